"""From batches to a loss or to text: what trains, and what a clip's result depends on."""

import math
import shutil
import unicodedata
from dataclasses import asdict

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
from datasets_lite import (
    BODY,
    LEFT_WRIST,
    RIGHT_WRIST,
    DataError,
    SignLanguageDataset,
    load_dataset_file,
)
from models_lite import (
    CentredLinear,
    SignLanguageLite,
    TextCodec,
    bones,
    hand_features,
    part_features,
    pose_features,
    train_tokenizer,
)

TEXTS = ["今天我在学校买红的书。", "你好，老师不喜欢鱼吗？", "明天妈妈要找医院！"]


def odd_batch(clips):
    """Indices of a long clip, a short one of an odd number of frames, and two between."""
    by_length = sorted(range(len(clips)), key=lambda i: clips.lengths[i])
    short = next(i for i in by_length if clips.lengths[i] % 2 == 1)
    return [by_length[-1], short, by_length[10], by_length[20]]


def texts_of(clips):
    return [entry["text"] for entry in clips.entries]


def logits_by_hand(model, src_input, labels):
    """Teacher forcing as the paper has it: the decoder reads pad, then the labels but the last."""
    embeddings, mask = model.encode_pose(src_input)
    read = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], 1).clamp(min=0)
    output = model.mt5_model(inputs_embeds=embeddings, attention_mask=mask, decoder_input_ids=read)
    return output.logits


def embed(model, src_input):
    """The pose encoder's output for a batch."""
    with torch.no_grad():
        embeddings, _ = model.encode_pose(src_input)
    return embeddings


# ------------------------------------------------------------ what trains


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
    wrong = []
    for name, parameter in model.mt5_model.named_parameters():
        if parameter.requires_grad != trainable_by_policy(name, depth, train_embedding):
            wrong.append(name)
    assert not wrong, f"{len(wrong)} of {len(names)}: {wrong}"
    frozen = [
        name
        for name, parameter in model.named_parameters()
        if not name.startswith("mt5_model.") and not parameter.requires_grad
    ]
    assert not frozen, f"frozen in the front-end: {frozen}"


def test_a_depth_beyond_the_decoder_freezes_all_of_it_and_warns(mt5_folder, capsys):
    model = pretrained_model(mt5_folder, TEXTS, freeze_decoder_layers=9)
    printed = capsys.readouterr().out
    assert "warning" in printed, printed
    assert "freeze_decoder_layers is 9" in printed, printed
    assert "6" in printed, printed
    blocks = [
        parameter.requires_grad
        for name, parameter in model.mt5_model.named_parameters()
        if name.startswith("decoder.block.")
    ]
    assert blocks
    assert not any(blocks)
    assert model.mt5_model.decoder.final_layer_norm.weight.requires_grad
    assert model.mt5_model.lm_head.weight.requires_grad


def test_a_depth_within_the_decoder_does_not_warn(mt5_folder, capsys):
    pretrained_model(mt5_folder, TEXTS, freeze_decoder_layers=6)
    assert "warning" not in capsys.readouterr().out


