"""Sharpness-aware training as composable Optax gradient transformations."""

from optax_sam import diagnostics
from optax_sam._ascents.asam import AdaptToScaleState, adapt_to_scale, asam
from optax_sam._ascents.rw_sam import (
    ReweightBySharpnessState,
    reweight_by_sharpness,
    rw_sam,
)
from optax_sam._ascents.sam import ScaleToRadiusState, m_sam, sam, scale_to_radius
from optax_sam._ascents.sparse_dynamic import (
    SparsifyDynamicallyState,
    dynamic_sparse_sam,
    sparsify_dynamically,
)
from optax_sam._ascents.sparse_fisher import (
    SparsifyByFisherState,
    sparse_sam,
    sparsify_by_fisher,
)
from optax_sam._ascents.static import choose_layers, perturb_only, select_layers
from optax_sam._ascents.vasso import SuppressVarianceState, suppress_variance, vasso
from optax_sam._engine.sharpness_aware import SharpnessAwareState, sharpness_aware
from optax_sam._engine.value_and_update import value_and_update
from optax_sam._masks.fisher import fisher_diagonal
from optax_sam._masks.patterns import n_m, structured, unstructured

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
