"""The mutants are of the package as it is; whether they survive takes long to find."""

import mutations
import pytest


@pytest.mark.parametrize("mutant", mutations.MUTANTS, ids=lambda mutant: mutant.file)
def test_a_mutant_can_be_made(mutant):
    compile(mutations.mutated(mutant), mutant.file, "exec")
