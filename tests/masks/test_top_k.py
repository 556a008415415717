"""The exact top-k of a tree against a stable sort of all its entries."""

import hypothesis
import hypothesis.extra.numpy as numpy_strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from optax_sam._masks import top_k

SHAPES = ((3, 4), (), (0, 2), (7,), (2, 1, 5))
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)
# What trips up a top-k: signed zeros, ties, denormals, infinities, neighbours.
SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-45, 2e-45, -1e-45, 1e-40, np.inf, -np.inf, 3e38)

largest = jax.jit(top_k.largest)


def naive(leaves, k):
    """The masks of the `k` largest entries: earlier ones first where they tie."""
    flat = np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])
    chosen = np.argsort(-flat, kind="stable")
    chosen = chosen[~np.isnan(flat[chosen])][:k]  # A sort puts NaN last.
    kept = np.isin(np.arange(flat.size), chosen)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    parts = np.split(kept, ends)
    return [m.reshape(x.shape) for m, x in zip(parts, leaves, strict=True)]


def assert_exact(leaves, k):
    masks = largest(leaves, k)
    for mask, expected in zip(masks, naive(leaves, k), strict=True):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected)


def split(flat, dtype):
    ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES])[:-1]
    parts = zip(np.split(flat, ends), SHAPES, strict=True)
    return [jnp.asarray(part.reshape(shape), dtype) for part, shape in parts]


float32s = strategies.one_of(
    strategies.sampled_from(SPECIAL),
    strategies.integers(-3, 3).map(float),
    strategies.floats(width=32, allow_nan=False),
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    flat=numpy_strategies.arrays(np.float32, SIZE, elements=float32s),
    k=strategies.integers(0, SIZE),
)
def test_selects_what_a_stable_sort_selects(dtype, flat, k):
    with np.errstate(over="ignore"):  # Some of the floats are too large for float16.
        assert_exact(split(flat, dtype), k)


@pytest.mark.parametrize("k", [0, 1, SIZE // 2, SIZE - 1, SIZE])
@pytest.mark.parametrize("fill", [0.0, -0.0, 1.0, -2.0, np.inf, -np.inf, 1e-45])
def test_all_entries_equal(fill, k):
    leaves = split(np.full(SIZE, fill), jnp.float32)
    masks = largest(leaves, k)
    kept = np.concatenate([np.ravel(m) for m in masks])
    np.testing.assert_array_equal(kept, np.arange(SIZE) < k)


def test_one_huge_and_many_tiny_leaves():
    rng = np.random.default_rng(0)
    tiny = [jnp.asarray(rng.normal(size=3), jnp.float32) for _ in range(30)]
    leaves = [jnp.asarray(rng.normal(size=(300, 1000)), jnp.float32), *tiny]
    # To one decimal place, 300,090 entries make a few dozen values.
    for tree in (leaves, [jnp.round(x, 1) for x in leaves]):
        for k in (1, 1000, 150_300, 300_089):
            assert_exact(tree, k)


def test_neighbouring_floats_are_told_apart():
    values = np.nextafter(np.float32(1), np.float32(2)) * np.ones(3, np.float32)
    values[1] = 1.0
    for scale in (1.0, -1.0, 2.0**-126, 2.0**127):
        assert_exact([jnp.asarray(values * np.float32(scale))], 2)


def test_nan_is_never_selected():
    leaves = [jnp.array([np.nan, 1.0, -np.inf]), jnp.array([-np.nan, 2.0])]
    for k in range(6):
        assert_exact(leaves, k)
    assert sum(int(m.sum()) for m in largest(leaves, 5)) == 3


@pytest.mark.usefixtures("x64")
def test_float64_and_mixed_types():
    rng = np.random.default_rng(0)
    wide = jnp.asarray(1 + 1e-12 * rng.normal(size=20))
    assert wide.dtype == jnp.float64
    for k in (0, 7, 20):
        assert_exact([wide], k)
    mixed = [wide, jnp.ones(3, jnp.float32), jnp.full(2, 1, jnp.bfloat16)]
    for k in (9, 12, 24):
        assert_exact(mixed, k)


def test_unsigned_integers_are_ranked_as_they_are():
    masks = largest([jnp.array([0, 3, 2**32 - 1], jnp.uint32)], 3)
    np.testing.assert_array_equal(masks[0], [False, True, True])


def test_weights_of_entries():
    """Entries are taken in order until what they count for reaches k."""
    scores = [jnp.array([1.0, 5.0]), jnp.array([4.0, 4.0]), jnp.array([9.0])]
    weights = [10, 3, 100]
    for k, expected in [
        (0, [[0, 0], [0, 0], [0]]),
        (100, [[0, 0], [0, 0], [1]]),
        (101, [[0, 1], [0, 0], [1]]),
        (110, [[0, 1], [0, 0], [1]]),
        (111, [[0, 1], [1, 0], [1]]),
        (114, [[0, 1], [1, 1], [1]]),
        (126, [[1, 1], [1, 1], [1]]),
    ]:
        masks = top_k.largest(scores, k, weigh_by=weights)
        for mask, rows in zip(masks, expected, strict=True):
            np.testing.assert_array_equal(mask, np.array(rows, bool))


def test_structure_is_kept_and_traced_counts_work():
    scores = {"a": jnp.array([1.0, 3.0]), "b": (jnp.array(2.0), None)}
    for k in range(4):
        masks = largest(scores, jnp.int32(k))
        assert jax.tree.structure(masks) == jax.tree.structure(scores)
        assert sum(int(m.sum()) for m in jax.tree.leaves(masks)) == k
    assert largest({}, 0) == {}


def test_more_entries_than_can_be_counted():
    huge = [jax.ShapeDtypeStruct((2**31, 2), jnp.float32)]
    with pytest.raises(ValueError, match=r"8,589,934,592 entries.*jax_enable_x64"):
        jax.eval_shape(lambda x: top_k.largest(x, 1), huge * 2)


def test_copies_on_all_devices_are_counted_without_a_word():
    everywhere = jax.sharding.PartitionSpec()
    each = jax.shard_map(
        top_k.largest,
        mesh=jax.make_mesh((8,), ("data",)),
        in_specs=everywhere,
        out_specs=everywhere,
    )
    compiled = jax.jit(each).lower([jnp.ones((4, 8)), jnp.ones(8)], 7).compile()
    for kind in ("all-", "reduce-scatter", "collective"):
        assert f" {kind}" not in compiled.as_text()


def test_count_true():
    assert top_k.count_true({"a": jnp.array([True, False, True]), "b": ()}) == 2
    assert top_k.count_true({}) == 0


def test_none_are_selected_not_even_the_largest_integer():
    scores = [jnp.full(3, 2**32 - 1, jnp.uint32)]
    assert not np.any(top_k.largest(scores, 0))
    assert np.sum(top_k.largest(scores, 1)) == 1
