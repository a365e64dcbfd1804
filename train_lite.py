"""The loop and the commands.

    python train_lite.py [train]              train; where there is no data of your own, on the built-in demo
    python train_lite.py check                look through the data without training
    python train_lite.py evaluate RUN         score a run's best model on a split
    python train_lite.py translate RUN CLIP [CLIP ...]

then `--field value` for any field of config_lite.py. Defaults below are TrainConfig's; training from scratch
(`--mt5_path ""`) has ScratchConfig's, the demo DemoConfig's. A run is a folder: config.json, metrics.jsonl (a
line a validation), predictions_dev.txt, last.pt (to go on from) and best/ (to use, complete in itself).
"""
import argparse
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import _bootstrap_resample
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser, get_cosine_with_min_lr_schedule_with_warmup_lr_rate as cosine

from config_lite import DEFAULT_DATA_DIR, ConfigError, DemoConfig, InferenceConfig, ScratchConfig, TrainConfig
from datasets_lite import (
    BODY, BODY_EDGES, HAND_EDGES, LEFT, RIGHT, THRESHOLD, DataError, LengthBatchSampler, SignLanguageDataset,
    load_dataset_file, load_pose_file, make_demo_corpus, pad_poses, read_clip)
from models_lite import SignLanguageLite, find_best, make_codec, mt5_folder

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock on the run's folder, no peak memory of the process
    fcntl = resource = None

SAVE_EVERY = 15 * 60  # seconds between two last.pt, at most
EVAL_BATCH = 16  # clips per forward pass of an evaluation, at least
# In these fields a run may differ from the last.pt it goes on from: they do not shape what comes out.
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

    def gather(self, rows=()):
        """The processes' lists, joined, in every process, which waits for the others here."""
        parts = [rows] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def autocast(self):
        """bf16 where the GPU has it in hardware, fp32 elsewhere; never fp16, which overflows in mT5."""
        gpu = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast("cuda", torch.bfloat16) if gpu else nullcontext()

    def peak_memory_gb(self):
        """Of the GPU, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
        return peak / (1e9 if sys.platform == "darwin" else 1e6)

def find_place(config):
    """The device, and the process group where torchrun started this process. Raises ConfigError."""
    names = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
    world, rank, local = (int(os.environ.get(name, alone)) for name, alone in names.items())
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = config.device if config.device != "auto" else "cuda" if cuda else "cpu"
    if kind == "cuda" and cuda <= local or kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device is {kind!r}, torch {torch.__version__} finds none for process {local}: "
                          "use --device auto, or start fewer processes")
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # said once, not once a process
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    if world > 1 and not dist.is_initialized():  # hours: the others wait while the first reads a large corpus
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=6))
    return Place(rank, world, device)

class Signals:
    """Keeps the first SIGINT, SIGTERM or SIGUSR1 for the loop to see; a second ends the process at once."""
    number = 0

    def __enter__(self):
        here = threading.current_thread() is threading.main_thread()
        names = ["SIGINT", "SIGTERM"] + ["SIGUSR1"] * (os.name == "posix") if here else []
        self.before = {name: signal.signal(getattr(signal, name), self.catch) for name in names}
        return self

    def __exit__(self, *_):
        for name, handler in self.before.items():
            signal.signal(getattr(signal, name), handler)

    def catch(self, number, _):
        """The handler. It may interrupt a print, so it must not print itself."""
        if self.number:
            os._exit(128 + number)
        self.number = number
        with suppress(OSError):  # a closed stderr must not break the step that this interrupts
            os.write(2, b"\nstopping after this micro-batch; last.pt is written; once more stops at once\n")

def _worker_signals(_):
    """In a loading process: a signal to the whole group (Ctrl-C, Slurm) is the main process's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name == "posix":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        # were it to die at once, the main process would fail before it could write last.pt
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))

# ----------------------------------------------------------------------------------- scores
def _clean(text, language):
    """What is scored: NFKC (mT5 knows no full-width punctuation), single spaces; Chinese without."""
    return ("" if language == "zh" else " ").join(unicodedata.normalize("NFKC", text).split())

def _cut(text, width=60):
    return text if len(text) <= width else text[:width - 3] + "..."

def edit_distance(found, wanted, replace=1):
    """The fewest insertions, deletions and replacements (at the cost `replace`) between two lists."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(found, 1):
        corner, row[0] = row[0], i
        for j, b in enumerate(wanted, 1):
            corner, row[j] = row[j], min(corner + replace * (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]

def _rouge_l(hypothesis, reference, beta=1.2):
    """F-score of the longest common subsequence of two token lists, recall weighted as in captioning."""
    common = (len(hypothesis) + len(reference) - edit_distance(hypothesis, reference, replace=2)) // 2
    if not common:
        return 0.0
    precision, recall = common / len(hypothesis), common / len(reference)
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)

def compute_metrics(predictions, references, language="zh"):
    """Texts -> {bleu1..bleu4, chrf, rouge_l, exact_match, unique_ratio} in percent, and bleu_signature.
    Both sides are NFKC-normalised and stripped; "zh" is scored by character and without spaces, others by
    sacrebleu's "13a" words. ROUGE-L is a mean over sentences. ValueError for unequal or zero lengths."""
    count, metrics = len(references), {}
    if len(predictions) != count or not count:
        raise ValueError(f"{len(predictions)} predictions for {count} references: one for each is needed")
    predictions, references = ([_clean(t, language) for t in texts] for texts in (predictions, references))
    for order in (1, 2, 3, 4):
        bleu = BLEU(tokenize="zh" if language == "zh" else "13a", max_ngram_order=order)
        metrics[f"bleu{order}"] = bleu.corpus_score(predictions, [references]).score
    pairs, split = list(zip(predictions, references)), list if language == "zh" else str.split
    return metrics | {"chrf": CHRF().corpus_score(predictions, [references]).score,
                      "rouge_l": 100 * sum(_rouge_l(split(p), split(r)) for p, r in pairs) / count,
                      "exact_match": 100 * sum(p == r for p, r in pairs) / count,
                      "unique_ratio": 100 * len(set(predictions)) / count,
                      "bleu_signature": str(bleu.get_signature())}

