"""Sharpness-aware training as composable Optax gradient transformations."""

from optax_sam import diagnostics
from optax_sam._adaptive import AdaptToScaleState, adapt_to_scale
from optax_sam._alias import (
    asam,
    dynamic_sparse_sam,
    m_sam,
    rw_sam,
    sam,
    sparse_sam,
    vasso,
)
from optax_sam._dynamic import SparsifyDynamicallyState, sparsify_dynamically
from optax_sam._engine import SharpnessAwareState, sharpness_aware
from optax_sam._fisher import fisher_diagonal
from optax_sam._pattern import n_m, structured, unstructured
from optax_sam._radius import ScaleToRadiusState, scale_to_radius
from optax_sam._reweight import ReweightBySharpnessState, reweight_by_sharpness
from optax_sam._sparse import SparsifyByFisherState, sparsify_by_fisher
from optax_sam._static import choose_layers, perturb_only, select_layers
from optax_sam._step import value_and_update
from optax_sam._variance import SuppressVarianceState, suppress_variance

__version__ = "0.1.0"

__all__ = [
    "AdaptToScaleState",
    "ReweightBySharpnessState",
    "ScaleToRadiusState",
    "SharpnessAwareState",
    "SparsifyByFisherState",
    "SparsifyDynamicallyState",
    "SuppressVarianceState",
    "adapt_to_scale",
    "asam",
    "choose_layers",
    "diagnostics",
    "dynamic_sparse_sam",
    "fisher_diagonal",
    "m_sam",
    "n_m",
    "perturb_only",
    "reweight_by_sharpness",
    "rw_sam",
    "sam",
    "scale_to_radius",
    "select_layers",
    "sharpness_aware",
    "sparse_sam",
    "sparsify_by_fisher",
    "sparsify_dynamically",
    "structured",
    "suppress_variance",
    "unstructured",
    "value_and_update",
    "vasso",
]
