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
import pickletools
import reprlib
import tempfile
import warnings
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
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

def _unpickle(raw, known=False):
    """bytes -> what they build. Refused is a PUT at a place of the memo that the opcodes before it cannot
    have filled: for 2**32 Python would make a table of 64 GB. `known`: not to look again, which is slow."""
    for count, (opcode, place, at) in enumerate(() if known else pickletools.genops(raw)):
        if "PUT" in opcode.name and place > count:
            raise _Refused(f"place {place:,} of a memo of {count:,}, at byte {at}")
    return _SafeUnpickler(io.BufferedReader(io.BytesIO(raw))).load()

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
    list of `problems` is given, faulty entries are added to it and left out instead."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such label file; data_dir must hold labels.train, .dev and .test")
    with _naming(path, "damaged, or neither a gzip-pickled dict nor JSON"):
        _check_size(path, path.stat().st_size)
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(MAX_BYTES + 1)
            _check_size(path, len(raw), "unpacks to at least")
            data = _unpickle(raw)
        else:
            data = json.loads(raw.decode("utf-8"))
    if not isinstance(data, (dict, list)) or not data:
        raise DataError(f"{path}: a dict or list of entries was expected, found {reprlib.repr(data)}")
    entries, faults = {}, [] if problems is None else problems
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
    return entries

def _first(lines):
    more = f"\n  ... and {len(lines) - 5} more" * (len(lines) > 5)
    return "\n".join(f"  {line}" for line in lines[:5]) + more

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