def exchange(texts):
    """-> order: clip i is given clip order[i], of another text than its own wherever possible."""
    ranked = sorted(range(len(texts)), key=lambda i: (zlib.crc32(texts[i].encode()), texts[i], i))
    shift = max(*Counter(texts).values(), len(texts) // 2)  # farther than the clips of any one text reach
    return [other for _, other in sorted(zip(ranked, ranked[shift:] + ranked[:shift]))]

@torch.no_grad()
def evaluate(model, data_loader, inference, place=Place(), constant="", stop=lambda: 0):
    """Score a whole split -> (metrics, rows of (index, name, reference, prediction) in the split's order).
    dev_loss: the plain nll per token; `constant`: the sentence of constant_bleu4. A text depends on its clip
    alone, so the scores shuffled_* decode nothing anew. Raises Stopped at a signal that stop() gives."""
    dataset, plan, started = data_loader.dataset, data_loader.batch_sampler.plan(), time.monotonic()
    rows, sums, was_training = [], [], model.training
    model.eval()
    bar = tqdm(plan, dataset.phase, unit=" batches", disable=True if place.rank else None, leave=False)
    for (number, clips, counts), (src_input, tgt_input) in zip(bar, data_loader):
        if stop():
            raise Stopped(stop())
        if not counts:
            continue
        with on_device(src_input, place) as src_input, place.autocast():
            output = model(src_input, tgt_input)
            texts = model.generate(src_input, **asdict(inference))
        tokens, gloss = output.num_tokens, output.gloss or [None] * len(texts)
        sums.append((number, output.nll.item() * tokens, tokens, output.num_correct))
        rows += zip(clips, src_input["names"], tgt_input["gt_sentence"], texts, gloss, tgt_input["gt_gloss"])
    model.train(was_training)
    rows = sorted(place.gather(rows), key=lambda row: row[0])
    _, nll, tokens, correct = zip(*sorted(place.gather(sums)))
    metrics = {"dev_loss": math.fsum(nll) / sum(tokens), "dev_accuracy": 100 * sum(correct) / sum(tokens)}
    metrics |= _text_scores([r[3] for r in rows], [r[2] for r in rows], dataset.config.language, constant)
    if signed := [(row[4], row[5]) for row in rows if row[4] is not None and row[5]]:
        wrong = sum(edit_distance(found, wanted) for found, wanted in signed)
        metrics["gloss_wer"] = 100 * wrong / sum(len(wanted) for _, wanted in signed)
    metrics["decoded_clips_per_second"] = len(rows) / max(time.monotonic() - started, 1e-9)
    return metrics, [row[:4] for row in rows]

def _text_scores(predictions, references, language, constant):
    """The metrics beside their baselines: poses exchanged, one constant sentence, the references' variety.
    BLEU of an order that no reference reaches is 0 for all: smoothing would give long garbage more."""
    right = compute_metrics(references, references, language)
    void = {key: 0.0 for key, value in right.items() if value == 0}
    metrics = compute_metrics(predictions, references, language) | void
    shuffled = compute_metrics([predictions[i] for i in exchange(references)], references, language) | void
    metrics |= {f"shuffled_{key}": shuffled[key] for key in ("bleu4", "chrf", "exact_match")}
    constant = (compute_metrics([constant] * len(references), references, language) | void)["bleu4"]
    return metrics | {"constant_bleu4": constant, "reference_unique_ratio": right["unique_ratio"]}

def collapse_warning(metrics, predictions):
    """A sentence where the outputs do not depend on the poses, else "". chrF tells: it knows single words."""
    top, count = Counter(predictions).most_common(1)[0]
    gap = metrics["chrf"] - metrics["shuffled_chrf"]
    varied = metrics["unique_ratio"] / metrics["reference_unique_ratio"]
    if len(predictions) < 2 or metrics["exact_match"] >= 50 or gap >= 1 and varied >= 0.2:
        return ""
    return (f"warning: the model ignores the pose: it has collapsed onto {_cut(top)!r} ({count} of "
            f"{len(predictions)} outputs; chrF {metrics['chrf']:.1f}, with exchanged poses "
            f"{metrics['shuffled_chrf']:.1f})")

def _sample(row):
    """(index, name, reference, prediction) for the eye, the prediction under the reference."""
    return f"    {row[1]}\n      reference   {_cut(row[2])}\n      prediction  {_cut(row[3])}"

def make_loader(dataset, batch_size, place=Place(), shuffle=False, accumulation=1):
    """A DataLoader over batches of like length; loading and tokenising happen in its processes."""
    config = dataset.config
    sampler = LengthBatchSampler(dataset.lengths, batch_size, shuffle, config.seed, accumulation, place.rank,
                                 place.world)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate_fn,
                      num_workers=config.num_workers, worker_init_fn=_worker_signals,
                      generator=torch.Generator(), pin_memory=place.device.type == "cuda")

@contextmanager
def on_device(src_input, place):
    """The batch with its tensors on the device; memory that fails becomes a RunError with what to lower."""
    try:
        yield {key: value.to(place.device, non_blocking=True) if torch.is_tensor(value) else value
               for key, value in src_input.items()}
    except RuntimeError as error:
        if "out of memory" not in str(error) and "t allocate memory" not in str(error):
            raise
        clips, frames = src_input["attention_mask"].shape
        raise RunError(f"out of memory at {clips} clips x {frames} frames ({str(error).splitlines()[0]}). "
                       "What costs least first: half the batch_size, twice gradient_accumulation: the same "
                       "training; gradient_checkpointing; lower max_length; train_embedding false") from error

