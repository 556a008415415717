"""The aliases against the authors' own optimizers."""

import pytest
import trajectories
from methods import defaults

# The others differ from one of these in hyperparameters or in the pattern only.
DEFAULT = ("sam", "vasso_t04", "asam", "ssamf_unstructured", "ssamf_nm24", "ssamd_grad")


@pytest.mark.parametrize("method", defaults(trajectories.METHODS, DEFAULT))
def test_reproduces_the_authors_trajectory_and_masks(method):
    deviation = trajectories.deviation(method)
    assert deviation.params <= trajectories.TOLERANCE
    assert deviation.losses <= trajectories.TOLERANCE
    assert deviation.masks == 0
