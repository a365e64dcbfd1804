"""How fast, how small, where the time goes: one command, no network; a GPU is used where there is
one.

    python tests/tools/bench.py [--quick] [--threads N] [--cpu-time] [part ...]

    loader      one clip read, checked and normalised, against the bare unpickling of its file
    training    mT5-small's true size (random weights): the default against levers off
    demo        the same at the size of the built-in demo
    growth      seconds over batch 1..32 and frames 64..512
    checkpoint  seconds and bytes of last.pt at mT5-small's size
    compile     torch.compile: what it costs against what it saves

A configuration has a process to itself, so that its peak memory is its own. Two of them are timed
in turns,
A B A B ..., and a ratio is the median of the turns' ratios: a machine that slows down slows both.
"""

import argparse
import contextlib
import functools
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

import numpy as np
import torch
from common import SHARED
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import MT5Config, MT5ForConditionalGeneration

import models_lite
import train_lite
from config_lite import DemoConfig, InferenceConfig, TrainConfig
from datasets_lite import (
    JOINTS,
    LOOKED_THROUGH,
    LengthBatchSampler,
    SignLanguageDataset,
    make_demo_corpus,
    read_clip,
)

ROWS, TOKENS, FRAMES = 250_112, 14, 128  # of mT5-small's tables; of a mean CSL-Daily clip
GPU = torch.cuda.is_available()
now = time.perf_counter  # --cpu-time puts the process's own CPU seconds in its place


def _on(device, src_input):
    return {
        key: value.to(device) if torch.is_tensor(value) else value
        for key, value in src_input.items()
    }


@dataclass(frozen=True)
class Case:
    """One configuration: the default, with some levers off."""

    name: str = "**default**"
    demo: bool = False  # the demo's size, else mT5-small's
    full_tables: bool = False
    random_batches: bool = False
    original_front_end: bool = False
    fp32: bool = False  # no bf16, no TF32
    used_pieces: bool = (
        False  # the pieces in use, without the characters that make other texts spellable
    )
    batch_size: int = 0  # 0 = the config's
    micro_batches: int = (
        8  # timed a turn; a step's time is worked out for the config's accumulation
    )


LEVERS = [
    Case("**all off**", full_tables=True, random_batches=True, original_front_end=True, fp32=True),
    Case("full tables", full_tables=True),
    Case("random batches", random_batches=True),
    Case("original front-end", original_front_end=True),
    Case("pieces in use only", used_pieces=True),
]
GPU_LEVERS = [
    Case("fp32", fp32=True),
    Case("batch 32 x 1", batch_size=32),
    Case("fp32, batch 4, full tables", fp32=True, batch_size=4, full_tables=True),
]


class OriginalFrontEnd(nn.Module):
    """What the original computes: 64, 128, 256 channels on every joint of every frame, then their
    mean.
    """

    def __init__(self, d_model):
        super().__init__()
        self.embed, self.body, self.hand = nn.Linear(3, 64), self.stack(), self.stack()
        self.out = nn.Sequential(
            nn.Linear(768, 512), nn.Linear(512, d_model), nn.LayerNorm(d_model)
        )

    @staticmethod
    def stack():
        """Twice: each joint by itself, then over three frames, then normalised."""
        return nn.Sequential(
            *(
                layer
                for i, o in ((64, 128), (128, 256))
                for layer in (
                    nn.Conv2d(i, o, 1),
                    nn.Conv2d(o, o, (3, 1), padding=(1, 0)),
                    nn.BatchNorm2d(o),
                    nn.ReLU(True),
                )
            )
        )

    def forward(self, src_input):
        """src_input -> (B, T, d_model)."""
        parts = (("body", self.body), ("left", self.hand), ("right", self.hand))
        return self.out(
            torch.cat(
                [
                    stack(self.embed(src_input[part]).permute(0, 3, 1, 2)).mean(-1).mT
                    for part, stack in parts
                ],
                -1,
            )
        )


# ------------------------------------------------------------------------- what is worked on


