"""Steps of an installed optax_sam, against NumPy: `python .ci/smoke.py`.

Run as a script it finds what is installed and not the checkout, whose root is not on
the path then. Flax's parts are tried where Flax is installed.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_sam

CHECKOUT = Path(__file__).parents[1]
CURVATURE, START = np.array([1.0, 3.0]), np.array([1.0, -2.0])
# Examples whose mean is the curvature.
BATCH = jnp.array([[0.5, 4.0], [1.5, 2.0], [1.0, 3.5], [1.0, 2.5]])
RHO, RATE, STEPS = 0.1, 0.05, 3
# Each is SAM at these hyperparameters.
METHODS = {
    "sam": {},
    "vasso": {"theta": 1.0},
    "friendly_sam": {"sigma": 0.0},
    "sparse_sam": {"pattern": optax_sam.unstructured(0.0), "refresh_every": 1},
    "dynamic_sparse_sam": {"sparsity": 0.0, "refresh_every": 1, "decay_steps": 9},
    "rw_sam": {"strength": 0.0},
    "m_sam": {"micro_batch_size": len(BATCH)},
    "gsam": {"alpha": 0.0},
    "wsam": {"gamma": 0.5},
    "look_sam": {"every": 1},
}


def losses(params, batch):
    """The losses of single examples, whose mean has the curvature above."""
    return 0.5 * batch @ params**2


def by_hand():
    """The parameters after some steps of SAM around SGD."""
    params = START
    for _ in range(STEPS):
        gradient = CURVATURE * params
        displaced = params + RHO * gradient / np.linalg.norm(gradient)
        params = params - RATE * CURVATURE * displaced
    return params


def trained(name, hyperparameters):
    """The parameters after some steps of a method."""
    tx = getattr(optax_sam, name)(optax.sgd(RATE), rho=RHO, **hyperparameters)
    step = jax.jit(optax_sam.value_and_update(losses, tx))
    params = jnp.asarray(START, jnp.float32)
    opt_state = tx.init(params)
    for _ in range(STEPS):
        _, updates, opt_state = step(params, opt_state, BATCH)
        params = optax.apply_updates(params, updates)
    return params


def trained_by_flax():
    """The parameters of an NNX model after as many steps of SAM."""
    from flax import nnx

    from optax_sam.flax import nnx_value_and_update

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.asarray(START, jnp.float32))

    model = Model()
    tx = optax_sam.sam(optax.sgd(RATE), rho=RHO)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(nnx_value_and_update(lambda model, x: losses(model.w[...], x)))
    for _ in range(STEPS):
        step(model, optimizer, BATCH)
    return model.w[...]


def features_kept():
    """How many of four output features a sparsified layer passes a gradient through."""
    from flax import nnx

    from optax_sam import implicit

    layer = implicit.sparsify(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), implicit.Channels(0.5)
    )
    gradient = nnx.grad(lambda layer: layer(jnp.ones(3)).sum())(layer)
    return jnp.any(gradient["kernel"][...], axis=0).sum()


def main():
    """Tries every method, the diagnostics and, where it is there, what is for Flax."""
    installed = Path(optax_sam.__file__)
    assert not installed.is_relative_to(CHECKOUT / "optax_sam"), installed
    assert (installed.parent / "py.typed").exists(), "the type annotations are not seen"
    expected = by_hand()
    for name, hyperparameters in METHODS.items():
        actual = trained(name, hyperparameters)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, err_msg=name)
    params = jnp.asarray(START, jnp.float32)
    top = optax_sam.diagnostics.top_eigenvalues(losses, params, BATCH, key=0)
    np.testing.assert_allclose(top.values, [CURVATURE.max()], rtol=1e-5)
    tried = "core"
    if importlib.util.find_spec("flax"):
        np.testing.assert_allclose(trained_by_flax(), expected, rtol=1e-5)
        assert features_kept() == 2
        tried = "core and Flax"
    print(f"optax_sam {optax_sam.__version__}, jax {jax.__version__}: {tried}")


if __name__ == "__main__":
    main()