def test_freezing_is_idempotent_and_leaves_no_trace_of_an_earlier_depth(mt5_folder):
    model = pretrained_model(mt5_folder, TEXTS, freeze_decoder_layers=2)

    def states():
        return {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def freeze(depth, train_embedding):
        model.config.freeze_decoder_layers = depth
        model.config.train_embedding = train_embedding
        model._freeze_mt5_layers()

    first = states()
    freeze(2, True)
    assert states() == first
    freeze(6, False)
    freeze(2, True)
    assert states() == first


def test_from_scratch_nothing_is_frozen(clips):
    model = scratch_model(clips, freeze_decoder_layers=4, train_embedding=False)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert not frozen, frozen


def test_frozen_blocks_pass_the_gradient_on_and_take_none(mt5_folder, clips):
    model = without_dropout(pretrained_model(mt5_folder, TEXTS, freeze_decoder_layers=6))
    model(*batch_of(clips, [0, 1])).loss.backward()
    moving = with_gradient(model)
    frozen = []
    still = []
    for name, _ in model.named_parameters():
        if name.startswith("mt5_model.decoder.block."):
            frozen.append(name)
        elif name not in moving:
            still.append(name)
    assert not moving & set(frozen)
    assert not still, f"trainable, but without a gradient: {still}"


def with_gradient(model):
    """The names of the parameters that the last backward pass would move."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }


def test_what_trains_is_printed_a_line_a_part(mt5_folder, capsys):
    model = pretrained_model(mt5_folder, TEXTS)
    printed = capsys.readouterr().out
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"{total:,}" in printed, printed
    assert f"{trained:,}" in printed, printed
    assert len(printed.strip().splitlines()) >= 5, printed


# ------------------------------------------------------------ the tying trap


def tied(model):
    """Ways in which the head and the table of pieces are one, or a stack has another table."""
    mt5 = model.mt5_model
    head = mt5.lm_head.weight
    table = mt5.shared.weight
    faults = []
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
    stored = load_file(mt5_folder / "model.safetensors")
    rows = model.codec.keep or slice(None)
    assert torch.equal(model.mt5_model.lm_head.weight, stored["lm_head.weight"][rows])
    assert torch.equal(model.mt5_model.shared.weight, stored["shared.weight"][rows])


def test_transformers_own_tying_finds_nothing_to_tie(mt5_folder, clips):
    """`resize_token_embeddings`, `save_pretrained` and others call tie_weights on the way."""
    for model in (scratch_model(clips), pretrained_model(mt5_folder, TEXTS)):
        head = model.mt5_model.lm_head.weight.detach().clone()
        model.mt5_model.tie_weights()
        assert not tied(model), tied(model)
        assert torch.equal(head, model.mt5_model.lm_head.weight)


def test_a_pretrained_model_that_is_tied_is_refused(mt5_folder, tmp_path):
    folder = shutil.copytree(mt5_folder, tmp_path / "tied")
    tied_mt5 = MT5ForConditionalGeneration(MT5Config(vocab_size=100, **MT5_SIZES))
    tied_mt5.save_pretrained(folder)
    with pytest.raises(ConfigError, match="its head is tied .* fewer rows than the vocabulary"):
        pretrained_model(folder)


# ------------------------------------------------------------ best/, there and back


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
        wanted = model(*batch)
        found = loaded(*batch)
    assert not tied(loaded), tied(loaded)
    assert not loaded.training
    assert found.nll.item() == wanted.nll.item()
    assert found.num_tokens == wanted.num_tokens
    assert found.gloss == wanted.gloss
    src_input, _ = batch
    assert loaded.generate(src_input, max_new_tokens=8) == model.generate(
        src_input, max_new_tokens=8
    )
    saved = model.state_to_save()
    again = loaded.state_to_save()
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_a_trimmed_model_is_saved_without_the_full_tables(mt5_folder, tmp_path):
    """From a toy vocabulary as from the real one: rows that no text can need are left behind."""
    model = pretrained_model(mt5_folder, ["abc"])
    saved = load_file(save_best(model, tmp_path / "best") / "model.safetensors")
    full = load_file(mt5_folder / "model.safetensors")["shared.weight"]
    assert len(saved["mt5_model.shared.weight"]) == len(model.codec)
    assert len(saved["mt5_model.lm_head.weight"]) == len(model.codec)
    assert len(model.codec) < len(full) / 2


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
    weights = best / "model.safetensors"
    config = best / "config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "no vocabulary":
        for path in list(best.iterdir()):
            if path.suffix == ".model" or "token" in path.name:
                path.unlink()
    elif damage == "half the weights":
        raw = weights.read_bytes()
        weights.write_bytes(raw[: len(raw) // 2])
    elif damage == "config is no JSON":
        config.write_text("{")
    elif damage == "another width":
        text = config.read_text(encoding="utf-8")
        config.write_text(text.replace('"d_model": 32', '"d_model": 64'), encoding="utf-8")
    else:
        other = save_best(scratch_model(clips, temporal_stride=1), tmp_path / "other")
        shutil.copy(other / "model.safetensors", weights)
    with pytest.raises(DataError) as caught:
        SignLanguageLite.from_pretrained(best)
    assert str(best) in str(caught.value)


# ------------------------------------------------------------ what a clip may depend on


@pytest.mark.parametrize("stride", [1, 2])
def test_padding_does_not_change_a_clip(clips, stride):
    """The original repeated the last frame, and its norms and convolutions read the padding."""
    model = scratch_model(clips, temporal_stride=stride)
    model.centre(batch_of(clips, [0])[0])  # what was zero, as padding, is so no longer
    for index in odd_batch(clips)[1:]:
        src_input, _ = batch_of(clips, [index])
        with torch.no_grad():
            alone, mask = model.encode_pose(src_input)
            longer, longer_mask = model.encode_pose(with_frames_appended(src_input, 17))
        real = alone.shape[1]
        off = (alone - longer[:, :real]).abs().max().item()
        assert off < 1e-5, f"off by {off:.2e} at {alone.abs().max():.1f}"
        assert int(mask.sum()) == real
        assert int(longer_mask.sum()) == real


def with_frames_appended(src_input, count):
    """A batch with so many more frames of padding."""
    padded = dict(src_input)
    for part in ("body", "left", "right"):  # (B, T, V, 3)
        padded[part] = F.pad(src_input[part], (0, 0, 0, 0, 0, count))
    padded["attention_mask"] = F.pad(src_input["attention_mask"], (0, count))
    return padded


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training without dropout"])
@pytest.mark.parametrize("position", ["sinusoidal", "learned", "none"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_clip_s_embeddings_do_not_depend_on_its_batch(clips, stride, position, training):
    model = scratch_model(clips, temporal_stride=stride, position_encoding=position)
    model.centre(batch_of(clips, [0])[0])
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
    loss = sum(output.loss.item() * output.num_tokens for output in alone) / tokens
    nll = sum(output.nll.item() * output.num_tokens for output in alone) / tokens
    assert together.loss.item() == pytest.approx(loss, abs=2e-5)
    assert together.nll.item() == pytest.approx(nll, abs=2e-5)
    assert together.num_tokens == tokens
    assert together.num_correct == sum(output.num_correct for output in alone)
    assert training or together.gloss == [output.gloss[0] for output in alone]


@pytest.fixture(scope="module")
def learnt(clips):
    """A model from scratch that has six clips by heart, those clips, and the training's losses."""
    model = without_dropout(scratch_model(clips, d_model=64, ctc_weight=0.5))
    indices = [0, 1, 2, 3, 4, 5]
    batch = batch_of(clips, indices)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(250):
        loss = model(*batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] <= 0.004:
            break
    return model.eval(), indices, losses


def test_one_batch_is_learnt_to_the_exact_strings(learnt, clips):
    """The self-test of the whole way from poses to text: no fault survives it.

    Least of all a second shift of the labels.
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
    indices = indices + others

    def generate(indices):
        src_input, _ = batch_of(clips, indices)
        return model.generate(src_input)

    together = generate(indices)
    alone = []
    for index in indices:
        alone += generate([index])
    assert together == alone
    assert generate(indices[::-1]) == alone[::-1]


def test_the_text_comes_from_the_pose(learnt, clips):
    model, indices, _ = learnt
    src_input, _ = batch_of(clips, indices)
    swapped, _ = batch_of(clips, indices[::-1])
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
    src_input, tgt_input = batch_of(clips, indices)
    texts = model.generate(src_input, **asdict(config))
    assert len(texts) == len(indices)
    assert all(isinstance(text, str) for text in texts)
    special = [text for text in texts if "<" in text or "▁" in text]
    assert not special, f"special pieces in the text: {special}"
    if "max_new_tokens" in options:
        longest = max(len(model.codec.ids(text)) for text in texts)
        assert longest <= 3 + 1, "three pieces and the end"
        assert len(model.codec.ids(tgt_input["gt_sentence"][0])) > 3 + 1, "or nothing is cut"


def test_beams_find_what_was_learnt_by_heart(learnt, clips):
    """More search may not find worse.

    Beams that stop at the first finished texts cut the right one short.
    """
    model, indices, _ = learnt
    src_input, _ = batch_of(clips, indices)
    greedy = model.generate(src_input)
    for beams in (2, 4):
        assert model.generate(src_input, num_beams=beams) == greedy, f"with {beams} beams"


# ------------------------------------------------------------ positions and stride


@pytest.mark.parametrize("stride", [1, 2])
def test_the_stride_divides_the_positions_and_the_mask(clips, stride):
    model = scratch_model(clips, temporal_stride=stride)
    indices = odd_batch(clips)
    with torch.no_grad():
        embeddings, mask = model.encode_pose(batch_of(clips, indices)[0])
    wanted = [math.ceil(clips.lengths[i] / stride) for i in indices]
    assert mask.sum(1).tolist() == wanted
    assert embeddings.shape == (4, max(wanted), 32)
    assert mask.shape == (4, max(wanted))
    for row, positions in zip(mask, wanted):
        assert row[:positions].all(), "ones, then zeros"
        assert not row[positions:].any(), "ones, then zeros"


@pytest.mark.parametrize("stride", [1, 2])
def test_the_sinusoid_is_the_paper_s_and_is_added_after_the_projection(clips, stride):
    src_input, _ = batch_of(clips, [0])
    without = scratch_model(clips, position_encoding="none", temporal_stride=stride)
    with_it = scratch_model(clips, position_encoding="sinusoidal", temporal_stride=stride)
    difference = embed(with_it, src_input) - embed(without, src_input)
    for position in (0, 1, 7):
        for pair in (0, 5, 15):
            rate = 10000 ** (-2 * pair / 32)
            added = difference[0, position, 2 * pair : 2 * pair + 2].tolist()
            wanted = [math.sin(position * rate), math.cos(position * rate)]
            assert added == pytest.approx(wanted, abs=1e-5), f"position {position}, pair {pair}"


def test_the_poses_start_smaller_than_the_position_beside_them(clips):
    """At unit scale they drown it, and what it is for, a sign twice in a row, is read as one."""
    src_input, _ = batch_of(clips, [0])
    poses = embed(scratch_model(clips, position_encoding="none"), src_input)
    both = embed(scratch_model(clips, position_encoding="sinusoidal"), src_input)
    positions = both - poses

    def size(values):
        return values.square().mean().sqrt().item()

    assert size(poses) == pytest.approx(0.5, abs=0.01)
    assert size(positions) == pytest.approx(0.5**0.5, abs=0.01)


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
    seen = decoder_inputs(model)
    src_input, tgt_input = batch_of(clips, [0])
    piece = 5
    with torch.no_grad():
        model(src_input, tgt_input | {"labels": torch.full((1, 6), piece)})
    read = [0] + [piece] * 5  # the decoder starts with padding
    for place in range(6):
        added = seen[0][0, place] - model.mt5_model.shared.weight[read[place]]
        wanted = []
        for i in range(0, 32, 2):
            angle = place * 10000 ** (-i / 32)
            wanted += [math.sin(angle), math.cos(angle)]
        assert added.tolist() == pytest.approx(wanted, abs=1e-5), f"piece {place}"


@pytest.mark.parametrize("beams", [1, 3])
def test_a_piece_s_place_is_the_same_when_decoding_one_by_one(clips, beams):
    model = scratch_model(clips)
    src_input, _ = batch_of(clips, [0, 1])
    seen = decoder_inputs(model)
    model.generate(src_input, num_beams=beams, max_new_tokens=5)
    assert len(seen) > 1
    assert all(given.shape[1] == 1 for given in seen), "one piece a call"
    table = model.mt5_model.shared.weight
    for place, given in enumerate(seen):
        pieces = given[:, 0] - model.piece_position.table[place]
        distances = (pieces[:, None] - table).abs().amax(-1)  # to each piece's row
        assert distances.amin(-1).max() < 1e-5, f"piece {place}"


@pytest.mark.parametrize("name", ["past_key_values", "cache", "some_later_name"])
def test_the_decoder_s_cache_is_known_under_any_name(clips, name):
    """transformers 5.24 renamed the argument.

    Read by its old name, each piece had the first one's place.
    """
    model = without_dropout(scratch_model(clips))
    cache = DynamicCache()
    keys, values = torch.zeros(2, 1, 1, 3, 8)  # three pieces are there
    cache.update(keys, values, layer_idx=0)
    arguments = {"input_ids": torch.tensor([[5]]), name: cache}
    _, given = model._number_pieces(model.mt5_model.decoder, (), arguments)
    added = given["inputs_embeds"][0, 0] - model.mt5_model.shared.weight[5]
    assert torch.allclose(added, model.piece_position.table[3], atol=1e-6)
    assert "input_ids" not in given
    assert given[name] is cache


def test_a_pretrained_decoder_is_given_its_pieces_as_they_are(mt5_folder, clips):
    model = without_dropout(pretrained_model(mt5_folder, TEXTS))
    seen = decoder_inputs(model)
    src_input, _ = batch_of(clips, [0])
    with torch.no_grad():
        model(src_input, {"labels": torch.full((1, 6), 5), "gt_gloss": [[]]})
    assert torch.equal(seen[0][0, 1:], model.mt5_model.shared.weight[[5] * 5])


def test_learned_positions_are_added_and_learn(clips):
    model = without_dropout(scratch_model(clips, position_encoding="learned", max_length=128))
    (name,) = [name for name, _ in model.named_parameters() if "position" in name]
    table = model.get_parameter(name)
    model(*batch_of(clips, [0])).loss.backward()
    used = math.ceil(clips.lengths[0] / model.config.temporal_stride)
    moved = table.grad.abs().sum(1) > 0
    rows = f"{name}: {int(moved.sum())} of {len(moved)} rows move, {used} used"
    assert moved[:used].all(), rows
    assert not moved[used:].any(), rows


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "none"])
@pytest.mark.parametrize("stride, max_length", [(1, 33), (2, 33), (2, 34)])
def test_every_length_up_to_max_length_works_and_a_longer_one_is_refused_by_name(
    clips, position, stride, max_length
):
    """Refused by name, not by a crash; sample_frames sees to it that the data set holds none."""
    model = scratch_model(
        clips, position_encoding=position, temporal_stride=stride, max_length=max_length
    )

    for frames in (1, 2, max_length - 1, max_length):
        assert embed(model, random_poses(frames)).shape[1] == math.ceil(frames / stride)
    with pytest.raises(
        ValueError, match=f"a clip has {max_length + 1} frames, more than the model"
    ):
        embed(model, random_poses(max_length + 1))


def random_poses(frames):
    """A batch of one clip."""
    return {
        "body": torch.rand(1, frames, 9, 3),
        "left": torch.rand(1, frames, 21, 3),
        "right": torch.rand(1, frames, 21, 3),
        "attention_mask": torch.ones(1, frames, dtype=torch.long),
    }


def test_max_length_is_what_the_data_set_samples_down_to(demo, clips):
    config = scratch_config(max_length=16)
    dataset = SignLanguageDataset(demo / "labels.dev", config, "dev")
    model = scratch_model(clips, max_length=16)
    src_input, tgt_input = batch_of(dataset, range(len(dataset)))
    assert src_input["body"].shape[1] == 16
    assert max(clips.lengths) > 16
    assert torch.isfinite(model(src_input, tgt_input).loss)


# ------------------------------------------------------------ features


@pytest.mark.parametrize("part, joints", [("left", (8, 12)), ("right", (4, 20)), ("body", (5, 6))])
def test_swapping_two_joints_changes_the_embedding(clips, part, joints):
    """With the original's mean over joints it does not: which finger moved is lost."""
    model = scratch_model(clips)
    src_input, _ = batch_of(clips, [0])
    first, second = joints
    swapped = dict(src_input)
    swapped[part] = src_input[part].clone()
    swapped[part][:, :, first] = src_input[part][:, :, second]
    swapped[part][:, :, second] = src_input[part][:, :, first]
    before = embed(model, src_input)
    after = embed(model, swapped)
    change = ((before - after).norm() / (before - before.mean()).norm()).item()
    assert change > 1e-2, f"the embedding changes by {100 * change:.4f} %"


def features(part):
    """part_features by joint: (B, T, V, 5) of x, y, confidence and velocity."""
    return part_features(part).reshape(*part.shape[:3], 5)


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


def test_a_bone_leads_from_the_joint_before_where_both_were_seen():
    hand = torch.zeros(1, 1, 21, 3)
    hand[0, 0, :4] = torch.tensor([[1, 2, 1], [4, 6, 0.5], [9, 9, 0], [5, 5, 1.0]])
    wanted = torch.zeros(20, 2)
    wanted[0] = torch.tensor([3, 4])  # joint 2 was not seen: no bone leads to it or from it
    assert torch.equal(bones(hand)[0, 0].view(20, 2), wanted)


def test_a_hand_is_given_with_its_bones_at_its_own_scale():
    hand = torch.rand(1, 6, 21, 3) + 0.1
    found = hand_features(hand, torch.zeros(1, 6, 3))
    root_mean_square = hand[..., :2].square().sum(-1).mean().sqrt()
    assert torch.allclose(found[..., 105:145] * root_mean_square, bones(hand), atol=1e-5)


def test_a_hand_is_seen_at_its_own_scale_and_in_its_place():
    hand = torch.rand(1, 6, 21, 3) + 0.1
    wrist = torch.rand(1, 6, 3)
    smaller_hand = hand * torch.tensor([0.1, 0.1, 1.0])
    features = hand_features(hand, wrist)
    smaller = hand_features(smaller_hand, wrist)
    off = (features - smaller).abs().max()
    assert torch.allclose(features, smaller, atol=1e-4), f"off by {off}"
    moved = hand_features(hand, wrist + 0.1)
    assert torch.equal(features[..., :-3], moved[..., :-3])
    assert not torch.equal(features[..., -3:], moved[..., -3:])


def test_an_unseen_hand_has_finite_features():
    unseen = hand_features(torch.zeros(2, 5, 21, 3), torch.zeros(2, 5, 3))
    assert torch.isfinite(unseen).all()
    assert not unseen.any()


def test_both_hands_go_through_the_same_weights_and_the_left_one_is_mirrored(clips):
    mirror = torch.tensor([-1.0, 1.0, 1.0])
    hand = torch.rand(2, 6, 21, 3)
    body = torch.rand(2, 6, 9, 3)
    other = body * mirror
    other[:, :, RIGHT_WRIST] = body[:, :, LEFT_WRIST] * mirror
    _, hands = pose_features({"body": body, "left": hand, "right": 0 * hand})
    left = hands.chunk(2)[0]
    _, hands = pose_features({"body": other, "left": 0 * hand, "right": hand * mirror})
    right = hands.chunk(2)[1]
    assert torch.allclose(left, right, atol=1e-6), (
        "a left hand and its mirror image on the right are one shape"
    )

    model = without_dropout(scratch_model(clips))
    src_input, _ = batch_of(clips, [0])
    weights = {name for name, _ in model.named_parameters() if "pose_embed" in name}
    for absent in ("left", "right"):
        model.zero_grad()
        one_hand = {**src_input, absent: torch.zeros_like(src_input[absent])}
        embeddings, _ = model.encode_pose(one_hand)
        embeddings.square().sum().backward()
        moving = {name for name in with_gradient(model) if "pose_embed" in name}
        assert moving == weights, f"without the {absent} hand"


def test_a_centred_layer_doubles_what_differs_from_the_mean():
    layer = CentredLinear(2, 1)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    assert layer(torch.tensor([[3.0, 4.0]])).item() == 14
    layer.mean = torch.tensor([3.0, 5.0])
    assert layer(torch.tensor([[7.0, 5.5]])).item() == 2 * (4 + 0.5)


def test_features_are_centred_over_real_frames_of_both_hands(clips):
    model = scratch_model(clips)
    src_input, _ = batch_of(clips, [0, 1, 2])
    model.centre(with_frames_appended(src_input, 17))
    real = src_input["attention_mask"].bool()
    body = src_input["body"]
    mirror = torch.tensor([-1.0, 1.0, 1.0])
    left = hand_features(src_input["left"] * mirror, body[:, :, LEFT_WRIST] * mirror)[real]
    right = hand_features(src_input["right"], body[:, :, RIGHT_WRIST])[real]
    for part, wanted in (("body", part_features(body)[real]), ("hand", torch.cat([left, right]))):
        assert torch.allclose(model.pose_embed[part].mean, wanted.mean(0), atol=1e-5), part


def test_means_are_saved_with_the_weights_and_taken_over(clips, tmp_path):
    model = scratch_model(clips)
    model.centre(batch_of(clips, [0, 1, 2])[0])
    model.save_pretrained(tmp_path)
    other = scratch_model(clips)
    other.init_from(tmp_path)
    for again in (SignLanguageLite.from_pretrained(tmp_path), other):
        for part, layer in model.pose_embed.items():
            assert layer.mean.any()
            assert torch.equal(again.pose_embed[part].mean, layer.mean)


# ------------------------------------------------------------ the loss


def test_labels_are_not_shifted_twice(clips):
    """The output at position t is trained on token t.

    The original trained it on t + 1, and token 1 never.
    """
    for smoothing in (0.0, 0.1):  # the original's fault lay in its smoothed branch
        model = scratch_model(clips, label_smoothing=smoothing)
        src_input, tgt_input = batch_of(clips, odd_batch(clips))
        labels = model.codec.encode(tgt_input["gt_sentence"])
        with torch.no_grad():
            logs = logits_by_hand(model, src_input, labels).log_softmax(-1)
            output = model(src_input, tgt_input)
        real = labels != -100
        of_labels = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][real]
        of_all_pieces = logs.mean(-1)[real]
        nll = -of_labels.mean().item()
        assert output.nll.item() == pytest.approx(nll, abs=1e-5), f"smoothing {smoothing}"
        smoothed = (1 - smoothing) * of_labels + smoothing * of_all_pieces
        loss = -smoothed.mean().item()
        assert output.loss.item() == pytest.approx(loss, abs=1e-5), f"smoothing {smoothing}"
        assert output.num_tokens == int(real.sum())
        assert output.num_correct == int((logs.argmax(-1) == labels)[real].sum())


