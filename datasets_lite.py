"""From files to batches: labels, poses, the data set, batches by length, and the built-in demo corpus.

One worked example, as a clip goes through:
    demo_00000.pkl       {"keypoints": (T, 1, 133, 2), "scores": (T, 1, 133)}, COCO-WholeBody, x right, y down, 0..1
    -> load_pose_file    keypoints (T, 133, 2), scores (T, 133)
    -> load_part_kp      body (T, 9, 3): joints 0 and 3-10 in one box for the clip, x and y in -1..1, confidence 0..1
                         left (T, 21, 3): joints 91-111 minus joint 91; right (T, 21, 3): joints 112-132 minus joint 112
    -> collate_fn        body (B, T, 9, 3), left and right (B, T, 21, 3), padded with zeros at the end
A joint that was not seen (confidence at most 0.3, NaN, Inf) is zero in all three channels.
"""
import codecs
import gzip
import io
import json
import os
import pickle
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

JOINTS = 133  # COCO-WholeBody
THRESHOLD = 0.3  # a joint at or below this confidence counts as not seen
# Nose, ears, shoulders, elbows, wrists, as in Uni-Sign. The original took the hips instead of the ears; in upper-body
# video they lie below the frame, and a guessed hip stretches the box that everything is scaled by.
BODY = [0, 3, 4, 5, 6, 7, 8, 9, 10]
LEFT_WRIST, RIGHT_WRIST = BODY.index(9), BODY.index(10)
LEFT, RIGHT = list(range(91, 112)), list(range(112, 133))
BODY_EDGES = [(0, 1), (0, 2), (0, 3), (0, 4), (3, 4), (3, 5), (5, 7), (4, 6), (6, 8)]  # positions in BODY
HAND_EDGES = [(0 if j % 4 == 1 else j - 1, j) for j in range(1, 21)]  # wrist to each finger's root, then along it


class DataError(ValueError):
    """The data cannot be used as it is; the message names the file or clip, what was found and what to do."""


# ---------------------------------------------------------------------------------------------- untrusted files

_CONTAINERS = {"set", "frozenset", "bytearray", "complex"}
_NUMPY = {"multiarray": {"_reconstruct", "scalar"}, "numeric": {"_frombuffer"}, "": {"ndarray", "dtype"}}


class _SafeUnpickler(pickle.Unpickler):
    """Builds arrays and plain containers; whatever else a pickle names is refused before it is called."""

    def __init__(self, file, path):
        super().__init__(file)
        self.path = path

    def find_class(self, module, name):
        if module in ("builtins", "__builtin__") and name in _CONTAINERS or (module, name) == ("collections", "OrderedDict"):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how protocols 0 to 2 write an array's bytes
            return _encode_latin1
        root, _, rest = module.partition(".")
        part = rest.replace("_core.", "").replace("core.", "")  # numpy 2 and numpy 1 names
        if root == "numpy" and name in _NUMPY.get(part, ()):
            home = {"multiarray": np._core.multiarray, "numeric": np._core.numeric} if hasattr(np, "_core") else \
                {"multiarray": np.core.multiarray, "numeric": np.core.numeric}
            return getattr(home.get(part, np), name)
        raise pickle.UnpicklingError(f"{self.path}: refused, the pickle asks for {module}.{name}; a label or pose file "
                                     "needs nothing but arrays and plain containers, so don't trust it")


def _encode_latin1(text, encoding="latin1"):
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"refused: bytes in the encoding {encoding!r}")
    return codecs.encode(text, "latin1")


def _unpickle(raw, path):
    """Untrusted bytes -> object. Raises DataError, or UnpicklingError for a refused global, naming the file."""
    try:
        return _SafeUnpickler(io.BytesIO(raw), path).load()
    except pickle.UnpicklingError as error:
        if "refused" in str(error):
            raise
        raise DataError(f"{path}: not a readable pickle ({error})") from error
    except (EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError, OverflowError,
            MemoryError, RecursionError, AssertionError, SystemError) as error:
        raise DataError(f"{path}: not a readable pickle ({type(error).__name__}: {error})") from error


