"""The benchmarks on simulated devices, in configurations that take seconds."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks import scaling, sharded_memory
from example_support import run_script
from sam_examples.benchmarking import collectives, sharded
from sam_examples.devices import sharding
from sam_examples.models.transformer import Transformer, make_language_loss_fn

DEVICES = 8
TINY = ["--width=64", "--layers=3", "--hidden=128", "--heads=2", "--vocabulary=128"]


@pytest.mark.full
def test_sharded_memory_is_what_the_arithmetic_says(tmp_path, capsys):
    path = tmp_path / "new" / "memory.json"
    methods = ["VaSSO", "SSAM-F"]
    sizes = [f"--devices={DEVICES}", "--length=16", "--bases", "SGD"]
    options = [*TINY, *sizes, "--methods", *methods, "--json", str(path)]
    sharded_memory.main(options)
    results = json.loads(path.read_text())
    rows = results["rows"]
    methods.append("SAM by hand")
    assert list(rows) == ["SGD", *(f"SGD, {method}" for method in methods)]
    weights = results["num_weights"]["total"]
    for row in rows.values():
        assert row["param_bytes"] == 4 * weights / DEVICES
        assert row["state_over_ideal"] == pytest.approx(1, abs=0.01)
        # What the compiler counts has the tokens, and no more.
        arrays = row["param_bytes"] + row["state_bytes"]
        assert row["argument_bytes"] == pytest.approx(arrays, rel=0.01)
        assert row["other_bytes"] == 0
    # One more float32 copy, and one byte for each weight.
    state = {name: row["state_over_params"] for name, row in rows.items()}
    assert state["SGD"] == state["SGD, SAM by hand"] == 1
    assert state["SGD, VaSSO"] == pytest.approx(2, abs=0.001)
    assert state["SGD, SSAM-F"] == pytest.approx(1.25, abs=0.001)
    for method in methods:
        row = rows[f"SGD, {method}"]
        assert row["gathered_over_base"] == pytest.approx(2, abs=0.01)
        assert row["reduced_over_base"] == pytest.approx(2, abs=0.01)
    # The gradients of four probes.
    assert rows["SGD, SSAM-F"]["refresh_over_base"] > 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


@pytest.mark.full
def test_scaling_counts_what_travels(tmp_path, capsys):
    path = tmp_path / "scaling.json"
    sizes = ["--stages", "1", "--width=8", "--batch-size=16", "--rounds=1"]
    methods = ["--methods", "sgd", "sam", "m_sam", "--devices", "1", str(DEVICES)]
    scaling.main([*sizes, *methods, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == [
        f"{method}, {count}" for count in (1, DEVICES) for method in methods[1:4]
    ]
    for name, row in rows.items():
        assert row["seconds"] > 0
        assert row["other_over_params"] == row["refresh_over_params"] == 0, name
    reduced = {name: row["reduced_over_params"] for name, row in rows.items()}
    assert reduced["sgd, 1"] == reduced["sam, 1"] == reduced["m_sam, 1"] == 0
    assert reduced["sgd, 8"] == pytest.approx(1, abs=0.01)
    assert reduced["sam, 8"] == pytest.approx(2, abs=0.01)
    assert reduced["m_sam, 8"] == pytest.approx(1, abs=0.01)
    assert rows["sgd, 8"]["time_over_sgd"] == 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def compiled_on_devices(fn, *shapes):
    mesh = sharding.make_mesh(DEVICES)
    place = sharding.by_examples(mesh)
    arguments = sharding.as_shapes(
        [np.zeros(shape, np.float32) for shape in shapes], [place] * len(shapes)
    )
    out = sharding.replicated(mesh)
    return jax.jit(fn, out_shardings=out).lower(*arguments).compile()


@pytest.mark.full
def test_traffic_counts_loops_and_sets_conditions_apart():
    def in_loop(x):
        def body(carry, _):
            return jnp.sin(carry + jnp.sum(x * carry[None], axis=0)), None

        return jax.lax.scan(body, x[0], length=5)[0]

    once = collectives.traffic(compiled_on_devices(lambda x: x.sum(0), (16, 100)))
    assert once.always == {collectives.REDUCE: 400}
    assert (once.sometimes.total(), once.number) == (0, 1)
    looped = collectives.traffic(compiled_on_devices(in_loop, (16, 100)))
    assert looped.always[collectives.REDUCE] >= 5 * 400

    def in_branch(x, y):
        branches = (lambda: y.sum(0), lambda: jnp.zeros(100))
        return jax.lax.cond(x[0] > 0, *branches)

    branched = collectives.traffic(compiled_on_devices(in_branch, (16,), (16, 100)))
    assert branched.sometimes == {collectives.REDUCE: 400}
    assert branched.always[collectives.REDUCE] < 100


@pytest.mark.full
def test_a_step_is_compiled_from_shapes_and_runs():
    mesh = sharding.make_mesh(DEVICES)
    place = sharding.by_examples(mesh)
    params, batch = {"w": np.ones((16, 4), np.float32)}, np.ones((8, 16), np.float32)
    problem = sharded.Problem(
        lambda params, x: jnp.sum((x @ params["w"]) ** 2, axis=-1),
        sharding.as_shapes(params, {"w": place}),
        sharding.as_shapes(batch, place),
        mesh,
    )
    tx = sharded_memory.METHODS["VaSSO"].make(sharded_memory.BASES["SGD"])
    update = sharded_memory.optax_sam.value_and_update(problem.loss_fn, tx)
    step = sharded.compile_step(problem, tx, update)
    assert sharded.bytes_on_a_device(problem.params) == 4 * 16 * 4 / DEVICES
    params, batch = jax.device_put((params, batch), place)
    after, _, loss = step.compiled(params, tx.init(params), batch)
    assert loss == 16**2 * 4
    assert after["w"].sharding == place


@pytest.mark.full
def test_the_transformer_sees_no_later_tokens():
    model = Transformer(11, 16, num_layers=2, num_heads=2, hidden=32)
    tokens = jnp.arange(12).reshape(2, 6) % 11
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    params = model.init(jax.random.key(0), inputs)["params"]
    assert params["layers"]["up"]["kernel"].shape == (2, 16, 32)
    logits = model.apply({"params": params}, inputs)
    assert logits.shape == (2, 5, 11)
    changed = model.apply({"params": params}, inputs.at[:, 3].set(0))
    np.testing.assert_allclose(changed[:, :3], logits[:, :3], atol=1e-6)
    assert not np.allclose(changed[:, 3:], logits[:, 3:], atol=1e-3)
    losses = make_language_loss_fn(model)(params, tokens)
    scores = jax.nn.log_softmax(logits)
    wanted = [-scores[i, jnp.arange(5), targets[i]].mean() for i in range(2)]
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (
            sharded_memory,
            ["--width=100", "--devices=8"],
            "--devices must divide --width, got 8.",
        ),
        (sharded_memory, ["--layers=0"], "--layers must be at least 1, got 0."),
        (
            sharded_memory,
            ["--bases", "LION"],
            "--bases must be of SGD, AdamW, got LION.",
        ),
        (
            sharded_memory,
            ["--methods", "ASAM"],
            "--methods must be of SAM, VaSSO, SSAM-D, SSAM-F, got ASAM.",
        ),
        (scaling, ["--rounds=0"], "--rounds must be at least 1, got 0."),
        (
            scaling,
            ["--devices", "3"],
            "--devices must divide --batch-size 64, got 3.",
        ),
        (scaling, ["--devices", "64"], "there are 8 devices, not 64."),
        (scaling, ["--width=4"], "--width must be a positive multiple of 8, got 4."),
    ],
)
def test_says_in_one_line_what_is_wrong(script, options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(options)
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.full
@pytest.mark.parametrize("script", ["scaling.py", "sharded_memory.py"])
def test_a_benchmark_runs_as_a_script_on_devices_of_its_own(script):
    methods, tiny = ["--methods", "sgd", "--devices", "2"], ["--stages=1", "--width=8"]
    options = [*methods, *tiny, "--batch-size=4", "--rounds=1"]
    if script == "sharded_memory.py":
        methods = ["--bases", "AdamW", "--methods", "SAM"]
        options = [*methods, *TINY, "--devices=16", "--length=4"]
    assert "/ params" in run_script(f"benchmarks/{script}", *options)
