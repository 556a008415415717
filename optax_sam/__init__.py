"""Sharpness-aware training as composable Optax gradient transformations."""

from optax_sam._adaptive import AdaptToScaleState, adapt_to_scale
from optax_sam._alias import asam, sam, vasso
from optax_sam._engine import SharpnessAwareState, sharpness_aware
from optax_sam._radius import ScaleToRadiusState, scale_to_radius
from optax_sam._sparse import perturb_only
from optax_sam._step import value_and_update
from optax_sam._variance import SuppressVarianceState, suppress_variance

__version__ = "0.1.0"

__all__ = [
    "AdaptToScaleState",
    "ScaleToRadiusState",
    "SharpnessAwareState",
    "SuppressVarianceState",
    "adapt_to_scale",
    "asam",
    "perturb_only",
    "sam",
    "scale_to_radius",
    "sharpness_aware",
    "suppress_variance",
    "value_and_update",
    "vasso",
]
