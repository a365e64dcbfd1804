"""The loop and the commands.

    python train_lite.py [train]            train; where there is no data of your own, on the built-in demo corpus
    python train_lite.py check              look through the data without training
    python train_lite.py evaluate RUN       score a run's best model on a split
    python train_lite.py translate RUN CLIP [CLIP ...]

then `--field value` for any field of config_lite.py. A run is a folder: config.json, metrics.jsonl (a line a
validation), predictions_dev.txt, last.pt (to go on from) and best/ (to use, complete in itself).
"""
import argparse
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

from config_lite import (DEFAULT_DATA_DIR, ConfigError, DemoConfig, InferenceConfig, ScratchConfig, TrainConfig)
from datasets_lite import (DataError, LengthBatchSampler, SignLanguageDataset, make_demo_corpus, pad_poses, read_clip)
from models_lite import SignLanguageLite, ctc_positions

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock on the run's folder, no peak memory of the process
    fcntl = resource = None

SAVE_EVERY = 15 * 60  # seconds between two last.pt at most
EVAL_BATCH = 16  # clips per forward pass of an evaluation, at least
# Fields that may differ from those of a run that is gone on with: they change where and how it runs, not what comes out.
FREE_FIELDS = {"output_dir", "resume_from", "auto_resume", "num_workers", "device", "log_interval", "val_interval",
               "use_tensorboard", "log_dir", "gradient_checkpointing", "on_bad_clip"}


class RunError(RuntimeError):
    """A run cannot start or go on; the message says why and what to do."""


class Stopped(Exception):
    """A signal asked the run to stop; `number` is the signal's."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


# ---------------------------------------------------------------------------------------------- processes, signals

@dataclass
class Place:
    """Where this process runs: its rank among `world`, and its device."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def say(self, text):
        """Print once, not once a process."""
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, values):
        """A list of numbers, summed over all processes."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, rows):
        """The processes' lists, joined, in every process."""
        if self.world == 1:
            return rows
        parts = [None] * self.world
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def autocast(self):
        """bf16 where the GPU has it in hardware, fp32 elsewhere; never fp16, which overflows in mT5."""
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def peak_memory_gb(self):
        """Of the GPU, or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        if resource is None:
            return 0.0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def find_place(config):
    """The device, and the process group where torchrun started this process."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device is {name!r}, but torch {torch.__version__} finds none here: use --device auto or cpu")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if name == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    return Place(rank, world, device)


class Signals:
    """The first SIGINT, SIGTERM or SIGUSR1 is kept for the loop to see; a second one ends the process at once."""

    def __init__(self):
        self.number, self.before = 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self.before[number] = signal.signal(number, self.catch)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number, _):
        """The handler; it must not print through sys.stdout, which may be in the middle of a line."""
        if self.number:
            os._exit(128 + number)
        self.number = number
        os.write(2, b"\nstopping: last.pt is written after this micro-batch; a second signal stops at once\n")


