"""Average-case sharpness: how much the loss rises at a distance from the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam._base.hyperparameters import as_key, check_integer
from optax_sam.diagnostics import _loop, _vector
from optax_sam.diagnostics._ball import displacement, random_unit
from optax_sam.diagnostics._estimate import Estimate, estimate
from optax_sam.diagnostics._hessian import LossFn


def average_sharpness(
    loss_fn: LossFn,
    params: optax.Params,
    batch: Any,
    *,
    rho: float | jax.Array,
    num_samples: int = 32,
    adaptive: bool = False,
    eta: float | jax.Array = 0.0,
    key: int | jax.Array,
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
    displace = displacement(owner, params, rho, adaptive, eta)
    seed = as_key(owner, key)
    losses = _vector.losses_function(loss_fn, params, batch)
    clean = _loop.compiled(lambda: losses(_vector.widen(params)))()

    def rise(i: jax.Array) -> jax.Array:
        u = random_unit(jax.random.fold_in(seed, i // 2), params)
        opposite = _vector.scale(u, 1 - 2 * (i % 2))
        return jnp.mean(losses(displace(opposite)) - clean)

    rises = _loop.over(rise, jnp.arange(2 * num_samples))
    return estimate(jnp.mean(rises.reshape(num_samples, 2), axis=1))
