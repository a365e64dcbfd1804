"""What each fix is worth.

A row of the table puts one original fault back, or takes one choice out, and trains to its end.

    python tests/tools/ablations.py                      the group "rows" on the demo, three seeds
    python tests/tools/ablations.py shifted no_position  these rows; --help names all
    python tests/tools/ablations.py --corpus DIR --language en --steps 1000
    python tests/tools/ablations.py freezing             mT5 pre-trained on text, then fine-tuned
    python tests/tools/ablations.py fewer --corpus DIR   10, 30, 100 % of the clips; 1-NN, a GRU
    python tests/tools/ablations.py transfer --corpus DIR --other DIR
                                                         init_from, both ways, 10 % of the clips
    python tests/tools/ablations.py --smoke              a few steps on a few clips:
                                                         does each row run, and bite?

Each run is a process of its own, which patches the product before it trains (see faults.py) and
fails unless the patch took effect. A finished run is a line of --results, learning curve included,
and is not run again. The table has dev figures of the schedule's end, test figures of the run's
best/.
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

import common
import faults
import torch
import transformers
from baselines import gru, nearest
from common import NotApplicable, median_and_range
from pretraining import BLOCKS, pretrain

import train_lite
from config_lite import DemoConfig, InferenceConfig, ScratchConfig
from datasets_lite import load_dataset_file, make_demo_corpus
from models_lite import SignLanguageLite

FIRST_SEED = 42
SMOKE_STEPS = 4
SMOKE_CLIPS = {"train": 72, "dev": 16, "test": 16}
# what is kept of a validation
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
)
# what tells runs apart
KEY = ("row", "corpus", "other", "mt5", "blocks", "seed", "steps", "settings", "smoke")


# ---------------------------------------------------------------------- the rows


def reference(config, folder):
    """Train the product as it is by now -> its validations as the curve, test scores of best/."""
    if train_lite.train(config, InferenceConfig()):
        raise RuntimeError("training stopped")
    model = SignLanguageLite.from_pretrained(folder / "best")
    data = common.load_split(config, "test")
    data.encode = model.codec.encode
    loader = train_lite.make_loader(data)
    test, _ = train_lite.evaluate(model, loader, InferenceConfig())
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {"curve": [json.loads(line) for line in lines], "test": test}


@dataclass
class Row:
    """A line of a table: what it sets and patches, on which share of the clips, by which model."""

    title: str
    options: dict = field(default_factory=dict)  # of the config
    patches: tuple = ()
    fraction: float = 1.0  # of the training clips
    run: object = reference  # or a baseline
    warm: bool = False  # starts from a run on --other
    pretrained: bool = False  # starts from the mT5 that pretraining.py makes


ORIGINAL_FREEZING = faults.freezing(faults.original_policy)
HEAD_ONLY = faults.freezing(faults.head_only)
ENCODER_FROZEN = faults.freezing(faults.all_but_encoder)
NOTHING_FROZEN = {"freeze_decoder_layers": 0}
REVIEWS_FREEZING = {"freeze_decoder_layers": BLOCKS // 2}

FAULT_ROWS = {
    "reference": Row("the reference"),
    "shifted": Row("labels shifted twice", patches=(faults.shift_labels_again,)),
    "original_freezing": Row("original freezing", patches=(ORIGINAL_FREEZING,)),
    "all_frozen": Row("all of mT5 frozen but its head", patches=(HEAD_ONLY,)),
    "encoder_frozen": Row("encoder frozen", patches=(ENCODER_FROZEN,)),
    "original_front_end": Row(
        "original front-end, as wide beside d_model", patches=(faults.original_front_end(16),)
    ),
    "graph": Row("graph layers instead of flattened joints", patches=(faults.graph_layers,)),
    "no_convolution": Row("no temporal convolution", patches=(faults.no_convolution,)),
    "no_position": Row("no position in the encoder", {"position_encoding": "none"}),
    "unit_scale": Row(
        "poses not scaled down beside the position", patches=(faults.poses_at_unit_scale,)
    ),
    "no_decoder_position": Row("no position in the decoder", patches=(faults.no_decoder_position,)),
    "learned_position": Row("learned position", {"position_encoding": "learned"}),
    "smoothing": Row("label smoothing 0.1", {"label_smoothing": 0.1}),
    "no_ctc": Row("CTC off", {"ctc_weight": 0.0}),
    "stride_1": Row("temporal stride 1", {"temporal_stride": 1}),
    "augmentation": Row("augmentation off", {"augment": False}),
    "rate_2e-4": Row("learning rate 2e-4", {"learning_rate": 2e-4}),
    "rate_5e-4": Row("learning rate 5e-4", {"learning_rate": 5e-4}),
    "rate_2e-3": Row("learning rate 2e-3", {"learning_rate": 2e-3}),
    "late_warm_up": Row("warm-up one epoch late", patches=(faults.warm_up_late,)),
    "leaking_tail": Row("tail gradients leak", patches=(faults.leak_tail,)),
    "raw_metric": Row("metric on raw text, not NFKC", patches=(faults.score_raw_text,)),
    "batch_dependent": Row(
        "padding repeats the last frame, BatchNorm",
        patches=(faults.repeat_last_frame, faults.read_padding),
    ),
    "hands_in_body_scale": Row(
        "hands not at their own scale", patches=(faults.hands_in_body_scale,)
    ),
    "no_velocities": Row("no velocities", patches=(faults.no_velocities,)),
    "no_bones": Row("no bones", patches=(faults.no_bones,)),
    "no_moving": Row("the body stays in its box", patches=(faults.body_in_its_box,)),
    "no_centring": Row("features not centred", patches=(faults.no_centring,)),
}
# in no group, for it takes two hours a run
WIDE_ROWS = {
    "original_front_end_wide": Row(
        "original front-end, full width", patches=(faults.original_front_end(64),)
    ),
}
FREEZING_ROWS = {
    "text_original": Row(
        "pre-trained on text: original freezing",
        NOTHING_FROZEN,
        patches=(ORIGINAL_FREEZING,),
        pretrained=True,
    ),
    "text_review": Row(
        "pre-trained on text: half of the decoder frozen (review)",
        REVIEWS_FREEZING,
        pretrained=True,
    ),
    "text_nothing": Row("pre-trained on text: nothing frozen", NOTHING_FROZEN, pretrained=True),
    "text_encoder": Row(
        "pre-trained on text: encoder frozen",
        NOTHING_FROZEN,
        patches=(ENCODER_FROZEN,),
        pretrained=True,
    ),
    "text_unit_scale": Row(
        "pre-trained on text: review's freezing, poses not scaled down",
        REVIEWS_FREEZING,
        patches=(faults.poses_at_unit_scale,),
        pretrained=True,
    ),
    "text_none": Row("the same depth from scratch", {"num_layers": BLOCKS}),
}
FEWER_ROWS = {
    "fewer_10_nearest": Row("10 % of the clips, 1-nearest neighbour", run=nearest, fraction=0.1),
    "fewer_10_gru": Row("10 % of the clips, bidirectional GRU", run=gru, fraction=0.1),
    "fewer_10": Row("10 % of the clips, the reference", fraction=0.1),
    "fewer_30_nearest": Row("30 % of the clips, 1-nearest neighbour", run=nearest, fraction=0.3),
    "fewer_30_gru": Row("30 % of the clips, bidirectional GRU", run=gru, fraction=0.3),
    "fewer_30": Row("30 % of the clips, the reference", fraction=0.3),
    "fewer_100_nearest": Row("100 % of the clips, 1-nearest neighbour", run=nearest),
    "fewer_100_gru": Row("100 % of the clips, bidirectional GRU", run=gru),
}
TRANSFER_ROWS = {
    "transfer": Row("10 % of the clips, from a run on the other corpus", fraction=0.1, warm=True),
}
ROWS = FAULT_ROWS | WIDE_ROWS | FREEZING_ROWS | FEWER_ROWS | TRANSFER_ROWS
GROUPS = {
    "rows": list(FAULT_ROWS),
    "freezing": list(FREEZING_ROWS),
    "fewer": [*FEWER_ROWS, "reference"],
    "transfer": ["fewer_10", "transfer"],
}


# ---------------------------------------------------------------------- one run, in its own process


def work(job):
    """One run in this process; its result goes to the file job["out"]."""
    row = ROWS[job["row"]]
    result = {key: job[key] for key in KEY}
    with tempfile.TemporaryDirectory(dir=job["work"]) as folder:
        try:
            result |= run_row(job, row, Path(folder))
        except NotApplicable as reason:
            result["note"] = str(reason)
    Path(job["out"]).write_text(json.dumps(result), encoding="utf-8")


def run_row(job, row, folder):
    """Patch and train -> curve, test scores, seconds, and the proof that the row is another."""
    data_dir = job["data_dir"]
    if row.fraction < 1 or job["smoke"]:
        data_dir = subset(data_dir, folder / "corpus", row.fraction, job)
    config, changes = make_config(job, row, data_dir, folder / "run")
    if row.warm:
        config.init_from = str(first_run(job, folder))
    for patch in row.patches:
        patch()
    wall = time.monotonic()
    cpu = time.process_time()
    result = row.run(config, folder / "run")
    result["seconds"] = time.process_time() - cpu
    result["wall_seconds"] = time.monotonic() - wall
    if row.patches and not common.NOTES:
        raise AssertionError("the patch was never reached")
    result["curve"] = [shorten(validation) for validation in result["curve"]]
    result["proof"] = "; ".join(changes + common.NOTES)
    return result


def shorten(validation):
    return {key: validation[key] for key in CURVE if key in validation}


def subset(source, folder, fraction, job):
    """A share of a corpus's training clips, even over its sorted texts; few clips for --smoke."""
    source = Path(source)
    rng = random.Random(job["seed"])
    folder.mkdir(parents=True)
    poses = (source / "pose_format").resolve()
    (folder / "pose_format").symlink_to(poses, target_is_directory=True)
    for split in ("train", "dev", "test"):
        entries = list(load_dataset_file(source / f"labels.{split}").items())
        rng.shuffle(entries)
        entries.sort(key=lambda item: item[1]["text"])
        wanted = SMOKE_CLIPS[split] if job["smoke"] else len(entries)
        if split == "train":
            wanted = max(1, round(wanted * fraction))
        chosen = {}
        for i in range(wanted):
            # one of each of so many equal stretches
            name, entry = entries[int((i + rng.random()) * len(entries) / wanted)]
            chosen[name] = entry
        (folder / f"labels.{split}").write_text(json.dumps(chosen), encoding="utf-8")
    return folder


