"""The code of the pages in docs/ runs, and no page has a link that leads nowhere."""

import builtins
import os.path
import symtable

import chex
import documents
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from flax import nnx
from sam_examples.settings.config_file import parse
from sam_examples.settings.translation import parse_translation

import optax_sam
from optax_sam.flax import nnx_value_and_update

# What a reader needs first; the code of other pages runs in the full tier.
FIRST_PAGES = {documents.TUTORIAL, "docs/choosing.md"}
NOT_CONVERTED = {"docs/recipes.md"}  # Its code does not run from top to bottom.
README = documents.python("README.md")
RECIPES = documents.python("docs/recipes.md")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.full] * (page not in FIRST_PAGES))
        for page in documents.PAGES
        if documents.python(page) and page not in NOT_CONVERTED
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
    assert "flax-nnxs-nnxoptimizer" in documents.anchors("docs/recipes.md")


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


def after_the_quickstart(page, heading):
    scope = {}
    exec(README["Flax linen"] + documents.python(page)[heading], scope)
    return scope


def test_by_hand():
    problem = problems.perceptron()
    tx = optax_sam.vasso(optax.sgd(0.1), rho=0.05, theta=0.4)
    scope = {
        "jax": jax,
        "jnp": jnp,
        "tx": tx,
        "params": problem.params,
        "opt_state": tx.init(problem.params),
        "loss_fn": problem.loss_fn,
        "batch": problem.batch,
    }

    @jax.jit
    def updates():
        exec(RECIPES["Recipes"] + RECIPES["By hand"], scope)
        return scope["updates"]

    assert problems.norm(updates()) > 0


def test_hyperparameters_that_change():
    problem = problems.perceptron()
    scope = {"jnp": jnp, "optax": optax, "optax_sam": optax_sam}
    scope["params"] = problem.params
    exec(RECIPES["Hyperparameters that change"], scope)

    def updates(tx, opt_state):
        step = jax.jit(optax_sam.value_and_update(problem.loss_fn, tx))
        return step(problem.params, opt_state, problem.batch)[1]

    plain = optax_sam.m_sam(optax.sgd(0.1), 0.1, 4)
    problems.assert_trees_close(
        updates(scope["tx"], scope["opt_state"]),
        updates(plain, plain.init(problem.params)),
        rtol=1e-5,
        atol=1e-8,
    )


def test_functional_sam_and_a_preconditioned_ascent():
    """Two steps: SAM's ascent, then one that AdamW's second moments scale."""
    heading = "Functional SAM and preconditioned ascents"
    scope = after_the_quickstart("docs/recipes.md", heading)
    step, batch, outputs_fn = scope["step"], scope["batch"], scope["output_fn"]

    @jax.jit
    def gradients(clean, second):
        outputs, vjp = jax.vjp(lambda p: outputs_fn(p, batch), clean)
        loss = lambda x: scope["loss_of_outputs"](x, batch).mean()  # noqa: E731
        (gradient,) = vjp(jax.grad(loss)(outputs))
        uphill = jax.tree.map(lambda g, v: g / (jnp.sqrt(v) + 1e-8), gradient, second)
        scale = 0.05 / optax.tree.norm(uphill)
        ahead = jax.tree.map(lambda p, u: p + scale * u, clean, uphill)
        _, vjp = jax.vjp(lambda p: outputs_fn(p, batch), ahead)
        return vjp(jax.grad(loss)(outputs))[0]

    params, tx = scope["params"], scope["tx"]
    base, opt_state = optax.adamw(1e-3), tx.init(params)
    base_state = base.init(params)
    for _ in range(2):
        second = optax.tree.get(base_state, "nu")
        expected, base_state = base.update(
            gradients(params, second), base_state, params
        )
        _, _, opt_state = step(params, opt_state, batch)
        problems.assert_trees_close(
            opt_state.base_state[0].mu, base_state[0].mu, rtol=1e-4, atol=1e-6
        )
        params = optax.apply_updates(params, expected)


