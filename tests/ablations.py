"""What each fix is worth: a row puts one original fault back, or takes one choice out, and trains to its end.

    python tests/ablations.py                            every row of "rows" on the demo corpus, three seeds
    python tests/ablations.py shifted no_position        these rows (--list names all)
    python tests/ablations.py --corpus DIR --language en --steps 1000
    python tests/ablations.py freezing                   an mT5 pre-trained on text, then fine-tuned on poses
    python tests/ablations.py fewer --corpus DIR ...     10, 30, 100 % of the clips, beside 1-NN and a GRU
    python tests/ablations.py transfer --corpus DIR --other DIR ...   init_from, both ways, at 10 % of the clips
    python tests/ablations.py --smoke ...                a few steps on a few clips: does each row run, and bite?

The product has no switch for bugs: each run is a process of its own, which patches the product before it trains and
fails unless the patch took effect. A finished run is a line of --results, with its learning curve, and is not run
again. The table has the dev figures of the schedule's end, and the test figures of the run's best/.
"""
import argparse
import io
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU
from torch import nn
from torch.utils.data import DataLoader
from transformers import MT5Config, MT5ForConditionalGeneration, T5Tokenizer, get_cosine_schedule_with_warmup

import datasets_lite
import models_lite
import train_lite
from config_lite import DemoConfig, InferenceConfig, ScratchConfig
from datasets_lite import BODY, BODY_EDGES, HAND_EDGES, LEFT, LEFT_WRIST, RIGHT_WRIST, SignLanguageDataset
from models_lite import IGNORE, SignLanguageLite, hand_features, part_features

CSL_DAILY = ROOT.parent / "shared" / "data" / "csl_daily_labels" / "labels.train"
BLOCKS, SENTINELS = 8, [chr(0xE000 + i) for i in range(30)]  # mT5-small's depth; marks of the masked spans
VALIDATIONS = 10  # of a run, about
CURVE = ("step", "train_loss", "dev_loss", "dev_accuracy", "bleu4", "chrf", "exact_match", "shuffled_bleu4",
         "unique_ratio", "gloss_wer", "clips_per_second")
PROOFS = []  # what this process's patch was seen to do


class NotApplicable(Exception):
    """The row means nothing here; the message says why."""


def prove(text, holds):
    """Note what a patch did; fails the run where it did nothing, so that no row silently repeats the reference."""
    if not holds:
        raise AssertionError(f"the row does not do what it names: {text}")
    if text not in PROOFS:
        PROOFS.append(text)


# ---------------------------------------------------------------------------------------------- faults put back

def shift_labels_again(config):
    """T5 has shifted its decoder's input; the output at t is nevertheless compared with token t + 1."""
    right = models_lite.text_loss

    def shifted(logits, labels, *rest):
        loss, nll, *more = right(logits[:, :-1], labels[:, 1:], *rest)
        share = (labels != IGNORE).sum() / (labels[:, 1:] != IGNORE).sum()  # the mean is over the labels left
        if not PROOFS:
            prove("the loss is another", not torch.isclose(nll * share, right(logits, labels, *rest)[1]))
        return loss * share, nll * share, *more

    models_lite.text_loss = shifted


def freezing(policy):
    """A patch after which policy(name, mt5) says whether a parameter of mT5 trains."""
    def patch(config):
        def freeze(self):
            named = list(self.mt5_model.named_parameters())
            for name, parameter in named:
                parameter.requires_grad_(bool(policy(name, self.mt5_model)))
            total, trained = (sum(p.numel() for _, p in named if some or p.requires_grad) for some in (True, False))
            prove(f"{trained:,} of mT5's {total:,} parameters train", 0 < trained < total)
            print(self.parameter_report(), flush=True)
        SignLanguageLite._freeze_mt5_layers = freeze
    return patch


def original_policy(name, mt5):
    """Encoder blocks 4-5 and decoder blocks 3-5 of 8, the two final norms and the head; nothing else.

    In a model of another depth: the same share of the blocks, rounded up, about the same relative height. Of 8 that
    gives the original's blocks; of 2, the upper one of each stack.
    """
    part, kind, number = (name.split(".") + ["", ""])[:3]
    if kind != "block":
        return "final_layer_norm" in name or name.startswith("lm_head")
    depth, (centre, share) = len(getattr(mt5, part).block), {"encoder": (5 / 8, 2 / 8), "decoder": (4.5 / 8, 3 / 8)}[part]
    count = math.ceil(share * depth)
    first = round(centre * depth - count / 2)
    return first <= int(number) < first + count


