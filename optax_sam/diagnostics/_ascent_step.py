"""One step of an ascent, as the engine takes it, without the descent."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._engine import passes, protocol
from optax_sam._engine.sharpness_aware import SharpnessAwareState
from optax_sam._engine.value_and_update import value_and_update


class Ascent(NamedTuple):
    """A step of an ascent: its perturbation, new state, and the losses that it read."""

    epsilon: optax.Updates
    state: optax.OptState
    losses: jax.Array


def ascent_step(
    loss_fn: Any, ascent: Any, has_aux: Any, ascent_loss_fn: Any, scoring_loss_fn: Any
) -> Callable[..., Ascent]:
    """The step of an ascent, `(params, state, *args)`, as the engine takes it."""
    ascent = protocol.as_transformation("ascent", ascent)

    def update(
        gradient: optax.Updates, state: optax.OptState, params: Any, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        def ascend(gradient: optax.Updates) -> tuple[optax.Updates, optax.OptState]:
            epsilon, new = ascent.update(gradient, state, params, **extra_args)
            return epsilon, new

        epsilon, new = ascend(gradient)
        finite = trees.all_finite(passes._read(ascend, gradient, epsilon, new))
        epsilon = trees.map_present(lambda e: passes._zero_unless(finite, e), epsilon)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return epsilon, (new, extra_args["losses"])

    step = value_and_update(
        loss_fn,
        optax.GradientTransformationExtraArgs(ascent.init, update),
        has_aux=has_aux,
        ascent_loss_fn=ascent_loss_fn,
        scoring_loss_fn=scoring_loss_fn,
    )

    def ascend(params: optax.Params, state: optax.OptState, *args: Any) -> Ascent:
        if isinstance(state, SharpnessAwareState):
            raise TypeError(
                "ascent_state is the state of the whole optimizer, SharpnessAwareState;"
                " pass its part opt_state.ascent_state."
            )
        expected = jax.eval_shape(ascent.init, params)
        sizes = [len(jax.tree.leaves(tree)) for tree in (state, expected)]
        if type(state) is not type(expected) or sizes[0] != sizes[1]:
            raise TypeError(
                f"ascent_state is not of this ascent: a {type(state).__name__} of "
                f"{sizes[0]} arrays, where it has a {type(expected).__name__} of "
                f"{sizes[1]}; pass the ascent that the optimizer was made with."
            )
        _, epsilon, (new, losses) = step(params, state, *args)
        return Ascent(epsilon, new, losses)

    return ascend
