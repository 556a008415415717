"""The worked example of static masks, and the study of accuracy against time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import static_masks
from example_support import check_refusal, make_dataset, results
from sam_examples.analysis.layers import layers_of
from sam_examples.benchmarking import measure
from sam_examples.models.convolution import PatchConv
from sam_examples.models.resnet import ResNet
from sam_examples.study.configurations import CONFIGURATIONS, SAM, SGD
from sam_examples.study.digits import Digits, best_rho
from sam_examples.study.prices import ONE, SOME
from sam_examples.training.epochs import draw_epoch
from sam_examples.training.step import make_loss_fn
from study import digits

import optax_sam

LAST = "last stage, head"
MODEL = ResNet((), 3, width=4, conv=PatchConv)


def test_static_masks_prints_choices_accuracies_and_times(tmp_path, capsys):
    sizes = ["--stages", "1", "--width", "2", "--epochs", "3", "--choose-every", "1"]
    options = ["--rho", "0.1", "--num-examples", "8", "--sparsity", "0.3"]
    static_masks.main([*sizes, *options, "--out", str(tmp_path / "run")])

    figures = results(tmp_path / "run")
    assert [choice["epoch"] for choice in figures["choices"]] == [0, 1, 2]
    chosen = {tuple(choice["layers"]) for choice in figures["choices"]}
    assert () not in chosen
    sparse, sam = figures["methods"]["static masks"], figures["methods"]["SAM"]
    assert (sparse["programs"], sam["programs"]) == (len(chosen), 1)
    total = sum(figures["cost"].values())
    for layers in chosen:
        assert sum(figures["cost"][name] for name in layers) <= 0.7 * total
    assert figures["step_time_over_sam"] > 0
    output, progress = capsys.readouterr()
    last = figures["choices"][2]["layers"]
    left_out = [name for name in figures["cost"] if name not in last]
    assert f"epoch 3: leaves out {', '.join(left_out)}" in output
    assert f"{100 * sparse['test_accuracy']:.1f}" in output
    assert "of SAM's time" in output
    assert "epoch" in progress


@pytest.mark.full
def test_a_mask_that_returns_is_not_compiled_again():
    def make_tx(mask):
        ascent = optax.chain(
            optax_sam.perturb_only(mask), optax_sam.scale_to_radius(0.1)
        )
        return optax_sam.sharpness_aware(optax.sgd(0.1), ascent)

    dataset = make_dataset()
    contestant = static_masks.Contestant(make_tx, MODEL, dataset, seed=0)
    epoch = draw_epoch(dataset.train, 8, seed=0, epoch=0)
    layers = list(contestant.state.params)
    for layer in (layers[0], layers[1], layers[0]):
        mask = optax_sam.select_layers(layer)(contestant.state.params)
        assert layers_of(mask) == [layer]
        contestant.train_epoch(mask, epoch)
    assert contestant.num_programs == 2
    assert len(contestant.step_seconds) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1"], "--sparsity must be at least 0 and below 1, got 1.0"),
        (["--choose-every", "0"], "--choose-every must be at least 1, got 0"),
        (["--rho", "-1"], "rho = -1 is out of range"),
        (["--epochs", "0"], "--epochs must be at least 1"),
    ],
)
def test_static_masks_refuses_bad_options_in_one_line(capsys, options, message):
    check_refusal(capsys, message, static_masks.main, options)


@pytest.mark.full
def test_the_study_writes_a_table_and_plots_and_repeats_nothing(
    tmp_path, capsys, monkeypatch
):
    sizes = ["--epochs", "1", "--width", "2", "--seeds", "2", "--tuning-seeds", "1"]
    timing = ["--timing-widths", "2", "--timing-rounds", "1"]
    out = ["--out", str(tmp_path / "run")]
    options = [*sizes, *out, "--configurations", SGD, LAST]
    digits.main(["sparse", *options, *timing])

    first = results(tmp_path / "run")
    assert list(first["rows"]) == [SGD, LAST]
    assert {len(row["test"]) for row in first["rows"].values()} == {2}
    row = first["rows"][LAST]
    tried = {float(rho): score for rho, score in row["valid_accuracy_of_rho"].items()}
    assert tried[row["rho"]] == max(tried.values())
    assert row["kind"] == "layers"
    times = first["times"]["2"]
    assert times[SGD] == 1
    assert math.isfinite(times[LAST])
    assert times["sgd_seconds"] > 0
    plot = tmp_path / "run" / "accuracy-2.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    output, progress = capsys.readouterr()
    mean = 100 * np.mean(row["test"])
    assert f"{mean:.1f} ± " in output
    assert f"{LAST}, rho {row['rho']:g}" in progress

    monkeypatch.setattr(Digits, "make_train", None)
    digits.main(["sparse", *options, "--skip-timing"])
    again = results(tmp_path / "run")
    assert again["rows"] == first["rows"]
    assert again["times"] == {}
    with pytest.raises(SystemExit, match="2"):
        digits.main(["sparse", *options, "--skip-timing", "--noise", "0.1"])
    assert "or another --out" in capsys.readouterr().err


@pytest.mark.full
def test_the_study_of_prices_times_steps_that_ascend_now_and_then(tmp_path):
    names = [SGD, "Momentum-SAM", "LookSAM-2, alpha 0.7", "SAM, late half"]
    sizes = ["--epochs", "1", "--width", "2", "--seeds", "1", "--tuning-seeds", "1"]
    timing = ["--timing-widths", "2", "--timing-rounds", "2"]
    out = ["--out", str(tmp_path / "run")]
    digits.main(["price", *sizes, *out, *timing, "--configurations", *names])
    found = results(tmp_path / "run")
    kinds = {name: row["kind"] for name, row in found["rows"].items()}
    assert kinds == dict(zip(names, ["dense", ONE, SOME, SOME], strict=True))
    assert all(math.isfinite(found["times"]["2"][name]) for name in names)


def test_a_mean_of_ratios_is_not_moved_by_outliers():
    seconds = {"a": np.array([1.0] * 10 + [3.0] * 9 + [900.0]), "b": np.ones(20)}
    assert measure.mean_time_ratio(seconds, "a", "b") == (8 * 1 + 8 * 3) / 16
    assert measure.mean_time_ratio(seconds, "b", "b") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--configurations", "all"], "--configurations are out of SGD; SAM; "),
        (["--configurations", SAM], "times are over those of SGD; add it"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--noise", "2"], "noise must be a share"),
    ],
)
def test_the_study_refuses_bad_options_in_one_line(capsys, options, message):
    check_refusal(capsys, message, digits.main, ["sparse", *options])


@pytest.mark.parametrize("peak", [0.09, 0.5, 0.7, 1.4, 5.0, 11.0])
def test_the_best_rho_lies_between_worse_neighbours(peak):
    best, scores = best_rho(lambda rho: 1 - 0.1 * abs(math.log2(rho / peak)))
    assert abs(math.log2(best / peak)) <= 0.25
    rhos = list(scores)
    assert rhos == sorted(rhos)
    assert rhos[0] < best < rhos[-1]
    assert scores[best] == max(scores.values())


def test_no_larger_rho_is_tried_after_a_collapse():
    best, scores = best_rho(lambda rho: rho if rho < 3 else 0.1)
    assert best == 2.828
    assert list(scores) == [0.25, 0.5, 1.0, 1.414, 2.0, 2.828, 4.0]


def test_the_search_ends_at_its_limits():
    assert best_rho(lambda rho: rho, high=6)[0] == 4.0
    assert best_rho(lambda rho: 1 / rho, low=-6)[0] == 0.062


@pytest.mark.full
def test_every_configuration_has_an_ascent_but_sgd():
    base = optax.sgd(0.1)
    for name, configuration in CONFIGURATIONS.items():
        if configuration.chosen is not None:
            with pytest.raises(ValueError, match="to be chosen first"):
                configuration.make_tx(base, 0.1, 10, 5)
            configuration = configuration.with_layers(True)
        tx = configuration.make_tx(base, 0.1, 10, 5)
        assert (tx is base) == (name == SGD)
        cheaper = configuration.channels < 1 or configuration.examples < 1
        assert (configuration.make_ascent_loss_fn(MODEL) is not None) == cheaper


@pytest.mark.full
def test_the_clean_pass_sees_a_share_of_examples_or_channels():
    dataset = make_dataset()
    variables = MODEL.init(jax.random.key(0), dataset.train.images, train=False)
    arguments = (dataset.train, variables["batch_stats"], jax.random.key(0))

    def gradient(loss_fn):
        def loss(params):
            losses = loss_fn(params, *arguments)[0]
            return jnp.sum(losses), losses

        return jax.grad(loss, has_aux=True)(variables["params"])

    examples = CONFIGURATIONS["quarter of the examples"].make_ascent_loss_fn(MODEL)
    assert gradient(examples)[1].shape == (4,)
    channels = CONFIGURATIONS["half the channels"].make_ascent_loss_fn(MODEL)
    sparse, losses = gradient(channels)
    dense, expected = gradient(make_loss_fn(MODEL))
    np.testing.assert_array_equal(losses, expected)
    kernel = sparse["PatchConv_0"]["kernel"]
    kept = np.any(kernel, axis=(0, 1, 2))
    assert kept.sum() == 2
    np.testing.assert_allclose(
        kernel[..., kept], dense["PatchConv_0"]["kernel"][..., kept], rtol=1e-5
    )
