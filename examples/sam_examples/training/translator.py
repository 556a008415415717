"""A model that was trained to translate, in use: sentences in, sentences out."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import numpy as np
import optax
import sacrebleu

from sam_examples.data.parallel_text import Pairs
from sam_examples.data.subwords import Subwords, load_subwords
from sam_examples.data.token_batches import Shape, choose_shapes, evaluation_order
from sam_examples.devices.sharding import by_examples, make_mesh
from sam_examples.models.decoding import translate
from sam_examples.models.encoder_decoder import EncoderDecoder
from sam_examples.settings.translation import TranslationConfig
from sam_examples.training.translation import SPECIAL, make_init, make_model

# The files of a run.
SUBWORDS, PARAMETERS = "subwords.model", "parameters.msgpack"


class Quality(NamedTuple):
    """How good translations are, of sentences that have one each to compare with.

    Attributes:
      bleu: BLEU of all of them together, by sacreBLEU, in per cent.
      chrf: chrF2, the same.
      exact: the share of translations that are the expected ones to the letter.
    """

    bleu: float
    chrf: float
    exact: float


def judge(translations: Sequence[str], expected: Sequence[str]) -> Quality:
    """Compares translations with those expected."""
    references = [list(expected)]
    # Text that is tokenised already is judged as it is.
    bleu = sacrebleu.corpus_bleu(list(translations), references, force=True)
    chrf = sacrebleu.corpus_chrf(list(translations), references)
    equal = [t == e for t, e in zip(translations, expected, strict=True)]
    return Quality(bleu.score, chrf.score, float(np.mean(equal)))


class Translator:
    """Translates by a model in evaluation mode.

    Attributes:
      sentences_per_second: in the latest call, apart from what it compiled.
    """

    def __init__(
        self,
        config: TranslationConfig,
        model: EncoderDecoder,
        subwords: Subwords,
        params: Any,
        num_devices: int,
    ) -> None:
        """Keeps what translates; devices share the sentences of a batch."""
        self._config, self._subwords, self._params = config, subwords, params
        self._devices = num_devices
        self._place = by_examples(make_mesh(num_devices))
        search = partial(
            translate,
            model,
            special=SPECIAL,
            beams=config.beams,
            alpha=config.length_penalty,
        )
        self._jitted: Any = jax.jit(search, static_argnames="length")
        self._searches: dict[Shape, Any] = {}
        self.sentences_per_second = 0.0

    def __call__(self, sentences: Sequence[str]) -> list[str]:
        """Translates sentences; one longer than `max_length` is cut off there."""
        sources = self._subwords.encode(sentences)
        lengths = np.minimum(sources.lengths, self._config.max_length)
        shapes = choose_shapes(
            lengths,
            tokens=max(
                # A search holds the past of so many beginnings.
                self._config.batch_tokens // self._config.beams,
                self._devices * (int(lengths.max()) + 4),
            ),
            count=self._config.shapes,
            rows_divisible_by=self._devices,
        )
        order = evaluation_order(lengths, shapes)
        for shape in dict(order):
            self._compile(shape)
        translations = [""] * len(sentences)
        start = time.perf_counter()
        for shape, rows in order:
            tokens = self._translate(sources.padded(rows, shape.length), shape)
            found = self._subwords.decode(tokens[: len(rows)])
            for row, translation in zip(rows, found, strict=True):
                translations[row] = translation
        seconds = time.perf_counter() - start
        self.sentences_per_second = len(sentences) / seconds
        return translations

    def _compile(self, shape: Shape) -> None:
        if shape not in self._searches:
            sources = jax.device_put(np.zeros(shape, np.int32), self._place)
            lowered = self._jitted.lower(
                self._params, sources, length=2 * shape.length + 8
            )
            self._searches[shape] = lowered.compile()

    def _translate(self, sources: np.ndarray, shape: Shape) -> np.ndarray:
        # Empty sentences, that end at once, fill the last batch up.
        filled = np.pad(sources, ((0, shape.rows - len(sources)), (0, 0)))
        placed = jax.device_put(filled, self._place)
        return np.asarray(self._searches[shape](self._params, placed))


def judged(translator: Translator, pairs: Pairs, path: Path) -> Quality:
    """Translates sentences into a file, one a line, and judges that."""
    translations = translator(pairs.sources)
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(translations) + "\n", encoding="utf-8")
    return judge(translations, pairs.targets)


def save_parameters(path: Path, params: Any) -> None:
    """Writes the parameters of a finished run."""
    path.write_bytes(flax.serialization.to_bytes(jax.tree.map(np.asarray, params)))


def check_finished(path: Path) -> None:
    """Raises a ValueError unless there are the parameters of a finished run."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; --out must be the directory of a finished run: go on "
            "with it by --resume first."
        )


def load_finished(
    config: TranslationConfig, directory: Path
) -> tuple[EncoderDecoder, Subwords, Any]:
    """The model, the subwords and the parameters of a finished run.

    Raises:
      ValueError: if a file is missing, damaged or of another model.
    """
    check_finished(directory / PARAMETERS)
    subwords = load_subwords(directory / SUBWORDS)
    model = make_model(config, len(subwords))
    like = jax.eval_shape(partial(make_init(model), config.seed, optax.identity()))
    return model, subwords, load_parameters(directory / PARAMETERS, like.params)


def load_parameters(path: Path, like: Any) -> Any:
    """Reads the parameters of a finished run.

    Args:
      path: what `save_parameters` has written.
      like: a tree of the same structure and shapes.

    Raises:
      ValueError: if they are damaged or of another model.
    """
    try:
        params = flax.serialization.from_bytes(like, path.read_bytes())
        shapes = [jax.tree.map(np.shape, tree) for tree in (params, like)]
    # What it raises depends on which part is damaged.
    except Exception as error:
        raise ValueError(f"{path} is damaged or of another model ({error}).") from error
    if shapes[0] != shapes[1]:
        raise ValueError(f"{path} has the parameters of a model of other sizes.")
    return params
