"""The training step of the examples, and one compiled function that takes many.

Nothing here depends on the method; `optax_sam.value_and_update` makes the step of any
Optax optimizer. The loss keeps to what sharpness-aware methods ask of it: it returns
the losses of the examples, the running statistics of batch normalisation are auxiliary
and hence those of the clean pass (of the perturbed one, if that is the only one), and
the dropout key is an argument and hence the same in both passes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import optax_sam
from sam_examples.data import Dataset, Split, augment, normalized


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
      gap: how much higher the cross-entropy is at the perturbed parameters, over steps
        that make both passes; NaN if none does. None where the two are not of the same
        examples and layers, or there is no ascent.
    """

    loss: jax.Array
    accuracy: jax.Array
    gap: jax.Array | None = None


LossFn = Callable[..., tuple[jax.Array, tuple[Any, jax.Array]]]
InitState = Callable[[int, optax.GradientTransformation], TrainState]
# step(state, batch, key), see make_step.
Step = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]
Prepare = Callable[[Any, jax.Array], tuple[Any, jax.Array]]


class Objective(NamedTuple):
    """What a training step minimises.

    Attributes:
      loss_fn: `loss_fn(params, batch, batch_stats, key) -> losses, auxiliary`, see
        `make_loss_fn`.
      scoring_loss_fn: `scoring_loss_fn(params, batch, batch_stats, key) -> losses`, see
        `make_scoring_loss_fn`.
      prepare: `prepare(batch, key) -> batch, key`, what the step does to a batch first.
      ascent_loss_fn: takes the place of the loss in the clean pass, whose gradients
        then only set the perturbation; None if none does.
    """

    loss_fn: LossFn
    scoring_loss_fn: Callable[..., jax.Array]
    prepare: Prepare
    ascent_loss_fn: LossFn | None = None


def make_loss(
    output_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    *,
    functional: bool,
    has_aux: bool = True,
) -> Callable[..., Any]:
    """The loss of a model's outputs, as a method takes it.

    Args:
      output_fn: see `optax_sam.functional_loss`.
      loss_fn: the losses of the outputs, see there.
      functional: whether the step of a sharpness-aware method is to know both parts,
        which makes it that of Functional SAM.
      has_aux: whether `output_fn` returns auxiliary data.
    """
    in_parts = optax_sam.functional_loss(output_fn, loss_fn, has_aux=has_aux)
    return in_parts if functional else whole(in_parts)


def whole(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A loss whose parts a step is not to know."""
    return lambda *args: loss_fn(*args)


def make_loss_fn(model: nn.Module, *, functional: bool = False) -> LossFn:
    """Makes `loss_fn(params, batch, batch_stats, key) -> losses, auxiliary`.

    `batch` is a `Split` of normalized images, `losses` has shape `[B]`, and the
    auxiliary data are the new running statistics and the share of correct predictions.

    Args:
      model: called as `model(images, train=True)`.
      functional: see `make_loss`.
    """

    def output_fn(
        params: Any, batch: Split, batch_stats: Any, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch.images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)
        return logits, (updated.get("batch_stats", {}), accuracy)

    return make_loss(output_fn, cross_entropies, functional=functional)


def cross_entropies(logits: jax.Array, batch: Split, *_: Any) -> jax.Array:
    """The losses `[B]` of logits `[B, C]`."""
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch.labels
    )
    return losses


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
        logits: Any = model.apply(variables, batch.images, train=False)
        return cross_entropies(logits, batch)

    return scoring_loss_fn


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
    prepare: Prepare = lambda batch, key: (batch, key),
    *,
    functional: bool = False,
    ascent_loss_fn: LossFn | None = None,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> Step:
    """Makes `step(state, batch, key) -> state, metrics`, to be compiled.

    Args:
      model: called as `model(images, train=...)`.
      tx: the optimizer, sharpness-aware or not.
      prepare: what the step does to a batch first, see `make_prepare`; by default the
        batch is as the model takes it.
      functional: see `make_loss`.
      ascent_loss_fn: see `Objective`.
      batch_sharding: how each batch is shared among devices, where state and batch are
        on more than one.
    """
    objective = Objective(
        make_loss_fn(model, functional=functional),
        make_scoring_loss_fn(model),
        prepare,
        ascent_loss_fn,
    )
    return make_step_of(objective, tx, batch_sharding)


def make_step_of(
    objective: Objective,
    tx: optax.GradientTransformation,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> Step:
    """Makes the step of `make_step` for any objective."""
    same_loss = objective.ascent_loss_fn is None
    step_fn = optax_sam.value_and_update(
        objective.loss_fn,
        tx,
        has_aux=True,
        ascent_loss_fn=objective.ascent_loss_fn,
        scoring_loss_fn=objective.scoring_loss_fn,
    )

    def step(
        state: TrainState, batch: Any, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        batch, dropout_key = objective.prepare(batch, key)
        if batch_sharding is not None:
            constrain: Any = jax.lax.with_sharding_constraint
            batch = constrain(batch, batch_sharding)
        (loss, (batch_stats, accuracy)), updates, opt_state = step_fn(
            state.params, state.opt_state, batch, state.batch_stats, dropout_key
        )
        params = optax.apply_updates(state.params, updates)
        metrics = Metrics(loss, accuracy, find_gap(opt_state) if same_loss else None)
        return TrainState(params, batch_stats, opt_state), metrics

    return step


def find_gap(opt_state: Any) -> jax.Array | None:
    """The gap of `Metrics` in a step's new state, which knows both losses anyway.

    They are equal in a step that made one pass.
    """
    clean, perturbed = (
        optax.tree.get(opt_state, name) for name in ("clean_loss", "perturbed_loss")
    )
    if clean is None:
        return None
    gap: jax.Array = jnp.where(perturbed == clean, jnp.nan, perturbed - clean)
    return gap


def make_prepare(dataset: Dataset, augmented: bool = False) -> Prepare:
    """Makes `prepare(batch, key) -> batch, dropout_key`: what a step sees of a batch.

    Images as they are stored are normalized and, if asked for, augmented.
    """

    def prepare(batch: Split, key: jax.Array) -> tuple[Split, jax.Array]:
        augment_key, dropout_key = jax.random.split(key)
        batch = normalized(batch, dataset)
        if augmented:
            batch = batch._replace(images=augment(augment_key, batch.images))
        return batch, dropout_key

    return prepare


def make_train_steps(step: Step, **jit_options: Any) -> Any:
    """Makes `train_steps(state, batches, keys) -> state, metrics`, compiled.

    It takes a step on each of `batches[steps, batch_size, ...]`, with a key for each.
    The state that is handed in is consumed, and the metrics are means over the steps.

    Args:
      step: made by `make_step`.
      **jit_options: for `jax.jit`, such as where state and metrics are to lie.
    """

    def train_steps(
        state: TrainState, batches: Split, keys: jax.Array
    ) -> tuple[TrainState, Metrics]:
        state, metrics = jax.lax.scan(
            lambda state, inputs: step(state, *inputs), state, (batches, keys)
        )
        means = jax.tree.map(jnp.mean, metrics)
        if metrics.gap is not None:
            means = means._replace(gap=jnp.nanmean(metrics.gap))
        return state, means

    return jax.jit(train_steps, donate_argnums=0, **jit_options)
