"""From files to batches: labels, poses, the data set, batches by length, and the built-in demo corpus.

One worked example, as a clip goes through:
    train_00000.pkl      {"keypoints": (T, 1, 133, 2), "scores": (T, 1, 133)}, COCO-WholeBody, x right, y down
    -> load_pose_file    keypoints (T, 133, 2), scores (T, 133)
    -> load_part_kp      body (T, 9, 3): joints 0, 3-10 in one box for the clip, x, y -1..1, confidence 0..1
                         left (T, 21, 3): joints 91-111 minus joint 91; right: joints 112-132 minus joint 112
    -> collate_fn        body (B, T, 9, 3), left and right (B, T, 21, 3), padded with zeros at the end
A joint that was not seen (confidence at most 0.3, NaN, Inf) is zero in all three channels.
"""
import gzip
import io
import json
import math
import os
import pickle
import reprlib
import tempfile
import warnings
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

JOINTS = 133  # COCO-WholeBody
THRESHOLD = 0.3  # a joint at or below this confidence counts as not seen
# Nose, ears, shoulders, elbows, wrists, as in Uni-Sign. The original took the hips instead of the ears; in
# upper-body video they lie below the frame, and a guessed hip stretches the box that everything is scaled by.
BODY = [0, 3, 4, 5, 6, 7, 8, 9, 10]
LEFT_WRIST, RIGHT_WRIST = BODY.index(9), BODY.index(10)
LEFT, RIGHT = list(range(91, 112)), list(range(112, 133))
USED = np.array(BODY + LEFT + RIGHT)
BODY_EDGES = [(0, 1), (0, 2), (0, 3), (0, 4), (3, 4), (3, 5), (5, 7), (4, 6), (6, 8)]  # positions in BODY
HAND_EDGES = [(0 if j % 4 == 1 else j - 1, j) for j in range(1, 21)]  # wrist to finger's root, then along it
MAX_BYTES = 256 * 2**20  # of a file, of what it unpacks to, and of each array that it claims to hold


class DataError(ValueError):
    """The data cannot be used as it is; the message names the file or clip, what was found and what to do."""


# ---------------------------------------------------------------------------------- untrusted files

class _Refused(pickle.UnpicklingError):
    """A pickle asks for more than data."""


class _Dtype:
    """A dtype while it is unpickled; of what follows its name only the byte order is believed."""

    def __init__(self, code, *flags):
        if code[:1] not in "biufSUOV" or not code[1:].isdigit():
            raise _Refused(f"an array of dtype {code!s:.100}")
        self.value = np.dtype(code)

    def __setstate__(self, state):
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array while it is unpickled: nothing but BUILD fills it, with bytes of a plain dtype."""

    __setitem__ = None

    def __new__(cls, *args):
        raise _Refused("an array without its data")

    def __setstate__(self, state):
        version, shape, dtype, fortran, data = state
        if dtype.value.kind not in "biufSU":
            raise _Refused(f"an array of dtype {dtype.value}")
        super().__setstate__((version, shape, dtype.value, fortran, data))


def _encode(text, encoding):
    if encoding not in ("latin1", "latin-1"):  # which protocols 0 to 2 write an array's bytes in
        raise _Refused(f"bytes in the encoding {encoding!s:.100}")
    return text.encode("latin1")


class _SafeUnpickler(pickle.Unpickler):
    """Builds arrays and plain containers; whatever else a pickle names is refused before it is called."""

    ALLOWED = {
        "numpy.ndarray": _Array, "numpy.dtype": _Dtype, "_codecs.encode": _encode,
        "numpy.core.multiarray._reconstruct": lambda kind, shape, code: np.ndarray.__new__(_Array, 0),
        "numpy.core.multiarray.scalar": lambda dtype, data: np.frombuffer(data, dtype.value, 1)[0],
        "numpy.core.numeric._frombuffer": lambda data, dtype, shape, order:
            np.frombuffer(data, dtype.value).reshape(shape, order=order).view(_Array),
        "builtins.bytearray": lambda data: bytearray(memoryview(data)), "builtins.complex": complex,
        "builtins.set": set, "builtins.frozenset": frozenset, "collections.OrderedDict": OrderedDict}

    def find_class(self, module, name):
        known = f"{module}.{name}".replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        if known not in self.ALLOWED:
            raise _Refused(f"{module}.{name}")
        return self.ALLOWED[known]


@contextmanager
def _naming(path, what):
    """Whatever a file's bytes make Python raise becomes an error that names the file."""
    try:
        yield
    except DataError:
        raise
    except _Refused as error:
        raise _Refused(f"{path}: refused, the pickle asks for {error}; a label or pose file needs nothing "
                       "but arrays and plain containers, so don't trust it") from None
    except Exception as error:  # of any kind: the bytes are anybody's
        raise DataError(f"{path}: {what} ({type(error).__name__}: {error!s:.200})") from error


