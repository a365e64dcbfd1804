"""From batches to a loss or to text: front-end, mT5, and the vocabulary between ids and strings.

    body (B, T, 9, 3), left, right (B, T, 21, 3)
    -> hand_features   each hand at its own scale, the left one flipped, with its bones
    -> part_features   each joint's place, confidence and velocity, flattened: no joint is lost
    -> pose_embed      features less their means: a linear layer for the body, one for both hands
    -> fusion          the three parts of a frame together
    -> proj            temporal_stride frames -> one input position of mT5
    -> temporal        residual convolutions over time, padding masked; layer_norm, position
    -> mT5 encoder     -> [CTC on glosses] -> mT5 decoder -> loss or text

B clips, T frames, T' = ceil(T / temporal_stride) positions, V joints; a text has L pieces (tokens)
of those that the vocabulary has;
mask: 1 = real, 0 = padding.
"""

import json
import math
import re
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import sentencepiece
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save
from torch import nn
from transformers import Cache, MT5Config, MT5ForConditionalGeneration, T5Tokenizer

from config_lite import DEFAULT_MT5, ConfigError, InferenceConfig, TrainConfig, make_config
from datasets_lite import (
    BODY,
    LEFT,
    LEFT_WRIST,
    RIGHT_WRIST,
    DataError,
    naming,
    normalise,
    refuse_pointer,
)

IGNORE = -100  # label of padding
BLANK = 0  # CTC classes: these two, as torch has it, then the glosses
UNKNOWN_GLOSS = 1
TABLES = ("shared.weight", "lm_head.weight")  # of mT5: a row a piece
# what is taken over of a saved mT5's configuration; other keys name code that a hub would give
MT5_SIZES = """vocab_size d_model d_kv d_ff num_heads num_layers num_decoder_layers dropout_rate
layer_norm_epsilon feed_forward_proj relative_attention_num_buckets"""


# ------------------------------------------------------------------------------- front-end


def part_features(part):
    """(B, T, V, 3) -> (B, T, 5 V): x, y, confidence and velocity, joint by joint.

    A velocity stands only where the joint was seen in this frame and in the one before: it never
    jumps a gap.
    """
    xy, confidence = part.split([2, 1], -1)  # (B, T, V, 2), (B, T, V, 1)
    seen = confidence > 0  # (B, T, V, 1)
    seen_twice = seen[:, 1:] & seen[:, :-1]  # (B, T - 1, V, 1)
    velocity = torch.zeros_like(xy)  # (B, T, V, 2); the first frame has none
    velocity[:, 1:] = xy.diff(dim=1) * seen_twice
    return torch.cat([xy, confidence, velocity], -1).flatten(2)  # (B, T, 5 V)


def bones(hand):
    """(B, T, 21, 3) -> (B, T, 40): each joint's place from the joint before, where both were seen.

    Along a finger, then from its tip to the next one's root. A hand's shape shows in them more than
    in places, which all move where the hand turns: fewer errors from two takes a sign
    (tests/RESULTS.md, "Bones"). Not for the body: its proportions are the person's.
    """
    seen = hand[..., 2:] > 0  # (B, T, 21, 1)
    both_seen = seen[:, :, 1:] & seen[:, :, :-1]  # (B, T, 20, 1)
    return (hand[..., :2].diff(dim=2) * both_seen).flatten(2)  # (B, T, 40)


def hand_features(hand, wrist):
    """hand (B, T, 21, 3), the body's wrist (B, T, 3) -> (B, T, 148): the shape, then its place.

    As load_part_kp gives it a hand is over the body's box, and small: its shape is divided by its
    root mean square distance from its own first joint over the clip.
    """
    xy, confidence = hand.split([2, 1], -1)  # (B, T, 21, 2), (B, T, 21, 1)
    joints = (confidence > 0).sum((1, 2, 3), keepdim=True)  # (B, 1, 1, 1); the others are zero
    # of length 1 over the whole clip, then of root mean square 1; jitter alone stays small
    xy = F.normalize(xy, dim=(1, 2, 3), eps=0.02) * joints.sqrt()  # (B, T, 21, 2)
    hand = torch.cat([xy, confidence], -1)  # (B, T, 21, 3)
    return torch.cat([part_features(hand), bones(hand), wrist], -1)  # (B, T, 148)


