"""What the tests share: clips and corpora in the real format, a tiny "pretrained" mT5, models.

Everything is made in temporary folders, offline. Real data is read from ../shared/data beside the
repository; a test that needs it is skipped where it is not there.
"""

import gzip
import io
import os
import pickle
import sys
from pathlib import Path

# before transformers is imported: no test may reach for the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import sentencepiece
import torch
from torch import nn
from transformers import MT5Config, MT5ForConditionalGeneration

import train_lite
from config_lite import ScratchConfig, TrainConfig
from datasets_lite import SignLanguageDataset, demo_sentence, make_demo_corpus
from models_lite import SignLanguageLite

SHARED = ROOT.parent / "shared" / "data"
torch.set_num_threads(1)  # for models this small, threads cost more than they bring


def shared(name):
    """A file or folder of the real data, or a skip that says what is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real data is not there: {path}")
    return path


# ------------------------------------------------------------ files


def random_clip(frames=12, seed=0):
    """(keypoints (T, 133, 2) in 0..1, scores (T, 133)): all joints seen, hands at their wrists."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 0.01, (frames, 133, 2)).cumsum(0)
    keypoints = rng.uniform(0.3, 0.7, (1, 133, 2)) + steps
    for wrist, hand in ((9, slice(91, 112)), (10, slice(112, 133))):
        shape = rng.normal(0, 0.03, (1, 21, 2))
        keypoints[:, hand] = keypoints[:, wrist, None] + shape + steps[:, hand]
    scores = rng.uniform(0.6, 1.0, (frames, 133))
    return keypoints.astype(np.float32), scores.astype(np.float32)


def write_pose(path, keypoints, scores, **more):
    """A pose file as the extractors write it: a list of per-frame arrays with the person axis."""
    content = {
        "keypoints": [np.asarray(frame)[None] for frame in keypoints],
        "scores": [np.asarray(frame)[None] for frame in scores],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content | more, protocol=4))
    return path


def write_labels(path, entries):
    """A label file as CSL-Daily's: a gzip-pickled dict."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(pickle.dumps(entries)))
    return path


def entry(name, text="今天我买书。", gloss=("今天", "我", "书", "买"), **more):
    """A clip's entry in a label file."""
    return {"name": name, "text": text, "gloss": list(gloss), **more}


def write_corpus(folder, clips, split="train"):
    """{name: (keypoints, scores)} -> the label file of a corpus of these clips."""
    for name, (keypoints, scores) in clips.items():
        write_pose(Path(folder) / "pose_format" / f"{name}.pkl", keypoints, scores)
    return write_labels(Path(folder) / f"labels.{split}", {name: entry(name) for name in clips})


def save_sound(state, path):
    """A checkpoint of this content, with its checksum behind it."""
    torch.save(state, path)
    raw = path.read_bytes()
    path.write_bytes(raw + train_lite.checksum(raw))


# ------------------------------------------------------------ the demo, small


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The folder of a small demo corpus."""
    return make_demo_corpus(
        tmp_path_factory.mktemp("demo") / "corpus",
        seed=1,
        splits={"train": 40, "dev": 10, "test": 6},
    )


@pytest.fixture(scope="session")
def clips(demo):
    """The small demo's training set."""
    return SignLanguageDataset(demo / "labels.train", scratch_config(), "dev")


def scratch_config(**options):
    """A small mT5 from scratch, without CTC and augmentation unless asked for."""
    small = {
        "d_model": 32,
        "num_layers": 2,
        "num_workers": 0,
        "ctc_weight": 0.0,
        "augment": False,
    }
    return ScratchConfig(**small | options)


def scratch_model(dataset, seed=0, **options):
    """A model from scratch on a data set's texts, in eval mode.

    The same seed gives the same weights.
    """
    torch.manual_seed(seed)
    texts = [entry["text"] for entry in dataset.entries]
    glosses = [entry["gloss"] for entry in dataset.entries]
    model = SignLanguageLite(scratch_config(**options), texts=texts, glosses=glosses)
    return model.eval()


def batch_of(dataset, indices):
    """(src_input, tgt_input) of these clips."""
    return dataset.collate_fn([dataset[i] for i in indices])


def without_dropout(model):
    """Train mode that draws nothing at random, so that figures can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # T5's attention keeps its rate as a number
    return model.train()


# ------------------------------------------------------------ a tiny "pretrained" mT5

MT5_SIZES = {
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 64,
    "num_layers": 6,
    "num_decoder_layers": 6,
    "decoder_start_token_id": 0,
}


@pytest.fixture(scope="session")
def mt5_folder(tmp_path_factory):
    """A folder with mT5's architecture at random, its head untied.

    It has the files that google/mt5-small ships, so no tokenizer.json. The tables have more rows
    than the vocabulary has pieces, as mT5's own do. The vocabulary is the real Chinese one where
    it is at hand, else one that is trained here.
    """
    folder = tmp_path_factory.mktemp("mt5")
    real = SHARED / "mt5_cn_tokenizer" / "spiece.model"
    vocabulary = real.read_bytes() if real.is_file() else train_spiece()
    (folder / "spiece.model").write_bytes(vocabulary)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary).get_piece_size()

    torch.manual_seed(7)
    mt5 = MT5ForConditionalGeneration(MT5Config(vocab_size=pieces + 50, **MT5_SIZES))
    mt5.config.tie_word_embeddings = False
    mt5.lm_head.weight = nn.Parameter(torch.randn(mt5.lm_head.weight.shape) * 32**-0.5)
    for parameter in mt5.shared.parameters():
        nn.init.normal_(parameter, std=0.5)
    mt5.save_pretrained(folder)
    return folder


def train_spiece():
    """A small vocabulary in mT5's format, learnt from sentences of the demo."""
    rng = np.random.default_rng(0)
    texts = [demo_sentence(rng)[0] for _ in range(400)]
    texts += ["他们在学校学习。", "The quick brown fox.", "再见！"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    return model.getvalue()


def pretrained_config(folder, **options):
    usual = {"mt5_path": str(folder), "freeze_decoder_layers": 4, "num_workers": 0}
    return TrainConfig(**usual | options)


def pretrained_model(folder, texts=None, seed=0, **options):
    """A model around the mT5 in this folder, in eval mode; with texts its vocabulary is trimmed."""
    torch.manual_seed(seed)
    model = SignLanguageLite(pretrained_config(folder, **options), texts=texts)
    return model.eval()


def save_best(model, folder):
    """The folder, with all that `SignLanguageLite.from_pretrained` needs."""
    model.save_pretrained(folder)
    return Path(folder)