def _worker_signals(_):
    """Loading processes: a Ctrl-C is the main process's to handle, a SIGTERM ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------- scores

def _clean(text, language):
    """What is scored: NFKC (mT5's vocabulary knows no full-width punctuation), stripped; Chinese without spaces."""
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

    Both sides are NFKC-normalised and stripped; "zh" is scored by character and without spaces, other languages by
    sacrebleu's "13a" words. ROUGE-L is the mean over sentences. Raises ValueError for unequal or zero lengths.
    """
    if len(predictions) != len(references) or not len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: there must be one for each")
    predictions, references = ([_clean(t, language) for t in texts] for texts in (predictions, references))
    metrics, tokenize = {}, "zh" if language == "zh" else "13a"
    for order in (1, 2, 3, 4):
        bleu = BLEU(tokenize=tokenize, max_ngram_order=order)
        metrics[f"bleu{order}"] = bleu.corpus_score(predictions, [references]).score
    metrics["chrf"] = CHRF().corpus_score(predictions, [references]).score
    split = list if language == "zh" else str.split
    rouge = [_rouge_l(split(p), split(r)) for p, r in zip(predictions, references)]
    metrics["rouge_l"] = 100 * sum(rouge) / len(rouge)
    metrics["exact_match"] = 100 * sum(p == r for p, r in zip(predictions, references)) / len(references)
    metrics["unique_ratio"] = 100 * len(set(predictions)) / len(predictions)
    metrics["bleu_signature"] = str(bleu.get_signature())
    return metrics


def exchange(texts, seed=0):
    """A fixed exchange of clips: order[i] is the clip that i gets, with another text than its own wherever possible."""
    rng, clips = np.random.default_rng(seed), {}
    for i, text in enumerate(texts):
        clips.setdefault(text, []).append(i)
    groups = list(clips.values())
    ranked = [i for g in rng.permutation(len(groups)) for i in groups[g]]
    shift = max(max(map(len, groups)), len(texts) // 2)  # farther than any text's clips reach
    order = [0] * len(texts)
    for position, i in enumerate(ranked):
        order[i] = ranked[(position + shift) % len(ranked)]
    return order


def edit_distance(found, wanted):
    """Insertions, deletions and replacements that turn one list into the other, at least."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(found, 1):
        corner, row[0] = row[0], i
        for j, b in enumerate(wanted, 1):
            corner, row[j] = row[j], min(corner + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@torch.no_grad()
def evaluate(model, data_loader, inference, place=None, constant="", stop=lambda: 0):
    """Score a whole split -> (metrics, rows of (clip, name, reference, prediction) in the split's order).

    dev_loss is the plain nll per token. No pose depends on its batch in eval mode, so `shuffled_*`, the scores with
    the clips exchanged among each other, need no second decoding. `constant` is the sentence of the constant_bleu4
    baseline. Raises Stopped when `stop()` gives a signal's number.
    """
    place, dataset, started = place or Place(), data_loader.dataset, time.monotonic()
    rows, sums, was_training = [], [], model.training
    model.eval()
    plan = data_loader.batch_sampler.plan()
    for (number, clips, counts), (src_input, tgt_input) in tqdm(
            zip(plan, data_loader), total=len(plan), desc=dataset.phase, unit=" batches", disable=_quiet(place), leave=False):
        if stop():
            raise Stopped(stop())
        if not counts:
            continue
        src_input = to_device(src_input, place.device)
        with out_of_memory(src_input), place.autocast():
            output = model(src_input, tgt_input)
            texts = model.generate(src_input, **asdict(inference))
        sums.append((number, output.nll.item() * output.num_tokens, output.num_tokens, output.num_correct))
        glosses = output.gloss or [None] * len(texts)
        rows += list(zip(clips, src_input["names"], tgt_input["gt_sentence"], texts, glosses, tgt_input["gt_gloss"]))
    model.train(was_training)
    rows, sums = sorted(place.gather(rows), key=lambda row: row[0]), sorted(place.gather(sums))
    tokens, seconds = sum(s[2] for s in sums), time.monotonic() - started
    metrics = {"dev_loss": math.fsum(s[1] for s in sums) / tokens, "dev_accuracy": 100 * sum(s[3] for s in sums) / tokens}
    metrics |= _text_scores([r[3] for r in rows], [r[2] for r in rows], dataset.config.language, constant)
    if any(row[4] is not None and row[5] for row in rows):
        wrong = sum(edit_distance(row[4], row[5]) for row in rows if row[5])
        metrics["gloss_wer"] = 100 * wrong / sum(len(row[5]) for row in rows)
    metrics["decoded_clips_per_second"] = len(rows) / max(seconds, 1e-9)
    return metrics, [row[:4] for row in rows]


def _text_scores(predictions, references, language, constant):
    """The metrics beside their baselines: poses exchanged, one constant sentence, how varied the references are."""
    metrics = compute_metrics(predictions, references, language)
    shuffled = compute_metrics([predictions[i] for i in exchange(references)], references, language)
    metrics |= {f"shuffled_{key}": shuffled[key] for key in ("bleu4", "chrf", "exact_match")}
    if constant:
        metrics["constant_bleu4"] = compute_metrics([constant] * len(references), references, language)["bleu4"]
    metrics["reference_unique_ratio"] = 100 * len({_clean(r, language) for r in references}) / len(references)
    return metrics


def collapse_warning(metrics, predictions):
    """A sentence where the outputs do not depend on the poses, else "".

    chrF tells, since BLEU-4 of one-word texts is 0 whatever the model does.
    """
    top, count = Counter(predictions).most_common(1)[0]
    varied = metrics["unique_ratio"] / metrics["reference_unique_ratio"]
    gap = metrics["chrf"] - metrics["shuffled_chrf"]
    if len(predictions) > 1 and (gap < 1 and metrics["exact_match"] < 50 or varied < 0.2):
        return (f"warning: the model ignores the pose: it has collapsed onto {top!r} ({count} of {len(predictions)} "
                f"outputs; chrF {metrics['chrf']:.1f} with the right poses, {metrics['shuffled_chrf']:.1f} with exchanged ones)")
    return ""


# ---------------------------------------------------------------------------------------------- batches to the device

def _quiet(place):
    """No progress bar: not a terminal, or not the process that prints."""
    return place.rank != 0 or not sys.stderr.isatty()


def make_loader(dataset, batch_size, place=Place(), shuffle=False, accumulation=1):
    """A DataLoader over batches of like length; loading and tokenising happen in its processes."""
    config = dataset.config
    sampler = LengthBatchSampler(dataset.lengths, batch_size, shuffle, config.seed, accumulation, place.rank, place.world)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate_fn, num_workers=config.num_workers,
                      worker_init_fn=_worker_signals, generator=torch.Generator(), pin_memory=place.device.type == "cuda")


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
            f"out of memory at a batch of {clips} clips x {frames} frames. In the order that costs least: halve batch_size "
            "and double gradient_accumulation (the same result); --gradient_checkpointing true; a lower max_length; "
            f"--train_embedding false ({str(error).splitlines()[0]})") from error


# ---------------------------------------------------------------------------------------------- what is written

def _need(path):
    free = shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists())).free
    return f"{free / 1e6:,.0f} MB free there"


