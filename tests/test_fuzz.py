"""Whatever arrays or bytes come in: a sound clip or a documented error, and nothing else.

That is: no NaN, no warning, no other exception. Of each kind of input a share is sound enough to be
read: a loader that refuses everything is none.

    python tests/test_fuzz.py 20000     that many inputs; prints counts by outcome, peak memory

As tests they run briefly; without the package hypothesis they are skipped.
"""

import gzip
import io
import json
import math
import pickle
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="pip install hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets_lite import (
    DataError,
    augment_clip,
    crop_scale,
    load_dataset_file,
    load_part_kp,
    load_pose_file,
)

COUNTS = Counter()  # (kind, outcome) -> inputs
LEAST_READ = 0.2  # of the inputs of each kind
SEED = st.integers(0, 2**32 - 1)
SPECIAL = np.array(
    [0, -0.0, 1, -1, 0.3, 0.31, 2.1, 1e-45, 1e-38, 1e30, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]
)


def is_small(shape):
    return np.prod(shape) < 1e5


def zeros(kind_and_shape):
    kind, shape = kind_and_shape
    return np.zeros(shape, kind)


ARRAY_KINDS = st.sampled_from(["f2", "f4", "f8", "i8", "u1", "b", "U3", "S2", "c8"])
ARRAY_SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 133]), max_size=4).filter(is_small)
ODD = st.one_of(  # what may stand where an array or a number should be
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=9),
    st.lists(st.floats(), max_size=3),
    st.just([1920, 1080]),
    st.just(np.array([640, 480])),
    st.tuples(ARRAY_KINDS, ARRAY_SHAPES).map(zeros),
)


def numbers(rng, *shape):
    """Plausible coordinates, of which some share is replaced by special values or random bits."""
    values = rng.normal(0.5, 0.3, shape)
    holes = rng.random(shape) < rng.choice([0, 0.01, 0.5, 1])
    scale = rng.choice([1, 1, 1000, 1e-30, 1e30])
    kind = rng.choice(["f2", "f4", "f8"])
    with np.errstate(all="ignore"):
        values = (values * scale).astype(kind)
        bits = np.frombuffer(rng.bytes(values.nbytes), values.dtype).reshape(shape)
        special = rng.choice(SPECIAL, shape).astype(values.dtype)
        values[holes] = np.where(rng.random(shape) < 0.5, bits, special)[holes]
    return values


def assert_sound(parts, frames):
    """These are the three tensors of a clip."""
    for part, joints in (("body", 9), ("left", 21), ("right", 21)):
        values = parts[part].numpy()
        assert values.shape == (frames, joints, 3), (part, values.shape)
        assert values.dtype == np.float32, (part, values.dtype)
        assert np.isfinite(values).all(), part
        assert np.abs(values).max(initial=0) <= 1, part


def outcome_of(function, path=None):
    """What a loader makes of its input: "read", or the documented error's name, which names path.

    Any other exception goes up; where there is no file, each does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            function()
        except (DataError, pickle.UnpicklingError) as error:
            assert path, f"arrays are never refused: {error}"
            assert path.name in str(error), f"it does not name the file: {error}"
            return type(error).__name__.strip("_")
    return "read"


def read_pose(content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip" + suffix)
        path.write_bytes(content)

        def read():
            keypoints, scores = load_pose_file(path)
            frames = len(scores)
            assert frames > 0
            assert keypoints.shape == (frames, 133, 2)
            assert scores.shape == (frames, 133)
            assert keypoints.dtype == scores.dtype == np.float32
            assert_sound(load_part_kp(keypoints, scores), frames)

        return outcome_of(read, path)


def read_labels(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "labels.train")
        path.write_bytes(content)

        def read():
            entries = load_dataset_file(path)
            assert entries
            for entry in entries.values():
                assert entry["text"].strip()
                assert isinstance(entry["gloss"], list)

        return outcome_of(read, path)


def damaged(rng, content):
    """One byte replaced, or bytes replaced, inserted, cut out or repeated, at a few places."""
    content = bytearray(content)
    if rng.random() < 0.5:
        content[rng.integers(len(content))] = rng.integers(256)
        return bytes(content)
    for _ in range(rng.integers(1, 6)):
        begin = int(rng.integers(len(content) + 1))
        length = int(rng.integers(1, 9))
        end = begin + int(rng.integers(0, length + 1))
        replacements = (
            rng.bytes(length),
            b"",
            content[begin : begin + length] * 3,
            bytes([255]) * length,
        )
        content[begin:end] = replacements[rng.integers(4)]
    if rng.random() < 0.2:
        content = content[: rng.integers(len(content) + 1)]
    return bytes(content)


def random_protocol(rng):
    """A pickle protocol."""
    return int(rng.integers(6))


def clip_bytes(rng, form):
    """A sound pose file's bytes, but for the numbers in it."""
    frames = int(rng.integers(1, 6))
    clip = {"keypoints": numbers(rng, frames, 1, 133, 2), "scores": numbers(rng, frames, 1, 133)}
    if form == "npz":
        file = io.BytesIO()
        np.savez(file, **clip)
        return file.getvalue()
    if rng.random() < 0.5:
        clip = {key: list(value) for key, value in clip.items()}
        clip |= {"start": 0, "end": frames, "w_h": [100, 100]}
    return pickle.dumps(clip, random_protocol(rng))