def pose_features(src_input):
    """A batch -> body (B, T, 45), hands (2 B, T, 148): all left ones, then all right ones."""
    body = src_input["body"]  # (B, T, 9, 3)
    # of the left hand x: the layer that both share sees like shapes
    flip = body.new_tensor([-1.0, 1.0, 1.0])  # (3,)
    left = hand_features(src_input["left"] * flip, body[:, :, LEFT_WRIST] * flip)  # (B, T, 148)
    right = hand_features(src_input["right"], body[:, :, RIGHT_WRIST])  # (B, T, 148)
    return part_features(body), torch.cat([left, right])  # (B, T, 45), (2 B, T, 148)


class CentredLinear(nn.Linear):
    """A linear layer over 2 (x - mean): the mean over training clips, at first 0.

    What is always there, such as where a shoulder lies, is larger than what changes; with it in the
    input, training begins by learning to leave it out. Not over each feature's own deviation: that
    did worse with people whom training has not seen (tests/RESULTS.md, "Learning sooner").
    """

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.register_buffer("mean", torch.zeros(in_features))

    def forward(self, x):
        """x (..., in_features) -> (..., out_features)."""
        # deviations are mostly below a half: twice as much is nearer to 1
        return super().forward(2 * (x - self.mean))


class TemporalBlock(nn.Module):
    """x + a convolution over 5 positions of norm(x); beyond a clip's end it reads zeros."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)  # per position: padding and other clips do not count
        self.conv = nn.Conv1d(width, width, kernel_size=5, padding=2)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, mask):
        """x (B, T', width), mask (B, T', 1) -> (B, T', width)."""
        h = self.norm(x) * mask
        h = self.conv(h.mT).mT  # over (B, width, T') -> (B, T', width)
        return x + self.dropout(self.linear(F.gelu(h)))


class SinusoidalPositionalEncoding(nn.Module):
    """Adds Vaswani et al.'s sinusoids, learnt vectors, or nothing, to x (B, T', d_model)."""

    def __init__(self, d_model, max_length, kind="sinusoidal"):
        super().__init__()
        position = torch.arange(max_length)[:, None]  # (max_length, 1)
        angle = position * 10000 ** (-torch.arange(0, d_model, 2) / d_model)
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)  # (max_length, d_model)
        if kind == "none":
            table.zero_()
        if kind == "learned":
            self.table = nn.Parameter(0.02 * torch.randn_like(table))
        else:
            self.register_buffer("table", table, persistent=False)

    def forward(self, x, begin=0):
        """begin: the place of x's first position; begin + T' <= max_length."""
        return x + self.table[begin : begin + x.shape[1]]


# ------------------------------------------------------------------------------- the model


