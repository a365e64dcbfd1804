"""The loop and the commands.

    python train_lite.py [train]              train; where there is no data of your own, on the built-in demo
    python train_lite.py check                look through the data without training
    python train_lite.py evaluate RUN         score a run's best model on a split
    python train_lite.py translate RUN CLIP [CLIP ...]

then `--field value` for any field of config_lite.py. A run is a folder: config.json, metrics.jsonl (a line a
validation), predictions_dev.txt, last.pt (to go on from) and best/ (to use, complete in itself).
"""
import argparse
import importlib.util
import json
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import unicodedata
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sacrebleu.metrics import BLEU, CHRF
from safetensors.torch import save as safetensors_bytes
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser, get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from config_lite import DEFAULT_DATA_DIR, ConfigError, DemoConfig, InferenceConfig, ScratchConfig, TrainConfig
from datasets_lite import (BODY, BODY_EDGES, HAND_EDGES, LEFT, RIGHT, THRESHOLD, DataError, LengthBatchSampler,
                           SignLanguageDataset, load_pose_file, make_demo_corpus, pad_poses, read_clip)
from models_lite import SignLanguageLite, ctc_positions, make_codec

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock on the run's folder, no peak memory of the process
    fcntl = resource = None

SAVE_EVERY = 15 * 60  # seconds between two last.pt, at most
EVAL_BATCH = 16  # clips per forward pass of an evaluation, at least
# Fields in which a run may differ from the last.pt it goes on from: where and how it runs, not what comes out.
FREE_FIELDS = {"output_dir", "resume_from", "auto_resume", "num_workers", "device", "log_interval",
               "val_interval", "use_tensorboard", "log_dir", "gradient_checkpointing", "on_bad_clip"}


class RunError(RuntimeError):
    """A run cannot start or go on; the message says why and what to do."""


class Stopped(Exception):
    """A signal asked the run to stop; args[0] is its number."""


# ----------------------------------------------------------------------------------- processes and signals

@dataclass
class Place:
    """Where this process runs: its rank among `world` processes, and its device."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def say(self, text):
        """Print once, not once a process."""
        if self.rank == 0:
            print(text, flush=True)

    def gather(self, rows):
        """The processes' lists, joined, in every process."""
        parts = [rows]
        if self.world > 1:
            parts = [None] * self.world
            dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def autocast(self):
        """bf16 where the GPU has it in hardware, fp32 elsewhere; never fp16, which overflows in mT5."""
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def peak_memory_gb(self):
        """Of the GPU, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
        return peak / (1e9 if sys.platform == "darwin" else 1e6)


def find_place(config):
    """The device, and the process group where torchrun started this process. Raises ConfigError."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if not there[name]():
        raise ConfigError(f"device is {name!r}, but torch {torch.__version__} finds none: use --device auto")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if name == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    return Place(rank, world, device)


class Signals:
    """Keeps the first SIGINT, SIGTERM or SIGUSR1 for the loop to see; a second one ends the process at once."""

    def __init__(self):
        self.number, self.before = 0, {}

    def __enter__(self):
        here = threading.current_thread() is threading.main_thread()
        for name in ("SIGINT", "SIGTERM", "SIGUSR1") if here else ():
            if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                self.before[number] = signal.signal(number, self.catch)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number, _):
        """The handler. It may interrupt a print, so it must not print itself."""
        if self.number:
            os._exit(128 + number)
        self.number = number
        os.write(2, b"\nstopping after this micro-batch, last.pt written; a second signal stops at once\n")


