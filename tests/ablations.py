"""What each fix is worth: a row puts one original fault back, or takes one choice out, and trains to its end.

    python tests/ablations.py                        every row of "rows" on the demo corpus, three seeds
    python tests/ablations.py shifted no_position    these rows; --help names all
    python tests/ablations.py --corpus DIR --language en --steps 1000
    python tests/ablations.py freezing               an mT5 pre-trained on text, then fine-tuned on poses
    python tests/ablations.py fewer --corpus DIR     10, 30, 100 % of the clips, beside 1-NN and a GRU
    python tests/ablations.py transfer --corpus DIR --other DIR    init_from, both ways, at 10 % of the clips
    python tests/ablations.py --smoke                a few steps on a few clips: does each row run, and bite?

The product has no switch for bugs: each run is a process of its own, which patches the product before it
trains and fails unless the patch took effect. A finished run is a line of --results, learning curve included,
and is not run again. The table has dev figures of the schedule's end, test figures of the run's best/.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
import transformers
from sacrebleu.metrics import BLEU
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Tokenizer,
    get_cosine_schedule_with_warmup,
)

import datasets_lite
import models_lite
import train_lite
from config_lite import DemoConfig, InferenceConfig, ScratchConfig
from datasets_lite import (
    BODY,
    BODY_EDGES,
    HAND_EDGES,
    LEFT,
    LEFT_WRIST,
    RIGHT_WRIST,
    SignLanguageDataset,
    load_dataset_file,
)
from models_lite import IGNORE, SignLanguageLite, hand_features, part_features

CSL_DAILY = ROOT.parent / "shared" / "data" / "csl_daily_labels" / "labels.train"
BLOCKS = 4  # of the mT5 that is pre-trained here, encoder and decoder each; mT5-small has 8
VALIDATIONS = 10  # of a run, about
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
PROOFS = []  # what the patch of this process was seen to do


class NotApplicable(Exception):
    """The row means nothing on this corpus or beside this reference; the message says why."""


def prove(text, holds):
    """Note what a patch did; where it did nothing the run fails: no row silently repeats the reference."""
    if not holds:
        raise AssertionError(f"the row does not do what it names: {text}")
    if text not in PROOFS:
        PROOFS.append(text)


def instead_of(owner, name):
    """A patch of the function below: it takes owner.name's place, the right one as its first argument."""

    def decorate(function):
        def patch():
            right = getattr(owner, name)
            setattr(owner, name, lambda *arguments, **more: function(right, *arguments, **more))

        return patch

    return decorate


# ---------------------------------------------------------------------- faults put back


@instead_of(models_lite, "text_loss")
def shift_labels_again(right, logits, labels, *rest):
    """T5 has shifted its decoder's input; the output at t is nevertheless compared with token t + 1."""
    loss, nll, *more = right(logits[:, :-1], labels[:, 1:], *rest)
    share = (labels != IGNORE).sum() / (
        labels[:, 1:] != IGNORE
    ).sum()  # the mean is over the labels left
    prove(
        "the loss is another",
        PROOFS or not torch.isclose(nll * share, right(logits, labels, *rest)[1]),
    )
    return loss * share, nll * share, *more


def freezing(policy):
    """A patch after which policy(name, mt5) says whether a parameter of mT5 trains."""

    @instead_of(SignLanguageLite, "_freeze_mt5_layers")
    def freeze(right, model):
        named = list(model.mt5_model.named_parameters())
        for name, parameter in named:
            parameter.requires_grad_(bool(policy(name, model.mt5_model)))
        total, trained = (
            sum(p.numel() for _, p in named),
            sum(p.numel() for _, p in named if p.requires_grad),
        )
        prove(f"{trained:,} of mT5's {total:,} parameters train", 0 < trained < total)

    return freeze