def fuzz_arrays(data):
    rng = np.random.default_rng(data.draw(SEED))
    frames = data.draw(st.integers(0, 12))
    keypoints = numbers(rng, frames, 133, 2)
    scores = numbers(rng, frames, 133)
    with np.errstate(all="ignore"):
        # as load_pose_file gives them
        stored_keypoints = keypoints.astype(np.float32)
        stored_scores = scores.astype(np.float32)
        motion = np.concatenate([keypoints, scores[..., None]], -1)[:, :9]

    def read():
        assert_sound(load_part_kp(keypoints, scores), frames)
        result, scale, _ = crop_scale(motion, 0.3)
        assert np.isfinite(result).all()
        assert np.isfinite(scale)
        if frames:
            moved, kept = augment_clip(stored_keypoints, stored_scores, rng, frames + 1)
            assert_sound(load_part_kp(moved, kept), len(kept))

    return outcome_of(read)


def fuzz_structures(data):
    fields = ("keypoints", "scores", "start", "end", "w_h", "more")
    odd = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(fields, ODD)))
    rng = np.random.default_rng(data.draw(SEED))
    good = pickle.loads(clip_bytes(rng, "pkl"))
    if rng.random() < 0.2:
        clip = odd
    else:
        clip = good | {field: odd[field] for field in list(odd)[: rng.integers(3)]}
    return read_pose(pickle.dumps(clip, random_protocol(rng)), ".pkl")


def fuzz_damaged_pickle(data):
    rng = np.random.default_rng(data.draw(SEED))
    return read_pose(damaged(rng, clip_bytes(rng, "pkl")), ".pkl")


def fuzz_damaged_npz(data):
    """The archive damaged, or its members before they are packed: their checksums are right."""
    rng = np.random.default_rng(data.draw(SEED))
    content = clip_bytes(rng, "npz")
    if rng.random() < 0.3:
        return read_pose(damaged(rng, content), ".npz")
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as sound, zipfile.ZipFile(file, "w") as packed:
        for name in sound.namelist():
            packed.writestr(name, damaged(rng, sound.read(name)))
    return read_pose(file.getvalue(), ".npz")


def fuzz_bytes(data):
    """Bytes of no form, alone or behind a sound file's end."""
    content = data.draw(st.binary(max_size=300))
    suffix = data.draw(st.sampled_from([".pkl", ".npz", ""]))
    rng = np.random.default_rng(data.draw(SEED))
    if rng.random() < 0.6:
        content = clip_bytes(rng, suffix[1:]) + content
    return read_pose(content, suffix)


GOOD_ENTRY = {"name": "a", "text": "你好", "gloss": ["你好"], "pose": "a.pkl"}
GOOD_ENTRIES = [GOOD_ENTRY | {"name": name, "pose": f"{name}.pkl"} for name in "abc"]


def with_one_odd_field(odd_fields):
    """A good entry, the first of the odd fields in the place of its own."""
    return GOOD_ENTRY | dict(list(odd_fields.items())[:1])


ODD_FIELDS = st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD_ENTRY, ODD))
ENTRIES = st.one_of(ODD, st.just(GOOD_ENTRY), ODD_FIELDS.map(with_one_odd_field))
KEYS = st.one_of(st.text(max_size=4), st.integers(0, 9))
LABELS = st.one_of(ODD, st.lists(ENTRIES, max_size=3), st.dictionaries(KEYS, ENTRIES, max_size=3))


def fuzz_labels(data):
    rng = np.random.default_rng(data.draw(SEED))
    labels = data.draw(LABELS)
    if rng.random() < 0.7:
        labels = GOOD_ENTRIES[: rng.integers(1, 4)]
        if rng.random() < 0.3:
            labels = [*labels, data.draw(ENTRIES)]
        if rng.random() < 0.5:
            labels = dict(enumerate(labels))
    if rng.random() < 0.3:
        content = json.dumps(labels, default=str).encode()
    else:
        content = gzip.compress(pickle.dumps(labels, random_protocol(rng)))
    if rng.random() < 0.3:
        content = damaged(rng, content)
    return read_labels(content)


KINDS = [
    fuzz_arrays,
    fuzz_structures,
    fuzz_damaged_pickle,
    fuzz_damaged_npz,
    fuzz_bytes,
    fuzz_labels,
]


def name_of(kind):
    return kind.__name__.removeprefix("fuzz_")


def run(kind, inputs):
    """Draw that many inputs of a kind and count what comes of them -> the share that is read."""

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def tried(data):
        COUNTS[name_of(kind), kind(data)] += 1

    before = COUNTS.copy()
    tried()
    new = COUNTS - before
    return new[name_of(kind), "read"] / new.total()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_whatever_comes_in_is_a_sound_clip_or_a_documented_error(kind):
    share = run(kind, 120)
    assert share >= LEAST_READ, f"{share:.0%} are read; the others test refusals alone"


def main():
    import resource  # not on Windows

    inputs = int(sys.argv[1]) if len(sys.argv) > 1 else 20000
    started = time.monotonic()
    shares = {name_of(kind): run(kind, math.ceil(inputs / len(KINDS))) for kind in KINDS}
    seconds = time.monotonic() - started
    for (kind, outcome), count in sorted(COUNTS.items()):
        print(f"{kind:20} {outcome:20} {count:7,}")
    total = sum(COUNTS.values())
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{total:,} inputs in {seconds:.0f} s: no NaN, no warning, no other error")
    print(f"peak memory {gigabytes:.2f} GB")
    refused = [kind for kind, share in shares.items() if share < LEAST_READ]
    if refused:
        sys.exit(f"less than {LEAST_READ:.0%} are read of {', '.join(refused)}")


if __name__ == "__main__":
    main()