class SignLanguageLite(nn.Module):
    """Pose keypoints -> front-end -> mT5 -> text.

    texts and glosses (a list a clip) are the training data's: the one makes the vocabulary from
    scratch and trims a pretrained one, the other sizes the CTC head. Raises ConfigError for an
    unusable mt5_path. saved, to rebuild: config.json's "model", and the tokeniser's "folder".
    """

    def __init__(self, config, texts=None, glosses=None, saved=None):
        super().__init__()
        self.config = config

        # text: the vocabulary and mT5
        self.codec = make_codec(config, texts, saved)
        self.mt5_tokenizer = self.codec.tokenizer
        self.mt5_model = build_mt5(config, self.codec, saved)
        d_model = self.mt5_model.config.d_model
        # of the training data: the longest text, in pieces, and all glosses
        self.longest_text = config.max_text_length
        self.glosses = []
        if texts:
            self.longest_text = self.codec.encode(texts).shape[1]
        if config.ctc_weight and glosses:
            words = set()
            for gloss in glosses:
                words.update([gloss] if isinstance(gloss, str) else gloss)
            self.glosses = sorted(words)
        if saved:
            self.longest_text = int(saved["longest_text"])
            self.glosses = sorted(saved["glosses"])

        # poses: from joints to mT5's input
        self.pose_embed = nn.ModuleDict(
            {
                "body": CentredLinear(5 * len(BODY), d_model),
                # joints, bones, wrist
                "hand": CentredLinear(5 * len(LEFT) + 2 * 20 + 3, d_model),
            }
        )
        self.fusion = nn.Linear(3 * d_model, d_model)
        self.proj = nn.Linear(config.temporal_stride * d_model, d_model)
        self.temporal = nn.ModuleList([TemporalBlock(d_model), TemporalBlock(d_model)])
        self.layer_norm = nn.LayerNorm(d_model)
        positions = math.ceil(config.max_length / config.temporal_stride)
        self.position = SinusoidalPositionalEncoding(d_model, positions, config.position_encoding)
        if not config.mt5_path:  # a pretrained decoder is given what it knows
            self.piece_position = SinusoidalPositionalEncoding(d_model, 2 * config.max_text_length)
            self.mt5_model.decoder.register_forward_pre_hook(self._number_pieces, with_kwargs=True)
        self.gloss_head = None
        if self.glosses:
            self.gloss_head = nn.Linear(d_model, 2 + len(self.glosses))

        self._init_weights()
        # not reentrant: the frozen blocks' inputs need no gradient
        if config.gradient_checkpointing:
            self.mt5_model.gradient_checkpointing_enable({"use_reentrant": False})
        if not saved:  # to use; a run that goes on comes this way, too
            self._freeze_mt5_layers()

    def _init_weights(self):
        """New linear layers start at Glorot's scale with zero biases, as in the original."""
        for layer in [*self.pose_embed.values(), self.fusion, self.proj, self.gloss_head]:
            if layer is not None:  # without CTC there is no gloss_head
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.constant_(self.layer_norm.weight, 0.5)  # at 1 the poses drown the position, RMS 0.7

    def _freeze_mt5_layers(self):
        """Choose what of mT5 trains (review, step 1); the front-end always does. Idempotent."""
        mt5 = self.mt5_model
        # 1) all of mT5 trains: poses are not text, so the encoder must adapt; always so head and
        # final norms
        mt5.requires_grad_(True)
        if self.config.mt5_path:  # from scratch there is no language to keep
            # 2) the first decoder blocks keep their language
            depth = self.config.freeze_decoder_layers
            blocks = mt5.decoder.block
            blocks[:depth].requires_grad_(False)
            if depth > len(blocks):
                print(
                    f"warning: freeze_decoder_layers is {depth}: all {len(blocks)} decoder blocks "
                    "are frozen"
                )
            # 3) the table of pieces, which encoder and decoder share
            mt5.shared.requires_grad_(self.config.train_embedding)
        self._print_parameters()

    def _print_parameters(self):
        """A line a part of mT5: its parameters, the shared table among them, and what trains."""
        for name, part in [*self.mt5_model.named_children(), ("all", self)]:
            total = sum(p.numel() for p in part.parameters())
            trainable = sum(p.numel() for p in part.parameters() if p.requires_grad)
            print(f"  {name:14} {total:>13,} parameters, {trainable:>13,} trainable")

    @torch.no_grad()
    def centre(self, src_input):
        """Take each pose feature's mean from these clips: before training, on their device."""
        body, hands = pose_features(src_input)
        real = src_input["attention_mask"].bool()  # (B, T)
        self.pose_embed["body"].mean = body[real].mean(0)  # (45,)
        self.pose_embed["hand"].mean = hands[real.repeat(2, 1)].mean(0)  # (148,)

    def encode_pose(self, src_input):
        """-> embeddings (B, T', d_model), mask (B, T'). Raises ConfigError beyond max_length."""
        mask = src_input["attention_mask"]  # (B, T)
        B, T = mask.shape
        stride = self.config.temporal_stride
        if self.config.max_length < T:
            raise ConfigError(
                f"a clip has {T} frames, more than the model's max_length {self.config.max_length}"
                ": sample it down (sample_frames does)"
            )

        # joints -> one vector a part; both hands in one call: they share the layer
        body, hands = pose_features(src_input)  # (B, T, 45), (2 B, T, 148)
        body = self.pose_embed["body"](body)  # (B, T, d_model)
        hands = self.pose_embed["hand"](hands)  # (2 B, T, d_model)

        # parts -> one vector a frame
        parts = torch.cat([body, *hands.chunk(2)], -1)  # (B, T, 3 d_model)
        x = self.fusion(F.gelu(parts))  # (B, T, d_model)

        # frames -> input positions of mT5, which see their neighbours in time
        x = F.pad(x * mask[..., None], (0, 0, 0, -T % stride))  # (B, T' stride, d_model)
        x = self.proj(x.reshape(B, -1, self.proj.in_features))  # (B, T', d_model)
        mask = mask[:, ::stride]  # (B, T')
        for block in self.temporal:
            x = block(x, mask[..., None])  # (B, T', d_model)
        x = self.layer_norm(x)  # (B, T', d_model)
        return self.position(x), mask

    def forward(self, src_input, tgt_input):
        """One batch -> loss (differentiated, per target token), nll (the plain one, detached),
        num_tokens, num_correct, gloss (what CTC reads, in eval mode).

        Labels that are absent are made of gt_sentence; CTC reads gt_gloss.
        """
        embeddings, mask = self.encode_pose(src_input)  # (B, T', d_model), (B, T')
        labels = tgt_input.get("labels")
        if labels is None:
            labels = self.codec.encode(tgt_input["gt_sentence"])
        labels = labels.to(embeddings.device)  # (B, L)
        # mT5 shifts the decoder's input to the right; the labels stay: a second shift would train
        # every output on the token after next
        output = self.mt5_model(inputs_embeds=embeddings, attention_mask=mask, labels=labels)
        loss = output.loss  # a mean over tokens; padding does not count
        logits = output.logits.mT  # (B, pieces, L)
        smoothing = self.config.label_smoothing
        if smoothing:
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        tokens = int((labels != IGNORE).sum())
        gloss = None
        if self.gloss_head is not None:
            hidden = output.encoder_last_hidden_state  # (B, T', d_model)
            scores = self.gloss_head(hidden).float().log_softmax(-1)  # (B, T', classes)
            if self.training:
                ctc = self._ctc_loss(scores, mask, tgt_input["gt_gloss"])
                # over text tokens, as the rest: `micro_batch` multiplies by them again
                loss = loss + self.config.ctc_weight * ctc / tokens
            else:
                gloss = self._read_gloss(scores, mask)
        return SimpleNamespace(
            loss=loss,
            nll=output.loss.detach(),
            num_tokens=tokens,
            num_correct=int((logits.argmax(1) == labels).sum()),
            gloss=gloss,
        )

    @torch.no_grad()
    def generate(self, src_input, **decoding):
        """-> list of B texts; decoding: fields of InferenceConfig.

        No text grows beyond 5/4 of the longest training text.
        """
        options = asdict(InferenceConfig(**decoding))
        # a word repeated without end would spoil a whole split's BLEU
        options["max_new_tokens"] = min(options["max_new_tokens"], self.longest_text * 5 // 4 + 1)
        embeddings, mask = self.encode_pose(src_input)  # (B, T', d_model), (B, T')
        rows = self.mt5_model.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            do_sample=False,
            **options,
        )  # (B, L)
        return self.codec.decode(rows)

    def _number_pieces(self, decoder, args, inputs):
        """Add positions to the decoder's input: T5's relative bias alone loses count of repeats.

        A hook before the decoder; the cache tells how many pieces went before, under whatever name
        this version of transformers gives it.
        """
        begin = 0
        for value in inputs.values():
            if isinstance(value, Cache):
                begin = value.get_seq_length()
        pieces = decoder.embed_tokens(inputs.pop("input_ids"))  # (B, L, d_model)
        inputs["inputs_embeds"] = self.piece_position(pieces, begin)
        return args, inputs

    def _ctc_loss(self, scores, mask, glosses):
        """scores (B, T', classes) -> negative log-likelihood, summed over clips with glosses.

        A clip with fewer positions than its glosses need adds nothing: it learns from its text.
        """
        classes = {word: i for i, word in enumerate(self.glosses, 2)}
        # one clip's behind another's
        targets = [classes.get(word, UNKNOWN_GLOSS) for gloss in glosses for word in gloss]
        lengths = mask.sum(1).long()  # (B,)
        target_lengths = lengths.new_tensor(list(map(len, glosses)))  # (B,)
        losses = F.ctc_loss(
            scores.transpose(0, 1),  # (T', B, classes)
            lengths.new_tensor(targets),
            lengths,
            target_lengths,
            reduction="none",
            zero_infinity=True,
        )  # (B,)
        return losses[target_lengths > 0].sum()

    def _read_gloss(self, scores, mask):
        """scores (B, T', classes) -> glosses, a list a clip: the best path, collapsed."""
        names = ["", "<unknown>", *self.glosses]
        found = []
        for best, real in zip(scores.argmax(-1), mask.bool()):  # (T',) each
            path = torch.unique_consecutive(best[real]).tolist()
            found.append([names[i] for i in path if i != BLANK])
        return found

    # --- there and back: weights, and a folder that holds a whole model ---

    def state_to_save(self):
        """Tensors by name, the shared table once; they are the model's own."""
        state = {name: value.detach() for name, value in self.named_parameters()}
        # with the features' means
        return state | self.pose_embed.state_dict(prefix="pose_embed.")

    def load_saved(self, state):
        """Load what `state_to_save` gave. DataError where names, shapes or types differ."""
        wrong = outline(self.state_to_save()) ^ outline(state)
        if wrong:
            raise DataError(f"the saved weights do not fit the configuration: {min(wrong)}")
        # strict would miss the stacks' names of the shared table; a sketch has nothing to copy to
        self.load_state_dict(state, strict=False, assign=self.layer_norm.weight.is_meta)

    def init_from(self, folder):
        """Start from another run: same-shaped layers are copied, shared pieces keep their rows.

        Poses are then centred on this run's own clips (`centre`).
        """
        other = SignLanguageLite.from_pretrained(folder)
        if other.glosses != self.glosses:
            other.gloss_head = None  # maybe of the same shape, but of other classes
        # by name: both models are built of the same layers
        source = other.state_to_save()
        # pieces are matched by their strings: rows differ between vocabularies
        rows = torch.tensor([other.codec.row.get(piece, -1) for piece in self.codec.pieces])
        known = rows >= 0
        anew = []
        for name, value in self.state_to_save().items():
            given = source.get(name)
            if name.endswith(TABLES) and given.shape[1] == value.shape[1]:
                value[known] = given[rows[known]]
            elif given is None or given.shape != value.shape:
                anew.append(name)
            else:
                value.copy_(given)
        print(
            f"weights from {folder}: {known.sum()} of {len(self.codec)} pieces known; "
            f"begun anew: {', '.join(anew) or 'nothing'}"
        )

    def save_pretrained(self, folder, **more):
        """Write a folder that `from_pretrained` reads; `more` goes into its config.json, too."""
        self.mt5_tokenizer.save_pretrained(folder)
        content = asdict(self.config) | more
        content["model"] = {
            "mt5_config": self.mt5_model.config.to_diff_dict(),
            "keep_pieces": self.codec.keep,
            "glosses": self.glosses,
            "longest_text": self.longest_text,
        }
        Path(folder, "config.json").write_bytes(to_json(content).encode())
        # written here, as the umask says: safetensors' own files are the owner's alone
        Path(folder, "model.safetensors").write_bytes(save(self.state_to_save()))

    @classmethod
    def from_pretrained(cls, folder):
        """A run's model, in eval mode, from its folder or best/. DataError names what is amiss."""
        folder = find_best(folder)
        with naming(folder, "damaged; copy it anew"):
            content = json.loads((folder / "config.json").read_bytes())
            config = make_config(TrainConfig, content)
            saved = content["model"] | {"folder": folder}
            weights = load_weights(folder)
            sizes = saved["mt5_config"]
            if sizes["num_layers"] + sizes["num_decoder_layers"] > len(weights):
                raise DataError("config.json has more blocks than model.safetensors has weights")
            # a sketch takes no memory: absurd sizes are found before they are made
            with torch.device("meta"):
                cls(config, saved=saved).load_saved(weights)
            model = cls(config, saved=saved)
            model.load_saved(weights)
        return model.eval()


