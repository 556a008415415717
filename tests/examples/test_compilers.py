"""Steps compiled for devices that are not there; here for simulated ones, and run."""

import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems as small_problems
import pytest
from benchmarks import compilers
from example_support import check_refusal
from methods import defaults
from sam_examples.benchmarking import collectives, problems, sharded, steps, topologies
from sam_examples.devices import sharding

BASE = optax.sgd(0.1, momentum=0.9)
# What a method by hand is the same as, bar the draws of random numbers.
SAME = {
    "contrib_sam": "sam_by_hand",
    "sam": "sam_by_hand",
    "asam": "asam_by_hand",
    "vasso": "vasso_by_hand",
    "momentum_sam": "momentum_sam_by_hand",
    "vasso_of_one_pass": "vasso_of_one_pass_by_hand",
    "every_5": "every_5_by_hand",
    "look_sam_5": "look_sam_5_by_hand",
    "look_sam_5_ascending": "look_sam_5_ascending_by_hand",
    "friendly_sam": "friendly_sam_by_hand",
    "gsam": "gsam_by_hand",
    "wsam": "wsam_by_hand",
    "m_sam": "m_sam_by_hand",
    "perturb_only": "perturb_only_by_hand",
}


def make_case(placement="jit", name="leaves", devices=8, batch_size=4):
    sizes = problems.Sizes(batch_size, 2, 8)
    mesh = sharding.make_mesh(devices)
    return problems.make_case(name, sizes, mesh, placement)


def arrays(shapes, seed):
    """Noise of these shapes, and zeros for integers, in their places."""
    rng = np.random.default_rng(seed)

    def fill(x):
        noise = jnp.issubdtype(x.dtype, jnp.floating)
        value = rng.normal(size=x.shape) if noise else np.zeros(x.shape)
        return jax.device_put(value.astype(x.dtype), x.sharding)

    return jax.tree.map(fill, shapes)


def train(case, name, change_state=lambda state: state):
    """Parameters and loss after three steps of a method."""
    method = steps.METHODS[name]
    tx, update = method.make(case, BASE)
    step = sharded.compile_step(case.problem, tx, update, count=method.at).compiled
    params = arrays(case.problem.params, 0)
    state = params, change_state(tx.init(params))
    batch, others = arrays(case.problem.batch, 1), arrays(case.problem.others, 2)
    if case.problem.layout == "pmap":
        mesh = case.problem.mesh
        inputs = jax.tree.map(lambda x: np.stack([x] * mesh.size), (state, others))
        parts = jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)
        place = sharding.by_examples(mesh)
        (state, others), batch = jax.device_put((inputs, parts), place)
    for _ in range(3):
        *state, value = step(*state, batch, *others)
    found = state[0], value[0]
    if case.problem.layout == "pmap":
        return jax.tree.map(lambda x: x[0], found)
    return found


@functools.cache
def by_hand(name, placement="jit"):
    return train(make_case(placement), name)


@pytest.mark.parametrize("method", defaults(SAME, ["vasso"]))
def test_a_method_by_hand_is_that_of_the_library(method):
    params, loss = train(make_case(), method)
    expected, expected_loss = by_hand(SAME[method])
    # Normalised by itself, a micro-batch has another loss than all examples.
    if method != "m_sam":
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    small_problems.assert_trees_close(params, expected, rtol=1e-4, atol=1e-6)
    plain, _ = by_hand("base")
    moved = jax.tree.map(jnp.subtract, params, plain)
    assert small_problems.norm(moved) > 1e-3


@pytest.mark.full
def test_masks_by_hand_are_those_of_the_library():
    # Of ones, they are SAM, and the state that is not due for a new mask keeps them.
    def keep_all(state):
        return jax.tree.map(lambda x: x | True if x.dtype == bool else x, state)

    expected, _ = by_hand("sam_by_hand")
    for method in ("mask_by_hand", "dynamic_between", "sparse_sam_between"):
        params, _ = train(make_case(), method, keep_all)
        small_problems.assert_trees_close(params, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_weights_by_hand_are_those_of_the_library_but_for_the_draws():
    params, loss = train(make_case(), "rw_sam")
    expected, expected_loss = by_hand("rw_sam_by_hand")
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-2)
    small_problems.assert_trees_close(params, expected, rtol=0, atol=1e-2)


