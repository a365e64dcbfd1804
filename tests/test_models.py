"""From batches to a loss or to text: what trains, what a clip's result depends on, what the loss
is.
"""

import math
import shutil
import unicodedata

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    MT5_SIZES,
    batch_of,
    pretrained_config,
    pretrained_model,
    save_best,
    scratch_config,
    scratch_model,
    shared,
    without_dropout,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache, MT5Config, MT5ForConditionalGeneration

import models_lite
from config_lite import ConfigError, InferenceConfig, TrainConfig
from datasets_lite import BODY, DataError, SignLanguageDataset, load_dataset_file
from models_lite import (
    SignLanguageLite,
    TextCodec,
    ctc_positions,
    hand_features,
    part_features,
    train_tokenizer,
)

TEXTS = ["今天我在学校买红的书。", "你好，老师不喜欢鱼吗？", "明天妈妈要找医院！"]


def odd_batch(clips):
    """A long clip, a short one, and two between, the short one of an odd number of frames."""
    order = sorted(range(len(clips)), key=lambda i: clips.lengths[i])
    short = next(i for i in order if clips.lengths[i] % 2)
    return [order[-1], short, order[10], order[20]]


def logits_by_hand(model, src_input, labels):
    """Teacher forcing as the paper has it: the decoder reads pad, then the labels but the last."""
    embeddings, mask = model.encode_pose(src_input)
    read = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], 1).clamp(min=0)
    return model.mt5_model(
        inputs_embeds=embeddings, attention_mask=mask, decoder_input_ids=read
    ).logits


# ------------------------------------------------------------------------- what trains


def trainable_by_policy(name, depth, train_embedding):
    """The review's step 1, for a parameter of mt5_model."""
    if name == "shared.weight":
        return train_embedding
    if name.startswith("decoder.block."):
        return int(name.split(".")[2]) >= depth
    return True  # the encoder, the decoder's last norm, lm_head


@pytest.mark.parametrize("train_embedding", [True, False])
@pytest.mark.parametrize("depth", [0, 4, 6])
@pytest.mark.parametrize("texts", [None, TEXTS], ids=["full tables", "trimmed"])
def test_requires_grad_of_every_parameter_by_name(mt5_folder, depth, train_embedding, texts):
    model = pretrained_model(
        mt5_folder, texts, freeze_decoder_layers=depth, train_embedding=train_embedding
    )
    names = [name for name, _ in model.mt5_model.named_parameters()]
    assert {
        "shared.weight",
        "lm_head.weight",
        "encoder.final_layer_norm.weight",
        "decoder.final_layer_norm.weight",
    } <= set(names)
    wrong = [
        name
        for name, p in model.mt5_model.named_parameters()
        if p.requires_grad != trainable_by_policy(name, depth, train_embedding)
    ]
    assert not wrong, f"{len(wrong)} of {len(names)}: {wrong}"
    frozen = [
        name
        for name, p in model.named_parameters()
        if not name.startswith("mt5_model.") and not p.requires_grad
    ]
    assert not frozen, f"frozen in the front-end: {frozen}"


def test_a_depth_beyond_the_decoder_freezes_all_of_it_and_warns(mt5_folder, capsys):
    model = pretrained_model(mt5_folder, TEXTS, freeze_decoder_layers=9)
    printed = capsys.readouterr().out
    assert "warning" in printed and "freeze_decoder_layers is 9" in printed and "6" in printed, (
        printed
    )
    blocks = [
        p.requires_grad
        for name, p in model.mt5_model.named_parameters()
        if name.startswith("decoder.block.")
    ]
    assert blocks and not any(blocks)
    assert model.mt5_model.decoder.final_layer_norm.weight.requires_grad
    assert model.mt5_model.lm_head.weight.requires_grad


def test_a_depth_within_the_decoder_does_not_warn(mt5_folder, capsys):
    pretrained_model(mt5_folder, TEXTS, freeze_decoder_layers=6)
    assert "warning" not in capsys.readouterr().out


def test_freezing_is_idempotent_and_leaves_no_trace_of_an_earlier_depth(mt5_folder):
    def states():
        return {name: p.requires_grad for name, p in model.named_parameters()}

    model = pretrained_model(mt5_folder, TEXTS, freeze_decoder_layers=2)
    first = states()
    model._freeze_mt5_layers()
    assert states() == first
    model.config.freeze_decoder_layers, model.config.train_embedding = 6, False
    model._freeze_mt5_layers()
    model.config.freeze_decoder_layers, model.config.train_embedding = 2, True
    model._freeze_mt5_layers()
    assert states() == first


def test_from_scratch_nothing_is_frozen(clips):
    model = scratch_model(clips, freeze_decoder_layers=4, train_embedding=False)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert not frozen, frozen


def test_frozen_blocks_pass_the_gradient_on_and_take_none(mt5_folder, clips):
    model = without_dropout(pretrained_model(mt5_folder, TEXTS, freeze_decoder_layers=6))
    model(*batch_of(clips, [0, 1])).loss.backward()
    grads = {
        name: p.grad is not None and bool(p.grad.abs().sum() > 0)
        for name, p in model.named_parameters()
    }
    frozen = [name for name in grads if name.startswith("mt5_model.decoder.block.")]
    assert not any(grads[name] for name in frozen)
    still = [name for name, moves in grads.items() if not moves and name not in frozen]
    assert not still, f"trainable, but without a gradient: {still}"


def test_what_trains_is_printed_a_line_a_part(mt5_folder, capsys):
    model = pretrained_model(mt5_folder, TEXTS)
    printed = capsys.readouterr().out
    total, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or every)
        for every in (True, False)
    )
    assert (
        f"{total:,}" in printed
        and f"{trained:,}" in printed
        and len(printed.strip().splitlines()) >= 5
    ), printed


# ------------------------------------------------------------------------- the tying trap


def tied(model):
    """Ways in which head and table of pieces are one, or a stack does not read the table."""
    mt5, faults = model.mt5_model, []
    head, table = mt5.lm_head.weight, mt5.shared.weight
    if head is table:
        faults.append("one object")
    if head.data_ptr() == table.data_ptr():
        faults.append("one memory")
    if torch.equal(head, table):
        faults.append("the same values")
    for stack in ("encoder", "decoder"):
        if getattr(mt5, stack).embed_tokens.weight is not table:
            faults.append(f"the {stack} has a table of its own")
    return faults


def test_the_head_is_apart_from_the_table_from_scratch(clips):
    model = scratch_model(clips)
    assert not tied(model), tied(model)