def original_front_end(config):
    """One 3 -> 64 layer for all joints, two convolutions over time, BatchNorm that counts padding, mean over joints."""
    def layer(into, out):
        return nn.Sequential(nn.Conv2d(into, out, 1), nn.Conv2d(out, out, (3, 1), padding=(1, 0)), nn.BatchNorm2d(out), nn.ReLU())

    def build(self):
        self.pose_embed, self.temporal = nn.Linear(3, 64), nn.ModuleList()
        self.convolutions = nn.ModuleDict({part: nn.Sequential(layer(64, 128), layer(128, 256)) for part in ("body", "hand")})
        self.fusion = nn.Linear(3 * 256, 512)
        self.proj = nn.Linear(self.config.temporal_stride * 512, self.mt5_model.config.d_model)
        for linear in [self.pose_embed, self.fusion, self.proj] + [self.gloss_head] * bool(self.glosses):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def pooled(self, part, kind):
        return self.convolutions[kind](self.pose_embed(part).permute(0, 3, 1, 2)).mean(-1)  # (B, 256, T)

    def encode(self, src_input):
        parts = [pooled(self, src_input[name], kind) for name, kind in (("body", "body"), ("left", "hand"), ("right", "hand"))]
        if not PROOFS:
            same = torch.allclose(parts[2], pooled(self, src_input["right"].flip(2), "hand"), atol=1e-3)
            prove("joints exchanged give the same output", same)
        x, stride = self.fusion(torch.cat(parts, 1).transpose(1, 2)), self.config.temporal_stride
        x = F.pad(x, (0, 0, 0, -x.shape[1] % stride))
        x = self.layer_norm(self.proj(x.reshape(len(x), -1, stride * 512)))
        return self.position(x), src_input["attention_mask"][:, ::stride]

    SignLanguageLite._init_weights, SignLanguageLite.encode_pose = build, encode


def warm_up_late(config):
    """The original stepped its schedule after each epoch: the first runs at the full rate, then warm-up begins."""
    right = train_lite.make_optimizer

    def late(*arguments):
        optimizer, scheduler = right(*arguments)
        epoch = arguments[3]
        before = scheduler.get_last_lr()[0]
        scheduler.lr_lambdas = [lambda step, f=f: f(step - epoch) if step >= epoch else 1.0 for f in scheduler.lr_lambdas]
        for group, rate in zip(optimizer.param_groups, scheduler.base_lrs):
            group["lr"] = rate
        scheduler._last_lr = list(scheduler.base_lrs)
        prove(f"the first {epoch} steps run at {scheduler.base_lrs[0]:.1e} instead of {before:.1e}", before < scheduler.base_lrs[0])
        return optimizer, scheduler

    train_lite.make_optimizer = late


def leak_tail(config):
    """An epoch's last, short window is not stepped, and its gradient goes into the next epoch's first step."""
    clips, window = count_clips(config), config.batch_size * config.gradient_accumulation
    if clips % window == 0:
        raise NotApplicable(f"{clips} clips leave no tail at {window} a step")
    right = train_lite.make_optimizer

    def leaking(*arguments):
        optimizer, scheduler = right(*arguments)
        steps, kept = 0, []

        def before_step(*_):
            nonlocal steps
            steps += 1
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if steps % arguments[3] == 0:
                # the original divided by the micro-batches of a whole window, so a tail weighs its share of one
                kept[:] = [(p, p.grad * (clips % window / window)) for p in parameters]
                for p in parameters:
                    p.grad = None
            elif kept:
                norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
                for p, gradient in kept:
                    p.grad += gradient
                prove("a tail's gradient is in the next epoch's first step",
                      torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf) != norm)
                kept.clear()

        optimizer.register_step_pre_hook(before_step)
        return optimizer, scheduler

    train_lite.make_optimizer = leaking


def score_raw_text(config):
    """Exact match and BLEU-4 on the strings as they are, only stripped."""
    texts = [e["text"].strip() for e in datasets_lite.load_dataset_file(Path(config.data_dir) / "labels.dev").values()]
    changed = sum(unicodedata.normalize("NFKC", text) != text for text in texts)
    if not changed:
        raise NotApplicable("NFKC changes no text of this corpus")
    prove(f"{changed} of {len(texts)} dev texts change under NFKC", True)
    right = train_lite.compute_metrics

    def raw(predictions, references, language="zh"):
        metrics = right(predictions, references, language)
        predictions, references = ([t.strip() for t in texts] for texts in (predictions, references))
        bleu = BLEU(tokenize="zh" if language == "zh" else "13a")
        metrics["bleu4"] = bleu.corpus_score(predictions, [references]).score
        metrics["exact_match"] = 100 * sum(map(str.__eq__, predictions, references)) / len(references)
        return metrics

    train_lite.compute_metrics = raw


class _FrameBatchNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)