def original_policy(name, mt5):
    """Encoder blocks 4-5 and decoder blocks 3-5 of 8, the two final norms and the head; nothing else.

    In a model of another depth: the same share of the blocks, rounded up, at about the same height.
    Of 8 that gives the original's blocks; of 2, the upper one of each stack.
    """
    part, kind, number = (name.split(".") + ["", ""])[:3]
    if kind != "block":
        return "final_layer_norm" in name or name.startswith("lm_head")
    centre, share = {"encoder": (5 / 8, 2 / 8), "decoder": (4.5 / 8, 3 / 8)}[part]
    depth = len(getattr(mt5, part).block)
    count = math.ceil(share * depth)
    return 0 <= int(number) - round(centre * depth - count / 2) < count


def head_only(name, mt5):
    return name.startswith("lm_head")


def all_but_encoder(name, mt5):
    return not name.startswith("encoder.")  # the table of pieces is mt5.shared: it trains


def original_front_end(width):
    """Patches: one 3 -> width layer for all joints, two convolutions over time, the mean over joints.

    No adjacency; BatchNorm counts padding. The original's width is 64, beside a d_model of 512. Stride, norm
    and position after it are the reference's.
    """

    def layer(into, out):
        over_time = nn.Conv2d(out, out, (3, 1), padding=(1, 0))
        return [nn.Conv2d(into, out, 1), over_time, nn.BatchNorm2d(out), nn.ReLU()]

    @instead_of(SignLanguageLite, "_init_weights")
    def build(right, model):
        model.temporal, model.pose_embed = nn.ModuleList(), nn.Linear(3, width)
        model.convolutions = nn.ModuleDict(
            {
                part: nn.Sequential(*layer(width, 2 * width), *layer(2 * width, 4 * width))
                for part in ("body", "hand")
            }
        )
        model.fusion = nn.Linear(3 * 4 * width, 8 * width)
        model.proj = nn.Linear(
            model.config.temporal_stride * 8 * width, model.mt5_model.config.d_model
        )
        for linear in [model.pose_embed, model.fusion, model.proj] + [model.gloss_head] * bool(
            model.glosses
        ):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    @instead_of(SignLanguageLite, "encode_pose")
    def encode(right, model, src_input):
        def pooled(part, kind):
            x = model.pose_embed(part).permute(0, 3, 1, 2)  # (B, width, T, V)
            return model.convolutions[kind](x).mean(-1)

        body, left, hand = (src_input[part] for part in ("body", "left", "right"))
        stride = model.config.temporal_stride
        parts = [pooled(body, "body"), pooled(left, "hand"), pooled(hand, "hand")]
        prove(
            "joints exchanged give the same output",
            PROOFS or torch.allclose(parts[2], pooled(hand.flip(2), "hand"), atol=1e-3),
        )
        x = model.fusion(torch.cat(parts, 1).transpose(1, 2))
        x = F.pad(x, (0, 0, 0, -x.shape[1] % stride))
        x = model.layer_norm(model.proj(x.reshape(len(x), -1, stride * x.shape[-1])))
        return model.position(x), src_input["attention_mask"][:, ::stride]

    return build, encode


@instead_of(train_lite, "make_optimizer")
def warm_up_late(right, model, config, steps, epoch):
    """The original steps its schedule after an epoch: the first has the full rate, then warm-up begins."""
    optimizer, scheduler = right(model, config, steps, epoch)
    prove(
        f"the first {epoch} steps run at the full rate",
        scheduler.get_last_lr()[0] < config.learning_rate,
    )
    factors = scheduler.lr_lambdas
    scheduler.lr_lambdas = [
        lambda step, f=f: f(step - epoch) if step >= epoch else 1.0 for f in factors
    ]
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate
    return optimizer, scheduler


@instead_of(train_lite, "make_optimizer")
def leak_tail(right, model, config, steps, epoch):
    """An epoch's last, short window is not stepped; its gradient goes into the next epoch's first step."""
    clips, window = count_clips(config), config.batch_size * config.gradient_accumulation
    if clips % window == 0:
        raise NotApplicable(f"{clips} clips leave no tail at {window} a step")
    optimizer, scheduler = right(model, config, steps, epoch)
    done, kept = [0], []

    def before_step(*_):
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        done[0] += 1
        for parameter, gradient in kept:
            prove("a tail's gradient is added to the next step's", PROOFS or gradient.any())
            parameter.grad += gradient
        kept.clear()
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        if done[0] % epoch == 0:
            # the original divides by the micro-batches of a whole window, so a tail weighs its share of one
            kept.extend((p, p.grad * (clips % window / window)) for p in parameters)
            for parameter in parameters:
                parameter.grad = None  # such a parameter is not stepped

    optimizer.register_step_pre_hook(before_step)
    return optimizer, scheduler


