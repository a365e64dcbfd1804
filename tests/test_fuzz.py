"""Whatever arrays or bytes come in: a sound clip or a documented error; no NaN, no warning, no
other exception.

    python tests/test_fuzz.py 20000     that many inputs, counts by kind and outcome, peak memory

As tests they run briefly; without the package hypothesis they are skipped.
"""

import gzip
import io
import json
import pickle
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="pip install hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets_lite import (  # noqa: E402
    DataError,
    augment_clip,
    crop_scale,
    load_dataset_file,
    load_part_kp,
    load_pose_file,
)

COUNTS = Counter()  # (kind, outcome) -> inputs
SEED = st.integers(0, 2**32 - 1)
SPECIAL = np.array(
    [0, -0.0, 1, -1, 0.3, 0.31, 2.1, 1e-45, 1e-38, 1e30, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=9),
    st.lists(st.floats(), max_size=3),
    st.just([1920, 1080]),
    st.just(np.array([640, 480])),
    st.tuples(
        st.sampled_from(["f2", "f4", "f8", "i8", "u1", "b", "U3", "S2", "c8"]),
        st.lists(st.sampled_from([0, 1, 2, 3, 133]), max_size=4).filter(
            lambda shape: np.prod(shape) < 1e5
        ),
    ).map(lambda a: np.zeros(a[1], a[0])),
)


def numbers(rng, *shape):
    """Plausible coordinates, of which some share is replaced by special values or random bits."""
    values, holes = rng.normal(0.5, 0.3, shape), rng.random(shape) < rng.choice([0, 0.01, 0.5, 1])
    with np.errstate(all="ignore"):
        values = (values * rng.choice([1, 1, 1000, 1e-30, 1e30])).astype(
            rng.choice(["f2", "f4", "f8"])
        )
        bits = np.frombuffer(rng.bytes(values.nbytes), values.dtype).reshape(shape)
        special = rng.choice(SPECIAL, shape).astype(values.dtype)
        values[holes] = np.where(rng.random(shape) < 0.5, bits, special)[holes]
    return values


def sound(parts, frames):
    """Whether these are the three tensors of a clip."""
    for part, joints in (("body", 9), ("left", 21), ("right", 21)):
        values = parts[part].numpy()
        assert values.shape == (frames, joints, 3) and values.dtype == np.float32, (
            part,
            values.shape,
            values.dtype,
        )
        assert np.isfinite(values).all() and np.abs(values).max(initial=0) <= 1, part


def outcome_of(function):
    """What a loader makes of its input: "read", or the documented error's name; anything else goes
    up.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            function()
        except (DataError, pickle.UnpicklingError) as error:
            assert str(error), "an error without a word"
            return type(error).__name__.strip("_")
    return "read"


def read_pose(content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip" + suffix)
        path.write_bytes(content)

        def read():
            keypoints, scores = load_pose_file(path)
            assert (
                keypoints.shape == (len(scores), 133, 2)
                and scores.shape == (len(scores), 133)
                and len(scores)
            )
            assert keypoints.dtype == scores.dtype == np.float32
            sound(load_part_kp(keypoints, scores), len(scores))

        return outcome_of(read)


def read_labels(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "labels.train")
        path.write_bytes(content)

        def read():
            entries = load_dataset_file(path)
            assert entries and all(
                e["text"].strip() and isinstance(e["gloss"], list) for e in entries.values()
            )

        return outcome_of(read)


def damaged(rng, content):
    """Bytes replaced, inserted, cut out or repeated, at a few places."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        at, length = int(rng.integers(len(content) + 1)), int(rng.integers(1, 9))
        content[at : at + int(rng.integers(0, length + 1))] = (
            rng.bytes(length),
            b"",
            content[at : at + length] * 3,
            bytes([255]) * length,
        )[rng.integers(4)]
    return bytes(content[: rng.integers(len(content) + 1)] if rng.random() < 0.2 else content)