def make_config(job, row, data_dir, folder):
    """-> (the row's config, what it changes). Raises NotApplicable if that is the reference."""
    settings = {
        "data_dir": str(data_dir),
        "language": job["language"],
        "output_dir": str(folder),
        "num_workers": 0,
        "device": "cpu",
        "seed": job["seed"],
        "max_steps": job["steps"],
    }
    settings |= job["settings"]
    base = config_kind(job["corpus"])(**settings)
    options = dict(row.options)
    if row.pretrained:
        options["mt5_path"] = job["mt5"]
    changes = []
    for key, new in options.items():
        before = getattr(base, key)
        if before != new:
            changes.append(f"{key} {before!r} -> {new!r}")
    if options and not changes:
        raise NotApplicable(f"the reference has {options}")
    config = replace(base, **options)
    window = config.batch_size * config.gradient_accumulation
    steps_per_epoch = math.ceil(common.count_clips(config) / window)
    interval = config.max_steps / common.VALIDATIONS / steps_per_epoch
    config.val_interval = max(1, round(interval))
    return config, changes


def config_kind(corpus):
    """The defaults that go with a corpus of this name."""
    if corpus == "demo":
        return DemoConfig
    return ScratchConfig


def first_run(job, folder):
    """The reference on all of --other, where a warm run starts -> its best/.

    The run is kept, and gone on with or taken as it is the next time; but not with --smoke.
    """
    data_dir = job["other"]
    if job["smoke"]:
        folder = folder / label(job)
        data_dir = subset(data_dir, folder / "corpus", 1.0, job)
    else:
        folder = Path(job["work"]) / "first" / label(job)
    config, _ = make_config(job, ROWS["reference"], data_dir, folder / "run")
    if train_lite.train(config, InferenceConfig()):
        raise RuntimeError("training stopped")
    return folder / "run" / "best"


