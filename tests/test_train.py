"""The loop and the commands: scores, schedule, windows, checkpoints, signals, processes, and every exit code."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    batch_of,
    entry,
    random_clip,
    scratch_config,
    scratch_model,
    shared,
    without_dropout,
    write_corpus,
    write_labels,
    write_pose,
)

import datasets_lite
import train_lite
from config_lite import InferenceConfig, TrainConfig
from datasets_lite import LengthBatchSampler, load_dataset_file
from train_lite import Place, Run, RunError, compute_metrics

TINY = [
    "--mt5_path=",
    "--d_model",
    "32",
    "--num_layers",
    "1",
    "--batch_size",
    "8",
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


def parameters(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)["model"]


def assert_equal_parameters(one, two, tolerance=0.0):
    one, two = parameters(one), parameters(two)
    assert one.keys() == two.keys()
    worst = max(float((one[n] - two[n]).abs().max()) for n in one)
    assert worst <= tolerance, f"parameters differ by up to {worst:.2e}"


# ----------------------------------------------------------------------------------- scores


def test_published_predictions_score_as_published():
    """BLEU-4 25.27 is what Uni-Sign's paper prints for these very outputs."""
    folder = shared("unisign_csl_daily_dev")

    def read(name):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        return [
            line.split(": ", 2)[2] if "prediction:" in line else line.split(": ")[-1]
            for line in lines
            if line
        ]

    predictions, references = read("predictions.txt"), read("references.txt")
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
    assert (
        scores["exact_match"] == 100
        and scores["bleu4"] == 0
        and scores["chrf"] == pytest.approx(100)
    )


def test_rouge_of_one_constant_sentence_is_high_on_csl_daily():
    """Which is why ROUGE proves nothing about the pose."""
    folder = shared("csl_daily_labels")
    train = [e["text"] for e in load_dataset_file(folder / "labels.train").values()]
    dev = [e["text"] for e in load_dataset_file(folder / "labels.dev").values()]
    best = max(
        compute_metrics([text] * len(dev), dev)["rouge_l"]
        for text in sorted(set(train), key=train.count)[-3:]
    )
    assert best > 10, f"ROUGE-L {best:.1f}"


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="1 predictions for 2"):
        compute_metrics(["a"], ["a", "b"])


def test_exchanged_clips_never_keep_their_text():
    texts = ["a", "b", "a", "c", "a", "d", "e", "b"]
    order = train_lite.exchange(texts)
    assert sorted(order) == list(range(len(texts)))
    assert all(texts[i] != texts[j] for i, j in enumerate(order)), [texts[j] for j in order]
    assert train_lite.exchange(
        ["a", "a", "a", "b"]
    )  # where one text has most clips, some must keep it


def test_intervals_of_a_weak_model_do_not_fail():
    """Some resamples hold no match at all, which sacrebleu's own mean cannot take."""
    found = train_lite.bootstrap(["a b"] + ["zz"] * 15, ["a c"] + ["yes no"] * 15, "en")
    assert (
        found.keys() == {"exact_match", "bleu4", "chrf"} and found["exact_match"] == " [0.00, 0.00]"
    ), found


def test_edit_distance_counts_each_kind_of_error():
    assert train_lite.edit_distance(["a", "x", "c", "d"], ["a", "b", "c"]) == 2
    assert train_lite.edit_distance([], ["a", "b"]) == 2


def scores_of(predictions, references, language="zh"):
    return train_lite._text_scores(predictions, references, language, references[0])


def test_a_collapsed_model_is_named():
    references = [f"今天{a}买{b}。" for a in "我你他她" for b in "书水花车鱼"]
    collapsed = ["今天我买书。"] * len(references)
    assert "ignores the pose" in train_lite.collapse_warning(
        scores_of(collapsed, references), collapsed
    )
    exchanged = references[7:] + references[:7]  # varied, but unrelated to the clips
    assert "ignores the pose" in train_lite.collapse_warning(
        scores_of(exchanged, references), exchanged
    )


