"""The loop and the commands.

    python train_lite.py [train]              train; without data of your own, on the built-in demo
    python train_lite.py check                look through the data without training
    python train_lite.py evaluate RUN         score a run's best model on a split
    python train_lite.py translate RUN CLIP [CLIP ...]

then `--field value` for any field of config_lite.py. Defaults below are TrainConfig's; training
from scratch (`--mt5_path ""`) has ScratchConfig's, the demo DemoConfig's. A run is a folder:
config.json, metrics.jsonl (a line a validation), predictions_dev.txt, last.pt (to go on from) and
best/ (to use, complete in itself).
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from sacrebleu.metrics import BLEU, CHRF
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BatchFeature
from transformers import get_cosine_with_min_lr_schedule_with_warmup_lr_rate as cosine_schedule
from transformers.hf_argparser import string_to_bool

from config_lite import (
    DEFAULT_DATA_DIR,
    NO_SPACES,
    ConfigError,
    DemoConfig,
    InferenceConfig,
    ScratchConfig,
    TrainConfig,
    language_code,
    make_config,
    set_instead,
)
from datasets_lite import (
    DataError,
    SignLanguageDataset,
    load_dataset_file,
    make_demo_corpus,
    naming,
    normalise,
    pad_poses,
    read_clip,
)
from models_lite import SignLanguageLite, find_best, make_codec, mt5_folder, to_json

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock on the run's folder, no peak memory of the process
    fcntl = None
    resource = None

# as usual with Muon, first layers, heads and tables stay with AdamW; so does the decoder, which was
# no better under Muon, and slower (tests/RESULTS.md)
MUON_LAYERS = ("fusion", "temporal", "proj", "mt5_model.encoder.block")
SAVE_EVERY = 15 * 60  # seconds; a longer epoch is saved within, too
EVAL_BATCH = 16  # clips per forward pass of an evaluation, at least
# In these fields a run may differ from the last.pt it goes on from: they do not shape the result.
# The last two are the budget, which may grow: `differences` has a rule for it.
FREE_FIELDS = """output_dir resume_from auto_resume num_workers device log_interval val_interval
use_tensorboard log_dir gradient_checkpointing on_bad_clip data_dir epochs max_steps"""
# SIGUSR1 is Slurm's, before the time is up; Windows has none
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}
# The fields of Run that last.pt keeps beside weights and optimisers.
KEPT = "epoch batch step skipped bad_in_a_row meter history average"


class RunError(RuntimeError):
    """A run cannot start or go on; the message says why and what to do."""


class Stopped(Exception):
    """A signal asked the run to stop; args[0] is its number."""


def complain(text):
    """On stderr, so that what a command puts out can be piped on."""
    print(text, file=sys.stderr)


@dataclass
class Place:
    """Where this process runs: its rank among `world` processes, and its device."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def gather(self, value=None):
        """Each process's value, in every process, which waits for the others here."""
        # one process alone has only its own
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def autocast(self):
        """bf16 where the GPU has it in hardware, else fp32; never fp16: it overflows in mT5."""
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def peak_memory_gb(self):
        """Of the GPU, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        if resource is None:
            return 0.0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere


@dataclass
class Run:
    """What a run works with, and all that changes while it goes on.

    `train` builds it and counts epochs, `rest_of_epoch` batches, `micro_batch` and `optimiser_step`
    steps and sums, `validate` adds to the history; `restore` puts back what last.pt holds.
    """

    config: TrainConfig
    inference: InferenceConfig
    place: Place
    folder: Path = Path()  # config.json, metrics.jsonl, last.pt, best/
    labels: int = 0  # checksum of dev's and train's label files

    # what it works with
    data: Any = None  # {"train": SignLanguageDataset, "dev": ...}
    model: Any = None
    net: Any = None  # the model, or DistributedDataParallel around it
    optimizers: Any = ()  # AdamW, and Muon for hidden matrices
    schedulers: Any = ()  # one each, stepped together
    writer: Any = None  # TensorBoard's
    total_steps: int = 0  # the budget

    # where it stands; KEPT in last.pt, which is written between two steps only
    epoch: int = 0  # from 0
    batch: int = 0  # micro-batches of this process that are done in this epoch
    step: int = 0  # optimiser steps that are done
    skipped: int = 0  # of them, those that were not finite
    bad_in_a_row: int = 0  # not finite, one after another
    meter: Counter = field(default_factory=Counter)  # sums since the last validation
    history: list = field(default_factory=list)  # the lines of metrics.jsonl
    average: Any = ()  # of each parameter, see average_steps

    # of the step that is under way
    window: Counter = field(default_factory=Counter)  # sums over its micro-batches

    last_loss: float = math.nan  # of the last step, per token
    saved_at: float = field(default_factory=time.monotonic)  # seconds
    signals: Any = None  # Signals, while the loop runs

    @property
    def description(self):
        """The configuration, and what else decides whether a run may be gone on with."""
        more = {"labels": self.labels, "processes": self.place.world}
        return asdict(self.config) | asdict(self.inference) | more

    @property
    def clips_per_step(self):
        """Of all processes together; 32 at least, says the review."""
        return self.config.batch_size * self.config.gradient_accumulation * self.place.world

    @property
    def validated(self):
        """Whether dev was scored at this step."""
        return any(entry["step"] == self.step for entry in self.history)

    @property
    def best(self):
        """The latest entry that is not plainly worse than those before.

        Of many validations of a small dev split the highest is a lucky moment, often an early one,
        and the schedule's end does better on test. So an entry may be one standard error below the
        highest of the second half of the entries up to it, and three below the highest of all. The
        error is that of a share of dev's clips, at whichever of the two is nearer to 50 %. By
        BLEU-4; where no text has four tokens by exact match, since of single words chrF tells too
        little.
        """
        measure = "bleu4" if any(m["bleu4"] for m in self.history) else "exact_match"
        scores = []  # in %
        for latest in self.history:
            scores.append(latest[measure])
            highest = max(scores)
            recent = max(scores[(len(scores) - 1) // 2 :])
            variance = max(share * (100 - share) for share in (highest, recent))
            # abs: BLEU of all that is right can be above 100 by a rounding
            error = math.sqrt(abs(variance) / latest["dev_clips"])  # in %
            if scores[-1] >= max(recent - error, highest - 3 * error):
                best = latest
        return best

    @contextmanager
    def timed(self, name):
        """Add the seconds that this takes to the meter."""
        began = time.monotonic()
        yield
        self.meter[name] += time.monotonic() - began


# ------------------------------------------------------------------------------- checkpoints


def find_latest_checkpoint(folder):
    """The folder's last.pt, or None."""
    path = Path(folder, "last.pt")
    return path if path.exists() else None


