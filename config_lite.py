"""What can be set. One dataclass field is one option: type, default, help and command-line flag.

Edit a default here, or give `--field value`. A misspelt name fails, a value out of range is refused
by name.
    TrainConfig      fine-tunes a pretrained mT5 on CSL-Daily; its defaults follow the review
    InferenceConfig  how text is decoded
    ScratchConfig    trains a small mT5 from nothing (`--mt5_path ""`): for a corpus of one's own
    DemoConfig       ScratchConfig on the built-in corpus, so that `python train_lite.py` just runs

What ScratchConfig and DemoConfig set in place of TrainConfig's defaults is printed before training.
"""

import os
import re
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

DEFAULT_DATA_DIR = "data/CSL_Daily_lite"
DEFAULT_MT5 = "google/mt5-small"


NO_SPACES = ["zh", "ja", "th", "lo", "km", "my"]  # written so, and therefore scored by character
# names and longer codes, each with the code that is used here
LANGUAGES = """chinese=zh mandarin=zh cantonese=zh zho=zh chi=zh cmn=zh yue=zh cn=zh japanese=ja
jpn=ja thai=th tha=th lao=lo khmer=km khm=km burmese=my mya=my bur=my arabic=ar bengali=bn
czech=cs danish=da dutch=nl english=en finnish=fi french=fr german=de greek=el hebrew=he hindi=hi
indonesian=id italian=it korean=ko persian=fa polish=pl portuguese=pt russian=ru spanish=es
swedish=sv turkish=tr ukrainian=uk urdu=ur vietnamese=vi"""


class ConfigError(ValueError):
    """A setting is out of range or contradicts another; the message says what would do."""


def option(default, help, **metadata):
    """A dataclass field; its help text also serves `--help`.

    group: the heading in `--help` of this field and those below it; aliases: the original scripts'
    flags; least, most: the range of a number, 0 and a billion where they are not given.
    """
    return field(default=default, metadata=metadata | {"help": help})


