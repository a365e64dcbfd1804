"""Patches of the product: the first half puts faults back, the second takes choices out.

The product has no switch for bugs. A patch is a function without arguments; calling it changes the
product in this process, for good. Most come from `instead_of`: the function under it is called in
the place of the product's own, which it is given as its first argument. Each patch proves in its
run that it did something.
"""

import math
import unicodedata

import torch
import torch.nn.functional as F
from common import (
    BODY_BONES,
    HAND_BONES,
    NotApplicable,
    count_clips,
    count_parameters,
    note,
    prove,
)
from sacrebleu.metrics import BLEU
from torch import nn

import datasets_lite
import models_lite
import train_lite
from datasets_lite import BODY, LEFT
from models_lite import SignLanguageLite, bones, part_features


def instead_of(owner, name):
    """Make a patch of the function below: it takes the place of owner.name."""

    def decorate(function):
        def patch():
            products_own = getattr(owner, name)

            def replacement(*arguments, **options):
                return function(products_own, *arguments, **options)

            setattr(owner, name, replacement)

        return patch

    return decorate


# ---------------------------------------------------------------------- faults of the loss


@instead_of(SignLanguageLite, "_init_weights")
def shift_labels_again(products_own, model):
    """mT5 has shifted its decoder's input; yet the output at t is compared with token t + 1."""
    products_own(model)

    def compare_with_the_next(mt5, args, inputs, output):
        labels = inputs.get("labels")
        if labels is None:  # decoding
            return
        right_loss = output.loss
        # the output at t - 1 in the place of that at t; the first label is compared with none
        output.logits = F.pad(output.logits[:, :-1], (0, 0, 1, 0))  # (B, L, pieces)
        late = output.logits[:, 1:].flatten(0, 1)  # (B (L - 1), pieces)
        output.loss = F.cross_entropy(late, labels[:, 1:].flatten())
        prove("the loss is another", lambda: not torch.isclose(output.loss, right_loss))

    model.mt5_model.register_forward_hook(compare_with_the_next, with_kwargs=True)


# ---------------------------------------------------------------------- faults of freezing


def freezing(policy):
    """A patch after which policy(name, mt5) says whether a parameter of mT5 trains."""

    @instead_of(SignLanguageLite, "_freeze_mt5_layers")
    def freeze(products_own, model):
        total = 0
        trained = 0
        for name, parameter in model.mt5_model.named_parameters():
            trains = policy(name, model.mt5_model)
            parameter.requires_grad_(trains)
            total += parameter.numel()
            if trains:
                trained += parameter.numel()
        prove(f"{trained:,} of mT5's {total:,} parameters train", lambda: 0 < trained < total)

    return freeze


def original_policy(name, mt5):
    """Encoder blocks 4-5 and decoder blocks 3-5 of 8, the two final norms and the head train.

    In a model of another depth: the same share of the blocks, rounded up, at about the same height.
    Of 8 that gives the original's blocks; of 2, the upper one of each stack.
    """
    parts = name.split(".")  # encoder.block.4.layer..., encoder.final_layer_norm.weight, ...
    if parts[1] != "block":
        return "final_layer_norm" in name or name.startswith("lm_head")
    stack = parts[0]
    number = int(parts[2])
    if stack == "encoder":
        centre = 5 / 8
        share = 2 / 8
    else:
        centre = 4.5 / 8
        share = 3 / 8
    depth = len(getattr(mt5, stack).block)
    count = math.ceil(share * depth)
    first = round(centre * depth - count / 2)
    return first <= number < first + count


def head_only(name, mt5):
    return name.startswith("lm_head")


def all_but_encoder(name, mt5):
    return not name.startswith("encoder.")  # the table of pieces is mt5.shared: it trains


# ---------------------------------------------------------------------- the original's front-end