def load_checkpoint(path):
    """last.pt -> its contents, on the CPU. Raises RunError for what is not one of ours."""
    # --resume meets the original's, too: of another model, trained on labels shifted twice
    what = "not a readable checkpoint, or of the original scripts; --auto_resume false starts anew"
    with naming(path, what, RunError):
        if not os.path.isfile(path):  # to open a pipe would wait for ever
            raise ValueError("it is no file")
        # torch itself would take a flipped bit into the weights
        content = np.memmap(path, mode="r")
        if content[-4:].tobytes() != checksum(content[:-4]):
            raise ValueError("its checksum differs")
        # weights_only: whoever wrote the file runs no code here
        return torch.load(path, map_location="cpu", weights_only=True)


def checksum(content):
    """Of an array of bytes; it stands behind what torch wrote, where torch does not mind it."""
    return zlib.crc32(content).to_bytes(4, "big")


def save_checkpoint(path, run):
    """Write last.pt: all that `restore` needs to go on as if nothing had happened.

    No random state is in it: each micro-batch draws from seed, epoch and number (`micro_batch`).
    """
    state = {name: getattr(run, name) for name in KEPT.split()}
    state |= {
        "config": run.description,
        "made_of": made_of(run.model, run.data),
        "model": run.model.state_to_save(),
        "optimizer": [optimizer.state_dict() for optimizer in run.optimizers],
        # a second start then changes nothing
        "finished": run.step >= run.total_steps and run.validated,
    }

    def write(aside):
        torch.save(state, aside)
        last_bytes = checksum(np.memmap(aside, mode="r"))
        with open(aside, "ab") as file:
            file.write(last_bytes)

    write_whole(path, write)


# ------------------------------------------------------------------------------- scores


@torch.no_grad()
def evaluate(model, data_loader, inference, place=None, signals=None):
    """Score a whole split -> (metrics, rows of (index, name, reference, prediction) in its order).

    dev_loss: the plain nll per token. A text depends on its clip alone, so the scores shuffled_*
    decode nothing anew. Raises Stopped after a signal.
    """
    place = place or Place()
    dataset = data_loader.dataset
    model.eval()
    # a row a clip; sums over the split, so that short batches do not weigh more
    rows = []
    nll = tokens = correct = wrong_glosses = glosses = 0
    bar = tqdm(data_loader, dataset.phase, disable=None)
    for (src_input, tgt_input), clips in zip(bar, data_loader.batch_sampler):
        if signals and signals.number:
            raise Stopped(signals.number)
        with on_device(src_input, place) as src_input, place.autocast():
            output = model(src_input, tgt_input)
            texts = model.generate(src_input, **asdict(inference))
        # the plain nll, whatever smoothing and CTC add to the loss
        nll += output.nll.item() * output.num_tokens
        tokens += output.num_tokens
        correct += output.num_correct
        rows += zip(clips, src_input["names"], tgt_input["gt_sentence"], texts)
        # read where the model has a CTC head and the clip has glosses
        for found, wanted in zip(output.gloss or [], tgt_input["gt_gloss"]):
            if wanted:
                wrong_glosses += edit_distance(found, wanted)
                glosses += len(wanted)
    rows.sort()  # batches came by length: back to the order of the label file
    *_, references, predictions = zip(*rows)
    metrics = {"dev_loss": nll / tokens, "dev_accuracy": 100 * correct / tokens}
    metrics |= scores_and_baselines(predictions, references, dataset.config.language)
    if glosses:
        metrics["gloss_wer"] = 100 * wrong_glosses / glosses
    return metrics, rows


def compute_metrics(predictions, references, language="zh"):
    """Texts -> {bleu1..bleu4, chrf, rouge_l, exact_match, unique_ratio} in %, and bleu_signature.

    Both sides are normalised as the vocabulary normalises; languages written without spaces are
    scored by character, others by sacrebleu's "13a" words. ROUGE-L is a mean over sentences.
    Raises ValueError for unequal or zero lengths, ConfigError for an unknown language.
    """
    count = len(references)
    if len(predictions) != count or not count:
        raise ValueError(f"{len(predictions)} predictions for {count} references: one each, please")
    # in one spelling: it decides how texts are cut
    language = language_code(language)
    # mT5 gives half-width punctuation back: raw strings could never match
    predictions = comparable(predictions, language)
    references = comparable(references, language)
    pairs = list(zip(predictions, references))
    # what ROUGE-L compares: characters, or words
    split = list if language in NO_SPACES else str.split
    metrics = {}
    # one figure an order; the last signature tells how they were made
    for order in (1, 2, 3, 4):
        bleu = make_bleu(language, order)
        metrics[f"bleu{order}"] = bleu.corpus_score(predictions, [references]).score
    return metrics | {
        "chrf": CHRF().corpus_score(predictions, [references]).score,
        "rouge_l": 100 * sum(rouge_l(split(p), split(r)) for p, r in pairs) / count,
        "exact_match": 100 * sum(p == r for p, r in pairs) / count,
        "unique_ratio": 100 * len(set(predictions)) / count,
        "bleu_signature": str(bleu.get_signature()),
    }


# ------------------------------------------------------------------------------- the loop


def train(config, inference, args=None):
    """Train as config says, or go on where an earlier run stopped; returns the exit code."""
    # where: process, device, folder; nothing is written yet
    place = find_place(config)
    instead = set_instead(config)
    if instead:
        print(instead)
    demo_banner(config, place)
    run = Run(config, inference, place, labels=labels_digest(config))
    # each process finds the same: no last.pt or best/ changes before all have read the data
    run.folder, last = choose_folder(config, run.description)
    if last is None:
        # what is missing is said before the poses are read; a resumed run needs neither
        if config.mt5_path:
            mt5_folder(config.mt5_path)
        if config.init_from:
            find_best(config.init_from)
    with lock_folder(run.folder) if place.rank == 0 else nullcontext():
        # go on, or find that there is nothing left to do
        state = load_checkpoint(last) if last else None
        if state and state["finished"] and not differences(run.description, state["config"]):
            run.folder = last.parent
            run.history = state["history"]
            print(
                f"{run.folder}: this run is finished; nothing was changed. To go on, raise "
                "max_steps or epochs; to begin anew, --auto_resume false"
            )
            say_end(run)
            return 0

        # data, model, optimiser: new, or as last.pt left them
        config.output_dir = str(run.folder)
        run.data = load_data(config, place)
        run.model = build_model(config, run.data, state).to(place.device)
        steps_per_epoch = math.ceil(len(run.data["train"]) / run.clips_per_step)
        run.total_steps = config.max_steps or config.epochs * steps_per_epoch
        run.optimizers, run.schedulers = make_optimizers(
            run.model, config, run.total_steps, steps_per_epoch, state
        )
        if state:
            restore(run, state)
        run.net = run.model
        if place.world > 1:
            run.net = DistributedDataParallel(run.model)
        run.writer = make_writer(run)
        print_plan(run)
        print(f"resumed from {last} at step {run.step}" if state else f"writing to {run.folder}")
        if place.rank == 0:
            write_whole(run.folder / "config.json", to_json(run.description))

        with Signals() as run.signals:
            try:
                if not run.history:
                    save_last(run)  # before best/ appears: from best/ alone a run could not go on
                    validate(run)
                # an epoch a turn, until the budget is spent and the last weights are scored
                while run.step < run.total_steps or not run.validated:
                    for *batch, step_due in rest_of_epoch(run):
                        with run.timed("computed"):
                            micro_batch(run, *batch, step_due)
                            if step_due:
                                optimiser_step(run)
                        if step_due:
                            after_step(run)
                    # the epoch or the budget is at its end
                    due = run.step >= run.total_steps or run.epoch % config.val_interval == 0
                    if due and not run.validated:
                        validate(run)
                    save_last(run)
                stopped_by = 0
            except Stopped as stopped:
                stopped_by = stopped.args[0]
            if run.writer:
                run.writer.close()
            if stopped_by:  # not in `except`: its traceback would keep the loading processes
                save_last(run)
                print(f"stopped by signal {stopped_by} at step {run.step}; run it again to go on")
                return 128 + stopped_by
    say_end(run)
    return 0