# ---------------------------------------------------------------------------------------------- labels and poses

def load_dataset_file(path, problems=None):
    """Labels -> {name: {name, text, gloss (list, may be empty), pose (file name)}}.

    Reads a gzip-pickled dict (CSL-Daily, How2Sign) and JSON, as a dict or as CSL-News's list of {video, pose, text}.
    Raises DataError naming the file or entry, pickle.UnpicklingError for a pickle that asks for more than data; where
    a list of `problems` is given, faulty entries are added to it and left out instead.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such label file; data_dir must hold labels.train, labels.dev and labels.test")
    raw = path.read_bytes()
    try:
        if raw[:2] == b"\x1f\x8b":
            data = _unpickle(gzip.decompress(raw), path)
        else:
            data = json.loads(raw.decode("utf-8"))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); copy it again") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: neither a gzip-pickled dict nor JSON ({error})") from error
    if isinstance(data, list):
        data = {Path(str(e.get("video") or e.get("pose") or i)).stem if isinstance(e, dict) else i: e
                for i, e in enumerate(data)} if len(data) else {}
    if not isinstance(data, dict):
        raise DataError(f"{path}: holds a {type(data).__name__}, a dict of entries or a list of them was expected")
    if not data:
        raise DataError(f"{path}: holds no entries")
    entries, faults = {}, []
    for key, entry in data.items():
        try:
            entries[str(key)] = _entry(path, str(key), entry)
        except DataError as error:
            faults.append(str(error))
    if faults and problems is None:
        raise DataError("\n".join(faults[:5]) + (f"\n... and {len(faults) - 5} more" if len(faults) > 5 else ""))
    if faults:
        problems += faults
    return entries


def _entry(path, key, entry):
    if not isinstance(entry, dict):
        raise DataError(f"{path}: entry {key} is a {type(entry).__name__}, a dict with name and text was expected")
    text, gloss = entry.get("text"), entry.get("gloss")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{path}: entry {key} has no text (found {text!r}); give it one or remove the entry")
    gloss = gloss.split() if isinstance(gloss, str) else list(gloss) if isinstance(gloss, (list, tuple)) else gloss
    if gloss is not None and not (isinstance(gloss, list) and all(isinstance(g, str) for g in gloss)):
        raise DataError(f"{path}: entry {key} has glosses of type {type(gloss).__name__}, a list of words was expected")
    name = str(entry.get("name") or key)
    return {"name": name, "text": text, "gloss": gloss or [], "pose": str(entry.get("pose") or f"{name}.pkl")}


def load_pose_file(path):
    """One clip -> (keypoints (T, 133, 2), scores (T, 133)), float32, as stored or divided by `w_h` where in pixels.

    `.pkl` holds arrays or lists of per-frame arrays, with or without the person axis, and may hold `start` and `end`
    (frames, end exclusive) and `w_h`; `.npz` holds the arrays `keypoints` and `scores` and nothing pickled.
    Raises DataError naming the file, pickle.UnpicklingError for a pickle that asks for more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such pose file")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                data = {key: archive[key] for key in archive.files}
        except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zlib.error, BadZipFile) as error:
            raise DataError(f"{path}: not a readable npz file ({error})") from error
    else:
        data = _unpickle(path.read_bytes(), path)
    if not isinstance(data, dict) or "keypoints" not in data or "scores" not in data:
        raise DataError(f"{path}: a dict with keypoints and scores was expected, found {_keys(data)}")
    keypoints = _frames(data["keypoints"], (JOINTS, 2), "keypoints", path)
    scores = _frames(data["scores"], (JOINTS,), "scores", path)
    if len(keypoints) != len(scores):
        raise DataError(f"{path}: {len(keypoints)} frames of keypoints, but {len(scores)} of scores")
    start, end = _cut(data, len(keypoints), path)
    keypoints, scores = keypoints[start:end], scores[start:end]
    return _from_pixels(keypoints, scores, data.get("w_h"), path), scores