def _worker_signals(_):
    """In a loading process: Ctrl-C is the main process's to handle, SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ----------------------------------------------------------------------------------- scores

def _clean(text, language):
    """What is scored: NFKC (mT5 knows no full-width punctuation), stripped; Chinese without spaces."""
    text = unicodedata.normalize("NFKC", text).strip()
    return "".join(text.split()) if language == "zh" else text


def _rouge_l(hypothesis, reference, beta=1.2):
    """F-score of the longest common subsequence of two token lists, recall weighted as in captioning."""
    row = [0] * (len(reference) + 1)
    for token in hypothesis:
        corner = 0
        for j, other in enumerate(reference):
            corner, row[j + 1] = row[j + 1], corner + 1 if token == other else max(row[j], row[j + 1])
    if not row[-1]:
        return 0.0
    precision, recall = row[-1] / len(hypothesis), row[-1] / len(reference)
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)


def compute_metrics(predictions, references, language="zh"):
    """Texts -> {bleu1..bleu4, chrf, rouge_l, exact_match, unique_ratio} in percent, and bleu_signature.

    Both sides are NFKC-normalised and stripped; "zh" is scored by character and without spaces, others by
    sacrebleu's "13a" words. ROUGE-L is the mean over sentences. Raises ValueError for unequal or zero lengths.
    """
    count = len(references)
    if len(predictions) != count or not count:
        raise ValueError(f"{len(predictions)} predictions for {count} references: one for each is needed")
    predictions, references = ([_clean(t, language) for t in texts] for texts in (predictions, references))
    metrics, split = {}, list if language == "zh" else str.split
    for order in (1, 2, 3, 4):
        bleu = BLEU(tokenize="zh" if language == "zh" else "13a", max_ngram_order=order)
        metrics[f"bleu{order}"] = bleu.corpus_score(predictions, [references]).score
    metrics["chrf"] = CHRF().corpus_score(predictions, [references]).score
    rouge = [_rouge_l(split(p), split(r)) for p, r in zip(predictions, references)]
    metrics["rouge_l"] = 100 * sum(rouge) / count
    metrics["exact_match"] = 100 * sum(p == r for p, r in zip(predictions, references)) / count
    metrics["unique_ratio"] = 100 * len(set(predictions)) / count
    metrics["bleu_signature"] = str(bleu.get_signature())
    return metrics


def exchange(texts, seed=0):
    """A fixed exchange of clips: clip i gets clip order[i], of another text than its own wherever possible."""
    clips = {}
    for i, text in enumerate(texts):
        clips.setdefault(text, []).append(i)
    groups = list(clips.values())
    ranked = [i for g in np.random.default_rng(seed).permutation(len(groups)) for i in groups[g]]
    shift = max(max(map(len, groups)), len(texts) // 2)  # farther than the clips of any one text reach
    order = [0] * len(texts)
    for position, i in enumerate(ranked):
        order[i] = ranked[(position + shift) % len(ranked)]
    return order


def edit_distance(found, wanted):
    """How many insertions, deletions and replacements turn one list into the other."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(found, 1):
        corner, row[0] = row[0], i
        for j, b in enumerate(wanted, 1):
            corner, row[j] = row[j], min(corner + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@torch.no_grad()
def evaluate(model, data_loader, inference, place=Place(), constant="", stop=lambda: 0):
    """Score a whole split -> (metrics, rows of (index, name, reference, prediction) in the split's order).

    dev_loss is the plain nll per token. In eval mode a text depends on its clip alone, so scores for exchanged
    poses, shuffled_*, need no second decoding. `constant` is the sentence of the constant_bleu4 baseline.
    Raises Stopped when `stop()` gives a signal's number.
    """
    dataset, plan, started = data_loader.dataset, data_loader.batch_sampler.plan(), time.monotonic()
    rows, sums, was_training = [], [], model.training
    model.eval()
    quiet = place.rank > 0 or not sys.stderr.isatty()
    bar = tqdm(plan, desc=dataset.phase, unit=" batches", disable=quiet, leave=False)
    for (number, clips, counts), (src_input, tgt_input) in zip(bar, data_loader):
        if stop():
            raise Stopped(stop())
        if not counts:
            continue
        src_input = to_device(src_input, place.device)
        with out_of_memory(src_input), place.autocast():
            output = model(src_input, tgt_input)
            texts = model.generate(src_input, **asdict(inference))
        tokens, gloss = output.num_tokens, output.gloss or [None] * len(texts)
        sums.append((number, output.nll.item() * tokens, tokens, output.num_correct))
        rows += zip(clips, src_input["names"], tgt_input["gt_sentence"], texts, gloss, tgt_input["gt_gloss"])
    model.train(was_training)
    rows, sums = sorted(place.gather(rows), key=lambda row: row[0]), sorted(place.gather(sums))
    tokens, correct = sum(s[2] for s in sums), sum(s[3] for s in sums)
    metrics = {"dev_loss": math.fsum(s[1] for s in sums) / tokens, "dev_accuracy": 100 * correct / tokens}
    metrics |= _text_scores([r[3] for r in rows], [r[2] for r in rows], dataset.config.language, constant)
    signed = [(row[4], row[5]) for row in rows if row[4] is not None and row[5]]
    if signed:
        wrong = sum(edit_distance(found, wanted) for found, wanted in signed)
        metrics["gloss_wer"] = 100 * wrong / sum(len(wanted) for _, wanted in signed)
    metrics["decoded_clips_per_second"] = len(rows) / max(time.monotonic() - started, 1e-9)
    return metrics, [row[:4] for row in rows]


def _text_scores(predictions, references, language, constant):
    """The metrics beside their baselines: poses exchanged, one constant sentence, the references' variety."""
    metrics = compute_metrics(predictions, references, language)
    shuffled = compute_metrics([predictions[i] for i in exchange(references)], references, language)
    metrics |= {f"shuffled_{key}": shuffled[key] for key in ("bleu4", "chrf", "exact_match")}
    metrics["constant_bleu4"] = compute_metrics([constant] * len(references), references, language)["bleu4"]
    metrics["reference_unique_ratio"] = compute_metrics(references, references, language)["unique_ratio"]
    return metrics


def collapse_warning(metrics, predictions):
    """A sentence where the outputs do not depend on the poses, else "".

    chrF tells, not BLEU-4, which is 0 for one-word texts whatever the model does.
    """
    top, count = Counter(predictions).most_common(1)[0]
    gap = metrics["chrf"] - metrics["shuffled_chrf"]
    varied = metrics["unique_ratio"] / metrics["reference_unique_ratio"]
    if len(predictions) < 2 or metrics["exact_match"] >= 50 or gap >= 1 and varied >= 0.2:
        return ""
    return (f"warning: the model ignores the pose: it has collapsed onto {top!r} ({count} of {len(predictions)} "
            f"outputs; chrF {metrics['chrf']:.1f}, with exchanged poses {metrics['shuffled_chrf']:.1f})")


# ----------------------------------------------------------------------------------- batches

def make_loader(dataset, batch_size, place=Place(), shuffle=False, accumulation=1):
    """A DataLoader over batches of like length; loading and tokenising happen in its processes."""
    config = dataset.config
    sampler = LengthBatchSampler(dataset.lengths, batch_size, shuffle, config.seed, accumulation, place.rank,
                                 place.world)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate_fn,
                      num_workers=config.num_workers, worker_init_fn=_worker_signals,
                      generator=torch.Generator(), pin_memory=place.device.type == "cuda")


def to_device(src_input, device):
    """The batch with its tensors on the device."""
    return {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in src_input.items()}


@contextmanager
def out_of_memory(src_input):
    """Turn an allocation that fails into a RunError which names the batch and what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "t allocate memory" not in str(error):
            raise
        clips, frames = src_input["attention_mask"].shape
        raise RunError(
            f"out of memory at a batch of {clips} clips x {frames} frames ({str(error).splitlines()[0]}). In the "
            "order that costs least: halve batch_size and double gradient_accumulation, which trains the same; "
            "--gradient_checkpointing true; a lower max_length; --train_embedding false") from error


# ----------------------------------------------------------------------------------- what is written

def write_whole(path, content):
    """Write bytes (or let content(file) write) beside path, flush to disk, then rename: never half a file.

    Raises RunError naming the path, what was written and the space left.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        size = aside.stat().st_size if aside.is_file() else 0
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        aside.unlink(missing_ok=True)
        raise RunError(f"could not write {path}: {error} (stopped after {size / 1e6:,.1f} MB; {free / 1e6:,.0f} "
                       "MB are free there); what stood there before is whole") from error


def _sync_folder(folder):
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _json(content):
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _tokenizer_files(model):
    """{file name: text} of the tokeniser."""
    with tempfile.TemporaryDirectory() as folder:
        model.mt5_tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir()}