# ------------------------------------------------------------------------------- before the loop


def find_place(config):
    """The device, and the process group where torchrun started this process. Raises ConfigError."""
    # torchrun says it in the environment; without it there is one process
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = dist.get_node_local_rank(fallback_rank=0)
    device = torch.device("cpu")
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        if torch.cuda.device_count() <= local_rank:
            raise ConfigError(
                f"device is {config.device!r}, but torch, or this build of it, finds no GPU for "
                f"process {local_rank}: use --device cpu, or start fewer processes"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if rank:
        # said once, not once a process; open as long as this process
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    if world > 1:
        # hours: the others wait while the first reads a large corpus
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))
    return Place(rank, world, device)


def demo_banner(config, place):
    """For the demo: say that it is one, and write its corpus on first use."""
    if not isinstance(config, DemoConfig):
        return
    print(
        f"There is no data in {DEFAULT_DATA_DIR}, so this is the built-in DEMO of synthetic "
        "signers: the code learns, but does not read people. With data of your own: --data_dir DIR"
    )
    if place.rank == 0 and not Path(config.data_dir).exists():
        make_demo_corpus(config.data_dir)
    place.gather()  # the others wait for the corpus


def labels_digest(config):
    """A checksum of dev's and train's labels; what is wrong in them is said at once."""
    digest = 0
    for split in ("dev", "train"):
        path = Path(config.data_dir, f"labels.{split}")
        load_dataset_file(path, [])
        digest = zlib.crc32(path.read_bytes(), digest)
    return digest


def choose_folder(config, description):
    """-> (the run's folder, its last.pt or None). Another run is never written over."""
    base = Path(config.output_dir or f"checkpoints/{Path(config.data_dir).resolve().name}")
    resumed = None
    # --resume: that run, in its own folder or copied into another
    if config.resume_from:
        resumed = Path(config.resume_from)
        changed = differences(load_checkpoint(resumed)["config"], description)
        if changed:
            raise ConfigError(
                f"resume_from {resumed}: that run was configured otherwise ({changed})"
            )
        if not config.output_dir or base.resolve() == resumed.resolve().parent:
            return resumed.parent, resumed
    folder = base
    number = 1
    # the first folder that is free, or whose run this one goes on with
    while find_latest_checkpoint(folder) or list(folder.glob("best*")):
        if config.auto_resume:
            last = find_latest_checkpoint(folder)
            changed = "its last.pt is missing"
            if last:
                described = folder / "config.json"
                with naming(described, "not a run's configuration", RunError):
                    saved = json.loads(described.read_bytes())
                    changed = differences(saved, description)
            if not changed:
                return folder, last
            if config.output_dir:
                raise ConfigError(
                    f"output_dir {folder} holds another run ({changed}); nothing was changed: "
                    "name another, or --auto_resume false for the next free one"
                )
            print(f"{folder} holds another run ({changed})")
        number += 1
        # abspath: base may be a link, or ".."
        folder = base.parent / f"{Path(os.path.abspath(base)).name}-{number}"
    return folder, resumed


def differences(saved, now):
    """What differs between two runs' descriptions and shapes the result: `field: old -> new`."""
    changed = {name for name in now if saved.get(name) != now[name]}
    changed.difference_update(FREE_FIELDS.split())
    # the budget may grow, but neither shrink nor change from epochs to steps
    budget = "max_steps" if now["max_steps"] or saved.get("max_steps") else "epochs"
    if not 0 < saved.get(budget, 0) <= now[budget]:
        changed.add(budget)
    return "; ".join(f"{name}: {saved.get(name)!r} -> {now[name]!r}" for name in sorted(changed))