def _keys(data):
    return f"a dict with {sorted(map(str, data))[:6]}" if isinstance(data, dict) else f"a {type(data).__name__}"


def _frames(value, shape, field, path):
    """Array (T, 133, ...) or (T, 1, 133, ...), or a list of T such frames -> float32 (T, 133, ...)."""
    try:
        with np.errstate(all="ignore"):
            array = np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: {field} is not numbers of one shape a frame ({error})") from error
    if array.size == 0:
        raise DataError(f"{path}: {field} has no frames (shape {array.shape})")
    if array.ndim == len(shape) + 2:  # a person axis: the first person is the signer
        array = array[:, 0]
    if array.shape[1:] != shape:
        wanted = "(T, 133, 2) or (T, 1, 133, 2)" if field == "keypoints" else "(T, 133) or (T, 1, 133)"
        raise DataError(f"{path}: {field} has shape {array.shape}, {wanted} was expected: 133 COCO-WholeBody joints")
    return array


def _cut(data, frames, path):
    if "start" not in data and "end" not in data:
        return 0, frames
    try:
        start, end = int(data.get("start") or 0), frames if data.get("end") is None else int(data["end"])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: start and end must be frame numbers ({error})") from error
    if not 0 <= start < end or start >= frames:
        raise DataError(f"{path}: start {start}, end {end} select no frame of {frames}")
    return start, end


def _from_pixels(keypoints, scores, w_h, path):
    # w_h stands on normalised clips, too, so the values decide
    seen = (scores > THRESHOLD) & np.isfinite(keypoints).all(-1)
    if w_h is None or not seen.any() or np.median(keypoints[seen]) <= 2:
        return keypoints
    try:
        size = np.asarray(w_h, dtype=np.float32).reshape(2)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: w_h is {w_h!r}, width and height in pixels were expected") from error
    if not (np.isfinite(size) & (size > 0)).all():
        raise DataError(f"{path}: w_h is {size.tolist()}, width and height in pixels were expected")
    return keypoints / size


def crop_scale(motion, thr):
    """Put a clip into one box: motion (T, V, 3) of x, y, confidence -> (result (T, V, 3) float32, scale, offset).

    The box spans all joints of all frames with confidence above thr and finite coordinates: scale is its longer side,
    offset (2,) its corner, result's x and y lie in -1..1, confidence in 0..1; any other joint is zero. Fewer than 4
    such joints, or a box without extent: (zeros, 0, None). Never NaN, never a warning; motion is left alone.
    """
    motion = np.asarray(motion)
    xy, confidence = motion[..., :2].astype(np.float64), motion[..., 2].astype(np.float64)
    result = np.zeros(motion.shape[:2] + (3,), np.float32)
    with np.errstate(all="ignore"):
        usable = (confidence > thr) & np.isfinite(xy).all(-1)
        if usable.sum() < 4:
            return result, 0, None
        points = xy[usable]
        low, high = points.min(0), points.max(0)
        scale = (high - low).max()
        if not np.isfinite(scale) or scale <= np.finfo(np.float32).tiny:
            return result, 0, None
        offset = low / 2 + high / 2 - scale / 2
        result[usable, :2] = np.clip((points - offset) / scale * 2 - 1, -1, 1)
        result[usable, 2] = np.clip(confidence[usable], 0, 1)
    return result, float(scale), offset


