r"""The sharpness-aware step, :math:`\text{ascent} \times \text{base}`.

1. Clean pass: losses and gradient at :math:`w`.
2. The ascent turns the clean gradient into a displacement :math:`\varepsilon`.
3. Perturbed pass: the gradient at :math:`w + \varepsilon`.
4. The base optimizer turns that gradient into the update of :math:`w`.

Nothing here knows a method: each is an ascent, an ordinary gradient transformation.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam._base import batching, trees
from optax_sam._base.checks import called, calling, check_parameters
from optax_sam._base.devices import AxisName, Devices, place_like
from optax_sam._base.hyperparameters import check_bool
from optax_sam._engine import batch_loss, protocol
from optax_sam._engine.ascend import Ascent, zero_unless
from optax_sam._engine.groups import Examples, Group, Passes
from optax_sam._engine.kept import check_kept
from optax_sam._engine.states import SharpnessAwareState, explaining
from optax_sam._engine.trial import check_directions, tried_uphill
from optax_sam._engine.when import AscendWhen, check_when, decide, either


def sharpness_aware(
    base: optax.GradientTransformation,
    ascent: optax.GradientTransformation,
    *,
    ascend_when: AscendWhen | None = None,
    micro_batch_size: int | None = None,
    micro_batches_at_once: int | None = 1,
    axis_name: AxisName | None = None,
    sync_ascent: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Descends along the gradient at the point that an ascent leads to.

    .. math::
      \varepsilon_t = \text{ascent}(\nabla f(w_t)), \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    The ascent's output points uphill: it is added to the parameters as it is. Leaves
    that the ascent gives back as `optax.MaskedNode` are not perturbed. Ascents combine
    with :func:`optax.chain`.

    A clean gradient that is not finite gives :math:`\varepsilon = 0` and leaves the
    ascent's state as it was; of an ascent that takes a gradient of its own, what it
    makes of that counts. What the base then does with the gradient at :math:`w` is
    up to the base: wrap it in `optax.apply_if_finite` to skip the step. Schedules in
    the ascent do not count such steps. A hyperparameter of a schedule or of
    `optax.inject_hyperparams` is held to its range within the step. If it is NaN, the
    step is the one without: the base's for `rho`, SAM's for `strength` and `theta`,
    ASAM's with :math:`\eta = 0`, of the same mask for `drop_fraction`; for `delta`
    its default stands.

    In a step for which `ascend_when` gives False, no perturbed pass runs
    (`jax.lax.cond`): it costs one gradient, the clean one, which the base gets; with
    `ascent_loss_fn` one more, as the base gets that of `loss_fn`. The ascent's state
    still sees the clean gradient, so an average is one of all clean gradients,
    schedules count all steps, and what an ascent computes for its state, such as a mask
    that is due or the forward pass of RW-SAM's figures, is computed.

    An ascent that reads nothing of the clean pass, neither gradient nor losses, as
    :func:`optax_sam.follow_momentum`, makes a step of one gradient, at
    :math:`w + \varepsilon`: value and auxiliary data are then those of that pass. It is
    seen when the step is traced. Only a base that reads the clean gradient, as that of
    :func:`optax_sam.gsam`, makes it be computed. From a branch of a condition, as in
    `optax.MultiSteps(sharpness_aware(...))`, nothing can be reported: value and
    auxiliary data remain those of a clean pass, which is made for them.

    Where wrappers go: what acts on the gradient that moves the parameters
    (`optax.MultiSteps`, clipping, `optax.masked`, `optax.partition`) belongs *around
    the base*. `optax.chain(clip, sharpness_aware(...))` clips the ascent only, and
    `optax.MultiSteps(sharpness_aware(...), k)` descends along the last of `k`
    gradients, of which :func:`value_and_update` warns; inside `optax.masked` the step
    is refused.

    With `micro_batch_size` this is m-SAM: the micro-batches :math:`I_1, \dots, I_k` of
    a batch ascend each for itself, and the base descends along the mean,

    .. math::
      \frac{1}{k} \sum_{j=1}^{k} \nabla f_{I_j}(w_t + \varepsilon_{t,j}), \qquad
      \varepsilon_{t,j} = \text{ascent}(\nabla f_{I_j}(w_t))

    whatever the number of devices that hold the batch under `jit`. All of them start
    from the ascent's state before the step, random numbers included, and the state then
    advances once, by the whole batch and along the mean of the clean gradients: a
    moving average is that of the whole batch, and so are the scores of
    :func:`sparsify_by_fisher`. To advance it, a mask that is due is made once more than
    there are rounds, and RW-SAM probes the whole batch once more. A micro-batch has
    only its own examples for batch normalisation.

    Through :func:`value_and_update` no pass over the whole batch is needed for `value`,
    `losses`, `grad` and auxiliary data, which are then those of the micro-batches' own
    clean passes: floating-point auxiliary data are their means, and arrays of which
    each has a part for its examples are put together. Others that are not floating
    point, such as a count of correct predictions, remain those of a pass over the whole
    batch, of which a compiler keeps what they depend on: nothing, for the count of a
    random stream. That holds for `value` and all auxiliary data where the update is
    called from a branch of a condition, as in `optax.MultiSteps(sharpness_aware(...))`.

    Typed PRNG keys (`jax.random.key`) among the arguments of its step that come after
    the batch get the number of the micro-batch folded in, by `jax.random.fold_in`: each
    draws for itself, the same in both of its passes, whatever the number of devices. A
    micro-batch of the whole batch draws as without. Raw keys (`jax.random.PRNGKey`)
    cannot be told from other integers: with them all micro-batches draw the same.

    Args:
      base: The optimizer that moves the parameters, any Optax transformation.
      ascent: The transformation of the clean gradient into :math:`\varepsilon`, such as
        :func:`optax_sam.scale_to_radius`.
      ascend_when: From the count of steps, an int32 scalar, to a bool scalar: whether
        the step ascends, see above. :func:`optax_sam.every` and
        :func:`optax_sam.between` make such functions. None for always.
      micro_batch_size: Examples of a micro-batch, which must divide the batch; None for
        the whole batch. Neighbours along the first axis of the batch's leaves make up a
        micro-batch. With an axis of devices, those of one device do.
      micro_batches_at_once: How many micro-batches are computed side by side, by
        `jax.vmap`; the others wait, in `jax.lax.scan`, and take no memory beyond a sum
        of gradients. None for all. It changes nothing but rounding. Where devices
        share a batch, choose a multiple of their number: one at a time would be
        computed by all of them. Unused without `micro_batch_size`.
      axis_name: The axis, or axes, of `jax.shard_map` or `jax.pmap` over which devices
        share the batch, where update is called inside of one: `grads`, `batch`,
        `losses`, `pullback`, `value`, `grad` and what `grad_fn` returns are then those
        of one device, and updates and state those of one device with all examples.
        Inside of `shard_map` take `grads` and `pullback` with respect to
        `jax.lax.pcast(params, axis_name, to="varying")`: with respect to `params`
        itself JAX gives the sum over devices. :func:`value_and_update` with an
        `axis_name` of its own does all that, and this one is not needed. Under `jit`,
        where arrays may be sharded without an axis, leave it out.
      sync_ascent: Whether all devices ascend together. If not, each ascends for itself,
        along the gradient of its own examples: m-SAM with what a device has of the
        batch as micro-batch, draws included. That saves one of two reductions of
        gradients, unless the ascent keeps gradients in its state. Needs an axis.

    Returns:
      A transformation whose update is called as
      `update(grads, state, params, *, loss_fn, batch, grad_fn, losses, pullback)`:

      * `grads`: the clean gradient of the mean loss, a tree like `params`.
      * `params`: pytree of floating-point arrays of any shapes. They are not modified.
      * `loss_fn` and `batch`: `loss_fn(params, batch)` returns the losses of the
        examples, shape `[B]`, or their mean as a scalar. With `micro_batch_size` it
        must be the losses, shape `[micro_batch_size]` of a micro-batch.
      * `grad_fn`: optional, `grad_fn(params)` replaces the gradient of the mean of
        `loss_fn` in the perturbed pass; then `loss_fn` is not needed. One that does not
        use its argument makes the step the base's, and nothing can tell. Not with
        `micro_batch_size`, which also leaves `grads` unread unless a micro-batch is
        the whole batch.
      * `losses`, `pullback`: optional, the clean losses `[B]` and the function
        `weights[B] -> gradient of sum(weights * losses)`, for ascents that weight
        examples.
      * `ascent_loss_fn`, `scoring_loss_fn`, `scoring_batch`: optional, the losses that
        `losses` and the clean passes of micro-batches are of, in place of `loss_fn`;
        those to score parameters by, and the examples to do it with.
      * `axis_name`: as above, with the difference that `grads` is the mean over devices
        already.

      All of these reach the ascent. The base gets every other extra argument, as `grad`
      the clean gradient (where that is not finite, the one it descends along), and of
      these only what its update spells out by name (its own update, not one inside a
      chain). :func:`value_and_update` makes the call with all of them. Updates have
      the dtypes that the base gives them.

    Raises:
      TypeError: If `base` or `ascent` is no transformation, a number of micro-batches
        or their size no integer, or `sync_ascent` no bool; in init and update, if a
        parameter is not real floating point or `loss_fn` cannot be called or returns
        no array; in update, if `state` is that of something else.
      ValueError: If a size or number is less than 1; in init, if the ascent is seen to
        lead downhill, as an optimizer does, or the base uphill, or one of them to be
        sharpness-aware; in update, if `params`, or
        `loss_fn` and `batch` as well as `grad_fn`, are missing, if losses or gradients
        have the wrong shape, if the batch cannot be cut into micro-batches, or if an
        axis is missing, unknown, or not what update is told.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.sharpness_aware(
      ...     optax.sgd(1.0), optax_sam.scale_to_radius(rho=0.5)
      ... )
      >>> params = jnp.array([3.0, 4.0])
      >>> grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, state = tx.update(
      ...     grad_fn(params), tx.init(params), params, grad_fn=grad_fn
      ... )
      >>> print(updates)  # minus the gradient at (3.3, 4.4)
      [-3.3 -4.4]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021, also for m-SAM
    """
    owner = called("sharpness_aware")
    base = protocol.as_transformation(owner, "base", base)
    ascent = protocol.as_transformation(owner, "ascent", ascent)
    size, at_once = batching.check_sizes(owner, micro_batch_size, micro_batches_at_once)
    check_bool(owner, "sync_ascent", sync_ascent)
    check_when(owner, ascend_when)
    own_axis_name = axis_name

    def init_fn(params: optax.Params) -> SharpnessAwareState:
        point = protocol.evaluated(params)
        check_parameters(owner, point)
        state = SharpnessAwareState.first(ascent.init(point), base.init(params))
        if point is not params:
            _check_lookahead(owner, state.base_state)
        check_directions(owner, base, ascent, state, point)
        tried = functools.partial(tried_uphill, base, state.base_state, point)
        check_kept(owner, state.ascent_state, state.base_state, point, tried)
        placed: SharpnessAwareState = place_like(state, point)
        return placed

    @calling(owner)
    def update_fn(
        updates: optax.Updates,
        state: SharpnessAwareState,
        params: optax.Params | None = None,
        *,
        loss_fn: Callable[..., jax.Array] | None = None,
        batch: Any = protocol.MISSING,
        grad_fn: Callable[[optax.Params], optax.Updates] | None = None,
        axis_name: AxisName | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        point = protocol.evaluated(params)
        check_parameters(owner, point)
        if size is not None and grad_fn is not None:
            raise ValueError(
                f"{owner}: with micro_batch_size each micro-batch has a gradient of "
                "its own, which grad_fn(params) cannot give; pass loss_fn and batch in "
                "its place."
            )
        updates = protocol.as_gradient("grads", updates, point)
        _warn_if_changed(updates, **extra_args)
        devices = _devices_of(own_axis_name, axis_name, sync_ascent)
        extra_args |= protocol.given(batch, loss_fn=loss_fn, grad_fn=grad_fn)
        extra_args["base_state"] = state.base_state
        extra_args = batch_loss.of_step(extra_args)
        averaged = axis_name is not None
        examples = Examples.of_step(point, extra_args, devices, averaged)
        ascends = decide(owner, ascend_when, state.step)
        passes_of = functools.partial(_passes, ascent, state.ascent_state, ascends)

        if sync_ascent and examples.are_one_group(size):
            passes = examples.all_together(passes_of, updates)
        else:
            # Each group starts from the state before the step; then that advances once.
            examples = examples.sharing_scores(size)
            passes = examples.each_alone(passes_of, updates, size, at_once)
            given = examples.shared_arguments
            advance = Ascent(
                ascent,
                passes.clean.gradient,
                state.ascent_state,
                point,
                given,
                passes.finite,
            )
            passes = passes._replace(ascent_state=advance().state)
        base_args = protocol.accepted(
            base.update,
            passes.for_base(examples.as_found(passes), ascends),
            withhold=protocol.ARGUMENTS,
        )
        updates, base_state = base.update(
            passes.perturbed.gradient, state.base_state, params, **base_args
        )
        return updates, state.after(passes.ascent_state, base_state, *passes.losses)

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return explaining(owner, tx)


def _passes(
    ascent: optax.GradientTransformationExtraArgs,
    ascent_state: optax.OptState,
    ascends: bool | jax.Array | None,
    group: Group,
    advances: jax.Array | None = None,
) -> Passes:
    """The passes over examples that ascend together, from the clean one on."""
    clean, params, given = group.clean, group.params, group.arguments
    ascend = Ascent(ascent, clean.gradient, ascent_state, params, given, advances)

    def with_ascent() -> Any:
        epsilon, new, finite = ascend()
        perturbed = group.pass_at(trees.displace(params, epsilon))
        if ascends is not None:  # The branches of a condition have to agree.
            perturbed = perturbed.like(clean)
        return perturbed, new, finite

    def without() -> Any:
        _, new, finite = ascend.not_made()
        # The base descends along the loss, whatever the ascent would have read, or a
        # transformation around the step has made of its gradient.
        found = clean._replace(gradient=given.get("grad", clean.gradient))
        unperturbed = group.pass_at(params) if "ascent_loss_fn" in given else found
        return unperturbed.like(clean), new, finite

    if ascend.reads_clean_pass or group.descends_by_clean_pass:
        perturbed, new, finite = either(ascends, with_ascent, without)
        # What is chosen of a condition's results is written out for the base.
        as_it_is = ascends is not None and ascend.reads_whole_gradient
        known = group.known_to_base(perturbed, as_it_is)
        return Passes.of(known, perturbed, new, finite, clean)
    # Then nobody need make the clean pass: the only one is reported in its place.
    epsilon, new, finite = ascend()
    if ascends is not None:
        epsilon = zero_unless(jnp.asarray(ascends), epsilon)
    only = group.pass_at(trees.displace(params, epsilon))
    known = group.known_to_base(only, False)._replace(loss=only.loss)
    return Passes.of(known, only, new, finite, only)


def _check_lookahead(owner: str, base_state: optax.OptState) -> None:
    """Refuses the parameters of `optax.lookahead` for a base that is something else."""

    def is_lookahead(x: Any) -> bool:
        return isinstance(x, optax.LookaheadState)

    if not any(map(is_lookahead, jax.tree.leaves(base_state, is_leaf=is_lookahead))):
        raise TypeError(
            f"{owner}: params are optax.LookaheadParams, and base is not "
            "optax.lookahead, which alone moves both the fast and the slow ones; pass "
            "optax.lookahead(base, ...) as base, or params.fast."
        )


def _warn_if_changed(
    gradient: Any,
    grad: Any = None,
    report: protocol.Report | None = None,
    **others: Any,
) -> None:
    """Warns of a gradient that is not the one `value_and_update` has found."""
    del others
    if report is None or not report.is_of_this_trace:
        return  # In a branch or a loop it cannot be told.
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(grad), strict=True)
    if any(a is not b for a, b in pairs):
        warnings.warn(
            "sharpness_aware: a transformation around it has changed the gradient, as "
            "in optax.chain(clip, sam(...)), which changes the ascent alone, and not "
            "what moves the parameters; put it around the base, "
            "sam(optax.chain(clip, sgd), rho).",
            stacklevel=2,
        )


def _devices_of(own: Any, shared: Any, sync_ascent: bool) -> Devices:
    """The devices that share the batch, by the name given here or to the update."""
    owner = called("sharpness_aware")
    names = [n if isinstance(n, tuple) else (n,) for n in (own, shared)]
    if None not in (own, shared) and names[0] != names[1]:
        raise ValueError(
            f"{owner}: axis_name = {own!r}, but update was called with "
            f"axis_name = {shared!r}; name the axis in one place only, which for "
            "optax_sam.value_and_update is there."
        )
    devices = Devices(own if shared is None else shared)
    devices.check(owner)
    if devices.axis_name is None and not sync_ascent:
        raise ValueError(
            f"{owner}: sync_ascent=False lets every device ascend for itself, "
            "and axis_name is missing; pass the axis of jax.shard_map or jax.pmap, "
            "here or to optax_sam.value_and_update. Under jax.jit micro_batch_size "
            "does the same."
        )
    return devices
