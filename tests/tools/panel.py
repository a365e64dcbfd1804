"""Train one setting on five sets of real motion, and print one table.

    python tests/tools/panel.py [--seeds 1 2 3] [--corpora sentences coffee unseen few two]
        [--tree DIR] [--test] [--jobs 1] [-- OPTION VALUE ...]
    python tests/tools/panel.py --baselines [--corpora ...]      what the network must beat

sentences and coffee: 1,200 sentences of many takes of few people; unseen: 6 signs, tested on people
who are not in training; few: 25 signs, about six training takes each of many signers; two: 32
signs, two training takes each. What stands behind `--` goes to train_lite.py. --tree trains another
version of the four files, with its own defaults. test is scored with --test only, for the end.
few has 32 and 18 clips: with --test both are counted together, too. --baselines: the nearest
training clip, a linear layer and a recurrent network instead, both splits. Needs ../shared/data and
../shared/tools; without them it says so. About half an hour a seed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from baselines import gru, linear, nearest
from common import ROOT, SHARED, print_table

from config_lite import ScratchConfig

# source, options of make_real_corpus.py, epochs between validations
CORPORA = {
    "sentences": ("bsl16_holistic", ["--sentences", "1200"], 1),
    "coffee": ("asl_coffee_holistic", ["--sentences", "1200", "--grammar", "coffee"], 1),
    "unseen": ("asl6_persons", ["--unseen"], 2),
    "few": ("asl25_holistic170", [], 10),
    "two": ("asl_coffee_holistic", ["--takes", "2"], 50),
}


PROGRAM = SHARED.parent / "tools" / "make_real_corpus.py"


def make_corpus(name, folder):
    source, options, _ = CORPORA[name]
    words = [sys.executable, PROGRAM, "--source", SHARED / f"{source}.npz", "--out", folder]
    subprocess.run([*words, *options], check=True, stdout=subprocess.DEVNULL)


def train(tree, corpus, name, seed, options):
    """-> the run's figures: dev's history, and when each validation came, in seconds."""
    run = corpus.with_name(f"{name}_{seed}")
    words = [sys.executable, tree / "train_lite.py", "--data_dir", corpus, "--mt5_path="]
    words += ["--language", "en", "--seed", seed, "--output_dir", run]
    words += ["--val_interval", CORPORA[name][2], *options]
    began = time.monotonic()
    seconds = []
    with subprocess.Popen(
        [*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            if "| dev_loss" in line:
                seconds.append(time.monotonic() - began)
            last = line
    if process.returncode:
        sys.exit(f"{name}, seed {seed}: {last}")
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = json.loads((run / "best" / "metrics.json").read_text())
    # incl. starting up and validations
    reached = [s for s, line in zip(seconds, history) if line["exact_match"] >= 85]
    return {
        "run": run,
        "clips": clips_in(run / "predictions_dev.txt"),
        "dev": best["exact_match"],
        "end": history[-1]["exact_match"],
        "to_85": reached[0] if reached else None,
        "seconds": seconds[-1],
    }


def score_test(tree, corpus, run):
    """-> test's exact match and clips, by the run's best/."""
    words = [sys.executable, tree / "train_lite.py", "evaluate", run, "--split", "test"]
    words += ["--data_dir", corpus]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("exact_match "))
    return float(line.split()[1]), clips_in(run / "predictions_test.txt")


def clips_in(predictions):
    return predictions.read_text(encoding="utf-8").count("\n") - 1  # a head


def both_splits(run, score, clips):
    """dev and test counted as one."""
    return (score * clips + run["dev"] * run["clips"]) / (clips + run["clips"])


def shown(values):
    """Median and range of a list of figures."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def print_baselines(names):
    """Exact match of dev and test, a row a set and baseline; seed 1."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            corpus = Path(folder, name)
            make_corpus(name, corpus)
            config = ScratchConfig(data_dir=str(corpus), language="en", seed=1, num_workers=0)
            for baseline in (nearest, linear, gru):
                began = time.monotonic()
                found = baseline(config, corpus)
                dev = found["curve"][-1]["exact_match"]
                seconds = time.monotonic() - began
                figures = (dev, found["test"]["exact_match"], seconds)
                rows.append([name, baseline.__name__, *(f"{figure:.1f}" for figure in figures)])
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print_table(["corpus", "baseline", "dev", "test", "s"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA))
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--test", action="store_true", help="look at test, once, at the end")
    parser.add_argument("--baselines", action="store_true", help="what the network must beat")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    options = words[cut + 1 :]
    if not PROGRAM.exists():
        sys.exit(f"the real motion is not there: {PROGRAM}")
    if args.baselines:
        print_baselines(args.corpora)
        return
    head = ["corpus", "dev", "dev at the end", "s to 85 %", "s in all"]
    if args.test:
        head += ["test", "dev and test"]
    rows = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        for name in args.corpora:
            corpus = Path(folder, name)
            make_corpus(name, corpus)
            jobs = []
            for seed in args.seeds:
                jobs.append(pool.submit(train, args.tree, corpus, name, seed, options))
            runs = [job.result() for job in jobs]
            row = [name]
            for key in ("dev", "end", "to_85", "seconds"):
                row.append(shown([run[key] for run in runs]))
            if args.test:
                scores = [score_test(args.tree, corpus, run["run"]) for run in runs]
                row.append(shown([score for score, _ in scores]))
                row.append(shown([both_splits(run, *s) for run, s in zip(runs, scores)]))
            rows.append(row)
            print(" | ".join(row), file=sys.stderr, flush=True)  # each as soon as it is there
    print_table(head, rows)


if __name__ == "__main__":
    main()