@pytest.mark.parametrize("texts", [None, TEXTS], ids=["full tables", "trimmed"])
def test_the_head_and_the_table_are_the_pretrained_ones(mt5_folder, texts):
    model = pretrained_model(mt5_folder, texts)
    assert not tied(model), tied(model)
    stored, rows = load_file(mt5_folder / "model.safetensors"), model.codec.keep or slice(None)
    assert torch.equal(model.mt5_model.lm_head.weight, stored["lm_head.weight"][rows])
    assert torch.equal(model.mt5_model.shared.weight, stored["shared.weight"][rows])


def test_transformers_own_tying_finds_nothing_to_tie(mt5_folder, clips):
    """`resize_token_embeddings`, `save_pretrained` and others call tie_weights on the way."""
    for model in (scratch_model(clips), pretrained_model(mt5_folder, TEXTS)):
        head = model.mt5_model.lm_head.weight.detach().clone()
        model.mt5_model.tie_weights()
        assert not tied(model), tied(model)
        assert torch.equal(head, model.mt5_model.lm_head.weight)


def test_tied_tables_are_refused_when_weights_are_loaded(clips):
    """load_state_dict itself would report success, while the second table overwrites the first."""
    model = scratch_model(clips)
    state = {name: value.clone() for name, value in model.state_to_save().items()}
    assert {"mt5_model.shared.weight", "mt5_model.lm_head.weight"} <= state.keys(), "both are saved"
    model.mt5_model.lm_head.weight = model.mt5_model.shared.weight
    assert tied(model), "the test's own detector"
    with pytest.raises((RuntimeError, DataError)):
        model.load_saved(state)


def test_a_pretrained_model_that_is_tied_is_refused(mt5_folder, tmp_path):
    shutil.copytree(mt5_folder, tmp_path / "tied")
    MT5ForConditionalGeneration(MT5Config(vocab_size=100, **MT5_SIZES)).save_pretrained(
        tmp_path / "tied"
    )
    with pytest.raises(ConfigError, match="tied|rows"):
        pretrained_model(tmp_path / "tied")


# ------------------------------------------------------------------------- best/, there and back


@pytest.mark.parametrize("kind", ["scratch", "scratch with glosses", "full tables", "trimmed"])
def test_a_saved_model_is_the_same_without_what_it_was_made_of(mt5_folder, tmp_path, clips, kind):
    if kind.startswith("scratch"):
        model = scratch_model(clips, ctc_weight=0.5 if "glosses" in kind else 0.0)
    else:
        shutil.copytree(mt5_folder, tmp_path / "mt5")
        model = pretrained_model(tmp_path / "mt5", TEXTS if kind == "trimmed" else None)
        shutil.rmtree(tmp_path / "mt5")
    with torch.no_grad():  # away from what a new model of the same seed would have
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    loaded = SignLanguageLite.from_pretrained(save_best(model, tmp_path / "best"))
    batch = batch_of(clips, [0, 1, 2])
    with torch.no_grad():
        a, b = model(*batch), loaded(*batch)
    assert not tied(loaded), tied(loaded)
    assert not loaded.training and a.nll.item() == b.nll.item() and a.num_tokens == b.num_tokens
    assert a.gloss == b.gloss
    assert model.generate(batch[0], max_new_tokens=8) == loaded.generate(batch[0], max_new_tokens=8)
    ours, theirs = model.state_to_save(), loaded.state_to_save()
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_a_trimmed_model_is_saved_without_the_full_tables(mt5_folder, tmp_path):
    """From a toy vocabulary as from the real one: rows that no text needs are left behind."""
    model = pretrained_model(mt5_folder, ["abc"])
    saved = load_file(save_best(model, tmp_path / "best") / "model.safetensors")
    full = load_file(mt5_folder / "model.safetensors")["shared.weight"]
    assert (
        len(saved["mt5_model.shared.weight"])
        == len(saved["mt5_model.lm_head.weight"])
        == len(model.codec)
        < len(full) / 2
    )


