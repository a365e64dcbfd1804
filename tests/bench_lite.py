"""How fast, how small, where the time goes: one command, no network, a GPU is used where there is one.

    python tests/bench_lite.py [--quick] [--threads N] [part ...]

    training    mT5-small's true size (random weights), clips like CSL-Daily's: the default against each lever off
    demo        the same at the size of the built-in demo
    growth      seconds over batch 1..32 and frames 64..512
    loader      one clip read, checked and normalised, against the bare unpickling of its file
    checkpoint  seconds and bytes of last.pt at mT5-small's size
    compile     torch.compile: what it costs against what it saves

A configuration lives in a process of its own, so that its peak memory is its own. Two of them are timed in turns,
A B A B ..., and a ratio is the median of the turns' ratios: a machine that slows down slows both.
"""
import argparse
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import pickle
import platform
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import MT5Config, MT5ForConditionalGeneration

import models_lite
import train_lite
from config_lite import DemoConfig, InferenceConfig, TrainConfig
from datasets_lite import JOINTS, LengthBatchSampler, SignLanguageDataset, make_demo_corpus, read_clip

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # real labels and pieces, used where they are
ROWS = 250_112  # of mT5-small's tables
TOKENS, FRAMES = 14, 128  # of a mean CSL-Daily clip
GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Case:
    """One configuration: the default, with some levers off."""

    name: str = "**default**"
    demo: bool = False  # the demo's size, else mT5-small's
    full_tables: bool = False
    random_batches: bool = False
    original_front_end: bool = False
    fp32: bool = False  # no bf16, no TF32
    used_pieces: bool = False  # the pieces in use, without the characters that make other texts spellable
    batch_size: int = 0  # 0 = the config's
    micro_batches: int = 8  # timed a turn; a step's time is worked out for the config's accumulation


LEVERS = [Case("full tables", full_tables=True), Case("random batches", random_batches=True),
          Case("original front-end", original_front_end=True), Case("pieces in use only", used_pieces=True)]
ALL_OFF = Case("**all off**", full_tables=True, random_batches=True, original_front_end=True, fp32=True)
GPU_CASES = [Case("fp32", fp32=True), Case("batch 32 x 1", batch_size=32),
             Case("fp32, batch 4, full tables", fp32=True, batch_size=4, full_tables=True)]


class OriginalFrontEnd(nn.Module):
    """What the original computes for a clip: 64, 128, 256 channels on every joint of every frame, then their mean."""

    def __init__(self, d_model):
        super().__init__()
        self.embed, self.body, self.hand = nn.Linear(3, 64), self.stack(), self.stack()
        self.out = nn.Sequential(nn.Linear(768, 512), nn.Linear(512, d_model), nn.LayerNorm(d_model))

    @staticmethod
    def stack():
        """Two levels of: each joint by itself, three frames of it, normalise."""
        return nn.Sequential(*(layer for i, o in ((64, 128), (128, 256)) for layer in (
            nn.Conv2d(i, o, 1), nn.Conv2d(o, o, (3, 1), padding=(1, 0)), nn.BatchNorm2d(o), nn.ReLU(inplace=True))))

    def forward(self, src_input):
        """src_input -> (B, T, d_model)."""
        means = [stack(self.embed(src_input[part]).permute(0, 3, 1, 2)).mean(-1).transpose(1, 2)
                 for part, stack in (("body", self.body), ("left", self.hand), ("right", self.hand))]
        return self.out(torch.cat(means, -1))


# ---------------------------------------------------------------------------------------------- what is timed

