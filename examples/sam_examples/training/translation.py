"""Trainings of a model that translates."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from sam_examples.data.parallel_text import ParallelText, load_parallel_text
from sam_examples.data.spelt_numbers import load_spelt_numbers
from sam_examples.data.subwords import BEGIN, END, PAD
from sam_examples.data.token_batches import (
    EncodedPairs,
    Shape,
    TokenBatch,
    choose_shapes,
    evaluation_order,
    training_batches,
)
from sam_examples.models.decoding import SpecialTokens
from sam_examples.models.encoder_decoder import EncoderDecoder, make_translator
from sam_examples.settings.methods import is_functional
from sam_examples.settings.translation import TranslationConfig, model_options
from sam_examples.training.sequences import mean_length, sentence_losses
from sam_examples.training.step import (
    LossFn,
    Metrics,
    Objective,
    TrainState,
    make_loss,
)
from sam_examples.training.task import Evaluation, Task

SPECIAL = SpecialTokens(PAD, BEGIN, END)


def load_text(config: TranslationConfig) -> ParallelText:
    """The text of a training.

    Raises:
      FileNotFoundError: if the directory or one of its files is missing.
      ValueError: if a language is not there, or the files do not fit together.
    """
    languages = config.source, config.target
    if config.data_dir is None:
        return load_spelt_numbers(*languages)
    return load_parallel_text(config.data_dir, *languages)


def make_model(config: TranslationConfig, vocabulary: int) -> EncoderDecoder:
    """The model of a training, for so many subwords."""
    return make_translator(config.model, vocabulary, **model_options(config))


def make_translation_task(
    config: TranslationConfig,
    train: EncodedPairs,
    valid: EncodedPairs,
    model: EncoderDecoder,
    rows_divisible_by: int,
) -> Task:
    """What a training is of that translates.

    Args:
      config: says how many tokens are a batch, and the epochs.
      train: the pairs to train on.
      valid: the held-out pairs.
      model: what translates.
      rows_divisible_by: what has to divide the pairs of a batch.

    Raises:
      ValueError: if a batch of so many tokens has no room for the longest sentences, or
        there are too few for one.
    """
    choose = partial(
        choose_shapes,
        tokens=config.batch_tokens,
        count=config.shapes,
        rows_divisible_by=rows_divisible_by,
    )
    batches = training_batches(
        train, choose(train.lengths), epochs=config.epochs, seed=config.seed
    )
    steps = len(batches) // config.epochs
    shapes = choose(valid.lengths)
    order = evaluation_order(valid.lengths, shapes)
    of_each_shape = list({shape: (shape, rows) for shape, rows in order}.values())
    return Task(
        Objective(
            make_translation_loss_fn(
                model, config.label_smoothing, is_functional(config.method)
            ),
            make_scoring_loss_fn(model, config.label_smoothing),
            prepare,
        ),
        make_init(model),
        make_evaluate_batch(model),
        batches,
        steps_per_epoch=steps,
        steps_per_call=1,  # Each is of a shape of its own.
        unit="tokens",
        units_per_step=len(train.targets.tokens) / steps,
        valid=_evaluation(valid, order),
        sample=_evaluation(valid, of_each_shape),
    )


def _evaluation(
    pairs: EncodedPairs, order: Sequence[tuple[Shape, np.ndarray]]
) -> Evaluation:
    def batch(index: int) -> tuple[TokenBatch, np.ndarray]:
        shape, rows = order[index]
        present = np.arange(shape.rows) < len(rows)
        return pairs.batch(rows, shape), present.astype(np.float32)

    batches = grain.MapDataset.range(len(order)).map(batch)
    return Evaluation(batches, len(pairs.targets.tokens))


class StepBatch(NamedTuple):
    """A batch as the losses of a step take it.

    Attributes:
      sources: tokens `[B, S]`.
      targets: tokens `[B, T]`.
      mean_length: that of the targets of the whole batch, `[B]`.
    """

    sources: jax.Array
    targets: jax.Array
    mean_length: jax.Array


def prepare(batch: TokenBatch, key: jax.Array) -> tuple[StepBatch, jax.Array]:
    """What a step sees of a batch; the key is that of dropout."""
    sources, targets = map(jnp.asarray, batch)
    return StepBatch(sources, targets, mean_length(targets != PAD)), key


def smoothed_cross_entropy(
    logits: jax.Array, labels: ArrayLike, smoothing: float
) -> jax.Array:
    """Cross-entropies with labels of which a share is spread over all classes.

    `-(1 - s) log p_y - s mean_v log p_v` (Szegedy et al., 2016, arXiv 1512.00567).

    Args:
      logits: `[..., V]`.
      labels: `[...]`, integers.
      smoothing: the share `s`.
    """
    log_probs = jax.nn.log_softmax(logits)
    index = jnp.asarray(labels)[..., None]
    chosen = jnp.take_along_axis(log_probs, index, axis=-1)[..., 0]
    return -(1 - smoothing) * chosen - smoothing * jnp.mean(log_probs, axis=-1)


def after_begin(targets: ArrayLike) -> jax.Array:
    """What each of the tokens `[B, T]` follows, the first one that of the beginning."""
    targets = jnp.asarray(targets)
    begin = jnp.full_like(targets[:, :1], BEGIN)
    return jnp.concatenate([begin, targets[:, :-1]], axis=1)


def make_translation_loss_fn(
    model: EncoderDecoder, smoothing: float, functional: bool = False
) -> LossFn:
    """Makes `loss_fn(params, batch, batch_stats, key) -> losses, auxiliary`.

    `batch` is a `StepBatch`, the losses `[B]` are `sentence_losses`, and the auxiliary
    data are the batch statistics, which stay as they are, and the share of tokens
    predicted; with `functional` the step is to know the loss in two parts.
    """

    def output_fn(
        params: Any, batch: StepBatch, batch_stats: Any, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        logits: Any = model.apply(
            {"params": params},
            batch.sources,
            after_begin(batch.targets),
            train=True,
            rngs={"dropout": key},
        )
        correct = jnp.argmax(logits, axis=-1) == batch.targets
        accuracy = jnp.mean(of_sentences(correct, batch))
        return logits, (batch_stats, accuracy)

    loss_fn = partial(losses_of_logits, smoothing=smoothing)
    return make_loss(output_fn, loss_fn, functional=functional)


def losses_of_logits(
    logits: jax.Array, batch: StepBatch, *_: Any, smoothing: float
) -> jax.Array:
    """The losses of sentences `[B]` of logits `[B, T, V]`."""
    return of_sentences(smoothed_cross_entropy(logits, batch.targets, smoothing), batch)


def of_sentences(token_losses: jax.Array, batch: StepBatch) -> jax.Array:
    """The `sentence_losses` of a batch."""
    return sentence_losses(token_losses, batch.targets != PAD, batch.mean_length)


def make_scoring_loss_fn(model: EncoderDecoder, smoothing: float) -> Any:
    """Makes the loss of `make_translation_loss_fn` without dropout: `losses` alone."""

    def scoring_loss_fn(
        params: Any, batch: StepBatch, batch_stats: Any, key: jax.Array
    ) -> jax.Array:
        del batch_stats, key
        written = after_begin(batch.targets)
        variables = {"params": params}
        logits: Any = model.apply(variables, batch.sources, written, train=False)
        return losses_of_logits(logits, batch, smoothing=smoothing)

    return scoring_loss_fn


def make_init(model: EncoderDecoder) -> Any:
    """Makes `init(seed, tx) -> TrainState`; the same seed, the same parameters."""
    init_model = jax.jit(partial(model.init, train=False))

    def init(seed: int, tx: optax.GradientTransformation) -> TrainState:
        # This generator compiles in a fifth of the default one's time.
        key = jax.random.key(seed, impl="rbg")
        tokens = jnp.full((1, 1), END)
        params = init_model(key, tokens, tokens)["params"]
        return TrainState(params, {}, tx.init(params))

    return init


def make_evaluate_batch(model: EncoderDecoder) -> Any:
    """Makes `evaluate(params, batch_stats, batch, weights) -> Metrics`.

    They are sums over the tokens of all sentences, each times its sentence's weight, of
    cross-entropies without label smoothing.
    """

    def evaluate(
        params: Any, batch_stats: Any, batch: TokenBatch, weights: jax.Array
    ) -> Metrics:
        del batch_stats
        written = after_begin(batch.targets)
        variables = {"params": params}
        logits: Any = model.apply(variables, batch.sources, written, train=False)
        losses = smoothed_cross_entropy(logits, batch.targets, 0.0)
        correct = jnp.argmax(logits, axis=-1) == batch.targets
        counts = weights[:, None] * (batch.targets != PAD)
        return Metrics(jnp.sum(counts * losses), jnp.sum(counts * correct))

    return evaluate
