"""Sparse SAM with masks from Fisher information, SSAM-F (arXiv 2210.05177)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._ascents.sam import scale_to_radius
from optax_sam._base.checks import called, calling
from optax_sam._base.devices import AxisName, Devices
from optax_sam._base.hyperparameters import (
    KeyLike,
    ScalarOrSchedule,
    as_key,
    check_choice,
    check_integer,
    key_at,
    key_data,
)
from optax_sam._base.losses import check_per_example, linearise, of_example, per_example
from optax_sam._engine import protocol
from optax_sam._engine.sharpness_aware import sharpness_aware
from optax_sam._masks import fisher, masking
from optax_sam._masks.patterns import Pattern, check_pattern


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
    key: KeyLike = 0,
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
    with calling("sparse_sam"):
        sparsify = sparsify_by_fisher(
            pattern,
            refresh_every=refresh_every,
            num_examples=num_examples,
            estimator=estimator,
            chunk_size=chunk_size,
            num_probes=num_probes,
            key=key,
        )
        radius = scale_to_radius(rho)
        ascent = optax.chain(radius, sparsify, *([radius] if rescale else []))
        return sharpness_aware(base, ascent)


def sparsify_by_fisher(
    pattern: Pattern,
    *,
    refresh_every: int,
    num_examples: int = 128,
    estimator: Literal["per_example", "probes"] = "per_example",
    chunk_size: int = 4,
    num_probes: int = 4,
    key: KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the entries that matter most by Fisher information: Sparse SAM, SSAM-F.

    .. math:: u \mapsto u \odot m, \qquad m = \text{pattern}(F), \qquad
      F = \frac{1}{n} \sum_{i=1}^{n} (\nabla \ell_i(w))^2

    After :func:`scale_to_radius` this is the papers'
    :math:`\varepsilon = \rho \, g / \|g\| \odot m`; before it,
    :math:`\|\varepsilon\|` is :math:`\rho` again. The mask is made anew at the start of
    each step whose count `refresh_every` divides, the first included, and costs nothing
    in the steps between.

    The scores are those of `loss_fn`, or of `scoring_loss_fn(params, batch)` where
    update gets one, as from `value_and_update(..., scoring_loss_fn=...)`: that of a
    model in evaluation mode, say.

    An example that is normalised by itself, or has the dropout of a batch of one, has
    other gradients than in its batch. Whether gradients of single examples add up to
    that of the examples together is therefore tried on a few whenever a mask is made,
    and where they do not, within a tenth, scores are by probes. The state does not say
    which it was; that losses of single examples differ from those in the batch is the
    sign.

    Args:
      pattern: From scores to masks, such as :func:`unstructured`.
      refresh_every: Steps between masks, at least 1.
      num_examples: The first so many examples of the batch are scored; all of a smaller
        batch.
      estimator: `"per_example"` for gradients of single examples, which is exact where
        they add up, or `"probes"` for the gradients of randomly signed sums of losses,
        which needs no gradient of a single example and, without a scoring loss, no
        forward pass.
      chunk_size: Examples whose gradients are in memory at once, for `"per_example"`;
        so many, and at least two, are tried.
      num_probes: Draws of signs to average over, for `"probes"`, each a backward pass.
      key: An int or JAX PRNG key, for `"probes"`.

    Returns:
      A link of an ascent for :func:`optax_sam.sharpness_aware`. It maps a tree of
      arrays of any shapes to one of the same shapes and dtypes. Leaves that are absent
      (:func:`perturb_only`) are neither scored nor counted.

    Raises:
      TypeError: If `pattern` is no function, or a count no integer; in update, if the
        pattern makes no bools.
      ValueError: If a count is less than 1 or `estimator` unknown; in update, if
        `params`, or `loss_fn` and `batch`, are missing, if losses are not per example,
        or if the pattern's masks do not fit.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> link = optax_sam.sparsify_by_fisher(
      ...     optax_sam.unstructured(0.5), refresh_every=390
      ... )
      >>> params, batch = jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> loss_fn = lambda w, batch: 0.5 * jnp.sum((w[None] - batch) ** 2, axis=-1)
      >>> updates, state = link.update(
      ...     jnp.ones(2), link.init(params), params, loss_fn=loss_fn, batch=batch
      ... )
      >>> print(updates)
      [0. 1.]

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach <https://arxiv.org/abs/2210.05177>`_, 2022
    """
    owner = called("sparsify_by_fisher")
    check_pattern(owner, pattern)
    refresh_every = check_integer(owner, "refresh_every", refresh_every, low=1)
    fisher = _estimator(owner, estimator, num_examples, chunk_size, num_probes)
    seed = as_key(owner, key)

    def init_fn(params: optax.Params) -> SparsifyByFisherState:
        return SparsifyByFisherState(
            count=jnp.zeros([], jnp.int32),
            mask=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=bool), params),
            since=jnp.zeros([], jnp.int32),
            key=key_data(seed),
        )

    def update_fn(
        updates: optax.Updates,
        state: SparsifyByFisherState,
        params: optax.Params | None = None,
        *,
        loss_fn: Any = None,
        batch: Any = protocol.MISSING,
        scoring_loss_fn: Any = None,
        scoring_batch: Any = protocol.MISSING,
        losses: Any = None,
        pullback: Any = None,
        ascent_loss_fn: Any = None,
        axis_name: AxisName | None = None,
        scoring_axis_name: AxisName | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SparsifyByFisherState]:
        del extra_args
        axis_name = axis_name if scoring_axis_name is None else scoring_axis_name
        # Those of the clean pass serve if they are of this loss and these examples.
        clean = (losses, pullback) if ascent_loss_fn is None else (None, None)
        name = "loss_fn"
        if scoring_loss_fn is not None:
            name, loss_fn, clean = "scoring_loss_fn", scoring_loss_fn, (None, None)
        if scoring_batch is not protocol.MISSING:
            batch, clean = scoring_batch, (None, None)
        protocol.require(owner, params=params, loss_fn=loss_fn, batch=batch)
        loss_fn = per_example(owner, name, loss_fn)
        masking.check(f"{owner}: state.mask", state.mask, params)

        def new_mask() -> chex.ArrayTree:
            draws = key_at(seed, state.key, state.count)
            add_up = partial(_add_up, owner, name, updates)
            scores = fisher(loss_fn, params, batch, clean, draws, axis_name, add_up)
            scores = masking.present(scores, updates)
            return masking.check(f"{owner}: pattern(scores)", pattern(scores), scores)

        due = state.count % refresh_every == 0
        mask = masking.refresh_if(due, new_mask, state.mask, updates)
        count = optax.safe_increment(state.count)
        since = jnp.where(due, state.count, state.since)
        state = SparsifyByFisherState(count, mask, since, state.key)
        return masking.apply(mask, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class SparsifyByFisherState(NamedTuple):
    """State of :func:`sparsify_by_fisher`.

    Attributes:
      count: Number of steps taken, an int32 scalar.
      mask: The mask of the last step, bools of the shapes of the parameters; all False
        before the first step.
      since: Count of the first step of this mask, an int32 scalar.
      key: Data of the PRNG key that the signs of probes are drawn with.
    """

    count: jax.Array  # type: ignore[assignment]
    mask: chex.ArrayTree
    since: jax.Array
    key: jax.Array


def _estimator(
    owner: str, estimator: Any, num_examples: Any, chunk_size: Any, num_probes: Any
) -> Callable[..., chex.ArrayTree]:
    """The function of the losses, at the parameters, that scores the parameters."""
    check_choice(owner, "estimator", estimator, ("per_example", "probes"))
    num_examples = check_integer(
        owner, "num_examples", num_examples, low=1, static=True
    )
    chunk_size = check_integer(owner, "chunk_size", chunk_size, low=1, static=True)
    num_probes = check_integer(owner, "num_probes", num_probes, low=1, static=True)

    def from_examples(
        loss_fn: Any, params: Any, batch: Any, axis_name: Any
    ) -> chex.ArrayTree:
        return fisher.fisher_diagonal(
            loss_fn,
            params,
            batch,
            num_examples=num_examples,
            chunk_size=chunk_size,
            axis_name=axis_name,
        )

    def from_probes(
        loss_fn: Any, params: Any, batch: Any, clean: Any, key: Any, axis_name: Any
    ) -> chex.ArrayTree:
        losses, pullback = clean
        if losses is not None:
            check_per_example(owner, "loss_fn", losses)
        if losses is None or pullback is None:
            # Of several devices every one has to know how many the others have.
            first = num_examples if axis_name is None else None
            examples = fisher.first_examples(owner, batch, first)
            losses, pullback = linearise(
                lambda p: loss_fn(p, examples), Devices(axis_name).vary(params)
            )
        return fisher.fisher_from_probes(
            losses, pullback, num_examples, num_probes, key, axis_name
        )

    def scores(
        loss_fn: Any,
        params: Any,
        batch: Any,
        clean: Any,
        key: Any,
        axis_name: Any,
        add_up: Callable[..., jax.Array],
    ) -> chex.ArrayTree:
        exact = partial(from_examples, loss_fn, params, batch, axis_name)
        probed = partial(from_probes, loss_fn, params, batch, clean, key, axis_name)
        if estimator == "probes":
            return probed()
        devices = Devices(axis_name)
        few = fisher.first_examples(owner, batch, max(2, chunk_size))
        alike = devices.all(add_up(loss_fn, devices.vary(params), few))
        return jax.lax.cond(alike, exact, probed)

    return scores


def _add_up(
    owner: str,
    name: str,
    updates: optax.Updates,
    loss_fn: Callable[..., jax.Array],
    params: optax.Params,
    examples: Any,
) -> jax.Array:
    """Whether gradients of single examples add up to that of the examples together.

    They do where no loss hangs on other examples, up to rounding in half precision.
    """

    def together(params: optax.Params) -> jax.Array:
        return jnp.mean(loss_fn(params, examples))

    def alone(params: optax.Params) -> jax.Array:
        loss = partial(of_example, owner, name, loss_fn, params)
        return jnp.mean(jax.vmap(loss)(examples))

    def gradient(loss: Callable[[optax.Params], jax.Array]) -> chex.ArrayTree:
        wide = jax.tree.map(lambda g: g.astype(float), jax.grad(loss)(params))
        return masking.present(wide, updates)

    whole = gradient(together)
    error = optax.tree.norm(optax.tree.sub(whole, gradient(alone)))
    near: jax.Array = error <= 0.1 * optax.tree.norm(whole)
    return near
