"""The README's own snippets and commands, run as they stand there."""

import functools
import re
import shlex
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser as make_torchrun_parser

import train_lite
from datasets_lite import load_part_kp, load_pose_file

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language):
    """What stands between ```language and ```."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def command_lines():
    """Every command of the README's bash blocks as a list of words, comments left out."""
    commands = []
    for line in "".join(code_blocks("bash")).splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words and words not in commands:
                commands.append(words)
    return commands


SNIPPETS = code_blocks("python")
COMMAND_LINES = command_lines()


def snippet(word):
    """The one snippet that holds this word."""
    found = [text for text in SNIPPETS if word in text]
    assert len(found) == 1, f"{len(found)} snippets with {word!r}"
    return found[0]


def test_the_snippet_for_own_videos_makes_a_corpus_that_check_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(snippet("np.random.rand"), {})
    assert train_lite.main(["check", "--data_dir", "data/mine", "--mt5_path", ""]) == 0
    assert "no errors" in capsys.readouterr().out


# ------------------------------------------------------------ poses from video

WIDTH, HEIGHT = 640, 480


def stand_in(monkeypatch, name, **content):
    """A module of this name for the snippets to import, with no more than this in it."""
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def stand_in_video(monkeypatch, length):
    """A cv2 whose only video is clip_0.mp4, its frame t all (t, 0, 0) in OpenCV's order: blue."""

    class VideoCapture:
        def __init__(self, path):
            assert path == "clip_0.mp4"
            self.pictures = [
                np.full((HEIGHT, WIDTH, 3), (t, 0, 0), dtype=np.uint8) for t in range(length)
            ]

        def read(self):
            return (True, self.pictures.pop(0)) if self.pictures else (False, None)

    def cvtColor(picture, code):
        assert code == "BGR to RGB"
        return picture[..., ::-1]

    stand_in(
        monkeypatch, "cv2", VideoCapture=VideoCapture, cvtColor=cvtColor, COLOR_BGR2RGB="BGR to RGB"
    )


def stand_in_mediapipe(monkeypatch, form, video):
    """A mediapipe of the old form (solutions) or the new one (tasks); video: parts seen a frame."""

    def landmarks(part, seen):
        # MediaPipe's joint i lies at x = i / 64, and each part in a row of its own
        count, y, visibility = {
            "pose": (33, 0.5, 0.75),
            "left_hand": (21, 0.25, 0.0),
            "right_hand": (21, 0.125, 0.0),
        }[part]
        marks = [SimpleNamespace(x=i / 64, y=y, visibility=visibility) for i in range(count)]
        if form == "old":
            return SimpleNamespace(landmark=marks) if seen else None
        return marks if seen else []

    def results_of(picture):
        t = picture[0, 0, 2]  # blue comes last in RGB
        parts = ("pose", "left_hand", "right_hand")
        return SimpleNamespace(
            **{f"{part}_landmarks": landmarks(part, part in video[t]) for part in parts}
        )

    class Holistic:
        process = staticmethod(results_of)

        def close(self):
            pass

    class HolisticLandmarker:
        @classmethod
        def create_from_model_path(cls, path):
            assert path == "holistic_landmarker.task"
            return cls()

        def detect(self, image):
            assert image.image_format == "RGB"
            return results_of(image.data)

        def close(self):
            pass

    if form == "old":
        holistic = SimpleNamespace(Holistic=Holistic)
        stand_in(monkeypatch, "mediapipe", solutions=SimpleNamespace(holistic=holistic))
    else:
        stand_in(
            monkeypatch,
            "mediapipe",
            tasks=SimpleNamespace(vision=SimpleNamespace(HolisticLandmarker=HolisticLandmarker)),
            Image=SimpleNamespace,
            ImageFormat=SimpleNamespace(SRGB="RGB"),
        )


COCO_OF_MEDIAPIPE = {  # left is the signer's own left in both
    0: 0,  # nose
    2: 1,  # left eye
    5: 2,
    7: 3,  # left ear
    8: 4,
    11: 5,  # left shoulder
    12: 6,
    13: 7,  # left elbow
    14: 8,
    15: 9,  # left wrist
    16: 10,
    23: 11,  # left hip
    24: 12,
}


