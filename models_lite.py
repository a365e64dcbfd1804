"""From batches to a loss or to text: front-end, mT5, and the vocabulary between ids and strings.

    body (B, T, 9, 3), left, right (B, T, 21, 3)
    -> part_features   each joint's place, confidence and velocity, flattened: no joint loses its identity
    -> pose_embed      one linear layer for the body, one that both hands share
    -> fusion          the three parts of a frame together
    -> temporal        residual convolutions over time, padding masked
    -> proj            temporal_stride frames -> one input position of mT5, layer_norm, absolute position
    -> mT5 encoder     -> [CTC on glosses] -> mT5 decoder, from scratch with absolute position -> loss or text

B clips, T frames, T' = ceil(T / temporal_stride) positions, V joints, L pieces; mask: 1 = real, 0 = padding.
"""
import json
import math
import re
import tempfile
import unicodedata
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import sentencepiece
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Cache, MT5Config, MT5ForConditionalGeneration, T5Tokenizer
from transformers.modeling_outputs import BaseModelOutput

from config_lite import ConfigError, TrainConfig
from datasets_lite import BODY, LEFT, LEFT_WRIST, RIGHT_WRIST, DataError, ctc_positions

IGNORE = -100  # label of padding
BLANK, UNKNOWN_GLOSS = 0, 1  # CTC classes before the glosses
SENTINEL = re.compile(r"▁?<extra_id_\d+>")  # what mT5 was pre-trained to emit between pieces of text

# ----------------------------------------------------------------------------------------------- text <-> ids
class TextCodec:
    """Texts <-> label ids, which are rows of the model's tables; keep: the tokeniser's ids that have a row,
    ascending; none given = all. Nowhere else are the two kinds of ids mapped."""
    def __init__(self, tokenizer, max_text_length, keep=None):
        self.tokenizer, self.max_text_length = tokenizer, max_text_length
        self.keep = keep or list(range(len(tokenizer)))
        self.row = {piece_id: row for row, piece_id in enumerate(self.keep)}
        self.unknown = self.row[tokenizer.unk_token_id]

    def __len__(self):
        return len(self.keep)

    def ids(self, text):
        """Rows for one text, end of sentence included, not cut; a piece that was cut off is spelled."""
        rows, tokenizer = [], self.tokenizer
        for piece_id in tokenizer(text).input_ids:
            if piece_id in self.row:
                rows.append(self.row[piece_id])
            else:  # by its characters, '▁' among them
                spelled = tokenizer.convert_tokens_to_ids(list(tokenizer.convert_ids_to_tokens(piece_id)))
                rows += [self.row.get(i, self.unknown) for i in spelled]
        return rows

    def encode(self, texts):
        """Texts -> labels (B, L), cut at max_text_length with the end of sentence kept, padded with -100."""
        limit, rows = self.max_text_length, [self.ids(text) for text in texts]
        rows = [torch.tensor(row[:limit - 1] + row[-1:] if len(row) > limit else row) for row in rows]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)

    def decode(self, rows):
        """Rows (B, L) -> texts without special pieces."""
        ids = [[self.keep[r] for r in row] for row in rows.tolist()]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def pieces(self):
        """The string of each row."""
        return self.tokenizer.convert_ids_to_tokens(self.keep)