@pytest.mark.parametrize(
    "damage",
    [
        "no weights",
        "no config",
        "no vocabulary",
        "half the weights",
        "config is no JSON",
        "another width",
        "weights of another model",
    ],
)
def test_a_damaged_best_is_refused_and_named(tmp_path, clips, damage):
    best = save_best(scratch_model(clips), tmp_path / "best")
    if damage in ("no weights", "no config"):
        (best / {"no weights": "model.safetensors", "no config": "config.json"}[damage]).unlink()
    elif damage == "no vocabulary":
        for path in [p for p in best.iterdir() if p.suffix == ".model" or "token" in p.name]:
            path.unlink()
    elif damage == "half the weights":
        raw = (best / "model.safetensors").read_bytes()
        (best / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    elif damage == "config is no JSON":
        (best / "config.json").write_text("{")
    elif damage == "another width":
        text = (best / "config.json").read_text(encoding="utf-8")
        (best / "config.json").write_text(
            text.replace('"d_model": 32', '"d_model": 64'), encoding="utf-8"
        )
    else:
        other = save_best(scratch_model(clips, temporal_stride=1), tmp_path / "other")
        shutil.copy(other / "model.safetensors", best)
    with pytest.raises(DataError) as caught:
        SignLanguageLite.from_pretrained(best)
    assert damage == "another width" or "weights" in damage or str(best) in str(caught.value), (
        caught.value
    )


# --------------------------------------------------------------------- what a clip may depend on


@pytest.mark.parametrize("stride", [1, 2])
def test_padding_does_not_change_a_clip(clips, stride):
    """The original repeated the last frame, counted padding in its norms and let convolutions read
    it.
    """
    model = scratch_model(clips, temporal_stride=stride)
    for index in odd_batch(clips)[1:]:
        src_input, _ = batch_of(clips, [index])
        padded = {
            key: F.pad(value, (0,) * (2 * value.dim() - 3) + (17,)) if value.dim() > 1 else value
            for key, value in src_input.items()
            if torch.is_tensor(value)
        }
        with torch.no_grad():
            alone, mask = model.encode_pose(src_input)
            longer, longer_mask = model.encode_pose(padded)
        real = alone.shape[1]
        off = (alone - longer[:, :real]).abs().max().item()
        assert off < 1e-5 and int(mask.sum()) == int(longer_mask.sum()) == real, (
            f"off by {off:.2e} at {alone.abs().max():.1f}"
        )


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training without dropout"])
@pytest.mark.parametrize("position", ["sinusoidal", "learned", "none"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_clip_s_embeddings_do_not_depend_on_its_batch(clips, stride, position, training):
    model = scratch_model(clips, temporal_stride=stride, position_encoding=position)
    model = without_dropout(model) if training else model
    indices = odd_batch(clips)
    with torch.no_grad():
        together, mask = model.encode_pose(batch_of(clips, indices)[0])
        for row, index in enumerate(indices):
            alone, _ = model.encode_pose(batch_of(clips, [index])[0])
            off = (together[row][mask[row].bool()] - alone[0]).abs().max().item()
            assert off < 1e-5, f"clip {index} of {clips.lengths[index]} frames: off by {off:.2e}"


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training without dropout"])
def test_a_clip_s_loss_does_not_depend_on_its_batch(clips, training):
    model = scratch_model(clips, ctc_weight=0.5, temporal_stride=1)
    model = without_dropout(model) if training else model
    indices = odd_batch(clips)
    with torch.no_grad():
        together = model(*batch_of(clips, indices))
        alone = [model(*batch_of(clips, [index])) for index in indices]
    tokens = sum(output.num_tokens for output in alone)
    for figure in ("loss", "nll"):
        wanted = (
            sum(getattr(output, figure).item() * output.num_tokens for output in alone) / tokens
        )
        assert getattr(together, figure).item() == pytest.approx(wanted, abs=2e-5), figure
    assert together.num_tokens == tokens
    assert together.num_correct == sum(output.num_correct for output in alone)
    assert training or together.gloss == [output.gloss[0] for output in alone]


@pytest.fixture(scope="module")
def learnt(clips):
    """A model from scratch that was trained on six clips until it had them by heart, and those
    clips.
    """
    model, indices = (
        without_dropout(scratch_model(clips, d_model=64, ctc_weight=0.5)),
        [0, 1, 2, 3, 4, 5],
    )
    batch, losses = batch_of(clips, indices), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    while len(losses) < 250 and (not losses or losses[-1] > 0.004):
        loss = model(*batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), indices, losses


def test_one_batch_is_learnt_to_the_exact_strings(learnt, clips):
    """The self-test of the whole way: no fault between poses and text survives it, a second shift
    least.
    """
    model, indices, losses = learnt
    src_input, tgt_input = batch_of(clips, indices)
    wanted = [unicodedata.normalize("NFKC", text) for text in tgt_input["gt_sentence"]]
    found = model.generate(src_input)
    assert found == wanted, (
        f"loss {losses[0]:.2f} -> {losses[-1]:.4f} in {len(losses)} steps: {found}"
    )
    assert len(set(wanted)) == len(wanted)
    assert model(src_input, tgt_input).gloss == tgt_input["gt_gloss"], "and so are the glosses"


def test_a_clip_s_text_does_not_depend_on_its_batch(learnt, clips):
    model, indices, _ = learnt
    others = [index for index in odd_batch(clips) if index not in indices]
    together = model.generate(batch_of(clips, indices + others)[0])
    alone = [model.generate(batch_of(clips, [index])[0])[0] for index in indices + others]
    assert together == alone
    backwards = model.generate(batch_of(clips, (indices + others)[::-1])[0])
    assert backwards == alone[::-1]


def test_the_text_comes_from_the_pose(learnt, clips):
    model, indices, _ = learnt
    src_input, _ = batch_of(clips, indices)
    order = indices[::-1]
    swapped, _ = batch_of(clips, order)
    assert model.generate(swapped) == model.generate(src_input)[::-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "length_penalty": 0.5},
        {"no_repeat_ngram_size": 2},
        {"max_new_tokens": 3},
    ],
)
def test_generate_takes_the_fields_of_inference_config_and_gives_texts(learnt, clips, options):
    model, indices, _ = learnt
    config = InferenceConfig(**options)
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    texts = model.generate(batch_of(clips, indices)[0], **fields)
    assert len(texts) == len(indices) and all(isinstance(text, str) for text in texts)
    special = [text for text in texts if "<" in text or "▁" in text]
    assert not special, f"special pieces in the text: {special}"
    pieces = [len(model.codec.ids(text)) for text in texts]
    if "max_new_tokens" in options:
        assert (
            max(pieces) <= 3 + 1 < len(model.codec.ids(batch_of(clips, [0])[1]["gt_sentence"][0]))
        ), f"{pieces} pieces"


def test_beams_find_what_was_learnt_by_heart(learnt, clips):
    """More search may not find worse: beams that stop at the first finished texts cut the right one
    short.
    """
    model, indices, _ = learnt
    src_input, _ = batch_of(clips, indices)
    greedy = model.generate(src_input)
    for beams in (2, 4):
        found = model.generate(src_input, num_beams=beams)
        wrong = [pair for pair in zip(found, greedy) if pair[0] != pair[1]]
        assert not wrong, f"{len(wrong)} of {len(greedy)} with {beams} beams: {wrong}"


# ------------------------------------------------------------------------- positions and stride


@pytest.mark.parametrize("stride", [1, 2])
def test_the_stride_divides_the_positions_and_the_mask(clips, stride):
    model = scratch_model(clips, temporal_stride=stride)
    indices = odd_batch(clips)
    with torch.no_grad():
        embeddings, mask = model.encode_pose(batch_of(clips, indices)[0])
    wanted = [math.ceil(clips.lengths[i] / stride) for i in indices]
    assert mask.sum(1).tolist() == wanted and embeddings.shape == (4, max(wanted), 32)
    assert mask.shape == (4, max(wanted))
    assert all(row[:n].all() and not row[n:].any() for row, n in zip(mask, wanted)), (
        "ones, then zeros"
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_the_sinusoid_is_the_paper_s_and_is_added_after_the_projection(clips, stride):
    src_input, _ = batch_of(clips, [0])
    with torch.no_grad():
        without, _ = scratch_model(
            clips, position_encoding="none", temporal_stride=stride
        ).encode_pose(src_input)
        with_it, _ = scratch_model(
            clips, position_encoding="sinusoidal", temporal_stride=stride
        ).encode_pose(src_input)
    for position in (0, 1, 7):
        for i in (0, 5, 15):
            rate = 10000 ** (-2 * i / 32)
            added = (with_it - without)[0, position, 2 * i : 2 * i + 2].tolist()
            wanted = [math.sin(position * rate), math.cos(position * rate)]
            assert added == pytest.approx(wanted, abs=1e-5), f"position {position}, pair {i}"


def test_the_poses_start_smaller_than_the_position_beside_them(clips):
    """At unit scale they drown it, and what it is for, a sign twice in a row, is read as one."""
    src_input, _ = batch_of(clips, [0])
    with torch.no_grad():
        poses, _ = scratch_model(clips, position_encoding="none").encode_pose(src_input)
        both, _ = scratch_model(clips, position_encoding="sinusoidal").encode_pose(src_input)
    sizes = [x.square().mean().sqrt().item() for x in (poses, both - poses)]
    assert sizes == pytest.approx([0.5, 0.5**0.5], abs=0.01)


def decoder_inputs(model):
    """A list that fills with what the decoder is given from now on."""
    seen = []
    model.mt5_model.decoder.block[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    return seen


def test_a_repeated_piece_is_told_from_the_first(clips):
    """Without a position of its own the decoder loses count of equal pieces one after another."""
    model = without_dropout(scratch_model(clips))
    seen, (src_input, tgt_input) = decoder_inputs(model), batch_of(clips, [0])
    with torch.no_grad():
        model(src_input, tgt_input | {"labels": torch.full((1, 6), 5)})
    given, table = seen[0][0], model.mt5_model.shared.weight
    for place in range(6):
        added = given[place] - table[5 if place else 0]  # 0: the decoder starts with padding
        rates = [10000 ** (-i / 32) for i in range(0, 32, 2)]
        wanted = [wave(place * rate) for rate in rates for wave in (math.sin, math.cos)]
        assert added.tolist() == pytest.approx(wanted, abs=1e-5), f"piece {place}"


@pytest.mark.parametrize("beams", [1, 3])
def test_a_piece_s_place_is_the_same_when_decoding_one_by_one(clips, beams):
    model, src_input = without_dropout(scratch_model(clips)), batch_of(clips, [0, 1])[0]
    seen = decoder_inputs(model.eval())
    model.generate(src_input, num_beams=beams, max_new_tokens=5)
    assert [x.shape[1] for x in seen] == [1] * len(seen) and len(seen) > 1, "one piece a call"
    table = model.mt5_model.shared.weight
    for place, given in enumerate(seen):
        rest = (given[:, 0] - model.piece_position.table[place])[:, None] - table
        assert rest.abs().amax(-1).amin(-1).max() < 1e-5, f"piece {place}"


@pytest.mark.parametrize("name", ["past_key_values", "cache", "some_later_name"])
def test_the_decoder_s_cache_is_known_under_any_name(clips, name):
    """transformers 5.24 renamed the argument; read by its old name, each piece had the first one's
    place.
    """
    model, cache = without_dropout(scratch_model(clips)), DynamicCache()
    cache.update(*torch.zeros(2, 1, 1, 3, 8), layer_idx=0)  # three pieces are there
    decoder, ids = model.mt5_model.decoder, torch.tensor([[5]])
    _, given = model._number_pieces(decoder, (), {"input_ids": ids, name: cache})
    added = given["inputs_embeds"][0, 0] - model.mt5_model.shared.weight[5]
    assert torch.allclose(added, model.piece_position.table[3], atol=1e-6)
    assert "input_ids" not in given and given[name] is cache


def test_a_run_from_before_the_decoder_had_positions_is_refused(clips, tmp_path):
    """Its weights would fit, and every text would be wrong."""
    best = save_best(scratch_model(clips), tmp_path / "best")
    weights = load_file(best / "model.safetensors")
    assert weights.pop("piece_position.table").shape == (128, 32)
    save_file(weights, best / "model.safetensors")
    with pytest.raises(DataError, match="piece_position.table"):
        SignLanguageLite.from_pretrained(best)


def test_a_pretrained_decoder_is_given_its_pieces_as_they_are(mt5_folder, clips):
    model = without_dropout(pretrained_model(mt5_folder, TEXTS))
    seen = decoder_inputs(model)
    src_input, _ = batch_of(clips, [0])
    with torch.no_grad():
        model(src_input, {"labels": torch.full((1, 6), 5), "gt_gloss": [[]]})
    assert torch.equal(seen[0][0, 1:], model.mt5_model.shared.weight[[5] * 5])


def test_learned_positions_are_added_and_learn(clips):
    model = without_dropout(scratch_model(clips, position_encoding="learned", max_length=128))
    ((name, table),) = [(n, p) for n, p in model.named_parameters() if "position" in n]
    model(*batch_of(clips, [0])).loss.backward()
    used = math.ceil(clips.lengths[0] / model.config.temporal_stride)
    moved = table.grad.abs().sum(1) > 0
    assert moved[:used].all() and not moved[used:].any(), (
        f"{name}: {int(moved.sum())} of {len(moved)} rows move, {used} used"
    )


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "none"])
@pytest.mark.parametrize("stride, max_length", [(1, 33), (2, 33), (2, 34)])
def test_every_length_up_to_max_length_works_and_a_longer_one_is_refused_by_name(
    clips, position, stride, max_length
):
    """Refused by name, not by a crash; sample_frames sees to it that the data set holds none."""
    model = scratch_model(
        clips, position_encoding=position, temporal_stride=stride, max_length=max_length
    )

    def poses(frames):
        return {
            "body": torch.rand(1, frames, 9, 3),
            "left": torch.rand(1, frames, 21, 3),
            "right": torch.rand(1, frames, 21, 3),
            "attention_mask": torch.ones(1, frames, dtype=torch.long),
        }

    with torch.no_grad():
        for frames in (1, 2, max_length - 1, max_length):
            assert model.encode_pose(poses(frames))[0].shape[1] == math.ceil(frames / stride)
        with pytest.raises((ValueError, ConfigError), match="max_length"):
            model.encode_pose(poses(max_length + 1))


def test_max_length_is_what_the_data_set_samples_down_to(demo, clips):
    config = scratch_config(max_length=16)
    dataset = SignLanguageDataset(demo / "labels.dev", config, "dev")
    model = scratch_model(clips, max_length=16)
    src_input, tgt_input = batch_of(dataset, range(len(dataset)))
    assert src_input["body"].shape[1] == 16 and max(clips.lengths) > 16
    assert torch.isfinite(model(src_input, tgt_input).loss)


# ------------------------------------------------------------------------- features


def embed(model, src_input):
    with torch.no_grad():
        return model.encode_pose(src_input)[0]


@pytest.mark.parametrize("part, joints", [("left", (8, 12)), ("right", (4, 20)), ("body", (5, 6))])
def test_swapping_two_joints_changes_the_embedding(clips, part, joints):
    """With the original's mean over joints it does not: which finger moved is lost."""
    model = scratch_model(clips)
    src_input, _ = batch_of(clips, [0])
    swapped = dict(src_input)
    swapped[part] = src_input[part].clone()
    swapped[part][:, :, list(joints)] = src_input[part][:, :, list(joints)[::-1]]
    a, b = embed(model, src_input), embed(model, swapped)
    change = ((a - b).norm() / (a - a.mean()).norm()).item()
    assert change > 1e-2, f"the embedding changes by {100 * change:.4f} %"


def features(part):
    """part_features by joint: (B, T, V, 5) of x, y, confidence and velocity."""
    B, T, V, _ = part.shape
    return part_features(part).reshape(B, T, V, 5)


def test_a_velocity_never_jumps_a_gap():
    part = torch.rand(1, 8, 21, 3) + 0.1
    part[:, 3:5, 7] = 0  # one finger drops out for two frames
    velocity = features(part)[..., 3:]
    wanted = torch.zeros_like(velocity)
    wanted[:, 1:] = part[:, 1:, :, :2] - part[:, :-1, :, :2]
    wanted[:, 3:6, 7] = 0  # leaving, gone, and coming back
    assert torch.equal(velocity, wanted), (
        f"{(velocity - wanted).abs().amax((0, 2, 3)).tolist()} by frame"
    )
    assert torch.equal(features(part)[..., :3], part)


def test_the_first_frame_has_no_velocity():
    assert not features(torch.rand(2, 5, 9, 3) + 0.1)[:, 0, :, 3:].any()


def test_a_hand_is_seen_at_its_own_scale_and_in_its_place():
    hand, wrist = torch.rand(1, 6, 21, 3) + 0.1, torch.rand(1, 6, 3)
    smaller = hand * torch.tensor([0.1, 0.1, 1.0])
    a, b = hand_features(hand, wrist, False), hand_features(smaller, wrist, False)
    assert torch.allclose(a, b, atol=1e-4), f"off by {(a - b).abs().max()}"
    moved = hand_features(hand, wrist + 0.1, False)
    assert torch.equal(a[..., :-3], moved[..., :-3]) and not torch.equal(
        a[..., -3:], moved[..., -3:]
    )


def test_an_unseen_hand_has_finite_features():
    unseen = hand_features(torch.zeros(2, 5, 21, 3), torch.zeros(2, 5, 3), True)
    assert torch.isfinite(unseen).all() and not unseen.any()


def test_both_hands_go_through_the_same_weights_and_the_left_one_is_mirrored(clips):
    mirror = torch.tensor([-1.0, 1.0, 1.0])
    hand, wrist = torch.rand(1, 6, 21, 3), torch.rand(1, 6, 3)
    left, right = (
        hand_features(hand, wrist, True),
        hand_features(hand * mirror, wrist * mirror, False),
    )
    assert torch.allclose(left, right, atol=1e-6), (
        "a left hand and its mirror image on the right are one shape"
    )
    model = without_dropout(scratch_model(clips))
    src_input, _ = batch_of(clips, [0])
    moves = {}
    for absent in ("left", "right"):
        model.zero_grad()
        model.encode_pose({**src_input, absent: torch.zeros_like(src_input[absent])})[
            0
        ].square().sum().backward()
        moves[absent] = {
            n
            for n, p in model.named_parameters()
            if "pose_embed" in n and p.grad is not None and p.grad.any()
        }
    assert (
        moves["left"]
        == moves["right"]
        == {n for n, _ in model.named_parameters() if "pose_embed" in n}
    )


# ------------------------------------------------------------------------- the loss


def test_labels_are_not_shifted_twice(clips):
    """The output at position t is trained on token t; the original trained it on t + 1 and token 1
    never.
    """
    for smoothing in (0.0, 0.1):  # the original's fault lay in its smoothed branch
        model = scratch_model(clips, label_smoothing=smoothing)
        src_input, tgt_input = batch_of(clips, odd_batch(clips))
        labels = model.codec.encode(tgt_input["gt_sentence"])
        with torch.no_grad():
            logs = logits_by_hand(model, src_input, labels).log_softmax(-1)
            output = model(src_input, tgt_input)
        real = labels != -100
        picked = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][real]
        assert output.nll.item() == pytest.approx(-picked.mean().item(), abs=1e-5), (
            f"smoothing {smoothing}"
        )
        wanted = -((1 - smoothing) * picked + smoothing * logs.mean(-1)[real]).mean().item()
        assert output.loss.item() == pytest.approx(wanted, abs=1e-5), (
            f"smoothing {smoothing}: by hand {wanted}"
        )
        assert output.num_tokens == int(real.sum())
        assert output.num_correct == int((logs.argmax(-1) == labels)[real].sum())


