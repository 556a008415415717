"""The training loop of the examples: one compiled function trains many steps.

Nothing here depends on the method; `optax_sam.value_and_update` makes the step of any
Optax optimizer. The loss keeps to what sharpness-aware methods ask of it: it returns
the losses of the examples, the running statistics of batch normalisation are auxiliary
and hence those of the clean pass, and the dropout key is an argument and hence the same
in both passes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import optax_sam
from sam_examples.data import Dataset, Split, augment, normalize
from sam_examples.models.convolution import fastest_convolution
from sam_examples.models.resnet import NORMS, ResNet


class TrainState(NamedTuple):
    """What a training step changes.

    Attributes:
      params: the model's parameters.
      batch_stats: running statistics of batch normalisation, empty without it.
      opt_state: the optimizer's state.
    """

    params: Any
    batch_stats: Any
    opt_state: Any


class Metrics(NamedTuple):
    """Means over examples, or over steps of the same size.

    Attributes:
      loss: the cross-entropy.
      accuracy: the share of correct predictions.
    """

    loss: jax.Array
    accuracy: jax.Array


LossFn = Callable[..., tuple[jax.Array, tuple[Any, jax.Array]]]
InitState = Callable[[int, optax.GradientTransformation], TrainState]


def make_loss_fn(model: nn.Module) -> LossFn:
    """Makes `loss_fn(params, batch, batch_stats, key) -> losses, auxiliary`.

    `batch` is a `Split` of normalized images, `losses` has shape `[B]`, and the
    auxiliary data are the new running statistics and the share of correct predictions.
    """

    def loss_fn(
        params: Any, batch: Split, batch_stats: Any, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch.images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)
        return losses, (updated.get("batch_stats", {}), accuracy)

    return loss_fn


def make_scoring_loss_fn(model: nn.Module) -> Callable[..., jax.Array]:
    """Makes `scoring_loss_fn(params, batch, batch_stats, key) -> losses`.

    The losses `[B]` are those in evaluation mode, where the loss of an example does not
    depend on the others: what Sparse SAM scores parameters by.
    """

    def scoring_loss_fn(
        params: Any, batch: Split, batch_stats: Any, key: jax.Array
    ) -> jax.Array:
        del key  # Nothing is dropped in evaluation mode.
        variables = {"params": params, "batch_stats": batch_stats}
        logits = model.apply(variables, batch.images, train=False)
        losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch.labels
        )
        return losses

    return scoring_loss_fn


def make_model(settings: Any, num_classes: int) -> ResNet:
    """The ResNet of some settings, with the convolution that is fastest here.

    Args:
      settings: has `stages`, `width`, `norm` and `dropout`.
      num_classes: number of logits.
    """
    return ResNet(
        stage_sizes=settings.stages,
        num_classes=num_classes,
        width=settings.width,
        norm=NORMS[settings.norm],
        dropout_rate=settings.dropout,
        conv=fastest_convolution(jax.default_backend()),
    )


def make_init(model: nn.Module, dataset: Dataset) -> InitState:
    """Makes `init(seed, tx) -> TrainState`; the same seed, the same parameters."""
    shape = (1, *dataset.train.image_shape)
    init_model = jax.jit(partial(model.init, train=False))

    def init(seed: int, tx: optax.GradientTransformation) -> TrainState:
        # This generator compiles in a fifth of the default one's time.
        key = jax.random.key(seed, impl="rbg")
        variables = init_model(key, jnp.zeros(shape))
        params = variables["params"]
        return TrainState(params, variables.get("batch_stats", {}), tx.init(params))

    return init


def make_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    dataset: Dataset,
    *,
    augmented: bool = False,
    ascent_loss_fn: LossFn | None = None,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> Callable[[TrainState, Split, jax.Array], tuple[TrainState, Metrics]]:
    """Makes `step(state, batch, key) -> state, metrics`, to be compiled.

    Args:
      model: called as `model(images, train=...)`.
      tx: the optimizer, sharpness-aware or not.
      dataset: images are normalized to its mean and deviation.
      augmented: whether to crop, flip and cut out the images, see `augment`.
      ascent_loss_fn: takes the place of the loss in the clean pass, whose gradients
        then only set the perturbation; by default none does.
      batch_sharding: how each batch is shared among devices, where state and batch are
        on more than one.
    """
    step_fn = optax_sam.value_and_update(
        make_loss_fn(model),
        tx,
        has_aux=True,
        ascent_loss_fn=ascent_loss_fn,
        scoring_loss_fn=make_scoring_loss_fn(model),
    )
    prepare = make_prepare(dataset, augmented)

    def step(
        state: TrainState, batch: Split, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        batch, dropout_key = prepare(batch, key)
        if batch_sharding is not None:
            constrain: Any = jax.lax.with_sharding_constraint
            batch = constrain(batch, batch_sharding)
        (loss, (batch_stats, accuracy)), updates, opt_state = step_fn(
            state.params, state.opt_state, batch, state.batch_stats, dropout_key
        )
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, batch_stats, opt_state), Metrics(loss, accuracy)

    return step


def make_prepare(
    dataset: Dataset, augmented: bool
) -> Callable[[Split, jax.Array], tuple[Split, jax.Array]]:
    """Makes `prepare(batch, key) -> batch, dropout_key`: what a step sees of a batch.

    Images as they are stored are normalized and, if asked for, augmented.
    """

    def prepare(batch: Split, key: jax.Array) -> tuple[Split, jax.Array]:
        augment_key, dropout_key = jax.random.split(key)
        images = normalize(batch.images, dataset.mean, dataset.std)
        if augmented:
            images = augment(augment_key, images)
        return Split(images, batch.labels), dropout_key

    return prepare


def make_train_steps(
    model: nn.Module, tx: optax.GradientTransformation, dataset: Dataset, **options: Any
) -> Any:
    """Makes `train_steps(state, split, indices, key) -> state, metrics`, compiled.

    It takes the steps of `indices[steps, batch_size]`, which pick examples of `split`,
    with new random numbers in each. The state that is handed in is consumed, and the
    metrics are means over the steps.

    Args:
      model: called as `model(images, train=...)`.
      tx: the optimizer, sharpness-aware or not.
      dataset: images are normalized to its mean and deviation.
      **options: those of `make_step`.
    """
    take_step = make_step(model, tx, dataset, **options)

    def train_steps(
        state: TrainState, split: Split, indices: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        def step(
            state: TrainState, step_input: tuple[jax.Array, jax.Array]
        ) -> tuple[TrainState, Metrics]:
            index, step_key = step_input
            batch = Split(split.images[index], split.labels[index])
            return take_step(state, batch, step_key)

        step_keys = jax.random.split(key, len(indices))
        state, metrics = jax.lax.scan(step, state, (indices, step_keys))
        return state, jax.tree.map(jnp.mean, metrics)

    return jax.jit(train_steps, donate_argnums=0)


def make_train_batches(
    step: Callable[[TrainState, Split, jax.Array], tuple[TrainState, Metrics]],
    out_shardings: Any = None,
) -> Any:
    """Makes `train(state, batches, count, key) -> state, metrics`, compiled.

    It takes a step on each of `batches[steps, batch_size, ...]`, of which the first is
    the step number `count`: what a step draws depends on its number and the key alone.
    The state that is handed in is consumed, and the metrics are means over the steps.

    Args:
      step: made by `make_step`.
      out_shardings: where the state and the metrics are to lie.
    """

    def train(
        state: TrainState, batches: Split, count: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        def body(
            state: TrainState, step_input: tuple[jax.Array, Split]
        ) -> tuple[TrainState, Metrics]:
            number, batch = step_input
            return step(state, batch, jax.random.fold_in(key, number))

        numbers = count + jnp.arange(len(batches.labels))
        state, metrics = jax.lax.scan(body, state, (numbers, batches))
        return state, jax.tree.map(jnp.mean, metrics)

    options = {} if out_shardings is None else {"out_shardings": out_shardings}
    return jax.jit(train, donate_argnums=0, **options)


def shuffled_batches(key: jax.Array, num_examples: int, batch_size: int) -> jax.Array:
    """Indices `[steps, batch_size]` of an epoch, without an incomplete last batch."""
    steps = num_examples // batch_size
    order = jax.random.permutation(key, num_examples)
    return order[: steps * batch_size].reshape(steps, batch_size)


def steps_per_call(num_steps: int, at_most: int = 16) -> int:
    """The most steps of one call that divide an epoch evenly: one shape, one compile.

    Args:
      num_steps: steps of an epoch.
      at_most: bounds how long nothing is heard of a call.
    """
    return max(d for d in range(1, at_most + 1) if num_steps % d == 0)
