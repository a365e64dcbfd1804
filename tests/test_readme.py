"""The README's own snippets and commands, run as they stand there."""

import functools
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser as make_torchrun_parser

import train_lite
from datasets_lite import load_part_kp

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
    exec(snippet("np.savez"), {})
    assert train_lite.main(["check", "--data_dir", "data/mine", "--mt5_path", ""]) == 0
    assert "no errors" in capsys.readouterr().out


def test_the_snippet_for_mediapipe_keeps_hands_at_their_wrists():
    space = {}
    exec(snippet("from_holistic"), space)
    rng = np.random.default_rng(0)

    def landmarks_near(x, y, count):
        points = [x, y] + 0.02 * rng.standard_normal((count, 2))
        landmarks = [SimpleNamespace(x=px, y=py, visibility=0.9) for px, py in points]
        return SimpleNamespace(landmark=landmarks)

    body = landmarks_near(0.5, 0.4, count=33)
    hand = landmarks_near(0.3, 0.6, count=21)
    body.landmark[16] = hand.landmark[0]  # the right wrist
    frames = [
        SimpleNamespace(pose_landmarks=body, left_hand_landmarks=None, right_hand_landmarks=hand),
        SimpleNamespace(pose_landmarks=None, left_hand_landmarks=None, right_hand_landmarks=None),
    ]
    keypoints, scores = space["from_holistic"](frames, 640, 480)
    assert keypoints.shape == (2, 133, 2)
    assert scores.shape == (2, 133)
    assert np.array_equal(keypoints[0, 10], keypoints[0, 112]), (
        "the wrist is the hand's first joint"
    )
    parts = load_part_kp(keypoints, scores)
    assert parts["right"][0, :, 2].min() > 0
    assert not parts["left"].any()
    assert not parts["body"][1].any()


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
        train_lite.make_parser(command).parse_args(arguments[1:])
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


def takes(parser, flag):
    """Whether a parser of train_lite.py knows this flag, whatever value would follow it."""
    try:
        _, not_taken = parser.parse_known_args(["RUN", "CLIP", flag])
    except SystemExit:  # "expected one argument"
        return True
    return flag not in not_taken


def test_every_option_that_the_readme_names_exists():
    """In its text, too, where a flag stands without its command."""
    parsers = [train_lite.make_parser(command) for command in train_lite.COMMANDS]
    torchrun_help = make_torchrun_parser().format_help()
    others = {"--no-index", "--patience"}  # git's
    others.add("--field")  # any
    others |= words_of_script_help("tests/tools/ablations.py") | words_of(torchrun_help)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert named, "the README names no flag at all: the test finds them no longer"
    unknown = []
    for flag in sorted(named - others):
        if not any(takes(parser, flag) for parser in parsers):
            unknown.append(flag)
    assert not unknown, f"no program takes {unknown}"
