"""From batches to a loss or to text: pose features, front-end, mT5, and the vocabulary between ids and strings.

    body (B, T, 9, 3), left, right (B, T, 21, 3)
    -> part_features   each joint's place, confidence and velocity, flattened: no joint loses its identity
    -> pose_embed      one linear layer for the body, one that both hands share
    -> fusion          the three parts of a frame together
    -> temporal        residual convolutions over time, padding masked
    -> proj            temporal_stride frames -> one input position of mT5, layer_norm, absolute position
    -> mT5 encoder     -> [CTC on glosses] -> mT5 decoder -> loss or text

B clips, T frames, T' = ceil(T / temporal_stride) positions, V joints, L label pieces. attention_mask: 1 = real, 0 = padding.
"""
import json
import math
import tempfile
import unicodedata
from dataclasses import dataclass, fields
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import nn
from transformers import MT5Config, MT5ForConditionalGeneration, T5Tokenizer
from transformers.modeling_outputs import BaseModelOutput

import config_lite
from config_lite import ConfigError
from datasets_lite import BODY, LEFT, LEFT_WRIST, RIGHT_WRIST, DataError

IGNORE = -100  # label of padding
BLANK, UNKNOWN_GLOSS = 0, 1  # CTC classes before the glosses


# ---------------------------------------------------------------------------------------------- text <-> ids

class TextCodec:
    """Texts <-> label ids; where the vocabulary is trimmed, the tokeniser's ids are mapped here and nowhere else.

    keep: the tokeniser's ids that have a row in the model's tables, ascending; None = all of them.
    """

    def __init__(self, tokenizer, max_text_length, keep=None):
        self.tokenizer, self.max_text_length, self.keep = tokenizer, max_text_length, keep
        self.row = {piece_id: row for row, piece_id in enumerate(keep)} if keep else None
        self.unknown = self.row[tokenizer.unk_token_id] if keep else tokenizer.unk_token_id

    def __len__(self):
        return len(self.keep) if self.keep else len(self.tokenizer)

    def ids(self, text):
        """Rows of the model's tables for one text, end of sentence included, not cut."""
        ids = self.tokenizer(text).input_ids
        return ids if self.row is None else [row for piece_id in ids for row in self._spell(piece_id)]

    def _spell(self, piece_id):
        """A kept piece is its row; a cut one is spelled by its characters, or is the unknown piece."""
        if piece_id in self.row:
            return [self.row[piece_id]]
        vocabulary, characters = self._vocabulary(), self.tokenizer.convert_ids_to_tokens(piece_id)
        return [self.row.get(vocabulary.get(character), self.unknown) for character in characters]

    def _vocabulary(self):
        if not hasattr(self, "_pieces"):
            self._pieces = self.tokenizer.get_vocab()
        return self._pieces

    def encode(self, texts):
        """Texts -> labels (B, L), cut at max_text_length with the end of sentence kept, padded with -100."""
        rows = [torch.tensor(ids[:self.max_text_length - 1] + ids[-1:] if len(ids) > self.max_text_length else ids)
                for ids in map(self.ids, texts)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)

    def decode(self, rows):
        """Rows (B, L) -> texts without special pieces."""
        ids = [[self.keep[r] for r in row] if self.keep else row for row in rows.tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def pieces(self):
        """The string of each row."""
        return self.tokenizer.convert_ids_to_tokens(self.keep or list(range(len(self.tokenizer))))


def train_tokenizer(texts, vocab_size):
    """A SentencePiece vocabulary learnt on the training texts, normalised as mT5's: every character is a piece, and at
    most vocab_size longer ones, one per 400 characters of text, since a rare piece would be learnt from a few clips."""
    characters = set(unicodedata.normalize("NFKC", "".join(texts)))
    longer = min(vocab_size, sum(map(len, texts)) // 400)
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder) / "spiece.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=file, vocab_size=len(characters) + 5 + longer,
                hard_vocab_limit=False, character_coverage=1.0, byte_fallback=False,
                normalization_rule_name="nmt_nfkc", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
        return T5Tokenizer.from_pretrained(folder, extra_ids=0)


def pieces_to_keep(tokenizer, texts):
    """The tokeniser's ids that these texts, or texts in the same scripts, can need: special, used, bytes, characters."""
    keep = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    keep.update(piece_id for ids in tokenizer(list(texts)).input_ids for piece_id in ids)
    scripts = {_script(character) for text in texts for character in unicodedata.normalize("NFKC", text)}
    for piece, piece_id in tokenizer.get_vocab().items():
        bare = piece[1:] if piece[:1] == "▁" else piece
        is_byte = len(piece) == 6 and piece.startswith("<0x")
        if is_byte or not bare or len(bare) == 1 and _script(bare) in scripts:
            keep.add(piece_id)
    return sorted(keep)


def _script(character):
    """LATIN, CJK, ... for letters; the block of 256 code points for digits, punctuation and signs."""
    if character.isalpha():
        return unicodedata.name(character, "?").split()[0]
    return ord(character) >> 8


# ---------------------------------------------------------------------------------------------- front-end

class SinusoidalPositionalEncoding(nn.Module):
    """Adds Vaswani et al.'s fixed sinusoids to x (B, T, d_model); T may be at most max_length."""

    def __init__(self, d_model, max_length):
        super().__init__()
        position = torch.arange(max_length)[:, None]
        rate = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        table = torch.zeros(max_length, d_model)
        table[:, 0::2], table[:, 1::2] = torch.sin(position * rate), torch.cos(position * rate)[:, :d_model // 2]
        self.register_buffer("table", table, persistent=False)

    def forward(self, x):
        return x + self.table[:x.shape[1]]


class LearnedPositionalEncoding(nn.Module):
    """Adds one learnt vector a position to x (B, T, d_model)."""

    def __init__(self, d_model, max_length):
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(max_length, d_model))

    def forward(self, x):
        return x + self.table[:x.shape[1]]


class TemporalBlock(nn.Module):
    """x + convolution over 5 frames of norm(x); what the convolution reads beyond a clip's end is zero."""

    def __init__(self, width, dropout=0.1):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(width), nn.Conv1d(width, width, kernel_size=5, padding=2)
        self.linear, self.dropout = nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x, mask):
        """x (B, T, width), mask (B, T, 1) float -> (B, T, width)."""
        h = (self.norm(x) * mask).transpose(1, 2)
        return x + self.dropout(self.linear(F.gelu(self.conv(h).transpose(1, 2))))