def _check_size(path, size, what="holds"):
    if size > MAX_BYTES:
        raise DataError(f"{path}: {what} {size:,} bytes, over {MAX_BYTES:,}; is it the right file?")


# ---------------------------------------------------------------------------------- labels and poses

def load_dataset_file(path, problems=None):
    """Labels -> {name: {name, text, gloss (list, may be empty), pose (file name)}}.

    Reads a gzip-pickled dict (CSL-Daily), and JSON: a dict, or CSL-News's list of {video, pose, text}. Raises
    DataError naming file or entry, pickle.UnpicklingError for a pickle that asks for more than data; where a
    list of `problems` is given, faulty entries are added to it and left out instead.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such label file; data_dir must hold labels.train, .dev and .test")
    with _naming(path, "damaged, or neither a gzip-pickled dict nor JSON"):
        _check_size(path, path.stat().st_size)
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(MAX_BYTES + 1)
            _check_size(path, len(raw), "unpacks to at least")
            data = _SafeUnpickler(io.BufferedReader(io.BytesIO(raw))).load()
        else:
            data = json.loads(raw.decode("utf-8"))
    if not isinstance(data, (dict, list)) or not data:
        raise DataError(f"{path}: a dict or list of entries was expected, found {reprlib.repr(data)}")
    entries, faults = {}, []
    for i, (key, entry) in enumerate(data.items() if isinstance(data, dict) else enumerate(data)):
        try:
            with _naming(path, f"entry {i} is malformed"):
                if isinstance(data, list) and isinstance(entry, dict):
                    key = Path(str(entry.get("pose") or entry.get("video") or key)).stem
                if str(key) in entries:
                    raise DataError(f"{path}: entry {key} is there twice; rename or remove one")
                entries[str(key)] = _entry(path, str(key), entry)
        except DataError as error:
            faults.append(str(error))
    if faults and problems is None:
        raise DataError(f"{path}: {len(faults)} faulty entries:\n{_first(faults)}")
    if faults:
        problems += faults
    return entries


def _first(lines):
    more = [f"... and {len(lines) - 5} more"] if len(lines) > 5 else []
    return "\n".join(f"  {line}" for line in lines[:5] + more)


def _entry(path, key, entry):
    where = f"{path}: entry {key}"
    if not isinstance(entry, dict):
        raise DataError(f"{where} is a {type(entry).__name__}, a dict with name and text was expected")
    text, gloss = entry.get("text"), entry.get("gloss")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where} has no text (found {reprlib.repr(text)}); give it one or remove the entry")
    gloss = gloss.split() if isinstance(gloss, str) else [] if gloss is None else gloss
    if not (isinstance(gloss, (list, tuple)) and all(isinstance(word, str) for word in gloss)):
        raise DataError(f"{where} has glosses of type {type(gloss).__name__}, a list of words was expected")
    name = str(entry.get("name") or key)
    pose = str(entry.get("pose") or f"{name}.pkl")
    if "\0" in name + pose:
        raise DataError(f"{where} has a name or pose that cannot be a file's; mend or remove it")
    "".join([name, pose, text, *gloss]).encode()  # half a character fails here, not in the tokeniser
    return {"name": name, "text": text, "gloss": list(gloss), "pose": pose}


def load_pose_file(path):
    """One clip -> (keypoints (T, 133, 2), scores (T, 133)), float32; pixels are divided by `w_h`, if there.

    `.pkl` holds arrays or lists of frames, with or without the person axis, and may hold `start` and `end`
    (frames, end exclusive) and `w_h`; `.npz` holds the arrays `keypoints` and `scores`, nothing pickled.
    Raises DataError naming the file, pickle.UnpicklingError for a pickle that asks for more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such pose file")
    with _naming(path, f"not a readable {path.suffix[1:]} file"), np.errstate(all="ignore"):
        _check_size(path, path.stat().st_size)
        with open(path, "rb") as file:
            data = _read_npz(file, path) if path.suffix == ".npz" else _SafeUnpickler(file).load()
        if not isinstance(data, dict) or "keypoints" not in data or "scores" not in data:
            found = f"dict with {reprlib.repr(list(data))}" if isinstance(data, dict) else type(data).__name__
            raise DataError(f"{path}: a dict with keypoints and scores was expected, found a {found}")
        keypoints = _frames(data["keypoints"], (JOINTS, 2), "keypoints", path)
        scores = _frames(data["scores"], (JOINTS,), "scores", path)
        frames = len(scores)
        if len(keypoints) != frames:
            raise DataError(f"{path}: {len(keypoints)} frames of keypoints, but {frames} of scores")
        start, end = data.get("start"), data.get("end")
        if start is not None or end is not None:
            start = int(_numbers(start or 0, None, "start", "a frame number", path)[0])
            end = frames if end is None else int(_numbers(end, None, "end", "a frame number", path)[0])
            if not 0 <= start < min(end, frames):
                raise DataError(f"{path}: start {start}, end {end} select no frame of {frames}")
            keypoints, scores = keypoints[start:end], scores[start:end]
        return _from_pixels(keypoints, scores, data.get("w_h"), path), scores


