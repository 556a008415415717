from decimal import Decimal
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax import lax
from methods import cover

from optax_sam import implicit

DENSE = (((1,), (0,)), ((), ()))
CONV = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
# name: attribute of the backward, product of lax, shapes of x and w, arguments, axes of
# the output features in w and y.
CASES = {
    "dense": ("dot_general", (8, 6), (6, 10), (DENSE,), {}, (1, 1)),
    "several axes": (
        "dot_general",
        (4, 3, 5, 2),
        (3, 2, 4, 6),
        ((((1, 3), (0, 1)), ((), ())),),
        {},
        (3, 3),
    ),
    "batched": (
        "dot_general",
        (3, 4, 5),
        (3, 6, 5),
        ((((2,), (2,)), ((0,), (0,))),),
        {},
        (1, 2),
    ),
    "transposed kernel": (
        "dot_general",
        (8, 6),
        (10, 6),
        ((((1,), (1,)), ((), ())),),
        {},
        (0, 1),
    ),
    "conv": (
        "conv_general_dilated",
        (2, 9, 8, 3),
        (3, 3, 3, 6),
        ((1, 1), "SAME"),
        CONV,
        (3, 3),
    ),
    "conv stride dilation": (
        "conv_general_dilated",
        (2, 9, 8, 3),
        (3, 2, 3, 6),
        ((2, 1), [(1, 2), (0, 1)]),
        {"rhs_dilation": (1, 2), "lhs_dilation": (2, 1), **CONV},
        (3, 3),
    ),
    "conv default layout": (
        "conv_general_dilated",
        (2, 3, 9),
        (6, 3, 4),
        ((2,), "VALID"),
        {},
        (0, 1),
    ),
    "conv odd layout": (
        "conv_general_dilated",
        (9, 2, 8, 3),
        (3, 6, 3, 3),
        ((1, 1), "SAME"),
        {
            "dimension_numbers": lax.ConvDimensionNumbers(
                (1, 3, 0, 2), (1, 3, 0, 2), (2, 0, 1, 3)
            )
        },
        (1, 0),
    ),
}
GROUPED = {
    "conv groups": (
        "conv_general_dilated",
        (2, 9, 8, 4),
        (3, 3, 2, 6),
        ((1, 1), "SAME"),
        {"feature_group_count": 2, **CONV},
        (3, 3),
    ),
    "conv batch groups": (
        "conv_general_dilated",
        (4, 9, 8, 3),
        (3, 3, 3, 6),
        ((1, 1), "SAME"),
        {"batch_group_count": 2, **CONV},
        (3, 3),
    ),
}
ALL = CASES | GROUPED
every_case = pytest.mark.parametrize("case", ALL)


@cache
def setup(case, dtype=jnp.float32):
    """The dense product, its arguments, and a cotangent of its output."""
    name, x_shape, w_shape, args, kwargs, _ = ALL[case]
    rng = np.random.default_rng(0)
    x, w = (np.asarray(rng.normal(size=s), dtype) for s in (x_shape, w_shape))
    dense = partial_last(getattr(lax, name), args, kwargs)
    dy = np.asarray(rng.normal(size=jax.eval_shape(dense, x, w).shape), dtype)
    return dense, x, w, dy


def partial_last(product, args, kwargs):
    return lambda x, w: product(x, w, *args, **kwargs)


def with_backward(case, backward):
    name, _, _, args, kwargs, _ = ALL[case]
    return partial_last(getattr(backward, name), args, kwargs)


@partial(jax.jit, static_argnames="product")
def pull_back(product, x, w, dy):
    return jax.vjp(product, x, w)[1](dy)


def slice_norms(x, axis):
    x = np.moveaxis(np.asarray(x, np.float64), axis, 0)
    return np.sqrt(np.sum(x.reshape(x.shape[0], -1) ** 2, axis=1))


def expected_choice(case, w, dy, by, count):
    w_axis, y_axis = ALL[case][-1]
    score = slice_norms(w, w_axis)
    if by == "gradient":
        score = score * slice_norms(dy, y_axis)
    return np.sort(np.argsort(-score, kind="stable")[:count])


def keep_only(x, kept, axis):
    keep = np.zeros(x.shape[axis], bool)
    keep[kept] = True
    shape = np.ones(x.ndim, int)
    shape[axis] = -1
    return np.where(keep.reshape(shape), x, np.zeros_like(x))


@cover(case=ALL.keys(), choice=[("gradient", 0.3), ("weight", 0.5), ("gradient", 0.99)])
def test_channels_are_the_dense_backward_of_the_chosen_features(case, choice):
    by, sparsity = choice
    dense, x, w, dy = setup(case)
    w_axis, y_axis = ALL[case][-1]
    size = w.shape[w_axis]
    count = max(1, size - int(size * Decimal(str(sparsity))))
    kept = expected_choice(case, w, dy, by, count)
    expected = pull_back(dense, x, w, keep_only(dy, kept, y_axis))
    sparse = with_backward(case, implicit.Channels(sparsity, by))
    actual = pull_back(sparse, x, w, dy)
    problems.assert_trees_close(actual, expected, rtol=1e-5, atol=1e-5)
    written = slice_norms(actual[1], w_axis) > 0
    np.testing.assert_array_equal(np.flatnonzero(written), kept)
    assert all(np.any(np.asarray(a)) for a in actual)


