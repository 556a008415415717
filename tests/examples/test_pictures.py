import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pictures
import pytest
from compare import compare
from example_support import TINY, check_refusal
from sam_examples.analysis.example_weights import WeightsOverTime, make_weigh
from sam_examples.data import load_digits, normalized
from sam_examples.reporting.figures import plot_loss_surfaces
from sam_examples.settings.methods import hyperparameters, make_tx
from sam_examples.training.build import make_network
from sam_examples.training.step import TrainState, make_loss_fn

NAMES = ("accuracy", "loss_surface", "spectrum", "weights")


@pytest.mark.full
def test_one_command_draws_four_pictures(tmp_path, capsys):
    sizes = ["--seeds", "1", "--epochs", "2", "--points", "3", "--iterations", "2"]
    pictures.main([*TINY, *sizes, "--out", str(tmp_path)])
    for name in NAMES:
        content = (tmp_path / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000  # More than an empty page.
        assert f"{name}.png" in capsys.readouterr().out or name != NAMES[0]
    figures = json.loads((tmp_path / "figures.json").read_text())
    for method in ("SGD", "SAM"):
        spectrum = figures["spectrum"][method]
        assert spectrum["largest eigenvalue"] > 0
        assert spectrum["standard error of the trace"] > 0
        assert figures["training loss at the solution"][method] > 0


@pytest.fixture(scope="module")
def trained():
    """Weights over a training by RW-SAM, and its last state."""
    options = pictures.tyro.cli(
        pictures.Options, args=[*TINY, "--seeds", "1", "--epochs", "2"]
    )
    dataset = load_digits(0.5, 0)
    model = make_network(options, dataset)
    values = hyperparameters(["rw_sam"], ["strength=3"])["rw_sam"]
    history = WeightsOverTime(model, dataset, 64, values)
    tx = make_tx("rw_sam", optax.sgd(0.1), values, 32)
    contestants = compare(options, [dataset], {"rw_sam": tx}, history)
    return dataset, model, values, history, contestants["rw_sam"].state


@pytest.mark.full
def test_weights_are_those_of_the_method(trained):
    dataset, model, values, history, state = trained
    assert len(history.weights) == 2
    for weights in history.weights:
        assert weights.shape == (16, 64)
        np.testing.assert_allclose(weights.mean(axis=1), 1, rtol=1e-5)
        assert weights.std() > 0.05
    # Over many vectors of signs, the slopes are the norms of the gradients.
    batches = jax.tree.map(
        lambda x: x[history.index[:1]], normalized(dataset.train, dataset)
    )
    key = jax.random.key(3)
    many = values | {"estimator": "jvp", "num_probes": 64}
    weights = make_weigh(model, many)(state, batches, key)[0]
    single = make_weigh(model, values | {"strength": 0.0})(state, batches, key)[0]
    np.testing.assert_array_equal(single, 1.0)

    def losses(params):
        batch = jax.tree.map(lambda x: x[0], batches)
        return make_loss_fn(model)(params, batch, state.batch_stats, key)[0]

    gradients = jax.jit(jax.jacrev(losses))(state.params)
    squares = jax.tree.map(lambda g: jnp.sum(g.reshape(64, -1) ** 2, 1), gradients)
    norms = np.sqrt(sum(jax.tree.leaves(squares)))
    assert np.corrcoef(np.log(weights), norms)[0, 1] > 0.8
    assert isinstance(state, TrainState)


def test_a_surface_may_be_flat(tmp_path):
    steps = np.linspace(-1, 1, 3)
    plot_loss_surfaces({"SGD": np.ones((3, 3))}, steps, "Flat", tmp_path / "flat.png")
    assert (tmp_path / "flat.png").read_bytes().startswith(b"\x89PNG")


BAD_OPTIONS = {
    "extent": (["--extent", "0"], "--extent must be positive, got 0"),
    "even": (["--points", "4"], "--points must be an odd number of at least 3"),
    "few": (["--points", "1"], "--points must be an odd number of at least 3"),
    "iterations": (["--iterations", "1"], "--iterations must be at least 2"),
    "seeds": (["--seeds", "0"], "--seeds must be at least 1"),
    "method": (["--hyperparameters", "theta=1"], "no chosen method takes 'theta'"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused_in_one_line(capsys, options, message):
    check_refusal(capsys, message, pictures.main, options)
