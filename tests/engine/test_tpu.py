"""What XLA for TPUs makes of steps on eight chips, compiled from shapes and never run.

Two networks: one whose matrix products make up nearly all FLOPs, with normalisation
over the batch, and one of which the parameters make up most of the memory traffic.
"""

import functools
import importlib.util
import json
import tempfile
from pathlib import Path

import pytest
from example_support import run_script

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu, of the extra tpu, which is for x86-64 Linux only",
    ),
]
MANY_FLOPS = (
    ("--problem=leaves", "--layers=2", "--width=256", "--batch-size=512"),
    (
        *("base", "sam", "vasso", "dynamic_between", "rw_sam", "m_sam"),
        *("momentum_sam", "vasso_of_one_pass", "friendly_sam", "gsam", "wsam"),
    ),
)
MANY_PARAMETERS = (
    ("--problem=matrices", "--layers=4", "--width=1024", "--batch-size=8"),
    (
        *("base", "sam_by_hand", "sam", "vasso_by_hand", "vasso"),
        *("mask_by_hand", "dynamic_between", "rw_sam", "m_sam_by_hand", "m_sam"),
        *("momentum_sam_by_hand", "momentum_sam"),
        *("vasso_of_one_pass_by_hand", "vasso_of_one_pass"),
        *("friendly_sam_by_hand", "friendly_sam", "gsam_by_hand", "gsam"),
        *("wsam_by_hand", "wsam", "every_5_by_hand", "every_5"),
        *("look_sam_5_by_hand", "look_sam_5"),
    ),
)
SHARDED = (
    ("--problem=matrices", "--layers=4", "--width=1024", "--layout=fully_sharded"),
    ("dynamic_between", "dynamic"),
)

TRANSLATION = (
    ("--problem=translation", "--layers=1", "--width=128", "--batch-size=8"),
    ("base", "sam"),
)


@functools.cache
def rows(sizes, methods):
    """The figures of each method, from a process of its own, which libtpu needs."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "figures.json"
        options = ["--topology=v5e:2x4", *sizes, "--json", str(path)]
        run_script("benchmarks/compilers.py", *options, "--methods", *methods)
        return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        ("sam", 2.01),
        ("vasso", 2.01),
        ("dynamic_between", 2.01),
        ("rw_sam", 2.42),
        ("m_sam", 2.01),
        *(("momentum_sam", 1.02), ("vasso_of_one_pass", 1.02)),
        *(("friendly_sam", 2.01), ("gsam", 2.02), ("wsam", 2.01)),
    ],
)
def test_flops(method, bound):
    assert int(bound) - 0.01 < rows(*MANY_FLOPS)[method]["FLOPs / base"] < bound


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        *(("sam", 1.02), ("vasso", 1.04), ("dynamic_between", 1.02), ("m_sam", 1.02)),
        *(("momentum_sam", 1.0), ("vasso_of_one_pass", 1.03), ("friendly_sam", 1.05)),
        *(("gsam", 1.04), ("wsam", 1.02), ("every_5", 0.87), ("look_sam_5", 1.03)),
    ],
)
def test_memory_traffic_over_that_of_the_method_by_hand(method, bound):
    assert rows(*MANY_PARAMETERS)[method]["bytes / hand"] < bound


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        *(("sam", 0.02), ("vasso", 0.25), ("dynamic_between", 0.02), ("m_sam", 0.02)),
        *(("momentum_sam", 0.05), ("vasso_of_one_pass", 0.03), ("friendly_sam", 0.24)),
        *(("gsam", 0.02), ("wsam", 0.02), ("every_5", 0.0)),
    ],
)
def test_temporaries_beyond_those_by_hand_in_units_of_the_parameters(method, bound):
    assert rows(*MANY_PARAMETERS)[method]["temp - hand"] < bound


def test_look_sam_has_no_higher_peak_of_memory_than_by_hand():
    figures = rows(*MANY_PARAMETERS)
    written = figures["look_sam_5_by_hand"]["peak_bytes"]
    assert figures["look_sam_5"]["peak_bytes"] <= written


@pytest.mark.parametrize(
    ("method", "gradients", "number"),
    [
        ("base", 1, 1),
        ("sam", 2, 2),
        ("vasso", 2, 2),
        ("dynamic_between", 2, 2),
        ("rw_sam", 2, 7),  # Weights of examples besides.
        ("m_sam", 1, 2),  # And whether all are finite.
        *(("momentum_sam", 1, 1), ("vasso_of_one_pass", 1, 1)),
        *(("friendly_sam", 2, 2), ("gsam", 2, 2), ("wsam", 2, 2)),
    ],
)
def test_collectives(method, gradients, number):
    row = rows(*MANY_PARAMETERS)[method]
    # All reductions; what else there is counts bytes.
    sent = row["sent_bytes"] / row["param_bytes"]
    assert sent == pytest.approx(gradients, abs=0.01)
    assert row["all-reduce_bytes"] > 0.999 * row["sent_bytes"]
    assert row["collectives"] <= number


def test_a_round_of_counting_is_one_collective_for_all_arrays():
    figures = rows(*SHARDED)
    # One in each of two loops and a few before, not three for each of four arrays.
    number = figures["dynamic"]["collectives"]
    assert number - figures["dynamic_between"]["collectives"] <= 8


@pytest.mark.parametrize("layout", ["jit", "fully_sharded"])
def test_a_translation_gathers_and_reduces_what_two_steps_of_adamw_do(layout):
    sizes, methods = TRANSLATION
    options = (*sizes, "--base=adamw", f"--layout={layout}")
    base, sam = rows(options, methods).values()
    assert 1.95 < sam["FLOPs / base"] < 2.01
    assert base["state / params"] == pytest.approx(2, abs=0.01)
    assert sam["state_bytes"] - base["state_bytes"] < 100  # Counts and losses.
    for kind in ("all-gather_bytes", "all-reduce_bytes"):
        assert sam.get(kind, 0) <= 2.01 * base.get(kind, 0)
    assert sam["collectives"] <= 2 * base["collectives"]
    assert layout == "fully_sharded" or "all-gather_bytes" not in sam
    # Parameters, two moments, and hardly more for the batch.
    assert sam["argument_bytes"] < 3.1 * sam["param_bytes"]
