"""The README's pictures; needs matplotlib.

python tests/tools/figures.py curves RUN OUT.png        a run's losses and scores over its steps
python tests/tools/figures.py poses DATA_DIR OUT.png    contact sheet: clips as they are read
"""

import argparse
import io
import json
import math
import re
from pathlib import Path

import numpy as np
from common import BODY_BONES, HAND_BONES
from matplotlib.figure import Figure

import datasets_lite as data_files


def curves(run, out):
    """Losses and scores of each validation."""
    lines = Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    steps = [metrics["step"] for metrics in history]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    for name in ("train_loss", "dev_loss"):
        values = [metrics[name] for metrics in history]
        # there is no train_loss before the first step
        values = [math.nan if value is None else value for value in values]
        losses.plot(steps, values, label=name)
    losses.set(title="Loss", xlabel="optimiser steps", ylabel="nats per piece", ylim=(0, None))
    for name in ("exact_match", "bleu4", "shuffled_bleu4"):
        scores.plot(steps, [metrics[name] for metrics in history], label=name)
    scores.set(title="Scores on dev", xlabel="optimiser steps", ylabel="%", ylim=(0, 103))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=80)


def picture_shape(path):
    """-> (width / height of the clip's picture, whether the file tells)."""
    raw = path.read_bytes()
    if path.suffix == ".npz":
        stored = np.load(path)
    else:
        stored = data_files.SafeUnpickler(io.BytesIO(raw)).load()
    if stored.get("w_h") is not None:
        width, height = stored["w_h"]
        return width / height, True
    if data_files.in_pixels(*data_files.load_pose_file(path)):
        return 1.0, True
    return 4 / 3, False


def poses(data_dir, out, clips=2, shots=8):
    """A few clips of each split, frames side by side, in the picture's own shape."""
    files = []
    for split in ("train", "dev", "test"):
        labels = Path(data_dir, f"labels.{split}")
        if labels.is_file():
            entries = list(data_files.load_dataset_file(labels).values())
            for i in np.linspace(0, len(entries) - 1, clips).astype(int):
                files.append(Path(data_dir, "pose_format", entries[i]["pose"]))
    figure = Figure(figsize=(1.5 * shots, 1.7 * len(files)), layout="constrained")
    figure.suptitle("body blue, left hand green, right hand orange; a cross: a joint not seen")
    for file, row in zip(files, figure.subplots(len(files), shots, squeeze=False)):
        keypoints, scores = data_files.load_pose_file(file)
        shape, known = picture_shape(file)
        keypoints[..., 0] *= shape  # 0..1 of the picture's width -> of its height, as y is
        note = "" if known else " (the file does not tell the picture's shape: drawn as 4:3)"
        title = row[0].set_title(file.stem + note, loc="left", fontsize=8)
        title.set_in_layout(False)  # it may reach over the frames beside it
        draw_frames(row, keypoints, scores)
    figure.savefig(out, dpi=60)


def draw_frames(row, keypoints, scores):
    """One clip's frames, an axes each, all in one scale."""
    used = data_files.USED
    parts = [
        (data_files.BODY, BODY_BONES, "C0"),
        (data_files.LEFT, HAND_BONES, "C2"),
        (data_files.RIGHT, HAND_BONES, "C1"),
    ]
    seen = (scores > data_files.THRESHOLD) & np.isfinite(keypoints).all(-1)  # (T, 133)
    places = keypoints[:, used][seen[:, used]]
    low = places.min(axis=0)
    high = places.max(axis=0)
    frames = np.linspace(0, len(keypoints) - 1, len(row)).astype(int)
    for frame, axes in zip(frames, row):
        for joints, bones, colour in parts:
            ends = np.array(joints)[np.array(bones)]  # (bones, 2)
            ends = ends[seen[frame, ends].all(axis=1)]
            axes.plot(*keypoints[frame, ends].T, linewidth=1, color=colour)
        unseen = [joint for joint in used if not seen[frame, joint]]
        crosses = np.clip(np.nan_to_num(keypoints[frame, unseen]), low, high)
        axes.plot(*crosses.T, "rx", markersize=3)
        axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), xticks=[], yticks=[])
        axes.set_aspect("equal")
        axes.set_xlabel(f"frame {frame}", fontsize=7)


ORIGINAL_FAULTS = (
    "labels shifted twice",
    "original freezing",
    "original front-end, as wide beside d_model",
    "no position in the encoder",
    "label smoothing 0.1",
    "warm-up one epoch late",
    "tail gradients leak",
    "padding repeats the last frame, BatchNorm",
)


def faults(results, out):
    """Exact match on dev, the reference first, then each fault of the original put back."""
    found = {}
    for line in Path(results).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 1 and cells[0] not in found:  # the first table is that of real sentences
            found[cells[0]] = [float(number) for number in re.findall(r"\d+\.\d+", cells[1])]
    names = ["the reference", *ORIGINAL_FAULTS]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        median, *spread = found[name]
        low, high = spread or (median, median)
        colour = "C0" if row == 0 else "C3"
        axes.barh(row, median, color=colour, height=0.6)
        axes.plot([low, high], [row, row], color="black", linewidth=1.5, marker="|")
        axes.text(max(high, median) + 1.5, row, f"{median:.0f}", va="center", fontsize=9)
    axes.set_yticks(
        range(len(names)), [name.replace(", as wide beside d_model", "") for name in names]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("dev sentences that are exactly right, % (median and range of three seeds)")
    axes.set_title("One fault of the original put back, 200 steps on real-motion sentences")
    figure.savefig(out, dpi=80)


FIGURES = {"curves": curves, "poses": poses, "faults": faults}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("source", help="what it is drawn from")
    parser.add_argument("out", metavar="OUT.png")
    args = parser.parse_args()
    FIGURES[args.figure](args.source, args.out)


if __name__ == "__main__":
    main()
