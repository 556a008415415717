"""The diagonal of the empirical Fisher information, the score of Sparse SAM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import batching, trees
from optax_sam._base.devices import AxisName, Devices
from optax_sam._base.hyperparameters import check_integer
from optax_sam._base.losses import of_example


def fisher_diagonal(
    loss_fn: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    batch: Any,
    *,
    num_examples: int | None = None,
    chunk_size: int = 4,
    axis_name: AxisName | None = None,
) -> chex.ArrayTree:
    r"""The empirical Fisher information of every parameter, from single examples.

    .. math:: F = \frac{1}{n} \sum_{i=1}^{n} (\nabla \ell_i(w))^2

    The squares are those of the entries, and the labels the true ones. The gradient of
    an example is that of `loss_fn` on a batch of this example alone. A model with batch
    normalisation is therefore to be scored in evaluation mode: normalised by statistics
    of its own, an example of one has no variance to be divided by.

    Args:
      loss_fn: `loss_fn(params, batch)` returns the losses of the examples, shape `[B]`.
      params: Pytree of floating-point arrays of any shapes.
      batch: Pytree of arrays that all have the examples along their first axis.
      num_examples: How many examples to take, the first ones; None for all.
      chunk_size: Examples whose gradients are in memory at once. Each takes as much as
        the parameters do.
      axis_name: Inside `jax.shard_map` or `jax.pmap`, the axis over which devices share
        the batch. The first examples are then those of the first devices.

    Returns:
      A tree like `params`, in float32 or wider.

    Raises:
      TypeError: If `num_examples` or `chunk_size` is no integer.
      ValueError: If they are less than 1, if `loss_fn` returns no per-example losses or
        if an array in `batch` lacks the axis of examples.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> loss_fn = lambda w, batch: 0.5 * jnp.sum((w[None] - batch) ** 2, axis=-1)
      >>> batch = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> print(optax_sam.fisher_diagonal(loss_fn, jnp.zeros(2), batch))
      [ 5. 10.]

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach <https://arxiv.org/abs/2210.05177>`_, 2022
    """
    owner = "fisher_diagonal"
    devices = Devices(axis_name)
    devices.check(owner)
    examples = first_examples(owner, batch, num_examples)
    chunk_size = check_integer(owner, "chunk_size", chunk_size, low=1)
    n, counted = _counted(devices, batching.count(owner, batch), num_examples)
    # On one device all that are left count, and nothing has to say so.
    counts = None if axis_name is None else counted[: batching.count(owner, examples)]
    params = devices.vary(params)

    # Traced once, for the chunks and the rest.
    loss = partial(of_example, owner, "loss_fn", loss_fn)
    gradient: Any = jax.jit(jax.grad(loss), inline=True)

    def squares(example: Any, counts: jax.Array | None) -> chex.ArrayTree:
        def square(g: jax.Array) -> jax.Array:
            s = jnp.square(g.astype(trees.accumulator_dtype(g.dtype)))
            return s if counts is None else jnp.where(counts, s, 0)

        return jax.tree.map(square, gradient(params, example))

    def add_squares(total: chex.ArrayTree, chunk: Any) -> chex.ArrayTree:
        of_examples = jax.vmap(squares)(*chunk)
        return jax.tree.map(lambda t, s: t + jnp.sum(s, axis=0), total, of_examples)

    total = trees.accumulators(params)
    chunks, rest = batching.chunks((examples, counts), chunk_size)
    if chunks is not None:
        total, _ = jax.lax.scan(
            lambda total, chunk: (add_squares(total, chunk), None), total, chunks
        )
    if rest is not None:
        total = add_squares(total, rest)
    return jax.tree.map(lambda t: t / n, devices.sum(total))


def fisher_from_probes(
    losses: jax.Array,
    pullback: Callable[[jax.Array], optax.Updates],
    num_examples: int,
    num_probes: int,
    key: jax.Array,
    axis_name: AxisName | None = None,
) -> chex.ArrayTree:
    r"""Estimates the same diagonal from sums of gradients under random signs.

    .. math:: F = \frac{1}{n} \mathbb{E} \Big(\sum_{i=1}^{n} s_i \nabla \ell_i\Big)^2

    Args:
      losses: The losses of the examples, shape `[B]`.
      pullback: `weights[B] -> gradient of sum(weights * losses)`.
      num_examples: The first so many examples count.
      num_probes: Number of draws of the signs to average over, one backward pass each.
      key: PRNG key.
      axis_name: The axis over which devices share the examples, if they do.

    Returns:
      A tree like the parameters, in float32 or wider.
    """
    devices = Devices(axis_name)
    n, counted = _counted(devices, losses.size, num_examples)

    def probe(key: jax.Array) -> chex.ArrayTree:
        total = losses.size * devices.size()
        signs = devices.part(jax.random.rademacher(key, (total,), losses.dtype))
        # Means rather than sums, which half precision might not hold.
        weights = jnp.where(counted, signs / n, 0)
        weights += jnp.zeros_like(losses)  # Placed as these on an explicit mesh.
        gradient = pullback(weights.astype(losses.dtype))
        return jax.tree.map(
            lambda g: n * jnp.square(g.astype(trees.accumulator_dtype(g.dtype))),
            devices.sum(devices.own("pullback(weights)", gradient)),
        )

    if num_probes == 1:  # Convolutions on the CPU are slow in a loop.
        return probe(key)
    keys = jax.random.split(key, num_probes)
    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(probe, keys[0]))
    total, _ = jax.lax.scan(
        lambda total, key: (jax.tree.map(jnp.add, total, probe(key)), None), start, keys
    )
    return jax.tree.map(lambda t: t / num_probes, total)


def first_examples(owner: str, batch: Any, num_examples: Any) -> Any:
    """The first examples of a batch, all of them if it has fewer."""
    n = batching.count(owner, batch)
    if num_examples is not None:
        n = min(n, check_integer(owner, "num_examples", num_examples, low=1))
    return jax.tree.map(lambda x: batching.part(jnp.asarray(x), 0, n), batch)


def _counted(devices: Devices, size: int, num_examples: Any) -> tuple[int, jax.Array]:
    """How many examples count, and which of the `size` on this device do."""
    total = size * devices.size()
    n = total if num_examples is None else min(num_examples, total)
    return n, devices.part(jnp.arange(total) < n)