# ----------------------------------------------------------------------------------- what is written
def write_whole(path, content):
    """Write bytes, or the file or folder that content(path) writes, beside path; flush to disk, then rename.
    So path is never half; a crash between a folder's two renames leaves path.old. Raises RunError naming
    path, what was written and the space left."""
    path = Path(path)
    aside, old = path.with_name(f"{path.name}.{os.getpid()}.part"), path.with_name(f"{path.name}.old")
    try:
        content(aside) if callable(content) else aside.write_bytes(content)
        for written in [*aside.rglob("*"), aside]:
            _to_disk(written)
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(aside, path)
        _to_disk(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is reported as any of them
        size = sum(file.stat().st_size for file in [aside, *aside.rglob("*")] if file.is_file())
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        _remove(aside)
        raise RunError(f"could not write {path}: {error} (after {size / 1e6:,.1f} MB; {free / 1e6:,.0f}"
                       " MB are free); what stood there before is whole") from error

def _to_disk(path):
    if os.name == "posix":  # elsewhere a folder cannot be opened, nor a file be flushed by another handle
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

def _remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

def _json(content):
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()

def _read_json(path):
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error

def save_best(run, metrics):
    """Replace best/ as a whole; `models_lite.find_best` reads it, or best.old after a crash."""
    def write(folder):
        run.model.save_pretrained(folder, **run.description(), constant=run.constant)
        (folder / "metrics.json").write_bytes(_json(metrics))
    write_whole(run.folder / "best", write)

def find_latest_checkpoint(folder):
    """The folder's last.pt, or None."""
    return next(Path(folder).glob("last.pt"), None)

def save_checkpoint(path, run):
    """Write last.pt: all that `restore` needs to go on as if nothing had happened, even within a window.
    No random state is among it: each micro-batch draws from seed, epoch and number alone (`micro_batch`)."""
    state = {name: getattr(run, name) for name in KEPT} | {
        "config": run.description(), "made_of": _made_of(run.model, run.data),
        "model": run.model.state_to_save(), "optimizer": run.optimizer.state_dict(),
        "gradients": {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None},
        "scheduler": run.scheduler.state_dict(), "finished": run.step >= run.total_steps and run.validated}
    write_whole(path, lambda aside: torch.save(state, aside))

def load_checkpoint(path):
    """last.pt -> its contents, on the CPU. Raises RunError for what is not a checkpoint of this project."""
    if str(path).endswith(".pth"):
        raise RunError(f"{path}: a checkpoint of the original scripts, of no use here: its front-end "
                       "averages the joints away, its labels are shifted twice. Start anew, without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if missing := {"model", "optimizer", "history", "config"} - state.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except Exception as error:  # of any kind: the bytes are anybody's
        raise RunError(f"{path}: not a readable checkpoint ({type(error).__name__}: {_cut(str(error))}); "
                       "--auto_resume false starts anew in another folder") from error
    return state

# ----------------------------------------------------------------------------------- which run
def _differences(saved, now):
    """What changed between two runs' descriptions among what shapes the result, as `field: old -> new`."""
    names = now.keys() - FREE_FIELDS - {"epochs", "max_steps"}
    budget = "max_steps" if now["max_steps"] or saved.get("max_steps") else "epochs"
    other_kind = bool(now["max_steps"]) != bool(saved.get("max_steps"))
    if other_kind or now[budget] < saved.get(budget, 0):  # a larger budget goes on
        names |= {budget}
    return "; ".join(f"{name}: {saved.get(name)!r} -> {now[name]!r}" for name in sorted(names)
                     if saved.get(name) != now[name])

def choose_folder(config, description):
    """-> (the run's folder, its last.pt or None). What another configuration gave is never written over."""
    resumed = Path(config.resume_from) if config.resume_from else None
    if resumed:
        if changed := _differences(load_checkpoint(resumed)["config"], description):
            raise ConfigError(f"resume_from {resumed}: that run was configured otherwise ({changed})")
        folder = Path(config.output_dir or resumed.parent)
        if folder.resolve() == resumed.resolve().parent:
            return folder, resumed
    name = "demo" if isinstance(config, DemoConfig) else Path(config.data_dir).resolve().name
    base = Path(config.output_dir or f"checkpoints/{name}")
    folder, number = base, 1
    while any((folder / name).exists() for name in ("last.pt", "best", "best.old")):
        if config.auto_resume:
            last, changed = find_latest_checkpoint(folder), "its last.pt is missing"
            if last:
                changed = _differences(_read_json(folder / "config.json"), description)
            if not changed:
                return folder, last
            if config.output_dir:
                raise ConfigError(f"output_dir {folder} holds another run ({changed}); nothing was changed: "
                                  "name another, or --auto_resume false for the next free one")
            print(f"{folder} holds another run ({changed})")
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder, resumed

def lock_folder(folder):
    """Hold the folder until this process ends, however it ends. Raises RunError where another holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would live on in loading processes
    except OSError as error:
        raise RunError(f"{folder}: another process is training there, or it cannot be locked ({error}): name "
                       "another output_dir") from error
    for left in folder.glob("*.part"):  # half-written, by a process that died
        _remove(left)
    return file

# ----------------------------------------------------------------------------------- the loop
# the fields of Run that last.pt keeps beside weights, optimiser and schedule
KEPT = ("epoch", "batch", "step", "window", "meter", "skipped", "bad_in_a_row", "history")

class Run:
    """All that changes while a run goes on, and what it works with."""
    def __init__(self, config, inference, place, **more):
        self.config, self.inference, self.place, self.folder = config, inference, place, Path()
        self.labels, self.constant = "", ""  # digest of dev's and train's; train's most frequent text
        self.epoch = self.batch = 0  # batch: of this process, within the epoch
        self.step = self.total_steps = self.skipped = self.bad_in_a_row = 0  # optimiser steps
        self.window, self.meter = Counter(), Counter()  # sums since the last step; since the last validation
        self.suspects, self.history = [], []  # the window's (names, loss); the lines of metrics.jsonl
        self.saved_at, self.last_loss = time.monotonic(), math.nan
        self.signals, self.asked_to_stop = Signals(), 0  # a signal's number, agreed on by all processes
        self.data = self.loader = self.dev_loader = None  # data: {"train": SignLanguageDataset, "dev": ...}
        self.model = self.net = None  # net: the model, or DistributedDataParallel around it
        self.optimizer = self.scheduler = self.writer = None  # writer: TensorBoard's
        vars(self).update(more)

    def description(self):
        """The configuration, and what else decides whether a run may be gone on with; plain data."""
        return asdict(self.config) | {
            "inference": asdict(self.inference), "labels": self.labels, "processes": self.place.world}

    @property
    def validated(self):
        """Whether dev was scored at this step."""
        return bool(self.history) and self.history[-1]["step"] == self.step

    @property
    def best(self):
        """The entry of highest bleu4 whose weights were saved; ties go by chrf, then by lower nll."""
        return max(self.history, key=lambda m: ("unsaved" not in m, m["bleu4"], m["chrf"], -m["dev_loss"]))

def make_optimizer(model, config, total_steps, steps_per_epoch):
    """AdamW, no decay on norms and biases; the schedule, per step: linear warm-up, cosine to min_lr."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, fused=trainable[0].device.type != "mps")
    longest = total_steps // 10 if config.max_steps else total_steps // 2
    warmup = min(round(config.warmup_epochs * steps_per_epoch), longest)
    # of transformers' two cosines to a minimum, the one whose first step is not lost at rate zero
    return optimizer, cosine(optimizer, warmup, total_steps, min_lr=config.min_lr)

def micro_batch(run, number, counts, src_input, tgt_input, last):
    """Forward and backward of one batch, its loss summed over tokens; at the last, processes exchange."""
    # from seed, epoch and number alone: a resumed run, or more processes, draw the same dropout
    torch.manual_seed(int(np.random.SeedSequence([run.config.seed, run.epoch, number]).generate_state(1)[0]))
    silent = run.place.world > 1 and not last
    with on_device(src_input, run.place) as src_input, run.net.no_sync() if silent else nullcontext():
        with run.place.autocast():
            output = run.net(src_input, tgt_input)
        # a batch that does not count only keeps this process in step with the others
        (output.loss * (output.num_tokens if counts else 0)).backward()
    if counts:
        tokens, loss, nll = output.num_tokens, output.loss.item(), output.nll.item()
        run.suspects.append((src_input["names"], loss))
        run.window.update(tokens=tokens, nll=nll * tokens, loss=loss * tokens, correct=output.num_correct,
                          clips=len(src_input["names"]))

def optimiser_step(run):
    """Divide the window's gradient by its tokens, over all processes, clip it and step; skip the not finite.
    Raises RunError after ten steps in a row that were not finite."""
    parts, window = run.place.gather([(run.window, run.signals.number)]), Counter()
    run.asked_to_stop = max(number for _, number in parts)
    for part, _ in parts:
        window.update(part)
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    # DistributedDataParallel averages over processes: undo that, the mean is over tokens
    torch._foreach_mul_([p.grad for p in parameters], run.place.world / max(window["tokens"], 1))
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, run.config.max_grad_norm or math.inf))
    finite = math.isfinite(norm) and math.isfinite(window["loss"])
    if finite:
        run.meter.update(window)
    else:
        run.optimizer.zero_grad(set_to_none=True)  # a step without gradients changes nothing
        names = [name for names, loss in run.suspects if not math.isfinite(loss) for name in names]
        names = names or [name for names, _ in run.suspects for name in names]
        print(f"warning: step {run.step + 1} is skipped: its loss or gradient (norm {norm}) is not finite; "
              f"{run.skipped + 1} so far; clips: {', '.join(names[:32])}", file=sys.stderr)
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step, run.last_loss = run.step + 1, window["loss"] / max(window["tokens"], 1)
    run.skipped, run.bad_in_a_row = run.skipped + (not finite), 0 if finite else run.bad_in_a_row + 1
    run.window, run.suspects = Counter(), []
    if run.bad_in_a_row >= 10:
        raise RunError("10 steps in a row were not finite: lower learning_rate, keep max_grad_norm above 0, "
                       "look at the clips named above with `python train_lite.py check`")

