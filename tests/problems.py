"""Small problems that the tests share, and the steps they take on them."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_sam


class Problem(NamedTuple):
    params: Any
    loss_fn: Callable[[Any, Any], jax.Array]  # (params, batch) -> losses [B]
    batch: Any


def quadratic_losses(params, batch):
    distances = jax.tree.map(lambda w, x: 0.5 * (w - x) ** 2, params, batch)
    return sum(x.reshape(x.shape[0], -1).sum(1) for x in jax.tree.leaves(distances))


def quadratic(dtype=jnp.float32) -> Problem:
    """Losses `|w - x_i|^2 / 2`, whose gradients are `w - x_i`, on a nested tree."""
    rng = np.random.default_rng(0)
    params = {
        "layer": {
            "w": np.asarray(rng.normal(size=(1, 3, 2)), dtype),
            "b": np.asarray(rng.normal(size=(1, 2)), dtype),
        },
        "scale": np.asarray(rng.normal(size=(1, 1)), dtype),
    }
    batch = jax.tree.map(
        lambda p: np.asarray(rng.normal(size=(8, *p.shape[1:])), dtype), params
    )
    return Problem(params, quadratic_losses, batch)


def perceptron_logits(params, batch):
    x, _ = batch
    layers = len(params) // 2
    for i in range(layers):
        x = x @ params[f"w{i}"] + params[f"b{i}"][None]
        x = jnp.tanh(x) if i < layers - 1 else x
    return x


def cross_entropy(logits, batch):
    _, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def perceptron_losses(params, batch):
    return cross_entropy(perceptron_logits(params, batch), batch)


def perceptron(dtype=jnp.float32, sizes=(6, 8, 8, 4), batch_size=16) -> Problem:
    """Cross-entropy of a small tanh network."""
    rng = np.random.default_rng(0)
    params = {}
    for i, (m, n) in enumerate(itertools.pairwise(sizes)):
        params[f"w{i}"] = np.asarray(rng.normal(size=(m, n)) / m**0.5, dtype)
        params[f"b{i}"] = np.asarray(0.1 * rng.normal(size=n), dtype)
    x = np.asarray(rng.normal(size=(batch_size, sizes[0])), dtype)
    labels = np.asarray(rng.integers(sizes[-1], size=batch_size), np.int32)
    return Problem(params, perceptron_losses, (x, labels))


def replaced(x: Any, index: Any, value: Any) -> np.ndarray:
    """A copy of an array, on the host, with other entries."""
    x = np.array(x)
    x[index] = value
    return x


@functools.partial(jax.jit, static_argnames="loss_fn")
def _mean_loss(loss_fn, params, batch):
    return jnp.mean(loss_fn(params, batch))


def mean_loss(problem: Problem) -> Callable[[Any], jax.Array]:
    return lambda params: _mean_loss(problem.loss_fn, params, problem.batch)


@functools.partial(jax.jit, static_argnames="loss_fn")
def value_and_grad(loss_fn, params, batch):
    """Of the mean loss, compiled once for each function and shape."""
    return jax.value_and_grad(lambda p: jnp.mean(loss_fn(p, batch)))(params)


def gradient(problem: Problem) -> Any:
    """Of the mean loss at the parameters, on the host as the problem is."""
    return jax.device_get(
        value_and_grad(problem.loss_fn, problem.params, problem.batch)[1]
    )


def training(tx, problem: Problem, steps: int) -> Callable[[Any, Any], Any]:
    """Compiles `run(params, opt_state)`: steps through `value_and_update`."""
    step = optax_sam.value_and_update(problem.loss_fn, tx)

    def body(carry, _):
        params, opt_state = carry
        _, updates, opt_state = step(params, opt_state, problem.batch)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def run(params, opt_state):
        return jax.lax.scan(body, (params, opt_state), length=steps)[0]

    return run


def train(tx, problem: Problem, steps: int) -> tuple[Any, Any]:
    """Takes compiled steps through `value_and_update`; returns params and state."""
    run = training(tx, problem, steps)
    return jax.jit(lambda params: run(params, tx.init(params)))(problem.params)


def assert_trees_equal(actual: Any, expected: Any) -> None:
    """Equal structure, dtypes and bits, NaN equal to NaN."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert jnp.asarray(a).dtype == jnp.asarray(e).dtype, path
        np.testing.assert_array_equal(a, e, err_msg=jax.tree_util.keystr(path))


def without_losses(tree: Any) -> Any:
    """The same without the losses of steps, which not every way to call them knows."""

    def is_state(x: Any) -> bool:
        return isinstance(x, optax_sam.SharpnessAwareState)

    def drop(x: Any) -> Any:
        if not is_state(x):
            return x
        losses = map(np.zeros_like, (x.clean_loss, x.perturbed_loss))
        return optax_sam.SharpnessAwareState(*x[:-2], *losses)

    return jax.tree.map(drop, tree, is_leaf=is_state)


def assert_trees_differ(actual: Any, expected: Any) -> None:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    assert any(np.any(np.asarray(a) != np.asarray(e)) for a, e in pairs)


def assert_trees_close(actual: Any, expected: Any, **tolerances) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        if jnp.issubdtype(jnp.asarray(a).dtype, jax.dtypes.prng_key):
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        np.testing.assert_allclose(
            np.asarray(a, np.float64),
            np.asarray(e, np.float64),
            err_msg=jax.tree_util.keystr(path),
            **tolerances,
        )


def norm(tree: Any) -> float:
    """The Euclidean norm of a tree, in float64 on the host."""
    return float(
        np.sqrt(
            sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree))
        )
    )


def ascend(ascent, problem, state=None, grads=None):
    """One compiled update of an ascent by hand, without the clean pass of the caller.

    The gradient, where none is given, is a tree of any numbers.
    """
    run = jax.jit(functools.partial(ascent.update, loss_fn=problem.loss_fn))
    return run(
        problem.params if grads is None else grads,
        ascent.init(problem.params) if state is None else state,
        problem.params,
        batch=problem.batch,
    )


def ascend_by(ascent_loss_fn, ascent, problem):
    """What an ascent makes of another loss in the clean pass, and its state."""
    kept = optax.GradientTransformation(lambda p: p, lambda u, state, p=None: (u, u))
    ascent = optax.chain(ascent, kept, optax.scale(0.1))
    tx = optax_sam.sharpness_aware(optax.set_to_zero(), ascent)
    step = jax.jit(
        optax_sam.value_and_update(problem.loss_fn, tx, ascent_loss_fn=ascent_loss_fn)
    )
    _, _, state = step(problem.params, tx.init(problem.params), problem.batch)
    state, updates, _ = state.ascent_state
    return updates, state