@every_case
def test_masked_is_the_dense_backward_through_the_masked_kernel(case):
    dense, x, w, dy = setup(case)
    mask = np.random.default_rng(1).random(w.shape) < 0.5
    actual = pull_back(with_backward(case, implicit.Masked(mask)), x, w, dy)
    expected_dx, _ = pull_back(dense, x, np.where(mask, w, np.zeros_like(w)), dy)
    _, expected_dw = pull_back(dense, x, w, dy)
    problems.assert_trees_equal(actual, (expected_dx, expected_dw))
    assert all(np.any(np.asarray(a)) for a in actual)


def test_masked_dense_layer_in_closed_form():
    _, x, w, dy = setup("dense")
    mask = np.random.default_rng(1).random(w.shape) < 0.5
    product = with_backward("dense", implicit.Masked(mask))
    dx, dw = pull_back(product, x, w, dy)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    np.testing.assert_allclose(dx, dy @ (w * mask).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dw, x.T @ dy, rtol=1e-5, atol=1e-6)


def test_channels_are_counted_for_the_decimal_written():
    product = implicit.Channels(0.29).dot_general
    _, dw = jax.vjp(lambda w: product(jnp.ones((1, 2)), w, DENSE), jnp.ones((2, 100)))
    assert int(dw(jnp.ones((1, 100)))[0].any(axis=0).sum()) == 71


def test_channels_of_a_dense_layer_in_closed_form():
    _, x, w, dy = setup("dense")
    product = with_backward("dense", implicit.Channels(0.5))
    dx, dw = pull_back(product, x, w, dy)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    # The norms of the terms of dx, one for each output feature.
    terms = [np.linalg.norm(np.outer(dy[:, c], w[:, c])) for c in range(10)]
    kept = np.argsort(terms)[5:]
    np.testing.assert_allclose(dx, dy[:, kept] @ w[:, kept].T, rtol=1e-5, atol=1e-6)
    expected = np.zeros_like(w)
    expected[:, kept] = x.T @ dy[:, kept]
    np.testing.assert_allclose(dw, expected, rtol=1e-5, atol=1e-6)


@every_case
def test_nothing_left_out_is_dense_bit_for_bit(case):
    dense, x, w, dy = setup(case)
    expected = pull_back(dense, x, w, dy)
    for backward in (implicit.Channels(0), implicit.Masked(np.ones(w.shape, bool))):
        actual = pull_back(with_backward(case, backward), x, w, dy)
        problems.assert_trees_equal(actual, expected)


