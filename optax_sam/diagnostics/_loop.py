"""Loops that are fast outside of `jit` too, where every step is a program of its own.

XLA on the CPU computes the gradients of convolutions many times slower inside of a
loop, where it leaves them as they are (jax-ml/jax issue 12868). Outside of `jit` there
is no need for one: Python calls the step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `fn` where that is not being done already, once for all equal shapes.

    The arrays that it closes over become arguments of the program: as constants, XLA
    would compute with them at compile time.
    """
    programs: dict[Any, Any] = {}

    def call(*args: Any) -> Any:
        if is_traced():
            return fn(*args)
        leaves, treedef = jax.tree.flatten(args)
        kind = treedef, *map(jax.typeof, leaves)
        if kind not in programs:
            trace: Any = jax.make_jaxpr(fn, return_shape=True)
            jaxpr, shape = trace(*args)
            evaluate: Any = jax.core.eval_jaxpr
            run = jax.jit(lambda consts, *x: evaluate(jaxpr.jaxpr, consts, *x))
            # NumPy's would go to the device at every call.
            consts = jax.tree.map(jnp.asarray, jaxpr.consts)
            programs[kind] = run, consts, jax.tree.structure(shape)
        run, consts, structure = programs[kind]
        return jax.tree.unflatten(structure, run(consts, *leaves))

    return call


def scan(step: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], Any]:
    """`jax.lax.scan` of a step, as a function of the carry and what to go along."""
    compiled_step = compiled(step)

    def run(carry: Any, xs: Any) -> tuple[Any, Any]:
        num = jax.tree.leaves(xs)[0].shape[0]
        if is_traced() or not num:
            along: tuple[Any, Any] = jax.lax.scan(step, carry, xs)
            return along
        found = []
        for i in range(num):
            carry, y = compiled_step(carry, jax.tree.map(lambda x, i=i: x[i], xs))
            found.append(y)
        return carry, jax.tree.map(lambda *y: jnp.stack(y), *found)

    return run


def over(fn: Callable[[Any], Any], xs: Any) -> Any:
    """`jax.lax.map` of a function, one element after the other."""
    return scan(lambda carry, x: (carry, fn(x)))((), xs)[1]


def over_loops(fn: Callable[[Any], Any], xs: Any) -> Any:
    """As :func:`over`, of a function that has loops of its own and is not one step."""
    if is_traced():
        return jax.lax.map(fn, xs)
    num = jax.tree.leaves(xs)[0].shape[0]
    found = [fn(jax.tree.map(lambda x, i=i: x[i], xs)) for i in range(num)]
    return jax.tree.map(lambda *y: jnp.stack(y), *found)


def is_traced() -> bool:
    """Whether all of this is being traced for a program, such as by `jax.jit`."""
    # Whatever is computed here then takes part, even if it does not depend on anything.
    return isinstance(jnp.zeros([]), jax.core.Tracer)