def work_on_text(job):
    """Pre-train the mT5 that pretrained rows start from, on the texts of this corpus and more."""
    files = [Path(job["data_dir"]) / "labels.train"]
    if job["language"] == "zh" and common.CSL_DAILY_LABELS.is_file():
        files.append(common.CSL_DAILY_LABELS)
    texts = []
    for file in files:
        found = common.read_texts(file)
        print(f"{len(found):,} texts of {file.parent.name}", flush=True)
        texts += found
    pretrain(Path(job["mt5"]), texts, SMOKE_STEPS if job["smoke"] else job["pretrain"])


# ---------------------------------------------------------------------- all runs


def identity(job):
    """What a result is known by; of a job and of its result the same."""
    return json.dumps([job[key] for key in KEY])


def label(job):
    digest = zlib.crc32(identity(job).encode())
    return f"{job['row']}-{job['corpus']}-{job['seed']}-{digest:08x}"


def make_jobs(args, names):
    """One dict a run, seed by seed, so that a table is there early."""
    runs = [(args.corpus, args.other, name) for name in names]
    if any(ROWS[name].warm for name in names):  # and the other way about
        runs += [(args.other, args.corpus, name) for name in GROUPS["transfer"]]
    jobs = []
    for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
        for data_dir, other, name in runs:
            jobs.append(make_job(args, seed, data_dir, other, name))
    return jobs


