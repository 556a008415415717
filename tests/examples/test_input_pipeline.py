"""The benchmark of the input pipeline, in a configuration that takes seconds."""

import json
import math

import pytest
from benchmarks import input_pipeline

TINY = [
    *["--stages=1", "--width=4", "--batch-size=4", "--folder-width=4"],
    *["--folder-batch-size=2", "--image-size=16", "--num-files=4"],
    *["--batches=3", "--rounds=2", "--threads=1"],
]
ROWS = ["arrays, SGD", "arrays, SAM", "folders, SGD", "folders, SAM"]


@pytest.mark.full
def test_it_writes_and_prints_every_row(tmp_path, capsys):
    path = tmp_path / "new" / "figures.json"
    input_pipeline.main([*TINY, "--json", str(path)])
    results = json.loads(path.read_text())
    rows = results["rows"]
    assert list(rows) == ROWS
    for row in rows.values():
        assert all(math.isfinite(figure) and figure > 0 for figure in row.values())
        assert row["pipeline_over_step"] > 0
    assert results["settings"]["folder_batch_size"] == 2
    assert {"jax", "flax", "optax", "optax_sam"} <= set(results["versions"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ROWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads=0"], "--threads must be at least 1, got 0."),
        (["--num-files=0"], "--num-files must be at least 1, got 0."),
        (
            ["--stages", "1", "0"],
            "--stages must be numbers of blocks, each at least 1, such as 1 1 1, got "
            "1 0.",
        ),
    ],
)
def test_says_in_one_line_what_is_wrong(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        input_pipeline.main(options)
    assert capsys.readouterr().err == f"error: {message}\n"
