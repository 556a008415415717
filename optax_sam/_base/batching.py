"""A batch as what it is made of: examples along the first axis of its arrays."""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_sam._base.devices import Devices
from optax_sam._base.hyperparameters import check_integer


def count(owner: str, batch: Any) -> int:
    """The number of examples in a batch; refuses one that cannot be cut."""
    sizes = set()
    for path, x in jax.tree.leaves_with_path(batch):
        if not jnp.ndim(x):
            raise ValueError(
                f"{owner}: batch{jax.tree_util.keystr(path)} is a scalar, but examples "
                "are taken along the first axis of all arrays in the batch; hand what "
                "the examples share to the loss in another way, as an argument of "
                "value_and_update's step after the batch, say."
            )
        sizes.add(jnp.shape(x)[0])
    if not sizes:
        raise ValueError(
            f"{owner}: no batch was passed, or one without arrays, and examples have "
            "to be taken from it; let loss_fn(params, batch) take it as an argument, "
            "and pass it to the step."
        )
    if len(sizes) != 1:
        raise ValueError(
            f"{owner}: the arrays of the batch must have one axis of examples in "
            f"common, their first; got lengths {sorted(sizes)}."
        )
    return int(sizes.pop())


def check_sizes(owner: str, size: Any, at_once: Any) -> tuple[Any, Any]:
    """Returns the size of micro-batches and how many at once, which may be None."""
    given = {"micro_batch_size": size, "micro_batches_at_once": at_once}
    size, at_once = (
        check_integer(owner, name, value, low=1, static=True, optional=True)
        for name, value in given.items()
    )
    return size, at_once


def split(owner: str, batch: Any, size: int, at_once: Any, devices: Devices) -> Any:
    """Cuts a batch `[B, ...]` into micro-batches `[rounds, at_once, size, ...]`."""
    num_examples = count(owner, batch)
    holder = "the batch" if devices.size() == 1 else "a device"
    if num_examples % size:
        divisors = [m for m in range(1, num_examples + 1) if num_examples % m == 0]
        raise ValueError(
            f"{owner}: micro_batch_size = {size} does not divide the {num_examples} "
            f"examples of {holder}; drop the incomplete micro-batch, or choose one of "
            f"{divisors}."
        )
    number = num_examples // size
    at_once = number if at_once is None else min(at_once, number)
    if number % at_once:
        raise ValueError(
            f"{owner}: micro_batches_at_once = {at_once} does not divide the {number} "
            f"micro-batches of the {num_examples} examples of {holder}; choose a "
            "divisor, or None for all at once."
        )
    return cut(batch, at_once, size)


def side_by_side(fn: Callable[[Any], Any], parts: Any) -> Any:
    """Maps over parts of a batch `[at_once, ...]`, computed at the same time."""
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        # Without vmap, which makes convolutions grouped ones.
        one = fn(jax.tree.map(lambda x: x[0], parts))
        return jax.tree.map(lambda x: x[None], one)
    return jax.vmap(fn)(parts)


def is_placed(x: jax.Array) -> bool:
    """Whether the examples are spread along explicit axes of a mesh."""
    return bool((jax.typeof(x).sharding.spec or (None,))[0])


def part(x: jax.Array, start: int, stop: int) -> jax.Array:
    """Neighbours along the first axis, wherever they are."""
    if is_placed(x):
        axis, *others = jax.typeof(x).sharding.spec
        if start % _num_parts(x) or stop % _num_parts(x):
            axis = None  # Devices cannot have equal shares of them.
        reshard: Any = jax.sharding.reshard
        x = reshard(x, _spec(axis, *others))
    return x[start:stop]


def cut(batch: Any, at_once: int, size: int) -> Any:
    """Cuts a batch `[B, ...]` into groups `[rounds, at_once, size, ...]`.

    A group is `size` neighbours. Those of one round are as far apart as they can be, so
    that every device that holds a part of the batch has its share of every round.
    """

    def cut_one(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        groups = _reshape(x, (at_once, x.shape[0] // (at_once * size), size))
        return jnp.swapaxes(groups, 0, 1)

    return jax.tree.map(cut_one, batch)


def numbers(groups: Any) -> jax.Array:
    """Where in the batch the groups of :func:`cut` were, `[rounds, at_once]`."""
    like = jax.tree.leaves(groups)[0]
    rounds, at_once = like.shape[:2]
    found = jnp.arange(rounds * at_once).reshape(at_once, rounds).T
    spec = jax.typeof(like).sharding.spec[:2]
    reshard: Any = jax.sharding.reshard
    return reshard(found, _spec(*spec)) if any(spec) else found


def together(whole: chex.ArrayTree, groups: chex.ArrayTree) -> chex.ArrayTree:
    """What groups `[rounds, at_once, ...]` found, as it is of the whole batch.

    Floats are means over groups, and what groups have for each example is put together.
    What is neither, such as a count, is what was found from the whole batch: nobody
    knows how to make one of many.
    """

    def of_leaf(x: Any, of_groups: Any) -> Any:
        if of_groups is None:
            return x
        of_groups = jnp.swapaxes(of_groups, 0, 1)
        at_once, rounds, *shape = of_groups.shape
        if x.shape == (*shape,) and jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.mean(of_groups, axis=(0, 1))
        if shape and x.shape == (at_once * rounds * shape[0], *shape[1:]):
            placed = {"out_sharding": jax.typeof(x).sharding} if is_placed(x) else {}
            return jnp.reshape(of_groups, x.shape, **placed)
        return x

    return jax.tree.map(of_leaf, whole, groups)


def chunks(examples: Any, size: int) -> tuple[Any, Any]:
    """Examples `[n, ...]` as chunks `[n // size, size, ...]` and a rest, or None."""
    n = jax.tree.leaves(examples)[0].shape[0]
    whole = n - n % size

    def chunk(x: jax.Array) -> jax.Array:
        if is_placed(x):  # A scan along a sharded axis is refused.
            groups: jax.Array = cut(part(x, 0, whole), size, 1)
            return jnp.squeeze(groups, 2)
        return x[:whole].reshape(whole // size, size, *x.shape[1:])

    several = jax.tree.map(chunk, examples) if whole else None
    if whole == n:
        return several, None
    return several, jax.tree.map(lambda x: part(x, whole, n), examples)


def _reshape(x: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Cuts the first axis; on a mesh of explicit axes, says where the parts go."""
    whole = (*shape, *x.shape[1:])
    sharding = jax.typeof(x).sharding
    if not is_placed(x):
        return jnp.reshape(x, whole)
    axes, *others = sharding.spec
    first, _, last = (axes if n % _num_parts(x) == 0 else None for n in shape)
    # The rounds remain in one piece: a scan goes along them.
    spec = _spec(first, None, None if first else last, *others)
    out_sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
    return jnp.reshape(x, whole, out_sharding=out_sharding)


def _num_parts(x: jax.Array) -> int:
    """In how many parts the examples are spread."""
    sharding = jax.typeof(x).sharding
    return math.prod(sharding.mesh.shape[a] for a in jax.tree.leaves(sharding.spec[0]))


def _spec(*axes: Any) -> jax.sharding.PartitionSpec:
    make: Any = jax.sharding.PartitionSpec  # Its constructor is not typed.
    spec: jax.sharding.PartitionSpec = make(*axes)
    return spec
