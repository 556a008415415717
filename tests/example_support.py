"""What the tests of the examples share: a small training, and calls of scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sam_examples.data import Dataset, Split

ROOT = Path(__file__).parents[1]
TINY = ["--stages", "1", "--width", "4"]


def results(directory):
    return json.loads((directory / "results.json").read_text())


def check_refusal(capsys, message, main, options):
    """Checks that a script ends with one line, and nothing else, on what is wrong."""
    with pytest.raises(SystemExit) as status:
        main(options)
    assert status.value.code == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")


def run_script(path, *options):
    """Runs a script of examples/ in a process of its own; returns what it prints."""
    search_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    completed = subprocess.run(
        [sys.executable, str(ROOT / "examples" / path), *options],
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def make_dataset(size=16):
    """Noise, brighter in a row that depends on the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(size, dtype=np.int32) % 3
    images = rng.normal(2, 3, (size, 4, 4, 1)).astype(np.float32)
    images[np.arange(size), labels] += 9
    split = Split(images, labels)
    mean, std = np.array([4], np.float32), np.array([5], np.float32)
    return Dataset("rows", 3, split, split, split, mean, std)
