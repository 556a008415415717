"""The methods by name: an ascent from its parts, around a base optimizer."""

from typing import Any, Literal

import chex
import optax

from optax_sam._ascents.asam import adapt_to_scale
from optax_sam._ascents.rw_sam import reweight_by_sharpness
from optax_sam._ascents.sam import scale_to_radius
from optax_sam._ascents.sparse_dynamic import sparsify_dynamically
from optax_sam._ascents.sparse_fisher import sparsify_by_fisher
from optax_sam._ascents.vasso import suppress_variance
from optax_sam._base.hyperparameters import ScalarOrSchedule, check_integer
from optax_sam._engine.sharpness_aware import sharpness_aware
from optax_sam._masks.patterns import Pattern


def sam(
    base: optax.GradientTransformation, rho: ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""SAM: descends along the gradient at the top of a ball of radius `rho`.

    .. math::
      \varepsilon_t = \rho \, \frac{g_t}{\|g_t\|}, \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    A step costs two gradients.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. 0.05 to 0.2 is usual for image classification from scratch. A
        scalar, or a schedule of the count of steps.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation or `rho` no real scalar or schedule.
      ValueError: If `rho` is negative, not finite or no scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.sam(optax.sgd(0.1, momentum=0.9), rho=0.05)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(2), jnp.ones((4, 2))
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      2.000
      1.257
      0.389

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    return sharpness_aware(base, scale_to_radius(rho))


def m_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    micro_batch_size: int,
    *,
    micro_batches_at_once: int | None = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""m-SAM: SAM in which every micro-batch of :math:`m` examples ascends for itself.

    .. math::
      \varepsilon_j = \rho \, \frac{\nabla f_{I_j}(w_t)}{\|\nabla f_{I_j}(w_t)\|},
      \qquad w_{t+1} = w_t + \text{base}\Big(
        \frac{1}{k} \sum_{j=1}^{k} \nabla f_{I_j}(w_t + \varepsilon_j)\Big)

    Under `jit` the result does not depend on how many devices hold the batch; it is SAM
    for :math:`m = B`.
    A step costs two gradients, and through :func:`value_and_update` one forward pass
    more, which is that of the whole batch, for the value and the auxiliary data.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. Smaller micro-batches want a smaller one, in our trials SAM's times
        the root of :math:`m / B`. A scalar, or a schedule of the count of steps.
      micro_batch_size: The number :math:`m` of examples, which must divide the batch.
      micro_batches_at_once: How many micro-batches are computed side by side; the
        others wait. None for all. More take more memory, each the size of the
        parameters a few times; the result is the same, up to rounding.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise. Update needs
      `loss_fn` and `batch`.

    Raises:
      TypeError: If `base` is no transformation, `rho` no real scalar or schedule, or
        a size or number no integer.
      ValueError: If `rho` is negative, not finite or no scalar, or a size or number
        less than 1.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.m_sam(optax.sgd(0.1), rho=0.5, micro_batch_size=2)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(2), jnp.ones((4, 2))
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      2.000
      1.064
      0.526

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    return sharpness_aware(
        base,
        scale_to_radius(rho),
        micro_batch_size=check_integer(
            "m_sam", "micro_batch_size", micro_batch_size, low=1, static=True
        ),
        micro_batches_at_once=micro_batches_at_once,
    )


def asam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    *,
    eta: ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""ASAM: SAM whose ball is measured relative to the size of each weight.

    .. math::
      \varepsilon_t = \rho \, \frac{T^2 g_t}{\|T g_t\|}, \quad T = |w_t| + \eta, \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    A step costs two gradients.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, without unit; 0 is the base itself. 0.5 to 2
        is usual for image classification from scratch. A scalar, or a schedule of the
        count of steps.
      eta: Added to the size of each weight, in units of the parameters. A scalar, or a
        schedule.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, or `rho` or `eta` no real scalar or
        schedule.
      ValueError: If `rho` or `eta` is negative, not finite or no scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.asam(optax.sgd(0.1, momentum=0.9), rho=0.5)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = 2 * jnp.ones(2), jnp.ones((4, 2))
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      2.000
      0.867
      0.021

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021
    """
    return sharpness_aware(base, adapt_to_scale(rho, eta=eta))


def vasso(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    theta: ScalarOrSchedule,
    *,
    accumulator_dtype: chex.ArrayDType | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""VaSSO: SAM that ascends along a moving average of the gradients.

    .. math::
      d_0 = g_0, \quad d_t = (1 - \theta) \, d_{t-1} + \theta \, g_t, \quad
      \varepsilon_t = \rho \, \frac{d_t}{\|d_t\|}, \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    A step costs two gradients, and the state holds one more copy of the parameters.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. A scalar, or a schedule of the count of steps.
      theta: Weight of the newest gradient, in [0, 1]; 1 is SAM. The paper's studies
        use 0.2, 0.4 and 0.9. A scalar, or a schedule.
      accumulator_dtype: Floating-point dtype of the average; None means float32 or
        wider.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, `rho` or `theta` no real scalar or
        schedule, or `accumulator_dtype` no floating-point dtype.
      ValueError: If `rho` is negative or not finite, `theta` outside [0, 1], or one of
        them no scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.vasso(optax.sgd(0.1, momentum=0.9), rho=0.5, theta=0.4)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params = jnp.zeros(2)
      >>> opt_state = tx.init(params)
      >>> for batch in (jnp.ones((4, 2)), jnp.eye(2), -jnp.eye(2)):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      2.000
      0.605
      3.058

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023
    """
    ascent = optax.chain(
        suppress_variance(theta, accumulator_dtype), scale_to_radius(rho)
    )
    return sharpness_aware(base, ascent)


def sparse_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    pattern: Pattern,
    *,
    refresh_every: int,
    num_examples: int = 128,
    estimator: Literal["per_example", "probes"] = "per_example",
    chunk_size: int = 4,
    num_probes: int = 4,
    key: Any = 0,
    rescale: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse SAM, SSAM-F: SAM on the weights of largest Fisher information.

    .. math::
      \varepsilon_t = \rho \, \frac{g_t}{\|g_t\|} \odot m, \quad
      m = \text{pattern}\Big(\frac{1}{n} \sum_i (\nabla \ell_i)^2\Big), \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    A step costs two gradients, as in SAM: an array of zeros saves no time. Every
    `refresh_every` steps it costs the scores of `num_examples` examples more. For a
    step that is cheaper see :func:`optax_sam.perturb_only` and
    :mod:`optax_sam.implicit`. Update needs `loss_fn` and `batch`, with losses per
    example.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. A scalar, or a schedule of the count of steps.
      pattern: From scores to masks, such as `optax_sam.unstructured(0.5)`.
      refresh_every: Steps between masks, at least 1; the papers use 1 to 10 epochs.
      num_examples: The first so many examples of the batch are scored.
      estimator: `"per_example"` or `"probes"`, see :func:`sparsify_by_fisher`.
      chunk_size: Examples whose gradients are in memory at once.
      num_probes: Draws of signs for `"probes"`.
      key: An int or JAX PRNG key, for `"probes"`.
      rescale: Whether the masked :math:`\varepsilon` is brought back to the length
        :math:`\rho`. The papers leave it shorter.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, `rho` no real scalar or schedule,
        `pattern` no function, or a count no integer.
      ValueError: If `rho` is negative, not finite or no scalar, a count less than 1, or
        `estimator` unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.sparse_sam(
      ...     optax.sgd(0.1), 0.5, optax_sam.unstructured(0.5), refresh_every=2
      ... )
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(2), jnp.array([[1.0, 2.0], [1.0, 2.0]])
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      5.000
      2.922
      1.664

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach <https://arxiv.org/abs/2210.05177>`_, 2022
    """
    sparsify = sparsify_by_fisher(
        pattern,
        refresh_every=refresh_every,
        num_examples=num_examples,
        estimator=estimator,
        chunk_size=chunk_size,
        num_probes=num_probes,
        key=key,
    )
    return sharpness_aware(base, _scaled_and(sparsify, rho, rescale))


def dynamic_sparse_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    sparsity: float,
    *,
    refresh_every: int,
    decay_steps: int,
    drop_fraction: ScalarOrSchedule = 0.5,
    drop_by: Literal["gradient", "weight"] = "gradient",
    grow_by: Literal["random", "gradient"] = "random",
    key: Any = 0,
    rescale: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse SAM, SSAM-D: SAM on a set of weights that drops some and grows others.

    .. math::
      \varepsilon_t = \rho \, \frac{g_t}{\|g_t\|} \odot m_t, \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    A step costs two gradients, as in SAM, and a change of the mask next to nothing.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. A scalar, or a schedule of the count of steps.
      sparsity: Share of the weights to leave out, in [0, 1]; a Python number.
      refresh_every: Steps between changes of the mask, at least 1.
      decay_steps: Steps until the mask stays, at least 1: the length of the training.
      drop_fraction: Share of the kept weights to drop at the start, in [0, 1]. A
        scalar, or a schedule.
      drop_by: `"gradient"` or `"weight"`, see :func:`sparsify_dynamically`.
      grow_by: `"random"` or `"gradient"`.
      key: An int or JAX PRNG key.
      rescale: Whether the masked :math:`\varepsilon` is brought back to the length
        :math:`\rho`. The papers leave it shorter.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, `rho` or `drop_fraction` no real scalar
        or schedule, `sparsity` no number, a count no integer, or `key` no key.
      ValueError: If `rho` is negative, not finite or no scalar, `sparsity` or
        `drop_fraction` outside [0, 1], a count less than 1, or `drop_by` or `grow_by`
        unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.dynamic_sparse_sam(
      ...     optax.sgd(0.1), 0.5, 0.75, refresh_every=1, decay_steps=3
      ... )
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(8), jnp.ones((4, 8))
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      >>> print(optax.tree.get(opt_state, "mask").sum())
      2

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach <https://arxiv.org/abs/2210.05177>`_, 2022
    """
    sparsify = sparsify_dynamically(
        sparsity,
        refresh_every=refresh_every,
        decay_steps=decay_steps,
        drop_fraction=drop_fraction,
        drop_by=drop_by,
        grow_by=grow_by,
        key=key,
    )
    return sharpness_aware(base, _scaled_and(sparsify, rho, rescale))


def rw_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    strength: ScalarOrSchedule,
    *,
    key: Any = 0,
    delta: ScalarOrSchedule = 1e-4,
    num_probes: int = 1,
    estimator: Literal["finite_difference", "jvp"] = "finite_difference",
    normalize: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""RW-SAM: SAM that ascends along the gradients of the steepest examples.

    .. math::
      \varepsilon_t = \rho \, \frac{\tilde g_t}{\|\tilde g_t\|}, \quad
      \tilde g_t = \sum_i p_i \nabla \ell_i(w_t), \quad
      p = \text{softmax}(\lambda s), \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    :math:`s_i` measures the slope of the loss of an example along a random direction. A
    step costs two gradients and one forward pass: 7/6 of SAM. Update needs `loss_fn`
    and `batch`, with losses per example.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. A scalar, or a schedule of the count of steps.
      strength: :math:`\lambda \ge 0`, in units of :math:`1 / s_i`; 0 is SAM. The larger
        it is, the larger a :math:`\rho` it wants. A scalar, or a schedule.
      key: An int or JAX PRNG key.
      delta: Step of the finite difference; see :func:`reweight_by_sharpness`.
      num_probes: Number of random directions.
      estimator: `"finite_difference"`, or `"jvp"`, which is exact and the one to use in
        bfloat16, at a third of a base step more.
      normalize: Whether to divide the slopes by their mean, so that `strength` has no
        unit.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, `rho`, `strength` or `delta` no real
        scalar or schedule, `key` no key, or another argument of the wrong type.
      ValueError: If one of them is out of range or `estimator` unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.rw_sam(optax.sgd(0.1), rho=0.5, strength=0.1)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(2), jnp.array([[1.0, 1.0], [3.0, 0.0]])
      >>> value, updates, opt_state = step(params, tx.init(params), batch)
      >>> effective = optax.tree.get(opt_state, "effective_sample_size")
      >>> print(1 < effective < 2)
      True

    References:
      `RW-SAM <https://arxiv.org/abs/2509.18001>`_, 2025
    """
    reweight = reweight_by_sharpness(
        strength,
        key=key,
        delta=delta,
        num_probes=num_probes,
        estimator=estimator,
        normalize=normalize,
    )
    return sharpness_aware(base, optax.chain(reweight, scale_to_radius(rho)))


def _scaled_and(
    sparsify: optax.GradientTransformation, rho: ScalarOrSchedule, rescale: bool
) -> optax.GradientTransformation:
    """Scales, then masks, as the papers do; scales again if wanted."""
    radius = scale_to_radius(rho)
    return optax.chain(radius, sparsify, *([radius] if rescale else []))