def test_label_smoothing_changes_the_loss_and_never_the_nll_beside_it(clips):
    batch = batch_of(clips, [0, 1, 2])
    with torch.no_grad():
        plain, smooth = (
            scratch_model(clips, label_smoothing=value)(*batch) for value in (0.0, 0.2)
        )
    assert plain.nll.item() == smooth.nll.item() == plain.loss.item()
    assert smooth.loss.item() != plain.loss.item()
    assert not plain.nll.requires_grad


def test_the_labels_may_come_from_the_loader_or_be_made_in_forward(clips):
    model = scratch_model(clips)
    src_input, tgt_input = batch_of(clips, odd_batch(clips))
    with_labels = {**tgt_input, "labels": model.codec.encode(tgt_input["gt_sentence"])}
    with torch.no_grad():
        a, b, c = (
            model(src_input, tgt_input),
            model(src_input, with_labels),
            model(src_input, {"gt_sentence": tgt_input["gt_sentence"]}),
        )
    assert (
        a.loss.item() == b.loss.item() == c.loss.item()
        and a.num_tokens == b.num_tokens == c.num_tokens
    )


def test_a_new_model_starts_near_the_uniform_loss(clips):
    """With mT5's own head of deviation 1 it would start at about 15."""
    model = scratch_model(clips, d_model=128)
    with torch.no_grad():
        nll, uniform = model(*batch_of(clips, [0, 1, 2, 3])).nll.item(), math.log(len(model.codec))
    assert uniform - 1 < nll < uniform + 1.5, f"nll {nll:.2f}, ln(vocabulary) {uniform:.2f}"


