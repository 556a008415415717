"""How much the direction of VaSSO's ascent depends on the batch.

With `theta` 1 it is SAM's, the gradient of the batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_sam
from optax_sam import diagnostics
from sam_examples.data import Split
from sam_examples.study.cifar10 import Trainer
from sam_examples.study.contestants import Run
from sam_examples.training.step import TrainState

_BATCHES = 16


class DirectionTrainer(Trainer):
    """A trainer of VaSSO that also records its direction.

    * `cosine`, of the angle between those of a step and of the one before, the mean
      over the last epoch;
    * `relative_variance` and `mean_cosine` over batches at the final parameters, all
      from the same average of earlier gradients, see `diagnostics.ascent_stability`.
    """

    def observe(self, before: TrainState, after: TrainState) -> dict[str, jax.Array]:
        """The cosine of two directions, one after the other."""
        was, now = (
            optax.tree.get(state.opt_state, "direction") for state in (before, after)
        )
        norms = optax.tree.norm(was) * optax.tree.norm(now)
        # There is no direction before the first step.
        cosine = optax.tree.vdot(was, now) / jnp.maximum(norms, 1e-30)
        return {"cosine": cosine}

    def measure(self, run: Run, state: TrainState, split: Split) -> dict[str, float]:
        """Curvature, noise, and how the direction varies."""
        theta = dict(run.hyperparameters)["theta"]
        stability = self._stability(state, split, theta)
        return {
            **super().measure(run, state, split),
            "relative_variance": float(stability.relative_variance),
            "mean_cosine": float(stability.mean_cosine),
        }

    def _stability(self, state: TrainState, split: Split, theta: float) -> Any:
        loss_fn, _ = self.loss_fns("vasso")
        count = self.recipe.batch_size
        index = jnp.arange(_BATCHES * count).reshape(_BATCHES, count)

        @jax.jit
        def measure(state: TrainState, split: Split) -> diagnostics.AscentStability:
            batches = jax.vmap(lambda i: self.batch(split, i, jax.random.key(0)))(index)
            return diagnostics.ascent_stability(
                loss_fn,
                optax_sam.suppress_variance(theta),
                state.params,
                _average(state.opt_state),
                batches,
                state.batch_stats,
                has_aux=True,
            )

        return measure(state, split)


def _average(opt_state: Any) -> Any:
    """The state of the link of VaSSO, out of that of the optimizer."""
    is_average = lambda x: isinstance(x, optax_sam.SuppressVarianceState)  # noqa: E731
    leaves = jax.tree.leaves(opt_state, is_leaf=is_average)
    return next(filter(is_average, leaves))