def test_label_smoothing_changes_the_loss_and_never_the_nll_beside_it(clips):
    batch = batch_of(clips, [0, 1, 2])
    with torch.no_grad():
        plain = scratch_model(clips, label_smoothing=0.0)(*batch)
        smooth = scratch_model(clips, label_smoothing=0.2)(*batch)
    assert plain.nll.item() == smooth.nll.item() == plain.loss.item()
    assert smooth.loss.item() != plain.loss.item()
    assert not plain.nll.requires_grad


def test_the_labels_may_come_from_the_loader_or_be_made_in_forward(clips):
    model = scratch_model(clips)
    src_input, tgt_input = batch_of(clips, odd_batch(clips))
    with_labels = {**tgt_input, "labels": model.codec.encode(tgt_input["gt_sentence"])}
    text_alone = {"gt_sentence": tgt_input["gt_sentence"]}
    with torch.no_grad():
        wanted = model(src_input, tgt_input)
        for targets in (with_labels, text_alone):
            found = model(src_input, targets)
            assert found.loss.item() == wanted.loss.item()
            assert found.num_tokens == wanted.num_tokens


def test_a_new_model_starts_near_the_uniform_loss(clips):
    """With mT5's own head of deviation 1 it would start at about 15."""
    model = scratch_model(clips, d_model=128)
    with torch.no_grad():
        nll = model(*batch_of(clips, [0, 1, 2, 3])).nll.item()
    uniform = math.log(len(model.codec))
    assert uniform - 1 < nll < uniform + 1.5, f"nll {nll:.2f}, ln(vocabulary) {uniform:.2f}"


