"""The loss along lines and planes through the parameters."""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._base.checks import check_like, check_parameters, shown
from optax_sam._base.hyperparameters import KeyLike, as_key, check_bool, check_integer
from optax_sam.diagnostics import _loop, _vector
from optax_sam.diagnostics._hessian import LossFn


def loss_surface(
    loss_fn: LossFn,
    params: optax.Params,
    batch: Any,
    directions: Any,
    xs: jax.Array,
    ys: jax.Array | None = None,
) -> jax.Array:
    r"""The mean loss on a grid in the plane of two directions, or along one.

    .. math:: f(w + x_j \, d_1 + y_i \, d_2)

    Point by point, so that it takes the time of as many losses as there are points, and
    the memory of one.

    Args:
      loss_fn: `loss_fn(params, batch)` returns the losses of the examples, shape `[B]`,
        or their mean as a scalar.
      params: Pytree of floating-point arrays of any shapes.
      batch: What `loss_fn` takes.
      directions: A tuple or list of two trees of the shapes of `params`, or of one
        where there are no `ys`; :func:`filter_normalized_directions` makes some.
      xs: Steps along the first direction, shape `[n]`.
      ys: Steps along the second, shape `[m]`, or None.

    Returns:
      The losses, shape `[m, n]`, or `[n]` without `ys`, in float32 or wider.

    Raises:
      ValueError: If a direction is missing or one too many, if it has not the structure
        or shapes of `params`, or if `xs` or `ys` is no vector.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import diagnostics
      >>> loss_fn = lambda w, batch: batch @ w**2
      >>> batch, plane = jnp.array([[1.0, 10.0]]), jnp.eye(2)
      >>> xs, ys = jnp.array([0.0, 1.0, 2.0]), jnp.array([0.0, 1.0])
      >>> print(
      ...     diagnostics.loss_surface(loss_fn, jnp.zeros(2), batch, [*plane], xs, ys)
      ... )
      [[ 0.  1.  4.]
       [10. 11. 14.]]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018
    """
    owner = "loss_surface"
    steps = [jnp.asarray(xs)] if ys is None else [jnp.asarray(xs), jnp.asarray(ys)]
    for name, x in zip(("xs", "ys"), steps, strict=False):
        if x.ndim != 1:
            raise ValueError(
                f"{owner}: {name} has shape {x.shape}; pass the steps along one "
                "direction, such as jnp.linspace(-1.0, 1.0, 21)."
            )
    if not isinstance(directions, tuple | list) or len(directions) != len(steps):
        raise ValueError(
            f"{owner}: directions must be {len(steps)} tree(s) in a tuple or list, one "
            f"each for {' and '.join(('xs', 'ys')[: len(steps)])}; got "
            f"{shown(directions)}."
        )
    for i, direction in enumerate(directions):
        remedy = "Pass a direction in the space of params."
        check_like(f"directions[{i}]", direction, params, remedy)
    losses = _vector.losses_function(loss_fn, params, batch)

    def at(coordinates: tuple[jax.Array, ...]) -> jax.Array:
        w = _vector.widen(params)
        for step, direction in zip(coordinates, directions, strict=True):
            w = _vector.add(w, _vector.widen(direction), step)
        return jnp.mean(losses(w))

    shape = tuple(len(x) for x in reversed(steps))
    grid = tuple(x.reshape(-1) for x in jnp.meshgrid(*steps))
    surface: jax.Array = _loop.over(at, grid).reshape(shape)
    return surface


def filter_normalized_directions(
    params: optax.Params,
    *,
    key: KeyLike,
    count: int = 2,
    orthogonal: bool = False,
) -> tuple[chex.ArrayTree, ...]:
    r"""Random directions in which every filter is as long as that of the parameters.

    .. math:: d_{\cdot j} = \|w_{\cdot j}\| \, \frac{z_{\cdot j}}{\|z_{\cdot j}\|}

    Filter :math:`j` of a tensor is what belongs to one output feature, entry :math:`j`
    of its last axis, as Flax has it; :math:`z` is normal. So a step of 1 is as large
    as the weights, whatever their scale, and surfaces of different solutions can be
    compared. Tensors of fewer than two axes, biases and scales of normalisation, are
    not moved, as in the paper.

    Args:
      params: Pytree of floating-point arrays of any shapes.
      key: An int or a JAX PRNG key.
      count: How many directions, at least 1.
      orthogonal: Whether every filter of a direction is orthogonal to that of those
        before, and the directions with it. In many dimensions they nearly are in any
        case. Filters of fewer entries than there are directions cannot be; they are
        zero in the later ones.

    Returns:
      A tuple of `count` trees like `params`, in float32 or wider.

    Raises:
      TypeError: If `key` is no key, `count` no integer or `orthogonal` no bool.
      ValueError: If `count` is less than 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import diagnostics
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(2)}
      >>> (d,) = diagnostics.filter_normalized_directions(params, key=0, count=1)
      >>> print(d["bias"], jnp.linalg.norm(d["kernel"], axis=0).round(4))
      [0. 0.] [5. 1.]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018
    """
    owner = "filter_normalized_directions"
    count = check_integer(owner, "count", count, low=1, static=True)
    check_bool(owner, "orthogonal", orthogonal)
    seed = as_key(owner, key)
    check_parameters(owner, params)
    found: list[chex.ArrayTree] = []
    draw = _loop.compiled(lambda key: _vector.draw(jax.random.normal, key, params))
    for i in range(count):
        drawn = draw(jax.random.fold_in(seed, i))
        others = tuple(found) if orthogonal else ()
        found.append(jax.tree.map(_normalise, drawn, _vector.widen(params), *others))
    return tuple(found)


def _normalise(z: jax.Array, w: jax.Array, *others: jax.Array) -> jax.Array:
    """Gives every filter of `z` the length of that of `w`, orthogonal to others."""
    if w.ndim < 2 or math.prod(w.shape[:-1]) <= len(others):
        return jnp.zeros_like(z)
    z = _unit_filters(z)
    others = tuple(map(_unit_filters, others))
    for _ in range(2 if others else 0):  # The second time for what rounding left.
        for other in others:
            z = z - _over_filters(jnp.sum, z * other) * other
        z = _unit_filters(z)
    return z * _filter_norms(w)


def _over_filters(reduce: Any, x: jax.Array) -> Any:
    return reduce(x, axis=tuple(range(x.ndim - 1)), keepdims=True)


def _filter_norms(x: jax.Array) -> jax.Array:
    """The norms of filters, with the axes that they go over; no square overflows."""
    largest = _over_filters(jnp.max, jnp.abs(x))
    relative = trees.ratio(x, largest)
    norms: jax.Array = largest * jnp.sqrt(_over_filters(jnp.sum, jnp.square(relative)))
    return norms


def _unit_filters(x: jax.Array) -> jax.Array:
    unit: jax.Array = trees.ratio(x, _filter_norms(x))
    return unit
