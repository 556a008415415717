"""A training of a small Transformer to translate that takes a core a minute or two."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sam_examples.data.parallel_text import Pairs, ParallelText
from sam_examples.data.subwords import learn_subwords
from sam_examples.data.token_batches import EncodedPairs
from sam_examples.models.encoder_decoder import make_translator
from sam_examples.reporting.metrics import MetricsWriter
from sam_examples.settings.methods import hyperparameters
from sam_examples.settings.translation import TranslationConfig, model_options
from sam_examples.study.contestants import Run as Entry
from sam_examples.study.ledger import Entry as Summary
from sam_examples.study.ledger import Ledger, mean_and_spread
from sam_examples.training.build import Optimizer
from sam_examples.training.interrupts import Interrupt
from sam_examples.training.loop import train
from sam_examples.training.run import Run
from sam_examples.training.task import Task
from sam_examples.training.trainer import Trainer as Stepper
from sam_examples.training.translation import make_translation_task
from sam_examples.training.translator import Translator, judge


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all runs have in common.

    Attributes:
      source: the language to translate from, as in the names of the files.
      target: the language to translate to.
      num_pairs: sentences to train on, the first ones that are not too long.
      longest: subwords of the longest of them; held-out and test text has all.
      vocabulary: subwords of both languages together.
      width: of the positions.
      hidden: width of the perceptrons' hidden layers.
      layers: those of the encoder, and of the decoder; normalisations come first.
      dropout: dropout rate.
      batch_tokens: tokens of a batch in either language, padding included.
      shapes: of batches.
      label_smoothing: share of each label that is spread over all subwords.
      warmup: share of the steps in which the learning rate rises from 0; it then falls
        to 0 along half a cosine.
      b2: AdamW's decay of the mean of squares.
      weight_decay: AdamW's.
    """

    source: str = "de"
    target: str = "en"
    num_pairs: int = 8000
    longest: int = 32
    vocabulary: int = 1000
    width: int = 64
    hidden: int = 128
    layers: int = 2
    dropout: float = 0.1
    batch_tokens: int = 1024
    shapes: int = 2
    label_smoothing: float = 0.1
    warmup: float = 0.1
    b2: float = 0.98
    weight_decay: float = 1e-4

    def config(self, entry: Entry | None = None) -> TranslationConfig:
        """The settings of translate.py, for one entry of the ledger if it is given."""
        own = ("num_pairs", "longest", "warmup", "b2")
        settings = dataclasses.asdict(self)
        config = TranslationConfig(
            **{name: value for name, value in settings.items() if name not in own},
            base="adamw",
            base_hyperparameters=(f"b2={self.b2}",),
            pre_norm=True,
            beams=1,
            devices=1,
            measure_every=0,
        )
        if entry is None:
            return config
        return dataclasses.replace(
            config,
            method=entry.method,
            learning_rate=dict(entry.hyperparameters)["learning_rate"],
            epochs=entry.epochs,
            warmup_epochs=self.warmup * entry.epochs,
            seed=entry.seed,
        )


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
      valid_loss: mean cross-entropy of a held-out token after the last epoch, without
        label smoothing.
      quality: BLEU, chrF and share of exact translations, greedy ones, of the held-out
        text (`valid`) and of the test sets.
      curves: figures of each epoch.
      step_seconds: wall time of a step, the median.
      seconds: wall time of the training and its evaluation, compilation included.
    """

    valid_loss: float
    quality: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, Sequence[float | None]]
    step_seconds: float
    seconds: float


class Trainer:
    """Trains runs of one recipe on one text."""

    def __init__(self, text: ParallelText, recipe: Recipe) -> None:
        """Learns the subwords, and cuts the text into them."""
        self._recipe, self._text = recipe, text
        sentences = [*text.train.sources, *text.train.targets]
        self._subwords = learn_subwords(sentences, recipe.vocabulary)
        pairs = self._encode(text.train)
        short = np.flatnonzero(pairs.lengths <= recipe.longest)
        self._train = pairs.take(short[: recipe.num_pairs])
        self._valid = self._encode(text.valid)
        config = recipe.config()
        self._model = make_translator(
            config.model, len(self._subwords), **model_options(config)
        )

    def program(self, entry: Entry) -> Any:
        """What the time of a run's steps depends on. Hashable."""
        return entry.method

    def is_compiled(self, entry: Entry) -> bool:
        """Whether `train` takes care of compilation, as it always does here."""
        del entry
        return True

    def compile(self, entry: Entry) -> None:
        """Leaves it to `train`."""

    def train(self, entry: Entry) -> Outcome:
        """Trains, evaluates and translates."""
        start = time.perf_counter()
        config, task, optimizer = self._parts(entry)
        run = Run(config, task, optimizer, 1)
        with (
            tempfile.TemporaryDirectory() as directory,
            MetricsWriter(Path(directory), {}, 0) as writer,
        ):
            train(run, config, lambda: None, writer, Interrupt())
        params = run.trainer.state.params
        translator = Translator(config, self._model, self._subwords, params, 1)
        sets = {"valid": self._text.valid, **self._text.tests}
        return Outcome(
            valid_loss=run.curves["valid_loss"][-1] or 0.0,
            quality={
                name: judge(translator(pairs.sources), pairs.targets)._asdict()
                for name, pairs in sets.items()
            },
            curves=run.curves,
            step_seconds=float(np.median(run.step_seconds)),
            seconds=time.perf_counter() - start,
        )

    def turn(self, entry: Entry) -> Callable[[], float]:
        """A function that takes the next step, and returns its seconds.

        They are those of the processor, which others do not lengthen.
        """
        config, task, optimizer = self._parts(entry)
        stepper = Stepper(config, task, optimizer, 1)

        def step() -> float:
            batch = task.batches[stepper.count]
            start = time.process_time()
            metrics = stepper.train(jax.tree.map(lambda x: x[None], batch))
            metrics.loss.block_until_ready()
            return time.process_time() - start

        return step

    def _parts(self, entry: Entry) -> tuple[TranslationConfig, Task, Optimizer]:
        config = self._recipe.config(entry)
        task = make_translation_task(config, self._train, self._valid, self._model, 1)
        (defaults,) = hyperparameters([entry.method]).values()
        values = defaults | dict(entry.hyperparameters)
        return config, task, Optimizer(config, values, task.steps_per_epoch)

    def _encode(self, pairs: Pairs) -> EncodedPairs:
        return EncodedPairs(*(self._subwords.encode(sentences) for sentences in pairs))


class TranslationLedger(Ledger):
    """A ledger of runs that are judged by held-out loss and BLEU."""

    def score(self, result: Mapping[str, Any]) -> float:
        """The held-out loss, of which less is better."""
        return -float(result["valid_loss"])

    def line(self, result: Mapping[str, Any]) -> str:
        """Held-out loss, and BLEU on all sets."""
        bleu = ", ".join(
            f"{name} {figures['bleu']:.2f}"
            for name, figures in result["quality"].items()
        )
        return f"loss {result['valid_loss']:.4f}, BLEU {bleu}"

    def columns(self, entry: Summary) -> dict[str, str]:
        """Held-out loss, BLEU on all sets, and times over AdamW's."""
        results = entry.results
        names = {s: s for s in results[0]["quality"]} | {"valid": "held out"}
        ratio = self.ratios.get(entry.contestant.label)
        return {
            "held-out loss": mean_and_spread(entry.figures("valid_loss"), 3),
            **{
                f"BLEU, {name}": mean_and_spread(
                    [result["quality"][key]["bleu"] for result in results]
                )
                for key, name in names.items()
            },
            "step / AdamW's": "" if ratio is None else f"{ratio:.2f}",
        }
