"""From files to batches: what is read, what is refused; no pose whatever makes a batch unfit."""

import codecs
import gzip
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
import unicodedata
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    entry,
    random_clip,
    scratch_config,
    shared,
    write_corpus,
    write_labels,
    write_pose,
)

import datasets_lite
from config_lite import TrainConfig
from datasets_lite import (
    BODY,
    LEFT,
    RIGHT,
    THRESHOLD,
    DataError,
    SignLanguageDataset,
    augment_clip,
    crop_scale,
    load_dataset_file,
    load_part_kp,
    load_pose_file,
    make_demo_corpus,
    read_clip,
)
from train_lite import cut, plan_epoch

NAN = float("nan")
INF = float("inf")
REFUSED = (DataError, pickle.UnpicklingError)


def assert_finite_and_bounded(parts, where=""):
    """No tensor of a clip has a number that is not finite or not within -1..1."""
    complaints = []
    for name, tensor in parts.items():
        largest = tensor.abs().max()
        if not tensor.isfinite().all() or largest > 1:
            nans = tensor.isnan().sum()
            infinities = tensor.isinf().sum()
            complaints.append(f"{name}: {nans} NaN, {infinities} Inf, largest {largest}")
    assert not complaints, f"{where} {complaints}"


def assert_reads_as(path, keypoints, scores):
    """A pose file holds these arrays."""
    found_keypoints, found_scores = load_pose_file(path)
    assert np.array_equal(found_keypoints, keypoints)
    assert np.array_equal(found_scores, scores)


def names_of(dataset):
    """The clips that a data set kept, in its order."""
    return [entry["name"] for entry in dataset.entries]


# ------------------------------------------------------------ crop_scale


def motion_of(frames=6, joints=9, seed=0):
    """(T, V, 3): x, y, confidence."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(0.1, 0.9, (frames, joints, 2))
    confidences = rng.uniform(0, 1.1, (frames, joints, 1))
    return np.concatenate([places, confidences], -1)


def crop_by_hand(motion, threshold):
    """The contract's words, joint by joint."""
    usable = []
    for index in np.ndindex(motion.shape[:2]):  # (frame, joint)
        x, y, confidence = motion[index]
        if confidence > threshold and np.isfinite(x) and np.isfinite(y):
            usable.append(index)
    places = [motion[index][:2] for index in usable]
    low = np.min(places, 0)
    high = np.max(places, 0)
    scale = max(high - low)
    offset = (low + high - scale) / 2
    result = np.zeros(motion.shape)
    for index in usable:
        result[index][:2] = np.clip(2 * (motion[index][:2] - offset) / scale - 1, -1, 1)
        result[index][2] = np.clip(motion[index][2], 0, 1)
    return result, scale, offset


@pytest.mark.parametrize("seed", range(5))
def test_crop_scale_is_one_box_for_the_clip(seed):
    rng = np.random.default_rng(seed)
    motion = motion_of(seed=seed)
    motion[rng.random(motion.shape) < 0.05] = rng.choice([NAN, INF, -INF])
    result, scale, offset = crop_scale(motion, THRESHOLD)
    wanted, wanted_scale, wanted_offset = crop_by_hand(motion, THRESHOLD)
    assert np.allclose(result, wanted, atol=1e-6), f"off by {np.abs(result - wanted).max():.2e}"
    assert np.isclose(scale, wanted_scale)
    assert np.allclose(offset, wanted_offset)
    assert np.abs(result[..., :2]).max() == pytest.approx(1, abs=1e-6), (
        "the longer side spans -1..1"
    )


def test_half_precision_loses_no_hand_of_a_clip_wider_than_its_largest_number():
    keypoints = np.full((1, 133, 2), -65000, np.float16)
    keypoints[0, ::2] = 65000  # 130,000 wide: infinite as float16
    pose = load_part_kp(keypoints, np.ones((1, 133), np.float16))
    assert pose["left"][0, :2].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert pose["right"][0, :2].tolist() == [[0, 0, 1], [-1, -1, 1]]


def test_crop_scale_leaves_its_input_alone():
    motion = motion_of()
    motion[0, 0] = NAN
    before = motion.copy()
    crop_scale(motion, THRESHOLD)
    assert np.array_equal(motion, before, equal_nan=True)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("channel", range(3))
def test_one_bad_joint_costs_that_joint_and_not_the_clip(channel, bad):
    motion = motion_of()
    motion[..., 2] = 0.9
    motion[2, 3, 2] = 0.0
    without, scale, _ = crop_scale(motion, THRESHOLD)  # the joint unseen
    motion[2, 3, 2] = 0.9
    motion[2, 3, channel] = bad
    result, scale_with, _ = crop_scale(motion, THRESHOLD)
    if channel == 2 and bad == INF:  # a confidence above the threshold, if an odd one: clipped to 1
        assert result[2, 3, 2] == 1
    else:
        assert np.array_equal(result, without)
        assert scale_with == scale
        assert not result[2, 3].any()


def test_a_joint_at_the_threshold_is_unseen_and_one_above_it_is_seen():
    motion = motion_of()
    motion[..., 2] = 0.9
    motion[0, 0, 2] = THRESHOLD
    motion[0, 1, 2] = np.nextafter(THRESHOLD, 1)
    result, _, _ = crop_scale(motion, THRESHOLD)
    assert THRESHOLD == 0.3
    assert not result[0, 0].any()
    assert result[0, 1, 2] > 0


def test_confidence_is_clipped_to_one():
    motion = motion_of()
    motion[..., 2] = 1.08  # seen in real files
    result, _, _ = crop_scale(motion, THRESHOLD)
    assert result[..., 2].max() == 1


@pytest.mark.parametrize("usable", [0, 1, 3, 4])
def test_fewer_than_four_usable_joints_are_no_clip(usable):
    motion = motion_of()
    motion[..., 2] = 0
    motion[0, :usable, 2] = 0.9
    result, scale, offset = crop_scale(motion, THRESHOLD)
    if usable < 4:
        assert not result.any()
        assert scale == 0
        assert offset is None
    else:
        assert result.any()
        assert scale > 0
        assert offset is not None