def to_json(content):
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def outline(state):
    """What two states have in common of which the one can be loaded for the other."""
    return {f"{name} {list(value.shape)} {value.dtype}" for name, value in state.items()}


def find_best(path):
    """A run's folder, or its best/ -> where the model is. Raises DataError.

    A crash between two renames leaves best.old, which is as good.
    """
    path = Path(path)
    for folder in (path / "best", path / "best.old", path, Path(f"{path}.old")):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise DataError(
        f"{path}: no config.json and model.safetensors there or in best/; name a run's folder"
    )


# ------------------------------------------------------------------------------- text <-> ids


class TextCodec:
    """Texts <-> label ids, which are rows of the model's tables.

    keep: the tokeniser's ids that have a row, ascending; none given = all. pieces: their strings;
    row: a piece's row, by its string. Nowhere else are the two kinds of ids mapped.
    """

    def __init__(self, tokenizer, max_text_length, keep=None):
        self.tokenizer = tokenizer
        self.max_text_length = max_text_length
        self.keep = keep or list(range(len(tokenizer)))
        self.pieces = tokenizer.convert_ids_to_tokens(self.keep)
        self.row = {piece: row for row, piece in enumerate(self.pieces)}
        self.unknown = self.row[tokenizer.unk_token]

    def __len__(self):
        return len(self.keep)

    def ids(self, text):
        """Rows for one text, with the end, not cut; a piece without a row is spelled."""
        rows = []
        # normalised here, too: transformers' own normaliser leaves what is written in two marks
        ids = self.tokenizer(normalise(text)).input_ids
        for piece in self.tokenizer.convert_ids_to_tokens(ids):
            spelled = [piece] if piece in self.row else list(piece)  # '▁' among its characters
            rows += [self.row.get(part, self.unknown) for part in spelled]
        return rows

    def encode(self, texts):
        """Texts -> labels (B, L), cut at max_text_length with the end kept, padded with -100."""
        labels = []
        for text in texts:
            *rows, end = self.ids(text)
            # without its end a text would teach never to stop
            labels.append(torch.tensor([*rows[: self.max_text_length - 1], end]))
        return nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)

    def decode(self, rows):
        """Rows (B, L) -> texts without special pieces."""
        ids = torch.tensor(self.keep)[rows.cpu()]  # (B, L)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return list(map(str.strip, texts))