def part_features(part):
    """(B, T, V, 3) -> (B, T, 5 V): each joint's x, y, confidence and velocity, joint by joint.

    A velocity stands only where the joint was seen in this frame and in the one before: it never jumps a gap.
    """
    xy, confidence = part[..., :2], part[..., 2:]
    seen = confidence > 0
    velocity = torch.zeros_like(xy)
    velocity[:, 1:] = (xy[:, 1:] - xy[:, :-1]) * (seen[:, 1:] & seen[:, :-1])
    return torch.cat([xy, confidence, velocity], dim=-1).flatten(2)


def hand_features(hand, wrist, mirror):
    """hand (B, T, 21, 3), the body's wrist (B, T, 3) -> (B, T, 108): the shape at its own scale, then its place.

    Relative to the body a hand's shape is a tenth of the box, so it is divided by its own root mean square distance
    from the wrist over the clip. The left hand is mirrored, so that the layer which both hands share sees like shapes.
    """
    seen = (hand[..., 2:] > 0).float()
    square = (hand[..., :2].square() * seen).sum((1, 2, 3)) / seen.sum((1, 2, 3)).clamp(min=1)
    own = 1 / square.sqrt().clamp(min=1e-3)
    flip = hand.new_tensor([-1.0, 1.0, 1.0]) if mirror else hand.new_ones(3)
    scale = torch.stack([own, own, torch.ones_like(own)], -1)[:, None, None]
    return torch.cat([part_features(hand * scale * flip), wrist * flip], dim=-1)


# ---------------------------------------------------------------------------------------------- the model

@dataclass
class LiteOutput:
    """loss is what is differentiated, per target token; nll the plain one, detached; gloss the CTC head's reading."""

    loss: torch.Tensor
    nll: torch.Tensor
    num_tokens: int
    num_correct: int
    gloss: list | None = None