def _read_npz(file, path):
    with np.load(file, allow_pickle=False) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about headers that Python 2 wrote
        for member in archive.zip.infolist():
            _check_size(path, member.file_size, f"{member.filename} unpacks to")
            with archive.zip.open(member) as file:  # its claim is read before memory is taken for it
                version = np.lib.format.read_magic(file)[0]
                shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version}_0")(file)
            _check_size(path, math.prod(shape) * dtype.itemsize, f"{member.filename} claims")
        return {name: archive[name] for name in archive.files}


def _frames(value, shape, field, path):
    """Array (T, 133, ...) or (T, 1, 133, ...), or a list of T such frames -> float32 (T, 133, ...)."""
    try:
        if isinstance(value, (list, tuple)) and value:
            value = _stacked(value, shape)
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"dtype {array.dtype}")
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: {field} is not numbers of one shape a frame ({error})") from error
    if array.size == 0:
        raise DataError(f"{path}: {field} has no frames (shape {array.shape})")
    if array.ndim == len(shape) + 2:  # a person axis: the first person is the signer
        array = array[:, 0]
    if array.shape[1:] != shape:
        wanted = "(T, 133, 2) or (T, 1, 133, 2)" if len(shape) == 2 else "(T, 133) or (T, 1, 133)"
        raise DataError(f"{path}: {field} has shape {array.shape}, {wanted} was expected (COCO-WholeBody)")
    return array.astype(np.float32, copy=False)


def _stacked(frames, shape):
    """Frames, arrays or lists of numbers -> array (T, ...); a pickle can name one list a million times."""
    first = frames[0]
    size = first.size if isinstance(first, np.ndarray) else math.prod(shape)
    if 4 * size * len(frames) > MAX_BYTES:
        raise ValueError(f"{len(frames)} frames are over {MAX_BYTES:,} bytes")
    if isinstance(first, np.ndarray):
        if any(getattr(frame, "shape", None) != first.shape for frame in frames):
            raise ValueError("frames of several shapes")
        return np.concatenate(frames, dtype=np.float32, casting="unsafe").reshape(-1, *first.shape)
    rows, shape = frames, (1, *shape) if len(first) == 1 else shape
    for width in shape:
        if any(not isinstance(row, (list, tuple)) or len(row) != width for row in rows):
            raise ValueError(f"lists that are not of {width} each")
        rows = [item for row in rows for item in row]
    return np.array([float(number) for number in rows]).reshape(-1, *shape)


def _numbers(value, count, field, wanted, path):
    """A number (count None), or a list or array of `count` of them -> list of finite floats."""
    try:
        values = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        numbers = [float(v) for v in (values if count else [values])]
        if len(numbers) == (count or 1) and all(map(math.isfinite, numbers)):
            return numbers
    except (TypeError, ValueError, OverflowError):
        pass
    raise DataError(f"{path}: {field} is {reprlib.repr(value)}, {wanted} was expected")


def _from_pixels(keypoints, scores, w_h, path):
    if w_h is None or not (keypoints > 2).any():
        return keypoints
    seen = (scores > THRESHOLD) & np.isfinite(keypoints).all(-1)
    if not seen.any() or np.median(keypoints[seen]) <= 2:  # w_h is on normalised clips, too
        return keypoints
    size = np.array(_numbers(w_h, 2, "w_h", "[width, height] in pixels", path), np.float32)
    if not (size > 0).all():
        raise DataError(f"{path}: w_h is {size.tolist()}, [width, height] in pixels was expected")
    return keypoints / size


def crop_scale(motion, thr):
    """One box for a clip: motion (T, V, 3) of x, y, confidence -> (result (T, V, 3) float32, scale, offset).

    It spans all joints of all frames with confidence above thr and finite coordinates. Scale: its longer
    side; offset (2,): its corner; result: x, y in -1..1, confidence in 0..1, any other joint zero. Fewer than
    4 such joints, or a box without extent: (zeros, 0, None). Never NaN or a warning; motion is left alone.
    """
    motion = np.asarray(motion)
    return _scaled(motion[..., :2], motion[..., 2], thr, motion.shape[1])