class Material:
    """Writes what the other processes work with: a random mT5-small, clips like CSL-Daily's, a small demo."""

    def __init__(self, folder, clips):
        make_demo_corpus(folder / "demo", splits={"train": 512, "dev": 64, "test": 1})
        demo = [entry["text"] for entry in pickle.loads(gzip.decompress((folder / "demo/labels.train").read_bytes())).values()]
        labels, texts = SHARED / "csl_daily_labels" / "labels.train", demo
        if labels.is_file():
            texts = [entry["text"] for entry in pickle.loads(gzip.decompress(labels.read_bytes())).values()]
        (folder / "texts.json").write_text(json.dumps(texts))
        self.write_clips(folder / "csl", texts, clips)
        pieces = SHARED / "mt5_cn_tokenizer" / "spiece.model"
        config = MT5Config(vocab_size=ROWS, d_model=512, d_ff=1024, d_kv=64, num_heads=6, num_layers=8, num_decoder_layers=8,
                           feed_forward_proj="gated-gelu", decoder_start_token_id=0)
        mt5 = MT5ForConditionalGeneration(config)
        models_lite._untie(mt5)
        nn.init.normal_(mt5.lm_head.weight, std=config.d_model ** -0.5)
        mt5.save_pretrained(folder / "mt5")
        if pieces.is_file():
            shutil.copy(pieces, folder / "mt5")
        else:
            models_lite.train_tokenizer(demo, 1000).save_pretrained(folder / "mt5")

    @staticmethod
    def write_clips(folder, texts, clips):
        """Lists of float64 frames with a person axis, as CSL-Daily's poses come; mean FRAMES, from 32 to 256."""
        rng = np.random.default_rng(0)
        (folder / "pose_format").mkdir(parents=True)
        entries = {}
        for i, frames in enumerate(np.clip(rng.normal(FRAMES, 45, clips), 32, 256).astype(int)):
            name = f"clip_{i:04d}"
            pose = {"keypoints": list(rng.uniform(0.2, 0.8, (frames, 1, JOINTS, 2))),
                    "scores": list(rng.uniform(0.25, 1, (frames, 1, JOINTS))), "w_h": [512, 512]}
            (folder / "pose_format" / f"{name}.pkl").write_bytes(pickle.dumps(pose))
            entries[name] = {"name": name, "text": texts[i * 37 % len(texts)], "gloss": []}
        (folder / "labels.train").write_bytes(gzip.compress(pickle.dumps(entries)))


