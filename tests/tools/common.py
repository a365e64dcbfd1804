"""What the scripts in this folder share: where the project is, proofs of a patch, bones, tables.

Imported first: it puts the project on the path and keeps the network out.
"""

import math
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"  # real data, used where it is there
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# bones: positions in datasets_lite's BODY, and in a hand
BODY_BONES = [(0, 1), (0, 2), (0, 3), (0, 4), (3, 4), (3, 5), (5, 7), (4, 6), (6, 8)]
HAND_BONES = [(0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, 21)]
PROOFS = []  # what this process was seen to do


class NotApplicable(Exception):
    """A row means nothing on this corpus or beside this reference; the message says why."""


def note(text):
    """Keep what a run tells of itself, once."""
    if text not in PROOFS:
        PROOFS.append(text)


def prove(text, holds):
    """Note what a patch did; where it did nothing the run fails: no row repeats the reference."""
    if not holds:
        raise AssertionError(f"the row does not do what it names: {text}")
    note(text)


def load_split(config, split):
    """One split of the corpus that a config names."""
    from datasets_lite import SignLanguageDataset

    return SignLanguageDataset(Path(config.data_dir) / f"labels.{split}", config, split)


def count_clips(config):
    """Of the training split, before any is left out."""
    from datasets_lite import load_dataset_file

    return len(load_dataset_file(Path(config.data_dir) / "labels.train"))


def cell(values, digits=1):
    """Median, with the range where there is one."""

    def show(value):
        if math.isinf(value):
            return "never"
        if math.isnan(value):
            return "–"
        return f"{value:.{digits}f}"

    low = show(min(values))
    high = show(max(values))
    middle = show(statistics.median(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def table(heads, rows):
    """Markdown, as lines; rows may come one by one."""
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
