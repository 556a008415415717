"""The step protocol: what a sharpness-aware update is called with.

`tx.update(grads, state, params, **arguments)`, with the arguments of
:class:`Arguments`. A missing one is refused by whoever needs it.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypedDict

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import losses, trees
from optax_sam._base.checks import called, check_like, checked, refuse, shown
from optax_sam._base.devices import AxisName

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # Before jax 0.10.
    from jax.core import get_opaque_trace_state

trace_now: Callable[[], Any] = get_opaque_trace_state
Advance: TypeAlias = Callable[[chex.ArrayTree, chex.ArrayTree], chex.ArrayTree]
MISSING: Any = object()  # For a batch that is not given; None is an empty pytree.


class Report:
    """What `value_and_update` reports: at first, what it finds in its own clean pass.

    Where groups of examples make clean passes of their own, these are to be reported,
    and nobody reads that of the whole batch, which is then not computed.

    Attributes:
      losses: The losses of the whole batch.
      value: The clean mean loss.
      aux: The auxiliary data.
    """

    def __init__(self, losses: jax.Array, value: jax.Array, aux: Any) -> None:
        """Reports so, unless it is called."""
        self.losses, self.value, self.aux = losses, value, aux
        self._trace = trace_now()

    @property
    def is_of_this_trace(self) -> bool:
        """Whether what is traced now is the step itself, no branch or loop in it."""
        return bool(trace_now() == self._trace)

    def __call__(self, value: jax.Array, aux: Any) -> None:
        """Takes another report; one from a branch or a loop cannot leave it."""
        if self.is_of_this_trace:
            self.value, self.aux = value, aux


class Pass(NamedTuple):
    """What one pass has found at some parameters.

    Attributes:
      gradient: The gradient of the mean loss.
      loss: The mean loss, None if the gradient was given without.
      found: Losses and auxiliary data, None if the gradient was given without.
    """

    gradient: optax.Updates
    loss: jax.Array | None = None
    found: chex.ArrayTree = None

    @property
    def arrays(self) -> chex.ArrayTree:
        """What was found without what is no array, which all passes have alike."""
        return jax.tree.map(
            lambda x: x if isinstance(x, jax.Array) else None, self.found
        )

    def like(self, other: "Pass") -> "Pass":
        """The same for a branch: gradient and loss alone, in dtypes of another pass."""
        loss = None if other.loss is None else jnp.asarray(self.loss, other.loss.dtype)
        return Pass(trees.cast_like(self.gradient, other.gradient), loss)


class Arguments(TypedDict, total=False):
    """The extra arguments of a sharpness-aware step.

    Attributes:
      loss_fn: `loss_fn(params, batch)` gives the losses of the examples, shape `[B]`; a
        scalar (their mean) will do where no method asks for single examples.
      batch: What `loss_fn` takes; a pytree of arrays where examples are to be told
        apart, along their first axis.
      grad_fn: `grad_fn(params)` gives the gradient; it replaces the gradient of the
        mean of `loss_fn` in the perturbed pass.
      losses: The clean losses `[B]`. Where they and `pullback` are given, nothing runs
        the clean forward pass again.
      pullback: `pullback(weights[B])` gives the gradient of `sum(weights * losses)` at
        `params`.
      ascent_loss_fn: `ascent_loss_fn(params, batch)` gives the losses that the clean
        pass is of, without it those of `loss_fn`.
      scoring_loss_fn: `scoring_loss_fn(params, batch)` gives losses `[B]` to score
        parameters by, such as those in evaluation mode; without it, `loss_fn` does.
      scoring_batch: The examples to score parameters by, without it those of `batch`: a
        micro-batch that ascends for itself shares its scores with the others.
      axis_name: The axis of `jax.shard_map` or `jax.pmap` over which devices share the
        examples. `batch`, `losses` and `pullback` are those of one device, while the
        gradient, `value` and `grad` are means over all.
      scoring_axis_name: That of the examples to score by, where it is another: a device
        that ascends for itself has no `axis_name`, but shares its scores.
      report: Takes value and auxiliary data of groups that made their own clean passes.
      advance: `advance(new, old)` is a part of the ascent's new state, or the old one
        unless the gradient is finite. The engine chooses so for all of the state that
        the ascent returns; an ascent that goes on with a part of its new state chooses
        before, and so the old one need not be kept beside it.
      is_gradient: `is_gradient(updates)` says whether updates are the gradient that the
        ascent was given, or a part of it, and no other link has made them.
      base_state: The state of the base before the step, for an ascent along what the
        base keeps.
    """

    loss_fn: Callable[[optax.Params, Any], jax.Array]
    batch: Any
    grad_fn: Callable[[optax.Params], optax.Updates]
    losses: jax.Array
    pullback: losses.Pullback
    ascent_loss_fn: Callable[[optax.Params, Any], jax.Array]
    scoring_loss_fn: Callable[[optax.Params, Any], jax.Array]
    scoring_batch: Any
    axis_name: AxisName
    scoring_axis_name: AxisName
    report: Report
    advance: Advance
    is_gradient: Callable[[optax.Updates], bool]
    base_state: optax.OptState


ARGUMENTS = frozenset(Arguments.__annotations__)


def take_new(new: chex.ArrayTree, old: chex.ArrayTree) -> chex.ArrayTree:
    """What `advance` is where no engine passes it."""
    del old
    return new


def given(batch: Any = MISSING, **others: Any) -> dict[str, Any]:
    """The arguments of the protocol that are given, by name."""
    named = {name: arg for name, arg in others.items() if arg is not None}
    return named if batch is MISSING else named | {"batch": batch}


def require(owner: str, or_else: str = "", **arguments: Any) -> None:
    """Refuses to go on without an argument that a method needs."""
    for name, value in arguments.items():
        if value is MISSING or (value is None and name != "batch"):
            raise ValueError(
                f"{owner}: {name} is missing; call tx.update(grads, state, params, "
                "loss_fn=..., batch=...) with loss_fn(params, batch) -> losses "
                f"[B]{or_else}, or let optax_sam.value_and_update make the call; with "
                "Flax, state.apply_loss(loss_fn, batch) of optax_sam.flax.TrainState, "
                "or nnx_value_and_update, makes it."
            )


def require_gradient(
    owner: str,
    updates: optax.Updates,
    is_gradient: Callable[[optax.Updates], bool] | None,
    chain: str,
) -> None:
    """Refuses what a link before has made of the gradient, which is not read."""
    if is_gradient is not None and not is_gradient(updates):
        raise ValueError(
            f"{owner}: a link before it in the chain has changed the gradient, without "
            "effect, since this one replaces it; put it first, optax.chain("
            f"{chain}), with at most perturb_only before."
        )


def require_of_base(owner: str, **arguments: Any) -> None:
    """Refuses to descend without what the engine tells the base."""
    what = {
        "grad": ("the clean gradient", "ascent"),
        "ascended": ("whether the step has ascended", "ascent, ascend_when=every(5)"),
    }
    for name, value in arguments.items():
        if value is None:
            meaning, others = what[name]
            raise ValueError(
                f"{owner}: {name}, {meaning}, is missing; make the link a part of the "
                f"base, sharpness_aware(optax.chain(link, sgd), {others}), which gives "
                "it."
            )


def accepted(
    update: Callable[..., Any],
    extra_args: Mapping[str, Any],
    *,
    withhold: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The extra arguments to pass to an update function.

    Args:
      update: The update function.
      extra_args: What there is to pass.
      withhold: Names to pass only to an update function that spells them out.

    Returns:
      The arguments that `update` spells out and, if it takes any (`**extra_args`),
      the others that are not withheld.
    """
    parameters = _parameters(update)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = list(parameters)[3:]  # After updates, state and params.
    return {
        name: value
        for name, value in extra_args.items()
        if name in named or (takes_any and name not in withhold)
    }