def _scaled(xy, confidence, thr, body):
    """crop_scale on the first `body` joints; the hands of 21 joints behind them get the body's scale only."""
    with np.errstate(all="ignore"):
        usable = confidence > thr
        joints = np.empty((3, *usable.shape))  # channels first: much faster than (T, V, 3)
        joints[:2], joints[2] = xy.transpose(2, 0, 1), confidence
        xy = joints[:2]
        usable &= np.isfinite(xy[0]) & np.isfinite(xy[1])
        low = np.where(usable[:, :body], xy[..., :body], np.inf).min((1, 2), initial=np.inf)
        high = np.where(usable[:, :body], xy[..., :body], -np.inf).max((1, 2), initial=-np.inf)
        scale = float((high - low).max())
        if np.count_nonzero(usable[:, :body]) < 4 or not np.finfo(np.float32).tiny < scale < math.inf:
            return np.zeros((*usable.shape, 3), np.float32), 0, None
        offset = low / 2 + high / 2 - scale / 2
        xy[..., :body] = (xy[..., :body] - offset[:, None, None]) / scale * 2 - 1
        for hand in (slice(first, first + 21) for first in range(body, usable.shape[1], 21)):
            xy[..., hand] = (xy[..., hand] - xy[..., hand][..., :1]) / scale
            usable[:, hand] &= usable[:, hand][:, :1]
        joints = np.where(usable, joints.clip([[[-1]], [[-1]], [[0]]], 1), 0)
        return joints.transpose(1, 2, 0).astype(np.float32, order="C"), scale, offset


def load_part_kp(skeletons, confs):
    """skeletons (T, 133, 2), confs (T, 133) -> {body (T, 9, 3), left, right (T, 21, 3)}, float32 tensors.

    The body goes through `crop_scale`. A hand is taken relative to its own first joint, divided by the body's
    scale and clipped to -1..1; in a frame where that first joint was not seen, the whole hand is zero.
    """
    skeletons, confs = np.asarray(skeletons).take(USED, 1), np.asarray(confs).take(USED, 1)
    joints, _, _ = _scaled(skeletons, confs, THRESHOLD, len(BODY))
    parts = {"body": joints[:, :9], "left": joints[:, 9:30], "right": joints[:, 30:]}
    return {part: torch.from_numpy(values.copy()) for part, values in parts.items()}


def sample_frames(frames, max_length, rng=None):
    """Indices of at most max_length of `frames` frames: evenly, or, with rng, at random within even steps."""
    if frames <= max_length:
        return np.arange(frames)
    inside = 0.5 if rng is None else rng.random(max_length)
    return np.minimum(((np.arange(max_length) + inside) * (frames / max_length)).astype(np.int64), frames - 1)


# ---------------------------------------------------------------------------------- the data set

class ClipReport(NamedTuple):
    """What the check before the first step found in one pose file; joints are counted over all frames."""

    frames: int = 0
    unseen: tuple = (0, 0, 0)  # joints at or below the threshold: body, left hand, right hand
    no_hand: int = 0  # frames in which neither hand was seen
    not_finite: int = 0  # joints, among the used ones, with a NaN or Inf
    in_pixels: bool = False
    problem: str = ""  # why the clip cannot be used


def inspect_clip(path):
    """One pose file -> ClipReport; never raises on what a file holds."""
    try:
        keypoints, scores = load_pose_file(path)
    except (DataError, pickle.UnpicklingError, OSError) as error:
        return ClipReport(problem=str(error))
    finite = np.isfinite(keypoints).all(-1)
    seen, problem = (scores > THRESHOLD) & finite, ""
    if not load_part_kp(keypoints, scores)["body"].any():
        count = np.count_nonzero(seen[:, BODY])
        problem = f"{path}: no usable body ({count} joints above confidence {THRESHOLD}, {len(seen)} frames)"
    unseen = tuple(int((~seen[:, part]).sum()) for part in (BODY, LEFT, RIGHT))
    no_hand = int((~seen[:, [LEFT[0], RIGHT[0]]]).all(1).sum())
    not_finite = int((~(finite & np.isfinite(scores)))[:, USED].sum())
    # load_pose_file divides by w_h where it can; what is still far above 1 are pixels
    in_pixels = bool(seen.any() and np.median(keypoints[seen]) > 2)
    return ClipReport(len(seen), unseen, no_hand, not_finite, in_pixels, problem)


