"""The aliases against the authors' own optimizers and against each other."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam
from optax_sam._ascents import sparse_dynamic

GOLDEN = np.load(Path(__file__).parent / "golden" / "trajectories.npz")
NAMES = ("w0", "b0", "w1", "b1", "w2", "b2")
METHODS = {
    "sam": lambda base: optax_sam.sam(base, rho=0.1),
    "vasso_t04": lambda base: optax_sam.vasso(base, rho=0.1, theta=0.4),
    "vasso_t09": lambda base: optax_sam.vasso(base, rho=0.2, theta=0.9),
    "asam": lambda base: optax_sam.asam(base, rho=0.5),
}


BASE = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
PATTERNS = {
    "ssamf_unstructured": optax_sam.unstructured(0.5),
    "ssamf_unstructured90": optax_sam.unstructured(0.9),
    "ssamf_structured": optax_sam.structured(0.5, unit="layer"),
    "ssamf_nm24": optax_sam.n_m(2, 4),
}
DYNAMIC = {
    "ssamd_grad": {"sparsity": 0.5, "drop_fraction": 0.5, "drop_by": "gradient"},
    "ssamd_weight": {"sparsity": 0.8, "drop_fraction": 0.3, "drop_by": "weight"},
}


def golden(name):
    return {key: jnp.asarray(GOLDEN[f"{name}/{key}"]) for key in NAMES}


def loss_fn(params, batch):
    return problems.perceptron(jnp.float64).loss_fn(params, batch[:2])


def scoring_loss_fn(params, batch):
    return loss_fn(params, batch[2:])


def assert_reproduces(method, step, params, opt_state, batches, first=0):
    """Compares parameters, losses and masks with those from step `first` on."""

    @jax.jit
    def run(params, opt_state):
        def body(carry, batch):
            params, opt_state = carry
            value, updates, opt_state = step(params, opt_state, batch)
            params = optax.apply_updates(params, updates)
            mask = optax.tree.get(opt_state, "mask", {})
            return (params, opt_state), (params, value, mask)

        return jax.lax.scan(body, (params, opt_state), batches)[1]

    trajectory, losses, masks = run(params, opt_state)
    tolerance = {"rtol": 0, "atol": 2e-6}
    for name in NAMES:
        expected = GOLDEN[f"{method}/{name}"][first:]
        assert trajectory[name].dtype == jnp.float64
        np.testing.assert_allclose(trajectory[name], expected, **tolerance)
    np.testing.assert_allclose(losses, GOLDEN[f"{method}/losses"][first:], **tolerance)
    return masks


def batches(first=0):
    steps = range(first, 30)
    x, y = (jnp.asarray(GOLDEN[name])[first:] for name in "XY")
    # Refresh i scores examples i; the four more that make the lengths equal are unused.
    refresh = [(t - first) // 6 for t in steps]
    fx = jnp.pad(GOLDEN["FX"], ((0, 0), (0, 4), (0, 0)))[jnp.array(refresh)]
    fy = jnp.pad(GOLDEN["FY"], ((0, 0), (0, 4)))[jnp.array(refresh)]
    return x, y, fx, fy


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_reproduces_the_authors_trajectory(method):
    tx, start = METHODS[method](BASE), golden("init")
    step = optax_sam.value_and_update(loss_fn, tx)
    assert_reproduces(method, step, start, tx.init(start), batches())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", PATTERNS)
def test_reproduces_the_authors_fisher_masks(method):
    """From step 1 on: the authors' step 0 has an empty mask and is the base's."""
    tx = optax_sam.sparse_sam(
        BASE, 0.1, PATTERNS[method], refresh_every=6, num_examples=12
    )
    start = golden("init")
    first_step = optax_sam.value_and_update(loss_fn, BASE)
    _, updates, base_state = first_step(
        start, BASE.init(start), (GOLDEN["X"][0], GOLDEN["Y"][0])
    )
    params = optax.apply_updates(start, updates)
    opt_state = tx.init(params)._replace(base_state=base_state)
    step = optax_sam.value_and_update(loss_fn, tx, scoring_loss_fn=scoring_loss_fn)
    masks = assert_reproduces(method, step, params, opt_state, batches(1), first=1)
    for name in NAMES:
        np.testing.assert_array_equal(masks[name], GOLDEN[f"{method}/mask/{name}"][:-1])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", DYNAMIC)
def test_reproduces_the_authors_dynamic_masks(method, monkeypatch):
    """With the authors' counts, whose density drifts; all else is as it ships."""
    total = 164 * (1 - DYNAMIC[method]["sparsity"])

    def authors_counts(kept, free, share):
        return tuple((total * x).astype(kept.dtype) for x in (1 - share, share))

    monkeypatch.setattr(sparse_dynamic, "_counts", authors_counts)
    tx = optax_sam.dynamic_sparse_sam(
        BASE,
        0.1,
        refresh_every=6,
        decay_steps=30,
        grow_by="gradient",
        **DYNAMIC[method],
    )
    start = golden("init")
    opt_state = optax.tree.set(tx.init(start), mask=golden(f"{method}/mask0"))
    step = optax_sam.value_and_update(loss_fn, tx)
    masks = assert_reproduces(method, step, start, opt_state, batches())
    for name in NAMES:
        np.testing.assert_array_equal(masks[name], GOLDEN[f"{method}/mask/{name}"])