def load_pose_file(path, known=False):
    """One clip -> (keypoints (T, 133, 2), scores (T, 133)), float32; pixels are divided by `w_h`, if there.
    `.pkl` holds arrays, or lists of an array a frame, with or without the person axis, and may hold `start`,
    `end` (frames, end exclusive) and `w_h`; `.npz` holds the same as arrays, nothing pickled.
    Raises DataError naming the file, pickle.UnpicklingError for a pickle that asks for more than data.
    known: the file has been read before, so its opcodes are not looked through again."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such pose file")
    with _naming(path, f"not a readable {path.suffix[1:]} file"), np.errstate(all="ignore"):
        _check_size(path, path.stat().st_size)
        data = _read_npz(path) if path.suffix == ".npz" else _unpickle(path.read_bytes(), known)
        if not isinstance(data, dict) or not {"keypoints", "scores"} <= data.keys():
            raise DataError(f"{path}: keypoints and scores were expected, found {reprlib.repr(data)}")
        keypoints = _frames(data["keypoints"], (JOINTS, 2), "keypoints", path)
        scores = _frames(data["scores"], (JOINTS,), "scores", path)
        if len(keypoints) != len(scores):
            raise DataError(f"{path}: {len(keypoints)} frames of keypoints, but {len(scores)} of scores")
        start, end, w_h = data.get("start") or 0, data.get("end"), data.get("w_h")
        end = len(scores) if end is None else end
        start, end = map(int, _two([start, end], 0, "[start, end]", "two frame numbers", path))
        if start >= min(end, len(scores)):
            raise DataError(f"{path}: start {start}, end {end} select no frame of {len(scores)}")
        keypoints, scores = keypoints[start:end], scores[start:end]
        # w_h is on normalised clips, too, of which the first look tells most
        if w_h is not None and (keypoints > 2).any() and _in_pixels(keypoints, scores):
            keypoints = keypoints / np.float32(_two(w_h, 1, "w_h", "[width, height] in pixels", path))
        return keypoints, scores

def _read_npz(path):
    with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about headers that Python 2 wrote
        for member in archive.zip.infolist():
            _check_size(path, member.file_size, f"{member.filename} unpacks to")
            with archive.zip.open(member) as file:  # its claim is read before memory is taken for it
                version = np.lib.format.read_magic(file)[0]
                shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version}_0")(file)
            _check_size(path, math.prod(shape) * dtype.itemsize, f"{member.filename} claims")
        return {name: archive[name] for name in archive.files}

def _frames(value, shape, field, path):
    """(T, 133, ...) or (T, 1, 133, ...), or a list of an array a frame -> float32 (T, 133, ...)."""
    if isinstance(value, (list, tuple)) and value:
        first = value[0]
        if not all(isinstance(frame, np.ndarray) and frame.shape == first.shape for frame in value):
            raise DataError(f"{path}: {field} is a list, but not of arrays of one shape, an array a frame")
        _check_size(path, 4 * first.size * len(value), f"{field} claims")  # a list can name one array often
        value = np.concatenate(value, dtype=np.float32, casting="unsafe").reshape(-1, *first.shape)
    array = np.asarray(value)
    if array.ndim == len(shape) + 2 and array.shape[1]:  # a person axis: the first person is the signer
        array = array[:, 0]
    if array.dtype.kind not in "biuf" or array.shape[1:] != shape:
        raise DataError(f"{path}: {field} has dtype {array.dtype}, shape {array.shape}; numbers in frames of "
                        f"{shape} or {(1, *shape)} were expected (COCO-WholeBody)")
    return array.astype(np.float32, copy=False)

def _two(values, least, field, wanted, path):
    """A list or array of two numbers, finite and not below `least` -> list of floats."""
    with suppress(TypeError, ValueError, OverflowError):
        numbers = [float(value) for value in values]
        if len(numbers) == 2 and all(least <= number < math.inf for number in numbers):
            return numbers
    raise DataError(f"{path}: {field} is {reprlib.repr(values)} instead of {wanted}")

def _in_pixels(keypoints, scores):
    """Whether the median coordinate of the usable joints is beyond what a normalised clip has."""
    seen = (scores > THRESHOLD) & np.isfinite(keypoints).all(-1)
    return bool(seen.any() and np.median(keypoints[seen]) > 2)

def crop_scale(motion, thr):
    """One box for a clip: motion (T, V, 3) of x, y, confidence -> (result (T, V, 3) float32, scale, offset).
    It spans all joints of all frames with confidence above thr and finite coordinates. Scale: its longer
    side; offset (2,): its corner; result: x, y in -1..1, confidence in 0..1, any other joint zero. Fewer than
    4 such joints, or a box without extent: (zeros, 0, None). Never NaN or a warning; motion is left alone."""
    motion = np.asarray(motion)
    return _scaled(motion[..., :2], motion[..., 2], thr, motion.shape[1])

def _scaled(xy, confidence, thr, body):
    """crop_scale on the first `body` joints; the hands of 21 joints behind them get the body's scale only."""
    with np.errstate(all="ignore"):
        joints = np.empty((3, *confidence.shape), np.float32)  # channels first: much faster than (T, V, 3)
        joints[:2], joints[2] = xy.transpose(2, 0, 1), confidence
        places = joints[:2]
        usable = (confidence > thr) & np.isfinite(places[0]) & np.isfinite(places[1])
        low = np.where(usable[:, :body], places[..., :body], np.inf).min((1, 2), initial=np.inf)
        high = np.where(usable[:, :body], places[..., :body], -np.inf).max((1, 2), initial=-np.inf)
        scale = float((high - low).max())
        if np.count_nonzero(usable[:, :body]) < 4 or not np.finfo(np.float32).tiny < scale < math.inf:
            return np.zeros((*usable.shape, 3), np.float32), 0, None
        offset = low / 2 + high / 2 - scale / 2
        places[..., :body] = (places[..., :body] - offset[:, None, None]) / scale * 2 - 1
        hands, shown = (array[..., body:].reshape(*array.shape[:-1], -1, 21) for array in (places, usable))
        hands[:] = (hands - hands[..., :1]) / scale
        shown &= shown[..., :1]
        places.clip(-1, 1, out=places)
        joints[2].clip(0, 1, out=joints[2])
        np.copyto(joints, 0, where=~usable)
        return np.stack(joints, axis=-1), scale, offset

def load_part_kp(skeletons, confs):
    """skeletons (T, 133, 2), confs (T, 133) -> {body (T, 9, 3), left, right (T, 21, 3)}, float32 tensors.
    The body goes through `crop_scale`. A hand is taken relative to its own first joint, divided by the body's
    scale and clipped to -1..1; in a frame where that first joint was not seen, the whole hand is zero."""
    return _parts(np.asarray(skeletons).take(USED, 1), np.asarray(confs).take(USED, 1))

def _parts(keypoints, scores):
    """load_part_kp on the 51 used joints alone."""
    joints, _, _ = _scaled(keypoints, scores, THRESHOLD, len(BODY))
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
    in_pixels: bool = False  # still, where load_pose_file had no w_h to divide by
    problem: str = ""  # why the clip cannot be used

