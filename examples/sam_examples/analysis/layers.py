"""Layers of a network, scored by Fisher information and chosen by score and cost."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import optax_sam
from sam_examples.data import Dataset, normalized
from sam_examples.training.step import TrainState, make_scoring_loss_fn


def make_score(
    model: nn.Module, dataset: Dataset, num_examples: int
) -> Callable[[TrainState], Any]:
    """Makes `score(state)`, the Fisher information of each parameter, compiled.

    Args:
      model: called as `model(images, train=...)`.
      dataset: its first training images are scored.
      num_examples: how many images are scored.
    """
    batch = normalized(dataset.train.take(slice(num_examples)), dataset)
    loss_fn = make_scoring_loss_fn(model)

    def score(params: Any, batch_stats: Any) -> Any:
        # Nothing is drawn in evaluation mode: any key will do.
        key = jax.random.key(0)
        return optax_sam.fisher_diagonal(
            lambda params, batch: loss_fn(params, batch, batch_stats, key),
            params,
            batch,
        )

    compiled = jax.jit(score)
    return lambda state: compiled(state.params, state.batch_stats)


class Chooser:
    """Chooses the layers to perturb, each a convolution, normalisation or head.

    Attributes:
      cost: multiplications in the gradient of each layer's weights for an image, by
        its path; they are what the clean pass saves by leaving the layer out.
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
        self._score = make_score(model, dataset, num_examples)
        self._sparsity = sparsity
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        run = partial(model.apply, train=False, capture_intermediates=True)
        image = jnp.zeros_like(dataset.train.images[:1], jnp.float32)
        outputs = jax.eval_shape(run, variables, image)[1]["intermediates"]
        self._cost = jax.tree.map_with_path(
            partial(_gradient_cost, outputs), state.params, is_leaf=_is_layer
        )
        self.cost = {
            _name(path): cost for path, cost in jax.tree.leaves_with_path(self._cost)
        }

    def __call__(self, state: TrainState) -> Any:
        """A tree of Python bools: which parameters to perturb."""
        scores = self._score(state)
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