def test_gradients_of_two_halves_add_up_to_those_of_the_whole(clips):
    """Summed over tokens, as the loop does it; a mean of means would be off where texts differ in
    length.
    """
    indices = odd_batch(clips)
    gradients = []
    for parts in ([indices], [indices[:1], indices[1:]]):
        model = without_dropout(scratch_model(clips, ctc_weight=0.3, temporal_stride=1)).double()
        for part in parts:
            src_input, tgt_input = batch_of(clips, part)
            src_input |= {name: src_input[name].double() for name in ("body", "left", "right")}
            output = model(src_input, tgt_input)
            (output.loss * output.num_tokens).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    off = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert off < 1e-5, f"off by {off:.2e}"


# ------------------------------------------------------------------------- CTC


def ctc_by_hand(model, src_input, glosses):
    """Each clip by itself, so that no padding is in it: summed negative log-likelihoods."""
    total, index = 0.0, {gloss: i + 2 for i, gloss in enumerate(model.glosses)}
    for i, gloss in enumerate(glosses):
        length = int(src_input["src_length"][i])
        alone = {
            key: src_input[key][i : i + 1, :length]
            for key in ("body", "left", "right", "attention_mask")
        }
        embeddings, mask = model.encode_pose(alone)
        hidden = model.mt5_model.encoder(
            inputs_embeds=embeddings, attention_mask=mask
        ).last_hidden_state
        logs = model.gloss_head(hidden).log_softmax(-1).transpose(0, 1)
        target = torch.tensor([[index.get(word, 1) for word in gloss]])
        total += (
            F.ctc_loss(logs, target, [logs.shape[0]], [len(gloss)], reduction="sum").item()
            if gloss
            else 0
        )
    return total