def test_gradients_of_two_halves_add_up_to_those_of_the_whole(clips):
    """Summed over tokens, as the loop does it.

    A mean of means would be off where texts differ in length.
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
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    whole, halves = gradients
    off = (whole - halves).norm() / whole.norm()
    assert off < 1e-5, f"off by {off:.2e}"


# ------------------------------------------------------------ CTC


def ctc_by_hand(model, src_input, glosses):
    """Each clip by itself, so that no padding is in it: summed negative log-likelihoods."""
    number = {word: i + 2 for i, word in enumerate(model.glosses)}  # 0: blank, 1: unknown
    total = 0.0
    for row, gloss in enumerate(glosses):
        if not gloss:
            continue
        length = int(src_input["src_length"][row])
        alone = {
            key: src_input[key][row : row + 1, :length]
            for key in ("body", "left", "right", "attention_mask")
        }
        embeddings, mask = model.encode_pose(alone)
        encoded = model.mt5_model.encoder(inputs_embeds=embeddings, attention_mask=mask)
        logs = model.gloss_head(encoded.last_hidden_state).log_softmax(-1).transpose(0, 1)
        target = torch.tensor([[number.get(word, 1) for word in gloss]])
        loss = F.ctc_loss(logs, target, [len(logs)], [len(gloss)], reduction="sum")
        total += loss.item()
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
    texts = texts_of(clips)
    no_glosses = [[]] * len(texts)
    model = SignLanguageLite(scratch_config(ctc_weight=0.5), texts=texts, glosses=no_glosses)
    model.train()
    output = model(*batch_of(clips, [0, 1]))
    assert model.gloss_head is None
    assert output.loss.item() == output.nll.item()


def test_ctc_without_a_single_gloss_in_the_batch_adds_nothing(clips):
    model = without_dropout(scratch_model(clips, ctc_weight=0.5))
    src_input, tgt_input = batch_of(clips, [0, 1])
    output = model(src_input, {**tgt_input, "gt_gloss": [[], []]})
    assert output.loss.item() == pytest.approx(output.nll.item())
    output.loss.backward()


@pytest.mark.parametrize("gloss, needs", [(["我"] * 8, 15), (["我", "书"] * 5, 10)])
def test_ctc_passes_over_a_clip_with_fewer_positions_than_its_glosses_need(clips, gloss, needs):
    """n glosses need n positions, and one more between equal neighbours; fewer cost infinity."""
    model = without_dropout(scratch_model(clips, ctc_weight=0.5, temporal_stride=1))

    def ctc_part(frames):
        target = {"gt_sentence": ["我"], "gt_gloss": [gloss]}
        output = model(random_poses(frames), target)
        output.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        return output.loss.item() - output.nll.item()

    assert ctc_part(needs) > 1
    assert ctc_part(needs - 1) == 0


# ------------------------------------------------------------ the vocabulary


def test_nothing_but_the_softmax_changes_when_the_vocabulary_is_trimmed(mt5_folder, clips):
    full = pretrained_model(mt5_folder, trim_vocabulary=False)
    trimmed = pretrained_model(mt5_folder, texts_of(clips) + TEXTS)
    front_end = {}
    for name, value in full.state_to_save().items():
        if not name.startswith("mt5_model."):
            front_end[name] = value
    trimmed.load_state_dict(front_end, strict=False)

    keep = trimmed.codec.keep
    rows = trimmed.mt5_model.lm_head.out_features
    assert len(keep) == rows
    assert rows < full.mt5_model.lm_head.out_features
    src_input, tgt_input = batch_of(clips, [0, 1, 2])
    full_labels = full.codec.encode(tgt_input["gt_sentence"])
    labels = trimmed.codec.encode(tgt_input["gt_sentence"])
    is_real = labels >= 0
    assert torch.equal(is_real, full_labels >= 0)
    assert torch.equal(torch.tensor(keep)[labels[is_real]], full_labels[is_real])

    with torch.no_grad():
        wanted = logits_by_hand(full, src_input, full_labels)[..., keep]
        found = logits_by_hand(trimmed, src_input, labels)
        full_output = full(src_input, tgt_input)
        output = trimmed(src_input, tgt_input)
    off = (wanted - found).abs().max()
    assert off <= 1e-6 * max(1, wanted.abs().max()), f"off by {off:.2e}"
    # the full model's, its softmax over the kept pieces alone
    nll = F.cross_entropy(wanted[is_real], labels[is_real]).item()
    assert output.nll.item() == pytest.approx(nll, abs=1e-5)
    assert output.nll < full_output.nll


def test_trimming_never_loses_a_piece_that_the_training_texts_need(mt5_folder):
    for texts in (TEXTS, ["The quick brown fox, 12 %."], ["abc"]):
        model = pretrained_model(mt5_folder, texts)
        keep = model.codec.keep
        full = TextCodec(model.mt5_tokenizer, 64)
        for text in texts:
            assert [keep[row] for row in model.codec.ids(text)] == full.ids(text), text
        special = [
            model.mt5_tokenizer.pad_token_id,
            model.mt5_tokenizer.eos_token_id,
            model.mt5_tokenizer.unk_token_id,
        ]
        assert [keep.index(piece) for piece in special] == special, (
            "pad, end and unknown keep their places"
        )


def test_a_piece_that_was_cut_is_spelled(mt5_folder):
    """A dev text may hold a word that no training text has.

    Its characters are kept, and so is the text.
    """
    texts = ["今天我在学校。", "明天他去商店！", "你好吗？"]
    model = pretrained_model(mt5_folder, texts)
    pieces = model.mt5_tokenizer.get_vocab()
    kept = set(model.codec.keep)

    def is_chinese(piece):
        """Of characters that are pieces themselves."""
        return all("一" <= character <= "鿿" and character in pieces for character in piece)

    cut = []
    for piece, index in pieces.items():
        if index not in kept and len(piece) == 2 and is_chinese(piece):
            cut.append(piece)
    assert cut, (
        "the vocabulary has no two-character piece that was cut: the test needs another text"
    )
    for word in cut[:20]:
        rows = model.codec.ids(word)
        assert model.codec.unknown not in rows, f"{word} is unknown"
        assert model.codec.decode(model.codec.encode([word]).clamp(min=0)) == [word]


def test_what_nothing_can_spell_is_the_unknown_piece_and_no_crash(mt5_folder):
    model = pretrained_model(mt5_folder, ["abc"])
    rows = model.codec.ids("𓀀")
    assert model.codec.unknown in rows
    assert max(rows) < len(model.codec)


def test_rows_that_are_no_text_are_never_decoded(mt5_folder):
    """mT5's tables have more rows than there are pieces, and raw mT5 emits <extra_id_0>."""
    model = pretrained_model(mt5_folder, trim_vocabulary=False)
    rows = model.mt5_model.lm_head.out_features
    stored = load_file(mt5_folder / "model.safetensors")
    assert rows == len(model.codec)
    assert rows < len(stored["lm_head.weight"])
    pieces = model.codec.pieces
    assert len(pieces) == rows
    assert None not in pieces
    assert not any("extra_id" in piece for piece in pieces)