def save_best(run, metrics):
    """Replace best/ as a whole. A crash between the two renames leaves best.old, which `find_best` reads."""
    best, old = run.folder / "best", run.folder / "best.old"
    aside = run.folder / f"best.{os.getpid()}.part"
    description = run.description() | {"constant": run.constant, "model": run.model.description()}
    files = {name: text.encode() for name, text in run.tokenizer.items()}
    files |= {"config.json": _json(description), "metrics.json": _json(metrics),
              "model.safetensors": safetensors_bytes(run.model.state_to_save())}
    try:
        aside.mkdir(exist_ok=True)
        for name, content in files.items():
            write_whole(aside / name, content)
        shutil.rmtree(old, ignore_errors=True)
        if best.exists():
            os.replace(best, old)
        os.replace(aside, best)
        _sync_folder(run.folder)
    except OSError as error:
        raise RunError(f"could not replace {best}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def find_best(run_path):
    """A run's folder, or its best/ -> the folder with the model. Raises DataError where there is none."""
    path = Path(run_path)
    for folder in (path / "best", path / "best.old", path, path.with_name(path.name + ".old")):
        if (folder / "model.safetensors").is_file():
            return folder
    raise DataError(f"{path}: no trained model there (best/model.safetensors); name a run's folder")


def find_latest_checkpoint(folder):
    """The folder's last.pt, or None."""
    path = Path(folder) / "last.pt"
    return path if path.is_file() else None


def save_checkpoint(path, run):
    """Write last.pt: all that `restore` needs to go on as if nothing had happened, mid-epoch and mid-window, too.

    No random state is among it: each micro-batch draws from seed, epoch and number alone (`micro_batch`).
    """
    state = {name: getattr(run, name) for name in KEPT}
    state |= {"config": run.description(), "model": run.model.state_to_save(),
              "model_description": run.model.description(), "tokenizer": run.tokenizer,
              "optimizer": run.optimizer.state_dict(), "scheduler": run.scheduler.state_dict(),
              "gradients": {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None},
              "finished": run.step >= run.total_steps and run.validated}
    write_whole(path, lambda file: torch.save(state, file))
    run.saved_at = time.monotonic()


def load_checkpoint(path):
    """last.pt -> its contents, on the CPU. Raises RunError for what is not a checkpoint of this project."""
    path = Path(path)
    if path.suffix == ".pth":
        raise RunError(f"{path}: a checkpoint of the original scripts, of no use here: its front-end averages the "
                       "joints away and its labels were shifted twice. Start anew, without --resume")
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint; without --resume a run goes on from its own last.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise RunError(f"{path}: not a readable checkpoint ({type(error).__name__}: {str(error)[:80]})") from error
    if not isinstance(state, dict) or not {"model", "optimizer", "history", "config"} <= state.keys():
        raise RunError(f"{path}: not a last.pt of this project")
    return state


# ----------------------------------------------------------------------------------- which run

def _differences(saved, now):
    """What changed between two runs' descriptions among what shapes the result, as `field: old -> new`."""
    names = now.keys() - FREE_FIELDS - {"epochs", "max_steps"}
    budget = "max_steps" if now["max_steps"] or saved.get("max_steps") else "epochs"
    other_kind = bool(now["max_steps"]) != bool(saved.get("max_steps"))
    if other_kind or now[budget] < saved.get(budget, 0):  # a larger budget goes on
        names |= {budget}
    changed = [name for name in sorted(names) if saved.get(name) != now[name]]
    return "; ".join(f"{name}: {saved.get(name)!r} -> {now[name]!r}" for name in changed)


def choose_folder(config, description, say=print):
    """-> (the run's folder, its last.pt or None). What another configuration gave is never written over."""
    if config.resume_from:
        path = Path(config.resume_from)
        changed = _differences(load_checkpoint(path)["config"], description)
        if changed:
            raise ConfigError(f"resume_from {path}: that run was configured otherwise ({changed})")
        return Path(config.output_dir or path.parent), path
    name = "demo" if isinstance(config, DemoConfig) else Path(config.data_dir).resolve().name
    base = Path(config.output_dir or f"checkpoints/{name}")
    folder, number = base, 1
    while any((folder / name).exists() for name in ("last.pt", "best", "best.old")):
        if config.auto_resume:
            try:
                changed = _differences(json.loads((folder / "config.json").read_text("utf-8")), description)
            except (OSError, ValueError):
                changed = "its config.json cannot be read"
            if not changed and find_latest_checkpoint(folder):
                return folder, folder / "last.pt"
            changed = changed or "its last.pt is missing"
            if config.output_dir:
                raise ConfigError(f"output_dir {folder} holds another run ({changed}); nothing was changed: "
                                  "name another, or --auto_resume false for the next free one")
            say(f"{folder} holds another run ({changed})")
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder, None


def lock_folder(folder):
    """Hold the run's folder until this process ends, however it ends. Raises RunError where another holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise RunError(f"could not write into {folder}: {error}; name another output_dir") from error
    if fcntl:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would live on in loading processes
        except OSError as error:
            raise RunError(f"another process is training in {folder} ({error}): wait for it, or name another "
                           "output_dir") from error
    for left in folder.glob("*.part"):  # half-written, by a process that died
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if (folder / "best.old").exists() and not (folder / "best").exists():
        os.replace(folder / "best.old", folder / "best")
    return file


# ----------------------------------------------------------------------------------- the loop

def _sums():
    return dict.fromkeys(("tokens", "nll", "loss", "correct", "clips"), 0.0)


# the fields of Run that last.pt keeps beside weights, optimiser and schedule
KEPT = ("epoch", "batch", "step", "window", "meter", "skipped", "bad_in_a_row", "history")


@dataclass
class Run:
    """All that changes while a run goes on, and what it works with."""

    config: TrainConfig
    inference: InferenceConfig
    place: Place
    folder: Path = Path()
    labels: str = ""  # digest of labels.train
    epoch: int = 0
    batch: int = 0  # of this process, within the epoch
    step: int = 0
    total_steps: int = 0
    window: dict = field(default_factory=_sums)  # since the last optimiser step, of this process
    meter: dict = field(default_factory=_sums)  # since the last validation, of all processes
    suspects: list = field(default_factory=list)  # (names, loss) of the window's micro-batches
    skipped: int = 0
    bad_in_a_row: int = 0
    history: list = field(default_factory=list)  # one dict a validation, as in metrics.jsonl
    saved_at: float = field(default_factory=time.monotonic)
    seconds: float = 0.0  # of training since the last validation,
    waited: float = 0.0  # and of these, for data
    last_loss: float = math.nan  # of the last optimiser step
    signals: Signals = field(default_factory=Signals)
    asked_to_stop: int = 0  # a signal's number, agreed on by all processes
    data: dict = None  # {"train": SignLanguageDataset, "dev": ...}
    model: SignLanguageLite = None
    tokenizer: dict = None  # {file name: text}
    net: torch.nn.Module = None  # the model, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer = None
    scheduler: torch.optim.lr_scheduler.LRScheduler = None
    loader: DataLoader = None
    dev_loader: DataLoader = None
    constant: str = ""  # the most frequent training text
    writer: object = None  # TensorBoard's

    def description(self):
        """The configuration, and what else decides whether a run may be gone on with; plain data."""
        return asdict(self.config) | {"inference": asdict(self.inference), "labels": self.labels,
                                      "processes": self.place.world}

    @property
    def validated(self):
        """Whether dev was scored at this step."""
        return bool(self.history) and self.history[-1]["step"] == self.step

    @property
    def best(self):
        """The entry of highest bleu4; ties go by chrf (one-word texts have no 4-grams), then by lower nll."""
        return max(self.history, key=lambda m: (m["bleu4"], m["chrf"], -m["dev_loss"]))


def make_optimizer(model, config, total_steps, steps_per_epoch):
    """AdamW, no decay on norms and biases; transformers' schedule: linear warm-up, cosine to min_lr, per step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, fused=trainable[0].device.type != "mps")
    longest = total_steps // 10 if config.max_steps else total_steps // 2
    warmup = min(round(config.warmup_epochs * steps_per_epoch), longest)
    # of transformers' two cosines to a minimum, the one whose first step is not lost at rate zero
    return optimizer, get_cosine_with_min_lr_schedule_with_warmup_lr_rate(optimizer, warmup, total_steps,
                                                                          min_lr=config.min_lr)


def micro_batch(run, number, counts, src_input, tgt_input, last):
    """Forward and backward of one batch, its loss summed over tokens; at the last, processes exchange."""
    # from seed, epoch and number alone: a resumed run, or more processes, draw the same dropout
    torch.manual_seed(int(np.random.SeedSequence([run.config.seed, run.epoch, number]).generate_state(1)[0]))
    src_input = to_device(src_input, run.place.device)
    silent = run.place.world > 1 and not last
    with out_of_memory(src_input), run.net.no_sync() if silent else nullcontext():
        with run.place.autocast():
            output = run.net(src_input, tgt_input)
        # a batch that does not count only keeps this process in step with the others
        (output.loss * (output.num_tokens if counts else 0)).backward()
    if counts:
        tokens, loss, nll = output.num_tokens, output.loss.item(), output.nll.item()
        run.suspects.append((src_input["names"], loss))
        now = (tokens, nll * tokens, loss * tokens, output.num_correct, len(src_input["names"]))
        run.window = {key: run.window[key] + value for key, value in zip(run.window, now)}


def optimiser_step(run):
    """Divide the window's gradient by its tokens, over all processes, clip it and step; skip the not finite."""
    *columns, signals = zip(*run.place.gather([[*run.window.values(), run.signals.number]]))
    run.asked_to_stop, window = max(signals), dict(zip(run.window, map(math.fsum, columns)))
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    # DistributedDataParallel averages over processes: undo that, the mean is over tokens
    torch._foreach_mul_([p.grad for p in parameters], run.place.world / max(window["tokens"], 1))
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.max_grad_norm or math.inf)
    if math.isfinite(norm) and math.isfinite(window["loss"]):
        run.optimizer.step()
        run.bad_in_a_row = 0
        run.meter = {key: run.meter[key] + window[key] for key in window}
    else:
        _report_skipped(run, float(norm))
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.last_loss = window["loss"] / max(window["tokens"], 1)
    run.window, run.suspects = _sums(), []