def clip_bytes(rng, form):
    frames = int(rng.integers(1, 6))
    clip = {"keypoints": numbers(rng, frames, 1, 133, 2), "scores": numbers(rng, frames, 1, 133)}
    if form == "npz":
        file = io.BytesIO()
        np.savez(file, **clip)
        return file.getvalue()
    if rng.random() < 0.5:
        clip = {key: list(value) for key, value in clip.items()} | {
            "start": 0,
            "end": frames,
            "w_h": [100, 100],
        }
    return pickle.dumps(clip, int(rng.integers(6)))


def fuzz_arrays(data):
    rng = np.random.default_rng(data.draw(SEED))
    frames = data.draw(st.integers(0, 12))
    keypoints, scores = numbers(rng, frames, 133, 2), numbers(rng, frames, 133)
    with np.errstate(all="ignore"):
        stored = (
            keypoints.astype(np.float32),
            scores.astype(np.float32),
        )  # as load_pose_file gives them
        motion = np.concatenate([keypoints, scores[..., None]], -1)[:, :9]

    def read():
        sound(load_part_kp(keypoints, scores), frames)
        result, scale, _ = crop_scale(motion, 0.3)
        assert np.isfinite(result).all() and np.isfinite(scale)
        if frames:
            moved, kept = augment_clip(*stored, rng, frames + 1)
            sound(load_part_kp(moved, kept), len(kept))

    return outcome_of(read)


def fuzz_structures(data):
    clip = data.draw(
        st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(("keypoints", "scores", "start", "end", "w_h", "more"), ODD),
        )
    )
    rng = np.random.default_rng(data.draw(SEED))
    good = pickle.loads(clip_bytes(rng, "pkl"))
    clip = clip if rng.random() < 0.2 else good | {key: clip[key] for key in list(clip)[:2]}
    return read_pose(pickle.dumps(clip, int(rng.integers(6))), ".pkl")


def fuzz_damaged_pickle(data):
    rng = np.random.default_rng(data.draw(SEED))
    return read_pose(damaged(rng, clip_bytes(rng, "pkl")), ".pkl")


def fuzz_damaged_npz(data):
    rng = np.random.default_rng(data.draw(SEED))
    return read_pose(damaged(rng, clip_bytes(rng, "npz")), ".npz")


def fuzz_bytes(data):
    return read_pose(
        data.draw(st.binary(max_size=300)), data.draw(st.sampled_from([".pkl", ".npz", ""]))
    )


def fuzz_labels(data):
    good = {"name": "a", "text": "你好", "gloss": ["你好"], "pose": "a.pkl"}
    entry = st.one_of(
        ODD,
        st.just(good),
        st.fixed_dictionaries({}, optional=dict.fromkeys(good, ODD)).map(
            lambda odd: good | dict(list(odd.items())[:1])
        ),
    )
    rng, key = (
        np.random.default_rng(data.draw(SEED)),
        st.one_of(st.text(max_size=4), st.integers(0, 9)),
    )
    labels = data.draw(
        st.one_of(ODD, st.lists(entry, max_size=3), st.dictionaries(key, entry, max_size=3))
    )
    if rng.random() < 0.3:
        content = json.dumps(labels, default=str).encode()
    else:
        content = gzip.compress(pickle.dumps(labels, int(rng.integers(6))))
    return read_labels(damaged(rng, content) if rng.random() < 0.3 else content)


KINDS = [
    fuzz_arrays,
    fuzz_structures,
    fuzz_damaged_pickle,
    fuzz_damaged_npz,
    fuzz_bytes,
    fuzz_labels,
]


def run(kind, inputs):
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def tried(data):
        COUNTS[kind.__name__.removeprefix("fuzz_"), kind(data)] += 1

    tried()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_whatever_comes_in_is_a_sound_clip_or_a_documented_error(kind):
    run(kind, 120)
    assert sum(COUNTS.values()) > 100


if __name__ == "__main__":
    import resource

    started, inputs = time.monotonic(), int(sys.argv[1]) if len(sys.argv) > 1 else 20000
    for kind in KINDS:
        run(kind, -(-inputs // len(KINDS)))
    for (kind, outcome), count in sorted(COUNTS.items()):
        print(f"{kind:20} {outcome:20} {count:7,}")
    print(
        f"{sum(COUNTS.values()):,} inputs in {time.monotonic() - started:.0f} s, no NaN, no "
        "warning, no other error; "
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"
    )
