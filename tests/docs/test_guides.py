"""The tutorial, the recipes and what else guides a user do what is said of them."""

import tomllib
import warnings

import documents
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

OWN_LOOP = "docs/recipes/your-own-loop.md"


def problem_of(scope):
    """What a reader trains who has pasted the code so far."""
    return problems.Problem(scope["params"], scope["loss_fn"], scope["batch"])


def sam_by_hand(base, base_state, problem, rho, steps, *, adaptive=False):
    """Parameters and the base's state after some steps, without the library."""
    for _ in range(steps):
        params, grads = problem.params, problems.gradient(problem)
        sizes = jax.tree.map(lambda w: abs(w) if adaptive else 1.0, params)
        scale = rho / problems.norm(jax.tree.map(jnp.multiply, sizes, grads))
        displaced = jax.tree.map(
            lambda w, t, g, s=scale: w + s * t**2 * g, params, sizes, grads
        )
        grads = problems.gradient(problem._replace(params=displaced))
        updates, base_state = base.update(grads, base_state, params)
        problem = problem._replace(params=optax.apply_updates(params, updates))
    return problem.params, base_state


@pytest.mark.parametrize("page", ["docs/index.md", documents.TUTORIAL])
def test_how_to_install_names_what_is_needed(page):
    text = " ".join((documents.ROOT / page).read_text().split())
    project = tomllib.loads((documents.ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["flax"]]
    needed.append(f"Python{project['requires-python']}")
    for requirement in needed:
        if not requirement.startswith("chex"):  # No user asks for it.
            assert requirement.replace(">=", " ") in text
    assert f"optax_sam-{optax_sam.__version__}-py3-none-any.whl[flax]" in text


def test_the_library_tells_of_three_mistakes():
    found = [
        block
        for block in documents.blocks(documents.TUTORIAL)
        if block.heading == "Three mistakes" and block.language in ("py", "text")
    ]
    assert [block.language for block in found] == ["py", "text"] * 3
    scope = documents.run(documents.TUTORIAL, "Flax linen")
    for mistake, said in zip(found[::2], found[1::2], strict=True):
        after = {name: x for name, x in scope.items() if name != "step"}
        exec(mistake.content, after)
        tx, params = after["tx"], after["params"]
        step = after.get("step", optax_sam.value_and_update(after["loss_fn"], tx))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                jax.eval_shape(step, params, tx.init(params), after["batch"])
            except ValueError as error:
                told = [error]
        (message,) = [str(getattr(x, "message", x)) for x in told]
        assert message == " ".join(said.content.split())


def test_radii_by_group_with_one_norm():
    """The row on groups of parameters, of what there is in PyTorch."""
    labels = {"w": "a", "b": "b"}
    gradient = {"w": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}
    radii = optax.partition({"a": optax.scale(0.1), "b": optax.scale(0.5)}, labels)
    ascent = optax.chain(optax_sam.scale_to_radius(1.0), radii)
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    epsilon, _ = ascent.update(gradient, tx.init(gradient).ascent_state, gradient)
    np.testing.assert_allclose([epsilon["w"][0], epsilon["b"][0]], [0.06, 0.4], 1e-6)


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


def test_commands():
    application, translation = documents.commands("docs/training.md")
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


@pytest.mark.full
def test_weight_decay_pulls_the_parameters_as_they_are():
    scope = documents.run("docs/recipes/regularisation.md", "Weight decay")
    params, tx, problem = scope["params"], scope["tx"], problem_of(scope)
    step = jax.jit(optax_sam.value_and_update(problem.loss_fn, tx))
    _, updates, _ = step(params, tx.init(params), problem.batch)
    plain = optax_sam.sam(optax.sgd(0.1, momentum=0.9), rho=0.05)
    step = jax.jit(optax_sam.value_and_update(problem.loss_fn, plain))
    _, others, _ = step(params, plain.init(params), problem.batch)
    expected = jax.tree.map(
        lambda u, p: u - 0.1 * 5e-4 * p if p.ndim > 1 else u, others, params
    )
    problems.assert_trees_close(updates, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.full
def test_statistics_and_dropout_together():
    heading = "Batch normalisation and dropout together"
    scope = documents.run("docs/recipes/regularisation.md", heading)
    assert scope["loss"] < 1.0  # From about log(10) = 2.3.
    problems.assert_trees_differ(
        scope["batch_stats"], scope["variables"]["batch_stats"]
    )


@pytest.mark.full
def test_hyperparameters_that_the_loop_changes():
    scope = documents.run("docs/recipes/schedules.md")
    params, problem = scope["params"], problem_of(scope)

    def updates(tx, opt_state):
        step = jax.jit(optax_sam.value_and_update(problem.loss_fn, tx))
        return step(params, opt_state, problem.batch)[1]

    def expected(tx):
        return updates(tx, tx.init(params))

    problems.assert_trees_close(
        updates(scope["tx"], scope["opt_state"]),
        expected(optax_sam.m_sam(optax.sgd(0.1), 0.1, 4)),
        rtol=1e-5,
        atol=1e-8,
    )
    problems.assert_trees_close(
        updates(scope["adamw_sam"], scope["adamw_state"]),
        expected(optax_sam.sam(optax.adamw(1e-3), 0.05)),
        rtol=1e-5,
        atol=1e-8,
    )


@pytest.mark.full
def test_frozen_parts_neither_move_nor_are_perturbed():
    def losses(params, batch):
        jax.debug.callback(points.append, params)
        return loss_fn(params, batch)

    points = []
    scope = documents.run("docs/recipes/freezing.md", "Frozen parts")
    params, tx, loss_fn = scope["params"], scope["tx"], scope["loss_fn"]
    step = jax.jit(optax_sam.value_and_update(losses, tx))
    _, updates, _ = step(params, tx.init(params), scope["batch"])
    jax.effects_barrier()
    backbone, head = (updates["params"][name] for name in ("layers_0", "layers_2"))
    assert not any(np.any(x) for x in jax.tree.leaves(backbone))
    assert all(np.any(x) for x in jax.tree.leaves(head))
    for point in points:
        layer = point["params"]["layers_0"]
        problems.assert_trees_equal(layer, params["params"]["layers_0"])
    moved = [point["params"]["layers_2"]["kernel"] for point in points]
    assert any(np.any(x != params["params"]["layers_2"]["kernel"]) for x in moved)
    # The same step as with the head alone for parameters.
    _, of_head, _ = scope["step"](
        {"layers_2": params["params"]["layers_2"]},
        scope["head_tx"].init({"layers_2": params["params"]["layers_2"]}),
        scope["batch"],
        scope["backbone"],
    )
    problems.assert_trees_close(of_head["layers_2"], head, rtol=1e-5, atol=1e-8)


@pytest.mark.full
def test_lora_moves_adapters_alone():
    scope = documents.run("docs/recipes/freezing.md", "LoRA")
    model = scope["lora_model"]
    untouched = nnx.LoRALinear(8, 10, lora_rank=2, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.kernel[...], untouched.kernel[...])
    assert np.any(model.lora.lora_b[...] != untouched.lora.lora_b[...])


@pytest.mark.full
def test_linen_train_state():
    heading = "Flax linen's `TrainState`"
    scope = documents.run("docs/recipes/frameworks.md", heading)
    assert scope["loss"] < 1.0  # From about log(10) = 2.3.
    assert scope["state"].step == 100
    problems.assert_trees_differ(
        scope["state"].batch_stats, scope["variables"]["batch_stats"]
    )


@pytest.mark.full
def test_equinox():
    eqx = pytest.importorskip("equinox")
    scope = documents.run("docs/recipes/frameworks.md", "Equinox")
    model = eqx.nn.MLP(8, 10, 32, 1, key=jax.random.key(1))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    problem = problem_of(scope)._replace(params=params)
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


@pytest.mark.full
def test_a_restored_run_takes_the_steps_of_one_that_was_not_stopped():
    page, heading = "docs/recipes/checkpoints.md", "Saving and resuming with Orbax"
    scope, start = (
        documents.run(page, heading),
        documents.run(documents.TUTORIAL, "Flax linen"),
    )
    inputs = start["params"], start["opt_state"], start["batch"]
    problems.assert_trees_equal(
        (scope["loss"], scope["updates"], scope["opt_state"]), scope["step"](*inputs)
    )


@pytest.mark.full
def test_from_sgd_to_sam():
    scope = documents.run("docs/recipes/checkpoints.md", "From an SGD run to SAM")
    sgd, problem = scope["base"], problem_of(scope)
    run = problems.training(scope["tx"], problem, 3)
    params, opt_state = run(problem.params, scope["opt_state"])
    problems.assert_trees_close(
        (params, opt_state.base_state),
        sam_by_hand(sgd, scope["base_state"], problem, 0.05, 3),
        rtol=1e-5,
        atol=1e-7,
    )
    # The way back.
    problems.training(sgd, problem, 1)(params, opt_state.base_state)


@pytest.mark.full
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

    page, heading = "docs/recipes/wrappers.md", "Steps that are not finite"
    points, base_state = train(documents.run(page, heading)["tx"])
    assert [i for i in range(1, 9) if np.any(points[i] != points[i - 1])] == [4, 8]
    assert (base_state.total_notfinite, base_state.notfinite_count) == (1, 0)
    # The other way round, a NaN stays in the sum.
    skipping = optax.apply_if_finite(optax.sgd(0.1), 10)
    points, _ = train(optax_sam.sam(optax.MultiSteps(skipping, 4), rho=0.05))
    assert not np.any(points)


@pytest.mark.full
def test_schedule_free():
    start = documents.run("docs/recipes/wrappers.md", "Lookahead")
    scope = documents.run("docs/recipes/wrappers.md", "Schedule-free optimizers")
    base, problem = optax.contrib.schedule_free_adamw(1e-2), problem_of(start)
    by_hand, state = sam_by_hand(base, base.init(problem.params), problem, 0.05, 1)
    problems.assert_trees_close(
        scope["evaluated"],
        optax.contrib.schedule_free_eval_params(state, by_hand),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.full
def test_nnx_by_hand():
    scope = documents.run(OWN_LOOP, "By hand with NNX")
    batch, trained = scope["batch"], scope["nnx_model"]
    tx, model = scope["tx"], nnx.Linear(8, 10, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss_fn(model, batch):
        logits = model(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    step, before = nnx_value_and_update(loss_fn), model.kernel[...]
    jax.jit(step)(model, optimizer, batch)  # As is said: to no effect.
    np.testing.assert_array_equal(model.kernel[...], before)
    step(model, optimizer, batch)
    np.testing.assert_allclose(trained.kernel[...], model.kernel[...], rtol=1e-5)


@pytest.mark.full
def test_losses_of_sentences():
    scope = documents.run(OWN_LOOP, "Sequence models")
    batch, model = scope["sentences"], scope["model"]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model.apply(scope["params"], batch["x"]), batch["y"]
    )
    expected = np.asarray(losses)[np.asarray(batch["is_token"])].mean()
    np.testing.assert_allclose(scope["loss"], expected, rtol=1e-5)
    found = scope["sentence_losses"](scope["params"], batch)
    assert found.shape == (64,)
    np.testing.assert_allclose(found.mean(), expected, rtol=1e-5)


@pytest.mark.full
def test_functional_sam_and_a_preconditioned_ascent():
    """Two steps: SAM's ascent, then one that AdamW's second moments scale."""
    scope = documents.run(OWN_LOOP)
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


def visible_training(tx, problem, calls):
    state = tx.init(problem.params)
    for _ in range(calls):
        updates, state = tx.update(problems.gradient(problem), state, problem.params)
        params = optax.apply_updates(problem.params, updates)
        problem = problem._replace(params=params)
    return params


@pytest.mark.full
def test_other_arguments_of_contrib():
    scope = documents.run("docs/migrating.md", "From `optax.contrib.sam`")
    problem = problem_of(scope)
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
        atol=1e-6,
    )


@pytest.mark.full
def test_the_classes_of_pytorch():
    """Ten steps of `adaptive=True`, with clipping, weight decay and a schedule."""
    start = documents.run(documents.TUTORIAL, "Flax linen")
    scope = documents.run("docs/migrating.md", "From PyTorch")
    problem, base = problem_of(start), scope["base"]
    expected, _ = sam_by_hand(
        base, base.init(problem.params), problem, 0.5, 10, adaptive=True
    )
    problems.assert_trees_close(scope["params"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_diagnostics():
    scope = documents.run("docs/diagnostics.md")
    figures = scope["figures"]
    losses = scope["loss_fn"](scope["params"], scope["batch"])
    np.testing.assert_allclose(
        figures["this step"].clean_loss, losses.mean(), rtol=1e-5
    )
    # SAM's step is where the search for the worst case begins.
    assert figures["worst in a ball"] >= figures["this step"].gap > 0
    assert np.all(np.diff(figures["largest eigenvalues"]) <= 0)
    assert figures["gradient noise"] > 0