def sparse(base, rho=0.1, sparsity=0.5, **options):
    pattern = optax_sam.unstructured(sparsity)
    return optax_sam.sparse_sam(base, rho, pattern, refresh_every=3, **options)


def dynamic(base, rho=0.1, sparsity=0.5, **options):
    return optax_sam.dynamic_sparse_sam(
        base, rho, sparsity, refresh_every=3, decay_steps=15, **options
    )


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("method", [sparse, dynamic])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sparsity_zero_is_sam_and_one_is_the_base(method, rescale, dtype):
    problem, base = problems.perceptron(dtype), optax.sgd(0.1, momentum=0.9)
    sam, _ = problems.train(optax_sam.sam(base, rho=0.1), problem, 20)
    plain, _ = problems.train(base, problem, 20)
    nothing, _ = problems.train(
        method(base, sparsity=1.0, rescale=rescale), problem, 20
    )
    problems.assert_trees_equal(nothing, plain)
    everything, _ = problems.train(
        method(base, sparsity=0.0, rescale=rescale), problem, 20
    )
    if rescale:  # To scale what has its length already may change the last bit.
        size = float(jnp.finfo(dtype).eps)
        problems.assert_trees_close(everything, sam, rtol=4 * size, atol=4 * size)
    else:
        problems.assert_trees_equal(everything, sam)


@pytest.mark.parametrize("method", [sparse, dynamic])
def test_rescale_brings_the_radius_back(method):
    problem = problems.perceptron()
    seen = []
    for rescale in (False, True):
        tx = method(optax.sgd(0.1), rescale=rescale, rho=0.25)
        grads = jax.grad(problems.mean_loss(problem))(problem.params)
        tx.update(
            grads,
            tx.init(problem.params),
            problem.params,
            loss_fn=problem.loss_fn,
            batch=problem.batch,
            grad_fn=lambda p, grads=grads: seen.append(p) or grads,
        )
        epsilon = jax.tree.map(jnp.subtract, seen[-1], problem.params)
        zeros = sum(int(jnp.sum(e == 0)) for e in jax.tree.leaves(epsilon))
        size = sum(e.size for e in jax.tree.leaves(epsilon))
        assert zeros == size - size // 2
        length = problems.norm(epsilon)
        assert length == pytest.approx(0.25, rel=1e-5) if rescale else length < 0.24


def test_vasso_with_theta_one_is_sam():
    problem, base = problems.perceptron(), optax.sgd(0.1, momentum=0.9)
    vasso, _ = problems.train(optax_sam.vasso(base, rho=0.1, theta=1.0), problem, 20)
    sam, _ = problems.train(optax_sam.sam(base, rho=0.1), problem, 20)
    problems.assert_trees_equal(vasso, sam)


@pytest.mark.parametrize(
    "tx",
    [
        lambda base: optax_sam.sam(base, rho=0.0),
        lambda base: optax_sam.vasso(base, rho=0.0, theta=0.4),
        lambda base: optax_sam.asam(base, rho=0.0),
        lambda base: sparse(base, rho=0.0),
        lambda base: dynamic(base, rho=0.0),
    ],
    ids=["sam", "vasso", "asam", "sparse", "dynamic"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rho_zero_is_the_base(tx, dtype):
    problem, base = problems.perceptron(dtype), optax.adamw(1e-2, eps=1e-4)
    expected, base_state = problems.train(base, problem, 20)
    actual, state = problems.train(tx(base), problem, 20)
    problems.assert_trees_equal(actual, expected)
    problems.assert_trees_equal(state.base_state, base_state)
    assert np.isfinite(problems.norm(actual))


def test_hyperparameters_by_position_and_by_name():
    base = optax.sgd(0.1)
    optax_sam.sam(base, 0.1)
    optax_sam.asam(base, 0.1)
    optax_sam.vasso(base, 0.1, 0.4)
    with pytest.raises(ValueError, match=r"rho = -1 .*>= 0"):
        optax_sam.sam(base, rho=-1)
    with pytest.raises(ValueError, match="eta"):
        optax_sam.asam(base, rho=1.0, eta=-0.1)
    with pytest.raises(ValueError, match="theta"):
        optax_sam.vasso(base, rho=0.1, theta=1.5)
    with pytest.raises(TypeError, match="accumulator_dtype"):
        optax_sam.vasso(base, rho=0.1, theta=0.5, accumulator_dtype=jnp.int32)
    with pytest.raises(ValueError, match=r"rho = -1 .*>= 0"):
        sparse(base, rho=-1)
    with pytest.raises(ValueError, match=r"sparsity = 2 .*in \[0, 1\]"):
        dynamic(base, 0.1, sparsity=2)
