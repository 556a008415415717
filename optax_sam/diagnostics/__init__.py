"""Measures of sharpness, curvature and noise, and loss surfaces.

Pure functions of a loss, parameters and a batch, to be called inside of `jax.jit`::

    from optax_sam import diagnostics

    @jax.jit
    def measure(params, batch):
        return diagnostics.top_eigenvalues(loss_fn, params, batch, count=3, key=0)

or outside of it: then the step of each loop is compiled once a call, and called from
Python. For convolutions on the CPU that is much faster, since XLA is many times slower
at their gradients inside of a loop. Elsewhere `jit` is better: it compiles once
for all calls, computes once what all products with a Hessian share, and holds the basis
of a Lanczos process once rather than twice.

They take what the optimizers take, `loss_fn(params, batch)` with the losses of the
examples or their mean, and the same pytrees of parameters. The work is done leaf by
leaf: parameters and batch may be sharded, what is as large as the parameters then is
too, and random numbers do not depend on it. Sums are in float32 or wider, whatever the
dtype of the parameters. They are written for `jit` with sharded arrays, not for the
inside of `jax.shard_map` or `jax.pmap`.

Losses of models with batch normalisation or dropout should be those in evaluation mode,
or close over one key, so that they are functions of the parameters alone.
"""

from optax_sam.diagnostics._ascent import (
    AscentMetrics,
    AscentStability,
    ascent_metrics,
    ascent_stability,
)
from optax_sam.diagnostics._hessian import (
    Estimate,
    hessian_trace,
    hessian_vector_product,
)
from optax_sam.diagnostics._noise import gradient_covariance_trace
from optax_sam.diagnostics._sharpness import average_sharpness, worst_case_sharpness
from optax_sam.diagnostics._spectrum import (
    Eigenpairs,
    SpectralDensity,
    smooth_density,
    spectral_density,
    top_eigenvalues,
)
from optax_sam.diagnostics._surface import filter_normalized_directions, loss_surface

__all__ = [
    "AscentMetrics",
    "AscentStability",
    "Eigenpairs",
    "Estimate",
    "SpectralDensity",
    "ascent_metrics",
    "ascent_stability",
    "average_sharpness",
    "filter_normalized_directions",
    "gradient_covariance_trace",
    "hessian_trace",
    "hessian_vector_product",
    "loss_surface",
    "smooth_density",
    "spectral_density",
    "top_eigenvalues",
    "worst_case_sharpness",
]