def depend_on_batch(config):
    """Padding repeats a clip's last frame, BatchNorm counts it, the convolutions read it."""
    pad, block = datasets_lite.pad_poses, models_lite.TemporalBlock

    def repeat_last(poses):
        batch = pad(poses)
        for part in ("body", "left", "right"):
            for clip, length in zip(batch[part], batch["src_length"].tolist()):
                clip[length:] = clip[length - 1]
        if batch["src_length"].min() < batch["attention_mask"].shape[1]:
            prove("padded frames hold a pose", batch["body"][batch["src_length"].argmin(), -1].any())
        return batch

    class Unmasked(block):
        def __init__(self, width, *more):
            super().__init__(width, *more)
            self.norm = _FrameBatchNorm(width)

        def forward(self, x, mask):
            return super().forward(x, torch.ones_like(mask))

    datasets_lite.pad_poses, models_lite.TemporalBlock = repeat_last, Unmasked


# ---------------------------------------------------------------------------------------------- choices taken out

class GraphEmbed(nn.Module):
    """A part's features (B, T, V * C + rest) through two graph layers over its bones, its joints kept, -> (B, T, d_model)."""

    def __init__(self, edges, joints, features, d_model, width=32):
        super().__init__()
        self.joints, self.each = joints, features // joints
        bones = torch.eye(joints)
        for a, b in edges:
            bones[a, b] = bones[b, a] = 1
        degree = bones.sum(1).rsqrt()
        self.register_buffer("bones", degree[:, None] * bones * degree)
        self.learnt = nn.Parameter(torch.zeros(2, joints, joints))  # links that the skeleton does not have
        self.enter, self.leave = nn.Linear(self.each, width), nn.Linear(joints * width + features % joints, d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x):
        joints, rest = x.split([self.joints * self.each, x.shape[-1] - self.joints * self.each], -1)
        h = self.enter(joints.unflatten(-1, (self.joints, self.each)))
        for norm, layer, learnt in zip(self.norms, self.layers, self.learnt):
            h = h + F.gelu((self.bones + learnt) @ layer(norm(h)))
        return self.leave(torch.cat([h.flatten(-2), rest], -1))


def graph_layers(config):
    """Graph layers in place of one linear layer on a part's flattened joints."""
    right = SignLanguageLite._init_weights

    def build(self):
        right(self)
        flat = sum(p.numel() for p in self.pose_embed.parameters())
        for part, edges, joints in (("body", BODY_EDGES, len(BODY)), ("hand", HAND_EDGES, len(LEFT))):
            old = self.pose_embed[part]
            self.pose_embed[part] = GraphEmbed(edges, joints, old.in_features, old.out_features)
        graph = sum(p.numel() for p in self.pose_embed.parameters())
        prove(f"{graph:,} parameters embed the joints, {flat:,} before", graph != flat)

    SignLanguageLite._init_weights = build


def no_convolution(config):
    """The temporal blocks stay, but each sees its own frame alone."""
    class OneFrame(models_lite.TemporalBlock):
        def __init__(self, width, *more):
            super().__init__(width, *more)
            before, self.conv = self.conv.kernel_size[0], nn.Conv1d(width, width, 1)
            prove(f"kernel {before} -> 1", before > 1)

    models_lite.TemporalBlock = OneFrame


def no_velocities(config):
    """Each frame's features are made as if it were a clip of its own."""
    def still(part):
        alone = part_features(part.flatten(0, 1)[:, None]).view(*part.shape[:2], -1)
        prove("features differ without velocities", PROOFS or not torch.equal(alone, part_features(part)))
        return alone

    models_lite.part_features = still


def hands_in_body_scale(config):
    """A hand's shape stays divided by the body's box, as load_part_kp gives it."""
    def plain(hand, wrist, mirror):
        flip = hand.new_tensor([-1.0 if mirror else 1.0, 1.0, 1.0])
        features = torch.cat([models_lite.part_features(hand * flip), wrist * flip], -1)
        prove("hand features differ", PROOFS or not torch.allclose(features, hand_features(hand, wrist, mirror)))
        return features

    models_lite.hand_features = plain


# ---------------------------------------------------------------------------------------------- pre-training on text

def span_corruption(ids, sentinels, rng, noise=0.15, mean_length=3):
    """T5's objective on one list of ids: about 15 % in spans of 3 give way to sentinels -> (input, target)."""
    masked = max(1, round(noise * len(ids)))
    spans = min(max(1, round(masked / mean_length)), len(ids) - masked)
    noisy = np.diff([0, *sorted(rng.choice(np.arange(1, masked), spans - 1, False)), masked])
    clean = np.diff([0, *sorted(rng.choice(np.arange(1, len(ids) - masked), spans - 1, False)), len(ids) - masked])
    source, target, at = [], [], 0
    for sentinel, keep, drop in zip(sentinels, clean, noisy):
        source += ids[at:at + keep] + [sentinel]
        target += [sentinel] + ids[at + keep:at + keep + drop]
        at += keep + drop
    return source + ids[at:], target


