"""How much the direction of an ascent depends on the batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import batching, trees
from optax_sam.diagnostics import _loop, _vector
from optax_sam.diagnostics._ascent_step import ascent_step


class AscentStability(NamedTuple):
    r"""How the direction of an ascent varies between batches, scalars.

    Attributes:
      variance: :math:`\frac{1}{K - 1} \sum_k \|d_k - \bar d\|^2`.
      relative_variance: The same over :math:`\|\bar d\|^2`; 0 where both are zero,
        infinite where only the mean is.
      mean_cosine: The mean cosine of the angle between the directions of two batches,
        over all pairs; that with a direction of zero is 0.
      mean_norm: The mean of :math:`\|d_k\|`.
    """

    variance: jax.Array
    relative_variance: jax.Array
    mean_cosine: jax.Array
    mean_norm: jax.Array


def ascent_stability(
    loss_fn: Callable[..., Any],
    ascent: optax.GradientTransformation,
    params: optax.Params,
    ascent_state: optax.OptState,
    batches: Any,
    *args: Any,
    has_aux: bool = False,
    ascent_loss_fn: Callable[..., Any] | None = None,
    scoring_loss_fn: Callable[..., Any] | None = None,
) -> AscentStability:
    r"""How much the direction of an ascent depends on the batch.

    .. math:: d_k = \text{ascent}(\nabla f_{I_k}(w)), \qquad k = 1, \dots, K

    All from the same parameters and the same state, one batch after the other: it takes
    `K` gradients, and the memory of one and of two sums. With
    :func:`optax_sam.suppress_variance` alone as the ascent, after its first step, the
    variance is :math:`\theta^2` of that of the gradient. Random numbers of an ascent
    are the same for all batches.

    Args:
      loss_fn: `loss_fn(params, batch, *args)` returns losses, as for
        :func:`ascent_metrics`.
      ascent: Any gradient transformation; its output is :math:`d_k`.
        `optax.identity()` is the gradient itself.
      params: Pytree of floating-point arrays of any shapes.
      ascent_state: State of the ascent, such as `opt_state.ascent_state`.
      batches: The batches along the first axis of every array: `[K, B, ...]`, of at
        least two.
      *args: What else `loss_fn` takes.
      has_aux: Whether `loss_fn` returns auxiliary data, which are dropped.
      ascent_loss_fn: As for :func:`optax_sam.value_and_update`.
      scoring_loss_fn: As for :func:`optax_sam.value_and_update`.

    Returns:
      :class:`AscentStability`, scalars in float32 or wider. A batch whose gradient is
      not finite has the direction zero.

    Raises:
      TypeError: As for :func:`ascent_metrics`.
      ValueError: If there are fewer than two batches.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> from optax_sam import diagnostics
      >>> loss_fn = lambda w, batch: batch @ w  # The gradient is the mean of the batch.
      >>> ascent = optax_sam.scale_to_radius(rho=1.0)
      >>> params, batches = jnp.zeros(2), jnp.array([[[2.0, 0.0]], [[0.0, 3.0]]])
      >>> stability = diagnostics.ascent_stability(
      ...     loss_fn, ascent, params, ascent.init(params), batches
      ... )
      >>> print(stability.variance, stability.mean_cosine, stability.mean_norm)
      1.0 0.0 1.0
    """
    owner = "ascent_stability"
    k = batching.count(owner, batches)
    if k < 2:
        raise ValueError(
            f"{owner}: got {k} batch, and one direction does not vary; pass several "
            "along the first axis of the arrays, [K, B, ...]."
        )
    ascend = ascent_step(loss_fn, ascent, has_aux, ascent_loss_fn, scoring_loss_fn)

    def direction(batch: Any) -> chex.ArrayTree:
        return _vector.widen(ascend(params, ascent_state, batch, *args).epsilon)

    def add(carry: Any, batch: Any) -> Any:
        count, mean, units, squares = carry
        d = direction(batch)
        unit = _vector.unit(d)
        change = _vector.add(d, mean, -1.0)
        squares += _vector.dot(change, change) * (count / (count + 1))
        mean = _vector.add(mean, change, 1 / (count + 1))
        carry = count + 1, mean, _vector.add(units, unit), squares
        return carry, (_vector.norm(d), _vector.dot(unit, unit))

    first = jax.tree.map(lambda x: x[0], batches)
    present = jax.eval_shape(direction, first)
    moved = trees.map_present(lambda _, p: p, present, params)
    zeros = _loop.compiled(lambda: _vector.zeros_like(moved))()
    zero = jnp.zeros_like(_vector.dot(zeros, zeros))
    carry = zero, zeros, zeros, zero
    (_, mean, units, squares), (norms, ones) = _loop.scan(add)(carry, batches)
    variance, square = squares / (k - 1), _vector.dot(mean, mean)
    # 0 / 1 where nothing moves; infinite where only the mean vanishes.
    relative = variance / jnp.where((square == 0) & (variance == 0), 1, square)
    pairs = _vector.dot(units, units) - jnp.sum(ones)
    return AscentStability(variance, relative, pairs / (k * (k - 1)), jnp.mean(norms))
