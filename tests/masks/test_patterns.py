from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods import DTYPES, cover

import optax_sam
from optax_sam._masks.patterns import check_sparsity, num_kept

PATTERNS = {
    "unstructured": optax_sam.unstructured(0.5),
    "layer": optax_sam.structured(0.5, unit="layer"),
    "filter": optax_sam.structured(0.5, unit="filter"),
    "n_m": optax_sam.n_m(2, 4),
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def random_scores(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [np.asarray(rng.normal(size=shape) ** 2, dtype) for shape in shapes]


def count(masks):
    return sum(int(m.sum()) for m in jax.tree.leaves(masks))


@pytest.mark.parametrize("sparsity", ["0", "0.1", "0.5", "0.8", "0.9", "0.99", "1"])
def test_unstructured_keeps_exactly_so_many(sparsity):
    scores = random_scores((3, 4), (7,), ())
    masks = jax.jit(optax_sam.unstructured(float(sparsity)))(scores)
    assert count(masks) == int(20 * (1 - Decimal(sparsity)))
    masks = jax.device_get(masks)
    kept = np.concatenate([s[m] for s, m in zip(scores, masks, strict=True)])
    dropped = np.concatenate([s[~m] for s, m in zip(scores, masks, strict=True)])
    assert min(kept, default=np.inf) >= max(dropped, default=-np.inf)


@pytest.mark.parametrize("number", [float, np.float32, np.float16])
def test_counts_are_those_of_the_decimal_written(number):
    for size in (10, 300, 41_943_048, 4_294_967_290):
        scores = jax.ShapeDtypeStruct((size // 2, 2), jnp.float32)
        for thousandths in range(0, 1001, 7):
            written = Decimal(thousandths) / 1000
            sparsity = check_sparsity("pattern", number(written))
            assert num_kept({"w": scores}, sparsity) == int(size * (1 - written))


def test_structured_counts_for_the_decimal_written():
    scores = {f"{i}": np.full((1,), 10.0 - i) for i in range(10)}
    assert count(optax_sam.structured(0.8)(scores)) == 2


def test_unstructured_score_is_that_of_the_best_mask():
    """No mask of as many entries keeps more: theory, item 6."""
    scores = random_scores((40,))[0]
    mask = np.asarray(jax.jit(optax_sam.unstructured(0.75))(scores))
    assert float(scores[mask].sum()) == pytest.approx(np.sort(scores)[-10:].sum())


def test_layers_are_taken_by_mean_until_enough_weights_are_kept():
    scores = {
        "small, high": np.full((2,), 9.0),
        "large, middling": np.full((4, 2), 5.0),
        "first of two equals": np.full((3,), 1.0),
        "second": np.full((3,), 1.0),
    }
    for sparsity, expected in [  # Of 16 weights.
        (1.0, set()),
        (0.9, {"small, high"}),
        (0.8, {"small, high", "large, middling"}),
        (0.4, {"small, high", "large, middling"}),
        (0.3, {"small, high", "large, middling", "first of two equals"}),
        (0.0, set(scores)),
    ]:
        masks = jax.jit(optax_sam.structured(sparsity))(scores)
        for name, mask in masks.items():
            assert mask.shape == scores[name].shape
            assert bool(mask.all()) == bool(mask.any()) == (name in expected)


def test_filters_are_taken_by_mean_until_enough_weights_are_kept():
    kernel = np.broadcast_to(np.float32([2, 0, 1, 0]), (3, 2, 4))
    bias = np.float32([0.5, 3])
    pattern = optax_sam.structured(1 - 8 / 26, unit="filter")
    masks = jax.jit(pattern)({"kernel": kernel, "bias": bias})
    # The entry 3.0 counts for one weight, a filter of the kernel for six.
    np.testing.assert_array_equal(masks["bias"], [False, True])
    np.testing.assert_array_equal(masks["kernel"].all((0, 1)), [1, 0, 1, 0])
    np.testing.assert_array_equal(masks["kernel"].any((0, 1)), [1, 0, 1, 0])


@pytest.mark.parametrize("axis", [-1, 0, 1, -2])
def test_n_m_keeps_n_of_every_m_along_the_axis(axis):
    (scores,) = random_scores((6, 11, 7))
    mask = np.asarray(jax.jit(optax_sam.n_m(2, 4, axis=axis))(scores))
    lines = np.moveaxis(mask, axis, -1)
    values = np.moveaxis(np.asarray(scores), axis, -1)
    for start in range(0, lines.shape[-1], 4):
        group = lines[..., start : start + 4]
        assert np.all(group.sum(-1) == min(2, group.shape[-1]))
        of_group = values[..., start : start + 4]
        kept = np.where(group, of_group, np.inf).min(-1)
        dropped = np.where(group, -np.inf, of_group).max(-1)
        assert np.all(kept > dropped)


def test_n_m_breaks_ties_by_position_and_leaves_vectors_whole():
    masks = optax_sam.n_m(1, 3)({"w": jnp.zeros((2, 5)), "b": jnp.zeros(5)})
    np.testing.assert_array_equal(masks["w"], [[1, 0, 0, 1, 0]] * 2)
    assert masks["b"].all()
    assert not optax_sam.n_m(0, 3)(jnp.ones((2, 5))).any()
    assert optax_sam.n_m(3, 3)(jnp.ones((2, 5))).all()


@cover(pattern=PATTERNS, dtype=DTYPES, default=("unstructured-float32", "n_m-bfloat16"))
def test_masks_have_the_form_of_the_scores(pattern, dtype):
    w, b, s = random_scores((4, 8), (8,), (), dtype=dtype)
    scores = {"w": w, "b": b, "tuple": (s, None), "absent": optax.MaskedNode()}
    masks = jax.jit(pattern)(scores)
    assert jax.tree.structure(masks) == jax.tree.structure(scores)
    for mask, x in zip(jax.tree.leaves(masks), jax.tree.leaves(scores), strict=True):
        assert mask.shape == x.shape
        assert mask.dtype == bool
    problems.assert_trees_equal(masks, pattern(scores))


@every_pattern
def test_no_scores(pattern):
    assert pattern({}) == {}
    assert pattern({"a": jnp.ones((0, 4))})["a"].shape == (0, 4)


@every_pattern
def test_nan_scores(pattern):
    scores = {"w": jnp.array([[1.0, np.nan, 2.0, 3.0]]), "v": jnp.ones((1, 4))}
    with pytest.raises(ValueError, match=r"scores\['w'\] has a NaN.*nan_to_num"):
        pattern(scores)
    masks = jax.jit(pattern)(scores)
    assert not masks["w"][0, 1]
    assert count(masks) > 0


@every_pattern
@pytest.mark.parametrize("dtype", [jnp.int32, bool])
def test_scores_that_are_no_floats(pattern, dtype):
    with pytest.raises(TypeError, match=r"scores\['w'\] has dtype .*floating-point"):
        pattern({"w": jnp.ones((2, 2), dtype)})


@pytest.mark.parametrize("make", [optax_sam.unstructured, optax_sam.structured])
def test_sparsities_out_of_range(make):
    for value in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"sparsity = .* is out of range"):
            make(value)
    for value in ("half", None, True, jnp.float32(0.5), np.complex64(0.5)):
        with pytest.raises(TypeError, match="sparsity must be a Python number"):
            make(value)


def test_unknown_units_and_axes():
    with pytest.raises(ValueError, match=r"unit = 'channel' is unknown.*'layer'"):
        optax_sam.structured(0.5, unit="channel")
    with pytest.raises(ValueError, match="n = 5 is more than m = 4"):
        optax_sam.n_m(5, 4)
    with pytest.raises(ValueError, match="m = 0 is out of range"):
        optax_sam.n_m(0, 0)
    with pytest.raises(ValueError, match="n = -1 is out of range"):
        optax_sam.n_m(-1, 4)
    with pytest.raises(TypeError, match="axis must be an integer"):
        optax_sam.n_m(2, 4, axis=None)
    for axis in (2, -3):
        with pytest.raises(ValueError, match=r"scores\['w'\] .* no axis"):
            optax_sam.n_m(2, 4, axis=axis)({"w": jnp.ones((4, 4))})


def test_nan_is_not_kept_in_a_group_that_has_too_few_others():
    scores = np.float32([[1, np.nan, np.nan, np.nan, 4, 3, 2, 1]])
    mask = jax.jit(optax_sam.n_m(2, 4))(scores)
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0, 1, 1, 0, 0]])