def round_trip(codec, texts):
    return codec.decode(codec.encode(texts).clamp(min=0))


@pytest.mark.parametrize("kind", ["scratch", "trimmed", "full tables"])
def test_the_vocabulary_gives_back_a_text_nfkc_normalised(mt5_folder, clips, kind):
    """So no output equals a raw reference with full-width punctuation.

    Scores must normalise both sides.
    """
    texts = texts_of(clips)
    if kind == "scratch":
        model = scratch_model(clips)
    elif kind == "trimmed":
        model = pretrained_model(mt5_folder, texts)
    else:
        model = pretrained_model(mt5_folder)
    wanted = [unicodedata.normalize("NFKC", text) for text in texts]
    assert wanted != texts, "or the test shows nothing"
    assert round_trip(model.codec, texts) == wanted


def test_the_real_labels_survive_the_real_vocabulary(mt5_folder):
    folder = shared("csl_daily_labels")
    train = [entry["text"] for entry in load_dataset_file(folder / "labels.train").values()]
    dev = [entry["text"] for entry in load_dataset_file(folder / "labels.dev").values()]
    codec = pretrained_model(mt5_folder, train).codec

    def without_spaces(text):
        return "".join(text.split())

    wrong = []
    for found, text in zip(round_trip(codec, dev), dev):
        wanted = unicodedata.normalize("NFKC", text)
        if without_spaces(found) != without_spaces(wanted):
            wrong.append((found, wanted))
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
    """The original read max_text_length nowhere.

    Without its end a text teaches the model never to stop.
    """
    texts = texts_of(clips)
    if kind == "scratch":
        model = scratch_model(clips, max_text_length=6)
    else:
        model = pretrained_model(mt5_folder, texts, max_text_length=6)
    end = model.mt5_tokenizer.eos_token_id
    long_text = "".join(texts[:3])
    short_text = texts[0][:2]
    labels = model.codec.encode([long_text, short_text])
    assert labels.shape[1] == 6

    whole = model.codec.ids(long_text)
    assert len(whole) > 6
    assert labels[0].tolist() == whole[:5] + [end]

    short = model.codec.ids(short_text)
    assert short[-1] == end
    assert labels[1].tolist() == short + [-100] * (6 - len(short))