def _report_skipped(run, norm):
    run.skipped, run.bad_in_a_row = run.skipped + 1, run.bad_in_a_row + 1
    names = [name for names, loss in run.suspects if not math.isfinite(loss) for name in names]
    names = names or [name for names, _ in run.suspects for name in names]
    print(f"warning: step {run.step + 1} is skipped: its loss or gradient (norm {norm}) is not finite; "
          f"{run.skipped} so far; clips: {', '.join(names[:32])}", file=sys.stderr, flush=True)
    if run.bad_in_a_row >= 10:
        raise RunError("10 steps in a row were not finite: lower learning_rate, keep max_grad_norm above 0, and "
                       "look at the clips named above with `python train_lite.py check`")


def train_epoch(run):
    """Go through the rest of the epoch, or of the budget. Raises Stopped after a signal, the position kept."""
    sampler, accumulation = run.loader.batch_sampler, run.config.gradient_accumulation
    run.data["train"].epoch = sampler.epoch = run.epoch
    sampler.start, plan = run.batch, sampler.plan()
    run.net.train()
    clock = time.monotonic()
    for (number, _, counts), (src_input, tgt_input) in zip(plan[run.batch:], run.loader):
        run.waited += time.monotonic() - clock
        run.batch += 1
        last = run.batch % accumulation == 0 or run.batch == len(plan)  # an epoch's last window may be short
        micro_batch(run, number, counts, src_input, tgt_input, last)
        if last:
            optimiser_step(run)
        run.seconds += time.monotonic() - clock
        if last and run.step % run.config.log_interval == 0:
            log_line(run)
        if last and run.step < run.total_steps and time.monotonic() - run.saved_at > SAVE_EVERY:
            try_to_save(run)
        stop = run.asked_to_stop if run.place.world > 1 else run.signals.number
        if stop:
            raise Stopped(stop)
        if run.step >= run.total_steps:
            return
        clock = time.monotonic()


def log_line(run):
    """One line in fixed order for grep, and the same to TensorBoard."""
    tokens, lr = max(run.meter["tokens"], 1), run.scheduler.get_last_lr()[0]
    nll, accuracy = run.meter["nll"] / tokens, 100 * run.meter["correct"] / tokens
    run.place.say(
        f"epoch {run.epoch + 1:03d} | step {run.step:06d}/{run.total_steps:06d} | loss {run.last_loss:.4f} | "
        f"nll {nll:.4f} | token accuracy {accuracy:.1f} % | lr {lr:.1e} | "
        f"{run.meter['clips'] / run.seconds:.0f} clips/s | waiting for data {100 * run.waited / run.seconds:.0f} %")
    if run.writer:
        for name, value in (("loss", run.last_loss), ("nll", nll), ("accuracy", accuracy), ("lr", lr)):
            run.writer.add_scalar(f"train/{name}", value, run.step)


