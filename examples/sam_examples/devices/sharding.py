"""Where the arrays of a training lie on a mesh of devices."""

from contextlib import suppress
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "devices"


def on_mesh(mesh: Mesh, *names: str | None) -> NamedSharding:
    """The sharding of arrays whose axes lie along the axes of a mesh, or along none."""
    return NamedSharding(mesh, PartitionSpec(*names))  # type: ignore[no-untyped-call]


def simulate_devices(count: int) -> None:
    """Makes JAX have so many CPU devices, unless it was asked for its devices before.

    All of them share the cores there are.
    """
    update_config: Any = jax.config.update
    with suppress(RuntimeError):  # Raised if there are other devices already.
        update_config("jax_num_cpu_devices", count)
        update_config("jax_platforms", "cpu")


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of one axis.

    Args:
      num_devices: how many devices to take; by default those of all processes, those of
        each process together.

    Raises:
      ValueError: if there are fewer devices.
    """
    devices = jax.devices()[:num_devices]
    if num_devices is not None and len(devices) < num_devices:
        raise ValueError(f"there are {len(devices)} devices, not {num_devices}.")
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return on_mesh(mesh)


def by_examples(mesh: Mesh) -> NamedSharding:
    """Every device has a part of the examples, which lie along the first axis."""
    return on_mesh(mesh, AXIS)


def by_first_divisible_axis(mesh: Mesh, params: Any) -> Any:
    """Fully sharded parameters: every device has a part of every large array.

    Args:
      mesh: a mesh of one axis.
      params: arrays or their shapes. One that has no axis that the number of devices
        divides is copied to all of them.

    Returns:
      A sharding for each leaf.
    """

    def shard(x: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(x.shape) if size % mesh.size == 0]
        return on_mesh(mesh, *[None] * axes[0], AXIS) if axes else replicated(mesh)

    return jax.tree.map(shard, params)


def of_params(mesh: Mesh, params: Any, fully_sharded: bool) -> Any:
    """The shardings of parameters: a part of each for every device, or a copy."""
    if fully_sharded:
        return by_first_divisible_axis(mesh, params)
    return jax.tree.map(lambda _: replicated(mesh), params)


def of_opt_state(
    tx: optax.GradientTransformation, opt_state: Any, params: Any, param_shardings: Any
) -> Any:
    """The shardings of an optimizer's state: what is like a parameter lies as it does.

    `jax.jit(tx.init)` puts the state of a sharpness-aware optimizer there by itself.
    That of others it copies to all devices; and it needs parameters, not their shapes.

    Args:
      tx: any Optax optimizer.
      opt_state: its state, or the shapes of it.
      params: the parameters, or the shapes of them.
      param_shardings: a tree like them. Counts, keys, and averages that are of another
        shape than their parameter, are copied to the devices of its first leaf.
    """
    everywhere = replicated(jax.tree.leaves(param_shardings)[0].mesh)

    def is_absent(node: Any) -> bool:  # In the state of masked or partitioned ones.
        return isinstance(node, optax.MaskedNode)

    def place(node: Any, param: Any, sharding: Any) -> Any:
        if is_absent(node):
            return node
        # Factored moments have fewer axes.
        return sharding if node.shape == param.shape else everywhere

    return optax.tree.map_params(
        tx,
        place,
        opt_state,
        params,
        param_shardings,
        transform_non_params=lambda _: everywhere,
        is_leaf=is_absent,
    )


def as_shapes(tree: Any, shardings: Any) -> Any:
    """Shapes, types and places of arrays, to compile for without having any."""
    shape: Any = jax.ShapeDtypeStruct
    return jax.tree.map(
        lambda x, place: shape(x.shape, x.dtype, sharding=place), tree, shardings
    )