def test_second_moments_by_a_link_of_optax():
    link = optax.scale_by_rms(0.999, eps_in_sqrt=False)
    ascent = optax.chain(link, optax_sam.scale_to_radius(0.5))
    problem = problems.quadratic()
    tx = optax_sam.sharpness_aware(optax.set_to_zero(), ascent)
    state = tx.init(problem.params)  # Would refuse an ascent that leads downhill.
    gradient = problems.gradient(problem)
    epsilon, _ = ascent.update(gradient, state.ascent_state, problem.params)
    # Of one gradient the square is that moment: all its entries count the same.
    size = sum(x.size for x in jax.tree.leaves(gradient))
    expected = jax.tree.map(lambda g: 0.5 * np.sign(g) / size**0.5, gradient)
    problems.assert_trees_close(epsilon, expected, rtol=1e-5)


def test_losses_of_sentences():
    scope = after_the_quickstart("docs/recipes.md", "Sequence models")
    batch, model = scope["sentences"], scope["model"]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model.apply(scope["params"], batch["x"]), batch["y"]
    )
    expected = np.asarray(losses)[np.asarray(batch["is_token"])].mean()
    np.testing.assert_allclose(scope["loss"], expected, rtol=1e-5)
    found = scope["sentence_losses"](scope["params"], batch)
    assert found.shape == (64,)
    np.testing.assert_allclose(found.mean(), expected, rtol=1e-5)


def coming_from_contrib(problem):
    scope = {"chex": chex, "jax": jax, "optax": optax, "optax_sam": optax_sam}
    scope |= {"params": problem.params, "mean_loss": problems.mean_loss(problem)}
    exec(RECIPES["Coming from `optax.contrib.sam`"], scope)  # It compares.
    return scope


def test_coming_from_contrib():
    coming_from_contrib(problems.perceptron())


@pytest.mark.full
def test_other_arguments_of_contrib():
    problem = problems.perceptron()
    scope = coming_from_contrib(problem)
    # Of two calls without `opaque_mode` the first is the ascent of a step.
    visible = optax.contrib.sam(optax.adam(1e-2), scope["adversary"])
    problems.assert_trees_close(
        visible_training(visible, problem, 10),
        scope["train"](scope["tx"], problem.params),
        rtol=1e-4,
        atol=1e-6,
    )
    # Another adversary, which keeps a moving average: the sign and the state.
    contrib = optax.contrib.sam(
        optax.adam(1e-2),
        optax.sgd(0.05, momentum=0.9),
        reset_state=False,
        opaque_mode=True,
    )
    ascent = optax.chain(optax.trace(0.9), optax.scale(0.05))
    tx = optax_sam.sharpness_aware(optax.adam(1e-2), ascent)
    problems.assert_trees_close(
        scope["train"](contrib, problem.params),
        scope["train"](tx, problem.params),
        rtol=1e-5,
        atol=1e-7,
    )


def visible_training(tx, problem, calls):
    state = tx.init(problem.params)
    for _ in range(calls):
        updates, state = tx.update(problems.gradient(problem), state, problem.params)
        params = optax.apply_updates(problem.params, updates)
        problem = problem._replace(params=params)
    return params


def sam_by_hand(base, base_state, problem, rho, steps):
    """Parameters and the base's state after some steps, without the library."""
    for _ in range(steps):
        params, grads = problem.params, problems.gradient(problem)
        scale = rho / problems.norm(grads)
        displaced = jax.tree.map(lambda w, g, s=scale: w + s * g, params, grads)
        grads = problems.gradient(problem._replace(params=displaced))
        updates, base_state = base.update(grads, base_state, params)
        problem = problem._replace(params=optax.apply_updates(params, updates))
    return problem.params, base_state


