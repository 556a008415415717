"""Numbers spelt out in two languages by num2words: text that nobody has to download."""

import num2words
import numpy as np

from sam_examples.data.parallel_text import Pairs, ParallelText

LARGEST = 99_999


def load_spelt_numbers(
    source: str,
    target: str,
    *,
    num_train: int = 10_000,
    num_valid: int = 500,
    num_test: int = 500,
) -> ParallelText:
    """Spells numbers up to 99,999, in fixed splits.

    No number is in two splits: those to test on are new.

    Args:
      source: the language to translate from, such as "de".
      target: the language to translate to.
      num_train: how many to train on.
      num_valid: how many to validate on.
      num_test: how many to test on.

    Raises:
      ValueError: if num2words does not know a language.
    """
    for language in (source, target):
        if language not in num2words.CONVERTER_CLASSES:
            raise ValueError(
                f"num2words spells no numbers in {language!r}; choose from "
                f"{', '.join(sorted(num2words.CONVERTER_CLASSES))}, or give --data-dir."
            )
    rng = np.random.default_rng(0)
    size = num_train + num_valid + num_test
    numbers = rng.choice(LARGEST + 1, size, replace=False).tolist()
    train, valid, test = (
        Pairs(*([_spell(n, language) for n in part] for language in (source, target)))
        for part in (
            numbers[:num_train],
            numbers[num_train : num_train + num_valid],
            numbers[num_train + num_valid :],
        )
    )
    return ParallelText("numbers", train, valid, {"test": test})


def _spell(number: int, language: str) -> str:
    spelt: str = num2words.num2words(number, lang=language)
    return spelt
