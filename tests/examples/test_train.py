"""The training application: its configuration, its files, and how it can be stopped."""

import csv
import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import train
from data_files import write_image_folders
from example_support import TINY, check_refusal, results
from sam_examples.reporting.metrics import MetricsWriter
from sam_examples.settings import config
from sam_examples.settings.command_line import write_json
from sam_examples.settings.config_file import parse
from sam_examples.settings.methods import METHODS, hyperparameters, make_ascent
from sam_examples.settings.run_options import as_json, num_devices
from sam_examples.training import build, images
from sam_examples.training import run as runs
from sam_examples.training.checkpoints import Checkpoints
from sam_examples.training.trainer import Trainer

PLAIN = [*TINY, "--measure-every", "0", "--devices", "1"]


def run(out, *options, common=PLAIN):
    train.main([*common, *options, "--out", str(out)])
    return results(out)


def curves(out):
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def refuse(capsys, message, *options):
    check_refusal(capsys, message, train.main, options)


# The configuration.


def test_defaults_are_those_of_the_data_set_and_the_method():
    digits = parse([])
    assert (digits.model, digits.epochs, digits.learning_rate) == ("resnet8", 40, 0.1)
    for dataset, rho in (("cifar10", 0.1), ("cifar100", 0.2)):
        sam = parse(["--dataset", dataset])
        assert (sam.model, sam.width, sam.epochs) == ("resnet18", None, 200)
        assert (sam.batch_size, sam.learning_rate) == (128, 0.05)
        assert sam.weight_decay == 1e-3
        assert sam.augment
        values = config.default_hyperparameters(sam, steps_per_epoch=351)
        assert values["vasso"]["rho"] == rho
        assert values["sparse_sam"]["refresh_every"] == 351
        assert values["between"]["first"] == 100 * 351
        sgd = parse(["--dataset", dataset, "--method", "sgd"])
        assert sgd.weight_decay == 5e-4
    imagenet = parse(["--dataset=imagenet"])
    assert (imagenet.model, imagenet.epochs) == ("resnet50", 90)
    assert (imagenet.batch_size, imagenet.weight_decay) == (256, 1e-4)
    adamw = parse(["--dataset", "cifar10", "--base", "adamw"])
    assert (adamw.learning_rate, adamw.weight_decay) == (1e-3, 1e-2)


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_flags_come_before_the_file_and_that_before_the_defaults(tmp_path, suffix):
    path = tmp_path / f"settings{suffix}"
    settings = {
        "dataset": "cifar10",
        "method": "sgd",
        "epochs": 3,
        "stages": [1, 1],
        "hyperparameters": ["rho=0.3"],
        "augment": False,
        "fully_sharded": True,
    }
    text = json.dumps(settings)
    if suffix == ".toml":  # The names of the flags are names as well.
        settings["fully-sharded"] = settings.pop("fully_sharded")
        text = "\n".join(f"{k} = {json.dumps(v)}" for k, v in settings.items())
    path.write_text(text)
    parsed = parse(["--config", str(path), "--epochs", "7"])
    assert parsed.epochs == 7
    assert (parsed.dataset, parsed.stages) == ("cifar10", (1, 1))
    assert parsed.hyperparameters == ("rho=0.3",)
    assert parsed.fully_sharded
    assert not parsed.augment
    assert (parsed.batch_size, parsed.weight_decay) == (128, 5e-4)
    assert parse(["--config", str(path), "--method", "sam"]).method == "sam"


def test_what_a_run_writes_of_its_settings_is_read_back(tmp_path):
    options = ["--dataset", "cifar10", "--no-augment", "--stages", "1", "2"]
    options += ["--perturb", "Conv_0", "--base-hyperparameters", "nesterov=True"]
    asked = parse([*options, "--warmup-epochs", "0.5", "--implicit", "0.25"])
    path = tmp_path / "config.json"
    write_json(path, as_json(asked))
    again = parse(["--config", str(path)])
    assert dataclasses.replace(again, config=None) == asked


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", '{"epoch": 3}', "has epoch, which is no setting; those are dataset"),
        ("c.json", "[]", "is no JSON or TOML file of settings by name"),
        ("c.json", "{", "is no JSON or TOML file"),
        ("c.toml", "epochs 3", "is no JSON or TOML file"),
        (None, "", "absent.json cannot be read (No such file or directory); give --c"),
    ],
)
def test_files_that_hold_no_settings_are_refused(tmp_path, capsys, name, text, message):
    path = tmp_path / (name or "absent.json")
    if name:
        path.write_text(text)
    refuse(capsys, message, "--config", str(path))


