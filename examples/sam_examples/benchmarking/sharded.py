"""Training steps compiled for several devices, from shapes alone."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from sam_examples.benchmarking.measure import set_counts
from sam_examples.devices.sharding import AXIS, as_shapes, of_opt_state, replicated

# Arrays on all devices and one program, or a program for each device.
Layout = Literal["jit", "shard_map", "pmap"]


class Problem(NamedTuple):
    """A loss, and the shapes, types and places of what it takes.

    Attributes:
      loss_fn: `loss_fn(params, batch, *others) -> losses[B]`, or a pair with auxiliary
        data.
      params: the shapes of the parameters, each with a sharding.
      batch: the shapes of a batch, each with a sharding.
      mesh: the devices.
      others: the shapes of what the loss takes after the batch, each with a sharding.
      layout: how devices share the work.
    """

    loss_fn: Callable[..., Any]
    params: Any
    batch: Any
    mesh: Mesh
    others: tuple[Any, ...] = ()
    layout: Layout = "jit"

    @property
    def axis_name(self) -> str | None:
        """The axis that devices are to be named by, None where arrays are sharded."""
        return None if self.layout == "jit" else AXIS


class Step(NamedTuple):
    """A compiled step.

    `step(params, opt_state, batch, *others) -> params, opt_state, value`

    Attributes:
      compiled: the step; parameters and state are donated, and stay in their places.
      opt_state: the shapes of the optimizer's state, each with a sharding.
      seconds: what it took to compile.
    """

    compiled: Any
    opt_state: Any
    seconds: float


def compile_step(
    problem: Problem,
    tx: optax.GradientTransformation,
    update: Any,
    *,
    count: int | None = None,
    compiler_options: Mapping[str, str | bool | int] | None = None,
) -> Step:
    """Compiles a step.

    Args:
      problem: the loss and the places of everything.
      tx: the optimizer, whose state lies as the parameters do.
      update: `update(params, opt_state, batch, *others) -> value, updates, opt_state`.
        Where devices have an axis name, `value` may differ between them; what the step
        returns is the mean.
      count: if given, the counts of the optimizer's state are taken to be this number,
        see `measure.set_counts`.
      compiler_options: passed to XLA.
    """
    shardings = jax.tree.map(lambda x: x.sharding, problem.params)
    opt_state = jax.eval_shape(tx.init, problem.params)
    places = of_opt_state(tx, opt_state, problem.params, shardings)
    opt_state = as_shapes(opt_state, places)

    def step(params: Any, opt_state: Any, *args: Any) -> tuple[Any, Any, Any]:
        if count is not None:
            opt_state = set_counts(opt_state, count)
        value, updates, opt_state = update(params, opt_state, *args)
        if problem.axis_name is not None:
            pmean: Any = jax.lax.pmean
            value = pmean(value, problem.axis_name)
        return optax.apply_updates(params, updates), opt_state, value

    arguments = problem.params, opt_state, problem.batch, *problem.others
    outputs = shardings, places, replicated(problem.mesh)
    lower = _LOWER[problem.layout]
    start = time.perf_counter()
    lowered = lower(step, problem.mesh, arguments, outputs)
    compiled = lowered.compile(compiler_options)
    return Step(compiled, opt_state, time.perf_counter() - start)


def _lower_jit(step: Any, mesh: Mesh, arguments: Any, outputs: Any) -> Any:
    jitted: Any = jax.jit(step, donate_argnums=(0, 1), out_shardings=outputs)
    return jitted.lower(*arguments)


def _lower_shard_map(step: Any, mesh: Mesh, arguments: Any, outputs: Any) -> Any:
    specs = [jax.tree.map(lambda x: x.sharding.spec, each) for each in arguments]
    # Unchecked, so that methods by hand may average gradients as under pmap.
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=replicated(mesh).spec,
        check_vma=False,
    )
    return _lower_jit(mapped, mesh, arguments, outputs)


def _lower_pmap(step: Any, mesh: Mesh, arguments: Any, outputs: Any) -> Any:
    """Every array has a first axis for the devices, and with it a part on each."""
    shape: Any = jax.ShapeDtypeStruct

    def stack(x: Any) -> Any:
        return shape((mesh.size, *x.sharding.shard_shape(x.shape)), x.dtype)

    devices = list(mesh.devices.flat)
    mapped: Any = jax.pmap(step, AXIS, devices=devices, donate_argnums=(0, 1))
    return mapped.lower(*jax.tree.map(stack, arguments))


_LOWER: Mapping[str, Callable[..., Any]] = {
    "jit": _lower_jit,
    "shard_map": _lower_shard_map,
    "pmap": _lower_pmap,
}


def bytes_on_a_device(shapes: Any) -> int:
    """Bytes of the parts of all arrays that one device has."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )
