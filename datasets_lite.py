"""From files to batches: labels, poses, the data set, batches by length, and the built-in demo.

One worked example, as a clip goes through:
    train_00000.pkl      {"keypoints": (T, 1, 133, 2), "scores": (T, 1, 133)}, COCO-WholeBody
    -> load_pose_file    keypoints (T, 133, 2), x right, y down; scores (T, 133)
    -> load_part_kp      body (T, 9, 3): joints 0, 3-10 in one box for the clip, x, y -1..1
                         left (T, 21, 3): joints 91-111 minus joint 91, over the box; right: 112-132
    -> collate_fn        body (B, T, 9, 3), left and right (B, T, 21, 3), zeros after the end
The third channel is the confidence, 0..1. A joint that was not seen (confidence at most 0.3, NaN,
Inf) is zero in all three.
"""

import gzip
import io
import json
import os
import pickle
import re
import reprlib
import signal
import tempfile
import unicodedata
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import product
from multiprocessing import Pipe
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from config_lite import NO_SPACES

try:
    import resource
except ImportError:  # Windows
    resource = None

JOINTS = 133  # COCO-WholeBody
THRESHOLD = 0.3  # a joint at or below this confidence counts as not seen
# Nose, ears, shoulders, elbows, wrists, as in Uni-Sign. The original took the hips instead of the
# ears; in upper-body video they lie below the frame, and a guessed hip stretches the box that
# everything is scaled by.
BODY = [0, *range(3, 11)]
LEFT = [*range(91, 112)]
RIGHT = [*range(112, 133)]
PARTS = {"body": BODY, "left": LEFT, "right": RIGHT}
USED = BODY + LEFT + RIGHT
# each joint's fellow of the other side; face and legs, which nothing reads, stay
MIRRORED = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, *range(11, 91), *RIGHT, *LEFT]
LEFT_WRIST = BODY.index(9)
RIGHT_WRIST = BODY.index(10)
# What reading one file may take (`guarded`): bytes of the file, CPU seconds, bytes of memory
MAX_BYTES = 256 * 2**20
MAX_SECONDS = 20
MAX_MEMORY = 2**30
ENDING = re.compile(r"\.(pkl|npz|pose)$")  # of the pose files that are read
POINTER = b"version https://git-lfs"
VIDEO = re.compile(r"(?i)\.(mp4|avi|mov|mkv|webm|m4v|mpe?g|wmv)$")
NORMALIZER = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc")  # mT5's


class DataError(ValueError):
    """The data cannot be used as it is; the message names file or clip, and what to do."""


def normalise(text):
    """A text as the vocabulary gives it back: NFKC, odd characters dropped or made spaces."""
    return " ".join(NORMALIZER.normalize(text).replace("▁", " ").split())


# ------------------------------------------------------------------------------- labels


def load_dataset_file(path, problems=None):
    """Labels -> {name: {name, text, gloss (list, may be empty), pose (file name)}}.

    Reads pickles (CSL-Daily: a dict) and JSON (a dict, or CSL-News's list of {video, pose, text}),
    gzipped or not, and JSON lines. Raises DataError naming file or entry, pickle.UnpicklingError
    for a pickle that asks for more than data; where a list of problems is given, faulty entries go
    there and are left out.
    """
    entries, faults = read_guarded(read_labels, Path(path))
    # `check` names all faults of a corpus, training stops at the first kind
    if problems is not None:
        problems += faults
    elif faults:
        raise DataError(f"{path}: {len(faults)} faulty entries:\n{first_five(faults)}")
    return entries


def read_labels(path):
    """-> entries, faults; runs under guard."""
    missing = "no such label file; --data_dir names a folder with labels.train, .dev, .test"
    raw = read_bytes(path, missing)
    with naming(path, "neither a pickle nor JSON (gzipped or not), nor JSON lines"):
        if raw.startswith(b"\x1f\x8b"):  # gzip's first bytes
            raw = gzip.decompress(raw)
        refuse_known(path, raw)
        if re.match(rb"[\x80(}\]c]", raw):  # a pickle's, of any protocol
            data = SafeUnpickler(io.BytesIO(raw)).load()
        else:
            data = parse_json(path, raw)
    if not isinstance(data, (dict, list)) or not data:
        raise DataError(
            f"{path}: a dict or list of entries was expected, found {reprlib.repr(data)}"
        )
    # a list has no keys: they are made below
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    entries = {}
    faults = []
    for key, entry in pairs:
        try:
            with naming(path, f"entry {key!a} is malformed"):
                if not isinstance(entry, dict):
                    raise DataError(
                        f"{path}: entry {key} is no dict with name and text: {reprlib.repr(entry)}"
                    )
                if isinstance(data, list):
                    # by its pose, with the folder: many clips may come from one video
                    key = ENDING.sub("", pose_name(entry, entry.get("video") or key))
                key = str(key)
                if key in entries:
                    raise DataError(f"{path}: entry {key} is there twice; rename or remove one")
                entries[key] = make_entry(path, key, entry)
        except DataError as error:
            faults.append(str(error))
    return entries, faults


def parse_json(path, raw):
    """JSON, or an object a line; with or without a byte order mark."""

    def once(pairs):
        found = {}
        for name, value in pairs:
            if name in found:
                raise DataError(f"{path}: {name!r} is there twice; rename or remove one")
            found[name] = value
        return found

    # Notepad's mark goes
    text = raw.decode("utf-8-sig").strip()
    if not re.match(r"[{\[]", text):
        raise DataError(
            f"{path}: a table, or other text that is no JSON (it begins {text[:40]!r}): write "
            '{name: {"text": ..., "gloss": [...]}}'
        )
    # an object a line: as a list of them; within a text no line ends like this
    text = re.sub(r"}\s*\n\s*{", "},\n{", text)
    values = json.loads(f"[{text}]", object_pairs_hook=once)
    return values[0] if len(values) == 1 else values


def refuse_known(path, raw):
    """Name a file that is of another kind altogether."""
    kinds = {
        POINTER: "a Git LFS pointer, not the file itself: run `git lfs pull`",
        b"<": "a web page, not the file itself: download it again",
        b"\xff\xfe": "text in UTF-16: save it as UTF-8",
        b"\xfe\xff": "text in UTF-16: save it as UTF-8",
        b"PK": "a zip archive: unpack it",
    }
    for beginning, kind in kinds.items():
        if raw.startswith(beginning):
            raise DataError(f"{path}: {kind}")


def refuse_pointer(path):
    """The same for weights, of which no more than the beginning is read."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            refuse_known(path, POINTER)


def pose_name(entry, otherwise):
    """Where a label's entry says that its pose lies within pose_format."""
    fields = ("pose", "pose_path", "video_path", "name")
    named = next(filter(None, map(entry.get, fields)), otherwise)
    path = VIDEO.sub(".pkl", str(named).replace("\\", "/"))
    path = re.sub("^(./)*pose_format/", "", path)
    return path if ENDING.search(path) else f"{path}.pkl"


def make_entry(path, key, entry):
    """One entry, checked -> {name, text, gloss, pose}."""
    where = f"{path}: entry {key}"
    text = entry.get("text")
    if not isinstance(text, str) or not normalise(text):
        raise DataError(
            f"{where} has no text (found {reprlib.repr(text)}); give it one or remove the entry"
        )
    # words in a list, or in one text with spaces; none = gloss-free
    gloss = entry.get("gloss")
    if gloss is None:
        gloss = []
    elif isinstance(gloss, str):
        gloss = gloss.split()
    # anything else would be counted, or read letter by letter
    if not isinstance(gloss, (list, tuple)) or not all(isinstance(word, str) for word in gloss):
        raise DataError(f"{where} has glosses {reprlib.repr(gloss)}, a list of words was expected")
    name = str(entry.get("name") or key)
    pose = pose_name(entry, key)
    # a label must not make the loader read any file of the machine
    if leads_out(pose):
        raise DataError(f"{where}: {pose} is a path out of pose_format: refused")
    # half a character fails here, not when the texts are tokenised
    "".join([name, pose, text, *gloss]).encode()
    return {"name": name, "text": text, "gloss": list(gloss), "pose": pose}


def leads_out(name):
    return Path(name).is_absolute() or ".." in Path(name).parts


def first_five(lines):
    shown = lines[:5]
    if len(lines) > 5:
        shown.append(f"... and {len(lines) - 5} more")
    return "  " + "\n  ".join(shown)


# ------------------------------------------------------------------------------- joints -> parts


@np.errstate(all="ignore")  # any numbers may stand there
def load_part_kp(skeletons, confs):
    """skeletons (T, 133, 2), confs (T, 133) -> {body (T, 9, 3), left, right (T, 21, 3)}, float32.

    The body goes through `crop_scale`. A hand is taken relative to its own first joint, divided by
    the longer side of the body's box and clipped to -1..1; in a frame where that joint was not seen
    it is all zero. The model brings it to its own scale (models_lite.hand_features).
    """
    # half precision could not hold every scale
    clip = np.float32(np.dstack([skeletons, confs]))  # (T, 133, 3)
    kps_with_scores = {}
    for part, joints in PARTS.items():  # the body first: its scale is the hands', too
        motion = clip[:, joints]  # (T, V, 3)
        if part == "body":
            result, scale, _ = crop_scale(motion, THRESHOLD)
        else:
            usable = seen_joints(motion[..., :2], motion[..., 2])  # (T, 21)
            usable &= usable[:, :1]  # no hand without its first joint,
            usable &= scale > 0  # or without a body
            place = (motion[..., :2] - motion[:, :1, :2]) / scale  # (T, 21, 2)
            result = only_usable(place, motion, usable)  # (T, 21, 3)
        kps_with_scores[part] = torch.from_numpy(result)
    return kps_with_scores


@np.errstate(all="ignore")  # what overflows is not usable
def crop_scale(motion, thr):
    """One box for a clip: motion (T, V, 3), x, y, confidence -> (result (T, V, 3), scale, offset).

    It spans the usable joints of all frames: confidence above thr, finite coordinates. scale: its
    longer side; offset (2,): its corner; result: x, y in -1..1, confidence in 0..1, any other joint
    zero. Fewer than 4 such joints, or a box without extent: (zeros, 0, None). For any numbers
    whatever no NaN and no warning; motion is left alone.
    """
    motion = np.asarray(motion)
    place = motion[..., :2].astype(np.float32)  # (T, V, 2)
    usable = seen_joints(place, motion[..., 2], thr)  # (T, V)
    valid_coords = place[usable]  # (usable joints, 2)
    nothing = np.zeros(motion.shape, np.float32)
    if len(valid_coords) < 4:
        return nothing, 0, None
    # the box over the whole clip, so that motion stays motion
    low = valid_coords.min(axis=0)
    high = valid_coords.max(axis=0)
    scale = float((high - low).max())
    if not np.finfo(np.float32).tiny < scale < np.inf:
        return nothing, 0, None
    offset = low / 2 + high / 2 - scale / 2  # halved first: a sum could overflow
    place = 2 * (place - offset) / scale - 1
    return only_usable(place, motion, usable), scale, offset


def seen_joints(keypoints, scores, thr=THRESHOLD):
    """(T, V, 2), (T, V) -> (T, V): whether the score is above thr and both coordinates finite."""
    x, y = np.moveaxis(keypoints, -1, 0)  # (T, V) each: many times as fast as all(-1)
    return (scores > thr) & np.isfinite(x) & np.isfinite(y)