@pytest.mark.parametrize("stride", [1, 2])
def test_ctc_is_summed_over_clips_without_padding_and_divided_by_the_target_tokens(clips, stride):
    model = without_dropout(scratch_model(clips, ctc_weight=0.7, temporal_stride=stride))
    src_input, tgt_input = batch_of(clips, odd_batch(clips))
    tgt_input["gt_gloss"][2] = []  # a clip without glosses takes no part
    tgt_input["gt_gloss"][3] = tgt_input["gt_gloss"][3] + ["never seen in training"]
    output = model(src_input, tgt_input)
    found = (output.loss - output.nll).item() * output.num_tokens
    wanted = 0.7 * ctc_by_hand(model, src_input, tgt_input["gt_gloss"])
    assert found == pytest.approx(wanted, rel=1e-4), f"{found} where {wanted} was expected"


def test_ctc_is_off_where_its_weight_is_nought_or_there_are_no_glosses(clips):
    assert scratch_model(clips, ctc_weight=0.0).gloss_head is None
    texts = [e["text"] for e in clips.entries]
    model = SignLanguageLite(
        scratch_config(ctc_weight=0.5), texts=texts, glosses=[[] for _ in texts]
    )
    output = model.train()(*batch_of(clips, [0, 1]))
    assert model.gloss_head is None and output.loss.item() == output.nll.item()


def test_ctc_without_a_single_gloss_in_the_batch_adds_nothing(clips):
    model = without_dropout(scratch_model(clips, ctc_weight=0.5))
    src_input, tgt_input = batch_of(clips, [0, 1])
    output = model(src_input, {**tgt_input, "gt_gloss": [[], []]})
    assert output.loss.item() == pytest.approx(output.nll.item())
    output.loss.backward()


@pytest.mark.parametrize("gloss, needs", [(["我"] * 8, 15), (["我", "书"] * 5, 10)])
def test_too_few_frames_for_the_glosses_is_an_error_that_names_the_clip(clips, gloss, needs):
    """Never an infinite loss: n glosses need n positions, and one more between equal neighbours."""
    model = scratch_model(clips, ctc_weight=0.5, temporal_stride=1).train()
    assert ctc_positions([model.glosses.index(word) for word in gloss]) == needs

    def run(frames):
        src_input = {
            "body": torch.rand(1, frames, 9, 3),
            "left": torch.rand(1, frames, 21, 3),
            "right": torch.rand(1, frames, 21, 3),
            "attention_mask": torch.ones(1, frames, dtype=torch.long),
            "src_length": torch.tensor([frames]),
            "names": ["S000123"],
        }
        return model(src_input, {"gt_sentence": ["我"], "gt_gloss": [gloss]})

    assert torch.isfinite(run(needs).loss)
    with pytest.raises(DataError, match="S000123"):
        run(needs - 1)


# ------------------------------------------------------------------------- the vocabulary


def test_nothing_but_the_softmax_changes_when_the_vocabulary_is_trimmed(mt5_folder, clips):
    texts = [e["text"] for e in clips.entries] + TEXTS
    full, trimmed = (
        pretrained_model(mt5_folder, trim_vocabulary=False),
        pretrained_model(mt5_folder, texts),
    )
    front = {
        name: value
        for name, value in full.state_to_save().items()
        if not name.startswith("mt5_model.")
    }
    trimmed.load_state_dict(front, strict=False)
    keep = trimmed.codec.keep
    assert len(keep) == trimmed.mt5_model.lm_head.out_features < full.mt5_model.lm_head.out_features
    src_input, tgt_input = batch_of(clips, [0, 1, 2])
    full_labels, labels = (
        model.codec.encode(tgt_input["gt_sentence"]) for model in (full, trimmed)
    )
    assert torch.equal(
        torch.tensor(keep)[labels.clamp(min=0)] * (labels >= 0), full_labels * (full_labels >= 0)
    )
    with torch.no_grad():
        wanted = logits_by_hand(full, src_input, full_labels)[..., keep]
        found = logits_by_hand(trimmed, src_input, labels)
        outputs = full(src_input, tgt_input), trimmed(src_input, tgt_input)
    assert (wanted - found).abs().max() <= 1e-6 * max(1, wanted.abs().max()), (
        f"off by {(wanted - found).abs().max():.2e}"
    )
    real = labels >= 0
    # the full model's, its softmax over the kept pieces alone
    nll = F.cross_entropy(wanted[real], labels[real]).item()
    assert outputs[1].nll.item() == pytest.approx(nll, abs=1e-5) and outputs[1].nll < outputs[0].nll


def test_trimming_never_loses_a_piece_that_the_training_texts_need(mt5_folder):
    for texts in (TEXTS, ["The quick brown fox, 12 %."], ["abc"]):
        model = pretrained_model(mt5_folder, texts)
        full = TextCodec(model.mt5_tokenizer, 64)
        assert [[model.codec.keep[row] for row in model.codec.ids(text)] for text in texts] == [
            full.ids(text) for text in texts
        ]
        special = [
            model.mt5_tokenizer.pad_token_id,
            model.mt5_tokenizer.eos_token_id,
            model.mt5_tokenizer.unk_token_id,
        ]
        assert [model.codec.keep.index(i) for i in special] == special, (
            "pad, end and unknown keep their places"
        )


