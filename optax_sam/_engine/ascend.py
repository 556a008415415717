"""Whose examples ascend together: those of all devices, of a device, a micro-batch.

Where several ascend each for themselves, all start from the ascent's state before the
step. It then advances once, by all examples along the mean of the clean gradients.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import optax

from optax_sam._base.devices import Devices
from optax_sam._engine import micro_batches, protocol
from optax_sam._engine.passes import Ascended, Passes, two_passes


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to be made, of which any examples may make their own passes.

    Attributes:
      ascend: From `(gradient, params=..., **arguments)` to the perturbation and the
        ascent's new state.
      params: The parameters.
      gradient_at: From parameters to the gradient there, of this device's examples.
      arguments: The extra arguments of the step.
      devices: Those that share the batch.
    """

    ascend: Callable[..., Ascended]
    params: optax.Params
    gradient_at: Callable[[optax.Params], optax.Updates]
    arguments: dict[str, Any]
    devices: Devices

    def over_all(self, gradient: optax.Updates) -> tuple[Passes, optax.OptState]:
        """All examples ascend together, along the mean of the devices' gradients."""
        if "axis_name" not in self.arguments:
            gradient = self.devices.mean(self.devices.own("grads", gradient))
        return two_passes(
            self._ascend_together,
            gradient,
            self.params,
            lambda p: self.devices.mean(self.gradient_at(self.devices.vary(p))),
        )

    def over_devices(self, gradient: optax.Updates) -> tuple[Passes, optax.OptState]:
        """The examples of each device ascend for themselves."""
        if "axis_name" in self.arguments:  # Then this gradient is a mean already.
            losses, pullback = map(self.arguments.get, ("losses", "pullback"))
            protocol.require(
                "sharpness_aware: sync_ascent=False", losses=losses, pullback=pullback
            )
            clean = protocol.clean_arguments(losses, pullback)  # type: ignore[arg-type]
        else:
            clean = {"grad": gradient}
        self.devices.own("grads", clean["grad"])
        return self._advance(self._alone(clean, self.gradient_at))

    def over_micro_batches(
        self, size: int, at_once: int | None
    ) -> tuple[Passes, optax.OptState]:
        """The examples of each micro-batch ascend for themselves."""
        batch = self.arguments["batch"]
        # They share the scores of parameters.
        arguments = {"scoring_batch": batch} | self.arguments
        step = dataclasses.replace(self, arguments=arguments)
        passes = micro_batches.mean(
            step._over_micro_batch,
            micro_batches.split(batch, size, at_once, self.devices),
            self.devices.vary(self.params),
        )
        return step._advance(passes)

    def _over_micro_batch(self, batch: Any) -> Passes:
        loss_fn = self.arguments["loss_fn"]
        clean_fn = self.arguments.get("ascent_loss_fn", loss_fn)
        clean_fn = protocol.checked("loss_fn", clean_fn, "params", "batch")
        params = self.devices.vary(self.params)
        losses, pullback = protocol.pass_over(batch, clean_fn, params)
        return self._alone(
            {"batch": batch} | protocol.clean_arguments(losses, pullback),
            protocol.gradient_function(loss_fn, batch, None),
        )

    def _alone(
        self,
        clean: dict[str, Any],
        gradient_at: Callable[[optax.Params], optax.Updates],
    ) -> Passes:
        """The passes over examples of which `clean` describes the clean pass."""
        arguments = self.arguments | clean
        arguments |= protocol.given(scoring_axis_name=self.devices.axis_name)
        arguments.pop("axis_name", None)
        params = self.devices.vary(self.params)
        ascend = partial(self.ascend, params=params, **arguments)
        return two_passes(ascend, clean["grad"], params, gradient_at)[0]

    def _advance(self, passes: Passes) -> tuple[Passes, optax.OptState]:
        """The mean over devices, and the state after it."""
        clean, gradient, finite = passes
        clean, gradient = self.devices.mean((clean, gradient))
        passes = Passes(clean, gradient, self.devices.all(finite))
        return passes, self._ascend_together(clean)[1]

    def _ascend_together(self, gradient: optax.Updates) -> Ascended:
        arguments = self.arguments | protocol.given(axis_name=self.devices.axis_name)
        return self.ascend(gradient, params=self.params, **arguments)
