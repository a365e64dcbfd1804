"""What each fix is worth: a row puts one original fault back, or takes one choice out, and trains.

    python tests/tools/ablations.py                        every row of "rows" on the demo, 3 seeds
    python tests/tools/ablations.py shifted no_position    these rows; --help names all
    python tests/tools/ablations.py --corpus DIR --language en --steps 1000
    python tests/tools/ablations.py freezing               pre-trained on text, then on poses
    python tests/tools/ablations.py fewer --corpus DIR     10, 30, 100 % of the clips, and baselines
    python tests/tools/ablations.py transfer --corpus DIR --other DIR    init_from, 10 % of clips
    python tests/tools/ablations.py --smoke                a few steps: does each row run, and bite?

Each run is a process of its own, which patches the product (faults.py) before it trains to the end
of
its schedule, and fails unless the patch took effect. A finished run is a line of --results,
learning
curve included, and is not run again. The table has dev figures of the schedule's end, test figures
of
the run's best/.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from baselines import VALIDATIONS, gru, nearest
from common import PROOFS, ROOT, SHARED, NotApplicable, cell, count_clips, load_split
from common import table as markdown_table
from faults import (
    all_but_encoder,
    freezing,
    graph_layers,
    hands_in_body_scale,
    head_only,
    leak_tail,
    no_convolution,
    no_decoder_position,
    no_velocities,
    original_front_end,
    original_policy,
    poses_at_unit_scale,
    read_padding,
    repeat_last_frame,
    score_raw_text,
    shift_labels_again,
    warm_up_late,
)
from pretraining import BLOCKS, pretrain

import datasets_lite
import train_lite
from config_lite import DemoConfig, InferenceConfig, ScratchConfig
from datasets_lite import load_dataset_file
from models_lite import SignLanguageLite

CSL_DAILY = SHARED / "csl_daily_labels" / "labels.train"
CURVE = (
    "step",
    "train_loss",
    "dev_loss",
    "dev_accuracy",
    "bleu4",
    "chrf",
    "exact_match",
    "shuffled_bleu4",
    "shuffled_exact_match",
    "unique_ratio",
    "gloss_wer",
    "clips_per_second",
)  # kept of a validation

# ---------------------------------------------------------------------- the rows


def reference(config, folder):
    """Train the product as it is by now; its validations are the curve, best/ gives the test
    scores.
    """
    if train_lite.train(config, InferenceConfig()):
        raise RuntimeError("training stopped")
    model, data = SignLanguageLite.from_pretrained(folder / "best"), load_split(config, "test")
    data.encode = model.codec.encode
    test, _ = train_lite.evaluate(model, train_lite.make_loader(data, 16), InferenceConfig())
    curve = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return {"curve": curve, "test": test}


@dataclass
class Row:
    """One line of a table: what it sets and patches, on which share of the training clips, by which
    model.
    """

    title: str
    options: dict = field(default_factory=dict)  # of the config
    patches: tuple = ()
    fraction: float = 1.0
    run: object = reference
    warm: bool = False  # starts from a run on --other
    pretrained: bool = False  # starts from the mT5 that `pretrain` made


ROWS = {
    "reference": Row("the reference"),
    "shifted": Row("labels shifted twice", patches=(shift_labels_again,)),
    "original_freezing": Row("original freezing", patches=(freezing(original_policy),)),
    "all_frozen": Row("all of mT5 frozen but its head", patches=(freezing(head_only),)),
    "encoder_frozen": Row("encoder frozen", patches=(freezing(all_but_encoder),)),
    "original_front_end": Row(
        "original front-end, as wide beside d_model", patches=original_front_end(16)
    ),
    "graph": Row("graph layers instead of flattened joints", patches=(graph_layers,)),
    "no_convolution": Row("no temporal convolution", patches=(no_convolution,)),
    "no_position": Row("no position in the encoder", {"position_encoding": "none"}),
    "unit_scale": Row("poses not scaled down beside the position", patches=(poses_at_unit_scale,)),
    "no_decoder_position": Row("no position in the decoder", patches=(no_decoder_position,)),
    "learned_position": Row("learned position", {"position_encoding": "learned"}),
    "smoothing": Row("label smoothing 0.1", {"label_smoothing": 0.1}),
    "no_ctc": Row("CTC off", {"ctc_weight": 0.0}),
    "stride_1": Row("temporal stride 1", {"temporal_stride": 1}),
    "augmentation": Row("augmentation off", {"augment": False}),
    "rate_2e-4": Row("learning rate 2e-4", {"learning_rate": 2e-4}),
    "rate_5e-4": Row("learning rate 5e-4", {"learning_rate": 5e-4}),
    "rate_2e-3": Row("learning rate 2e-3", {"learning_rate": 2e-3}),
    "late_warm_up": Row("warm-up one epoch late", patches=(warm_up_late,)),
    "leaking_tail": Row("tail gradients leak", patches=(leak_tail,)),
    "raw_metric": Row("metric on raw text, not NFKC", patches=(score_raw_text,)),
    "batch_dependent": Row(
        "padding repeats the last frame, BatchNorm", patches=(repeat_last_frame, read_padding)
    ),
    "hands_in_body_scale": Row("hands not at their own scale", patches=(hands_in_body_scale,)),
    "no_velocities": Row("no velocities", patches=(no_velocities,)),
}
GROUPS = {"rows": list(ROWS)}
ROWS |= {
    # two hours a run: by its name alone
    "original_front_end_wide": Row(
        "original front-end, full width", patches=original_front_end(64)
    ),
    "text_original": Row(
        "pre-trained on text: original freezing",
        {"freeze_decoder_layers": 0},
        (freezing(original_policy),),
        pretrained=True,
    ),
    "text_review": Row(
        "pre-trained on text: half of the decoder frozen (review)",
        {"freeze_decoder_layers": BLOCKS // 2},
        pretrained=True,
    ),
    "text_nothing": Row(
        "pre-trained on text: nothing frozen", {"freeze_decoder_layers": 0}, pretrained=True
    ),
    "text_encoder": Row(
        "pre-trained on text: encoder frozen",
        {"freeze_decoder_layers": 0},
        (freezing(all_but_encoder),),
        pretrained=True,
    ),
    "text_unit_scale": Row(
        "pre-trained on text: review's freezing, poses not scaled down",
        {"freeze_decoder_layers": BLOCKS // 2},
        (poses_at_unit_scale,),
        pretrained=True,
    ),
    "text_none": Row("the same depth from scratch", {"num_layers": BLOCKS}),
}
GROUPS["freezing"], GROUPS["fewer"] = [name for name in ROWS if name.startswith("text_")], []
for percent in (10, 30, 100):
    share, name = {"fraction": percent / 100}, f"fewer_{percent}"
    ROWS |= {
        f"{name}_nearest": Row(
            f"{percent} % of the clips, 1-nearest neighbour", run=nearest, **share
        ),
        f"{name}_gru": Row(f"{percent} % of the clips, bidirectional GRU", run=gru, **share),
    }
    ROWS |= (
        {name: Row(f"{percent} % of the clips, the reference", **share)} if percent < 100 else {}
    )
    GROUPS["fewer"] += [f"{name}_nearest", f"{name}_gru", name if percent < 100 else "reference"]
ROWS["transfer"] = Row("10 % of the clips, from a run on the other corpus", fraction=0.1, warm=True)
GROUPS["transfer"] = ["fewer_10", "transfer"]


# ---------------------------------------------------------------------- one run, in its own process


def subset(source, folder, fraction, job):
    """A share of a corpus's training clips, even over its sorted texts; for --smoke, few clips a
    split.
    """
    source, rng = Path(source), random.Random(job["seed"])
    folder.mkdir(parents=True)
    (folder / "pose_format").symlink_to(
        (source / "pose_format").resolve(), target_is_directory=True
    )
    for split in ("train", "dev", "test"):
        entries = list(load_dataset_file(source / f"labels.{split}").items())
        rng.shuffle(entries)
        entries.sort(key=lambda item: item[1]["text"])
        wanted = (72 if split == "train" else 16) if job["smoke"] else len(entries)
        count = max(1, round(wanted * (fraction if split == "train" else 1)))
        chosen = dict(entries[int((i + rng.random()) * len(entries) / count)] for i in range(count))
        (folder / f"labels.{split}").write_text(json.dumps(chosen), encoding="utf-8")
    return folder


def make_config(job, row, data_dir, folder):
    """-> (the row's config, what it changes). NotApplicable where that leaves the reference."""
    base = (DemoConfig if job["corpus"] == "demo" else ScratchConfig)(
        **{
            "data_dir": str(data_dir),
            "language": job["language"],
            "output_dir": str(folder),
            "num_workers": 0,
            "device": "cpu",
            "seed": job["seed"],
            "max_steps": job["steps"],
            **job["settings"],
        }
    )
    options = row.options | ({"mt5_path": job["mt5"]} if row.pretrained else {})
    before = {key: getattr(base, key) for key in options}
    changes = [
        f"{key} {before[key]!r} -> {new!r}" for key, new in options.items() if before[key] != new
    ]
    if options and not changes:
        raise NotApplicable(f"the reference has {options}")
    config = replace(base, **options)
    epoch = math.ceil(count_clips(config) / (config.batch_size * config.gradient_accumulation))
    config.val_interval = max(1, round(config.max_steps / VALIDATIONS / epoch))
    return config, changes


def first_run(job, folder):
    """The reference on all of --other, where a warm run starts; kept -> its best/."""
    data_dir, folder = (
        job["other"],
        (folder if job["smoke"] else Path(job["work"]) / "first") / label(job),
    )
    if job["smoke"]:
        data_dir = subset(data_dir, folder / "corpus", 1.0, job)
    config, _ = make_config(job, ROWS["reference"], data_dir, folder / "run")
    if train_lite.train(config, InferenceConfig()):
        raise RuntimeError("training stopped")
    return folder / "run" / "best"


def work(job):
    """One run in this process; its result goes to the file job["out"]."""
    if job["row"] == "pretrain":
        labels = [Path(job["data_dir"]) / "labels.train", CSL_DAILY]
        texts = []
        for path in labels[: 1 + (job["language"] == "zh" and CSL_DAILY.is_file())]:
            found = [entry["text"] for entry in load_dataset_file(path).values()]
            print(f"{len(found):,} texts of {path.parent.name}", flush=True)
            texts += found
        return pretrain(Path(job["mt5"]), texts, 4 if job["smoke"] else job["pretrain"])
    row, result, data_dir = ROWS[job["row"]], {key: job[key] for key in KEY}, job["data_dir"]
    with tempfile.TemporaryDirectory(dir=job["work"]) as folder:
        folder = Path(folder)
        try:
            if row.fraction < 1 or job["smoke"]:
                data_dir = subset(data_dir, folder / "corpus", row.fraction, job)
            config, changes = make_config(job, row, data_dir, folder / "run")
            config.init_from = str(first_run(job, folder)) if row.warm else ""
            for patch in row.patches:
                patch()
            wall, cpu = time.monotonic(), time.process_time()
            result |= row.run(config, folder / "run")
            result |= {
                "seconds": time.process_time() - cpu,
                "wall_seconds": time.monotonic() - wall,
            }
            if row.patches and not PROOFS:
                raise AssertionError("the patch was never reached")
            result["curve"] = [{key: m[key] for key in CURVE if key in m} for m in result["curve"]]
            result["proof"] = "; ".join(changes + PROOFS)
        except NotApplicable as reason:
            result["note"] = str(reason)
    Path(job["out"]).write_text(json.dumps(result), encoding="utf-8")


# ---------------------------------------------------------------------- all runs, and the table

KEY = (
    "row",
    "corpus",
    "other",
    "mt5",
    "blocks",
    "seed",
    "steps",
    "settings",
    "smoke",
)  # tells runs apart


def identity(job):
    return json.dumps([job[key] for key in KEY])


def label(job):
    return f"{job['row']}-{job['corpus']}-{job['seed']}-{zlib.crc32(identity(job).encode()):08x}"


def run_job(job):
    """A subprocess of this script on one core -> its result. Raises RuntimeError with the end of
    its log.
    """
    log = Path(job["work"]) / "logs" / f"{label(job)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    threads, out = (
        "2" if job["row"] == "pretrain" else "1",
        log.with_suffix(".json"),
    )  # it runs alone
    command = [sys.executable, __file__, "--worker", json.dumps(job | {"out": str(out)})]
    with open(log, "w") as file:
        code = subprocess.run(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        ).returncode
    if code:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-12:])
        raise RuntimeError(f"{label(job)} failed; {log} ends:\n{end}")
    return json.loads(out.read_text(encoding="utf-8")) if job["row"] != "pretrain" else None


