"""Who ascends together: all examples, those of each device, or each micro-batch.

Where several groups ascend, each for itself, all start from the ascent's state before
the step. It then advances once, by all examples along the mean of the clean gradients.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import batching, losses, trees
from optax_sam._base.checks import checked
from optax_sam._base.devices import Devices
from optax_sam._engine import protocol

_OWNER = "sharpness_aware"


class Group(NamedTuple):
    """Examples that ascend together.

    Attributes:
      gradient: Their clean gradient, at `params`.
      gradient_at: From parameters to their gradient there.
      params: The parameters; a device's own where it ascends for itself.
      arguments: The extra arguments of their ascent.
    """

    gradient: optax.Updates
    gradient_at: Callable[[optax.Params], optax.Updates]
    params: optax.Params
    arguments: dict[str, Any]


class Passes(NamedTuple):
    """What the two passes of one group, or of all on average, have given.

    Attributes:
      clean_gradient: The gradient at the parameters.
      gradient: The gradient at the perturbed parameters.
      ascent_state: The ascent's new state, which counts only if finite.
      finite: Whether what the ascent read was finite, a bool scalar.
    """

    clean_gradient: optax.Updates
    gradient: optax.Updates
    ascent_state: optax.OptState
    finite: jax.Array


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a step, to be grouped.

    Attributes:
      params: The parameters, the same on all devices.
      gradient_at: From parameters to the gradient of this device's examples.
      arguments: The extra arguments of the step, without an axis.
      devices: Those that share the batch.
      averaged: Whether the gradient that the update is called with is the mean over
        devices, rather than a device's own.
    """

    params: optax.Params
    gradient_at: Callable[[optax.Params], optax.Updates]
    arguments: dict[str, Any]
    devices: Devices
    averaged: bool

    @classmethod
    def of_step(
        cls, params: optax.Params, arguments: Any, devices: Devices, averaged: bool
    ) -> "Examples":
        """The examples of an update, by what it is called with."""
        gradient_at = protocol.gradient_function(**arguments)
        if not averaged:
            own = {name: arguments.get(name) for name in ("value", "grad")}
            arguments |= devices.mean(protocol.given(**own))
        return cls(params, gradient_at, arguments, devices, averaged)

    def are_one_group(self, size: int | None) -> bool:
        """Whether all of them fit into a group of this size."""
        if size is None:
            return True
        batch, devices = self.arguments["batch"], self.devices
        return batching.count(_OWNER, batch) * devices.size() == size

    def sharing_scores(self, size: int | None) -> "Examples":
        """The same, so that groups of a size score parameters by all of them."""
        if size is None:
            return self
        arguments = {"scoring_batch": self.arguments["batch"]} | self.arguments
        return dataclasses.replace(self, arguments=arguments)

    def all(self, gradient: optax.Updates) -> Group:
        """All examples, those of all devices."""
        if not self.averaged:
            gradient = self.devices.mean(self.devices.own("grads", gradient))
        return Group(
            gradient,
            lambda p: self.devices.mean(self.gradient_at(self.devices.vary(p))),
            self.params,
            self.shared_arguments,
        )

    @property
    def shared_arguments(self) -> dict[str, Any]:
        """The extra arguments of what concerns the examples of all devices."""
        return self.arguments | protocol.given(axis_name=self.devices.axis_name)

    def of_device(self, gradient: optax.Updates) -> Group:
        """The examples of this device."""
        clean = {"grad": gradient}
        if self.averaged:
            given, pullback = map(self.arguments.get, ("losses", "pullback"))
            owner = f"{_OWNER}: sync_ascent=False"
            protocol.require(owner, losses=given, pullback=pullback)
            clean = losses.clean_pass(given, pullback)._asdict()  # type: ignore[arg-type]
        self.devices.own("grads", clean["grad"])
        return self._alone(self.arguments | clean, self.gradient_at)

    def of_micro_batch(self, batch: Any) -> Group:
        """The examples of a micro-batch of this device."""
        loss_fn = self.arguments["loss_fn"]
        clean_fn = self.arguments.get("ascent_loss_fn", loss_fn)
        clean_fn = checked("loss_fn", clean_fn, "params", "batch")
        own_params = self.devices.vary(self.params)
        clean = losses.clean_pass(*losses.of_batch(clean_fn, own_params, batch))
        return self._alone(
            self.arguments | {"batch": batch} | clean._asdict(),
            protocol.gradient_function(loss_fn, batch),
        )

    def _alone(
        self,
        arguments: dict[str, Any],
        gradient_at: Callable[[optax.Params], optax.Updates],
    ) -> Group:
        """Examples of this device, which know of the others for their scores only."""
        scoring = protocol.given(scoring_axis_name=self.devices.axis_name)
        own_params = self.devices.vary(self.params)
        return Group(arguments["grad"], gradient_at, own_params, arguments | scoring)

    def each_alone(
        self,
        two_passes: Callable[[Group], Passes],
        gradient: optax.Updates,
        size: int | None,
        at_once: int | None,
    ) -> Passes:
        """The mean of passes over groups of a size, those of a device without one."""
        if size is None:
            passes = two_passes(self.of_device(gradient))
        else:
            batch = self.arguments["batch"]
            parts = batching.split(_OWNER, batch, size, at_once, self.devices)
            passes = _mean(
                lambda part: two_passes(self.of_micro_batch(part)),
                parts,
                self.devices.vary(self.params),
            )
        clean, gradient = self.devices.mean((passes.clean_gradient, passes.gradient))
        finite = self.devices.all(passes.finite)
        return Passes(clean, gradient, passes.ascent_state, finite)


def _mean(
    two_passes: Callable[[Any], Passes], micro_batches: Any, like: optax.Params
) -> Passes:
    """The mean of passes over micro-batches `[rounds, at_once, size, ...]`.

    The sums are in float32 or wider, the means in the dtypes of `like`. The state is
    nobody's, and not computed.
    """

    def over_round(round_: Any) -> tuple[chex.ArrayTree, jax.Array]:
        clean, gradient, _, finite = batching.side_by_side(two_passes, round_)
        return jax.tree.map(_sum, (clean, gradient)), jnp.all(finite)

    def step(total: chex.ArrayTree, round_: Any) -> tuple[Any, jax.Array]:
        new, finite = over_round(round_)
        return jax.tree.map(jnp.add, total, new), finite

    rounds, at_once = jax.tree.leaves(micro_batches)[0].shape[:2]
    if rounds == 1:
        total, finite = over_round(jax.tree.map(lambda x: x[0], micro_batches))
    else:
        zeros = jax.tree.map(lambda p: _sum(jnp.zeros_like(p)[None]), like)
        total, finite = jax.lax.scan(step, (zeros, zeros), micro_batches)
    means = jax.tree.map(lambda x: x / (rounds * at_once), total)
    clean, gradient = (trees.cast_like(tree, like) for tree in means)
    return Passes(clean, gradient, None, jnp.all(finite))


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, dtype=trees.accumulator_dtype(x.dtype))