def inspect_clip(path):
    """One pose file -> ClipReport; never raises on what a file holds."""
    try:
        keypoints, scores = load_pose_file(path)
    except (DataError, pickle.UnpicklingError, OSError) as error:
        return ClipReport(problem=str(error))
    finite = np.isfinite(keypoints).all(-1)
    seen, usable = (scores > THRESHOLD) & finite, load_part_kp(keypoints, scores)["body"].any()
    problem = "" if usable else f"{path}: no usable body ({seen[:, BODY].sum()} joints, {len(seen)} frames)"
    unseen = tuple(int((~seen[:, part]).sum()) for part in (BODY, LEFT, RIGHT))
    no_hand = int((~seen[:, [LEFT[0], RIGHT[0]]]).all(1).sum())
    not_finite = int((~(finite & np.isfinite(scores)))[:, USED].sum())
    return ClipReport(len(seen), unseen, no_hand, not_finite, _in_pixels(keypoints, scores), problem)

class SignLanguageDataset(Dataset):
    """Clips of one label file; item: (name, pose {body, left, right}, text, gloss).
    Every pose file is read once when the set is made, by all cores, so that no bad clip stops a run later;
    what was found is kept in config.output_dir. With on_bad_clip "error" DataError names the bad clips, with
    "skip" they are left out and listed in output_dir/bad_clips.txt; a list of `problems` replaces both.
    `encode`, if set, turns texts into labels in the loader's workers."""
    def __init__(self, label_path, config, phase="train", problems=None):
        self.config, self.phase, self.label_path = config, phase, Path(label_path)
        self.pose_dir = self.label_path.parent / "pose_format"
        self.epoch, self.encode = 0, None
        self.entries = list(load_dataset_file(label_path, problems).values())
        self.paths = [self._find(entry) for entry in self.entries]
        self.reports = [self._check_ctc(*pair) for pair in zip(self.entries, self._inspect_all())]
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
        folder, known = self.config.output_dir, {}
        cache = Path(folder, f"clips_{self.label_path.name}.json")
        with suppress(OSError, ValueError):  # no cache yet, or half a one: it is only a saving of time
            known = json.loads(cache.read_text(encoding="utf-8")) if folder else {}
        stats = [path.stat() if path and path.is_file() else None for path in self.paths]
        keys = [s and f"{path} {s.st_size} {s.st_mtime_ns}" for path, s in zip(self.paths, stats)]
        todo = sorted({path for path, key in zip(self.paths, keys) if path and key not in known})
        with ProcessPoolExecutor() if len(todo) >= 500 else nullcontext() as pool:
            reports = pool.map(inspect_clip, todo, chunksize=64) if pool else map(inspect_clip, todo)
            bar = tqdm(reports, f"reading {self.label_path.name}", len(todo), leave=False, disable=None)
            found = dict(zip(todo, list(bar)))
        found[None] = ClipReport(problem=f"its pose is outside {self.pose_dir}, or a link leads out: refused")
        reports = [ClipReport(*known[k]) if k in known else found[path] for path, k in zip(self.paths, keys)]
        if folder and todo:
            _write(cache, json.dumps({key: report for key, report in zip(keys, reports) if key}))
        return reports

    def _check_ctc(self, entry, report):
        """A training clip that makes fewer encoder positions than CTC needs for its glosses is bad, too."""
        frames, need = min(report.frames, self.config.max_length), ctc_positions(entry["gloss"])
        positions = -(-frames // self.config.temporal_stride)
        if report.problem or self.phase != "train" or not self.config.ctc_weight or positions >= need:
            return report
        return report._replace(problem=f"{frames} frames make {positions} positions, CTC on its glosses "
                               f"needs {need}: remove it, or --temporal_stride 1, or --ctc_weight 0")

    def _drop_bad(self, problems):
        """Leave out bad clips, or refuse the set, as on_bad_clip says; `problems` only takes their names."""
        bad = [f"{e['name']}: {r.problem}" for e, r in zip(self.entries, self.reports) if r.problem]
        good = [i for i, report in enumerate(self.reports) if not report.problem]
        message = f"{self.label_path}: {len(bad)} of {len(self.entries)} clips are unusable:\n{_first(bad)}"
        self.entries, self.paths, self.reports = (
            [values[i] for i in good] for values in (self.entries, self.paths, self.reports))
        if problems is not None:
            problems += bad
        elif bad and (self.config.on_bad_clip == "error" or not good):
            raise DataError(f"{message}\nmend or remove them, or leave them out with --on_bad_clip skip")
        elif bad:
            print(f"{message}\nleft out, as on_bad_clip says")
            if self.config.output_dir:
                path = Path(self.config.output_dir, "bad_clips.txt")
                old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
                lines = [line for line in old if not line.startswith(self.phase + "\t")]
                _write(path, "\n".join(lines + [f"{self.phase}\t{line}" for line in bad]) + "\n")

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        entry = self.entries[index]
        return entry["name"], self._load_pose(index), entry["text"], entry["gloss"]

    def _load_pose(self, index):
        return read_clip(self.paths[index], self.config, *self._draw(index), known=True)

    def _draw(self, index):
        """A clip's random numbers (training only), and the frames that augmentation must leave it for CTC."""
        # from seed, epoch and clip alone, so the same whatever worker draws it
        rng = np.random.default_rng([self.config.seed, self.epoch, index]) if self.phase == "train" else None
        return rng, self.config.temporal_stride * ctc_positions(self.entries[index]["gloss"])

    def epoch_lengths(self):
        """Frames of each clip at this epoch's speed: batches sorted by these hold little padding."""
        if self.phase != "train" or not self.config.augment:
            return self.lengths
        drawn = [_augmented_frames(r.frames, *self._draw(i)) for i, r in enumerate(self.reports)]
        return [min(frames, self.config.max_length) for frames in drawn]

    def collate_fn(self, batch):
        """Items -> (src_input, tgt_input); attention_mask (B, T): 1 = real frame, 0 = zero padding."""
        names, poses, texts, glosses = map(list, zip(*batch))
        labels = {"labels": self.encode(texts)} if self.encode else {}
        return pad_poses(poses) | {"names": names}, {"gt_sentence": texts, "gt_gloss": glosses} | labels

def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)