@pytest.mark.full
@pytest.mark.parametrize("method", ["sam", "sam_by_hand", "vasso"])
@pytest.mark.parametrize("placement", ["fully_sharded", "shard_map", "pmap"])
def test_every_layout_takes_the_same_steps(placement, method):
    def found(placement):
        return train(make_case(placement, "matrices"), method)

    small_problems.assert_trees_close(
        found(placement), found("jit"), rtol=1e-4, atol=1e-6
    )


@pytest.mark.full
def test_every_network_can_be_had_from_shapes():
    # From shapes; images and widths as small as the networks allow.
    small = {"image_size": 32, "width": 128, "layers": 1, "batch_size": 2}
    mesh = sharding.make_mesh(2)
    names = ("leaves", "matrices", "transformer", "vit_b", "resnet8", "resnet50")
    for name in (*names, "translation"):
        recipe = problems.NETWORKS[name]
        asked = {
            size: value
            for size, value in small.items()
            if getattr(recipe.sizes, size) is not None
        }
        if name == "vit_b":
            asked["image_size"] = 16
        sizes = problems.choose(name, **asked)
        case = problems.make_case(name, sizes, mesh, recipe.layout)
        # What names the last layers of each, and takes a loss in evaluation mode.
        scored = name in ("transformer", "resnet8", "translation")
        for method in ("perturb_only", "sparse_sam_between")[: 1 + scored]:
            tx, update = steps.METHODS[method].make(case, BASE)
            opt_state = jax.eval_shape(tx.init, case.problem.params)
            arguments = case.problem.params, opt_state, case.problem.batch
            found = jax.eval_shape(update, *arguments, *case.problem.others)
            (loss, _), updates, after = found
            assert loss.shape == ()
            assert jax.tree.structure(updates) == jax.tree.structure(arguments[0])
            assert jax.tree.structure(after) == jax.tree.structure(opt_state)


def simulated(*args):
    return topologies.Compiler(sharding.make_mesh(2), {}, {"a package": "1.2"})


OPTIONS = ["--layers", "1", "--width", "8", "--batch-size", "4"]