def test_a_corpus_of_fifteen_words_is_no_collapse():
    words = [f"word{chr(97 + i)}" for i in range(15)]
    assert train_lite.collapse_warning(scores_of(words * 3, words * 3, "en"), words * 3) == ""
    half = words * 2 + words[1:] + words[:1]  # a third of the clips wrong
    assert train_lite.collapse_warning(scores_of(half, words * 3, "en"), half) == ""


def test_evaluation_covers_the_whole_split_and_weighs_tokens(clips):
    """The original scored about fifty predictions, and averaged the loss over batches, smoothing included."""
    model, found = scratch_model(clips, label_smoothing=0.1), []
    for size in (3, len(clips)):
        loader = train_lite.make_loader(clips, size)
        metrics, rows = train_lite.evaluate(model, loader, InferenceConfig(max_new_tokens=8))
        assert [row[0] for row in rows] == list(range(len(clips)))
        found.append(metrics)
    with torch.no_grad():
        singles = [model(*batch_of(clips, [i])) for i in range(len(clips))]
    nll = sum(float(s.nll) * s.num_tokens for s in singles) / sum(s.num_tokens for s in singles)
    assert found[0]["dev_loss"] == pytest.approx(found[1]["dev_loss"], rel=1e-5)
    assert found[0]["dev_loss"] == pytest.approx(nll, rel=1e-5), (
        "the plain nll, whatever the smoothing"
    )
    assert found[0]["exact_match"] == found[1]["exact_match"]


def test_a_loss_worse_than_guessing_is_warned_of(clips, capsys):
    run = run_of(scratch_model(clips), clips)
    metrics, rows = train_lite.evaluate(
        run.model, train_lite.make_loader(clips, 8), InferenceConfig(max_new_tokens=4)
    )
    train_lite.print_validation(run, metrics | {"epoch": 1, "step": 1, "dev_loss": 99.0}, rows)
    assert "worse than guessing evenly" in capsys.readouterr().out


# ----------------------------------------------------------------------------------- schedule, windows, steps