class SignLanguageLite(nn.Module):
    """Pose keypoints -> front-end -> mT5 -> text.

    texts (training texts) are the vocabulary's source from scratch, and what a pretrained one is trimmed to; glosses
    (training gloss lists) size the CTC head. Raises ConfigError where mt5_path is not there, DataError for clips that
    CTC cannot align. `saved` is for `from_pretrained` alone.
    """

    def __init__(self, config, texts=None, glosses=None, saved=None):
        super().__init__()
        self.config, self.label_smoothing = config, config.label_smoothing
        self.mt5_tokenizer, self.mt5_model, keep = _saved_mt5(saved) if saved else _build_mt5(config, texts)
        self.codec = TextCodec(self.mt5_tokenizer, config.max_text_length, keep)
        d_model = self.mt5_model.config.d_model
        words = (w for g in glosses or [] for w in ([g] if isinstance(g, str) else g))
        self.glosses = saved["glosses"] if saved else sorted(set(words)) if config.ctc_weight else []

        self.pose_embed = nn.ModuleDict({"body": nn.Linear(5 * len(BODY), d_model),
                                         "hand": nn.Linear(5 * len(LEFT) + 3, d_model)})
        self.fusion = nn.Linear(3 * d_model, d_model)
        self.temporal = nn.ModuleList([TemporalBlock(d_model), TemporalBlock(d_model)])
        self.proj = nn.Linear(config.temporal_stride * d_model, d_model)
        self.layer_norm = nn.LayerNorm(d_model)
        positions = -(-config.max_length // config.temporal_stride)
        self.position = {"sinusoidal": SinusoidalPositionalEncoding, "learned": LearnedPositionalEncoding,
                         "none": lambda *_: nn.Identity()}[config.position_encoding](d_model, positions)
        self.gloss_head = nn.Linear(d_model, 2 + len(self.glosses)) if self.glosses else None
        self._init_weights()
        if config.gradient_checkpointing:
            self.mt5_model.gradient_checkpointing_enable({"use_reentrant": False})
        if not saved:
            self._freeze_mt5_layers()

    def _init_weights(self):
        """New linear layers start at Glorot's scale with zero biases, as in the original."""
        new = [*self.pose_embed.values(), self.fusion, self.proj] + [self.gloss_head] * bool(self.glosses)
        for layer in new:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _freeze_mt5_layers(self):
        """Choose what of mT5 trains (review, step 1), on parameters, and print a line a part. Idempotent."""
        mt5, depth = self.mt5_model, self.config.freeze_decoder_layers
        # 1) everything trains: poses are not text, so the whole encoder must adapt; head and norms always do
        for parameter in mt5.parameters():
            parameter.requires_grad_(True)
        if self.config.mt5_path:  # from scratch there is no language to keep
            # 2) the first decoder blocks keep their language
            for block in mt5.decoder.block[:depth]:
                block.requires_grad_(False)
            # 3) the table of pieces, which encoder and decoder share
            mt5.shared.weight.requires_grad_(self.config.train_embedding)
            if depth > len(mt5.decoder.block):
                print(f"warning: freeze_decoder_layers is {depth}, the decoder has {len(mt5.decoder.block)} blocks: "
                      "all are frozen")
        print(self.parameter_report(), flush=True)

    def parameter_report(self):
        """A line a part: name, parameters, trainable ones."""
        mt5 = self.mt5_model
        front = [p for name, p in self.named_parameters() if not name.startswith("mt5_model.")]
        parts = {"front-end": front, "piece table": [mt5.shared.weight],
                 "mT5 encoder": [p for n, p in mt5.encoder.named_parameters() if "embed_tokens" not in n],
                 "mT5 decoder": [p for n, p in mt5.decoder.named_parameters() if "embed_tokens" not in n],
                 "head": [mt5.lm_head.weight]}
        parts["all"] = [p for part in parts.values() for p in part]
        return "\n".join(f"  {name:12} {sum(p.numel() for p in part):>13,} parameters, "
                         f"{sum(p.numel() for p in part if p.requires_grad):>13,} trainable"
                         for name, part in parts.items())

    def encode_pose(self, src_input):
        """-> embeddings (B, T', d_model) for mT5's encoder, mask (B, T')."""
        body, left, right, mask = (src_input[key] for key in ("body", "left", "right", "attention_mask"))
        B, T = mask.shape
        if T > self.config.max_length:
            raise ValueError(f"a clip has {T} frames, more than max_length {self.config.max_length}: sample it down "
                             "(sample_frames does) or raise max_length")
        hands = torch.cat([hand_features(left, body[:, :, LEFT_WRIST], mirror=True),
                           hand_features(right, body[:, :, RIGHT_WRIST], mirror=False)])
        left, right = self.pose_embed["hand"](hands).chunk(2)  # both hands in one call
        parts = torch.cat([self.pose_embed["body"](part_features(body)), left, right], dim=-1)
        x, real = self.fusion(F.gelu(parts)), mask[..., None].to(parts.dtype)
        for block in self.temporal:
            x = block(x, real)
        stride = self.config.temporal_stride
        x = F.pad(x * real, (0, 0, 0, -T % stride))
        x = self.layer_norm(self.proj(x.reshape(B, -1, stride * x.shape[-1])))
        return self.position(x), mask[:, ::stride]

    def _encode(self, src_input):
        """-> hidden states (B, T', d_model) of mT5's encoder, mask (B, T')."""
        embeddings, mask = self.encode_pose(src_input)
        return self.mt5_model.encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state, mask

    def forward(self, src_input, tgt_input):
        """One batch -> LiteOutput. tgt_input needs gt_sentence; labels are made where the loader made none."""
        hidden, mask = self._encode(src_input)
        labels = tgt_input.get("labels")
        labels = (self.codec.encode(tgt_input["gt_sentence"]) if labels is None else labels).to(hidden.device)
        # T5 shifts the decoder's input to the right; the labels stay where they are and are never shifted again
        logits = self.mt5_model(encoder_outputs=BaseModelOutput(hidden), attention_mask=mask,
                                decoder_input_ids=self.mt5_model._shift_right(labels)).logits.float()
        loss, nll, correct = text_loss(logits, labels, self.label_smoothing)
        tokens, gloss = int((labels != IGNORE).sum()), None
        if self.gloss_head is not None:
            scores = self.gloss_head(hidden).float().log_softmax(-1)
            if self.training:
                loss = loss + self.config.ctc_weight * self._ctc_loss(scores, mask, src_input, tgt_input["gt_gloss"])
            else:
                gloss = self._read_gloss(scores, mask)
        return LiteOutput(loss / tokens, nll / tokens, tokens, int(correct), gloss)

    def _ctc_loss(self, scores, mask, src_input, gt_gloss):
        """Negative log-likelihood of the glosses, summed over the clips that have any; scores (B, T', classes)."""
        rows = [i for i, gloss in enumerate(gt_gloss) if gloss]
        if not rows:
            return scores.new_zeros(())
        index = {gloss: i + 2 for i, gloss in enumerate(self.glosses)}
        targets = [[index.get(word, UNKNOWN_GLOSS) for word in gt_gloss[i]] for i in rows]
        lengths = mask.sum(1)[rows].long()
        for i, target, length in zip(rows, targets, lengths.tolist()):
            if length < ctc_positions(target):
                raise DataError(f"clip {src_input.get('names', rows)[i]}: {length} positions of {self.config.temporal_stride} "
                                f"frames, but its {len(target)} glosses need {ctc_positions(target)}: remove the clip, or "
                                "set temporal_stride 1 or ctc_weight 0")
        return F.ctc_loss(scores[rows].transpose(0, 1), torch.tensor(sum(targets, []), device=scores.device), lengths,
                          torch.tensor([len(t) for t in targets], device=scores.device), blank=BLANK, reduction="sum")

    def _read_gloss(self, scores, mask):
        """The best path, repeats and blanks taken out."""
        names = ["", "<unknown>"] + self.glosses
        paths = [torch.unique_consecutive(row[real.bool()]).tolist() for row, real in zip(scores.argmax(-1), mask)]
        return [[names[i] for i in path if i != BLANK] for path in paths]

    @torch.no_grad()
    def generate(self, src_input, num_beams=1, max_new_tokens=64, length_penalty=1.0, no_repeat_ngram_size=0):
        """-> list of B texts; the encoder runs once, decoding keeps its keys and values."""
        hidden, mask = self._encode(src_input)
        beams = {"length_penalty": length_penalty, "early_stopping": True} if num_beams > 1 else {}
        rows = self.mt5_model.generate(
            encoder_outputs=BaseModelOutput(hidden), attention_mask=mask, num_beams=num_beams, do_sample=False,
            max_new_tokens=max_new_tokens, no_repeat_ngram_size=no_repeat_ngram_size, **beams)
        return self.codec.decode(rows)

    def state_to_save(self):
        """Parameters by name, each table once."""
        return {n: p.detach().cpu().contiguous() for n, p in self.state_dict().items() if "embed_tokens" not in n}

    def load_saved(self, state):
        """Load what `state_to_save` gave; raises DataError where names or shapes differ, and guards the tables."""
        own = self.state_to_save()
        wrong = sorted(n for n in own.keys() | state.keys() if n not in own or n not in state or own[n].shape != state[n].shape)
        if wrong:
            raise DataError(f"the saved weights do not fit this configuration, first at {wrong[0]}")
        self.load_state_dict(state, strict=False)
        _check_tables(self.mt5_model)
        if not torch.equal(self.mt5_model.lm_head.weight.detach().cpu(), state["mt5_model.lm_head.weight"]):
            raise DataError("the head was overwritten while loading: it must not be tied to the piece table")

    def init_from(self, folder):
        """Start from another run's best/: same-shaped layers are copied, pieces that both know keep their rows."""
        other = SignLanguageLite.from_pretrained(folder)
        source, own, anew = other.state_to_save(), self.state_dict(), []
        rows = {piece: i for i, piece in enumerate(other.codec.pieces())}
        shared = [(i, rows[piece]) for i, piece in enumerate(self.codec.pieces()) if piece in rows]
        for name, value in own.items():
            if name in ("mt5_model.shared.weight", "mt5_model.lm_head.weight") and name in source \
                    and source[name].shape[1] == value.shape[1]:
                mine, theirs = map(list, zip(*shared))
                value[mine] = source[name][theirs].to(value)
            elif name in source and source[name].shape == value.shape:
                value.copy_(source[name])
            elif "embed_tokens" not in name:
                anew.append(name)
        _check_tables(self.mt5_model)
        print(f"weights from {folder}: {len(shared)} of {len(self.codec)} pieces known; "
              f"begun anew: {', '.join(anew) or 'nothing'}", flush=True)

    def description(self):
        """What `from_pretrained` needs beside weights and tokeniser, as plain data."""
        return {"mt5_config": self.mt5_model.config.to_diff_dict(), "keep_pieces": self.codec.keep, "glosses": self.glosses}

    @classmethod
    def from_pretrained(cls, folder):
        """Rebuild a run's model from its best/ alone, in eval mode. Raises DataError where the folder is not one."""
        folder = Path(folder)
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            raise DataError(f"{folder}: no config.json and model.safetensors there; name a run's best/ folder")
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        known = {item.name for item in fields(config_lite.TrainConfig)}
        config = config_lite.TrainConfig(**{key: value for key, value in saved.items() if key in known})
        model = cls(config, saved={**saved["model"], "folder": folder})
        model.load_saved(load_file(folder / "model.safetensors"))
        return model.eval()


def ctc_positions(target):
    """Positions that CTC needs for a target: one a gloss, one more between equal neighbours."""
    return len(target) + sum(a == b for a, b in zip(target, target[1:]))


def text_loss(logits, labels, smoothing):
    """logits (B, L, vocabulary) float32, labels (B, L) -> sums over real labels: smoothed loss, plain nll, correct."""
    flat, target = logits.flatten(0, 1), labels.flatten()
    nll = F.cross_entropy(flat, target, ignore_index=IGNORE, reduction="sum")
    loss = nll
    if smoothing:
        loss = F.cross_entropy(flat, target, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    return loss, nll.detach(), (flat.argmax(-1) == target).sum()


# ---------------------------------------------------------------------------------------------- mT5 both ways

def _build_mt5(config, texts):
    """-> tokeniser, mT5 with its head untied, kept pieces (None = all): pretrained, or from scratch on the texts."""
    if config.mt5_path:
        tokenizer, mt5 = _pretrained_mt5(config.mt5_path)
        keep = pieces_to_keep(tokenizer, texts) if texts and config.trim_vocabulary else None
        if keep is None and len(tokenizer) < mt5.shared.num_embeddings:
            keep = list(range(len(tokenizer)))  # rows that no piece has, so that none of them is ever decoded
        elif keep is None and len(tokenizer) > mt5.shared.num_embeddings:
            raise ConfigError(f"mt5_path {config.mt5_path}: {len(tokenizer)} pieces, but {mt5.shared.num_embeddings} rows")
        if keep:
            _cut_tables(mt5, keep)
        return tokenizer, mt5, keep
    if not texts:
        raise ConfigError("mt5_path is '', so the vocabulary is learnt from the training texts: give SignLanguageLite "
                          "texts=[...], or set mt5_path")
    tokenizer = train_tokenizer(texts, config.vocab_size)
    mt5 = MT5ForConditionalGeneration(MT5Config(
        vocab_size=len(tokenizer), d_model=config.d_model, d_kv=32, num_heads=config.d_model // 32,
        d_ff=2 * config.d_model, num_layers=config.num_layers, num_decoder_layers=config.num_layers,
        decoder_start_token_id=tokenizer.pad_token_id))
    _untie(mt5)
    # mT5 draws its head with deviation 1: logits of deviation sqrt(d_model), a loss of 15 where ln(vocabulary) is 4
    nn.init.normal_(mt5.lm_head.weight, std=config.d_model ** -0.5)
    return tokenizer, mt5, None


def make_codec(config, texts):
    """The TextCodec that a model of this configuration would have, without the model. Raises ConfigError."""
    if not config.mt5_path:
        return TextCodec(train_tokenizer(texts, config.vocab_size), config.max_text_length)
    tokenizer = T5Tokenizer.from_pretrained(mt5_folder(config.mt5_path), extra_ids=0)
    return TextCodec(tokenizer, config.max_text_length, pieces_to_keep(tokenizer, texts) if config.trim_vocabulary else None)


def mt5_folder(path):
    """mt5_path -> a local folder with vocabulary, config and weights, downloaded where it is a hub name.

    Raises ConfigError where there is none: transformers 5 would go on without a word, with a vocabulary of 3 pieces.
    """
    advice = "download google/mt5-small and name its folder, or train a small mT5 from scratch with --mt5_path ''"
    if not Path(path).is_dir():
        try:
            path = snapshot_download(path, allow_patterns=["config.json", "spiece.model", "pytorch_model.bin", "model.safetensors"])
        except (OSError, ValueError) as error:
            raise ConfigError(f"mt5_path is {path!r}: no such folder, and the hub did not give it "
                              f"({str(error).splitlines()[0]}); {advice}") from error
    found = {file.name for file in Path(path).iterdir()}
    for needed in ({"config.json"}, {"spiece.model", "tokenizer.json"}, {"model.safetensors", "pytorch_model.bin"}):
        if not found & needed:
            raise ConfigError(f"mt5_path {path}: no {' or '.join(sorted(needed))} there (found {sorted(found)[:8]}); {advice}")
    return path


def _pretrained_mt5(path):
    folder = mt5_folder(path)
    try:
        tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0)
        mt5 = MT5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"mt5_path {folder}: not a readable mT5 ({str(error).strip().splitlines()[0]})") from error
    head = mt5.lm_head.weight
    if head is mt5.shared.weight:
        raise ConfigError(f"mt5_path {path}: the head came out tied to the piece table, mT5's own is not")
    _untie(mt5)
    return tokenizer, mt5


def _saved_mt5(saved):
    """The same two from a run's best/, without weights: `load_saved` brings them."""
    tokenizer = T5Tokenizer.from_pretrained(saved["folder"], extra_ids=0)
    mt5 = MT5ForConditionalGeneration(MT5Config(**saved["mt5_config"]))
    _untie(mt5)
    return tokenizer, mt5, saved["keep_pieces"]


def _untie(mt5):
    """mT5's head is its own table; transformers 5 ties it to the input's, silently. Part them and keep them parted."""
    mt5.config.tie_word_embeddings = False
    if mt5.lm_head.weight is mt5.shared.weight:
        mt5.lm_head.weight = nn.Parameter(mt5.shared.weight.detach().clone())
    mt5.encoder.set_input_embeddings(mt5.shared)  # an untied model would give each stack a table of its own
    mt5.decoder.set_input_embeddings(mt5.shared)
    _check_tables(mt5)


def _check_tables(mt5):
    head, table = mt5.lm_head.weight, mt5.shared.weight
    if head is table or head.data_ptr() == table.data_ptr() or mt5.decoder.embed_tokens.weight is not table:
        raise RuntimeError("mT5's head must be apart from its piece table, and the decoder must read that table")


def _cut_tables(mt5, keep):
    """Keep these rows of both tables."""
    rows = torch.tensor(keep)
    mt5.shared = nn.Embedding.from_pretrained(mt5.shared.weight.detach()[rows].clone(), freeze=False)
    head = nn.Linear(mt5.config.d_model, len(keep), bias=False)
    head.weight = nn.Parameter(mt5.lm_head.weight.detach()[rows].clone())
    mt5.lm_head, mt5.config.vocab_size = head, len(keep)
    _untie(mt5)
