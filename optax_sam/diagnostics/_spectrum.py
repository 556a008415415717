"""The spectrum of the Hessian: its largest eigenvalues, and its density."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._base.checks import shown
from optax_sam._base.hyperparameters import KeyLike, as_key, check_integer, check_number
from optax_sam.diagnostics import _lanczos, _loop, _vector
from optax_sam.diagnostics._hessian import LossFn, hessian


class Eigenpairs(NamedTuple):
    r"""The largest eigenvalues of a Hessian.

    Attributes:
      values: The eigenvalues, the largest first, shape `[count]`.
      residuals: Estimates of :math:`\|H v - \lambda v\|`, shape `[count]`: some
        eigenvalue is as close as that to each value. Exact but for rounding: where the
        process has converged they may be zero.
      vectors: The eigenvectors :math:`v` of norm one, a tree of leaves
        `[count, *shape]`; None if they were not asked for.
    """

    values: jax.Array
    residuals: jax.Array
    vectors: chex.ArrayTree | None


class SpectralDensity(NamedTuple):
    """A density as weights at nodes, from every probe.

    Attributes:
      nodes: Eigenvalues of the Hessian in Krylov spaces, in ascending order, shape
        `[num_probes, iterations]`.
      weights: How much of the spectrum each node stands for, of the same shape; they
        are not negative, and the sum of every row is 1.
    """

    nodes: jax.Array
    weights: jax.Array


def top_eigenvalues(
    loss_fn: LossFn,
    params: optax.Params,
    batch: Any,
    *,
    count: int = 1,
    iterations: int = 32,
    return_vectors: bool = False,
    key: KeyLike,
) -> Eigenpairs:
    r"""The largest eigenvalues of the Hessian of the mean loss, by Lanczos.

    .. math:: H v_i = \lambda_i v_i, \qquad \lambda_1 \ge \lambda_2 \ge \dots

    Largest by value, not by size: negative curvature comes last. All basis vectors are
    kept orthogonal, so no eigenvalue appears more often than it should; an eigenvalue
    that is repeated appears again once the Krylov space of the start is exhausted.
    Each iteration takes one to two gradients and a copy of the parameters in float32,
    placed as they are.

    Args:
      loss_fn: `loss_fn(params, batch)` returns the losses of the examples, shape `[B]`,
        or their mean as a scalar.
      params: Pytree of floating-point arrays of any shapes.
      batch: What `loss_fn` takes.
      count: How many eigenvalues, at least 1.
      iterations: Lanczos steps, at least `count`; more than there are parameters are
        not made. `residuals` say whether they were enough.
      return_vectors: Whether to return the eigenvectors.
      key: An int or a JAX PRNG key, for the start.

    Returns:
      :class:`Eigenpairs`: values, residuals and, if asked for, vectors.

    Raises:
      TypeError: If `count` or `iterations` is no integer or `key` no key.
      ValueError: If `count` is less than 1, or more than `iterations` or than there are
        parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import diagnostics
      >>> loss_fn = lambda w, batch: 0.5 * batch @ w**2
      >>> batch = jnp.array([[1.0, -3.0, 5.0]])
      >>> top = diagnostics.top_eigenvalues(
      ...     loss_fn, jnp.ones(3), batch, count=2, key=0
      ... )
      >>> print(top.values.round(3))
      [5. 1.]

    References:
      Lanczos, *An Iteration Method for the Solution of the Eigenvalue Problem of Linear
      Differential and Integral Operators*, 1950
    """
    owner = "top_eigenvalues"
    count = check_integer(owner, "count", count, low=1, static=True)
    iterations = check_integer(owner, "iterations", iterations, low=1, static=True)
    most = min(iterations, trees.size(params))
    if count > most:
        raise ValueError(
            f"{owner}: count = {count} is more than the {most} eigenvalues that "
            f"{iterations} iterations find for {trees.size(params)} parameters; ask "
            "for fewer, or raise iterations."
        )
    seed = as_key(owner, key)
    decompose = _lanczos.process(hessian(loss_fn, params, batch), most)
    start = _loop.compiled(
        lambda key: _vector.unit(_vector.draw(jax.random.normal, key, params))
    )
    space = decompose(start(seed))
    values, vectors = _lanczos.eigenpairs(space.diagonal, space.off_diagonal)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    return Eigenpairs(
        values,
        jnp.abs(space.off_diagonal[-1] * vectors[-1]),
        _lanczos.combine(space.basis, vectors.T) if return_vectors else None,
    )


def spectral_density(
    loss_fn: LossFn,
    params: optax.Params,
    batch: Any,
    *,
    iterations: int = 64,
    num_probes: int = 4,
    key: KeyLike,
) -> SpectralDensity:
    r"""The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    .. math::
      \phi(t) = \frac{1}{d} \sum_{i=1}^{d} \delta(t - \lambda_i) \approx
      \frac{1}{k} \sum_{j=1}^{k} \sum_{l=1}^{m} \omega_{jl} \, \delta(t - \theta_{jl})

    From each of :math:`k` random vectors of signs, :math:`m` Lanczos steps give the
    nodes :math:`\theta` and weights :math:`\omega` of a Gauss quadrature, whose first
    :math:`2m - 1` moments are those of the density that this vector sees; on average
    over vectors, those are the moments of :math:`\phi`. :func:`smooth_density` makes a
    curve of it. The cost is one to two gradients for each iteration and probe, and
    `iterations` copies of the parameters in float32, placed as they are.

    Args:
      loss_fn: `loss_fn(params, batch)` returns the losses of the examples, shape `[B]`,
        or their mean as a scalar.
      params: Pytree of floating-point arrays of any shapes.
      batch: What `loss_fn` takes.
      iterations: Lanczos steps :math:`m`, at least 1; more than there are parameters
        are not made.
      num_probes: Number :math:`k` of random vectors, at least 1, one after the other.
      key: An int or a JAX PRNG key.

    Returns:
      A :class:`SpectralDensity`: nodes and weights.

    Raises:
      TypeError: If `iterations` or `num_probes` is no integer or `key` no key.
      ValueError: If one of them is less than 1, or there are no parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import diagnostics
      >>> loss_fn = lambda w, batch: 0.5 * batch @ w**2
      >>> density = diagnostics.spectral_density(
      ...     loss_fn, jnp.ones(2), jnp.array([[-3.0, 5.0]]), num_probes=1, key=0
      ... )
      >>> print(density.nodes.round(2), density.weights.round(2))
      [[-3.  5.]] [[0.5 0.5]]

    References:
      Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian
      Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019
    """
    owner = "spectral_density"
    iterations = check_integer(owner, "iterations", iterations, low=1, static=True)
    num_probes = check_integer(owner, "num_probes", num_probes, low=1, static=True)
    seed = as_key(owner, key)
    m = min(iterations, trees.size(params))
    if not m:
        raise ValueError(
            f"{owner}: a Hessian of no parameters has no spectrum, got "
            f"{shown(params)}; pass the parameters of the model."
        )
    decompose = _lanczos.process(hessian(loss_fn, params, batch), m)
    start = _loop.compiled(
        lambda key: _vector.unit(_vector.draw(jax.random.rademacher, key, params))
    )

    def probe(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        space = decompose(start(jax.random.fold_in(seed, i)))
        return space.diagonal, space.off_diagonal

    matrices = _loop.over_loops(probe, jnp.arange(num_probes))
    nodes, vectors = _lanczos.eigenpairs(*matrices)
    return SpectralDensity(nodes, jnp.square(vectors[:, 0]))


def smooth_density(
    density: SpectralDensity,
    grid: jax.Array,
    *,
    width: float | jax.Array | None = None,
) -> jax.Array:
    r"""A spectral density as a curve, every node a Gaussian.

    .. math::
      \phi_\sigma(t) = \frac{1}{k} \sum_{j,l} \frac{\omega_{jl}}{\sqrt{2\pi} \, \sigma}
      \exp\Big(-\frac{(t - \theta_{jl})^2}{2 \sigma^2}\Big)

    Its integral is 1: times the number of parameters, it is a number of eigenvalues per
    unit of curvature.

    Args:
      density: What :func:`spectral_density` returns.
      grid: The points :math:`t`, shape `[n]`, in units of the eigenvalues.
      width: The standard deviation :math:`\sigma > 0` of the Gaussians, in the same
        units; None for a hundredth of the range of the nodes.

    Returns:
      The density at the points, shape `[n]`.

    Raises:
      TypeError: If `width` is no real scalar.
      ValueError: If `width` is not positive, or `grid` no vector.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import diagnostics
      >>> density = diagnostics.SpectralDensity(jnp.zeros((1, 1)), jnp.ones((1, 1)))
      >>> grid = jnp.array([-1.0, 0.0, 1.0])
      >>> print(diagnostics.smooth_density(density, grid, width=0.399).round(1))
      [0. 1. 0.]
    """
    owner = "smooth_density"
    nodes, weights = (jnp.asarray(x).reshape(-1) for x in density)
    grid = jnp.asarray(grid, jnp.promote_types(nodes.dtype, jnp.result_type(grid)))
    if grid.ndim != 1:
        raise ValueError(
            f"{owner}: grid has shape {grid.shape}; pass the points of a line, such as "
            "jnp.linspace(-1.0, 10.0, 500)."
        )
    if width is None:
        spread = jnp.max(nodes) - jnp.min(nodes)
        # Fires where all eigenvalues are the same: the line has to have some width.
        level = jnp.where(nodes[0] == 0, 1, jnp.abs(nodes[0]))
        width = 0.01 * jnp.where(spread == 0, level, spread)
    else:
        width = check_number(owner, "width", width, positive=True)
    sigma = jnp.asarray(width, grid.dtype)

    def at(t: jax.Array) -> Any:
        heights = jnp.exp(-0.5 * jnp.square((t - nodes) / sigma))
        return jnp.sum(weights * heights)

    norm = density.nodes.shape[0] * (2 * jnp.pi) ** 0.5
    curve: jax.Array = jax.vmap(at)(grid) / (norm * sigma)
    return curve