class SignLanguageDataset(Dataset):
    """Clips of one label file; item: (name, pose {body, left, right}, text, gloss).

    Every pose file is read once when the set is made, by all cores, so that no bad clip stops a run later;
    what was found is kept in config.output_dir. With on_bad_clip "error" DataError names the bad clips, with
    "skip" they are left out and listed in output_dir/bad_clips.txt; a list of `problems` replaces both.
    `encode`, if set, turns texts into labels in the loader's workers.
    """

    def __init__(self, label_path, config, phase="train", problems=None):
        self.config, self.phase, self.label_path = config, phase, Path(label_path)
        self.pose_dir = self.label_path.parent / "pose_format"
        self.epoch, self.encode = 0, None
        self.entries = list(load_dataset_file(label_path, problems).values())
        self.paths = [self._find(entry) for entry in self.entries]
        self.reports = self._inspect_all()
        self._drop_bad(problems)
        self.lengths = [min(report.frames, config.max_length) for report in self.reports]

    def _find(self, entry):
        """The entry's pose, else name.pkl, else name.npz; None for one that lies outside pose_format."""
        for name in (entry["pose"], entry["name"] + ".pkl", entry["name"] + ".npz"):
            path = self.pose_dir / name
            if not path.resolve().is_relative_to(self.pose_dir.resolve()):
                return None
            if path.is_file():
                return path
        return self.pose_dir / entry["pose"]

    def _inspect_all(self):
        """Inspect each file, or take what an earlier run found for the same size and time of change."""
        folder = self.config.output_dir
        cache_path = Path(folder or ".") / f"clips_{self.label_path.name}.json"
        try:
            cache = json.loads(cache_path.read_text(encoding="utf-8")) if folder else {}
        except (OSError, ValueError):  # no cache yet, or half a one: it is only a saving of time
            cache = {}
        stats = [path.stat() if path and path.is_file() else None for path in self.paths]
        keys = [s and f"{path} {s.st_size} {s.st_mtime_ns}" for path, s in zip(self.paths, stats)]
        todo = sorted({path for path, key in zip(self.paths, keys) if path and key not in cache})
        found = dict(zip(todo, _in_parallel(inspect_clip, todo, f"reading {self.label_path.name}")))
        found[None] = ClipReport(problem=f"its pose is outside {self.pose_dir}, or a link leads out: refused")
        reports = [ClipReport(*cache[k]) if k in cache else found[path] for path, k in zip(self.paths, keys)]
        if folder and todo:
            _write(cache_path, json.dumps({k: r for k, r in zip(keys, reports) if k}))
        return reports

    def _drop_bad(self, problems):
        """Leave out bad clips, or refuse the set, as on_bad_clip says; `problems` only takes their names."""
        bad = [f"{e['name']}: {r.problem}" for e, r in zip(self.entries, self.reports) if r.problem]
        if not bad:
            return
        message = f"{self.label_path}: {len(bad)} of {len(self.entries)} clips are unusable:\n{_first(bad)}"
        if problems is None and (self.config.on_bad_clip == "error" or len(bad) == len(self.entries)):
            raise DataError(f"{message}\nmend or remove them, or leave them out with --on_bad_clip skip")
        keep = [i for i, report in enumerate(self.reports) if not report.problem]
        self.entries, self.paths, self.reports = (
            [values[i] for i in keep] for values in (self.entries, self.paths, self.reports))
        if problems is not None:
            problems += bad
            return
        if self.config.output_dir:
            path = Path(self.config.output_dir) / "bad_clips.txt"
            old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            lines = [line for line in old if not line.startswith(self.phase + "\t")]
            _write(path, "".join(f"{line}\n" for line in lines + [f"{self.phase}\t{line}" for line in bad]))
        print(f"{message}\nleft out, as on_bad_clip says", flush=True)

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        entry = self.entries[index]
        return entry["name"], self._load_pose(index), entry["text"], entry["gloss"]

    def _load_pose(self, index):
        # from seed, epoch and clip alone, so the same whatever worker draws it
        rng = np.random.default_rng([self.config.seed, self.epoch, index]) if self.phase == "train" else None
        least = self.config.temporal_stride * ctc_positions(self.entries[index]["gloss"])
        return read_clip(self.paths[index], self.config, rng, least)

    def collate_fn(self, batch):
        """Items -> (src_input, tgt_input); attention_mask (B, T): 1 = real frame, 0 = zero padding."""
        names, poses, texts, glosses = zip(*batch)
        src_input = pad_poses(poses) | {"names": list(names)}
        tgt_input = {"gt_sentence": list(texts), "gt_gloss": list(glosses)}
        if self.encode is not None:
            tgt_input["labels"] = self.encode(tgt_input["gt_sentence"])
        return src_input, tgt_input


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def ctc_positions(target):
    """Positions that CTC needs for a target: one a gloss, one more between equal neighbours."""
    return len(target) + sum(a == b for a, b in zip(target, target[1:]))