@pytest.mark.parametrize("form", ["old", "new"])
def test_the_snippet_for_mediapipe_puts_each_joint_in_its_place(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video = [
        {"pose", "left_hand", "right_hand"},
        {"pose", "right_hand"},
        {"pose", "left_hand"},
        set(),  # nobody
        {"pose"},
    ]
    stand_in_video(monkeypatch, len(video))
    stand_in_mediapipe(monkeypatch, form, video)
    exec(snippet("import mediapipe"), {})
    keypoints, scores = load_pose_file(tmp_path / "clip_0.npz")
    assert keypoints.shape == (5, 133, 2)
    assert scores.shape == (5, 133)
    expected = np.zeros((5, 133, 3))  # x, y, score
    for source, target in COCO_OF_MEDIAPIPE.items():
        expected[[0, 1, 2, 4], target] = source / 64, 0.5, 0.75
    for joint in range(21):
        expected[[0, 2], 91 + joint] = joint / 64, 0.25, 1  # the left hand
        expected[[0, 1], 112 + joint] = joint / 64, 0.125, 1
    np.testing.assert_allclose(keypoints, expected[..., :2], atol=1e-6)
    np.testing.assert_array_equal(scores, expected[..., 2])
    with np.load("clip_0.npz") as stored:  # float32, pixels of a picture of this size
        assert {stored[name].dtype.name for name in ("keypoints", "scores")} == {"float32"}
        assert stored["w_h"].tolist() == [WIDTH, HEIGHT]
        assert stored["keypoints"][0, 10].tolist() == [160, 240]  # the right wrist: 16 / 64, 0.5
    parts = load_part_kp(keypoints, scores)
    assert parts["right"][1].any()
    assert not parts["left"][1].any()
    assert not parts["body"][3].any()


def test_the_snippet_for_rtmlib_takes_the_first_person_and_drops_no_frame(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    persons_seen = [2, 0, 1]

    class Wholebody:
        def __call__(self, picture):
            count = persons_seen[picture[0, 0, 0]]  # blue comes first in OpenCV's order
            keypoints = np.empty((count, 133, 2))
            for person in range(count):  # the second one stands 100 pixels to the right
                keypoints[person, :, 0] = np.arange(133) + 100 * person
                keypoints[person, :, 1] = 240
            scores = np.full((count, 133), 0.5)
            scores[:, 0] = 3.25
            return keypoints, scores

    stand_in_video(monkeypatch, len(persons_seen))
    stand_in(monkeypatch, "rtmlib", Wholebody=Wholebody)
    exec(snippet("import Wholebody"), {})
    keypoints, scores = load_pose_file(tmp_path / "clip_0.npz")
    assert keypoints.shape == (3, 133, 2)
    assert scores.shape == (3, 133)
    for t in (0, 2):
        np.testing.assert_allclose(keypoints[t, :, 0], np.arange(133) / WIDTH, atol=1e-6)
        np.testing.assert_allclose(keypoints[t, :, 1], 0.5, atol=1e-6)
        assert scores[t, 0] == 1, "a score above 1 is clipped"
        assert (scores[t, 1:] == 0.5).all()
    assert not keypoints[1].any()
    assert not scores[1].any()


@pytest.mark.parametrize("word", ["import mediapipe", "import Wholebody"])
def test_a_video_that_cannot_be_read_leaves_no_file(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_in_video(monkeypatch, 0)
    stand_in_mediapipe(monkeypatch, "old", [])
    stand_in(monkeypatch, "rtmlib", Wholebody=SimpleNamespace)
    with pytest.raises(AssertionError, match=r"clip_0\.mp4 cannot be read"):
        exec(snippet(word), {})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ commands and their flags

NOT_OURS = [
    "python -m venv .venv",
    ". .venv/bin/activate",
    "pip install -r requirements.txt",
    "python -m pytest -q tests",
]


def check_train_lite(arguments):
    """A command line of train_lite.py: argparse takes every flag, the configuration every value."""
    command = arguments[0] if arguments else ""
    if command in ("evaluate", "translate"):  # RUN need not exist here
        train_lite.make_parser(command).parse_args(arguments)
    else:
        train_lite.parse(arguments)


def words_of(help_text):
    """The words of a --help, without commas and the brackets of the usage line."""
    return set(re.split(r"[\s,\[\]]+", help_text))


@functools.cache
def words_of_script_help(script):
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
    )
    return words_of(done.stdout)


def check_script(script, arguments):
    """A command line of a script in tests/: it is there, and its --help names each flag."""
    if script.endswith("figures.py"):
        pytest.importorskip("matplotlib", reason="pip install matplotlib")
    assert (ROOT / script).is_file(), f"there is no {script}"
    flags = {word for word in arguments if word.startswith("--")}
    unknown = flags - words_of_script_help(script)
    assert not unknown, f"{script} --help does not name {unknown}"


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_every_command_of_the_readme_is_one_that_its_program_takes(words):
    program, *arguments = words
    if program == "python" and arguments[0] == "train_lite.py":
        check_train_lite(arguments[1:])
    elif program == "python" and arguments[0].startswith("tests/"):
        check_script(arguments[0], arguments[1:])
    elif program == "torchrun":
        given = make_torchrun_parser().parse_args(arguments)
        assert given.training_script == "train_lite.py"
        check_train_lite(given.training_script_args)
    else:
        assert " ".join(words) in NOT_OURS or program == "git"


def takes(command, flag):
    """Whether this command of train_lite.py knows the flag, whatever value would follow it."""
    try:
        parser = train_lite.make_parser(command)
        _, not_taken = parser.parse_known_args([command, "RUN", "CLIP", flag])
    except SystemExit:  # "expected one argument"
        return True
    return flag not in not_taken


def test_every_option_that_the_readme_names_exists():
    """In its text, too, where a flag stands without its command."""

    torchrun_help = make_torchrun_parser().format_help()
    others = {"--no-index", "--patience"}  # git's
    others.add("--field")  # any
    others |= words_of_script_help("tests/tools/ablations.py") | words_of(torchrun_help)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert named, "the README names no flag at all: the test finds them no longer"
    unknown = []
    for flag in sorted(named - others):
        if not any(takes(command, flag) for command in train_lite.COMMANDS):
            unknown.append(flag)
    assert not unknown, f"no program takes {unknown}"
