"""The runs on CIFAR-10: their order, their files, and that they can be resumed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_files import PER_FILE, write_binaries
from example_support import check_refusal
from sam_examples.data import Split, load_cifar10, normalize
from sam_examples.models.airbench import Airbench, whitening_filters
from sam_examples.study import contestants, ledger
from sam_examples.study.cifar10 import Recipe, Trainer, shrunk, triangle
from sam_examples.study.cifar10_runs import QUESTIONS, SETTINGS
from sam_examples.study.contestants import Contestant, Group, Run
from sam_examples.study.directions import DirectionTrainer
from study import cifar10 as script

TINY = Recipe(widths=(2, 2, 2), batch_size=8, dtype="float32")


def options(data_dir, out):
    return [
        *("full", "--data-dir", str(data_dir), "--out", str(out)),
        *("--images-per-file", str(PER_FILE), "--num-valid", "4"),
        *("--recipe.widths", "2", "2", "2", "--recipe.batch-size", "8"),
        *("--recipe.dtype", "float32"),
    ]


@pytest.fixture
def data_dir(tmp_path):
    return write_binaries(tmp_path / "cifar-10-batches-bin")


def make_trainer(data_dir):
    return Trainer(load_cifar10(data_dir, num_valid=4, images_per_file=PER_FILE), TINY)


def few(monkeypatch, *chosen):
    groups = (Group("noise", chosen, (0.0, 0.4)),)
    setting = dataclasses.replace(SETTINGS["full"], groups=groups)
    monkeypatch.setitem(SETTINGS, "full", setting)


def sam(**others):
    trials = ({"learning_rate": 1.0, "rho": rho, **others} for rho in (0.1, 0.2))
    return Contestant("SAM", "sam", tuple(trials), epochs=1)


SGD = Contestant("SGD", "sgd", ({"learning_rate": 0.5},), epochs=1)
ALL = SETTINGS["full"].groups
SAM = sam()


@pytest.mark.full
def test_a_ledger_grows_and_repeats_nothing(tmp_path, data_dir, monkeypatch, capsys):
    few(monkeypatch, SGD)
    arguments = options(data_dir, tmp_path / "runs")
    script.main([*arguments, "--minutes", "9"])
    files = {path.name: path.read_text() for path in (tmp_path / "runs").iterdir()}
    assert sorted(files) == sorted(
        f"sgd-lr0.5-noise{noise}-epochs1-seed{seed}.json"
        for noise in ("0", "0.4")
        for seed in (0, 1, 2)
    )
    for text in files.values():
        result = json.loads(text)
        assert 0 <= result["valid"] <= 1
        assert 0 <= result["test"] <= 1
        assert result["step_seconds"] > 0
        assert result["device"] == jax.devices()[0].device_kind
        assert {"jax", "optax", "flax"} <= set(result["versions"])
        assert result["recipe"]["widths"] == [2, 2, 2]
    printed = capsys.readouterr().out
    assert printed.count("% held out") == 6

    script.main([*arguments, "--minutes", "9"])
    printed = capsys.readouterr().out
    assert "% held out" not in printed
    assert QUESTIONS["noise"] in printed
    assert files == {p.name: p.read_text() for p in (tmp_path / "runs").iterdir()}


def test_no_run_is_begun_without_time(tmp_path, data_dir, capsys):
    script.main([*options(data_dir, tmp_path / "runs"), "--minutes", "0"])
    assert "no runs yet" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_a_watch_knows_how_long_a_run_takes():
    watch = script.Watch(minutes=1)
    assert watch.allows("sam", epochs=10)
    watch.note("sam", seconds=40, epochs=10)
    watch.note("sam", seconds=20, epochs=10)
    assert watch.allows("sam", epochs=10)
    assert not watch.allows("sam", epochs=20)
    assert watch.allows("sgd", epochs=20)
    assert not script.Watch(minutes=0).allows("sgd")


def test_more_seeds_are_for_what_did_best_on_the_held_out_split():
    groups = [Group("noise", (SGD, SAM), (0.0, 0.4))]
    worse, better = (SAM.run(trial, 0.4, seed=0) for trial in SAM.grid)
    before = list(contestants.in_order(groups, {worse: 0.6}))
    assert [run.seed for run in before[:6]] == [0] * 6
    assert SAM.run(SAM.grid[0], 0.4, seed=1) in before
    after = list(contestants.in_order(groups, {worse: 0.6, better: 0.7}))
    assert SAM.run(SAM.grid[1], 0.4, seed=1) in after
    assert SAM.run(SAM.grid[0], 0.4, seed=1) not in after


@pytest.mark.parametrize("setting", SETTINGS)
def test_files_of_all_runs_differ(setting):
    groups = SETTINGS[setting].groups
    scores = dict.fromkeys(contestants.in_order(groups, {}), 0.5)
    runs = set(contestants.in_order(groups, scores))
    assert len({ledger.file_name(run) for run in runs}) == len(runs)


def record(ledger_, run, **figures):
    ledger_.add(run, {"valid": 0.5, "test": 0.5, "step_seconds": 0.01} | figures)


def test_a_run_comes_back_as_it_was_recorded(tmp_path):
    book = ledger.Ledger(tmp_path, TINY, ALL)
    static = dataclasses.replace(sam(perturb=("Conv_4",)), label="static")
    runs = [c.run(c.grid[0], 0.4, seed=2) for c in (SGD, SAM, static)]
    for run in runs:
        record(book, run)
    again = ledger.Ledger(tmp_path, TINY, ALL)
    assert set(again.results) == set(runs)
    assert set(again.missing()).isdisjoint(runs)


def test_a_summary_reports_test_accuracy_of_the_held_out_choice(tmp_path):
    book = ledger.Ledger(tmp_path, TINY, [Group("noise", (SGD, SAM), (0.0, 0.4))])
    for trial, valid, test in zip(SAM.grid, (0.8, 0.7), (0.6, 0.9), strict=True):
        record(book, SAM.run(trial, 0.0, seed=0), valid=valid, test=test)
    record(book, SAM.run(SAM.grid[0], 0.0, seed=1), valid=0.6, test=0.7)
    (row,) = book.summary()
    assert row["chosen"] == "learning_rate 1, rho 0.1"
    assert (row["best of"], row["seeds"]) == ("2", "2")
    assert row["test"] == "65.00 ± 7.07"


def test_runs_of_another_recipe_are_refused(tmp_path, data_dir, capsys):
    record(ledger.Ledger(tmp_path, Recipe(), ALL), SGD.run(SGD.grid[0], 0.0, seed=0))
    arguments = [*options(data_dir, tmp_path), "--minutes", "0"]
    check_refusal(capsys, "is of the recipe", script.main, arguments)


def test_a_field_that_a_recorded_recipe_lacks_was_as_by_default(tmp_path):
    run = SGD.run(SGD.grid[0], 0.0, seed=0)
    record(ledger.Ledger(tmp_path, Recipe(), ALL), run)
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    del result["recipe"]["stride"]
    path.write_text(json.dumps(result))
    assert run in ledger.Ledger(tmp_path, Recipe(), ALL).results
    with pytest.raises(ValueError, match="is of the recipe"):
        ledger.Ledger(tmp_path, Recipe(stride=2), ALL)


def test_a_ledger_needs_images(tmp_path, capsys):
    arguments = ["full", "--minutes", "1", "--out", str(tmp_path)]
    check_refusal(capsys, "--data-dir must name", script.main, arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--questions", "why"], "--questions must be out of noise, got why"),
        (["--only", "SGDM"], "--only must be out of ASAM, GSAM, "),
        (["--time-rounds", "-1"], "--time-rounds must be at least 0, got -1"),
    ],
)
def test_what_is_not_in_the_study_is_refused(options, message, capsys):
    check_refusal(capsys, message, script.main, ["full", "--minutes", "0", *options])


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(ValueError, match=r"notes\.json is no run of a ledger"):
        ledger.Ledger(tmp_path, TINY, ALL)


@pytest.mark.full
def test_a_method_that_cannot_be_compiled_costs_the_others_nothing(
    tmp_path, data_dir, monkeypatch, capsys
):
    trial = {"learning_rate": 1.0, "rho": 0.1, "key": "x"}
    broken = dataclasses.replace(SAM, label="broken", grid=(trial,))
    few(monkeypatch, broken, SGD)
    compile_run = Trainer.compile

    def compile_some(self, run):
        if run.label == "broken":
            raise ValueError("not on this card")
        compile_run(self, run)

    monkeypatch.setattr(Trainer, "compile", compile_some)
    script.main([*options(data_dir, tmp_path / "runs"), "--minutes", "9"])
    assert len(list((tmp_path / "runs").iterdir())) == 6
    assert "broken cannot be compiled: not on this card" in capsys.readouterr().err


@pytest.mark.full
def test_runs_that_differ_in_numbers_share_a_program(data_dir):
    trainer = make_trainer(data_dir)
    first, other = (SAM.run(trial, 0.0, seed=0) for trial in SAM.grid)
    trainer.compile(first)
    assert trainer.is_compiled(dataclasses.replace(other, noise=0.4, seed=1, epochs=2))
    assert not trainer.is_compiled(SGD.run(SGD.grid[0], 0.0, seed=0))
    outcome = trainer.train(other)
    assert 0 <= outcome.valid <= 1
    assert np.isfinite(outcome.train_loss)
    # And a run does not depend on which run it was compiled for.
    assert trainer.train(other)[:3] == outcome[:3]
    fresh = make_trainer(data_dir)
    fresh.compile(other)
    assert fresh.train(other)[:3] == outcome[:3]


def of_different_kinds():
    """One configuration of each method, mask, base and backward of all."""
    kinds = {}
    for group in SETTINGS["small"].groups:
        for contestant in group.contestants:
            trial = contestant.grid[0]
            words = {v for v in trial.values() if isinstance(v, (str, tuple))}
            kind = contestant.method, frozenset(words), "implicit" in trial
            kinds.setdefault(kind, contestant)
    return list(kinds.values())


def tiny_run(contestant):
    run = contestant.run(contestant.grid[-1], 0.4, seed=1)
    values = dict(run.hyperparameters)
    if "micro_batch_size" in values:
        values["micro_batch_size"] = 4
    return dataclasses.replace(run, hyperparameters=tuple(values.items()), epochs=1)


@pytest.mark.full
@pytest.mark.parametrize("contestant", of_different_kinds(), ids=lambda c: c.label)
def test_every_kind_of_contestant_has_a_program(data_dir, monkeypatch, contestant):
    # Without XLA, which takes most of the time.
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: lowered)
    trainer, run = make_trainer(data_dir), tiny_run(contestant)
    trainer.compile(run)
    assert trainer.is_compiled(run)


# What trainings differ in beside the method, which other tests train.
KINDS = (
    *("AdamW", "VaSSO, theta 0.4", "SAM, every 2nd step", "Functional SAM"),
    *("m-SAM, m = 32", "Momentum-SAM, first block", "implicit, half of the channels"),
    *("Fisher, layers, 50 %", "RW-SAM + VaSSO", "VaSSO + Sparse SAM"),
)


@pytest.mark.full
@pytest.mark.parametrize("label", KINDS)
def test_every_kind_of_contestant_trains(data_dir, label):
    contestants_ = (c for g in SETTINGS["small"].groups for c in g.contestants)
    contestant = next(c for c in contestants_ if c.label == label)
    trainer, run = make_trainer(data_dir), tiny_run(contestant)
    trainer.compile(run)
    assert np.isfinite(trainer.train(run).train_loss)


@pytest.mark.full
def test_curvature_and_noise_are_those_of_the_final_parameters(data_dir):
    recipe = dataclasses.replace(TINY, measured=8)
    dataset = load_cifar10(data_dir, num_valid=4, images_per_file=PER_FILE)
    trainer = DirectionTrainer(dataset, recipe)
    theta = {"learning_rate": 0.1, "rho": 0.0, "theta": 1.0}
    run = Run("VaSSO", "vasso", tuple(theta.items()), 0.0, 1, 0)
    trainer.compile(run)
    measures = trainer.train(run).measures
    assert measures["covariance_trace"] > 0
    assert measures["top_eigenvalue"] > 0
    # With theta 1 an average of all is the last gradient: less of it varies less.
    slow = dataclasses.replace(
        run, hyperparameters=tuple({**theta, "theta": 0.5}.items())
    )
    slower = trainer.train(slow).measures
    assert slower["cosine"] > measures["cosine"]
    assert slower["mean_cosine"] > measures["mean_cosine"]
    assert slower["relative_variance"] < measures["relative_variance"]
    # The trainings are the same, since rho is 0.
    assert slower["top_eigenvalue"] == pytest.approx(measures["top_eigenvalue"])


@pytest.mark.full
def test_steps_are_timed_in_turns(tmp_path, data_dir, monkeypatch, capsys):
    longer = dataclasses.replace(SGD, label="SGD, longer", epochs=2)
    asam = dataclasses.replace(SAM, label="ASAM", method="asam")
    few(monkeypatch, SGD, longer, SAM, asam)
    arguments = options(data_dir, tmp_path / "runs")
    # The base, which times are over, is timed as well.
    script.main([*arguments, "--time-rounds", "2", "--only", "SAM"])
    times = json.loads((tmp_path / "runs-steps.json").read_text())
    assert times["over_base"].keys() == {"SGD", "SGD, longer", "SAM"}
    assert times["over_base"]["SGD"] == times["over_base"]["SGD, longer"] == 1
    assert times["processor_seconds"].keys() == {"SGD", "SAM"}
    assert ledger.time_ratios(tmp_path / "runs") == times["over_base"]


def test_a_mean_over_pixels_takes_their_place():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    small = shrunk(Split(images, np.zeros(2)), 2).images
    assert small.shape == (2, 2, 2, 3)
    expected = images[:, :2, 2:].astype(float).mean((1, 2))
    np.testing.assert_array_equal(small[:, 0, 1], np.rint(expected))
    assert small.dtype == np.uint8


@pytest.mark.full
def test_a_recipe_may_have_the_first_images_only(data_dir):
    dataset = load_cifar10(data_dir, num_valid=4, images_per_file=PER_FILE)
    recipe = dataclasses.replace(TINY, num_images=16, stride=2, pad=0, flip=False)
    first = dataset._replace(train=dataset.train.take(slice(16)))
    run, losses = SGD.run(SGD.grid[0], 0.0, seed=0), []
    for images in (dataset, first):
        trainer = Trainer(images, recipe)
        trainer.compile(run)
        losses.append(trainer.train(run).train_loss)
    assert losses[0] == losses[1]


@pytest.mark.full
def test_rho_zero_is_the_base_and_rho_is_read(data_dir):
    trainer = make_trainer(data_dir)
    rate = {"learning_rate": 1.0}
    runs = [SGD.run(rate, 0.0, 0)]
    runs += [SAM.run({**rate, "rho": rho}, 0.0, 0) for rho in (0.0, 0.5)]
    runs = [dataclasses.replace(run, epochs=3) for run in runs]
    for run in runs[:2]:
        trainer.compile(run)
    base, nothing, sharp = (trainer.train(run).train_loss for run in runs)
    assert nothing == pytest.approx(base, rel=1e-5)
    assert abs(sharp - base) > 1e-4


def test_whitened_patches_are_uncorrelated_and_of_variance_one():
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(64, 4, 4, 3))
    images = np.repeat(np.repeat(coarse, 4, axis=1), 4, axis=2)
    images = images + 0.1 * rng.normal(size=images.shape)
    filters = whitening_filters(images, epsilon=0.0)
    assert filters.shape == (2, 2, 3, 24)
    patches = jax.lax.conv_general_dilated(
        jnp.asarray(images, jnp.float32),
        jnp.asarray(filters),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    patches = np.asarray(patches, np.float64).reshape(-1, 24)
    covariance = patches[:, :12].T @ patches[:, :12] / len(patches)
    np.testing.assert_allclose(covariance, np.eye(12), atol=1e-3)
    np.testing.assert_array_equal(patches[:, 12:], -patches[:, :12])


@pytest.mark.full
def test_whitening_is_no_parameter_and_stays_as_it_is(data_dir):
    images = load_cifar10(data_dir, num_valid=4, images_per_file=PER_FILE).train.images
    images = normalize(images, np.full(3, 125.0), np.full(3, 63.0))
    model = Airbench(widths=(2, 2, 2))
    variables = model.init(jax.random.key(0), images, train=False)
    kernels = {f"Conv_{i}" for i in range(6)} | {f"BatchNorm_{i}" for i in range(6)}
    assert set(variables["params"]) == kernels | {"Dense_0"}
    filters = jnp.asarray(whitening_filters(images))
    stats = {**variables["batch_stats"], "whitening": filters}
    logits, updated = model.apply(
        {"params": variables["params"], "batch_stats": stats},
        images,
        train=True,
        mutable=["batch_stats"],
    )
    assert logits.shape == (len(images), 10)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(updated["batch_stats"]["whitening"], filters)
    assert float(jnp.std(logits)) > 0


@pytest.mark.parametrize("name", [s for s in SETTINGS if (script.RESULTS / s).exists()])
def test_all_that_is_recorded_is_asked_for(name):
    setting, directory = SETTINGS[name], script.RESULTS / name
    runs = ledger.Ledger(directory, setting.recipe, setting.groups)
    assert set(runs.results) <= {
        contestant.run(trial, noise, seed)
        for group in setting.groups
        for contestant, noise in group.pairs
        for trial in contestant.grid
        for seed in range(group.seeds)
    }


def test_a_training_raises_and_lowers_the_learning_rate():
    rates = [float(triangle(0.5, 0.2, 99)(count)) for count in range(99)]
    assert max(rates) == pytest.approx(0.5)
    assert int(np.argmax(rates)) == 19
    assert 0 < rates[0] < 0.03
    assert 0 < rates[-1] < 0.01


def test_a_run_is_hashable_by_what_it_trains():
    run = Run("SAM", "sam", (("rho", 0.1),), 0.0, 10, 0)
    assert run in {dataclasses.replace(run, seed=1): 1, run: 2}