@instead_of(train_lite, "compute_metrics")
def score_raw_text(right, predictions, references, language="zh"):
    """Exact match and BLEU-4 of the strings as they are, only stripped."""
    if all(unicodedata.is_normalized("NFKC", text) for text in references):
        raise NotApplicable("NFKC changes no text of this corpus")
    prove("texts change under NFKC", True)
    metrics, tokenize = (
        right(predictions, references, language),
        "zh" if language == "zh" else "13a",
    )
    predictions, references = (
        [text.strip() for text in texts] for texts in (predictions, references)
    )
    metrics["bleu4"] = BLEU(tokenize=tokenize).corpus_score(predictions, [references]).score
    metrics["exact_match"] = 100 * sum(map(str.__eq__, predictions, references)) / len(references)
    return metrics


@instead_of(datasets_lite, "pad_poses")
def repeat_last_frame(right, poses):
    """Padding repeats a clip's last frame."""
    batch = right(poses)
    for part in ("body", "left", "right"):
        for clip, length in zip(batch[part], batch["src_length"].tolist()):
            clip[length:] = clip[length - 1]
    return batch


class FrameBatchNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)


@instead_of(models_lite, "TemporalBlock")
def read_padding(right, width):
    """BatchNorm counts padded frames, the convolutions read them."""

    def forward(x, mask):
        padded = x[mask[..., 0] == 0]
        if len(padded):
            prove("padding holds frames and is read", PROOFS or padded.any())
        return right.forward(block, x, torch.ones_like(mask))

    block = right(width)
    block.norm, block.forward = FrameBatchNorm(width), forward
    return block


# ---------------------------------------------------------------------- choices taken out