def only_usable(place, motion, usable):
    """Places (T, V, 2), motion's confidence -> (T, V, 3), clipped; what is not usable is zero."""
    clipped = np.dstack([place.clip(-1, 1), motion[..., 2].clip(0, 1)])  # (T, V, 3)
    return np.where(usable[..., None], clipped, 0).astype(np.float32)


# ------------------------------------------------------------------------------- the data set


class SignLanguageDataset(Dataset):
    """Clips of one label file; item: (name, pose {body, left, right}, text, gloss).

    With config.augment two clips may be one item, a sentence that nobody signed (`begin_epoch`).
    Every pose file is read once when the set is made, by all cores, so that no bad clip stops a run
    later; what was found is kept in config.output_dir. With on_bad_clip "error" DataError names the
    bad clips, with "skip" they are left out and listed in output_dir/bad_clips.txt; a list of
    problems replaces both. encode, if set, turns texts into labels in the loading processes.
    """

    def __init__(self, label_path, config, phase="train", problems=None):
        self.config = config
        self.phase = phase
        self.label_path = Path(label_path)
        self.encode = None
        # labels, then poses: what is wrong is said before a model is built
        bad = []  # entries, then clips
        self.entries = load_dataset_file(label_path, bad).values()
        self._inspect_all(bad)  # keeps the sound ones, each with its path and report
        self._refuse_bad(bad, problems)
        self.begin_epoch(0)

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        clips = [self._load_pose(clip) for clip in (index, *self.partners[index])]
        names, poses, texts, glosses = zip(*clips)
        pose = {}
        for part in PARTS:
            pose[part] = torch.cat([one[part] for one in poses])  # (T, V, 3)
        between = "" if self.config.language in NO_SPACES else " "
        return " + ".join(names), pose, between.join(texts), sum(glosses, [])

    def _load_pose(self, index):
        """One clip, as it is played in this epoch -> its name, pose, text and gloss."""
        rng = None
        if self.phase == "train":
            # from seed, epoch and clip alone, so the same whatever process draws it
            rng = np.random.default_rng([self.config.seed, self.epoch, index])
        entry = self.entries[index]
        digest = entry["report"].digest
        pose = read_clip(entry["path"], self.config, rng, self.lengths[index], digest)
        return entry["name"], pose, entry["text"], entry["gloss"]

    def begin_epoch(self, epoch):
        """Draw each clip's speed, and which are joined."""
        self.epoch = epoch
        # frames in which each clip is played, and the clip that follows it, if any
        self.lengths = np.array([entry["report"].frames for entry in self.entries])
        self.partners = [()] * len(self)
        self.totals = self.lengths  # of both together
        if self.phase == "train" and self.config.augment:
            rng = np.random.default_rng([self.config.seed, epoch])
            # as often faster as slower
            factors = 1.1 ** rng.uniform(-1, 1, len(self))
            self.lengths = (self.lengths * factors).round().astype(int).clip(4)
            self.totals = self.lengths.copy()
            # sentences that nobody signed: a sign must be found wherever it stands. Not in the
            # first two epochs: short clips alone are learnt sooner
            for index, other in enumerate(rng.permutation(len(self)).tolist()):
                if epoch >= 2 and self._fit(index, other) and rng.random() < self.config.join:
                    self.partners[index] = (other,)
                    self.totals[index] += self.lengths[other]

    def _fit(self, index, other):
        """Whether two clips can be joined: nothing to be cut, and glosses for both or none."""
        frames = self.lengths[index] + self.lengths[other]
        first = self.entries[index]
        second = self.entries[other]
        # a piece has a character at least
        characters = len(first["text"] + second["text"]) + 2
        short = frames <= self.config.max_length and characters <= self.config.max_text_length
        return index != other and short and bool(first["gloss"]) == bool(second["gloss"])

    def collate_fn(self, batch):
        """Items -> (src_input, tgt_input); attention_mask (B, T): 1 = real frame, 0 = padding."""
        names, poses, texts, glosses = map(list, zip(*batch))
        # zeros after a clip's end, and a mask that tells
        src_input = pad_poses(poses)
        src_input["names"] = names
        tgt_input = {"gt_sentence": texts, "gt_gloss": glosses}
        if self.encode:
            tgt_input["labels"] = self.encode(texts)
        return src_input, tgt_input

    # --- what is checked before the first step ---

    def _find(self, entry):
        """Where the entry's pose lies, in pose_format; a link may lead out."""
        # the pose as named, then its name and the entry's with each ending
        stems = [entry["pose"], ENDING.sub("", entry["pose"]), VIDEO.sub("", entry["name"])]
        folder = self.label_path.parent / "pose_format"
        forms = ("", "NFC", "NFD")  # as it stands there, as most write it, as macOS does
        for stem, ending, form in product(stems, ("", ".pkl", ".npz", ".pose"), forms):
            name = stem + ending
            if form:
                name = unicodedata.normalize(form, name)
            # False, too, for what can be no file's name
            if os.path.isfile(folder / name) and not leads_out(name):
                return folder / name
        return folder / entry["pose"]

    def _inspect_all(self, bad):
        """Inspect each file, or take what an earlier run found for the same size and time.

        What is unusable goes to the list of bad ones.
        """
        folder = self.config.output_dir
        cache = Path(folder, f"clips_{self.label_path.name}.json")
        reports = {}
        if folder:
            # none yet, or one that another version wrote: it only saves time
            with suppress(Exception):
                for key, report in json.loads(cache.read_text()).items():
                    reports[key] = ClipReport(**report)
        todo = {}
        for entry in self.entries:
            path = self._find(entry)
            # what tells that a file has changed
            key = str(path)
            if os.path.isfile(path):
                stat = path.stat()
                key = f"{path} {stat.st_size} {stat.st_mtime_ns}"
            entry.update(path=path, key=key)
            if key not in reports:
                todo[key] = path
        found = guarded(inspect_clip, list(todo.values()), os.cpu_count())
        bar = tqdm(found, f"reading {self.label_path.name}", len(todo), leave=False, disable=None)
        reports.update(zip(todo, bar))
        sound = {}  # without what could not be read: it may be mended, or there, the next time
        for entry in self.entries:
            report = reports[entry["key"]]
            if isinstance(report, DataError):
                bad.append(f"{entry['name']}: {report}")
                continue
            entry["report"] = report
            sound[entry["key"]] = report._asdict()
        self.entries = [entry for entry in self.entries if "report" in entry]
        if folder and todo:
            cache.parent.mkdir(parents=True, exist_ok=True)
            cache.write_text(json.dumps(sound))

    def _refuse_bad(self, bad, problems):
        """Refuse the set, or do without what is bad, as on_bad_clip says; problems takes names."""
        # all are named, the first five on the screen
        clips = len(bad) + len(self)
        message = f"{self.label_path}: {len(bad)} of {clips} clips are unusable:\n{first_five(bad)}"
        if problems is not None:
            problems += bad
        elif bad and (self.config.on_bad_clip == "error" or not self.entries):
            raise DataError(
                f"{message}\nmend or remove them, or leave them out with --on_bad_clip skip"
            )
        elif bad:
            print(f"{message}\nleft out, as on_bad_clip says")
            if self.config.output_dir:
                mode = "w" if self.phase == "train" else "a"  # train comes first
                with open(Path(self.config.output_dir, "bad_clips.txt"), mode) as file:
                    file.writelines(f"{self.phase}\t{line}\n" for line in bad)


