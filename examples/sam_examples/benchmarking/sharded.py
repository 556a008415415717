"""Training steps compiled for several devices, from shapes alone."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from sam_examples.devices.sharding import as_shapes, of_opt_state, replicated


class Problem(NamedTuple):
    """A loss, and the shapes, types and places of what it takes.

    Attributes:
      loss_fn: `loss_fn(params, batch) -> losses[B]`.
      params: the shapes of the parameters, each with a sharding.
      batch: the shapes of a batch, each with a sharding.
      mesh: the devices.
    """

    loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any
    mesh: Mesh


class Step(NamedTuple):
    """A compiled step, `step(params, opt_state, batch) -> params, opt_state, loss`.

    Attributes:
      compiled: the step; parameters and state are donated, and stay in their places.
      opt_state: the shapes of the optimizer's state, each with a sharding.
      seconds: what it took to compile.
    """

    compiled: Any
    opt_state: Any
    seconds: float


def compile_step(
    problem: Problem, tx: optax.GradientTransformation, update: Any
) -> Step:
    """Compiles a step.

    Args:
      problem: the loss and the places of everything.
      tx: the optimizer, whose state lies as the parameters do.
      update: `update(params, opt_state, batch) -> value, updates, opt_state`.
    """
    shardings = jax.tree.map(lambda x: x.sharding, problem.params)
    opt_state = jax.eval_shape(tx.init, problem.params)
    places = of_opt_state(tx, opt_state, problem.params, shardings)
    opt_state = as_shapes(opt_state, places)

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, updates, opt_state = update(params, opt_state, batch)
        return optax.apply_updates(params, updates), opt_state, value

    jitted = jax.jit(
        step,
        donate_argnums=(0, 1),
        out_shardings=(shardings, places, replicated(problem.mesh)),
    )
    start = time.perf_counter()
    compiled = jitted.lower(problem.params, opt_state, problem.batch).compile()
    return Step(compiled, opt_state, time.perf_counter() - start)


def bytes_on_a_device(shapes: Any) -> int:
    """Bytes of the parts of all arrays that one device has."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )
