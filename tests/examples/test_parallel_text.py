"""Sentences in two languages: files, numbers, subwords."""

import gzip
import re

import numpy as np
import pytest
from sam_examples.data.parallel_text import Pairs, load_parallel_text
from sam_examples.data.spelt_numbers import load_spelt_numbers
from sam_examples.data.subwords import (
    END,
    PAD,
    Subwords,
    learn_subwords,
    load_subwords,
)

GERMAN = "ein Hund läuft .\nzwei Hunde\u2028laufen .\r\nein Kind\n"
ENGLISH = "a dog runs .\ntwo dogs run .\na child\n"


def write(directory, **texts):
    for name, text in texts.items():
        (directory / name.replace("__", ".")).write_bytes(text.encode())


@pytest.fixture
def directory(tmp_path):
    for split in ("train", "val", "test_a"):
        write(tmp_path, **{f"{split}__de": GERMAN, f"{split}__en": ENGLISH})
    return tmp_path


def test_plain_and_packed_files_are_read_line_by_line(directory):
    path = directory / "test_b.de.gz"
    path.write_bytes(gzip.compress(GERMAN.encode()))
    write(directory, test_b__en=ENGLISH, notes__txt="not a split")
    text = load_parallel_text(directory, "de", "en")
    pairs = Pairs(
        ["ein Hund läuft .", "zwei Hunde\u2028laufen .", "ein Kind"],
        ["a dog runs .", "two dogs run .", "a child"],
    )
    assert text.train == text.valid == pairs
    assert text.tests == {"test_a": pairs, "test_b": pairs}
    assert text.notes == ()
    assert load_parallel_text(directory, "en", "de").train == Pairs(*pairs[::-1])


def test_held_out_text_may_be_called_valid(directory):
    for language in ("de", "en"):
        path = directory / f"val.{language}"
        path.rename(directory / f"valid.{language}")
    assert len(load_parallel_text(directory, "de", "en").valid.sources) == 3


def test_pairs_with_an_empty_line_are_left_out_and_counted(directory):
    write(directory, train__de="eins\n\nzwei\ndrei\n \n", train__en="1\n2\n\n3\n4\n")
    text = load_parallel_text(directory, "de", "en")
    assert text.train == Pairs(["eins", "drei"], ["1", "3"])
    assert text.notes == ("3 of 5 pairs of train have an empty line and are left out",)


BAD = {
    "a language": (
        {},
        ("de", "fr"),
        ValueError,
        "no training text in 'fr'; there is train.de and train.en.",
    ),
    "a file": (
        {"test_b__de": "x\n"},
        ("de", "en"),
        FileNotFoundError,
        "test_b.en is missing, and so is its .gz; there is test_b.de.",
    ),
    "lines": (
        {"val__de": "eins\nzwei\n"},
        ("de", "en"),
        ValueError,
        "val.de 2 and val.en 3 lines",
    ),
    "all lines": (
        {"val__de": "\n\n\n"},
        ("de", "en"),
        ValueError,
        "the files of val have no pair of sentences.",
    ),
}


@pytest.mark.parametrize(
    ("texts", "languages", "kind", "message"), BAD.values(), ids=BAD
)
def test_what_is_wrong_with_files_is_said(directory, texts, languages, kind, message):
    write(directory, **texts)
    with pytest.raises(kind, match=re.escape(message)):
        load_parallel_text(directory, *languages)


def test_damaged_and_missing_files_are_named(directory):
    packed = gzip.compress(GERMAN.encode())
    for damaged in (packed[:-9], packed[:20] + b"??" + packed[22:], GERMAN.encode()):
        (directory / "test_b.de.gz").write_bytes(damaged)
        write(directory, test_b__en=ENGLISH)
        with pytest.raises(ValueError, match=r"test_b.de.gz is damaged or no text"):
            load_parallel_text(directory, "de", "en")
    write(directory, test_a__de="x\n")
    (directory / "test_a.de").write_bytes(b"\xff\n")
    (directory / "test_b.de.gz").unlink()
    with pytest.raises(ValueError, match=r"test_a.de is damaged or no text"):
        load_parallel_text(directory, "de", "en")
    for path in directory.glob("test*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no test\* beside train"):
        load_parallel_text(directory, "de", "en")
    for path in directory.glob("val*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no val.\* or valid.\* beside"):
        load_parallel_text(directory, "de", "en")
    with pytest.raises(FileNotFoundError, match="is no directory"):
        load_parallel_text(directory / "none", "de", "en")


def test_numbers_of_a_split_are_in_no_other():
    text = load_spelt_numbers("de", "en", num_train=50, num_valid=20, num_test=20)
    again = load_spelt_numbers("de", "en", num_train=50, num_valid=20, num_test=20)
    assert text == again
    splits = [text.train, text.valid, text.tests["test"]]
    assert [len(split.sources) for split in splits] == [50, 20, 20]
    for language in range(2):
        assert len({s for split in splits for s in split[language]}) == 90
    with pytest.raises(ValueError, match="spells no numbers in 'xx'; choose from am"):
        load_spelt_numbers("de", "xx")


def test_subwords_give_sentences_back_and_are_kept(tmp_path):
    text = load_spelt_numbers("de", "en", num_train=50, num_valid=1, num_test=1)
    sentences = [*text.train.sources, *text.train.targets]
    subwords = learn_subwords(sentences, 80)
    assert len(subwords) == 80
    encoded = subwords.encode(sentences)
    length = int(encoded.lengths.max())
    assert length < max(map(len, sentences))
    tokens = encoded.padded(np.arange(100), length + 2)
    assert np.all((tokens == END).sum(axis=1) == 1)
    assert np.all(tokens[:, -2:] == PAD)
    assert subwords.decode(tokens) == sentences
    assert subwords.decode(tokens[:, :0]) == [""] * 100

    path = tmp_path / "subwords.model"
    path.write_bytes(subwords.proto)
    kept = load_subwords(path)
    np.testing.assert_array_equal(kept.encode(sentences).tokens, encoded.tokens)
    again = learn_subwords(sentences, 80)
    assert again.proto == subwords.proto
    with pytest.raises(ValueError, match="--vocabulary 10 is too small"):
        learn_subwords(sentences, 10)
    path.write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"subwords.model: the subwords are no model"):
        load_subwords(path)
    with pytest.raises(ValueError, match="no model"):
        Subwords(b"")
