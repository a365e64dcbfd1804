"""Patches of the product: a fault of the original put back, or a choice taken out.

The product has no switch for bugs. A patch takes the place of one function for this process, and
`prove` fails the run where it changes nothing.
"""

import math
import unicodedata

import torch
import torch.nn.functional as F
from common import BODY_BONES, HAND_BONES, PROOFS, NotApplicable, count_clips, note, prove
from sacrebleu.metrics import BLEU
from torch import nn

import datasets_lite
import models_lite
import train_lite
from datasets_lite import BODY, LEFT
from models_lite import IGNORE, SignLanguageLite, part_features


def instead_of(owner, name):
    """A patch of the function below: it takes owner.name's place, the right one as its first
    argument.
    """

    def decorate(function):
        def patch():
            right = getattr(owner, name)
            setattr(owner, name, lambda *arguments, **more: function(right, *arguments, **more))

        return patch

    return decorate


# ---------------------------------------------------------------------- faults put back


@instead_of(models_lite, "text_loss")
def shift_labels_again(right, logits, labels, *rest):
    """T5 has shifted its decoder's input; the output at t is nevertheless compared with token t +
    1.
    """
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
    """Encoder blocks 4-5 and decoder blocks 3-5 of 8, the two final norms and the head; nothing
    else.

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
    """Patches: one 3 -> width layer for all joints, two convolutions over time, the mean over
    joints.

    No adjacency; BatchNorm counts padding. The original's width is 64, beside a d_model of 512.
    Stride, norm
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
    """The original steps its schedule after an epoch: the first has the full rate, then warm-up
    begins.
    """
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
    """An epoch's last, short window is not stepped; its gradient goes into the next epoch's first
    step.
    """
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
            # the original divides by the micro-batches of a whole window, so a tail weighs its
            # share of one
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
    note("texts change under NFKC")
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
    """Features (B, T, V * C + rest) -> two graph layers over the bones, joints kept -> (B, T,
    d_model).
    """

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
    for part, edges, joints in (("body", BODY_BONES, len(BODY)), ("hand", HAND_BONES, len(LEFT))):
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
    """LayerNorm starts at 1, its default: the poses are then as large beside the position as they
    come.
    """
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
