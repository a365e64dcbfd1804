"""What the reference is measured against: a nearest neighbour and a recurrent network.

Both see the features of the reference's first layers.
"""

import math
import unicodedata

import torch
import torch.nn.functional as F
from common import load_split, note
from torch import nn
from torch.utils.data import DataLoader

import train_lite
from datasets_lite import LEFT_WRIST, RIGHT_WRIST
from models_lite import hand_features, part_features

VALIDATIONS = 10  # of a run, about


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


def nearest(config, folder):
    """1-nearest neighbour: features at 32 frames, the text of the closest training clip."""
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
    note(f"{flat['train'].shape[1]:,} figures a clip")
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
    """The recurrent baseline on the reference's features, with its batch size, optimiser and
    schedule.
    """
    torch.manual_seed(config.seed)
    data = {split: load_split(config, split) for split in ("train", "dev", "test")}
    glue = "" if config.language == "zh" else " "
    split_text = str.split if glue else (lambda text: list(unicodedata.normalize("NFKC", text)))
    curve = []
    step = 0
    epoch = 0
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
    note(f"{parameters:,} parameters, {'one word a clip' if model.single else 'CTC'}")

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
        epoch += 1
        data["train"].begin_epoch(epoch)
    return {"curve": curve, "test": scores("test")}
