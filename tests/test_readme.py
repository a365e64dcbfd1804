"""The README's own snippets and commands, run as they stand there."""

import re
from types import SimpleNamespace

import numpy as np
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


def test_every_option_that_the_readme_names_exists():
    parser = train_lite.make_parser("check")
    known = {flag for action in parser._actions for flag in action.option_strings}
    known |= {"--split", "--nproc_per_node", "--json"}
    known |= set(
        re.findall(r'add_argument\("(--\w+)"', (ROOT / "tests" / "ablations.py").read_text("utf-8"))
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert named <= known, named - known
