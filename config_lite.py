"""What can be set. One dataclass field is one option: type, default, help and command-line flag.

Edit a default here, or give `--field value`. A misspelt name fails, a value out of range is refused by name.
    TrainConfig    fine-tunes a pretrained mT5 on CSL-Daily; its defaults follow the review
    ScratchConfig  trains a small mT5 from nothing (`--mt5_path ""`): for a corpus of one's own
    DemoConfig     ScratchConfig on the built-in synthetic corpus, so that `python train_lite.py` just runs
"""
import math
from dataclasses import dataclass, field, fields
from typing import Literal

DEFAULT_DATA_DIR = "data/CSL_Daily_lite"
DEFAULT_MT5 = "google/mt5-small"

class ConfigError(ValueError):
    """A setting is out of range or contradicts another; the message names field, value and what would do."""

def option(default, help, **metadata):
    """A dataclass field whose help text also serves `--help`; `aliases` are the original scripts' flags."""
    return field(default=default, metadata={"help": help, **metadata})

@dataclass(slots=True)
class InferenceConfig:
    """How text is decoded; every field is an argument of `SignLanguageLite.generate`."""
    num_beams: int = option(1, "beams; 1 = greedy")
    max_new_tokens: int = option(64, "longest output, in pieces; at most 5/4 of the longest training text")
    length_penalty: float = option(1.0, "above 0 favours longer outputs; read with beams only")
    no_repeat_ngram_size: int = option(0, "forbid repeated n-grams of pieces; 0 = off: sentences do repeat")

    def __post_init__(self):
        _check_types(self)
        _require(self, "num_beams", self.num_beams >= 1, "at least 1")
        _require(self, "max_new_tokens", self.max_new_tokens >= 1, "at least 1")