def train_tokenizer(texts, vocab_size):
    """A SentencePiece vocabulary learnt on these texts, normalised as mT5's: every character is a piece, and
    at most vocab_size longer ones, one per 400 characters: a rarer one would be learnt from few clips."""
    longer = min(vocab_size, sum(map(len, texts)) // 400)
    size = len(set(unicodedata.normalize("NFKC", "".join(texts)))) + 5 + longer
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=f"{folder}/spiece", vocab_size=size, minloglevel=2,
            hard_vocab_limit=False, character_coverage=1.0, max_sentence_length=2 ** 24,
            normalization_rule_name="nmt_nfkc", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
        return T5Tokenizer.from_pretrained(folder, extra_ids=0)

def pieces_to_keep(tokenizer, texts=None):
    """The tokeniser's ids, ascending, that these texts, or others in their scripts, can need; no texts = all:
    pad, end, unknown, what the texts use, bytes, and the scripts' single characters, which spell what is cut;
    never mT5's sentinels: what has no row cannot be emitted."""
    usable = {piece: i for piece, i in tokenizer.get_vocab().items() if not SENTINEL.fullmatch(piece)}
    if not texts:
        return sorted(usable.values())
    keep = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    keep = keep.union(*tokenizer(list(texts)).input_ids)
    scripts = {_script(character) for character in set(unicodedata.normalize("NFKC", "".join(texts)))}
    for piece, piece_id in usable.items():
        bare = piece.removeprefix("▁")
        if not bare or len(bare) == 1 and _script(bare) in scripts or re.fullmatch("<0x..>", piece):
            keep.add(piece_id)
    return sorted(keep.intersection(usable.values()))

def _script(character):
    """LATIN, CJK, ... for letters; the block of 256 code points for digits, punctuation and signs."""
    return unicodedata.name(character, "?").split()[0] if character.isalpha() else ord(character) >> 8

# -------------------------------------------------------------------------------------------------- front-end
class SinusoidalPositionalEncoding(nn.Module):
    """Adds Vaswani et al.'s sinusoids, or learnt vectors, to x (B, T', d_model); begin + T' <= max_length."""
    def __init__(self, d_model, max_length, learned=False, keep=False):
        super().__init__()
        position = torch.arange(max_length)[:, None]
        rate = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        table = torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=-1).flatten(1)
        self.register_buffer("table", table, persistent=keep)
        if learned:
            self.table = nn.Parameter(0.02 * torch.randn_like(table))

    def forward(self, x, begin=0):
        return x + self.table[begin:begin + x.shape[1]]

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
    """(B, T, V, 3) -> (B, T, 5 V): x, y, confidence and velocity, joint by joint. A velocity stands only
    where the joint was seen in this frame and in the one before: it never jumps a gap."""
    xy, confidence = part[..., :2], part[..., 2:]
    seen, velocity = confidence > 0, torch.zeros_like(xy)
    velocity[:, 1:] = (xy[:, 1:] - xy[:, :-1]) * (seen[:, 1:] & seen[:, :-1])
    return torch.cat([xy, confidence, velocity], dim=-1).flatten(2)

def hand_features(hand, wrist, mirror):
    """hand (B, T, 21, 3), the body's wrist (B, T, 3) -> (B, T, 108): the shape, then its place. A shape is
    small beside the body, so it is divided by its root mean square distance from the wrist over the clip. The
    left hand is mirrored, so that the layer which both hands share sees like shapes."""
    seen = (hand[..., 2:] > 0).float()
    square = (hand[..., :2].square() * seen).sum((1, 2, 3)) / seen.sum((1, 2, 3)).clamp(min=1)
    own = 1 / square.sqrt().clamp(min=1e-3)
    scale = torch.stack([own, own, torch.ones_like(own)], -1)[:, None, None]
    flip = hand.new_tensor([-1.0 if mirror else 1.0, 1.0, 1.0])
    return torch.cat([part_features(hand * scale * flip), wrist * flip], dim=-1)

