"""The benchmark scripts, in configurations that take seconds."""

import json
import math

import pytest
from benchmarks import finite_difference, sparse_cost, step_cost, throughput, top_k
from example_support import check_refusal, run_script
from sam_examples.benchmarking import measure

TINY = [
    "--stage-sizes=1",
    "--width=8",
    "--batch-size=2",
    "--image-size=4",
    "--rounds=2",
]


REFERENCES = [measure.SGD, step_cost.HAND_WRITTEN, step_cost.CONTRIB]


@pytest.mark.parametrize(
    "names",
    [
        [*REFERENCES, "optax_sam.vasso"],
        pytest.param(list(step_cost.ROWS), marks=pytest.mark.full),
    ],
    ids=["some", "all"],
)
def test_step_cost_writes_and_prints_every_row(tmp_path, capsys, monkeypatch, names):
    chosen = {name: step_cost.ROWS[name] for name in names}
    monkeypatch.setattr(step_cost, "ROWS", chosen)
    path = tmp_path / "new" / "costs.json"
    step_cost.main([*TINY, "--json", str(path)])
    results = json.loads(path.read_text())
    rows = results["rows"]
    assert list(rows) == names
    for row in rows.values():
        assert all(math.isfinite(figure) and figure > 0 for figure in row.values())
    assert rows[measure.SGD]["flops_over_sgd"] == 1
    assert rows[measure.SGD]["time_over_sgd"] == 1
    assert rows[step_cost.CONTRIB]["temp_over_contrib"] == 1
    assert rows[step_cost.HAND_WRITTEN]["time_over_hand_written"] == 1
    assert rows["optax_sam.vasso"]["state_over_params"] > 1.99
    assert results["settings"]["stage_sizes"] == [1]
    assert {"jax", "flax", "optax", "optax_sam"} <= set(results["versions"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_wide_figures_leave_the_names_of_rows_whole(capsys):
    name = "a name of the length that names have"
    wide = {f"time_over_{other}": 12345.6 for other in ("sgd", "sam", "contrib", "b")}
    measure.print_table({name: wide}, "Steps")
    assert name in capsys.readouterr().out


@pytest.mark.full
def test_throughput_writes_and_prints_every_row(tmp_path, capsys, monkeypatch):
    make_rows = throughput.make_rows
    some = [measure.SGD, "SAM", "SSAM-F, half", "static: first block", "RW-SAM"]

    def make_some(options):  # Each takes seconds to compile.
        rows = make_rows(options)
        return {name: rows[name] for name in some}

    monkeypatch.setattr(throughput, "make_rows", make_some)
    path = tmp_path / "throughput.json"
    throughput.main([*TINY, "--batch-size=4", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert rows[measure.SGD]["time_over_sgd"] == 1
    for row in rows.values():
        assert all(math.isfinite(figure) and figure > 0 for figure in row.values())
    # Between refreshes a mask costs nothing that counts beside SAM's passes.
    assert rows["SSAM-F, half"]["flops_over_sgd"] < 1.1 * rows["SAM"]["flops_over_sgd"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    assert "bfloat16" in printed


@pytest.mark.full
def test_sparse_cost_writes_and_prints_every_row(tmp_path, capsys, monkeypatch):
    all_steps, refresh = sparse_cost.make_steps([1]), "4 probes, PatchConv"
    some = [measure.SGD, sparse_cost.SAM, sparse_cost.SSAM_F, "implicit, 1/2 kept"]
    rows = {name: all_steps[name] for name in some}  # Each takes seconds to compile.
    monkeypatch.setattr(sparse_cost, "make_steps", lambda _: rows)
    refreshes = {refresh: sparse_cost.REFRESHES[refresh]}
    monkeypatch.setattr(sparse_cost, "REFRESHES", refreshes)
    path = tmp_path / "costs.json"
    sparse_cost.main([*TINY, "--refresh-rounds=1", "--json", str(path)])
    results = json.loads(path.read_text())
    steps = results["steps"]
    assert list(steps) == some
    assert steps[sparse_cost.SAM]["time_over_sam"] == 1
    assert list(results["refreshes"]) == [refresh]
    figures = [*steps.values(), *results["scoring"].values()]
    assert all(math.isfinite(f) and f > 0 for row in figures for f in row.values())
    assert all(row["flops_over_sgd"] > 0 for row in results["refreshes"].values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*steps, refresh])


@pytest.mark.full
def test_top_k_finds_equal_masks(tmp_path):
    path = tmp_path / "top_k.json"
    top_k.main(["--width=4", "--rounds=1", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 8
    assert all(row["wrong_over_all"] == 0 for row in rows.values())
    assert all(row["seconds"] > 0 for row in rows.values())


@pytest.mark.full
def test_finite_differences_are_near_the_slopes_in_float32_only(tmp_path, capsys):
    path = tmp_path / "errors.json"
    tiny = ["--widths=8", "--stages=1", "--num-examples=4", "--directions=1"]
    finite_difference.main([*tiny, "--steps=2", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    rows = {name.split(": ")[1]: row for name, row in rows.items()}
    assert list(rows) == ["1e-01", "1e-02", "1e-03", "1e-04", "1e-05", "1e-06", "jvp"]
    float32, bfloat16 = (
        {name: row[f"{dtype}_error_over_exact"] for name, row in rows.items()}
        for dtype in ("float32", "bfloat16")
    )
    assert float32["jvp"] == 0
    assert float32["1e-04"] < 0.05 < float32["1e-01"]
    assert bfloat16["jvp"] < 0.1 < bfloat16["1e-04"]


def test_finite_difference_refuses_a_width_without_groups(capsys):
    with pytest.raises(SystemExit, match="2"):
        finite_difference.main(["--widths", "8", "12"])
    error = "error: --widths must be positive multiples of 8, got (8, 12).\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(
    ("main", "option", "message"),
    [
        (step_cost.main, "--rounds", "--rounds must be at least 1, got 0."),
        (step_cost.main, "--stage-sizes", "--stage-sizes must be numbers of blocks"),
        (throughput.main, "--steps", "--steps must be at least 1, got 0."),
    ],
)
def test_steps_are_refused_in_one_line(main, option, message, capsys):
    check_refusal(capsys, message, main, [option, "0"])


@pytest.mark.full
@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("benchmarks/step_cost.py", "--json"),
        ("benchmarks/sparse_cost.py", "--json"),
        ("benchmarks/top_k.py", "--json"),
        ("benchmarks/finite_difference.py", "--json"),
        ("study/digits.py", "sparse"),
        ("study/cifar10.py", "small"),
        ("study/translation.py", "--minutes"),
    ],
)
def test_a_program_runs_as_a_script(script, option):
    assert option in run_script(script, "--help")