def read_clip(path, config, rng=None, least=1):
    """The one way from a pose file to {body, left, right}: training (with rng), evaluation, one clip.

    Augmentation shortens no clip below `least` frames. Raises DataError or pickle.UnpicklingError, naming
    the file.
    """
    stored = keypoints, scores = load_pose_file(path)
    if rng is not None and config.augment:
        keypoints, scores = augment_clip(keypoints, scores, rng, least)
    frames = sample_frames(len(scores), config.max_length, rng)
    pose = load_part_kp(keypoints[frames], scores[frames])
    if not pose["body"].any():  # the few frames that show a body were not among these: take only such
        keypoints, scores = stored
        seen = np.flatnonzero(load_part_kp(*stored)["body"].any((1, 2)))
        frames = seen[sample_frames(len(seen), config.max_length)]
        pose = load_part_kp(keypoints[frames], scores[frames])
    if not pose["body"].any():
        raise DataError(f"{path}: no usable body joint in its {len(stored[1])} frames; see on_bad_clip")
    return pose


def augment_clip(keypoints, scores, rng, least=1):
    """Another speed (0.8-1.25), tilt (to 10 degrees), aspect (to 10 %), noise (0.3 % of the body)."""
    count = round(len(scores) * np.exp(rng.uniform(np.log(0.8), np.log(1.25))))
    count = max(4, min(least, len(scores)), count)
    frames = np.linspace(0, len(scores) - 1, count).round().astype(int)
    keypoints, scores = keypoints[frames], scores[frames]
    angle, aspect = np.radians(rng.uniform(-10, 10)), rng.uniform(0.9, 1.1)
    _, scale, _ = _scaled(keypoints[:, BODY], scores[:, BODY], THRESHOLD, len(BODY))
    with np.errstate(all="ignore"):
        noise = rng.normal(0, 0.003 * scale, keypoints.shape)
        return (keypoints @ (_turn(angle) * [[aspect], [1.0]]) + noise).astype(np.float32), scores