class ClipReport(NamedTuple):
    """What the check found in one pose file; shares are in %."""

    frames: int
    body: float  # of its joints, those not seen: at or below the threshold, or not finite
    left: float
    right: float
    no_hand: float  # of the frames, those in which neither hand was seen
    not_finite: int  # joints, among the used ones, with a NaN or Inf
    in_pixels: bool  # still, where load_pose_file had no w_h to divide by
    digest: str  # of the file's contents
    odd: list  # what looks wrong, for `check`


def inspect_clip(path):
    """One pose file -> ClipReport; runs under guard."""
    raw = read_bytes(path)
    keypoints, scores = parse_pose(path, raw)
    usable_parts(path, keypoints, scores)
    # counts for the report of `check`
    seen = seen_joints(keypoints, scores)  # (T, 133)
    x, y = np.moveaxis(keypoints, -1, 0)  # (T, 133) each
    not_finite = ~np.isfinite(x + y + scores)  # (T, 133)
    has_hand = seen[:, [LEFT[0], RIGHT[0]]].any(1)  # (T,): by the hands' first joints
    # what looks wrong, each with what to do
    odd = []
    if len(scores) == 1:
        odd.append("one frame only: is time the first axis?")
    if scores.max() > 2:
        odd.append("scores far above 1: bring them to 0..1, or nothing counts as unseen")
    if (seen & (x == 0) & (y == 0))[:, USED].any():
        odd.append("joints at exactly (0, 0) with a high score: score them 0 where they are unseen")
    # frames in which the wrists lie the other way round than the shoulders; crossed arms are brief
    shoulders = keypoints[:, 5] - keypoints[:, 6]  # (T, 2)
    wrists = keypoints[:, 9] - keypoints[:, 10]
    across = (shoulders * wrists).sum(1) < 0  # (T,)
    across &= seen[:, [5, 6, 9, 10]].all(1)
    if across.mean() > 0.8:
        odd.append("each wrist beside the other shoulder: are left and right exchanged?")
    return ClipReport(
        len(seen),
        *(100 * (~seen[:, joints]).mean() for joints in PARTS.values()),
        no_hand=100 * (~has_hand).mean(),
        not_finite=int(not_finite[:, USED].sum()),
        in_pixels=in_pixels(keypoints, scores),
        digest=sha256(raw).hexdigest(),
        odd=odd,
    )


# ------------------------------------------------------------------------------- clips -> batches


def read_clip(path, config, rng=None, frames=None, digest=""):
    """The one way from a pose file to {body, left, right}: training, evaluation, a single clip.

    rng: draws for training; with config.augment the clip is played in so many frames. digest as in
    `load_pose_file`, and its errors.
    """
    stored = load_pose_file(path, digest)
    keypoints, scores = stored
    augmented = rng is not None and config.augment
    # on the clip as it was stored; its box is taken afterwards, and the body moved in it last
    if augmented:
        keypoints, scores = augment_clip(keypoints, scores, rng, frames)
        # left-handed signers are few in any corpus
        if rng.random() < config.mirror:
            keypoints, scores = mirror(keypoints, scores)
    # at most max_length of them, over the whole clip
    chosen = sample_frames(len(scores), config.max_length, rng)
    pose = load_part_kp(keypoints[chosen], scores[chosen])
    if pose["body"].any():
        if augmented:
            move_body(pose["body"], rng)
        return pose
    # the few frames that show a body were not among these: take those that show most
    keypoints, scores = stored
    shown = seen_joints(keypoints, scores)[:, BODY].sum(1)  # (T,)
    chosen = np.sort(np.argsort(-shown, kind="stable")[: len(chosen)])
    return usable_parts(path, keypoints[chosen], scores[chosen])


