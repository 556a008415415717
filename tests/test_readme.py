"""The README's code runs, and its quickstarts are short and learn."""

import documents
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

CODE = documents.python("README.md")
LINEN, NNX = CODE["Flax linen"], CODE["Flax NNX"]


@pytest.mark.parametrize("quickstart", [LINEN, NNX], ids=["linen", "nnx"])
def test_quickstarts_have_at_most_twenty_lines(quickstart):
    assert len(quickstart.strip().splitlines()) <= 20


def test_linen_quickstart_learns():
    scope = {}
    exec(LINEN, scope)
    losses = scope["loss_fn"](scope["params"], scope["batch"])
    assert np.mean(losses) < 1.0  # From about log(10) = 2.3.


def test_nnx_quickstart_learns():
    scope = {}
    exec(NNX, scope)
    assert scope["loss"] < 1.0  # From about log(10) = 2.3.
    _, norm, _, dropout, _ = scope["model"].layers
    assert jnp.any(norm.mean[...] != 0)  # The clean passes moved it away from zero.
    assert dropout.rngs.count[...] == 100


def test_composing():
    problem = problems.perceptron()
    scope = {"optax": optax, "optax_sam": optax_sam}
    exec(CODE["Composing"], scope)
    tx = scope["tx"]
    step = jax.jit(optax_sam.value_and_update(problem.loss_fn, tx))
    _, updates, _ = step(problem.params, tx.init(problem.params), problem.batch)
    assert problems.norm(updates) > 0


def test_commands():
    main_job, tests = documents.commands("README.md")
    assert main_job.endswith("examples/compare.py")
    assert tests.endswith("-m pytest -n 2")
