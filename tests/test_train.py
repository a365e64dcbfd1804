"""The loop and the commands.

Scores, schedule, windows, checkpoints, signals, processes, and every exit code.
"""

import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    batch_of,
    entry,
    random_clip,
    save_sound,
    scratch_config,
    scratch_model,
    shared,
    without_dropout,
    write_labels,
    write_pose,
)

import datasets_lite
import train_lite
from config_lite import ConfigError, InferenceConfig, TrainConfig
from datasets_lite import (
    DataError,
    load_dataset_file,
)
from models_lite import SignLanguageLite, TextCodec, train_tokenizer
from train_lite import Place, Run, RunError, compute_metrics

TINY = [
    "--mt5_path=",
    "--d_model",
    "32",
    "--num_layers",
    "1",
    "--batch_size",
    "8",
    "--gradient_accumulation",
    "1",
    "--num_workers",
    "0",
    "--max_new_tokens",
    "8",
    "--val_interval",
    "2",
    "--max_steps",
]


def command(*arguments):
    """Exit code of a command line, in this process."""
    try:
        return train_lite.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def tiny_run(demo, out, steps, *more):
    return command("--data_dir", demo, "--output_dir", out, *TINY, steps, *more)


def run_python(program, *arguments, **options):
    """A program text in a Python of its own, started in the repository."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


def parameters(out):
    """The parameters in a run's last checkpoint."""
    return torch.load(Path(out) / "last.pt", weights_only=True)["model"]


def copied_parameters(model):
    """A model's parameters as they are now."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(one, two):
    """Between the tensors of the same name in two dictionaries."""
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def assert_equal_parameters(one, two, tolerance=0.0):
    one = parameters(one)
    two = parameters(two)
    assert one.keys() == two.keys()
    worst = largest_difference(one, two)
    assert worst <= tolerance, f"parameters differ by up to {worst:.2e}"


def read_jsonl(path):
    """The rows of a file that holds one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# The loop's own functions, in one place for whoever changes how they are called.


def run_of(model, dataset, **options):
    """A run of ten steps that is ready for its first epoch."""
    config = scratch_config(ctc_weight=0.5, max_steps=10, warmup_epochs=0, **options)
    run = Run(config, InferenceConfig(), Place(), total_steps=10)
    run.signals = SimpleNamespace(number=0)
    run.model = model
    run.net = model
    run.data = {"train": dataset}
    run.optimizers, run.schedulers = train_lite.make_optimizers(model, config, 10, 2)
    return run


def train_epoch(run):
    """The inner loop of `train_lite.train`."""
    for *batch, last in train_lite.rest_of_epoch(run):
        train_lite.micro_batch(run, *batch, last)
        if last:
            train_lite.optimiser_step(run)


def accumulate_one_window(run):
    """The gradient of the first window's summed loss, and the tokens that it is summed over."""
    for *batch, last in train_lite.rest_of_epoch(run):
        train_lite.micro_batch(run, *batch, last=False)
        if last:
            break
    return run.window["tokens"]


def epoch_plan(run, epoch=0):
    """The epoch's (number, clips, whether it counts)."""
    run.data["train"].begin_epoch(epoch)
    return train_lite.plan_epoch(run.data["train"], run.config)


def evaluation_loader(dataset, size):
    clips = train_lite.by_length(range(len(dataset)), dataset.lengths)
    return train_lite.make_loader(dataset, train_lite.cut(clips, size))


def test_evaluation_begins_with_the_longest_clips(clips):
    batches = train_lite.make_loader(clips).batch_sampler
    lengths = list(clips.lengths[sum(batches, [])])
    assert len(lengths) == len(clips)
    assert lengths == sorted(lengths, reverse=True), "memory fails in the first batch, not the last"


def text_scores(predictions, references, language):
    return train_lite.scores_and_baselines(predictions, references, language)


# ------------------------------------------------------------------------- scores


def test_published_predictions_score_as_published():
    """BLEU-4 25.27 is what Uni-Sign's paper prints for these very outputs."""
    folder = shared("unisign_csl_daily_dev")

    def text_of(line):
        """What follows the line's label; a prediction may hold ": " itself."""
        if "prediction:" in line:
            return line.split(": ", 2)[2]
        return line.split(": ")[-1]

    def read(name):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        return [text_of(line) for line in lines if line]

    predictions = read("predictions.txt")
    references = read("references.txt")
    scores = compute_metrics(predictions, references, "zh")
    found = [scores[f"bleu{n}"] for n in (1, 2, 3, 4)]
    assert found == pytest.approx([53.29, 40.56, 31.65, 25.27], abs=0.01), (
        f"{len(predictions)} lines: {found}"
    )
    assert "tok:zh" in scores["bleu_signature"]


def test_full_width_punctuation_counts_as_correct():
    """The original compared raw strings, and mT5's vocabulary gives half-width punctuation back."""
    assert compute_metrics(["你好,妈妈吃饭吗?"], ["你好，妈妈 吃饭吗？"])["exact_match"] == 100


def test_one_word_texts_have_no_bleu4_but_match():
    scores = compute_metrics(["moon", "star"], ["moon", "star"], "en")
    assert scores["exact_match"] == 100
    assert scores["bleu4"] == 0
    assert scores["chrf"] == pytest.approx(100)


def test_rouge_of_one_constant_sentence_is_high_on_csl_daily():
    """Which is why ROUGE proves nothing about the pose."""
    folder = shared("csl_daily_labels")
    train = [e["text"] for e in load_dataset_file(folder / "labels.train").values()]
    dev = [e["text"] for e in load_dataset_file(folder / "labels.dev").values()]
    most_frequent = sorted(set(train), key=train.count)[-3:]
    best = max(compute_metrics([text] * len(dev), dev)["rouge_l"] for text in most_frequent)
    assert best > 10, f"ROUGE-L {best:.1f}"


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="1 predictions for 2"):
        compute_metrics(["a"], ["a", "b"])


def test_exchanged_clips_never_keep_their_text():
    texts = ["a", "b", "a", "c", "a", "d", "e", "b"]
    order = train_lite.exchange(texts)
    assert sorted(order) == list(range(len(texts)))
    assert all(texts[i] != texts[j] for i, j in enumerate(order)), [texts[j] for j in order]
    # where one text has most clips, some must keep it
    texts = ["a", "a", "a", "b"]
    assert sum(texts[i] == texts[j] for i, j in enumerate(train_lite.exchange(texts))) == 2