def test_a_model_works_with_a_local_mt5_alone(mt5_folder, clips):
    model = SignLanguageLite(pretrained_config(mt5_folder))
    output = model(*batch_of(clips, [0, 1]))
    assert torch.isfinite(output.loss)
    src_input, _ = batch_of(clips, [0])
    assert len(model.generate(src_input, max_new_tokens=4)) == 1


def test_from_scratch_needs_texts_and_says_so():
    with pytest.raises(ConfigError, match="texts"):
        SignLanguageLite(scratch_config())


# ------------------------------------------------------------ a missing mT5

MT5_FILES = {
    "weights": "model.safetensors",
    "spiece.model": "spiece.model",
    "config.json": "config.json",
}


def break_mt5(path, mt5_folder, fault):
    """Leave at `path` what this fault leaves of an mT5."""
    if fault == "no such folder":
        return
    if fault == "empty":
        path.mkdir()
    elif fault == "a file":
        path.write_bytes(b"")
    elif fault.startswith("no "):
        shutil.copytree(mt5_folder, path)
        (path / MT5_FILES[fault.removeprefix("no ")]).unlink()
    else:
        shutil.copytree(mt5_folder, path)
        (path / MT5_FILES[fault]).write_bytes(b"garbage")


@pytest.mark.parametrize(
    "fault",
    [
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
    ],
)
def test_an_mt5_path_that_cannot_be_used_is_a_config_error_that_names_it(
    mt5_folder, tmp_path, fault
):
    if fault == "a hub name, no network":
        name = "sign-language-lite/no-such-mt5"
    else:
        name = str(tmp_path / "mt5")
        break_mt5(tmp_path / "mt5", mt5_folder, fault)
    with pytest.raises(ConfigError, match="mt5_path") as caught:
        SignLanguageLite(TrainConfig(mt5_path=name), texts=TEXTS)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message.strip(), message