def ctc_positions(target):
    """Positions that CTC needs for a target: one a gloss, one more between equal neighbours."""
    return len(target) + sum(a == b for a, b in zip(target, target[1:]))

def read_clip(path, config, rng=None, least=1, known=False):
    """The one way from a pose file to {body, left, right}: training (with rng), evaluation, one clip.
    Augmentation shortens no clip below `least` frames. Raises as `load_pose_file` does."""
    keypoints, scores = stored = [array.take(USED, 1) for array in load_pose_file(path, known)]
    if rng is not None and config.augment:
        keypoints, scores = augment_clip(keypoints, scores, rng, least)
    frames = sample_frames(len(scores), config.max_length, rng)
    pose = _parts(keypoints[frames], scores[frames])
    if not pose["body"].any():  # the few frames that show a body were not among these: first of all such
        seen = np.flatnonzero(_parts(*stored)["body"].any((1, 2)))
        frames = sample_frames(len(stored[1]), config.max_length)
        frames = np.sort(np.concatenate([seen, np.setdiff1d(frames, seen)])[:len(frames)])
        pose = _parts(stored[0][frames], stored[1][frames])
        if not pose["body"].any():
            raise DataError(f"{path}: no usable body joint in its {len(stored[1])} frames; see on_bad_clip")
    return pose

def augment_clip(keypoints, scores, rng, least=1):
    """Another speed (0.8-1.25), tilt (to 10 degrees), aspect (to 10 %), noise (0.3 % of the body).
    keypoints (T, V, 2), scores (T, V) start with the body's joints."""
    count = _augmented_frames(len(scores), rng, least)
    frames = np.linspace(0, len(scores) - 1, count).round().astype(int)
    keypoints, scores = keypoints[frames], scores[frames]
    angle, aspect = np.radians(rng.uniform(-10, 10)), rng.uniform(0.9, 1.1)
    turn = np.array([[aspect * np.cos(angle), -aspect * np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    with np.errstate(all="ignore"):
        x, y = keypoints[:, :len(BODY)].transpose(2, 0, 1)
        seen = (scores[:, :len(BODY)] > THRESHOLD) & np.isfinite(x + y)
        scale = max(np.ptp(x[seen]), np.ptp(y[seen])) if seen.any() else 0
        noise = np.float32(0.003 * scale) * rng.standard_normal(keypoints.shape, np.float32)
        turned = keypoints.reshape(-1, 2) @ turn.astype(np.float32)
        return turned.reshape(keypoints.shape) + noise, scores

def _augmented_frames(frames, rng, least):
    return max(4, min(least, frames), round(frames * np.exp(rng.uniform(np.log(0.8), np.log(1.25)))))

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
    `start` skips batches of this process that an interrupted epoch has already used."""
    def __init__(self, lengths, batch_size, shuffle, seed=0, accumulation=1, rank=0, world=1):
        self.lengths, self.batch_size, self.shuffle = np.asarray(lengths), batch_size, shuffle
        self.seed, self.rank, self.world, self.epoch, self.start = seed, rank, world, 0, 0
        self.window = batch_size * accumulation * world if shuffle else max(1, len(self.lengths))

    def __len__(self):
        return len(self.plan())

    def plan(self):
        """This process's epoch: [(number of the batch among all processes', clips, whether it counts)]."""
        count, size, rng = len(self.lengths), self.batch_size, np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(count) if self.shuffle else np.arange(count)
        full, rest = np.split(order, [count - count % self.window])
        windows = []
        for begin in range(0, len(full), 16 * self.window):
            windows += [*self._by_length(full[begin:begin + 16 * self.window]).reshape(-1, self.window)]
        windows = [windows[i] for i in rng.permutation(len(windows))] + [self._by_length(rest)]
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

# ---------------------------------------------------------------------------------- the built-in demo
# Word classes in the order of the text: how often one is there, what stands around its word, its words.
DEMO_WORDS = {
    "greeting": (0.1, "{}，", "你好"), "time": (0.6, "{}", "今天 明天 昨天"),
    "subject": (1, "{}", "我 你 他 妈妈 老师 朋友"), "place": (0.5, "在{}", "学校 家 商店 医院"),
    "not": (0.3, "{}", "不"), "verb": (1, "{}", "买 找 看 喜欢 要 卖"), "adjective": (0.5, "{}的", "大 小 红 新"),
    "object": (1, "{}", "书 水 花 车 鱼 苹果 衣服 手机 电脑"), "question": (0.3, "{}？", "吗"), "thanks": (0.1, "{}！", "谢谢")}
DEMO_ORDER = "greeting time place subject object adjective verb not question thanks".split()  # of the signs
DEMO_SPLITS = {"train": 1600, "dev": 120, "test": 120}
# A hand: flexion of 5 fingers, their spread, the palm's angle. Points are x + 1j * y, y down, in shoulder
# widths from the neck, so that to turn is to multiply. At rest: both wrists, both hands, left first.
DEMO_REST = [0.6 + 1.6j, -0.6 + 1.6j, *[0.4] * 5, 0.15, 0, *[0.4] * 5, 0.15, 0]

def make_demo_corpus(data_dir, seed=0, splits=None):
    """Write a synthetic corpus in the real on-disk format, the same for the same seed -> data_dir as a Path.
    Signs differ in hand shape, place and path, some use both hands; the text's word order is not the signs';
    signers differ in size, place, tilt, speed and noise; hands drop out. No dev or test sentence is in train.
    `splits` gives clips a split. The folder appears whole or not at all; DataError where one is in use."""
    data_dir, splits, rng = Path(data_dir), splits or DEMO_SPLITS, np.random.default_rng(seed)
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise DataError(f"{data_dir}: is there and not an empty folder; remove it or name another")
    sentences, signs = {}, _demo_signs()
    while len(sentences) < sum(splits.values()):
        sentences.update([_demo_sentence(rng)])  # by their texts: none comes twice
    rows = iter(sentences.items())
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir.parent, prefix=".demo") as aside:
        corpus = Path(aside) / "corpus"
        (corpus / "pose_format").mkdir(parents=True)
        for split, count in splits.items():
            labels = {}
            for number in tqdm(range(count), f"demo {split}", disable=None, leave=False):
                (text, gloss), name = next(rows), f"{split}_{number:05d}"
                keypoints, scores = _demo_clip([signs[word] for word in gloss], rng)
                clip = pickle.dumps({"keypoints": keypoints[:, None], "scores": scores[:, None]}, protocol=4)
                (corpus / "pose_format" / f"{name}.pkl").write_bytes(clip)
                labels[name] = {"name": name, "gloss": gloss, "text": text, "video_path": f"{name}.mp4"}
            (corpus / f"labels.{split}").write_bytes(gzip.compress(pickle.dumps(labels, protocol=4), mtime=0))
        os.replace(corpus, data_dir)
    return data_dir

def _demo_sentence(rng):
    """One random sentence: (text in word order, gloss in sign order)."""
    text, words = "", {}
    for kind, (chance, form, choice) in DEMO_WORDS.items():
        if rng.random() < chance:
            words[kind] = str(rng.choice(choice.split()))
            text += form.format(words[kind])
        elif kind == "question":
            text += "。"
    return text, [words[kind] for kind in DEMO_ORDER if kind in words]

def _demo_signs():
    """{word: (paths (3, 2), hands (14,))} of left and right, whatever the seed. A path is the wrist's place,
    how far it goes straight on, and how far forth and back."""
    rng, signs = np.random.default_rng(20247), {}
    for word in " ".join(choice for *_, choice in DEMO_WORDS.values()).split():
        place = complex(rng.uniform(-0.7, 0.2), rng.uniform(-0.5, 1.0))
        right = np.array([place, *rng.uniform(0, [0.4, 0.25]) * np.exp(2j * np.pi * rng.random(2))])
        hand = [*rng.integers(2, size=5), rng.uniform(0.12, 0.35), rng.uniform(-1.2, 1.2)]
        idle, mirror = ([DEMO_REST[0], 0, 0], DEMO_REST[2:9]), -right.conj()
        # a half of the signs are one-handed; in the others the left hand mirrors the right, or holds still
        left, other = (idle, idle, (mirror, hand), (mirror * [1, 0, 0], hand))[rng.integers(4)]
        signs[word] = np.stack([left, right], -1), [*other, *hand]
    return signs

def _demo_hand(hand):
    """(T, 7) -> joints (T, 21) of a right hand around its wrist; at palm angle 0 its fingers point up."""
    flexion, spread, palm = np.split(hand[..., None], [5, 6], axis=1)
    heading = palm + 1.3 * spread * np.arange(-2, 3)[:, None] + 1.2 * flexion * np.arange(4) - np.pi / 2
    bones = (1 - 0.3 * flexion) * [0.13, 0.07, 0.05, 0.04] * np.exp(1j * heading)  # (T, 5, 4), from the wrist
    return np.hstack([np.zeros((len(hand), 1)), bones.cumsum(-1).reshape(-1, 20)])

def _demo_clip(signs, rng):
    """Signs one after another by one random signer -> keypoints (T, 133, 2) in 0..1, scores (T, 133)."""
    keys, times, phase = [DEMO_REST] * 2, [0, 1], np.linspace(0, 1, 6)  # key frames: both wrists, both hands
    for paths, hands in signs:
        wrists = np.stack([np.ones(6), phase, np.sin(2 * np.pi * phase)], -1) @ paths
        keys += [[*both, *hands] for both in wrists]
        times += list(times[-1] + 3 + rng.uniform(4, 6) * phase)  # before it, the hands move there
    keys, times = np.array([*keys, DEMO_REST]), [*times, times[-1] + 3]
    frames = np.arange(0, times[-1], rng.uniform(0.8, 1.25))  # the signer's speed
    track = np.stack([np.interp(frames, times, key) for key in keys.T], -1)
    wrists, left, right = np.split(track, [2, 9], axis=1)
    points = np.full((len(track), JOINTS), -0.5j)  # legs and face, which nothing reads, are a dot
    points[:, [0, 3, 4, 5, 6]] = -0.55j, 0.17 - 0.57j, -0.17 - 0.57j, 0.5, -0.5
    points[:, [7, 8]] = (points[:, [5, 6]] + wrists) / 2 + [0.2 + 0.25j, -0.2 + 0.25j]
    points[:, [9, 10]] = wrists
    points[:, LEFT] = wrists[:, :1] - _demo_hand(left.real).conj()
    points[:, RIGHT] = wrists[:, 1:] + _demo_hand(right.real)
    # the signer's size, tilt, place and aspect; the detector's noise; hips and legs out of the frame
    size, tilt = rng.uniform(0.14, 0.26), np.radians(rng.uniform(-8, 8))
    points = size * np.exp(1j * tilt) * points + complex(rng.uniform(0.4, 0.6), rng.uniform(0.25, 0.4))
    keypoints = np.stack([rng.uniform(0.92, 1.08) * points.real, points.imag], -1)
    keypoints += rng.normal(0, size * rng.uniform(0.004, 0.012), keypoints.shape)
    scores = rng.uniform(0.7, 1.0, points.shape)
    scores[:, 11:23] = rng.uniform(0, 0.25, scores[:, 11:23].shape)
    for hand in (LEFT, RIGHT):
        if rng.random() < 0.3:  # it drops out for some frames
            begin, length = rng.integers(len(points)), rng.integers(1, 4)
            scores[begin:begin + length, hand] = rng.uniform(0, 0.2)
            keypoints[begin:begin + length, hand] = rng.uniform(0, 1, 2)
    return keypoints.astype(np.float32), scores.astype(np.float32)