def test_from_sgd_to_sam():
    problem = problems.perceptron()
    rate = optax.linear_schedule(0.1, 0.0, 8)
    sgd = optax.sgd(rate, momentum=0.9)
    params, base_state = problems.train(sgd, problem, 1)
    scope = {"optax": optax, "optax_sam": optax_sam, "rate": rate}
    scope |= {"params": problem.params, "grads": problems.gradient(problem)}
    exec(RECIPES["From an SGD run to SAM"].replace("sgd(0.1", "sgd(rate"), scope)
    problem = problem._replace(params=params)
    run = problems.training(scope["tx"], problem, 3)
    params, opt_state = run(params, scope["opt_state"])
    problems.assert_trees_close(
        (params, opt_state.base_state),
        sam_by_hand(sgd, base_state, problem, 0.05, 3),
        rtol=1e-5,
        atol=1e-7,
    )
    # The way back.
    problems.training(sgd, problem, 1)(params, opt_state.base_state)


def test_schedule_free():
    problem = problems.perceptron()
    scope = {"optax": optax, "optax_sam": optax_sam}
    exec(RECIPES["Schedule-free optimizers"], scope)
    params, opt_state = problems.train(scope["tx"], problem, 5)
    evaluated = scope["evaluated_params"](opt_state, params)
    base = optax.contrib.schedule_free_adamw(1e-2)
    by_hand, state = sam_by_hand(base, base.init(problem.params), problem, 0.05, 5)
    problems.assert_trees_close(
        evaluated,
        optax.contrib.schedule_free_eval_params(state, by_hand),
        rtol=1e-4,
        atol=1e-6,
    )
    problems.assert_trees_differ(evaluated, params)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    scope = {}
    exec(README["Flax linen"].partition("params =")[0], scope)
    exec(RECIPES["Equinox"], scope)
    model = eqx.nn.MLP(8, 10, 32, 1, key=jax.random.key(1))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    problem = problems.Problem(params, scope["loss_fn"], scope["batch"])
    base = optax.sgd(0.1, momentum=0.9)
    params, _ = sam_by_hand(base, base.init(params), problem, 0.05, 10)
    trained, by_hand = scope["model"], eqx.combine(params, static)
    assert trained.activation is model.activation
    problems.assert_trees_close(
        eqx.filter(trained, eqx.is_array),
        eqx.filter(by_hand, eqx.is_array),
        rtol=1e-4,
        atol=1e-6,
    )


def test_nnx_optimizer_by_hand():
    scope = {"jnp": jnp, "nnx": nnx, "model": nnx.Linear(3, 1, rngs=nnx.Rngs(0))}
    scope["loss_fn"] = lambda model, x: jnp.mean(model(x) ** 2, axis=-1)
    scope["batch"] = jnp.eye(3)
    tx = optax_sam.sam(optax.sgd(0.1), rho=0.05)
    scope["optimizer"] = nnx.Optimizer(scope["model"], tx, wrt=nnx.Param)
    exec(RECIPES["Flax NNX's `nnx.Optimizer`"], scope)
    by_hand, model = scope["model"], nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx_value_and_update(lambda model, x: jnp.mean(model(x) ** 2))
    before = model.kernel[...]
    jax.jit(step)(model, optimizer, jnp.eye(3))  # As is said: to no effect.
    np.testing.assert_array_equal(model.kernel[...], before)
    step(model, optimizer, jnp.eye(3))
    np.testing.assert_allclose(by_hand.kernel[...], model.kernel[...], rtol=1e-5)


@pytest.mark.full
def test_linen_train_state():
    scope = {}
    exec(README["Flax linen"], scope)
    exec(RECIPES["Flax linen's `TrainState`"], scope)
    assert scope["loss"] < 1.0  # From about log(10) = 2.3.
    assert scope["state"].step == 100
    problems.assert_trees_differ(
        scope["state"].batch_stats, scope["variables"]["batch_stats"]
    )