def usable_parts(path, keypoints, scores):
    """`load_part_kp` of a clip that must show a body."""
    pose = load_part_kp(keypoints, scores)
    if not pose["body"].any():
        raise DataError(f"{path}: no usable body in {len(scores)} frames; see on_bad_clip")
    return pose


def sample_frames(frames, max_length, rng=None):
    """Indices of at most max_length frames: evenly, or, with rng, at random within even steps."""
    if frames <= max_length:
        return np.arange(frames)
    # where in each even step
    inside = 0.5 if rng is None else rng.uniform(0, 0.999, max_length)
    chosen = (np.arange(max_length) + inside) * (frames / max_length)
    return chosen.astype(int)


@np.errstate(all="ignore")  # any numbers may stand there
def augment_clip(keypoints, scores, rng, frames):
    """keypoints (T, 133, 2), scores (T, 133) -> the same motion in so many frames, seen otherwise.

    Tilt up to 10 degrees, aspect up to 10 %, noise of 0.3 % of the body's extent.
    """
    # speed: frames are left out or shown twice
    chosen = np.linspace(0, len(scores) - 1, frames).round().astype(int)
    keypoints = keypoints[chosen]  # (frames, 133, 2)
    scores = scores[chosen]
    # tilt and aspect, in one matrix
    unit = np.exp(1j * np.radians(rng.uniform(-10, 10)))  # cosine + 1j * sine
    turn = np.float32([[unit.real, -unit.imag], [unit.imag, unit.real]])  # (2, 2)
    turn[0] *= rng.uniform(0.9, 1.1)
    _, extent, _ = crop_scale(np.dstack([keypoints, scores])[:, BODY], THRESHOLD)
    noise = rng.standard_normal((frames, len(USED), 2), np.float32)  # (frames, 51, 2)
    keypoints = keypoints @ turn  # (frames, 133, 2)
    keypoints[:, USED] += 0.003 * np.float32(extent) * noise
    return keypoints, scores


def mirror(keypoints, scores):
    """The clip as a mirror shows it, its left hand now a right one: (T, 133, 2), (T, 133)."""
    return keypoints[:, MIRRORED] * np.float32([-1, 1]), scores[:, MIRRORED]


def move_body(body, rng):
    """Change body (T, 9, 3) in place: one other size and one other place for the whole clip.

    Where a body lies in its box depends on chance: one arm out for one frame makes the box larger.
    Of few takes a model learns that place by heart (tests/RESULTS.md, "Where the body lies").
    Unlike a real box this one may cut: what leaves -1..1 is clipped. The hands stay: they are
    relative to their first joint, and the model takes their place from the body's wrists.
    """
    size, *shift = rng.uniform(-0.3, 0.3, 3)  # the logarithm of the size; x and y in half boxes
    place = body[..., :2] * np.exp(size) + body.new_tensor(shift)  # (T, 9, 2)
    body[..., :2] = place.clip(-1, 1) * (body[..., 2:] > 0)  # the unseen stay zero


def pad_poses(poses):
    """[{body (T, 9, 3), ...}] -> {body (B, T, 9, 3), ..., attention_mask, src_length (B,)}."""
    batch = {}
    for part in PARTS:
        batch[part] = pad_sequence([pose[part] for pose in poses], batch_first=True)  # (B, T, V, 3)
    lengths = torch.tensor([len(pose["body"]) for pose in poses])  # (B,)
    batch["src_length"] = lengths
    batch["attention_mask"] = (torch.arange(lengths.max()) < lengths[:, None]).long()  # (B, T)
    return batch


# ------------------------------------------------------------------------------- one pose file


def load_pose_file(path, digest=""):
    """One clip -> (keypoints (T, 133, 2), scores (T, 133)), float32; pixels are divided by w_h.

    .pkl holds arrays, nested lists or lists of an array a frame, as `all_frames` takes them, and
    may hold start, end (frames, end exclusive) and w_h; .npz holds the same as arrays, nothing
    pickled; .pose is read by the package pose-format. Without scores the keypoints' third channel
    is taken. digest: sha256 of contents that were read under guard before, without harm: they need
    none again. Raises DataError naming the file, pickle.UnpicklingError for a pickle that asks for
    more.
    """
    path = Path(path)
    raw = read_bytes(path)
    if sha256(raw).hexdigest() == digest:
        return parse_pose(path, raw)
    return read_guarded(lambda path: parse_pose(path, raw), path)


def parse_pose(path, raw):
    """A pose file's bytes -> keypoints (T, 133, 2), scores (T, 133), float32."""
    with naming(path, f"not a readable {path.suffix[1:]} file"):
        if path.suffix == ".npz":
            data = dict(np.load(io.BytesIO(raw), allow_pickle=False))
        elif path.suffix == ".pose":
            data = read_pose_format(path, raw)
        else:
            refuse_known(path, raw)
            data = SafeUnpickler(io.BytesIO(raw)).load()
        if not isinstance(data, dict) or "keypoints" not in data:
            raise DataError(
                f"{path}: keypoints and scores were expected, found {reprlib.repr(data)}"
            )
        keypoints = all_frames(data["keypoints"], "keypoints", path)  # (T, 133, 2 or 3)
        scores = keypoints[..., 2:]
        if "scores" in data:
            scores = all_frames(data["scores"], "scores", path)  # (T, 133, 1)
        # the two must belong together
        if keypoints.shape[2] not in (2, 3) or scores.shape != (*keypoints.shape[:2], 1):
            raise DataError(
                f"{path}: keypoints {keypoints.shape} and scores {scores.shape} do not fit; "
                "(T, 133, 2) and (T, 133, 1) were expected, or (T, 133, 3), the last the score"
            )
        start = data.get("start")
        end = data.get("end")
        with naming(path, f"start {start!r}, end {end!r} are no range within {len(scores)} frames"):
            keypoints = keypoints[start:end, :, :2]  # (T, 133, 2)
            scores = scores[start:end, :, 0]  # (T, 133)
            if not len(scores) or min(start or 0, end or 0) < 0:
                raise IndexError("out of range")
        # by their values: w_h is on normalised clips, too
        size = data.get("w_h")
        if size is not None and in_pixels(keypoints, scores):
            with naming(path, f"w_h is {reprlib.repr(size)} instead of [width, height] in pixels"):
                size = np.asarray(size, np.float32).reshape(2)
                if not (size >= 1).all():
                    raise ValueError("too small")
            keypoints = keypoints / size
        return keypoints, scores


