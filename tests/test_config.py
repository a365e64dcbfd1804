"""The configuration: the contract's defaults, and every bad value or misspelt name refused."""

import ast
import math
from dataclasses import fields, make_dataclass

import pytest
from conftest import ROOT

from config_lite import (
    ConfigError,
    DemoConfig,
    InferenceConfig,
    ScratchConfig,
    TrainConfig,
    language_code,
    set_instead,
)

KINDS = [TrainConfig, ScratchConfig, DemoConfig, InferenceConfig]
NAMES = [item.name for item in fields(TrainConfig)]


def not_its_type(item):
    """Values that a field of this type must refuse, by name."""
    choices = getattr(item.type, "__args__", None)
    if choices:
        first = choices[0]
        almost = float(first) if isinstance(first, int) else first.upper()
        return [None, "neither of them", 17, almost]
    return {
        str: [None, 3, b"bytes", ["a"]],
        bool: [None, 1, 0.0, "true"],
        int: [None, "3", 2.5, math.nan, math.inf, True, [1]],
        float: [None, "0.1", math.nan, math.inf, -math.inf, True, [1.0]],
    }[item.type]


def out_of_range(kind, name):
    """Values of the right type that this field must refuse, by name."""
    values = list(SPECIAL.get(name, []))
    is_number = kind.__dataclass_fields__[name].type in (int, float)
    if is_number and kind is not InferenceConfig:
        values += [-1, -0.5]
    if is_number and name in AT_LEAST_ONE:
        values.append(0)
    return values


AT_LEAST_ONE = {
    "batch_size",
    "gradient_accumulation",
    "max_length",
    "max_text_length",
    "epochs",
    "log_interval",
    "val_interval",
    "num_layers",
    "vocab_size",
    "learning_rate",
    "num_beams",
    "max_new_tokens",
}
SPECIAL = {
    "label_smoothing": [1.0],
    "learning_rate": [1.5],
    "min_lr": [0.1],
    "mirror": [1.5],
    "d_model": [0, 33],
    "seed": [2**63],
    "max_text_length": [2**16 + 1],
    "temporal_stride": [0, 3],
    "num_beams": [-1],
    "max_new_tokens": [-1],
    "no_repeat_ngram_size": [-1],
}


TRAINING_FIELDS = [(TrainConfig, item.name) for item in fields(TrainConfig)]
DECODING_FIELDS = [(InferenceConfig, item.name) for item in fields(InferenceConfig)]