def train_epoch(run):
    """Go through the rest of the epoch, or of the budget. Raises Stopped after a signal, position kept."""
    sampler, accumulation = run.loader.batch_sampler, run.config.gradient_accumulation
    run.data["train"].epoch = sampler.epoch = run.epoch
    sampler.lengths = np.array(run.data["train"].epoch_lengths())
    sampler.start, plan = run.batch, sampler.plan()
    run.net.train()
    clock = time.monotonic()
    for (number, _, counts), (src_input, tgt_input) in zip(plan[run.batch:], run.loader):
        run.meter["waited"] += time.monotonic() - clock
        run.batch += 1
        last = run.batch % accumulation == 0 or run.batch == len(plan)  # an epoch's last window may be short
        micro_batch(run, number, counts, src_input, tgt_input, last)
        if last:
            optimiser_step(run)
        run.meter["seconds"] += time.monotonic() - clock
        if last and run.step % run.config.log_interval == 0:
            log_line(run)
        if last and run.step < run.total_steps and time.monotonic() - run.saved_at > SAVE_EVERY:
            try_to_save(run)
        if stop := run.asked_to_stop if run.place.world > 1 else run.signals.number:
            raise Stopped(stop)
        if run.step >= run.total_steps:
            return
        clock = time.monotonic()

def report(run, part, row):
    """{name: value} as one line in fixed order for grep, and to TensorBoard."""
    print(f"epoch {run.epoch + (run.step > 0):03d} | step {run.step:06d}/{run.total_steps:06d} | " +
          " | ".join(f"{name} {value:.4g}" for name, value in row.items()))
    for name, value in row.items() if run.writer else ():
        run.writer.add_scalar(f"{part}/{name}", value, run.step)

def log_line(run):
    """How training goes, over all since the last validation; the loss is the last step's."""
    sums, tokens = run.meter, max(run.meter["tokens"], 1)
    report(run, "train", {
        "loss": run.last_loss, "nll": sums["nll"] / tokens, "accuracy": 100 * sums["correct"] / tokens,
        "lr": run.scheduler.get_last_lr()[0], "clips_per_second": sums["clips"] / sums["seconds"],
        "waiting_for_data": 100 * sums["waited"] / sums["seconds"]})

def try_to_save(run, last_chance=False):
    """last.pt, by the first process; a full disk is reported, and training goes on to the next save."""
    if run.place.rank == 0:
        _or_warn(save_checkpoint, run.folder / "last.pt", run, fatal=last_chance)
        run.saved_at = time.monotonic()

def _or_warn(write, *arguments, fatal=False):
    try:
        write(*arguments)
    except RunError as error:
        if fatal:
            raise
        print(f"warning: {error}; training goes on to the next save", file=sys.stderr)
        return False
    return True