def make_job(args, seed, data_dir, other, name):
    """All that a run's process must know, as plain data."""
    row = ROWS[name]
    mt5 = args.work / f"mt5-{data_dir.name}-{BLOCKS}-{args.pretrain}"
    return {
        "row": name,
        "corpus": data_dir.name,
        "other": str(other) if row.warm else "",
        "mt5": str(mt5) if row.pretrained else "",
        "blocks": BLOCKS,
        "seed": seed,
        "steps": args.steps,
        "settings": args.settings,
        "smoke": args.smoke,
        "language": args.language,
        "pretrain": args.pretrain,
        "data_dir": str(data_dir),
        "work": str(args.work),
    }


def run_process(job, task, threads):
    """A process of this script -> where it may have written a result.

    Raises RuntimeError with the end of its log.
    """
    log = Path(job["work"]) / "logs" / f"{label(job)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    out = log.with_suffix(".json")
    command = [sys.executable, __file__, task, json.dumps(job | {"out": str(out)})]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "w") as file:
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if ended.returncode:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-12:])
        raise RuntimeError(f"{label(job)} failed; {log} ends:\n{end}")
    return out


def run_job(job):
    """-> the result of one run, on one core."""
    out = run_process(job, "--worker", threads=1)
    return json.loads(out.read_text(encoding="utf-8"))


def pretrain_what_is_missing(jobs):
    """Each mT5 that these jobs start from and that is not there yet, one after another."""
    for job in jobs:
        mt5 = job["mt5"]
        if mt5 and not Path(mt5, "model.safetensors").is_file():
            print(f"pre-training {mt5} on text", flush=True)
            # it runs alone, so it may have both cores
            run_process(job | {"row": "pretrain"}, "--pretrain-worker", threads=2)


