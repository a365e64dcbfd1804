"""How fast, how small, where the time goes: one command, no network; on a GPU where there is one.

    python tests/tools/bench.py [--quick] [--threads N] [--cpu-time] [part ...]

    loader      one clip read, checked and normalised, against the bare unpickling of its file
    training    mT5-small's true size (random weights), clips like CSL-Daily's: the default
                against levers off
    demo        the same at the size of the built-in demo
    growth      seconds over batch 1..32 and frames 64..512
    checkpoint  seconds and bytes of last.pt at mT5-small's size
    compile     torch.compile: what it costs against what it saves

A configuration has a process to itself, so that its peak memory is its own. Two of them are timed
in turns, A B A B ..., and a ratio is the median of the turns' ratios: a machine that slows down
slows both.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import platform
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from common import CSL_DAILY_LABELS, SHARED, print_table, random_mt5, read_texts
from faults import put_original_front_end
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import models_lite
import train_lite
from config_lite import DemoConfig, InferenceConfig, TrainConfig
from datasets_lite import (
    BODY,
    JOINTS,
    LEFT,
    RIGHT,
    SignLanguageDataset,
    make_demo_corpus,
    read_clip,
)
from train_lite import by_length, cut, plan_epoch

MT5_ROWS = 250_112  # of each of mT5-small's two tables
TOKENS = 14  # of a mean CSL-Daily text
FRAMES = 128  # of a mean CSL-Daily clip
CLIPS_PER_STEP = 32
GPU = torch.cuda.is_available()
now = time.perf_counter  # --cpu-time puts the process's own CPU seconds in its place


@dataclass(frozen=True)
class Case:
    """One configuration: the default, with some levers off."""

    name: str = "**default**"
    demo: bool = False  # the demo's size, else mT5-small's
    full_tables: bool = False
    random_batches: bool = False
    original_front_end: bool = False
    fp32: bool = False  # no bf16, no TF32
    used_pieces: bool = False  # without the characters that make other texts spellable
    batch_size: int = 0  # 0 = the config's
    # timed a turn; a step's time is worked out for the config's accumulation
    micro_batches: int = 8


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


# ---------------------------------------------------------------------- what is worked on


class Material:
    """Writes what the other processes read: a small demo, clips like CSL-Daily's, an mT5-small."""

    def __init__(self, folder, clips, with_mt5):
        make_demo_corpus(folder / "demo", splits={"train": 512, "dev": 64, "test": 1})
        demo_texts = read_texts(folder / "demo" / "labels.train")
        texts = demo_texts
        if CSL_DAILY_LABELS.is_file():
            texts = read_texts(CSL_DAILY_LABELS)
        (folder / "texts.json").write_text(json.dumps(texts))
        self.write_clips(folder / "csl", texts, clips)
        if with_mt5:
            self.write_mt5(folder / "mt5", demo_texts)

    @staticmethod
    def write_clips(folder, texts, clips):
        """Lists of float64 frames with a person axis, as CSL-Daily's poses come."""
        rng = np.random.default_rng(0)
        entries = {}
        (folder / "pose_format").mkdir(parents=True)
        for i, frames in enumerate(clip_lengths(clips)):
            name = f"clip_{i}"
            pose = {
                "keypoints": list(rng.uniform(0.2, 0.8, (frames, 1, JOINTS, 2))),
                "scores": list(rng.uniform(0.25, 1, (frames, 1, JOINTS))),
                "w_h": [512, 512],
            }
            (folder / "pose_format" / f"{name}.pkl").write_bytes(pickle.dumps(pose))
            entries[name] = {"name": name, "text": texts[i * 37 % len(texts)], "gloss": []}
        (folder / "labels.train").write_text(json.dumps(entries), encoding="utf-8")

    @staticmethod
    def write_mt5(folder, texts):
        """1.2 GB in mT5-small's form; its tables repeat 1,024 random rows: soon drawn."""
        drawn = 1024
        mt5 = random_mt5(
            vocab_size=drawn,
            d_model=512,
            d_ff=1024,
            d_kv=64,
            num_heads=6,
            num_layers=8,
            num_decoder_layers=8,
            feed_forward_proj="gated-gelu",
        )
        for table in (mt5.shared, mt5.lm_head):
            rows = table.weight.detach().repeat(MT5_ROWS // drawn + 1, 1)
            table.weight = nn.Parameter(rows[:MT5_ROWS].clone())  # (MT5_ROWS, d_model)
        mt5.config.vocab_size = MT5_ROWS
        mt5.save_pretrained(folder)
        pieces = SHARED / "mt5_cn_tokenizer" / "spiece.model"
        if pieces.is_file():
            shutil.copy(pieces, folder)
        else:
            models_lite.train_tokenizer(texts, 1000).save_pretrained(folder)


def clip_lengths(count):
    """Frames of so many clips: 32 to 256, FRAMES on average."""
    drawn = np.random.default_rng(0).normal(FRAMES, 45, count)
    return np.clip(drawn, 32, 256).astype(int)


# ---------------------------------------------------------------------- one configuration


def make_config(folder, case, max_length):
    """The product's defaults, but for what the case asks."""
    settings = {"data_dir": str(folder / "csl")}
    if case.original_front_end:
        settings["temporal_stride"] = 1  # it knows no stride
    if case.batch_size:
        settings["batch_size"] = case.batch_size
        settings["gradient_accumulation"] = CLIPS_PER_STEP // case.batch_size
    if case.demo:
        settings["data_dir"] = str(folder / "demo")
        return DemoConfig(**settings)
    settings["mt5_path"] = str(folder / "mt5")
    settings["max_length"] = max_length
    return TrainConfig(**settings)


def build_model(folder, case, config, entries):
    """The product's own way, the levers switched around it."""
    if case.demo:
        texts = [entry["text"] for entry in entries]
    else:
        texts = json.loads((folder / "texts.json").read_text())
    if case.used_pieces:
        models_lite.pieces_to_keep = pieces_in_use
    if case.full_tables:
        models_lite.pieces_to_keep = all_rows
    glosses = [entry["gloss"] for entry in entries]
    model = models_lite.SignLanguageLite(config, texts=texts, glosses=glosses)
    if case.full_tables:
        pieces = len(model.mt5_tokenizer)
        model.codec = models_lite.TextCodec(model.mt5_tokenizer, config.max_text_length)
        # a row without a piece must not be decoded: this tokeniser could not spell it
        model.mt5_model.lm_head.weight.data[pieces:] = 0
    if case.original_front_end:
        put_original_front_end(model, width=64)
    return model


def pieces_in_use(tokenizer, texts):
    """Pad, end, unknown, and what these texts use."""
    return sorted({0, 1, 2}.union(*tokenizer(texts).input_ids))


def all_rows(tokenizer, texts):
    """Those of mT5's own tables, of which some have no piece."""
    return list(range(MT5_ROWS))


def to_device(src_input, device):
    moved = {}
    for key, value in src_input.items():
        moved[key] = value.to(device) if torch.is_tensor(value) else value
    return moved


class Bench:
    """One configuration: its data, its model, and what is timed of them."""

    def __init__(self, folder, case, max_length=256):
        self.case = case
        self.config = make_config(folder, case, max_length)
        self.place = train_lite.find_place(self.config)
        if case.fp32:
            self.place.autocast = contextlib.nullcontext
            torch.set_float32_matmul_precision("highest")
        labels = Path(self.config.data_dir) / "labels.train"
        self.data = SignLanguageDataset(labels, self.config, "train")
        with contextlib.redirect_stdout(io.StringIO()):
            model = build_model(folder, case, self.config, self.data.entries)
            self.model = model.to(self.place.device)
        self.loaded_gb = train_lite.Place().peak_memory_gb()  # of the process, not of the GPU
        self.data.encode = self.model.codec.encode
        self.run = self.make_run()
        self.batches = self.choose_batches(self.config.batch_size, case.micro_batches)
        self.middle = self.batches[len(self.batches) // 2]
        self.warm_up()

    def make_run(self):
        """What the product's steps work on."""
        optimizers, schedulers = train_lite.make_optimizers(self.model, self.config, 1000, 100)
        return train_lite.Run(
            self.config,
            InferenceConfig(),
            self.place,
            model=self.model,
            net=self.model,
            optimizers=optimizers,
            schedulers=schedulers,
            signals=SimpleNamespace(number=0),
            data={"train": self.data, "dev": self.data},
        )

    def warm_up(self):
        """The first pass and step, which are never timed; the pass is counted."""
        self.hold(self.middle)
        with FlopCounterMode(display=False) as counter:
            self.forward_and_backward(0)
        self.flops = counter.get_total_flops()
        for optimizer in self.run.optimizers:
            optimizer.step()  # makes its state
        self.model.zero_grad()

    # --- batches ---

    def choose_batches(self, size, count, shuffle=True):
        """So many of an epoch's batches, from long clips to short: each turn sees all lengths."""
        lengths = np.array(self.data.lengths)
        if self.case.random_batches:
            order = np.random.default_rng(0).permutation(len(lengths))
            batches = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        else:
            config = replace(self.config, batch_size=size)
            plan = plan_epoch(unjoined(lengths), config)
            batches = [clips for _, clips, _ in plan]
            if not shuffle:
                batches = cut(by_length(range(len(lengths)), lengths), size)
        full = [batch for batch in batches if len(batch) == size]
        full.sort(key=lambda batch: -lengths[batch].mean())
        return [full[int((i + 0.5) * len(full) / count)] for i in range(count)]

    def collate(self, clips):
        """These clips as a batch, in this process."""
        return self.data.collate_fn([self.data[i] for i in clips])

    def hold(self, *batches):
        """Keep these batches in memory, for what is timed without a loader."""
        self.held = []
        for batch in batches:
            src_input, tgt_input = self.collate(batch)
            self.held.append((to_device(src_input, self.place.device), tgt_input))

    # --- what is timed ---

    def timed(self, function, *arguments):
        """Seconds of one call, until the device has done all of it."""
        start = now()
        function(*arguments)
        if GPU:
            torch.cuda.synchronize()
        return now() - start

    def micro_batches(self):
        """-> seconds of the micro-batches through the loader, waiting included; of the waiting."""
        loader = DataLoader(
            self.data,
            batch_sampler=self.batches,
            collate_fn=self.data.collate_fn,
            num_workers=self.config.num_workers,
            pin_memory=GPU,
        )
        batches = iter(loader)
        first = next(batches)  # to start the loading processes is an epoch's matter
        last = len(self.batches) - 1
        waited = 0.0
        start = now()
        for i in range(len(self.batches)):
            before = now()
            src_input, tgt_input = first if i == 0 else next(batches)
            waited += now() - before
            # ends with .item(), so the device has done all of it
            train_lite.micro_batch(self.run, i, True, src_input, tgt_input, i == last)
        return now() - start, waited

    def forward_and_backward(self, i):
        """Of a batch in memory."""
        with self.place.autocast():
            output = self.run.net(*self.held[i])
        (output.loss * output.num_tokens).backward()

    def front_end(self):
        """Forward and backward of the front-end alone."""
        src_input, _ = self.held[0]
        with self.place.autocast():
            x, _ = self.model.encode_pose(src_input)  # (B, T', d_model)
        x.sum().backward()

    def head(self):
        """Forward and backward from the decoder's last state on: head, softmax, cross-entropy."""
        device = self.place.device
        _, tgt_input = self.held[0]
        labels = tgt_input["labels"].to(device)  # (B, L)
        width = self.model.mt5_model.config.d_model
        hidden = torch.randn(*labels.shape, width, device=device, requires_grad=True)
        with self.place.autocast():
            logits = self.model.mt5_model.lm_head(hidden).float()  # (B, L, pieces)
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()

    def matmul_peak(self):
        """FLOP/s of a large matrix product, in the precision that training uses."""
        n = 8192 if GPU else 2048
        dtype = torch.bfloat16
        if isinstance(self.place.autocast(), contextlib.nullcontext):
            dtype = torch.float32
        a = torch.randn(n, n, device=self.place.device, dtype=dtype)
        torch.mm(a, a)
        seconds = min(self.timed(torch.mm, a, a) for _ in range(3))
        return 2 * n**3 / seconds

    def decode(self):
        """Clips a second of `generate`, TOKENS pieces a clip, in batches of an evaluation."""
        size = max(train_lite.EVAL_BATCH, self.config.batch_size)
        self.model.eval()
        self.hold(*self.choose_batches(size, 2, shuffle=False))
        seconds = 0.0
        with self.place.autocast():
            for src_input, _ in self.held:
                seconds += self.timed(self.generate, src_input)
        return len(self.held) * size / seconds

    def generate(self, src_input):
        self.model.generate(src_input, max_new_tokens=TOKENS)

    # --- what a part asks for ---

    def turn(self):
        """All figures of this configuration once; parts are shares of a whole optimiser step."""
        self.model.train()
        accumulation = self.config.gradient_accumulation
        passes, waited = self.micro_batches()
        optimiser = self.timed(train_lite.optimiser_step, self.run)
        one_pass = passes / len(self.batches)
        step = accumulation * one_pass + optimiser
        peak = self.matmul_peak()
        load = self.timed(self.collate, self.middle)
        self.hold(self.middle)
        whole = self.timed(self.forward_and_backward, 0)
        front = self.timed(self.front_end)
        head = self.timed(self.head)
        self.model.zero_grad()
        computed = accumulation * (passes - waited) / len(self.batches) / step
        return {
            "clips/s": self.config.batch_size * accumulation / step,
            "wait": 1 - computed - optimiser / step,
            "front": front / whole * computed,
            "mT5": max(whole - front - head, 0) / whole * computed,
            "head": head / whole * computed,
            "optimiser": optimiser / step,
            "load": load / one_pass,
            "share": self.flops / whole / peak,
            "peak": peak / 1e9,
            "loaded": self.loaded_gb,
            "decoded/s": self.decode(),
            "GB": self.place.peak_memory_gb(),
            "rows": self.model.mt5_model.lm_head.out_features,
        }

    def grow(self, batch, frames):
        """Seconds and FLOP of forward and backward at this size, every frame real."""
        src_input = {"attention_mask": torch.ones((batch, frames), dtype=torch.long)}
        for part, joints in (("body", BODY), ("left", LEFT), ("right", RIGHT)):
            src_input[part] = torch.rand(batch, frames, len(joints), 3)
        labels = torch.randint(3, len(self.model.codec), (batch, TOKENS))
        self.held = [(to_device(src_input, self.place.device), {"labels": labels})]
        with FlopCounterMode(display=False) as counter:
            self.forward_and_backward(0)
        return self.timed(self.forward_and_backward, 0), counter.get_total_flops()

    def checkpoint(self, path):
        """Seconds to write and to read last.pt, and its bytes."""
        wrote = self.timed(train_lite.save_checkpoint, path, self.run)
        read = self.timed(train_lite.load_checkpoint, path)
        return wrote, read, path.stat().st_size

    def compiled(self, turns):
        """Seconds until the compiled network knows two lengths, then of a pass: plain, compiled."""
        fast_net = torch.compile(self.model, dynamic=True)
        self.hold(self.batches[0], self.batches[-1])
        first = self.passes_of(fast_net, (0, 1, 0))
        plain = []
        fast = []
        for _ in range(turns):
            plain.append(self.passes_of(self.model, (0, 1)) / 2)
            fast.append(self.passes_of(fast_net, (0, 1)) / 2)
        return first, median(plain), median(fast)

    def passes_of(self, net, held):
        self.run.net = net
        return sum(self.timed(self.forward_and_backward, i) for i in held)


# ---------------------------------------------------------------------- processes


class Worker:
    """An object in a fresh process, so that `ru_maxrss` is its own; it idles between calls."""

    threads = torch.get_num_threads()

    def __init__(self, kind, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=serve, args=(other, kind, arguments, self.threads, now)
        )
        self.process.start()
        other.close()

    def __call__(self, method, *arguments):
        self.pipe.send((method, arguments))
        return self.pipe.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join()


def serve(pipe, kind, arguments, threads, clock):
    """The other end of a Worker: make the object, then do what is asked, until nothing is."""
    global now
    now = clock
    torch.set_num_threads(threads)
    if sys.platform == "linux":  # else loading processes are spawned, too, which takes seconds
        multiprocessing.set_start_method("fork", force=True)
    try:
        thing = kind(*arguments)
        request = pipe.recv()
        while request is not None:
            method, arguments = request
            pipe.send(getattr(thing, method)(*arguments))
            request = pipe.recv()
    except EOFError:
        pass
    except BaseException:  # the parent sees the pipe close
        traceback.print_exc()


def in_turns(calls, turns):
    """Each call's results, a list a call, the calls taking turns."""
    results = [[] for _ in calls]
    for _ in range(turns):
        for call, own in zip(calls, results):
            own.append(call())
    return results


# ---------------------------------------------------------------------- parts: levers


LEVER_HEAD = [
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
COMPARED = ("clips/s", "GB", "decoded/s")


def print_title(title):
    print(f"\n### {title}\n", flush=True)


def lever_rows(folder, default, cases, turns):
    """Yield a row a case, then the default's; two processes at a time, in turns."""
    all_ours = []
    with Worker(Bench, folder, default) as worker:
        for case in cases:
            with Worker(Bench, folder, case) as other:
                ours, theirs = in_turns([lambda: worker("turn"), lambda: other("turn")], turns)
            all_ours += ours
            ratios = {}
            for key in COMPARED:
                ratios[key] = median(a[key] / b[key] for a, b in zip(ours, theirs))
            yield lever_row(case.name, theirs, ratios)
    yield lever_row(default.name, all_ours, dict.fromkeys(COMPARED, 1))


def lever_row(name, turns, ratios):
    """A configuration's row: medians of its turns, and the default's figures over its own."""
    middle = {}
    for key in turns[0]:
        middle[key] = median(turn[key] for turn in turns)
    shares = ("wait", "front", "mT5", "head", "optimiser", "load", "share")
    return [
        name,
        f"{middle['rows']:,.0f}",
        f"{middle['clips/s']:.2f}",
        f"{ratios['clips/s']:.2f}",
        *[f"{100 * middle[key]:.1f}" for key in shares],
        f"{middle['loaded']:.2f}",
        f"{middle['GB']:.2f}",
        f"{ratios['GB']:.2f}",
        f"{middle['decoded/s']:.1f}",
        f"{ratios['decoded/s']:.2f}",
        f"{middle['peak']:.0f}",
    ]


def training(folder, turns, quick):
    """mT5-small's size, and what padding an epoch would have."""
    micro_batches = 3 if quick else 8
    default = Case(micro_batches=micro_batches)
    cases = LEVERS + GPU_LEVERS if GPU else LEVERS
    cases = [replace(case, micro_batches=micro_batches) for case in cases]
    print_title(f"Training and decoding at mT5-small's size, a step of {CLIPS_PER_STEP} clips")
    print_table(LEVER_HEAD, lever_rows(folder, default, cases, turns))
    lengths = clip_lengths(18401)
    print_title("Padded share of all frames, 18,401 clips, %")
    sizes = (2, 4, 16, 32)
    print_table(["batch", "by length", "random"], [padding_row(lengths, size) for size in sizes])


def padding_row(lengths, size):
    """Batches of this size: sorted by length as in training, and drawn at random."""
    config = TrainConfig(batch_size=size, gradient_accumulation=CLIPS_PER_STEP // size)
    sorted_ones = [clips for _, clips, _ in plan_epoch(unjoined(lengths), config)]
    order = np.random.default_rng(0).permutation(len(lengths))
    at_random = np.array_split(order, -(-len(lengths) // size))
    return [str(size), padded_share(lengths, sorted_ones), padded_share(lengths, at_random)]


def unjoined(lengths):
    """What plan_epoch reads of a data set in which no clips are joined."""
    return SimpleNamespace(lengths=lengths, totals=lengths, epoch=0)


def padded_share(lengths, batches):
    frames = sum(len(batch) * lengths[batch].max() for batch in batches)
    return f"{100 * (1 - lengths.sum() / frames):.1f}"


def demo(folder, turns, quick):
    """The demo's size."""
    default = Case(demo=True, micro_batches=1 if quick else 2)
    cases = [
        replace(default, name="random batches", random_batches=True),
        replace(default, name="original front-end", original_front_end=True),
        replace(default, name="**both off**", random_batches=True, original_front_end=True),
    ]
    print_title("Training and decoding at the demo's size")
    print_table(LEVER_HEAD, lever_rows(folder, default, cases, turns))


# ---------------------------------------------------------------------- parts: the others


def growth(folder, turns, quick):
    """Seconds of a pass over batch, then over frames, each row twice the size of the one above."""
    sizes = [(batch, FRAMES) for batch in (1, 2, 4, 8, 16, 32)]
    sizes += [(4, frames) for frames in (64, 128, 256, 512)]
    first_of_frames = (4, 64)
    with Worker(Bench, folder, Case(micro_batches=1), 512) as worker:
        calls = [lambda size=size: worker("grow", *size) for size in sizes]
        results = in_turns(calls, turns)
    rows = []
    last = None
    for size, result in zip(sizes, results):
        batch, frames = size
        ms = 1000 * median(seconds for seconds, _ in result)
        _, flops = result[0]
        row = [str(batch), str(frames), f"{ms:.0f}"]
        row += [f"{ms * FRAMES / batch / frames:.0f}", f"{flops / 1e9:.1f}"]
        if last is None or size == first_of_frames:
            row += ["", ""]
        else:
            last_ms, last_flops = last
            row += [f"{ms / last_ms:.2f}", f"{flops / last_flops:.2f}"]
        rows.append(row)
        last = (ms, flops)
    head = ["batch", "frames", "ms", f"ms per {FRAMES} frames", "GFLOP", "ms x", "FLOP x"]
    print_title("Growth of forward and backward at mT5-small's size")
    print_table(head, rows)


def loader(folder, turns, quick):
    """One clip of each form."""
    files = [
        ("demo, arrays", folder / "demo" / "pose_format" / "train_00000.pkl"),
        ("like CSL-Daily's, list of frames", folder / "csl" / "pose_format" / "clip_0.pkl"),
    ]
    files += [("CSL-News", file) for file in (SHARED / "csl_news" / "pose_format").glob("*.pkl")]
    head = ["file", "kB", "bare µs", "read_clip µs", "x"]
    print_title("A clip read, checked and normalised, against open and pickle.load")
    print_table(head, [loader_row(name, path, 60 * turns) for name, path in files])


def loader_row(name, path, turns):
    config = TrainConfig()
    # as in training: a file that the check has read is read without guard
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def bare():
        start = now()
        with open(path, "rb") as file:
            pickle.load(file)
        return now() - start

    def checked():
        start = now()
        read_clip(path, config, digest=digest)
        return now() - start

    bare_seconds, checked_seconds = in_turns([bare, checked], turns)
    before = 1e6 * median(bare_seconds)
    after = 1e6 * median(checked_seconds)
    size = path.stat().st_size / 1e3
    return [name, f"{size:.0f}", f"{before:.0f}", f"{after:.0f}", f"{after / before:.2f}"]


def checkpoint(folder, turns, quick):
    """last.pt."""
    cases = [Case(micro_batches=1)]
    if not quick:
        cases.append(Case("full tables", full_tables=True, micro_batches=1))
    rows = []
    for case in cases:
        with Worker(Bench, folder, case) as worker:
            results = [worker("checkpoint", folder / "last.pt") for _ in range(turns)]
        wrote = median(result[0] for result in results)
        read = median(result[1] for result in results)
        size = median(result[2] for result in results)
        rows.append([case.name, f"{wrote:.2f}", f"{read:.2f}", f"{size / 1e6:,.0f}"])
    print_title("last.pt at mT5-small's size")
    print_table(["tables", "write s", "read s", "MB"], rows)


def compilation(folder, turns, quick):
    """torch.compile; at mT5-small's size compiling takes minutes, so not in a quick run."""
    cases = [("demo", Case(demo=True))]
    if not quick:
        cases.append(("mT5-small", Case()))
    rows = []
    for name, case in cases:
        with Worker(Bench, folder, case) as worker:
            first, plain, fast = worker("compiled", 3 * turns)
        even = "never"
        if fast < plain:
            even = f"{(first - 3 * fast) / (plain - fast):,.0f}"
        row = [name, f"{first:.0f}", f"{1000 * plain:.0f}", f"{1000 * fast:.0f}"]
        rows.append([*row, f"{plain / fast:.2f}", even])
    head = ["size", "first three passes s", "plain ms", "compiled ms", "x"]
    print_title("torch.compile of the network, dynamic shapes")
    print_table([*head, "passes until it pays"], rows)


# ---------------------------------------------------------------------- the command line

PARTS = {
    "loader": loader,
    "training": training,
    "demo": demo,
    "growth": growth,
    "checkpoint": checkpoint,
    "compile": compilation,
}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="part", help="which to run; all where none is named")
    add("--quick", action="store_true", help="one turn, fewer batches: a couple of minutes")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    add(
        "--cpu-time",
        action="store_true",
        help="CPU seconds of one thread, where others compute, too; shows no waiting",
    )
    args = parser.parse_args()
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not args.parts:
        args.parts = list(PARTS)
    if args.cpu_time:
        args.threads = 1
    return args


def print_machine(args, turns):
    gpu = torch.cuda.get_device_name() if GPU else "no GPU"
    line = f"{cpu_name()}, {os.cpu_count()} cores, {args.threads} threads"
    line += f", torch {torch.__version__}, {gpu}; {turns} turns"
    if args.cpu_time:
        line += "; CPU seconds, one thread"
    print(line, flush=True)


def cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def main():
    """Parse, prepare, run the parts."""
    global now
    args = parse()
    turns = 1 if args.quick else 3
    if args.cpu_time:
        now = time.process_time
    Worker.threads = args.threads
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    print_machine(args, turns)
    clips = 64 if args.quick else 256
    with_mt5 = bool(set(args.parts) - {"loader", "demo"})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Worker(Material, folder, clips, with_mt5):
            pass
        for part in args.parts:
            PARTS[part](folder, turns, args.quick)


if __name__ == "__main__":
    main()