@contextmanager
def lock_folder(folder):
    """Hold the folder, until this process ends at the latest. RunError where another does."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:  # not emptied: it may be a link
        # held as long as the file is open
        try:
            if fcntl:
                # flock would live on in loading processes
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"{folder}: another process is training there, or it cannot be locked ({error}): "
                "name another output_dir"
            ) from error
        for half_written in folder.glob("*.part"):  # by a process that died
            remove(half_written)
        yield


def texts_of(dataset):
    return [entry["text"] for entry in dataset.entries]


def load_data(config, place):
    """-> {"train": SignLanguageDataset, "dev": ...}; the first process reads the files for all."""
    data = {}
    if place.rank:
        place.gather()
    for split in ("train", "dev"):
        data[split] = SignLanguageDataset(Path(config.data_dir, f"labels.{split}"), config, split)
    if not place.rank:
        place.gather()
    return data


def build_model(config, data, state=None):
    """A new model from the training texts and glosses, or with the weights that last.pt holds."""
    torch.manual_seed(config.seed)
    glosses = [entry["gloss"] for entry in data["train"].entries]
    model = SignLanguageLite(config, texts_of(data["train"]), glosses)
    # the same data must give the same vocabulary, else ids would mean other pieces
    if state:
        if made_of(model, data) != state["made_of"]:
            raise RunError(
                "last.pt was trained with other clips or pieces: was a clip mended or lost? Has "
                "mt5_path or sentencepiece changed? --auto_resume false starts anew"
            )
        model.load_saved(state["model"])
    else:
        if config.init_from:
            model.init_from(config.init_from)
        # a few hundred clips, as the first epoch plays them, tell enough of the means
        train = data["train"]
        chosen = range(0, len(train), math.ceil(len(train) / 300))
        src_input, _ = train.collate_fn([train[clip] for clip in chosen])
        model.centre(src_input)
    for dataset in data.values():
        dataset.encode = model.codec.encode  # texts become labels in the loading processes
    return model


def made_of(model, data):
    """What a resumed run must find again; the clips by their contents, in the data's order.

    Their names, texts and glosses are in the digest of the label files.
    """
    clips = [entry["report"].digest for split in data.values() for entry in split.entries]
    return [model.codec.pieces, clips]


def make_loader(dataset, batches=None):
    """A DataLoader over these batches; none given: all, longest clips first, as for evaluation.

    Loading and tokenising happen in its processes.
    """
    config = dataset.config
    if batches is None:
        clips = by_length(range(len(dataset)), dataset.lengths)
        batches = cut(clips, max(config.batch_size, EVAL_BATCH))
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collate_fn,
        num_workers=config.num_workers,
        worker_init_fn=leave_signals_to_main,
    )


def make_optimizers(model, config, total_steps, steps_per_epoch, state=None):
    """AdamW, with Muon beside it if config says so -> the optimisers, and a schedule for each.

    No decay on norms and biases. Per step: linear warm-up, then a cosine to min_lr. state: what
    last.pt holds, to go on from; the schedule is that of the budget asked for now.
    """
    hidden = [
        module.weight
        for name, module in model.named_modules()
        if config.muon and isinstance(module, torch.nn.Linear) and name.startswith(MUON_LAYERS)
    ]
    with_muon = set(hidden)
    # what is frozen has no gradient, and is not stepped
    others = [p for p in model.parameters() if p not in with_muon]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, config.learning_rate, fused=True)]
    if hidden:
        muon = torch.optim.Muon(
            hidden,
            4 * config.learning_rate,  # its steps are a fifth as long as AdamW's first ones
            config.weight_decay,
            ns_steps=3,  # not five, dear on a CPU: 2 of 50 clips apart (tests/RESULTS.md)
            adjust_lr_fn="match_rms_adamw",  # a rate for all shapes
        )
        optimizers.append(muon)
    # a short run must not be all warm-up
    longest = total_steps // 10 if config.max_steps else total_steps // 2
    warmup = min(round(config.warmup_epochs * steps_per_epoch), longest)
    last = -1  # the schedule's place; its own first step follows
    if state:
        last = min(state["step"], total_steps - 1) - 1
        for optimizer, saved in zip(optimizers, state["optimizer"]):
            optimizer.load_state_dict(saved)
    # of transformers' cosines to a minimum the one whose first step is not lost at rate zero
    schedulers = [
        cosine_schedule(optimizer, warmup, total_steps, last_epoch=last, min_lr=config.min_lr)
        for optimizer in optimizers
    ]
    return optimizers, schedulers


def restore(run, state):
    """Put a run where last.pt left it.

    In a folder without a best/, as after --resume from elsewhere, dev is scored anew first.
    """
    for name in KEPT.split():
        setattr(run, name, state[name])
    run.average = [average.to(run.place.device) for average in run.average]
    if not list(run.folder.glob("best*")):
        run.history = []


def make_writer(run):
    """TensorBoard's writer, where the configuration asks for it, else None."""
    if not run.config.use_tensorboard or run.place.rank:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(Path(run.config.log_dir, run.folder.name))


def print_plan(run):
    """The configuration, the data, and what a step will be; warn of what deserves a second look."""
    config = run.config
    codec = run.model.codec
    window = run.clips_per_step
    dev_texts = "".join(texts_of(run.data["dev"]))
    print(config)  # all that decides the run, so that a log alone tells what it was
    print(data_report(run.data, codec))
    # as Place.autocast decides it
    precision = "fp32" if isinstance(run.place.autocast(), nullcontext) else "bf16 autocast"
    print(
        f"vocabulary: {len(codec):,} of {len(codec.tokenizer):,} pieces kept\n"
        f"a step: {window} clips; {run.total_steps} steps; {run.place}, {precision}, "
        f"{torch.get_num_threads()} threads"
    )
    # what a first run gets wrong most often
    if config.ctc_weight and run.model.gloss_head is None:
        print("warning: ctc_weight is set, but labels.train has no glosses: training is gloss-free")
    if config.language == "zh" and max(dev_texts) < "\u2e80":
        print("warning: language is zh, but no text has a Chinese character: set --language")
    if window < 32:
        print(
            f"warning: batch_size x gradient_accumulation x processes is {window}; the review: 32"
        )


# ------------------------------------------------------------------------------- inside the loop


def rest_of_epoch(run):
    """Yield the micro-batches of this epoch that are still to do, as long as the budget lasts.

    Each is (number among the epoch's batches of all processes, whether it counts, src_input,
    tgt_input, whether an optimiser step is due: it is the last of its window). One that does not
    count only keeps this process in step with the others.
    """
    # order and speeds follow from seed and epoch: an interrupted epoch is the same again
    data = run.data["train"]
    data.begin_epoch(run.epoch)
    plan = plan_epoch(data, run.config, run.place.rank, run.place.world)
    rest = plan[run.batch :]
    run.net.train()
    batches = iter(make_loader(data, [clips for _, clips, _ in rest]))
    for number, _, counts in rest:
        if run.step >= run.total_steps:
            return
        with run.timed("waited"):
            src_input, tgt_input = next(batches)
        run.batch += 1
        window_full = run.batch % run.config.gradient_accumulation == 0
        last = window_full or run.batch == len(plan)  # an epoch's last window may be short
        yield number, counts, src_input, tgt_input, last
    run.epoch += 1
    run.batch = 0


def plan_epoch(data, config, rank=0, world=1):
    """One process's epoch: [(number among all processes' batches, clips, whether it counts)].

    A window: the clips that one optimiser step sees. From seed and epoch alone, pools of 16 windows
    are sorted by length and cut into windows, which come in random order, a short one last: a
    step's clips do not depend on how micro-batches and processes divide it. Within a window the
    longest come first, mostly the joined ones: batches are of like length, windows are mixed.
    Process `rank` of `world` takes every world-th batch of a window; where that does not come out
    even, it repeats one that does not count.
    """
    rng = np.random.default_rng([config.seed, data.epoch])
    size = config.batch_size * config.gradient_accumulation * world  # clips in a window
    order = rng.permutation(len(data.lengths)).tolist()
    whole = len(order) - len(order) % size
    windows = []
    for pool in cut(order[:whole], 16 * size):
        windows += cut(by_length(pool, data.lengths), size)
    rng.shuffle(windows)
    windows.append(order[whole:])
    plan = []
    number = rank
    for window in windows:
        batches = cut(by_length(window, data.totals), config.batch_size)
        # a turn: one batch for each process
        for turn in cut(batches, world):
            counts = rank < len(turn)
            plan.append((number, turn[rank if counts else -1], counts))
            number += len(turn)
    return plan


def by_length(clips, lengths):
    """The longest first."""
    return sorted(clips, key=lambda clip: -lengths[clip])


def cut(rows, size):
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


