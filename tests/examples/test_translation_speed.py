"""The benchmark of a finished translation, in a configuration that takes seconds."""

import json
import math

import pytest
import translate
from benchmarks import translation_speed
from example_support import check_refusal
from sam_examples.data.spelt_numbers import load_spelt_numbers
from sam_examples.training import translation

TINY = ["--layers", "1", "--width", "8", "--hidden", "8", "--vocabulary", "80"]
TINY += ["--batch-tokens", "400", "--shapes", "1", "--epochs", "1"]
TINY += ["--warmup-epochs", "0", "--schedule", "constant", "--method", "sgd"]


@pytest.mark.full
def test_it_measures_a_finished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        translation,
        "load_spelt_numbers",
        lambda *languages: load_spelt_numbers(
            *languages, num_train=200, num_valid=20, num_test=10
        ),
    )
    run, path = tmp_path / "run", tmp_path / "figures.json"
    translate.main([*TINY, "--devices", "1", "--out", str(run)])
    options = ["--run", str(run), "--rounds", "2", "--batches", "2"]
    translation_speed.main([*options, "--beams", "1", "2", "--json", str(path)])
    figures = json.loads(path.read_text())
    assert list(figures["searches"]) == ["greedy", "beam search, 2"]
    assert list(figures["steps"]) == ["adamw alone", "sam on adamw"]
    for rows in (figures["searches"], figures["steps"]):
        for row in rows.values():
            assert all(math.isfinite(x) and x > 0 for x in row.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("greedy", "sam on adamw"))


def test_a_run_that_is_not_there_is_refused_in_a_line(tmp_path, capsys):
    options = ["--run", str(tmp_path)]
    check_refusal(capsys, "config.json", translation_speed.main, options)
    options += ["--beams", "0"]
    check_refusal(capsys, "--beams must be at least 1", translation_speed.main, options)
