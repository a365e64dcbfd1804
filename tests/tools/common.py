"""What the slow scripts share: paths, notes of what a run did, data, an mT5 to start from, tables.

Import this module before transformers and before the product: it puts the repository's root on
sys.path, so that `from config_lite import ...` works, and keeps everything away from the network.
"""

import math
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["HF_HUB_OFFLINE"] = "1"  # is read when transformers is imported

import torch
from torch import nn
from transformers import MT5Config, MT5ForConditionalGeneration

from datasets_lite import SignLanguageDataset, load_dataset_file

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"  # real data, used where they are there
# bones: positions in datasets_lite's BODY, and in a hand
BODY_BONES = [(0, 1), (0, 2), (0, 3), (0, 4), (3, 4), (3, 5), (5, 7), (4, 6), (6, 8)]
HAND_BONES = [(0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, 21)]
CSL_DAILY_LABELS = SHARED / "csl_daily_labels" / "labels.train"
VALIDATIONS = 10  # of a run, about


# ---------------------------------------------------------------------- notes of a run


class NotApplicable(Exception):
    """The row means nothing on this corpus or beside this reference; the message says why."""


NOTES = []  # of this process: what it was seen to do


def note(text):
    """Keep what is worth knowing about this run; it stands beside the result."""
    if text not in NOTES:
        NOTES.append(text)


def prove(text, check):
    """Note what a patch does, once check() has shown it; later calls with this text check no more.

    Where check() is false the run fails: no row silently repeats the reference.
    """
    if text in NOTES:
        return
    if not check():
        raise AssertionError(f"the row does not do what it names: {text}")
    note(text)


# ---------------------------------------------------------------------- data


def read_texts(label_file):
    """The texts of a label file, in its order."""
    return [entry["text"] for entry in load_dataset_file(label_file).values()]


def count_clips(config):
    """How many clips labels.train names."""
    return len(load_dataset_file(Path(config.data_dir) / "labels.train"))


def load_split(config, split):
    """A split of the configuration's corpus as the product reads it."""
    return SignLanguageDataset(Path(config.data_dir) / f"labels.{split}", config, split)


# ---------------------------------------------------------------------- models


def random_mt5(**sizes):
    """An mT5 of these sizes at random; its head is a table of its own, as in the published mT5."""
    mt5 = MT5ForConditionalGeneration(MT5Config(decoder_start_token_id=0, **sizes))
    mt5.config.tie_word_embeddings = False  # transformers 5 would tie the head to mt5.shared
    mt5.set_input_embeddings(mt5.shared)  # one table for both stacks, untied or not
    # at this deviation the first logits are about 1, so the first loss is about ln(pieces)
    head = torch.randn(mt5.lm_head.weight.shape) * mt5.config.d_model**-0.5  # (pieces, d_model)
    mt5.lm_head.weight = nn.Parameter(head)
    return mt5


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------------- tables


def print_table(head, rows):
    """Print Markdown, a line as soon as its row is there: rows may come one by one."""
    print_row(head)
    print("|" + "---|" * len(head), flush=True)
    for row in rows:
        print_row(row)


def print_row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def median_and_range(values, digits=1):
    """A cell: the median, and the range where there is one."""
    low = format_figure(min(values), digits)
    middle = format_figure(statistics.median(values), digits)
    high = format_figure(max(values), digits)
    if low == high:
        return middle
    return f"{middle} ({low} to {high})"


def format_figure(value, digits):
    """Infinity is a goal that was never reached, NaN a figure that the run does not have."""
    if math.isinf(value):
        return "never"
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}f}"