@dataclass(slots=True)
class TrainConfig:
    """Fine-tuning a pretrained mT5. Raises ConfigError naming field, value and what would do."""

    # --- training (review, step 3) ---
    # batch_size x gradient_accumulation x processes: clips a step, 32 at least (review)
    batch_size: int = option(2, "clips per forward pass and process", least=1, group="training")
    gradient_accumulation: int = option(16, "forward passes per optimiser step", least=1)
    epochs: int = option(50, "passes over the training data; read where max_steps is 0")
    max_steps: int = option(0, "optimiser steps; 0 = epochs decide")
    # for pretrained weights; from scratch it is too low, see ScratchConfig
    learning_rate: float = option(
        2e-4, "peak rate of AdamW; Muon's is 4 times as high", least=1e-12, most=1, aliases=["--lr"]
    )
    weight_decay: float = option(0.01, "decoupled decay; norms and biases are spared")
    # from scratch it learns more from few takes (tests/RESULTS.md); with pretrained weights untried
    muon: bool = option(False, "Muon in place of AdamW for the hidden matrices before the decoder")
    # single steps at a high rate jump about, their mean does not (tests/RESULTS.md); it needs the
    # weights' memory twice more
    average_steps: int = option(
        0, "dev and best/ have an average of the weights over about so many steps; 0 = the weights"
    )
    max_grad_norm: float = option(1.0, "clip the gradient at this norm; 0 = off")
    seed: int = option(42, "of weights, order, augmentation and dropout", most=2**63 - 1)

    # --- learning rate schedule ---
    # rises from the first optimiser step, not once an epoch
    warmup_epochs: float = option(5, "linear warm-up; at most half of epochs, a tenth of max_steps")
    min_lr: float = option(1e-6, "the rate at the end of the cosine")

    # --- loss ---
    # at 0.1 a useless, uniform output looked like progress
    label_smoothing: float = option(
        0.0, "0 = off (review, cause 4); the plain nll is shown beside it", most=0.99
    )
    # needs glosses in labels.train
    ctc_weight: float = option(
        0.0, "of the CTC loss on glosses, over mT5's encoder; 0 = gloss-free"
    )

    # --- paths ---
    # paths may begin with ~
    mt5_path: str = option(
        DEFAULT_MT5, "hub name or folder of an mT5; '' = a small one from scratch", group="paths"
    )
    data_dir: str = option(
        DEFAULT_DATA_DIR, "holds labels.train, labels.dev, labels.test and pose_format/"
    )
    output_dir: str = option("", "where the run is written; '' = checkpoints/<name of data_dir>")
    init_from: str = option(
        "", "another run's best/, whose weights this run starts from; '' = none"
    )

    # --- clips and texts ---
    # position tables hold max_length frames; CSL-Daily has about 120 on average
    max_length: int = option(
        256,
        "frames a clip at most; longer ones are sampled down evenly",
        least=2,
        most=65536,
        group="clips and texts",
    )
    max_text_length: int = option(
        64, "pieces a text at most; longer ones are cut and counted", least=1, most=65536
    )
    # it decides how BLEU cuts a text, and what stands between joined ones
    language: str = option("zh", "of the texts: by its ISO 639 code; zh is scored by character")
    # new every epoch; evaluation reads clips as they are
    augment: bool = option(False, "vary speed, tilt, aspect, noise, the body's size and place")
    # with people that training has not seen it brought most; with the same people it costs a little
    mirror: float = option(
        0.5, "share of augmented clips with left and right exchanged; 0 = off", most=1
    )
    # a sign is learnt apart from its clip: the strongest help, but for two takes of known people
    join: float = option(
        0.5, "share of augmented clips to which another is joined, from epoch 3 on; 0 = off", most=1
    )
    on_bad_clip: Literal["error", "skip"] = option("error", "stop at bad clips, or leave them out")

    # --- model ---
    position_encoding: Literal["sinusoidal", "learned", "none"] = option(
        "sinusoidal",
        "absolute position added to the projected poses (review, cause 3)",
        group="model",
    )
    # 2 halves what the encoder works on; signs last 10 frames and more
    temporal_stride: Literal[1, 2] = option(2, "frames per input position of mT5")
    # what of a pretrained mT5 trains; the encoder always does
    freeze_decoder_layers: int = option(
        4, "first decoder blocks kept as pretrained (review, step 1)"
    )
    train_embedding: bool = option(True, "train the shared table of pieces, too")
    trim_vocabulary: bool = option(
        True, "cut pretrained tables to what the training texts can need"
    )
    # from scratch alone: a pretrained mT5 has its own sizes
    d_model: int = option(128, "width of an mT5 from scratch, a multiple of 32", least=32)
    num_layers: int = option(2, "encoder and decoder blocks, each, of an mT5 from scratch", least=1)
    vocab_size: int = option(
        1000, "longer pieces, beside all characters, of an mT5 from scratch", least=1
    )

    # of any mT5
    gradient_checkpointing: bool = option(
        False, "recompute mT5's activations: less memory, more time"
    )

    # --- log ---
    # files and screen have the same figures
    use_tensorboard: bool = option(
        False, "write scalars to log_dir; needs the package tensorboard", group="the run"
    )
    log_dir: str = option("runs", "TensorBoard's folder")
    log_interval: int = option(10, "optimiser steps between log lines", least=1)

    # --- validation ---
    val_interval: int = option(1, "epochs between validations", least=1)

    # --- going on ---
    # the same command goes on by itself: this is for another folder
    resume_from: str = option(
        "", "a last.pt to go on from; '' = see auto_resume", aliases=["--resume"]
    )
    auto_resume: bool = option(True, "go on from output_dir/last.pt where there is one")

    # --- machine ---
    # one machine; several processes are torchrun's matter
    device: Literal["auto", "cuda", "cpu"] = option(
        "auto", "auto = cuda where there is one, else cpu"
    )
    num_workers: int = option(2, "processes that load clips; 0 = in the main process")

    def __post_init__(self):
        """Check every field by itself, then those that depend on each other."""
        _check_fields(self, TrainConfig)
        if not self.epochs and not self.max_steps:
            _refuse(self, "epochs", "1 or more where max_steps is 0")
        if self.min_lr > self.learning_rate:
            _refuse(self, "min_lr", "at most learning_rate")
        if self.d_model % 32:
            _refuse(self, "d_model", "a multiple of 32")
        self.language = language_code(self.language)