def test_schedule_warms_up_from_the_first_step_and_ends_at_min_lr(clips):
    """The original stepped it once an epoch, so that epoch 1 ran at the full rate before its warm-up."""
    config = TrainConfig(epochs=10, warmup_epochs=2, learning_rate=1e-3, min_lr=1e-5)
    optimizer, scheduler = train_lite.make_optimizer(
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
    run, rates = run_of(scratch_model(clips).train(), clips, batch_size=8), []
    run.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    train_lite.train_epoch(run)
    assert len(rates) == 5 and rates == sorted(set(rates), reverse=True), rates


def test_norms_and_biases_do_not_decay(clips):
    model = scratch_model(clips)
    optimizer, _ = train_lite.make_optimizer(model, TrainConfig(), 10, 5)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        spared = name.endswith("bias") or "norm" in name
        assert decay[id(parameter)] == (0 if spared else 0.01), name


def run_of(model, dataset, **options):
    config = scratch_config(ctc_weight=0.5, max_steps=10, warmup_epochs=0, **options)
    run = Run(config, InferenceConfig(), Place(), total_steps=10)
    run.model = run.net = model
    run.data = {"train": dataset}
    run.loader = train_lite.make_loader(
        dataset, config.batch_size, shuffle=True, accumulation=config.gradient_accumulation
    )
    run.optimizer, run.scheduler = train_lite.make_optimizer(model, config, 10, 2)
    return run


def test_accumulating_16_times_2_steps_like_1_times_32(clips):
    """A window's loss is one mean over its tokens, however it is divided, and it holds the same clips."""
    after, before = [], None
    for size, accumulation in ((32, 1), (2, 16)):
        model = without_dropout(scratch_model(clips, ctc_weight=0.5))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        run = run_of(model, clips, batch_size=size, gradient_accumulation=accumulation)
        run.total_steps = 1
        train_lite.train_epoch(run)
        after.append({n: p.detach() for n, p in model.named_parameters()})
        assert run.step == 1
    moved = max(float((after[0][n] - before[n]).abs().max()) for n in before)
    apart = {n: float((after[0][n] - after[1][n]).abs().max()) for n in before}
    # AdamW's first step is the gradient's sign, so where a gradient is rounding noise the two may part: compare moments
    worst = max(apart, key=apart.get)
    share = sum(int(((after[0][n] - after[1][n]).abs() > 1e-5).sum()) for n in before)
    total = sum(p.numel() for p in before.values())
    assert share <= 1e-3 * total, (
        f"{share} of {total} parameters part, by up to {apart[worst]:.1e} of {moved:.1e} ({worst})"
    )


def test_accumulated_gradients_equal_the_large_batch(clips):
    gradients = []
    for size, accumulation in ((32, 1), (2, 16)):
        model = without_dropout(scratch_model(clips, ctc_weight=0.5))
        run = run_of(model, clips, batch_size=size, gradient_accumulation=accumulation)
        plan = run.loader.batch_sampler.plan()[:accumulation]
        for (number, _, counts), (src, tgt) in zip(plan, run.loader):
            train_lite.micro_batch(run, number, counts, src, tgt, last=False)
        tokens = run.window["tokens"]
        gradients.append(
            {n: p.grad / tokens for n, p in model.named_parameters() if p.grad is not None}
        )
    scale = max(float(g.abs().max()) for g in gradients[0].values())
    worst = max(float((gradients[0][n] - gradients[1][n]).abs().max()) for n in gradients[0])
    assert worst < 1e-5 * scale, f"{worst:.2e} of {scale:.2e}"


def test_the_last_short_window_is_stepped_and_leaves_no_gradient(clips):
    """40 clips in windows of 32: the original neither stepped nor cleared the 8 left over."""
    run = run_of(scratch_model(clips).train(), clips, batch_size=8, gradient_accumulation=4)
    train_lite.train_epoch(run)
    assert run.step == 2 and run.batch == 5
    assert all(p.grad is None for p in run.model.parameters())


def test_a_step_that_is_not_finite_is_skipped_by_name(clips, capsys):
    run = run_of(scratch_model(clips).train(), clips, batch_size=20)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.net = _Poisoned(run.model)
    train_lite.train_epoch(run)
    assert run.skipped == 2 and all(
        torch.equal(p, before[n]) for n, p in run.model.named_parameters()
    )
    assert clips.entries[0]["name"] in capsys.readouterr().err
    with pytest.raises(RunError, match="10 steps in a row"):
        for run.epoch in range(1, 9):
            run.batch, run.total_steps = 0, 99
            train_lite.train_epoch(run)


class _Poisoned(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        output = self.model(*batch)
        output.loss = output.loss * math.nan
        return output


# ----------------------------------------------------------------------------------- a run, its folder, its end


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory):
    """A finished run of 12 steps, with augmentation."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert tiny_run(demo, out, 12, "--augment", "--gradient_accumulation", 2) == 0
    return out


def test_a_run_writes_what_the_contract_says(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
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
    best = max(lines, key=lambda m: (m["bleu4"], m["chrf"], -m["dev_loss"]))
    assert json.loads((finished / "best" / "metrics.json").read_text()) == best
    assert not list(finished.rglob("*.part"))


def test_bleu_of_an_order_that_no_reference_reaches_tells_nothing():
    """Smoothing gives long garbage a BLEU-4 above the right words' 0: step 0 would have been the best."""
    words, garbage = ["sun", "moon", "star"], ["sun sun sun sun sun"] * 3
    for predictions in (words, garbage):
        scores = train_lite._text_scores(predictions, words, "en", "the sun is very bright")
        assert [
            scores[k] for k in ("bleu2", "bleu3", "bleu4", "shuffled_bleu4", "constant_bleu4")
        ] == [0] * 5
    assert compute_metrics(garbage, words, "en")["bleu4"] > 0, "or the test shows nothing"
    mixed = train_lite._text_scores(["a b c d"], ["a b c d"], "en", "sun")
    assert mixed["bleu4"] == pytest.approx(100), "a reference that reaches it is scored as before"


def test_a_finished_run_changes_nothing(demo, finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != ".lock"}
    assert tiny_run(demo, finished, 12, "--augment", "--gradient_accumulation", 2) == 0
    assert "finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != ".lock"}


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
    assert command(*flags, 2) == 0 and command(*flags, 2, "--label_smoothing", 0.1) == 0
    assert "label_smoothing: 0.0 -> 0.1" in capsys.readouterr().out
    assert Path("checkpoints/corpus-2/last.pt").is_file()
    assert (
        command(*flags, 2, "--auto_resume", "false") == 0
        and Path("checkpoints/corpus-3/last.pt").is_file()
    )
    assert command(*flags, 2, "--label_smoothing", 0.1) == 0
    assert "corpus-2: this run is finished" in capsys.readouterr().out
    assert command(*flags, 2, "--output_dir", finished) == 1
    assert "gradient_accumulation: 2 -> 1" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "micro_batches", [3, 7]
)  # 3: in the middle of a window; 7: in the second epoch
def test_resuming_equals_an_uninterrupted_run(
    demo, finished, tmp_path, monkeypatch, workers, micro_batches
):
    seen, original = [], train_lite.micro_batch

    def interrupted(run, *batch):
        original(run, *batch)
        seen.append(1)
        if len(seen) == micro_batches:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_lite, "micro_batch", interrupted)
    out, flags = (
        tmp_path / "run",
        ["--augment", "--gradient_accumulation", 2, "--num_workers", workers],
    )
    assert tiny_run(demo, out, 12, *flags) == 128 + signal.SIGTERM
    assert tiny_run(demo, out, 12, *flags) == 0
    assert_equal_parameters(out, finished)
    lines = [
        [
            {
                k: v
                for k, v in json.loads(line).items()
                if k in ("step", "train_loss", "dev_loss", "bleu4")
            }
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (out, finished)
    ]
    assert lines[0] == lines[1]


def test_a_second_signal_ends_at_once():
    code = "import os, train_lite\nwith train_lite.Signals():\n os.kill(os.getpid(), 15)\n os.kill(os.getpid(), 2)\nprint(1)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 128 + signal.SIGINT and b"stopping" in done.stderr and not done.stdout


def test_a_second_process_in_one_folder_is_refused(demo, tmp_path, capsys):
    pytest.importorskip("fcntl")
    code = f"import train_lite, pathlib, sys\nf = train_lite.lock_folder(pathlib.Path({str(tmp_path)!r}))\nprint(1, flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        assert tiny_run(demo, tmp_path, 2) == 1
        assert "another process is training" in capsys.readouterr().err
        holder.kill()
    assert tiny_run(demo, tmp_path, 2) == 0  # a lock dies with its process


def test_a_full_disk_keeps_the_last_checkpoint_whole(demo, finished, tmp_path):
    resource = pytest.importorskip("resource")
    out = shutil.copytree(finished, tmp_path / "run")
    before, limit = parameters(out), int(0.8 * (out / "last.pt").stat().st_size)
    code = (
        f"import resource, sys, train_lite\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.exit(train_lite.main(sys.argv[1:]))"
    )
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
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, flags)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert (
        f"could not write {out}/last.pt" in done.stderr
        and "MB" in done.stderr
        and "Traceback" not in done.stderr
    )
    after = parameters(out)
    assert all(torch.equal(before[n], after[n]) for n in before) and not list(out.rglob("*.part"))