def _parameters(fn: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(fn).parameters


def evaluated(params: Any) -> Any:
    """The parameters that the loss is of: of those of `optax.lookahead`, the fast."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def as_transformation(
    owner: str, name: str, tx: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with support for extra arguments, or refuses it."""
    if not (
        callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))
    ):
        example = "optax.sgd(0.1)"
        if name == "ascent":
            example = "optax_sam.scale_to_radius(rho=0.05)"
        raise TypeError(
            f"{owner}: {name} must be an Optax gradient transformation, such as "
            f"{example}; got {shown(tx)} of type {type(tx).__name__}."
        )
    keywords = [p for p in _parameters(tx.update).values() if p.kind is p.VAR_KEYWORD]
    if keywords and not isinstance(tx, optax.GradientTransformationExtraArgs):
        # Such as optax.MultiSteps: it takes extra arguments but its type denies it.
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)


def pass_function(
    clean_params: optax.Params,
    loss_fn: Any = None,
    batch: Any = MISSING,
    grad_fn: Any = None,
    **others: Any,
) -> Callable[[optax.Params], Pass]:
    """The function `params -> perturbed pass` that the extra arguments describe.

    It is built like the clean pass of `value_and_update`, so that where parameters
    agree, gradients do, to the last bit.

    Args:
      clean_params: The parameters of the clean pass, this device's.
      loss_fn: The :class:`BatchLoss` of `batch`, or None.
      batch: The batch for `loss_fn`, or `MISSING`.
      grad_fn: The gradient as a function of params, or None; wins over `loss_fn`.
      **others: Other arguments of the step, which do not matter.

    Returns:
      A pass over the batch as a function of params.

    Raises:
      ValueError: If neither `grad_fn` nor both `loss_fn` and `batch` are given, or
        `grad_fn` beside a loss of outputs.
      TypeError: If one of them cannot be called as it has to be.
    """
    del others
    if grad_fn is not None:
        owner = called("sharpness_aware")
        if loss_fn is not None and loss_fn.of_outputs is not None:
            raise ValueError(
                f"{owner}: grad_fn(params) gives a gradient without the derivative by "
                "the outputs that loss_fn, in two parts, takes from the clean pass; "
                "leave grad_fn out."
            )
        given_fn = checked(owner, "grad_fn", grad_fn, "params")

        def given_pass(params: optax.Params) -> Pass:
            return Pass(as_gradient("grad_fn(params)", given_fn(params), params))

        return given_pass
    or_else = ", or pass grad_fn=..."
    require(called("sharpness_aware"), or_else, loss_fn=loss_fn, batch=batch)

    def mean_pass(params: optax.Params) -> Pass:
        found = loss_fn.after_clean(clean_params, batch).linearise(params, batch)
        mean = losses.clean_pass(found.losses, found.pullback)
        return Pass(mean.grad, mean.value, (found.losses, found.aux))

    return mean_pass


