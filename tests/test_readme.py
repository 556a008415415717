"""The README's commands are what they should be, its quickstart is short and learns."""

import documents
import jax.numpy as jnp
import numpy as np
import pytest

TUTORIAL = documents.python(documents.TUTORIAL)


def test_the_quickstart_is_the_tutorial_s():
    assert documents.python("README.md") == {"Quickstart": TUTORIAL["Flax linen"]}


@pytest.mark.parametrize("heading", ["Flax linen", "Flax NNX"])
def test_quickstarts_have_at_most_twenty_lines(heading):
    assert len(TUTORIAL[heading].strip().splitlines()) <= 20


def test_linen_quickstart_learns():
    scope = documents.run(documents.TUTORIAL, "Flax linen")
    losses = scope["loss_fn"](scope["params"], scope["batch"])
    assert np.mean(losses) < 1.0  # From about log(10) = 2.3.


def test_nnx_quickstart_learns():
    scope = {}
    exec(TUTORIAL["Flax NNX"], scope)
    assert scope["loss"] < 1.0  # From about log(10) = 2.3.
    _, norm, _, dropout, _ = scope["model"].layers
    assert jnp.any(norm.mean[...] != 0)  # The clean passes moved it away from zero.
    assert dropout.rngs.count[...] == 100


def test_commands():
    main_job, tests = documents.commands("README.md")
    assert main_job.endswith("examples/compare.py")
    assert tests.endswith("-m pytest -n 2")