def try_to_save(run, last_chance=False):
    """last.pt, by the first process; a full disk is reported, and training goes on to the next save."""
    if run.place.rank == 0:
        _or_warn(lambda: save_checkpoint(run.folder / "last.pt", run), last_chance)
        run.saved_at = time.monotonic()


def _or_warn(write, last_chance=False):
    try:
        write()
    except RunError as error:
        if last_chance:
            raise
        print(f"warning: {error}; training goes on to the next save", file=sys.stderr, flush=True)


def validate(run):
    """Score dev, print and write what came out, and replace best/ where it is the best so far."""
    stop = (lambda: run.signals.number) if run.place.world == 1 else (lambda: 0)
    scores, rows = evaluate(run.model, run.dev_loader, run.inference, run.place, run.constant, stop)
    tokens = run.meter["tokens"]
    metrics = {"epoch": run.epoch + (run.step > 0), "step": run.step,
               "train_loss": run.meter["loss"] / tokens if tokens else None, **scores,
               "lr": run.scheduler.get_last_lr()[0], "skipped_steps": run.skipped,
               "clips_per_second": run.meter["clips"] / run.seconds if run.seconds else None,
               "peak_memory_gb": run.place.peak_memory_gb()}
    run.history.append(metrics)
    run.meter, run.seconds, run.waited = _sums(), 0.0, 0.0
    print_validation(run, metrics, rows)
    if run.place.rank == 0:
        lines = "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in run.history)
        _or_warn(lambda: write_whole(run.folder / "metrics.jsonl", lines.encode()))
        _or_warn(lambda: write_predictions(run.folder / "predictions_dev.txt", rows))
        if run.best is metrics:
            _or_warn(lambda: save_best(run, metrics))