def _turn(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def pad_poses(poses):
    """[{body (T, 9, 3), ...}] -> {body (B, T, 9, 3), left, right, attention_mask (B, T), src_length (B,)}."""
    lengths = torch.tensor([len(pose["body"]) for pose in poses])
    batch = {part: torch.nn.utils.rnn.pad_sequence([pose[part] for pose in poses], batch_first=True)
             for part in ("body", "left", "right")}
    mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
    return batch | {"attention_mask": mask, "src_length": lengths}


class LengthBatchSampler(Sampler):
    """Batches of clips of like length, in windows of the clips that one optimiser step of all processes sees.

    Shuffled, from seed and epoch alone: pools of 16 windows are sorted by length and cut into windows, which
    come in random order; a short one is last. So a step's clips do not depend on how micro-batches and
    processes divide it. Unshuffled: longest first, and memory fails early. Process `rank` of `world` takes
    every world-th batch of a window; where that does not come out even, it repeats one that does not count.
    `start` skips batches of this process that an interrupted epoch has already used.
    """

    def __init__(self, lengths, batch_size, shuffle, seed=0, accumulation=1, rank=0, world=1):
        self.lengths, self.batch_size, self.shuffle = np.asarray(lengths), batch_size, shuffle
        self.seed, self.rank, self.world, self.epoch, self.start = seed, rank, world, 0, 0
        self.window = batch_size * accumulation * world if shuffle else max(1, len(self.lengths))

    def __len__(self):
        full, rest = divmod(len(self.lengths), self.window)
        share = self.batch_size * self.world
        return full * -(-self.window // share) + -(-rest // share)

    def plan(self):
        """This process's epoch: [(number of the batch among all processes', clips, whether it counts)]."""
        count, size, rng = len(self.lengths), self.batch_size, np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(count) if self.shuffle else np.arange(count)
        whole = count - count % self.window
        windows = []
        for begin in range(0, whole, 16 * self.window):
            part = self._by_length(order[begin:min(whole, begin + 16 * self.window)])
            windows += [part[i:i + self.window] for i in range(0, len(part), self.window)]
        windows = [windows[i] for i in rng.permutation(len(windows))] if self.shuffle else windows
        windows += [self._by_length(order[whole:])] if whole < count else []
        plan, number = [], 0
        for window in windows:
            batches = [window[i:i + size].tolist() for i in range(0, len(window), size)]
            for i in range(self.rank, -(-len(batches) // self.world) * self.world, self.world):
                plan.append((number + i, batches[min(i, len(batches) - 1)], i < len(batches)))
            number += len(batches)
        return plan

    def _by_length(self, clips):
        return clips[np.argsort(-self.lengths[clips], kind="stable")]

    def __iter__(self):
        yield from (clips for _, clips, _ in self.plan()[self.start:])


def _in_parallel(function, items, title):
    """[function(item)], by all cores where there is enough to do, with a progress bar on a terminal."""
    bar = dict(total=len(items), desc=title, unit=" clips", disable=None, leave=False)
    if len(items) < 500 or (os.cpu_count() or 1) < 2:
        return [function(item) for item in tqdm(items, **bar)]
    with ProcessPoolExecutor() as pool:
        return list(tqdm(pool.map(function, items, chunksize=64), **bar))


# ---------------------------------------------------------------------------------- the built-in demo

# Word classes in the order of the text; the sign order differs: see _demo_sentence.
DEMO_WORDS = {
    "greeting": ["你好"], "time": ["今天", "明天", "昨天"], "subject": ["我", "你", "他", "妈妈", "老师", "朋友"],
    "place": ["学校", "家", "商店", "医院"], "not": ["不"], "verb": ["买", "找", "看", "喜欢", "要", "卖"],
    "adjective": ["大", "小", "红", "新"], "object": ["书", "水", "花", "车", "鱼", "苹果", "衣服", "手机", "电脑"],
    "question": ["吗"], "thanks": ["谢谢"]}
DEMO_SPLITS = {"train": 1600, "dev": 120, "test": 120}


def make_demo_corpus(data_dir, seed=0, splits=None):
    """Write a synthetic corpus in the real on-disk format, the same for the same seed -> data_dir as a Path.

    Signs differ in hand shape, place and path, some use both hands; the text's word order is not the signs';
    signers differ in size, place, tilt, speed and noise; hands drop out. No dev or test sentence is in train.
    `splits` gives clips a split. The folder appears whole or not at all; DataError where one is in use.
    """
    data_dir, splits, rng = Path(data_dir), splits or DEMO_SPLITS, np.random.default_rng(seed)
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise DataError(f"{data_dir}: is there and not an empty folder; remove it or name another")
    sentences, signs = {}, _demo_signs()
    while len(sentences) < sum(splits.values()):
        text, gloss = _demo_sentence(rng)
        sentences.setdefault(text, gloss)
    rows = iter(sentences.items())
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir.parent, prefix=".demo") as aside:
        corpus = Path(aside) / "corpus"
        (corpus / "pose_format").mkdir(parents=True)
        for split, count in splits.items():
            labels = {}
            for number in tqdm(range(count), desc=f"demo {split}", disable=None, leave=False):
                (text, gloss), name = next(rows), f"{split}_{number:05d}"
                keypoints, scores = _demo_clip([signs[word] for word in gloss], rng)
                clip = {"keypoints": keypoints[:, None], "scores": scores[:, None]}
                with open(corpus / "pose_format" / f"{name}.pkl", "wb") as file:
                    pickle.dump(clip, file, protocol=4)
                labels[name] = {"name": name, "gloss": gloss, "text": text, "video_path": f"{name}.mp4"}
            (corpus / f"labels.{split}").write_bytes(gzip.compress(pickle.dumps(labels, protocol=4), mtime=0))
        os.replace(corpus, data_dir)
    return data_dir


def _demo_sentence(rng):
    """One random sentence: (text in word order, gloss in sign order)."""
    word = {kind: words[rng.integers(len(words))] for kind, words in DEMO_WORDS.items()}
    chance = dict(greeting=0.1, time=0.6, place=0.5, adjective=0.5, question=0.3, thanks=0.1) | {"not": 0.3}
    has = {kind: kind not in chance or rng.random() < chance[kind] for kind in DEMO_WORDS}
    text = "".join([
        "你好，" * has["greeting"], word["time"] * has["time"], word["subject"],
        ("在" + word["place"]) * has["place"], "不" * has["not"], word["verb"],
        (word["adjective"] + "的") * has["adjective"], word["object"],
        "吗？" if has["question"] else "，" if has["thanks"] else "。", "谢谢！" * has["thanks"]])
    order = "greeting time place subject object adjective verb not question thanks".split()
    return text, [word[kind] for kind in order if has[kind]]


def _demo_signs():
    """{word: hand (flexion of 5 fingers, spread, palm angle), place, path, other hand}, whatever the seed."""
    rng, signs = np.random.default_rng(20240), {}
    shapes = [[a, b, c, d, d] for a in (0, 1) for b in (0, 0.5, 1) for c in (0, 1) for d in (0, 1)]
    shapes = rng.permutation(shapes)
    for i, word in enumerate(word for words in DEMO_WORDS.values() for word in words):
        angle = rng.uniform(0, 2 * np.pi)
        signs[word] = {
            "hand": [*shapes[i % len(shapes)], rng.uniform(0.12, 0.35), rng.uniform(-1.2, 1.2)],
            "place": np.array([rng.uniform(-0.7, 0.2), rng.uniform(-0.5, 1.0)]),
            "direction": 0.35 * np.array([np.cos(angle), np.sin(angle)]),
            "path": ("line", "arc", "circle", "tap")[rng.integers(4)],
            "other": ("none", "none", "mirror", "base")[rng.integers(4)]}
    return signs


def _demo_path(sign, phase):
    """Displacement (n, 2) of the dominant hand at phase (n,), 0..1, of the sign."""
    wave = np.exp(2j * np.pi * phase)
    forth, aside = {"line": (phase, 0 * phase), "arc": (phase, np.sin(np.pi * phase)),
                    "tap": (wave.imag**2, 0 * phase), "circle": (wave.real / 2, wave.imag / 2)}[sign["path"]]
    return np.outer(forth, sign["direction"]) + np.outer(aside, sign["direction"][::-1] * [-1, 1])


def _demo_hand(flexion, spread, palm):
    """Joints (n, 21, 2) around the right wrist from flexion (n, 5), spread (n, 1) and palm angle (n, 1)."""
    finger = np.arange(5)
    heading = palm + spread * (finger - 2) * 1.3 - np.pi / 2  # fingers point up at palm 0
    joints, place = np.zeros((len(palm), 21, 2)), 0
    for segment, length in enumerate((0.13, 0.07, 0.05, 0.04)):
        step = length * (1 - 0.3 * flexion * (segment > 0))
        place = place + step[..., None] * np.stack([np.cos(heading), np.sin(heading)], -1)
        joints[:, 1 + segment + 4 * finger] = place
        heading = heading + 1.2 * flexion
    return joints


def _demo_clip(signs, rng):
    """Signs one after another by one random signer -> keypoints (T, 133, 2) in 0..1, scores (T, 133)."""
    # a key frame: right wrist, left wrist, flexion (5), spread, palm angle, whether the left hand idles
    rest, speed = [-0.6, 1.6, 0.6, 1.6, *[0.4] * 5, 0.15, 0, 1], rng.uniform(0.8, 1.25)
    keys, times = [rest, rest], [0, 1]
    for sign in signs:
        phase = np.linspace(0, 1, max(4, round(rng.uniform(5, 7) / speed)))
        right = sign["place"] + _demo_path(sign, phase)
        left = {"none": 0 * right + rest[2:4], "mirror": right * [-1, 1],
                "base": 0 * right + sign["place"] * [-1, 1]}
        keys += [[*r, *q, *sign["hand"], sign["other"] == "none"] for r, q in zip(right, left[sign["other"]])]
        begin = times[-1] + 1 + max(1, round(2 / speed))  # the hands move from sign to sign in between
        times += range(begin, begin + len(phase))
    keys, times = np.array(keys + [rest]), times + [times[-1] + 3]
    track = np.stack([np.interp(np.arange(times[-1] + 1), times, key) for key in keys.T], -1)
    right, left, flexion, spread, palm, idle = np.split(track, [2, 4, 9, 10, 11], -1)
    # the rest of the body, in shoulder widths from the neck; legs and face, which nothing reads, are dots
    points, reach = np.zeros((len(track), JOINTS, 2)), rng.uniform(0.9, 1.1)
    points[:, [0, 3, 4, 5, 6]] = [(0, -0.55), (0.17, -0.57), (-0.17, -0.57), (0.5, 0), (-0.5, 0)]
    points[:, 11:23], points[:, [1, 2, *range(23, 91)]] = (0, 2.4), (0, -0.5)
    for side, shoulder, elbow, wrist, hand in ((1, 5, 7, 9, left), (-1, 6, 8, 10, right)):
        points[:, wrist] = hand
        points[:, elbow] = (points[:, shoulder] + hand) / 2 + [0.2 * reach * side, 0.25]
    points[:, RIGHT] = right[:, None] + _demo_hand(flexion, spread, palm)
    idling = flexion * (1 - idle) + 0.4 * idle
    points[:, LEFT] = left[:, None] + _demo_hand(idling, spread, palm * (1 - idle)) * [-1, 1]
    return _demo_signer(points, rng)


def _demo_signer(points, rng):
    """A signer's size, place and tilt, the detector's noise, and hands that drop out for some frames."""
    size, tilt = rng.uniform(0.14, 0.26), np.radians(rng.uniform(-8, 8))
    points = points @ _turn(tilt) * [rng.uniform(0.92, 1.08), 1] * size
    points += [rng.uniform(0.4, 0.6), rng.uniform(0.25, 0.4)]
    points += rng.normal(0, size * rng.uniform(0.004, 0.012), points.shape)
    scores = rng.uniform(0.7, 1.0, points.shape[:2])
    scores[:, 11:23] = rng.uniform(0, 0.25, scores[:, 11:23].shape)  # hips and legs are out of the frame
    for hand in (LEFT, RIGHT):
        if rng.random() < 0.3:
            begin, length = rng.integers(len(points)), rng.integers(1, 4)
            scores[begin:begin + length, hand] = rng.uniform(0, 0.2)
            points[begin:begin + length, hand] = rng.uniform(0, 1, 2)
    return points.astype(np.float32), scores.astype(np.float32)