def pretrain(folder, texts, steps, batch=32, length=64):
    """A small mT5 that knows text and no poses, saved in mT5's form: spiece.model, config.json, weights."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=4000, hard_vocab_limit=False, pad_id=0, eos_id=1,
            unk_id=2, bos_id=-1, character_coverage=1.0, normalization_rule_name="nmt_nfkc", minloglevel=2)
    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0)
    pieces, rng = len(tokenizer), np.random.default_rng(0)
    torch.manual_seed(0)
    # the sentinels' rows lie behind those of the pieces, as in mT5; the product cuts them off
    mt5 = MT5ForConditionalGeneration(MT5Config(
        vocab_size=pieces + len(SENTINELS), d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=BLOCKS,
        num_decoder_layers=BLOCKS, decoder_start_token_id=0))
    mt5.config.tie_word_embeddings = False  # transformers 5 ties mT5's head, mT5's own is not tied
    mt5.lm_head.weight = nn.Parameter(torch.randn(mt5.lm_head.weight.shape) * 128 ** -0.5)
    optimizer = torch.optim.AdamW(mt5.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    rows, losses = tokenizer(texts).input_ids, []
    for step in range(steps):
        pairs = []
        for _ in range(batch):  # texts one after another, as T5 packs them, cut to one length
            ids = []
            while len(ids) < length:
                ids += rows[rng.integers(len(rows))]
            pairs.append(span_corruption(ids[:length], range(pieces, pieces + len(SENTINELS)), rng))
        source, target = (nn.utils.rnn.pad_sequence([torch.tensor(pair[i] + [1]) for pair in pairs], True, fill)
                          for i, fill in ((0, 0), (1, IGNORE)))
        loss = mt5(input_ids=source, attention_mask=source != 0, labels=target).loss
        loss.backward()
        nn.utils.clip_grad_norm_(mt5.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 99 or step == steps - 1:
            print(f"pre-training step {step + 1} of {steps}: loss {np.mean(losses[-100:]):.3f}", flush=True)
    mt5.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- baselines

def features(src_input):
    """What the reference's first layers see, all parts in one: (B, T, F)."""
    body = src_input["body"]
    hands = [hand_features(src_input[side], body[:, :, wrist], mirror=side == "left")
             for side, wrist in (("left", LEFT_WRIST), ("right", RIGHT_WRIST))]
    return torch.cat([part_features(body), *hands], -1)


def load_splits(config):
    return {split: SignLanguageDataset(Path(config.data_dir) / f"labels.{split}", config, split)
            for split in ("train", "dev", "test")}


def nearest(config, folder):
    """1-nearest neighbour: poses resampled to 32 frames, the text of the closest training clip."""
    started, flat, texts = time.monotonic(), {}, {}
    for split, data in load_splits(config).items():
        items = [data.collate_fn([data[i]]) for i in range(len(data))]
        flat[split] = torch.stack([F.interpolate(features(src).transpose(1, 2), 32, mode="linear").flatten() for src, _ in items])
        texts[split] = [tgt["gt_sentence"][0] for _, tgt in items]
    scores = {}
    for split in ("dev", "test"):
        found = [texts["train"][i] for i in torch.cdist(flat[split], flat["train"]).argmin(1)]
        scores[split] = train_lite.compute_metrics(found, texts[split], config.language)
    prove(f"{flat['train'].shape[1]} figures a clip", True)
    return {"curve": [{"step": 0, **scores["dev"]}], "test": scores["test"], "seconds": time.monotonic() - started}