class GraphEmbed(nn.Module):
    """Features (B, T, V * C + rest) -> two graph layers over the bones, joints kept -> (B, T, d_model)."""

    def __init__(self, edges, joints, features, d_model, width=32):
        super().__init__()
        self.joints, self.rest = joints, features % joints
        bones = torch.eye(joints)
        for a, b in edges:
            bones[a, b] = bones[b, a] = 1
        degree = bones.sum(1).rsqrt()
        self.register_buffer("bones", degree[:, None] * bones * degree)
        self.learnt = nn.Parameter(
            torch.zeros(2, joints, joints)
        )  # links that the skeleton does not have
        self.enter = nn.Linear(features // joints, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.leave = nn.Linear(joints * width + self.rest, d_model)

    def forward(self, x):
        x, rest = x.split([x.shape[-1] - self.rest, self.rest], -1)
        h = self.enter(x.unflatten(-1, (self.joints, -1)))
        for norm, layer, learnt in zip(self.norms, self.layers, self.learnt):
            h = h + F.gelu((self.bones + learnt) @ layer(norm(h)))
        return self.leave(torch.cat([h.flatten(-2), rest], -1))


@instead_of(SignLanguageLite, "_init_weights")
def graph_layers(right, model):
    """Graph layers in place of one linear layer on a part's flattened joints."""
    right(model)
    before = sum(p.numel() for p in model.pose_embed.parameters())
    for part, edges, joints in (("body", BODY_EDGES, len(BODY)), ("hand", HAND_EDGES, len(LEFT))):
        old = model.pose_embed[part]
        model.pose_embed[part] = GraphEmbed(edges, joints, old.in_features, old.out_features)
    after = sum(p.numel() for p in model.pose_embed.parameters())
    prove(f"{after:,} parameters embed the joints, {before:,} before", after != before)


@instead_of(models_lite, "TemporalBlock")
def no_convolution(right, width):
    """The temporal blocks stay, but each sees its own frame alone."""
    block = right(width)
    prove(f"kernel {block.conv.kernel_size[0]} -> 1", block.conv.kernel_size[0] > 1)
    block.conv = nn.Conv1d(width, width, 1)
    return block


@instead_of(SignLanguageLite, "_init_weights")
def poses_at_unit_scale(right, model):
    """LayerNorm starts at 1, its default: the poses are then as large beside the position as they come."""
    right(model)
    prove("the norm before the position starts at 1", model.layer_norm.weight.max() < 1)
    nn.init.ones_(model.layer_norm.weight)


@instead_of(SignLanguageLite, "_number_pieces")
def no_decoder_position(right, model, decoder, args, inputs):
    """The decoder tells its pieces' places by T5's relative bias alone."""
    _, numbered = right(model, decoder, args, dict(inputs))
    plain = decoder.embed_tokens(inputs["input_ids"])
    prove(
        "the decoder's input has no positions",
        PROOFS or not torch.equal(numbered["inputs_embeds"], plain),
    )
    return args, inputs


@instead_of(models_lite, "part_features")
def no_velocities(right, part):
    """Each frame's features are made as if it were a clip of its own."""
    alone = right(part.flatten(0, 1)[:, None]).view(*part.shape[:2], -1)
    prove("features differ", PROOFS or not torch.equal(alone, right(part)))
    return alone


@instead_of(models_lite, "hand_features")
def hands_in_body_scale(right, hand, wrist, mirror):
    """A hand's shape stays divided by the body's box, as load_part_kp gives it."""
    flip = hand.new_tensor([-1.0 if mirror else 1.0, 1.0, 1.0])
    plain = torch.cat([part_features(hand * flip), wrist * flip], -1)
    prove("features differ", PROOFS or not torch.allclose(plain, right(hand, wrist, mirror)))
    return plain


# ---------------------------------------------------------------------- pre-training on text


def span_corruption(ids, sentinels, rng, noise=0.15, mean_length=3):
    """T5's objective: of a list of ids, 15 % in spans of about 3 give way to sentinels -> (input, target)."""

    def pieces(total, count):
        return np.diff(
            [0, *sorted(rng.choice(np.arange(1, total), count - 1, replace=False)), total]
        )

    masked = max(1, round(noise * len(ids)))
    spans, source, target, at = max(1, round(masked / mean_length)), [], [], 0
    for sentinel, keep, drop in zip(
        sentinels, pieces(len(ids) - masked, spans), pieces(masked, spans)
    ):
        source += ids[at : at + keep] + [sentinel]
        target += [sentinel] + ids[at + keep : at + keep + drop]
        at += keep + drop
    return source, target


def pretrain(folder, texts, steps, batch=32, length=64):
    """A small mT5 that knows text and no poses, saved in mT5's form: spiece.model, config.json, weights."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=4000,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    tokenizer, rng = T5Tokenizer.from_pretrained(folder, extra_ids=0), np.random.default_rng(0)
    pieces, rows = len(tokenizer), tokenizer(texts).input_ids
    sentinels = range(
        pieces, pieces + 30
    )  # behind the pieces' rows, as in mT5; the product cuts them off
    torch.manual_seed(0)
    mt5 = MT5ForConditionalGeneration(
        MT5Config(
            vocab_size=pieces + len(sentinels),
            d_model=128,
            d_kv=32,
            num_heads=4,
            d_ff=256,
            num_layers=BLOCKS,
            num_decoder_layers=BLOCKS,
            decoder_start_token_id=0,
        )
    )
    mt5.config.tie_word_embeddings = (
        False  # transformers 5 ties mT5's head; mT5's own is a table of its own
    )
    mt5.lm_head.weight = nn.Parameter(torch.randn(mt5.lm_head.weight.shape) * 128**-0.5)
    optimizer, losses = torch.optim.AdamW(mt5.parameters(), lr=1e-3, weight_decay=0.01), []
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    for step in range(1, steps + 1):
        pairs = []
        for _ in range(batch):  # texts one behind another, cut to one length
            ids = sum((rows[i] for i in rng.integers(len(rows), size=length // 2)), [])[:length]
            pairs.append(span_corruption(ids, sentinels, rng))
        source, target = (
            nn.utils.rnn.pad_sequence([torch.tensor(ids + [1]) for ids in side], True, padding)
            for side, padding in zip(zip(*pairs), (0, IGNORE))
        )
        loss = mt5(input_ids=source, attention_mask=source != 0, labels=target).loss
        loss.backward()
        nn.utils.clip_grad_norm_(mt5.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            print(
                f"pre-training step {step} of {steps}: loss {np.mean(losses[-100:]):.3f}",
                flush=True,
            )
    mt5.save_pretrained(folder)


# ---------------------------------------------------------------------- baselines


def features(src_input):
    """What the reference's first layers see, all parts in one: (B, T, F)."""
    body, left, right = (src_input[part] for part in ("body", "left", "right"))
    return torch.cat(
        [
            part_features(body),
            hand_features(left, body[:, :, LEFT_WRIST], mirror=True),
            hand_features(right, body[:, :, RIGHT_WRIST], mirror=False),
        ],
        -1,
    )


def load_split(config, split):
    return SignLanguageDataset(Path(config.data_dir) / f"labels.{split}", config, split)


def nearest(config, folder):
    """1-nearest neighbour: features resampled to 32 frames, the text of the closest training clip."""
    flat, texts, scores = {}, {}, {}
    for split in ("train", "dev", "test"):
        data = load_split(config, split)
        clips = [features(data.collate_fn([data[i]])[0]).transpose(1, 2) for i in range(len(data))]
        flat[split] = torch.stack(
            [F.interpolate(clip, 32, mode="linear").flatten() for clip in clips]
        )
        texts[split] = [entry["text"] for entry in data.entries]
    for split in ("dev", "test"):
        found = [texts["train"][i] for i in torch.cdist(flat[split], flat["train"]).argmin(1)]
        scores[split] = train_lite.compute_metrics(found, texts[split], config.language)
    prove(f"{flat['train'].shape[1]:,} figures a clip", True)
    return {"curve": [{"step": 0, **scores["dev"]}], "test": scores["test"]}


class Gru(nn.Module):
    """A two-layer bidirectional GRU; one word a clip from its mean over time, or CTC over words."""

    def __init__(self, size, words, single):
        super().__init__()
        self.words, self.single = words, single
        self.enter, self.dropout = nn.Linear(size, 128), nn.Dropout(0.2)
        self.gru = nn.GRU(128, 192, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(2 * 192, 1 + len(words))  # 0 = CTC's blank

    def forward(self, src_input):
        """-> log-probabilities (B, T, words), for one word a clip (B, words)."""
        x, lengths = self.dropout(F.gelu(self.enter(features(src_input)))), src_input["src_length"]
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        h, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.head(
            self.dropout(h.sum(1) / lengths[:, None] if self.single else h)
        ).log_softmax(-1)

    def loss(self, src_input, texts):
        targets = [[1 + self.words.index(word) for word in text] for text in texts]
        if self.single:
            return F.nll_loss(self(src_input), torch.tensor(targets)[:, 0])
        sizes, flat = (
            torch.tensor([len(target) for target in targets]),
            torch.tensor(sum(targets, [])),
        )
        scores, lengths = self(src_input).transpose(0, 1), src_input["src_length"]
        return F.ctc_loss(scores, flat, lengths, sizes, zero_infinity=True)

    @torch.no_grad()
    def read(self, src_input):
        """-> each clip's words, by the best path."""
        best = self.eval()(src_input).argmax(-1)
        paths = (
            best[:, None].tolist()
            if self.single
            else [
                row[:length].unique_consecutive().tolist()
                for row, length in zip(best, src_input["src_length"])
            ]
        )
        return [[self.words[i - 1] for i in path if i] for path in paths]


def gru(config, folder):
    """The recurrent baseline on the reference's features, with its batch size, optimiser and schedule."""
    torch.manual_seed(config.seed)
    data = {split: load_split(config, split) for split in ("train", "dev", "test")}
    glue, curve, step = "" if config.language == "zh" else " ", [], 0
    split_text = str.split if glue else (lambda text: list(unicodedata.normalize("NFKC", text)))
    texts = [split_text(entry["text"]) for entry in data["train"].entries]
    loaders = {
        split: DataLoader(part, config.batch_size, split == "train", collate_fn=part.collate_fn)
        for split, part in data.items()
    }
    size = features(next(iter(loaders["dev"]))[0]).shape[-1]
    model = Gru(
        size, sorted({word for text in texts for word in text}), single=max(map(len, texts)) == 1
    )
    optimizer, scheduler = train_lite.make_optimizer(
        model, config, config.max_steps, len(loaders["train"])
    )
    parameters = sum(p.numel() for p in model.parameters())
    prove(f"{parameters:,} parameters, {'one word a clip' if model.single else 'CTC'}", True)

    def scores(split):
        found = [
            glue.join(words) for src_input, _ in loaders[split] for words in model.read(src_input)
        ]
        return train_lite.compute_metrics(
            found, [e["text"] for e in data[split].entries], config.language
        )

    while step < config.max_steps:
        for src_input, tgt_input in loaders["train"]:
            loss = model.train().loss(src_input, map(split_text, tgt_input["gt_sentence"]))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step % max(1, config.max_steps // VALIDATIONS) == 0 or step == config.max_steps:
                curve.append({"step": step, "train_loss": loss.item(), **scores("dev")})
            if step == config.max_steps:
                break
        data["train"].epoch += 1
    return {"curve": curve, "test": scores("test")}


# ---------------------------------------------------------------------- the rows


def reference(config, folder):
    """Train the product as it is by now; its validations are the curve, best/ gives the test scores."""
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
    """One line of a table: what it sets and patches, on which share of the training clips, by which model."""

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


def count_clips(config):
    return len(load_dataset_file(Path(config.data_dir) / "labels.train"))


def subset(source, folder, fraction, job):
    """A share of a corpus's training clips, even over its sorted texts; for --smoke, few clips a split."""
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
    """-> (the row's config, what it changes). Raises NotApplicable where that leaves the reference."""
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
    """The reference on all of --other, where a warm run starts; kept, but for --smoke -> its best/."""
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
    """A subprocess of this script on one core -> its result. Raises RuntimeError with the end of its log."""
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


def cell(values, digits=1):
    """Median, with the range where there is one."""
    low, middle, high = (
        "never" if math.isinf(v) else "–" if math.isnan(v) else f"{v:.{digits}f}"
        for v in (min(values), statistics.median(values), max(values))
    )
    return middle + (f" ({low} to {high})" if low != high else "")


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
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in dict.fromkeys(job["row"] for job in jobs):
        wanted = [identity(job) for job in jobs if job["row"] == name]
        found = [results[key] for key in wanted if key in results]
        if not found or "note" in found[0]:
            lines.append(
                f"| {ROWS[name].title} | {found[0]['note'] if found else 'no run'} |" + " |" * 7
            )
            continue
        ends, tests = [r["curve"][-1] for r in found], [r["test"] for r in found]
        steps = [
            [
                next((p["step"] for p in r["curve"] if p["exact_match"] >= goal), math.inf)
                for r in found
            ]
            for goal in (50, 90)
        ]
        lines.append(
            "| "
            + " | ".join(
                [
                    ROWS[name].title
                    + f" [{len(found)} of {len(wanted)} seeds]" * (len(found) < len(wanted)),
                    cell([m["exact_match"] for m in ends]),
                    cell([m["exact_match"] for m in tests]),
                    cell([m["bleu4"] for m in tests]),
                    cell([m.get("shuffled_bleu4", math.nan) for m in tests]),
                    cell([m.get("dev_loss", math.nan) for m in ends], 3),
                    cell(steps[0], 0),
                    cell(steps[1], 0),
                    cell([r["seconds"] for r in found], 0),
                ]
            )
            + " |"
        )
    return "\n".join(lines)


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
