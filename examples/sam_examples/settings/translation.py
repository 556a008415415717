"""What translate.py is asked for: its configuration, its defaults, and their checks."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from sam_examples.models.encoder_decoder import TRANSLATORS
from sam_examples.settings.command_line import (
    Directory,
    Int,
    check_common,
    require,
    require_at_least_one,
)
from sam_examples.settings.config_file import parse_as
from sam_examples.settings.methods import parts
from sam_examples.settings.run_options import RunOptions, check_run


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Which text to train on."""

    data_dir: Directory = None
    """Where train.*, val.* or valid.* and test*.* are, as they are or as .gz; by
    default numbers are spelt out, which nobody has to download."""
    source: str = "de"
    """Language to translate from, as in the names of the files."""
    target: str = "en"
    """Language to translate to."""
    vocabulary: int = 8000
    """Subwords of both languages together, learnt from the training text."""
    max_length: int = 128
    """Subwords of the longest sentences; others are cut off there."""


@dataclasses.dataclass(frozen=True)
class TranslationConfig(RunOptions, TextOptions):
    """Trains a Transformer with one method to translate, and reports BLEU and chrF.

    They are those after the last epoch, on held-out text and on the test sets, whose
    translations go to translations/. The defaults are those of the text that the
    command line names. Metrics go to metrics.csv and to TensorBoard, settings to
    config.json, results to results.json, checkpoints to checkpoints/, subwords to
    subwords.model and the last parameters to parameters.msgpack, all in one directory.
    Ctrl-C saves a checkpoint and stops; --resume goes on from it bit for bit, on as
    many devices as before. --translate uses a finished run.
    """

    of_the_machine: ClassVar[tuple[str, ...]] = (
        *RunOptions.of_the_machine,
        "beams",
        "length_penalty",
        "translate",
    )

    model: Annotated[str, tyro.conf.arg(help=f"Out of {', '.join(TRANSLATORS)}.")] = (
        "small"
    )
    layers: Int = None
    """Layers of the encoder, and of the decoder, in place of the model's."""
    width: Int = None
    """Width of the positions, in place of the model's."""
    hidden: Int = None
    """Width of the hidden layers, in place of the model's."""
    pre_norm: bool = False
    """Whether normalisations come before the parts of a layer, and not after them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, losses and states are in float32."""
    batch_tokens: int = 4096
    """Tokens of a batch in either language, padding included."""
    shapes: int = 4
    """Shapes of batches, by the lengths of sentences; each is compiled for."""
    label_smoothing: float = 0.1
    """Share of each label that is spread over all subwords."""
    beams: int = 4
    """Beginnings that the search for a translation keeps; 1 is greedy."""
    length_penalty: float = 0.6
    """Power of the length that log-probabilities of translations are divided by."""
    translate: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Translates the sentences of a file, one a line, by the finished run in --out, and
    trains nothing."""


def suitable_translation(**names: str | None) -> TranslationConfig:
    """What suits a text, a method and a base, where nothing else is asked for.

    Args:
      **names: data_dir, method and base, None for the default; no others count.
    """
    numbers = names["data_dir"] is None
    base = names["base"] or "adamw"
    config = TranslationConfig(
        base=base,
        method=names["method"] or "sam",
        schedule="inverse_sqrt",
        learning_rate=2e-3,
        warmup_epochs=2.0,
        weight_decay=1e-4,
        epochs=30,
        dropout=0.3,
        base_hyperparameters=("b2=0.98",) if base == "adamw" else (),
    )
    if numbers:
        config = dataclasses.replace(
            config,
            vocabulary=200,
            layers=2,
            width=64,
            hidden=128,
            batch_tokens=1024,
            shapes=2,
            epochs=8,
            warmup_epochs=1.0,
            dropout=0.1,
        )
    return config


def parse_translation(args: Sequence[str]) -> TranslationConfig:
    """The configuration of translate.py that a command line asks for."""
    names = ("data_dir", "method", "base", "translate")
    return parse_as(TranslationConfig, args, suitable_translation, names)


def check_translation(config: TranslationConfig) -> None:
    """Raises a ValueError if a setting is out of range; the message says which."""
    check_common(config)
    check_run(config)
    require_at_least_one(config, "vocabulary", "batch_tokens", "shapes", "beams")
    require(
        config.max_length >= 4, "--max-length must be at least 4", config.max_length
    )
    require(
        config.source != config.target,
        "--source and --target must be two languages",
        config.source,
    )
    for name in ("label_smoothing", "length_penalty"):
        value, flag = getattr(config, name), name.replace("_", "-")
        require(0 <= value < 1, f"--{flag} must be at least 0 and below 1", value)
    if config.translate is not None and config.out is None:
        raise ValueError("--translate needs --out, the directory of a finished run.")
    if parts(config.method) == ["sgd"]:
        require(not config.perturb, "--perturb needs an ascent", config.method)


def model_options(config: TranslationConfig) -> dict[str, Any]:
    """What `make_translator` takes besides the name and the vocabulary."""
    return {
        "num_layers": config.layers,
        "width": config.width,
        "hidden": config.hidden,
        "pre_norm": config.pre_norm,
        "dropout_rate": config.dropout,
        "dtype": config.dtype,
    }
