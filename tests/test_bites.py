"""What planted faults slipped past: figures computed by hand, and properties.

Each test fails under a fault of tests/tools/mutate.py, which no other test notices.
"""

import copy
import json
import math
import os
import pickle
import signal
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    batch_of,
    entry,
    random_clip,
    save_best,
    save_sound,
    scratch_config,
    scratch_model,
    without_dropout,
    write_corpus,
    write_labels,
    write_pose,
)
from test_train import (
    command,
    copied_parameters,
    epoch_plan,
    evaluation_loader,
    run_of,
    train_epoch,
)

import datasets_lite
import models_lite
import train_lite
from config_lite import ConfigError, DemoConfig, InferenceConfig, ScratchConfig, TrainConfig
from datasets_lite import (
    BODY,
    ClipReport,
    DataError,
    SignLanguageDataset,
    augment_clip,
    load_dataset_file,
    load_part_kp,
    load_pose_file,
    make_demo_corpus,
    read_clip,
    sample_frames,
)
from models_lite import (
    SignLanguageLite,
    find_best,
    hand_features,
    part_features,
    pieces_to_keep,
    train_tokenizer,
)
from train_lite import Place, Run, RunError, compute_metrics

MIRROR = torch.tensor([-1.0, 1.0, 1.0])


# ------------------------------------------------------------ joints and hands


def test_each_hand_has_its_own_wrist_and_the_left_alone_is_mirrored(clips):
    model = scratch_model(clips)
    src_input, _ = batch_of(clips, [0, 1])
    given = []
    model.pose_embed["hand"].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    model.encode_pose(src_input)
    left, right = given[0].chunk(2)
    body = src_input["body"]  # nose, ears, shoulders, elbows, left wrist, right wrist
    assert torch.equal(left[..., -3:], body[:, :, 7] * MIRROR)
    assert torch.equal(right[..., -3:], body[:, :, 8])
    for hand, part, sign in ((left, "left", -1), (right, "right", 1)):
        x = hand[..., :105].unflatten(-1, (21, 5))[..., 0]
        assert x.any()
        assert (sign * x * src_input[part][..., 0] >= 0).all(), part


def test_a_hand_is_divided_by_its_root_mean_square_over_the_seen_joints():
    hand = torch.zeros(1, 2, 21, 3)
    hand[0, 0, 0] = torch.tensor([0, 0, 1.0])
    hand[0, 0, 1] = torch.tensor([0.3, 0.4, 0.9])
    hand[0, 1, 2] = torch.tensor([0, 0.7, 0.8])
    rms = math.sqrt((0.25 + 0.49) / 3)
    wanted = torch.zeros(2, 21, 3)
    wanted[0, 0, 2] = 1
    wanted[0, 1] = torch.tensor([0.3 / rms, 0.4 / rms, 0.9])
    wanted[1, 2] = torch.tensor([0, 0.7 / rms, 0.8])
    shape = hand_features(hand, torch.zeros(1, 2, 3))[..., :105].unflatten(-1, (21, 5))
    assert torch.allclose(shape[0, ..., :3], wanted, atol=1e-6)


@pytest.mark.parametrize("odd", [0, 1])  # an odd number of frames is filled up to pairs
def test_the_front_end_is_what_its_docstring_draws(clips, odd):
    index = next(i for i, frames in enumerate(clips.lengths) if frames % 2 == odd)
    model = scratch_model(clips)
    src_input, _ = batch_of(clips, [index])
    body, left, right = (src_input[part] for part in ("body", "left", "right"))
    hand = model.pose_embed["hand"]
    parts = [
        model.pose_embed["body"](part_features(body)),
        hand(hand_features(left * MIRROR, body[:, :, 7] * MIRROR)),
        hand(hand_features(right, body[:, :, 8])),
    ]
    x = model.fusion(F.gelu(torch.cat(parts, -1)))
    if x.shape[1] % 2:
        x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    x = model.proj(torch.cat([x[:, 0::2], x[:, 1::2]], -1))
    for block in model.temporal:
        h = F.layer_norm(x, [32], block.norm.weight, block.norm.bias)
        h = F.conv1d(h.mT, block.conv.weight, block.conv.bias, padding=2).mT
        x = x + block.linear(F.gelu(h))
    x = F.layer_norm(x, [32], model.layer_norm.weight, model.layer_norm.bias)
    found, _ = model.encode_pose(src_input)
    assert torch.allclose(found, x + model.position.table[: x.shape[1]], atol=1e-5)


def test_a_frame_reaches_four_others_on_either_side(clips):
    """Two convolutions over five frames, each."""
    model = scratch_model(clips, temporal_stride=1)
    src_input, _ = batch_of(clips, [0])
    changed = src_input | {"body": src_input["body"].clone()}
    changed["body"][0, 9] += 0.5
    before, _ = model.encode_pose(src_input)
    after, _ = model.encode_pose(changed)
    reached = (before - after).abs().amax(-1)[0].nonzero().flatten().tolist()
    # the velocity of the frame behind changes, too
    assert reached == list(range(5, 15))


def test_new_layers_start_at_glorots_scale_without_biases(clips):
    model = scratch_model(clips, ctc_weight=0.5, d_model=64)
    for layer in (*model.pose_embed.values(), model.fusion, model.proj, model.gloss_head):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


def test_a_model_from_scratch_has_the_sizes_that_it_is_asked_for(clips):
    mt5 = scratch_model(clips, d_model=64, num_layers=3).mt5_model.config
    found = [mt5.d_model, mt5.d_kv, mt5.num_heads, mt5.d_ff, mt5.num_layers, mt5.num_decoder_layers]
    assert found == [64, 32, 2, 128, 3, 3]


def test_the_demo_s_arms_are_not_crossed(demo):
    """A sign moves the elbow between its own shoulder and its own wrist."""
    for number in range(5):
        points, _ = load_pose_file(demo / "pose_format" / f"train_{number:05d}.pkl")
        sag = [points[:, 7 + s] - (points[:, 5 + s] + points[:, 9 + s]) / 2 for s in (0, 1)]
        span = np.abs(points[:, 5] - points[:, 6]).max()
        assert np.abs(sag[0] - sag[1]).max() < 0.2 * span
        assert (points[:, 5, 0] > points[:, 6, 0]).all(), "the signer's left is the picture's right"
        gap = [np.median(np.abs(points[:, 9 + s] - points[:, 91 + 21 * s])) for s in (0, 1)]
        assert max(gap) < 0.1 * span, "a hand's first joint is at its wrist"


# ------------------------------------------------------------ glosses, texts, decoding


def test_glosses_are_the_best_path_without_repeats_blanks_and_padding(clips):
    model = scratch_model(clips, ctc_weight=0.5)
    model.glosses = ["a", "b"]
    best = torch.tensor([[0, 2, 2, 0, 2, 3, 3, 1], [3, 3, 0, 2, 3, 2, 2, 2]])
    mask = torch.tensor([[1] * 8, [1] * 4 + [0] * 4])
    found = model._read_gloss(F.one_hot(best, 4).float(), mask)
    assert found == [["a", "a", "b", "<unknown>"], ["b", "a"]]


def test_init_from_a_run_with_as_many_other_glosses_begins_their_head_anew(clips, tmp_path, capsys):
    def model_of(glosses, seed):
        torch.manual_seed(seed)
        texts = [entry["text"] for entry in clips.entries]
        return SignLanguageLite(scratch_config(ctc_weight=0.5), texts, [glosses])

    other = model_of(["a", "b"], 1)
    best = save_best(other, tmp_path / "best")
    for glosses, anew in ((["a", "c"], True), (["a", "b"], False)):
        model = model_of(glosses, 2)
        before = model.gloss_head.weight.clone()
        model.init_from(best)
        assert ("gloss_head.weight" in capsys.readouterr().out) == anew
        wanted = before if anew else other.gloss_head.weight
        assert torch.equal(model.gloss_head.weight, wanted)
        assert torch.equal(model.fusion.weight, other.fusion.weight)


DECODING = {
    "num_beams": 3,
    "max_new_tokens": 5,
    "length_penalty": 0.3,
    "no_repeat_ngram_size": 2,
}


def test_every_decoding_option_reaches_mt5(clips):
    model = scratch_model(clips)
    model.longest_text = 40
    given = {}

    def noted(**options):
        given.clear()
        given.update(options)
        return torch.zeros(1, 2, dtype=torch.long)

    model.mt5_model.generate = noted
    src_input, _ = batch_of(clips, [0])
    model.generate(src_input, **DECODING)
    assert {name: given[name] for name in DECODING} == DECODING
    assert given["do_sample"] is False
    model.generate(src_input, max_new_tokens=99)
    assert (given["num_beams"], given["max_new_tokens"]) == (1, 51)


def test_transformers_warns_of_no_default(clips, monkeypatch):
    """Of a length_penalty without beams it does where the user gives one."""
    warnings = []
    logger = transformers.generation.configuration_utils.logger
    monkeypatch.setattr(logger, "warning_once", lambda text, *_: warnings.append(text))
    model = scratch_model(clips)
    src_input, _ = batch_of(clips, [0])
    model.generate(src_input, max_new_tokens=2)
    assert not warnings
    model.generate(src_input, max_new_tokens=2, length_penalty=0.3)
    assert len(warnings) == 1 and "length_penalty" in warnings[0], warnings