class GruBaseline(nn.Module):
    """Linear layer, two-layer bidirectional GRU, then one word a clip (mean over time) or CTC over words."""

    def __init__(self, size, words, single):
        super().__init__()
        self.words, self.single = words, single
        self.enter, self.drop = nn.Linear(size, 128), nn.Dropout(0.2)
        self.gru = nn.GRU(128, 192, 2, batch_first=True, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(2 * 192, 1 + len(words))  # 0 = blank

    def forward(self, src_input):
        """-> log-probabilities (B, T, words), or (B, words) for one word a clip."""
        x, lengths = self.drop(F.gelu(self.enter(features(src_input)))), src_input["src_length"]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        h = h.sum(1) / lengths[:, None] if self.single else h
        return self.head(self.drop(h)).log_softmax(-1)

    def loss(self, src_input, targets):
        scores = self(src_input)
        if self.single:
            return F.nll_loss(scores, torch.tensor([t[0] for t in targets]))
        sizes = torch.tensor([len(t) for t in targets])
        return F.ctc_loss(scores.transpose(0, 1), torch.tensor(sum(targets, [])), src_input["src_length"], sizes,
                          zero_infinity=True)

    @torch.no_grad()
    def read(self, src_input, glue):
        best = self(src_input).argmax(-1)
        paths = [[i] for i in best.tolist()] if self.single else [
            row[:n].unique_consecutive().tolist() for row, n in zip(best, src_input["src_length"])]
        return [glue.join(self.words[i - 1] for i in path if i) for path in paths]


def gru(config, folder):
    """The recurrent baseline on the reference's features, batches, optimiser and schedule."""
    started, data, chinese = time.monotonic(), load_splits(config), config.language == "zh"
    torch.manual_seed(config.seed)
    split_text = lambda text: list(unicodedata.normalize("NFKC", text)) if chinese else text.split()
    spelt = [split_text(entry["text"]) for entry in data["train"].entries]
    words = sorted({word for row in spelt for word in row})
    index = {word: i + 1 for i, word in enumerate(words)}
    model = GruBaseline(features(data["dev"].collate_fn([data["dev"][0]])[0]).shape[-1], words, all(len(row) == 1 for row in spelt))
    loaders = {split: DataLoader(part, config.batch_size, shuffle=split == "train", collate_fn=part.collate_fn,
                                 generator=torch.Generator().manual_seed(config.seed)) for split, part in data.items()}
    optimizer, schedule = train_lite.make_optimizer(model, config, config.max_steps, len(loaders["train"]))

    def scores(split):
        model.eval()
        found = [text for src, _ in loaders[split] for text in model.read(src, "" if chinese else " ")]
        model.train()
        return train_lite.compute_metrics(found, [e["text"] for e in data[split].entries], config.language)

    curve, step, every = [], 0, max(1, config.max_steps // VALIDATIONS)
    while step < config.max_steps:
        for src, tgt in loaders["train"]:
            loss = model.loss(src, [[index[word] for word in split_text(text)] for text in tgt["gt_sentence"]])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % every == 0 or step == config.max_steps:
                curve.append({"step": step, "train_loss": loss.item(), **scores("dev")})
            if step == config.max_steps:
                break
        data["train"].epoch += 1
    parameters = sum(p.numel() for p in model.parameters())
    prove(f"{parameters:,} parameters, {'one word a clip' if model.single else 'CTC on words'}", True)
    return {"curve": curve, "test": scores("test"), "seconds": time.monotonic() - started}


# ---------------------------------------------------------------------------------------------- one run

def reference(config, folder):
    """Train the product as it is patched by now; its own validations are the curve, `evaluate` gives the test scores."""
    started = time.monotonic()
    if train_lite.train(config, InferenceConfig()):
        raise RuntimeError("training stopped")
    seconds, printed = time.monotonic() - started, io.StringIO()
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        curve = [json.loads(line) for line in file]
    with redirect_stdout(printed):
        code = train_lite.main(["evaluate", str(folder), "--split", "test"])
    test = {key: float(value) for key, value in re.findall(r"^(\w+) (-?\d[\d.]*)", printed.getvalue(), re.M)}
    if code or "exact_match" not in test:
        raise RuntimeError(f"evaluate failed: {printed.getvalue()}")
    return {"curve": curve, "test": test, "seconds": seconds}


@dataclass
class Row:
    """One line of a table: what it sets, what it patches, on which share of the training clips, by which model."""

    title: str
    options: object = field(default_factory=dict)  # or a function of the reference's config
    patch: object = None
    fraction: float = 1.0
    run: object = reference
    warm: bool = False  # starts from a run on --other
    pretrained: bool = False  # starts from the mT5 that `pretrain` made


ROWS = {
    "reference": Row("the reference"),
    "shifted": Row("labels shifted twice", patch=shift_labels_again),
    "original_freezing": Row("original freezing", patch=freezing(original_policy)),
    "all_frozen": Row("all of mT5 frozen but its head", patch=freezing(lambda name, _: name.startswith("lm_head"))),
    "encoder_frozen": Row("encoder frozen", patch=freezing(lambda name, _: not name.startswith("encoder."))),
    "original_front_end": Row("original front-end: mean over joints", patch=original_front_end),
    "graph": Row("graph layers instead of flattened joints", patch=graph_layers),
    "no_convolution": Row("no temporal convolution", patch=no_convolution),
    "no_position": Row("no position", {"position_encoding": "none"}),
    "learned_position": Row("learned position", {"position_encoding": "learned"}),
    "smoothing": Row("label smoothing 0.1", {"label_smoothing": 0.1}),
    "no_ctc": Row("CTC off", {"ctc_weight": 0.0}),
    "stride_1": Row("temporal stride 1", {"temporal_stride": 1}),
    "augmentation": Row("augmentation on / off: the other", lambda ref: {"augment": not ref.augment}),
    "rate_2e-4": Row("learning rate 2e-4", {"learning_rate": 2e-4}),
    "rate_5e-4": Row("learning rate 5e-4", {"learning_rate": 5e-4}),
    "rate_2e-3": Row("learning rate 2e-3", {"learning_rate": 2e-3}),
    "late_warm_up": Row("warm-up one epoch late", patch=warm_up_late),
    "leaking_tail": Row("tail gradients leak", patch=leak_tail),
    "raw_metric": Row("metric on raw text, not NFKC", patch=score_raw_text),
    "batch_dependent": Row("padding repeats the last frame, BatchNorm", patch=depend_on_batch),
    "hands_in_body_scale": Row("hands not at their own scale", patch=hands_in_body_scale),
    "no_velocities": Row("no velocities", patch=no_velocities),
}
GROUPS = {"rows": list(ROWS)}
ROWS |= {
    "text_original": Row("pre-trained on text, original freezing", {"freeze_decoder_layers": 0},
                         freezing(original_policy), pretrained=True),
    "text_review": Row("pre-trained on text, half of the decoder frozen (review)",
                       {"freeze_decoder_layers": BLOCKS // 2}, pretrained=True),
    "text_nothing": Row("pre-trained on text, nothing frozen", {"freeze_decoder_layers": 0}, pretrained=True),
    "text_encoder": Row("pre-trained on text, encoder frozen", {"freeze_decoder_layers": 0},
                        freezing(lambda name, _: not name.startswith("encoder.")), pretrained=True),
    "text_none": Row("the same shape from scratch", {"num_layers": BLOCKS}),
}
GROUPS["freezing"] = [name for name in ROWS if name.startswith("text_")]
GROUPS["fewer"] = []
for share in (10, 30, 100):
    ROWS |= {f"fewer_{share}_nearest": Row(f"{share} % of the clips, 1-nearest neighbour", fraction=share / 100, run=nearest),
             f"fewer_{share}_gru": Row(f"{share} % of the clips, bidirectional GRU", fraction=share / 100, run=gru)}
    if share < 100:  # with all clips it is the row "reference"
        ROWS[f"fewer_{share}"] = Row(f"{share} % of the clips, the reference", fraction=share / 100)
    GROUPS["fewer"] += [f"fewer_{share}_nearest", f"fewer_{share}_gru", f"fewer_{share}" if share < 100 else "reference"]
ROWS["transfer"] = Row("10 % of the clips, started from a run on the other corpus", fraction=0.1, warm=True)
GROUPS["transfer"] = ["fewer_10", "transfer"]


def count_clips(config):
    return len(datasets_lite.load_dataset_file(Path(config.data_dir) / "labels.train"))


def subset(source, folder, fraction, seed, clips=None):
    """A corpus of a share of another's training clips, evenly over its texts; `clips`: so many of them at most, a
    quarter of that in dev and test."""
    source, rng = Path(source), random.Random(seed)
    folder.mkdir(parents=True)
    (folder / "pose_format").symlink_to((source / "pose_format").resolve(), target_is_directory=True)
    for split in ("train", "dev", "test"):
        entries = list(datasets_lite.load_dataset_file(source / f"labels.{split}").items())
        rng.shuffle(entries)
        entries.sort(key=lambda item: item[1]["text"])
        limit = len(entries) if clips is None else clips if split == "train" else clips // 4
        count = max(1, round(min(len(entries), limit) * (fraction if split == "train" else 1)))
        start = rng.random()
        chosen = dict(entries[int((i + start) * len(entries) / count)] for i in range(count))
        (folder / f"labels.{split}").write_text(json.dumps(chosen), encoding="utf-8")
    return folder


def make_config(job, row, data_dir, folder):
    """-> (the row's config, what it changes in words). Raises NotApplicable where it is the reference itself."""
    kind = DemoConfig if job["demo"] else ScratchConfig
    base = kind(**{"data_dir": str(data_dir), "language": job["language"], "output_dir": str(folder), "device": "cpu",
                   "num_workers": 0, "seed": job["seed"], "max_steps": job["steps"], **job["settings"]})
    options = dict(row.options(base) if callable(row.options) else row.options)
    if row.pretrained:
        options["mt5_path"] = job["mt5"]
    changes = [f"{key}: {getattr(base, key)!r} -> {value!r}" for key, value in options.items() if getattr(base, key) != value]
    if options and not changes:
        raise NotApplicable(f"the reference has {options}")
    config = replace(base, **options)
    epoch = math.ceil(count_clips(config) / (config.batch_size * config.gradient_accumulation))
    config.val_interval = max(1, round(config.max_steps / VALIDATIONS / epoch))
    return config, changes


def first_run(job, folder):
    """The reference, trained on all of --other: where a warm run starts; kept, and trained once -> its best/."""
    data_dir, name = job["other"], f"{Path(job['other']).name}-{job['seed']}-{job['steps']}-{label(job)[-8:]}"
    folder = (folder if job["clips"] else Path(job["work"])) / "sources" / name
    if job["clips"]:
        data_dir = subset(data_dir, folder / "corpus", 1.0, job["seed"], job["clips"])
    config, _ = make_config(job, ROWS["reference"], data_dir, folder / "run")
    if train_lite.train(config, InferenceConfig()):
        raise RuntimeError("training stopped")
    return folder / "run" / "best"


def work(job):
    """One run in this process; its result goes to the file job["out"]."""
    if job["row"] == "pretrain":
        labels = [Path(job["data_dir"]) / "labels.train"] + [CSL_DAILY] * (job["language"] == "zh" and CSL_DAILY.is_file())
        texts = [entry["text"] for path in labels for entry in datasets_lite.load_dataset_file(path).values()]
        return pretrain(Path(job["mt5"]), texts, job["pretrain_steps"])
    row, result = ROWS[job["row"]], {key: job[key] for key in KEY}
    with tempfile.TemporaryDirectory(dir=job["work"]) as folder:
        folder, data_dir = Path(folder), job["data_dir"]
        try:
            if row.fraction < 1 or job["clips"]:
                data_dir = subset(data_dir, folder / "corpus", row.fraction, job["seed"], job["clips"])
            config, changes = make_config(job, row, data_dir, folder / "run")
            if row.warm:
                config.init_from = str(first_run(job, folder))
            if row.patch:
                row.patch(config)
            result |= row.run(config, folder / "run")
            if row.patch and not PROOFS:
                raise AssertionError("the patch was never reached")
            result["curve"] = [{key: point[key] for key in CURVE if key in point} for point in result["curve"]]
            result["proof"] = changes + PROOFS
        except NotApplicable as reason:
            result["note"] = str(reason)
    Path(job["out"]).write_text(json.dumps(result), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- all runs, the table

KEY = ("row", "corpus", "other", "seed", "steps", "settings", "clips", "mt5")  # what tells one run from another


def identity(result):
    return json.dumps([result[key] for key in KEY], sort_keys=True)


def label(job):
    return f"{job['row']}-{job['corpus']}-{job['seed']}-{zlib.crc32(identity(job | {'row': '', 'mt5': ''}).encode()):08x}"


def run_job(job):
    """A subprocess of this script on one core -> its result; raises RuntimeError with the log's end."""
    log = Path(job["work"]) / "logs" / f"{label(job)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    job["out"] = str(log.with_suffix(".json"))
    with open(log, "w") as file:
        code = subprocess.run([sys.executable, __file__, "--worker", json.dumps(job)], stdout=file, stderr=subprocess.STDOUT,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}).returncode
    if code:
        raise RuntimeError(f"{label(job)} failed; {log} ends:\n" + "\n".join(log.read_text().splitlines()[-12:]))
    return json.loads(Path(job["out"]).read_text(encoding="utf-8")) if job["row"] != "pretrain" else None


def make_jobs(args, names):
    """One dict a run, seed by seed, so that a table with fewer seeds is there early."""
    pairs = [(args.corpus, args.other, names)]
    if any(ROWS[name].warm for name in names):
        pairs.append((args.other, args.corpus, GROUPS["transfer"]))  # and the other way about
    jobs = []
    for seed in range(42, 42 + args.seeds):
        for data_dir, other, some in pairs:
            for name in some:
                row = ROWS[name]
                jobs.append({
                    "row": name, "data_dir": str(data_dir), "corpus": data_dir.name, "demo": args.demo and data_dir == args.corpus,
                    "other": str(other) if row.warm else "", "language": args.language, "seed": seed, "steps": args.steps,
                    "settings": args.settings, "clips": args.clips, "work": str(args.work),
                    "mt5": str(args.work / f"mt5_{data_dir.name}_{args.pretrain_steps}") if row.pretrained else "",
                    "pretrain_steps": args.pretrain_steps})
    return jobs


def run_all(jobs, results, path, at_once):
    """Run what has no result yet, append each to the file as it ends -> number of failures."""
    todo, failures = [job for job in jobs if identity(job) not in results], 0
    for job in {job["mt5"]: job for job in todo if job["mt5"] and not Path(job["mt5"], "model.safetensors").is_file()}.values():
        print(f"pre-training {job['mt5']} on text", flush=True)
        run_job(job | {"row": "pretrain"})
    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(run_job, job): job for job in todo}
        for number, future in enumerate(as_completed(futures), 1):
            try:
                result = future.result()
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                failures += 1
                continue
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(result | {"date": time.strftime("%Y-%m-%d %H:%M"), "torch": torch.__version__}) + "\n")
            results[identity(result)] = result
            end = result.get("note") or (f"{result['seconds']:.0f} s, exact match on test {result['test']['exact_match']:.1f}; "
                                         + "; ".join(result["proof"]))
            print(f"[{number}/{len(todo)}] {result['row']} on {result['corpus']}, seed {result['seed']}: {end}", flush=True)
    return failures


def cell(values, digits=1):
    """Median, and the range where there are several; inf is "never", None "-"."""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    show = lambda v: "never" if math.isinf(v) else f"{v:.{digits}f}"
    low, high = show(min(values)), show(max(values))
    return show(statistics.median(values)) + (f" ({low} to {high})" if low != high else "")


def steps_to(curve, percent):
    return next((point["step"] for point in curve if point["exact_match"] >= percent), math.inf)


def table(names, jobs, results):
    """Markdown, a line a row that has results."""
    lines = ["| row | exact match, dev | test | BLEU-4, test | poses exchanged | dev nll | steps to 50 % | to 90 % | seconds |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name in names:
        wanted = [job for job in jobs if job["row"] == name]
        found = [results[identity(job)] for job in wanted if identity(job) in results]
        notes, found = [r["note"] for r in found if "note" in r], [r for r in found if "note" not in r]
        title = ROWS[name].title + (f" [{len(found)} of {len(wanted)} seeds]" if len(found) < len(wanted) and not notes else "")
        if not found:
            lines += [f"| {title} | {notes[0] if notes else 'no run'} |" + " |" * 7]
            continue
        ends, tests = [r["curve"][-1] for r in found], [r["test"] for r in found]
        lines.append("| " + " | ".join([
            title, cell([e["exact_match"] for e in ends]), cell([t["exact_match"] for t in tests]),
            cell([t["bleu4"] for t in tests]), cell([t.get("shuffled_bleu4") for t in tests]),
            cell([e.get("dev_loss") for e in ends], 3), cell([steps_to(r["curve"], 50) for r in found], 0),
            cell([steps_to(r["curve"], 90) for r in found], 0), cell([r["seconds"] for r in found], 0)]) + " |")
    return "\n".join(lines)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows, or groups of them: " + ", ".join(GROUPS))
    parser.add_argument("--corpus", default="demo", help="demo, or a data_dir")
    parser.add_argument("--other", type=Path, help="the other corpus of transfer")
    parser.add_argument("--language", default="zh")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="optimiser steps; 0 = the reference's own")
    parser.add_argument("--pretrain-steps", type=int, default=3000)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the config, for every row")
    parser.add_argument("--results", type=Path, default=Path("ablations.jsonl"))
    parser.add_argument("--work", type=Path, help="logs and what runs share; default: <results>.work")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--smoke", action="store_true", help="4 steps on 72 clips, one seed")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker or args.list:
        return args, list(ROWS)
    names = list(dict.fromkeys(n for name in args.names or ["rows"] for n in GROUPS.get(name, [name])))
    if unknown := set(names) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; see --list")
    if any(ROWS[name].warm for name in names) and not args.other:
        parser.error("transfer needs --other DIR")
    args.clips = 72 if args.smoke else None
    if args.smoke:
        args.seeds, args.steps, args.pretrain_steps = 1, args.steps or 4, 4
        args.results = Path(tempfile.mkdtemp(prefix="ablations_")) / "smoke.jsonl"
    args.demo = args.corpus == "demo"
    args.steps = args.steps or (DemoConfig if args.demo else ScratchConfig)().max_steps
    args.work = (args.work or args.results.with_suffix(".work")).resolve()
    args.corpus = args.work / "demo" if args.demo else Path(args.corpus).resolve()
    args.other = args.other.resolve() if args.other else None
    args.settings = {}
    for setting in args.set:
        name, _, value = setting.partition("=")
        args.settings[name] = json.loads(value) if re.fullmatch(r"-?[\d.]+(e-?\d+)?|true|false", value) else value
    return args, names


def main():
    args, names = parse()
    if args.worker:
        return work(json.loads(args.worker))
    if args.list:
        print("\n".join(f"{group}:\n" + "\n".join(f"    {n:20} {ROWS[n].title}" for n in some) for group, some in GROUPS.items()))
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    if args.demo and not args.corpus.exists():
        datasets_lite.make_demo_corpus(args.corpus)
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.is_file() else []
    results = {identity(result): result for result in map(json.loads, lines)}
    jobs = make_jobs(args, names)
    failures = run_all(jobs, results, args.results, args.jobs)
    for corpus in dict.fromkeys(job["corpus"] for job in jobs):
        mine = [job for job in jobs if job["corpus"] == corpus]
        settings = "".join(f", {key} {value}" for key, value in args.settings.items())
        print(f"\n{corpus}, {args.steps} steps, {args.seeds} seeds{settings}: median (range); dev at the schedule's end, test "
              f"with the best model\n\n{table(list(dict.fromkeys(job['row'] for job in mine)), mine, results)}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
