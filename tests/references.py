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
    """To a length; zeros stay what they are."""
    return rho * v / np.sqrt((v**2).sum()) if v.any() else v


class Sgd:
    """SGD with momentum, which takes in the weight decay; `tx` is Optax's.

    Attributes:
      momentum: That before a step.
    """

    def __init__(self, decay):
        self.decay, self.momentum = decay, np.zeros(7)
        self.tx = optax.chain(
            optax.add_decayed_weights(decay), optax.sgd(RATE, momentum=MOMENTUM)
        )

    def update(self, direction, w):
        self.momentum = MOMENTUM * self.momentum + direction + self.decay * w
        return -RATE * self.momentum


class AdamW:
    """The same of Adam with decoupled weight decay; its momentum is not debiased."""

    def __init__(self, decay, rate=0.05, b1=0.9, b2=0.99, eps=1e-6):
        self.decay, self.rate, self.b1, self.b2, self.eps = decay, rate, b1, b2, eps
        self.momentum, self.squares, self.count = np.zeros(7), np.zeros(7), 0
        self.tx = optax.adamw(rate, b1, b2, eps, weight_decay=decay)

    def update(self, direction, w):
        self.count += 1
        self.momentum = self.b1 * self.momentum + (1 - self.b1) * direction
        self.squares = self.b2 * self.squares + (1 - self.b2) * direction**2
        mean = self.momentum / (1 - self.b1**self.count)
        size = np.sqrt(self.squares / (1 - self.b2**self.count)) + self.eps
        return -self.rate * (mean / size + self.decay * w)


def trajectory(step, base):
    """Parameters after each step around a base.

    Args:
      step: `step(w, g, gradient_at) -> (direction, extra)`: what the base takes in, and
        what is added to its update.
      base: One of the above, whose momentum a step may read.

    Returns:
      Parameters `[steps, 7]`.
    """
    w, found = START, []
    for batch in BATCHES:
        gradient_at = functools.partial(gradient, batch=batch)
        direction, extra = step(w, gradient_at(w), gradient_at)
        w = w + base.update(direction, w) + extra
        found.append(w)
    return np.stack(found)


def replayed(tx, losses=losses):
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


def assert_replays(tx, step, base):
    """Whether an optimizer takes the steps of a paper."""
    expected = trajectory(step, base)
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