def make_codec(config, texts, saved=None):
    """A TextCodec: as saved, of a pretrained mT5, or learnt on texts. Raises ConfigError."""
    keep = None
    if saved:
        tokenizer = T5Tokenizer.from_pretrained(saved["folder"], extra_ids=0)
        keep = saved["keep_pieces"]
        if keep[-1] >= len(tokenizer):  # transformers makes up 3 pieces where files are missing
            raise DataError("the tokeniser's files are missing, or another model's")
    elif config.mt5_path:
        folder = mt5_folder(config.mt5_path)
        with naming(f"mt5_path {config.mt5_path}", "not a readable mT5", ConfigError):
            tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0)
        keep = pieces_to_keep(tokenizer, texts if config.trim_vocabulary else None)
    elif texts:
        tokenizer = train_tokenizer(texts, config.vocab_size)
    else:
        raise ConfigError(
            "mt5_path is '', so the vocabulary is learnt from the training texts: give them to "
            "SignLanguageLite (texts=[...]), or set mt5_path"
        )
    return TextCodec(tokenizer, config.max_text_length, keep)


def train_tokenizer(texts, vocab_size):
    """A SentencePiece vocabulary learnt on these texts, normalised as mT5's.

    Every character is a piece, and at most vocab_size longer ones, one per 400 characters: a rarer
    one would be learnt from few clips.
    """
    longer = min(vocab_size, sum(map(len, texts)) // 400)
    characters = set("".join(map(normalise, texts)))
    what = "could not be learnt; is the disk full?"
    with naming("vocabulary", what, ConfigError), tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=f"{folder}/spiece",
            vocab_size=len(characters) + 5 + longer,
            hard_vocab_limit=False,  # a tiny corpus may not fill it
            character_coverage=1.0,
            max_sentence_length=2**24,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        return T5Tokenizer.from_pretrained(folder, extra_ids=0)


def pieces_to_keep(tokenizer, texts=None):
    """The tokeniser's ids, ascending, that these texts use, and what spells any other.

    That is pad, end, unknown, bytes, and all single characters; no texts = all; never mT5's
    sentinels: what has no row cannot be emitted.
    """
    used = set(tokenizer.all_special_ids)  # pad, end and unknown
    if texts:
        used.update(*tokenizer(list(map(normalise, texts))).input_ids)
    keep = []
    for piece, piece_id in tokenizer.get_vocab().items():
        # single characters, with or without the space before them, and bytes spell what is not kept
        spells = re.fullmatch("(?s)▁?.?|<0x..>", piece)
        # never a sentinel of mT5's pre-training
        if "<extra_id_" not in piece and (spells or not texts or piece_id in used):
            keep.append(piece_id)
    return sorted(keep)


# ------------------------------------------------------------------------------- mT5, three ways


def build_mt5(config, codec, saved):
    """mT5 with its head untied: as saved but for the weights, pretrained, or from scratch."""
    if saved:
        sizes = {name: saved["mt5_config"][name] for name in MT5_SIZES.split()}
        return untied_mt5(MT5Config(**sizes))
    if config.mt5_path:
        return pretrained_mt5(config.mt5_path, codec)
    mt5 = untied_mt5(
        MT5Config(
            vocab_size=len(codec),
            d_model=config.d_model,
            d_kv=32,
            num_heads=config.d_model // 32,
            d_ff=2 * config.d_model,
            num_layers=config.num_layers,  # of the decoder, too
        )
    )
    # mT5 draws its head with deviation 1: the first loss is then 15, where ln(pieces) is 4
    nn.init.normal_(mt5.lm_head.weight, std=config.d_model**-0.5)
    return mt5


def untied_mt5(mt5_config):
    """A new mT5. Its head is its own table; transformers 5 silently ties it to the input's."""
    mt5 = MT5ForConditionalGeneration(mt5_config)
    # said in the config, too, so that no later call ties them again
    mt5.config.tie_word_embeddings = False
    mt5.lm_head.weight = nn.Parameter(mt5.shared.weight.detach().clone())
    # where transformers did not tie, each stack has a table of its own
    mt5.set_input_embeddings(mt5.shared)
    return mt5


def pretrained_mt5(path, codec):
    """The weights of an mT5 folder; of the two large tables only the rows that stay."""
    folder = mt5_folder(path)
    with naming(f"mt5_path {path}", "not a readable mT5", ConfigError):
        weights = load_weights(folder)
        if "lm_head.weight" not in weights or len(weights["shared.weight"]) <= codec.keep[-1]:
            raise ConfigError(
                f"mt5_path {path}: not an mT5: its head is tied to the piece table, or that has "
                "fewer rows than the vocabulary has pieces"
            )
        # built small: the model never has the full tables
        for name in TABLES:
            weights[name] = weights[name][codec.keep]  # (pieces, d_model)
        mt5 = untied_mt5(MT5Config.from_pretrained(folder, vocab_size=len(codec)))
        # the shared table once, by its own name
        state = {name: weights[name] for name, _ in mt5.named_parameters()}
        mt5.load_state_dict(state, strict=False)
    return mt5


def load_weights(folder):
    """Name -> tensor, from the folder's weight files; mapped: what nobody reads takes no memory."""
    weights = {}
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        refuse_pointer(path)
        if path.suffix == ".safetensors":
            weights |= load_file(path)
        else:
            mapped = zipfile.is_zipfile(path)  # what torch wrote before 1.6 cannot be
            weights |= torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return weights


def mt5_folder(path):
    """mt5_path -> a folder with vocabulary, config and weights, downloaded where it is a hub name.

    Raises ConfigError where one is missing: transformers would make up a vocabulary of 3 pieces.
    """
    folder = Path(path)
    advice = "download google/mt5-small and name its folder, or train from scratch: --mt5_path ''"
    needed = [
        ["config.json"],
        ["spiece.model", "tokenizer.json"],
        ["*.safetensors", "pytorch_model*.bin"],
    ]
    beside = Path(__file__).with_name("pretrained_weight") / "mt5-small"  # the original's place
    if path == DEFAULT_MT5 and beside.is_dir():
        folder = beside
    if not folder.is_dir():
        what = f"no such folder, and the hub did not give it; {advice}"
        with naming(f"mt5_path {path}", what, ConfigError):
            folder = Path(snapshot_download(path, allow_patterns=sum(needed, [])))
    for names in needed:
        if not any(list(folder.glob(name)) for name in names):
            raise ConfigError(f"mt5_path {path}: no {' or '.join(names)} there; {advice}")
    return folder