def test_intervals_of_a_weak_model_do_not_fail():
    """Some resamples hold no match at all, which sacrebleu's own mean cannot take."""
    found = train_lite.intervals(["a b"] + ["zz"] * 15, ["a c"] + ["yes no"] * 15, "en")
    assert found.keys() == {"exact_match", "bleu4"}
    assert found["exact_match"] == "0.00 [0.00, 0.00]", found


def test_edit_distance_counts_each_kind_of_error():
    assert train_lite.edit_distance(["a", "x", "c", "d"], ["a", "b", "c"]) == 2
    assert train_lite.edit_distance([], ["a", "b"]) == 2


def collapse_warning(predictions, references, language="zh"):
    scores = text_scores(predictions, references, language)
    return train_lite.collapse_warning(scores, predictions)


def test_a_collapsed_model_is_named():
    references = [f"今天{a}买{b}。" for a in "我你他她" for b in "书水花车鱼"]
    collapsed = ["今天我买书。"] * len(references)
    assert "ignores the pose" in collapse_warning(collapsed, references)
    exchanged = references[7:] + references[:7]  # varied, but unrelated to the clips
    assert "ignores the pose" in collapse_warning(exchanged, references)


def test_a_corpus_of_fifteen_words_is_no_collapse():
    words = [f"word{letter}" for letter in "abcdefghijklmno"]
    references = words * 3
    assert collapse_warning(references, references, "en") == ""
    a_third_wrong = words * 2 + words[1:] + words[:1]
    assert collapse_warning(a_third_wrong, references, "en") == ""


def test_evaluation_covers_the_whole_split_and_weighs_tokens(clips):
    """The original scored about fifty predictions, and averaged the loss over batches.

    That loss had the smoothing in it, too.
    """
    model = scratch_model(clips, label_smoothing=0.1)
    found = []
    for size in (3, len(clips)):
        loader = evaluation_loader(clips, size)
        metrics, rows = train_lite.evaluate(model, loader, InferenceConfig(max_new_tokens=8))
        assert [row[0] for row in rows] == list(range(len(clips)))
        found.append(metrics)
    in_threes, all_at_once = found
    with torch.no_grad():
        singles = [model(*batch_of(clips, [i])) for i in range(len(clips))]
    tokens = sum(single.num_tokens for single in singles)
    nll = sum(float(single.nll) * single.num_tokens for single in singles) / tokens
    assert in_threes["dev_loss"] == pytest.approx(all_at_once["dev_loss"], rel=1e-5)
    assert in_threes["dev_loss"] == pytest.approx(nll, rel=1e-5), (
        "the plain nll, whatever the smoothing"
    )
    assert in_threes["exact_match"] == all_at_once["exact_match"]


# ------------------------------------------------------------------------- schedule, windows, steps


def test_schedule_warms_up_from_the_first_step_and_ends_at_min_lr(clips):
    """The original stepped it once an epoch: epoch 1 ran at the full rate before its warm-up."""
    config = TrainConfig(epochs=10, warmup_epochs=2, learning_rate=1e-3, min_lr=1e-5)
    (optimizer,), (scheduler,) = train_lite.make_optimizers(
        scratch_model(clips), config, total_steps=50, steps_per_epoch=5
    )
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(1e-4)  # a tenth of the peak: 2 epochs of 5 steps
    assert rates[4] == pytest.approx(5e-4)
    assert rates[9] == pytest.approx(1e-3)  # the peak
    assert rates[29] == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-3)  # half-way down the cosine
    assert rates[49] == pytest.approx(1e-5)


def test_the_loop_steps_the_schedule_at_every_optimiser_step(clips):
    """Not once an epoch, as the original did: what each step ran at, seen from inside the loop."""
    run = run_of(scratch_model(clips).train(), clips, batch_size=8, gradient_accumulation=1)
    rates = []

    def note_the_rate(optimizer, *_):
        rates.append(optimizer.param_groups[0]["lr"])

    run.optimizers[0].register_step_pre_hook(note_the_rate)
    train_epoch(run)
    assert len(rates) == 5
    assert rates == sorted(set(rates), reverse=True), rates


def test_norms_and_biases_do_not_decay(clips):
    model = scratch_model(clips)
    (optimizer,), _ = train_lite.make_optimizers(model, TrainConfig(), 10, 5)
    decay = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            decay[id(parameter)] = group["weight_decay"]
    for name, parameter in model.named_parameters():
        spared = name.endswith("bias") or "norm" in name
        assert decay[id(parameter)] == (0 if spared else 0.01), name


def test_accumulating_16_times_2_steps_like_1_times_32(clips):
    """A window's loss is one mean over its tokens, however it is divided.

    And it holds the same clips.
    """
    after = []
    for size, accumulation in ((32, 1), (2, 16)):
        model = without_dropout(scratch_model(clips, ctc_weight=0.5))
        before = copied_parameters(model)
        run = run_of(model, clips, batch_size=size, gradient_accumulation=accumulation)
        run.total_steps = 1
        train_epoch(run)
        after.append(copied_parameters(model))
        assert run.step == 1
    large_batch, accumulated = after
    moved = largest_difference(large_batch, before)
    apart = {name: (large_batch[name] - accumulated[name]).abs() for name in before}
    # AdamW's first step is the gradient's sign: where a gradient is rounding noise the two may part
    parted = sum(int((difference > 1e-5).sum()) for difference in apart.values())
    total = sum(parameter.numel() for parameter in before.values())
    worst = max(apart, key=lambda name: float(apart[name].max()))
    assert parted <= 1e-3 * total, (
        f"{parted} of {total} parameters part, "
        f"by up to {float(apart[worst].max()):.1e} of {moved:.1e} ({worst})"
    )


