"""The noise of gradients: the trace of the covariance of those of single examples."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import batching
from optax_sam._base.hyperparameters import check_integer
from optax_sam._base.losses import check_per_example
from optax_sam.diagnostics import _loop, _vector
from optax_sam.diagnostics._hessian import LossFn


def gradient_covariance_trace(
    loss_fn: LossFn, params: optax.Params, batch: Any, *, chunk_size: int = 4
) -> jax.Array:
    r"""The trace of the covariance of the gradients of single examples.

    .. math::
      \text{tr} V = \frac{1}{B - 1} \sum_{i=1}^{B} \|\nabla \ell_i(w) - \bar g\|^2,
      \qquad \bar g = \frac{1}{B} \sum_{i=1}^{B} \nabla \ell_i(w)

    With :math:`B - 1`, which is without bias for the population that the examples come
    from; times :math:`(B - 1) / B` it is that of the batch itself. The mean gradient
    of `m` examples drawn at random has :math:`1 / m` of it.

    The gradient of an example is that of `loss_fn` on a batch of this example alone.
    A model with batch normalisation is therefore to be measured in evaluation mode. The
    cost is a gradient of every example, and `chunk_size` of them in memory, however
    many there are. The mean is updated along with the squares, so that nothing is lost
    where gradients differ by little.

    Args:
      loss_fn: `loss_fn(params, batch)` returns the losses of the examples, shape `[B]`.
      params: Pytree of floating-point arrays of any shapes.
      batch: Pytree of arrays that all have the examples along their first axis; at
        least two.
      chunk_size: Examples whose gradients are in memory at once. Where devices share a
        batch, choose a multiple of their number: each then has its share of a chunk.

    Returns:
      The trace, a scalar in float32 or wider.

    Raises:
      TypeError: If `chunk_size` is no integer.
      ValueError: If it is less than 1, if `loss_fn` returns no per-example losses, if
        an array in `batch` lacks the axis of examples, or if there is only one.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import diagnostics
      >>> loss_fn = lambda w, batch: batch @ w
      >>> batch = jnp.array([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
      >>> print(diagnostics.gradient_covariance_trace(loss_fn, jnp.zeros(2), batch))
      4.0

    References:
      `RW-SAM <https://arxiv.org/abs/2509.18001>`_, 2025
    """
    owner = "gradient_covariance_trace"
    chunk_size = check_integer(owner, "chunk_size", chunk_size, low=1, static=True)
    n = batching.count(owner, batch)
    if n < 2:
        raise ValueError(
            f"{owner}: the batch has {n} example, and one gradient does not vary; pass "
            "a batch of at least two."
        )

    def gradient(example: Any) -> chex.ArrayTree:
        example = jax.tree.map(lambda x: x[None], example)

        def loss(wide: chex.ArrayTree) -> jax.Array:
            losses = _vector.losses_function(loss_fn, params, example)(wide)
            return check_per_example(owner, "loss_fn", losses, 1)[0]

        return jax.grad(loss)(_vector.widen(params))

    def add(carry: Any, chunk: Any) -> Any:
        """Merges the mean and the sum of squares of a chunk with those so far."""
        count, mean, squares = carry
        size = jax.tree.leaves(chunk)[0].shape[0]
        gradients = jax.vmap(gradient)(chunk)
        of_chunk = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
        rest = jax.tree.map(lambda g, m: g - m[None], gradients, of_chunk)
        change = jax.tree.map(jnp.subtract, of_chunk, mean)
        total = count + size
        squares += _vector.dot(rest, rest)
        squares += _vector.dot(change, change) * (count * size / total)
        return (total, _vector.add(mean, change, size / total), squares), ()

    step = _loop.scan(add)
    zeros = _loop.compiled(lambda: _vector.zeros_like(params))()
    zero = jnp.zeros_like(_vector.dot(zeros, zeros))
    carry = zero, zeros, zero
    chunks, rest = batching.chunks(jax.tree.map(jnp.asarray, batch), chunk_size)
    if chunks is not None:
        carry, _ = step(carry, chunks)
    if rest is not None:
        carry, _ = _loop.compiled(add)(carry, rest)
    return carry[2] / (n - 1)
