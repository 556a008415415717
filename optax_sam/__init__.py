"""Sharpness-aware training as composable Optax gradient transformations.

Start with `value_and_update(loss_fn, tx)`, the training step of any Optax optimizer,
and with a method around the optimizer that moves the parameters, such as
`tx = sam(optax.sgd(0.1), rho=0.05)`:

* `sam`, `asam`, `vasso`, `friendly_sam`, `sparse_sam`, `dynamic_sparse_sam`, `rw_sam`,
  `m_sam`, `gsam` and `wsam`, which descend in another way, `look_sam`, which ascends in
  some steps only, and `momentum_sam`, of which a step costs one gradient.

To combine methods, chain their ascents, `sharpness_aware(base, optax.chain(...))`, in
the order of this list:

* `reweight_by_sharpness` (RW-SAM), `suppress_variance` (VaSSO) or
  `remove_common_direction` (Friendly SAM); or `follow_momentum` (Momentum-SAM, with a
  length of its own) or `follow_average`, which read no gradient,
* `scale_to_radius` (SAM) or `adapt_to_scale` (ASAM),
* `sparsify_by_fisher`, `sparsify_dynamically` (Sparse SAM); before all of them
  `perturb_only`, with a mask by `select_layers` or `choose_layers`.

`gap_descent` (GSAM), `weighted_descent` (WSAM), `reuse_ascent` (LookSAM) and
`keep_average` are first links of the base, for any ascent. `every` and `between` say
when to ascend. A loss in two parts, by `functional_loss`, makes any of them Functional
SAM.

Masks for Sparse SAM come from a pattern, `unstructured`, `structured` or `n_m`, of
scores such as `fisher_diagonal`.

`optax_sam.diagnostics` measures sharpness, `optax_sam.flax` has the steps of NNX and of
linen's `TrainState`, and `optax_sam.implicit` sparse backward passes of Flax layers.
What a function takes and returns is in its own help, `help(optax_sam.sam)`.
"""

from optax_sam import diagnostics
from optax_sam._ascents.asam import AdaptToScaleState, adapt_to_scale, asam
from optax_sam._ascents.friendly_sam import (
    RemoveCommonDirectionState,
    friendly_sam,
    remove_common_direction,
)
from optax_sam._ascents.momentum_sam import (
    FollowMomentumState,
    follow_momentum,
    momentum_sam,
)
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
from optax_sam._ascents.vasso import (
    FollowAverageState,
    KeepAverageState,
    SuppressVarianceState,
    follow_average,
    keep_average,
    suppress_variance,
    vasso,
)
from optax_sam._descents.functional_sam import functional_loss
from optax_sam._descents.gsam import GapDescentState, gap_descent, gsam
from optax_sam._descents.look_sam import ReuseAscentState, look_sam, reuse_ascent
from optax_sam._descents.wsam import WeightedDescentState, weighted_descent, wsam
from optax_sam._engine.sharpness_aware import sharpness_aware
from optax_sam._engine.states import SharpnessAwareState
from optax_sam._engine.value_and_update import value_and_update
from optax_sam._engine.when import between, every
from optax_sam._masks.fisher import fisher_diagonal
from optax_sam._masks.patterns import n_m, structured, unstructured

__version__ = "0.1.0"

__all__ = [
    "AdaptToScaleState",
    "FollowAverageState",
    "FollowMomentumState",
    "GapDescentState",
    "KeepAverageState",
    "RemoveCommonDirectionState",
    "ReuseAscentState",
    "ReweightBySharpnessState",
    "ScaleToRadiusState",
    "SharpnessAwareState",
    "SparsifyByFisherState",
    "SparsifyDynamicallyState",
    "SuppressVarianceState",
    "WeightedDescentState",
    "adapt_to_scale",
    "asam",
    "between",
    "choose_layers",
    "diagnostics",
    "dynamic_sparse_sam",
    "every",
    "fisher_diagonal",
    "follow_average",
    "follow_momentum",
    "friendly_sam",
    "functional_loss",
    "gap_descent",
    "gsam",
    "keep_average",
    "look_sam",
    "m_sam",
    "momentum_sam",
    "n_m",
    "perturb_only",
    "remove_common_direction",
    "reuse_ascent",
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
    "weighted_descent",
    "wsam",
]
