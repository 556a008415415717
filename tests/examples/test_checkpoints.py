"""Trainings that go on from checkpoints, whatever stopped them."""

import dataclasses
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import train
from example_support import TINY, check_refusal, results
from sam_examples.settings.config import load
from sam_examples.settings.config_file import parse
from sam_examples.settings.methods import hyperparameters
from sam_examples.training.build import Optimizer, make_network
from sam_examples.training.checkpoints import Checkpoints, Progress, checksum
from sam_examples.training.images import make_image_task
from sam_examples.training.run import Run

EPOCHS, STEPS = 4, 16  # Steps of an epoch.
OPTIONS = [*TINY, "--epochs", str(EPOCHS), "--noise", "0.2", "--dropout", "0.1"]
OPTIONS += ["--measure-every", "0", "--devices", "1"]


def run(method, out, *options):
    train.main(["--method", method, *OPTIONS, *options, "--out", str(out)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Makes a directory of a finished run of a method, with all its checkpoints."""
    made = {}

    def make(method="sgd", *options):
        if (method, options) not in made:
            made[method, options] = out = tmp_path_factory.mktemp(method) / "run"
            run(method, out, "--keep", str(EPOCHS), *options)
        return made[method, options]

    return make


@pytest.fixture
def interrupted(finished, tmp_path):
    """Makes a directory as a run leaves it that was stopped after some epochs."""

    def make(epochs, *arguments):
        out = tmp_path / "interrupted"
        shutil.copytree(finished(*arguments), out)
        (out / "results.json").unlink()
        for epoch in range(epochs + 1, EPOCHS + 1):
            shutil.rmtree(checkpoint(out, epoch))
        return out

    return make


def checkpoint(out, epoch):
    return out / "checkpoints" / str(epoch * STEPS)


def last_state(out):
    """All arrays of the last checkpoint, by name."""
    with ocp.CheckpointManager(out / "checkpoints") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(manager.latest_step(), args=args)["state"]
    paths = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths}


def assert_same_end(actual, expected):
    for name in ("epochs", "test_accuracy"):
        assert results(actual)[name] == results(expected)[name]
    ours, theirs = last_state(actual), last_state(expected)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        assert leaf.dtype == theirs[name].dtype
        assert leaf.tobytes() == theirs[name].tobytes(), name


def assert_refused(capsys, message, method, out, *options):
    capsys.readouterr()
    arguments = ["--method", method, *OPTIONS, *options, "--out", str(out)]
    check_refusal(capsys, message, train.main, arguments)


# What there is in a state: averages, masks, keys and counts.
@pytest.mark.parametrize(
    "method",
    [
        "vasso",
        pytest.param("sparse_sam", marks=pytest.mark.full),
        pytest.param("rw_sam", marks=pytest.mark.full),
    ],
)
def test_an_interrupted_run_ends_as_one_that_was_not(finished, interrupted, method):
    out = interrupted(2, method)
    # As if killed while it deleted an old one.
    shutil.rmtree(checkpoint(out, 1) / "state")
    run(method, out, "--resume")
    assert_same_end(out, finished(method))


@pytest.mark.full
def test_resume_begins_where_no_checkpoint_is_whole(finished, tmp_path):
    out = tmp_path / "run"
    for steps in ("16", "99"):
        half = out / "checkpoints" / f"{steps}.orbax-checkpoint-tmp"
        shutil.copytree(checkpoint(finished(), 1), half)
        shutil.rmtree(half / "state")
    run("sgd", out, "--resume")
    assert_same_end(out, finished())
    assert not list(half.parent.glob("*tmp*"))


@pytest.mark.full
def test_resuming_a_finished_run_reports_again(finished, interrupted, capsys):
    out = interrupted(EPOCHS)
    run("sgd", out, "--resume")
    assert "after epoch 4" in capsys.readouterr().out
    assert_same_end(out, finished())
    assert results(out)["step_seconds"] == results(finished())["step_seconds"]


@pytest.mark.full
def test_a_finished_run_goes_on_for_more_epochs(finished, tmp_path, capsys):
    steady = ["--schedule", "constant"]
    run("sgd", tmp_path, *steady, "--epochs", "2")
    run("sgd", tmp_path, "--epochs", "4", "--resume")
    message = (
        "4 epochs in place of 2: from step 32 on schedules are those of 4, with a "
        "learning rate of 0.1 where that of 2 was 0.1\n"
    )
    assert message in capsys.readouterr().out
    assert_same_end(tmp_path, finished("sgd", *steady))


@pytest.mark.full
def test_more_epochs_have_the_schedules_of_all_of_them(interrupted, capsys):
    out = interrupted(EPOCHS)
    run("sgd", out, "--epochs", "6", "--resume")
    message = "with a learning rate of 0.025 where that of 4 was 0\n"
    assert message in capsys.readouterr().out
    rates = results(out)["epochs"]["learning_rate"]
    step = np.array([EPOCHS * STEPS - 1, 5 * STEPS - 1])
    ends = np.array([EPOCHS, 6]) * STEPS
    cosine = 0.05 * (1 + np.cos(np.pi * step / ends))
    np.testing.assert_allclose(rates[EPOCHS - 1 : EPOCHS + 1], cosine, rtol=1e-5)
    assert results(out)["settings"]["epochs"] == 6


def test_what_may_grow_may_not_shrink(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(np.ones(1), Progress(1, {"epochs": 4}, {}, [], [], {}))
    assert checkpoints.latest({"epochs": 5}, may_grow=["epochs"]).steps == 1
    for asked, may_grow in (({"epochs": 3}, ["epochs"]), ({"epochs": 5}, [])):
        with pytest.raises(ValueError, match=r"epochs is 4 there and \d here"):
            checkpoints.latest(asked, may_grow)


@pytest.mark.full
def test_checkpoints_come_every_few_epochs_and_last_and_some_stay(tmp_path):
    sizes = ["--checkpoint-every", "2", "--keep", "2"]
    run("sgd", tmp_path, "--epochs", "7", *sizes)
    assert Checkpoints(tmp_path / "checkpoints", 2).steps() == [6 * STEPS, 7 * STEPS]


@pytest.mark.full
@pytest.mark.parametrize("devices", [1, 4])
def test_a_checkpoint_of_eight_devices_is_read_on_fewer(
    interrupted, monkeypatch, devices
):
    out = interrupted(EPOCHS - 1, "vasso", "--devices", "8")
    expected = last_state(out)
    restore, restored = Checkpoints.restore, []

    def spy(self, progress, like):
        state = restore(self, progress, like)
        leaves = jax.tree.leaves(state)
        restored.extend((np.asarray(leaf).tobytes(), leaf.sharding) for leaf in leaves)
        return state

    monkeypatch.setattr(Checkpoints, "restore", spy)
    run("vasso", out, "--resume", "--devices", str(devices))
    values = sorted(value for value, _ in restored)
    assert values == sorted(leaf.tobytes() for leaf in expected.values())
    for _, sharding in restored:
        assert sharding.device_set == set(jax.devices()[:devices])
        assert sharding.is_fully_replicated
    assert results(out)["settings"]["devices"] == devices
    assert np.isfinite(results(out)["test_accuracy"])
    assert np.isfinite(results(out)["epochs"]["train_loss"]).all()


def largest(directory):
    return max(
        (path for path in directory.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


def cut_off(path):
    os.truncate(path, path.stat().st_size // 2)


def change_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by(content):
    def replace(path):
        shutil.rmtree(path)
        path.mkdir()
        (path / "notes.txt").write_text(content)

    return replace


DAMAGES = {
    "arrays cut off": lambda path: cut_off(largest(path / "state" / "d")),
    "arrays changed": lambda path: change_a_bit(largest(path / "state" / "d")),
    "arrays lost": lambda path: shutil.rmtree(path / "state" / "d"),
    "no state": lambda path: shutil.rmtree(path / "state"),
    "no progress": lambda path: shutil.rmtree(path / "progress"),
    "progress cut off": lambda path: cut_off(path / "progress" / "metadata"),
    "other progress": lambda path: (path / "progress" / "metadata").write_text("{}"),
    "no checksum": lambda path: shutil.rmtree(path / "checksum"),
    "other step": lambda path: path.rename(path.with_name("99")),
    "empty": replace_by(""),
}


@pytest.mark.full
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused(interrupted, capsys, damage):
    out = interrupted(3)
    damage(checkpoint(out, 3))
    last = max((out / "checkpoints").iterdir(), key=lambda path: path.name)
    message = f"error: {last} is damaged or no checkpoint of this training ("
    assert_refused(capsys, message, "sgd", out, "--resume")


@pytest.mark.full
@pytest.mark.parametrize("damage", [cut_off, change_a_bit, Path.unlink])
def test_large_arrays_come_back_as_they_were_or_not_at_all(tmp_path, capfd, damage):
    # Small ones are in the index, which Orbax checks; and many are read at a time.
    arrays = np.random.default_rng(0).normal(size=(60, 9999)).astype(np.float32)
    state = {str(i): jax.numpy.asarray(array) for i, array in enumerate(arrays)}
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(state, Progress(1, {}, {}, [], [], {}))
    progress = checkpoints.latest({})
    assert checksum(checkpoints.restore(progress, state)) == checksum(state)
    damage(largest(tmp_path / "1" / "state" / "ocdbt.process_0"))
    with pytest.raises(ValueError, match="1 is damaged or no checkpoint of this"):
        checkpoints.restore(progress, state)
    assert capfd.readouterr() == ("", "")


@pytest.mark.full
def test_the_checkpoint_before_a_damaged_one_is_good(finished, interrupted, capsys):
    out = interrupted(2)
    for epoch, remedy in ((2, "go on from step 16"), (1, "begin anew")):
        path = checkpoint(out, epoch)
        whole = shutil.copytree(path, out / f"whole {epoch}")
        DAMAGES["arrays cut off"](path)
        message = f"; delete that directory to {remedy}."
        assert_refused(capsys, message, "sgd", out, "--resume")
        shutil.rmtree(path)
    whole.rename(path)
    run("sgd", out, "--resume")
    assert_same_end(out, finished())


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "changes"),
    [("sgd", {"width": 8}), ("sgd", {"norm": "group"}), ("vasso", {})],
)
def test_a_state_of_another_structure_is_refused(interrupted, capsys, method, changes):
    out = interrupted(2)
    checkpoints = Checkpoints(out / "checkpoints", 4)
    progress = json.loads((checkpoint(out, 2) / "progress" / "metadata").read_text())
    config = parse([*OPTIONS, "--method", method])
    config = dataclasses.replace(config, **changes)
    chosen = hyperparameters([method])[method]
    optimizer, dataset = Optimizer(config, chosen, STEPS), load(config)
    model = make_network(config, dataset)
    other = Run(config, make_image_task(config, dataset, model, 1), optimizer, 1)
    other.trainer.count = 3 * STEPS
    other.save(checkpoints, progress["settings"])
    message = f"{checkpoint(out, 3)} is damaged or no checkpoint of this training"
    assert_refused(capsys, message, "sgd", out, "--resume")


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--learning-rate", "0.3", "--hyperparameters", "rho=0.2"],
            "but learning_rate is 0.1 there and 0.3 here; rho is 0.5 there and 0.2 "
            "here; give those, or another --out.",
        ),
        (["--method", "sgd"], "method is vasso there and sgd here; rho is 0.5 there"),
        (["--epochs", "3"], "epochs is 4 there and 3 here"),
        (["--noise-seed", "1"], "seed is 0 there and 1 here; checksum of the data is "),
        (["--batch-size", "32"], "batch_size is 64 there and 32 here"),
        (["--stages", "1", "1"], "stages is [1] there and [1, 1] here"),
    ],
)
def test_resume_refuses_other_settings(interrupted, capsys, options, message):
    assert_refused(
        capsys, message, "vasso", interrupted(1, "vasso"), "--resume", *options
    )


@pytest.mark.full
def test_a_directory_with_checkpoints_is_left_alone(finished, capsys):
    message = "has checkpoints of an earlier run; give --resume to go on from the last"
    assert_refused(capsys, message, "sgd", finished())
    assert results(finished())["epochs"]


# Trains once for every line of arguments. Most of the time of a short training goes
# into importing, which is done once, before each training gets a process of its own.
SERVER = """
import json, os, sys
import train
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        train.main(json.loads(line))
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Trains in processes that can be killed; what they print is in a file."""

    def __init__(self, log, environment, seconds):
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                env=os.environ
                | environment
                | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                start_new_session=True,
            )
        self._deadline = threading.Timer(seconds, self._kill)
        self._deadline.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._deadline.cancel()
        self._kill()
        self._process.communicate()

    def _kill(self):
        os.killpg(self._process.pid, signal.SIGKILL)

    def _answer(self):
        line = self._process.stdout.readline()
        assert line, f"no answer in time:\n{self._log.read_text()}"
        return int(line)

    def train(self, arguments, begun=None, delay=0.0):
        """Trains, to the end or until a time after it has begun; the exit status."""
        self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
        offset = self._log.stat().st_size
        child = self._answer()
        if begun is not None:
            while not (begun(self._log.read_bytes()[offset:]) or self._ended(0.01)):
                pass
            if not self._ended(delay):
                os.kill(child, signal.SIGKILL)
        return self._answer()

    def _ended(self, seconds):
        return bool(select.select([self._process.stdout], [], [], seconds)[0])


def seconds_between_checkpoints(out):
    times = sorted(path.stat().st_mtime for path in (out / "checkpoints").iterdir())
    return (times[-1] - times[0]) / (len(times) - 1)


@pytest.mark.full
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    directory, log = killed / "checkpoints", tmp_path / "log"
    options = [*OPTIONS, "--method", "dynamic_sparse_sam", "--epochs", "25"]
    environment = {
        "JAX_PLATFORMS": "cpu",
        "OPENBLAS_NUM_THREADS": "1",
        # Every run compiles all anew otherwise. Not that of the tests: a run that is
        # killed may leave half a program behind.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    found = []
    rng = random.Random(4)

    def begun(output):
        # The first may leave nothing behind; then there is something to go on from.
        return b"loss=" in output and (not found or Checkpoints(directory, 3).steps())

    with Server(log, environment, seconds=400) as server:
        alone = [*options, "--keep", "25", "--out", str(undisturbed)]
        assert server.train(alone) == 0, log.read_text()
        seconds = seconds_between_checkpoints(undisturbed)
        again = [*options, "--out", str(killed), "--resume"]
        for _ in range(10):
            status = server.train(again, begun, rng.uniform(0, 2.5 * seconds))
            assert status == -signal.SIGKILL, log.read_text()
            found.append(Checkpoints(directory, 3).steps())
        assert server.train(again) == 0, log.read_text()
    assert all(found[1:])
    assert_same_end(killed, undisturbed)