def test_a_piece_that_was_cut_is_spelled(mt5_folder):
    """A dev text may hold a word that no training text has: its characters are kept, and so is the
    text.
    """
    texts = ["今天我在学校。", "明天他去商店！", "你好吗？"]
    model = pretrained_model(mt5_folder, texts)
    pieces, known = model.mt5_tokenizer.get_vocab(), set(model.codec.keep)
    cut = [
        piece
        for piece, i in pieces.items()
        if i not in known
        and len(piece) == 2
        and piece[0] != "▁"
        and all("一" <= character <= "鿿" and character in pieces for character in piece)
    ][:20]
    assert cut, (
        "the vocabulary has no two-character piece that was cut: the test needs another text"
    )
    for word in cut:
        rows = model.codec.ids(word)
        assert model.codec.unknown not in rows, f"{word} is unknown"
        assert model.codec.decode(model.codec.encode([word]).clamp(min=0)) == [word]


def test_what_nothing_can_spell_is_the_unknown_piece_and_no_crash(mt5_folder):
    model = pretrained_model(mt5_folder, ["abc"])
    rows = model.codec.ids("𓀀")
    assert model.codec.unknown in rows and max(rows) < len(model.codec)


def test_rows_that_are_no_text_are_never_decoded(mt5_folder):
    """mT5's tables have more rows than its vocabulary pieces, and raw mT5 emits <extra_id_0>."""
    model = pretrained_model(mt5_folder, trim_vocabulary=False)
    rows, stored = model.mt5_model.lm_head.out_features, load_file(mt5_folder / "model.safetensors")
    assert rows == len(model.codec) < len(stored["lm_head.weight"]), (
        f"{rows} rows, {len(model.codec)} pieces"
    )
    pieces = model.codec.pieces()
    assert len(pieces) == rows and not [
        piece for piece in pieces if piece is None or "extra_id" in piece
    ]


def round_trip(codec, texts):
    return codec.decode(codec.encode(texts).clamp(min=0))


@pytest.mark.parametrize("kind", ["scratch", "trimmed", "full tables"])
def test_the_vocabulary_gives_back_a_text_nfkc_normalised(mt5_folder, clips, kind):
    """So no output equals a raw reference with full-width punctuation: scores must normalise both
    sides.
    """
    texts = [e["text"] for e in clips.entries]
    model = (
        scratch_model(clips)
        if kind == "scratch"
        else pretrained_model(mt5_folder, texts if kind == "trimmed" else None)
    )
    found, wanted = (
        round_trip(model.codec, texts),
        [unicodedata.normalize("NFKC", text) for text in texts],
    )
    changed = sum(a != b for a, b in zip(wanted, texts))
    assert found == wanted and changed > 0, (
        f"{sum(a != b for a, b in zip(found, wanted))} of {len(texts)} differ"
    )


def test_the_real_labels_survive_the_real_vocabulary(mt5_folder):
    folder = shared("csl_daily_labels")
    train, dev = (
        [e["text"] for e in load_dataset_file(folder / f"labels.{split}").values()]
        for split in ("train", "dev")
    )
    codec = pretrained_model(mt5_folder, train).codec
    found = round_trip(codec, dev)
    wanted = ["".join(unicodedata.normalize("NFKC", text).split()) for text in dev]
    wrong = [(a, b) for a, b in zip(found, wanted) if "".join(a.split()) != b]
    assert not wrong, f"{len(wrong)} of {len(dev)}: {wrong[:3]}"
    unknown = [text for text in dev if codec.unknown in codec.ids(text)]
    assert not unknown, f"{len(unknown)} of {len(dev)} with an unknown piece: {unknown[:3]}"
    assert len(codec) < len(codec.tokenizer), f"{len(codec)} of {len(codec.tokenizer)} pieces kept"


@pytest.mark.parametrize(
    "texts",
    [["a"], ["你"], ["hello world"] * 3, ["吃 饭", "吃"], ["ＡＢＣ１２３，。"], ["é ü ß"] * 2],
)
def test_a_vocabulary_can_be_learnt_from_next_to_nothing(texts):
    codec = TextCodec(train_tokenizer(texts, 1000), 64)
    assert round_trip(codec, texts) == [unicodedata.normalize("NFKC", text) for text in texts]


@pytest.mark.parametrize("kind", ["scratch", "trimmed"])
def test_a_long_text_is_cut_at_max_text_length_and_keeps_its_end(mt5_folder, clips, kind):
    """The original read max_text_length nowhere. Without its end a text teaches the model never to
    stop.
    """
    texts = [e["text"] for e in clips.entries]
    model = (
        scratch_model(clips, max_text_length=6)
        if kind == "scratch"
        else pretrained_model(mt5_folder, texts, max_text_length=6)
    )
    labels = model.codec.encode(["".join(texts[:3]), texts[0][:2]])
    end = model.mt5_tokenizer.eos_token_id
    assert labels.shape[1] == 6 and labels[0, -1] == end, labels.tolist()
    whole = model.codec.ids("".join(texts[:3]))
    assert labels[0, :5].tolist() == whole[:5] and len(whole) > 6
    short = model.codec.ids(texts[0][:2])
    assert labels[1].tolist() == short + [-100] * (6 - len(short)) and short[-1] == end


def test_a_model_works_with_a_local_mt5_alone(mt5_folder, clips):
    model = SignLanguageLite(pretrained_config(mt5_folder))
    output = model(*batch_of(clips, [0, 1]))
    assert (
        torch.isfinite(output.loss)
        and len(model.generate(batch_of(clips, [0])[0], max_new_tokens=4)) == 1
    )


def test_from_scratch_needs_texts_and_says_so():
    with pytest.raises(ConfigError, match="texts"):
        SignLanguageLite(scratch_config())


# ------------------------------------------------------------------------- a missing mT5

BAD_MT5 = [
    "no such folder",
    "a hub name, no network",
    "empty",
    "weights",
    "spiece.model",
    "config.json",
    "no weights",
    "no spiece.model",
    "no config.json",
    "a file",
]


@pytest.mark.parametrize("fault", BAD_MT5)
def test_an_mt5_path_that_cannot_be_used_is_a_config_error_that_names_it(
    mt5_folder, tmp_path, fault
):
    path = tmp_path / "mt5"
    if fault not in ("no such folder", "a hub name, no network", "a file"):
        shutil.copytree(mt5_folder, path)
    if fault == "empty":
        shutil.rmtree(path)
        path.mkdir()
    elif fault == "a file":
        path.write_bytes(b"")
    elif fault.startswith("no ") and fault != "no such folder":
        (path / fault[3:].replace("weights", "model.safetensors")).unlink()
    elif fault in ("weights", "spiece.model", "config.json"):
        (path / fault.replace("weights", "model.safetensors")).write_bytes(b"garbage")
    name = "sign-language-lite/no-such-mt5" if "hub" in fault else str(path)
    with pytest.raises(ConfigError, match="mt5_path") as caught:
        SignLanguageLite(TrainConfig(mt5_path=name), texts=TEXTS)
    assert name in str(caught.value) and "\n" not in str(caught.value).strip(), caught.value


