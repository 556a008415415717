"""The runs that translate: their files, their table, and the times of their steps."""

import json

import pytest
from example_support import check_refusal
from sam_examples.data.spelt_numbers import load_spelt_numbers
from sam_examples.study import contestants, ledger
from sam_examples.study.contestants import Contestant, Group
from sam_examples.study.translation import Recipe, TranslationLedger
from sam_examples.study.translation_runs import GROUPS
from study import translation as script

TINY = ["--recipe.vocabulary", "60", "--recipe.longest", "64", "--recipe.layers", "1"]
TINY += ["--recipe.width", "8", "--recipe.hidden", "8", "--recipe.shapes", "1"]
TINY += ["--recipe.batch-tokens", "200"]
ADAMW = Contestant("AdamW", "sgd", ({"learning_rate": 0.01},), epochs=2)
RHOS = tuple({"learning_rate": 0.01, "rho": rho} for rho in (0.1, 0.2))
SAM = Contestant("SAM", "sam", RHOS, epochs=2)


@pytest.fixture
def few(monkeypatch):
    groups = tuple(Group("translation", (c,)) for c in (ADAMW, SAM))
    monkeypatch.setattr(script, "GROUPS", groups)
    return groups


@pytest.fixture
def data_dir(tmp_path):
    text = load_spelt_numbers("de", "en", num_train=40, num_valid=4, num_test=4)
    directory = tmp_path / "text"
    directory.mkdir()
    splits = {"train": text.train, "val": text.valid, "test_a": text.tests["test"]}
    for name, pairs in splits.items():
        for language, sentences in zip(("de", "en"), pairs, strict=True):
            path = directory / f"{name}.{language}"
            path.write_text("\n".join(sentences), encoding="utf-8")
    return directory


@pytest.mark.full
def test_runs_are_recorded_with_losses_and_bleu(tmp_path, data_dir, few, capsys):
    arguments = [*TINY, "--data-dir", str(data_dir), "--out", str(tmp_path / "runs")]
    script.main([*arguments, "--at-most", "1"])
    # A second program takes up the other end.
    script.main([*arguments, "--at-most", "1", "--backwards"])
    names = [
        f"{name}-noise0-epochs2-seed0.json" for name in ("adamw-lr0.01", "sam-rho")
    ]
    found = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert found[0] == names[0]
    assert len(found) == 2
    result = json.loads((tmp_path / "runs" / names[0]).read_text())
    assert len(result["curves"]["valid_loss"]) == 2
    assert result["valid_loss"] == result["curves"]["valid_loss"][-1] > 0
    assert set(result["quality"]) == {"valid", "test_a"}
    assert 0 <= result["quality"]["test_a"]["bleu"] <= 100
    assert result["step_seconds"] > 0
    assert result["recipe"]["width"] == 8

    script.main([*arguments, "--time-rounds", "2"])
    times = json.loads((tmp_path / "runs-steps.json").read_text())
    assert times["over_base"]["AdamW"] == 1
    assert times["over_base"]["SAM"] > 0
    capsys.readouterr()
    script.main([*arguments, "--minutes", "0"])
    assert "AdamW" in capsys.readouterr().out


def record(book, run, **figures):
    quality = {"valid": {"bleu": 20.0}, "test_a": {"bleu": 10.0}}
    book.add(run, {"valid_loss": 2.0, "quality": quality} | figures)


def test_the_trial_of_the_least_held_out_loss_is_chosen(tmp_path, few):
    book = TranslationLedger(tmp_path, Recipe(), few)
    book.ratios = {"SAM": 1.9}
    for trial, loss in zip(SAM.grid, (2.5, 2.25), strict=True):
        record(book, SAM.run(trial, 0.0, seed=0), valid_loss=loss)
    assert SAM.run(SAM.grid[1], 0.0, seed=1) in book.missing()
    record(book, SAM.run(SAM.grid[1], 0.0, seed=1), valid_loss=2.75)
    (row,) = book.summary()
    assert row == {
        "configuration": "SAM",
        "epochs": "2",
        "best of": "2",
        "chosen": "learning_rate 0.01, rho 0.2",
        "seeds": "2",
        "held-out loss": "2.500 ± 0.354",
        "BLEU, held out": "20.00 ± 0.00",
        "BLEU, test_a": "10.00 ± 0.00",
        "step / AdamW's": "1.90",
    }


def test_what_another_program_adds_is_not_done_again(tmp_path, few):
    first, second = (TranslationLedger(tmp_path, Recipe(), few) for _ in range(2))
    run = next(first.missing())
    record(second, run)
    assert run not in first.missing()
    assert run in first.results


def test_files_of_all_runs_differ():
    runs = set(contestants.in_order(GROUPS, {}))
    runs |= set(contestants.in_order(GROUPS, dict.fromkeys(runs, 0.5)))
    assert len({ledger.file_name(run) for run in runs}) == len(runs)


def test_a_ledger_needs_text(tmp_path, capsys):
    arguments = ["--minutes", "1", "--out", str(tmp_path)]
    check_refusal(capsys, "--data-dir must name", script.main, arguments)
