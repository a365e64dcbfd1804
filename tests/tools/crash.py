"""Kill a run at random moments until it is done, and compare it with one that nobody disturbed.

    python tests/tools/crash.py [--kills 50] [--seed 0]

Each kill is a SIGKILL between 0 and 3 s after the run began to train (every third one waits for a
file that is
being written); then the same command goes on. At the end every parameter must be equal, bit for
bit, last.pt and
best/ must have been readable after every kill, and metrics.jsonl must tell the same story. About 10
minutes on 2 cores.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT
from safetensors.torch import load_file

from datasets_lite import make_demo_corpus


def command(folder, name, steps):
    """The command line of one run; --augment and two loading processes make it as random as a run
    gets.
    """
    return [
        sys.executable,
        str(ROOT / "train_lite.py"),
        "--data_dir",
        str(folder / "corpus"),
        "--mt5_path=",
        "--output_dir",
        str(folder / name),
        "--max_steps",
        str(steps),
        "--batch_size",
        "4",
        "--augment",
        "--gradient_accumulation",
        "3",
        "--d_model",
        "32",
        "--num_layers",
        "1",
        "--val_interval",
        "2",
        "--log_interval",
        "1",
        "--max_new_tokens",
        "8",
    ]


def kill_once(arguments, out, rng, on_write):
    """Start the run, kill it after a random moment of training -> whether it was killed (it may be
    done before).
    """
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        for line in run.stdout:
            if line.startswith(("writing to", "resumed from")):
                break
        deadline = time.monotonic() + rng.uniform(0, 3)
        while time.monotonic() < deadline or on_write:
            if run.poll() is not None:
                break
            if on_write and list(out.glob("*.part")):
                break
            if time.monotonic() > deadline + 20:
                break
            time.sleep(0.0005)
        run.kill()
        run.stdout.read()
        return run.wait() < 0


def readable(out):
    """Whether last.pt and best/ (or best.old, between two renames) are whole; absent ones were not
    yet written.
    """
    if (out / "last.pt").exists():
        torch.load(out / "last.pt", weights_only=True)
    best = next((out / name for name in ("best", "best.old") if (out / name).exists()), None)
    if best:
        load_file(best / "model.safetensors")
        json.loads((best / "metrics.json").read_text(encoding="utf-8"))
    return (out / "last.pt").exists()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    rng, started = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_demo_corpus(folder / "corpus", seed=0, splits={"train": 40, "dev": 6, "test": 2})
        subprocess.run(command(folder, "whole", args.steps), check=True, stdout=subprocess.DEVNULL)
        out, kills, writes = folder / "killed", 0, 0
        while kills < args.kills:
            on_write = kills % 3 == 2
            if not kill_once(command(folder, "killed", args.steps), out, rng, on_write):
                raise SystemExit(f"the run was done after {kills} kills: give more --steps")
            kills, writes = kills + 1, writes + bool(list(out.glob("*.part")))
            step = torch.load(out / "last.pt", weights_only=True)["step"] if readable(out) else 0
            print(f"kill {kills:3d}: last.pt at step {step}", flush=True)
        subprocess.run(command(folder, "killed", args.steps), check=True, stdout=subprocess.DEVNULL)
        one, two = (
            torch.load(folder / run / "last.pt", weights_only=True) for run in ("whole", "killed")
        )
        unequal = [n for n in one["model"] if not torch.equal(one["model"][n], two["model"][n])]
        history = [
            [(m["step"], m["dev_loss"], m["bleu4"]) for m in state["history"]]
            for state in (one, two)
        ]
    print(
        f"{kills} kills, {writes} of them while a file was written; no checkpoint unreadable; "
        f"{len(unequal)} of {len(one['model'])} parameters differ; validations "
        f"{'equal' if history[0] == history[1] else 'DIFFER'}; {time.monotonic() - started:.0f} s"
    )
    return 1 if unequal or history[0] != history[1] else 0


if __name__ == "__main__":
    sys.exit(main())
