"""The pages' tables and figures are those of the recorded runs."""

import json

import numpy as np
import pytest
from sam_examples.study import ledger
from sam_examples.study.cifar10_runs import SETTINGS
from sam_examples.study.plots import PLOTS
from sam_examples.study.report import Book, render
from study import report as script


@pytest.mark.parametrize("page", script.PAGES, ids=lambda page: page.parent.name)
def test_a_page_has_the_figures_of_the_files(page):
    text = page.read_text()
    assert text.count("<!-- / -->") > 1
    assert render(text, Book(script.HERE / "results")) == text


def record(directory, label, noise, accuracies, **figures):
    """Records runs of a configuration of the small setting, one for each seed."""
    setting = SETTINGS["small"]
    book = ledger.Ledger(directory / "small", setting.recipe, setting.groups)
    (contestant,) = {
        c.label: c for g in setting.groups for c in g.contestants if c.label == label
    }.values()
    for seed, accuracy in enumerate(accuracies):
        run = contestant.run(contestant.grid[0], noise, seed)
        measures = {
            "top_eigenvalue": 1.0,
            "hessian_trace": 2.0,
            "covariance_trace": 3.0,
        }
        common = {"valid": accuracy, "fitted": 1.0, "measures": measures}
        book.add(run, {**common, "test": accuracy, "step_seconds": 0.01, **figures})


@pytest.fixture
def book(tmp_path):
    record(tmp_path, "SGD", 0.4, (0.3, 0.32))
    record(tmp_path, "SAM", 0.4, (0.4, 0.42, 0.44), step_seconds=0.02)
    record(tmp_path, "SGD", 0.8, (0.2,))
    return Book(tmp_path)


def test_what_stands_between_marks_is_replaced(book):
    page = "a <!-- value | small | 0.4 | SAM | test -->old<!-- / --> b\n"
    new = "a <!-- value | small | 0.4 | SAM | test -->42.0 ± 2.0<!-- / --> b\n"
    assert render(page, book) == new == render(new, book)
    page = "x\n<!-- noises | small | noise -->\n\n<!-- / -->\ny\n"
    rendered = render(page, book)
    assert "| SGD | 24 | 31.0 ± 1.4 | 20.0 | 1.00 |" in rendered
    assert "| SAM | 24 | 42.0 ± 2.0 |  | 2.00 |" in rendered
    assert rendered.startswith("x\n<!-- noises | small | noise -->\n| configuration |")
    assert rendered.endswith("|\n<!-- / -->\ny\n")
    assert render(rendered, book) == rendered


def test_further_trials_count_as_those_of_the_configuration(book, tmp_path):
    record(tmp_path, "SAM, finer", 0.4, (0.5, 0.54))
    further = Book(tmp_path)
    entry = further.entry("small", 0.4, "SAM")
    assert entry.tried == 2
    assert entry.trial["rho"] == 0.25
    np.testing.assert_array_equal(entry.figures("test"), [0.5, 0.54])
    # Also in the tables that ask for the configuration alone.
    rendered = render("<!-- table | small | combine | 0.4 -->\n<!-- / -->", further)
    assert (
        "| SAM | 24 | 2 | learning_rate 0.25, rho 0.25 | 2 | 52.0 ± 2.8 |" in rendered
    )
    # The best is chosen on held-out images with the first seed.
    record(tmp_path, "SAM, farther", 0.4, (0.45, 0.9))
    assert Book(tmp_path).entry("small", 0.4, "SAM").trial["rho"] == 0.25


def test_times_in_turns_win_over_those_of_the_runs(book, tmp_path):
    path = ledger.times_path(tmp_path / "small")
    path.write_text(json.dumps({"over_base": {"SGD": 1.0, "SAM": 1.5}}))
    entry = Book(tmp_path).entry("small", 0.4, "SAM")
    assert Book(tmp_path).time("small", entry) == 1.5


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("sum | small", "a key begins with one of"),
        ("value | tiny | 0.4 | SAM | test", "a setting is one of"),
        ("value | small | 0.4 | SAM | rho", "a figure is one of"),
        ("value | small | 0.4 | VaSSO, theta 0.9 | test", "small has no runs of VaSSO"),
        ("table | small | combine", "small has no runs of|a table needs runs"),
    ],
)
def test_a_key_without_an_answer_is_refused(book, key, message):
    if key.startswith("table"):
        book = Book(book._results / "empty")
    with pytest.raises(ValueError, match=message):
        render(f"<!-- {key} -->\n<!-- / -->", book)


def test_a_table_has_a_row_for_each_configuration(book):
    rendered = render("<!-- table | small | combine | 0.4 -->\n<!-- / -->", book)
    lines = rendered.splitlines()[1:-1]
    assert len(lines) == 4
    assert lines[2].startswith("| SGD | 24 | 1 | learning_rate 0.25, weight_decay")
    assert lines[3].startswith("| SAM | 24 | 1 | learning_rate 0.25, rho 0.2 | 3 |")


@pytest.mark.full
def test_the_program_writes_pages_and_figures(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- value | full | 0.4 | SGD | test --><!-- / -->")
    script.main(["--pages", str(page), "--figures", str(tmp_path / "figures")])
    mean = page.read_text().split("-->")[1].split(" ")[0]
    tests = Book(script.HERE / "results").entry("full", 0.4, "SGD").figures("test")
    assert float(mean) == pytest.approx(100 * np.mean(tests), abs=0.05)
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == {f"{name}.png" for name in PLOTS}
    assert "accuracy_over_time.png" in capsys.readouterr().out