def write_whole(path, content):
    """Write bytes beside path, flush them to disk, then rename: a crash or a full disk leaves the old file whole.

    Raises RunError naming the path, the need and the space.
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
        aside.unlink(missing_ok=True)
        raise RunError(f"could not write {path}: {error} (stopped after {size / 1e6:,.1f} MB; {_need(path)}); "
                       "what stood there before is whole") from error


def _sync_folder(folder):
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _tokenizer_files(model):
    """{file name: text} of the tokeniser."""
    with tempfile.TemporaryDirectory() as folder:
        model.mt5_tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir()}


def save_best(run, metrics):
    """Replace best/ as a whole. A crash between the two renames leaves best.old, which `find_best` reads."""
    best, old = run.folder / "best", run.folder / "best.old"
    aside = run.folder / f"best.{os.getpid()}.part"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"could not write {best}: {error}") from error
    try:
        for name, text in _tokenizer_files(run.model).items():
            write_whole(aside / name, text.encode())
        write_whole(aside / "config.json", _json(run.description() | {"model": run.model.description()}))
        write_whole(aside / "metrics.json", _json(metrics))
        write_whole(aside / "model.safetensors", safetensors_bytes(run.model.state_to_save()))
    except RunError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if best.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(best, old)
    os.replace(aside, best)
    _sync_folder(run.folder)
    shutil.rmtree(old, ignore_errors=True)


def find_best(run_path):
    """A run's folder, or its best/ -> the folder with the model. Raises DataError where there is none."""
    path = Path(run_path)
    for folder in (path / "best", path / "best.old", path, path.with_name(path.name + ".old")):
        if (folder / "model.safetensors").is_file():
            return folder
    raise DataError(f"{path}: no trained model there (best/model.safetensors); train one, or name a run's folder")


def _json(content):
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def find_latest_checkpoint(folder):
    """The folder's last.pt, or None."""
    path = Path(folder) / "last.pt"
    return path if path.is_file() else None


def save_checkpoint(path, run):
    """Write last.pt: all that `restore` needs to go on as if nothing had happened, mid-epoch and mid-window, too.

    No random state is needed: each micro-batch draws from seed, epoch and number alone (see `micro_batch`).
    """
    named = dict(run.model.named_parameters())
    state = {
        "config": run.description(), "model": run.model.state_to_save(), "model_description": run.model.description(),
        "tokenizer": _tokenizer_files(run.model), "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(), "epoch": run.epoch, "batch": run.batch, "step": run.step,
        "window": dict(run.window), "meter": dict(run.meter), "skipped": run.skipped, "bad_in_a_row": run.bad_in_a_row,
        "gradients": {n: p.grad for n, p in named.items() if p.grad is not None} if run.window["tokens"] else {},
        "history": run.history, "finished": run.step >= run.total_steps and run.validated}
    write_whole(path, lambda file: torch.save(state, file))
    run.saved_at = time.monotonic()


def load_checkpoint(path):
    """last.pt -> its contents, on the CPU. Raises RunError for what is not a checkpoint of this project."""
    path = Path(path)
    if path.suffix == ".pth":
        raise RunError(f"{path}: a checkpoint of the original scripts. Its front-end averages the joints away and its "
                       "labels were shifted twice, so its weights are of no use here: start anew, without --resume")
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint; leave out --resume to go on from the run's own last.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise RunError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict) or not {"model", "optimizer", "history", "config"} <= state.keys():
        raise RunError(f"{path}: not a last.pt of this project")
    return state


# ---------------------------------------------------------------------------------------------- which run

def _differences(saved, now):
    """What changed between two runs' descriptions among what shapes the result, as `field: old -> new`."""
    names = now.keys() - FREE_FIELDS - {"epochs", "max_steps"}
    budget = "max_steps" if now["max_steps"] or saved.get("max_steps") else "epochs"
    other_kind = bool(now["max_steps"]) != bool(saved.get("max_steps"))
    if other_kind or now[budget] < saved.get(budget, 0):  # a larger budget goes on
        names |= {budget}
    return [f"{name}: {saved.get(name)!r} -> {now[name]!r}" for name in sorted(names) if saved.get(name) != now[name]]