def run_all(jobs, results, args):
    """Run what has no result yet and append each as it ends -> number of failures."""
    todo = [job for job in jobs if identity(job) not in results]
    pretrain_what_is_missing(todo)
    stamp = versions()
    failures = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run_job, job) for job in todo]
        for number, future in enumerate(as_completed(futures), 1):
            try:
                result = future.result()
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                failures += 1
                continue
            result |= stamp
            result["date"] = time.strftime("%Y-%m-%d %H:%M")
            with open(args.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            results[identity(result)] = result
            print(f"{number}/{len(todo)} {describe(result)}", flush=True)
    return failures


def versions():
    """Which code a result is of."""
    command = ["git", "-C", common.ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def describe(result):
    """A line for the eye."""
    name = f"{result['row']}, {result['corpus']}, seed {result['seed']}"
    if "note" in result:
        return f"{name}: {result['note']}"
    return f"{name}: {result['seconds']:.0f} s; {result['proof']}"


# ---------------------------------------------------------------------- the table

HEAD = [
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


def table_rows(jobs, results):
    """-> the cells of each row that the jobs name."""
    keys = {}  # a row's identities
    for job in jobs:
        keys.setdefault(job["row"], []).append(identity(job))
    rows = []
    for name, wanted in keys.items():
        found = [results[key] for key in wanted if key in results]
        title = ROWS[name].title
        if not found:
            rows.append(with_empty_cells(title, "no run"))
        elif "note" in found[0]:
            rows.append(with_empty_cells(title, found[0]["note"]))
        else:
            if len(found) < len(wanted):
                title += f" [{len(found)} of {len(wanted)} seeds]"
            rows.append([title, *figures(found)])
    return rows


def with_empty_cells(*cells):
    return [*cells, *[""] * (len(HEAD) - len(cells))]


def figures(found):
    """The cells of a row's results behind its title."""
    ends = [result["curve"][-1] for result in found]
    tests = [result["test"] for result in found]
    return [
        median_and_range([end["exact_match"] for end in ends]),
        median_and_range([test["exact_match"] for test in tests]),
        median_and_range([test["bleu4"] for test in tests]),
        median_and_range([test.get("shuffled_bleu4", math.nan) for test in tests]),
        median_and_range([end.get("dev_loss", math.nan) for end in ends], 3),
        median_and_range([steps_to(50, result["curve"]) for result in found], 0),
        median_and_range([steps_to(90, result["curve"]) for result in found], 0),
        median_and_range([result["seconds"] for result in found], 0),
    ]


def steps_to(goal, curve):
    """The first validation with so many exact matches, in percent; infinity for none."""
    for validation in curve:
        if validation["exact_match"] >= goal:
            return validation["step"]
    return math.inf


# ---------------------------------------------------------------------- the command line


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=list_groups(), formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", default=["rows"], help="rows, or groups of them; see below")
    add("--corpus", default="demo", help="demo, or a data_dir")
    add("--other", type=Path, help="the other corpus of transfer")
    add("--language", default="zh")
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=0, help="optimiser steps; 0 = the reference's own")
    add("--pretrain", type=int, default=3000, help="steps on text, for freezing")
    add("--set", action="append", default=[], metavar="FIELD=JSON", help="for every row")
    add("--results", type=Path, default=Path("ablations.jsonl"), help="logs go beside it")
    add("--jobs", type=int, default=2, help="runs at a time, a core each")
    add("--smoke", action="store_true", help="4 steps on 72 clips, one seed")
    return parser


def list_groups():
    return "\n".join(f"{group}: {' '.join(names)}" for group, names in GROUPS.items())


def parse():
    """-> (arguments, names of the rows)."""
    parser = make_parser()
    args = parser.parse_args()
    names = []
    for name in args.names:
        names += GROUPS.get(name, [name])
    names = list(dict.fromkeys(names))  # each once
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}\n{list_groups()}")
    if any(ROWS[name].warm for name in names) and not args.other:
        parser.error("transfer needs --other DIR")
    if args.smoke:
        args.seeds = 1
        args.steps = SMOKE_STEPS
        args.results = Path(tempfile.mkdtemp(), "smoke.jsonl")
    if not args.steps:
        args.steps = config_kind(Path(args.corpus).name)().max_steps
    args.settings = {}
    for item in args.set:
        name, value = item.split("=", 1)
        args.settings[name] = json.loads(value)
    args.work = args.results.with_suffix(".work").resolve()
    if args.corpus == "demo":
        args.corpus = args.work / "demo"
    else:
        args.corpus = Path(args.corpus).resolve()
    if args.other:
        args.other = args.other.resolve()
    return args, names


def read_results(path):
    """{identity: result} of a results file, which need not be there."""
    if not path.is_file():
        return {}
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        results[identity(result)] = result
    return results


def main():
    args, names = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.corpus == args.work / "demo" and not args.corpus.exists():
        make_demo_corpus(args.corpus)
    results = read_results(args.results)
    jobs = make_jobs(args, names)
    failures = run_all(jobs, results, args)
    for corpus in dict.fromkeys(job["corpus"] for job in jobs):
        where = ", ".join([corpus, *args.set])
        print(f"\n{where}, {args.steps} steps, {args.seeds} seeds:\n")
        of_corpus = [job for job in jobs if job["corpus"] == corpus]
        common.print_table(HEAD, table_rows(of_corpus, results))
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
    elif sys.argv[1:2] == ["--pretrain-worker"]:
        work_on_text(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