def validate(run):
    """Score dev, print and write what came out, and replace best/ where it is the best so far."""
    stop = (lambda: run.signals.number) if run.place.world == 1 else (lambda: 0)
    scores, rows = evaluate(run.model, run.dev_loader, run.inference, run.place, run.constant, stop)
    tokens, seconds = run.meter["tokens"], run.meter["seconds"]
    metrics = {"epoch": run.epoch + (run.step > 0), "step": run.step, **scores,
               "train_loss": run.meter["loss"] / tokens if tokens else None, "skipped_steps": run.skipped,
               "clips_per_second": run.meter["clips"] / seconds if seconds else None,
               "lr": run.scheduler.get_last_lr()[0], "peak_memory_gb": run.place.peak_memory_gb()}
    run.history.append(metrics)
    run.meter = Counter()
    print_validation(run, metrics, rows)
    if run.place.rank == 0:
        if run.best is metrics and not _or_warn(save_best, run, metrics):
            metrics["unsaved"] = True  # so that a later one, whose weights are there, counts as the best
        lines = "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in run.history)
        _or_warn(write_whole, run.folder / "metrics.jsonl", lines.encode())
        _or_warn(write_predictions, run.folder / "predictions_dev.txt", rows)

def print_validation(run, m, rows):
    """One line of scores, two samples, and warnings where nothing is learnt."""
    names = ("dev_loss dev_accuracy bleu4 shuffled_bleu4 constant_bleu4 chrf exact_match unique_ratio "
             "reference_unique_ratio gloss_wer").split()
    report(run, "dev", {name: m[name] for name in names if name in m})
    print("\n".join(_sample(row) for row in rows[:: max(1, len(rows) // 2)][:2]))
    uniform = math.log(len(run.model.codec))
    if m["step"] and not m["dev_loss"] <= uniform:  # NaN, too
        print(f"warning: dev_loss {m['dev_loss']:.2f} is worse than guessing evenly ({uniform:.2f})")
    if m["step"] and (warning := collapse_warning(m, [row[3] for row in rows])):
        print(warning)
    if run.writer:
        run.writer.add_text("dev/samples", "\n\n".join(_sample(row) for row in rows[:8]), m["step"])

def write_predictions(path, rows):
    """Name, reference and prediction a line, tab-separated, in the split's order."""
    lines = ["\t".join(" ".join(cell.split()) for cell in row[1:]) + "\n" for row in rows]
    write_whole(path, ("name\treference\tprediction\n" + "".join(lines)).encode())

def loop(run):
    """Validate at step 0, then train and validate to the budget's end; last.pt after every epoch."""
    if not run.history:
        try_to_save(run)  # before best/ appears: a folder with best/ alone could not be gone on with
        validate(run)
    while run.step < run.total_steps or not run.validated:
        if run.step < run.total_steps:
            train_epoch(run)
        done = run.step >= run.total_steps
        if not run.validated and (done or (run.epoch + 1) % run.config.val_interval == 0):
            validate(run)
        if run.batch >= len(run.loader.batch_sampler):
            run.epoch, run.batch = run.epoch + 1, 0
        try_to_save(run, last_chance=done)

def load_data(config, place):
    """-> {"train": SignLanguageDataset, "dev": ...}; the first process reads the files for all."""
    if place.rank:
        place.gather()
    data = {split: SignLanguageDataset(Path(config.data_dir, f"labels.{split}"), config, split)
            for split in ("train", "dev")}
    if not place.rank:
        place.gather()
    return data

def build_model(config, data, state=None):
    """A new model from the training texts and glosses, or with the weights that last.pt holds."""
    entries = data["train"].entries
    model = SignLanguageLite(config, [e["text"] for e in entries], [e["gloss"] for e in entries])
    if state:
        now, then = _made_of(model, data), state["made_of"]
        if changed := [name for name in now if now[name] != then[name]]:
            raise RunError(f"last.pt was trained with other {', '.join(changed)}: was a clip mended or lost? "
                           "Has mt5_path or sentencepiece changed? --auto_resume false starts anew")
        model.load_saved(state["model"])
    elif config.init_from:
        model.init_from(find_best(config.init_from))
    return model

def _made_of(model, data):
    """What a resumed run must find again; the clips come in the data's order."""
    return {"pieces": model.codec.pieces(), "glosses": model.glosses,
            "clips": [entry["name"] for split in ("train", "dev") for entry in data[split].entries]}

def start(run, state):
    """Load the data, build the model or restore all that last.pt holds, and print what will happen."""
    config, place = run.config, run.place
    run.data = load_data(config, place)
    torch.manual_seed(config.seed)
    run.model = run.net = build_model(config, run.data, state).to(place.device)
    for dataset in run.data.values():
        dataset.encode = run.model.codec.encode
    run.constant = Counter(e["text"] for e in run.data["train"].entries).most_common(1)[0][0]
    run.loader = make_loader(run.data["train"], config.batch_size, place, True, config.gradient_accumulation)
    run.dev_loader = make_loader(run.data["dev"], max(config.batch_size, EVAL_BATCH), place)
    clips, window = len(run.data["train"]), run.loader.batch_sampler.window
    batches, steps_per_epoch = -(-clips // config.batch_size), -(-clips // window)
    if place.world > batches:
        raise ConfigError(f"{place.world} processes for {batches} batches of {config.batch_size} clips: "
                          "start fewer, or lower batch_size")
    run.total_steps = config.max_steps or config.epochs * steps_per_epoch
    run.optimizer, run.scheduler = make_optimizer(run.model, config, run.total_steps, steps_per_epoch)
    if state:
        restore(run, state)
    if place.world > 1:
        devices = [place.device.index] if place.device.type == "cuda" else None
        run.net = DistributedDataParallel(run.model, device_ids=devices)
    if config.use_tensorboard and place.rank == 0:
        from torch.utils.tensorboard import SummaryWriter
        run.writer = SummaryWriter(Path(config.log_dir, run.folder.name))
        with suppress(ImportError):  # matplotlib
            run.writer.add_figure("poses", draw_poses(run.data))
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
    if not list(run.folder.glob("best*")):  # --resume from elsewhere: the next validation is the best here
        run.history = [m | {"unsaved": True} for m in run.history]

def print_plan(run, window):
    """The configuration, the data, and what a step will be; warn of what deserves a second look."""
    config, place, codec = run.config, run.place, run.model.codec
    print("configuration: " + ", ".join(f"{k} {v!r}" for k, v in asdict(config).items()))
    print("\n".join(data_report(run.data, codec)))
    pieces = [i for e in run.data["dev"].entries for i in codec.tokenizer(e["text"]).input_ids]
    known = [i != codec.tokenizer.unk_token_id and i in codec.row for i in pieces]
    precision = "fp32" if isinstance(place.autocast(), nullcontext) else "bf16 autocast"
    print(f"vocabulary: {len(codec):,} of {len(codec.tokenizer):,} pieces kept; they cover "
          f"{100 * np.mean(known):.2f} % of dev's, the rest is spelled by characters\n"
          f"a step: {config.batch_size} clips x {config.gradient_accumulation} accumulated x "
          f"{place.world} processes = {window} clips; {run.total_steps} steps; {place.device}, "
          f"{precision}, {torch.get_num_threads()} threads")
    if config.ctc_weight and run.model.gloss_head is None:
        print("warning: ctc_weight is set, but labels.train has no glosses: training is gloss-free")
    if config.language == "zh" and all(ord(c) < 0x2E80 for e in run.data["dev"].entries for c in e["text"]):
        print("warning: language is zh, but no text has a Chinese character: set --language")
    if window < 32:
        print(f"warning: batch_size x gradient_accumulation x processes is {window}; the review: 32")

def train(config, inference, args=None):
    """Train as config says, or go on where the run was; returns the exit code."""
    place = find_place(config)
    if isinstance(config, DemoConfig):
        demo_banner(config, place)
    for path in (labels := [Path(config.data_dir, f"labels.{split}") for split in ("dev", "train")]):
        load_dataset_file(path)  # which says what is wrong, before there is a folder
    run = Run(config, inference, place, labels=f"{zlib.crc32(b''.join(map(Path.read_bytes, labels))):08x}")
    chosen = [choose_folder(config, run.description())] if place.rank == 0 else []
    run.folder, last = place.gather(chosen)[0]
    if config.mt5_path and last is None:
        mt5_folder(config.mt5_path)  # what is missing is said before the poses are read
    if config.init_from and last is None:
        find_best(config.init_from)
    config.output_dir, number = str(run.folder), 0
    with lock_folder(run.folder) if place.rank == 0 else nullcontext():
        state = load_checkpoint(last) if last else None
        if state and state["finished"] and not _differences(run.description(), state["config"]):
            run.folder, run.history = last.parent, state["history"]
            budget = "max_steps" if config.max_steps else "epochs"
            print(f"{run.folder}: this run is finished, at step {state['step']}; nothing was changed. "
                  f"To go on, raise {budget}; to begin anew, --auto_resume false")
        else:
            start(run, state)
            print(f"resumed from {last} at step {run.step}" if state else f"writing to {run.folder}")
            if place.rank == 0:
                write_whole(run.folder / "config.json", _json(run.description()))
            number = run_to_end(run)
    if number:
        return 128 + number
    one, two = run.history[0], run.history[-1]
    print(f"next: python train_lite.py evaluate {run.folder} --split test\n"
          f"dev_loss {one['dev_loss']:.4f} -> {two['dev_loss']:.4f} | exact_match "
          f"{one['exact_match']:.2f} -> {two['exact_match']:.2f} | best epoch {run.best['epoch']} | "
          f"{run.folder / 'best'}")
    return 0

def run_to_end(run):
    """The loop under signal handlers -> 0, or the number of the signal that stopped it, last.pt written."""
    number = 0
    with Signals() as run.signals:
        try:
            loop(run)
        except Stopped as stopped:
            number = stopped.args[0]
        if number:  # outside of `except`, whose traceback would keep the loading processes
            try_to_save(run, last_chance=True)
            print(f"stopped by signal {number} at step {run.step}; the same command goes on")
        elif run.place.rank == 0:
            draw_curves(run)
    if run.writer:
        run.writer.close()
    return number

def demo_banner(config, place):
    """Say that this is the demo, and write its corpus on first use."""
    print(f"There is no data in {DEFAULT_DATA_DIR}, so this is the built-in DEMO of synthetic signers: "
          "the code learns, but does not read people. For data of your own: --data_dir FOLDER")
    if place.rank == 0 and not Path(config.data_dir).exists():
        make_demo_corpus(config.data_dir)
    place.gather()

# ----------------------------------------------------------------------------------- the other commands
def data_report(data, codec):
    """A table, quantities down and splits across, then warnings that say what to set; codec may be None."""
    texts = {split: [e["text"] for e in dataset.entries] for split, dataset in data.items()}
    table, warnings = {"": data}, []
    for split, dataset in data.items():
        figures, notes = _figures(split, dataset, texts[split], codec)
        for label, figure in figures.items():
            table.setdefault(label, []).append(figure)
        own = set(texts[split])
        if repeated := len(texts[split]) - len(own):
            notes.append(f"{split}: {repeated} texts repeat others, which is normal for single signs")
        for other in {"dev": ["train"], "test": ["train", "dev"]}.get(split, []):
            if shared := len(own & set(texts.get(other, ()))):
                notes.append(f"{shared} of {split}'s {len(own)} texts occur in {other}, too: normal for "
                             "single signs; in sentences the score rewards remembering")
        warnings += [f"warning: {note}" for note in notes]
    return [f"{label:36}" + "".join(f"{c:>20}" for c in cells) for label, cells in table.items()] + warnings

def _figures(split, dataset, texts, codec):
    """A split's column of the table, {label: figure}, and what in it deserves a second look."""
    reports, limit = dataset.reports, dataset.config.max_length
    frames, ids = np.array([r.frames for r in reports]), [codec.ids(text) for text in texts] if codec else []
    pieces, cut_at = np.array([len(row) for row in ids] or [0]), (codec or dataset.config).max_text_length
    odd = [text for text, row in zip(texts, ids) if codec.unknown in row]
    (f5, f50, f95), (p5, p50, p95) = (np.percentile(counts, [5, 50, 95]) for counts in (frames, pieces))
    total, over, cut = frames.sum(), 100 * (frames > limit).mean(), 100 * (pieces > cut_at).mean()
    unseen = 100 * np.sum([r.unseen for r in reports], 0) / total / [len(BODY), len(LEFT), len(RIGHT)]
    no_hand = 100 * sum(r.no_hand for r in reports) / total
    figures = {
        "clips": len(frames),
        "frames: 5 %, median, 95 %": f"{f5:.0f} / {f50:.0f} / {f95:.0f}",
        f"clips over max_length {limit}": f"{over:.1f} %",
        "frames that this drops": f"{100 * np.maximum(frames - limit, 0).sum() / total:.1f} %",
        "joints not seen: body, left, right": " / ".join(f"{share:.1f}" for share in unseen) + " %",
        "frames without a hand": f"{no_hand:.1f} %",
        "joints NaN or Inf": sum(r.not_finite for r in reports),
        "clips in pixels": sum(r.in_pixels for r in reports)}
    figures |= {} if codec is None else {
        "pieces: 5 %, median, 95 %": f"{p5:.0f} / {p50:.0f} / {p95:.0f}",
        f"texts cut at max_text_length {cut_at}": f"{cut:.1f} %", "texts with unknown pieces": len(odd)}
    notes = {
        f"{over:.0f} % of {split}'s clips exceed max_length {limit}: --max_length "
        f"{math.ceil(np.percentile(frames, 97))} covers 97 %": over > 5,
        f"{split}: no hand in {no_hand:.0f} % of the frames: look with check --plot poses.png": no_hand > 50,
        f"{cut:.1f} % of {split}'s texts are cut: --max_text_length {pieces.max()} covers all": cut,
        f"{split}: the vocabulary cannot spell {len(odd)} texts, first {_cut(odd[0]) if odd else ''!r}": odd}
    return figures, [note for note, holds in notes.items() if holds]

def check_command(config, inference, args):
    """`check`: every fault of labels and poses by name, and what the data are like; exit code 1 on faults."""
    if isinstance(config, DemoConfig):
        demo_banner(config, Place())
    data, problems, codec = {}, [], None
    for split in ("train", "dev", "test"):
        try:
            dataset = SignLanguageDataset(Path(config.data_dir, f"labels.{split}"), config, split, problems)
            data |= {split: dataset} if len(dataset) else {}
        except (DataError, pickle.UnpicklingError) as error:
            problems.append(str(error))
    try:
        codec = make_codec(config, [e["text"] for e in data["train"].entries]) if "train" in data else None
    except ConfigError as error:
        print(f"warning: texts are not counted in pieces: {error}")
    print("\n".join(data_report(data, codec)))
    if args.plot and data:
        draw_poses(data).savefig(args.plot, dpi=100, bbox_inches="tight")
        print(f"contact sheet: {args.plot}")
    print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr)
    print(f"{len(problems)} errors" if problems else "no errors; next: python train_lite.py, same options")
    return 1 if problems else 0

def draw_poses(data, clips=2, shots=8):
    """A contact sheet (a Figure): clips of each split, frames side by side, joints read, unseen in red."""
    from matplotlib.figure import Figure
    files = [dataset.paths[i] for dataset in data.values()
             for i in np.linspace(0, len(dataset) - 1, clips).astype(int)]
    figure, used = Figure(figsize=(2 * shots, 2.2 * len(files))), BODY + LEFT + RIGHT
    parts = (BODY, BODY_EDGES, "C0"), (LEFT, HAND_EDGES, "C2"), (RIGHT, HAND_EDGES, "C1")
    for file, row in zip(files, figure.subplots(len(files), shots, squeeze=False)):
        xy, scores = load_pose_file(file)
        seen = (scores > THRESHOLD) & np.isfinite(xy).all(-1)
        low, high = (edge(xy[:, used][seen[:, used]], 0) for edge in (np.min, np.max))
        for t, axes in zip(np.linspace(0, len(xy) - 1, shots).astype(int), row):
            for part, edges, colour in parts:
                bones = np.array(part)[np.array(edges)]
                axes.plot(*xy[t, bones[seen[t, bones].all(1)]].T, lw=1, color=colour)
            unseen = np.nan_to_num(xy[t, [j for j in used if not seen[t, j]]])
            axes.plot(*np.clip(unseen, low, high).T, "rx", ms=3)
            axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), xticks=[], yticks=[], aspect="equal")
        row[0].set_title(file.stem, loc="left", fontsize=8)
    return figure

def draw_curves(run):
    """curves.png, where matplotlib is installed: losses and scores over steps. No error: the run is done."""
    with suppress(ImportError, OSError):
        from matplotlib.figure import Figure
        figure, steps = Figure(figsize=(10, 4)), [m["step"] for m in run.history]
        panels = (("train_loss", "dev_loss"), ("bleu4", "exact_match", "shuffled_bleu4"))
        for axes, keys in zip(figure.subplots(1, 2), panels):
            axes.plot(steps, [[math.nan if m[key] is None else m[key] for key in keys] for m in run.history])
            axes.legend(keys)
        figure.savefig(run.folder / "curves.png", dpi=120)

def evaluate_command(config, inference, args):
    """`evaluate RUN`: a split's scores, one a line, 95 % intervals behind; predictions in a file."""
    folder, place, language = find_best(args.run), find_place(config), config.language
    model = SignLanguageLite.from_pretrained(folder).to(place.device)
    if config.max_length > model.config.max_length:
        raise ConfigError(f"max_length is {config.max_length}, the model takes {model.config.max_length}")
    config.output_dir = ""  # evaluating leaves no cache behind
    dataset = SignLanguageDataset(Path(config.data_dir, f"labels.{args.split}"), config, "evaluated")
    dataset.encode = model.codec.encode
    print("\n".join(data_report({args.split: dataset}, model.codec)), file=sys.stderr)
    loader = make_loader(dataset, max(config.batch_size, EVAL_BATCH), place)
    constant = _read_json(folder / "config.json").get("constant", "")
    metrics, rows = evaluate(model, loader, inference, place, constant)
    predictions, references = ([_clean(row[i], language) for row in rows] for i in (3, 2))
    intervals = bootstrap(predictions, references, language) | ({} if metrics["bleu4"] else {"bleu4": ""})
    for key, value in {"exact_match": metrics["exact_match"], **metrics}.items():
        digits = 4 if key == "dev_loss" else 2
        print(key, value if isinstance(value, str) else f"{value:.{digits}f}{intervals.get(key, '')}")
    print(collapse_warning(metrics, predictions) + "\nthe ten worst clips, by chrF:")
    chrf = [CHRF().sentence_score(p, [r]).score for p, r in zip(predictions, references)]
    print("\n".join(_sample(rows[i]) for i in np.argsort(chrf, kind="stable")[:10]))
    write_predictions(out := Path(args.run, f"predictions_{args.split}.txt"), rows)
    write_whole(out.with_name(f"metrics_{args.split}.json"), _json(metrics))
    print(f"predictions beside references: {out}; all figures: metrics_{args.split}.json beside it")
    return 0

def bootstrap(predictions, references, language, samples=1000):
    """{metric: " [low, high]"}: 95 % intervals over resampled clips; sacrebleu's for BLEU-4 and chrF."""
    right = np.array([100.0 * (p == r) for p, r in zip(predictions, references)])
    scores = {"exact_match": np.random.default_rng(0).choice(right, (samples, len(right))).mean(1)}
    for key, metric in (("bleu4", BLEU(tokenize="zh" if language == "zh" else "13a")), ("chrf", CHRF())):
        # corpus_score(n_bootstrap=...) itself fails on chrF where a resample has no match at all
        statistics = metric._extract_corpus_statistics(predictions, [references])
        scores[key] = [float(s.score) for s in _bootstrap_resample(statistics, metric, n_samples=samples)[1]]
    return {key: " [{:.2f}, {:.2f}]".format(*np.percentile(s, [2.5, 97.5])) for key, s in scores.items()}

def translate_command(config, inference, args):
    """`translate RUN CLIP...`: name and text a line; a bad clip is reported, passed over, and exit code 1."""
    place, bad = find_place(config), 0
    model = SignLanguageLite.from_pretrained(args.run).to(place.device)
    for begin in range(0, len(args.clips), EVAL_BATCH):
        clips, texts = [], []
        for path in args.clips[begin:begin + EVAL_BATCH]:
            try:
                clips.append((path, read_clip(path, model.config)))
            except (DataError, pickle.UnpicklingError, OSError) as error:
                bad = 1
                print(f"error: {error}", file=sys.stderr)
        if clips:
            with on_device(pad_poses([pose for _, pose in clips]), place) as src_input, place.autocast():
                texts = model.generate(src_input, **asdict(inference))
        for (path, _), text in zip(clips, texts):
            as_json = json.dumps({"clip": path, "text": text}, ensure_ascii=False)
            print(as_json if args.json else f"{path}\t{text}")
    return bad

# ----------------------------------------------------------------------------------- the command line
COMMANDS = {"train": train, "check": check_command,
            "evaluate": evaluate_command, "translate": translate_command}

def make_parser(command):
    """The command's parser: its own arguments, then one flag a field of TrainConfig and InferenceConfig."""
    kinds = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    parser = HfArgumentParser([TrainConfig, InferenceConfig], prog=f"train_lite.py {command}",
                              formatter_class=type("Two", kinds, {}), description=__doc__, allow_abbrev=False)
    # the groups of --help are config_lite's comment headers, known by the first field under each
    headers = re.findall(r"# --- (.+) ---\n +(\w+):", inspect.getsource(TrainConfig))
    titles, group = {name: title for title, name in headers} | {"num_beams": "decoding"}, parser._optionals
    for action in list(group._group_actions):
        if action.option_strings[0].startswith("--no_"):  # HfArgumentParser's twins of options that are on
            action.help = argparse.SUPPRESS
        group = parser.add_argument_group(titles[action.dest]) if action.dest in titles else group
        parser._optionals._group_actions.remove(action)
        group._group_actions.append(action)
    if command in ("evaluate", "translate"):
        parser.add_argument("run", help="a run's folder, or its best/")
    if command == "evaluate":
        parser.add_argument("--split", default="dev", help="the label file's ending: train, dev or test")
    if command == "translate":
        parser.add_argument("clips", nargs="+", help="pose files")
        parser.add_argument("--json", action="store_true", help="one JSON object a line")
    if command == "check":
        parser.add_argument("--plot", default="", metavar="FILE.png", help="contact sheet of some clips")
    hidden = {"action": "store_false", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--no-resume", dest="auto_resume", **hidden)  # these two are the original's
    parser.add_argument("--no-tensorboard", dest="use_tensorboard", **hidden)
    return parser

def parse(argv):
    """-> (command, config, inference, the command's own arguments). Exits with 2 on a bad command line."""
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("train", argv)
    names = {kind: [item.name for item in fields(kind)] for kind in (TrainConfig, InferenceConfig)}
    # argparse fills in no default where there is a value: what is still None was not given
    args = make_parser(command).parse_args(rest, argparse.Namespace(**dict.fromkeys(sum(names.values(), []))))
    given = {name: value for name, value in vars(args).items() if value is not None}
    kind, defaults = TrainConfig, {}
    untouched = TrainConfig().data_dir == DEFAULT_DATA_DIR  # who edits it in config_lite.py has given it
    if command in ("evaluate", "translate"):
        defaults = _read_json(find_best(args.run) / "config.json")
        defaults |= defaults.get("inference", {})
    elif untouched and "data_dir" not in given and not Path(DEFAULT_DATA_DIR).exists():
        kind = DemoConfig
    elif given.get("mt5_path", TrainConfig().mt5_path) == "":
        kind = ScratchConfig
    if given.get("epochs") and "max_steps" not in given:  # who asks for epochs gets epochs
        defaults["max_steps"] = 0
    values = defaults | given
    config, inference = ({name: values[name] for name in which if name in values} for which in names.values())
    return command, kind(**config), InferenceConfig(**inference), args

def main(argv=None):
    """Run a command; returns the exit code. What the user can mend is one clear message, no traceback."""
    try:
        try:
            command, *rest = parse(sys.argv[1:] if argv is None else argv)
            return COMMANDS[command](*rest)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is noticed, and not at exit
    except BrokenPipeError:  # `| head`: end quietly, as SIGPIPE would
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13
    except ModuleNotFoundError as error:  # use_tensorboard, check --plot
        print(f"error: {error}, an optional package: pip install {error.name}", file=sys.stderr)
        return 1
    except (ConfigError, DataError, RunError, pickle.UnpicklingError, OSError) as error:
        text = re.sub(r"(?s)^Caught .*\n\S*(DataError|_Refused): ", "", str(error))
        print("error:", text.strip(), file=sys.stderr)  # a loading process's without its traceback
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # a log is read while it grows
    # not sys.exit: after an error Python would wait a minute for the loading processes, deaf to SIGTERM
    os._exit(main())
