"""Functional SAM: the Jacobian at w + eps, the derivative of the loss at w."""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import problems
import pytest
import references
from methods import defaults

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)
PROBLEM = problems.perceptron()
output_fn, of_outputs = problems.perceptron_logits, problems.cross_entropy
FUNCTIONAL = optax_sam.functional_loss(output_fn, of_outputs)


def functional(problem=PROBLEM):
    return problem._replace(loss_fn=FUNCTIONAL)


def one_step(tx, problem=PROBLEM, params=None, **options):
    """Value, updates and state of one step, the base's gradient being the updates."""
    params = problem.params if params is None else params
    step = jax.jit(optax_sam.value_and_update(problem.loss_fn, tx, **options))
    return step(params, tx.init(params), problem.batch)


@jax.jit
def pulled_back(clean, perturbed, batch=PROBLEM.batch):
    """dF(perturbed)^T dL(F(clean)), of the mean loss."""
    outputs = output_fn(clean, batch)
    derivative = jax.grad(lambda x: of_outputs(x, batch).mean())(outputs)
    return jax.vjp(lambda p: output_fn(p, batch), perturbed)[1](derivative)[0]


def gradient_of(ascent, **options):
    """The optimizer whose updates are the gradient that the base gets."""
    base = optax.chain(optax_sam.keep_average(0.4), optax.identity())
    with_no_sign = optax.chain(base, optax.scale(-1.0))
    return optax_sam.sharpness_aware(with_no_sign, ascent, **options)


RADIUS = optax_sam.scale_to_radius(0.5)
ASCENTS = {
    "sam": RADIUS,
    "asam": optax_sam.adapt_to_scale(0.5),
    "vasso": optax.chain(optax_sam.suppress_variance(0.4), RADIUS),
    "one gradient": optax.chain(optax_sam.follow_average(), RADIUS),
    "reweighted": optax.chain(
        optax_sam.reweight_by_sharpness(0.5, key=0, estimator="jvp"), RADIUS
    ),
    "reweighted by differences": optax.chain(
        optax_sam.reweight_by_sharpness(0.5, key=0), RADIUS
    ),
    "fisher": optax.chain(
        RADIUS,
        optax_sam.sparsify_by_fisher(optax_sam.unstructured(0.5), refresh_every=2),
    ),
    "matrices": optax.chain(
        optax_sam.perturb_only(lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), RADIUS
    ),
}


@pytest.mark.parametrize(
    "ascent", defaults(ASCENTS, ("sam", "one gradient", "reweighted"))
)
def test_an_ascent_is_what_it_is_and_the_derivative_is_the_clean_one(ascent):
    """Two steps, by hand: with the gradient in place of the pass of the library."""
    tx = gradient_of(ASCENTS[ascent])
    step = jax.jit(optax_sam.value_and_update(FUNCTIONAL, tx))
    batch = PROBLEM.batch

    @jax.jit
    def by_hand(params, opt_state):
        losses, vjp = jax.vjp(lambda p: PROBLEM.loss_fn(p, batch), params)
        pullback = lambda weights: vjp(weights)[0]  # noqa: E731
        return tx.update(
            pullback(jnp.full_like(losses, 1 / losses.size)),
            opt_state,
            params,
            loss_fn=PROBLEM.loss_fn,
            batch=batch,
            grad_fn=lambda perturbed: pulled_back(params, perturbed),
            losses=losses,
            pullback=pullback,
        )

    params, opt_state = PROBLEM.params, tx.init(PROBLEM.params)
    for _ in range(2):
        expected, state = by_hand(params, opt_state)
        value, updates, opt_state = step(params, opt_state, batch)
        problems.assert_trees_close(updates, expected, rtol=1e-5, atol=1e-6)
        problems.assert_trees_close(
            opt_state.ascent_state, state.ascent_state, rtol=1e-5, atol=1e-6
        )
        # Value and both losses are those of the loss, as for any other method.
        np.testing.assert_allclose(
            value, PROBLEM.loss_fn(params, batch).mean(), rtol=1e-6
        )
        assert opt_state.clean_loss == value
        params = optax.apply_updates(params, jax.tree.map(lambda u: 0.1 * u, updates))


