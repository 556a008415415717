"""RW-SAM over its hyperparameters, beside SAM and m-SAM."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

import optax_sam
from sam_examples.study.configurations import CONFIGURATIONS, SAM, SGD, Configuration

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


REWEIGHTING: Mapping[str, Configuration] = {
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