def test_accumulated_gradients_equal_the_large_batch(clips):
    gradients = []
    for size, accumulation in ((32, 1), (2, 16)):
        model = without_dropout(scratch_model(clips, ctc_weight=0.5))
        run = run_of(model, clips, batch_size=size, gradient_accumulation=accumulation)
        tokens = accumulate_one_window(run)
        gradients.append(
            {
                name: parameter.grad / tokens
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        )
    scale = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    worst = largest_difference(gradients[0], gradients[1])
    assert worst < 1e-5 * scale, f"{worst:.2e} of {scale:.2e}"


def test_the_last_short_window_is_stepped_and_leaves_no_gradient(clips):
    """40 clips in windows of 32: the original neither stepped nor cleared the 8 left over."""
    run = run_of(scratch_model(clips).train(), clips, batch_size=8, gradient_accumulation=4)
    train_epoch(run)
    assert run.step == 2
    assert (run.epoch, run.batch) == (1, 0), "the next epoch is due"
    assert all(p.grad is None for p in run.model.parameters())


def test_a_step_that_is_not_finite_is_skipped_by_name(clips, capsys):
    run = run_of(scratch_model(clips).train(), clips, batch_size=20, gradient_accumulation=1)
    before = copied_parameters(run.model)
    run.net = LossIsNotANumber(run.model)
    train_epoch(run)
    assert run.skipped == 2
    after = copied_parameters(run.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert clips.entries[0]["name"] in capsys.readouterr().err
    with pytest.raises(RunError, match="10 steps in a row"):
        for epoch in range(1, 9):
            run.epoch = epoch
            run.batch = 0
            run.total_steps = 99
            train_epoch(run)


class LossIsNotANumber(torch.nn.Module):
    """A model whose loss is NaN for every batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        output = self.model(*batch)
        output.loss = output.loss * math.nan
        return output


# ------------------------------------------------------------------------- a run and its folder


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory):
    """A finished run of 12 steps, with augmentation."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert tiny_run(demo, out, 12, "--augment", "--gradient_accumulation", 2) == 0
    return out


def test_a_run_writes_what_the_contract_says(finished):
    lines = read_jsonl(finished / "metrics.jsonl")
    wanted = {
        "epoch",
        "step",
        "train_loss",
        "dev_loss",
        "dev_accuracy",
        "bleu1",
        "bleu2",
        "bleu3",
        "bleu4",
        "chrf",
        "rouge_l",
        "exact_match",
        "unique_ratio",
        "shuffled_bleu4",
        "lr",
        "clips_per_second",
        "peak_memory_gb",
        "gloss_wer",
    }
    assert all(wanted <= line.keys() for line in lines), wanted - lines[0].keys()
    assert lines[0]["step"] == 0 and lines[-1]["step"] == 12
    assert lines[-1]["dev_loss"] < lines[0]["dev_loss"], (
        f"{lines[0]['dev_loss']:.3f} -> {lines[-1]['dev_loss']:.3f}"
    )
    names = {path.name for path in finished.rglob("*")}
    assert {
        "config.json",
        "last.pt",
        "predictions_dev.txt",
        "model.safetensors",
        "metrics.json",
    } <= names, names
    highest = max(line["bleu4"] for line in lines) / 100
    error = (highest * (1 - highest) / lines[0]["dev_clips"]) ** 0.5
    best = [line for line in lines if line["bleu4"] / 100 >= highest - error][-1]
    assert json.loads((finished / "best" / "metrics.json").read_text()) == best
    assert not list(finished.rglob("*.part"))


def test_bleu_of_an_order_that_no_reference_reaches_tells_nothing():
    """Smoothing gives long garbage a BLEU-4 above the right words' 0.

    Step 0 would have been the best.
    """
    words = ["sun", "moon", "star"]
    garbage = ["sun sun sun sun sun"] * 3
    for predictions in (words, garbage):
        scores = text_scores(predictions, words, "en")
        for name in ("bleu2", "bleu3", "bleu4", "shuffled_bleu4"):
            assert scores[name] == 0, name
    assert compute_metrics(garbage, words, "en")["bleu4"] > 0, "or the test shows nothing"
    reached = text_scores(["a b c d"], ["a b c d"], "en")
    assert reached["bleu4"] == pytest.approx(100), "a reference that reaches it is scored as before"


def times_of_change(folder):
    """Of all that is in a run's folder, the lock apart."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def test_a_finished_run_changes_nothing(demo, finished, capsys):
    before = times_of_change(finished)
    assert tiny_run(demo, finished, 12, "--augment", "--gradient_accumulation", 2) == 0
    assert "finished" in capsys.readouterr().out
    assert times_of_change(finished) == before


def test_a_larger_budget_goes_on(demo, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    assert tiny_run(demo, out, 14, "--augment", "--gradient_accumulation", 2) == 0
    assert f"resumed from {out}/last.pt at step 12" in capsys.readouterr().out


def test_another_configuration_never_writes_over_a_run(
    demo, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo, "corpus")
    flags = ["--data_dir", "corpus", *TINY]
    assert command(*flags, 2) == 0
    assert command(*flags, 2, "--label_smoothing", 0.1) == 0
    assert "label_smoothing: 0.0 -> 0.1" in capsys.readouterr().out
    assert Path("checkpoints/corpus-2/last.pt").is_file()
    assert command(*flags, 2, "--auto_resume", "false") == 0
    assert Path("checkpoints/corpus-3/last.pt").is_file()
    assert command(*flags, 2, "--label_smoothing", 0.1) == 0
    assert "corpus-2: this run is finished" in capsys.readouterr().out
    assert command(*flags, 2, "--output_dir", finished) == 1
    assert "gradient_accumulation: 2 -> 1" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "micro_batches",
    [
        3,  # in the middle of a window
        7,  # in the second epoch
        17,  # in the fourth, with joined clips and an average of more than the last step
    ],
)
def test_resuming_equals_an_uninterrupted_run(
    demo, finished, tmp_path, monkeypatch, workers, micro_batches
):
    original = train_lite.micro_batch
    seen = []

    def interrupted(run, *batch):
        original(run, *batch)
        seen.append(1)
        if len(seen) == micro_batches:
            os.kill(os.getpid(), signal.SIGTERM)

    def learning_curve(folder):
        figures = ("step", "train_loss", "dev_loss", "bleu4")
        curve = []
        for row in read_jsonl(folder / "metrics.jsonl"):
            curve.append({name: row[name] for name in figures if name in row})
        return curve

    monkeypatch.setattr(train_lite, "micro_batch", interrupted)
    out = tmp_path / "run"
    flags = ["--augment", "--gradient_accumulation", 2, "--num_workers", workers]
    assert tiny_run(demo, out, 12, *flags) == 128 + signal.SIGTERM
    assert tiny_run(demo, out, 12, *flags) == 0
    assert_equal_parameters(out, finished)
    whole, again = (train_lite.load_checkpoint(run / "last.pt") for run in (finished, out))
    averages = list(zip(whole["average"], again["average"], strict=True))
    assert averages
    assert all(torch.equal(*pair) for pair in averages)
    assert learning_curve(out) == learning_curve(finished)


TWO_SIGNALS = """
    import os, signal
    import train_lite

    with train_lite.Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""


def test_a_second_signal_ends_at_once():
    done = run_python(TWO_SIGNALS)
    assert done.returncode == 128 + signal.SIGINT
    assert "stopping" in done.stderr
    assert not done.stdout


HOLDS_THE_LOCK = """
    import sys
    from pathlib import Path
    import train_lite

    with train_lite.lock_folder(Path(sys.argv[1])):
        print("locked", flush=True)
        input()  # until this process is killed
"""


def test_a_second_process_in_one_folder_is_refused(demo, tmp_path, capsys):
    pytest.importorskip("fcntl")
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDS_THE_LOCK), tmp_path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        holder.stdout.readline()
        assert tiny_run(demo, tmp_path, 2) == 1
        assert "another process is training" in capsys.readouterr().err
        holder.kill()
    assert tiny_run(demo, tmp_path, 2) == 0  # a lock dies with its process


WRITES_SMALL_FILES_ONLY = """
    import resource, sys
    import train_lite

    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(train_lite.main(sys.argv[2:]))
"""


def test_a_full_disk_keeps_the_last_checkpoint_whole(demo, finished, tmp_path):
    pytest.importorskip("resource")
    out = shutil.copytree(finished, tmp_path / "run")
    before = parameters(out)
    limit = int(0.8 * (out / "last.pt").stat().st_size)
    flags = [
        "--data_dir",
        demo,
        "--output_dir",
        out,
        *TINY,
        14,
        "--augment",
        "--gradient_accumulation",
        2,
    ]
    done = run_python(WRITES_SMALL_FILES_ONLY, limit, *flags)
    assert done.returncode == 1, done.stderr
    assert f"could not write {out}/last.pt" in done.stderr
    assert "Is the disk full?" in done.stderr
    assert "Traceback" not in done.stderr
    after = parameters(out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(out.rglob("*.part"))


def test_an_original_checkpoint_is_refused_with_the_reason(demo, tmp_path, capsys):
    original = tmp_path / "checkpoint_epoch_3.pth"
    original.write_bytes(b"x")
    assert tiny_run(demo, tmp_path / "run", 2, "--resume", original) == 1
    assert "original scripts" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_an_error(demo, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    whole = (out / "last.pt").read_bytes()
    for damaged in (whole[:1000], b"", b"\x80\x04garbage"):
        (out / "last.pt").write_bytes(damaged)
        assert tiny_run(demo, out, 14, "--augment", "--gradient_accumulation", 2) == 1
        assert "not a readable checkpoint" in capsys.readouterr().err


class TouchesAFile:
    """What a stranger's checkpoint may hold: it touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    save_sound({"model": TouchesAFile(tmp_path / "ran")}, tmp_path / "last.pt")
    with pytest.raises(RunError, match="not a readable checkpoint.*UnpicklingError"):
        train_lite.load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()


def test_last_pt_holds_plain_data_only(finished):
    state = torch.load(finished / "last.pt", weights_only=True)
    assert {
        "model",
        "optimizer",
        "epoch",
        "batch",
        "history",
        "config",
        "made_of",
    } <= state.keys()


@pytest.mark.parametrize("muon, off", [("false", 1e-5), ("true", 1e-4)])
def test_two_processes_train_like_one(demo, tmp_path, muon, off):
    """Two gloo processes and one with the same windows: parameters within 1e-5, metrics equal.

    torch's Muon rounds to bf16 on its way, so that a last bit counts for more.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    # without clipping, which would hide a gradient of the wrong scale
    steps = [4, "--batch_size", 4, "--max_grad_norm", 0, "--muon", muon]
    assert tiny_run(demo, one, *steps, "--gradient_accumulation", 4) == 0
    flags = ["--data_dir", demo, "--output_dir", two, *TINY, *steps, "--gradient_accumulation", 2]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
            str(ROOT / "train_lite.py"),
            *map(str, flags),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_parameters(one, two, off)
    alone = read_jsonl(one / "metrics.jsonl")[-1]
    together = read_jsonl(two / "metrics.jsonl")[-1]
    for key in ("bleu4", "chrf", "exact_match", "dev_accuracy", "shuffled_bleu4", "unique_ratio"):
        assert alone[key] == together[key], key
    assert alone["train_loss"] == pytest.approx(together["train_loss"], rel=off), (
        "tokens of all processes"
    )


# ------------------------------------------------------------------------- the other commands


def test_evaluate_on_dev_repeats_best_exactly(demo, finished, capsys):
    assert command("evaluate", finished, "--split", "dev") == 0
    lines = capsys.readouterr().out.splitlines()
    best = json.loads((finished / "best" / "metrics.json").read_text())
    again = json.loads((finished / "metrics_dev.json").read_text())
    assert lines[0].startswith(f"exact_match {best['exact_match']:.2f} [")
    for key in again.keys() & best.keys():
        assert again[key] == best[key], key


def test_translate_reports_a_bad_clip_and_goes_on(demo, finished, tmp_path, capsys):
    clip = demo / "pose_format" / "dev_00000.pkl"
    bad = tmp_path / "bad.pkl"
    bad.write_bytes(b"nothing")
    assert command("translate", finished, clip, bad, clip) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"{clip}\t")
    assert "bad.pkl" in printed.err
    predicted = (finished / "predictions_dev.txt").read_text().splitlines()[1].split("\t")
    assert command("translate", finished / "best", clip) == 0
    assert predicted[0] == "dev_00000"


def test_best_works_alone(finished, demo, tmp_path, capsys):
    """On a machine that has nothing but best/ and a clip."""
    best = shutil.copytree(finished / "best", tmp_path / "elsewhere")
    clip = demo / "pose_format" / "dev_00001.pkl"
    assert command("translate", best, clip) == 0
    assert capsys.readouterr().out.startswith(f"{clip}\t")


def spoil_corpus(folder):
    """Add clips with a fault each, and a label file that is none; the names of all of them."""
    keypoints, scores = random_clip(20)
    joints_134 = [0, *range(133)]
    raw = {
        "unreadable": b"\x80\x04nonsense",
        "empty": b"",
        "no_scores": pickle.dumps({"keypoints": keypoints}),
    }
    clips = {
        "joints_17": {"keypoints": keypoints[:, :17], "scores": scores[:, :17]},
        "joints_134": {"keypoints": keypoints[:, joints_134], "scores": scores[:, joints_134]},
        "all_zero": {"keypoints": keypoints * 0, "scores": scores * 0},
        "all_nan": {"keypoints": keypoints * math.nan, "scores": scores},
        "unlike_lengths": {"keypoints": keypoints, "scores": scores[:5]},
        "start_after_end": {"keypoints": keypoints, "scores": scores, "start": 9, "end": 3},
    }
    for name, content in raw.items():
        (folder / "pose_format" / f"{name}.pkl").write_bytes(content)
    for name, content in clips.items():
        write_pose(folder / "pose_format" / f"{name}.pkl", **content)
    labels = {name: entry(name) for name in [*raw, *clips, "missing"]}
    labels["climbs"] = entry("climbs", pose="../../outside.pkl")
    labels["no_text"] = entry("no_text", text="  ")
    sound = load_dataset_file(folder / "labels.train")
    write_labels(folder / "labels.train", labels | sound)
    (folder / "labels.test").write_bytes(b"not labels")
    return [*labels, "labels.test"]


def test_check_names_every_fault_of_a_spoiled_corpus(demo, tmp_path, capsys):
    folder = shutil.copytree(demo, tmp_path / "spoiled")
    faults = spoil_corpus(folder)
    assert command("check", "--data_dir", folder, "--mt5_path=") == 1
    printed = capsys.readouterr()
    missed = [name for name in faults if name not in printed.err]
    assert not missed, f"not named: {missed}\n{printed.err}"
    assert "13 errors" in printed.out, printed.out[-200:]


def test_check_of_sound_data_ends_well_and_warns_of_leakage(demo, tmp_path, capsys):
    folder = shutil.copytree(demo, tmp_path / "corpus")
    shutil.copy(folder / "labels.train", folder / "labels.test")
    assert command("check", "--data_dir", folder, "--mt5_path=", "--max_length", 40) == 0
    out = capsys.readouterr().out
    assert re.search(r"\d+ of test's texts occur in an earlier split", out)
    assert "exceed max_length 40: --max_length" in out
    assert "no errors" in out


@pytest.mark.parametrize("figure", ["poses", "curves"])
def test_contact_sheet_and_curves_are_drawn(demo, finished, tmp_path, figure):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    source = demo if figure == "poses" else finished
    out = tmp_path / "figure.png"
    script = ROOT / "tests" / "tools" / "figures.py"
    subprocess.run([sys.executable, script, figure, source, out], check=True)
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert out.stat().st_size > 10_000


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, code, words",
    [
        (["--no_such_flag"], 2, "no_such_flag"),
        (["--batch_size", "two"], 2, "batch_size"),
        (["--position_encoding", "circular"], 2, "position_encoding"),
        (["--batch_size", "0"], 1, "batch_size is 0"),
        (["--label_smoothing", "1.5"], 1, "label_smoothing is 1.5"),
        (["--learning_rate", "nan"], 1, "learning_rate"),
        (["--data_dir", "nowhere"], 1, "nowhere"),
        (["--mt5_path", "nowhere/at/all"], 1, "nowhere/at/all"),
        (["--resume", "nowhere.pt"], 1, "nowhere.pt"),
        (["--init_from", "nowhere"], 1, "nowhere"),
        (["evaluate", "nowhere"], 1, "nowhere"),
        (["translate", "nowhere"], 2, "clips"),
    ],
)
def test_bad_settings_are_one_clear_line(flags, code, words, demo, tmp_path, capsys):
    is_complete = flags[0] in ("evaluate", "translate") or "--data_dir" in flags
    if not is_complete:
        flags = [*flags, "--data_dir", demo, "--output_dir", tmp_path / "run"]
        if "--mt5_path" not in flags:
            flags.append("--mt5_path=")
    assert command(*flags) == code
    error = capsys.readouterr().err
    assert words in error, error
    assert "Traceback" not in error, error
    assert code == 2 or len(error.splitlines()) == 1, error
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_a_folder_without_dev_is_refused(demo, tmp_path, capsys):
    folder = shutil.copytree(demo, tmp_path / "corpus")
    (folder / "labels.dev").unlink()
    assert tiny_run(folder, tmp_path / "run", 2) == 1
    assert "labels.dev" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_bad_clips_stop_a_run_before_its_first_step_or_are_left_out(demo, tmp_path, capsys):
    folder = shutil.copytree(demo, tmp_path / "corpus")
    (folder / "pose_format" / "train_00003.pkl").unlink()
    assert tiny_run(folder, tmp_path / "run", 2) == 1
    assert "train_00003" in capsys.readouterr().err
    assert tiny_run(folder, tmp_path / "run", 2, "--on_bad_clip", "skip") == 0
    assert "train_00003" in (tmp_path / "run" / "bad_clips.txt").read_text()


def test_running_out_of_memory_says_what_to_lower():
    src = {"attention_mask": torch.ones(4, 100)}
    what_costs_least = """half the batch_size|twice gradient_accumulation|gradient_checkpointing|
    lower max_length|train_embedding false"""
    in_order = "^out of memory.*" + re.sub(r"\|\s*", ".*", what_costs_least)
    with pytest.raises(RunError, match=in_order), train_lite.on_device(src, Place()):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="something else"), train_lite.on_device(src, Place()):
        raise RuntimeError("something else")


