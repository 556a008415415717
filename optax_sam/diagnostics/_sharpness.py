"""Sharpness: how much the loss rises around the parameters, at worst and on average."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import batching
from optax_sam._base.devices import Devices
from optax_sam._base.hyperparameters import (
    KeyLike,
    as_key,
    check_bool,
    check_integer,
    check_number,
)
from optax_sam.diagnostics import _loop, _vector
from optax_sam.diagnostics._hessian import Estimate, LossFn, estimate


def worst_case_sharpness(
    loss_fn: LossFn,
    params: optax.Params,
    batch: Any,
    *,
    rho: float | jax.Array,
    steps: int = 20,
    step_size: float | jax.Array = 1.0,
    adaptive: bool = False,
    eta: float | jax.Array = 0.0,
    micro_batch_size: int | None = None,
    micro_batches_at_once: int | None = 1,
    key: KeyLike | None = None,
) -> jax.Array:
    r"""How much the loss can rise within a ball around the parameters.

    .. math:: \max_{\|\varepsilon\| \le \rho} f(w + \varepsilon) - f(w)

    By projected gradient ascent with steps of a fixed length, halved whenever a step
    does not lead higher. The first leads to SAM's point :math:`\rho \, g / \|g\|`, so
    one step is the sharpness that SAM sees, and more steps never find less. Where the
    gradient at :math:`w` is zero there is no such direction and the result is 0; with a
    `key`, a second ascent starts from a random point of the sphere, which finds the
    curvature there. The result is a lower bound of the maximum. On a quadratic it tends
    to the solution of the trust-region problem.

    Adaptive, the ball is :math:`\|\varepsilon / (|w| + \eta)\| \le \rho`, entry by
    entry, that of :func:`optax_sam.adapt_to_scale`. With `micro_batch_size` it is
    m-sharpness: the mean over micro-batches of the maximum of each.

    The cost is `steps` gradients and two losses of the batch, with a `key` about twice
    as many. In half precision the parameters are perturbed in their own dtypes, which
    round a small `rho` away.

    Args:
      loss_fn: `loss_fn(params, batch)` returns the losses of the examples, shape `[B]`,
        or their mean as a scalar.
      params: Pytree of floating-point arrays of any shapes.
      batch: What `loss_fn` takes; with `micro_batch_size`, a pytree of arrays that all
        have the examples along their first axis.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm, or without
        unit if adaptive. A scalar.
      steps: Number of steps, at least 1.
      step_size: Length of the steps after the first, before it is halved, in units of
        `rho`, above 0. A scalar.
      adaptive: Whether to measure against the size of each weight.
      eta: :math:`\eta \ge 0`, in units of the parameters, unused unless adaptive. A
        scalar.
      micro_batch_size: Examples of a micro-batch, neighbours, which must divide the
        batch; None for the whole batch.
      micro_batches_at_once: How many micro-batches are computed side by side, None for
        all, as for :func:`optax_sam.sharpness_aware`. Where devices share a batch,
        choose a multiple of their number.
      key: An int or a JAX PRNG key for a second start, or None for none.

    Returns:
      The sharpness, a scalar of at least 0 in float32 or wider; not finite where a
      loss on the way is not.

    Raises:
      TypeError: If a number is no real scalar, or no integer where it has to be, or
        `key` no key.
      ValueError: If a number is out of range, or the batch cannot be cut.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import diagnostics
      >>> loss_fn = lambda w, batch: 0.5 * batch @ w**2
      >>> batch = jnp.array([[1.0, 4.0]])
      >>> for steps in (1, 20):
      ...     print(
      ...         diagnostics.worst_case_sharpness(
      ...             loss_fn, jnp.array([2.0, 0.1]), batch, rho=1.0, steps=steps
      ...         ).round(2)
      ...     )
      2.6
      2.98

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021, also for m-sharpness;
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021;
      Andriushchenko et al., `A Modern Look at the Relationship between Sharpness and
      Generalization <https://arxiv.org/abs/2302.07011>`_, 2023
    """
    owner = "worst_case_sharpness"
    steps = check_integer(owner, "steps", steps, low=1, static=True)
    step_size = check_number(owner, "step_size", step_size, positive=True)
    displace = _displacement(owner, params, rho, adaptive, eta)
    seed = None if key is None else as_key(owner, key)

    def losses(wide: chex.ArrayTree, part: Any) -> jax.Array:
        examples = batch if micro_batch_size is None else part
        return _vector.losses_function(loss_fn, params, examples)(wide)

    ascend = _ascent(losses, displace, params, steps, step_size, seed)
    if micro_batch_size is None:
        return ascend(())
    size, at_once = batching.check_sizes(owner, micro_batch_size, micro_batches_at_once)
    micro_batches = batching.split(owner, batch, size, at_once, Devices())
    over_round = functools.partial(batching.side_by_side, ascend)
    return jnp.mean(_loop.over_loops(over_round, micro_batches))


def average_sharpness(
    loss_fn: LossFn,
    params: optax.Params,
    batch: Any,
    *,
    rho: float | jax.Array,
    num_samples: int = 32,
    adaptive: bool = False,
    eta: float | jax.Array = 0.0,
    key: KeyLike,
) -> Estimate:
    r"""How much the loss rises on average at a distance from the parameters.

    .. math:: \mathbb{E}\, f(w + \varepsilon) - f(w), \qquad \|\varepsilon\| = \rho

    :math:`\varepsilon` is uniform on the sphere, or, adaptive, :math:`\varepsilon /
    (|w| + \eta)` is. In :math:`d` dimensions that is next to the normal distribution of
    standard deviation :math:`\rho / \sqrt d` for every parameter, and to second order
    the mean is :math:`\rho^2 \, \text{tr} H / (2 d)`. A sample is the mean of the two
    opposite points :math:`\pm\varepsilon`, so that the slope at :math:`w` drops out.
    The cost is two losses of the batch for each, one after the other. Micro-batches
    would not change the mean.

    Args:
      loss_fn: `loss_fn(params, batch)` returns the losses of the examples, shape `[B]`,
        or their mean as a scalar.
      params: Pytree of floating-point arrays of any shapes.
      batch: What `loss_fn` takes.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm, or without
        unit if adaptive. A scalar.
      num_samples: Number of pairs of opposite points, at least 1.
      adaptive: Whether to measure against the size of each weight.
      eta: :math:`\eta \ge 0`, in units of the parameters, unused unless adaptive. A
        scalar.
      key: An int or a JAX PRNG key.

    Returns:
      An :class:`Estimate`: the mean over the samples, and its standard error. Unlike
      the worst case it may be negative.

    Raises:
      TypeError: If a number is no real scalar, or no integer where it has to be, or
        `key` no key.
      ValueError: If a number is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import diagnostics
      >>> loss_fn = lambda w, batch: 0.5 * batch @ w**2
      >>> sharpness = diagnostics.average_sharpness(
      ...     loss_fn, jnp.ones(2), jnp.array([[4.0, 4.0]]), rho=1.0, key=0
      ... )
      >>> print(sharpness.mean.round(3))
      2.0
    """
    owner = "average_sharpness"
    num_samples = check_integer(owner, "num_samples", num_samples, low=1, static=True)
    displace = _displacement(owner, params, rho, adaptive, eta)
    seed = as_key(owner, key)
    losses = _vector.losses_function(loss_fn, params, batch)
    clean = _loop.compiled(lambda: losses(_vector.widen(params)))()

    def rise(i: jax.Array) -> jax.Array:
        u = _random_unit(jax.random.fold_in(seed, i // 2), params)
        opposite = _vector.scale(u, 1 - 2 * (i % 2))
        return jnp.mean(losses(displace(opposite)) - clean)

    rises = _loop.over(rise, jnp.arange(2 * num_samples))
    return estimate(jnp.mean(rises.reshape(num_samples, 2), axis=1))


def _displacement(
    owner: str, params: optax.Params, rho: Any, adaptive: Any, eta: Any
) -> Callable[[chex.ArrayTree], chex.ArrayTree]:
    """The map from the unit ball to the one around the parameters.

    The ball is of radius `rho`, adaptive: relative to the size of each weight plus
    `eta`. The map takes and gives trees in float32 or wider.
    """
    rho = check_number(owner, "rho", rho)
    eta = check_number(owner, "eta", eta)
    check_bool(owner, "adaptive", adaptive)

    def displace(u: chex.ArrayTree) -> chex.ArrayTree:
        def move(p: jax.Array, u: jax.Array) -> jax.Array:
            if adaptive:
                u = u * (jnp.abs(p) + jnp.asarray(eta, p.dtype))
            return p + jnp.asarray(rho, p.dtype) * u

        return jax.tree.map(move, _vector.widen(params), u)

    return displace


def _random_unit(key: jax.Array, like: chex.ArrayTree) -> chex.ArrayTree:
    """A random vector, uniform on the unit sphere."""
    return _vector.unit(_vector.draw(jax.random.normal, key, like))


def _ascent(
    losses: Callable[[chex.ArrayTree, Any], jax.Array],
    displace: Callable[[chex.ArrayTree], chex.ArrayTree],
    params: optax.Params,
    steps: int,
    step_size: Any,
    key: Any,
) -> Callable[[Any], jax.Array]:
    """The largest rise of the loss on ascents in the unit ball, as a function of data.

    The data are what the losses depend on beside the parameters, a tree of arrays.
    """

    @_loop.compiled
    def clean_losses(data: Any) -> jax.Array:
        return losses(_vector.widen(params), data)

    def rise(u: chex.ArrayTree, fixed: Any) -> jax.Array:
        data, clean = fixed
        return jnp.mean(losses(displace(u), data) - clean)

    def next_point(u: chex.ArrayTree, slope: chex.ArrayTree, length: Any) -> Any:
        u = _vector.add(u, _vector.unit(slope), length)
        return _vector.scale(u, 1 / jnp.maximum(_vector.norm(u), 1))

    def step(carry: Any, _: jax.Array) -> Any:
        u, slope, best, length, fixed = carry
        new = next_point(u, slope, length)
        found, new_slope = jax.value_and_grad(rise)(new, fixed)
        higher = ~(found <= best) & ~jnp.isnan(best)  # NaN counts, and is not left.
        u, slope, best = jax.tree.map(
            lambda a, b: jnp.where(higher, a, b),
            (new, new_slope, found),
            (u, slope, best),
        )
        shorter = jnp.minimum(length, step_size) * jnp.where(higher, 1, 0.5)
        return (u, slope, best, shorter.astype(length.dtype), fixed), ()

    @_loop.compiled
    def last(carry: Any) -> jax.Array:
        u, slope, best, length, fixed = carry
        return jnp.maximum(best, rise(next_point(u, slope, length), fixed))

    @_loop.compiled
    def centre() -> chex.ArrayTree:
        return _vector.zeros_like(params)

    begin, scan = _loop.compiled(jax.value_and_grad(rise)), _loop.scan(step)
    random_start = _loop.compiled(lambda: _random_unit(key, params))

    def ascend(data: Any) -> jax.Array:
        clean = clean_losses(data)
        # Zero, of these data: vmap on a mesh of explicit axes needs to know whose.
        zero = jnp.minimum(jnp.abs(jnp.mean(clean)), 0)

        def from_start(u: chex.ArrayTree, best: jax.Array | None) -> jax.Array:
            found, slope = begin(u, (data, clean))
            # From the centre, of no height, the first step leads to SAM's point.
            length = zero + jnp.maximum(jnp.asarray(step_size, zero.dtype), 1)
            carry = u, slope, found if best is None else best, length, (data, clean)
            if steps > 1:
                carry, _ = scan(carry, jnp.arange(steps - 1))
            highest: jax.Array = last(carry)
            return highest

        best = from_start(centre(), zero)
        return (
            best if key is None else jnp.maximum(best, from_start(random_start(), None))
        )

    return ascend