BAD_OPTIONS = {
    "dataset": (["--dataset", "digit"], "--dataset must be one of digits, cifar10"),
    "data": (["--dataset", "cifar10"], "--dataset cifar10 needs --data-dir"),
    "no data": (["--dataset", "cifar100", "--data-dir", "no"], "no CIFAR-100 in no"),
    "folders": (["--dataset", "imagenet", "--data-dir", "nowhere"], "nowhere"),
    "method": (["--method", "rh"], "unknown method 'rh'; choose from sgd"),
    "twice": (["--method", "sam+sam"], "has a name twice"),
    "two radii": (["--method", "sam+asam"], "only one of them would have an effect"),
    "two descents": (["--method", "gsam+wsam"], "gsam and wsam each make a descent"),
    "a radius of its own": (
        ["--method", "asam+momentum_sam"],
        "asam and momentum_sam each scale the ascent to a radius",
    ),
    "two conditions": (
        ["--method", "look_sam+every"],
        "look_sam and every each say which steps ascend",
    ),
    "no gradient": (
        ["--method", "momentum_sam+preconditioned_sam"],
        "the ascent of momentum_sam takes no gradient of the batch, and so precond",
    ),
    "period": (
        ["--method", "every", "--hyperparameters", "k=0"],
        "every: every: k = 0 is out of range",
    ),
    "last": (
        ["--method", "between", "--hyperparameters", "last=late"],
        "'last=late' has no whole number or None after '='",
    ),
    "no momentum": (
        [*TINY, "--method", "momentum_sam", "--base", "rmsprop"],
        "pass a base with momentum",
    ),
    "base among": (["--method", "sgd+sam"], "sgd has no ascent"),
    "width": (["--width", "0"], "--width must be at least 1, got 0"),
    "stages": (["--stages", "1", "0"], "--stages must be"),
    "model": (["--model", "resnet19"], "resnet19"),
    "model width": (["--model", "vit_s", "--norm", "group"], "vit_s"),
    "epochs": (["--epochs", "0"], "--epochs must be at least 1"),
    "micro-batch": (
        ["--method", "m_sam", "--batch-size", "40"],
        "m_sam.micro_batch_size must divide --batch-size 40",
    ),
    "devices": (["--devices", "9"], "--devices must be from 1 to 8, the number of dev"),
    "no devices": (["--devices", "0"], "--devices must be from 1 to 8"),
    "share": (["--devices", "3"], "--devices must divide --batch-size 64, got 3"),
    "base": (["--base", "adamv"], "--base adamv is no optimizer of Optax that takes"),
    "no base": (["--base", "chain"], "--base chain is no optimizer of Optax"),
    "argument": (
        ["--base", "adamw", "--base-hyperparameters", "momentum=0.9"],
        "adamw does not take 'momentum'; it takes b1, b2",
    ),
    "value": (["--base-hyperparameters", "momentum=big"], "'momentum=big' has no num"),
    "pattern": (
        ["--method", "sparse_sam", "--hyperparameters", "pattern=2of4"],
        "pattern must be unstructured, layer, filter or of the form 2:4",
    ),
    "perturb": (["--perturb", "Conv"], "no parameter is in a layer 'Conv'; there are"),
    "no ascent": (
        ["--method", "sgd", "--perturb", "Conv_0"],
        "--perturb needs an ascent, got sgd",
    ),
    "no part": (
        ["--method", "sgd", "--ascent-part", "4"],
        "--implicit and --ascent-part need an ascent that takes a gradient, got sgd",
    ),
    "no gradient of a part": (
        ["--method", "momentum_sam", "--ascent-part", "4"],
        "need an ascent that takes a gradient, got momentum_sam",
    ),
    "sparsity": (
        ["--method=sparse_sam", "--hyperparameters", "sparsity=0.9", "pattern=2:4"],
        "the pattern 2:4 has a sparsity of 0.5, got sparsity=0.9",
    ),
    "switch": (
        ["--method", "rw_sam", "--hyperparameters", "normalize=yes"],
        "'normalize=yes' has no True or False after '='",
    ),
    "augment": (["--augment"], "--augment is for CIFAR: it would cut out all of a"),
    "all": (["--train-on-all"], "--train-on-all is for CIFAR and ImageNet"),
    "no rise": (
        ["--epochs", "1", "--warmup-epochs", "0.99"],
        "--warmup-epochs must leave steps of the 16 of the training, got 0.99",
    ),
    "noise seed": (["--noise-seed", "-1"], "--noise-seed must be from 0 to 2**32 - 1"),
    "noise": (["--noise", "2"], "--noise must be from 0 to 1, got 2.0"),
    "number": (["--base", "sm3"], "--base sm3 cannot be made"),
    "state": (["--base", "lbfgs"], "--base lbfgs does not work in this training"),
    "part": (["--ascent-part", "3"], "--ascent-part must divide --batch-size 64"),
    "implicit": (["--implicit", "1"], "--implicit must be at least 0 and below 1"),
    "warm-up": (["--warmup-epochs", "40"], "--warmup-epochs must leave steps of"),
    "measure": (["--measure-every", "-1"], "--measure-every must be at least 0"),
    "checkpoints": (["--checkpoint-every", "0"], "--checkpoint-every must be at least"),
    "seed": (["--seed", "-1"], "--seed must be from 0 to 2**32 - 1, got -1"),
    "keep": (["--keep", "0"], "--keep must be at least 1, got 0"),
    "resume": (["--resume"], "--resume needs --out"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused_in_one_line(
    tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    refuse(capsys, message, *options)


# A run and its files.


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The directory of a run of several methods together, with measurements."""
    out = tmp_path_factory.mktemp("measured")
    method = ["--method", "rw_sam+vasso+sparse_sam", "--epochs", "3", "--noise", "0.5"]
    options = ["--measure-every", "2", "--devices", "2", "--fully-sharded"]
    values = ["--hyperparameters", "strength=3", "rho=0.1", "sparsity=0.75"]
    run(out, *method, *options, *values, common=TINY)
    return out


@pytest.mark.full
def test_metrics_have_what_the_ascent_does(measured):
    rows = curves(measured)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [int(row["step"]) for row in rows] == [16, 32, 48]
    assert rows[0]["gap"] == ""  # Every second epoch, and the last.
    for row in rows[1:]:
        clean, perturbed = float(row["clean_loss"]), float(row["perturbed_loss"])
        assert float(row["gap"]) == pytest.approx(perturbed - clean, abs=1e-5)
        assert 0 < float(row["train_gap"]) < 1
        assert 0 < float(row["perturbation_norm"]) <= 0.1
        assert float(row["mask_density"]) == pytest.approx(0.25, abs=1 / 398)
        assert 1 < float(row["effective_sample_size"]) < 63
    figures = results(measured)
    for name, curve in figures["epochs"].items():
        assert [row[name] for row in rows] == [
            "" if x is None else str(x) for x in curve
        ]
    assert figures["labels"]["num_flipped"] == round(0.5 * 1025)
    assert figures["settings"]["noise_seed"] == 0


def events(path):
    from tensorboardX.proto.event_pb2 import Event

    content = path.read_bytes()
    while content:  # Each record is its length, a checksum, the event, a checksum.
        size = int.from_bytes(content[:8], "little")
        yield Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


def test_tensorboard_keeps_what_comes_before_a_resumed_step(tmp_path):
    with MetricsWriter(tmp_path, {}, first_step=16):
        pass
    (path,) = (tmp_path / "tensorboard").iterdir()
    # From there on what an earlier run wrote is void; of step 16 it counts.
    starts = [e.step for e in events(path) if e.HasField("session_log")]
    assert starts == [17]


@pytest.mark.full
def test_tensorboard_reads_the_metrics(measured):
    (path,) = (measured / "tensorboard").iterdir()
    scalars = {}
    for event in events(path):
        for value in event.summary.value:
            scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    rows = curves(measured)
    assert scalars["epochs/valid_accuracy"] == pytest.approx(
        {int(row["step"]): float(row["valid_accuracy"]) for row in rows}
    )
    assert scalars["epochs/gap"].keys() == {32, 48}
    assert scalars["steps/train_loss"].keys() == {16, 32, 48}
    assert scalars["steps/train_gap"].keys() == {16, 32, 48}


@pytest.mark.full
def test_the_learning_rate_warms_up_and_falls(tmp_path):
    options = ["--epochs", "4", "--warmup-epochs", "2", "--learning-rate", "0.2"]
    run(tmp_path, "--method", "sgd", *options)
    rates = [float(row["learning_rate"]) for row in curves(tmp_path)]
    falling = 0.1 * (1 + np.cos(np.pi * np.array([15, 31]) / 32))
    expected = [0.2 * 15 / 32, 0.2 * 31 / 32, *falling]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        ["--method", "base", "--base", "contrib.muon"],
        ["--base", "rprop", "--schedule", "constant"],
        ["--method", "sam", "--base", "adamw", "--dtype", "bfloat16"],
        ["--perturb", "Conv_0", "--ascent-part", "2", "--implicit", "0.5"],
        ["--model", "resnet18", "--method", "m_sam+asam"],
    ],
)
def test_bases_models_and_cheaper_ascents(tmp_path, options):
    losses = run(tmp_path, *options, "--epochs", "2")["epochs"]["train_loss"]
    assert np.isfinite(losses).all()
    assert losses[1] < losses[0]


def test_every_hyperparameter_of_a_method_is_within_reach():
    assignments = [
        "normalize=True",
        "pattern=1:4",
        "eta=0.1",
        "fisher_estimator=probes",
    ]
    values = hyperparameters(["rw_sam+asam+sparse_sam"], assignments)
    (chosen,) = values.values()
    assert (chosen["normalize"], chosen["eta"]) == (True, 0.1)
    assert chosen["sparsity"] == 0.75  # That of the pattern.
    for name in METHODS:
        make_ascent(name, hyperparameters([name])[name], num_steps=10)


@pytest.mark.full
def test_metrics_of_micro_batches_are_means_over_them():
    def measured(method, *assignments):
        asked = parse([*PLAIN, "--method", method, "--norm", "group"])
        dataset, values = config.load(asked), hyperparameters([method], assignments)
        optimizer = build.Optimizer(asked, values[method], 16)
        model = build.make_network(asked, dataset)
        task = images.make_image_task(asked, dataset, model, 1)
        trainer = Trainer(asked, task, optimizer, 1)
        split = dataset.train
        trainer.train(type(split)(split.images[:64][None], split.labels[:64][None]))
        return trainer.measure()

    alone, together = measured("sam", "rho=0.1"), measured("m_sam", "rho=0.1")
    assert together["effective_sample_size"] == 16
    assert alone["effective_sample_size"] == 64
    assert together["clean_loss"] == pytest.approx(alone["clean_loss"], rel=0.02)
    # A micro-batch's own gradient leads higher on its own loss.
    assert together["gap"] > alone["gap"] > 0


# Devices.


def test_all_devices_that_can_share_a_batch_do():
    asked = parse([])
    for size, count in ((64, 8), (36, 6), (7, 7), (11, 1)):
        assert num_devices(asked, size) == count
    assert num_devices(asked) == 8


@pytest.mark.full
def test_sharing_parameters_changes_nothing_but_rounding(tmp_path):
    options = ["--method", "vasso", "--epochs", "2", "--devices"]
    alone = run(tmp_path / "alone", *options, "1")
    sharded = run(tmp_path / "sharded", *options, "4", "--fully-sharded")
    for name in ("train_loss", "valid_loss"):
        np.testing.assert_allclose(
            alone["epochs"][name], sharded["epochs"][name], rtol=2e-4
        )


@pytest.mark.full
@pytest.mark.parametrize("base", ["sgd", "adafactor"])
def test_parameters_and_state_are_shared_on_request(base):
    asked = parse([*PLAIN, "--method", "vasso", "--devices", "4", "--base", base])
    asked = dataclasses.replace(asked, fully_sharded=True)
    dataset = config.load(asked)
    values = {"rho": 0.1, "theta": 0.9}
    optimizer = build.Optimizer(asked, values, 16)
    model = build.make_network(asked, dataset)
    task = images.make_image_task(asked, dataset, model, 4)
    state = Trainer(asked, task, optimizer, 4).state
    kernel = state.params["Conv_0"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    average = state.opt_state.ascent_state[0].direction["Conv_0"]["kernel"]
    assert average.sharding == kernel.sharding


# Being stopped.


@pytest.mark.full
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    # Calls of four steps, so that it is stopped within an epoch.
    monkeypatch.setattr(images, "BYTES_PER_CALL", 4 * 64 * 4 * 64)
    options = ["--method", "dynamic_sparse_sam", "--epochs", "3", "--dropout", "0.1"]
    whole = run(tmp_path / "whole", *options)
    advance, calls = runs.Run.advance, []

    def interrupt(*args):
        calls.append(None)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        advance(*args)

    monkeypatch.setattr(runs.Run, "advance", interrupt)
    out = tmp_path / "stopped"
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        run(out, *options)
    assert status.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().out == (
        f"stopped after step 24 of 48, in epoch 2; --out {out} --resume goes on from "
        "there\n"
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (out / "results.json").exists()
    assert Checkpoints(out / "checkpoints", 3).steps() == [16, 24]
    assert len(curves(out)) == 1
    # The settings are those that the run wrote down.
    train.main(["--out", str(out), "--resume"])
    assert len(calls) == 12
    again = results(out)
    for name in ("epochs", "test_accuracy", "labels"):
        assert again[name] == whole[name]
    assert curves(out) == curves(tmp_path / "whole")


@pytest.mark.full
@pytest.mark.parametrize("every", [("0", "1"), ("1", "0")])
def test_a_resumed_run_may_measure_what_it_did_not(tmp_path, every):
    options = ["--epochs", "3", "--devices", "1", "--out", str(tmp_path)]
    train.main([*TINY, *options, "--measure-every", every[0], "--epochs", "3"])
    for step in Checkpoints(tmp_path / "checkpoints", 3).steps()[1:]:
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    train.main([*TINY, *options, "--measure-every", every[1], "--resume"])
    rows = curves(tmp_path)
    assert [row["gap"] != "" for row in rows] == [e == "1" for e in (*every, every[1])]
    assert [int(row["step"]) for row in rows] == [16, 32, 48]


def test_ctrl_c_before_the_training_is_a_line(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load", interrupted)
    with pytest.raises(SystemExit) as status:
        train.main([])
    assert status.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().out.count("\n") == 1


# Class folders.


@pytest.mark.full
def test_folders_train_and_a_damaged_image_loses_nothing(tmp_path, monkeypatch, capsys):
    data = write_image_folders(tmp_path / "data")
    options = ["--dataset", "imagenet", "--data-dir", str(data), "--model", "resnet8"]
    options += ["--width", "4", "--stages", "1", "--batch-size", "4", "--epochs", "2"]
    options += ["--devices", "1", "--measure-every", "0", "--method", "sgd"]
    monkeypatch.setattr(images, "EVALUATION_BATCH", 4)
    out = tmp_path / "all"
    train.main([*options, "--train-on-all", "--out", str(out)])
    assert [row["step"] for row in curves(out)] == ["6", "12"]
    assert curves(out)[0]["valid_loss"] == ""
    assert results(out)["valid_accuracy"] is None
    assert "validation" not in capsys.readouterr().out

    out = tmp_path / "held out"
    # Calls of one step, and images of the eighth that cannot be read.
    monkeypatch.setattr(images, "BYTES_PER_CALL", 1)
    next_batches, calls = runs.next_batches, []

    def next_or_none(batches):
        calls.append(None)
        if len(calls) == 8:
            raise SystemExit(2)
        return next_batches(batches)

    monkeypatch.setattr(runs, "next_batches", next_or_none)
    with pytest.raises(SystemExit):
        train.main([*options, "--out", str(out)])
    assert Checkpoints(out / "checkpoints", 3).steps() == [5, 7]
    train.main(["--out", str(out), "--resume"])
    assert [row["step"] for row in curves(out)] == ["5", "10"]
    assert 0 <= results(out)["valid_accuracy"] <= 1


def test_a_second_signal_ends_it_at_once():
    from sam_examples.training.interrupts import interruptible

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupt:  # noqa: PT012
        assert not interrupt
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


def test_every_method_is_one_of_the_command_line(capsys):
    with pytest.raises(SystemExit) as status:
        train.main(["--help"])
    assert not status.value.code
    output = " ".join(capsys.readouterr().out.replace("│", "").split())
    for name in METHODS:
        assert name in output
    for field in dataclasses.fields(config.Config):
        assert f"--{field.name.replace('_', '-')}" in output
    assert jax.device_count() == 8