def test_every_process_takes_its_share_of_every_window():
    lengths = list(range(10, 47))
    config = TrainConfig(batch_size=4, gradient_accumulation=2)
    data = SimpleNamespace(lengths=lengths, totals=lengths, epoch=0)
    plans = [train_lite.plan_epoch(data, config, rank, 2) for rank in (0, 1)]
    clips = []
    for _, batch, counts in plans[0] + plans[1]:
        if counts:
            clips += batch
    assert sorted(clips) == list(range(len(lengths)))
    assert len(plans[0]) == len(plans[1])


def parsed_config(*flags):
    """The training configuration that a command line without a command makes."""
    _, config, _, _ = train_lite.parse([str(flag) for flag in flags])
    return config


def test_old_flags_do_what_they_did(demo):
    flags = ["--lr", "0.001", "--epochs", "3", "--no-resume", "--no-tensorboard"]
    config = parsed_config("--data_dir", demo, *flags)
    assert config.learning_rate == 0.001
    assert config.epochs == 3
    assert config.auto_resume is False
    assert config.use_tensorboard is False


def test_who_asks_for_epochs_gets_epochs(demo):
    """ScratchConfig has a budget in steps, which must not silently win."""
    flags = ["--mt5_path=", "--data_dir", demo, "--epochs", 3]
    assert parsed_config(*flags).max_steps == 0
    assert parsed_config(*flags, "--max_steps", 7).max_steps == 7


