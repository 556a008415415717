r"""m-SAM: the two passes over every micro-batch of a batch, and the mean of them.

.. math::
  \frac{1}{k} \sum_{j=1}^{k} \nabla f_{I_j}(w + \varepsilon_j), \qquad
  \varepsilon_j = \text{ascent}(\nabla f_{I_j}(w))
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam import _tree
from optax_sam._passes import Passes


def is_whole(batch: Any, size: int) -> bool:
    """Whether a micro-batch of this size is all of the batch."""
    return _num_examples(batch) == size


def split(batch: Any, size: int, at_once: int | None) -> Any:
    """Cuts a batch `[B, ...]` into micro-batches `[rounds, at_once, size, ...]`.

    A micro-batch is `size` neighbours. Those of one round are as far apart as they can
    be, so that each device that holds a part of the batch has its share of every round.
    """
    num_examples = _num_examples(batch)
    if num_examples % size:
        raise ValueError(
            f"sharpness_aware: micro_batch_size = {size} does not divide the batch of "
            f"{num_examples} examples; drop the incomplete micro-batch, or choose one "
            f"of {[m for m in range(1, num_examples + 1) if num_examples % m == 0]}."
        )
    num_micro_batches = num_examples // size
    at_once = num_micro_batches if at_once is None else min(at_once, num_micro_batches)
    if num_micro_batches % at_once:
        raise ValueError(
            f"sharpness_aware: micro_batches_at_once = {at_once} does not divide the "
            f"{num_micro_batches} micro-batches of a batch of {num_examples} examples; "
            "choose a divisor, or None for all at once."
        )

    def cut(x: Any) -> jax.Array:
        parts = jnp.reshape(x, (at_once, -1, size, *jnp.shape(x)[1:]))
        return jnp.swapaxes(parts, 0, 1)

    return jax.tree.map(cut, batch)


def _num_examples(batch: Any) -> int:
    """The length of the first axis of every leaf of a batch."""
    sizes = {}
    for path, x in jax.tree.leaves_with_path(batch):
        name = f"batch{jax.tree_util.keystr(path)}"
        if not jnp.ndim(x):
            raise ValueError(
                f"sharpness_aware: {name} is a scalar, and micro_batch_size cuts every "
                "leaf of the batch along its first axis, the examples; pass what all "
                "examples share as a further argument of loss_fn."
            )
        sizes[name] = jnp.shape(x)[0]
    if len(set(sizes.values())) != 1:
        raise ValueError(
            "sharpness_aware: micro_batch_size cuts every leaf of the batch along its "
            f"first axis, whose lengths are {sizes or 'none: the batch is empty'}; "
            "pass a batch whose leaves have one entry for each example."
        )
    size: int = sizes.popitem()[1]
    return size


def mean(
    passes: Callable[[Any], Passes], micro_batches: Any, params: optax.Params
) -> Passes:
    """The mean of the passes over micro-batches `[rounds, at_once, size, ...]`.

    The sums are in float32 or wider, the means in the dtypes of `params`.
    """
    rounds, at_once = jax.tree.leaves(micro_batches)[0].shape[:2]

    def over_round(micro_batches: Any) -> Passes:
        if at_once == 1:  # Without vmap, which makes convolutions grouped ones.
            one = passes(jax.tree.map(lambda x: x[0], micro_batches))
            several = jax.tree.map(lambda x: x[None], one)
        else:
            several = jax.vmap(passes)(micro_batches)
        total: Passes = jax.tree.map(_sum, several)
        return total

    def step(total: Passes, micro_batches: Any) -> tuple[Passes, None]:
        return jax.tree.map(_add, total, over_round(micro_batches)), None

    if rounds == 1:
        total = over_round(jax.tree.map(lambda x: x[0], micro_batches))
    else:
        zeros = jax.tree.map(lambda p: _sum(jnp.zeros_like(p)[None]), params)
        start = Passes(zeros, zeros, jnp.array(True))
        total, _ = jax.lax.scan(step, start, micro_batches)
    clean, gradient = (
        _tree.cast_like(jax.tree.map(lambda x: x / (rounds * at_once), tree), params)
        for tree in (total.clean_gradient, total.gradient)
    )
    return Passes(clean, gradient, total.finite)


def _sum(x: jax.Array) -> jax.Array:
    """Adds along the first axis; of bools, whether all are true."""
    if x.dtype == jnp.bool_:
        return jnp.all(x, axis=0)
    return jnp.sum(x, axis=0, dtype=_tree.accumulator_dtype(x.dtype))


def _add(x: jax.Array, y: jax.Array) -> jax.Array:
    return x & y if x.dtype == jnp.bool_ else x + y