def make_jobs(args, names):
    """One dict a run, seed by seed, so that a table is there early."""
    jobs, common = (
        [],
        {
            "language": args.language,
            "steps": args.steps,
            "settings": args.settings,
            "smoke": args.smoke,
            "work": str(args.work),
            "pretrain": args.pretrain,
            "blocks": BLOCKS,
        },
    )
    pairs = [(args.corpus, args.other, names)]
    if any(ROWS[name].warm for name in names):
        pairs.append((args.other, args.corpus, GROUPS["transfer"]))  # and the other way about
    for seed in range(42, 42 + args.seeds):
        for data_dir, other, name in ((*pair[:2], name) for pair in pairs for name in pair[2]):
            mt5 = args.work / f"mt5-{data_dir.name}-{BLOCKS}-{args.pretrain}"
            first = str(other) if ROWS[name].warm else ""
            jobs.append(
                common
                | {
                    "row": name,
                    "seed": seed,
                    "data_dir": str(data_dir),
                    "corpus": data_dir.name,
                    "other": first,
                    "mt5": str(mt5) if ROWS[name].pretrained else "",
                }
            )
    return jobs


def run_all(jobs, results, args):
    """Run what has no result yet and append each as it ends -> number of failures."""
    todo, failures = [job for job in jobs if identity(job) not in results], 0
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    stamp = {"commit": commit, "torch": torch.__version__, "transformers": transformers.__version__}
    for mt5, job in {job["mt5"]: job for job in todo if job["mt5"]}.items():
        if not Path(mt5, "model.safetensors").is_file():
            print(f"pre-training {mt5} on text", flush=True)
            run_job(job | {"row": "pretrain"})
    with ThreadPoolExecutor(args.jobs) as pool:
        for number, future in enumerate(
            as_completed([pool.submit(run_job, job) for job in todo]), 1
        ):
            try:
                result = future.result() | stamp | {"date": time.strftime("%Y-%m-%d %H:%M")}
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                failures += 1
                continue
            with open(args.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            results[identity(result)] = result
            end = result.get("note") or f"{result['seconds']:.0f} s; {result['proof']}"
            name = f"{result['row']}, {result['corpus']}, seed {result['seed']}"
            print(f"{number}/{len(todo)} {name}: {end}", flush=True)
    return failures


def steps_to(goal, result):
    """The step of a run's first validation at so much exact match."""
    for metrics in result["curve"]:
        if metrics["exact_match"] >= goal:
            return metrics["step"]
    return math.inf


def table(jobs, results):
    """Markdown, a line a row."""
    heads = [
        "row",
        "exact match, dev",
        "test",
        "BLEU-4, test",
        "with poses exchanged",
        "dev nll",
        "steps to 50 %",
        "to 90 %",
        "CPU seconds",
    ]
    names = dict.fromkeys(job["row"] for job in jobs)
    rows = []
    for name in names:
        wanted = [identity(job) for job in jobs if job["row"] == name]
        found = [results[key] for key in wanted if key in results]
        rows.append(table_row(name, found, len(wanted)))
    return "\n".join(markdown_table(heads, rows))


def table_row(name, found, wanted):
    """The cells of one row, from its runs that are done."""
    title = ROWS[name].title
    if not found:
        return [title, "no run", *[""] * 7]
    if "note" in found[0]:
        return [title, found[0]["note"], *[""] * 7]
    if len(found) < wanted:
        title += f" [{len(found)} of {wanted} seeds]"
    ends = [result["curve"][-1] for result in found]
    tests = [result["test"] for result in found]
    return [
        title,
        cell([end["exact_match"] for end in ends]),
        cell([test["exact_match"] for test in tests]),
        cell([test["bleu4"] for test in tests]),
        cell([test.get("shuffled_bleu4", math.nan) for test in tests]),
        cell([end.get("dev_loss", math.nan) for end in ends], 3),
        cell([steps_to(50, result) for result in found], 0),
        cell([steps_to(90, result) for result in found], 0),
        cell([result["seconds"] for result in found], 0),
    ]


def parse():
    """-> (arguments, names of the rows)."""
    listed = "\n".join(f"{group}: {' '.join(names)}" for group, names in GROUPS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=listed, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", default=["rows"], help="rows, or groups of them; see below"
    )
    parser.add_argument("--corpus", default="demo", help="demo, or a data_dir")
    parser.add_argument("--other", type=Path, help="the other corpus of transfer")
    parser.add_argument("--language", default="zh")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=0, help="optimiser steps; 0 = the reference's own"
    )
    parser.add_argument("--pretrain", type=int, default=3000, help="steps on text, for freezing")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=JSON", help="for every row"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("ablations.jsonl"), help="logs go beside it"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--smoke", action="store_true", help="4 steps on 72 clips, one seed")
    args = parser.parse_args()
    names = list(dict.fromkeys(n for name in args.names for n in GROUPS.get(name, [name])))
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}\n{listed}")
    if any(ROWS[name].warm for name in names) and not args.other:
        parser.error("transfer needs --other DIR")
    if args.smoke:
        args.seeds, args.steps, args.results = 1, 4, Path(tempfile.mkdtemp(), "smoke.jsonl")
    args.steps = (
        args.steps
        or (DemoConfig if Path(args.corpus).name == "demo" else ScratchConfig)().max_steps
    )
    args.settings = {
        name: json.loads(value) for name, value in (item.split("=", 1) for item in args.set)
    }
    args.work = args.results.with_suffix(".work").resolve()
    args.corpus = args.work / "demo" if args.corpus == "demo" else Path(args.corpus).resolve()
    args.other = args.other and args.other.resolve()
    return args, names


def main():
    if sys.argv[1:2] == ["--worker"]:
        return work(json.loads(sys.argv[2]))
    args, names = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.corpus == args.work / "demo" and not args.corpus.exists():
        datasets_lite.make_demo_corpus(args.corpus)
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.is_file() else []
    results = {identity(result): result for result in map(json.loads, lines)}
    jobs = make_jobs(args, names)
    failures = run_all(jobs, results, args)
    for corpus in dict.fromkeys(job["corpus"] for job in jobs):
        print(
            f"\n{', '.join([corpus, *args.set])}, {args.steps} steps, {args.seeds} seeds:\n\n"
            + table([job for job in jobs if job["corpus"] == corpus], results)
        )
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