def all_frames(value, field, path):
    """Persons and frames in any usual order -> (T, 133, channels) float32, the first person's.

    (T, 133, C), (T, persons, 133, C), (persons, T, 133, C) where the second axis is over 10 and
    longer than the first; scores without their axis of one. In a list of frames the number of
    persons may change, and a frame with nobody (empty or None) stays, unseen. Other orders raise
    DataError.
    """
    if isinstance(value, (list, tuple)):
        # None and an empty list are a frame with nobody
        value = [np.asarray([] if frame is None else frame) for frame in value]
        if len({frame.shape for frame in value}) > 1:  # persons come and go
            shape = max(value, key=np.size).shape
            # of one person: (133, 2), or (133,) for bare scores
            person = shape[-1:] if shape[-1] == JOINTS else shape[-2:]
            # the first one, or, behind all, nobody
            nobody = np.zeros(person)
            value = [np.append(frame, nobody).reshape(-1, *person)[0] for frame in value]
    # now with every axis; what is found is said as it stood there
    array = np.asarray(value)
    found = f"dtype {array.dtype}, shape {array.shape}"
    if field == "scores" and array.shape[-1:] == (JOINTS,):
        array = array[..., None]  # (T, 133, 1), perhaps with persons
    if array.ndim == 4 and array.shape[1]:
        persons_first = array.shape[1] > max(10, array.shape[0])
        array = array[0] if persons_first else array[:, 0]
    # 133 joints: other skeletons would be read as something else
    if array.dtype.kind not in "biuf" or array.ndim != 3 or array.shape[1] != JOINTS:
        raise DataError(
            f"{path}: {field} has {found}; numbers in frames of ({JOINTS}, ...) or (persons, "
            f"{JOINTS}, ...) were expected (COCO-WholeBody)"
        )
    return array.astype(np.float32, copy=False)


# the body's joints as `.pose` headers call them, once "_" is gone and sides are one letter
POSE_FORMAT_BODY = "nose lear rear lshoulder rshoulder lelbow relbow lwrist rwrist"


def read_pose_format(path, raw):
    """A .pose file's first person, in pixels over the header's size, the score third.

    Joints are found by their names (COCO-WholeBody, MediaPipe Holistic, OpenPose); those that the
    header lacks are unseen.
    """
    with naming(path, ".pose files need a package: pip install pose-format"):
        from pose_format import Pose
    pose = Pose.read(raw)
    body = dict(zip(POSE_FORMAT_BODY.split(), BODY))
    joints = []  # ours, for each point of the file; one too many: a point that is not read
    for component in pose.header.components:
        kind = component.name.lower()
        names = [re.sub("_|eft|ight", "", point.lower()) for point in component.points]
        if "world" in kind:  # the same again, in metres
            joints += [JOINTS] * len(names)
        elif "hand" in kind and len(names) == len(LEFT):
            joints += LEFT if "left" in kind else RIGHT
        else:
            joints += [body.get(name, JOINTS) for name in names]
    if not {5, 6, LEFT[0], RIGHT[0]}.issubset(joints):
        raise DataError(f"{path}: its header has no shoulders or not both hands")
    # the first person; pixels -> 0..1
    size = pose.header.dimensions
    places = np.asarray(pose.body.data)[:, 0, :, :2]  # (T, points, 2)
    clip = np.zeros((len(places), JOINTS + 1, 3))
    clip[:, joints, :2] = places / [size.width, size.height]
    clip[:, joints, 2] = np.asarray(pose.body.confidence)[:, 0]
    return {"keypoints": clip[:, :JOINTS]}


def in_pixels(keypoints, scores):
    """Whether most coordinates of the usable joints are beyond what a normalised clip has."""
    beyond = keypoints[seen_joints(keypoints, scores)] > 2
    return bool(beyond.sum() > beyond.size / 2)


# ------------------------------------------------------------------------------- untrusted files


class Refused(DataError, pickle.UnpicklingError):
    """A pickle asks for more than data."""


def read_guarded(read, path):
    """read(path), of one file. Raises the error that names it."""
    (result,) = guarded(read, [path])
    if isinstance(result, DataError):
        raise result
    return result


def guarded(read, paths, children=1):
    """Yield for each path what read(path) gives, or the DataError that names the path.

    What Python and numpy do with hostile bytes cannot be bounded from inside: a deep tuple ends the
    process, a kilobyte takes all memory. So forked children read, within limits; one that dies
    costs its file alone. Windows has no fork: the allow-list and MAX_BYTES are all there is.
    """
    readers = {}
    try:
        for number, path in enumerate(paths):
            # children take turns; a new one goes on behind the file that ended the last
            turn = number % children
            if resource and turn not in readers:
                readers[turn] = start_reader(read, paths[number::children])
            try:
                result = readers[turn][1].recv() if resource else outcome(read, path)
            except (EOFError, OSError):  # it ended before a result, or within one
                stop_reader(*readers.pop(turn))
                result = DataError(
                    f"{path}: it ended the process that read it: it takes over {MAX_SECONDS} CPU "
                    "seconds, or is made to crash Python; remove it"
                )
            yield result
    finally:
        # the last first: it holds the pipes of those before it open
        for reader in reversed(readers.values()):
            stop_reader(*reader)