def test_an_original_checkpoint_is_refused_with_the_reason(demo, tmp_path, capsys):
    (tmp_path / "checkpoint_epoch_3.pth").write_bytes(b"x")
    assert tiny_run(demo, tmp_path / "run", 2, "--resume", tmp_path / "checkpoint_epoch_3.pth") == 1
    assert "original scripts" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_an_error(demo, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    whole = (out / "last.pt").read_bytes()
    for damaged in (whole[:1000], b"", b"\x80\x04garbage"):
        (out / "last.pt").write_bytes(damaged)
        assert tiny_run(demo, out, 14, "--augment", "--gradient_accumulation", 2) == 1
        assert "not a readable checkpoint" in capsys.readouterr().err


class _Spy:
    """What a stranger's checkpoint may hold: it touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    torch.save({"model": _Spy(tmp_path / "ran")}, tmp_path / "last.pt")
    with pytest.raises(RunError, match="not a readable checkpoint"):
        train_lite.load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()


def test_last_pt_holds_plain_data_only(finished):
    state = torch.load(finished / "last.pt", weights_only=True)
    assert {
        "model",
        "optimizer",
        "scheduler",
        "epoch",
        "batch",
        "window",
        "history",
        "config",
        "made_of",
    } <= state.keys()


def test_two_processes_train_like_one(demo, tmp_path):
    """Two gloo processes and one with the same windows: parameters within 1e-5, metrics equal."""
    one, two = tmp_path / "one", tmp_path / "two"
    # without clipping, which would hide a gradient of the wrong scale
    steps = [4, "--batch_size", 4, "--max_grad_norm", 0]
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
    assert_equal_parameters(one, two, 1e-5)
    read = [
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in (one, two)
    ]
    for key in ("bleu4", "chrf", "exact_match", "dev_accuracy", "shuffled_bleu4", "unique_ratio"):
        assert read[0][key] == read[1][key], key
    assert read[0]["train_loss"] == pytest.approx(read[1]["train_loss"], rel=1e-5), (
        "tokens of all processes"
    )


# ----------------------------------------------------------------------------------- the other commands


def test_evaluate_on_dev_repeats_best_exactly(demo, finished, capsys):
    assert command("evaluate", finished, "--split", "dev") == 0
    lines = capsys.readouterr().out.splitlines()
    best = json.loads((finished / "best" / "metrics.json").read_text())
    again = json.loads((finished / "metrics_dev.json").read_text())
    assert lines[0].startswith(f"exact_match {best['exact_match']:.2f} [")
    for key in again.keys() & best.keys() - {"decoded_clips_per_second"}:
        assert again[key] == best[key], key


def test_translate_reports_a_bad_clip_and_goes_on(demo, finished, tmp_path, capsys):
    clip, bad = demo / "pose_format" / "dev_00000.pkl", tmp_path / "bad.pkl"
    bad.write_bytes(b"nothing")
    assert command("translate", finished, clip, bad, clip, "--json") == 1
    out = capsys.readouterr()
    texts = [json.loads(line)["text"] for line in out.out.splitlines()]
    assert len(texts) == 2 and texts[0] == texts[1] and "bad.pkl" in out.err
    predicted = (finished / "predictions_dev.txt").read_text().splitlines()[1].split("\t")
    assert command("translate", finished / "best", clip) == 0 and predicted[0] == "dev_00000"


def test_best_works_alone(finished, demo, tmp_path, capsys):
    """On a machine that has nothing but best/ and a clip."""
    best = shutil.copytree(finished / "best", tmp_path / "elsewhere")
    assert command("translate", best, demo / "pose_format" / "dev_00001.pkl") == 0


def test_check_names_every_fault_of_a_spoiled_corpus(demo, tmp_path, capsys):
    folder = shutil.copytree(demo, tmp_path / "spoiled")
    poses = folder / "pose_format"
    keypoints, scores = random_clip(20)
    faults = {
        "missing": None,
        "unreadable": b"\x80\x04nonsense",
        "empty": b"",
        "joints_17": dict(keypoints=keypoints[:, :17], scores=scores[:, :17]),
        "joints_134": dict(
            keypoints=keypoints[:, [0, *range(133)]], scores=scores[:, [0, *range(133)]]
        ),
        "all_zero": dict(keypoints=keypoints * 0, scores=scores * 0),
        "all_nan": dict(keypoints=keypoints * math.nan, scores=scores),
        "unlike_lengths": dict(keypoints=keypoints, scores=scores[:5]),
        "start_after_end": dict(keypoints=keypoints, scores=scores, start=9, end=3),
        "no_scores": None,
        "climbs": None,
        "too_short": dict(keypoints=keypoints[:2], scores=scores[:2]),
    }
    labels = {name: entry(name) for name in faults} | {"no_text": entry("no_text", text="  ")}
    labels["climbs"]["pose"] = "../../outside.pkl"
    for name, content in faults.items():
        if isinstance(content, bytes):
            (poses / f"{name}.pkl").write_bytes(content)
        elif content:
            more = {k: content[k] for k in content.keys() - {"keypoints", "scores"}}
            write_pose(poses / f"{name}.pkl", content["keypoints"], content["scores"], **more)
    import pickle

    (poses / "no_scores.pkl").write_bytes(pickle.dumps({"keypoints": keypoints}))
    write_labels(folder / "labels.train", labels | load_dataset_file(demo / "labels.train"))
    (folder / "labels.test").write_bytes(b"not labels")
    assert command("check", "--data_dir", folder, "--mt5_path=") == 1
    out = capsys.readouterr()
    missed = [
        name
        for name in [*labels, "labels.test"]
        if not any(name in line for line in out.err.splitlines())
    ]
    assert not missed, f"not named: {missed}\n{out.err}"
    assert "14 errors" in out.out, out.out[-200:]


def test_check_of_sound_data_ends_well_and_warns_of_leakage(demo, tmp_path, capsys):
    folder = shutil.copytree(demo, tmp_path / "corpus")
    shutil.copy(folder / "labels.train", folder / "labels.test")
    assert command("check", "--data_dir", folder, "--mt5_path=", "--max_length", 40) == 0
    out = capsys.readouterr().out
    assert (
        "occur in train, too" in out
        and "exceed max_length 40: --max_length" in out
        and "no errors" in out
    )


def test_contact_sheet_is_drawn(demo, tmp_path):
    pytest.importorskip("matplotlib")
    assert (
        command("check", "--data_dir", demo, "--mt5_path=", "--plot", tmp_path / "poses.png") == 0
    )
    assert (tmp_path / "poses.png").stat().st_size > 10_000


# ----------------------------------------------------------------------------------- bad input: one line, the exit code


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
    own = (
        []
        if flags[0] in ("evaluate", "translate") or "--data_dir" in flags
        else ["--data_dir", demo]
    )
    mt5 = [] if "--mt5_path" in flags or own == [] else ["--mt5_path="]
    run = [] if own == [] else ["--output_dir", tmp_path / "run"]
    assert command(*flags, *own, *mt5, *run) == code
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error, error
    assert code == 2 or len(error.splitlines()) == 1, error
    assert not (tmp_path / "run").exists(), "nothing half-written"


def test_a_folder_without_dev_is_refused(demo, tmp_path, capsys):
    folder = shutil.copytree(demo, tmp_path / "corpus")
    (folder / "labels.dev").unlink()
    assert tiny_run(folder, tmp_path / "run", 2) == 1
    assert "labels.dev" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_bad_clips_stop_a_run_before_its_first_step_or_are_left_out(demo, tmp_path, capsys):
    folder = shutil.copytree(demo, tmp_path / "corpus")
    (folder / "pose_format" / "train_00003.pkl").unlink()
    assert tiny_run(folder, tmp_path / "run", 2) == 1
    assert "train_00003" in capsys.readouterr().err
    assert tiny_run(folder, tmp_path / "run", 2, "--on_bad_clip", "skip") == 0
    assert "train_00003" in (tmp_path / "run" / "bad_clips.txt").read_text()


def test_clips_too_short_for_their_glosses_are_named_before_the_first_step(tmp_path, capsys):
    for split in ("train", "dev"):
        write_corpus(
            tmp_path / "corpus",
            {f"{split}_a": random_clip(4), f"{split}_b": random_clip(30)},
            split,
        )
    assert tiny_run(tmp_path / "corpus", tmp_path / "run", 2) == 1
    assert (
        "train_a: 4 frames make 2 positions, CTC on its glosses needs 4" in capsys.readouterr().err
    )


def test_more_processes_than_batches_are_refused(demo, monkeypatch):
    config = scratch_config(data_dir=str(demo), batch_size=40, output_dir="")
    run = Run(config, InferenceConfig(), Place())
    monkeypatch.setattr(
        train_lite,
        "load_data",
        lambda c, p: {
            s: train_lite.SignLanguageDataset(demo / f"labels.{s}", c, s) for s in ("train", "dev")
        },
    )
    run.place = Place(0, 3)
    with pytest.raises(train_lite.ConfigError, match="3 processes for 1 batches"):
        train_lite.start(run, None)


def test_running_out_of_memory_says_what_to_lower():
    src = {"attention_mask": torch.ones(4, 100)}
    with (
        pytest.raises(RunError, match="4 clips x 100 frames.*half the batch_size"),
        train_lite.on_device(src, Place()),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="something else"), train_lite.on_device(src, Place()):
        raise RuntimeError("something else")


def test_every_process_takes_its_share_of_every_window():
    lengths = list(range(10, 47))
    plans = [LengthBatchSampler(lengths, 4, True, 0, 2, rank, 2).plan() for rank in (0, 1)]
    clips = sorted(c for plan in plans for _, part, counts in plan if counts for c in part)
    assert clips == list(range(len(lengths))) and len(plans[0]) == len(plans[1])


def test_old_flags_do_what_they_did(demo):
    _, config, _, _ = train_lite.parse(
        [
            "--data_dir",
            str(demo),
            "--lr",
            "0.001",
            "--epochs",
            "3",
            "--no-resume",
            "--no-tensorboard",
        ]
    )
    assert (config.learning_rate, config.epochs, config.auto_resume, config.use_tensorboard) == (
        0.001,
        3,
        False,
        False,
    )


def test_who_asks_for_epochs_gets_epochs(demo):
    """ScratchConfig has a budget in steps, which must not silently win."""
    flags = ["--mt5_path=", "--data_dir", str(demo), "--epochs", "3"]
    assert train_lite.parse(flags)[1].max_steps == 0
    assert train_lite.parse(flags + ["--max_steps", "7"])[1].max_steps == 7


def test_the_command_line_picks_the_right_configuration(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = [
        type(train_lite.parse(argv)[1]).__name__
        for argv in (
            [],
            ["--mt5_path="],
            ["--data_dir", str(demo)],
            ["--data_dir", str(demo), "--mt5_path", ""],
        )
    ]
    assert kinds == ["DemoConfig", "DemoConfig", "TrainConfig", "ScratchConfig"]
    monkeypatch.setattr(
        train_lite.TrainConfig.__init__,
        "__defaults__",
        tuple(
            "" if value == "google/mt5-small" else value
            for value in train_lite.TrainConfig.__init__.__defaults__
        ),
    )
    assert type(train_lite.parse(["--data_dir", str(demo)])[1]).__name__ == "ScratchConfig", (
        "edited in config_lite.py"
    )


def test_evaluating_the_training_split_augments_nothing(finished, demo, monkeypatch, tmp_path):
    shutil.copytree(finished / "best", tmp_path / "best")
    monkeypatch.setattr(datasets_lite, "augment_clip", None)  # whoever calls it fails
    assert (
        command(
            "evaluate",
            tmp_path / "best",
            "--split",
            "train",
            "--data_dir",
            demo,
            "--augment",
            "true",
        )
        == 0
    )
    assert "exact_match" in json.loads((tmp_path / "best" / "metrics_train.json").read_text())


def test_a_damaged_best_is_named(finished, tmp_path, capsys):
    for name, words in (
        ("spiece.model", "tokeniser"),
        ("model.safetensors", "damaged"),
        ("config.json", "damaged"),
    ):
        folder = shutil.copytree(finished / "best", tmp_path / name)
        for file in folder.glob("tokenizer*" if name == "spiece.model" else name):
            file.unlink() if name == "spiece.model" else file.write_bytes(b"[]")
        assert command("translate", folder, "clip.pkl") == 1
        error = capsys.readouterr().err
        assert str(folder) in error and words in error and "Traceback" not in error, error


def test_a_clip_that_is_lost_between_two_starts_stops_the_second_by_name(demo, tmp_path, capsys):
    """Else the epoch would go on with other clips than it began with."""
    corpus = shutil.copytree(demo, tmp_path / "corpus")
    assert tiny_run(corpus, tmp_path / "run", 2, "--on_bad_clip", "skip") == 0
    (corpus / "pose_format" / "train_00003.pkl").unlink()
    assert tiny_run(corpus, tmp_path / "run", 4, "--on_bad_clip", "skip") == 1
    assert (
        "other" in (error := capsys.readouterr().err)
        and "clips" in error
        and "--auto_resume false" in error
    )


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
    state = {"steps": 0}
    original = train_lite.optimiser_step

    def stop_after_two(run):
        original(run)
        state["steps"] += 1
        if state["steps"] == 2:
            run.signals.number = 15

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lite, "optimiser_step", stop_after_two)
        assert command(*flags, "--output_dir", tmp_path / "parts", "--epochs", 2) == 128 + 15
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
    done = capsys.readouterr()
    assert "cannot spell 1 texts, first 'ქართული'" in done.err and done.out.startswith(
        "exact_match "
    ), done.err


def test_tensorboard_gets_scalars_texts_and_the_contact_sheet(demo, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert (
        tiny_run(
            demo,
            tmp_path / "run",
            4,
            "--use_tensorboard",
            "true",
            "--log_dir",
            tmp_path / "tb",
            "--log_interval",
            2,
        )
        == 0
    )
    events = EventAccumulator(str(tmp_path / "tb" / "run"))
    events.Reload()
    assert {"train/loss", "train/lr", "dev/bleu4", "dev/exact_match"} <= set(
        events.Tags()["scalars"]
    )
    assert (
        events.Tags()["images"] == ["poses"]
        and "dev/samples/text_summary" in events.Tags()["tensors"]
    )
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
    assert (tmp_path / "run" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_an_error_in_a_loading_process_is_one_line_and_ends_at_once(demo, tmp_path):
    """As when a file is replaced after the check: neither the worker's traceback, nor a minute's wait for it."""
    corpus = shutil.copytree(demo, tmp_path / "corpus")
    code = (
        "import sys, train_lite as t; from pathlib import Path; original = t.start\n"
        "def start(run, state):\n    original(run, state)\n"
        f"    Path({str(corpus)!r}, 'pose_format', 'train_00003.pkl').write_bytes(b'no pickle')\n"
        "t.start = start\nexec(open(t.__file__).read().split('if __name__')[1].partition(':')[2].replace('\\n    ', '\\n'),"
        " vars(t))"
    )
    flags = ["--data_dir", corpus, "--output_dir", tmp_path / "run", *TINY, 20, "--num_workers", 2]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=50,
    )
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if "warn" not in line.lower()]
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:], done.stderr
    assert "train_00003.pkl" in errors[-1] and "Traceback" not in done.stderr
