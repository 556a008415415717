"""What is found of the precision of a function, wherever it is rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam._base import precision

HALF = jnp.bfloat16
ONES = np.ones((3, 3), HALF)


def half(x):
    return x.astype(HALF).astype(x.dtype)


@jax.custom_jvp
def with_tangents(x):
    return half(x)


@jax.custom_vjp
def with_cotangents(x):
    return half(x)


with_tangents.defjvp(lambda x, t: (with_tangents(*x), t[0]))
with_cotangents.defvjp(lambda x: (with_cotangents(x), None), lambda _, g: (g,))
LOW = {
    "cast": half,
    "jit": jax.jit(half),
    "scan": lambda x: jax.lax.scan(lambda c, _: (half(c), None), x, length=2)[0],
    "cond": lambda x: jax.lax.cond(x.sum() > 0, half, lambda x: x, x),
    "while": lambda x: jax.lax.fori_loop(0, x.size, lambda _, x: half(x), x),
    "remat": jax.checkpoint(half),
    "custom_jvp": with_tangents,
    "custom_vjp": with_cotangents,
    "vmap": jax.vmap(with_cotangents),
    "nested": lambda x: jax.checkpoint(jax.jit(lambda x: jax.nn.relu(half(x))))(x),
}
FULL = {
    "sine": jnp.sin,
    "product": lambda x: x @ x,
    "constant in half precision": lambda x: x + jnp.asarray(ONES, x.dtype),
    "integers": lambda x: x + jax.random.bernoulli(jax.random.key(0), 0.5, x.shape),
    "wide": lambda x: jax.nn.softmax(x),
}


def jaxpr(fn, dtype=jnp.float32):
    return jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((3, 3), dtype)).jaxpr


@pytest.mark.parametrize("name", LOW)
def test_rounding_is_seen_wherever_it_is(name):
    assert precision.is_below_float32(jaxpr(LOW[name]))


@pytest.mark.parametrize("name", FULL)
def test_what_stays_in_float32(name):
    found = jaxpr(FULL[name])
    assert not precision.is_below_float32(found)
    assert precision.has_platforms_precision(found) == (name == "product")


def test_an_input_in_half_precision_counts():
    assert precision.is_below_float32(jaxpr(lambda x: x.astype("float32"), HALF))


def test_a_product_that_asks_for_full_precision():
    with jax.default_matmul_precision("highest"):
        found = jaxpr(lambda x: x @ x)
    assert not precision.has_platforms_precision(found)


def test_functions_without_forward_mode():
    found = precision.without_forward_mode(jaxpr(jax.jit(with_cotangents)))
    assert found == ["with_cotangents"]
    assert not precision.without_forward_mode(jaxpr(with_tangents))