# --------------------------------------------------------------------- memory, a start elsewhere


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(mt5_folder, clips):
    """The original's option did nothing."""
    gradients, calls = [], []
    for option in (False, True):
        model = without_dropout(pretrained_model(mt5_folder, TEXTS, gradient_checkpointing=option))
        count = [0]
        for stack in (model.mt5_model.encoder, model.mt5_model.decoder):
            stack.block[0].layer[0].register_forward_hook(
                lambda *_, count=count: count.__setitem__(0, count[0] + 1)
            )
        model(*batch_of(clips, [0, 1])).loss.backward()
        calls.append(count[0])
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    assert calls == [2, 4], f"first blocks ran {calls[0]} and {calls[1]} times"
    assert gradients[0].keys() == gradients[1].keys()
    off = max((gradients[0][name] - gradients[1][name]).abs().max().item() for name in gradients[0])
    assert off < 1e-6, f"off by {off:.2e}"


def test_init_from_keeps_the_rows_of_shared_pieces_and_names_what_begins_anew(
    clips, tmp_path, capsys
):
    other = scratch_model(clips, seed=1, position_encoding="learned", max_length=64, ctc_weight=0.5)
    best = save_best(other, tmp_path / "best")
    torch.manual_seed(2)
    texts = ["今天我在医院看书。", "我们一起学习新的单词，好吗？"] * 5
    model = SignLanguageLite(
        scratch_config(position_encoding="learned", max_length=128, ctc_weight=0.5),
        texts=texts,
        glosses=[["今天", "我"], ["学习"]],
    )
    before = {name: value.clone() for name, value in model.state_to_save().items()}
    capsys.readouterr()
    model.init_from(best)
    printed, after, source = capsys.readouterr().out, model.state_to_save(), other.state_to_save()
    theirs, ours = other.codec.pieces(), model.codec.pieces()
    both = [(i, theirs.index(piece)) for i, piece in enumerate(ours) if piece in theirs]
    alone = [i for i, piece in enumerate(ours) if piece not in theirs]
    assert len(both) > 10 and alone, "the test needs pieces that are shared and some that are not"
    for table in ("mt5_model.shared.weight", "mt5_model.lm_head.weight"):
        assert all(torch.equal(after[table][i], source[table][j]) for i, j in both), table
        assert torch.equal(after[table][alone], before[table][alone]), table
    differ = [
        name
        for name in after
        if "shared" not in name
        and "lm_head" not in name
        and after[name].shape != source[name].shape
    ]
    assert {name.split(".")[0] for name in differ} == {"position", "gloss_head"}
    for name in after:
        if name in differ:
            assert name in printed and torch.equal(after[name], before[name]), (
                f"{name} in {printed}"
            )
        elif "shared" not in name and "lm_head" not in name:
            assert torch.equal(after[name], source[name]), name
    assert f"{len(both)} of {len(ours)}" in printed and not tied(model), printed


def test_init_from_what_is_no_run_is_refused(clips, tmp_path):
    with pytest.raises(DataError, match="best"):
        scratch_model(clips).init_from(tmp_path / "nothing")


def test_the_body_keeps_the_order_of_its_joints():
    """LEFT_WRIST and RIGHT_WRIST in the front-end are positions in this list."""
    assert BODY == [0, 3, 4, 5, 6, 7, 8, 9, 10]


def test_no_output_grows_far_beyond_the_longest_training_text(clips, tmp_path):
    """Else a model that repeats a word without end spoils the BLEU of a whole split, and best/ with
    it.
    """
    model, rows = scratch_model(clips), []
    nn.init.zeros_(model.mt5_model.lm_head.weight)  # all pieces alike: the end is never chosen
    longest = max(len(model.codec.ids(entry["text"])) for entry in clips.entries)
    src_input, _ = batch_of(clips, [0, 1])
    for one in (model, SignLanguageLite.from_pretrained(save_best(model, tmp_path / "best"))):
        one.codec.decode = lambda found: rows.append(found.shape[1] - 1) or [""] * len(found)
        one.generate(src_input, max_new_tokens=64)
        one.generate(src_input, max_new_tokens=3)
    assert rows == [longest * 5 // 4 + 1, 3] * 2, f"longest {longest}, generated {rows}"


def test_mt5_beside_the_scripts_is_taken_where_the_path_is_left_at_its_default(
    mt5_folder, tmp_path, monkeypatch
):
    """Users of the original scripts have it there."""
    beside = tmp_path / "pretrained_weight" / "mt5-small"
    shutil.copytree(mt5_folder, beside)
    monkeypatch.setattr(models_lite, "__file__", str(tmp_path / "models_lite.py"))
    assert models_lite.mt5_folder("google/mt5-small") == beside
    assert models_lite.mt5_folder(str(mt5_folder)) == str(mt5_folder)


def test_only_the_rows_that_stay_are_read_of_a_pretrained_mt5(mt5_folder, monkeypatch):
    """Both large tables together are a gigabyte in mT5-small."""
    sizes = []
    built = models_lite.MT5ForConditionalGeneration.__init__

    def noting_its_size(self, config):
        sizes.append(config.vocab_size)
        built(self, config)

    monkeypatch.setattr(models_lite.MT5ForConditionalGeneration, "__init__", noting_its_size)
    model = pretrained_model(mt5_folder, TEXTS)
    assert sizes == [len(model.codec)] and sizes[0] < len(model.mt5_tokenizer)


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_are_read_in_either_format_and_in_shards(mt5_folder, tmp_path, shards):
    """google/mt5-small ships pytorch_model.bin; larger ones come in several files."""
    weights = load_file(mt5_folder / "model.safetensors")
    for kind in ("bin", "safetensors"):
        folder = tmp_path / kind
        shutil.copytree(mt5_folder, folder)
        (folder / "model.safetensors").unlink()
        names = sorted(weights)
        for shard in range(shards):
            part = {name: weights[name] for name in names[shard::shards]}
            if kind == "bin":
                torch.save(part, folder / f"pytorch_model-{shard}.bin")
            else:
                save_file(part, folder / f"model-{shard}.safetensors")
        state = pretrained_model(folder, TEXTS).mt5_model.state_dict()
        wanted = pretrained_model(mt5_folder, TEXTS).mt5_model.state_dict()
        different = [name for name in wanted if not torch.equal(state[name], wanted[name])]
        assert not different, f"{kind}: {different}"