@dataclass(slots=True)
class TrainConfig:
    """Fine-tuning a pretrained mT5. Raises ConfigError naming field, value and range."""
    # --- data ---
    data_dir: str = option(DEFAULT_DATA_DIR, "holds labels.train, labels.dev, labels.test, pose_format/")
    language: str = option("zh", "of the texts: zh is scored by character, others by word")
    max_length: int = option(256, "frames a clip at most; longer ones are sampled down evenly")
    max_text_length: int = option(64, "pieces a text at most; longer ones are cut and counted")
    on_bad_clip: Literal["error", "skip"] = option("error", "stop at bad clips, or leave them out")
    augment: bool = option(False, "vary speed, tilt, aspect and noise of the training clips")
    num_workers: int = option(2, "processes that load clips; 0 = in the main process")

    # --- model ---
    mt5_path: str = option(DEFAULT_MT5, "hub name or folder of an mT5; '' = small, from scratch")
    init_from: str = option("", "another run's best/, whose weights this run starts from; '' = none")
    position_encoding: Literal["sinusoidal", "learned", "none"] = option(
        "sinusoidal", "absolute position added to the projected poses (review, cause 3)")
    temporal_stride: Literal[1, 2] = option(2, "frames per mT5 input position")
    freeze_decoder_layers: int = option(4, "first decoder blocks kept as pretrained (review, step 1)")
    train_embedding: bool = option(True, "train the shared table of pieces, too")
    trim_vocabulary: bool = option(True, "cut pretrained tables to pieces that the training texts can need")
    gradient_checkpointing: bool = option(False, "recompute mT5's activations: less memory, more time")
    d_model: int = option(128, "width of an mT5 from scratch, a multiple of 32")
    num_layers: int = option(2, "encoder and decoder blocks, each, of an mT5 from scratch")
    vocab_size: int = option(1000, "longer pieces, beside all characters, of an mT5 from scratch")

    # --- loss ---
    label_smoothing: float = option(0.0, "0 = off (review, cause 4); the plain nll is always shown beside it")
    ctc_weight: float = option(0.0, "weight of the CTC loss on glosses over mT5's encoder; 0 = gloss-free")

    # --- optimisation ---
    batch_size: int = option(2, "clips per forward pass and process (review, step 3)")
    gradient_accumulation: int = option(16, "forward passes per optimiser step (review, step 3)")
    epochs: int = option(50, "passes over the training data; read when max_steps is 0")
    max_steps: int = option(0, "optimiser steps; 0 = epochs decide")
    learning_rate: float = option(2e-4, "peak rate of AdamW (review, step 3)", aliases=["--lr"])
    min_lr: float = option(1e-6, "the rate at the end of the cosine")
    warmup_epochs: float = option(5, "linear warm-up; at most half of epochs, a tenth of max_steps")
    weight_decay: float = option(0.01, "AdamW's decay; norms and biases are spared")
    max_grad_norm: float = option(1.0, "clip the gradient at this norm; 0 = off")

    # --- run ---
    output_dir: str = option("", "where the run is written; '' = checkpoints/<name of data_dir>")
    seed: int = option(42, "of weights, order, augmentation and dropout")
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto = cuda where there is one, else cpu")
    log_interval: int = option(10, "optimiser steps between log lines")
    val_interval: int = option(1, "epochs between validations")
    resume_from: str = option("", "a last.pt to go on from; '' = see auto_resume", aliases=["--resume"])
    auto_resume: bool = option(True, "go on from output_dir/last.pt where there is one")
    use_tensorboard: bool = option(False, "write scalars to log_dir; needs the package tensorboard")
    log_dir: str = option("runs", "TensorBoard's folder")

    def __post_init__(self):
        """Check every field by itself, then those that depend on each other."""
        _check_types(self)
        for name in ("batch_size", "gradient_accumulation", "max_length", "max_text_length", "vocab_size",
                     "num_layers", "log_interval", "val_interval"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "epochs", self.epochs >= 1 or self.max_steps >= 1, "at least 1 where max_steps is 0")
        _require(self, "learning_rate", 0 < self.learning_rate <= 1, "above 0, at most 1")
        _require(self, "min_lr", self.min_lr <= self.learning_rate, "at most learning_rate")
        _require(self, "label_smoothing", self.label_smoothing < 1, "at least 0 and below 1")
        _require(self, "d_model", self.d_model >= 32 and self.d_model % 32 == 0, "a multiple of 32")
        _require(self, "max_text_length", self.max_text_length <= 2**16, "at most 65536")
        _require(self, "max_length", self.temporal_stride <= self.max_length <= 2**16, "the stride to 65536")
        _require(self, "seed", self.seed < 2**63, "below 2**63")

@dataclass(slots=True)
class ScratchConfig(TrainConfig):
    """A small mT5 from scratch: no language to keep, so a high rate, a budget in steps, and glosses."""
    mt5_path: str = ""
    learning_rate: float = 1e-3
    batch_size: int = 32
    gradient_accumulation: int = 1
    max_steps: int = 1500
    val_interval: int = 5
    ctc_weight: float = 0.5
    augment: bool = True

@dataclass(slots=True)
class DemoConfig(ScratchConfig):
    """The built-in corpus, in under five minutes on two cores."""
    data_dir: str = "data/demo"
    max_steps: int = 800

def _check_types(config):
    for item in fields(config):
        value, choices = getattr(config, item.name), getattr(item.type, "__args__", None)
        if choices:
            known = value in choices and type(value) is type(choices[0])
            _require(config, item.name, known, "one of " + ", ".join(map(repr, choices)))
        elif item.type in (int, float):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            _require(config, item.name, number, "a finite number")
            _require(config, item.name, item.type is float or isinstance(value, int), "a whole number")
            _require(config, item.name, value >= 0 or item.name == "length_penalty", "not negative")
        else:
            _require(config, item.name, isinstance(value, item.type), f"a {item.type.__name__}")

def _require(config, name, holds, wanted):
    if not holds:
        raise ConfigError(f"{type(config).__name__}.{name} is {getattr(config, name)!r}: it must be {wanted}")