class OriginalFrontEnd(nn.Module):
    """One 3 -> width layer for all joints, two convolutions over time, the mean over joints.

    No adjacency; BatchNorm counts padding. The original's width is 64, beside a d_model of 512.
    Its stride is 1; here it may be the reference's.
    """

    def __init__(self, width, d_model, stride):
        super().__init__()
        self.stride = stride
        self.pose_embed = nn.Linear(3, width)
        self.body = self.make_stack(width)
        self.hand = self.make_stack(width)
        self.fusion = nn.Linear(3 * 4 * width, 8 * width)
        self.proj = nn.Linear(stride * 8 * width, d_model)

    @staticmethod
    def make_stack(width):
        """Twice: each joint by itself, then over three frames, then normalised."""
        layers = []
        for channels in (width, 2 * width):
            layers.append(nn.Conv2d(channels, 2 * channels, 1))
            layers.append(nn.Conv2d(2 * channels, 2 * channels, (3, 1), padding=(1, 0)))
            layers.append(nn.BatchNorm2d(2 * channels))
            layers.append(nn.ReLU())
        return nn.Sequential(*layers)

    def pool(self, part, stack):
        """part (B, T, V, 3) -> (B, 4 width, T), where no joint is told from another."""
        x = self.pose_embed(part).permute(0, 3, 1, 2)  # (B, width, T, V)
        return stack(x).mean(-1)  # (B, 4 width, T)

    def forward(self, src_input):
        """-> (B, T', d_model), before norm and position."""
        body = self.pool(src_input["body"], self.body)
        left = self.pool(src_input["left"], self.hand)
        right = self.pool(src_input["right"], self.hand)
        x = torch.cat([body, left, right], 1).transpose(1, 2)  # (B, T, 12 width)
        x = self.fusion(x)  # (B, T, 8 width)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.stride))  # T up to a multiple of the stride
        x = x.reshape(len(x), -1, self.stride * x.shape[-1])  # (B, T', stride * 8 width)
        return self.proj(x)  # (B, T', d_model)


def put_original_front_end(model, width):
    """Take the model's own front-end away; norm and position behind it stay. -> the new one."""
    del model.fusion, model.temporal, model.proj
    model.pose_embed = nn.ModuleDict()  # nothing to centre either, as in the original
    model.centre = lambda src_input: None
    stride = model.config.temporal_stride
    front_end = OriginalFrontEnd(width, model.mt5_model.config.d_model, stride)

    def encode_pose(src_input):
        x = model.layer_norm(front_end(src_input))  # (B, T', d_model)
        return model.position(x), src_input["attention_mask"][:, ::stride]

    model.front_end = front_end
    model.encode_pose = encode_pose
    return front_end


def original_front_end(width):
    """A patch that builds every model with the original's front-end."""

    @instead_of(SignLanguageLite, "_init_weights")
    def build(products_own, model):
        front_end = put_original_front_end(model, width)
        linears = [front_end.pose_embed, front_end.fusion, front_end.proj]
        if model.gloss_head is not None:
            linears.append(model.gloss_head)
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        front_end.register_forward_pre_hook(check_that_joints_are_lost)

    return build


def check_that_joints_are_lost(front_end, arguments):
    hand = arguments[0]["right"]  # (B, T, V, 3)

    def joints_are_lost():
        with torch.no_grad():
            straight = front_end.pool(hand, front_end.hand)
            exchanged = front_end.pool(hand.flip(2), front_end.hand)
        return torch.allclose(straight, exchanged, atol=1e-3)

    prove("joints exchanged give the same output", joints_are_lost)


# ---------------------------------------------------------------------- faults of the steps


@instead_of(train_lite, "make_optimizers")
def warm_up_late(products_own, model, config, steps, epoch, state):
    """The original's schedule waits for an epoch at the full rate; only then warm-up begins."""
    optimizers, schedulers = products_own(model, config, steps, epoch, state)
    begins_low = schedulers[0].get_last_lr()[0] < config.learning_rate
    prove(f"the first {epoch} steps run at the full rate", lambda: begins_low)

    def delay(factor):
        def delayed(step):
            if step < epoch:
                return 1.0
            return factor(step - epoch)

        return delayed

    for optimizer, scheduler in zip(optimizers, schedulers):
        scheduler.lr_lambdas = [delay(factor) for factor in scheduler.lr_lambdas]
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate
    return optimizers, schedulers


@instead_of(train_lite, "make_optimizers")
def leak_tail(products_own, model, config, steps, epoch, state):
    """An epoch's last, short window is not stepped; its gradient goes into the next step."""
    clips = count_clips(config)
    window = config.batch_size * config.gradient_accumulation
    tail = clips % window
    if tail == 0:
        raise NotApplicable(f"{clips} clips leave no tail at {window} a step")
    optimizers, schedulers = products_own(model, config, steps, epoch, state)
    leak = TailLeak(model, config.max_grad_norm, epoch, tail / window)
    optimizers[0].register_step_pre_hook(leak.before_step)  # the first to step
    return optimizers, schedulers


