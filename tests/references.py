"""Steps of the papers in plain NumPy, to compare trajectories with.

Nothing here uses the library. Parameters are one vector; losses are those of logistic
regression, whose gradients can be written down.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems

import optax_sam

_RNG = np.random.default_rng(0)
START = _RNG.normal(size=7)
BATCHES = [
    (_RNG.normal(size=(12, 7)), _RNG.integers(2, size=12) * 2.0 - 1) for _ in range(30)
]
RATE, MOMENTUM = 0.3, 0.9


def gradient(w, batch):
    """Of the mean of log(1 + exp(-y x.w))."""
    x, y = batch
    return -(x * (y / (1 + np.exp(y * (x @ w))))[:, None]).mean(0)


def losses(params, batch):
    x, y = batch
    w = jnp.concatenate([params["a"], params["b"]])
    return jnp.logaddexp(0.0, -y * (x @ w))


def scaled(v, rho):
    return rho * v / np.sqrt((v**2).sum())


def trajectory(step, decay):
    """Parameters after each step of SGD with momentum and weight decay.

    Args:
      step: `step(w, g, gradient_at) -> (direction, extra)`: what momentum takes in, and
        what is added to the update beside it.
      decay: Weight decay, added to what momentum takes in.

    Returns:
      Parameters `[steps, 7]`.
    """
    w, velocity, found = START, np.zeros(7), []
    for batch in BATCHES:
        gradient_at = functools.partial(gradient, batch=batch)
        direction, extra = step(w, gradient_at(w), gradient_at)
        velocity = MOMENTUM * velocity + direction + decay * w
        w = w - RATE * velocity + extra
        found.append(w)
    return np.stack(found)


def base(decay):
    return optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(RATE, momentum=MOMENTUM)
    )


def replayed(tx):
    """The same of an optimizer, through `value_and_update`, in float64."""
    with jax.enable_x64(True):
        params = {"a": jnp.asarray(START[:3]), "b": jnp.asarray(START[3:])}
        step = optax_sam.value_and_update(losses, tx)

        def body(carry, batch):
            params, opt_state = carry
            _, updates, opt_state = step(params, opt_state, batch)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), jnp.concatenate([params["a"], params["b"]])

        batches = jax.tree.map(lambda *x: jnp.stack(x), *BATCHES)
        run = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), batches)[1])
        return np.asarray(run(params))


def assert_replays(tx, step, decay):
    """Whether an optimizer takes the steps of a paper."""
    expected = trajectory(step, decay)
    np.testing.assert_allclose(replayed(tx), expected, rtol=1e-11, atol=1e-12)


def assert_is(tx, other, steps=20):
    """Whether two optimizers take the same steps, to the last bit.

    In code that is not optimised: else a product may be rounded with a sum, or alone.
    """
    problem = problems.perceptron()

    def trained(tx):
        level = {"xla_backend_optimization_level": 0}
        run = jax.jit(problems.training(tx, problem, steps), compiler_options=level)
        return run(problem.params, tx.init(problem.params))[0]

    problems.assert_trees_equal(trained(tx), trained(other))