def test_the_command_line_picks_the_right_configuration(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def kind_of(*flags):
        return type(parsed_config(*flags)).__name__

    assert kind_of() == "DemoConfig"
    assert kind_of("--mt5_path=") == "DemoConfig"
    assert kind_of("--data_dir", demo) == "TrainConfig"
    assert kind_of("--data_dir", demo, "--mt5_path", "") == "ScratchConfig"

    defaults = list(TrainConfig.__init__.__defaults__)
    defaults[defaults.index("google/mt5-small")] = ""
    monkeypatch.setattr(TrainConfig.__init__, "__defaults__", tuple(defaults))
    assert kind_of("--data_dir", demo) == "ScratchConfig", "edited in config_lite.py"


def test_evaluating_the_training_split_augments_nothing(finished, demo, monkeypatch, tmp_path):
    best = shutil.copytree(finished / "best", tmp_path / "best")
    monkeypatch.setattr(datasets_lite, "augment_clip", None)  # whoever calls it fails
    flags = ["--split", "train", "--data_dir", demo, "--augment", "true"]
    assert command("evaluate", best, *flags) == 0
    assert "exact_match" in json.loads((best / "metrics_train.json").read_text())


def test_a_damaged_best_is_named(finished, tmp_path, capsys):
    without_tokeniser = shutil.copytree(finished / "best", tmp_path / "no tokeniser")
    for path in without_tokeniser.glob("tokenizer*"):
        path.unlink()
    bad_weights = shutil.copytree(finished / "best", tmp_path / "bad weights")
    (bad_weights / "model.safetensors").write_bytes(b"[]")
    bad_config = shutil.copytree(finished / "best", tmp_path / "bad config")
    (bad_config / "config.json").write_bytes(b"[]")
    for folder, words in (
        (without_tokeniser, "tokeniser"),
        (bad_weights, "damaged"),
        (bad_config, "damaged"),
    ):
        assert command("translate", folder, "clip.pkl") == 1
        error = capsys.readouterr().err
        assert str(folder) in error, error
        assert words in error, error
        assert "Traceback" not in error, error


def test_a_clip_that_is_lost_between_two_starts_stops_the_second_by_name(demo, tmp_path, capsys):
    """Else the epoch would go on with other clips than it began with."""
    corpus = shutil.copytree(demo, tmp_path / "corpus")
    assert tiny_run(corpus, tmp_path / "run", 2, "--on_bad_clip", "skip") == 0
    (corpus / "pose_format" / "train_00003.pkl").unlink()
    assert tiny_run(corpus, tmp_path / "run", 4, "--on_bad_clip", "skip") == 1
    error = capsys.readouterr().err
    assert "other" in error
    assert "clips" in error
    assert "--auto_resume false" in error


def test_a_pretrained_run_goes_on_as_if_never_stopped(demo, mt5_folder, tmp_path):
    flags = [
        "--data_dir",
        demo,
        "--mt5_path",
        mt5_folder,
        "--max_new_tokens",
        4,
        "--num_workers",
        0,
        "--batch_size",
        8,
        "--gradient_accumulation",
        2,
        "--warmup_epochs",
        0,
        "--ctc_weight",
        0.5,
    ]
    assert command(*flags, "--output_dir", tmp_path / "whole", "--epochs", 2) == 0
    original = train_lite.optimiser_step
    steps = []

    def stop_after_two(run):
        original(run)
        steps.append(1)
        if len(steps) == 2:
            run.signals.number = signal.SIGTERM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lite, "optimiser_step", stop_after_two)
        assert (
            command(*flags, "--output_dir", tmp_path / "parts", "--epochs", 2)
            == 128 + signal.SIGTERM
        )
    assert command(*flags, "--output_dir", tmp_path / "parts", "--epochs", 2) == 0
    assert_equal_parameters(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_needs_nothing_that_it_no_longer_reads(finished, demo, tmp_path, capsys):
    first = shutil.copytree(finished / "best", tmp_path / "first")
    run = tmp_path / "run"
    assert tiny_run(demo, run, 2, "--init_from", first) == 0
    shutil.rmtree(first)
    assert tiny_run(demo, run, 2, "--init_from", first) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert tiny_run(demo, run, 4, "--init_from", first) == 0, (
        "nor does a longer budget read it again"
    )


def test_evaluating_on_other_texts_names_those_that_the_vocabulary_cannot_spell(
    finished, demo, tmp_path, capsys
):
    corpus = shutil.copytree(demo, tmp_path / "corpus")
    labels = load_dataset_file(corpus / "labels.test")
    next(iter(labels.values()))["text"] = "ქართული"
    write_labels(corpus / "labels.test", labels)
    folder = shutil.copytree(finished / "best", tmp_path / "best")
    assert command("evaluate", folder, "--split", "test", "--data_dir", corpus) == 0
    printed = capsys.readouterr()
    assert "cannot spell 1 texts, first 'ქართული'" in printed.err, printed.err
    assert printed.out.startswith("exact_match "), printed.err


def test_tensorboard_gets_scalars(demo, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--use_tensorboard", "true", "--log_dir", tmp_path / "tb", "--log_interval", 2]
    assert tiny_run(demo, tmp_path / "run", 4, *flags) == 0
    events = EventAccumulator(str(tmp_path / "tb" / "run"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "dev/bleu4", "dev/exact_match"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]


SPOILS_A_CLIP_AFTER_THE_CHECK = """
import os
import runpy
import sys

import datasets_lite

spoiled_clip = os.environ["SPOILED_CLIP"]
checked = datasets_lite.SignLanguageDataset.__init__


def checked_and_then_spoiled(self, *arguments, **options):
    checked(self, *arguments, **options)
    with open(spoiled_clip, "wb") as file:
        file.write(b"no pickle")


datasets_lite.SignLanguageDataset.__init__ = checked_and_then_spoiled
runpy.run_path(os.environ["TRAIN_LITE"], run_name="__main__")
"""


def test_an_error_in_a_loading_process_is_one_line_and_ends_at_once(demo, tmp_path):
    """As when a file is replaced after the check.

    Neither the worker's traceback is shown, nor is the minute waited that Python grants a worker.
    """
    corpus = shutil.copytree(demo, tmp_path / "corpus")
    driver = tmp_path / "spoils_a_clip.py"
    driver.write_text(SPOILS_A_CLIP_AFTER_THE_CHECK)
    flags = ["--data_dir", corpus, "--output_dir", tmp_path / "run", *TINY, 20, "--num_workers", 2]
    done = subprocess.run(
        [sys.executable, driver, *map(str, flags)],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "TRAIN_LITE": str(ROOT / "train_lite.py"),
            "SPOILED_CLIP": str(corpus / "pose_format" / "train_00003.pkl"),
        },
        timeout=50,  # less than the minute
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if "warn" not in line.lower()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:], done.stderr
    assert "train_00003.pkl" in errors[0]
    assert "Traceback" not in done.stderr


def test_a_word_that_is_no_command_lists_the_commands(capsys):
    """`python train_lite.py test` must not start a training."""
    for word in ("test", "Train", "nowhere.pkl"):
        assert command(word) == 2
        error = capsys.readouterr().err
        assert f"invalid choice: {word!r}" in error
        assert all(name in error for name in ("train", "check", "evaluate", "translate"))


def test_a_field_that_was_renamed_in_the_configuration_is_one_line(demo, monkeypatch, capsys):
    def reads_an_old_name(config, inference, args):
        return config.lr_scheduler

    monkeypatch.setitem(train_lite.COMMANDS, "train", reads_an_old_name)
    assert command("--data_dir", demo, "--mt5_path=") == 1
    assert "ScratchConfig has no field 'lr_scheduler'" in capsys.readouterr().err


def test_defaults_that_the_scratch_configuration_sets_are_named_before_training(demo, capsys):
    assert command("--data_dir", demo, "--mt5_path=", "--resume", "nowhere.pt") == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("ScratchConfig sets: batch_size 16 (TrainConfig: 2), ")


def test_other_processes_leave_the_scores_to_the_first(finished, demo, tmp_path, monkeypatch):
    """Under torchrun each would score its share and write it over the others'."""
    folder = shutil.copytree(finished / "best", tmp_path / "best")
    monkeypatch.setattr(train_lite, "find_place", lambda config: Place(1, 2))
    assert command("evaluate", folder, "--data_dir", demo) == 0
    assert not (folder / "metrics_dev.json").exists()
    monkeypatch.setattr(train_lite, "find_place", lambda config: Place(0, 2))
    assert command("evaluate", folder, "--data_dir", demo) == 0
    lines = (folder / "predictions_dev.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 10, "a heading, and every clip of dev"


def test_a_field_written_as_a_plain_default_is_still_an_option(demo, monkeypatch):
    """The natural edit: `epochs: int = 20`, as ScratchConfig's fields read."""
    monkeypatch.setattr(train_lite.TrainConfig.__dataclass_fields__["batch_size"], "metadata", {})
    assert parsed_config("--data_dir", demo, "--batch_size", 4).batch_size == 4


@pytest.mark.parametrize("word, value", [("yes", True), ("0", False), ("True", True)])
def test_truth_values_may_be_said_in_several_ways(demo, word, value):
    assert parsed_config("--data_dir", demo, "--augment", word).augment is value
    assert command("--data_dir", demo, "--augment", "perhaps") == 2


class SpoilsOneBatch(torch.nn.Module):
    """The model, but for a loss that is not a number where this clip is in the batch."""

    def __init__(self, model, clip):
        super().__init__()
        self.model = model
        self.clip = clip

    def forward(self, src_input, tgt_input):
        output = self.model(src_input, tgt_input)
        if self.clip in src_input["names"]:
            output.loss = output.loss * math.nan
        return output


def test_a_skipped_step_names_the_clips_whose_loss_was_not_finite(clips, capsys):
    """Not the whole window, of which the other micro-batches were sound."""
    run = run_of(scratch_model(clips).train(), clips, batch_size=4, gradient_accumulation=10)
    _, batch, _ = epoch_plan(run)[3]
    named = [clips.entries[index]["name"] for index in batch]
    run.net = SpoilsOneBatch(run.model, named[0])
    train_epoch(run)
    error = capsys.readouterr().err
    assert run.skipped == 1
    assert error.splitlines()[0].endswith("for the clips " + ", ".join(named)), error
    assert error.count("train_") == len(named), error


def test_a_run_that_a_signal_stops_closes_tensorboard(demo, tmp_path, monkeypatch):
    """Else what is queued is lost: the process ends without Python's own clearing up."""
    closed = []
    sent = []

    class Writer:
        def add_scalar(self, *_):
            if not sent:  # a second signal would end the process
                sent.append(True)
                os.kill(os.getpid(), signal.SIGTERM)

        def add_text(self, *_):
            pass

        def close(self):
            closed.append(True)

    monkeypatch.setattr(train_lite, "make_writer", lambda run: Writer())
    assert tiny_run(demo, tmp_path / "run", 4) == 128 + signal.SIGTERM
    assert closed == [True]


# ------------------------------------------------------------ what the vocabulary can give back

SENTENCES = {
    "zh": ["今天，我在学校买书。", "你好！", "他（不）要“红”的车吗？"],
    "ja": ["今日は学校で本を買う。", "ｶﾀｶﾅ とひらがな"],
    "ko": ["나는 오늘 학교에서 책을 샀다.", "안녕하세요!"],
    "th": ["วันนี้ฉันซื้อหนังสือที่โรงเรียน", "สวัสดี น้ำ ครับ"],
    "my": ["ကျွန်တော် ဒီနေ့ စာအုပ် ဝယ်တယ်။"],
    "en": ["Hello, everyone -- and welcome!", "It's 3.50 (or ½) — don't go…"],
    "de": ["Auf Lanzarote gibt es eine starke Wasserknappheit.", "Größe: 20 m², „schön“"],
    "fa": ["او می\u200cخواهد کتاب بخرد.", "ما نمی\u200cدانیم کجا است."],
    "ar": ["اشتريت كتابًا اليوم في المدرسة.", "السَّلامُ عليكم"],
    "hi": ["मैंने आज स्कूल में किताब खरीदी।", "नमस्ते दुनिया यह है"],
    "ru": ["Сегодня я купил книгу в школе.", "Съешь ещё этих булок"],
    "vi": ["Hôm nay tôi mua sách ở trường.", unicodedata.normalize("NFD", "Tiếng Việt rất đẹp")],
}
# fmt: off
ODD_CHARACTERS = [
    "\xa0", "\xad", "\x85", "\u200b", "\u200c", "\u200d", "\u200e", "\u2028", "\u2029",
    "\u202f", "\u2060", "\u3000", "\ufeff", "�", "\t", "\x7f", "…", "½", "²", "㎏", "ﬁ",
    "％", "～", "｡", "“", "„", "—", "★", "👍", "👨\u200d👩", "ﷺ", "▁",
]
# fmt: on


@pytest.mark.parametrize("language", SENTENCES)
def test_what_the_vocabulary_gives_back_of_a_text_scores_100(language):
    texts = SENTENCES[language]
    codec = TextCodec(train_tokenizer(texts * 5, 1000), 512)
    assert not any(codec.unknown in codec.ids(text) for text in texts), "it can spell them"
    given_back = codec.decode(codec.encode(texts).clamp(min=0))
    scores = compute_metrics(given_back, texts, language)
    assert scores["exact_match"] == 100
    assert scores["bleu4"] == pytest.approx(100)


@pytest.mark.parametrize("odd", ODD_CHARACTERS, ids=ascii)
def test_an_odd_character_costs_no_score(odd):
    texts = [f"we can all see{odd} you", f"this {odd} is the other one"]
    codec = TextCodec(train_tokenizer(texts * 5, 1000), 512)
    given_back = codec.decode(codec.encode(texts).clamp(min=0))
    scores = compute_metrics(given_back, texts, "en")
    assert scores["exact_match"] == 100, (given_back, texts)
    assert scores["bleu4"] == pytest.approx(100)


@pytest.mark.parametrize("language, signature", [("zh-TW", "zh"), ("ja", "char"), ("de", "13a")])
def test_a_language_decides_how_bleu_cuts(language, signature):
    scores = compute_metrics(["a b c d e"], ["a b c d e"], language)
    assert f"tok:{signature}" in scores["bleu_signature"]


def test_sacrebleu_s_warning_of_tokenized_periods_is_not_heard(caplog):
    texts = ["this is a sentence ."] * 200
    assert compute_metrics(texts, texts, "en")["bleu4"] == pytest.approx(100)
    assert not caplog.records


# ------------------------------------------------------------ a run is shared


def test_all_of_a_run_s_best_is_readable_as_the_umask_says(finished):
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (finished / "best").iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert set(modes.values()) == {oct(0o666 & ~umask)}, modes


def test_evaluate_in_a_folder_that_may_not_be_written_prints_its_scores(
    demo, finished, monkeypatch, capsys
):
    def refuse(path, content):
        raise train_lite.RunError(f"could not write {path}: Permission denied")

    monkeypatch.setattr(train_lite, "write_whole", refuse)
    assert command("evaluate", finished) == 0
    out = capsys.readouterr().out
    assert out.startswith("exact_match ")
    assert "not kept: could not write" in out


def test_evaluate_from_another_folder_names_data_dir(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("evaluate", finished, "--data_dir", "data/mine") == 1
    assert "--data_dir" in capsys.readouterr().err


def test_a_pointer_in_place_of_weights_is_called_that(finished, tmp_path, mt5_folder):
    best = shutil.copytree(finished / "best", tmp_path / "best")
    (best / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="Git LFS pointer"):
        SignLanguageLite.from_pretrained(best)
    folder = shutil.copytree(mt5_folder, tmp_path / "mt5")
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match="Git LFS pointer"):
        SignLanguageLite(scratch_config(mt5_path=str(folder)))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_missing_right_is_called_that(finished, tmp_path):
    best = shutil.copytree(finished / "best", tmp_path / "best")
    (best / "model.safetensors").chmod(0)
    with pytest.raises(DataError, match="may not read"):
        SignLanguageLite.from_pretrained(best)


def test_a_run_does_not_depend_on_how_its_data_are_spelled(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo, "data/mine")
    spellings = ["data/mine", "data/mine/", "./data/../data/mine", str(tmp_path / "data" / "mine")]
    for steps, spelled in enumerate(spellings, 1):
        assert command("--data_dir", spelled, *TINY, steps) == 0
    assert os.listdir("checkpoints") == ["mine"]
    assert "resumed from checkpoints/mine/last.pt at step 3" in capsys.readouterr().out


def test_a_clip_exchanged_under_its_name_stops_a_resumed_run(demo, tmp_path, capsys):
    data = shutil.copytree(demo, tmp_path / "data")
    assert tiny_run(data, tmp_path / "run", 2) == 0
    poses = sorted((data / "pose_format").glob("train_*"))
    poses[0].write_bytes(poses[1].read_bytes())
    assert tiny_run(data, tmp_path / "run", 4) == 1
    assert "other clips" in capsys.readouterr().err


@pytest.mark.parametrize("part", range(20))
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(finished, tmp_path, part):
    """In the weights, but in names, dates and padding, too."""
    flipped = bytearray((finished / "last.pt").read_bytes())
    flipped[int((len(flipped) - 1) * part / 19)] ^= 1
    (tmp_path / "last.pt").write_bytes(flipped)
    with pytest.raises(RunError, match="last.pt.*checksum"):
        train_lite.load_checkpoint(tmp_path / "last.pt")


def test_a_pipe_in_the_place_of_a_checkpoint_is_named(tmp_path):
    os.mkfifo(tmp_path / "last.pt")
    with pytest.raises(RunError, match="last.pt.*it is no file"):
        train_lite.load_checkpoint(tmp_path / "last.pt")


def test_torch_itself_opens_a_checkpoint_and_notices_no_flipped_bit(finished, tmp_path):
    flipped = bytearray((finished / "last.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(flipped)
    assert torch.load(tmp_path / "last.pt", weights_only=True), "torch itself notices nothing"
    with pytest.raises(RunError, match="last.pt.*checksum"):
        train_lite.load_checkpoint(tmp_path / "last.pt")