def language_code(language):
    """'ZH', 'zh-CN', 'Chinese' -> 'zh', 'German' -> 'de'. ConfigError for what is no language."""
    # without region and script
    code = re.split("[-_]", language.strip().lower())[0]
    code = dict(pair.split("=") for pair in LANGUAGES.split()).get(code, code)
    if not re.fullmatch("[a-z]{2,3}", code):
        raise ConfigError(f"language is {language!r}: give an ISO 639 code, such as zh or de")
    return code


@dataclass(slots=True)
class InferenceConfig:
    """How text is decoded; every field is an argument of `SignLanguageLite.generate`."""

    num_beams: int = option(1, "beams; 1 = greedy", least=1, group="decoding")
    max_new_tokens: int = option(
        64, "longest output, in pieces; at most 5/4 of the longest training text", least=1
    )
    length_penalty: float = option(
        1.0, "above 0 favours longer outputs; read with beams only", least=-10, most=10
    )
    no_repeat_ngram_size: int = option(
        0, "forbid repeated n-grams of pieces; 0 = off: sentences do repeat"
    )

    def __post_init__(self):
        _check_fields(self, InferenceConfig)


@dataclass(slots=True)
class ScratchConfig(TrainConfig):
    """A small mT5 from scratch: no language to keep, so a high rate, steps, and glosses."""

    # a vocabulary learnt from the texts, an mT5 of d_model and num_layers
    mt5_path: str = ""
    # the longer half of a step's clips, mostly joined ones, then the others: little padding
    batch_size: int = 16
    gradient_accumulation: int = 2
    # steps stay steps at a third of the data
    max_steps: int = 600
    learning_rate: float = 1e-3
    # learns sooner than with more (tests/RESULTS.md); on tiny corpora it is a step or two
    warmup_epochs: float = 0.5
    muon: bool = True
    average_steps: int = 20
    # glosses are the strongest help that a small corpus has
    ctc_weight: float = 0.5
    augment: bool = True
    val_interval: int = 5


@dataclass(slots=True)
class DemoConfig(ScratchConfig):
    """The built-in corpus."""

    # written on first use
    data_dir: str = "data/demo"
    max_steps: int = 500


def make_config(kind, values):
    """A configuration of this kind from those of the values that are its fields."""
    return kind(**{item.name: values[item.name] for item in fields(kind) if item.name in values})


def set_instead(config):
    """One line on what ScratchConfig or DemoConfig has in place of TrainConfig's defaults, or "".

    Who edits a default of TrainConfig is told here where the edit does not reach.
    """
    changes = []
    # the defaults as they stand in the file, edited or not; both classes have one order of fields
    for plain, own in zip(fields(TrainConfig), fields(config)):
        # an edit does not reach it, and the command line does not set it
        in_force = getattr(config, own.name) == own.default
        if in_force and own.default != plain.default:
            change = f"{own.name} {own.default!r} (TrainConfig: {plain.default!r})"
            if own.name == "max_steps":  # an edit of epochs does not reach it either
                change += f" instead of epochs {config.epochs}"
            changes.append(change)
    return f"{type(config).__name__} sets: {', '.join(changes)}" if changes else ""


def _check_fields(config, owner):
    """Type, choices and range of each field; owner is the class whose options say what they are."""
    options = fields(owner)
    # a subclass may set fields, not make new ones: those stand behind the owner's
    added = fields(config)[len(options) :]
    if added:
        _refuse(config, added[0].name, f"a field of {owner.__name__}, too: is it misspelt there?")
    for item in options:
        value = getattr(config, item.name)
        kind = type(value)  # not isinstance: True is an int to Python
        # of a Literal; repr tells 1 from True
        choices = [repr(choice) for choice in get_args(item.type)]
        least = item.metadata.get("least", 0)
        most = item.metadata.get("most", 1_000_000_000)
        wanted = ""
        if choices:
            if repr(value) not in choices:
                wanted = f"one of {', '.join(choices)}"
        elif kind is not item.type and (kind, item.type) != (int, float):
            wanted = f"of type {item.type.__name__}"
        elif kind is not str and not least <= value <= most:
            wanted = f"a number from {least} to {most}"
        if wanted:
            _refuse(config, item.name, wanted)
        if kind is str:  # a path may begin with ~
            setattr(config, item.name, os.path.expanduser(value))


def _refuse(config, name, wanted):
    raise ConfigError(
        f"{type(config).__name__}.{name} is {getattr(config, name)!r}: it must be {wanted}"
    )