class TailLeak:
    """Keeps the gradient of an epoch's last window for the step after it."""

    def __init__(self, model, max_grad_norm, steps_per_epoch, share):
        self.model = model
        self.max_grad_norm = max_grad_norm or math.inf
        self.steps_per_epoch = steps_per_epoch
        self.share = share  # of a whole window
        self.steps = 0
        self.kept = []  # (parameter, gradient)

    def before_step(self, optimizer, arguments, options):
        self.steps += 1
        self.add_kept()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if self.steps % self.steps_per_epoch == 0:
            self.keep(parameters)

    def add_kept(self):
        if not self.kept:
            return
        prove("a tail's gradient is added to the next step's", self.any_kept)
        for parameter, gradient in self.kept:
            parameter.grad += gradient
        self.kept.clear()

    def any_kept(self):
        return any(gradient.any() for _, gradient in self.kept)

    def keep(self, parameters):
        for parameter in parameters:
            # the original divides by the micro-batches of a whole window: a tail weighs its share
            self.kept.append((parameter, parameter.grad * self.share))
            parameter.grad = None  # a parameter without a gradient is not stepped


# ---------------------------------------------------------------------- faults of score and padding


@instead_of(train_lite, "compute_metrics")
def score_raw_text(products_own, predictions, references, language="zh"):
    """Exact match and BLEU-4 of the strings as they are, only stripped."""
    if all(unicodedata.is_normalized("NFKC", text) for text in references):
        raise NotApplicable("NFKC changes no text of this corpus")
    note("texts change under NFKC")
    metrics = products_own(predictions, references, language)
    tokenize = "zh" if language == "zh" else "13a"
    predictions = [text.strip() for text in predictions]
    references = [text.strip() for text in references]
    equal = sum(found == wanted for found, wanted in zip(predictions, references))
    metrics["bleu4"] = BLEU(tokenize=tokenize).corpus_score(predictions, [references]).score
    metrics["exact_match"] = 100 * equal / len(references)
    return metrics


@instead_of(datasets_lite, "pad_poses")
def repeat_last_frame(products_own, poses):
    """Padding repeats a clip's last frame."""
    batch = products_own(poses)
    lengths = batch["src_length"].tolist()
    for part in ("body", "left", "right"):
        for clip, length in zip(batch[part], lengths):
            clip[length:] = clip[length - 1]
    return batch


class FrameBatchNorm(nn.BatchNorm1d):
    """BatchNorm over all frames of a batch, padded ones included."""

    def forward(self, x):
        flat = x.flatten(0, 1)  # (B * T, width)
        return super().forward(flat).view_as(x)  # (B, T, width)


@instead_of(models_lite, "TemporalBlock")
def read_padding(products_own, width):
    """BatchNorm counts padded frames, the convolutions read them."""
    block = products_own(width)
    block.norm = FrameBatchNorm(width)
    forward_with_mask = block.forward

    def forward(x, mask):
        padded = x[mask[..., 0] == 0]  # (padded frames, width)
        if len(padded):
            prove("padding holds frames and is read", padded.any)
        return forward_with_mask(x, torch.ones_like(mask))

    block.forward = forward
    return block


# ---------------------------------------------------------------------- choices: the front-end


