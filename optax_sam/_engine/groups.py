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
from optax_sam._base.checks import called
from optax_sam._base.devices import Devices
from optax_sam._engine import protocol

_OWNER = "sharpness_aware"  # Unless an alias was called.


class Group(NamedTuple):
    """Examples that ascend together.

    Attributes:
      clean: What the clean pass has found at `params`; losses and auxiliary data only
        if it is one of their own.
      pass_at: From parameters to what a pass finds there.
      params: The parameters; a device's own where it ascends for itself.
      arguments: The extra arguments of their ascent.
    """

    clean: protocol.Pass
    pass_at: Callable[[optax.Params], protocol.Pass]
    params: optax.Params
    arguments: dict[str, Any]

    @property
    def descends_by_clean_pass(self) -> bool:
        """Whether the perturbed pass takes a derivative from the clean one."""
        loss_fn = self.arguments.get("loss_fn")
        return loss_fn is not None and loss_fn.of_outputs is not None

    def known_to_base(
        self, perturbed: protocol.Pass, moves_if_finite: bool
    ) -> protocol.Pass:
        """The clean pass with the gradient that the base is told as `grad`.

        Where that is not finite, the gradient at the perturbed parameters stands for
        it: the same one, if nothing is perturbed then and both are of one function. A
        transformation around the step may have changed the one that ascends.
        """
        grad = self.arguments.get("grad", self.clean.gradient)
        pairs = zip(*map(jax.tree.leaves, (grad, self.clean.gradient)), strict=True)
        is_other = {"ascent_loss_fn", "grad_fn"} & self.arguments.keys()
        if not (moves_if_finite and not is_other and all(a is b for a, b in pairs)):
            finite = trees.all_finite(grad)  # Also of what the ascent has not read.
            grad = jax.tree.map(
                lambda a, b: jnp.where(finite, a, b), grad, perturbed.gradient
            )
        return self.clean._replace(gradient=grad)


