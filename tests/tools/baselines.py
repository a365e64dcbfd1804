"""What the network must beat: the nearest training clip, a linear layer, a recurrent network.

All read the features that the product's first layers read, centred as there. Like every way to
run a row, each takes the configuration and the run's folder, and gives {"curve": [scores of dev,
...], "test": scores}.
"""

import math
import unicodedata
from dataclasses import replace

import torch
import torch.nn.functional as F
from common import VALIDATIONS, count_parameters, load_split, note
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from models_lite import CentredLinear, pose_features
from train_lite import compute_metrics, make_optimizers

SPLITS = ("train", "dev", "test")


def features(src_input):
    """What the product's first layers see, all parts in one: (B, T, F)."""
    body, hands = pose_features(src_input)  # (B, T, 45), (2 B, T, 148)
    return torch.cat([body, *hands.chunk(2)], -1)  # (B, T, F)


def texts_of(data):
    return [entry["text"] for entry in data.entries]


# ---------------------------------------------------------------------- 1-nearest neighbour


def nearest(config, folder):
    """The text of the closest training clip, every clip resampled to 32 frames."""
    train = load_split(config, "train")
    centred = centred_by(train)
    train_vectors = clip_vectors(train, centred)
    train_texts = texts_of(train)
    scores = {}
    for split in ("dev", "test"):
        data = load_split(config, split)
        closest = torch.cdist(clip_vectors(data, centred), train_vectors).argmin(1)  # (clips)
        found = [train_texts[i] for i in closest]
        scores[split] = compute_metrics(found, texts_of(data), config.language)
    note(f"{train_vectors.shape[1]:,} figures a clip")
    return {"curve": [{"step": 0, **scores["dev"]}], "test": scores["test"]}


def centred_by(train, width=1):
    """A layer that has the features' means over the training clips."""
    frames = []
    for i in range(len(train)):
        src_input, _ = train.collate_fn([train[i]])
        frames.append(features(src_input)[0])  # (T, F)
    frames = torch.cat(frames)  # (all frames, F)
    layer = CentredLinear(frames.shape[1], width)
    layer.mean = frames.mean(0)
    return layer


def clip_vectors(data, centred, frames=32):
    """A data set's clips, each as one vector: (clips, F * frames)."""
    vectors = []
    for i in range(len(data)):
        src_input, _ = data.collate_fn([data[i]])
        clip = 2 * (features(src_input) - centred.mean)  # (1, T, F)
        clip = clip.transpose(1, 2)  # (1, F, T)
        clip = F.interpolate(clip, frames, mode="linear")  # (1, F, frames)
        vectors.append(clip.flatten())  # (F * frames)
    return torch.stack(vectors)  # (clips, F * frames)


# ---------------------------------------------------------------------- a linear layer


