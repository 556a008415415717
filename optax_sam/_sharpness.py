"""Worst-case sharpness: how much the loss can rise around the parameters."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _examples, _vector
from optax_sam._ball import displacement, random_unit
from optax_sam._estimate import check_number
from optax_sam._hessian import LossFn
from optax_sam._hyperparameter import as_key, check_integer


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
    key: int | jax.Array | None = None,
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
    displace = displacement(owner, params, rho, adaptive, eta)
    seed = None if key is None else as_key(owner, key)

    def of(batch: Any) -> jax.Array:
        losses = _vector.losses_function(loss_fn, params, batch)
        return _ascend(losses, displace, params, steps, step_size, seed)

    if micro_batch_size is None:
        return of(batch)
    size, at_once = micro_batch_size, micro_batches_at_once
    return jnp.mean(_map(of, _micro_batches(owner, batch, size, at_once)))


def _ascend(
    losses: Callable[[chex.ArrayTree], jax.Array],
    displace: Callable[[chex.ArrayTree], chex.ArrayTree],
    params: optax.Params,
    steps: int,
    step_size: Any,
    key: jax.Array | None,
) -> jax.Array:
    """The largest rise of the loss on ascents within the unit ball."""
    clean = losses(_vector.widen(params))
    step_size = jnp.asarray(step_size, clean.dtype)

    def rise(u: chex.ArrayTree) -> jax.Array:
        return jnp.mean(losses(displace(u)) - clean)

    def next_point(u: chex.ArrayTree, slope: chex.ArrayTree, length: Any) -> Any:
        u = _vector.add(u, _vector.unit(slope), length)
        return _vector.scale(u, 1 / jnp.maximum(_vector.norm(u), 1))

    def step(carry: Any, _: None) -> Any:
        u, slope, best, length = carry
        new = next_point(u, slope, length)
        found, new_slope = jax.value_and_grad(rise)(new)
        higher = ~(found <= best)  # NaN counts, and is not left any more.
        u, slope, best = jax.tree.map(
            lambda a, b: jnp.where(higher, a, b),
            (new, new_slope, found),
            (u, slope, best),
        )
        length = jnp.minimum(length, step_size) * jnp.where(higher, 1, 0.5)
        return (u, slope, best, length.astype(step_size.dtype)), None

    def ascend(u: chex.ArrayTree, slope: chex.ArrayTree, best: jax.Array) -> Any:
        # From the centre to SAM's point.
        carry = u, slope, best, zero + jnp.maximum(step_size, 1)
        if steps > 1:
            carry, _ = jax.lax.scan(step, carry, length=steps - 1)
        u, slope, best, length = carry
        return jnp.maximum(best, rise(next_point(u, slope, length)))

    # Zero, of the micro-batch: vmap on a mesh of explicit axes needs to know whose.
    zero = jnp.minimum(jnp.abs(jnp.mean(clean)), 0)
    centre = _vector.zeros_like(params)
    best = ascend(centre, jax.grad(rise)(centre), zero)
    if key is None:
        return best
    u = random_unit(key, params)
    found, slope = jax.value_and_grad(rise)(u)
    return jnp.maximum(best, ascend(u, slope, found))


def _micro_batches(owner: str, batch: Any, size: Any, at_once: Any) -> Any:
    """The batch as micro-batches `[rounds, at_once, size, ...]`."""
    size = check_integer(owner, "micro_batch_size", size, low=1, static=True)
    examples = _examples.count(owner, batch)
    if examples % size:
        raise ValueError(
            f"{owner}: micro_batch_size = {size} does not divide the {examples} "
            "examples of the batch; choose a divisor."
        )
    number = examples // size
    if at_once is not None:
        at_once = check_integer(
            owner, "micro_batches_at_once", at_once, low=1, static=True
        )
    at_once = number if at_once is None else min(at_once, number)
    if number % at_once:
        raise ValueError(
            f"{owner}: micro_batches_at_once = {at_once} does not divide the {number} "
            "micro-batches of the batch; choose a divisor, or None for all at once."
        )
    return _examples.cut(batch, at_once, size)


def _map(fn: Callable[[Any], jax.Array], micro_batches: Any) -> jax.Array:
    """Maps over rounds one after the other, and over those of a round at once."""

    def over_round(round_: Any) -> Any:
        if jax.tree.leaves(round_)[0].shape[0] == 1:
            return fn(jax.tree.map(lambda x: x[0], round_))[None]
        return jax.vmap(fn)(round_)

    values: jax.Array = jax.lax.map(over_round, micro_batches)
    return values