def noting_generate(monkeypatch):
    """A list of the options that the model is called with from now on; its texts are numbers."""
    options = []

    def noted(self, src_input, **given):
        options.append(given)
        return [f"text {len(options)}"] * len(src_input["body"])

    monkeypatch.setattr(SignLanguageLite, "generate", noted)
    return options


def test_translate_decodes_as_the_run_did_and_as_it_is_told(
    clips, demo, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run" / "best"
    scratch_model(clips).save_pretrained(folder, **DECODING)
    options = noting_generate(monkeypatch)
    capsys.readouterr()
    files = sorted((demo / "pose_format").glob("train_000[01]*.pkl"))[:17]
    assert command("translate", tmp_path / "run", *files, "--num_beams", 4) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert lines == [f"{path}\ttext {number}" for number, path in enumerate(files, 1)]
    assert options == [DECODING | {"num_beams": 4}] * 17


def test_evaluate_takes_no_longer_clips_than_the_model_and_leaves_nothing_but_its_files(
    clips, demo, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    model = scratch_model(clips, max_length=64, output_dir=str(tmp_path / "elsewhere"))
    model.save_pretrained(run / "best", **DECODING)
    flags = ["evaluate", run, "--data_dir", demo]
    longer = random_clip(70)
    write_corpus(tmp_path / "longer", {"test_a": longer}, "test")
    own = ["evaluate", run, "--data_dir", tmp_path / "longer", "--split", "test"]
    assert command(*own, "--max_length", 65) == 1
    assert "has 65 frames, more than the model's max_length 64" in capsys.readouterr().err
    options = noting_generate(monkeypatch)
    assert command(*flags, "--split", "test") == 0
    assert options == [DECODING]
    assert not (tmp_path / "elsewhere").exists()
    assert sorted(path.name for path in run.iterdir()) == [
        "best",
        "metrics_test.json",
        "predictions_test.txt",
    ]


def test_a_learnt_vocabulary_has_one_longer_piece_for_400_characters():
    rng = np.random.default_rng(0)
    letters = [chr(ord("一") + number) for number in range(40)]
    words = ["".join(rng.choice(letters, 2)) for _ in range(80)]
    texts = ["".join(rng.choice(words, 5)) for _ in range(400)]
    for limit, most in ((3, 3), (1000, 10)):
        pieces = train_tokenizer(texts, limit).get_vocab()
        longer = [piece for piece in pieces if len(piece) > 1 and "<" not in piece]
        assert most - 2 <= len(longer) <= most + 2, longer
        assert set("".join(texts)) <= pieces.keys()


class Vocabulary:
    """Twelve pieces; every text is the piece 书 and its end."""

    all_special_ids = [0, 1, 2]

    def get_vocab(self):
        pieces = ["<pad>", "</s>", "<unk>", "▁", "书", "a", "ab"]
        pieces += ["<extra_id_0>", "▁<extra_id_1>", "<0x41>", "水", "▁b"]
        return {piece: number for number, piece in enumerate(pieces)}

    def __call__(self, texts):
        return SimpleNamespace(input_ids=[[4, 1] for _ in texts])


def test_single_characters_and_bytes_stay_and_sentinels_never_do():
    assert pieces_to_keep(Vocabulary()) == [0, 1, 2, 3, 4, 5, 6, 9, 10, 11]
    # all but "ab", and not "▁b" less than "书"
    assert pieces_to_keep(Vocabulary(), ["书"]) == [0, 1, 2, 3, 4, 5, 9, 10, 11]


# ------------------------------------------------------------ the gradient of a step


def gradients_at_the_step(run):
    """{name: gradient}, filled when the optimiser steps, before anything moves."""
    gradients = {}

    def note(*_):
        for name, parameter in run.model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()

    run.optimizers[0].register_step_pre_hook(note)
    return gradients


@pytest.mark.parametrize("limit", [0, 0.01])
def test_a_step_s_gradient_is_that_of_the_mean_over_its_tokens(clips, limit):
    """Seen before the optimiser: AdamW forgives a gradient of the wrong scale."""
    model = without_dropout(scratch_model(clips, ctc_weight=0.5))
    run = run_of(model, clips, batch_size=4, gradient_accumulation=3, max_grad_norm=limit)
    window = sum((batch for _, batch, _ in epoch_plan(run)[:3]), [])
    loss = model(*batch_of(clips, window)).loss
    names, parameters = zip(*model.named_parameters())
    wanted = dict(zip(names, torch.autograd.grad(loss, parameters)))
    norm = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    assert norm > 0.01, "or nothing is clipped"
    scale = min(1, limit / norm) if limit else 1
    found = gradients_at_the_step(run)
    run.total_steps = 1
    train_epoch(run)
    for name in names:
        off = (found[name] - scale * wanted[name]).abs().max()
        assert off < 1e-5 * scale * norm, f"{name}: off by {off:.1e} of {scale * norm:.1e}"


@dataclass
class Beside(Place):
    """A place beside another process, whose part of what is gathered is this."""

    other: tuple = ()

    def gather(self, value=None):
        return [value, self.other]


def ready_to_step(clips, window, gradient=1.0, **options):
    """A run whose window is at its end, all gradients alike."""
    run = run_of(scratch_model(clips), clips, **options)
    run.window = Counter(window)
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    return run


def test_two_processes_divide_by_the_tokens_of_both_and_stop_together(clips):
    run = ready_to_step(clips, {"tokens": 3, "loss": 1.0}, max_grad_norm=0)
    other = {"tokens": 5, "loss": 2.0, "clips": 4}
    run.place = Beside(world=2, other=(Counter(other), signal.SIGTERM))
    found = gradients_at_the_step(run)
    with pytest.raises(train_lite.Stopped) as stopped:
        train_lite.optimiser_step(run)
    assert stopped.value.args == (signal.SIGTERM,)
    assert run.step == 1 and not run.window
    # DistributedDataParallel has halved the sum
    assert {float(value) for grad in found.values() for value in grad.unique()} == {2 / 8}
    assert run.meter == {"tokens": 8, "loss": 3.0, "clips": 4}
    assert run.last_loss == 3 / 8


def test_a_repeated_batch_counts_for_nothing(clips):
    """It keeps a process in step with the others, where a window does not divide."""
    run = run_of(scratch_model(clips).train(), clips)
    train_lite.micro_batch(run, 0, False, *batch_of(clips, [0, 1]), last=True)
    gradients = [parameter.grad for parameter in run.model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert not run.window


def test_processes_number_their_batches_as_one_process_does():
    """So dropout is drawn alike, and a window that does not divide has no clip twice."""
    lengths = list(range(10, 47))
    (alone,) = plans_of(lengths, accumulation=4, world=1)
    for world in (2, 4):
        batches = {}
        for plan in plans_of(lengths, accumulation=4 // world, world=world):
            for number, batch, counts in plan:
                assert not (counts and number in batches)
                if counts:
                    batches[number] = batch
        assert batches == {number: batch for number, batch, _ in alone}
    whole, repeated = plans_of(lengths[:33], accumulation=1, world=2)
    assert [counts for *_, counts in whole + repeated].count(False) == 1


def plans_of(lengths, accumulation, world):
    plans = []
    for rank in range(world):
        config = TrainConfig(batch_size=4, gradient_accumulation=accumulation)
        data = SimpleNamespace(lengths=lengths, totals=lengths, epoch=0)
        plans.append(train_lite.plan_epoch(data, config, rank, world))
    return plans


def test_dropout_follows_from_seed_epoch_and_number(clips):
    def loss(number=3, epoch=1, seed=5):
        run = run_of(scratch_model(clips).train(), clips, seed=seed)
        run.epoch = epoch
        train_lite.micro_batch(run, number, True, *batch_of(clips, [0, 1]), last=True)
        return run.window["loss"]

    losses = [loss(), loss(number=4), loss(epoch=2), loss(seed=6)]
    assert len(set(losses)) == 4, losses
    assert loss() == losses[0]


def test_a_new_model_follows_from_the_seed(clips):
    data = {"train": copy.copy(clips), "dev": copy.copy(clips)}
    weights = []
    for seed in (1, 1, 2):
        model = train_lite.build_model(scratch_config(seed=seed), data)
        weights.append(model.fusion.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_new_model_is_centred_by_its_training_clips(clips):
    data = {"train": copy.copy(clips), "dev": copy.copy(clips)}
    model = train_lite.build_model(scratch_config(), data)
    wanted = scratch_model(clips)
    wanted.centre(batch_of(clips, range(len(clips)))[0])
    for part, layer in model.pose_embed.items():
        assert layer.mean.any()
        assert torch.allclose(layer.mean, wanted.pose_embed[part].mean, atol=1e-6), part


def test_a_run_from_anothers_weights_is_centred_by_its_own_clips(clips, tmp_path):
    data = {"train": copy.copy(clips), "dev": copy.copy(clips)}
    other = scratch_model(clips)
    other.save_pretrained(tmp_path)
    model = train_lite.build_model(scratch_config(seed=7, init_from=str(tmp_path)), data)
    for part, layer in model.pose_embed.items():
        assert torch.equal(layer.weight, other.pose_embed[part].weight), part
        assert layer.mean.any(), part
        assert not other.pose_embed[part].mean.any(), part


# ------------------------------------------------------------ steps that are not finite


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_loss_or_a_gradient_alone_that_is_not_finite_skips_the_step(clips, fault):
    run = ready_to_step(clips, {"tokens": 3, "loss": math.inf if fault == "loss" else 1.0})
    if fault == "gradient":
        run.model.fusion.bias.grad[0] = math.nan
    before = copied_parameters(run.model)
    train_lite.optimiser_step(run)
    assert (run.skipped, run.bad_in_a_row, run.step) == (1, 1, 1)
    assert not run.meter, "it does not count in the averages"
    assert run.schedulers[0].last_epoch == 1, "the schedule moves on"
    after = copied_parameters(run.model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_ten_bad_steps_end_the_run_unless_a_good_one_comes_between(clips):
    run = ready_to_step(clips, {})

    def step(loss):
        run.window = Counter(tokens=1, loss=loss)
        run.model.fusion.bias.grad = torch.ones(32)
        train_lite.optimiser_step(run)

    for loss in [math.nan] * 9 + [1.0] + [math.nan] * 9:
        step(loss)
    assert (run.skipped, run.bad_in_a_row) == (18, 9)
    with pytest.raises(RunError, match="10 steps in a row"):
        step(math.nan)


# ------------------------------------------------------------ what last.pt keeps


def standing_run(clips, folder, **options):
    """A run in the middle, all its figures different."""
    run = run_of(scratch_model(clips), clips, **options)
    run.data["dev"] = clips
    run.folder = folder
    run.epoch, run.batch, run.step, run.skipped, run.bad_in_a_row = 3, 4, 5, 6, 7
    run.meter = Counter(tokens=8, loss=9.5)
    run.average = []
    run.history = [{"step": 4, "bleu4": 1.0, "chrf": 1.0, "dev_loss": 1.0, "dev_clips": 9}]
    return run


KEPT = ("epoch", "batch", "step", "skipped", "bad_in_a_row", "meter", "history", "average")


def test_a_resumed_run_stands_where_it_stood(clips, tmp_path):
    run = standing_run(clips, tmp_path)
    run.average = [torch.full((), 2.0)]
    run.optimizers[0].step()
    for _ in range(run.step):
        run.schedulers[0].step()
    train_lite.save_last(run)
    (tmp_path / "best").mkdir()
    again = run_of(scratch_model(clips), clips)
    again.folder = tmp_path
    # a larger budget: the rate is that of today's schedule
    budget = (again.config, 100, 2)
    state = train_lite.load_checkpoint(tmp_path / "last.pt")
    again.optimizers, again.schedulers = train_lite.make_optimizers(again.model, *budget, state)
    train_lite.restore(again, state)
    for name in KEPT:
        assert getattr(again, name) == getattr(run, name), name
    optimizers, schedulers = train_lite.make_optimizers(scratch_model(clips), *budget)
    for optimizer, scheduler in zip(optimizers, schedulers):
        optimizer.step()
        for _ in range(run.step):
            scheduler.step()
    rates = [optimizer.param_groups[0]["lr"] for optimizer in again.optimizers]
    assert rates == pytest.approx([scheduler.get_last_lr()[0] for scheduler in schedulers])
    (tmp_path / "best").rmdir()
    train_lite.restore(again, train_lite.load_checkpoint(tmp_path / "last.pt"))
    assert again.history == [], "dev is scored anew where there is no best/"


@pytest.mark.parametrize(
    "step, scored, finished", [(10, 10, True), (11, 11, True), (10, 9, False), (9, 9, False)]
)
def test_a_run_is_finished_when_its_last_weights_are_scored(
    clips, tmp_path, step, scored, finished
):
    run = standing_run(clips, tmp_path)
    run.step = step
    run.history[-1]["step"] = scored
    train_lite.save_last(run)
    assert train_lite.load_checkpoint(tmp_path / "last.pt")["finished"] is finished


def figures(bleu4, exact, dev_loss, dev_clips=100, chrf=0.0):
    scores = {"bleu4": bleu4, "exact_match": exact, "chrf": chrf}
    return scores | {"dev_loss": dev_loss, "dev_clips": dev_clips}


@pytest.mark.parametrize(
    "history, best",
    [
        # of 100 clips 50 % has a standard error of 5
        ([figures(40, 0, 1), figures(50, 0, 1), figures(44.9, 0, 1)], 1),
        ([figures(40, 0, 1), figures(50, 0, 1), figures(45.1, 0, 1)], 2),
        ([figures(45.1, 0, 1), figures(50, 0, 1), figures(10, 0, 1)], 1),
        # of 10,000 clips it has one of half a point
        ([figures(50, 0, 1, 10**4), figures(49.4, 0, 1, 10**4)], 0),
        ([figures(50, 0, 1, 10**4), figures(49.6, 0, 1, 10**4)], 1),
        # exact match where no text has four words; loss and chrF tell nothing
        ([figures(0, 50, 0), figures(0, 60, 9), figures(0, 1, 0)], 1),
        ([figures(0, 46, 0, chrf=58.8), figures(0, 71, 0, chrf=50.6)], 1),
        ([figures(0, 0, 3), figures(0, 0, 9)], 1),
        ([figures(100 + 1e-13, 100, 1), figures(99.9, 100, 1)], 0),
        # real: one signer's dev split, whose early peak had 61 % of test, the end 92
        ([figures(0, x, 1, 150) for x in (0, 71, 51, 55, 61, 61, 56, 63, 61)], 8),
        ([figures(0, x, 1, 150) for x in (0, 71, 51, 55, 61)], 4),
        ([figures(0, x, 1, 150) for x in (0, 71, 51)], 1),
        # below 50 % the error of the highest is the larger one
        ([figures(x, 0, 1) for x in (30, 20, 17)], 2),
        # what collapses, or goes on far below, is never best, however long
        ([figures(x, 0, 1, 150) for x in (0, 20, 50, 70, 80, *[0] * 10)], 4),
        ([figures(x, 0, 1, 150) for x in (0, 50, 80, *[68] * 10)], 2),
        ([figures(x, 0, 1, 150) for x in (0, 50, 80, *[69] * 10)], 12),
        # one lucky 100 % does not stay for ever
        ([figures(x, 0, 1, 150) for x in (0, 90, 100, 98, 99, 98, 99)], 6),
    ],
)
def test_best_is_the_latest_that_is_not_plainly_worse(history, best):
    run = Run(TrainConfig(), InferenceConfig(), Place(), history=history)
    assert run.best is history[best]


def test_validation_saves_best_where_it_is_the_best_and_writes_every_line(
    clips, tmp_path, monkeypatch
):
    run = run_of(scratch_model(clips), clips)
    run.data["dev"] = clips
    run.folder = tmp_path
    run.signals = SimpleNamespace(number=0)
    rows = [(0, "a clip", "书\t花", "书\n"), (1, "another", "水", "鱼")]
    more = {"shuffled_chrf": 0.0, "exact_match": 50.0}
    more |= {"unique_ratio": 100.0, "reference_unique_ratio": 100.0}
    saved = []
    given = []

    scores = [(50, 1, 3.0), (1, 9, 1.0), (99, 2, 3.0), (20, 2, 3.5)]

    def scored(model, loader, inference, place, signals):
        given.append(signals)
        return figures(*scores[run.step]) | more, rows

    monkeypatch.setattr(train_lite, "evaluate", scored)
    monkeypatch.setattr(train_lite, "save_best", lambda run, *what: saved.append(run.step))
    for run.step in range(4):
        run.meter = Counter(tokens=4, loss=6.0, clips=8, waited=1.0, computed=3.0)
        run.skipped = run.step
        train_lite.validate(run)
        assert not run.meter
    assert saved == [0, 2]
    assert given == [run.signals] * 4, "a signal ends an evaluation"
    last = run.history[-1]
    assert (last["train_loss"], last["clips_per_second"], last["skipped_steps"]) == (1.5, 2.0, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert (tmp_path / "predictions_dev.txt").read_text(encoding="utf-8") == (
        "name\treference\tprediction\na clip\t书 花\t书 \nanother\t水\t鱼\n"
    )
    run.place = Beside(world=2, other=())
    train_lite.validate(run)
    assert given[-1] is None, "several processes stop at a step, together"


def test_a_signal_ends_an_evaluation(clips):
    loader = evaluation_loader(clips, 16)
    signals = SimpleNamespace(number=signal.SIGTERM)
    with pytest.raises(train_lite.Stopped) as stopped:
        train_lite.evaluate(scratch_model(clips), loader, InferenceConfig(), signals=signals)
    assert stopped.value.args == (signal.SIGTERM,)


def test_loading_processes_leave_signals_to_the_main_one(clips, monkeypatch):
    loader = evaluation_loader(clips, 16)
    set_to = {}
    monkeypatch.setattr(signal, "signal", set_to.__setitem__)
    loader.worker_init_fn(0)
    assert set_to == dict.fromkeys(train_lite.STOP_SIGNALS, signal.SIG_IGN)
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} == set_to.keys()


def test_a_log_line_and_a_checkpoint_come_when_they_are_due(clips, monkeypatch, capsys):
    run = run_of(scratch_model(clips), clips, log_interval=5)
    saved = []
    monkeypatch.setattr(train_lite, "save_last", lambda run: saved.append(run.step))
    run.meter = Counter(tokens=8, nll=12.0, correct=2, clips=6, waited=1.0, computed=3.0)
    run.last_loss = 1.25
    run.batch = 1
    capsys.readouterr()
    for run.step in (4, 5):
        train_lite.after_step(run)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "epoch 001 | step 000005/000010 | loss 1.25 | nll 1.5 | accuracy 25 | lr 0.0009756 | "
        "clips_per_second 1.5 | waiting_for_data 25"
    ]
    assert saved == []
    monkeypatch.setattr(train_lite, "SAVE_EVERY", -1)
    train_lite.after_step(run)
    assert saved == [5]


# ------------------------------------------------------------ the run's folder


def test_what_is_written_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """And the old one steps aside before the new one comes, and goes after it."""
    calls = []

    def note(what, function):
        def noted(*paths, **options):
            names = [Path(path).name.replace(f".{os.getpid()}", "") for path in paths[:2]]
            calls.append((what, *names))
            return function(*paths, **options)

        return noted

    monkeypatch.setattr(train_lite, "flush_to_disk", note("flush", train_lite.flush_to_disk))
    monkeypatch.setattr(os, "replace", note("rename", os.replace))

    def content(folder):
        folder.mkdir()
        (folder / "weights").write_bytes(b"x")

    best = tmp_path / "best"
    best.mkdir()
    (tmp_path / "best.old").mkdir()
    train_lite.write_whole(best, content)
    assert calls == [
        ("flush", "weights"),
        ("flush", "best.part"),
        ("rename", "best", "best.old"),
        ("rename", "best.part", "best"),
        ("flush", tmp_path.name),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_flushing_reaches_the_disk(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    handles = []
    monkeypatch.setattr(os, "fsync", handles.append)
    train_lite.flush_to_disk(tmp_path / "file")
    assert len(handles) == 1
    with pytest.raises(OSError):
        os.fstat(handles[0])  # closed again


def test_after_a_crash_best_old_is_as_good(tmp_path):
    def make(name):
        (tmp_path / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / file).write_bytes(b"x")

    make("run/best.old")
    config = scratch_config(output_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="holds another run.*last.pt is missing"):
        train_lite.choose_folder(config, {})
    assert find_best(tmp_path / "run") == tmp_path / "run" / "best.old"
    assert find_best(tmp_path / "run" / "best") == tmp_path / "run" / "best.old"
    make("run/best")
    assert find_best(tmp_path / "run") == tmp_path / "run" / "best"
    assert find_best(tmp_path / "run" / "best") == tmp_path / "run" / "best"
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "run" / "best" / file).rename(tmp_path / "aside")
        assert find_best(tmp_path / "run") == tmp_path / "run" / "best.old", f"without {file}"
        (tmp_path / "aside").rename(tmp_path / "run" / "best" / file)


def test_the_lock_clears_away_what_a_dead_process_left_half(tmp_path):
    (tmp_path / "last.pt.1.part").write_bytes(b"x")
    (tmp_path / "best.1.part").mkdir()
    (tmp_path / "last.pt").write_bytes(b"x")
    with train_lite.lock_folder(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "last.pt"]


def described(**options):
    """A run's description; processes and labels beside the configuration."""
    world = options.pop("processes", 1)
    labels = options.pop("labels", 1)
    config = TrainConfig(mt5_path="", **options)
    return Run(config, InferenceConfig(), Place(world=world), labels=labels).description


@pytest.mark.parametrize(
    "changed",
    [
        {"labels": 2},
        {"processes": 2},
        {"weight_decay": 0.02},
        {"seed": 1},
        {"batch_size": 3},
        {"augment": True},
        {"max_length": 128},
        {"max_grad_norm": 0.5},
        {"epochs": 49},
        {"max_steps": 100000},  # another kind of budget
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_run_goes_on_under_no_other_configuration(changed):
    (name,) = changed
    assert train_lite.differences(described(), described(**changed)).startswith(f"{name}: ")


def test_a_run_goes_on_with_what_does_not_shape_it_and_with_a_larger_budget():
    free = {"output_dir": "a", "num_workers": 9, "device": "cpu", "log_interval": 3}
    free |= {"val_interval": 2, "log_dir": "b", "gradient_checkpointing": True}
    free |= {"on_bad_clip": "skip", "auto_resume": False, "epochs": 51}
    assert train_lite.differences(described(), described(**free)) == ""
    in_steps = [described(max_steps=steps, epochs=epochs) for steps, epochs in ((7, 9), (8, 1))]
    assert train_lite.differences(*in_steps) == "", "epochs are not read where steps decide"
    assert train_lite.differences(in_steps[1], in_steps[0]) == "max_steps: 8 -> 7"
    assert train_lite.differences(in_steps[0], described(epochs=9)).startswith("max_steps: ")


def test_resume_from_elsewhere_takes_that_run_and_no_other_configuration(tmp_path):
    last = tmp_path / "first" / "last.pt"
    last.parent.mkdir()
    save_sound({"model": {}, "optimizer": {}, "history": [], "config": described()}, last)
    config = TrainConfig(mt5_path="", resume_from=str(last), output_dir=str(tmp_path / "second"))
    assert train_lite.choose_folder(config, described()) == (tmp_path / "second", last)
    config.output_dir = ""
    assert train_lite.choose_folder(config, described()) == (last.parent, last)
    with pytest.raises(ConfigError, match="configured otherwise.*weight_decay: 0.01 -> 0.5"):
        train_lite.choose_folder(config, described(weight_decay=0.5))


def test_the_labels_digest_tells_of_train_and_of_dev(tmp_path):
    digests = []
    for train, dev in (("书", "花"), ("水", "花"), ("书", "水"), ("花", "书"), ("书", "花")):
        for split, text in (("train", train), ("dev", dev)):
            # not packed: gzip writes the time, too
            labels = json.dumps({"a": entry("a", text)})
            (tmp_path / f"labels.{split}").write_text(labels, encoding="utf-8")
        digests.append(train_lite.labels_digest(TrainConfig(data_dir=str(tmp_path))))
    assert len(set(digests)) == 4
    assert digests[-1] == digests[0]


def test_warm_up_is_at_most_a_tenth_of_steps_or_half_of_epochs(clips):
    model = scratch_model(clips)
    for options, total, first in (
        ({"max_steps": 100}, 100, 1 / 10),
        ({"epochs": 6}, 60, 1 / 30),
        ({"epochs": 50}, 500, 1 / 50),
        ({"epochs": 50, "warmup_epochs": 0.2}, 500, 1 / 2),
    ):
        config = TrainConfig(learning_rate=1e-3, **options)
        optimizers, _ = train_lite.make_optimizers(model, config, total, steps_per_epoch=10)
        for optimizer in optimizers:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * first), options


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="device is 'cuda'"):
        train_lite.find_place(TrainConfig(device="cuda"))
    assert train_lite.find_place(TrainConfig()).device == torch.device("cpu")


def test_an_interrupt_and_a_missing_package_have_their_exit_codes(monkeypatch, capsys):
    def fails(error):
        def run(config, inference, args):
            raise error

        monkeypatch.setitem(train_lite.COMMANDS, "train", run)
        return command("--mt5_path=", "--data_dir", ".")

    assert fails(KeyboardInterrupt()) == 130
    assert fails(OSError("no space")) == 1
    assert fails(ModuleNotFoundError("no tensorboard", name="tensorboard")) == 1
    assert "pip install tensorboard" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError())


# ------------------------------------------------------------ scores


def test_edit_distance_by_hand():
    assert train_lite.edit_distance("kitten", "sitting") == 3
    assert train_lite.edit_distance("", "abc") == train_lite.edit_distance("abc", "") == 3
    # where a replacement costs two, what is left is the longest common subsequence: bcba
    assert train_lite.edit_distance("abcbdab", "bdcaba", replace=2) == 7 + 6 - 2 * 4


def test_rouge_l_by_hand():
    """Common acd: precision 3/4, recall 3/5, recall weighted by 1.2 squared."""
    wanted = 2.44 * 0.75 * 0.6 / (0.6 + 1.44 * 0.75)
    assert train_lite.rouge_l("abcd", "acdxy") == pytest.approx(wanted)
    assert train_lite.rouge_l("abcd", "xy") == 0
    scores = compute_metrics(["abcd", "xy", "xy"], ["acdxy", "xy", "abc"])
    assert scores["rouge_l"] == pytest.approx(100 * (wanted + 1 + 0) / 3)
    scores = compute_metrics(["a bb"], ["bb a a"], "en")
    assert scores["rouge_l"] == pytest.approx(100 * 2.44 * (1 / 6) / (1 / 3 + 1.44 / 2))


def test_bleu_of_words_parts_punctuation_from_them():
    """As 13a does: 3 of 4 tokens; by spaces it would be 2 of 3."""
    english = compute_metrics(["hello, big world"], ["hello, small world"], "en")
    assert english["bleu1"] == pytest.approx(75)
    assert "tok:13a" in english["bleu_signature"]
    # by character: 3 of 4, and the pairs 1 of 3
    chinese = compute_metrics(["我 买书。"], ["我卖书。"])
    assert chinese["bleu1"] == pytest.approx(75)
    assert chinese["bleu2"] == pytest.approx(100 * math.sqrt(3 / 4 * 1 / 3))


def test_shares_of_texts_by_hand():
    predictions = ["书", "书", "花", "花"]
    references = ["书", "水", "花", "花"]
    scores = compute_metrics(predictions, references)
    assert (scores["unique_ratio"], scores["exact_match"]) == (50, 75)
    scores = train_lite.scores_and_baselines(predictions, references, "zh")
    assert scores["reference_unique_ratio"] == 75


def test_texts_are_scored_normalised():
    assert train_lite.comparable([" Ａ，  ｂ\u3000c "], "en") == ["A, b c"]
    assert train_lite.comparable([" 今天， 书\u3000"], "zh") == ["今天,书"]


@pytest.mark.parametrize("counts", [(8, 1, 1), (6, 2, 2), (5, 2, 2), (3, 3, 4), (1,) * 9, (3,)])
def test_an_exchange_leaves_as_few_their_own_text_as_can_be(counts):
    """Of n clips where one text has m, at least 2 m - n keep it."""
    texts = [letter for letter, count in zip("abcdefghi", counts) for _ in range(count)]
    texts = texts[1::2] + texts[0::2]
    order = train_lite.exchange(texts)
    assert sorted(order) == list(range(len(texts)))
    kept = sum(texts[i] == texts[order[i]] for i in range(len(texts)))
    assert kept == max(0, 2 * max(counts) - len(texts))


def test_the_shuffled_scores_are_those_of_exchanged_texts():
    references = ["今天我买书", "明天你看花", "他在家"]
    scores = train_lite.scores_and_baselines(references, references, "zh")
    exchanged = [references[i] for i in train_lite.exchange(references)]
    wanted = compute_metrics(exchanged, references)
    assert scores["exact_match"] == 100
    for key in ("bleu4", "chrf", "exact_match"):
        assert scores[f"shuffled_{key}"] == wanted[key] < scores[key], key


@pytest.mark.parametrize(
    "changed, warned",
    [
        ({}, False),
        ({"shuffled_chrf": 8.4}, True),
        ({"unique_ratio": 15.9}, True),
        ({"chrf": 95.0, "shuffled_chrf": 83.0}, False),  # like sentences
        ({"shuffled_chrf": 8.4, "exact_match": 50.0}, False),
    ],
)
def test_a_collapse_is_little_gap_or_little_variety(changed, warned):
    metrics = {"chrf": 10.0, "shuffled_chrf": 8.3, "exact_match": 49.0}
    metrics |= {"unique_ratio": 16.0, "reference_unique_ratio": 80.0}
    words = train_lite.collapse_warning(metrics | changed, ["书", "花", "书"])
    assert bool(words) == warned
    if warned:
        assert "collapsed onto '书' (2 of 3 outputs" in words
    assert not train_lite.collapse_warning(metrics | changed, ["书"])


def test_scores_are_printed_with_exact_match_first_and_an_interval_where_it_tells(capsys):
    rows = [(0, "a", "今天我买书", "今天我买书"), (1, "b", "明天你看花", "明天你看花")]
    metrics = {"dev_loss": 1.23456, "dev_accuracy": 33.333, "bleu4": 0.0, "exact_match": 100.0}
    more = {"chrf": 10.0, "shuffled_chrf": 0.0, "unique_ratio": 1, "reference_unique_ratio": 1}
    train_lite.print_scores(metrics | more, rows, "zh")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "exact_match 100.00 [100.00, 100.00]",
        "dev_loss 1.235",
        "dev_accuracy 33.33",
        "bleu4 0",
    ]


def test_long_texts_are_shortened_for_the_eye():
    assert train_lite.shorten("x" * 60) == "x" * 60
    assert train_lite.shorten("x" * 61) == "x" * 57 + "..."


class Scripted(torch.nn.Module):
    """A model whose texts and glosses are written by hand; the nll of its batches, too."""

    def __init__(self, texts, glosses, nll):
        super().__init__()
        self.texts = texts
        self.glosses = glosses
        self.nll = iter(nll)
        self.options = []

    def forward(self, src_input, tgt_input):
        count = len(src_input["names"])
        gloss = [self.glosses[name] for name in src_input["names"]]
        nll = torch.tensor(next(self.nll))
        return SimpleNamespace(nll=nll, num_tokens=5 * count, num_correct=2, gloss=gloss)

    def generate(self, src_input, **options):
        self.options.append(options)
        return [self.texts[name] for name in src_input["names"]]


def test_an_evaluation_by_hand(tmp_path):
    frames = {"a": 12, "b": 20, "c": 16}  # evaluated in the order b, c, a
    write_corpus(tmp_path, {name: random_clip(frames[name]) for name in frames}, "dev")
    glosses = {"a": ["我", "买", "书"], "b": ["你", "看"], "c": []}
    labels = {name: entry(name, "我买书", glosses[name]) for name in frames}
    write_labels(tmp_path / "labels.dev", labels)
    dataset = SignLanguageDataset(tmp_path / "labels.dev", scratch_config(), "dev")
    # one gloss is missing, one replaced, two are too many; where there are none, none count
    found = {"a": ["我", "书"], "b": ["你", "书", "我", "他"], "c": ["水"]}
    model = Scripted({"a": "我买书", "b": "你", "c": "他"}, found, nll=[1.0, 4.0])
    inference = InferenceConfig(**DECODING)
    metrics, rows = train_lite.evaluate(model, evaluation_loader(dataset, 2), inference)
    assert metrics["gloss_wer"] == pytest.approx(100 * (1 + 3) / 5)
    assert metrics["dev_loss"] == pytest.approx((10 * 1.0 + 5 * 4.0) / 15)
    assert metrics["dev_accuracy"] == pytest.approx(100 * 4 / 15)
    assert metrics["exact_match"] == pytest.approx(100 / 3)
    assert rows == [
        (0, "a", "我买书", "我买书"),
        (1, "b", "我买书", "你"),
        (2, "c", "我买书", "他"),
    ]
    assert model.options == [asdict(inference)] * 2


# ------------------------------------------------------------ what check prints


def test_files_of_one_size_and_time_are_told_apart(tmp_path):
    """As a copied corpus may have them; what is found for the one is not taken for the other."""
    keypoints, scores = random_clip(4)
    label = write_corpus(tmp_path, {"a": (keypoints, scores), "b": (keypoints, 0 * scores)})
    files = [tmp_path / "pose_format" / f"{name}.pkl" for name in "ab"]
    for path in files:
        os.utime(path, ns=(10**18, 10**18))
    assert len({path.stat().st_size for path in files}) == 1
    with pytest.raises(DataError, match="1 of 2 clips are unusable:\n  b: "):
        SignLanguageDataset(label, scratch_config(), "train")


def test_bad_clips_are_listed_anew_at_each_start(tmp_path):
    keypoints, scores = random_clip(4)
    config = scratch_config(on_bad_clip="skip", output_dir=str(tmp_path / "run"))
    for split in ("train", "dev"):
        clips = {f"{split}_good": (keypoints, scores), f"{split}_bad": (keypoints, 0 * scores)}
        write_corpus(tmp_path, clips, split)
    for _ in range(2):
        for split in ("train", "dev"):
            SignLanguageDataset(tmp_path / f"labels.{split}", config, split)
    lines = (tmp_path / "run" / "bad_clips.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == ["train\ttrain_bad", "dev\tdev_bad"]


def test_a_clip_is_counted_by_hand(tmp_path):
    keypoints, scores = random_clip(5)
    scores[0, [5, 91]] = 0.3  # a body joint, the left hand's first
    scores[0, 112] = 0.1  # and the right one's: no hand in frame 0
    scores[1, 132] = 0
    keypoints[2, 100, 0] = math.nan
    scores[3, 9] = math.inf  # seen, but not finite
    keypoints[4, 40] = math.nan  # the face is not read
    scores[4, 91] = 0  # the right hand alone is left
    path = write_pose(tmp_path / "a.pkl", keypoints, scores)
    report = datasets_lite.inspect_clip(path)
    # of 45, 105, 105 joints, and of 5 frames
    counts = [report.body * 0.45, report.left * 1.05, report.right * 1.05, report.no_hand * 0.05]
    assert counts == pytest.approx([1, 3, 2, 1])
    assert report.frames == 5
    assert (report.not_finite, report.in_pixels) == (2, False)
    write_pose(path, keypoints * 500, scores)
    assert datasets_lite.inspect_clip(path).in_pixels


def clip_report(frames, no_hand=0):
    """Of a clip in which nothing else is amiss."""
    return ClipReport(frames, 0, 0, 0, no_hand, 0, False, "", [])


def split_of(reports, texts, max_length=20):
    entries = []
    for number, (report, text) in enumerate(zip(reports, texts)):
        gloss = ["a"] * int(text[0])  # as many as the first digit says
        entries.append({"name": f"c{number}", "text": text, "gloss": gloss, "report": report})
    config = SimpleNamespace(max_length=max_length, temporal_stride=2, ctc_weight=0.5)
    return SimpleNamespace(entries=entries, config=config)


def test_the_figures_of_check_by_hand():
    reports = [
        ClipReport(10, 8, 4, 0, 20, 2, True, "", []),
        ClipReport(30, 12, 6, 20, 30, 1, False, "", []),
    ]
    codec = SimpleNamespace(max_text_length=3, unknown=2, ids=lambda text: [*map(int, text), 1])
    data = {
        "train": split_of(reports, ["34", "5678"]),
        "dev": split_of([clip_report(20, no_hand=55)] * 20, ["34", "92"] + ["3"] * 18),
    }
    assert train_lite.data_report(data, codec).splitlines() == [
        "train: 2 clips, frames 20 (11 to 29), 50.0 % over max_length 20; 1 in pixels",
        "  not seen: body 11.0 %, left hand 5.5 %, right hand 15.0 %; no hand in 27.5 % of the "
        "frames; 3 joints not finite",
        "  pieces a text 4 (3 to 5), 50.0 % over max_text_length 3",
        "dev: 20 clips, frames 20 (20 to 20), 0.0 % over max_length 20; 0 in pixels",
        "  not seen: body 0.0 %, left hand 0.0 %, right hand 0.0 %; no hand in 55.0 % of the "
        "frames; 0 joints not finite",
        "  pieces a text 2 (2 to 3), 0.0 % over max_text_length 3",
        "warning: too many of train's clips exceed max_length 20: --max_length 30 covers 97 %",
        "warning: train: 1 of 2 clips are in pixels, the others in 0..1: keep to one",
        "warning: some of train's texts are cut: --max_text_length 5 covers all",
        "warning: dev: mostly no hand is seen, or never the left, or the right (shares above): "
        "does the detector give hands?",
        "warning: dev: the vocabulary cannot spell 1 texts, first '92'",
        "warning: 1 of dev's texts occur in an earlier split: normal for single signs; in "
        "sentences the score rewards remembering",
    ]


def test_few_long_clips_are_no_warning():
    reports = [clip_report(20)] * 19 + [clip_report(21)]
    report = train_lite.data_report({"dev": split_of(reports, ["3"] * 20)}, None)
    assert "warning" not in report


def plan_of(clips, capsys, texts=None, **options):
    """The warnings that a run prints before its first step."""
    run = run_of(scratch_model(clips), clips, **options)
    dev = copy.copy(clips)
    if texts:
        dev.entries = []
        for number, text in enumerate(texts):
            dev.entries.append({**entry(f"c{number}", text), "report": clip_report(20)})
    run.data = {"train": clips, "dev": dev}
    capsys.readouterr()
    train_lite.print_plan(run)
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("warning: ") and "occur in" not in line]


def test_what_a_first_run_gets_wrong_is_warned_of(clips, capsys):
    glosses = "ctc_weight is set, but labels.train has no glosses"
    chinese = "language is zh, but no text has a Chinese character"
    small = "batch_size x gradient_accumulation x processes is 31; the review: 32"
    english = ["书 花"] * 40
    # the model has no CTC head, the configuration asks for one
    assert [line for line in plan_of(clips, capsys) if glosses in line]
    found = plan_of(clips, capsys, batch_size=31, gradient_accumulation=1)
    assert [line for line in found if small in line]
    assert not [line for line in plan_of(clips, capsys) if "review" in line]
    assert not [line for line in plan_of(clips, capsys, english) if chinese in line]
    # another vocabulary would do; this is about the script
    found = plan_of(clips, capsys, ["a book"] * 40)
    assert [line for line in found if chinese in line]
    found = plan_of(clips, capsys, ["a book"] * 40, language="en")
    assert not [line for line in found if chinese in line]


# ------------------------------------------------------------ files, within limits


def test_a_file_over_the_size_limit_is_refused_and_one_at_the_limit_is_read(tmp_path, monkeypatch):
    label = write_labels(tmp_path / "labels.train", {"a": entry("a")})
    pose = write_pose(tmp_path / "a.pkl", *random_clip(2))
    for path, read in ((label, load_dataset_file), (pose, load_pose_file)):
        size = path.stat().st_size
        monkeypatch.setattr(datasets_lite, "MAX_BYTES", size - 1)
        with pytest.raises(DataError, match=rf"{path.name}: holds {size:,} bytes, over"):
            read(path)
    monkeypatch.setattr(datasets_lite, "MAX_BYTES", pose.stat().st_size)
    assert datasets_lite.inspect_clip(pose).frames == 2


def test_a_small_file_that_unpacks_to_more_than_the_limit_is_refused(tmp_path, monkeypatch):
    label = write_labels(tmp_path / "labels.train", {"a": entry("a", "x" * 100_000)})
    monkeypatch.setattr(datasets_lite, "MAX_BYTES", 10_000)
    with pytest.raises(DataError, match="labels.train"):
        load_dataset_file(label)


def test_every_core_reads_and_the_findings_keep_their_order(tmp_path, monkeypatch):
    if not hasattr(os, "fork"):
        pytest.skip("no fork, no readers")
    label = write_corpus(tmp_path, {f"c{i}": random_clip(4 + i) for i in range(7)})
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    shares = []
    start_reader = datasets_lite.start_reader

    def noted(read, paths):
        if read is datasets_lite.inspect_clip:
            shares.append(len(paths))
        return start_reader(read, paths)

    monkeypatch.setattr(datasets_lite, "start_reader", noted)
    dataset = SignLanguageDataset(label, scratch_config(), "train")
    assert list(dataset.lengths) == [4, 5, 6, 7, 8, 9, 10]
    assert sorted(shares) == [2, 2, 3]


# ------------------------------------------------------------ frames and augmentation


def test_evaluation_takes_the_middle_of_each_even_step():
    assert sample_frames(10, 5).tolist() == [1, 3, 5, 7, 9]
    assert sample_frames(8, 3).tolist() == [1, 4, 6]
    assert sample_frames(5, 5).tolist() == [0, 1, 2, 3, 4]
    drawn = [sample_frames(10, 5, np.random.default_rng(seed)) for seed in range(50)]
    assert (np.min(drawn, 0) == [0, 2, 4, 6, 8]).all()
    assert (np.max(drawn, 0) == [1, 3, 5, 7, 9]).all()
    assert any(np.ptp(np.diff(frames)) for frames in drawn), "each step draws for itself"


def test_clips_epochs_and_seeds_draw_augmentation_each_for_themselves(tmp_path):
    label = write_corpus(tmp_path, {"a": random_clip(30), "b": random_clip(30)})

    def body(index, epoch=0, seed=1):
        config = scratch_config(augment=True, join=0.0, seed=seed)  # partners differ by themselves
        dataset = SignLanguageDataset(label, config, "train")
        dataset.begin_epoch(epoch)
        dataset.lengths[:] = 30  # the speed apart
        return dataset[index][1]["body"]

    first = body(0)
    assert torch.equal(first, body(0))
    for other in (body(1), body(0, epoch=1), body(0, seed=2)):
        assert not torch.equal(first, other)


def test_speeds_are_drawn_by_clip_epoch_and_seed_evenly_between_slower_and_faster(tmp_path):
    label = write_corpus(tmp_path, {"a": random_clip(4), "b": random_clip(4)})
    dataset = SignLanguageDataset(label, scratch_config(augment=True, join=0.0), "train")
    dataset.config.max_length = 10**6
    for labelled in dataset.entries:
        labelled["report"] = clip_report(10_000)

    def lengths(epoch):
        dataset.begin_epoch(epoch)
        return dataset.lengths

    draws = np.array([lengths(epoch) for epoch in range(1500)]) / 10_000
    assert 0.909 <= draws.min() < 0.91
    assert 1.099 < draws.max() <= 1.1
    assert abs(np.log(draws).mean()) < 0.003, "as often faster as slower"
    assert (draws[:, 0] != draws[:, 1]).mean() > 0.99
    dataset.phase = "dev"
    assert (lengths(0) == 10_000).all()
    dataset.phase = "train"
    dataset.config.seed += 1
    assert (lengths(0) != 10_000 * draws[0]).any()


def test_augmentation_tilts_stretches_and_blurs_as_much_as_it_says():
    keypoints, scores = random_clip(6)
    read = datasets_lite.USED
    angles, aspects, noises = [], [], []
    for seed in range(300):
        moved, _ = augment_clip(keypoints, scores, np.random.default_rng(seed), 6)
        face = slice(23, 91)  # without noise
        before = keypoints[:, face].reshape(-1, 2).astype(float)
        change, *_ = np.linalg.lstsq(before, moved[:, face].reshape(-1, 2), rcond=None)
        angles.append(math.degrees(math.atan2(change[1, 0], change[1, 1])))
        aspects.append(np.linalg.det(change))
        noises.append((moved[:, read] - keypoints[:, read] @ change).std())
    assert -10 <= min(angles) < -9.5 and 9.5 < max(angles) <= 10
    assert 0.9 <= min(aspects) < 0.905 and 1.095 < max(aspects) <= 1.1
    extent = np.ptp(keypoints[:, BODY].reshape(-1, 2), axis=0).max()
    assert np.mean(noises) == pytest.approx(0.003 * extent, rel=0.02)


def test_a_hand_has_no_scale_without_a_body():
    keypoints, scores = random_clip(4)
    scores[:, BODY] = 0
    parts = load_part_kp(keypoints, scores)
    assert not any(part.any() for part in parts.values())


def test_a_body_is_one_square_box_around_what_was_seen():
    """4 wide, 2 high: x spans -1..1, y lies in the middle half."""
    keypoints = np.zeros((1, 133, 2), np.float32)
    scores = np.zeros((1, 133), np.float32)
    corners = [(1, 2), (5, 2), (1, 4), (5, 4)]
    keypoints[0, BODY[:4]] = corners
    keypoints[0, BODY[4:]] = 100
    scores[0, BODY[:4]] = 0.9
    keypoints[0, [91, 92]] = [(2, 2), (3, 1)]
    scores[0, [91, 92]] = 0.8
    parts = load_part_kp(keypoints, scores)
    assert parts["body"][0, :4, :2].tolist() == [[-1, -0.5], [1, -0.5], [-1, 0.5], [1, 0.5]]
    assert parts["body"][0, :4, 2].tolist() == pytest.approx([0.9] * 4)
    assert not parts["body"][0, 4:].any()
    assert parts["left"][0, 1].tolist() == pytest.approx([0.25, -0.25, 0.8])


def test_the_demo_is_the_seed_s(tmp_path):
    corpora = []
    for seed in (1, 1, 2):
        folder = make_demo_corpus(tmp_path / str(len(corpora)), seed, {"train": 3})
        corpora.append(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.*"))))
    assert corpora[0] == corpora[1] != corpora[2]
    clip = pickle.loads((tmp_path / "0" / "pose_format" / "train_00000.pkl").read_bytes())
    assert clip["keypoints"].shape[1:] == (1, 133, 2)


# ------------------------------------------------------------ defaults that the review names

DEFAULTS = {
    TrainConfig: {
        "batch_size": 2,
        "gradient_accumulation": 16,
        "epochs": 50,
        "muon": False,
        "average_steps": 0,
        "join": 0.5,
        "mirror": 0.5,
        "max_steps": 0,
        "learning_rate": 2e-4,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "seed": 42,
        "warmup_epochs": 5,
        "min_lr": 1e-6,
        "label_smoothing": 0.0,
        "ctc_weight": 0.0,
        "max_length": 256,
        "max_text_length": 64,
        "language": "zh",
        "augment": False,
        "on_bad_clip": "error",
        "position_encoding": "sinusoidal",
        "temporal_stride": 2,
        "freeze_decoder_layers": 4,
        "train_embedding": True,
        "trim_vocabulary": True,
        "val_interval": 1,
        "auto_resume": True,
        "device": "auto",
    },
    ScratchConfig: {
        "batch_size": 16,
        "gradient_accumulation": 2,
        "max_steps": 600,
        "muon": True,
        "average_steps": 20,
        "learning_rate": 1e-3,
        "warmup_epochs": 0.5,
        "ctc_weight": 0.5,
        "augment": True,
        "val_interval": 5,
        "d_model": 128,
        "num_layers": 2,
        "vocab_size": 1000,
    },
    DemoConfig: {"data_dir": "data/demo", "max_steps": 500},
    InferenceConfig: {
        "num_beams": 1,
        "max_new_tokens": 64,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    },
}


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
def test_defaults_are_those_that_the_review_and_the_readme_name(kind):
    config = kind()
    assert {name: getattr(config, name) for name in DEFAULTS[kind]} == DEFAULTS[kind]


def test_a_mirror_exchanges_left_and_right_and_nothing_else():
    keypoints, scores = random_clip(5)
    scores[:, 95] = 0.4
    moved, kept = datasets_lite.mirror(keypoints, scores)
    pairs = {0: 0, 3: 4, 4: 3, 5: 6, 7: 8, 9: 10, 91: 112, 95: 116, 111: 132, 112: 91, 132: 111}
    for joint, fellow in pairs.items():
        assert (moved[:, joint, 0] == -keypoints[:, fellow, 0]).all(), joint
        assert (moved[:, joint, 1] == keypoints[:, fellow, 1]).all(), joint
        assert (kept[:, joint] == scores[:, fellow]).all(), joint
    back = datasets_lite.mirror(moved, kept)
    assert (back[0] == keypoints).all() and (back[1] == scores).all()


def test_a_training_clip_s_body_gets_another_size_and_place(tmp_path):
    """One factor and one shift for a clip; what was not seen stays zero, what leaves is clipped."""
    keypoints, scores = random_clip(12)
    keypoints[:, BODY] = (keypoints[:, BODY] - 0.5) / 4 + 0.5  # in the middle of its box
    keypoints[:, [5, 10]] = [(0, 0), (1, 1)]  # but for two corners
    scores[:, 7] = 0
    path = write_pose(tmp_path / "a.pkl", keypoints, scores)
    plain = read_clip(path, scratch_config())["body"]
    inner = [i for i, joint in enumerate(BODY) if joint not in (5, 7, 10)]
    corners = [BODY.index(5), BODY.index(10)]
    sizes, shifts, beyond = [], [], 0
    for seed in range(200):
        moved = plain.clone()
        datasets_lite.move_body(moved, np.random.default_rng(seed))
        assert torch.equal(moved[..., 2], plain[..., 2])
        assert not moved[:, BODY.index(7)].any()
        assert moved.abs().max() <= 1
        beyond += int((moved[:, corners, :2].abs() == 1).any())
        before = plain[:, inner, :2].double()
        after = moved[:, inner, :2].double()
        size = ((after[-1] - after[0]) / (before[-1] - before[0])).median()
        shift = (after - size * before).flatten(0, 1).median(0).values
        assert torch.allclose(after, size * before + shift, atol=1e-5), f"seed {seed}"
        sizes.append(size)
        shifts += shift.tolist()
    assert math.exp(-0.3) <= min(sizes) < 0.76 and 1.32 < max(sizes) <= math.exp(0.3)
    assert -0.3001 <= min(shifts) < -0.28 and 0.28 < max(shifts) <= 0.3001
    assert beyond > 100
    draws = np.stack([np.log(sizes), shifts[::2], shifts[1::2]])
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.25, "each is drawn by itself"


def test_the_body_alone_is_moved_in_augmented_training_alone(tmp_path):
    path = write_pose(tmp_path / "a.pkl", *random_clip(12))
    moved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets_lite, "move_body", lambda body, rng: moved.append(body))
        read_clip(path, scratch_config(augment=True))
        read_clip(path, scratch_config(augment=False), np.random.default_rng(0), 12)
        assert not moved
        pose = read_clip(path, scratch_config(augment=True), np.random.default_rng(0), 12)
    (body,) = moved
    assert body is pose["body"]


def test_half_of_the_training_clips_are_mirrored_and_no_others(tmp_path):
    """By the left shoulder, which is the higher one: in a mirror the right one is."""
    keypoints, scores = random_clip(12)
    keypoints[:, [5, 6]] = [(0.9, 0.1), (0.1, 0.9)]
    path = write_pose(tmp_path / "a.pkl", keypoints, scores)

    def mirrored(rng, **options):
        body = read_clip(path, scratch_config(**options), rng, 12)["body"]
        return bool((body[:, BODY.index(5), 1] > body[:, BODY.index(6), 1]).all())

    drawn = [mirrored(np.random.default_rng(seed), augment=True) for seed in range(80)]
    assert 25 < sum(drawn) < 55
    assert not any(mirrored(np.random.default_rng(i), augment=True, mirror=0.0) for i in range(9))
    assert not mirrored(None, augment=True), "evaluation reads clips as they are"
    assert not mirrored(np.random.default_rng(0), augment=False)


# ------------------------------------------------------------ a run that somebody sent


@pytest.fixture(scope="module")
def sent(tmp_path_factory, clips):
    """A run's folder, and what its config.json holds."""
    folder = tmp_path_factory.mktemp("sent") / "run"
    scratch_model(clips, ctc_weight=0.5).save_pretrained(folder / "best")
    return folder, json.loads((folder / "best" / "config.json").read_text(encoding="utf-8"))


def spoil(sent, path, value):
    """The folder, with another value at this path of its configuration."""
    folder, content = sent
    content = copy.deepcopy(content)
    place = content
    *parents, last = path.split("/")
    for name in parents:
        place = place[name]
    place[last] = value
    (folder / "best" / "config.json").write_text(json.dumps(content))
    return folder


SIZES = ["d_model", "d_ff", "d_kv", "num_layers", "num_decoder_layers", "num_heads", "vocab_size"]


@pytest.mark.parametrize("value", [10**9, -1, "x"], ids=repr)
@pytest.mark.parametrize("name", [*SIZES, "relative_attention_num_buckets"])
def test_sizes_that_are_not_the_weights_are_refused_before_memory_is_taken(sent, name, value):
    folder = spoil(sent, f"model/mt5_config/{name}", value)
    before = peak_memory()
    with pytest.raises(DataError, match=str(folder / "best")):
        SignLanguageLite.from_pretrained(folder)
    assert peak_memory() < before + 0.5, "GB"


def peak_memory():
    return Place().peak_memory_gb()


@pytest.mark.parametrize("value", [None, 5, "x", ["a", 3]], ids=repr)
@pytest.mark.parametrize(
    "path",
    ["model", "model/mt5_config", "model/glosses", "model/longest_text", "batch_size", "language"],
)
def test_a_field_of_the_wrong_kind_names_the_folder(sent, path, value):
    folder = spoil(sent, path, value)
    if value == 5 and path in ("model/longest_text", "batch_size"):
        assert SignLanguageLite.from_pretrained(folder), "that is a good one"
        return
    with pytest.raises(DataError, match=str(folder / "best")):
        SignLanguageLite.from_pretrained(folder)


@pytest.mark.parametrize(
    "name, value",
    [
        ("attn_implementation", "someone/kernels"),
        ("_attn_implementation", "someone/kernels"),
        ("experts_implementation", "someone/kernels"),
        ("auto_map", {"AutoConfig": "someone--code.Config"}),
        ("decoder_start_token_id", 10**9),
        ("pad_token_id", -5),
        ("relative_attention_max_distance", -3),
    ],
)
def test_what_could_load_code_or_lead_astray_is_dropped(sent, tmp_path, monkeypatch, name, value):
    seen = []
    original = transformers.MT5Config.__init__

    def noted(self, *arguments, **options):
        seen.append(options)
        original(self, *arguments, **options)

    monkeypatch.setattr(transformers.MT5Config, "__init__", noted)
    folder = spoil(sent, f"model/mt5_config/{name}", value)
    clip = write_pose(tmp_path / "clip.pkl", *random_clip(20))
    assert command("translate", folder, clip) == 0
    assert all(options.get(name) != value for options in seen)


@pytest.mark.parametrize("path, value", [("num_beams", "x"), ("length_penalty", 11)])
def test_a_sent_run_s_decoding_is_checked(sent, tmp_path, capsys, path, value):
    folder = spoil(sent, path, value)
    clip = write_pose(tmp_path / "clip.pkl", *random_clip(20))
    assert command("translate", folder, clip) == 1
    assert str(folder / "best" / "config.json") in capsys.readouterr().err


def test_another_machine_s_processes_and_device_are_not_taken_over(sent):
    for name, value in (("num_workers", 10**6), ("device", "cuda")):
        folder = spoil(sent, name, value)
        _, config, _, _ = train_lite.parse(["evaluate", str(folder)])
        assert getattr(config, name) == getattr(TrainConfig(), name)
    folder = spoil(sent, "device", "cpu")
    assert train_lite.parse(["evaluate", str(folder)])[1].device == "cpu", "its figures' own"
    _, config, _, _ = train_lite.parse(["evaluate", str(folder), "--num_workers", "7"])
    assert config.num_workers == 7


# ------------------------------------------------------------ small ones


def test_a_lock_that_is_a_link_empties_nothing(tmp_path):
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(target)
    with train_lite.lock_folder(tmp_path / "run"):
        assert target.read_text() == "kept"


def test_the_working_folder_may_be_the_runs_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "last.pt").touch()
    config = TrainConfig(output_dir=".", auto_resume=False)
    folder, last = train_lite.choose_folder(config, described())
    assert last is None
    assert folder.resolve() == tmp_path / "here" / "here-2"


def test_a_number_of_6000_digits_is_no_label_file(tmp_path):
    for content in (b"1" * 6000, b'{"a": ' + b"1" * 6000 + b"}", b"I" + b"1" * 6000 + b"\n."):
        (tmp_path / "labels.train").write_bytes(content)
        with pytest.raises(DataError, match="labels.train"):
            load_dataset_file(tmp_path / "labels.train")


@pytest.mark.parametrize("value", [1e308, -1e308, 11.0])
def test_a_length_penalty_that_overflows_is_refused(value):
    with pytest.raises(ConfigError, match="length_penalty.*a number from -10 to 10"):
        InferenceConfig(length_penalty=value)


def test_a_disk_that_fills_while_the_vocabulary_is_learnt_is_said(monkeypatch):
    def full(**_):
        raise RuntimeError("Internal: No space left on device")

    monkeypatch.setattr(models_lite.sentencepiece.SentencePieceTrainer, "train", full)
    with pytest.raises(ConfigError, match="vocabulary: could not be learnt; is the disk full"):
        train_tokenizer(["书"], 10)


def test_the_rate_ends_at_its_lowest(clips):
    run = run_of(scratch_model(clips).train(), clips, batch_size=8)
    rates = []
    while run.step < run.total_steps:
        train_epoch(run)
        rates.append(run.schedulers[-1].get_last_lr()[0])
    assert run.step == 10
    assert rates[-1] == pytest.approx(run.config.min_lr)


# ------------------------------------------------------------ two optimisers


def test_muon_has_the_hidden_matrices_before_the_decoder_and_adamw_the_rest(clips):
    model = scratch_model(clips, ctc_weight=0.5)
    config = scratch_config(muon=True)
    (adamw, muon), schedulers = train_lite.make_optimizers(model, config, 10, 2)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    wanted = {"fusion.weight", "proj.weight"}
    for name, parameter in model.named_parameters():
        inside = "encoder.block." in name or name.startswith("temporal.")
        if inside and parameter.ndim == 2 and "relative_attention_bias" not in name:
            wanted.add(name)
    assert found == wanted
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert rest == set(names.values()) - found
    assert len(schedulers) == 2
    (adamw,), _ = train_lite.make_optimizers(model, scratch_config(muon=False), 10, 2)
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(names)


def test_every_parameter_is_stepped_and_muons_rate_is_four_times_as_high(clips):
    run = run_of(scratch_model(clips, ctc_weight=0.5).train(), clips, muon=True)
    before = copied_parameters(run.model)
    train_epoch(run)
    still = [name for name, p in run.model.named_parameters() if torch.equal(p, before[name])]
    assert not still, still
    adamw, muon = (scheduler.get_last_lr()[0] for scheduler in run.schedulers)
    assert muon == pytest.approx(4 * adamw, rel=0.01)


# ------------------------------------------------------------ average of weights


def test_the_average_is_over_an_eighth_of_the_steps_and_at_most_so_many(clips):
    model = scratch_model(clips).train()
    run = run_of(model, clips, batch_size=1, gradient_accumulation=2, average_steps=3)
    weight = model.fusion.weight
    run.average = copied(model)
    where = [p is weight for p in model.parameters()].index(True)
    # of ten steps, and as if many had gone before
    for before, newest in ((0, 1), (6, 1), (11, 1 / 1.5), (23, 1 / 3), (999, 1 / 3)):
        average = run.average[where].clone()
        run.step = before
        run.total_steps = before + 1
        train_epoch(run)
        assert run.step == before + 1
        wanted = average + newest * (weight.detach() - average)
        assert torch.allclose(run.average[where], wanted, atol=1e-7), before
        assert newest == 1 or not torch.equal(run.average[where], weight)


def copied(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_dev_scores_the_average_and_best_holds_it_and_training_goes_on_with_the_weights(
    clips, tmp_path, monkeypatch
):
    run = standing_run(clips, tmp_path)
    run.data["dev"] = clips
    run.history = []
    weights = copied(run.model)
    run.average = [2 * weight for weight in weights]
    scored = []

    def evaluate(model, *more):
        scored.extend(copied(model))
        return original(model, *more)

    original = train_lite.evaluate
    monkeypatch.setattr(train_lite, "evaluate", evaluate)
    train_lite.validate(run)
    best = copied(SignLanguageLite.from_pretrained(tmp_path / "best"))
    for weight, now, read, kept in zip(weights, copied(run.model), scored, best, strict=True):
        assert torch.equal(now, weight)
        assert torch.equal(read, 2 * weight)
        assert torch.equal(kept, 2 * weight)


def test_without_an_average_dev_scores_the_model_itself(clips, tmp_path):
    run = standing_run(clips, tmp_path)
    assert train_lite.averaged_model(run) is run.model


# ------------------------------------------------------------ small promises


def test_epochs_may_be_none_where_steps_are_the_budget():
    assert TrainConfig(epochs=0, max_steps=5).max_steps == 5
    with pytest.raises(ConfigError, match="epochs is 0: it must be 1 or more where max_steps is 0"):
        TrainConfig(epochs=0, max_steps=0)


def test_a_gloss_given_as_a_text_is_one_gloss(clips):
    texts = [labelled["text"] for labelled in clips.entries]
    model = SignLanguageLite(scratch_config(ctc_weight=0.5), texts, glosses=["HAUS", "AUTO"])
    assert model.glosses == ["AUTO", "HAUS"]


def test_a_default_with_a_percent_sign_is_shown_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(TrainConfig.__dataclass_fields__["log_dir"], "default", "/100%data")
    with pytest.raises(SystemExit):
        train_lite.make_parser("train").parse_args(["--help"])
    assert "(default: '/100%data')" in capsys.readouterr().out


def test_a_folder_that_is_gone_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(RunError, match="could not write .*gone/x.json"):
        train_lite.write_whole(tmp_path / "gone" / "x.json", "{}")


def test_another_runs_damaged_checkpoint_is_passed_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "checkpoints" / "data"
    other.mkdir(parents=True)
    (other / "last.pt").write_bytes(b"damaged")
    (other / "config.json").write_text(json.dumps(described()))
    config = TrainConfig(mt5_path="", data_dir="data")
    folder, last = train_lite.choose_folder(config, described(weight_decay=0.5))
    assert folder == Path("checkpoints", "data-2") and last is None


@pytest.mark.parametrize("gpu, backend", [(False, "gloo"), (True, "nccl")])
def test_processes_speak_over_what_their_device_has(monkeypatch, gpu, backend):
    """torch by itself takes nccl wherever the machine has a GPU, used or not."""
    asked = []
    monkeypatch.setattr(
        train_lite.dist, "init_process_group", lambda name=None, **_: asked.append(name)
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    train_lite.find_place(scratch_config(device="cuda" if gpu else "cpu"))
    assert asked == [backend]
