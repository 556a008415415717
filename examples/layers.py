"""Layers of a network, scored by Fisher information and chosen by score and cost."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from data import Dataset, Split, normalize
from training import TrainState, make_scoring_loss_fn

import optax_sam


class Chooser:
    """Chooses the layers to perturb, each a convolution, normalisation or head.

    Attributes:
      cost: multiplications in the gradient of each layer's weights, by its path; they
        are what the clean pass saves by leaving the layer out.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        state: TrainState,
        *,
        sparsity: float,
        num_examples: int,
    ) -> None:
        """Counts what the gradients of the layers cost.

        Args:
          model: called as `model(images, train=...)`.
          dataset: its first training images are scored.
          state: says what layers there are.
          sparsity: share of the cost to leave out, at least.
          num_examples: how many images are scored.
        """
        images, labels = (x[:num_examples] for x in dataset.train)
        images = normalize(jnp.asarray(images), dataset.mean, dataset.std)
        batch = Split(images, jnp.asarray(labels))
        loss_fn = make_scoring_loss_fn(model)

        def scores(params: Any, batch_stats: Any) -> Any:
            # Nothing is drawn in evaluation mode: any key will do.
            key = jax.random.key(0)
            return optax_sam.fisher_diagonal(
                lambda params, batch: loss_fn(params, batch, batch_stats, key),
                params,
                batch,
            )

        self._scores = jax.jit(scores)
        self._sparsity = sparsity
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        run = partial(model.apply, train=False, capture_intermediates=True)
        outputs = jax.eval_shape(run, variables, images)[1]["intermediates"]
        self._cost = jax.tree.map_with_path(
            partial(_gradient_cost, outputs), state.params, is_leaf=_is_layer
        )
        self.cost = {
            _name(path): cost for path, cost in jax.tree.leaves_with_path(self._cost)
        }

    def __call__(self, state: TrainState) -> Any:
        """A tree of Python bools: which parameters to perturb."""
        scores = self._scores(state.params, state.batch_stats)
        return optax_sam.choose_layers(scores, self._sparsity, cost=self._cost)


def _is_layer(node: Any) -> bool:
    """Whether this part of the parameters holds arrays, rather than more parts."""
    return isinstance(node, Mapping) and not any(
        isinstance(part, Mapping) for part in node.values()
    )


def _gradient_cost(outputs: Any, path: Any, layer: Any) -> float:
    """Multiplications in the gradient of a layer's weights."""
    for part in path:
        outputs = outputs[part.key]
    (output,) = outputs["__call__"]
    weights = sum(leaf.size for leaf in jax.tree.leaves(layer))
    return float(weights * output.size / output.shape[-1])


def layers_of(mask: Any) -> list[str]:
    """Paths of the layers that a mask selects."""
    return [
        _name(path)
        for path, layer in jax.tree.leaves_with_path(mask, is_leaf=_is_layer)
        if any(jax.tree.leaves(layer))
    ]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