def test_writes_and_prints_row_by_row(tmp_path, capsys, monkeypatch):
    path = tmp_path / "new" / "figures.json"
    monkeypatch.setattr(compilers, "describe", simulated)
    measure_method, seen = compilers.measure_method, []

    def measure(case, compiler, method, base):
        if seen:  # Those before are there already.
            written = json.loads(path.read_text())
            assert [*written["rows"], *written["errors"]] == seen
        seen.append(["base", "sam_by_hand", "sam"][len(seen)])
        if len(seen) == 2:
            with topologies.memory_errors():
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3G of 2G.\nMore")
        return measure_method(case, compiler, method, base)

    monkeypatch.setattr(compilers, "measure_method", measure)
    methods = ["--methods", "base", "sam_by_hand", "sam"]
    with pytest.raises(SystemExit, match="2"):
        compilers.main([*OPTIONS, *methods, "--json", str(path)])
    output, error = capsys.readouterr()
    assert error == "error: sam_by_hand does not fit: 3G of 2G.\n"
    results = json.loads(path.read_text())
    assert results["errors"] == {"sam_by_hand": "3G of 2G."}
    assert results["versions"]["a package"] == "1.2"
    base, sam = results["rows"].values()
    assert base["param_bytes"] == base["state_bytes"] == 4 * 8 * 8
    assert sam["FLOPs / base"] > 1.5
    assert sam["sent / params"] == pytest.approx(2, abs=0.1)
    assert all(math.isfinite(figure) for figure in sam.values())
    lines = [line for line in output.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[1] for line in lines[2:]] == methods[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--problem=what"], "--problem must be one of matrices, leaves, resnet8"),
        (["--layers=0"], "--layers must be at least 1, got 0."),
        (["--problem=vit_b", "--width=8"], "vit_b has no --width to choose, got 8."),
        (["--problem=transformer", "--width=8"], "--width must be a multiple of 128"),
        (["--methods", "what"], "--methods must be of base, sam_by_hand"),
        (["--layout=pmap", "--methods", "m_sam_by_hand"], "--methods must be of base"),
    ],
)
def test_says_in_one_line_what_is_wrong(options, message, capsys, monkeypatch):
    monkeypatch.setattr(compilers, "describe", simulated)
    check_refusal(capsys, message, compilers.main, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs the package libtpu, which is not there; pip install -e '.[tpu]'."),
        (["--platform=cuda"], "needs the package jax_cuda12_plugin, which is not th"),
    ],
)
def test_names_the_package_that_is_missing(options, message, capsys, monkeypatch):
    monkeypatch.setattr(topologies, "find_spec", lambda name: None)
    check_refusal(capsys, message, compilers.main, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology=x"], "compiler of tpu has no --topology x: what it said; write"),
        (["--devices=9"], "--devices must be from 1 to the 1 of v5e:2x2, got 9."),
        (["--target=x"], "--target describes a GPU; leave it out for a TPU, got x."),
        (["--platform=cuda"], "--platform cuda needs --target FILE, the description"),
        (["--platform=cuda", "--target=missing"], "No such file or directory"),
    ],
)
def test_refuses_devices_there_are_not(options, message, capsys, monkeypatch):
    def get(platform, topology_name, **options):
        if topology_name == "x":
            raise RuntimeError("what it said\nand more")
        return types.SimpleNamespace(devices=jax.devices()[:1])

    monkeypatch.setattr(topologies, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies.topologies, "get_topology_desc", get)
    for name, value in topologies._LIBTPU.items():  # To be taken back afterwards.
        monkeypatch.setenv(name, value)
    check_refusal(capsys, message, compilers.main, options)


def test_other_errors_of_a_compiler_are_raised():
    error = jax.errors.JaxRuntimeError("INTERNAL: a bug")
    with pytest.raises(jax.errors.JaxRuntimeError), topologies.memory_errors():
        raise error


# In the style of XLA for TPUs: a loop of three rounds that gathers, with a collective
# that is spread over two fusions, and for GPUs: a convolution that is a call.
PROGRAM = """\
%piece (p: f32[8]) -> f32[8] {
  %g = f32[8]{0} all-gather(%p), channel_id=7, frontend_attributes={chain_id="1"}
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f.1 = f32[8]{0} fusion(%p), kind=kCustom, calls=%piece
  %f.2 = f32[8]{0} fusion(%p), kind=kCustom, calls=%piece
  %r = f32[4]{0} all-reduce(%f.2), channel_id=8, to_apply=%add
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %c = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%x), condition=%condition, body=%body
  %k = f32[4]{0} custom-call(%w), custom_call_target="__cudnn$convForward"
}
"""


def test_reads_what_compilers_for_tpus_and_gpus_write():
    compiled = types.SimpleNamespace(
        as_text=lambda: PROGRAM,
        cost_analysis=lambda: None,
        memory_analysis=lambda: types.SimpleNamespace(
            temp_size_in_bytes=5, argument_size_in_bytes=6, peak_memory_in_bytes=7
        ),
    )
    figures = topologies.figures(compiled)
    assert figures["fusions"] == 3 * 2
    assert figures["convolutions"] == 1
    assert figures["all-gather_bytes"] == 3 * 8 * 4
    assert figures["all-reduce_bytes"] == 3 * 4 * 4
    assert figures["collectives"] == 6
    assert (figures["temp_bytes"], figures["peak_bytes"]) == (5, 7)
    assert "flops" not in figures
    looped = collectives.traffic(compiled)
    assert looped.always.total() == figures["sent_bytes"]
