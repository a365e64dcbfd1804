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

import train_lite
from datasets_lite import load_part_kp

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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

    def marks(count, x, y):
        spread = 0.02 * rng.standard_normal((count, 2))
        return SimpleNamespace(
            landmark=[SimpleNamespace(x=x + a, y=y + b, visibility=0.9) for a, b in spread]
        )

    body = marks(33, 0.5, 0.4)
    hand = marks(21, 0.3, 0.6)
    body.landmark[16] = hand.landmark[0]  # the right wrist
    frames = [
        SimpleNamespace(pose_landmarks=body, left_hand_landmarks=None, right_hand_landmarks=hand),
        SimpleNamespace(pose_landmarks=None, left_hand_landmarks=None, right_hand_landmarks=None),
    ]
    keypoints, scores = space["from_holistic"](frames, 640, 480)
    assert keypoints.shape == (2, 133, 2) and scores.shape == (2, 133)
    assert np.array_equal(keypoints[0, 10], keypoints[0, 112]), (
        "the wrist is the hand's first joint"
    )
    parts = load_part_kp(keypoints, scores)
    assert (
        parts["right"][0, :, 2].min() > 0 and not parts["left"].any() and not parts["body"][1].any()
    )


def commands():
    """Every command line in the README's bash blocks, a list of words each."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if "python" in words:
                found.append(words[words.index("python") :])
            elif words[:1] == ["torchrun"]:
                found.append(["python", *words[2:]])
    return found


TRAIN_COMMANDS = [words[2:] for words in commands() if words[1] == "train_lite.py"]
TOOLS = [words[1:] for words in commands() if words[1].startswith("tests/tools/")]


@pytest.mark.parametrize("words", TRAIN_COMMANDS, ids=" ".join)
def test_the_command_line_takes_what_the_readme_gives(words):
    """argparse exits where a command, a flag or a value is not known."""
    command = words[0] if words and words[0] in train_lite.COMMANDS else "train"
    rest = words[1:] if words and words[0] == command else words
    args = train_lite.make_parser(command).parse_args(rest)
    flags = [word for word in rest if word.startswith("--")]
    assert len(vars(args)) >= len(flags)


@functools.cache
def usage(script):
    """What a script's --help prints."""
    arguments = [sys.executable, ROOT / script, "--help"]
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("words", TOOLS, ids=" ".join)
def test_the_tools_that_the_readme_names_know_their_flags(words):
    script, *rest = words
    assert (ROOT / script).is_file()
    if script.endswith("figures.py"):
        pytest.importorskip("matplotlib", reason="pip install matplotlib")
    for word in rest:
        named = word.startswith("--") or not (word.isupper() or "." in word or "/" in word)
        assert not named or word.isdigit() or word in usage(script), f"{word} in {script} --help"