def micro_batch(run, number, counts, src_input, tgt_input, last):
    """Forward and backward, the loss summed over tokens; processes exchange at the last."""
    # from seed, epoch and number alone: a resumed run, or more processes, draw the same dropout,
    # whatever the loaders have drawn from torch's generator before
    torch.manual_seed(hash((run.config.seed, run.epoch, number)))  # of ints: always the same
    # gradients travel once a window, not once a batch
    exchange_now = last or run.place.world == 1
    silent = nullcontext() if exchange_now else run.net.no_sync()
    with on_device(src_input, run.place) as src_input, silent:
        with run.place.autocast():
            output = run.net(src_input, tgt_input)
        # summed, not averaged: texts of unlike length weigh by their tokens; `optimiser_step`
        # divides once, by all tokens of the window
        tokens = output.num_tokens  # targets, padding apart
        summed_loss = output.loss * tokens
        # a gradient of zeros, for which the other processes wait
        if not counts:
            summed_loss = summed_loss * 0.0
        summed_loss.backward()
    if not counts:
        return
    names = src_input["names"]
    loss = summed_loss.item()
    if not math.isfinite(loss):
        complain(f"warning: the loss is not finite for the clips {', '.join(names)}")
    run.window.update(
        tokens=tokens,
        loss=loss,
        nll=output.nll.item() * tokens,
        correct=output.num_correct,
        clips=len(names),
    )


def optimiser_step(run):
    """Divide the window's gradient by its tokens, over all processes, clip it, step, and average.

    A step that is not finite is skipped; RunError after ten of them in a row. Raises Stopped, when
    all is done, where a process was asked to stop.
    """
    # sums of all processes, and whether one of them was asked to stop
    stop_signal = 0
    window = Counter()
    for part, signal_number in run.place.gather((run.window, run.signals.number)):
        window.update(part)
        stop_signal = max(stop_signal, signal_number)
    tokens = window["tokens"]

    for parameter in run.model.parameters():
        # DistributedDataParallel averages over processes: undo that, the mean is over tokens
        if parameter.grad is not None:
            parameter.grad.mul_(run.place.world / tokens)
    # norm before clipping; with max_grad_norm 0 it is only measured
    norm = torch.nn.utils.clip_grad_norm_(
        run.model.parameters(), run.config.max_grad_norm or math.inf
    )
    if math.isfinite(norm) and math.isfinite(window["loss"]):
        run.meter.update(window)
        run.bad_in_a_row = 0
    else:
        run.model.zero_grad()  # a step without gradients changes nothing
        run.skipped += 1
        run.bad_in_a_row += 1
        complain(f"warning: step {run.step + 1} is skipped: its loss or gradient is not finite")
    # the schedule moves with every step, skipped or not, and beyond its end it would rise again
    for optimizer, scheduler in zip(run.optimizers, run.schedulers):
        optimizer.step()
        if run.step + 1 < run.total_steps:
            scheduler.step()
    run.model.zero_grad()
    run.step += 1
    # at first over an eighth of the steps: what was far off is soon forgotten
    steps = max(1, min(run.config.average_steps, run.step / 8))
    if run.config.average_steps:
        run.average = run.average or [p.detach().clone() for p in run.model.parameters()]
    for average, parameter in zip(run.average, run.model.parameters()):
        average.lerp_(parameter.detach(), 1 / steps)
    run.last_loss = window["loss"] / tokens
    run.window = Counter()  # what follows begins a new one
    if run.bad_in_a_row >= 10:
        raise RunError(
            "10 steps in a row were not finite: lower learning_rate, keep max_grad_norm above 0, "
            "look at the clips named above with `python train_lite.py check`"
        )
    # between two steps there is no gradient to keep
    if stop_signal:
        raise Stopped(stop_signal)


def averaged_model(run):
    """What dev scores and best/ holds: the model, or a copy that has the averages as weights."""
    if not run.average:
        return run.model
    model = deepcopy(run.model)
    for parameter, average in zip(model.parameters(), run.average):
        parameter.data = average
    return model


@contextmanager
def on_device(src_input, place):
    """The batch with its tensors on the device; memory that fails is a RunError with advice."""
    try:
        yield BatchFeature(src_input).to(place.device)
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory", str(error)):
            raise
        raise RunError(
            "out of memory. What costs least first: half the batch_size, twice "
            "gradient_accumulation: the same training; gradient_checkpointing; lower max_length; "
            "train_embedding false"
        ) from error


def after_step(run):
    """A log line and a last.pt, where they are due."""
    if run.step % run.config.log_interval == 0:
        tokens = max(run.meter["tokens"], 1)
        row = {
            "loss": run.last_loss,  # of this step; the others since the last validation
            "nll": run.meter["nll"] / tokens,
            "accuracy": 100 * run.meter["correct"] / tokens,
            **pace(run),
        }
        report(run, "train", row)
    # an epoch may take hours
    if time.monotonic() - run.saved_at > SAVE_EVERY:
        save_last(run)


def pace(run):
    """How training goes since the last validation; before its first step no clip was seen."""
    seconds = max(run.meter["waited"] + run.meter["computed"], 1e-9)
    return {
        "lr": run.schedulers[0].get_last_lr()[0],
        "clips_per_second": run.meter["clips"] / seconds,
        "waiting_for_data": 100 * run.meter["waited"] / seconds,
    }


def save_last(run):
    """Write last.pt: before step 1, as an epoch or the run ends, after 15 minutes, at a signal."""
    if run.place.rank == 0:
        save_checkpoint(run.folder / "last.pt", run)
    run.saved_at = time.monotonic()


def validate(run):
    """Score dev, print and write what came out, and replace best/ where `Run.best` picks it."""
    scored = None
    if run.place.rank == 0:  # the others wait
        # several processes stop at an optimiser step, together
        signals = run.signals if run.place.world == 1 else None
        model = averaged_model(run)
        scored = evaluate(model, make_loader(run.data["dev"]), run.inference, run.place, signals)
    scores, rows = run.place.gather(scored)[0]
    # of training since the last validation
    sums = run.meter
    metrics = {
        "epoch": shown_epoch(run),
        "step": run.step,
        "dev_clips": len(rows),
        **scores,
        "train_loss": sums["loss"] / sums["tokens"] if sums["tokens"] else None,
        "skipped_steps": run.skipped,
        "peak_memory_gb": run.place.peak_memory_gb(),
        **pace(run),
    }
    # best is chosen among all, this one included
    run.history.append(metrics)
    run.meter = Counter()
    print_validation(run, metrics, rows)
    if run.place.rank == 0:
        if run.best is metrics:
            save_best(run, model, metrics)
        lines = [json.dumps(line) + "\n" for line in run.history]
        write_whole(run.folder / "metrics.jsonl", "".join(lines))
        write_predictions(run.folder / "predictions_dev.txt", rows)


