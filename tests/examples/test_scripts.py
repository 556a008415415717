import functools

import compare
import m_sharpness
import numpy as np
import pytest
import train
from data_files import PER_FILE, write_binaries, write_pickles
from example_support import TINY, check_refusal, results
from matplotlib.figure import Figure
from sam_examples.reporting.figures import plot_test_accuracy
from sam_examples.reporting.tables import Curves, print_table, summarize
from sam_examples.settings import config
from sam_examples.settings.methods import METHODS, hyperparameters
from sam_examples.training import images, loop, trainer


def test_compare_writes_table_figure_and_figures(tmp_path, capsys):
    out = tmp_path / "new" / "comparison"
    methods = ["--methods", "sgd", "sam", "--hyperparameters", "rho=0.3"]
    sizes = ["--seeds", "2", "--epochs", "3", "--noise", "0.2", "--dropout", "0.1"]
    compare.main([*TINY, *methods, *sizes, "--out", str(out)])

    output, progress = capsys.readouterr()
    assert "seed 1, sam" in progress
    assert "loss=" in progress
    assert "accuracy=" in progress
    assert "test accuracy (%)" in output
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    figures = results(out)
    assert figures["settings"]["noise"] == 0.2
    assert figures["versions"].keys() >= {"jax", "flax", "optax", "optax_sam"}
    assert list(figures["methods"]) == ["sgd", "sam"]
    for method, changed in (("sgd", {}), ("sam", {"rho": 0.3})):
        of_method = figures["methods"][method]
        assert of_method["hyperparameters"] == changed
        assert len(of_method["seeds"]) == 2
        for curves in of_method["seeds"]:
            assert {len(curve) for curve in curves.values()} == {3}
        finals = [curves["test_accuracy"][-1] for curves in of_method["seeds"]]
        mean, std = np.mean(finals), np.std(finals, ddof=1)
        assert of_method["final_test_accuracy"] == pytest.approx(
            {"mean": mean, "std": std}
        )
        row = next(
            line for line in output.splitlines() if line.startswith(f"│ {method} ")
        )
        assert f"{100 * mean:.1f} ± {100 * std:.1f}" in row
    assert figures["methods"]["sgd"]["step_time_over_sgd"] == 1
    # The same seeds draw the same parameters and batches for every method.
    losses = [
        figures["methods"][m]["seeds"][0]["train_loss"][0] for m in ("sgd", "sam")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


@pytest.mark.full
def test_m_sharpness_plots_accuracy_over_the_size_of_micro_batches(tmp_path, capsys):
    sizes = ["--sizes", "64", "16", "--seeds", "2", "--epochs", "2"]
    m_sharpness.main([*TINY, *sizes, "--out", str(tmp_path)])
    output, progress = capsys.readouterr()
    methods = results(tmp_path)["methods"]
    assert list(methods) == ["RW-SAM", "m = 64", "m = 16"]
    for name, figures in methods.items():
        accuracy = figures["final_test_accuracy"]
        row = f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f}"
        assert any(name in line and row in line for line in output.splitlines())
    assert (tmp_path / "m_sharpness.png").read_bytes().startswith(b"\x89PNG")
    assert "seed 1, m = 16" in progress


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--sizes", "64", "24"],
            "m_sam.micro_batch_size must divide --batch-size 64, got 24",
        ),
        (["--sizes"], "--sizes must be given, got none"),
        (["--rho", "-1"], "rho = -1 is out of range"),
        (["--width", "6"], "--width must be a multiple of 4 for groups of channels"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_m_sharpness_refuses_bad_options_in_one_line(capsys, options, message):
    check_refusal(capsys, message, m_sharpness.main, options)


def test_times_are_medians_of_ratios_within_epochs():
    times = {"sgd": [1.0, 10.0, 2.0], "sam": [2.0, 30.0, 4.0]}
    curves = {
        method: [Curves([0.0], [0.0], [0.0], [0.0], seconds)]
        for method, seconds in times.items()
    }
    summary = summarize(curves)
    assert summary["sam"]["step_time_over_sgd"] == 2
    assert summary["sam"]["step_seconds"] == 4
    assert summary["sam"]["final_test_accuracy"]["std"] is None
    del curves["sgd"]
    assert "step_time_over_sgd" not in summarize(curves)["sam"]


def test_labels_are_rho_and_what_is_not_the_default():
    changes = ["rho=0.3", "normalize=True", "refresh_every=16"]
    labels = {
        method: compare.label(method, values)
        for method, values in hyperparameters(
            ["sgd", "sam", "rw_sam", "m_sam+asam", "sparse_sam"], changes
        ).items()
    }
    assert labels == {
        "sgd": "sgd",
        "sam": "sam rho=0.3",
        "rw_sam": "rw_sam rho=0.3 normalize=True",
        "m_sam+asam": "m_sam+asam rho=0.3",
        "sparse_sam": "sparse_sam rho=0.3",
    }
    assert compare.label("sam", METHODS["sam"]) == "sam rho=0.5"


def test_a_table_of_eighty_columns_has_all_of_a_label(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    curves = {
        "sgd": [Curves(*[[0.5]] * 5)] * 2,
        "m_sam rho=0.3 micro_batch_size=8": [Curves(*[[0.5]] * 5)] * 2,
    }
    print_table(summarize(curves), "Digits")
    lines = capsys.readouterr().out.splitlines()
    names = "".join(line.split("│")[1].strip() for line in lines if "│" in line)
    assert "rho=0.3micro_batch_size=8" in names


@pytest.mark.parametrize("count", [3, 12])
def test_a_legend_takes_nothing_from_the_axes(tmp_path, monkeypatch, count):
    def check(figure, path, dpi):
        figure.draw_without_rendering()
        (axes,), (legend,) = figure.axes, figure.legends
        width, height = axes.get_position().size * figure.get_size_inches()
        assert 6 < width < 7
        assert 3.4 < height < 4
        for text in legend.get_texts():
            corners = figure.transFigure.inverted().transform(text.get_window_extent())
            assert np.all((corners >= 0) & (corners <= 1))
        drawn.append(path)

    drawn = []
    monkeypatch.setattr(Figure, "savefig", check)
    changes = " sparsity=0.75 refresh_every=4 num_examples=64 fisher_estimator=probes"
    curves = [Curves(test_accuracy=[0.3, 0.5])]
    names = {f"vasso+sparse_sam rho=0.{i}{changes}": curves for i in range(count)}
    plot_test_accuracy(names, "Digits", tmp_path)
    assert drawn


@pytest.fixture
def traced(monkeypatch):
    """What the bar says while something is traced, by what makes it."""

    class Bar(loop.tqdm):
        def set_description(self, description=None, refresh=True):
            said.append(description)
            super().set_description(description, refresh)

    def spy(owner, name):
        make = getattr(owner, name)

        def make_noted(*args, **kwargs):
            made = make(*args, **kwargs)

            def noted(*args):
                while_traced.setdefault(name, []).append(said[-1])
                return made(*args)

            return noted

        monkeypatch.setattr(owner, name, make_noted)

    said, while_traced = [], {}
    monkeypatch.setattr(loop, "tqdm", Bar)
    spy(trainer, "make_step_of")
    spy(images, "make_evaluate_batch")
    spy(trainer.diagnostics, "ascent_metrics")
    return while_traced


def test_train_reports_the_last_epoch(tmp_path, capsys, traced):
    out = tmp_path / "run"
    options = ["--method", "vasso", "--epochs", "3", "--hyperparameters", "theta=0.9"]
    train.main([*TINY, *options, "--out", str(out)])

    output, progress = capsys.readouterr()
    figures = results(out)
    assert figures["hyperparameters"]["theta"] == 0.9
    assert figures["settings"]["learning_rate"] == 0.1
    assert {len(curve) for curve in figures["epochs"].values()} == {3}
    assert figures["valid_accuracy"] == figures["epochs"]["valid_accuracy"][-1]
    assert output.count("\n") == 1
    assert f"test accuracy {100 * figures['test_accuracy']:.2f} %" in output
    assert "epoch 3 of 3" in progress
    assert "epoch 3 of 3, evaluating" in progress
    assert len(traced) == 3
    for descriptions in traced.values():
        assert set(descriptions) == {"epoch 1 of 3, compiling"}
    assert "loss=" in progress
    assert "accuracy=" in progress


@pytest.mark.full
@pytest.mark.parametrize("write", [write_pickles, write_binaries])
def test_train_reads_cifar10(tmp_path, monkeypatch, write):
    small = functools.partial(
        config.load_cifar10, num_valid=5, images_per_file=PER_FILE
    )
    monkeypatch.setattr(config, "load_cifar10", small)
    directory = str(write(tmp_path / "cifar"))
    out = tmp_path / "run"
    options = ["--dataset", "cifar10", "--data-dir", directory, "--method", "sgd"]
    sizes = ["--epochs", "1", "--stages", "1", "--width", "2", "--batch-size", "8"]
    train.main([*options, *sizes, "--out", str(out)])
    figures = results(out)
    assert figures["settings"]["augment"]
    assert figures["test_accuracy"] * PER_FILE == pytest.approx(
        round(figures["test_accuracy"] * PER_FILE)
    )


def test_methods_are_told_how_long_the_training_is(monkeypatch, capsys):
    def make_tx(method, base, values, num_steps):
        assert isinstance(values["refresh_every"], int)
        raise ValueError(f"{method} for {num_steps} steps")

    monkeypatch.setattr(compare, "make_tx", make_tx)
    options = ["--epochs", "3", "--hyperparameters", "refresh_every=4"]
    options += ["--methods", "dynamic_sparse_sam"]
    message = "dynamic_sparse_sam for 48 steps"
    check_refusal(capsys, message, compare.main, options)


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as status:
        compare.main(["--help"])
    assert not status.value.code
    output = capsys.readouterr().out
    for option in ("--epochs", "--noise", "--hyperparameters", "--out", *METHODS):
        assert option in output


BAD_OPTIONS = {
    "methods": (["--methods"], "--methods must be given, got none"),
    "method": (["--methods", "adam"], "unknown method 'adam'; choose from"),
    "epochs": (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    "seeds": (["--seeds", "0"], "--seeds must be at least 1"),
    "no stages": (["--stages"], "--stages must be"),
    "stages": (["--stages", "1", "0"], "--stages must be"),
    "batch size": (["--batch-size", "2000"], "at most 1,025"),
    "noise": (["--noise", "60"], "noise must be a share from 0 to 1, got 60"),
    "dropout": (["--dropout", "1"], "--dropout must be"),
    "learning rate": (["--learning-rate", "nan"], "--learning-rate must be"),
    "weight decay": (["--weight-decay", "-1"], "--weight-decay must be"),
    "hyperparameter": (["--hyperparameters", "phi=1"], "no chosen method takes 'phi'"),
    "value": (
        ["--methods", "sgd", "asam", "--hyperparameters", "rho=-1"],
        "asam: adapt_to_scale: rho = -1 is out of range",
    ),
    "micro-batch": (
        ["--methods", "m_sam", "--batch-size", "40"],
        "m_sam.micro_batch_size must divide --batch-size 40, got 16",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_compare_refuses_bad_options_in_one_line(tmp_path, capsys, options, message):
    options = [*options, "--out", str(tmp_path / "run")]
    check_refusal(capsys, message, compare.main, options)
    assert not (tmp_path / "run").exists()


def test_an_unusable_directory_of_results_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    check_refusal(capsys, "file", train.main, ["--out", str(tmp_path / "file")])