# ------------------------------------------------------------ memory, a start elsewhere


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(mt5_folder, clips):
    """The original's option did nothing."""

    def calls_and_gradients(gradient_checkpointing):
        """How often the two first blocks run in a step, and the gradients."""
        model = without_dropout(
            pretrained_model(mt5_folder, TEXTS, gradient_checkpointing=gradient_checkpointing)
        )
        calls = []

        def note_the_call(*_):
            calls.append(1)

        for stack in (model.mt5_model.encoder, model.mt5_model.decoder):
            stack.block[0].layer[0].register_forward_hook(note_the_call)
        model(*batch_of(clips, [0, 1])).loss.backward()
        gradients = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad
        return len(calls), gradients

    calls, gradients = calls_and_gradients(False)
    calls_again, recomputed = calls_and_gradients(True)
    assert calls == 2
    assert calls_again == 4
    assert gradients.keys() == recomputed.keys()
    off = max((gradients[name] - recomputed[name]).abs().max().item() for name in gradients)
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
    printed = capsys.readouterr().out
    after = model.state_to_save()
    source = other.state_to_save()

    source_pieces = other.codec.pieces
    source_rows = {}  # row in this model -> row in the other
    new_rows = []
    for row, piece in enumerate(model.codec.pieces):
        if piece in source_pieces:
            source_rows[row] = source_pieces.index(piece)
        else:
            new_rows.append(row)
    assert len(source_rows) > 10, "the test needs pieces that are shared"
    assert new_rows, "the test needs pieces that are not shared"
    assert f"{len(source_rows)} of {len(model.codec.pieces)}" in printed, printed

    begins_anew = set()
    for name in after:
        if name in ("mt5_model.shared.weight", "mt5_model.lm_head.weight"):
            for row, source_row in source_rows.items():
                assert torch.equal(after[name][row], source[name][source_row]), name
            assert torch.equal(after[name][new_rows], before[name][new_rows]), name
        elif after[name].shape != source[name].shape:
            assert name in printed, printed
            assert torch.equal(after[name], before[name]), name
            begins_anew.add(name.split(".")[0])
        else:
            assert torch.equal(after[name], source[name]), name
    assert begins_anew == {"position", "gloss_head"}
    assert not tied(model), tied(model)


