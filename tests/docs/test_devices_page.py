"""What the blocks of the page on several devices give, beyond that they run."""

import re

import documents
import flax.linen as nn
import jax
import multi_process
import numpy as np
import optax
import problems
import pytest
import tyro
from sam_examples.devices.processes import check_processes

import optax_sam

PAGE = "docs/devices.md"


def after(heading):
    assert len(jax.devices()) == 8
    return documents.run(PAGE, heading)


def on_one_device(scope, *names):
    """Copies on the first device of what a page has made."""
    return jax.device_put([scope[name] for name in names], jax.devices()[0])


def parts(x):
    return {shard.data.shape for shard in x.addressable_shards}


@pytest.mark.full
def test_sharded_arrays():
    scope = after("Under `jit`, with sharded arrays")
    assert parts(scope["batch"]["x"]) == {(8, 8)}
    inputs = on_one_device(scope, "params", "opt_state", "batch")
    alone = optax_sam.value_and_update(scope["loss_fn"], scope["tx"])(*inputs)
    inputs = scope["params"], scope["opt_state"], scope["batch"]
    problems.assert_trees_close(scope["step"](*inputs), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_fully_sharded():
    scope = after("Fully sharded (FSDP)")
    params, batch = scope["params"], scope["batch"]
    kernel = params["params"]["layers_0"]["kernel"]
    assert parts(kernel) == {(1, 32)}
    trace = optax.tree.get(scope["opt_state"], "trace")
    # The bias of ten classes is on every device.
    assert parts(params["params"]["layers_2"]["bias"]) == {(10,)}
    for x, average in zip(*map(jax.tree.leaves, (params, trace)), strict=True):
        assert average.sharding.is_equivalent_to(x.sharding, x.ndim)

    (alone, one), tx = on_one_device(scope, "params", "batch"), scope["tx"]
    loss, updates, _ = optax_sam.value_and_update(scope["loss_fn"], tx)(
        alone, tx.init(alone), one
    )
    problems.assert_trees_close(
        scope["train_step"](params, jax.jit(tx.init)(params), batch)[:2],
        (loss, optax.apply_updates(alone, updates)),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.full
def test_shard_map():
    scope = after("Inside `shard_map` and `pmap`")
    names = "params", "opt_state", "batch"
    alone = optax_sam.value_and_update(scope["loss_fn"], scope["tx"])(
        *on_one_device(scope, *names)
    )
    together = scope["step"](*(scope[name] for name in names))
    problems.assert_trees_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by", ["pmap", "shard_map"])
def test_copies_differ_where_the_axis_was_forgotten(by):
    page = documents.python(PAGE)["Inside `shard_map` and `pmap`"]
    scope, problem = {"jax": jax}, problems.perceptron()
    exec(
        "import numpy as np\n" + page[page.index("def copies") : page.index("loss, ")],
        scope,
    )
    base = optax.sgd(0.1)
    devices = jax.devices()[:2]

    def updates(axis_name):
        step = optax_sam.value_and_update(problem.loss_fn, base, axis_name=axis_name)
        none, data = jax.P(), jax.P("data")
        over = jax.jit(
            jax.shard_map(
                step,
                mesh=jax.sharding.Mesh(devices, ("data",)),
                in_specs=(none, none, data),
                out_specs=none,
                check_vma=False,
            )
        )
        batch = problem.batch
        if by == "pmap":
            over = jax.pmap(step, "data", in_axes=(None, None, 0), devices=devices)
            batch = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
        return over(problem.params, base.init(problem.params), batch)[1]

    assert scope["copies_agree"](updates("data"))
    assert not scope["copies_agree"](updates(None))


@pytest.mark.full
def test_pmap():
    scope = after("With `pmap`, state and batch statistics")
    for x in jax.tree.leaves(scope["state"]):
        np.testing.assert_array_equal(x, np.stack([x[0]] * 8))
    # The same steps on one device, whose normalisation needs no name.
    layers = [
        nn.BatchNorm(x.use_running_average) if x is scope["norm"] else x
        for x in scope["model"].layers
    ]
    scope["model"] = nn.Sequential(layers)
    tx, (variables, batch) = scope["tx"], on_one_device(scope, "variables", "batch")
    step = jax.jit(optax_sam.value_and_update(scope["loss_fn"], tx, has_aux=True))
    params, stats = variables["params"], variables["batch_stats"]
    opt_state = tx.init(params)
    for _ in range(10):
        (loss, stats), updates, opt_state = step(params, opt_state, batch, stats)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(scope["loss"], loss, rtol=1e-5)
    problems.assert_trees_close(
        (scope["params"], scope["batch_stats"]), (params, stats), rtol=1e-4, atol=1e-5
    )


@pytest.mark.full
def test_rows_of_a_process():
    scope = after("Several processes")
    assert parts(scope["batch"]["y"]) == {(8,)}
    # One process has all rows.
    np.testing.assert_array_equal(scope["batch"]["y"], scope["rows"]["y"])


def test_commands():
    (job,) = (block for block in documents.blocks(PAGE) if block.language == "yaml")
    text = "\n".join([*documents.commands(PAGE), job.content])
    calls = re.findall(r"python examples/multi_process.py (.*?)(?: &|\n|\")", text)
    for variable in ("$i", "$JOB_COMPLETION_INDEX"):
        calls = [call.replace(variable, "1") for call in calls]
    options = [tyro.cli(multi_process.Options, args=call.split()) for call in calls]
    for given in options:
        check_processes(given)
    assert [given.cluster for given in options] == [False, True, True, False]
    assert [given.process_id for given in options] == [1, None, None, 1]