class GraphEmbed(nn.Module):
    """Features (B, T, V * C + rest) -> two graph layers, joints kept -> (B, T, d_model).

    The layers mix a joint with its neighbours along the bones, and along links that are learnt.
    """

    def __init__(self, edges, joints, features, d_model, width=32):
        super().__init__()
        self.joints = joints
        self.rest = features % joints  # features of no joint: a hand's place
        bones = torch.eye(joints)
        for a, b in edges:
            bones[a, b] = 1
            bones[b, a] = 1
        degree = bones.sum(1).rsqrt()
        self.register_buffer("bones", degree[:, None] * bones * degree)  # (V, V)
        self.learnt = nn.Parameter(torch.zeros(2, joints, joints))  # not bones: a matrix a layer
        self.enter = nn.Linear(features // joints, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.leave = nn.Linear(joints * width + self.rest, d_model)

    def fit(self, x):
        """Features enter as they are."""

    def forward(self, x):
        x, rest = x.split([x.shape[-1] - self.rest, self.rest], -1)  # (B, T, V * C), (B, T, rest)
        h = self.enter(x.unflatten(-1, (self.joints, -1)))  # (B, T, V, width)
        for norm, layer, learnt in zip(self.norms, self.layers, self.learnt):
            h = h + F.gelu((self.bones + learnt) @ layer(norm(h)))  # (B, T, V, width)
        h = torch.cat([h.flatten(-2), rest], -1)  # (B, T, V * width + rest)
        return self.leave(h)  # (B, T, d_model)


@instead_of(SignLanguageLite, "_init_weights")
def graph_layers(products_own, model):
    """Graph layers in place of one linear layer on a part's flattened joints."""
    products_own(model)
    before = count_parameters(model.pose_embed)
    for part, edges, joints in (("body", BODY_BONES, BODY), ("hand", HAND_BONES, LEFT)):
        old = model.pose_embed[part]
        new = GraphEmbed(edges, len(joints), old.in_features, old.out_features)
        model.pose_embed[part] = new
    after = count_parameters(model.pose_embed)
    prove(
        f"{after:,} parameters embed the joints, {before:,} before",
        lambda: after != before,
    )


@instead_of(SignLanguageLite, "centre")
def no_centring(products_own, model, src_input):
    """Features enter as they are."""
    products_own(model, src_input)
    for layer in model.pose_embed.values():
        prove("a mean is not 0", lambda layer=layer: layer.mean.any())
        layer.mean.zero_()


@instead_of(models_lite, "TemporalBlock")
def no_convolution(products_own, width):
    """The temporal blocks stay, but each sees its own frame alone."""
    block = products_own(width)
    kernel = block.conv.kernel_size[0]
    prove(f"kernel {kernel} -> 1", lambda: kernel > 1)
    block.conv = nn.Conv1d(width, width, 1)
    return block


@instead_of(models_lite, "part_features")
def no_velocities(products_own, part):
    """Each frame's features are made as if it were a clip of its own."""
    frames = part.flatten(0, 1)[:, None]  # (B * T, 1, V, 3)
    alone = products_own(frames).view(*part.shape[:2], -1)  # (B, T, 5 V)
    prove("features differ", lambda: not torch.equal(alone, products_own(part)))
    return alone


@instead_of(models_lite, "bones")
def no_bones(products_own, hand):
    """A hand's joints have their places alone."""
    found = products_own(hand)
    prove("a bone is not 0", found.any)
    return torch.zeros_like(found)


@instead_of(datasets_lite, "move_body")
def body_in_its_box(products_own, body, rng):
    """Augmented clips keep the body's place."""
    moved = body.clone()
    products_own(moved, rng)
    prove("it moves", lambda: not torch.equal(moved, body))


@instead_of(models_lite, "hand_features")
def hands_in_body_scale(products_own, hand, wrist):
    """A hand's shape stays divided by the body's box, as load_part_kp gives it."""
    plain = torch.cat([part_features(hand), bones(hand), wrist], -1)  # (B, T, 148)

    def differs():
        return not torch.allclose(plain, products_own(hand, wrist))

    prove("features differ", differs)
    return plain


# ---------------------------------------------------------------------- choices: position


@instead_of(SignLanguageLite, "_init_weights")
def poses_at_unit_scale(products_own, model):
    """LayerNorm starts at 1, its default: poses beside the position are as large as they come."""
    products_own(model)
    weight = model.layer_norm.weight
    prove("the norm before the position starts at 1", lambda: weight.max() < 1)
    nn.init.ones_(weight)


@instead_of(SignLanguageLite, "_number_pieces")
def no_decoder_position(products_own, model, decoder, args, inputs):
    """The decoder tells its pieces' places by T5's relative bias alone."""

    def differs():
        _, numbered = products_own(model, decoder, args, dict(inputs))
        plain = decoder.embed_tokens(inputs["input_ids"])  # (B, L, d_model)
        return not torch.equal(numbered["inputs_embeds"], plain)

    prove("the decoder's input has no positions", differs)
    return args, inputs
