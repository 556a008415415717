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
from data import Dataset, Split, augment, normalize
from models.convolution import fastest_convolution
from models.resnet import NORMS, ResNet

import optax_sam


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
Evaluate = Callable[[TrainState, Split], Metrics]


def make_loss_fn(model: nn.Module) -> LossFn:
    """Makes `loss_fn(params, batch, batch_stats, key) -> losses, auxiliary`.

    `batch` is a `Split` of normalized images, `losses` has shape `[B]`, and the
    auxiliary data are the new running statistics and the number of correct predictions.
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
        num_correct = jnp.sum(jnp.argmax(logits, axis=-1) == batch.labels)
        return losses, (updated.get("batch_stats", {}), num_correct)

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
    shape = (1, *dataset.train.images.shape[1:])
    init_model = jax.jit(partial(model.init, train=False))

    def init(seed: int, tx: optax.GradientTransformation) -> TrainState:
        # This generator compiles in a fifth of the default one's time.
        key = jax.random.key(seed, impl="rbg")
        variables = init_model(key, jnp.zeros(shape))
        params = variables["params"]
        return TrainState(params, variables.get("batch_stats", {}), tx.init(params))

    return init


def make_train_steps(
    model: nn.Module,
    tx: optax.GradientTransformation,
    dataset: Dataset,
    *,
    augmented: bool = False,
    ascent_loss_fn: LossFn | None = None,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> Any:
    """Makes `train_steps(state, split, indices, key) -> state, metrics`, compiled.

    It scans over `indices[steps, B]`, which pick the examples of each step out of
    `split`. The state is donated. The metrics are of the clean passes in training mode.

    Args:
      model: called as `model(images, train=...)`.
      tx: any Optax optimizer, sharpness-aware or not.
      dataset: says how to normalize.
      augmented: whether to apply `data.augment`.
      ascent_loss_fn: takes the place of the loss in the clean passes, whose gradients
        then only set the perturbation; by default none does.
      batch_sharding: how each batch is shared among devices, where state and split are
        on more than one.
    """
    step_fn = optax_sam.value_and_update(
        make_loss_fn(model),
        tx,
        has_aux=True,
        ascent_loss_fn=ascent_loss_fn,
        scoring_loss_fn=make_scoring_loss_fn(model),
    )

    def train_steps(
        state: TrainState, split: Split, indices: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        def step(
            state: TrainState, step_input: tuple[jax.Array, jax.Array]
        ) -> tuple[TrainState, Metrics]:
            index, step_key = step_input
            augment_key, dropout_key = jax.random.split(step_key)
            images = normalize(split.images[index], dataset.mean, dataset.std)
            if augmented:
                images = augment(augment_key, images)
            batch = Split(images, split.labels[index])
            if batch_sharding is not None:
                constrain: Any = jax.lax.with_sharding_constraint
                batch = constrain(batch, batch_sharding)
            (loss, (batch_stats, num_correct)), updates, opt_state = step_fn(
                state.params, state.opt_state, batch, state.batch_stats, dropout_key
            )
            params = optax.apply_updates(state.params, updates)
            metrics = Metrics(loss, num_correct / len(index))
            return TrainState(params, batch_stats, opt_state), metrics

        step_keys = jax.random.split(key, len(indices))
        state, metrics = jax.lax.scan(step, state, (indices, step_keys))
        return state, jax.tree.map(jnp.mean, metrics)

    return jax.jit(train_steps, donate_argnums=0)


def make_evaluate(
    model: nn.Module, dataset: Dataset, *, chunk_size: int = 500
) -> Evaluate:
    """Makes `evaluate(state, split) -> Metrics` over the whole split, compiled.

    The model is in evaluation mode, and sees `chunk_size` images at a time.
    """

    def evaluate(params: Any, batch_stats: Any, split: Split) -> Metrics:
        def evaluate_example(example: Split) -> Metrics:
            logits = model.apply(
                {"params": params, "batch_stats": batch_stats},
                normalize(example.images[None], dataset.mean, dataset.std),
                train=False,
            )[0]
            loss = optax.softmax_cross_entropy_with_integer_labels(
                logits, example.labels
            )
            return Metrics(loss, jnp.argmax(logits) == example.labels)

        # What does not fill a chunk is evaluated as well, as a chunk of its own.
        metrics = jax.lax.map(evaluate_example, split, batch_size=chunk_size)
        return Metrics(*map(jnp.mean, metrics))

    compiled = jax.jit(evaluate)
    return lambda state, split: compiled(state.params, state.batch_stats, split)


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
