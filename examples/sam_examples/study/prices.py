"""Methods by what a step costs: two gradients, one, or a second one now and then."""

from collections.abc import Callable, Mapping
from typing import Any

import optax

import optax_sam
from sam_examples.study.configurations import (
    CONFIGURATIONS,
    SAM,
    SGD,
    Configuration,
    MakeAscent,
)

TWO, ONE, SOME = "two gradients", "one gradient", "two in some steps"
_FIRST_LAYERS = "stem, first stage, quarter of the examples"


def _ascent(*before: optax.GradientTransformation) -> MakeAscent:
    """The links, then the radius."""
    return lambda rho, num_steps, epoch_steps: optax.chain(
        *before, optax_sam.scale_to_radius(rho)
    )


def _along_momentum(
    rho: Any, num_steps: int, epoch_steps: int
) -> optax.GradientTransformation:
    return optax_sam.follow_momentum(rho)


def _every(k: int) -> Callable[[int], Any]:
    return lambda num_steps: optax_sam.every(k)


def _late(num_steps: int) -> Any:
    return optax_sam.between(num_steps // 2)


def _early(num_steps: int) -> Any:
    return optax_sam.between(0, num_steps // 2 - 1)


PRICES: Mapping[str, Configuration] = {
    SGD: CONFIGURATIONS[SGD],
    SAM: Configuration(TWO, _ascent()),
    **{
        f"VaSSO, theta {theta:g}": Configuration(
            TWO, _ascent(optax_sam.suppress_variance(theta))
        )
        for theta in (0.4, 0.9)
    },
    **{
        f"Friendly SAM, sigma {sigma:g}": Configuration(
            TWO, _ascent(optax_sam.remove_common_direction(sigma))
        )
        for sigma in (0.5, 1.0)
    },
    **{
        f"GSAM, alpha {alpha:g}": Configuration(
            TWO, _ascent(), descent=optax_sam.gap_descent(alpha)
        )
        for alpha in (0.05, 0.2)
    },
    **{
        f"WSAM, gamma {gamma:g}": Configuration(
            TWO, _ascent(), descent=optax_sam.weighted_descent(gamma)
        )
        for gamma in (0.6, 0.8)
    },
    "Momentum-SAM": Configuration(ONE, _along_momentum),
    **{
        f"VaSSO of one pass, theta {theta:g}": Configuration(
            ONE,
            _ascent(optax_sam.follow_average()),
            descent=optax_sam.keep_average(theta),
        )
        for theta in (0.1, 0.4)
    },
    **{
        f"LookSAM-{k}, alpha {alpha:g}": Configuration(
            SOME,
            _ascent(),
            descent=optax_sam.reuse_ascent(alpha),
            ascend_when=_every(k),
        )
        for k in (2, 3, 5)
        for alpha in (0.3, 0.7)
    },
    "SAM, every 2nd step": Configuration(SOME, _ascent(), ascend_when=_every(2)),
    "SAM, every 5th step": Configuration(SOME, _ascent(), ascend_when=_every(5)),
    "SAM, early half": Configuration(SOME, _ascent(), ascend_when=_early),
    "SAM, late half": Configuration(SOME, _ascent(), ascend_when=_late),
    _FIRST_LAYERS: CONFIGURATIONS[_FIRST_LAYERS],
}
