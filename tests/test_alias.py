"""The aliases against the authors' own optimizers and against each other."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

GOLDEN = np.load(Path(__file__).parent / "golden" / "trajectories.npz")
NAMES = ("w0", "b0", "w1", "b1", "w2", "b2")
METHODS = {
    "sam": lambda base: optax_sam.sam(base, rho=0.1),
    "vasso_t04": lambda base: optax_sam.vasso(base, rho=0.1, theta=0.4),
    "vasso_t09": lambda base: optax_sam.vasso(base, rho=0.2, theta=0.9),
    "asam": lambda base: optax_sam.asam(base, rho=0.5),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_reproduces_the_authors_trajectory(method):
    tx = METHODS[method](
        optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    )
    loss_fn = problems.perceptron(jnp.float64).loss_fn
    step = optax_sam.value_and_update(loss_fn, tx)

    @jax.jit
    def run(params, batches):
        def body(carry, batch):
            params, opt_state = carry
            value, updates, opt_state = step(params, opt_state, batch)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), (params, value)

        return jax.lax.scan(body, (params, tx.init(params)), batches)[1]

    start = {name: jnp.asarray(GOLDEN[f"init/{name}"]) for name in NAMES}
    trajectory, losses = run(
        start, (jnp.asarray(GOLDEN["X"]), jnp.asarray(GOLDEN["Y"]))
    )
    for name in NAMES:
        assert trajectory[name].dtype == jnp.float64
        np.testing.assert_allclose(
            trajectory[name], GOLDEN[f"{method}/{name}"], rtol=0, atol=2e-6
        )
    np.testing.assert_allclose(losses, GOLDEN[f"{method}/losses"], rtol=0, atol=2e-6)


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
    ],
    ids=["sam", "vasso", "asam"],
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
