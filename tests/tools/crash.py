"""Kill a run at random moments until it is done, and compare it with one that nobody disturbed.

    python tests/tools/crash.py [--kills 50] [--seed 0] [--steps 800] [--processes 1]

Each kill is a SIGKILL between 0 and 3 s after the run began to train (every third one waits for a
file that is being written); then the same command goes on. At the end every parameter must be
equal, bit for bit, last.pt and best/ must have been readable after every kill, and metrics.jsonl
must tell the same story. With more processes all are killed at once. About 10 minutes on 2 cores.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT
from safetensors.torch import load_file

from datasets_lite import make_demo_corpus

LONGEST_WAIT = 20  # seconds for a file that is being written


def command(folder, name, steps):
    """The command line of one run; --augment and two loading processes: as random as a run gets."""
    options = {
        "--data_dir": folder / "corpus",
        "--mt5_path": "",
        "--output_dir": folder / name,
        "--max_steps": steps,
        "--batch_size": 4,
        "--gradient_accumulation": 3,
        "--d_model": 32,
        "--num_layers": 1,
        "--val_interval": 2,
        "--log_interval": 1,
        "--max_new_tokens": 8,
    }
    words = [sys.executable, str(ROOT / "train_lite.py"), "--augment"]
    words += [f"{option}={value}" for option, value in options.items()]
    return words


def start(arguments, processes):
    """The run's processes, as torchrun would start them; the first one's output is a pipe."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        started.append(
            subprocess.Popen(
                arguments,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | place,
            )
        )
    return started


def run_to_its_end(arguments, processes):
    run = start(arguments, processes)
    text = run[0].stdout.read()
    codes = [process.wait() for process in run]
    if any(codes):
        raise SystemExit(f"the run failed:\n{text[-2000:]}")


def kill_once(arguments, processes, out, rng, on_write):
    """Start the run, kill it after a random moment of training -> whether it was killed.

    It may be done before. on_write: wait for a file that is being written.
    """
    run = start(arguments, processes)
    first = run[0]
    for line in first.stdout:
        if line.startswith(("writing to", "resumed from")):
            break
    deadline = time.monotonic() + rng.uniform(0, 3)
    while first.poll() is None:
        now = time.monotonic()
        if not on_write and now >= deadline:
            break
        if on_write and (is_writing(out) or now > deadline + LONGEST_WAIT):
            break
        time.sleep(0.0005)
    for process in run:
        process.kill()
    first.stdout.read()
    return [process.wait() for process in run][0] < 0


def is_writing(out):
    """Whether there is a half-written file; a kill leaves it there."""
    return any(out.glob("*.part"))


def saved_step(out):
    """The step of last.pt, 0 where none was written yet. Fails where it or best/ is not whole."""
    best = find_best(out)
    if best:
        load_file(best / "model.safetensors")
        json.loads((best / "metrics.json").read_text(encoding="utf-8"))
    last = out / "last.pt"
    if not last.exists():
        return 0
    return torch.load(last, weights_only=True)["step"]


def find_best(out):
    """best/, or best.old, which is all there is between two renames, or None."""
    for name in ("best", "best.old"):
        if (out / name).exists():
            return out / name
    return None


def kill_again_and_again(folder, args):
    """-> how many of the kills left a half-written file."""
    rng = random.Random(args.seed)
    out = folder / "killed"
    arguments = command(folder, "killed", args.steps)
    writes = 0
    for kill in range(args.kills):
        on_write = kill % 3 == 2
        if not kill_once(arguments, args.processes, out, rng, on_write):
            raise SystemExit(f"the run was done after {kill} kills: give more --steps")
        if is_writing(out):
            writes += 1
        print(f"kill {kill + 1:3d}: last.pt at step {saved_step(out)}", flush=True)
    return writes


def story(state):
    """What metrics.jsonl tells that does not depend on time."""
    return [(line["step"], line["dev_loss"], line["bleu4"]) for line in state["history"]]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_demo_corpus(folder / "corpus", seed=0, splits={"train": 40, "dev": 6, "test": 2})
        run_to_its_end(command(folder, "whole", args.steps), args.processes)
        writes = kill_again_and_again(folder, args)
        run_to_its_end(command(folder, "killed", args.steps), args.processes)
        whole = torch.load(folder / "whole" / "last.pt", weights_only=True)
        killed = torch.load(folder / "killed" / "last.pt", weights_only=True)
    unequal = 0
    for name, value in whole["model"].items():
        if not torch.equal(value, killed["model"][name]):
            unequal += 1
    same_story = story(whole) == story(killed)
    print(
        f"{args.kills} kills, {writes} of them while a file was being written; "
        f"no checkpoint unreadable; {unequal} of {len(whole['model'])} parameters differ; "
        f"validations {'equal' if same_story else 'DIFFER'}; {time.monotonic() - started:.0f} s"
    )
    return 1 if unequal or not same_story else 0


if __name__ == "__main__":
    sys.exit(main())