def choose_folder(config, description, say=print):
    """-> (the run's folder, its last.pt or None). Nothing that another configuration gave is ever written over."""
    if config.resume_from:
        path = Path(config.resume_from)
        changed = _differences(load_checkpoint(path)["config"], description)
        if changed:
            raise ConfigError(f"resume_from {path}: that run had another configuration ({'; '.join(changed)})")
        return Path(config.output_dir or path.parent), path
    base = Path(config.output_dir or Path("checkpoints") / Path(config.data_dir).resolve().name)
    base = Path("checkpoints/demo") if isinstance(config, DemoConfig) and not config.output_dir else base
    folder, number = base, 1
    while (folder / "last.pt").exists() or (folder / "best").exists() or (folder / "best.old").exists():
        if config.auto_resume:
            saved = _read_json(folder / "config.json")
            changed = _differences(saved, description) if saved else ["its config.json is missing"]
            if not changed and find_latest_checkpoint(folder):
                return folder, folder / "last.pt"
            reason = "; ".join(changed) or "its last.pt is missing"
            if config.output_dir:
                raise ConfigError(f"output_dir {folder} holds another run ({reason}); nothing was changed: name another "
                                  "output_dir, or --auto_resume false for the next free one")
            say(f"{folder} holds another run ({reason})")
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    if folder != base:
        say(f"this run goes to {folder}")
    return folder, None


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def lock_folder(folder):
    """Hold the run's folder for this process; the lock goes with the process. Raises RunError where another holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise RunError(f"could not write into {folder}: {error}; name another output_dir") from error
    if fcntl:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked loading processes would keep it
        except (BlockingIOError, PermissionError) as error:
            raise RunError(f"another process is training in {folder}: wait for it, or name another output_dir") from error
    for left in folder.glob("*.part"):  # half-written, from a process that died
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if (folder / "best.old").exists() and not (folder / "best").exists():
        os.replace(folder / "best.old", folder / "best")
    return file


# ---------------------------------------------------------------------------------------------- the loop

def _empty_window():
    return {"tokens": 0.0, "nll": 0.0, "loss": 0.0, "correct": 0.0, "clips": 0.0}


@dataclass
class Run:
    """All that changes while a run goes on, and what it works with."""

    config: TrainConfig
    inference: InferenceConfig
    place: Place
    folder: Path
    labels: str  # digest of labels.train
    signals: Signals = field(default_factory=Signals)
    epoch: int = 0
    batch: int = 0  # of this process, within the epoch
    step: int = 0
    total_steps: int = 0
    window: dict = field(default_factory=_empty_window)  # sums since the last optimiser step, of this process
    meter: dict = field(default_factory=_empty_window)  # sums since the last validation, of all processes
    skipped: int = 0
    bad_in_a_row: int = 0
    history: list = field(default_factory=list)  # one dict a validation, as in metrics.jsonl
    suspects: list = field(default_factory=list)  # (names, loss) of the window's micro-batches
    saved_at: float = field(default_factory=time.monotonic)
    seconds: float = 0.0  # of training since the last validation, and how much of it was waiting for data
    waited: float = 0.0
    last_loss: float = math.nan  # of the last optimiser step
    asked_to_stop: int = 0  # a signal's number, agreed on by all processes
    data: dict = None  # {"train": SignLanguageDataset, "dev": ...}
    model: SignLanguageLite = None
    net: torch.nn.Module = None  # the model, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer = None
    scheduler: object = None
    loader: DataLoader = None
    dev_loader: DataLoader = None
    constant: str = ""  # the most frequent training text
    writer: object = None  # TensorBoard's

    def description(self):
        """The configuration and what else decides whether a run may be gone on with; plain data."""
        return asdict(self.config) | {"inference": asdict(self.inference), "labels": self.labels,
                                      "processes": self.place.world}

    @property
    def validated(self):
        return bool(self.history) and self.history[-1]["step"] == self.step

    @property
    def best(self):
        """The history's best entry: by bleu4, ties by chrf (one-word texts have no 4-grams), then by lower nll."""
        return max(self.history, key=lambda m: (m["bleu4"], m["chrf"], -m["dev_loss"]))


def load_data(config, place):
    """-> {"train": SignLanguageDataset, "dev": ...}; the first process reads the files, the others its findings."""
    if place.rank:
        dist.barrier()
    data = {split: SignLanguageDataset(Path(config.data_dir) / f"labels.{split}", config, split)
            for split in ("train", "dev")}
    if place.world > 1 and place.rank == 0:
        dist.barrier()
    return data


def build_model(config, data, state=None):
    """A new model from the training texts, or the one that last.pt holds, vocabulary and all."""
    if state is None:
        entries = data["train"].entries
        model = SignLanguageLite(config, texts=[e["text"] for e in entries], glosses=[e["gloss"] for e in entries])
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


def make_optimizer(model, config, total_steps, steps_per_epoch):
    """AdamW without decay on norms and biases, and transformers' schedule: linear warm-up, cosine to min_lr, per step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=trainable[0].device.type in ("cpu", "cuda"))
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.max_steps:
        warmup = min(warmup, total_steps // 10)
    # of transformers' two cosines to a minimum, the one whose first step is not wasted at rate zero
    scheduler = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(optimizer, warmup, total_steps, min_lr=config.min_lr)
    return optimizer, scheduler


def micro_batch(run, number, counts, src_input, tgt_input, last):
    """Forward and backward of one batch, its loss summed over tokens; `last` of the window lets processes exchange."""
    # from seed, epoch and number alone: whatever was interrupted or divided among processes draws the same dropout
    torch.manual_seed(int(np.random.SeedSequence([run.config.seed, run.epoch, number]).generate_state(1)[0]))
    src_input = to_device(src_input, run.place.device)
    alone = run.place.world == 1 or last
    with out_of_memory(src_input), nullcontext() if alone else run.net.no_sync():
        with run.place.autocast():
            output = run.net(src_input, tgt_input)
        # a repeated batch only keeps this process in step with the others
        (output.loss * (output.num_tokens if counts else 0)).backward()
    if counts:
        loss, nll, tokens = output.loss.item(), output.nll.item(), output.num_tokens
        run.suspects.append((src_input["names"], loss))
        for key, value in (("tokens", tokens), ("nll", nll * tokens), ("loss", loss * tokens),
                           ("correct", output.num_correct), ("clips", len(src_input["names"]))):
            run.window[key] += value


def optimiser_step(run):
    """Divide the window's gradient by its tokens, over all processes, clip it, and step; skip it where not finite."""
    sums = run.place.sum([run.window[key] for key in run.window] + [run.signals.number])
    run.window, run.asked_to_stop = dict(zip(run.window, sums)), int(sums[-1])
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    # DistributedDataParallel averages over processes, so undo that: the mean is over tokens
    torch._foreach_mul_([p.grad for p in parameters], run.place.world / max(run.window["tokens"], 1))
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.max_grad_norm or math.inf)
    if math.isfinite(norm) and math.isfinite(run.window["loss"]):
        run.optimizer.step()
        run.bad_in_a_row = 0
        for key in run.meter:
            run.meter[key] += run.window[key]
    else:
        _report_skipped(run, float(norm))
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.last_loss = run.window["loss"] / max(run.window["tokens"], 1)
    run.window, run.suspects = _empty_window(), []