def test_exact_on_a_closed_form():
    """F(w) = x.w^2 / 2 and L(z) = (z - y)^2 / 2, whose clean gradient is r w x."""
    w, x, y = np.array([3.0, 4.0]), np.array([[1.0, 2.0]]), np.array([5.0])
    residual = (x @ w**2 / 2 - y).item()
    clean = residual * w * x[0]
    perturbed = w + references.scaled(clean, 0.5)
    loss_fn = optax_sam.functional_loss(
        lambda w, batch: batch[0] @ w**2 / 2,
        lambda outputs, batch: (outputs - batch[1]) ** 2 / 2,
    )
    problem = problems.Problem(jnp.array(w), loss_fn, (jnp.array(x), jnp.array(y)))
    tx = optax_sam.sam(optax.sgd(1.0), rho=0.5)
    value, updates, state = one_step(tx, problem)
    np.testing.assert_allclose(updates, -residual * perturbed * x[0], rtol=1e-6)
    np.testing.assert_allclose(value, residual**2 / 2, rtol=1e-6)
    at_perturbed = ((x @ perturbed**2 / 2 - y) ** 2 / 2).item()
    np.testing.assert_allclose(state.perturbed_loss, at_perturbed, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("make_base", [references.Sgd, references.AdamW])
def test_steps_are_those_of_the_paper(make_base, decay):
    """Thirty, in float64; outputs tanh(x.w), and losses log(1 + exp(-3 y outputs))."""
    rho = 0.5

    def gradient(at, clean, batch):
        x, y = batch
        derivative = -3 * y / (1 + np.exp(3 * y * np.tanh(x @ clean)))
        return (x * (derivative * (1 - np.tanh(x @ at) ** 2))[:, None]).mean(0)

    w, base, expected = references.START, make_base(decay), []
    for batch in references.BATCHES:
        epsilon = references.scaled(gradient(w, w, batch), rho)
        w = w + base.update(gradient(w + epsilon, w, batch), w)
        expected.append(w)

    loss_fn = optax_sam.functional_loss(
        lambda params, batch: jnp.tanh(
            batch[0] @ jnp.concatenate([params["a"], params["b"]])
        ),
        lambda outputs, batch: jnp.logaddexp(0.0, -3 * batch[1] * outputs),
    )
    tx = optax_sam.sam(base.tx, rho)
    found = references.replayed(tx, loss_fn)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


def linear(outputs, batch):
    return outputs @ jnp.linspace(-1.0, 1.0, outputs.shape[-1]) + batch[1]


def trained(of_outputs, in_parts, tx=None):
    def composed(params, batch):
        return of_outputs(output_fn(params, batch), batch)

    loss_fn = optax_sam.functional_loss(output_fn, of_outputs) if in_parts else composed
    tx = optax_sam.sam(SGD, 0.5) if tx is None else tx
    return problems.train(tx, PROBLEM._replace(loss_fn=loss_fn), 20)[0]


def test_is_sam_where_the_loss_is_linear_in_the_outputs():
    problems.assert_trees_equal(trained(linear, True), trained(linear, False))


def test_is_not_sam_where_the_loss_is_not_linear():
    found, sam = trained(of_outputs, True), trained(of_outputs, False)
    assert problems.norm(optax.tree.sub(found, sam)) > 1e-2


@pytest.mark.parametrize("tx", [optax_sam.sam(SGD, 0.0), SGD], ids=["rho=0", "base"])
def test_without_a_perturbation_it_is_the_base(tx):
    expected = trained(of_outputs, False, SGD)
    problems.assert_trees_equal(trained(of_outputs, True, tx), expected)


@pytest.mark.parametrize("at_once", [1, pytest.param(None, marks=pytest.mark.full)])
def test_micro_batches_take_their_own_derivatives(at_once):
    tx = gradient_of(RADIUS, micro_batch_size=4, micro_batches_at_once=at_once)
    value, updates, _ = one_step(tx, functional())
    batch = jax.tree.map(jnp.asarray, PROBLEM.batch)

    @jax.jit
    def of_part(start):
        part = jax.tree.map(lambda x: x[start + jnp.arange(4)], batch)
        gradient = pulled_back(PROBLEM.params, PROBLEM.params, part)
        epsilon, _ = RADIUS.update(gradient, RADIUS.init(PROBLEM.params))
        return pulled_back(
            PROBLEM.params, optax.tree.add(PROBLEM.params, epsilon), part
        )

    parts = map(of_part, (0, 4, 8, 12))
    expected = jax.tree.map(lambda *g: -sum(g) / 4, *parts)
    problems.assert_trees_close(updates, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, problems.mean_loss(PROBLEM)(PROBLEM.params))


def test_by_hand_steps_are_those_of_value_and_update():
    tx = gradient_of(RADIUS)
    gradient = problems.gradient(PROBLEM)
    options = {"loss_fn": FUNCTIONAL, "batch": PROBLEM.batch}
    state = tx.init(PROBLEM.params)
    updates, _ = jax.jit(functools.partial(tx.update, loss_fn=FUNCTIONAL))(
        gradient, state, PROBLEM.params, batch=PROBLEM.batch
    )
    _, expected, _ = one_step(tx, functional())
    problems.assert_trees_close(updates, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"grad_fn.*two parts.*leave grad_fn out"):
        tx.update(
            gradient, state, PROBLEM.params, **options, grad_fn=lambda p: gradient
        )


def test_a_step_that_does_not_ascend_is_the_base():
    tx = gradient_of(RADIUS, ascend_when=optax_sam.between(1, 1))
    step = jax.jit(optax_sam.value_and_update(FUNCTIONAL, tx))
    params, state = PROBLEM.params, tx.init(PROBLEM.params)
    _, skipped, state = step(params, state, PROBLEM.batch)
    _, ascended, state = step(params, state, PROBLEM.batch)
    minus = jax.tree.map(jnp.negative, problems.gradient(PROBLEM))
    problems.assert_trees_close(skipped, minus, rtol=1e-5, atol=1e-6)
    _, expected, _ = one_step(gradient_of(RADIUS), functional())
    problems.assert_trees_close(ascended, expected, rtol=1e-5, atol=1e-6)


def test_momentum_sam_makes_the_clean_forward_pass():
    """Its perturbed pass needs the clean outputs, whose loss is then the value."""
    tx = optax_sam.momentum_sam(SGD, 0.5)

    @jax.jit
    def expected(params, velocity):
        length = jnp.maximum(optax.tree.norm(velocity), 1e-6)
        ahead = jax.tree.map(lambda p, v: p - 0.5 * v / length, params, velocity)
        gradient = pulled_back(params, ahead)
        return jax.tree.map(lambda g, v: -0.1 * (g + 0.9 * v), gradient, velocity)

    step = jax.jit(optax_sam.value_and_update(FUNCTIONAL, tx))
    params, state = PROBLEM.params, tx.init(PROBLEM.params)
    for _ in range(2):
        (velocity,) = optax.tree.get_all_with_path(state.base_state, "trace")
        value, updates, state = step(params, state, PROBLEM.batch)
        np.testing.assert_allclose(
            value, problems.mean_loss(PROBLEM)(params), rtol=1e-6
        )
        problems.assert_trees_close(
            updates, expected(params, velocity[1]), rtol=1e-4, atol=1e-6
        )
        params = optax.apply_updates(params, updates)


def test_the_derivative_is_that_of_the_loss_also_where_another_one_ascends():
    def ascent_loss_fn(params, batch):
        return PROBLEM.loss_fn(params, jax.tree.map(lambda x: x[:4], batch))

    tx = gradient_of(RADIUS)
    _, updates, _ = one_step(tx, functional(), ascent_loss_fn=ascent_loss_fn)
    quarter = PROBLEM._replace(batch=jax.tree.map(lambda x: x[:4], PROBLEM.batch))
    epsilon, _ = RADIUS.update(problems.gradient(quarter), RADIUS.init(PROBLEM.params))
    perturbed = optax.tree.add(PROBLEM.params, epsilon)
    expected = jax.tree.map(jnp.negative, pulled_back(PROBLEM.params, perturbed))
    problems.assert_trees_close(updates, expected, rtol=1e-5, atol=1e-6)


def test_auxiliary_data_are_those_of_the_clean_pass():
    with_aux = optax_sam.functional_loss(
        lambda p, batch: (output_fn(p, batch), {"norm": jnp.sum(p["w0"] ** 2)}),
        of_outputs,
        has_aux=True,
    )
    tx = gradient_of(RADIUS)
    problem = PROBLEM._replace(loss_fn=with_aux)
    (value, aux), updates, _ = one_step(tx, problem, has_aux=True)
    plain, expected, _ = one_step(tx, functional())
    assert value == plain
    np.testing.assert_allclose(aux["norm"], np.sum(PROBLEM.params["w0"] ** 2), 1e-6)
    problems.assert_trees_equal(updates, expected)
    losses, aux = with_aux(PROBLEM.params, PROBLEM.batch)
    assert losses.shape == (16,)
    assert aux.keys() == {"norm"}


def test_outputs_may_be_any_tree():
    """Also of integers and keys, which have no derivative."""

    def outputs_fn(params, batch):
        logits = output_fn(params, batch)
        return {"logits": logits, "best": logits.argmax(-1), "none": None}

    def of_tree(outputs, batch):
        return of_outputs(outputs["logits"], batch) + 0 * outputs["best"]

    problem = PROBLEM._replace(loss_fn=optax_sam.functional_loss(outputs_fn, of_tree))
    tx = gradient_of(RADIUS)
    problems.assert_trees_equal(one_step(tx, problem)[1], one_step(tx, functional())[1])


@pytest.mark.parametrize(
    "layout",
    [pytest.param(meshes.data_parallel, marks=pytest.mark.full), meshes.fully_sharded],
)
def test_sharded_steps_are_those_of_one_device(layout):
    tx = optax_sam.vasso(SGD, 0.5, 0.4)
    problem = functional(meshes.PROBLEM)
    expected = one_step(tx, problem)
    step = jax.jit(optax_sam.value_and_update(FUNCTIONAL, tx))
    params, batch = layout(problem.params), meshes.fully_sharded(problem.batch)
    found = step(params, jax.jit(tx.init)(params), batch)
    problems.assert_trees_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("check_vma", "sync_ascent"),
    [
        (True, True),
        pytest.param(True, False, marks=pytest.mark.full),
        pytest.param(False, True, marks=pytest.mark.full),
        pytest.param(False, False, marks=pytest.mark.full),
    ],
)
def test_devices_that_share_a_batch(check_vma, sync_ascent):
    problem = functional(meshes.PROBLEM)
    size = None if sync_ascent else meshes.BATCH // meshes.DEVICES
    expected = one_step(gradient_of(RADIUS, micro_batch_size=size), problem)
    tx = gradient_of(RADIUS, axis_name="data", sync_ascent=sync_ascent)
    step = optax_sam.value_and_update(FUNCTIONAL, tx, axis_name="data")
    run = jax.jit(meshes.over_devices(step, check_vma=check_vma))
    found = run(problem.params, tx.init(problem.params), problem.batch)
    problems.assert_trees_close(found[:2], expected[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["losses", "outputs"])
def test_a_part_may_take_a_mean_over_devices(part):
    """The gradients are then still those of one device with all examples."""

    def make(mean):
        def mean_loss(params, batch):
            return mean(meshes.PROBLEM.loss_fn(params, batch).mean())

        if part == "losses":
            return optax_sam.functional_loss(
                output_fn, lambda x, batch: mean(of_outputs(x, batch).mean())
            )
        return optax_sam.functional_loss(mean_loss, lambda x, batch: x**2)

    tx, (params, _, batch) = gradient_of(RADIUS), meshes.PROBLEM
    alone, over_devices = make(lambda x: x), make(lambda x: jax.lax.pmean(x, "data"))
    expected = one_step(tx, meshes.PROBLEM._replace(loss_fn=alone))
    step = optax_sam.value_and_update(over_devices, tx, axis_name="data")
    found = jax.jit(meshes.over_devices(step))(params, tx.init(params), batch)
    problems.assert_trees_close(found[:2], expected[:2], rtol=1e-5, atol=1e-6)


def flops(problem, tx):
    step = jax.jit(optax_sam.value_and_update(problem.loss_fn, tx))
    inputs = problem.params, tx.init(problem.params), problem.batch
    return step.lower(*inputs).compile().cost_analysis()["flops"]


def test_a_step_costs_what_that_of_sam_does():
    problem = problems.perceptron(sizes=(64, 64, 64, 32), batch_size=64)
    sam, base = optax_sam.sam(SGD, 0.1), flops(problem, SGD)
    assert flops(functional(problem), SGD) == base
    assert 1.9 * base < flops(functional(problem), sam) <= 1.005 * flops(problem, sam)
    # One gradient and a forward pass, where another loss costs one gradient.
    momentum = optax_sam.momentum_sam(SGD, 0.1)
    assert 1.2 < flops(functional(problem), momentum) / base < 1.45


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optax_sam.functional_loss(None, of_outputs), TypeError, "output_fn"),
        (lambda: optax_sam.functional_loss(output_fn, 3), TypeError, "loss_fn must"),
        (
            lambda: optax_sam.functional_loss(output_fn, of_outputs, has_aux=1),
            TypeError,
            "has_aux",
        ),
        (
            lambda: optax_sam.value_and_update(FUNCTIONAL, SGD, has_aux=True),
            ValueError,
            "has_aux must be that which the loss was made with, False, got True",
        ),
        (
            lambda: optax_sam.functional_loss(output_fn, of_outputs, has_aux=True)(
                PROBLEM.params, PROBLEM.batch
            ),
            TypeError,
            r"output_fn must return a pair \(outputs, aux\)",
        ),
        (
            lambda: one_step(
                SGD,
                PROBLEM._replace(
                    loss_fn=optax_sam.functional_loss(output_fn, lambda x, batch: x)
                ),
            ),
            ValueError,
            r"one loss per example, shape \[B\]",
        ),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_error_in_a_part_says_that_the_batch_was_cut():
    loss_fn = optax_sam.functional_loss(
        lambda p, x, labels: output_fn(p, (x, labels)),
        lambda outputs, x, labels: of_outputs(outputs, (x, labels)),
    )
    tx = optax_sam.m_sam(SGD, 0.1, 4)
    step = optax_sam.value_and_update(loss_fn, tx)
    with pytest.raises(ValueError, match="hape") as caught:
        jax.eval_shape(step, PROBLEM.params, tx.init(PROBLEM.params), *PROBLEM.batch)
    assert any("4 of the 16 examples" in note for note in caught.value.__notes__)
