"""Trainings by several processes, which run on this machine, against one process."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import multi_process
import numpy as np
import optax
import pytest
from sam_examples.devices import sharding
from sam_examples.settings.methods import METHODS, make_tx

ROOT = Path(__file__).parents[2]
PROCESSES, SECONDS, ATTEMPTS = 2, 180, 3
SMALL = ["--epochs=1", "--batch-size=256", "--stages", "1", "--width=4"]
PORT_TAKEN = "Failed to add port"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_all(commands, directory, seconds=SECONDS):
    """Runs commands side by side; returns their statuses and outputs.

    When one fails or time is up the others are killed: they would wait for it.
    """
    logs = [directory / f"process{i}.log" for i in range(len(commands))]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Compiles faster.
        "PYTHONPATH": path,
    }
    children = []
    deadline = time.monotonic() + seconds
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("w") as out:
                children.append(
                    subprocess.Popen(
                        command, stdout=out, stderr=subprocess.STDOUT, env=environment
                    )
                )
        while time.monotonic() < deadline:
            statuses = [child.poll() for child in children]
            if None not in statuses or any(statuses):
                break
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [c.returncode for c in children], [log.read_text() for log in logs]


def train_by_processes(options, directory):
    for _ in range(ATTEMPTS):  # Another program may take the port before we do.
        command = [
            *[sys.executable, str(ROOT / "examples" / "multi_process.py"), *options],
            *[f"--coordinator=127.0.0.1:{free_port()}", "--devices-per-process=2"],
            *[f"--num-processes={PROCESSES}", f"--out={directory}"],
        ]
        commands = [[*command, f"--process-id={i}"] for i in range(PROCESSES)]
        statuses, outputs = run_all(commands, directory)
        if not any(PORT_TAKEN in output for output in outputs):
            break
    assert statuses == [0] * PROCESSES, "\n".join(outputs)
    return outputs


def results(directory):
    figures = json.loads((directory / "results.json").read_text())
    with np.load(directory / "params.npz") as params:
        return figures, dict(params)


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "layout"), [("vasso", []), ("dynamic_sparse_sam", ["--fully-sharded"])]
)
def test_several_processes_train_as_one(method, layout, tmp_path, capsys):
    options = [*SMALL, "--method", method]
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    outputs = train_by_processes([*options, *layout], together)
    assert "4 devices of 2 processes" in outputs[0]
    assert method not in outputs[1]
    multi_process.main([*options, "--out", str(alone)])
    assert "8 devices of 1 processes" in capsys.readouterr().out

    (figures, params), (expected, expected_params) = results(together), results(alone)
    assert (figures["processes"], figures["devices"]) == (2, 4)
    assert len(figures["losses"]) == 4
    np.testing.assert_allclose(figures["losses"], expected["losses"], atol=2e-5)
    assert figures["test_accuracy"] == pytest.approx(expected["test_accuracy"])
    assert params.keys() == expected_params.keys()
    assert params["Dense_0/kernel"].shape == (4, 10)
    for path, value in params.items():
        np.testing.assert_allclose(
            value, expected_params[path], atol=2e-5, err_msg=path
        )


@pytest.mark.full
def test_children_that_wait_for_a_dead_one_are_killed(tmp_path):
    waiting = [sys.executable, "-c", "import time; time.sleep(600)"]
    dying = [sys.executable, "-c", "raise SystemExit('gone')"]
    statuses, outputs = run_all([waiting, dying], tmp_path)
    assert statuses == [-9, 1]
    assert "gone" in outputs[1]
    statuses, _ = run_all([waiting], tmp_path, seconds=0.1)
    assert statuses == [-9]


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_the_state_of_every_method_lies_as_the_parameters(method):
    mesh = sharding.make_mesh()
    shapes = {"kernel": (3, 8), "bias": (8,), "scale": (3,)}
    params = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    shardings = sharding.by_first_divisible_axis(mesh, params)
    assert shardings["kernel"] == sharding.on_mesh(mesh, None, sharding.AXIS)
    assert shardings["bias"] == sharding.on_mesh(mesh, sharding.AXIS)
    assert shardings["scale"] == sharding.replicated(mesh)

    alone, params = params, jax.device_put(params, shardings)
    base = optax.adamw(0.1)
    tx = make_tx(method, base, METHODS[method], num_steps=10)
    shapes = jax.eval_shape(tx.init, params)
    wanted = sharding.of_opt_state(tx, shapes, params, shardings)
    state = jax.jit(tx.init, out_shardings=wanted)(params)
    leaves = jax.tree.leaves_with_path(state)
    for (path, x), expected in zip(
        leaves, jax.tree.leaves(tx.init(alone)), strict=True
    ):
        last = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else None
        like = shardings.get(last, sharding.replicated(mesh))
        assert x.sharding.is_equivalent_to(like, x.ndim), path
        np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--coordinator", "localhost", "--num-processes=2", "--process-id=0"],
            "--coordinator must be HOST:PORT, got localhost.",
        ),
        (
            ["--num-processes", "2"],
            "--coordinator, --num-processes and --process-id go together, "
            "got (None, 2, None).",
        ),
        (
            ["--coordinator", "a:1", "--num-processes=2", "--process-id=2"],
            "--process-id must be from 0 to 1, got 2.",
        ),
        (
            ["--coordinator", "a:1", "--num-processes=0", "--process-id=0"],
            "--num-processes must be at least 1, got 0.",
        ),
        (
            [
                *["--coordinator=a:1", "--num-processes=1", "--process-id=0"],
                "--cluster",
            ],
            "--cluster needs no --coordinator, got a:1.",
        ),
        (
            ["--devices-per-process", "0"],
            "--devices-per-process must be at least 1, got 0.",
        ),
        (
            ["--batch-size", "63"],
            "--batch-size must be a multiple of the number of devices, 8, got 63.",
        ),
        (
            ["--method", "adam"],
            f"unknown method 'adam'; choose from {', '.join(METHODS)}, or several of "
            "them joined by +.",
        ),
    ],
)
def test_says_in_one_line_what_is_wrong(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        multi_process.main(options)
    assert capsys.readouterr().err == f"error: {message}\n"
