"""Test accuracy of RW-SAM over its hyperparameters, beside SAM and m-SAM."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optax

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import trade_off
from sam_examples.benchmarking.configurations import (
    CONFIGURATIONS,
    SAM,
    SGD,
    Configuration,
)

import optax_sam

REWEIGHTED, MICRO_BATCHES = "reweighted", "micro-batches"
STRENGTHS = {False: (0.03, 0.1, 0.3), True: (0.3, 1.0, 3.0)}  # By normalize.
PROBES = (1, 4)
SIZES = (32, 16, 8, 4)


def reweighted(strength: float, num_probes: int, normalize: bool) -> Configuration:
    """RW-SAM."""

    def make_ascent(
        rho: Any, num_steps: int, epoch_steps: int
    ) -> optax.GradientTransformation:
        reweight = optax_sam.reweight_by_sharpness(
            strength, key=0, num_probes=num_probes, normalize=normalize
        )
        return optax.chain(reweight, optax_sam.scale_to_radius(rho))

    return Configuration(REWEIGHTED, make_ascent)


ROWS: Mapping[str, Configuration] = {
    SGD: CONFIGURATIONS[SGD],
    SAM: CONFIGURATIONS[SAM],
    **{
        f"RW-SAM, strength {strength:g}{' normalized' if normalize else ''}, "
        f"{probes} probe{'s' if probes > 1 else ''}": reweighted(
            strength, probes, normalize
        )
        for normalize, strengths in STRENGTHS.items()
        for strength in strengths
        for probes in PROBES
    },
    **{
        f"m-SAM, m = {size}": dataclasses.replace(
            CONFIGURATIONS[SAM], kind=MICRO_BATCHES, micro_batch_size=size
        )
        for size in SIZES
    },
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the study that the command line asks for."""
    trade_off.run(
        args,
        ROWS,
        purpose="Measures what RW-SAM gains over SAM, for hyperparameters in a grid.",
        name="reweight-accuracy",
        title="RW-SAM and m-SAM, a network",
    )


if __name__ == "__main__":
    main()