def _report_skipped(run, norm):
    run.skipped, run.bad_in_a_row = run.skipped + 1, run.bad_in_a_row + 1
    names = [name for names, loss in run.suspects if not math.isfinite(loss) for name in names]
    names = names or [name for names, _ in run.suspects for name in names]
    print(f"warning: step {run.step + 1} skipped, its loss or gradient (norm {norm}) is not finite; {run.skipped} so far; "
          f"clips: {', '.join(names[:32])}{', ...' if len(names) > 32 else ''}", file=sys.stderr, flush=True)
    if run.bad_in_a_row >= 10:
        raise RunError("10 steps in a row were not finite: lower learning_rate, keep max_grad_norm above 0, and look at "
                       "the clips named above with `python train_lite.py check`")


def train_epoch(run):
    """Go through the rest of an epoch, or of the budget. Raises Stopped after a signal, with the position kept."""
    run.data["train"].epoch = run.loader.batch_sampler.epoch = run.epoch
    run.loader.batch_sampler.start = run.batch
    plan, accumulation = run.loader.batch_sampler.plan(), run.config.gradient_accumulation
    run.net.train()
    clock = time.monotonic()
    for (number, _, counts), (src_input, tgt_input) in zip(plan[run.batch:], run.loader):
        loaded = time.monotonic()
        run.batch += 1
        last = run.batch % accumulation == 0 or run.batch == len(plan)
        micro_batch(run, number, counts, src_input, tgt_input, last)
        if last:
            optimiser_step(run)
        run.waited, run.seconds = run.waited + loaded - clock, run.seconds + time.monotonic() - clock
        if last and run.step % run.config.log_interval == 0:
            log_line(run)
        if last and run.step < run.total_steps and time.monotonic() - run.saved_at > SAVE_EVERY:
            try_to_save(run)
        stop = run.asked_to_stop if run.place.world > 1 else run.signals.number
        if stop and (last or run.place.world == 1):
            raise Stopped(stop)
        if run.step >= run.total_steps:
            return
        clock = time.monotonic()


def log_line(run):
    """One line in fixed order for grep, and the same to TensorBoard."""
    meter, lr = run.meter, run.scheduler.get_last_lr()[0]
    tokens = max(meter["tokens"], 1)
    nll, accuracy, speed = meter["nll"] / tokens, 100 * meter["correct"] / tokens, meter["clips"] / max(run.seconds, 1e-9)
    run.place.say(
        f"epoch {run.epoch + 1:03d} | step {run.step:06d}/{run.total_steps:06d} | loss {run.last_loss:.4f} | nll {nll:.4f} | "
        f"token accuracy {accuracy:.1f} % | lr {lr:.2e} | {speed:.0f} clips/s | waiting for data "
        f"{100 * run.waited / max(run.seconds, 1e-9):.0f} %")
    if run.writer:
        for name, value in (("loss", run.last_loss), ("nll", nll), ("token_accuracy", accuracy), ("lr", lr)):
            run.writer.add_scalar(f"train/{name}", value, run.step)