def as_gradient(name: str, gradient: Any, params: optax.Params) -> optax.Updates:
    """Returns a gradient as a tree like the parameters, or refuses it.

    What Flax's variables hold is taken out of them: the gradient with respect to a
    model that is merged from arrays has variables where these have arrays.
    """
    owner, expected = called("sharpness_aware"), _paths(params)
    if _paths(gradient) == expected:
        structure, leaves = jax.tree.structure(params), jax.tree.leaves(gradient)
        gradient = jax.tree.unflatten(structure, leaves)
    elif type(gradient) is tuple and expected in map(_paths, gradient):
        refuse(
            owner,
            f"{name} must be a gradient alone, a tree like params",
            jax.tree.structure(gradient),
            "take it out of the tuple that jax.value_and_grad(...), and jax.grad(..., "
            "has_aux=True), return; grad_fn=jax.grad(...) gives it alone",
        )
    remedy = "Take the gradient with respect to the same tree that is passed as params."
    check_like(f"{owner}: {name}", gradient, params, remedy)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{owner}: {name}{jax.tree_util.keystr(path)} has dtype "
                f"{jnp.result_type(leaf)}, and a gradient must be real floating point; "
                "do not round it to integers, of which most are zero."
            )
    return gradient


def _paths(tree: Any) -> list[Any]:
    """The paths of the leaves, those within Flax's variables as of the variables."""
    value = jax.tree_util.GetAttrKey("value")
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    return [path[:-1] if path[-1:] == (value,) else path for path in paths]