@pytest.mark.parametrize(
    "kind, name",
    TRAINING_FIELDS + DECODING_FIELDS,
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_bad_value_is_refused_by_name(kind, name):
    wrong = {}
    for value in not_its_type(kind.__dataclass_fields__[name]) + out_of_range(kind, name):
        try:
            kind(**{name: value})
            wrong[repr(value)] = "accepted"
        except ConfigError as error:
            if name not in str(error) or repr(value) not in str(error):
                wrong[repr(value)] = f"the message does not name it: {error}"
        except Exception as error:
            wrong[repr(value)] = repr(error)
    assert not wrong, f"{kind.__name__}.{name}: {wrong}"


def test_the_message_names_the_choices():
    with pytest.raises(ConfigError, match="'sinusoidal'.*'learned'.*'none'"):
        TrainConfig(position_encoding="rotary")


@pytest.mark.parametrize("name", ["batch_size", "max_steps"])
def test_a_whole_float_is_refused_where_an_int_is_needed(name):
    """Kept as a float it would fail hours later, in a slice."""
    with pytest.raises(ConfigError, match=f"{name} is 2.0: it must be of type int"):
        TrainConfig(**{name: 2.0})


def test_a_seed_may_be_any_that_torch_takes():
    assert TrainConfig(seed=2**63 - 1).seed == 2**63 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_misspelt_option_fails(kind):
    with pytest.raises(TypeError):
        kind(learning_rte=1e-3)
    with pytest.raises(AttributeError):
        kind().learning_rte = 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_has_a_help_text_and_a_default_that_is_valid(kind):
    kind()
    base = InferenceConfig if kind is InferenceConfig else TrainConfig
    missing = [item.name for item in fields(base) if not item.metadata.get("help")]
    assert not missing, f"no help: {missing}"


def test_the_defaults_are_the_contract_s():
    wanted = {
        "learning_rate": 2e-4,
        "batch_size": 2,
        "gradient_accumulation": 16,  # the review's step 3
        "freeze_decoder_layers": 4,  # step 1
        "position_encoding": "sinusoidal",  # step 4
        "label_smoothing": 0.0,  # cause 4
        "mt5_path": "google/mt5-small",
        "data_dir": "data/CSL_Daily_lite",
        "language": "zh",
        "max_steps": 0,
        "init_from": "",
        "ctc_weight": 0.0,
        "use_tensorboard": False,
        "on_bad_clip": "error",
    }
    config = TrainConfig()
    found = {name: getattr(config, name) for name in wanted}
    assert found == wanted
    assert config.batch_size * config.gradient_accumulation >= 32


def test_the_contract_s_options_exist():
    wanted = [
        "batch_size",
        "gradient_accumulation",
        "epochs",
        "learning_rate",
        "weight_decay",
        "warmup_epochs",
        "min_lr",
        "label_smoothing",
        "max_length",
        "max_text_length",
        "gradient_checkpointing",
        "use_tensorboard",
        "log_dir",
        "log_interval",
        "val_interval",
        "resume_from",
        "auto_resume",
        "device",
        "num_workers",
        "max_steps",
        "max_grad_norm",
        "init_from",
        "augment",
        "ctc_weight",
        "trim_vocabulary",
        "train_embedding",
        "output_dir",
        "seed",
        "language",
        "position_encoding",
        "temporal_stride",
        "on_bad_clip",
    ]
    missing = sorted(set(wanted) - set(NAMES))
    assert not missing, f"missing: {missing}"
    decoding = {item.name for item in fields(InferenceConfig)}
    assert decoding == {"num_beams", "max_new_tokens", "length_penalty", "no_repeat_ngram_size"}


def test_warm_up_may_be_nothing_or_a_fraction():
    assert TrainConfig(warmup_epochs=0).warmup_epochs == 0
    assert TrainConfig(warmup_epochs=0.25).warmup_epochs == 0.25


def test_from_scratch_no_pretrained_model_is_asked_for_and_the_budget_is_in_steps():
    """A budget in epochs would shrink with the data; steps stay steps at a third of it."""
    for kind in (ScratchConfig, DemoConfig):
        config = kind()
        assert isinstance(config, TrainConfig), kind.__name__
        assert config.mt5_path == "", kind.__name__
        assert config.max_steps > 0, kind.__name__
        assert config.batch_size * config.gradient_accumulation >= 32, kind.__name__


def test_the_demo_differs_from_scratch_only_in_what_it_must():
    base = ScratchConfig()
    demo = DemoConfig()
    changed = {name for name in NAMES if getattr(base, name) != getattr(demo, name)}
    assert isinstance(demo, ScratchConfig)
    assert "data_dir" in changed
    assert changed <= {"data_dir", "max_steps", "epochs", "val_interval"}, (
        f"the demo changes {sorted(changed)}"
    )


def is_a_config(node):
    """Whether this expression is called config, as in `config` and in `self.config`."""
    if isinstance(node, ast.Name):
        return node.id == "config"
    return isinstance(node, ast.Attribute) and node.attr == "config"


def test_every_option_is_read_somewhere():
    """The original's gradient_checkpointing, max_text_length and three more were read nowhere."""
    read = set()
    for name in ("datasets_lite.py", "models_lite.py", "train_lite.py"):
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            is_read = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            if is_read and is_a_config(node.value):
                read.add(node.attr)
    unread = sorted(set(NAMES) - read)
    assert not unread, f"options that nothing reads: {unread}"


# ------------------------------------------------------------------------- edited defaults


def test_what_is_set_in_place_of_an_edited_default_is_named(monkeypatch):
    """Else who edits TrainConfig's batch_size trains from scratch with another, untold."""
    monkeypatch.setattr(TrainConfig.__dataclass_fields__["batch_size"], "default", 8)
    monkeypatch.setattr(TrainConfig.__dataclass_fields__["epochs"], "default", 7)
    line = set_instead(ScratchConfig(epochs=7))
    assert line.startswith("ScratchConfig sets: batch_size 16 (TrainConfig: 8), ")
    assert "max_steps 600 (TrainConfig: 0) instead of epochs 7" in line
    assert "\n" not in line


def test_what_was_given_on_the_command_line_is_not_said_to_be_set():
    line = set_instead(ScratchConfig(batch_size=4, max_steps=0))
    assert "batch_size" not in line
    assert " epochs " not in line, "epochs decide"
    assert "learning_rate 0.001 (TrainConfig: 0.0002)" in line
    assert set_instead(TrainConfig(batch_size=4)) == ""


def test_a_field_that_only_a_subclass_has_is_refused():
    """As where batch_size is misspelt in TrainConfig, and ScratchConfig sets the right one."""
    misspelt = make_dataclass("Mine", [("batchsize", int, 8)], bases=(TrainConfig,))
    with pytest.raises(
        ConfigError, match=r"Mine\.batchsize is 8: it must be a field of TrainConfig"
    ):
        misspelt()


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = TrainConfig(data_dir="~/corpus", mt5_path="~/mt5", init_from="~/run/best")
    found = (config.data_dir, config.mt5_path, config.init_from)
    home = "/home/someone"
    assert found == (f"{home}/corpus", f"{home}/mt5", f"{home}/run/best")


@pytest.mark.parametrize(
    "given, code",
    [
        ("zh", "zh"),
        ("ZH", "zh"),
        ("zh-CN", "zh"),
        ("zh_Hans_CN", "zh"),
        ("zho", "zh"),
        ("cmn", "zh"),
        ("yue", "zh"),
        ("cn", "zh"),
        ("Chinese", "zh"),
        ("ja", "ja"),
        ("jpn", "ja"),
        ("my", "my"),
        ("de-AT", "de"),
        ("German", "de"),
        (" en ", "en"),
        ("gsg", "gsg"),
    ],
)
def test_a_language_in_any_usual_form_is_one_code(given, code):
    assert language_code(given) == code
    assert TrainConfig(language=given).language == code


@pytest.mark.parametrize("given", ["", "-", "klingonese", "z", "12", "中文"])
def test_what_is_no_language_is_refused_by_name(given):
    with pytest.raises(ConfigError, match="language is "):
        TrainConfig(language=given)