@pytest.mark.parametrize("points", ["one point", "a span beyond float64", "denormal span"])
def test_a_degenerate_box_is_no_clip(points):
    motion = motion_of()
    motion[..., 2] = 0.9
    if points == "one point":
        motion[..., :2] = 0.5
    elif points == "a span beyond float64":
        motion[..., :2] = 0
        motion[0, 0, 0] = 1.7e308
        motion[0, 1, 0] = -1.7e308
    else:
        motion[..., :2] = 0
        motion[0, 0, 0] = 5e-324
    result, scale, offset = crop_scale(motion, THRESHOLD)
    assert not result.any(), f"scale {scale}, offset {offset}"
    assert scale == 0
    assert offset is None


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_no_bit_pattern_whatever_makes_a_nan_or_a_warning(kind):
    """Random bits: NaNs of all kinds, signalling ones, Inf, denormals, the largest numbers."""
    for seed in range(20):
        raw = np.random.default_rng(seed).bytes(5 * 133 * 3 * np.dtype(kind).itemsize)
        motion = np.frombuffer(raw, kind).reshape(5, 133, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result, scale, _ = crop_scale(motion, THRESHOLD)
            parts = load_part_kp(motion[..., :2], motion[..., 2])
        assert np.isfinite(result).all(), f"seed {seed}"
        assert np.isfinite(scale), f"seed {seed}"
        assert np.abs(result).max() <= 1, f"seed {seed}"
        assert_finite_and_bounded(parts, f"seed {seed}:")


# ------------------------------------------------------------ hostile poses


# Each changes the arrays of a sound clip in place.


def place(where, value):
    def change(keypoints, scores):
        keypoints[where] = value

    return change


def confidence(where, value):
    def change(keypoints, scores):
        scores[where] = value

    return change


def times(factor):
    def change(keypoints, scores):
        keypoints *= np.float32(factor)

    return change


def all_zeros(keypoints, scores):
    keypoints[:] = 0
    scores[:] = 0


def wider_than_float32(keypoints, scores):
    keypoints[0, 0] = 3e38
    keypoints[0, 5] = -3e38


def random_bits(keypoints, scores):
    rng = np.random.default_rng(0)
    keypoints[:] = np.frombuffer(rng.bytes(keypoints.nbytes), np.float32).reshape(keypoints.shape)


HOSTILE = {
    "all zeros": all_zeros,
    "zeros, but sure": place(..., 0),
    "all NaN": place(..., NAN),
    "all Inf": place(..., INF),
    "all -Inf": place(..., -INF),
    "confidences NaN": confidence(..., NAN),
    "confidences Inf": confidence(..., INF),
    "confidences negative": confidence(..., -1),
    "confidences 1e30": confidence(..., 1e30),
    "all 1e30": place(..., 1e30),
    "all 1e38": place(..., 1e38),
    "x 1e30": place((..., 0), 1e30),
    "times 1e30": times(1e30),
    "times 1e38": times(1e38),
    "wider than float32": wider_than_float32,
    "random bits": random_bits,
    "one joint NaN": place((2, 5), NAN),
    "one joint Inf": place((2, 5), INF),
    "one joint 1e30": place((2, 5), 1e30),
    "one joint 1e38": place((2, 5), 1e38),
    "a wrist NaN": place((2, 91), NAN),
    "a finger Inf": place((2, 95), INF),
    "a finger 1e38": place((2, 95), 1e38),
    "one confidence NaN": confidence((2, 5), NAN),
    "a frame NaN": place(3, NAN),
    "tiny": times(1e-42),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_poses_give_no_nan_and_no_warning(name):
    keypoints, scores = random_clip()
    HOSTILE[name](keypoints, scores)
    keypoints_before = keypoints.copy()
    scores_before = scores.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = load_part_kp(keypoints, scores)
    assert_finite_and_bounded(parts)
    assert np.array_equal(keypoints, keypoints_before, equal_nan=True)
    assert np.array_equal(scores, scores_before, equal_nan=True)


@pytest.mark.parametrize("augment", [False, True])
def test_a_batch_of_hostile_clips_is_free_of_nan(tmp_path, augment):
    """Through files, the data set and collate_fn; what cannot be used at all is left out."""
    made = {}
    for i, (name, change) in enumerate(HOSTILE.items()):
        keypoints, scores = random_clip(seed=i)
        change(keypoints, scores)
        made[name] = (keypoints, scores)
    labels = write_corpus(tmp_path / "data", made)
    config = scratch_config(on_bad_clip="skip", output_dir=str(tmp_path / "run"), augment=augment)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = SignLanguageDataset(labels, config, "train")
        src_input, _ = dataset.collate_fn([dataset[i] for i in range(len(dataset))])
    kept = set(names_of(dataset))
    assert_finite_and_bounded({part: src_input[part] for part in ("body", "left", "right")})
    assert {
        "one joint NaN",
        "one joint Inf",
        "a wrist NaN",
        "a finger Inf",
        "one confidence NaN",
        "a frame NaN",
    } <= kept
    assert not {"all zeros", "all NaN", "all Inf", "confidences NaN", "confidences negative"} & kept


# ------------------------------------------------------------ load_part_kp


def test_the_parts_are_the_joints_they_are_said_to_be():
    keypoints, scores = random_clip(7)
    parts = load_part_kp(keypoints, scores)
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    assert shapes == {"body": (7, 9, 3), "left": (7, 21, 3), "right": (7, 21, 3)}
    assert all(tensor.dtype == torch.float32 for tensor in parts.values())
    motion = np.concatenate([keypoints[:, BODY], scores[:, BODY, None]], -1)
    body, scale, _ = crop_scale(motion, 0.3)
    assert np.allclose(parts["body"], body, atol=1e-6)
    for name, joints in (("left", LEFT), ("right", RIGHT)):
        wanted = np.clip((keypoints[:, joints] - keypoints[:, joints[:1]]) / scale, -1, 1)
        off = np.abs(parts[name][..., :2].numpy() - wanted)
        assert off.max() < 1e-5, f"{name}: {off.max()}"
    assert list(range(91, 112)) == LEFT
    assert list(range(112, 133)) == RIGHT


def test_a_hand_does_not_change_when_it_moves_as_a_whole():
    keypoints, scores = random_clip()
    moved = keypoints.copy()
    moved[:, LEFT] += [0.05, -0.02]
    before = load_part_kp(keypoints, scores)
    after = load_part_kp(moved, scores)
    off = (before["left"] - after["left"]).abs().max()
    assert torch.allclose(before["left"], after["left"], atol=1e-4), f"off by {off}"
    assert torch.equal(before["right"], after["right"])
    assert torch.equal(before["body"], after["body"])


@pytest.mark.parametrize("fault", ["low", "nan"])
@pytest.mark.parametrize("part, wrist", [("left", 91), ("right", 112)])
def test_a_hand_whose_first_joint_is_unseen_is_zero_in_that_frame(part, wrist, fault):
    keypoints, scores = random_clip()
    whole = load_part_kp(keypoints, scores)
    if fault == "low":
        scores[4, wrist] = 0.3
    else:
        keypoints[4, wrist] = NAN
    parts = load_part_kp(keypoints, scores)
    other_frames = [frame for frame in range(len(scores)) if frame != 4]
    assert not parts[part][4].any()
    assert torch.equal(parts[part][other_frames], whole[part][other_frames])
    other_hand = "right" if part == "left" else "left"
    assert torch.equal(parts[other_hand], whole[other_hand])
    assert torch.equal(parts["body"], whole["body"])


def test_the_pose_does_not_depend_on_where_the_signer_stands_or_how_large():
    keypoints, scores = random_clip()
    here = load_part_kp(keypoints, scores)
    there = load_part_kp(keypoints * 640 + [30, 200], scores)
    worst = max((here[part] - there[part]).abs().max().item() for part in here)
    assert worst < 1e-3, f"differs by {worst}"


def test_exchanging_two_joints_exchanges_their_rows():
    """The original took the mean over joints: nothing may be lost before the model, either."""
    keypoints, scores = random_clip()
    joints = list(range(133))
    joints[95], joints[99] = joints[99], joints[95]
    rows = list(range(21))  # the same two, in the left hand
    rows[4], rows[8] = rows[8], rows[4]
    before = load_part_kp(keypoints, scores)["left"]
    after = load_part_kp(keypoints[:, joints], scores[:, joints])["left"]
    assert torch.equal(before[:, rows], after)
    assert not torch.equal(before, after)


def test_the_real_clip_has_its_known_figures():
    path = shared("csl_news/pose_format") / "Common-Concerns_20200730_0-87_468436.pkl"
    keypoints, scores = load_pose_file(path)
    parts = load_part_kp(keypoints, scores)
    assert keypoints.shape == (87, 133, 2)
    assert scores.shape == (87, 133)

    def box_side(joints):
        motion = np.concatenate([keypoints[:, joints], scores[:, joints, None]], -1)
        _, scale, _ = crop_scale(motion, 0.3)
        return round(scale, 4)

    def extent(part, axis):
        is_seen = part[..., 2] > 0
        values = part[..., axis][is_seen]
        return [round(values.min().item(), 2), round(values.max().item(), 2)]

    assert box_side([0, 3, 4, 5, 6, 7, 8, 9, 10]) == 0.6246
    # with the hips, which are out of the frame
    assert box_side([0, 5, 6, 7, 8, 9, 10, 11, 12]) == 0.7611
    found = {name: [extent(part, 0), extent(part, 1)] for name, part in parts.items()}
    assert found == {
        "body": [[-1.0, 1.0], [-0.99, 0.99]],
        "left": [[-0.26, 0.15], [-0.26, 0.16]],
        "right": [[-0.08, 0.25], [-0.31, 0.1]],
    }


# ------------------------------------------------------------ load_pose_file: forms


def forms_of(keypoints, scores):
    """{what: the content of a pose file in that form}, all of one clip."""
    k = keypoints
    s = scores
    return {
        "list of (1, 133, 2)": {
            "keypoints": [frame[None] for frame in k],
            "scores": [frame[None] for frame in s],
        },
        "list of (133, 2)": {"keypoints": list(k), "scores": list(s)},
        "(T, 1, 133, 2)": {"keypoints": k[:, None], "scores": s[:, None]},
        "(T, 133, 2)": {"keypoints": k, "scores": s},
        "two persons": {
            "keypoints": np.stack([k, k + 9], 1),
            "scores": np.stack([s, 0 * s], 1),
        },
        "float64": {"keypoints": k.astype(np.float64), "scores": s.astype(np.float64)},
        "Fortran order": {"keypoints": np.asfortranarray(k), "scores": np.asfortranarray(s)},
        "big-endian": {"keypoints": k.astype(">f4"), "scores": s.astype(">f8")},
        "tuples": {"keypoints": tuple(k), "scores": tuple(s[:, None])},
        "OrderedDict": OrderedDict(keypoints=k, scores=s),
        "further fields": {
            "keypoints": k,
            "scores": s,
            "w_h": [512, np.int64(512)],
            "fps": np.float32(25),
            "tags": {"a", "b"},
            "start": None,
            "video": "x.mp4",
            "raw": b"\x00\xff",
        },
    }


FORMS = list(forms_of(*random_clip(5)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", range(6))
def test_every_form_and_protocol_gives_the_same_arrays(tmp_path, form, protocol):
    keypoints, scores = random_clip(5)
    path = tmp_path / "clip.pkl"
    content = forms_of(keypoints, scores)[form]
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found_keypoints, found_scores = load_pose_file(path)
    assert np.array_equal(found_keypoints, keypoints)
    assert np.array_equal(found_scores, scores)
    assert found_keypoints.dtype == np.float32
    assert found_scores.dtype == np.float32


def short_text(raw):
    """A text in a pickle of protocol 4 or later: SHORT_BINUNICODE, its length, itself."""
    return b"\x8c" + bytes([len(raw)]) + raw


def renamed(raw, old, new):
    """A pickle as another numpy writes it: its module's name, in the form of any protocol."""
    if raw[2:3] == b"\x95":  # FRAME and the frame's length, which changes: frames are optional
        raw = raw[:2] + raw[11:]
    raw = raw.replace(b"c" + old, b"c" + new)
    for module in (b".multiarray", b".numeric"):
        raw = raw.replace(short_text(old + module), short_text(new + module))
    return raw


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("new", [b"numpy.core", b"numpy._core"], ids=["numpy 1", "numpy 2"])
def test_arrays_pickled_by_either_numpy_are_read(tmp_path, protocol, new):
    keypoints, scores = random_clip(4)
    old = b"numpy._core" if hasattr(np, "_core") else b"numpy.core"
    content = {"keypoints": list(keypoints[:, None]), "scores": scores, "start": np.int64(1)}
    raw = renamed(pickle.dumps(content, protocol), old, new)
    assert new + b"." in raw, "the test's own renaming failed"
    assert old == new or old + b"." not in raw, "the test's own renaming failed"
    path = tmp_path / "clip.pkl"
    path.write_bytes(raw)
    assert_reads_as(path, keypoints[1:], scores[1:])


def test_npz_is_the_pickle_free_form(tmp_path):
    keypoints, scores = random_clip(5)
    path = tmp_path / "clip.npz"
    np.savez_compressed(path, keypoints=keypoints[:, None], scores=scores, start=1, end=4)
    assert_reads_as(path, keypoints[1:4], scores[1:4])


@pytest.mark.parametrize(
    "more, wanted",
    [
        ({"start": 2}, slice(2, None)),
        ({"end": 5}, slice(0, 5)),
        ({"start": 2, "end": 5}, slice(2, 5)),
        ({"start": 0, "end": 8}, slice(0, 8)),
    ],
)
def test_start_and_end_cut_the_clip(tmp_path, more, wanted):
    keypoints, scores = random_clip(8)
    path = write_pose(tmp_path / "clip.pkl", keypoints, scores, **more)
    assert_reads_as(path, keypoints[wanted], scores[wanted])


def test_pixels_are_divided_by_the_size_and_known_by_their_values(tmp_path):
    keypoints, scores = random_clip()
    pixels = keypoints * np.float32([640, 480])

    path = write_pose(tmp_path / "a.pkl", pixels, scores, w_h=[640, 480])
    found, _ = load_pose_file(path)
    assert np.allclose(found, keypoints, atol=1e-5), "pixels with w_h are divided by it"

    path = write_pose(tmp_path / "b.pkl", keypoints, scores, w_h=[640, 480])
    found, _ = load_pose_file(path)
    assert np.array_equal(found, keypoints), "w_h stands on normalised clips, too: left alone"

    path = write_pose(tmp_path / "c.pkl", pixels, scores)
    found, _ = load_pose_file(path)
    assert np.array_equal(found, pixels), "pixels without w_h are left to crop_scale"


def test_unseen_joints_do_not_decide_whether_a_clip_is_in_pixels(tmp_path):
    keypoints, scores = random_clip()
    scores[:, 11:91] = 0.1
    keypoints[:, 11:91] = 5000  # what a detector writes for a joint that it did not find
    found, _ = load_pose_file(write_pose(tmp_path / "a.pkl", keypoints, scores, w_h=[640, 480]))
    assert np.array_equal(found, keypoints)


# ------------------------------------------------------------ load_pose_file: bad ones


def doubling_lists(depth):
    """Each list holds the next one twice: a few bytes a level, 2 ** depth places to walk over."""
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


K, S = random_clip(4)  # keypoints and scores of a sound clip
BAD_POSES = {
    "17 joints": {"keypoints": K[:, :17], "scores": S[:, :17]},
    "134 joints": {"keypoints": np.zeros((4, 134, 2)), "scores": np.zeros((4, 134))},
    "no frames, lists": {"keypoints": [], "scores": []},
    "no frames, arrays": {"keypoints": np.zeros((0, 133, 2)), "scores": np.zeros((0, 133))},
    "no frames, person axis": {
        "keypoints": np.zeros((0, 1, 133, 2)),
        "scores": np.zeros((0, 1, 133)),
    },
    "no person": {"keypoints": np.zeros((4, 0, 133, 2)), "scores": np.zeros((4, 0, 133))},
    "lengths differ": {"keypoints": K, "scores": S[:3]},
    "start is end": {"keypoints": K, "scores": S, "start": 2, "end": 2},
    "start after end": {"keypoints": K, "scores": S, "start": 3, "end": 1},
    "start after the clip": {"keypoints": K, "scores": S, "start": 4},
    "start negative": {"keypoints": K, "scores": S, "start": -1},
    "start is a word": {"keypoints": K, "scores": S, "start": "first"},
    "end is NaN": {"keypoints": K, "scores": S, "end": NAN},
    "end is a list": {"keypoints": K, "scores": S, "end": [3]},
    "no scores": {"keypoints": K},
    "no keypoints": {"scores": S},
    "empty dict": {},
    "a list": [K, S],
    "None": None,
    "an array": K,
    "words": {"keypoints": "many", "scores": "many"},
    "None inside": {"keypoints": None, "scores": None},
    "ragged": {"keypoints": [K[0], K[1, :5], K[2], K[3]], "scores": S},
    "arrays of one number": {"keypoints": K, "scores": list(S[:, 0])},
    "complex": {"keypoints": [complex(1, 2)] * 4, "scores": S},
    "pixels, size 0": {"keypoints": K * 500, "scores": S, "w_h": [0, 500]},
    "pixels, size NaN": {"keypoints": K * 500, "scores": S, "w_h": [NAN, 500]},
    "pixels, size of one": {"keypoints": K * 500, "scores": S, "w_h": [500]},
    "pixels, size a word": {"keypoints": K * 500, "scores": S, "w_h": "large"},
}
GOOD = pickle.dumps({"keypoints": list(K[:, None]), "scores": list(S[:, None])}, protocol=4)
BAD_BYTES = {
    "empty": b"",
    "text": b"not a pickle",
    "zeros": b"\x00" * 100,
    "json": b"{}",
    "half": GOOD[: len(GOOD) // 2],
    "without its end": GOOD[:-1],
    "gzip": gzip.compress(GOOD),
    "persistent": b"\x80\x04P0\n.",
    "extension": b"\x80\x02\x82\x07.",
    "unknown encoding": b"\x80\x05\x8c\x02\xff\xfe.",
}


@pytest.mark.parametrize("name", [*BAD_POSES, *BAD_BYTES])
def test_a_bad_pose_file_is_refused_by_name(tmp_path, name):
    path = tmp_path / "the_clip.pkl"
    if name in BAD_BYTES:
        path.write_bytes(BAD_BYTES[name])
    else:
        path.write_bytes(pickle.dumps(BAD_POSES[name]))
    with pytest.raises(DataError, match="the_clip.pkl"):
        load_pose_file(path)


def test_a_missing_pose_file_is_an_error_and_never_zeros(tmp_path):
    for name in ("clip.pkl", "clip.npz"):
        with pytest.raises(DataError, match=name):
            load_pose_file(tmp_path / name)
    with pytest.raises(DataError):
        load_pose_file(tmp_path)  # a folder


def test_a_bad_npz_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "whole.npz", keypoints=K, scores=S)
    whole = (tmp_path / "whole.npz").read_bytes()
    objects = np.array([object_with_payload()], object)
    np.savez(tmp_path / "objects.npz", keypoints=objects, scores=S)
    np.savez(tmp_path / "joints.npz", keypoints=K[:, :17], scores=S[:, :17])
    np.savez(tmp_path / "alone.npz", keypoints=K)
    for name, raw in (
        ("empty", b""),
        ("text", b"not a zip"),
        ("half", whole[: len(whole) // 2]),
        ("a pickle", GOOD),
    ):
        (tmp_path / f"{name}.npz").write_bytes(raw)
    for name in ("objects", "joints", "alone", "empty", "text", "half", "a pickle"):
        with pytest.raises(DataError, match=f"{name}.npz"):
            load_pose_file(tmp_path / f"{name}.npz")


def test_a_damaged_pose_file_never_ends_in_another_exception(tmp_path):
    """Cut at many places, or with single bytes changed: read, or refused as data; nothing else."""
    rng = np.random.default_rng(0)
    path = tmp_path / "clip.pkl"
    clip = {"keypoints": K[:1], "scores": S[:1], "start": 0, "w_h": [1, 1]}
    short = pickle.dumps(clip, protocol=4)
    cases = [GOOD[:cut] for cut in np.linspace(0, len(GOOD) - 1, 60).astype(int)]
    for raw in (GOOD, short):
        for _ in range(150):
            changed = bytearray(raw)
            # mostly near the beginning, where the pickle's structure is
            reach = len(raw) if rng.random() < 0.2 else 250
            changed[rng.integers(reach)] = rng.integers(256)
            cases.append(bytes(changed))
    odd = []
    for i, raw in enumerate(cases):
        path.write_bytes(raw)
        try:
            with warnings.catch_warnings():
                # a changed byte may make it an array of another dtype
                warnings.simplefilter("ignore")
                load_pose_file(path)
        except REFUSED as error:
            if "clip.pkl" not in str(error):
                odd.append(f"case {i} names no file: {error}")
        except Exception as error:
            odd.append(f"case {i}: {error!r}")
    assert not odd, f"{len(odd)} of {len(cases)}: {odd[:5]}"


@pytest.mark.parametrize("where", ["as the frames", "as a later frame", "inside a frame"])
def test_nested_lists_that_double_at_each_level_are_refused_at_once(tmp_path, where):
    """200 bytes of file; at 40 levels a walk over it would take days.

    27 levels keep a failing test short.
    """
    path = tmp_path / "bomb.pkl"
    bomb = doubling_lists(27)
    keypoints = {
        "as the frames": bomb,
        "as a later frame": [K[0], bomb],
        "inside a frame": [[bomb]],
    }
    frames = keypoints[where]
    path.write_bytes(pickle.dumps({"keypoints": frames, "scores": S[: len(frames)]}))
    begun = time.process_time()
    with pytest.raises(DataError, match="bomb.pkl"):
        load_pose_file(path)
    seconds = time.process_time() - begun
    assert seconds < 0.5, f"{path.stat().st_size} bytes took {seconds:.1f} s"


# ------------------------------------------------------------ untrusted pickles


class Reduces:
    """Pickled, this is a call of function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stateful:
    """Pickled, this is an allowed reconstruction that is then given another state."""

    def __init__(self, reduced, state):
        self.reduced = (*reduced[:2], state)

    def __reduce__(self):
        return self.reduced


def object_with_payload(command="true"):
    return Reduces(os.system, command)


def call(name, *arguments):
    """A pickle, written by hand, that calls a global which pickle.dumps might not name so."""
    return b"\x80\x02" + pickled_global(name) + pickled(arguments) + b"R."


def pickled_global(name):
    """GLOBAL: a function or class by its module and name."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode()


def pickled_text(value):
    """BINUNICODE: a text."""
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def pickled(value):
    """What protocol 2 writes for a value, without the pickle's first two bytes and its end."""
    return pickle.dumps(value, 2)[2:-1]


def attacks(marker):
    """{what: (pickle that would create the file `marker`, the global it must be refused for)}."""
    command = f"touch {marker}"
    python = f"open({str(marker)!r}, 'w').close()"
    evil = object_with_payload(command)
    os_module = os.system.__module__  # "posix" or "nt"
    system = f"{os_module}.system"
    array = np.zeros(2, np.float32).__reduce__()
    found = {f"os.system, protocol {p}": (pickle.dumps(evil, p), system) for p in range(6)}
    found |= {
        "eval": (pickle.dumps(Reduces(eval, python)), "builtins.eval"),
        "eval, Python 2's name": (call("__builtin__.eval", python), "builtin"),
        "exec": (pickle.dumps(Reduces(exec, python)), "builtins.exec"),
        "compile": (pickle.dumps(Reduces(compile, python, "x", "exec")), "builtins.compile"),
        "open": (pickle.dumps(Reduces(open, str(marker), "w")), "open"),
        "subprocess": (
            pickle.dumps(Reduces(subprocess.Popen, ["touch", str(marker)])),
            "subprocess.Popen",
        ),
        "import": (pickle.dumps(Reduces(__import__, "os")), "builtins.__import__"),
        "importlib": (call("importlib.import_module", "os"), "importlib.import_module"),
        "getattr chain": (
            pickle.dumps(Reduces(getattr, Reduces(__import__, "os"), "system")),
            "builtins.getattr",
        ),
        "getattr of what is allowed": (
            pickle.dumps(Reduces(getattr, np.ndarray, "tofile")),
            "builtins.getattr",
        ),
        "dotted name": (
            b"\x80\x04" + pickled_text("numpy") + pickled_text("ndarray.tofile") + b"\x93.",
            "numpy.ndarray.tofile",
        ),
        "dotted name of a container": (
            b"\x80\x04" + pickled_text("builtins") + pickled_text("bytearray.__class__") + b"\x93.",
            "builtins.bytearray.__class__",
        ),
        "name from the memo": (
            b"\x80\x04"
            + pickled_text(os_module)
            + b"q\x000"
            + pickled_text("system")
            + b"q\x010h\x00h\x01\x93"
            + pickled_text(command)
            + b"\x85R.",
            system,
        ),
        "INST": (f"(S'{command}'\ni{os_module}\nsystem\n.".encode(), system),
        "OBJ": (f"(c{os_module}\nsystem\nS'{command}'\no.".encode(), system),
        "NEWOBJ": (
            b"\x80\x02" + pickled_global("subprocess.Popen") + pickled_text(command) + b"\x85\x81.",
            "subprocess.Popen",
        ),
        "operator": (call("operator.attrgetter", "system"), "operator.attrgetter"),
        "functools": (call("functools.partial", "x"), "functools.partial"),
        "codecs.decode": (call("codecs.decode", "x", "rot13"), "codecs.decode"),
        "_codecs.lookup": (call("_codecs.lookup", "rot13"), "_codecs.lookup"),
        "pickle in a pickle": (call("pickle.loads", pickle.dumps(evil)), "pickle.loads"),
        "copyreg": (call("copyreg.add_extension", "os", "system", 7), "copyreg.add_extension"),
        "torch.load": (call("torch.load", str(marker)), "torch.load"),
        "numpy.load": (call("numpy.load", str(marker)), "numpy.load"),
        "numpy.core's neighbour": (
            call("numpy.core.multiarray.fromfile", str(marker)),
            "numpy.core.multiarray.fromfile",
        ),
        "numpy's runstring": (
            call("numpy.testing._private.utils.runstring", python, {}),
            "runstring",
        ),
        "this project": (
            call("datasets_lite.make_demo_corpus", str(marker)),
            "datasets_lite.make_demo_corpus",
        ),
        "object array": (pickle.dumps(np.array([1, evil], dtype=object)), system),
        "object array, oldest protocol": (pickle.dumps(np.array([evil], dtype=object), 0), system),
        "list of arrays": (pickle.dumps({"keypoints": [K[0], evil], "scores": S}), system),
        "nested": (pickle.dumps({"keypoints": K, "scores": [({"a": ((evil,),)},)]}), system),
        "a key": (pickle.dumps({(1, evil): 2}), system),
        "in a set": (pickle.dumps({frozenset([evil])}), system),
        "in an array's state": (
            pickle.dumps(Stateful(array, (1, (1,), np.dtype("O"), False, [evil]))),
            system,
        ),
        "as an argument of what is allowed": (
            pickle.dumps(Reduces(array[0], np.ndarray, (evil,), b"b")),
            system,
        ),
        "behind an entry that is fine": (
            pickle.dumps({"keypoints": K, "scores": S, "w_h": evil}),
            system,
        ),
    }
    return found


ATTACKS = list(attacks(Path("x")))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_that_runs_code_is_refused_by_name_and_runs_nothing(tmp_path, name):
    marker = tmp_path / "executed"
    raw, wanted = attacks(marker)[name]
    pose = tmp_path / "the_clip.pkl"
    pose.write_bytes(raw)
    labels = tmp_path / "labels.train"
    labels.write_bytes(gzip.compress(raw))
    for path, load in ((pose, load_pose_file), (labels, load_dataset_file)):
        with pytest.raises(pickle.UnpicklingError) as caught:
            load(path)
        assert not marker.exists(), f"{path.name}: the payload ran"
        assert path.name in str(caught.value)
        assert wanted in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["os.system, protocol 4", "eval", "INST", "name from the memo", "object array", "nested"],
)
def test_the_attacks_are_live(tmp_path, name):
    """Else the test above could not fail: Python's own unpickler runs them."""
    marker = tmp_path / "executed"
    raw, _ = attacks(marker)[name]
    pickle.loads(raw)
    assert marker.exists()


def test_the_data_set_never_runs_a_clip_s_code(tmp_path):
    """By the real way in: a downloaded corpus with one rigged pose among good ones."""
    labels = write_corpus(tmp_path, {f"c{i}": random_clip(seed=i) for i in range(3)})
    marker = tmp_path / "executed"
    raw, _ = attacks(marker)["os.system, protocol 4"]
    rigged = tmp_path / "pose_format" / "c1.pkl"
    rigged.write_bytes(raw)
    with pytest.raises(REFUSED, match="c1.*system"):
        SignLanguageDataset(labels, scratch_config(), "train")
    with pytest.raises(pickle.UnpicklingError, match="system"):
        read_clip(rigged, scratch_config())
    assert not marker.exists()


# (1,), dtype("O"), eight bytes
POINTERS = (
    b"(K\x01\x85"
    + pickled_global("numpy.dtype")
    + pickled_text("O8")
    + b"\x85R"
    + pickled_global("_codecs.encode")
    + pickled_text("\0" * 8)
    + pickled_text("latin1")
    + b"\x86Rt"
)
MEMORY = {
    "an array of objects over raw bytes": pickled_global("numpy.ndarray") + POINTERS + b"R",
    "the same through the class's __new__": pickled_global("numpy.ndarray") + POINTERS + b"\x81",
    "a record whose dtype hides an object": pickled(np.zeros(1, [("a", "O")])),
}


@pytest.mark.parametrize("name", MEMORY)
def test_no_pickle_makes_objects_of_raw_bytes(tmp_path, name):
    """numpy takes such bytes for pointers: whoever writes the file chooses the address.

    Here it is null, which is harmless.
    """
    path = tmp_path / "the_clip.pkl"
    path.write_bytes(
        b"\x80\x02}"
        + pickled_text("keypoints")
        + MEMORY[name]
        + b"s"
        + pickled_text("scores")
        + b"Ns."
    )
    with pytest.raises(REFUSED, match="the_clip.pkl"):
        load_pose_file(path)


def test_no_codec_but_latin1_is_called(tmp_path):
    (tmp_path / "the_clip.pkl").write_bytes(call("_codecs.encode", "uryyb", "rot13"))
    with pytest.raises(DataError, match="the_clip.pkl.*expected, found b'uryyb'"):
        load_pose_file(tmp_path / "the_clip.pkl")


def peak_gb():
    """Of this process and its children so far."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(one).ru_maxrss for one in who) / 1e6


# what each would do to the process that reads it
BOMBS = {
    "a memo of 64 GB": b"\x80\4}r\xff\xff\xff\xff.",
    "the same in text": b"\x80\4}p4294967295\n.",
    "a tuple 200,000 deep as a key: C recursion": b"\x80\4})" + b"\x85" * 200_000 + b"Ns.",
    "a list 200,000 deep": b"\x80\4" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a set that is its own member's": b"\x80\4\x8f" + b"(" * 50_000 + b".",
    "3,000 copies of a megabyte": b"\x80\4c_codecs\nencode\nq\0000X\0\0\x10\0"
    + b"a" * 2**20
    + b"q\x010X\6\0\0\0latin1q\x020("
    + b"h\0h\1h\2\x86R" * 3000
    + b"l.",
    "BUILD on an OrderedDict": b"\x80\4ccollections\nOrderedDict\n)R}X\5\0\0\0itemsNsb.",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork, no guard")
@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_file_is_named_and_costs_nothing_but_itself(tmp_path, name):
    raw = BOMBS[name]
    pose = tmp_path / "the_clip.pkl"
    pose.write_bytes(raw)
    labels = tmp_path / "labels.train"
    labels.write_bytes(gzip.compress(raw))
    for path, load in ((pose, load_pose_file), (labels, load_dataset_file)):
        with pytest.raises(REFUSED, match=path.name):
            load(path)
    assert peak_gb() < 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork, no guard")
def test_a_reader_that_takes_too_long_is_ended_by_its_cpu_time(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_lite, "MAX_SECONDS", 1)
    spin = tmp_path / "spin"

    def read(path):
        while path == spin:
            pass
        return path.name

    found = list(datasets_lite.guarded(read, [tmp_path / "a", spin, tmp_path / "b"]))
    assert found[0] == "a"
    assert "spin" in str(found[1])
    assert "CPU seconds" in str(found[1])
    assert found[2] == "b", "the files behind it must still be read"


UNREAD = """
from datasets_lite import guarded
results = guarded(lambda path: path * 100_000, list("abcdefgh"), 4)  # more than a pipe holds
for _ in range(4):  # each child has begun
    next(results)
results.close()
print("closed")
"""


def test_readers_end_when_nobody_wants_their_results_any_more():
    """As after Ctrl-C: a child that waits for a full pipe must not be waited for."""
    run = subprocess.run(
        [sys.executable, "-c", UNREAD], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert run.stdout == "closed\n", run.stderr


def test_guarded_results_come_in_order_whatever_the_number_of_children(tmp_path):
    def read(path):
        if path.name == "7":
            raise DataError(f"{path}: the seventh")
        if path.name == "9":
            os.kill(os.getpid(), signal.SIGKILL)
        return int(path.name)

    paths = [tmp_path / str(number) for number in range(12)]
    for children in (1, 2, 5, 20):
        found = list(datasets_lite.guarded(read, paths, children))
        assert [result for result in found if isinstance(result, int)] == [
            number for number in range(12) if number not in (7, 9)
        ]
        assert str(found[7]).endswith("the seventh")
        assert "ended the process that read it" in str(found[9])
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # no child is left, no zombie either


def test_the_data_set_names_a_clip_that_kills_its_reader_and_goes_on(tmp_path):
    labels = write_corpus(tmp_path / "data", {f"c{i}": random_clip(seed=i) for i in range(5)})
    deep = BOMBS["a tuple 200,000 deep as a key: C recursion"]
    (tmp_path / "data" / "pose_format" / "c2.pkl").write_bytes(deep)
    with pytest.raises(DataError, match="1 of 5 .*\n.*c2"):
        SignLanguageDataset(labels, scratch_config(), "train")
    skipping = scratch_config(on_bad_clip="skip")
    assert names_of(SignLanguageDataset(labels, skipping, "train")) == ["c0", "c1", "c3", "c4"]


GUARD_SCRIPT = """
import sys, threading
from pathlib import Path
from torch.utils.data import DataLoader, Dataset
from datasets_lite import load_pose_file

class Clips(Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return load_pose_file(sys.argv[1])[1].shape

print(load_pose_file(sys.argv[1])[1].shape)
thread = threading.Thread(target=lambda: print(load_pose_file(sys.argv[1])[1].shape))
thread.start()
thread.join()
print(*DataLoader(Clips(), num_workers=1, collate_fn=list))
"""


def test_the_guard_works_in_a_plain_script_a_thread_and_a_loading_process(tmp_path):
    """No `if __name__ == "__main__"`; a loading process is daemonic and may start no other."""
    path = tmp_path / "clip.pkl"
    write_pose(path, *random_clip(6))
    script = tmp_path / "script.py"
    script.write_text(GUARD_SCRIPT)
    run = subprocess.run(
        [sys.executable, script, path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(datasets_lite.__file__).parent)},
    )
    assert run.stderr == ""
    assert run.stdout.split("\n") == ["(6, 133)"] * 2 + ["[(6, 133)] [(6, 133)]", ""]


def test_a_file_that_was_checked_is_read_without_guard_until_its_bytes_change(
    tmp_path, monkeypatch
):
    labels = write_corpus(tmp_path, {"a": random_clip(6)})
    dataset = SignLanguageDataset(labels, scratch_config(), "dev")
    guards = []
    guarded = datasets_lite.guarded
    monkeypatch.setattr(
        datasets_lite, "guarded", lambda *args: guards.append(args[1]) or guarded(*args)
    )
    before = dataset[0][1]
    assert guards == []
    path = tmp_path / "pose_format" / "a.pkl"
    write_pose(path, *random_clip(6, seed=1))
    after = dataset[0][1]
    assert guards == [[path]]
    assert not torch.equal(before["body"], after["body"])


def test_a_pickle_cannot_change_the_functions_that_it_may_call(tmp_path, monkeypatch):
    """BUILD with a pair of dicts sets attributes of what is on the stack, functions included."""
    state = pickled((None, {"__defaults__": ("rot13",)}))
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + pickled_global("_codecs.encode") + state + b"b.")
    numeric = np._core.numeric if hasattr(np, "_core") else np.core.numeric
    (tmp_path / "b.pkl").write_bytes(
        b"\x80\x02" + pickled_global("numpy.core.numeric._frombuffer") + state + b"b."
    )
    encoded = codecs.encode("é", "latin1")
    defaults = numeric._frombuffer.__defaults__
    # put back if this test fails
    monkeypatch.setattr(numeric._frombuffer, "__defaults__", defaults)
    for name in ("a.pkl", "b.pkl"):
        with pytest.raises(REFUSED):
            load_pose_file(tmp_path / name)
    assert codecs.encode("é", "latin1") == encoded
    assert numeric._frombuffer.__defaults__ == defaults
    path = tmp_path / "c.pkl"
    path.write_bytes(pickle.dumps({"keypoints": K, "scores": S}, 2))
    assert np.array_equal(load_pose_file(path)[0], K), "the next file is read as ever"


# ------------------------------------------------------------ labels


@pytest.mark.parametrize("split, count", [("train", 18401), ("dev", 1077), ("test", 1176)])
def test_the_real_csl_daily_labels_are_read(split, count):
    entries = load_dataset_file(shared("csl_daily_labels") / f"labels.{split}")
    assert len(entries) == count
    for key, value in entries.items():
        assert value["name"], f"{key}: {value}"
        assert value["text"].strip(), f"{key}: {value}"
        assert isinstance(value["gloss"], list), f"{key}: {value}"
        assert value["pose"], f"{key}: {value}"


def test_the_real_csl_news_labels_are_read_and_find_their_clip():
    folder = shared("csl_news")
    entries = load_dataset_file(folder / "labels.json")
    (value,) = entries.values()
    assert value["pose"] == "Common-Concerns_20200730_0-87_468436.pkl"
    assert value["text"]
    assert value["gloss"] == []
    dataset = SignLanguageDataset(folder / "labels.json", scratch_config(language="zh"), "dev")
    assert dataset[0][1]["body"].shape == (87, 9, 3)


def test_both_label_formats_give_the_same_entries(tmp_path):
    entries = {}
    rows = []
    for name in ("c0", "c1", "c2"):
        entries[name] = entry(name, pose=f"{name}.pkl")
        rows.append(
            {
                "video": f"{name}.mp4",
                "pose": f"{name}.pkl",
                "text": "今天我买书。",
                "gloss": "今天 我 书 买",
            }
        )
    write_labels(tmp_path / "labels.train", entries)
    (tmp_path / "labels.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(rows), encoding="utf-8")
    pickled_dict = load_dataset_file(tmp_path / "labels.train")
    json_dict = load_dataset_file(tmp_path / "labels.json")
    json_list = load_dataset_file(tmp_path / "list.json")
    assert pickled_dict == json_dict
    assert pickled_dict == json_list
    assert pickled_dict["c0"]["gloss"] == ["今天", "我", "书", "买"]


def test_clips_of_one_video_stay_apart(tmp_path):
    """Keyed by the video alone, all but the last of them would be gone without a word."""
    rows = [{"video": "news.mp4", "pose": f"news_{i}.pkl", "text": f"句子{i}。"} for i in range(3)]
    (tmp_path / "labels.json").write_text(json.dumps(rows), encoding="utf-8")
    entries = load_dataset_file(tmp_path / "labels.json")
    assert list(entries) == ["news_0", "news_1", "news_2"]
    assert [e["pose"] for e in entries.values()] == [f"news_{i}.pkl" for i in range(3)]


def test_keys_that_are_the_same_once_they_are_text_are_no_silent_loss(tmp_path):
    path = write_labels(tmp_path / "labels.train", {1: entry("a"), "1": entry("b")})
    with pytest.raises(DataError, match="entry 1 is there twice"):
        load_dataset_file(path)


BAD_LABELS = {
    "empty file": b"",
    "text": "你好".encode(),
    "latin": b"\xff\xfe\x00",
    "gzip of nothing": gzip.compress(b""),
    "gzip of text": gzip.compress(b"hello"),
    "half a gzip": gzip.compress(pickle.dumps({"a": entry("a")}))[:40],
    "gzip header alone": b"\x1f\x8b",
    "damaged gzip": b"\x1f\x8b\x08\x00" + b"\xff" * 60,
    "plain pickle": pickle.dumps({}),
    "empty dict": {},
    "empty list": [],
    "a number": 3,
    "None": None,
    "a text": "labels",
    "list of texts": ["a", "b"],
    "list of None": [None],
    "entry is a list": {"a": [1]},
    "entry is a text": {"a": "今天"},
    "empty entry": {"a": {}},
    "no text": {"a": {"name": "a", "gloss": []}},
    "empty text": {"a": entry("a", "")},
    "blank text": {"a": entry("a", " \n\t")},
    "text None": {"a": entry("a", None)},
    "text a number": {"a": entry("a", 5)},
    "glosses are numbers": {"a": {"name": "a", "text": "x", "gloss": [1, 2]}},
    "glosses are a dict": {"a": {"name": "a", "text": "x", "gloss": {}}},
    "too deep": b"[" * 100000,
    "a number too long": b"[" + b"1" * 5000 + b"]",
    "too deep a dict": b'{"a":' * 100000,
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels_are_refused_by_name(tmp_path, name):
    content = BAD_LABELS[name]
    path = tmp_path / "labels.train"
    if isinstance(content, bytes):
        raws = [content]
    else:
        raws = [gzip.compress(pickle.dumps(content)), json.dumps(content).encode()]
    for raw in raws:
        path.write_bytes(raw)
        with pytest.raises(DataError, match="labels.train"):
            load_dataset_file(path)


def test_missing_labels_are_an_error_and_never_an_empty_set(tmp_path):
    with pytest.raises(DataError, match="labels.dev"):
        load_dataset_file(tmp_path / "labels.dev")
    with pytest.raises(DataError, match="labels.dev"):
        SignLanguageDataset(tmp_path / "labels.dev", scratch_config(), "dev")


def test_a_bad_entry_is_named(tmp_path):
    path = write_labels(
        tmp_path / "labels.train",
        {"good": entry("good"), "S000123_P0000": entry("S000123_P0000", "")},
    )
    with pytest.raises(DataError, match="S000123_P0000"):
        load_dataset_file(path)


# ------------------------------------------------------------ the data set

BAD_CLIPS = {
    "zeros": (np.zeros_like(K), np.zeros_like(S)),
    "below": (K, np.full_like(S, 0.3)),
    "nan": (np.full_like(K, NAN), S),
    "inf": (np.full_like(K, INF), S),
    "point": (np.full_like(K, 0.5), S),
    "joints": (K[:, :17], S[:, :17]),
}


@pytest.fixture
def mixed(tmp_path):
    """A label file of three good clips and of bad ones, and the bad ones' names.

    The bad ones are those above, a missing, an empty and a truncated file.
    """
    good = {f"good{i}": random_clip(8 + i, seed=i) for i in range(3)}
    label = write_corpus(tmp_path / "data", good | BAD_CLIPS)
    names = [*good, *BAD_CLIPS, "missing", "empty", "half"]
    write_labels(label, {name: entry(name) for name in names})
    (label.parent / "pose_format" / "empty.pkl").write_bytes(b"")
    (label.parent / "pose_format" / "half.pkl").write_bytes(GOOD[:300])
    return label, names[3:]


def test_bad_clips_stop_the_run_before_its_first_step_and_are_named(mixed):
    label, bad = mixed
    with pytest.raises(DataError) as caught:
        SignLanguageDataset(label, scratch_config(), "train")
    message = str(caught.value)
    named = [name for name in bad if f"  {name}: " in message]
    assert named == bad[:5], f"{len(named)} of {len(bad)} named: {message}"
    assert "9 of 12 clips are unusable" in message
    assert "and 4 more" in message
    assert "good" not in message


def test_bad_clips_are_left_out_and_listed_where_that_is_asked_for(mixed, tmp_path, capsys):
    """Zero-filling a missing file, as the original did, would keep it in the set."""
    label, bad = mixed
    config = scratch_config(on_bad_clip="skip", output_dir=str(tmp_path / "run"))
    dataset = SignLanguageDataset(label, config, "train")
    assert names_of(dataset) == ["good0", "good1", "good2"]
    assert len(dataset) == 3
    assert [dataset[i][0] for i in range(3)] == ["good0", "good1", "good2"]
    assert all(dataset[i][1]["body"].any() for i in range(3))
    listed = (tmp_path / "run" / "bad_clips.txt").read_text(encoding="utf-8")
    assert all(name in listed for name in bad), listed
    assert "good" not in listed, listed
    assert str(len(bad)) in capsys.readouterr().out


def test_nothing_but_bad_clips_is_an_error_even_where_they_are_skipped(tmp_path):
    label = write_corpus(tmp_path / "data", {"zeros": BAD_CLIPS["zeros"]})
    config = scratch_config(on_bad_clip="skip", output_dir=str(tmp_path / "run"))
    with pytest.raises(DataError, match="zeros"):
        SignLanguageDataset(label, config, "train")


def test_one_unseen_joint_is_no_bad_clip(tmp_path):
    keypoints, scores = random_clip()
    keypoints[3, 5] = NAN
    keypoints[4, 92] = INF
    scores[5, 9] = NAN
    label = write_corpus(tmp_path, {"a": (keypoints, scores)})
    dataset = SignLanguageDataset(label, scratch_config(), "train")
    assert len(dataset) == 1


def test_the_files_are_read_once_and_again_only_where_they_changed(tmp_path, monkeypatch):
    label = write_corpus(tmp_path / "data", {f"c{i}": random_clip(8 + i, seed=i) for i in range(4)})
    config = scratch_config(output_dir=str(tmp_path / "run"))
    inspect_clip = datasets_lite.inspect_clip
    log = tmp_path / "log"  # a file, since children read

    def noted_and_inspected(path):
        with log.open("a") as file:
            print(path.stem, file=file)
        return inspect_clip(path)

    def files_read():
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return sorted(names)

    monkeypatch.setattr(datasets_lite, "inspect_clip", noted_and_inspected)
    first = SignLanguageDataset(label, config, "train")
    assert files_read() == ["c0", "c1", "c2", "c3"]
    second = SignLanguageDataset(label, config, "train")
    assert files_read() == []
    assert list(second.lengths) == list(first.lengths) == [8, 9, 10, 11]
    write_pose(tmp_path / "data" / "pose_format" / "c2.pkl", *random_clip(20))
    third = SignLanguageDataset(label, config, "train")
    assert files_read() == ["c2"]
    assert list(third.lengths) == [8, 9, 20, 11]
    same = tmp_path / "data" / "pose_format" / "c1.pkl"
    # the same size, another time of change
    os.utime(same, ns=(same.stat().st_atime_ns, same.stat().st_mtime_ns + 5))
    SignLanguageDataset(label, config, "train")
    assert files_read() == ["c1"]


def test_a_bad_clip_stays_bad_when_the_findings_are_reused(mixed, tmp_path):
    label, bad = mixed
    config = scratch_config(on_bad_clip="skip", output_dir=str(tmp_path / "run"))
    first = SignLanguageDataset(label, config, "train")
    second = SignLanguageDataset(label, config, "train")
    assert names_of(first) == names_of(second)
    assert len(second) == 3
    strict = scratch_config(output_dir=str(tmp_path / "run"))
    with pytest.raises(DataError, match="zeros"):
        SignLanguageDataset(label, strict, "train")


def test_half_a_cache_is_only_lost_time(tmp_path):
    label = write_corpus(tmp_path / "data", {"a": random_clip()})
    config = scratch_config(output_dir=str(tmp_path / "run"))
    SignLanguageDataset(label, config, "train")
    for path in (tmp_path / "run").iterdir():
        path.write_bytes(path.read_bytes()[:7])
    assert len(SignLanguageDataset(label, config, "train")) == 1


@pytest.mark.parametrize(
    "pose", ["../secret.pkl", "sub/../../secret.pkl", "ABSOLUTE", "../../../etc/passwd"]
)
@pytest.mark.parametrize("field", ["pose", "name"])
def test_a_pose_outside_of_pose_format_is_never_read(tmp_path, pose, field, monkeypatch):
    secret = write_pose(tmp_path / "data" / "secret.pkl", *random_clip())
    if pose == "ABSOLUTE":
        pose = str(secret)
    if field == "name":
        rigged = {"name": pose.removesuffix(".pkl"), "text": "x"}
    else:
        rigged = {"name": "rigged", "text": "x", "pose": pose}
    write_corpus(tmp_path / "data", {"good": random_clip()})
    label = write_labels(
        tmp_path / "data" / "labels.train", {"good": entry("good"), "rigged": rigged}
    )
    log = tmp_path / "log"  # children read
    read_bytes = datasets_lite.read_bytes

    def noted_and_read(path, *more):
        with log.open("a") as file:
            print(Path(path).resolve(), file=file)
        return read_bytes(path, *more)

    monkeypatch.setattr(datasets_lite, "read_bytes", noted_and_read)
    with pytest.raises(DataError, match="is a path out of pose_format: refused"):
        SignLanguageDataset(label, scratch_config(), "train")
    lenient = scratch_config(on_bad_clip="skip", output_dir=str(tmp_path / "run"))
    assert names_of(SignLanguageDataset(label, lenient, "train")) == ["good"]
    read = {Path(line) for line in log.read_text().splitlines()}
    assert read == {label.resolve(), (tmp_path / "data" / "pose_format" / "good.pkl").resolve()}


@pytest.mark.parametrize("name", ["../secret", "ABSOLUTE"])
def test_a_name_that_leads_out_finds_no_pose_where_the_named_one_is_missing(tmp_path, name):
    write_pose(tmp_path / "data" / "secret.pkl", *random_clip())
    if name == "ABSOLUTE":
        name = str(tmp_path / "data" / "secret")
    label = write_labels(
        tmp_path / "data" / "labels.train", {"a": {**entry("a", pose="absent.pkl"), "name": name}}
    )
    with pytest.raises(DataError, match="absent.pkl: no such pose file"):
        SignLanguageDataset(label, scratch_config(), "train")


@pytest.mark.parametrize("pose", ["a\0b.pkl", "", ".", "x" * 300 + ".pkl", "folder"])
def test_a_pose_name_that_no_file_can_have_is_a_bad_clip(tmp_path, pose):
    write_corpus(tmp_path, {"good": random_clip()})
    (tmp_path / "pose_format" / "folder").mkdir()
    label = write_labels(
        tmp_path / "labels.train", {"good": entry("good"), "odd": entry("odd", pose=pose)}
    )
    with pytest.raises(DataError, match="odd"):
        SignLanguageDataset(label, scratch_config(), "train")


def test_the_pose_is_found_by_its_entry_then_by_name_pkl_then_by_name_npz(tmp_path):
    folder = tmp_path / "pose_format"
    for name, frames in (("own.pkl", 5), ("a.pkl", 6), ("b.pkl", 7)):
        write_pose(folder / name, *random_clip(frames))
    keypoints, scores = random_clip(8)
    np.savez(folder / "c.npz", keypoints=keypoints, scores=scores)
    label = write_labels(
        tmp_path / "labels.train",
        {"a": entry("a", pose="own.pkl"), "b": entry("b", pose="absent.pkl"), "c": entry("c")},
    )
    # poses stand beside the labels, whatever it says
    elsewhere = scratch_config(data_dir=str(tmp_path / "another"))
    assert list(SignLanguageDataset(label, elsewhere, "train").lengths) == [5, 7, 8]


def test_an_item_is_name_pose_text_gloss(clips):
    name, pose, text, gloss = clips[3]
    assert name == clips.entries[3]["name"]
    assert text == clips.entries[3]["text"]
    assert gloss == clips.entries[3]["gloss"]
    frames = clips.lengths[3]
    assert {part: tuple(pose[part].shape) for part in pose} == {
        "body": (frames, 9, 3),
        "left": (frames, 21, 3),
        "right": (frames, 21, 3),
    }


def test_a_batch_is_padded_with_zeros_at_its_end_and_the_mask_says_where(clips):
    order = np.argsort(clips.lengths)
    items = [clips[i] for i in (order[-1], order[0], order[5])]
    src_input, tgt_input = clips.collate_fn(items)
    lengths = [len(item[1]["body"]) for item in items]
    assert lengths[0] > lengths[1], "the test needs clips of different lengths"
    assert src_input["body"].shape == (3, max(lengths), 9, 3)
    assert src_input["left"].shape == (3, max(lengths), 21, 3)
    assert src_input["src_length"].tolist() == lengths
    assert src_input["attention_mask"].sum(1).tolist() == lengths
    for row, (_, pose, _, _) in enumerate(items):
        length = lengths[row]
        mask = [1] * length + [0] * (max(lengths) - length)
        assert src_input["attention_mask"][row].tolist() == mask
        for part in ("body", "left", "right"):
            padded = src_input[part][row]
            assert torch.equal(padded[:length], pose[part]), "a clip goes into the batch as it is"
            assert not padded[length:].any(), "what follows is zero, not the last frame again"
    assert src_input["names"] == [item[0] for item in items]
    assert tgt_input == {
        "gt_sentence": [item[2] for item in items],
        "gt_gloss": [item[3] for item in items],
    }


def test_the_loader_tokenises_where_it_is_told_how(demo):
    dataset = SignLanguageDataset(demo / "labels.dev", scratch_config(), "dev")
    dataset.encode = lambda texts: torch.tensor([[len(text)] for text in texts])
    _, tgt_input = dataset.collate_fn([dataset[0], dataset[1]])
    wanted = [len(text) for text in tgt_input["gt_sentence"]]
    assert tgt_input["labels"].flatten().tolist() == wanted


# ------------------------------------------------------------ frames


@pytest.mark.parametrize("phase, augment", [("train", False), ("train", True), ("dev", False)])
def test_a_clip_with_few_usable_frames_never_stops_a_run_later(tmp_path, phase, augment):
    """What the check before the first step lets through is usable, whichever frames are drawn."""
    keypoints, scores = random_clip(40)
    scores[:17] = 0
    scores[18:] = 0  # the body is seen in one frame of 40
    label = write_corpus(tmp_path, {"a": (keypoints, scores)})
    sampled = SignLanguageDataset(label, scratch_config(max_length=8, augment=augment), phase)
    for epoch in range(30):
        sampled.begin_epoch(epoch)
        assert body_of(sampled, 0).any(), f"epoch {epoch}"


def body_of(dataset, index):
    """The body of a clip as the data set gives it now."""
    _, pose, _, _ = dataset[index]
    return pose["body"]


def ramp(frames):
    """A clip whose left wrist goes steadily to the right: its x tells the frame."""
    one_frame, _ = random_clip(1)
    keypoints = np.tile(one_frame, (frames, 1, 1))
    keypoints[:, BODY] = np.linspace(0.2, 0.8, 9)[:, None]
    keypoints[:, 9, 0] = np.linspace(0.2, 0.8, frames)
    scores = np.full((frames, 133), 0.9, np.float32)
    return keypoints.astype(np.float32), scores


@pytest.mark.parametrize("phase", ["train", "dev"])
def test_a_long_clip_is_sampled_over_its_whole_length(tmp_path, phase):
    """The original kept the first of random frames: what is cut off at the end is never seen."""
    label = write_corpus(tmp_path, {"long": ramp(100), "short": ramp(10)})
    dataset = SignLanguageDataset(label, scratch_config(max_length=10), phase)
    wrist = body_of(dataset, 0)[:, BODY.index(9), 0]
    frames = ((wrist + 1) / 2 * 99).round()  # of the ramp's 100
    assert len(wrist) == 10
    assert (frames.diff() > 0).all(), f"in order: {frames.tolist()}"
    for step, frame in enumerate(frames.tolist()):
        assert 10 * step - 6 <= frame <= 10 * step + 16, f"one a step: {frames.tolist()}"
    short = body_of(dataset, 1)
    assert len(short) == 10
    assert torch.equal(short, load_part_kp(*ramp(10))["body"])


def test_training_draws_other_frames_each_epoch_and_evaluation_never(tmp_path):
    label = write_corpus(tmp_path, {"long": ramp(100)})

    def drawn(dataset, epoch):
        dataset.begin_epoch(epoch)
        return body_of(dataset, 0)

    train = SignLanguageDataset(label, scratch_config(max_length=10), "train")
    first = drawn(train, epoch=0)
    second = drawn(train, epoch=1)
    again = drawn(train, epoch=0)
    assert torch.equal(first, again), "the same epoch draws the same, in whatever process"
    assert not torch.equal(first, second)

    dev = SignLanguageDataset(label, scratch_config(max_length=10), "dev")
    assert torch.equal(drawn(dev, epoch=0), drawn(dev, epoch=1))


def test_augmentation_varies_training_clips_only(tmp_path):
    label = write_corpus(tmp_path, {"a": random_clip(30)})
    plain = load_part_kp(*random_clip(30))["body"]
    train = SignLanguageDataset(label, scratch_config(augment=True), "train")
    dev = SignLanguageDataset(label, scratch_config(augment=True), "dev")
    assert torch.equal(body_of(dev, 0), plain)
    first = body_of(train, 0)
    again = body_of(train, 0)
    train.begin_epoch(1)
    other = body_of(train, 0)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    _, pose, _, _ = train[0]
    assert_finite_and_bounded(pose)


# ------------------------------------------------------------ batches by length

LENGTHS = np.random.default_rng(0).integers(20, 300, 203)


def counted_clips(plan):
    """The clips of a plan, without batches that only fill up a process's share."""
    clips = []
    for _, batch, counts in plan:
        if counts:
            clips += batch
    return clips


def plan_of(size, seed=0, accumulation=1, epoch=0, rank=0, world=1, totals=LENGTHS):
    config = TrainConfig(batch_size=size, gradient_accumulation=accumulation, seed=seed)
    data = SimpleNamespace(lengths=LENGTHS, totals=totals, epoch=epoch)
    return plan_epoch(data, config, rank, world)


@pytest.mark.parametrize(
    "size, accumulation, world",
    [(32, 1, 1), (2, 16, 1), (16, 1, 2), (3, 5, 2), (500, 1, 1), (7, 2, 3), (29, 1, 1)],
)
def test_every_clip_comes_exactly_once_an_epoch(size, accumulation, world):
    clips = []
    batches = []
    for rank in range(world):
        plan = plan_of(size, 3, accumulation, 2, rank, world)
        clips += counted_clips(plan)
        batches.append(len(plan))
        assert all(1 <= len(batch) <= size for _, batch, _ in plan)
    assert sorted(clips) == list(range(len(LENGTHS))), (
        f"{len(clips)} clips, {len(set(clips))} different"
    )
    assert len(set(batches)) == 1, (
        f"processes of {batches} batches would wait for each other for ever"
    )


def test_the_order_follows_from_seed_and_epoch_alone():
    def order(seed, epoch):
        return plan_of(8, seed, epoch=epoch)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def steps(size, accumulation, world, epoch=0):
    """The clips of each optimiser step, of all processes together."""
    plans = []
    for rank in range(world):
        plans.append(plan_of(size, 5, accumulation, epoch, rank, world))
    clips_by_step = []
    for begin in range(0, len(plans[0]), accumulation):
        clips = []
        for plan in plans:
            clips += counted_clips(plan[begin : begin + accumulation])
        clips_by_step.append(sorted(clips))
    return clips_by_step


@pytest.mark.parametrize(
    "size, accumulation, world",
    [(2, 16, 1), (16, 1, 2), (8, 2, 2), (1, 32, 1), (4, 8, 1), (4, 2, 4)],
)
def test_a_step_s_clips_do_not_depend_on_how_the_window_is_divided(size, accumulation, world):
    for epoch in range(3):
        whole = steps(32, 1, 1, epoch)
        divided = steps(size, accumulation, world, epoch)
        assert whole == divided, f"epoch {epoch}"
        assert [len(step) for step in whole] == [32] * 6 + [203 - 6 * 32]


def test_batches_of_like_length_waste_less_than_random_ones():
    def padding(batches):
        """The share of a batch's frames that are no clip's."""
        padded = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
        return 1 - LENGTHS.sum() / padded

    order = np.random.default_rng(1).permutation(len(LENGTHS))
    random = padding([order[i : i + 8] for i in range(0, len(order), 8)])
    by_length = padding([clips for _, clips, _ in plan_of(8, 1)])
    assert by_length < random / 2, f"{by_length:.0%} padding, {random:.0%} in random batches"


def test_within_a_window_joined_clips_and_single_ones_have_batches_of_their_own():
    joined = np.random.default_rng(3).random(len(LENGTHS)) < 0.5
    totals = LENGTHS + 1000 * joined  # each longer than any single clip
    for plain, divided in zip(plan_of(32), cut(plan_of(16, accumulation=2, totals=totals), 2)):
        clips = sum((batch for _, batch, _ in divided), [])
        assert sorted(plain[1]) == sorted(clips), "the window is the same"
        assert list(joined[clips]) == sorted(joined[clips], reverse=True), "joined ones come first"
        assert list(totals[clips]) == sorted(totals[clips], reverse=True)


# ------------------------------------------------------------ what the field writes

PEOPLE = [1, 3, 2, 1]  # in each frame
FORMS = {
    "(T, 133, 2)": (K, S),
    "(T, 1, 133, 2)": (K[:, None], S[:, None]),
    "(T, 3, 133, 2), the first person": (np.stack([K, K + 1, K + 2], 1), np.stack([S] * 3, 1)),
    "nested lists": (K.tolist(), S.tolist()),
    "nested lists, a person axis": (K[:, None].tolist(), S[:, None].tolist()),
    "arrays in a list": (list(K), list(S)),
    "a list among arrays": (list(K), [S[0], S[1], S[2].tolist(), S[3]]),
    "as many persons as were seen": (
        [np.stack([K[t] + n for n in range(PEOPLE[t])]) for t in range(4)],
        [np.stack([S[t]] * PEOPLE[t]) for t in range(4)],
    ),
    "the same, nested lists": (
        [[(K[t] + n).tolist() for n in range(PEOPLE[t])] for t in range(4)],
        [[S[t].tolist()] * PEOPLE[t] for t in range(4)],
    ),
    "persons in some frames only": ([K[0], K[1][None], K[2], K[3]], [S[0], S[1][None], S[2], S[3]]),
    "scores (T, 133, 1)": (K, S[..., None]),
    "scores (T, 1, 133, 1)": (K[:, None], S[:, None, :, None]),
    "scores as a third channel": (np.concatenate([K, S[..., None]], -1), None),
    "the same with a person axis": (np.concatenate([K, S[..., None]], -1)[:, None], None),
    "x, y, z beside scores": (np.concatenate([K, K[..., :1]], -1), S),
    "float64, float16 scores": (K.astype(np.float64), S.astype(np.float16)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_the_field_writes_gives_the_same_clip(tmp_path, form):
    keypoints, scores = FORMS[form]
    data = {"keypoints": keypoints}
    if scores is not None:
        data["scores"] = scores
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(data))
    read = load_pose_file(tmp_path / "a.pkl")
    np.testing.assert_array_equal(read[0], K.astype(np.float32))
    np.testing.assert_allclose(read[1], S, atol=1e-3)


@pytest.mark.parametrize("nobody", [np.zeros((0, 133, 2)), None, []], ids=["empty", "None", "[]"])
def test_a_frame_with_nobody_stays_and_is_unseen(tmp_path, nobody):
    """Time must not shrink."""
    none = None if nobody is None else []
    data = {
        "keypoints": [K[0][None], nobody, K[2][None], np.stack([K[3], K[0]])],
        "scores": [S[0][None], none, S[2][None], np.stack([S[3], S[0]])],
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(data))
    keypoints, scores = load_pose_file(tmp_path / "a.pkl")
    np.testing.assert_array_equal(keypoints[[0, 2, 3]], K[[0, 2, 3]])
    np.testing.assert_array_equal(scores[[0, 2, 3]], S[[0, 2, 3]])
    assert not scores[1].any()


def test_persons_first_is_read_where_it_is_unmistakable(tmp_path):
    keypoints, scores = random_clip(30)
    both = {"keypoints": np.stack([keypoints, keypoints + 1]), "scores": np.stack([scores] * 2)}
    np.savez(tmp_path / "a.npz", **both)
    read = load_pose_file(tmp_path / "a.npz")
    np.testing.assert_array_equal(read[0], keypoints)
    assert read[1].shape == (30, 133)


@pytest.mark.parametrize(
    "shape", [(133, 12, 2), (12, 2, 133), (2, 12, 133), (12, 133, 1, 2), (133, 2)]
)
def test_any_other_order_of_axes_is_refused_by_name_and_shape(tmp_path, shape):
    np.savez(tmp_path / "a.npz", keypoints=np.zeros(shape), scores=np.zeros((12, 133)))
    with pytest.raises(DataError, match="a.npz: keypoints has .*" + re.escape(str(shape)[:-1])):
        load_pose_file(tmp_path / "a.npz")


def foreign_objects():
    """Pickled poses that hold more than arrays and containers."""
    objects = np.empty(4, object)
    objects[:] = list(K)
    return {
        "torch": torch.from_numpy(K),
        "masked": np.ma.array(K),
        "object": objects,
        "class": Path("x"),
    }


@pytest.mark.parametrize("name", foreign_objects())
def test_foreign_objects_are_refused_with_the_lines_that_convert_them(tmp_path, name):
    raw = pickle.dumps({"keypoints": foreign_objects()[name], "scores": S})
    (tmp_path / "my_clip.pkl").write_bytes(raw)
    with pytest.raises(pickle.UnpicklingError) as caught:
        load_pose_file(tmp_path / "my_clip.pkl")
    assert "pickle.load(open('my_clip.pkl', 'rb'))" in str(caught.value)
    assert "np.savez('my_clip.npz'" in str(caught.value)


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"", "empty"),
    ],
)
def test_what_is_no_pose_or_label_file_at_all_is_named(tmp_path, raw, words):
    for name, load in (("a.pkl", load_pose_file), ("labels.dev", load_dataset_file)):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=f"{name}: .*{words}"):
            load(tmp_path / name)


ENTRIES = {
    "a": {"name": "a", "text": "今天。", "gloss": ["今天"]},
    "b": {"name": "b", "text": "好"},
}
AS_JSON = json.dumps(ENTRIES, ensure_ascii=False)
LABELS = {
    "JSON": AS_JSON.encode(),
    "JSON with a byte order mark": AS_JSON.encode("utf-8-sig"),
    "gzipped JSON": gzip.compress(AS_JSON.encode()),
    "indented JSON": json.dumps(ENTRIES, indent=2).encode(),
    "JSON lines": "\n".join(json.dumps(entry) for entry in ENTRIES.values()).encode(),
    "gzipped JSON lines": gzip.compress(
        "\r\n".join(json.dumps(entry) for entry in ENTRIES.values()).encode()
    ),
    "a list": json.dumps(list(ENTRIES.values())).encode(),
    "pickle": pickle.dumps(ENTRIES),
    "pickle, protocol 0": pickle.dumps(ENTRIES, 0),
    "pickle, protocol 1": pickle.dumps(ENTRIES, 1),
    "gzipped pickle of a list": gzip.compress(pickle.dumps(list(ENTRIES.values()))),
}


@pytest.mark.parametrize("form", LABELS)
def test_labels_in_every_form_are_the_same_labels(tmp_path, form):
    (tmp_path / "labels.train").write_bytes(LABELS[form])
    assert load_dataset_file(tmp_path / "labels.train") == {
        "a": {"name": "a", "text": "今天。", "gloss": ["今天"], "pose": "a.pkl"},
        "b": {"name": "b", "text": "好", "gloss": [], "pose": "b.pkl"},
    }


@pytest.mark.parametrize(
    "raw, words",
    [
        (AS_JSON.encode("utf-16"), "UTF-16"),
        (b"name\ttext\na\thello\n", "a table.*name.ttext"),
        (b"PK\x03\x04abcd", "zip archive"),
        (b'{"a": {"text": "x"}, "a": {"text": "y"}}', "'a' is there twice"),
        (b'[{"name": "a", "text": "x"}, {"name": "a", "text": "y"}]', "a is there twice"),
        (b'{"name": "a", "text": "x"}\n{"name": "a", "text": "y"}', "a is there twice"),
        (json.dumps({"a": {"text": "\u200b\ufeff"}}).encode(), "entry a has no text"),
        (b"1" * 6000, "table, or other text"),
    ],
)
def test_labels_that_cannot_be_read_are_named_for_what_they_are(tmp_path, raw, words):
    (tmp_path / "labels.train").write_bytes(raw)
    with pytest.raises(DataError, match=f"(?s)labels.train.*{words}"):
        load_dataset_file(tmp_path / "labels.train")


@pytest.mark.parametrize(
    "label, file",
    [
        ({"name": "v.mp4"}, "v.pkl"),
        ({"name": "v.MP4"}, "v.npz"),
        ({"name": "c1", "video_path": "day/v 1.mov"}, "day/v 1.pkl"),
        ({"name": "c1", "video_path": "day/v.mp4"}, "c1.npz"),
        ({"name": "c1", "pose_path": "pose_format/day/v.pkl"}, "day/v.pkl"),
        ({"name": "c1", "pose": "day\\v.pkl"}, "day/v.pkl"),
        ({"name": "c1", "pose": "./pose_format/v.pkl"}, "v.npz"),
        ({"name": "c.1", "pose": "c.1"}, "c.1.pkl"),
        ({"name": "giờ"}, unicodedata.normalize("NFD", "giờ") + ".pkl"),
        ({"name": unicodedata.normalize("NFD", "é")}, unicodedata.normalize("NFC", "é") + ".npz"),
    ],
)
def test_a_pose_is_found_under_the_names_that_labels_give(tmp_path, label, file):
    path = tmp_path / "pose_format" / file
    path.parent.mkdir(parents=True)
    keypoints, scores = random_clip(8)
    if path.suffix == ".npz":
        np.savez(path, keypoints=keypoints, scores=scores)
    else:
        path.write_bytes(pickle.dumps({"keypoints": keypoints, "scores": scores}))
    (tmp_path / "labels.train").write_text(json.dumps({"k": {"text": "x", **label}}))
    assert len(SignLanguageDataset(tmp_path / "labels.train", scratch_config(), "train")) == 1


def test_each_missing_pose_is_named_by_its_own_file(tmp_path):
    labels = write_corpus(tmp_path, {"good": random_clip(8)})
    labels.write_text(json.dumps({name: {"text": "x"} for name in ("good", "lost1", "lost2")}))
    with pytest.raises(DataError) as caught:
        SignLanguageDataset(labels, scratch_config(), "train")
    for name in ("lost1", "lost2"):
        assert re.search(f"{name}: .*{name}.pkl: no such pose file", str(caught.value))


def test_a_dot_in_a_name_is_no_ending(tmp_path):
    rows = [{"name": f"clip.{number}", "text": "line\u2028break"} for number in (1, 2)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "labels.train").write_text(lines, encoding="utf-8")
    entries = load_dataset_file(tmp_path / "labels.train")
    assert [entry["pose"] for entry in entries.values()] == ["clip.1.pkl", "clip.2.pkl"]


def test_two_entries_of_one_number_in_two_folders_are_two_clips(tmp_path):
    rows = [{"pose": f"{day}/0.pkl", "text": day} for day in ("monday", "tuesday")]
    (tmp_path / "labels.train").write_text(json.dumps(rows))
    entries = load_dataset_file(tmp_path / "labels.train")
    assert [entry["pose"] for entry in entries.values()] == ["monday/0.pkl", "tuesday/0.pkl"]


@pytest.mark.parametrize("name", ["x" * 300, "\ud800", "loop"])
def test_a_name_that_can_be_no_file_s_costs_its_entry_alone(tmp_path, name):
    """ENAMETOOLONG, half a character, a link onto itself: OSError and its kin at every look."""
    labels = write_corpus(tmp_path, {"good": random_clip(8)})
    (tmp_path / "pose_format" / "loop.pkl").symlink_to("loop.pkl")
    entries = {"good": {"text": "x"}, "bad": {"text": "y", "pose": f"{name}.pkl"}}
    labels.write_text(json.dumps(entries))
    with pytest.raises(DataError, match="bad"):
        SignLanguageDataset(labels, scratch_config(), "train")
    config = scratch_config(on_bad_clip="skip", output_dir=str(tmp_path / "run"))
    assert names_of(SignLanguageDataset(labels, config, "train")) == ["good"]
    assert "bad" in (tmp_path / "run" / "bad_clips.txt").read_text()


def test_a_faulty_entry_is_left_out_like_a_bad_clip(tmp_path):
    labels = write_corpus(tmp_path, {"good": random_clip(8)})
    labels.write_text(json.dumps({"good": {"text": "x"}, "mute": {"text": ""}}))
    with pytest.raises(DataError, match="mute"):
        SignLanguageDataset(labels, scratch_config(), "train")
    skipping = scratch_config(on_bad_clip="skip")
    assert names_of(SignLanguageDataset(labels, skipping, "train")) == ["good"]


def test_a_link_out_of_the_folder_is_followed_but_no_path_is(tmp_path):
    labels = write_corpus(tmp_path / "data", {"a": random_clip(8)})
    stored = (tmp_path / "data" / "pose_format" / "a.pkl").rename(tmp_path / "blob")
    (tmp_path / "data" / "pose_format" / "a.pkl").symlink_to(stored)
    assert len(SignLanguageDataset(labels, scratch_config(), "train")) == 1
    for path in ("../../blob", str(stored), "x/../../../blob"):
        labels.write_text(json.dumps({"a": {"text": "x", "pose": path}}))
        with pytest.raises(DataError, match="out of pose_format"):
            SignLanguageDataset(labels, scratch_config(), "train")


# ------------------------------------------------------------ .pose files


def write_pose_format(path, components, keypoints, scores, size=(200, 100)):
    """components: {name: points}; keypoints (T, persons, points, 2) in pixels."""
    pytest.importorskip("pose_format", reason="pip install pose-format")
    from pose_format import Pose
    from pose_format.numpy import NumPyPoseBody
    from pose_format.pose_header import PoseHeader, PoseHeaderComponent, PoseHeaderDimensions

    headers = [
        PoseHeaderComponent(name, points, [], [(0, 0, 0)], "XYC")
        for name, points in components.items()
    ]
    header = PoseHeader(0.2, PoseHeaderDimensions(*size, 0), headers)
    with open(path, "wb") as file:
        Pose(header, NumPyPoseBody(25, keypoints, scores)).write(file)


HAND = [f"p{i}" for i in range(21)]
MEDIAPIPE = ["NOSE", "LEFT_EAR", "LEFT_SHOULDER", "RIGHT_SHOULDER", "LEFT_ELBOW", "RIGHT_WRIST"]
HEADERS = {
    "MediaPipe": (
        {
            "POSE_LANDMARKS": MEDIAPIPE,
            "LEFT_HAND_LANDMARKS": HAND,
            "RIGHT_HAND_LANDMARKS": HAND,
            "POSE_WORLD_LANDMARKS": MEDIAPIPE,
        },
        {0: 0, 3: 1, 5: 2, 6: 3, 7: 4, 10: 5, 91: 6, 111: 26, 112: 27, 132: 47},
    ),
    "OpenPose": (
        {
            "pose_keypoints_2d": ["Nose", "Neck", "RShoulder", "LShoulder", "REar", "LWrist"],
            "hand_left_keypoints_2d": HAND,
            "hand_right_keypoints_2d": HAND,
        },
        {0: 0, 6: 2, 5: 3, 4: 4, 9: 5, 91: 6, 112: 27},
    ),
    "COCO-WholeBody": (
        {
            "BODY": ["nose", "left_eye", "left_shoulder", "right_shoulder", "right_elbow"],
            "RIGHT_HAND": HAND,
            "LEFT_HAND": HAND,
        },
        {0: 0, 5: 2, 6: 3, 8: 4, 112: 5, 132: 25, 91: 26},
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_pose_header_s_joints_land_where_they_belong(tmp_path, kind):
    components, places = HEADERS[kind]
    count = sum(map(len, components.values()))
    keypoints = np.zeros((7, 2, count, 2))
    keypoints[:, 0, :, 0] = np.arange(count)  # a joint's x tells which it is
    keypoints[:, 0, :, 1] = 50
    keypoints[:, 1] = 77  # another person
    scores = np.full((7, 2, count), 0.75)
    scores[3] = 0  # a frame with nobody stays
    path = tmp_path / "a.pose"
    write_pose_format(path, components, keypoints, scores)
    read, seen = load_pose_file(path)
    assert read.shape == (7, 133, 2)
    for joint, place in places.items():
        np.testing.assert_allclose(read[0, joint], [place / 200, 50 / 100], atol=1e-6)
        assert seen[0, joint] == 0.75
    assert not seen[3].any()
    absent = sorted(set(BODY) - set(places))
    assert not seen[:, absent].any()


@pytest.mark.parametrize(
    "lacking", ["LEFT_HAND_LANDMARKS", "RIGHT_HAND_LANDMARKS", "POSE_LANDMARKS"]
)
def test_a_pose_header_without_hands_or_shoulders_is_refused_by_name(tmp_path, lacking):
    components = dict(HEADERS["MediaPipe"][0])
    del components[lacking], components["POSE_WORLD_LANDMARKS"]
    count = sum(map(len, components.values()))
    path = tmp_path / "a.pose"
    write_pose_format(path, components, np.ones((3, 1, count, 2)), np.ones((3, 1, count)))
    with pytest.raises(DataError, match="a.pose: its header has no"):
        load_pose_file(path)


def test_without_the_package_a_pose_file_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pose_format", None)
    (tmp_path / "a.pose").write_bytes(b"x")
    with pytest.raises(DataError, match="a.pose.*pip install pose-format"):
        load_pose_file(tmp_path / "a.pose")


REAL_POSES = {"holistic_full": 125, "mediapipe": 170, "openpose": 93, "train_1_original": 70}


@pytest.mark.parametrize("name", REAL_POSES)
def test_real_pose_files_are_read_frame_by_frame(name):
    pytest.importorskip("pose_format", reason="pip install pose-format")
    path = shared(f"pose_files/{name}.pose")
    keypoints, scores = load_pose_file(path)
    assert keypoints.shape == (REAL_POSES[name], 133, 2)
    report = datasets_lite.inspect_clip(path)
    assert not report.odd
    assert read_clip(path, scratch_config())["body"].any()


# ------------------------------------------------------------ what looks wrong


def standing(frames=20):
    """A plain upright signer: shoulders, elbows, wrists on their own sides, all else nearby."""
    rng = np.random.default_rng(0)
    keypoints = 0.5 + 0.02 * rng.standard_normal((frames, 133, 2)).astype(np.float32)
    for joint, place in {5: (0.6, 0.4), 6: (0.4, 0.4), 7: (0.65, 0.6), 8: (0.35, 0.6)}.items():
        keypoints[:, joint] = place
    keypoints[:, 9] = (0.6, 0.7)
    keypoints[:, 10] = (0.4, 0.7)
    return keypoints, np.full((frames, 133), 0.9, np.float32)


def exchanged():
    keypoints, scores = standing()
    keypoints[:, [9, 10]] = keypoints[:, [10, 9]]
    return keypoints, scores


def at_the_origin():
    keypoints, scores = standing()
    keypoints[3, 92] = 0
    return keypoints, scores


ODD = {
    "scores far above 1": lambda: (standing()[0], standing()[1] * 100),
    r"exactly \(0, 0\)": at_the_origin,
    "one frame only": lambda: standing(1),
    "left and right exchanged": exchanged,
    "a length unlike": lambda: standing(400),
    "are in pixels, the others": lambda: (standing()[0] * 500, standing()[1]),
}


@pytest.mark.parametrize("words", ODD)
def test_check_names_the_clip_that_looks_wrong_and_none_of_the_sound(tmp_path, words):
    from train_lite import data_report

    sound = {f"c{i}": standing(20 + i % 3) for i in range(9)}
    labels = write_corpus(tmp_path / "sound", sound)
    report = data_report({"dev": SignLanguageDataset(labels, scratch_config(), "dev")})
    assert "warning" not in report
    labels = write_corpus(tmp_path / "odd", sound | {"odd_one": ODD[words]()})
    report = data_report(
        {"dev": SignLanguageDataset(labels, scratch_config(max_length=999), "dev")}
    )
    lines = report.splitlines()
    warnings = [line for line in lines if line.startswith("warning") and "exceed" not in line]
    matching = [line for line in warnings if re.search(words, line)]
    assert len(matching) == 1, warnings
    assert "odd_one" in matching[0] or "1 of 10" in matching[0]


def test_check_says_where_a_hand_is_never_seen(tmp_path):
    from train_lite import data_report

    keypoints, scores = standing()
    scores[:, LEFT] = 0
    labels = write_corpus(tmp_path, {"a": (keypoints, scores)})
    report = data_report({"dev": SignLanguageDataset(labels, scratch_config(), "dev")})
    assert "left hand 100.0 %" in report
    assert "does the detector give hands?" in report


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_nothing_looks_wrong_in_the_real_corpus_of_german_signs(split):
    from train_lite import data_report

    labels = shared(f"dgs_corpus/labels.{split}")
    data = SignLanguageDataset(labels, scratch_config(language="de"), split)
    assert "warning" not in data_report({split: data})


# ------------------------------------------------------------ the demo corpus

SMALL = {"train": 12, "dev": 4, "test": 4}


def contents(folder):
    """{relative path: bytes} of all files in a folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_the_demo_is_the_same_for_the_same_seed(tmp_path):
    first = contents(make_demo_corpus(tmp_path / "a", 3, SMALL))
    again = contents(make_demo_corpus(tmp_path / "b", 3, SMALL))
    other = contents(make_demo_corpus(tmp_path / "c", 4, SMALL))
    assert first.keys() == again.keys()
    assert all(first[name] == again[name] for name in first)
    assert first.keys() == other.keys()
    assert any(first[name] != other[name] for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], (
        "nothing else is left behind"
    )


def test_no_dev_or_test_sentence_of_the_demo_occurs_in_train(tmp_path):
    folder = make_demo_corpus(tmp_path / "demo", 0, {"train": 150, "dev": 40, "test": 40})

    def texts_of(split):
        entries = load_dataset_file(folder / f"labels.{split}")
        return [entry["text"] for entry in entries.values()]

    train = texts_of("train")
    dev = texts_of("dev")
    test = texts_of("test")
    assert len(train) == 150
    assert len(dev) == 40
    assert len(test) == 40
    assert not set(train) & set(dev + test)
    assert not set(dev) & set(test)


def test_the_demo_comes_through_the_real_loader_and_looks_like_signing(demo):
    """Full-width punctuation, clips of different lengths, missing hands.

    And glosses that are not in the words' order.
    """
    frames = []
    hands_missing = 0
    texts = []
    for split, count in (("train", 40), ("dev", 10), ("test", 6)):
        dataset = SignLanguageDataset(demo / f"labels.{split}", scratch_config(), split)
        assert len(dataset) == count
        for i in range(count):
            _, pose, text, gloss = dataset[i]
            assert_finite_and_bounded(pose)
            assert gloss
            assert text
            frames.append(len(pose["body"]))
            for hand in ("left", "right"):
                is_seen = pose[hand].any(-1).any(-1)  # by frame
                hands_missing += int((~is_seen).sum())
            texts.append((text, gloss))
    assert max(frames) > 1.5 * min(frames), f"{min(frames)} to {max(frames)} frames"
    assert hands_missing > 0
    assert any("，" in text or "？" in text for text, _ in texts)
    reordered = 0
    for text, gloss in texts:
        places = [text.find(word) for word in gloss]
        if places != sorted(places):
            reordered += 1
    assert reordered > 20, (
        f"the sign order differs from the word order in {reordered} of {len(texts)}"
    )


def test_a_demo_that_is_interrupted_leaves_no_half_corpus(tmp_path, monkeypatch):
    original = datasets_lite.pickle.dumps
    calls = []

    def fails_at_the_third(*arguments, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **more)

    monkeypatch.setattr(datasets_lite.pickle, "dumps", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make_demo_corpus(tmp_path / "demo", 0, SMALL)
    assert not (tmp_path / "demo").exists()
    monkeypatch.setattr(datasets_lite.pickle, "dumps", original)
    assert make_demo_corpus(tmp_path / "demo", 0, SMALL).is_dir(), "the next try works"


@pytest.mark.parametrize("language, text", [("zh", "我买书你看花"), ("en", "我买书 你看花")])
def test_joined_clips_are_one_after_another_with_their_texts_and_glosses(tmp_path, language, text):
    write_corpus(tmp_path, {"a": random_clip(20), "b": random_clip(30)})
    texts = {"a": entry("a", "我买书", ["我", "书"]), "b": entry("b", "你看花", ["你", "花"])}
    label = write_labels(tmp_path / "labels.train", texts)
    config = scratch_config(augment=True, join=1.0, mirror=0.0, language=language)
    dataset = SignLanguageDataset(label, config, "train")
    found = set()
    for epoch in range(10):
        config.join = 1.0
        dataset.begin_epoch(epoch)
        name, pose, joined_text, gloss = dataset[0]
        frames = sum(dataset.lengths[clip] for clip in (0, *dataset.partners[0]))
        assert len(pose["body"]) == len(pose["left"]) == frames
        found.add(name)
        config.join = 0.0
        dataset.begin_epoch(epoch)
        right = dataset[0][1]["right"]
        if name == "a + b":
            assert (joined_text, gloss) == (text, ["我", "书", "你", "花"])
            right = torch.cat([right, dataset[1][1]["right"]])
        else:
            assert (joined_text, gloss) == ("我买书", ["我", "书"])
        assert torch.equal(pose["right"], right), "the same clips, one behind the other"
        assert epoch >= 2 or name == "a", "nothing is joined in the first two epochs"
    assert found == {"a", "a + b"}, "never with itself"
    assert dataset.entries[0]["gloss"] == ["我", "书"], "the labels stay as they are"


@pytest.mark.parametrize(
    "first, second",
    [
        (("我", ["我"]), ("书", [])),  # CTC would learn that the second clip says nothing
        (("我" * 40, ["我"]), ("书" * 23, ["书"])),  # cut, it would teach to stop in mid-motion
    ],
)
def test_clips_whose_labels_do_not_fit_are_not_joined(tmp_path, first, second):
    write_corpus(tmp_path, {"a": random_clip(20), "b": random_clip(30)})
    label = write_labels(
        tmp_path / "labels.train", {"a": entry("a", *first), "b": entry("b", *second)}
    )
    dataset = SignLanguageDataset(label, scratch_config(augment=True, join=1.0), "train")
    for epoch in range(10):
        dataset.begin_epoch(epoch)
        assert dataset.partners == [(), ()]


def test_clips_are_joined_in_augmented_training_alone_and_never_beyond_max_length(tmp_path):
    label = write_corpus(tmp_path, {f"c{i}": random_clip(20 + i) for i in range(20)})

    def joined(phase="train", **options):
        dataset = SignLanguageDataset(label, scratch_config(**options), phase)
        dataset.begin_epoch(2)
        return [len(partner) for partner in dataset.partners]

    assert sum(joined(augment=True, join=1.0)) >= 16, "all but those drawn with themselves"
    assert 3 <= sum(joined(augment=True, join=0.5)) <= 17
    for options in ({"augment": True, "join": 0.0}, {"augment": False}):
        assert sum(joined(**options)) == 0
    assert sum(joined("dev", augment=True, join=1.0)) == 0
    dataset = SignLanguageDataset(
        label, scratch_config(augment=True, join=1.0, max_length=60), "train"
    )
    dataset.begin_epoch(2)
    assert 0 < sum(len(partner) for partner in dataset.partners) < 20
    for index, partner in enumerate(dataset.partners):
        frames = sum(dataset.lengths[clip] for clip in (index, *partner))
        assert frames == dataset.totals[index], "by it the clip is sorted"
        assert len(body_of(dataset, index)) == frames <= 60


def test_a_name_in_no_normal_form_is_found_as_it_is_written(tmp_path):
    name = "\u00ea\u0301"  # a Vietnamese keyboard's: neither NFC nor NFD
    keypoints, scores = random_clip(12)
    label = write_corpus(tmp_path, {name: (keypoints, scores)})
    (tmp_path / "pose_format" / f"{name}.pkl").unlink()
    np.savez(tmp_path / "pose_format" / f"{name}.npz", keypoints=keypoints, scores=scores)
    assert len(SignLanguageDataset(label, scratch_config(), "dev")) == 1


def test_an_epochs_lengths_are_those_of_its_augmented_clips(demo):
    """The sampler sorts by them: were they off, batches would be padded more.

    Nothing else would tell.
    """
    config = scratch_config(augment=True, max_length=40)
    dataset = SignLanguageDataset(demo / "labels.train", config, "train")
    for epoch in range(3):
        dataset.begin_epoch(epoch)
        totals = [min(frames, 40) for frames in dataset.totals]
        found = [len(body_of(dataset, i)) for i in range(len(dataset))]
        assert totals == found, f"epoch {epoch}"
        assert found != [entry["report"].frames for entry in dataset.entries]
        assert max(found) == 40
    dataset.config.augment = False
    dataset.begin_epoch(3)
    assert list(dataset.lengths) == [entry["report"].frames for entry in dataset.entries]


def test_an_augmented_clip_is_the_same_motion_at_another_tilt_and_speed():
    """Once the best linear map is taken out, what is left is the noise."""
    keypoints, scores = random_clip(30)
    for seed in range(20):
        moved, kept = augment_clip(keypoints, scores, np.random.default_rng(seed), 24 + seed)
        assert len(kept) == 24 + seed
        frames = np.linspace(0, 29, len(kept)).round().astype(int)
        assert (kept == scores[frames]).all()
        assert moved.dtype == np.float32
        before = keypoints[frames].reshape(-1, 2).astype(float)
        after = moved.reshape(-1, 2)
        linear_map, *_ = np.linalg.lstsq(before, after, rcond=None)
        assert np.abs(linear_map - np.eye(2)).max() < 0.25, f"seed {seed}: {linear_map}"
        noise = np.abs(after - before @ linear_map).max()  # of the joints that are read
        assert 0 < noise < 0.03, f"seed {seed}: noise {noise:.4f}"


def test_frames_that_show_too_little_of_a_body_are_an_error_and_never_zeros(tmp_path):
    """One joint in every second frame is a body over the clip, and none in two of its frames."""
    keypoints, scores = random_clip(40)
    scores[:] = 0
    for frame in range(0, 40, 2):
        scores[frame, BODY[frame // 2 % 9]] = 0.9
    path = write_pose(tmp_path / "the_clip.pkl", keypoints, scores)
    assert read_clip(path, scratch_config())["body"].any()
    with pytest.raises(DataError, match="the_clip.pkl"):
        read_clip(path, scratch_config(max_length=2))