def test_init_from_what_is_no_run_is_refused(clips, tmp_path):
    with pytest.raises(DataError, match="best"):
        scratch_model(clips).init_from(tmp_path / "nothing")


def test_the_body_keeps_the_order_of_its_joints():
    """LEFT_WRIST and RIGHT_WRIST in the front-end are positions in this list."""
    assert BODY == [0, 3, 4, 5, 6, 7, 8, 9, 10]


def test_no_output_grows_far_beyond_the_longest_training_text(clips, tmp_path):
    """Else a model that repeats a word without end spoils a whole split's BLEU, and best/ too."""
    model = scratch_model(clips)
    nn.init.zeros_(model.mt5_model.lm_head.weight)  # all pieces alike: the end is never chosen
    loaded = SignLanguageLite.from_pretrained(save_best(model, tmp_path / "best"))
    longest = max(len(model.codec.ids(text)) for text in texts_of(clips))
    src_input, _ = batch_of(clips, [0, 1])

    def pieces_generated(model, max_new_tokens):
        lengths = []

        def note_the_length(rows):
            lengths.append(rows.shape[1] - 1)  # without the piece that decoding starts with
            return [""] * len(rows)

        model.codec.decode = note_the_length
        model.generate(src_input, max_new_tokens=max_new_tokens)
        (length,) = lengths
        return length

    for each in (model, loaded):
        assert pieces_generated(each, max_new_tokens=64) == longest * 5 // 4 + 1
        assert pieces_generated(each, max_new_tokens=3) == 3


def test_mt5_beside_the_scripts_is_taken_where_the_path_is_left_at_its_default(
    mt5_folder, tmp_path, monkeypatch
):
    """Users of the original scripts have it there."""
    beside = tmp_path / "pretrained_weight" / "mt5-small"
    shutil.copytree(mt5_folder, beside)
    monkeypatch.setattr(models_lite, "__file__", str(tmp_path / "models_lite.py"))
    assert models_lite.mt5_folder("google/mt5-small") == beside
    assert models_lite.mt5_folder(str(mt5_folder)) == mt5_folder


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