def start_reader(read, paths):
    """Fork a child that reads these paths -> its number, and the pipe that its results come by."""
    results, sink = Pipe(duplex=False)
    child = os.fork()
    if child:
        sink.close()
        return child, results
    try:  # in the child, which never comes back to the caller's code
        results.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's matter
        with suppress(OSError, ValueError):  # Linux alone says what is held; or less is allowed
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            memory = pages * resource.getpagesize() + MAX_MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        for path in paths:
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # of CPU; its signal ends the child
            sink.send(outcome(read, path))
    finally:
        os._exit(0)


def stop_reader(child, results):
    results.close()  # it ends, if it has not, when it sends the next
    os.waitpid(child, 0)


def outcome(read, path):
    """read(path), or the DataError that it ends in."""
    try:
        with naming(path, "cannot be read"):
            result = read(path)
            check_size(path, len(pickle.dumps(result)))
            return result
    except DataError as error:
        return error


@contextmanager
def naming(path, what, kind=DataError):
    """Whatever a file's bytes make Python raise becomes an error that names the file.

    numpy warns of nothing meanwhile: any numbers may stand there.
    """
    try:
        with np.errstate(all="ignore"):
            yield
    except Exception as error:  # of any kind: the bytes are anybody's
        if isinstance(error, (kind, Refused)) and str(path) in str(error):
            raise  # it is one already
        if isinstance(error, Refused):
            raise Refused(
                f"{path}: refused, the pickle asks for {error}; a label or pose file needs nothing "
                "but arrays and plain containers. If you trust who made it, convert it there:\n"
                f"  data = pickle.load(open({path.name!r}, 'rb'))\n"
                f"  np.savez('{path.stem}.npz', keypoints=np.float32(data['keypoints']), "
                "scores=np.float32(data['scores']))"
            ) from None
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise kind(f"{path}: {what} ({reason:.400})") from error


def check_size(path, size):
    if size > MAX_BYTES:
        raise DataError(f"{path}: holds {size:,} bytes, over {MAX_BYTES:,}; is it the right file?")


def read_bytes(path, missing="no such pose file"):
    if not os.path.isfile(path):
        raise DataError(f"{path}: {missing}")
    check_size(path, path.stat().st_size)
    raw = path.read_bytes()
    if not raw:
        raise DataError(f"{path}: an empty file")
    return raw


class Stored:
    """What numpy's dtype or array was pickled from; np.asarray makes an array of plain numbers.

    numpy's own reconstructors are never called: with made-up bytes they are not safe.
    """

    def __init__(self, *given):
        self.given = given

    def __setstate__(self, state):
        self.state = state

    def __array__(self, dtype=None, copy=None):
        _, shape, kind, in_columns, data = self.state
        return plain_array(data, kind, shape, "F" if in_columns else "C")


def plain_array(data, kind, shape, order):
    """An array from its bytes and what its dtype was pickled from; protocol 5 writes just these."""
    code = kind.state[1] + kind.given[0]  # byte order, and what an element is
    if np.dtype(code).kind not in "biufSU":
        raise Refused(f"an array of dtype {code}")
    return np.frombuffer(data, code).reshape(shape, order=order)


def plain_number(kind, data):
    return plain_array(data, kind, (), "C")[()]


def encode_latin1(text, encoding):
    """Protocols 0 to 2 write an array's bytes as text."""
    return text.encode("latin1")


class SafeUnpickler(pickle.Unpickler):
    """Builds arrays and plain containers; what else a pickle names is refused uncalled."""

    ALLOWED = {
        "numpy.ndarray": Stored,
        "numpy.dtype": Stored,
        "numpy.core.multiarray._reconstruct": Stored,
        "numpy.core.multiarray.scalar": plain_number,
        "numpy.core.numeric._frombuffer": plain_array,
        "_codecs.encode": encode_latin1,
        "builtins.bytearray": bytearray,
        "builtins.set": set,
        "collections.OrderedDict": dict,
    }

    def find_class(self, module, name):
        """Under the names of numpy 1 and of Python 2, too."""
        # one list for all writers of pickles
        known = f"{module}.{name}"
        known = known.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        if known not in self.ALLOWED:
            raise Refused(f"{module}.{name}")
        return self.ALLOWED[known]


# ------------------------------------------------------------------------------- the built-in demo

# Word classes in the order of the text: how often one is there, what stands around it, its words.
DEMO_WORDS = {
    "time": (0.6, "{}", "今天 明天 昨天"),
    "subject": (1, "{}", "我 你 他 妈妈 老师 朋友"),
    "place": (0.5, "在{}", "学校 家 商店 医院"),
    "not": (0.3, "{}", "不"),
    "verb": (1, "{}", "买 找 看 喜欢 要 卖"),
    "adjective": (0.5, "{}的", "大 小 红 新"),
    "object": (1, "{}", "书 水 花 车 鱼 苹果 衣服 手机 电脑"),
    "question": (0.3, "{}？", "吗"),
}
DEMO_SIGNS = "time place subject object adjective verb not question"  # their order
DEMO_SPLITS = {"train": 1600, "dev": 120, "test": 120}
# Points are up + 1j * right, in shoulder widths from the neck: to turn is to multiply, to mirror is
# to conjugate. A hand is its wrist, the turn of its palm, and how straight each finger is.
DEMO_HEAD = [0.55, 0, 0, 0.57 + 0.17j, 0.57 - 0.17j, 0.5j, -0.5j]  # nose to shoulders, no eyes
DEMO_REST = np.array([-1.6 + 0.6j, 1, *[0.6] * 5])  # the left hand; conjugated: the right one
# the fingers' directions, thumb to little finger, of the left hand and of the right one
DEMO_FAN = np.exp(0.3j * np.outer([-1, 1], np.arange(-2, 3)))  # (2, 5)