class Material:
    """Writes what the other processes read: a small demo, clips like CSL-Daily's, a random
    mT5-small.
    """

    def __init__(self, folder, clips, with_mt5):
        make_demo_corpus(folder / "demo", splits={"train": 512, "dev": 64, "test": 1})
        files = folder / "demo/labels.train", SHARED / "csl_daily_labels/labels.train"
        demo, *real = [
            [entry["text"] for entry in pickle.loads(gzip.decompress(file.read_bytes())).values()]
            for file in files
            if file.is_file()
        ]
        texts = real[0] if real else demo
        (folder / "texts.json").write_text(json.dumps(texts))
        self.write_clips(folder / "csl", texts, clips)
        if with_mt5:
            self.write_mt5(folder / "mt5", demo)

    @staticmethod
    def write_clips(folder, texts, clips):
        """Lists of float64 frames with a person axis, as CSL-Daily's poses come."""
        rng, entries = np.random.default_rng(0), {}
        (folder / "pose_format").mkdir(parents=True)
        for i, frames in enumerate(clip_lengths(clips)):
            pose = {
                "keypoints": list(rng.uniform(0.2, 0.8, (frames, 1, JOINTS, 2))),
                "scores": list(rng.uniform(0.25, 1, (frames, 1, JOINTS))),
                "w_h": [512, 512],
            }
            (folder / "pose_format" / f"clip_{i}.pkl").write_bytes(pickle.dumps(pose))
            entries[f"clip_{i}"] = {
                "name": f"clip_{i}",
                "text": texts[i * 37 % len(texts)],
                "gloss": [],
            }
        (folder / "labels.train").write_bytes(gzip.compress(pickle.dumps(entries)))

    @staticmethod
    def write_mt5(folder, texts):
        """1.2 GB in mT5-small's form; its tables repeat 1,024 random rows, sooner drawn."""
        config = MT5Config(
            vocab_size=1024,
            d_model=512,
            d_ff=1024,
            d_kv=64,
            num_heads=6,
            num_layers=8,
            num_decoder_layers=8,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
        mt5 = MT5ForConditionalGeneration(config)
        models_lite.untie(mt5)
        for table, scale in ((mt5.shared, 1), (mt5.lm_head, config.d_model**-0.5)):
            rows = scale * torch.randn(1024, config.d_model)
            table.weight = nn.Parameter(rows.repeat(ROWS // 1024 + 1, 1)[:ROWS].clone())
        mt5.config.vocab_size = ROWS
        mt5.save_pretrained(folder)
        pieces = SHARED / "mt5_cn_tokenizer/spiece.model"
        if pieces.is_file():
            shutil.copy(pieces, folder)
        else:
            models_lite.train_tokenizer(texts, 1000).save_pretrained(folder)


def clip_lengths(count):
    """Frames of so many clips: 32 to 256, FRAMES on average."""
    return np.clip(np.random.default_rng(0).normal(FRAMES, 45, count), 32, 256).astype(int)


class Bench:
    """One configuration: its data, its model, and what is timed of them."""

    def __init__(self, folder, case, max_length=256):
        settings = {"data_dir": str(folder / ("demo" if case.demo else "csl"))}
        if case.original_front_end:  # it knows no stride
            settings["temporal_stride"] = 1
        if not case.demo:
            settings |= {"mt5_path": str(folder / "mt5"), "max_length": max_length}
        if case.batch_size:
            settings |= {
                "batch_size": case.batch_size,
                "gradient_accumulation": 32 // case.batch_size,
            }
        self.case, self.config = case, (DemoConfig if case.demo else TrainConfig)(**settings)
        self.place = train_lite.find_place(self.config)
        if case.fp32:
            self.place.autocast = contextlib.nullcontext
            torch.set_float32_matmul_precision("highest")
        self.data = SignLanguageDataset(
            Path(self.config.data_dir) / "labels.train", self.config, "train"
        )
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = self.build_model(folder).to(self.place.device)
        self.loaded_gb = train_lite.Place().peak_memory_gb()
        self.data.encode = self.model.codec.encode
        optimizer, scheduler = train_lite.make_optimizer(self.model, self.config, 1000, 100)
        self.run = train_lite.Run(
            self.config,
            InferenceConfig(),
            self.place,
            model=self.model,
            net=self.model,
            optimizer=optimizer,
            scheduler=scheduler,
            data={"train": self.data, "dev": self.data},
        )
        self.batches = self.choose_batches(self.config.batch_size, case.micro_batches)
        self.hold(self.batches[len(self.batches) // 2])
        with FlopCounterMode(display=False) as counter:  # the first pass, which is never timed
            self.pass_of(0)
        self.flops = counter.get_total_flops()
        optimizer.step()  # makes its state
        optimizer.zero_grad()

    def build_model(self, folder):
        """The product's own way, the levers switched around it."""
        case, entries = self.case, self.data.entries
        texts = (
            [e["text"] for e in entries]
            if case.demo
            else json.loads((folder / "texts.json").read_text())
        )
        if case.used_pieces:
            models_lite.pieces_to_keep = lambda tokenizer, texts: sorted(
                {0, 1, 2}.union(*tokenizer(texts).input_ids)
            )
        if case.full_tables:
            models_lite.pieces_to_keep = lambda tokenizer, texts: list(range(ROWS))
        model = models_lite.SignLanguageLite(
            self.config, texts=texts, glosses=[e["gloss"] for e in entries]
        )
        if case.full_tables:  # a row without a piece must not be decoded
            model.codec = models_lite.TextCodec(model.mt5_tokenizer, self.config.max_text_length)
            model.mt5_model.lm_head.weight.data[len(model.mt5_tokenizer) :] = 0
        if case.original_front_end:
            del model.pose_embed, model.fusion, model.temporal, model.proj, model.layer_norm
            model.front_end = OriginalFrontEnd(model.mt5_model.config.d_model)
            model.encode_pose = lambda src: (
                model.position(model.front_end(src)),
                src["attention_mask"],
            )
        return model

    def choose_batches(self, size, count, shuffle=True):
        """`count` of an epoch's batches, from long clips to short, so that each turn sees all
        lengths.
        """
        lengths = np.array(self.data.lengths)
        if self.case.random_batches:
            order = np.random.default_rng(0).permutation(len(lengths))
            batches = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        else:
            accumulation = self.config.gradient_accumulation if shuffle else 1
            batches = list(LengthBatchSampler(lengths, size, shuffle, 0, accumulation))
        batches = sorted((b for b in batches if len(b) == size), key=lambda b: -lengths[b].mean())
        return [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]

    def collate(self, clips):
        """These clips as a batch, in this process."""
        return self.data.collate_fn([self.data[i] for i in clips])

    def hold(self, *batches):
        """Keep these batches in memory, for what is timed without a loader."""
        self.held = [(_on(self.place.device, src), tgt) for src, tgt in map(self.collate, batches)]

    def timed(self, function, *args):
        """Seconds of one call, until the device has done all of it."""
        start = now()
        function(*args)
        if GPU:
            torch.cuda.synchronize()
        return now() - start

    def steps(self):
        """Seconds of the micro-batches through the loader, waiting included; and of the waiting."""
        loader = iter(
            DataLoader(
                self.data,
                batch_sampler=self.batches,
                collate_fn=self.data.collate_fn,
                num_workers=self.config.num_workers,
                pin_memory=GPU,
            )
        )
        batch, waited, start = (
            next(loader),
            0.0,
            now(),
        )  # to start the loading processes is an epoch's matter
        for i in range(len(self.batches)):
            before = now()
            batch = next(loader) if i else batch
            waited += now() - before
            train_lite.micro_batch(
                self.run, i, True, *batch, i == len(self.batches) - 1
            )  # ends with .item()
        return now() - start, waited

    def pass_of(self, i):
        """Forward and backward of a batch in memory."""
        with self.place.autocast():
            output = self.run.net(*self.held[i])
        (output.loss * output.num_tokens).backward()

    def front_end(self, i):
        """Forward and backward of the front-end alone."""
        with self.place.autocast():
            x, _ = self.model.encode_pose(self.held[i][0])
        x.sum().backward()

    def head(self, i):
        """Forward and backward from the decoder's last state on: head, softmax, cross-entropy."""
        device, labels = self.place.device, self.held[i][1]["labels"].to(self.place.device)
        width = self.model.mt5_model.config.d_model
        hidden = torch.randn(*labels.shape, width, device=device, requires_grad=True)
        with self.place.autocast():
            logits = self.model.mt5_model.lm_head(hidden).float()
        models_lite.text_loss(logits, labels, 0.0)[0].backward()

    def matmul_peak(self):
        """FLOP/s of a large matrix product, in the precision that training uses."""
        n, bf16 = (
            (8192 if GPU else 2048),
            not isinstance(self.place.autocast(), contextlib.nullcontext),
        )
        a = torch.randn(
            n, n, device=self.place.device, dtype=torch.bfloat16 if bf16 else torch.float32
        )
        torch.mm(a, a)
        return 2 * n**3 / min(self.timed(torch.mm, a, a) for _ in range(3))

    def decode(self):
        """Clips a second of `generate`, TOKENS pieces a clip, in batches of an evaluation."""
        size = max(train_lite.EVAL_BATCH, self.config.batch_size)
        self.model.eval()
        self.hold(*self.choose_batches(size, 2, shuffle=False))
        seconds = 0.0
        with self.place.autocast():
            for src_input, _ in self.held:
                seconds += self.timed(self.generate, src_input)
        return 2 * size / seconds

    def generate(self, src_input):
        return self.model.generate(src_input, max_new_tokens=TOKENS)

    def turn(self):
        """All figures of this configuration once; parts are shares of a whole optimiser step."""
        self.model.train()
        passes, waited = self.steps()
        optimiser = self.timed(train_lite.optimiser_step, self.run)
        a_pass, accumulation = passes / len(self.batches), self.config.gradient_accumulation
        step, peak = accumulation * a_pass + optimiser, self.matmul_peak()
        middle = self.batches[len(self.batches) // 2]
        load = self.timed(self.collate, middle)
        self.hold(middle)
        whole, front, head = (self.timed(f, 0) for f in (self.pass_of, self.front_end, self.head))
        self.model.zero_grad()
        computed = accumulation * (passes - waited) / len(self.batches) / step
        return {
            "clips/s": self.config.batch_size * accumulation / step,
            "wait": 1 - computed - optimiser / step,
            "front": front / whole * computed,
            "mT5": max(whole - front - head, 0) / whole * computed,
            "head": head / whole * computed,
            "optimiser": optimiser / step,
            "load": load / a_pass,
            "share": self.flops / whole / peak,
            "peak": peak / 1e9,
            "loaded": self.loaded_gb,
            "decoded/s": self.decode(),
            "GB": self.place.peak_memory_gb(),
            "rows": self.model.mt5_model.lm_head.out_features,
        }

    def grow(self, batch, frames):
        """Seconds and FLOP of forward and backward at this size, every frame real."""
        src = {
            part: torch.rand(batch, frames, joints, 3)
            for part, joints in (("body", 9), ("left", 21), ("right", 21))
        }
        src["attention_mask"] = torch.ones((batch, frames), dtype=torch.long)
        labels = torch.randint(3, len(self.model.codec), (batch, TOKENS))
        self.held = [(_on(self.place.device, src), {"labels": labels})]
        with FlopCounterMode(display=False) as counter:
            self.pass_of(0)
        return self.timed(self.pass_of, 0), counter.get_total_flops()

    def checkpoint(self, path):
        """Seconds to write and to read last.pt, and its bytes."""
        wrote = self.timed(train_lite.save_checkpoint, path, self.run)
        return wrote, self.timed(train_lite.load_checkpoint, path), path.stat().st_size

    def compiled(self, turns):
        """Seconds until the compiled network has seen two lengths; of a pass: plain, compiled."""
        nets = self.model, torch.compile(self.model, dynamic=True)
        self.hold(self.batches[0], self.batches[-1])
        self.run.net, times = nets[1], []
        first = sum(self.timed(self.pass_of, i) for i in (0, 1, 0))
        for _ in range(turns):
            for self.run.net in nets:
                times.append(sum(self.timed(self.pass_of, i) for i in (0, 1)) / 2)
        return first, statistics.median(times[::2]), statistics.median(times[1::2])


# ------------------------------------------------------------------------- processes


class Worker:
    """An object in a fresh process, so that `ru_maxrss` is its own; it idles between calls."""

    threads = torch.get_num_threads()

    def __init__(self, kind, *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, kind, args, self.threads, now))
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


def serve(pipe, kind, args, threads, clock):
    """The other end of a Worker: make the object, do what is asked, until asked for nothing."""
    global now
    now = clock
    torch.set_num_threads(threads)
    if sys.platform == "linux":  # else loading processes are spawned, too, which takes seconds
        multiprocessing.set_start_method("fork", force=True)
    try:
        thing = kind(*args)
        while request := pipe.recv():
            pipe.send(getattr(thing, request[0])(*request[1:]))
    except EOFError:
        pass
    except BaseException:  # the parent sees the pipe close
        traceback.print_exc()


def in_turns(calls, turns):
    """Each call's results, a list a call, the calls taking turns."""
    return list(zip(*([call() for call in calls] for _ in range(turns))))


# ------------------------------------------------------------------------- parts


def table(title, head, rows):
    """Print a Markdown table; rows may come one by one."""
    print(f"\n### {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def levers(title, folder, default, cases, turns):
    """The default against each case, two processes at a time, in turns; the default's own row comes
    last.
    """
    head = [
        "levers off",
        "rows",
        "clips/s",
        "default is x",
        "wait %",
        "front-end %",
        "mT5 %",
        "head, loss %",
        "optimiser %",
        "load / pass %",
        "of peak %",
        "GB loaded",
        "GB peak",
        "default takes x",
        "decoded/s",
        "default is x",
        "peak GFLOP/s",
    ]
    table(title, head, lever_rows(folder, default, cases, turns))


def lever_rows(folder, default, cases, turns):
    """Yield a row a case, then the default's."""
    ours, keys = [], ("clips/s", "GB", "decoded/s")
    with Worker(Bench, folder, default) as worker:
        for case in cases:
            with Worker(Bench, folder, case) as other:
                a, b = in_turns([lambda: worker("turn"), lambda: other("turn")], turns)
            ours += a
            ratios = {key: statistics.median(x[key] / y[key] for x, y in zip(a, b)) for key in keys}
            yield figures(case.name, b, ratios)
    yield figures(default.name, ours, dict.fromkeys(keys, 1))


def figures(name, turns, ratios):
    """A configuration's row: medians of its turns, and the default's figures over its own."""
    m = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    shares = [
        f"{100 * m[key]:.1f}"
        for key in ("wait", "front", "mT5", "head", "optimiser", "load", "share")
    ]
    return [
        name,
        f"{m['rows']:,.0f}",
        f"{m['clips/s']:.2f}",
        f"{ratios['clips/s']:.2f}",
        *shares,
        f"{m['loaded']:.2f}",
        f"{m['GB']:.2f}",
        f"{ratios['GB']:.2f}",
        f"{m['decoded/s']:.1f}",
        f"{ratios['decoded/s']:.2f}",
        f"{m['peak']:.0f}",
    ]


def training(folder, turns, quick):
    """mT5-small's size, and what padding an epoch would have."""
    default = Case(micro_batches=3 if quick else 8)
    cases = LEVERS + (GPU_LEVERS if GPU else [])
    levers(
        "Training and decoding at mT5-small's size, a step of 32 clips",
        folder,
        default,
        [replace(case, micro_batches=default.micro_batches) for case in cases],
        turns,
    )
    lengths, rows = clip_lengths(18401), []
    for size in (2, 4, 16, 32):
        drawn = np.array_split(
            np.random.default_rng(0).permutation(len(lengths)), -(-len(lengths) // size)
        )
        plans = list(LengthBatchSampler(lengths, size, True, 0, 32 // size)), drawn
        full = [sum(len(batch) * lengths[batch].max() for batch in plan) for plan in plans]
        rows.append([str(size)] + [f"{100 * (1 - lengths.sum() / frames):.1f}" for frames in full])
    table("Padded share of all frames, 18,401 clips, %", ["batch", "by length", "random"], rows)


def demo(folder, turns, quick):
    """The demo's size."""
    default = Case(demo=True, micro_batches=1 if quick else 2)
    levers(
        "Training and decoding at the demo's size",
        folder,
        default,
        [
            replace(default, name="random batches", random_batches=True),
            replace(default, name="original front-end", original_front_end=True),
            replace(default, name="**both off**", random_batches=True, original_front_end=True),
        ],
        turns,
    )


def growth(folder, turns, quick):
    """Seconds of a pass over batch and frames, each row twice the size of the one above."""
    sizes = [(b, FRAMES) for b in (1, 2, 4, 8, 16, 32)] + [
        (4, frames) for frames in (64, 128, 256, 512)
    ]
    with Worker(Bench, folder, Case(micro_batches=1), 512) as worker:
        results = in_turns([lambda size=size: worker("grow", *size) for size in sizes], turns)
    rows, last = [], None
    for (batch, frames), result in zip(sizes, results):
        ms, flops = 1000 * statistics.median(seconds for seconds, _ in result), result[0][1]
        grown = ["", ""]
        if (batch, frames) not in (sizes[0], (4, 64)):
            grown = [f"{ms / last[0]:.2f}", f"{flops / last[1]:.2f}"]
        rows.append(
            [
                str(batch),
                str(frames),
                f"{ms:.0f}",
                f"{ms * FRAMES / batch / frames:.0f}",
                f"{flops / 1e9:.1f}",
                *grown,
            ]
        )
        last = ms, flops
    table(
        "Growth of forward and backward at mT5-small's size",
        ["batch", "frames", "ms", f"ms per {FRAMES} frames", "GFLOP", "ms x", "FLOP x"],
        rows,
    )


def loader(folder, turns, quick):
    """One clip of each form."""

    def bare(path):
        start = now()
        with open(path, "rb") as file:
            pickle.load(file)
        return 1e6 * (now() - start)

    def whole(path):
        start = now()
        read_clip(path, config)
        return 1e6 * (now() - start)

    files = [
        ("demo, arrays", folder / "demo/pose_format/train_00000.pkl"),
        ("like CSL-Daily's, list of frames", folder / "csl/pose_format/clip_0.pkl"),
        *(("CSL-News", file) for file in (SHARED / "csl_news/pose_format").glob("*.pkl")),
    ]
    rows = []
    config = TrainConfig()
    for name, path in files:
        # as in training: the first reading of a file, before the first step, is slower
        LOOKED_THROUGH.add(path)
        calls = [functools.partial(bare, path), functools.partial(whole, path)]
        a, b = (statistics.median(times) for times in in_turns(calls, 60 * turns))
        size = path.stat().st_size / 1e3
        rows.append([name, f"{size:.0f}", f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}"])
    table(
        "A clip read, checked and normalised, against open and pickle.load",
        ["file", "kB", "bare µs", "read_clip µs", "x"],
        rows,
    )


def checkpoint(folder, turns, quick):
    """last.pt."""
    rows = []
    full = Case("full tables", full_tables=True, micro_batches=1)
    for case in [Case(micro_batches=1)] + [full] * (not quick):
        with Worker(Bench, folder, case) as worker:
            results = [worker("checkpoint", folder / "last.pt") for _ in range(turns)]
        wrote, read, size = map(statistics.median, zip(*results))
        rows.append([case.name, f"{wrote:.2f}", f"{read:.2f}", f"{size / 1e6:,.0f}"])
    table("last.pt at mT5-small's size", ["tables", "write s", "read s", "MB"], rows)


def compile(folder, turns, quick):
    """torch.compile; at mT5-small's size compiling takes minutes, so not in a quick run."""
    rows = []
    for name, case in [("demo", Case(demo=True))] + [("mT5-small", Case())] * (not quick):
        with Worker(Bench, folder, case) as worker:
            first, plain, fast = worker("compiled", 3 * turns)
        even = f"{(first - 3 * fast) / (plain - fast):,.0f}" if fast < plain else "never"
        rows.append(
            [
                name,
                f"{first:.0f}",
                f"{1000 * plain:.0f}",
                f"{1000 * fast:.0f}",
                f"{plain / fast:.2f}",
                even,
            ]
        )
    table(
        "torch.compile of the network, dynamic shapes",
        ["size", "first three passes s", "plain ms", "compiled ms", "x", "passes until it pays"],
        rows,
    )


PARTS = {part.__name__: part for part in (loader, training, demo, growth, checkpoint, compile)}


def main():
    """Parse, prepare, run the parts."""
    global now
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="part", help="which to run; all where none is named"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one turn, fewer batches: a couple of minutes"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds of one thread, where others compute, too; shows no waiting",
    )
    args = parser.parse_args()
    names = args.parts or list(PARTS)
    if unknown := set(names) - PARTS.keys():
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.cpu_time:
        now, args.threads = time.process_time, 1
    Worker.threads, turns, cpu = args.threads, 1 if args.quick else 3, platform.machine()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t :")
    print(
        f"{cpu}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if GPU else 'no GPU'}; {turns} turns"
        f"{'; CPU seconds, one thread' if args.cpu_time else ''}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        with Worker(
            Material, Path(folder), 64 if args.quick else 256, bool({*names} - {"loader", "demo"})
        ):
            pass
        for name in names:
            PARTS[name](Path(folder), turns, args.quick)


if __name__ == "__main__":
    main()