def linear(config, folder):
    """A class a training text, by a linear layer over every clip resampled to 32 frames."""
    torch.manual_seed(config.seed)
    train = load_split(config, "train")
    texts = sorted(set(texts_of(train)))
    wanted = torch.tensor([texts.index(text) for text in texts_of(train)])  # (clips)
    centred = centred_by(train)
    vectors = clip_vectors(train, centred)  # (clips, F * 32)
    layer = nn.Linear(vectors.shape[1], len(texts))
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3, weight_decay=0.1)
    for _ in range(300):
        F.cross_entropy(layer(vectors), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = {}
    for split in ("dev", "test"):
        data = load_split(config, split)
        found = [texts[i] for i in layer(clip_vectors(data, centred)).argmax(1)]
        scores[split] = compute_metrics(found, texts_of(data), config.language)
    return {"curve": [{"step": 300, **scores["dev"]}], "test": scores["test"]}


# ---------------------------------------------------------------------- a recurrent network


class Gru(nn.Module):
    """A bidirectional GRU of two layers over the features.

    single: every text is one word, read from the mean over time. Otherwise CTC over words.
    """

    def __init__(self, enter, words, single):
        super().__init__()
        self.words = words
        self.single = single
        self.enter = enter  # features -> 128
        self.dropout = nn.Dropout(0.2)
        self.gru = nn.GRU(128, 192, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(2 * 192, 1 + len(words))  # class 0 is CTC's blank

    def forward(self, src_input):
        """-> log-probabilities (B, T, classes); where a text is a single word (B, classes)."""
        lengths = src_input["src_length"]
        x = self.dropout(F.gelu(self.enter(features(src_input))))  # (B, T, 128)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed, _ = self.gru(packed)
        h, _ = pad_packed_sequence(
            packed, batch_first=True
        )  # (B, T, 384), zero beyond a clip's end
        if self.single:
            h = h.sum(1) / lengths[:, None]  # (B, 384)
        return self.head(self.dropout(h)).log_softmax(-1)

    def loss(self, src_input, texts):
        """texts: a list of words a clip."""
        targets = [self.path_of(text) for text in texts]
        if self.single:
            return F.nll_loss(self(src_input), torch.tensor(targets)[:, 0])
        sizes = torch.tensor([len(target) for target in targets])  # (B)
        flat = torch.tensor(sum(targets, []))  # (all words)
        scores = self(src_input).transpose(0, 1)  # (T, B, classes)
        return F.ctc_loss(scores, flat, src_input["src_length"], sizes, zero_infinity=True)

    @torch.no_grad()
    def read(self, src_input):
        """-> each clip's words, by the best path."""
        self.eval()
        best = self(src_input).argmax(-1)  # (B, T), or (B)
        if self.single:
            paths = best[:, None].tolist()
        else:
            paths = []
            for row, length in zip(best, src_input["src_length"]):
                paths.append(row[:length].unique_consecutive().tolist())
        return [self.words_of(path) for path in paths]

    def path_of(self, text):
        """A list of words as classes."""
        return [1 + self.words.index(word) for word in text]

    def words_of(self, path):
        """A path of classes without the blanks, as words."""
        return [self.words[number - 1] for number in path if number != 0]


def gru(config, folder):
    """The recurrent baseline, with the reference's batch size, optimiser and schedule."""
    torch.manual_seed(config.seed)
    data = {split: load_split(config, split) for split in SPLITS}
    loaders = {}
    clips = config.batch_size * config.gradient_accumulation  # of a step
    for split, part in data.items():
        loaders[split] = DataLoader(part, clips, split == "train", collate_fn=part.collate_fn)
    model = make_gru(data["train"], config.language)
    if model.single:  # a mean over time has no room for two words
        config.join = 0.0
        data["train"].begin_epoch(0)
    batches = len(loaders["train"])
    config = replace(config, muon=False)  # its matrices are not those of an mT5
    (optimizer,), (scheduler,) = make_optimizers(model, config, config.max_steps, batches)
    interval = max(1, config.max_steps // VALIDATIONS)
    curve = []
    for step, (src_input, tgt_input) in enumerate(endless(loaders["train"]), 1):
        texts = [split_text(text, config.language) for text in tgt_input["gt_sentence"]]
        model.train()
        loss = model.loss(src_input, texts)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % interval == 0 or step == config.max_steps:
            scores = score(model, loaders["dev"], config.language)
            curve.append({"step": step, "train_loss": loss.item(), **scores})
        if step == config.max_steps:
            break
    return {"curve": curve, "test": score(model, loaders["test"], config.language)}


def make_gru(train, language):
    """A model for the words of the training texts."""
    texts = [split_text(text, language) for text in texts_of(train)]
    words = set()
    for text in texts:
        words.update(text)
    single = max(len(text) for text in texts) == 1
    model = Gru(centred_by(train, 128), sorted(words), single)
    kind = "one word a clip" if single else "CTC"
    note(f"{count_parameters(model):,} parameters, {kind}")
    return model


def endless(loader):
    """The loader's batches, epoch after epoch; the data set's augmentation goes by its epoch."""
    while True:
        yield from loader
        loader.dataset.begin_epoch(loader.dataset.epoch + 1)


def split_text(text, language):
    """What counts as a word: in Chinese a character."""
    if language == "zh":
        return list(unicodedata.normalize("NFKC", text))
    return text.split()


def score(model, loader, language):
    """The model's texts of a split, scored as the product scores its own."""
    glue = "" if language == "zh" else " "
    found = []
    for src_input, _ in loader:
        found += [glue.join(words) for words in model.read(src_input)]
    return compute_metrics(found, texts_of(loader.dataset), language)