def print_validation(run, m, rows):
    """One line of scores, two samples with prediction under reference, and warnings where nothing is learnt."""
    gloss = f" | gloss WER {m['gloss_wer']:.1f} %" if "gloss_wer" in m else ""
    run.place.say(
        f"epoch {m['epoch']:03d} | step {m['step']:06d} | dev_loss {m['dev_loss']:.4f} | token accuracy "
        f"{m['dev_accuracy']:.1f} % | bleu4 {m['bleu4']:.2f} (poses exchanged {m['shuffled_bleu4']:.2f}, one "
        f"constant sentence {m['constant_bleu4']:.2f}) | chrf {m['chrf']:.1f} | exact_match {m['exact_match']:.1f}"
        f" % | unique outputs {m['unique_ratio']:.0f} % (references {m['reference_unique_ratio']:.0f} %){gloss}")
    for _, name, reference, prediction in rows[:: max(1, len(rows) // 2)][:2]:
        run.place.say(f"    {name}\n      reference   {reference}\n      prediction  {prediction}")
    uniform = math.log(len(run.model.codec))
    if m["step"] and m["dev_loss"] > uniform:
        run.place.say(f"warning: dev_loss {m['dev_loss']:.2f} is worse than guessing evenly ({uniform:.2f})")
    if m["step"] and (warning := collapse_warning(m, [row[3] for row in rows])):
        run.place.say(warning)
    if run.writer:
        for name, value in m.items():
            if isinstance(value, (int, float)):
                run.writer.add_scalar(f"dev/{name}", value, m["step"])
        run.writer.add_text("dev/samples", "\n\n".join(f"{r[2]} **{r[3]}**" for r in rows[:8]), m["step"])


def write_predictions(path, rows):
    """Name, reference and prediction a line, tab-separated, in the split's order."""
    lines = ["\t".join(" ".join(cell.split()) for cell in row[1:]) + "\n" for row in rows]
    write_whole(path, ("name\treference\tprediction\n" + "".join(lines)).encode())


def loop(run):
    """Validate at step 0, then train and validate to the budget's end; last.pt after every epoch."""
    if not run.history:
        validate(run)
        try_to_save(run)
    while run.step < run.total_steps or not run.validated:
        if run.step < run.total_steps:
            train_epoch(run)
        done = run.step >= run.total_steps
        if not run.validated and (done or (run.epoch + 1) % run.config.val_interval == 0):
            validate(run)
        if run.batch == len(run.loader.batch_sampler):
            run.epoch, run.batch = run.epoch + 1, 0
        try_to_save(run, last_chance=done)


# ----------------------------------------------------------------------------------- train

def load_data(config, place):
    """-> {"train": SignLanguageDataset, "dev": ...}; the first process reads the files, the others its findings."""
    if place.rank:
        dist.barrier()
    data = {split: SignLanguageDataset(Path(config.data_dir) / f"labels.{split}", config, split)
            for split in ("train", "dev")}
    if place.world > 1 and place.rank == 0:
        dist.barrier()
    problems = too_short_for_ctc(data["train"], config)
    if problems:
        raise DataError("\n".join(problems[:5]) + f"\n{len(problems)} such clips" * (len(problems) > 5))
    return data


def build_model(config, data, state=None):
    """A new model from the training texts, or the one that last.pt holds, vocabulary and all."""
    if state is None:
        entries = data["train"].entries
        model = SignLanguageLite(config, [e["text"] for e in entries], [e["gloss"] for e in entries])
        if config.init_from:
            model.init_from(find_best(config.init_from))
        return model
    with tempfile.TemporaryDirectory() as folder:
        for name, text in state["tokenizer"].items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        model = SignLanguageLite(config, saved=state["model_description"] | {"folder": folder})
    model._freeze_mt5_layers()
    model.load_saved(state["model"])
    return model


def start(run, state):
    """Load the data, build or restore the model, and print what will happen before the first step."""
    config, place = run.config, run.place
    run.data = load_data(config, place)
    torch.manual_seed(config.seed)
    run.model = build_model(config, run.data, state).to(place.device)
    run.tokenizer = _tokenizer_files(run.model)
    for dataset in run.data.values():
        dataset.encode = run.model.codec.encode
    run.constant = Counter(e["text"] for e in run.data["train"].entries).most_common(1)[0][0]
    run.loader = make_loader(run.data["train"], config.batch_size, place, True, config.gradient_accumulation)
    run.dev_loader = make_loader(run.data["dev"], max(config.batch_size, EVAL_BATCH), place)
    clips, window = len(run.data["train"]), run.loader.batch_sampler.window
    batches, steps_per_epoch = -(-clips // config.batch_size), -(-clips // window)
    if place.world > batches:
        raise ConfigError(f"{place.world} processes for {batches} batches of {config.batch_size} clips: start "
                          "fewer processes, or lower batch_size")
    run.total_steps = config.max_steps or config.epochs * steps_per_epoch
    run.optimizer, run.scheduler = make_optimizer(run.model, config, run.total_steps, steps_per_epoch)
    if state:
        restore(run, state)
    run.net = run.model
    if place.world > 1:
        devices = [place.device.index] if place.device.type == "cuda" else None
        run.net = DistributedDataParallel(run.model, device_ids=devices)
    if config.use_tensorboard and place.rank == 0:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("use_tensorboard needs what is missing: pip install tensorboard") from error
        run.writer = SummaryWriter(Path(config.log_dir) / run.folder.name)
    print_plan(run, window)


def restore(run, state):
    """Put a run where last.pt left it; the schedule is that of the budget asked for now."""
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    for group, factor in zip(run.optimizer.param_groups, run.scheduler.lr_lambdas):
        group["lr"] = run.config.learning_rate * factor(run.scheduler.last_epoch)
    for name in KEPT:
        setattr(run, name, state[name])
    named = dict(run.model.named_parameters())
    for name, gradient in state["gradients"].items():
        named[name].grad = gradient.to(run.place.device)


def print_plan(run, window):
    """The configuration, the data, and what a step will be; warn of what deserves a second look."""
    config, place, codec = run.config, run.place, run.model.codec
    place.say("configuration: " + ", ".join(f"{k} {v!r}" for k, v in asdict(config).items()))
    place.say("\n".join(data_report(run.data, codec, config)))
    pieces = [i for e in run.data["dev"].entries for i in codec.tokenizer(e["text"]).input_ids]
    covered = 100 * sum(codec.row is None or i in codec.row for i in pieces) / len(pieces)
    place.say(f"vocabulary: {len(codec):,} of {len(codec.tokenizer):,} pieces kept; they cover {covered:.2f} % of "
              "dev's, the rest is spelled by characters")
    precision = "fp32" if isinstance(place.autocast(), nullcontext) else "bf16 autocast"
    place.say(f"a step: {config.batch_size} clips x {config.gradient_accumulation} accumulated x {place.world} "
              f"processes = {window} clips; {run.total_steps} steps; {place.device}, {precision}, "
              f"{torch.get_num_threads()} threads")
    if window < 32:
        place.say(f"warning: batch_size x gradient_accumulation x processes is {window}: the review asks for 32")


def train(config, inference):
    """Train as config says, or go on where the run was; returns the exit code."""
    place = find_place(config)
    if isinstance(config, DemoConfig):
        demo_banner(config, place)
    labels = [Path(config.data_dir) / f"labels.{split}" for split in ("train", "dev")]
    for path in labels:
        if not path.is_file():
            raise DataError(f"data_dir {config.data_dir}: no {path.name} there; it must hold labels.train, "
                            "labels.dev, labels.test and pose_format/")
    run = Run(config, inference, place, labels=f"{zlib.crc32(labels[0].read_bytes()):08x}")
    chosen = [choose_folder(config, run.description(), place.say)] if place.rank == 0 else []
    run.folder, last = place.gather(chosen)[0]
    config.output_dir = str(run.folder)
    lock = lock_folder(run.folder) if place.rank == 0 else None
    state = load_checkpoint(last) if last else None
    if state and state["finished"] and not _differences(run.description(), state["config"]):
        run.history, budget = state["history"], "max_steps" if config.max_steps else "epochs"
        place.say(f"{run.folder}: this run is finished, at step {state['step']}; nothing was changed. To go on, "
                  f"raise {budget}; to begin anew, --auto_resume false")
    else:
        start(run, state)
        place.say(f"resumed from {last} at step {run.step}" if state else f"writing to {run.folder}")
        stopped_by = run_to_end(run)
        if stopped_by:
            return 128 + stopped_by
    place.say(f"next: python train_lite.py evaluate {run.folder} --split test")
    first, end = run.history[0], run.history[-1]
    place.say(f"dev_loss {first['dev_loss']:.4f} -> {end['dev_loss']:.4f} | exact_match "
              f"{first['exact_match']:.2f} -> {end['exact_match']:.2f} | best epoch {run.best['epoch']} | "
              f"{run.folder / 'best'}")
    if lock:
        lock.close()
    return 0


def run_to_end(run):
    """The loop under signal handlers -> 0, or the number of the signal that stopped it, with last.pt written."""
    with Signals() as run.signals:
        try:
            if run.place.rank == 0:
                write_whole(run.folder / "config.json", _json(run.description()))
            loop(run)
        except Stopped as stopped:
            try_to_save(run, last_chance=True)
            run.place.say(f"stopped by signal {stopped.args[0]} at step {run.step}; the same command goes on")
            return stopped.args[0]
        finally:
            if run.writer:
                run.writer.close()
    if run.place.rank == 0 and importlib.util.find_spec("matplotlib"):
        draw_curves(run)
    return 0


def demo_banner(config, place):
    """Say that this is the demo, and write its corpus on first use."""
    place.say(f"There is no data in {DEFAULT_DATA_DIR}, so this is the built-in DEMO of synthetic signers: it shows "
              "that the code learns, not how well it reads people. For data of your own: --data_dir FOLDER")
    if place.rank == 0 and not Path(config.data_dir).exists():
        make_demo_corpus(config.data_dir)
    if place.world > 1:
        dist.barrier()


# ----------------------------------------------------------------------------------- a look at the data

def data_report(data, codec, config):
    """Lines on each split, then warnings that say what to set; codec None = texts are not counted in pieces."""
    lines, warnings, limit = [], [], config.max_length
    texts = {split: [e["text"] for e in dataset.entries] for split, dataset in data.items()}
    for split, dataset in data.items():
        reports, different = dataset.reports, set(texts[split])
        frames = np.array([r.frames for r in reports])
        total, over = frames.sum(), 100 * (frames > limit).mean()
        low, middle, high = np.percentile(frames, [5, 50, 95])
        unseen = 100 * np.sum([r.unseen for r in reports], 0) / total / [len(BODY), len(LEFT), len(RIGHT)]
        no_hand = 100 * sum(r.no_hand for r in reports) / total
        lines += [f"{split}: {len(frames)} clips of {low:.0f} / {middle:.0f} / {high:.0f} frames (5 %, median, 95 %); "
                  f"{over:.1f} % over max_length {limit}, which drops "
                  f"{100 * np.maximum(frames - limit, 0).sum() / total:.1f} % of all frames",
                  f"    joints not seen: body {unseen[0]:.1f} %, left hand {unseen[1]:.1f} %, right hand "
                  f"{unseen[2]:.1f} %; frames without a hand {no_hand:.1f} %; NaN or Inf: "
                  f"{sum(r.not_finite for r in reports)} joints; in pixels: {sum(r.in_pixels for r in reports)} clips"]
        if over > 5:
            warnings.append(f"{over:.0f} % of {split}'s clips exceed max_length {limit}: --max_length "
                            f"{math.ceil(np.percentile(frames, 97))} covers 97 %")
        if no_hand > 50:
            warnings.append(f"{split}: no hand in {no_hand:.0f} % of the frames: look with check --plot poses.png")
        if len(different) < len(frames):
            warnings.append(f"{split}: {len(frames) - len(different)} of {len(frames)} texts are repetitions: normal "
                            "for single signs")
        for other in {"dev": ["train"], "test": ["train", "dev"]}.get(split, []):
            if shared := len(different & set(texts.get(other, ()))):
                warnings.append(f"{shared} of {split}'s {len(different)} different texts occur in {other}, too: normal "
                                "for single signs; in sentences the score rewards remembering")
        if codec:
            _report_pieces(split, texts[split], codec, config, lines, warnings)
    return lines + [f"warning: {warning}" for warning in warnings]


def _report_pieces(split, texts, codec, config, lines, warnings):
    rows, limit = [codec.ids(text) for text in texts], config.max_text_length
    pieces, unknown = np.array([len(row) for row in rows]), [codec.unknown in row for row in rows]
    low, middle, high = np.percentile(pieces, [5, 50, 95])
    cut = 100 * (pieces > limit).mean()
    lines.append(f"    texts of {low:.0f} / {middle:.0f} / {high:.0f} pieces; {cut:.1f} % cut at max_text_length "
                 f"{limit}; {sum(unknown)} with unknown pieces")
    if cut:
        warnings.append(f"{cut:.1f} % of {split}'s texts exceed max_text_length {limit}: --max_text_length "
                        f"{pieces.max()} covers all")
    if any(unknown):
        warnings.append(f"{split}: the vocabulary cannot spell {sum(unknown)} texts, first {texts[unknown.index(True)]!r}")


def too_short_for_ctc(dataset, config):
    """Faults of clips whose glosses need more encoder positions for CTC than their frames make."""
    problems = []
    for entry, frames in zip(dataset.entries, dataset.lengths if config.ctc_weight else []):
        positions, need = -(-frames // config.temporal_stride), ctc_positions(entry["gloss"])
        if positions < need:
            problems.append(f"{entry['name']}: {frames} frames make {positions} positions, its {len(entry['gloss'])} "
                            f"glosses need {need} for CTC: remove it, or --temporal_stride 1 or --ctc_weight 0")
    return problems


def check_command(config, inference, args):
    """`check`: every fault of labels, texts and poses by name, and what the data are like; exit code 1 on faults."""
    if isinstance(config, DemoConfig):
        demo_banner(config, Place())
    data, problems, codec = {}, [], None
    for split in ("train", "dev", "test"):
        try:
            dataset = SignLanguageDataset(Path(config.data_dir) / f"labels.{split}", config, split, problems)
            problems += too_short_for_ctc(dataset, config) if split == "train" else []
            data |= {split: dataset} if len(dataset) else {}
        except (DataError, pickle.UnpicklingError) as error:
            problems.append(str(error))
    try:
        codec = make_codec(config, [e["text"] for e in data["train"].entries]) if "train" in data else None
    except ConfigError as error:
        print(f"warning: texts are not counted in pieces: {error}")
    print("\n".join(data_report(data, codec, config)), flush=True)
    if args.plot and data:
        draw_poses(data, args.plot)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(problems)} errors" if problems else "no errors; next: python train_lite.py with the same options")
    return 1 if problems else 0


def draw_poses(data, path, clips=2, shots=8):
    """A contact sheet: clips of each split, frames side by side, with the front-end's joints; unseen ones in red."""
    pyplot = _pyplot("check --plot")
    files = [(split, dataset.paths[i]) for split, dataset in data.items()
             for i in np.linspace(0, len(dataset) - 1, clips).astype(int)]
    figure, grid = pyplot.subplots(len(files), shots, figsize=(2 * shots, 2.2 * len(files)), squeeze=False)
    edges = [(BODY[a], BODY[b], "tab:blue") for a, b in BODY_EDGES]
    for hand, colour in ((LEFT, "tab:green"), (RIGHT, "tab:orange")):
        edges += [(hand[a], hand[b], colour) for a, b in HAND_EDGES]
    used = BODY + LEFT + RIGHT
    for (split, file), row in zip(files, grid):
        xy, scores = load_pose_file(file)
        seen = (scores > THRESHOLD) & np.isfinite(xy).all(-1)
        low, high = xy[:, used][seen[:, used]].min(0), xy[:, used][seen[:, used]].max(0)
        for t, axes in zip(np.linspace(0, len(xy) - 1, shots).astype(int), row):
            for a, b, colour in edges:
                if seen[t, a] and seen[t, b]:
                    axes.plot(*xy[t, [a, b]].T, lw=1, color=colour)
            axes.plot(*np.clip(np.nan_to_num(xy[t, [j for j in used if not seen[t, j]]]), low, high).T, "rx", ms=3)
            axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), xticks=[], yticks=[], aspect="equal")
        row[0].set_title(f"{split} {file.stem}", loc="left", fontsize=8)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
    print(f"contact sheet: {path}")


def draw_curves(run):
    """curves.png: losses and scores over steps."""
    pyplot, steps = _pyplot("curves.png"), [m["step"] for m in run.history]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    for axes, keys in zip(panels, (("train_loss", "dev_loss"), ("bleu4", "exact_match", "shuffled_bleu4"))):
        for key in keys:
            axes.plot(steps, [math.nan if m[key] is None else m[key] for m in run.history], label=key)
        axes.set_xlabel("step")
        axes.legend()
    figure.savefig(run.folder / "curves.png", dpi=120)
    pyplot.close(figure)


def _pyplot(wanted_by):
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"{wanted_by} needs a package that is missing: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


# ----------------------------------------------------------------------------------- evaluate and translate

def evaluate_command(config, inference, args):
    """`evaluate RUN`: a split's scores, one a line, 95 % bootstrap intervals behind; predictions in a file."""
    folder, place, language = find_best(args.run), find_place(config), config.language
    model = SignLanguageLite.from_pretrained(folder).to(place.device)
    constant = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("constant", "")
    config.output_dir = ""  # evaluating leaves no cache behind
    dataset = SignLanguageDataset(Path(config.data_dir) / f"labels.{args.split}", config, args.split)
    dataset.encode = model.codec.encode
    loader = make_loader(dataset, max(config.batch_size, EVAL_BATCH), place)
    metrics, rows = evaluate(model, loader, inference, place, constant)
    predictions, references = ([_clean(row[i], language) for row in rows] for i in (3, 2))
    intervals = bootstrap(predictions, references, language)
    for key, value in {"exact_match": metrics["exact_match"], **metrics}.items():
        interval = " [{:.2f}, {:.2f}]".format(*intervals[key]) if key in intervals else ""
        print(f"{key} {value if isinstance(value, str) else format(value, '.4f' if key == 'dev_loss' else '.2f')}{interval}")
    print(collapse_warning(metrics, predictions) + "\nthe ten worst clips, by chrF:")
    chrf = [CHRF().sentence_score(p, [r]).score for p, r in zip(predictions, references)]
    for i in np.argsort(chrf, kind="stable")[:10]:
        print(f"    {rows[i][1]}\n      reference   {rows[i][2]}\n      prediction  {rows[i][3]}")
    out = Path(args.run) / f"predictions_{args.split}.txt"
    write_predictions(out, rows)
    write_whole(out.with_name(f"metrics_{args.split}.json"), _json(metrics))
    print(f"predictions beside references: {out}; all figures: metrics_{args.split}.json beside it")
    return 0


def bootstrap(predictions, references, language, samples=1000):
    """{metric: (low, high)}: 95 % intervals over resampled clips; sacrebleu's for BLEU-4 and chrF."""
    intervals = {}
    for key, metric in (("bleu4", BLEU(tokenize="zh" if language == "zh" else "13a")), ("chrf", CHRF())):
        score = metric.corpus_score(predictions, [references], n_bootstrap=samples)
        intervals[key] = (score._mean - score._ci, score._mean + score._ci)
    right = np.array([100.0 * (p == r) for p, r in zip(predictions, references)])
    means = np.random.default_rng(0).choice(right, (samples, len(right))).mean(1)
    return intervals | {"exact_match": tuple(np.percentile(means, [2.5, 97.5]))}


def translate_command(config, inference, args):
    """`translate RUN CLIP...`: name and text a line; a bad clip is reported, the rest translated, exit code 1."""
    place, bad = find_place(config), 0
    model = SignLanguageLite.from_pretrained(find_best(args.run)).to(place.device)
    for begin in range(0, len(args.clips), EVAL_BATCH):
        names, poses = [], []
        for path in args.clips[begin:begin + EVAL_BATCH]:
            try:
                poses.append(read_clip(path, model.config))
                names.append(path)
            except (DataError, pickle.UnpicklingError, OSError) as error:
                bad += 1
                print(f"error: {error}", file=sys.stderr, flush=True)
        if not poses:
            continue
        src_input = to_device(pad_poses(poses), place.device)
        with out_of_memory(src_input), place.autocast():
            texts = model.generate(src_input, **asdict(inference))
        for path, text in zip(names, texts):
            print(json.dumps({"clip": path, "text": text}, ensure_ascii=False) if args.json else f"{path}\t{text}",
                  flush=True)
    return 1 if bad else 0


# ----------------------------------------------------------------------------------- the command line

COMMANDS = {"train": train, "check": check_command, "evaluate": evaluate_command, "translate": translate_command}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def make_parser(command):
    """The command's parser: its own arguments, then one flag a field of TrainConfig and InferenceConfig."""
    parser = HfArgumentParser([TrainConfig, InferenceConfig], prog=f"train_lite.py {command}", description=__doc__,
                              formatter_class=_HelpFormatter, allow_abbrev=False)
    if command in ("evaluate", "translate"):
        parser.add_argument("run", help="a run's folder, or its best/")
    if command == "evaluate":
        parser.add_argument("--split", default="dev", help="the label file's ending: train, dev or test")
    if command == "translate":
        parser.add_argument("clips", nargs="+", help="pose files")
        parser.add_argument("--json", action="store_true", help="one JSON object a line")
    if command == "check":
        parser.add_argument("--plot", default="", metavar="FILE.png", help="draw a contact sheet of some clips")
    for flag, name in (("--no-resume", "auto_resume"), ("--no-tensorboard", "use_tensorboard")):  # the original's
        parser.add_argument(flag, dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def parse(argv):
    """-> (command, config, inference, the command's own arguments). Exits with 2 on a bad command line."""
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("train", argv)
    parser = make_parser(command)
    parser.set_defaults(data_dir=None)  # to see whether it is given
    args, standard, kind = parser.parse_args(rest), TrainConfig(), TrainConfig
    if command in ("evaluate", "translate"):
        defaults = json.loads((find_best(args.run) / "config.json").read_text(encoding="utf-8"))
        defaults |= defaults["inference"]
    else:
        data_dir = args.data_dir or standard.data_dir
        if args.data_dir is None and data_dir == DEFAULT_DATA_DIR and not Path(data_dir).exists():
            kind = DemoConfig
        elif args.mt5_path == "":
            kind = ScratchConfig
        defaults = {item.name: item.default for item in fields(kind)}
    names = [item.name for item in (*fields(TrainConfig), *fields(InferenceConfig))]
    parser.set_defaults(**{name: defaults[name] for name in names if name in defaults})
    args = parser.parse_args(rest)
    config, inference = ({item.name: getattr(args, item.name) for item in fields(c)} for c in (kind, InferenceConfig))
    return command, kind(**config), InferenceConfig(**inference), args


def main(argv=None):
    """Run a command; returns the exit code. What the user can mend is one clear message, without a traceback."""
    try:
        command, config, inference, args = parse(sys.argv[1:] if argv is None else argv)
        if command == "train":
            return train(config, inference)
        return COMMANDS[command](config, inference, args)
    except (ConfigError, DataError, RunError, pickle.UnpicklingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