def make_demo_corpus(data_dir, seed=0, splits=None):
    """Write a synthetic corpus in the real on-disk format -> data_dir as a Path.

    Signs differ in hand shape, place and path, some use both hands; the text's word order is not
    the signs'; signers differ in size, place, tilt, speed and noise; hands drop out. No dev or test
    sentence is in train. splits gives clips a split. The same seed gives the same corpus; the
    folder appears whole or not at all. Raises DataError where one is in use.
    """
    data_dir = Path(data_dir)
    splits = splits or DEMO_SPLITS
    rng = np.random.default_rng(seed)
    if data_dir.is_file() or any(data_dir.glob("*")):
        raise DataError(f"{data_dir}: is there and not an empty folder; remove it or name another")
    # as many different sentences as all splits need: none is in two
    sentences = {}
    while len(sentences) < sum(splits.values()):
        sentences.update([demo_sentence(rng)])  # by their texts: none comes twice
    rows = iter(sentences.items())
    signs = demo_signs()
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir.parent, prefix=".demo") as aside:
        corpus = Path(aside, "corpus")
        poses = corpus / "pose_format"
        poses.mkdir(parents=True)
        for split, count in splits.items():
            labels = {}
            for number in range(count):
                text, gloss = next(rows)
                name = f"{split}_{number:05d}"
                clip = demo_clip([signs[word] for word in gloss], rng)
                (poses / f"{name}.pkl").write_bytes(pickle.dumps(clip))
                labels[name] = {"name": name, "gloss": gloss, "text": text}
            path = corpus / f"labels.{split}"
            path.write_bytes(gzip.compress(pickle.dumps(labels), mtime=0))
        # whole or not at all
        os.replace(corpus, data_dir)
    return data_dir


def demo_sentence(rng):
    """One random sentence: (text in word order, gloss in sign order)."""
    text = ""
    words = {}
    for kind, (chance, form, choice) in DEMO_WORDS.items():
        if rng.random() < chance:
            words[kind] = str(rng.choice(choice.split()))
            text += form.format(words[kind])
    return text, [words[kind] for kind in DEMO_SIGNS.split() if kind in words]


def demo_signs():
    """{word: (2, 14)}: left and right hand where the sign begins and ends, whatever the seed."""
    rng = np.random.default_rng(20247)
    signs = {}
    for _, _, choice in DEMO_WORDS.values():
        for word in choice.split():
            begin = complex(rng.uniform(-1, 0.5), rng.uniform(-0.7, 0.2))
            end = begin + rng.uniform(0, 0.5) * np.exp(2j * np.pi * rng.random())
            palm = np.exp(1j * rng.uniform(-1.2, 1.2))
            fingers = rng.integers(1, 4, 5) / 3  # bent, half bent, straight
            right = np.array([[begin, palm, *fingers], [end, palm, *fingers]])  # (2, 7)
            # some signs need both hands
            left = right.conj() if rng.random() < 0.5 else [DEMO_REST, DEMO_REST]
            signs[word] = np.hstack([left, right])
    return signs


def demo_clip(signs, rng):
    """Signs one after another by one random signer -> a pose file's content."""
    # what the hands are to do, and when
    rest = np.hstack([DEMO_REST, DEMO_REST.conj()])
    keys = np.vstack([rest, *signs, rest])  # (2 signs + 2, 14)
    times = np.cumsum(rng.uniform(3, 5, len(keys)))
    frames = np.arange(times[0], times[-1], rng.uniform(0.8, 1.25))  # the signer's speed
    track = np.stack([np.interp(frames, times, key) for key in keys.T], -1)  # (T, 14)
    hands = track.reshape(-1, 2, 7)  # (T, 2, 7)

    # joints; legs and face, which nothing reads, stay a dot
    points = np.zeros((len(frames), JOINTS), complex)  # (T, 133)
    points[:, :7] = DEMO_HEAD
    wrists = hands[..., 0]  # (T, 2)
    points[:, 9:11] = wrists
    points[:, 7:9] = (DEMO_HEAD[5:] + wrists) / 2 - 0.25  # elbows
    fingers = (hands[..., 1:2] * hands[..., 2:] * DEMO_FAN)[..., None]  # (T, 2, 5, 1)
    fingers = (fingers * 0.08 * np.arange(1, 5)).reshape(-1, 40)  # (T, 40)
    points[:, 91:] = wrists.repeat(21, 1)  # (T, 42)
    points[:, LEFT[1:] + RIGHT[1:]] += fingers

    # the signer's size, tilt and place; the detector's noise
    size = rng.uniform(0.14, 0.26)
    points = points * size * np.exp(1j * rng.uniform(-0.14, 0.14))  # up to 8 degrees
    points += complex(-rng.uniform(0.25, 0.4), rng.uniform(0.4, 0.6))
    keypoints = np.stack([points.imag, -points.real], -1)
    keypoints += rng.normal(0, size * rng.uniform(0.004, 0.012), keypoints.shape)
    scores = rng.uniform(0.7, 1.0, points.shape)
    begin = rng.integers(len(points))  # for three frames a hand drops out
    scores[begin : begin + 3, rng.choice([LEFT, RIGHT])] = 0.1
    # with the person axis, as Uni-Sign has it
    return {
        "keypoints": np.float32(keypoints)[:, None],
        "scores": np.float32(scores)[:, None],
    }