def print_validation(run, metrics, rows):
    """One line of scores, two samples, and warnings where nothing is learnt."""
    names = """dev_loss dev_accuracy bleu4 shuffled_bleu4 chrf exact_match
    unique_ratio reference_unique_ratio gloss_wer"""
    report(run, "dev", {name: metrics[name] for name in names.split() if name in metrics})
    # the first clip and one from the middle, prediction under reference
    for _, name, reference, prediction in (rows[0], rows[len(rows) // 2]):
        print(
            f"    {name}\n      reference   {shorten(reference)}\n"
            f"      prediction  {shorten(prediction)}"
        )
    if metrics["step"]:
        print(collapse_warning(metrics, [row[3] for row in rows]), end="")


def shown_epoch(run):
    """The one under way, or the last whole one, counted from 1; 0 = before training."""
    return run.epoch + (run.batch > 0)


def report(run, part, row):
    """{name: value} as one line in fixed order for grep, and to TensorBoard."""
    line = f"epoch {shown_epoch(run):03d} | step {run.step:06d}/{run.total_steps:06d}"
    for name, value in row.items():
        line += f" | {name} {value:.4g}"
        if run.writer:
            run.writer.add_scalar(f"{part}/{name}", value, run.step)
    print(line)


class Signals(ExitStack):
    """Keeps the first SIGINT, SIGTERM or SIGUSR1 for the loop to see; a second ends the process."""

    number = 0

    def __enter__(self):
        with suppress(ValueError):  # Python lets the main thread alone set handlers
            for number in STOP_SIGNALS:
                before = signal.signal(number, self.catch)
                self.callback(signal.signal, number, before)  # at the exit
        return self

    def catch(self, number, _):
        """The handler. It may interrupt a print, so it must not print itself."""
        if self.number:
            os._exit(128 + number)
        self.number = number
        with suppress(OSError):  # a closed stderr must not break the step that this interrupts
            os.write(2, b"\nstopping after this step; last.pt is written; once more ends now\n")


def leave_signals_to_main(_):
    """In a loading process: a signal to the whole group (Ctrl-C, Slurm) is the main process's."""
    # were it to die, the main process would fail before it could write last.pt
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ------------------------------------------------------------------------------- after the loop


def say_end(run):
    """What to do next, and the run in one line."""
    first = run.history[0]
    final = run.history[-1]
    print(f"next: python train_lite.py evaluate {run.folder} --split test")
    print(
        f"dev_loss {first['dev_loss']:.4f} -> {final['dev_loss']:.4f} | "
        f"exact_match {first['exact_match']:.2f} -> {final['exact_match']:.2f} | "
        f"best epoch {run.best['epoch']} | {run.folder / 'best'}"
    )


# ------------------------------------------------------------------------------- more scores


def comparable(texts, language):
    """What is scored: normalised, in languages without spaces without any."""
    between = "" if language in NO_SPACES else " "
    return [normalise(text).replace(" ", between) for text in texts]


def make_bleu(language, order=4):
    tokenize = "13a"  # by word
    if language in NO_SPACES:
        tokenize = "zh" if language == "zh" else "char"
    return BLEU(tokenize=tokenize, max_ngram_order=order, force=True)  # force: no warning


def edit_distance(found, wanted, replace=1):
    """The fewest insertions, deletions and replacements (each costs `replace`) between lists."""
    row = list(range(len(wanted) + 1))  # from nothing to each beginning of wanted
    for a in found:
        above = row
        row = [above[0] + 1]
        for j, b in enumerate(wanted):
            replaced = above[j] + (0 if a == b else replace)
            row.append(min(replaced, above[j + 1] + 1, row[j] + 1))
    return row[-1]


def rouge_l(hypothesis, reference):
    """F-score of the longest common subsequence of two lists, recall weighted as in captioning.

    That is (1 + b^2) P R / (R + b^2 P), where b is 1.2 and its square 1.44, precision P is common /
    len(hypothesis), recall R likewise.
    """
    # where a replacement costs two, an edit distance counts what is not in common
    apart = edit_distance(hypothesis, reference, replace=2)
    common = (len(hypothesis) + len(reference) - apart) // 2
    return 2.44 * common / max(len(hypothesis) + 1.44 * len(reference), 1)


def exchange(texts):
    """-> order: clip i is given clip order[i], of another text than its own wherever possible."""
    # by checksum: equal texts stand together, like ones, which a plain sort would pair, do not
    ranked = np.argsort([zlib.crc32(text.encode()) for text in texts], kind="stable")
    # farther than the clips of any one text reach: no clip may get its own text back
    shift = max(*Counter(texts).values(), len(texts) // 2)
    order = np.empty_like(ranked)
    order[ranked] = np.roll(ranked, -shift)
    return order.tolist()


def scores_and_baselines(predictions, references, language):
    """The metrics beside their baseline, the same texts for exchanged poses.

    BLEU of an order that no reference reaches is 0 for all: smoothing would give long garbage more.
    """
    perfect = compute_metrics(references, references, language)
    # an order of BLEU that even the references themselves do not reach
    unreached = {key: 0.0 for key, value in perfect.items() if value == 0}
    exchanged = [predictions[i] for i in exchange(references)]
    metrics = compute_metrics(predictions, references, language) | unreached
    shuffled = compute_metrics(exchanged, references, language) | unreached
    for key in ("bleu4", "chrf", "exact_match"):
        metrics[f"shuffled_{key}"] = shuffled[key]
    metrics["reference_unique_ratio"] = perfect["unique_ratio"]
    return metrics


def collapse_warning(metrics, predictions):
    """A line where the outputs do not depend on the poses, else "". chrF tells."""
    # what it says most often
    top, count = Counter(predictions).most_common(1)[0]
    # chrF knows single words, too, where BLEU-4 has nothing to count; a gap of a fifth comes of the
    # clips' lengths alone: long ones have long texts
    shuffled = metrics["shuffled_chrf"]
    gap = metrics["chrf"] - shuffled
    least_gap = max(1, 0.2 * min(shuffled, 100 - shuffled))
    variety = metrics["unique_ratio"] / metrics["reference_unique_ratio"]
    reads_poses = gap >= least_gap and variety >= 0.2
    # half of the clips right is no collapse, however few sentences there are
    if len(predictions) < 2 or metrics["exact_match"] >= 50 or reads_poses:
        return ""
    return (
        f"warning: the model ignores the pose: it has collapsed onto {shorten(top)!r} ({count} of "
        f"{len(predictions)} outputs)\n"
    )


def intervals(predictions, references, language):
    """{metric: its score and 95 % interval over resampled clips, as text}; texts: normalised."""
    # a clip is right or wrong, in %
    right = 100.0 * np.equal(predictions, references)
    resampled = np.random.default_rng(0).choice(right, (1000, len(right))).mean(1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    # sacrebleu resamples with a fixed seed of its own
    bleu = make_bleu(language).corpus_score(predictions, [references], n_bootstrap=1000)
    return {
        "exact_match": f"{right.mean():.2f} [{low:.2f}, {high:.2f}]",
        "bleu4": bleu.format(score_only=True),  # sacrebleu's mean and half width
    }


def shorten(text):
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------- what is written


def write_whole(path, content):
    """Write a text, or the file or folder that content(path) writes, beside path, then rename it.

    So path is never half; a crash between a folder's two renames leaves path.old. Raises RunError
    naming path.
    """
    aside = Path(f"{path}.{os.getpid()}.part")
    old = Path(f"{path}.old")
    try:
        if callable(content):
            content(aside)
        else:
            aside.write_bytes(content.encode())
        # on disk before the rename: a crash must not leave a name without its bytes
        for written in [*aside.rglob("*"), aside]:
            flush_to_disk(written)
        # a folder cannot replace a folder: the old one steps aside
        if path.is_dir():
            remove(old)
            os.replace(path, old)
        os.replace(aside, path)
        flush_to_disk(path.parent)
        remove(old)
    except (OSError, RuntimeError, SafetensorError) as error:
        remove(aside)
        raise RunError(
            f"could not write {path}: {error}. Is the disk full? What stood there is whole"
        ) from error


def flush_to_disk(path):
    # elsewhere a folder cannot be opened, nor a file flushed by another handle
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_best(run, model, metrics):
    """Replace best/ as a whole by the model that was scored.

    `models_lite.find_best` reads it, or best.old after a crash.
    """

    def write(folder):
        model.save_pretrained(folder, **run.description)
        (folder / "metrics.json").write_bytes(to_json(metrics).encode())

    write_whole(run.folder / "best", write)


def write_predictions(path, rows):
    """Name, reference and prediction a line, tab-separated, in the split's order."""
    text = "name\treference\tprediction\n"
    for row in rows:
        text += "\t".join(re.sub(r"\s+", " ", cell) for cell in row[1:]) + "\n"
    write_whole(path, text)


# ------------------------------------------------------------------------------- check


def check_command(config, inference, args):
    """`check`: every fault of labels and poses by name, and what the data are like -> exit code."""
    demo_banner(config, Place())
    data = {}
    problems = []
    for split in ("train", "dev", "test"):
        path = Path(config.data_dir, f"labels.{split}")
        try:
            dataset = SignLanguageDataset(path, config, split, problems)
            if len(dataset):
                data[split] = dataset
        except DataError as error:
            problems.append(str(error))
    # pieces are counted by the vocabulary that training would have
    codec = None
    if "train" in data:
        try:
            codec = make_codec(config, texts_of(data["train"]))
        except ConfigError as error:
            print(f"warning: texts are not counted in pieces: {error}")
    print(data_report(data, codec))
    # every fault, not the first alone
    for problem in problems:
        complain(f"error: {problem}")
    if problems:
        print(f"{len(problems)} errors")
        return 1
    print("no errors; next: python train_lite.py, same options")
    return 0


def data_report(data, codec=None):
    """Lines on each split's clips and texts, then warnings that say what to do."""
    lines = []
    seen = {}  # text -> the first split that has it
    # warnings stand where they are found, until they are sorted to the end
    for split, dataset in data.items():
        lines += describe_poses(split, dataset)
        texts = texts_of(dataset)
        if codec:  # None where there is no vocabulary to count by
            lines += describe_texts(split, texts, codec)
        # leaks, by text
        shared = [text for text in set(texts) if seen.setdefault(text, split) != split]
        if shared:
            lines.append(
                f"warning: {len(shared)} of {split}'s texts occur in an earlier split: normal for "
                "single signs; in sentences the score rewards remembering"
            )
    return "\n".join(sorted(lines, key=lambda line: line.startswith("warning: ")))


def spread(counts):
    """A quantity's 5th, 50th and 95th percentile, as text."""
    low, median, high = np.percentile(counts, [5, 50, 95])
    return f"{median:.0f} ({low:.0f} to {high:.0f})"


def describe_poses(split, dataset):
    """Yield two lines on a split's clips, and warnings of what deserves a second look."""
    limit = dataset.config.max_length
    # a row a figure of ClipReport, a column a clip
    figures = np.array([entry["report"][:7] for entry in dataset.entries]).T
    frames = figures[0]
    body, left, right, no_hand = figures[1:5] @ frames / frames.sum()  # of all frames, in %
    # joints of all clips, and clips
    not_finite, pixels = figures[5:].sum(1)
    over = 100 * (frames > limit).mean()
    yield (
        f"{split}: {len(frames)} clips, frames {spread(frames)}, {over:.1f} % over max_length "
        f"{limit}; {pixels:.0f} in pixels"
    )
    yield (
        f"  not seen: body {body:.1f} %, left hand {left:.1f} %, right hand {right:.1f} %; no hand "
        f"in {no_hand:.1f} % of the frames; {not_finite:.0f} joints not finite"
    )
    # a few long ones are no harm
    if over > 5:
        yield (
            f"warning: too many of {split}'s clips exceed max_length {limit}: --max_length "
            f"{math.ceil(np.percentile(frames, 97))} covers 97 %"
        )
    if no_hand > 50 or max(left, right) > 99.99:
        yield (
            f"warning: {split}: mostly no hand is seen, or never the left, or the right (shares "
            "above): does the detector give hands?"
        )
    if 0 < pixels < len(frames):
        yield (
            f"warning: {split}: {pixels:.0f} of {len(frames)} clips are in pixels, the others in "
            "0..1: keep to one"
        )
    # in logarithms: three times as long as usual, and beyond the usual spread
    away = np.abs(np.log(frames / np.median(frames)))
    far = away > max(math.log(3), 8 * np.median(away))
    odd = {}  # what looks wrong -> in which clips
    for entry, unlike in zip(dataset.entries, far):
        looks = list(entry["report"].odd)
        if unlike:
            looks.append("a length unlike the others': is the frame rate the same, is it cut?")
        for text in looks:
            odd.setdefault(text, []).append(entry["name"])
    for text, clips in odd.items():
        yield f"warning: {split}: {len(clips)} clips, first {clips[0]}: {text}"


def describe_texts(split, texts, codec):
    """Yield a line on a split's texts, and warnings of what deserves a second look."""
    limit = codec.max_text_length
    ids = [codec.ids(text) for text in texts]
    lengths = [len(rows) for rows in ids]
    cut = 100 * np.mean([length > limit for length in lengths])
    yield f"  pieces a text {spread(lengths)}, {cut:.1f} % over max_text_length {limit}"
    if cut:
        yield (
            f"warning: some of {split}'s texts are cut: --max_text_length {max(lengths)} covers all"
        )
    # they would train, or be scored, with an unknown piece
    unspellable = [text for text, rows in zip(texts, ids) if codec.unknown in rows]
    if unspellable:
        yield (
            f"warning: {split}: the vocabulary cannot spell {len(unspellable)} texts, first "
            f"{shorten(unspellable[0])!r}"
        )


# ------------------------------------------------------------------------------- using a run


def evaluate_command(config, inference, args):
    """`evaluate RUN`: a split's scores, one a line, with intervals; predictions in a file."""
    place = find_place(config)
    if place.rank:  # one process scores and writes
        return 0
    model = SignLanguageLite.from_pretrained(args.run).to(place.device)
    config.output_dir = ""  # evaluating leaves no cache behind
    path = Path(config.data_dir, f"labels.{args.split}")
    dataset = SignLanguageDataset(path, config, "evaluated")
    complain(data_report({args.split: dataset}, model.codec))
    metrics, rows = evaluate(model, make_loader(dataset), inference, place)
    print_scores(metrics, rows, config.language)
    out = Path(args.run, f"predictions_{args.split}.txt")
    figures = out.with_name(f"metrics_{args.split}.json")
    try:
        write_predictions(out, rows)
        write_whole(figures, to_json(metrics))
        print(f"predictions: {out}; all figures: {figures}")
    except RunError as error:  # somebody else's run
        print(f"not kept: {error}")
    return 0


def print_scores(metrics, rows, language):
    """A metric a line, exact match first, and a warning where the poses are not read."""
    *_, references, predictions = zip(*rows)
    references = comparable(references, language)
    predictions = comparable(predictions, language)
    with_interval = intervals(predictions, references, language)  # of two metrics
    if not metrics["bleu4"]:  # no reference has four tokens: sacrebleu's smoothing tells nothing
        del with_interval["bleu4"]
    # exact match comes first; at its place in metrics it would be without its interval
    for key, value in (with_interval | metrics | with_interval).items():
        print(key, f"{value:.4g}" if isinstance(value, float) else value)
    print(collapse_warning(metrics, predictions), end="")


def translate_command(config, inference, args):
    """`translate RUN CLIP...`: name and text a line; a bad clip is passed over, exit code 1."""
    place = find_place(config)
    model = SignLanguageLite.from_pretrained(args.run).to(place.device)
    exit_code = 0
    for path in args.clips:
        try:
            pose = read_clip(path, model.config)
        except (DataError, OSError) as error:
            complain(f"error: {error}")
            exit_code = 1
            continue
        with on_device(pad_poses([pose]), place) as src_input, place.autocast():
            text = model.generate(src_input, **asdict(inference))[0]
        print(f"{path}\t{text}")
    return exit_code


# ------------------------------------------------------------------------------- the command line

COMMANDS = {
    "train": train,
    "check": check_command,
    "evaluate": evaluate_command,
    "translate": translate_command,
}


def make_parser(command):
    """The command's parser: its own arguments, then a flag for each field of the configuration.

    What is not given is absent from the result: defaults depend on what is given (`parse`).
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s ... [--field value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS)  # a misspelt one must not start a training
    if command in ("evaluate", "translate"):
        parser.add_argument("run", help="a run's folder, or its best/")
    if command == "evaluate":
        parser.add_argument("--split", default="dev", help="train, dev (the default) or test")
    if command == "translate":
        parser.add_argument("clips", nargs="+", help="pose files")
    # a flag for each field, which turns its word into the field's type
    group = parser
    for item in [*fields(TrainConfig), *fields(InferenceConfig)]:
        if "group" in item.metadata:  # this field and those below it
            group = parser.add_argument_group(item.metadata["group"])
        flags = [f"--{item.name}", *item.metadata.get("aliases", [])]
        how = {"type": item.type}
        choices = get_args(item.type)  # of a Literal
        if choices:
            how = {"type": type(choices[0]), "choices": choices}
        elif item.type is bool:  # the flag alone says true
            how = {"type": string_to_bool, "nargs": "?", "const": True}
        words = item.metadata.get("help", "")  # none where a user wrote a plain default
        words += f" (default: {item.default!r})".replace("%", "%%")
        group.add_argument(*flags, dest=item.name, help=words, **how)
    # these two are the original's
    parser.add_argument("--no-resume", dest="auto_resume", action="store_false")
    parser.add_argument("--no-tensorboard", dest="use_tensorboard", action="store_false")
    return parser


def parse(argv):
    """-> (command, config, inference, the command's own arguments). Exits with 2 on a bad line."""
    if not argv or argv[0].startswith("-"):
        argv = ["train", *argv]
    args = make_parser(argv[0]).parse_args(argv)
    given = vars(args)
    kind = TrainConfig
    values = {}
    if "run" in given:  # as it was trained
        path = find_best(args.run) / "config.json"
        with naming(path, "not a run's configuration"):
            values = json.loads(path.read_bytes())
            # what another machine had says nothing of this one
            values.pop("num_workers", None)
            if values.get("device") == "cuda":
                values["device"] = "auto"
            make_config(TrainConfig, values)
            make_config(InferenceConfig, values)
    else:
        plain = TrainConfig()
        # who names a folder, here or in config_lite.py, means it
        own_data = "data_dir" in given or plain.data_dir != DEFAULT_DATA_DIR
        if not own_data and not Path(DEFAULT_DATA_DIR).exists():
            kind = DemoConfig
        elif not given.get("mt5_path", plain.mt5_path):
            kind = ScratchConfig
    if given.get("epochs") and "max_steps" not in given:
        values["max_steps"] = 0  # who asks for epochs gets epochs
    # what was given wins over what was saved
    values |= given
    return args.command, make_config(kind, values), make_config(InferenceConfig, values), args


def main(argv):
    """Run a command; returns the exit code. What the user can mend is one message, no traceback."""
    try:
        command, config, inference, args = parse(argv)
        return COMMANDS[command](config, inference, args)
    except BrokenPipeError:  # `| head`: end quietly, as SIGPIPE would
        return 128 + 13
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:  # use_tensorboard
        message = f"{error}, an optional package: pip install {error.name}"
    except AttributeError as error:
        if not isinstance(error.obj, (TrainConfig, InferenceConfig)):
            raise
        # a field of config_lite.py was renamed, which nobody finds before it is read
        message = f"config_lite.py: {type(error.obj).__name__} has no field {error.name!r}"
    except (ConfigError, DataError, RunError, OSError) as error:
        # a loading process's error comes with its traceback, which is of no use to the user
        message = re.sub(r"(?s)^Caught .*\n\S*(DataError|Refused): ", "", str(error)).strip()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    complain(f"error: {message}")
    return 1


if __name__ == "__main__":
    # a log is read as it grows
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    # not sys.exit: after an error Python would wait a minute for the loading processes
    os._exit(main(sys.argv[1:]))