def test_freezing_parts():
    def losses(params, batch):
        jax.debug.callback(points.append, params)
        return batch @ (params["backbone"] * params["head"])

    points = []
    scope = {"jax": jax, "optax": optax, "optax_sam": optax_sam}
    exec(RECIPES["Freezing parts"], scope)
    tx, params = scope["tx"], {"backbone": jnp.ones(2), "head": jnp.ones(2)}
    step = jax.jit(optax_sam.value_and_update(losses, tx))
    _, updates, _ = step(params, tx.init(params), jnp.ones((4, 2)))
    jax.effects_barrier()
    assert not np.any(updates["backbone"])
    assert np.all(updates["head"])
    assert all(np.all(point["backbone"] == 1) for point in points)
    assert any(np.all(point["head"] > 1) for point in points)


def test_shard_map():
    scope = after_the_quickstart("docs/devices.md", "Inside `shard_map` and `pmap`")
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


def test_steps_that_are_not_finite():
    def loss_fn(params, batch):
        return jnp.sum((params[None] - batch) ** 2, axis=-1)

    def train(tx):
        params, step = jnp.zeros(2), jax.jit(optax_sam.value_and_update(loss_fn, tx))
        opt_state, points = tx.init(params), []
        for scale in (1.0, jnp.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
            _, updates, opt_state = step(params, opt_state, scale * jnp.ones((2, 2)))
            params = optax.apply_updates(params, updates)
            points.append(params)
        return points, opt_state.base_state

    scope = {"optax": optax, "optax_sam": optax_sam}
    exec(RECIPES["Steps that are not finite"], scope)
    points, base_state = train(scope["tx"])
    assert [i for i in range(1, 9) if np.any(points[i] != points[i - 1])] == [4, 8]
    assert (base_state.total_notfinite, base_state.notfinite_count) == (1, 0)
    # The other way round, a NaN stays in the sum.
    skipping = optax.apply_if_finite(optax.sgd(0.1), 10)
    points, _ = train(optax_sam.sam(optax.MultiSteps(skipping, 4), rho=0.05))
    assert not np.any(points)


def scopes(table):
    yield table
    for inner in table.get_children():
        yield from scopes(inner)


@pytest.mark.parametrize("heading", RECIPES)
def test_recipes_use_what_the_reader_has(heading):
    start = README["Flax linen"] + RECIPES["Recipes"]
    if "NNX" in heading:
        start = README["Flax NNX"]
    code = start + RECIPES[heading]
    page, *functions = scopes(symtable.symtable(code, heading, "exec"))
    names = page.get_symbols()
    used = {name.get_name() for name in names if name.is_referenced()}
    for function in functions:
        used |= {x.get_name() for x in function.get_symbols() if x.is_global()}
    made = {x.get_name() for x in names if x.is_assigned() or x.is_imported()}
    assert used <= made | set(dir(builtins))


@pytest.mark.full
def test_pmap():
    scope = after_the_quickstart(
        "docs/devices.md", "With `pmap`, state and batch statistics"
    )
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


@pytest.mark.full
def test_diagnostics():
    scope = after_the_quickstart("docs/diagnostics.md", "Diagnostics")
    figures = scope["figures"]
    losses = scope["loss_fn"](scope["params"], scope["batch"])
    np.testing.assert_allclose(
        figures["this step"].clean_loss, losses.mean(), rtol=1e-5
    )
    # SAM's step is where the search for the worst case begins.
    assert figures["worst in a ball"] >= figures["this step"].gap > 0
    assert np.all(np.diff(figures["largest eigenvalues"]) <= 0)
    assert figures["gradient noise"] > 0


def test_commands():
    application, translation = documents.commands("docs/training.md")
    (processes,) = documents.commands("docs/devices.md")
    assert "examples/multi_process.py" in processes
    script, *options = application.split()[1:]
    assert script == "examples/train.py"
    asked = parse(options)
    assert (asked.dataset, asked.model, asked.epochs) == ("cifar10", "resnet8", 3)
    training, use = (line.split()[1:] for line in translation.splitlines())
    assert training[0] == use[0] == "examples/translate.py"
    trained, used = parse_translation(training[1:]), parse_translation(use[1:])
    assert (trained.target, trained.method) == ("en", "functional_sam")
    assert used.out == trained.out
    assert used.translate.suffix == ".de"