class Bench:
    """One configuration: its data, its model, and what is timed of them."""

    def __init__(self, folder, case, max_length=256):
        kind = DemoConfig if case.demo else TrainConfig
        settings = {} if case.demo else {"mt5_path": str(folder / "mt5"), "max_length": max_length}
        if case.original_front_end:  # it knows no stride
            settings["temporal_stride"] = 1
        self.case, self.folder = case, folder
        self.config = kind(data_dir=str(folder / ("demo" if case.demo else "csl")), trim_vocabulary=not case.full_tables, **settings)
        if case.batch_size:
            self.config.batch_size, self.config.gradient_accumulation = case.batch_size, max(1, 32 // case.batch_size)
        self.place = train_lite.find_place(self.config)
        if case.fp32:
            self.place.autocast = contextlib.nullcontext
            torch.set_float32_matmul_precision("highest")
        self.data = SignLanguageDataset(Path(self.config.data_dir) / "labels.train", self.config, "train")
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = self.build_model().to(self.place.device)
        self.loaded_gb = train_lite.Place().peak_memory_gb()
        self.data.encode = self.model.codec.encode
        optimizer, scheduler = train_lite.make_optimizer(self.model, self.config, 1000, 100)
        self.run = train_lite.Run(self.config, InferenceConfig(), self.place, model=self.model, net=self.model,
                                  optimizer=optimizer, scheduler=scheduler)
        self.batches = self.choose_batches(self.config.batch_size, case.micro_batches)
        self.hold(self.batches[len(self.batches) // 2])
        with FlopCounterMode(display=False) as counter:  # the first pass, which is never timed
            self.pass_of(0)
        self.flops = counter.get_total_flops()
        self.run.optimizer.step()  # makes its state
        self.run.optimizer.zero_grad()

    def build_model(self):
        """The product's own way, the levers switched around it."""
        case, texts = self.case, [entry["text"] for entry in self.data.entries]
        if not case.demo:
            texts = json.loads((self.folder / "texts.json").read_text())
        if case.used_pieces:
            models_lite.pieces_to_keep = lambda tokenizer, texts: sorted(
                {0, 1, 2}.union(*tokenizer(list(texts)).input_ids))
        if case.full_tables:
            models_lite._cut_tables = lambda mt5, keep: None
        model = models_lite.SignLanguageLite(self.config, texts=texts, glosses=[e["gloss"] for e in self.data.entries])
        if case.full_tables:  # rows that no piece of this tokeniser has must not be decoded: it could not spell them
            model.codec.keep = model.codec.row = None
            model.mt5_model.lm_head.weight.data[len(model.mt5_tokenizer):] = 0
        if case.original_front_end:
            del model.pose_embed, model.fusion, model.temporal, model.proj, model.layer_norm
            model.front_end = OriginalFrontEnd(model.mt5_model.config.d_model)
            model.encode_pose = lambda src: (model.position(model.front_end(src)), src["attention_mask"])
        return model

    def hold(self, *batches):
        """Load these batches into memory, for what is timed without a loader; returns seconds a batch."""
        start = time.perf_counter()
        self.some = [self.data.collate_fn([self.data[i] for i in clips]) for clips in batches]
        seconds = (time.perf_counter() - start) / len(batches)
        self.src = [train_lite.to_device(src, self.place.device) for src, _ in self.some]
        return seconds

    def choose_batches(self, size, count, shuffle=True):
        """`count` of an epoch's batches, from the longest clips to the shortest, so that a turn sees all lengths."""
        lengths = np.array(self.data.lengths)
        if self.case.random_batches:
            order = np.random.default_rng(0).permutation(len(lengths))
            batches = [order[i:i + size].tolist() for i in range(0, len(order), size)]
        else:
            batches = list(LengthBatchSampler(lengths, size, shuffle, 0, self.config.gradient_accumulation if shuffle else 1))
        batches = sorted((b for b in batches if len(b) == size), key=lambda b: -lengths[b].mean())
        return [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]

    def clock(self):
        """Now, when the device has done all that it was given."""
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, function, *args):
        """Seconds of one call."""
        start = self.clock()
        function(*args)
        return self.clock() - start

    def steps(self):
        """The micro-batches through the loader, then an optimiser step -> seconds: all, waiting, of the optimiser."""
        self.model.train()
        loader = iter(DataLoader(self.data, batch_sampler=self.batches, collate_fn=self.data.collate_fn,
                                 num_workers=self.config.num_workers, pin_memory=GPU))
        waited, batch = 0.0, next(loader)  # to start the loading processes is an epoch's matter
        start = self.clock()
        for i in range(len(self.batches)):
            before = time.perf_counter()
            batch = next(loader) if i else batch
            waited += time.perf_counter() - before
            train_lite.micro_batch(self.run, i, True, *batch, i == len(self.batches) - 1)
        passes = self.clock() - start
        return passes, waited, self.timed(train_lite.optimiser_step, self.run)

    def pass_of(self, i):
        """Forward and backward of a batch in memory."""
        with self.place.autocast():
            output = self.run.net(self.src[i], self.some[i][1])
        (output.loss * output.num_tokens).backward()

    def front_end(self, i):
        """Forward and backward of the front-end alone."""
        with self.place.autocast():
            x, _ = self.model.encode_pose(self.src[i])
        x.sum().backward()

    def head(self, i):
        """Forward and backward from the decoder's last state: head, softmax, cross-entropy."""
        labels = self.some[i][1]["labels"].to(self.place.device)
        hidden = torch.randn(*labels.shape, self.model.mt5_model.config.d_model, device=self.place.device, requires_grad=True)
        with self.place.autocast():
            logits = self.model.mt5_model.lm_head(hidden).float()
        models_lite.text_loss(logits, labels, 0.0)[0].backward()

    def matmul_peak(self):
        """FLOP/s of a large matrix product, in the precision that training uses."""
        n, bf16 = (8192 if GPU else 2048), not isinstance(self.place.autocast(), contextlib.nullcontext)
        a = torch.randn(n, n, device=self.place.device, dtype=torch.bfloat16 if bf16 else torch.float32)
        torch.mm(a, a)
        return 2 * n ** 3 / min(self.timed(torch.mm, a, a) for _ in range(3))

    def decode(self):
        """Clips a second of `generate`, TOKENS pieces a clip, in batches of an evaluation."""
        self.model.eval()
        size = max(train_lite.EVAL_BATCH, self.config.batch_size)
        batches = [train_lite.to_device(self.data.collate_fn([self.data[i] for i in clips])[0], self.place.device)
                   for clips in self.choose_batches(size, 2, shuffle=False)]
        start = self.clock()
        for src_input in batches:
            with self.place.autocast():
                self.model.generate(src_input, max_new_tokens=TOKENS)
        return 2 * size / (self.clock() - start)

    def turn(self):
        """All figures of this configuration once, as numbers; shares are of a whole optimiser step."""
        passes, waited, optimiser = self.steps()
        a_pass, accumulation = passes / len(self.batches), self.config.gradient_accumulation
        step = accumulation * a_pass + optimiser
        self.model.train()
        peak = self.matmul_peak()
        load = self.hold(self.batches[len(self.batches) // 2])
        whole, front, head = (self.timed(f, 0) for f in (self.pass_of, self.front_end, self.head))
        self.model.zero_grad()
        rest, compute = max(whole - front - head, 0), (step - optimiser) * (1 - waited / passes)
        figures = {"clips/s": self.config.batch_size * accumulation / step, "wait": waited / passes * (1 - optimiser / step),
                   "optimiser": optimiser / step, "load": load / a_pass,
                   "peak": self.flops / whole / peak, "peak GFLOP/s": peak / 1e9, "decoded/s": self.decode(),
                   "loaded GB": self.loaded_gb, "GB": self.place.peak_memory_gb(), "pieces": len(self.model.mt5_model.lm_head.weight)}
        return figures | {name: part / whole * compute / step for name, part in (("front", front), ("mT5", rest), ("head", head))}

    def grow(self, batch, frames):
        """Seconds and FLOP of forward and backward at this size, every frame real."""
        shape = (batch, frames)
        src = {"body": torch.rand(*shape, 9, 3), "left": torch.rand(*shape, 21, 3), "right": torch.rand(*shape, 21, 3),
               "attention_mask": torch.ones(shape, dtype=torch.long)}
        labels = torch.randint(3, len(self.model.codec), (batch, TOKENS))
        self.src, self.some = [train_lite.to_device(src, self.place.device)], [(src, {"labels": labels})]
        with FlopCounterMode(display=False) as counter:
            self.pass_of(0)
        return min(self.timed(self.pass_of, 0) for _ in range(2)), counter.get_total_flops()

    def checkpoint(self):
        """Seconds to write and to read last.pt, and its bytes."""
        path = self.folder / "last.pt"
        wrote = self.timed(train_lite.save_checkpoint, path, self.run)
        return wrote, self.timed(train_lite.load_checkpoint, path), path.stat().st_size

    def compiled(self, turns):
        """Seconds until the compiled network has seen both batch lengths, then of a pass: plain, compiled."""
        plain, fast = self.model, torch.compile(self.model, dynamic=True)
        self.run.net = fast
        self.hold(self.batches[0], self.batches[-1])
        first = sum(self.timed(self.pass_of, i) for i in (0, 1, 0))
        times = {plain: [], fast: []}
        for _ in range(turns):
            for self.run.net in times:
                times[self.run.net].append(sum(self.timed(self.pass_of, i) for i in (0, 1)) / 2)
        return first, statistics.median(times[plain]), statistics.median(times[fast])

    @staticmethod
    def loader(path, turns):
        """Microseconds: bare unpickling of a file, and `read_clip` of it."""
        def bare():
            with open(path, "rb") as file:
                pickle.load(file)
        config, times = TrainConfig(), ([], [])
        for _ in range(turns):
            for into, function in zip(times, (bare, lambda: read_clip(path, config))):
                start = time.perf_counter()
                function()
                into.append(1e6 * (time.perf_counter() - start))
        return [statistics.median(t) for t in times]


# ---------------------------------------------------------------------------------------------- processes

def serve(pipe, kind, args, threads):
    """The other end of a Worker: make the object, then do what is asked."""
    torch.set_num_threads(threads)
    try:
        thing = kind(*args)
        while request := pipe.recv():
            pipe.send(getattr(thing, request[0])(*request[1:]))
    except EOFError:
        pass
    except BaseException:
        traceback.print_exc()


class Worker:
    """An object in a fresh process, so that `ru_maxrss` is its own; it idles between calls."""

    threads = torch.get_num_threads()

    def __init__(self, kind, *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, kind, args, self.threads))
        self.process.start()
        other.close()

    def __call__(self, *request):
        self.pipe.send(request)
        return self.pipe.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join()


def in_turns(calls, turns):
    """Each call's results, a list a call, the calls taking turns."""
    rounds = [[call() for call in calls] for _ in range(turns)]
    return [list(results) for results in zip(*rounds)]


def median(turns, key):
    return statistics.median(turn[key] for turn in turns)


# ---------------------------------------------------------------------------------------------- tables

def table(title, head, rows):
    """Print a Markdown table."""
    print(f"\n### {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def figures_row(name, turns, ratios):
    """A configuration's row; ratios are the default's figures against its own."""
    m = {key: median(turns, key) for key in turns[0]}
    shares = [f"{100 * m[key]:.1f}" for key in ("wait", "front", "mT5", "head", "optimiser")]
    return [name, f"{m['pieces']:,.0f}", f"{m['clips/s']:.2f}", ratios["clips/s"], *shares, f"{100 * m['load']:.1f}",
            f"{100 * m['peak']:.0f}", f"{m['loaded GB']:.2f}", f"{m['GB']:.2f}", ratios["GB"], f"{m['decoded/s']:.1f}",
            ratios["decoded/s"]]


def levers(title, folder, default, cases, turns):
    """The default against each case, two processes at a time, in turns."""
    rows, ours = [], []
    with Worker(Bench, folder, default) as worker:
        for case in cases:
            with Worker(Bench, folder, case) as other:
                a, b = in_turns([lambda: worker("turn"), lambda: other("turn")], turns)
            ours += a
            ratios = {key: f"{statistics.median(x[key] / y[key] for x, y in zip(a, b)):.2f}" for key in a[0]}
            rows.append(figures_row(case.name, b, ratios))
    head = ["levers off", "rows", "clips/s", "default is x", "wait %", "front-end %", "mT5 %", "head, loss %", "optimiser %",
            "load / pass %", "of peak %", "GB loaded", "GB peak", "default takes x", "decoded/s", "default is x"]
    table(title, head, [figures_row(default.name, ours, {"clips/s": "1", "GB": "1", "decoded/s": "1"})] + rows)
    print(f"\nMatmul peak of this run: {median(ours, 'peak GFLOP/s'):,.0f} GFLOP/s.")


def training(folder, turns, quick):
    """mT5-small's size."""
    default = Case(micro_batches=4 if quick else 8)
    cases = ([] if quick else LEVERS) + [ALL_OFF] + (GPU_CASES if GPU else [])
    if not GPU:
        cases = [replace(case, fp32=False) for case in cases]
    levers("Training and decoding at mT5-small's size, a step of 32 clips", folder, default,
           [replace(case, micro_batches=default.micro_batches) for case in cases], turns)
    lengths, rows = np.clip(np.random.default_rng(0).normal(FRAMES, 45, 18401), 32, 256).astype(int), []
    for size in (2, 4, 16, 32):
        bucketed = list(LengthBatchSampler(lengths, size, True, 0, 32 // size))
        drawn = np.array_split(np.random.default_rng(0).permutation(len(lengths)), len(bucketed))
        rows.append([str(size)] + [f"{100 * (1 - lengths.sum() / sum(len(b) * lengths[b].max() for b in plan)):.1f}"
                                   for plan in (bucketed, drawn)])
    table("Padded share of all frames, 18,401 clips, %", ["batch", "by length", "random"], rows)


def demo(folder, turns, quick):
    """The demo's size."""
    default = Case(demo=True, micro_batches=2 if quick else 4)
    levers("Training and decoding at the demo's size", folder, default, [
        replace(default, name="random batches", random_batches=True),
        replace(default, name="original front-end", original_front_end=True),
        replace(default, name="**both off**", random_batches=True, original_front_end=True)], turns)


def growth(folder, turns, quick):
    """Seconds of a pass over batch and frames."""
    sizes = [(b, FRAMES) for b in (1, 2, 4, 8, 16, 32)[:5 if quick else 6]] + [(4, t) for t in (64, 128, 256, 512)]
    with Worker(Bench, folder, Case(micro_batches=1), 512) as worker:
        results = in_turns([lambda size=size: worker("grow", *size) for size in sizes], turns)
    rows, before = [], None
    for (batch, frames), result in zip(sizes, results):
        now = statistics.median(r[0] for r in result), result[0][1]
        grown = before and frames + batch > sum(before[2])
        rows.append([str(batch), str(frames), f"{1000 * now[0]:.0f}", f"{1000 * now[0] / batch / frames * 128:.0f}",
                     f"{now[1] / 1e9:.1f}", f"{now[0] / before[0]:.2f}" if grown else "", f"{now[1] / before[1]:.2f}" if grown else ""])
        before = (*now, (batch, frames))
    table("Growth of forward and backward (twice the size a row)",
          ["batch", "frames", "ms", "ms per 128 frames", "GFLOP", "x ms", "x FLOP"], rows)


def loader(folder, turns, quick):
    """One clip."""
    real = SHARED / "csl_news" / "pose_format"
    files = {"demo, arrays": folder / "demo/pose_format/train_00000.pkl", "as CSL-Daily's, list of frames": folder / "csl/pose_format/clip_0000.pkl",
             "CSL-News, list of frames": next(real.glob("*.pkl")) if real.is_dir() else None}
    rows = []
    with Worker(Loader) as worker:
        for name, path in files.items():
            if path:
                bare, ours = worker("loader", path, 60 * turns)
                rows.append([name, f"{path.stat().st_size / 1e3:.0f}", f"{bare:.0f}", f"{ours:.0f}", f"{ours / bare:.2f}"])
    table("A clip read, checked and normalised, against open + pickle.load", ["file", "kB", "bare µs", "read_clip µs", "x"], rows)


class Loader:
    """Bench.loader alone, in a process without a model."""

    loader = staticmethod(Bench.loader)


def checkpoint(folder, turns, quick):
    """last.pt."""
    rows = []
    for case in [Case(micro_batches=1)] + ([] if quick else [Case("full tables", full_tables=True, micro_batches=1)]):
        with Worker(Bench, folder, case) as worker:
            [results] = in_turns([lambda: worker("checkpoint")], turns)
        wrote, read, size = (statistics.median(column) for column in zip(*results))
        rows.append([case.name, f"{wrote:.2f}", f"{read:.2f}", f"{size / 1e6:,.0f}"])
    table("last.pt at mT5-small's size", ["tables", "write s", "read s", "MB"], rows)


def compile(folder, turns, quick):
    """torch.compile."""
    rows = []
    for name, case in (("demo", Case(demo=True, micro_batches=2)), ("mT5-small", Case(micro_batches=2)))[:1 if quick else 2]:
        with Worker(Bench, folder, case) as worker:
            first, plain, fast = worker("compiled", 3 * turns)
        even = f"{(first - 3 * fast) / (plain - fast):,.0f}" if fast < plain else "never"
        rows.append([name, f"{first:.0f}", f"{1000 * plain:.0f}", f"{1000 * fast:.0f}", f"{plain / fast:.2f}", even])
    table("torch.compile of the network, dynamic shapes",
          ["size", "compiling s", "plain ms a pass", "compiled ms", "x", "passes until it pays"], rows)


PARTS = {part.__name__: part for part in (loader, training, demo, growth, checkpoint, compile)}


def main():
    """Parse, prepare, run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="which to run; all where none is named")
    parser.add_argument("--quick", action="store_true", help="fewer turns and cases: a couple of minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, in every process")
    parser.add_argument("--turns", type=int, default=0, help="repeats a median is taken of")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    Worker.threads, turns = args.threads, args.turns or (1 if args.quick else 3)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t :")
    print(f"{cpu}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}, "
          f"{torch.cuda.get_device_name() if GPU else 'no GPU'}; medians of {turns} turns")
    with tempfile.TemporaryDirectory() as folder:
        with Worker(Material, Path(folder), 64 if args.quick else 256):
            pass
        for name in args.parts or PARTS:
            PARTS[name](Path(folder), turns, args.quick)


if __name__ == "__main__":
    main()
