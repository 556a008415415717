"""The code of the pages in docs/ runs, and no page has a link that leads nowhere."""

import os.path

import documents
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

# What a reader needs first; the code of other pages runs in the full tier.
FIRST_PAGES = {documents.TUTORIAL, "docs/choosing.md"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.full] * (page not in FIRST_PAGES))
        for page in documents.PAGES
        if documents.python(page)
    ],
)
def test_code_runs(page):
    documents.run(page)


@pytest.mark.parametrize("page", documents.PAGES)
def test_links_lead_somewhere(page):
    for link in documents.links(page):
        name, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(page), name))
        target = target if name else page
        assert (documents.ROOT / target).exists(), link
        if anchor:
            assert target in documents.PAGES, link
            assert anchor in documents.anchors(target), link


def test_anchors_are_those_of_github():
    found = documents.anchors("examples/benchmarks/README.md")
    assert "sharded_memorypy-a-billion-parameters-fully-sharded" in found
    assert "flax-linens-trainstate" in documents.anchors("docs/recipes/frameworks.md")


def test_adding_a_method():
    scope = {"__name__": "sign_sam"}
    exec(documents.python("CONTRIBUTING.md")["Adding a method"], scope)
    base, params = optax.sgd(1.0), jnp.array([1.0, -3.0])
    # The gradient at w is that of half the squared length.
    for rho, expected in ((0.5, [-1.5, 3.5]), (0.0, [-1.0, 3.0])):
        tx = scope["sign_sam"](base, rho)
        state = tx.init(params)
        updates, _ = tx.update(params, state, params, grad_fn=lambda w: w)
        np.testing.assert_array_equal(updates, expected)
    nothing, state = tx.update(params * jnp.nan, state, params, grad_fn=lambda w: w)
    np.testing.assert_array_equal(nothing, -params)
    assert state.ascent_state.count == 0
    with pytest.raises(ValueError, match=r"^sign_sam: rho = -1 "):
        scope["sign_sam"](base, rho=-1.0)


def test_shard_map():
    scope = documents.run("docs/devices.md", "Inside `shard_map` and `pmap`")
    inputs = scope["params"], scope["opt_state"], scope["batch"]
    assert len(jax.devices()) > 1
    alone = optax_sam.value_and_update(scope["loss_fn"], scope["tx"])(*inputs)
    problems.assert_trees_close(scope["step"](*inputs), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by", ["pmap", "shard_map"])
def test_copies_differ_where_the_axis_was_forgotten(by):
    page = documents.python("docs/devices.md")["Inside `shard_map` and `pmap`"]
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
    scope = documents.run("docs/devices.md", "With `pmap`, state and batch statistics")
    assert scope["devices"] > 1
    for x in jax.tree.leaves(scope["state"]):
        np.testing.assert_array_equal(x, np.stack([x[0]] * scope["devices"]))
    # The same steps on one device, whose normalisation needs no name.
    layers = [
        nn.BatchNorm(x.use_running_average) if x is scope["norm"] else x
        for x in scope["model"].layers
    ]
    scope["model"] = nn.Sequential(layers)
    tx, batch = scope["tx"], scope["batch"]
    step = jax.jit(optax_sam.value_and_update(scope["loss_fn"], tx, has_aux=True))
    params, stats = scope["variables"]["params"], scope["variables"]["batch_stats"]
    opt_state = tx.init(params)
    for _ in range(10):
        (loss, stats), updates, opt_state = step(params, opt_state, batch, stats)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(scope["loss"], loss, rtol=1e-5)
    problems.assert_trees_close(
        (scope["params"], scope["batch_stats"]), (params, stats), rtol=1e-4, atol=1e-5
    )


def test_commands():
    (processes,) = documents.commands("docs/devices.md")
    assert "examples/multi_process.py" in processes