def load_part_kp(skeletons, confs):
    """skeletons (T, 133, 2), confs (T, 133) -> {body (T, 9, 3), left (T, 21, 3), right (T, 21, 3)}, float32 tensors.

    The body goes through `crop_scale`. A hand is taken relative to its own first joint, divided by the body's scale and
    clipped to -1..1; in a frame where that first joint was not seen, the whole hand is zero.
    """
    skeletons, confs = np.asarray(skeletons), np.asarray(confs)
    body, scale, _ = crop_scale(np.concatenate([skeletons[:, BODY], confs[:, BODY, None]], -1), THRESHOLD)
    parts = {"body": body}
    for part, joints in (("left", LEFT), ("right", RIGHT)):
        xy, confidence = skeletons[:, joints].astype(np.float64), confs[:, joints].astype(np.float64)
        hand = np.zeros(xy.shape[:2] + (3,), np.float32)
        with np.errstate(all="ignore"):
            usable = (confidence > THRESHOLD) & np.isfinite(xy).all(-1)
            usable &= usable[:, :1] & (scale > 0)
            relative = (xy - xy[:, :1]) / (scale or 1)
        hand[usable, :2] = np.clip(relative[usable], -1, 1)
        hand[usable, 2] = np.clip(confidence[usable], 0, 1)
        parts[part] = hand
    return {part: torch.from_numpy(values) for part, values in parts.items()}


def sample_frames(frames, max_length, rng=None):
    """Indices of at most max_length of `frames` frames over the whole clip: even, or with rng at random within steps."""
    if frames <= max_length:
        return np.arange(frames)
    edges = np.arange(max_length) * (frames / max_length)
    inside = 0.5 if rng is None else rng.random(max_length)
    return np.minimum((edges + inside * (frames / max_length)).astype(np.int64), frames - 1)


# ---------------------------------------------------------------------------------------------- the data set

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
    seen = (scores > THRESHOLD) & finite
    hands = seen[:, LEFT[0]] | seen[:, RIGHT[0]]
    joints, problem = BODY + LEFT + RIGHT, ""
    if not crop_scale(np.concatenate([keypoints[:, BODY], scores[:, BODY, None]], -1), THRESHOLD)[1]:
        problem = (f"{path}: no usable body ({int(seen[:, BODY].sum())} joints above confidence {THRESHOLD} in "
                   f"{len(seen)} frames)")
    # load_pose_file divides by w_h where it can; what is still far above 1 are pixels
    in_pixels = bool(seen.any() and np.median(keypoints[seen]) > 2)
    unseen = tuple(int((~seen[:, part]).sum()) for part in (BODY, LEFT, RIGHT))
    not_finite = int((~(finite & np.isfinite(scores)))[:, joints].sum())
    return ClipReport(len(seen), unseen, int((~hands).sum()), not_finite, in_pixels, problem)


