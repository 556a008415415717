"""The Hessian of the mean loss, by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._base.checks import check_like
from optax_sam._base.hyperparameters import KeyLike, as_key, check_integer
from optax_sam.diagnostics import _loop, _vector

LossFn: TypeAlias = Callable[[optax.Params, Any], jax.Array]
Product: TypeAlias = Callable[[chex.ArrayTree], chex.ArrayTree]


class Estimate(NamedTuple):
    """The mean of random samples.

    Attributes:
      mean: The mean, a scalar in float32 or wider.
      standard_error: The standard deviation of the mean, estimated from the spread of
        the samples; infinite if there is one sample only.
    """

    mean: jax.Array
    standard_error: jax.Array


def hessian_vector_product(
    loss_fn: LossFn, params: optax.Params, batch: Any, vector: chex.ArrayTree
) -> chex.ArrayTree:
    r"""The product of the Hessian of the mean loss with a vector.

    .. math:: H v = \left.\frac{d}{dt} \nabla f(w + t v)\right|_{t=0}

    Forward over reverse: about two gradients, and no Hessian in memory.

    Args:
      loss_fn: `loss_fn(params, batch)` returns the losses of the examples, shape `[B]`,
        or their mean as a scalar. It has to be twice differentiable, and where it is
        piecewise linear (as between the kinks of a ReLU) that is what counts.
      params: Pytree of floating-point arrays of any shapes.
      batch: What `loss_fn` takes.
      vector: :math:`v`, a tree of arrays of the shapes of `params`.

    Returns:
      A tree like `params`, in float32 or wider.

    Raises:
      TypeError: If a parameter is not real floating point or the loss no array.
      ValueError: If `vector` has not the structure or shapes of `params`, or the losses
        have more than one axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import diagnostics
      >>> loss_fn = lambda w, batch: 0.5 * batch @ w**2
      >>> product = diagnostics.hessian_vector_product(
      ...     loss_fn, jnp.ones(2), jnp.array([[1.0, 3.0]]), jnp.array([1.0, 2.0])
      ... )
      >>> print(product)
      [1. 6.]
    """
    gradient = gradient_function(loss_fn, params, batch)
    remedy = "Pass a direction in the space of params."
    check_like("vector", vector, params, remedy)
    at = _vector.widen(params)
    tangent = trees.cast_like(vector, at)
    product: chex.ArrayTree = jax.jvp(gradient, (at,), (tangent,))[1]
    return product


def hessian_trace(
    loss_fn: LossFn,
    params: optax.Params,
    batch: Any,
    *,
    num_probes: int = 32,
    key: KeyLike,
) -> Estimate:
    r"""Estimates the trace of the Hessian of the mean loss, after Hutchinson.

    .. math:: \text{tr} H = \mathbb{E}\, z^\top H z

    :math:`z` is a vector of random signs. The variance of one probe is twice the sum of
    the squares of all entries off the diagonal; a diagonal Hessian takes one probe. The
    cost is a gradient to begin with, and one to two for each probe, one after the
    other.

    Args:
      loss_fn: `loss_fn(params, batch)` returns the losses of the examples, shape `[B]`,
        or their mean as a scalar.
      params: Pytree of floating-point arrays of any shapes.
      batch: What `loss_fn` takes.
      num_probes: Number of :math:`z`, at least 1.
      key: An int or a JAX PRNG key.

    Returns:
      An :class:`Estimate`: the mean over the probes, and its standard error.

    Raises:
      TypeError: If `num_probes` is no integer or `key` no key.
      ValueError: If `num_probes` is less than 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import diagnostics
      >>> loss_fn = lambda w, batch: 0.5 * batch @ w**2
      >>> batch = jnp.array([[1.0, 3.0], [3.0, 5.0]])
      >>> trace = diagnostics.hessian_trace(loss_fn, jnp.ones(2), batch, key=0)
      >>> print(trace.mean, trace.standard_error)
      6.0 0.0

    References:
      Hutchinson, *A Stochastic Estimator of the Trace of the Influence Matrix for
      Laplacian Smoothing Splines*, 1989
    """
    owner = "hessian_trace"
    num_probes = check_integer(owner, "num_probes", num_probes, low=1, static=True)
    seed = as_key(owner, key)
    product = hessian(loss_fn, params, batch)

    def probe(i: jax.Array) -> jax.Array:
        z = _vector.draw(jax.random.rademacher, jax.random.fold_in(seed, i), params)
        return _vector.dot(z, product(z))

    return estimate(_loop.over(probe, jnp.arange(num_probes)))


def gradient_function(loss_fn: LossFn, params: optax.Params, batch: Any) -> Product:
    """The gradient of the mean loss as a function of params in float32 or wider."""
    losses = _vector.losses_function(loss_fn, params, batch)
    gradient: Product = jax.grad(lambda p: jnp.mean(losses(p)))
    return gradient


def hessian(loss_fn: LossFn, params: optax.Params, batch: Any) -> Product:
    """The product with the Hessian at `params`, to be taken many times in a loop.

    While that is traced, what does not depend on the vector is computed once, before
    the loop, and kept, for the memory of about one more backward pass.
    """
    gradient, at = gradient_function(loss_fn, params, batch), _vector.widen(params)
    product: Product
    if _loop.is_traced():
        product = jax.linearize(gradient, at)[1]
    else:

        def product(vector: chex.ArrayTree) -> chex.ArrayTree:
            tangent: chex.ArrayTree = jax.jvp(gradient, (at,), (vector,))[1]
            return tangent

    return product


def estimate(samples: jax.Array) -> Estimate:
    """The mean of samples `[n]`, and how far it may be off."""
    n = samples.shape[0]
    mean = jnp.mean(samples)
    if n == 1:
        return Estimate(mean, jnp.full_like(mean, jnp.inf))
    return Estimate(mean, jnp.std(samples, ddof=1) / n**0.5)