class Passes(NamedTuple):
    """What the two passes of one group, or of all on average, have given.

    Attributes:
      clean: Gradient and loss at the parameters.
      perturbed: Gradient and loss at the perturbed parameters.
      ascent_state: The ascent's state after them.
      finite: Whether what the ascent read was finite, a bool scalar.
      found: Losses and auxiliary data to report, if not those of the clean pass of all.
        Of each group at first, `[rounds, groups, ...]` of several.
    """

    clean: protocol.Pass
    perturbed: protocol.Pass
    ascent_state: optax.OptState
    finite: jax.Array
    found: chex.ArrayTree = None

    @classmethod
    def of(
        cls,
        clean: protocol.Pass,
        perturbed: protocol.Pass,
        ascent_state: optax.OptState,
        finite: jax.Array,
        reported: protocol.Pass,
    ) -> "Passes":
        """Those of a group, one of which is reported."""
        clean, perturbed = (p._replace(found=None) for p in (clean, perturbed))
        return cls(clean, perturbed, ascent_state, finite, reported.arrays)

    @property
    def losses(self) -> tuple[Any, Any]:
        """The mean losses of both passes, zeros unless both are known."""
        found = self.clean.loss, self.perturbed.loss
        return (0.0, 0.0) if None in found else found

    def for_base(
        self, arguments: dict[str, Any], ascends: jax.Array | bool | None
    ) -> dict[str, Any]:
        """The extra arguments of the base: among them `grad`, the clean gradient.

        With a condition of when to ascend, `ascended` says whether the step has.
        """
        told = {} if ascends is None else {"ascended": self.finite & ascends}
        return arguments | {"grad": self.clean.gradient} | told


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a step, to be grouped.

    Attributes:
      params: The parameters, the same on all devices.
      pass_at: From parameters to a pass over this device's examples.
      arguments: The extra arguments of the step, without an axis.
      devices: Those that share the batch.
      averaged: Whether the gradient that the update is called with is the mean over
        devices, rather than a device's own.
    """

    params: optax.Params
    pass_at: Callable[[optax.Params], protocol.Pass]
    arguments: dict[str, Any]
    devices: Devices
    averaged: bool

    @classmethod
    def of_step(
        cls, params: optax.Params, arguments: Any, devices: Devices, averaged: bool
    ) -> "Examples":
        """The examples of an update, by what it is called with."""
        pass_at = protocol.pass_function(devices.vary(params), **arguments)
        if not averaged:
            own = {name: arguments.get(name) for name in ("value", "grad")}
            arguments |= devices.mean(protocol.given(**own))
        return cls(params, pass_at, arguments, devices, averaged)

    def are_one_group(self, size: int | None) -> bool:
        """Whether all of them fit into a group of this size."""
        if size is None:
            return True
        batch, devices = self.arguments["batch"], self.devices
        return batching.count(called(_OWNER), batch) * devices.size() == size

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

        def pass_at(params: optax.Params) -> protocol.Pass:
            own = self.pass_at(self.devices.vary(params))
            gradient, loss = self.devices.mean((own.gradient, own.loss))
            return own._replace(gradient=gradient, loss=loss)

        clean = protocol.Pass(gradient, self._clean_loss())
        return Group(clean, pass_at, self.params, self.shared_arguments)

    def _clean_loss(self) -> jax.Array | None:
        """The clean mean loss, if the step knows it and that of the other pass."""
        given = {"losses", "value"} & self.arguments.keys()
        if "grad_fn" in self.arguments or not given:
            return None
        if "value" in given:
            return jnp.asarray(self.arguments["value"], float)
        mean: jax.Array = self.devices.mean(losses.mean_loss(self.arguments["losses"]))
        return mean

    @property
    def shared_arguments(self) -> dict[str, Any]:
        """The extra arguments of what concerns the examples of all devices."""
        return self.arguments | protocol.given(axis_name=self.devices.axis_name)

    def all_together(
        self, passes_of: Callable[..., Passes], gradient: optax.Updates
    ) -> Passes:
        """The passes over all examples, which ascend together."""
        return self._finding(_put_in, passes_of(self.all(gradient)))

    def of_device(self, gradient: optax.Updates) -> Group:
        """The examples of this device."""
        draws = getattr(self.arguments.get("loss_fn"), "draws", False)
        if draws and self.devices.size() > 1:
            return self.of_part(self.arguments["batch"], self.devices.index())
        clean = {"grad": gradient}
        if self.averaged:
            given, pullback = map(self.arguments.get, ("losses", "pullback"))
            owner = f"{called(_OWNER)}: sync_ascent=False"
            protocol.require(owner, losses=given, pullback=pullback)
            clean = losses.clean_pass(given, pullback)._asdict()  # type: ignore[arg-type]
        self.devices.own("grads", clean["grad"])
        return self._alone(self.arguments | clean, self.pass_at)

    def of_part(self, batch: Any, number: Any, size: int | None = None) -> Group:
        """The examples of a part of the batch, the number-th of many, if not None."""
        names = ("loss_fn", "ascent_loss_fn")
        named = {n: self.arguments[n] for n in names if n in self.arguments}
        own = {n: fn.of_group(number) for n, fn in named.items()}
        loss_fn = own["loss_fn"].of_group(None, size)
        clean_fn = own.get("ascent_loss_fn", loss_fn)
        own_params = self.devices.vary(self.params)
        found, pullback, aux, derivative = clean_fn.linearise(own_params, batch)
        clean = losses.clean_pass(found, pullback)
        if clean_fn is loss_fn:
            loss_fn = loss_fn.taking(derivative)
        # All parts score by the draws of the whole batch.
        scoring = {"scoring_loss_fn": named["loss_fn"]}
        group = self._alone(
            scoring | self.arguments | own | {"batch": batch} | clean._asdict(),
            protocol.pass_function(own_params, loss_fn, batch),
        )
        return group._replace(clean=group.clean._replace(found=(found, aux)))

    def _alone(
        self,
        arguments: dict[str, Any],
        pass_at: Callable[[optax.Params], protocol.Pass],
    ) -> Group:
        """Examples of this device, which know of the others for their scores only."""
        scoring = protocol.given(scoring_axis_name=self.devices.axis_name)
        # A loss beside a gradient that is given would not be that of both passes.
        loss = None if "grad_fn" in arguments else arguments.get("value")
        clean = protocol.Pass(*self.devices.vary((arguments["grad"], loss)))
        own_params = self.devices.vary(self.params)
        return Group(clean, pass_at, own_params, arguments | scoring)

    def each_alone(
        self,
        passes_of: Callable[..., Passes],
        gradient: optax.Updates,
        size: int | None,
        at_once: int | None,
    ) -> Passes:
        """The mean of passes over groups of a size, those of a device without one."""
        always = jnp.ones([], bool)  # What becomes of their states, nobody reads.
        if size is None:
            passes = passes_of(self.of_device(gradient), always)
            found = jax.tree.map(lambda x: x[None, None], passes.found)
            passes = passes._replace(found=found)
        else:
            batch = self.arguments["batch"]
            owner = called(_OWNER)
            parts = batching.split(owner, batch, size, at_once, self.devices)
            passes = _mean(
                lambda part: passes_of(self.of_part(part[0], part[1], size), always),
                (parts, self._numbers(parts)),
                self.devices.vary(self.params),
            )
        clean, perturbed = self.devices.mean((passes.clean, passes.perturbed))
        finite = self.devices.all(passes.finite)
        passes = Passes(clean, perturbed, passes.ascent_state, finite, passes.found)
        return self._finding(batching.together, passes)

    def _numbers(self, parts: Any) -> Any:
        """Where in the batch of all devices each part is, None for the only one."""
        numbers = batching.numbers(parts)
        if numbers.size * self.devices.size() == 1:
            return None
        return numbers + self.devices.index() * numbers.size

    def _finding(self, merge: Callable[..., Any], passes: Passes) -> Passes:
        """The same, with what was found as it is to be reported, if it is."""
        report = self.arguments.get("report")
        if report is None or passes.found is None:
            return passes._replace(found=None)
        whole = report.losses, report.aux
        return passes._replace(found=merge(whole, passes.found))

    def as_found(self, passes: Passes) -> dict[str, Any]:
        """The extra arguments, with what groups found in clean passes of their own.

        It is reported. Nothing of the clean pass of all together is then read, nor
        computed.
        """
        if passes.found is None:
            return self.shared_arguments
        report = self.arguments["report"]
        found, aux = passes.found
        value = self.devices.mean(losses.mean_loss(found))
        report(value, aux)
        return self.shared_arguments | {"losses": found, "value": value}


def _put_in(whole: chex.ArrayTree, arrays: chex.ArrayTree) -> chex.ArrayTree:
    """A tree with its arrays replaced by those of another."""
    return jax.tree.map(lambda x, own: x if own is None else own, whole, arrays)


def _mean(
    passes_of: Callable[[Any], Passes], micro_batches: Any, like: optax.Params
) -> Passes:
    """The mean of passes over micro-batches `[rounds, at_once, size, ...]`.

    The sums are in float32 or wider, the means in the dtypes of `like`. What micro-
    batches found stays apart, `[rounds, at_once, ...]`. The state is nobody's, and not
    computed.
    """

    def over_round(round_: Any) -> tuple[chex.ArrayTree, Any]:
        passes = batching.side_by_side(passes_of, round_)
        clean, perturbed = passes.clean, passes.perturbed
        others = jnp.all(passes.finite), (clean.loss, perturbed.loss), passes.found
        return jax.tree.map(_sum, (clean.gradient, perturbed.gradient)), others

    def step(total: chex.ArrayTree, round_: Any) -> tuple[Any, Any]:
        new, others = over_round(round_)
        return jax.tree.map(jnp.add, total, new), others

    rounds, at_once = jax.tree.leaves(micro_batches)[0].shape[:2]
    if rounds == 1:
        total, others = over_round(jax.tree.map(lambda x: x[0], micro_batches))
        others = jax.tree.map(lambda x: x[None], others)
    else:
        zeros = jax.tree.map(lambda p: _sum(jnp.zeros_like(p)[None]), like)
        total, others = jax.lax.scan(step, (zeros, zeros), micro_batches)
    finite, losses_, found = others
    gradients = jax.tree.map(lambda x: x / (rounds * at_once), total)
    clean, perturbed = (
        protocol.Pass(trees.cast_like(gradient, like), jnp.mean(loss))
        for gradient, loss in zip(gradients, losses_, strict=True)
    )
    return Passes(clean, perturbed, None, jnp.all(finite), found)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, dtype=trees.accumulator_dtype(x.dtype))
