"""The aliases against the authors' own optimizers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods import defaults

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


# The others differ from one of these in their hyperparameters only.
DEFAULT = ("sam", "vasso_t04", "asam", "ssamf_unstructured", "ssamf_structured",
           "ssamf_nm24", "ssamd_grad")  # fmt: skip


def golden(name):
    return {key: GOLDEN[f"{name}/{key}"] for key in NAMES}


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
    x, y = (GOLDEN[name][first:] for name in "XY")
    # Refresh i scores examples i; the four more that make the lengths equal are unused.
    refresh = [(t - first) // 6 for t in steps]
    fx = np.pad(GOLDEN["FX"], ((0, 0), (0, 4), (0, 0)))[refresh]
    fy = np.pad(GOLDEN["FY"], ((0, 0), (0, 4)))[refresh]
    return x, y, fx, fy


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", defaults(METHODS, DEFAULT))
def test_reproduces_the_authors_trajectory(method):
    tx, start = METHODS[method](BASE), golden("init")
    step = optax_sam.value_and_update(loss_fn, tx)
    assert_reproduces(method, step, start, tx.init(start), batches())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", defaults(PATTERNS, DEFAULT))
def test_reproduces_the_authors_fisher_masks(method):
    """From step 1 on: the authors' step 0 has an empty mask and is the base's."""
    tx = optax_sam.sparse_sam(
        BASE, 0.1, PATTERNS[method], refresh_every=6, num_examples=12
    )
    start = golden("init")
    first_step = jax.jit(optax_sam.value_and_update(loss_fn, BASE))
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
@pytest.mark.parametrize("method", defaults(DYNAMIC, DEFAULT))
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
