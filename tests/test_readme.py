"""The README's code runs, and its quickstarts are short and learn."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from sam_examples.config_file import parse

import optax_sam

README = (Path(__file__).parent.parent / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(
    LINEN,
    NNX,
    COMPOSING,
    BY_HAND,
    CHEAPER,
    SHARD_MAP,
    DIAGNOSTICS,
    IN_PARTS,
    FLOAT16,
) = CODE
COMMANDS = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)


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
    from flax import nnx

    trained = nnx.as_pure(nnx.state(scope["model"], nnx.Param))
    problems.assert_trees_equal(trained, scope["params"])
    paths = jax.tree.leaves_with_path(scope["rest"])
    (mean,) = [x for path, x in paths if "mean" in jax.tree_util.keystr(path)]
    assert mean.shape == (32,)
    assert jnp.any(mean != 0)  # The clean passes moved it away from zero.


def test_composing_and_by_hand():
    problem = problems.perceptron()
    scope = {"jax": jax, "optax": optax, "optax_sam": optax_sam}
    exec(COMPOSING, scope)
    mean_loss = problems.mean_loss(problem)
    scope |= {
        "params": problem.params,
        "opt_state": scope["tx"].init(problem.params),
        "grads": jax.grad(mean_loss)(problem.params),
        "loss_fn": problem.loss_fn,
        "batch": problem.batch,
        "mean_loss": mean_loss,
    }
    exec(BY_HAND, scope)
    assert problems.norm(scope["updates"]) > 0


def test_cheaper_steps():
    scope = {}
    exec(LINEN + CHEAPER, scope)
    params, batch, tx = scope["params"], scope["batch"], scope["tx"]
    # The names and parameters of the layers are those of the dense model.
    sparse = scope["sparse_model"].apply(params, batch["x"])
    dense = scope["model"].apply(params, batch["x"])
    np.testing.assert_array_equal(sparse, dense)
    opt_state = tx.init(params)
    value, updates, _ = scope["step"](params, opt_state, batch)
    quarter = scope["ascent_loss_fn"](params, batch)
    assert quarter.shape == (16,)
    np.testing.assert_allclose(value, quarter.mean(), rtol=1e-5)
    assert problems.norm(updates) > 0


def test_shard_map():
    scope = {}
    exec(LINEN + SHARD_MAP, scope)
    inputs = scope["params"], scope["opt_state"], scope["batch"]
    assert len(jax.devices()) > 1
    alone = optax_sam.value_and_update(scope["loss_fn"], scope["tx"])(*inputs)
    problems.assert_trees_close(scope["step"](*inputs), alone, rtol=1e-4, atol=1e-6)


def test_diagnostics():
    scope = {}
    exec(LINEN + DIAGNOSTICS, scope)
    figures = scope["figures"]
    losses = scope["loss_fn"](scope["params"], scope["batch"])
    np.testing.assert_allclose(
        figures["this step"].clean_loss, losses.mean(), rtol=1e-5
    )
    # SAM's step is where the search for the worst case begins.
    assert figures["worst in a ball"] >= figures["this step"].gap > 0
    assert np.all(np.diff(figures["largest eigenvalues"]) <= 0)
    assert figures["gradient noise"] > 0


def test_commands():
    main_job, tests, application, processes = COMMANDS
    assert main_job.endswith("examples/compare.py")
    assert tests.endswith("-m pytest -n 2")
    assert "examples/multi_process.py" in processes
    script, *options = application.split()[1:]
    assert script == "examples/train.py"
    asked = parse(options)
    assert (asked.dataset, asked.model, asked.epochs) == ("cifar10", "resnet8", 3)
