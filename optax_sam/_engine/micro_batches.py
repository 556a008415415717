r"""m-SAM: the two passes over every micro-batch of a batch, and the mean of them.

.. math::
  \frac{1}{k} \sum_{j=1}^{k} \nabla f_{I_j}(w + \varepsilon_j), \qquad
  \varepsilon_j = \text{ascent}(\nabla f_{I_j}(w))
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import batching, trees
from optax_sam._base.devices import Devices
from optax_sam._engine.passes import Passes

_OWNER = "sharpness_aware"


def is_whole(batch: Any, size: int, devices: Devices) -> bool:
    """Whether a micro-batch of this size is all of the batch, on all devices."""
    return batching.count(_OWNER, batch) * devices.size() == size


def split(batch: Any, size: int, at_once: int | None, devices: Devices) -> Any:
    """Cuts a batch `[B, ...]` into micro-batches `[rounds, at_once, size, ...]`."""
    num_examples = batching.count(_OWNER, batch)
    if num_examples % size:
        divisors = [m for m in range(1, num_examples + 1) if num_examples % m == 0]
        raise ValueError(
            f"{_OWNER}: micro_batch_size = {size} does not divide the {num_examples} "
            f"examples of {_holder(devices)}; drop the incomplete micro-batch, or "
            f"choose one of {divisors}."
        )
    num_micro_batches = num_examples // size
    at_once = num_micro_batches if at_once is None else min(at_once, num_micro_batches)
    if num_micro_batches % at_once:
        raise ValueError(
            f"{_OWNER}: micro_batches_at_once = {at_once} does not divide the "
            f"{num_micro_batches} micro-batches of the {num_examples} examples of "
            f"{_holder(devices)}; choose a divisor, or None for all at once."
        )
    return batching.cut(batch, at_once, size)


def mean(
    passes: Callable[[Any], Passes], micro_batches: Any, params: optax.Params
) -> Passes:
    """The mean of the passes over micro-batches `[rounds, at_once, size, ...]`.

    The sums are in float32 or wider, the means in the dtypes of `params`.
    """
    rounds, at_once = jax.tree.leaves(micro_batches)[0].shape[:2]

    def over_round(micro_batches: Any) -> tuple[chex.ArrayTree, jax.Array]:
        if at_once == 1:  # Without vmap, which makes convolutions grouped ones.
            one = passes(jax.tree.map(lambda x: x[0], micro_batches))
            several = jax.tree.map(lambda x: x[None], one)
        else:
            several = jax.vmap(passes)(micro_batches)
        gradients = several.clean_gradient, several.gradient
        return jax.tree.map(_sum, gradients), jnp.all(several.finite)

    def step(total: chex.ArrayTree, micro_batches: Any) -> tuple[Any, jax.Array]:
        new, finite = over_round(micro_batches)
        return jax.tree.map(jnp.add, total, new), finite

    if rounds == 1:
        total, finite = over_round(jax.tree.map(lambda x: x[0], micro_batches))
    else:
        zeros = jax.tree.map(lambda p: _sum(jnp.zeros_like(p)[None]), params)
        total, finite = jax.lax.scan(step, (zeros, zeros), micro_batches)
    means = jax.tree.map(lambda x: x / (rounds * at_once), total)
    clean, gradient = (trees.cast_like(tree, params) for tree in means)
    return Passes(clean, gradient, jnp.all(finite))


def _holder(devices: Devices) -> str:
    return "the batch" if devices.size() == 1 else "a device"


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, dtype=trees.accumulator_dtype(x.dtype))
