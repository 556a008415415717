"""The command for a GPU, in miniature, and the checks of numbers that it makes."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from benchmarks import gpu, numerics
from data_files import write_binaries
from example_support import check_refusal

TINY = "--stage-sizes 1 --width 4 --batch-size 4 --image-size 4 --rounds 1 --rows SAM"
CHEAP = ["a zero gradient", "the scale", "|eps|", "SAM: nan"]


def test_numbers_hold_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "numerics.json"
    numerics.main(["--only", *CHEAP, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 7
    assert all(row["holds"] for row in rows.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


@pytest.mark.full
def test_numbers_of_trainings_hold_here():
    numerics.main(["--only", "golden: vasso", "VaSSO, rho", "is SAM, bfloat16"])


def test_a_number_that_does_not_hold_is_an_error(tmp_path, monkeypatch, capsys):
    checks = {
        "fine": numerics.Check(lambda: 1.0, at_most=1.0),
        "too large": numerics.Check(lambda: 2.0, at_most=1.0),
        "not a number": numerics.Check(lambda: float("nan"), at_most=1.0),
        "broken": numerics.Check(lambda: 1 / 0),
    }
    monkeypatch.setattr(numerics, "chosen", lambda only: checks)
    path = tmp_path / "numerics.json"
    with pytest.raises(SystemExit, match="1"):
        numerics.main(["--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["holds"] for row in rows.values()] == [True, False, False, False]
    assert "ZeroDivisionError" in rows["broken"]["error"]
    assert "3 of 4 do not hold: too large; not a number" in capsys.readouterr().out


def arguments(tmp_path, *more):
    return ["--out", str(tmp_path / "out"), *more]


def outcomes(tmp_path):
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    return {part["part"]: part["outcome"] for part in content["parts"]}


@pytest.mark.full
def test_everything_in_miniature(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    data_dir = write_binaries(tmp_path / "cifar-10-batches-bin")
    recipe = "--recipe.widths 2 2 2 --recipe.batch-size 8 --recipe.dtype float32"
    gpu.main(
        arguments(
            tmp_path,
            *("--minutes", "10", "--numerics=--only 'a zero gradient'"),
            f"--throughput={TINY}",
            *("--data-dir", str(data_dir), "--runs", str(tmp_path / "runs")),
            f"--study={recipe} --images-per-file 6 --num-valid 4 --at-most 1",
        )
    )
    assert outcomes(tmp_path) == {
        "numerics": "done",
        "numerics, fixed kernels": "done",
        "throughput, bfloat16": "done",
        "throughput, float32": "done",
        "study": "done",
    }
    for dtype in gpu.DTYPES:
        text = (tmp_path / "out" / f"throughput-{dtype}.json").read_text()
        results = json.loads(text)
        assert results["settings"]["dtype"] == dtype
        assert set(results["rows"]) == {"SGD", "SAM", "SAM by hand"}
    assert len(list((tmp_path / "runs").iterdir())) == 1


def scripts(monkeypatch, tmp_path, **contents):
    """Puts scripts in the places of the parts."""
    for name, content in contents.items():
        (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "STUDY", tmp_path / "study.py")


def test_a_part_that_fails_or_hangs_costs_the_others_nothing(tmp_path, monkeypatch):
    scripts(
        monkeypatch,
        tmp_path,
        numerics="raise SystemExit(1)",
        throughput="import time; time.sleep(60)",
        study="import sys; sys.exit(sys.argv[2:4] != ['--data-dir', 'images'])",
    )
    start = time.monotonic()
    with pytest.raises(SystemExit, match="1"):
        gpu.main(arguments(tmp_path, "--minutes", "0.1", "--data-dir", "images"))
    assert time.monotonic() - start < 9
    assert outcomes(tmp_path) == {
        "numerics": "status 1",
        "numerics, fixed kernels": "status 1",
        "throughput, bfloat16": "out of time",
        "throughput, float32": "out of time",
        "study": "done",
    }


def test_what_is_done_is_written_before_the_next_part_begins(tmp_path, monkeypatch):
    seen = []
    parts = [gpu.Part(name, ("script.py",), 0.0) for name in "ab"]
    monkeypatch.setattr(gpu, "make_parts", lambda options: parts)

    def run_part(part, seconds):
        seen.append(outcomes(tmp_path) if part.name == "b" else {})
        return "done", 0.0

    monkeypatch.setattr(gpu, "run_part", run_part)
    gpu.main(arguments(tmp_path))
    assert seen == [{}, {"a": "done"}]


def test_the_study_is_told_to_end_before_it_is_stopped(tmp_path, monkeypatch):
    print_arguments = (
        "import pathlib, sys; pathlib.Path('seen').write_text(sys.argv[2])"
    )
    scripts(monkeypatch, tmp_path, study=print_arguments)
    monkeypatch.chdir(tmp_path)
    part = gpu.Part("study", ("study.py",), 0.0, is_told=True)
    assert gpu.run_part(part, 70.0)[0] == "done"
    assert float((tmp_path / "seen").read_text()) == pytest.approx(1.0)


def test_a_part_adds_its_flags_to_those_of_the_environment(tmp_path, monkeypatch):
    note = """import os, pathlib
pathlib.Path("seen").write_text(os.environ["XLA_FLAGS"])"""
    scripts(monkeypatch, tmp_path, numerics=note)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    gpu.run_part(gpu.Part("numerics", ("numerics.py",), 0.0, "--xla_b=2"), 70.0)
    assert (tmp_path / "seen").read_text() == "--xla_a=1 --xla_b=2"


def test_minutes_are_checked(tmp_path, capsys):
    message = "--minutes must be above 0, got 0.0."
    check_refusal(capsys, message, gpu.main, arguments(tmp_path, "--minutes", "0"))


def test_the_card_is_described_where_there_is_one(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!{sys.executable}\nprint('NVIDIA H100, 580.1')\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.describe_card() == "NVIDIA H100, 580.1"
    monkeypatch.setenv("PATH", "")
    assert gpu.describe_card() is None
