"""What the methods' pages and the page on how to choose say of their code."""

import documents
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

METHODS = [page for page in documents.PAGES if page.startswith("docs/methods/")]


def problem_of(scope):
    """What a reader trains who has pasted the code so far."""
    return problems.Problem(scope["params"], scope["loss_fn"], scope["batch"])


@pytest.mark.full
@pytest.mark.parametrize(
    ("page", "heading"),
    [
        (page, heading)
        for page in METHODS
        for heading, code in documents.python(page).items()
        if "\nsame = " in code
    ],
)
def test_an_alias_is_the_same_as_its_chain(page, heading):
    scope = documents.run(page, heading)
    problem = problem_of(scope)
    alias, chain = (problems.train(scope[x], problem, 4) for x in ("tx", "same"))
    problems.assert_trees_equal(alias, chain)


def losses_of_steps(page, heading, steps=6):
    """The two losses of each step of a page's optimizer, and its last state."""
    scope = documents.run(page, heading)
    params, loss_fn, batch = problem_of(scope)
    tx = scope["tx"]
    step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
    opt_state, seen = tx.init(params), []
    for _ in range(steps):
        value, updates, opt_state = step(params, opt_state, batch)
        params = optax.apply_updates(params, updates)
        seen.append((float(value), float(opt_state.perturbed_loss)))
    return np.array(seen), opt_state


@pytest.mark.full
@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("momentum_sam", "Code"),
        ("momentum_sam", "Warming up"),
        ("momentum_sam", "Combining"),
        ("vasso", "Of one pass"),
        ("index", "An ascent of your own"),
    ],
)
def test_steps_of_one_gradient_report_its_loss(page, heading):
    losses, opt_state = losses_of_steps(f"docs/methods/{page}.md", heading)
    np.testing.assert_array_equal(losses[:, 0], losses[:, 1])
    assert optax.tree.get(opt_state, "clean_loss") == losses[-1, 1]


@pytest.mark.full
@pytest.mark.parametrize(
    ("page", "heading", "ascending"),
    [
        ("look_sam", "Code", 2 * [True, False, False]),
        ("look_sam", "Ascending in some steps only", 6 * [False]),
        ("look_sam", "Combining", [True, *4 * [False], True]),
        ("index", "Combining", 3 * [True, False]),
    ],
)
def test_steps_that_ascend_have_a_gap(page, heading, ascending):
    losses, _ = losses_of_steps(f"docs/methods/{page}.md", heading)
    np.testing.assert_array_equal(losses[:, 0] != losses[:, 1], ascending)


@pytest.mark.full
def test_the_gap_is_in_the_state():
    page = "docs/methods/index.md"
    assert documents.run(page, "The gap, for nothing")["gap"] > 0


@pytest.mark.full
def test_cheaper_ascents():
    scope = documents.run("docs/methods/index.md", "Cheaper ascents")
    params, batch, tx = scope["params"], scope["batch"], scope["tx"]
    # The names and parameters of the layers are those of the dense model.
    sparse = scope["sparse_model"].apply(params, batch["x"])
    dense = scope["model"].apply(params, batch["x"])
    np.testing.assert_array_equal(sparse, dense)
    value, updates, _ = scope["step"](params, tx.init(params), batch)
    quarter = scope["ascent_loss_fn"](params, batch)
    assert quarter.shape == (16,)
    np.testing.assert_allclose(value, quarter.mean(), rtol=1e-5)
    assert problems.norm(updates) > 0


@pytest.mark.full
def test_chosen_layers_leave_out_half_of_the_weights():
    scope = documents.run("docs/methods/sparse_sam.md", "Static masks")
    sizes = jax.tree.map(jnp.size, scope["params"])
    chosen = optax.tree.sum(jax.tree.map(lambda n, m: n * m, sizes, scope["mask"]))
    assert 0 < chosen <= optax.tree.sum(sizes) / 2


@pytest.mark.full
def test_an_implicit_backward_leaves_values_and_half_of_the_features():
    scope = documents.run("docs/methods/implicit.md", "Code")
    params, loss_fn, batch = problem_of(scope)
    np.testing.assert_array_equal(
        scope["ascent_loss_fn"](params, batch), loss_fn(params, batch)
    )
    gradient = jax.grad(lambda p: scope["ascent_loss_fn"](p, batch).mean())(params)
    kernel = gradient["params"]["layers_0"]["kernel"]
    assert np.sum(np.any(kernel, axis=0)) == kernel.shape[1] / 2


@pytest.mark.full
def test_another_ascent_with_the_descent_of_gsam():
    problem = problems.perceptron()
    tx = documents.run("docs/methods/gsam.md", "Combining")["tx"]
    params, grad_fn = problem.params, jax.grad(problems.mean_loss(problem))
    clean = grad_fn(params)
    updates, _ = tx.update(clean, tx.init(params), params, grad_fn=grad_fn)
    # The first direction of VaSSO is that of SAM, the first momentum the gradient.
    scale = 0.1 / problems.norm(clean)
    perturbed = grad_fn(jax.tree.map(lambda p, g: p + scale * g, params, clean))
    share = optax.tree.vdot(clean, perturbed) / optax.tree.norm(perturbed, squared=True)
    expected = jax.tree.map(
        lambda p, g: -0.1 * (p - 0.1 * (g - share * p)), perturbed, clean
    )
    problems.assert_trees_close(updates, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.full
def test_wsam_with_a_learning_rate_is_sam_around_plain_sgd_only():
    problem = problems.perceptron()

    def trained(method, base):
        return problems.train(method(base), problem, 4)[0]

    def decoupled(base):
        return optax_sam.wsam(base, rho=0.1, gamma=0.5, learning_rate=0.1)

    def sam(base):
        return optax_sam.sam(base, rho=0.1)

    plain, momentum = optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)
    problems.assert_trees_close(
        trained(decoupled, plain), trained(sam, plain), rtol=1e-5, atol=1e-6
    )
    problems.assert_trees_differ(trained(decoupled, momentum), trained(sam, momentum))


def test_choosing():
    scope = documents.run("docs/choosing.md")
    assert 1 < scope["effective"] < 64
    # Without a radius the sweep trains by the base alone.
    start = problem_of(scope)._replace(params=scope["start"], batch=scope["training"])
    params, _ = problems.train(scope["base"], start, 30)
    loss = jnp.mean(scope["loss_fn"](params, scope["held_out"]))
    np.testing.assert_allclose(scope["sweep"][0.0], loss, rtol=1e-4)
    assert len(set(scope["sweep"].values())) == 4
