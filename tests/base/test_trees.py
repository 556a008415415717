import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods import DTYPES, cover

from optax_sam._base import trees

ABSENT = optax.MaskedNode()
# What each kind of device has.
FOR_DEVICES = [
    trees._on_usual_scale,
    trees._on_scales,
    functools.partial(trees._on_scales, clip=False),
    trees._on_joint_scales,
]


@cover(
    bad=[np.nan, np.inf, -np.inf],
    # XLA on the CPU drops NaN from maxima over 4096 entries or more.
    shape=[(3,), (64, 64), (300, 40)],
    dtype=DTYPES,
)
def test_all_finite(bad, shape, dtype):
    good = {"a": np.ones(shape, dtype), "b": ABSENT, "c": np.ones(2, "f"), "d": None}
    spoilt = good | {"a": problems.replaced(good["a"], 1, bad)}
    everywhere = good | {"a": np.full(shape, bad, dtype)}
    of_kept = functools.partial(trees.all_finite, kept=True)
    for check in (trees.all_finite, jax.jit(trees.all_finite), jax.jit(of_kept)):
        assert check(good)
        assert not check(spoilt)
        assert not check(everywhere)
    assert trees.all_finite({})
    assert trees.all_finite(jnp.zeros((0, 3)))


def test_what_is_finite_although_its_square_is_not():
    for kept in (False, True):
        assert trees.all_finite(jnp.full(4, 3e38), kept=kept)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("scale", [1e-7, 1.0, 3e4])
def test_scale_to_norm_is_exact_where_squares_are_not(dtype, scale):
    tree = [np.full(1000, scale, dtype), {"b": np.full((3, 4), scale, dtype)}]
    out = trees.scale_to_norm(tree, 0.5)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(out))
    assert problems.norm(out) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_scale_to_norm_rounds_nothing_to_the_dtype_of_its_input(dtype):
    tree = np.asarray(np.random.default_rng(0).normal(size=1000), dtype)
    expected = np.asarray(tree, np.float64) / problems.norm(tree)
    np.testing.assert_allclose(trees.scale_to_norm(tree, 1.0), expected, rtol=1e-6)


@pytest.mark.parametrize("find", FOR_DEVICES)
@pytest.mark.parametrize("exponent", [-37, -30, -24, -18, -9, 0, 9, 15, 30, 37])
def test_scale_to_norm_in_float32_beyond_the_range_of_squares(
    find, exponent, monkeypatch
):
    monkeypatch.setattr(trees, "_on_usual_scale", find)
    unit = np.float32(10.0) ** exponent
    for entries in ([1], [0, 0], [1, 2, 3, 4]):
        tree = [unit * np.array(entries, np.float32), np.zeros(1, np.float32)]
        scale_to_norm = functools.partial(trees.scale_to_norm, kept=True)
        out, zero = jax.jit(scale_to_norm)(tree, 2.0)
        expected = 2 * np.array(entries) / (np.linalg.norm(entries) or 1)
        np.testing.assert_allclose(out, expected, rtol=1e-6)
        np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize("largest", [1e-36, 1e-23, 1e-10, 1e3, 1e16, 1e29, 3e38])
def test_scale_to_norm_of_entries_of_all_sizes(largest):
    tree = np.float32(largest) * np.logspace(-20, 0, 5001, dtype=np.float32)
    tree = tree[tree > np.finfo(np.float32).tiny]
    expected = tree.astype(np.float64) / problems.norm(tree)
    np.testing.assert_allclose(trees.scale_to_norm(tree, 1.0), expected, rtol=1e-6)


@pytest.mark.parametrize("find", FOR_DEVICES)
def test_scale_to_a_weighted_norm(find, monkeypatch):
    monkeypatch.setattr(trees, "_on_usual_scale", find)
    tree, weights = {"a": jnp.array([3.0, -4.0]), "b": ABSENT}, jnp.array([4.0, 3.0])
    weights = {"a": weights, "b": jnp.ones(5)}
    out = trees.scale_to_norm(tree, 2.0, weights, kept=True)
    assert out["b"] == ABSENT
    np.testing.assert_allclose(out["a"], np.array([3, -4]) / (6 * 2**0.5), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scale_to_norm_hides_nothing_that_is_not_finite(value):
    assert not np.isfinite(trees.scale_to_norm(jnp.array([1.0, value]), 1.0)).all()


def test_norm_accumulates_over_many_small_leaves_in_float32():
    # 500 bfloat16 leaves: a bfloat16 sum stalls, and gives 32 for 35.4.
    tree = [np.full((), 1.5826, jnp.bfloat16)] * 500
    out = trees.scale_to_norm(tree, 1.0)
    assert problems.norm(out) == pytest.approx(1.0, rel=1e-6)


def test_scale_to_norm_of_zero_empty_and_absent():
    np.testing.assert_array_equal(trees.scale_to_norm(jnp.zeros(3), 1.0), np.zeros(3))
    assert trees.scale_to_norm({}, 1.0) == {}
    assert trees.scale_to_norm({"a": ABSENT}, 1.0) == {"a": ABSENT}
    out = trees.scale_to_norm({"a": ABSENT, "b": jnp.array([2.0])}, 1.0)
    assert out["a"] == ABSENT
    np.testing.assert_array_equal(out["b"], [1.0])


@pytest.mark.usefixtures("x64")
def test_accumulates_in_float64_under_x64():
    tree = [np.random.default_rng(0).normal(size=100).astype(np.float32)]
    out = trees.scale_to_norm(tree, 1.0)
    assert out[0].dtype == jnp.float64
    assert problems.norm(out) == pytest.approx(1.0, rel=1e-14)


def test_map_present_and_cast_like():
    tree, other = {"a": jnp.ones(2), "b": ABSENT}, {"a": jnp.ones(2), "b": jnp.ones(3)}
    assert trees.map_present(lambda x, y: x + y, tree, other)["b"] == ABSENT
    cast = trees.cast_like(tree, {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(3)})
    assert cast["a"].dtype == jnp.bfloat16
    assert cast["b"] == ABSENT


@pytest.mark.full
def test_compiled_code_grows_with_the_number_of_leaves_and_no_faster():
    def lines(leaves):
        tree = [np.ones(3 + i, np.float32) for i in range(leaves)]
        compiled = jax.jit(trees.scale_to_norm).lower(tree, 1.0).compile()
        return len(compiled.as_text().splitlines())

    # Eight times the leaves take 9 to 11 times the code (XLA unrolls the stacking a
    # little), and 28 to 32 times if every fusion repeats the arithmetic of all leaves.
    assert lines(80) < 12 * lines(10)