class SignLanguageDataset(Dataset):
    """Clips of one label file; item: (name, pose {body, left, right}, text, gloss).

    Every pose file is read once when the set is made, by all cores, so that no bad clip stops a run hours later; the
    result is kept in config.output_dir. With on_bad_clip "error" DataError names the bad clips, with "skip" they are
    left out and listed in output_dir/bad_clips.txt. `encode`, if set, turns texts into labels in the loader's workers.
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
        root = self.pose_dir.resolve()
        for name in (entry["pose"], entry["name"] + ".pkl", entry["name"] + ".npz"):
            path = self.pose_dir / name
            if not path.resolve().is_relative_to(root):
                return None
            if path.is_file():
                return path
        return self.pose_dir / entry["pose"]

    def _inspect_all(self):
        """Inspect each file, or take what an earlier run found for the same size and time of change."""
        cache_path = Path(self.config.output_dir or ".") / f"clips_{self.label_path.name}.json"
        keep = bool(self.config.output_dir)
        try:
            cache = json.loads(cache_path.read_text(encoding="utf-8")) if keep else {}
        except (OSError, ValueError):  # no cache yet, or half a one: it is only a saving of time
            cache = {}
        keys = []
        for path in self.paths:
            stat = path.stat() if path and path.is_file() else None
            keys.append(f"{path} {stat.st_size} {stat.st_mtime_ns}" if stat else "")
        todo = sorted({path for path, key in zip(self.paths, keys) if path and key not in cache})
        found = dict(zip(todo, _in_parallel(inspect_clip, todo, f"reading {self.label_path.name}")))
        found[None] = ClipReport(problem=f"its pose lies outside {self.pose_dir}, or a link leads out: refused")
        reports = [ClipReport(*cache[key]) if key in cache else found[path] for path, key in zip(self.paths, keys)]
        if keep and todo:
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            aside = cache_path.with_suffix(f".{os.getpid()}.part")
            aside.write_text(json.dumps({k: r for k, r in zip(keys, reports) if k}), encoding="utf-8")
            os.replace(aside, cache_path)
        return reports

    def _drop_bad(self, problems):
        """Leave out bad clips, or refuse the set, as on_bad_clip says; with a list of problems only name them there."""
        bad = [f"{e['name']}: {r.problem}" for e, r in zip(self.entries, self.reports) if r.problem]
        if not bad:
            return
        message = (f"{self.label_path}: {len(bad)} of {len(self.entries)} clips are unusable:\n  " + "\n  ".join(bad[:5])
                   + (f"\n  ... and {len(bad) - 5} more" if len(bad) > 5 else ""))
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
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            lines = [line for line in old if not line.startswith(self.phase + "\t")]
            lines += [f"{self.phase}\t{line}" for line in bad]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{message}\nleft out, as on_bad_clip says", flush=True)

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        entry = self.entries[index]
        return entry["name"], self._load_pose(index), entry["text"], entry["gloss"]

    def _load_pose(self, index):
        rng = None
        if self.phase == "train":  # from seed, epoch and clip alone, so the same whatever worker draws it
            rng = np.random.default_rng([self.config.seed, self.epoch, index])
        return read_clip(self.paths[index], self.config, rng)

    def collate_fn(self, batch):
        """Items -> (src_input, tgt_input): parts zero-padded at the end, attention_mask (B, T) 1 = real, 0 = padding."""
        names, poses, texts, glosses = zip(*batch)
        src_input = pad_poses(poses)
        src_input["names"] = list(names)
        tgt_input = {"gt_sentence": list(texts), "gt_gloss": list(glosses)}
        if self.encode is not None:
            tgt_input["labels"] = self.encode(tgt_input["gt_sentence"])
        return src_input, tgt_input


def read_clip(path, config, rng=None):
    """The one way from a pose file to {body, left, right}: training (with rng), evaluation and a single clip."""
    keypoints, scores = load_pose_file(path)
    if rng is not None and config.augment:
        keypoints, scores = augment_clip(keypoints, scores, rng)
    frames = sample_frames(len(scores), config.max_length, rng)
    pose = load_part_kp(keypoints[frames], scores[frames])
    if not pose["body"].any():
        raise DataError(f"{path}: no usable body joint in the {len(frames)} frames taken; see on_bad_clip")
    return pose


def augment_clip(keypoints, scores, rng):
    """Another speed (0.8-1.25), tilt (to 10 degrees), aspect (to 10 %) and noise (0.3 % of the body's extent)."""
    count = max(4, round(len(scores) * np.exp(rng.uniform(np.log(0.8), np.log(1.25)))))
    frames = np.minimum(np.linspace(0, len(scores) - 1, count).round().astype(int), len(scores) - 1)
    keypoints, scores = keypoints[frames], scores[frames]
    angle, aspect = np.radians(rng.uniform(-10, 10)), rng.uniform(0.9, 1.1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * [[aspect], [1.0]]
    _, scale, _ = crop_scale(np.concatenate([keypoints[:, BODY], scores[:, BODY, None]], -1), THRESHOLD)
    with np.errstate(all="ignore"):
        noise = rng.normal(0, 0.003 * scale, keypoints.shape)
        return (keypoints @ turn + noise).astype(np.float32), scores


def pad_poses(poses):
    """[{body (T, 9, 3), ...}] -> {body (B, T, 9, 3), left, right (B, T, 21, 3), attention_mask (B, T), src_length (B,)}."""
    lengths = torch.tensor([len(pose["body"]) for pose in poses])
    batch = {part: torch.nn.utils.rnn.pad_sequence([pose[part] for pose in poses], batch_first=True)
             for part in ("body", "left", "right")}
    batch["attention_mask"] = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
    batch["src_length"] = lengths
    return batch


class LengthBatchSampler(Sampler):
    """Batches of clips of like length, in windows: what one optimiser step sees, batch_size x accumulation x world clips.

    Shuffled, from seed and epoch alone: pools of 16 windows are sorted by length and cut into windows, which come in
    random order; the clips that fill none come last, as a short one. So a step's clips depend on the window's size, not
    on how micro-batches and processes divide it. Unshuffled: longest first, so that memory fails early.
    Process `rank` of `world` takes every world-th batch of a window; where they do not divide evenly, it repeats one
    that does not count. `start` skips batches of this process that an interrupted epoch has already used.
    """

    def __init__(self, lengths, batch_size, shuffle, seed=0, accumulation=1, rank=0, world=1):
        self.lengths, self.batch_size, self.shuffle, self.seed = np.asarray(lengths), batch_size, shuffle, seed
        self.rank, self.world, self.epoch, self.start = rank, world, 0, 0
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


# ---------------------------------------------------------------------------------------------- the built-in demo

# Word classes in the order of the text; the sign order differs: see _demo_sentence.
DEMO_WORDS = {
    "greeting": ["你好"], "time": ["今天", "明天", "昨天"], "subject": ["我", "你", "他", "妈妈", "老师", "朋友"],
    "place": ["学校", "家", "商店", "医院"], "not": ["不"], "verb": ["买", "找", "看", "喜欢", "要", "卖"],
    "adjective": ["大", "小", "红", "新"], "object": ["书", "水", "花", "车", "鱼", "苹果", "衣服", "手机", "电脑"],
    "question": ["吗"], "thanks": ["谢谢"]}
DEMO_SIGNS = [word for words in DEMO_WORDS.values() for word in words]
DEMO_SPLITS = {"train": 1600, "dev": 120, "test": 120}


def make_demo_corpus(data_dir, seed=0, splits=None):
    """Write a synthetic corpus in the real on-disk format, the same for the same seed; returns data_dir as a Path.

    Signs differ in hand shape, place and path, some use both hands; the text's word order is not the signs' order;
    signers differ in size, place, tilt, speed and noise; hands drop out. No dev or test sentence occurs in train.
    `splits` gives clips a split; the folder appears whole or not at all.
    """
    data_dir, splits = Path(data_dir), splits or DEMO_SPLITS
    rng = np.random.default_rng(seed)
    sentences, wanted = {}, sum(splits.values())
    while len(sentences) < wanted:
        text, gloss = _demo_sentence(rng)
        sentences.setdefault(text, gloss)
    aside = data_dir.with_name(f"{data_dir.name}.{os.getpid()}.part")
    (aside / "pose_format").mkdir(parents=True)
    signs, rows = _demo_signs(), iter(sentences.items())
    for split, count in splits.items():
        labels = {}
        for number in tqdm(range(count), desc=f"demo {split}", disable=None, leave=False):
            text, gloss = next(rows)
            name = f"{split}_{number:05d}"
            keypoints, scores = _demo_clip([signs[word] for word in gloss], rng)
            with open(aside / "pose_format" / f"{name}.pkl", "wb") as file:
                pickle.dump({"keypoints": keypoints[:, None], "scores": scores[:, None]}, file, protocol=4)
            labels[name] = {"name": name, "gloss": gloss, "text": text, "video_path": f"{name}.mp4"}
        with gzip.GzipFile(aside / f"labels.{split}", "wb", mtime=0) as file:
            pickle.dump(labels, file, protocol=4)
    os.replace(aside, data_dir)
    return data_dir


def _demo_sentence(rng):
    """One random sentence: (text in word order, gloss in sign order)."""
    word = {kind: words[rng.integers(len(words))] for kind, words in DEMO_WORDS.items()}
    chance = {"greeting": 0.1, "time": 0.6, "place": 0.5, "not": 0.3, "adjective": 0.5, "question": 0.3, "thanks": 0.1}
    has = {kind: kind not in chance or rng.random() < chance[kind] for kind in DEMO_WORDS}
    text = "".join([
        "你好，" if has["greeting"] else "", word["time"] if has["time"] else "", word["subject"],
        "在" + word["place"] if has["place"] else "", "不" if has["not"] else "", word["verb"],
        word["adjective"] + "的" if has["adjective"] else "", word["object"],
        "吗？" if has["question"] else "，" if has["thanks"] else "。", "谢谢！" if has["thanks"] else ""])
    order = ["greeting", "time", "place", "subject", "object", "adjective", "verb", "not", "question", "thanks"]
    return text, [word[kind] for kind in order if has[kind]]


def _demo_signs():
    """{word: hand shape, palm angle, place, path, other hand}; fixed, so that corpora of two seeds share their signs."""
    rng, signs = np.random.default_rng(20240), {}
    shapes = rng.permutation([[a, b, c, d, d] for a in (0, 1) for b in (0, 0.5, 1) for c in (0, 1) for d in (0, 1)])
    for i, word in enumerate(DEMO_SIGNS):
        angle = rng.uniform(0, 2 * np.pi)
        signs[word] = {
            "flexion": shapes[i % len(shapes)], "spread": rng.uniform(0.12, 0.35), "palm": rng.uniform(-1.2, 1.2),
            "place": np.array([rng.uniform(-0.7, 0.2), rng.uniform(-0.5, 1.0)]),  # shoulder widths from the neck
            "direction": 0.35 * np.array([np.cos(angle), np.sin(angle)]),
            "path": ("line", "arc", "circle", "tap")[rng.integers(4)],
            "other": ("none", "none", "mirror", "base")[rng.integers(4)]}
    return signs


def _demo_path(sign, phase):
    """Displacement (n, 2) of the dominant hand at phase 0..1 of the sign."""
    along, across = sign["direction"], sign["direction"][::-1] * [-1, 1]
    forth, aside = {
        "line": (phase, 0 * phase), "arc": (phase, np.sin(np.pi * phase)),
        "circle": (np.cos(2 * np.pi * phase) / 2, np.sin(2 * np.pi * phase) / 2),
        "tap": (np.sin(2 * np.pi * phase) ** 2, 0 * phase)}[sign["path"]]
    return forth[:, None] * along + aside[:, None] * across


def _demo_hand(flexion, spread, palm, mirror):
    """Joints (n, 21, 2) of one hand, wrist at the origin: flexion (n, 5), spread (n,), palm angle (n,)."""
    n, finger = len(flexion), np.arange(5)
    heading = palm[:, None] + spread[:, None] * (finger - 2) * 1.3 - np.pi / 2  # fingers point up at palm 0
    joints, place = np.zeros((n, 21, 2)), np.zeros((n, 5, 2))
    for segment, length in enumerate((0.13, 0.07, 0.05, 0.04)):
        step = length * (1 - 0.3 * flexion * (segment > 0))
        place = place + step[..., None] * np.stack([np.cos(heading), np.sin(heading)], -1)
        joints[:, 1 + segment + 4 * finger] = place
        heading = heading + 1.2 * flexion
    joints[..., 0] *= -1 if mirror else 1
    return joints


def _demo_clip(signs, rng):
    """Play signs one after another by one random signer -> keypoints (T, 133, 2) in 0..1, scores (T, 133)."""
    rest = {"flexion": np.full(5, 0.4), "spread": 0.15, "palm": 0.0}
    speed, keys = rng.uniform(0.8, 1.25), [(rest, np.array([-0.6, 1.6]), np.array([0.6, 1.6]))] * 2
    for sign in signs:
        phase = np.linspace(0, 1, max(4, round(rng.uniform(5, 7) / speed)))
        right = sign["place"] + _demo_path(sign, phase)
        left = {"none": np.zeros_like(right) + [0.6, 1.6], "mirror": right * [-1, 1],
                "base": np.zeros_like(right) + sign["place"] * [-1, 1]}[sign["other"]]
        gap = [None] * max(1, round(2 / speed))  # movement from sign to sign, filled in below
        keys += gap + [(sign, r, q) for r, q in zip(right, left)]
    keys += [None, None, keys[0]]
    known = np.array([i for i, key in enumerate(keys) if key is not None])

    def track(values):
        flat = np.array(values, float).reshape(len(known), -1)
        return np.stack([np.interp(np.arange(len(keys)), known, column) for column in flat.T], -1)

    shown = [keys[i] for i in known]
    right, left = track([key[1] for key in shown]), track([key[2] for key in shown])
    flexion = track([key[0]["flexion"] for key in shown])
    spread, palm = track([key[0]["spread"] for key in shown])[:, 0], track([key[0]["palm"] for key in shown])[:, 0]
    idle = track([float(key[0].get("other", "none") == "none") for key in shown])
    points = _demo_body(right, left, rng.uniform(0.9, 1.1))
    points[:, RIGHT] = right[:, None] + _demo_hand(flexion, spread, palm, mirror=False)
    points[:, LEFT] = left[:, None] + _demo_hand(flexion * (1 - idle) + 0.4 * idle, spread, palm * (1 - idle[:, 0]), True)
    return _demo_signer(points, rng)


def _demo_body(right, left, reach):
    """Body, face and feet around the given wrists (n, 2); the unit is the shoulder width, the origin the neck."""
    points = np.zeros((len(right), JOINTS, 2))
    fixed = {0: (0, -0.55), 1: (0.08, -0.62), 2: (-0.08, -0.62), 3: (0.17, -0.57), 4: (-0.17, -0.57), 5: (0.5, 0),
             6: (-0.5, 0), 11: (0.33, 1.6), 12: (-0.33, 1.6), 13: (0.33, 2.4), 14: (-0.33, 2.4), 15: (0.33, 3.2),
             16: (-0.33, 3.2)}
    for joint, place in fixed.items():
        points[:, joint] = place
    points[:, 17:23] = [0, 3.3]
    ring = np.linspace(0, 2 * np.pi, 68)
    points[:, 23:91] = np.stack([0.18 * np.cos(ring), 0.25 * np.sin(ring) - 0.5], -1)
    for wrist, elbow, shoulder, hand in ((9, 7, 5, left), (10, 8, 6, right)):
        points[:, wrist] = hand
        points[:, elbow] = (points[:, shoulder] + hand) / 2 + [0.2 * reach * (1 if shoulder == 5 else -1), 0.25]
    return points


def _demo_signer(points, rng):
    """A signer's size, place and tilt, the detector's noise, and hands that drop out for some frames."""
    size, tilt = rng.uniform(0.14, 0.26), np.radians(rng.uniform(-8, 8))
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    points = points @ turn * [rng.uniform(0.92, 1.08), 1] * size + [rng.uniform(0.4, 0.6), rng.uniform(0.25, 0.4)]
    points += rng.normal(0, size * rng.uniform(0.004, 0.012), points.shape)
    scores = rng.uniform(0.7, 1.0, points.shape[:2])
    scores[:, 11:23] = rng.uniform(0, 0.25, scores[:, 11:23].shape)  # hips and legs are out of the frame
    for hand in (LEFT, RIGHT):
        if rng.random() < 0.3:
            begin, length = rng.integers(len(points)), rng.integers(1, 4)
            scores[begin:begin + length, hand] = rng.uniform(0, 0.2)
            points[begin:begin + length, hand] = rng.uniform(0, 1, 2)
    return points.astype(np.float32), scores.astype(np.float32)