def try_to_save(run, last_chance=False):
    """Write last.pt in the first process; a disk that is full is reported, and training goes on to the next save."""
    if run.place.rank:
        return
    try:
        save_checkpoint(run.folder / "last.pt", run)
    except RunError as error:
        if last_chance:
            raise
        print(f"warning: {error}; training goes on to the next save", file=sys.stderr, flush=True)
        run.saved_at = time.monotonic()


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
    run.meter, run.seconds, run.waited = _empty_window(), 0.0, 0.0
    print_validation(run, metrics, rows)
    if run.place.rank == 0:
        try:
            write_whole(run.folder / "metrics.jsonl",
                        "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in run.history).encode())
            write_predictions(run.folder / "predictions_dev.txt", rows)
            if run.best is metrics:
                save_best(run, metrics)
        except RunError as error:
            print(f"warning: {error}; training goes on to the next save", file=sys.stderr, flush=True)


def print_validation(run, m, rows):
    """One line of scores, two samples with prediction under reference, and a warning where the model has not learnt."""
    gloss = f" | gloss WER {m['gloss_wer']:.1f} %" if "gloss_wer" in m else ""
    run.place.say(
        f"epoch {m['epoch']:03d} | step {m['step']:06d} | dev_loss {m['dev_loss']:.4f} | token accuracy {m['dev_accuracy']:.1f} % | "
        f"bleu4 {m['bleu4']:.2f} (poses exchanged {m['shuffled_bleu4']:.2f}, one constant sentence "
        f"{m.get('constant_bleu4', 0):.2f}) | chrf {m['chrf']:.1f} | exact_match {m['exact_match']:.1f} % | unique outputs "
        f"{m['unique_ratio']:.0f} % of {m['reference_unique_ratio']:.0f} %{gloss}")
    for _, name, reference, prediction in rows[:: max(1, len(rows) // 2)][:2]:
        run.place.say(f"    {name}\n      reference   {reference}\n      prediction  {prediction}")
    uniform = math.log(len(run.model.codec))
    if m["step"] and m["dev_loss"] > uniform:
        run.place.say(f"warning: dev_loss {m['dev_loss']:.2f} is worse than guessing evenly among all pieces ({uniform:.2f})")
    if m["step"] and (warning := collapse_warning(m, [row[3] for row in rows])):
        run.place.say(warning)
    if run.writer:
        for name, value in m.items():
            if isinstance(value, (int, float)):
                run.writer.add_scalar(f"dev/{name}", value, m["step"])
        run.writer.add_text("dev/samples", "\n\n".join(f"{r[2]}\n\n**{r[3]}**" for r in rows[:8]), m["step"])


def write_predictions(path, rows):
    """name, reference and prediction a line, tab-separated, in the split's order."""
    lines = ["name\treference\tprediction"] + ["\t".join(" ".join(str(c).split()) for c in row[1:]) for row in rows]
    write_whole(path, ("\n".join(lines) + "\n").encode())


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


def start(run, state):
    """Load the data, build or restore the model, and print what will happen before the first step."""
    config, place = run.config, run.place
    run.data = load_data(config, place)
    torch.manual_seed(config.seed)
    run.model = build_model(config, run.data, state).to(place.device)
    for dataset in run.data.values():
        dataset.encode = run.model.codec.encode
    run.constant = Counter(e["text"] for e in run.data["train"].entries).most_common(1)[0][0]
    run.loader = make_loader(run.data["train"], config.batch_size, place, True, config.gradient_accumulation)
    run.dev_loader = make_loader(run.data["dev"], max(config.batch_size, EVAL_BATCH), place)
    clips, window = len(run.data["train"]), run.loader.batch_sampler.window
    if place.world > -(-clips // config.batch_size):
        raise ConfigError(f"{place.world} processes, but only {-(-clips // config.batch_size)} batches of {config.batch_size} "
                          f"in {clips} training clips: start fewer processes or lower batch_size")
    steps_per_epoch = -(-clips // window)
    run.total_steps = config.max_steps or config.epochs * steps_per_epoch
    run.optimizer, run.scheduler = make_optimizer(run.model, config, run.total_steps, steps_per_epoch)
    if state:
        restore(run, state)
    run.net = DistributedDataParallel(
        run.model, device_ids=[place.device.index] if place.device.type == "cuda" else None) if place.world > 1 else run.model
    run.writer = _tensorboard(run)
    print_plan(run, window)


def restore(run, state):
    """Put a run where last.pt left it; the schedule is that of the budget asked for now."""
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    for group, base, factor in zip(run.optimizer.param_groups, run.scheduler.base_lrs, run.scheduler.lr_lambdas):
        group["lr"] = base * factor(run.scheduler.last_epoch)
    for name in ("epoch", "batch", "step", "window", "meter", "skipped", "bad_in_a_row", "history"):
        setattr(run, name, state[name])
    named = dict(run.model.named_parameters())
    for name, gradient in state["gradients"].items():
        named[name].grad = gradient.to(run.place.device)


def _tensorboard(run):
    if not run.config.use_tensorboard or run.place.rank:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("use_tensorboard is True, but the package is not installed: pip install tensorboard") from error
    return SummaryWriter(Path(run.config.log_dir) / run.folder.name)


def print_plan(run, window):
    """The configuration, the data, and what a step will be; warn of what deserves a second look."""
    config, place = run.config, run.place
    shown = {k: v for k, v in asdict(config).items()}
    place.say("configuration: " + ", ".join(f"{k} {v!r}" for k, v in shown.items()))
    for line in data_report(run.data, run.model.codec, config):
        place.say(line)
    precision = "bf16 autocast" if not isinstance(place.autocast(), nullcontext) else "fp32"
    place.say(f"vocabulary: {vocabulary_report(run)}")
    place.say(f"one step: {config.batch_size} clips x {config.gradient_accumulation} accumulated x {place.world} processes = "
              f"{window} clips; {run.total_steps} steps; {place.device}, {precision}, {torch.get_num_threads()} threads")
    if window < 32:
        place.say(f"warning: batch_size x gradient_accumulation x processes is {window}, under 32 (review, step 3)")


def vocabulary_report(run):
    """What is kept of the pieces, and how much of dev's text they cover."""
    codec = run.model.codec
    texts = [e["text"] for e in run.data["dev"].entries]
    unknown = codec.row[codec.tokenizer.unk_token_id] if codec.row else codec.tokenizer.unk_token_id
    full = [i for ids in codec.tokenizer(texts).input_ids for i in ids]
    kept = sum(codec.row is None or i in codec.row for i in full)
    lost = sum(codec.ids(text).count(unknown) for text in texts)
    return (f"{len(codec):,} of {len(codec.tokenizer):,} pieces kept; they cover {100 * kept / len(full):.2f} % of dev's "
            f"pieces, the rest is spelled; {lost} unknown")


def data_report(data, codec, config):
    """Lines on each split, then warnings that say what to set."""
    lines, texts = [], {split: [e["text"] for e in dataset.entries] for split, dataset in data.items()}
    for split, dataset in data.items():
        frames = np.array([r.frames for r in dataset.reports])
        low, middle, high = np.percentile(frames, [5, 50, 95])
        over = (frames > config.max_length).mean()
        dropped = np.maximum(frames - config.max_length, 0).sum() / frames.sum()
        pieces = np.array([len(codec.ids(text)) for text in texts[split]])
        cut = (pieces > config.max_text_length).mean()
        lines.append(f"{split}: {len(frames)} clips of {low:.0f} / {middle:.0f} / {high:.0f} frames (5 %, median, 95 %), "
                     f"{100 * over:.1f} % sampled down to {config.max_length} (dropping {100 * dropped:.1f} % of frames); texts of "
                     f"{np.median(pieces):.0f} pieces (at most {pieces.max()}), {100 * cut:.1f} % cut; "
                     f"{len(set(texts[split]))} different texts")
        if over > 0.05:
            lines.append(f"warning: {100 * over:.0f} % of {split}'s clips exceed max_length {config.max_length}: --max_length "
                         f"{math.ceil(np.percentile(frames, 97))} covers 97 %")
        if cut > 0:
            lines.append(f"warning: {100 * cut:.1f} % of {split}'s texts exceed max_text_length {config.max_text_length}: "
                         f"--max_text_length {pieces.max()} covers all")
    for split in ("dev", "test"):
        if split in texts:
            shared = sum(text in set(texts["train"]) for text in set(texts[split]))
            if shared:
                lines.append(f"warning: {shared} of {split}'s {len(set(texts[split]))} different texts occur in train, too: "
                             "normal for single signs; in sentences the score then rewards remembering")
    return lines


def train(config, inference):
    """Train as config says, or go on where the run was; returns the exit code."""
    place = find_place(config)
    if isinstance(config, DemoConfig):
        demo_banner(config, place)
    labels = Path(config.data_dir) / "labels.train"
    if not labels.is_file():
        raise DataError(f"data_dir {config.data_dir}: there is no labels.train; it must hold labels.train, labels.dev, "
                        "labels.test and pose_format/")
    run = Run(config, inference, place, Path(), f"{zlib.crc32(labels.read_bytes()):08x}")
    chosen = choose_folder(config, run.description(), place.say) if place.rank == 0 else None
    run.folder, last = place.gather([chosen] if chosen else [])[0]
    config.output_dir = str(run.folder)
    lock = lock_folder(run.folder) if place.rank == 0 else None
    state = load_checkpoint(last) if last else None
    if state and state["finished"] and not _differences(run.description(), state["config"]):
        run.history = state["history"]
        place.say(f"{run.folder}: this run is finished, at step {state['step']}; nothing was changed. To go on, raise "
                  f"{'max_steps' if config.max_steps else 'epochs'}; to begin anew, --auto_resume false\n{summary(run)}")
        return 0
    start(run, state)
    place.say(f"resumed from {last} at step {run.step}" if state else f"writing to {run.folder}")
    with Signals() as run.signals:
        try:
            if place.rank == 0:
                write_whole(run.folder / "config.json", _json(run.description()))
            loop(run)
        except Stopped as stopped:
            try_to_save(run, last_chance=True)
            place.say(f"stopped by signal {stopped.number} at step {run.step}; the same command goes on from here")
            return 128 + stopped.number
        finally:
            if run.writer:
                run.writer.close()
    draw_curves(run)
    place.say(f"next: python train_lite.py evaluate {run.folder} --split test\n{summary(run)}")
    return 0


def summary(run):
    """The last line: before -> after."""
    first, last = run.history[0], run.history[-1]
    return (f"dev_loss {first['dev_loss']:.4f} -> {last['dev_loss']:.4f} | exact_match {first['exact_match']:.2f} -> "
            f"{last['exact_match']:.2f} | best epoch {run.best['epoch']} | {run.folder / 'best'}")


def demo_banner(config, place):
    """Say that this is the demo, and write its corpus on first use."""
    place.say(f"There is no data in {DEFAULT_DATA_DIR}, so this is the built-in DEMO: synthetic signers, synthetic signs; it "
              "shows that the code learns, not how well it reads people. For your own data: --data_dir FOLDER")
    if place.rank == 0 and not Path(config.data_dir).exists():
        make_demo_corpus(config.data_dir, seed=0)
    if place.world > 1:
        dist.barrier()


def draw_curves(run):
    """curves.png, where matplotlib is installed."""
    if run.place.rank:
        return
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    steps = [m["step"] for m in run.history]
    left.plot(steps[1:], [m["train_loss"] for m in run.history[1:]], label="train loss")
    left.plot(steps, [m["dev_loss"] for m in run.history], label="dev nll")
    for key in ("bleu4", "exact_match", "shuffled_bleu4"):
        right.plot(steps, [m[key] for m in run.history], label=f"dev {key}")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.legend()
    figure.savefig(run.folder / "curves.png", dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------- the other commands

def evaluate_command(config, inference, args):
    """`evaluate RUN`: a split's scores, one a line, with 95 % bootstrap intervals; predictions beside references."""
    folder = find_best(args.run)
    place, model = find_place(config), SignLanguageLite.from_pretrained(folder)
    model.to(place.device)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.output_dir = ""
    dataset = SignLanguageDataset(Path(config.data_dir) / f"labels.{args.split}", config, args.split)
    dataset.encode = model.codec.encode
    loader = make_loader(dataset, max(config.batch_size, EVAL_BATCH), place)
    metrics, rows = evaluate(model, loader, inference, place, saved.get("constant", ""))
    predictions, references = [row[3] for row in rows], [row[2] for row in rows]
    intervals = bootstrap(predictions, references, config.language)
    for key in sorted(metrics, key=lambda k: (k != "exact_match", k)):
        value = metrics[key]
        low_high = " [{:.2f}, {:.2f}]".format(*intervals[key]) if key in intervals else ""
        print(f"{key} {value:.2f}{low_high}" if isinstance(value, float) else f"{key} {value}")
    warning = collapse_warning(metrics, predictions)
    if warning:
        print(warning)
    print("the ten worst clips, by chrF:")
    worst = sorted(rows, key=lambda row: CHRF().sentence_score(_clean(row[3], config.language),
                                                               [_clean(row[2], config.language)]).score)
    for _, name, reference, prediction in worst[:10]:
        print(f"  {name}\n    reference   {reference}\n    prediction  {prediction}")
    out = Path(args.run) / f"predictions_{args.split}.txt"
    write_predictions(out, rows)
    print(f"predictions beside references: {out}")
    return 0


def bootstrap(predictions, references, language, samples=1000):
    """{metric: (low, high)}: 95 % intervals over resampled clips; sacrebleu's for BLEU-4 and chrF."""
    predictions, references = ([_clean(t, language) for t in texts] for texts in (predictions, references))
    bleu = BLEU(tokenize="zh" if language == "zh" else "13a")
    intervals = {}
    for key, metric in (("bleu4", bleu), ("chrf", CHRF())):
        score = metric.corpus_score(predictions, [references], n_bootstrap=samples)
        intervals[key] = (score._mean - score._ci, score._mean + score._ci)
    right = np.array([p == r for p, r in zip(predictions, references)], float)
    means = 100 * np.random.default_rng(0).choice(right, (samples, len(right))).mean(1)
    intervals["exact_match"] = tuple(np.percentile(means, [2.5, 97.5]))
    return intervals


def translate_command(config, inference, args):
    """`translate RUN CLIP...`: name and text a line; a bad clip is reported, the rest are translated, exit code 1."""
    place, model = find_place(config), SignLanguageLite.from_pretrained(find_best(args.run))
    model.to(place.device)
    bad = 0
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
        for name, text in zip(names, texts):
            print(json.dumps({"clip": name, "text": text}, ensure_ascii=False) if args.json else f"{name}\t{text}", flush=True)
    return 1 if bad else 0


def check_command(config, inference, args):
    """`check`: the data, split by split, without training."""
    if isinstance(config, DemoConfig):
        demo_banner(config, Place())
    return 0


# ---------------------------------------------------------------------------------------------- the command line

COMMANDS = {"train": train, "check": check_command, "evaluate": evaluate_command, "translate": translate_command}


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
    for flag, name in (("--no-resume", "auto_resume"), ("--no-tensorboard", "use_tensorboard")):  # the original's
        parser.add_argument(flag, dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse(argv):
    """-> (command, config, inference, the command's own arguments). Exits with 2 on a bad command line."""
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("train", argv)
    parser = make_parser(command)
    parser.set_defaults(data_dir=None)
    args = parser.parse_args(rest)
    kind = TrainConfig
    if command in ("evaluate", "translate"):
        saved = json.loads((find_best(args.run) / "config.json").read_text(encoding="utf-8"))
        defaults = {**saved, **saved["inference"]}
    else:
        standard = TrainConfig()
        if args.data_dir is None and standard.data_dir == DEFAULT_DATA_DIR and not Path(DEFAULT_DATA_DIR).exists():
            kind = DemoConfig
        elif args.mt5_path == "":
            kind = ScratchConfig
        defaults = {item.name: item.default for item in fields(kind)}
    known = {item.name for item in fields(TrainConfig)} | {item.name for item in fields(InferenceConfig)}
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in known})
    args = parser.parse_args(rest)
    config = kind(**{item.name: getattr(args, item.name) for item in fields(kind)})
    return command, config, InferenceConfig(**{i.name: getattr(args, i.name) for i in fields(InferenceConfig)}), args


def main(argv=None):
    """Run a command; returns the exit code. What the user can mend is one clear message, without a traceback."""
    try:
        command, config, inference, args = parse(sys.argv[1:] if argv is None else argv)
        if command == "train":
            return train(config, inference)
        return COMMANDS[command](config, inference, args)
    except (ConfigError, DataError, RunError, pickle.UnpicklingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