@pytest.mark.parametrize("case", ["dense", "conv"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_are_those_of_the_dense_product(case, dtype):
    dense, x, w, dy = setup(case, dtype)
    for backward in (
        implicit.Channels(0.5),
        implicit.Masked(np.zeros(w.shape, bool)),
    ):
        sparse = with_backward(case, backward)
        expected = jax.jit(dense)(x, w)
        problems.assert_trees_equal(jax.jit(sparse)(x, w), expected)
        values, _ = jax.jit(lambda x, w, sparse=sparse: jax.vjp(sparse, x, w))(x, w)
        problems.assert_trees_equal(values, expected)
        dx, dw = pull_back(sparse, x, w, dy)
        assert dx.dtype == dw.dtype == dtype


def test_preferred_element_type_reaches_the_product():
    _, x, w, _ = setup("dense", jnp.bfloat16)
    product = implicit.Channels(0.5).dot_general

    def value_and_grads(x, w):
        y, vjp = jax.vjp(
            lambda x, w: product(x, w, DENSE, preferred_element_type=jnp.float32), x, w
        )
        return y, vjp(y)

    y, grads = jax.eval_shape(value_and_grads, x, w)
    assert y.dtype == jnp.float32
    assert {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}


def test_ties_go_to_the_first_features():
    product = implicit.Channels(0.5).dot_general
    x, w = (np.ones(shape, np.float32) for shape in ([1, 3], [3, 4]))
    dw = jax.jit(jax.grad(lambda w: product(x, w, DENSE).sum()))(w)
    np.testing.assert_array_equal(dw.any(axis=0), [True, True, False, False])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_choice_does_not_depend_on_the_scale_of_the_gradient(scale):
    _, x, w, dy = setup("dense")
    product = with_backward("dense", implicit.Channels(0.5))
    written = [np.any(pull_back(product, x, w, g)[1], axis=0) for g in (dy, dy * scale)]
    np.testing.assert_array_equal(*written)


@pytest.mark.parametrize("kind", ["channels", "masked"])
def test_gradients_that_are_not_finite_stay_so(kind):
    _, x, w, dy = setup("dense")
    w = problems.replaced(w, (slice(None), 7), 0)  # Infinity times zero is no norm.
    mask = np.ones(w.shape, bool)
    backward = implicit.Channels(0.9) if kind == "channels" else implicit.Masked(mask)
    product = with_backward("dense", backward)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        dx, dw = pull_back(product, x, w, problems.replaced(dy, (0, 7), bad))
        assert not np.all(np.isfinite(dx))
        assert not np.all(np.isfinite(dw))


def test_a_new_choice_is_not_compiled_anew():
    _, x, w, dy = setup("conv")
    traces = []

    @jax.jit
    def gradient(x, w, dy):
        traces.append(1)
        # Made anew in every trace, as in a loss function.
        product = with_backward("conv", implicit.Channels(0.5))
        return jax.vjp(product, x, w)[1](dy)[1]

    larger = np.repeat(np.float32([100, 1]), 3)
    first, second = gradient(x, w, dy * larger), gradient(x, w, dy * larger[::-1])
    np.testing.assert_array_equal(slice_norms(first, 3) > 0, [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(slice_norms(second, 3) > 0, [0, 0, 0, 1, 1, 1])
    assert len(traces) == 1


def test_equal_settings_are_equal_and_hash_alike():
    for name in ("dot_general", "conv_general_dilated"):
        one, other = (getattr(implicit.Channels(0.5), name) for _ in range(2))
        assert one == other
        assert hash(one) == hash(other)
        assert one != getattr(implicit.Channels(0.25), name)


def flops(product, x, w):
    def loss(x, w):
        return jnp.sum(jnp.square(product(x, w)))

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_compiled_flops(name):
    rng = np.random.default_rng(0)
    shapes = {
        "dense": ((256, 128), (128, 128)),
        "conv": ((2, 8, 8, 64), (3, 3, 64, 64)),
    }
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes[name])
    attribute, _, _, args, kwargs, _ = CASES[name]
    dense = flops(partial_last(getattr(lax, attribute), args, kwargs), x, w)

    def relative(backward):
        return flops(with_backward(name, backward), x, w) / dense

    # A third of the arithmetic is the forward; what is added is the choice.
    for sparsity in (0.5, 0.75):
        expected = 1 / 3 + 2 / 3 * (1 - sparsity)
        assert relative(implicit.Channels(sparsity)) == pytest.approx(
            expected, abs=0.02
        )
    assert relative(implicit.Masked(np.ones(w.shape, bool))) < 1.01


@pytest.mark.parametrize("transform", ["vmap", "scan", "cond", "remat", "no jit"])
@pytest.mark.parametrize("kind", ["channels", "masked"])
def test_under_transformations(transform, kind):
    _, x, w, _ = setup("dense")
    mask = np.random.default_rng(1).random(w.shape) < 0.5
    backward = implicit.Channels(0.5) if kind == "channels" else implicit.Masked(mask)
    product = with_backward("dense", backward)

    def gradient(w, fn=product):
        return jax.grad(lambda x, w: jnp.sum(fn(x, w) ** 2), (0, 1))(x, w)

    remat = partial(gradient, fn=jax.checkpoint(product))
    ws = np.stack([w, w[::-1]])
    expected = jax.tree.map(lambda *g: np.stack(g), *map(jax.jit(gradient), ws))
    actual = {
        "vmap": jax.jit(jax.vmap(gradient)),
        "scan": jax.jit(lambda ws: lax.scan(lambda _, w: (0, gradient(w)), 0, ws)[1]),
        "cond": jax.jit(
            jax.vmap(
                partial(
                    gradient,
                    fn=lambda x, w: lax.cond(True, product, lambda x, w: x @ w, x, w),
                )
            )
        ),
        "remat": jax.jit(lambda ws: lax.map(remat, ws)),
        "no jit": lambda ws: jax.tree.map(
            lambda *g: np.stack(g), *(gradient(w) for w in ws)
        ),
    }[transform](ws)
    problems.assert_trees_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_summed_over_devices_that_choose_for_themselves():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    _, x, w, _ = setup("dense")
    for backward in (
        implicit.Channels(0.5),
        implicit.Channels(0.5, by="weight"),
        implicit.Masked(np.ones(w.shape, bool)),
    ):
        product = with_backward("dense", backward)

        def gradient(w, x, product=product):
            return jax.grad(lambda w: lax.pmean(jnp.sum(product(x, w) ** 2), "data"))(w)

        # Without the sum check_vma refuses the gradient, even of a single device.
        specs = {"in_specs": (P(), P("data")), "out_specs": P()}
        actual = jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))(w, x)
        loss = lambda w, fn=product: jnp.sum(fn(x, w) ** 2)  # noqa: E731
        expected = jax.jit(jax.grad(loss))(w)
        problems.assert_trees_close(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 2, np.nan])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"Channels: sparsity = .* is out of range"):
        implicit.Channels(sparsity)


@pytest.mark.parametrize("sparsity", ["0.5", None, True, jnp.float32(0.5)])
def test_sparsity_that_is_no_number(sparsity):
    with pytest.raises(TypeError, match="sparsity must be a Python number"):
        implicit.Channels(sparsity)


def test_unknown_choice():
    with pytest.raises(ValueError, match="'gradient' or 'weight', got 'random'"):
        implicit.Channels(0.5, by="random")