# -------------------------------------------------------------------------------------------------- the model
class SignLanguageLite(nn.Module):
    """Pose keypoints -> front-end -> mT5 -> text. texts and glosses (a list a clip) are the training data's:
    the one makes the vocabulary from scratch and trims a pretrained one, the other sizes the CTC head. Raises
    ConfigError for an unusable mt5_path. `saved`, to rebuild: description() and the tokeniser's "folder"."""
    def __init__(self, config, texts=None, glosses=None, saved=None):
        super().__init__()
        self.config, self.label_smoothing = config, config.label_smoothing
        self.codec = make_codec(config, texts, saved)
        self.mt5_tokenizer, self.mt5_model = self.codec.tokenizer, _build_mt5(config, self.codec, saved)
        d_model = self.mt5_model.config.d_model
        lengths = [min(len(self.codec.ids(text)), config.max_text_length) for text in texts or []]
        self.longest_text = saved["longest_text"] if saved else max(lengths, default=config.max_text_length)
        words = (w for g in glosses or [] for w in ([g] if isinstance(g, str) else g))
        self.glosses = saved["glosses"] if saved else sorted(set(words)) if config.ctc_weight else []
        self.pose_embed = nn.ModuleDict({"body": nn.Linear(5 * len(BODY), d_model),
                                         "hand": nn.Linear(5 * len(LEFT) + 3, d_model)})
        self.fusion = nn.Linear(3 * d_model, d_model)
        self.temporal = nn.ModuleList([TemporalBlock(d_model), TemporalBlock(d_model)])
        self.proj = nn.Linear(config.temporal_stride * d_model, d_model)
        self.layer_norm = nn.LayerNorm(d_model)
        nn.init.constant_(self.layer_norm.weight, 0.5)  # at 1 the poses drown the sinusoids, of RMS 0.7
        positions, kind = math.ceil(config.max_length / config.temporal_stride), config.position_encoding
        self.position = (nn.Identity() if kind == "none" else
                         SinusoidalPositionalEncoding(d_model, positions, learned=kind == "learned"))
        if not config.mt5_path:  # a pretrained decoder is given what it knows; keep: older runs are refused
            self.piece_position = SinusoidalPositionalEncoding(d_model, 2 * config.max_text_length, keep=True)
            self.mt5_model.decoder.register_forward_pre_hook(self._number_pieces, with_kwargs=True)
        self.gloss_head = nn.Linear(d_model, 2 + len(self.glosses)) if self.glosses else None
        self._init_weights()
        if config.gradient_checkpointing:
            self.mt5_model.gradient_checkpointing_enable({"use_reentrant": False})
        if not saved:
            self._freeze_mt5_layers()

    def _init_weights(self):
        """New linear layers start at Glorot's scale with zero biases, as in the original."""
        for layer in filter(None, [*self.pose_embed.values(), self.fusion, self.proj, self.gloss_head]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _freeze_mt5_layers(self):
        """Choose what of mT5 trains (review, step 1) and print a line a part. Idempotent."""
        mt5, depth = self.mt5_model, self.config.freeze_decoder_layers
        # 1) everything trains: poses are not text, so the encoder must adapt; head and final norms always
        mt5.requires_grad_(True)
        if self.config.mt5_path:  # from scratch there is no language to keep
            # 2) the first decoder blocks keep their language
            mt5.decoder.block[:depth].requires_grad_(False)
            # 3) the table of pieces, which encoder and decoder share
            mt5.shared.requires_grad_(self.config.train_embedding)
            if depth > (blocks := len(mt5.decoder.block)):
                print(f"warning: freeze_decoder_layers is {depth}: all {blocks} decoder blocks are frozen")
        names = dict(shared="piece table", encoder="mT5 encoder", decoder="mT5 decoder", lm_head="head")
        total, trainable = Counter(), Counter()
        for name, p in self.named_parameters():
            for part in ("all", names[name.split(".")[1]] if "mt5_model" in name else "front-end"):
                total[part] += p.numel()
                trainable[part] += p.numel() * p.requires_grad
        print("\n".join(f"  {part:12} {total[part]:>13,} parameters, {trainable[part]:>13,} trainable"
                        for part in ("front-end", *names.values(), "all")))

    def encode_pose(self, src_input):
        """-> embeddings (B, T', d_model), mask (B, T'). Raises ValueError beyond max_length frames."""
        body, left, right, mask = (src_input[key] for key in ("body", "left", "right", "attention_mask"))
        (B, T), stride = mask.shape, self.config.temporal_stride
        if T > self.config.max_length:
            raise ValueError(f"a clip has {T} frames, more than max_length {self.config.max_length}: sample "
                             "it down (sample_frames does) or raise max_length")
        hands = torch.cat([hand_features(left, body[:, :, LEFT_WRIST], mirror=True),
                           hand_features(right, body[:, :, RIGHT_WRIST], mirror=False)])
        left, right = self.pose_embed["hand"](hands).chunk(2)  # both hands in one call
        parts = torch.cat([self.pose_embed["body"](part_features(body)), left, right], dim=-1)
        x, real = self.fusion(F.gelu(parts)), mask[..., None].to(parts.dtype)
        for block in self.temporal:
            x = block(x, real)
        x = F.pad(x * real, (0, 0, 0, -T % stride))
        x = self.layer_norm(self.proj(x.reshape(B, -1, stride * x.shape[-1])))
        return self.position(x), mask[:, ::stride]

    def _encode(self, src_input):
        """-> hidden states (B, T', d_model) of mT5's encoder, mask (B, T')."""
        embeddings, mask = self.encode_pose(src_input)
        return self.mt5_model.encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state, mask

    def _number_pieces(self, decoder, args, inputs):
        """Position for the decoder's input, too: T5's relative bias alone loses count of a repeated word."""
        begin = next((x.get_seq_length() for x in inputs.values() if isinstance(x, Cache)), 0)  # of any name
        embeds = decoder.embed_tokens(inputs.pop("input_ids"))
        return args, inputs | {"inputs_embeds": self.piece_position(embeds, begin)}

    def forward(self, src_input, tgt_input):
        """One batch -> loss (differentiated, per target token), nll (the plain one, detached), num_tokens,
        num_correct, gloss (what CTC reads). Absent labels are made of gt_sentence; CTC reads gt_gloss."""
        hidden, mask = self._encode(src_input)
        labels = tgt_input.get("labels")
        labels = (self.codec.encode(tgt_input["gt_sentence"]) if labels is None else labels).to(hidden.device)
        # T5 shifts the decoder's input to the right; the labels stay where they are, never shifted again
        logits = self.mt5_model(encoder_outputs=BaseModelOutput(hidden), attention_mask=mask,
                                decoder_input_ids=self.mt5_model._shift_right(labels)).logits.float()
        loss, nll, correct = text_loss(logits, labels, self.label_smoothing)
        tokens, gloss = int((labels != IGNORE).sum()), None
        if self.gloss_head is not None:
            scores = self.gloss_head(hidden).float().log_softmax(-1)
            if self.training:
                loss = loss + self.config.ctc_weight * self._ctc_loss(scores, mask, src_input, tgt_input)
            else:
                gloss = self._read_gloss(scores, mask)
        return SimpleNamespace(loss=loss / tokens, nll=nll / tokens, num_tokens=tokens,
                               num_correct=int(correct), gloss=gloss)

    def _ctc_loss(self, scores, mask, src_input, tgt_input):
        """scores (B, T', classes) -> negative log-likelihood, summed over the clips that have glosses. Raises
        DataError for a clip with fewer positions than its glosses need."""
        index = {gloss: i + 2 for i, gloss in enumerate(self.glosses)}
        rows = [i for i, gloss in enumerate(tgt_input["gt_gloss"]) if gloss]
        if not rows:
            return scores.sum() * 0  # a gradient for the head, for which DistributedDataParallel waits
        targets = [[index.get(word, UNKNOWN_GLOSS) for word in tgt_input["gt_gloss"][i]] for i in rows]
        lengths = mask.sum(1)[rows].long()
        sizes = lengths.new_tensor([len(target) for target in targets])
        for i, target, length in zip(rows, targets, lengths.tolist()):
            if length < ctc_positions(target):
                name = src_input.get("names", range(len(mask)))[i]
                raise DataError(f"clip {name}: {length} positions, but its {len(target)} glosses need "
                                f"{ctc_positions(target)}: remove it; or temporal_stride 1; or ctc_weight 0")
        return F.ctc_loss(scores[rows].transpose(0, 1), sizes.new_tensor(sum(targets, [])), lengths, sizes,
                          blank=BLANK, reduction="sum")

    def _read_gloss(self, scores, mask):
        """The best path, repeats and blanks taken out."""
        names, best = ["", "<unknown>"] + self.glosses, scores.argmax(-1)
        paths = [torch.unique_consecutive(row[real.bool()]).tolist() for row, real in zip(best, mask)]
        return [[names[i] for i in path if i != BLANK] for path in paths]

    @torch.no_grad()
    def generate(self, src_input, num_beams=1, max_new_tokens=64, length_penalty=1.0, no_repeat_ngram_size=0):
        """-> list of B texts; the encoder runs once, decoding keeps its keys and values. No text grows beyond
        5/4 of the longest training text: a word repeated without end would spoil a whole split's BLEU."""
        hidden, mask = self._encode(src_input)
        beams = {"length_penalty": length_penalty} if num_beams > 1 else {}
        rows = self.mt5_model.generate(
            encoder_outputs=BaseModelOutput(hidden), attention_mask=mask,
            max_new_tokens=min(max_new_tokens, self.longest_text * 5 // 4 + 1),
            num_beams=num_beams, do_sample=False, no_repeat_ngram_size=no_repeat_ngram_size, **beams)
        return self.codec.decode(rows)

    def state_to_save(self):
        """Parameters by name, on the CPU, each table once."""
        return {n: p.cpu().contiguous() for n, p in self.state_dict().items() if "embed_tokens" not in n}

    def load_saved(self, state):
        """Load what `state_to_save` gave. Raises DataError where names or shapes differ or a head is tied."""
        own = self.state_to_save()
        wrong = own.keys() ^ state.keys() or [n for n in own if own[n].shape != state[n].shape]
        if wrong:
            raise DataError(f"the saved weights do not fit this configuration, first at {min(wrong)}")
        self.load_state_dict(state, strict=False)
        if not torch.equal(self.mt5_model.shared.weight.cpu(), state["mt5_model.shared.weight"].cpu()):
            raise DataError("the piece table was overwritten while loading: the head must not be tied to it")

    def init_from(self, folder):
        """Start from another run: same-shaped layers are copied, pieces that both know keep their rows."""
        other, anew = SignLanguageLite.from_pretrained(folder), []
        source, rows = other.state_to_save(), {piece: i for i, piece in enumerate(other.codec.pieces())}
        shared = [(i, rows[piece]) for i, piece in enumerate(self.codec.pieces()) if piece in rows]
        mine, theirs = map(list, zip(*shared))
        for name, value in self.state_dict().items():
            is_table = name in ("mt5_model.shared.weight", "mt5_model.lm_head.weight")
            if is_table and source[name].shape[1] == value.shape[1]:
                value[mine] = source[name][theirs].to(value)
            elif name in source and source[name].shape == value.shape and (
                    other.glosses == self.glosses or not name.startswith("gloss_head")):
                value.copy_(source[name])
            elif "embed_tokens" not in name:
                anew.append(name)
        print(f"weights from {folder}: {len(shared)} of {len(self.codec)} pieces known; "
              f"begun anew: {', '.join(anew) or 'nothing'}")

    def description(self):
        """What rebuilding needs beside weights and tokeniser, as plain data."""
        return {"mt5_config": self.mt5_model.config.to_diff_dict(), "keep_pieces": self.codec.keep,
                "glosses": self.glosses, "longest_text": self.longest_text}

    def save_pretrained(self, folder, **more):
        """Write a folder that `from_pretrained` reads; `more` goes into its config.json, too."""
        content = asdict(self.config) | more | {"model": self.description()}
        self.mt5_tokenizer.save_pretrained(folder)
        Path(folder, "config.json").write_bytes(json.dumps(content, ensure_ascii=False, indent=1).encode())
        save_file(self.state_to_save(), Path(folder, "model.safetensors"))

    @classmethod
    def from_pretrained(cls, folder):
        """A run's model, in eval mode, from its folder or best/. Raises DataError naming what is amiss."""
        folder = find_best(folder)
        try:
            content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            config = {item.name: content[item.name] for item in fields(TrainConfig) if item.name in content}
            model = cls(TrainConfig(**config), saved=content["model"] | {"folder": folder})
            model.load_saved(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(f"{folder}: damaged ({type(error).__name__}: {error}); copy it anew") from error
        return model.eval()

def find_best(path):
    """A run's folder, or its best/ -> where the model is; best.old, where a crash left that. Or DataError."""
    for folder in (Path(path, "best"), Path(path, "best.old"), Path(path), Path(f"{Path(path)}.old")):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise DataError(f"{path}: no config.json and model.safetensors there or in best/; name a run's folder")

def text_loss(logits, labels, smoothing):
    """logits (B, L, pieces) float32, labels (B, L) -> sums over real labels: loss, plain nll, correct."""
    flat, target = logits.flatten(0, 1), labels.flatten()
    loss = nll = F.cross_entropy(flat, target, ignore_index=IGNORE, reduction="sum")
    if smoothing:
        loss = F.cross_entropy(flat, target, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    return loss, nll.detach(), (flat.argmax(-1) == target).sum()

# ---------------------------------------------------------------------------------------------- mT5 both ways
def make_codec(config, texts, saved=None):
    """A model's TextCodec: as it was saved, of a pretrained mT5, or learnt on texts. Raises ConfigError."""
    if saved:
        tokenizer, keep = T5Tokenizer.from_pretrained(saved["folder"], extra_ids=0), saved["keep_pieces"]
    elif config.mt5_path:
        tokenizer = _read_mt5(T5Tokenizer, config.mt5_path, extra_ids=0)
        keep = pieces_to_keep(tokenizer, texts if config.trim_vocabulary else None)
    elif texts:
        tokenizer, keep = train_tokenizer(texts, config.vocab_size), None
    else:
        raise ConfigError("mt5_path is '', so the vocabulary is learnt from the training texts: give them to "
                          "SignLanguageLite (texts=[...]), or set mt5_path")
    return TextCodec(tokenizer, config.max_text_length, keep)

def _build_mt5(config, codec, saved):
    """mT5 with its head untied: as it was saved but for the weights, pretrained and cut, or from scratch."""
    pieces = len(codec.tokenizer)
    if saved:
        mt5 = _untie(MT5ForConditionalGeneration(MT5Config(**saved["mt5_config"])))
        need = max(codec.keep[-1] + 1, mt5.config.vocab_size)
        if pieces < need:  # transformers makes up a vocabulary of 3 pieces where the files are missing
            raise DataError(f"the tokeniser's files hold {pieces} pieces, the model needs {need}")
    elif config.mt5_path:
        mt5 = _read_mt5(MT5ForConditionalGeneration, config.mt5_path, dtype=torch.float32)
        if mt5.lm_head.weight is mt5.shared.weight or mt5.shared.num_embeddings < pieces:
            raise ConfigError(f"mt5_path {config.mt5_path}: not an mT5: its head is tied to the piece table, "
                              f"or that has fewer rows than the {pieces} pieces")
        _cut_tables(_untie(mt5), codec.keep)
    else:
        mt5 = _untie(MT5ForConditionalGeneration(MT5Config(
            vocab_size=pieces, d_model=config.d_model, d_kv=32, num_heads=config.d_model // 32,
            d_ff=2 * config.d_model, num_layers=config.num_layers, num_decoder_layers=config.num_layers,
            decoder_start_token_id=codec.tokenizer.pad_token_id)))
        # mT5 draws its head with deviation 1: logits of deviation sqrt(d_model), a loss of 15, not ln(pieces)
        nn.init.normal_(mt5.lm_head.weight, std=config.d_model ** -0.5)
    return mt5

def _read_mt5(kind, path, **options):
    folder = mt5_folder(path)
    try:
        return kind.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"mt5_path {path}: not a readable mT5 ({reason})") from error

def mt5_folder(path):
    """mt5_path -> a folder with vocabulary, config and weights, downloaded where it is a hub name. Raises
    ConfigError where one is missing: transformers would make up a vocabulary of 3 pieces instead."""
    advice = "download google/mt5-small and name its folder, or train a small mT5 from scratch: --mt5_path ''"
    needed = [["config.json"], ["spiece.model", "tokenizer.json"], ["model.safetensors", "pytorch_model.bin"]]
    if not Path(path).is_dir():
        try:
            path = snapshot_download(path, allow_patterns=sum(needed, []))
        except (OSError, ValueError) as error:
            raise ConfigError(f"mt5_path is {path!r}: no such folder, and the hub did not give it "
                              f"({str(error).splitlines()[0]}); {advice}") from error
    found = {file.name for file in Path(path).iterdir()}
    if missing := [" or ".join(names) for names in needed if not found & set(names)]:
        raise ConfigError(f"mt5_path {path}: no {', no '.join(missing)} there; {advice}")
    return path

def _untie(mt5):
    """mT5's head is its own table; transformers 5 silently ties it to the input's. Part them -> mt5."""
    mt5.config.tie_word_embeddings = False
    if mt5.lm_head.weight is mt5.shared.weight:
        mt5.lm_head.weight = nn.Parameter(mt5.shared.weight.detach().clone())
    mt5.encoder.set_input_embeddings(mt5.shared)  # an untied model would give each stack a table of its own
    mt5.decoder.set_input_embeddings(mt5.shared)
    return mt5

def _cut_tables(mt5, keep):
    """Keep these rows of both tables."""
    for module in (mt5.shared, mt5.lm_head):
        module.weight = nn.Parameter(module.weight.detach()[keep].clone())
    mt5.shared.num_embeddings = mt5.lm_head.out_features = mt5.config.vocab_size = len(keep)
