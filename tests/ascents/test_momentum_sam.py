import jax
import numpy as np
import optax
import problems
import pytest
import references
from methods import defaults

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)
PROBLEM = problems.perceptron(sizes=(4, 3))
WEIGHTS = {"w0": True, "b0": False}
AHEAD, STATIC = optax_sam.follow_momentum(0.5), optax_sam.perturb_only(WEIGHTS)
FISHER = optax_sam.sparsify_by_fisher(optax_sam.unstructured(0.5), refresh_every=2)


@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("make", [references.Sgd, references.AdamW])
def test_steps_are_those_of_the_paper(make, decay):
    rho, base = 0.5, make(decay)

    def step(w, g, gradient_at):
        return gradient_at(w - references.scaled(base.momentum, rho)), 0

    references.assert_replays(optax_sam.momentum_sam(base.tx, rho), step, base)


def test_rho_zero_and_a_momentum_of_zero_are_the_base():
    momentum_sam = optax_sam.momentum_sam
    references.assert_is(momentum_sam(SGD, 0.0), SGD)
    references.assert_is(momentum_sam(SGD, 3.0), SGD, steps=1)


def by_kind(weights, biases):
    by_label = {"weights": weights, "biases": biases}
    return optax.partition(by_label, {"w0": "weights", "b0": "biases"})


# With the names of what they accumulate, and of the parameters of which they do.
BASES = {
    "sgd": (SGD, "trace"),
    "adam": (optax.adam(1e-2), "mu"),
    "adamw": (optax.adamw(1e-2), "mu"),
    "lion": (optax.lion(1e-3), "mu"),
    "momo": (optax.contrib.momo(0.05), "exp_avg"),
    "schedule free": (optax.contrib.schedule_free(SGD, 0.1, b1=0.9), "trace"),
    "multi steps": (optax.MultiSteps(optax.adam(1e-2), 2), "mu"),
    "apply_if_finite": (optax.apply_if_finite(optax.adam(1e-2), 3), "mu"),
    "injected": (optax.inject_hyperparams(optax.adam)(1e-2), "mu"),
    "lookahead": (optax.lookahead(SGD, 2, 0.5), "trace"),
    "two kinds": (by_kind(optax.adam(1e-2), SGD), "mu trace"),
    "none of biases": (by_kind(optax.adam(1e-2), optax.set_to_zero()), "mu"),
    "masked": (optax.masked(SGD, WEIGHTS), "trace"),
}
DEFAULT = ("sgd", "schedule free", "multi steps", "lookahead", "two kinds", "masked")


def kept(base_state, names):
    """What a base has accumulated, zeros where it accumulates nothing."""
    found = jax.tree.map(np.zeros_like, PROBLEM.params)
    for name in names.split():
        for _, tree in optax.tree.get_all_with_path(base_state, name):
            present = {n: x for n, x in tree.items() if isinstance(x, jax.Array)}
            found |= jax.device_get(present)
    return found


def remember():
    """A last link, whose state is the perturbation, zeros of what is not perturbed."""

    def update_fn(updates, state, params=None):
        del state
        zeros = optax.tree.zeros_like(params)
        perturbed = {n: e for n, e in updates.items() if isinstance(e, jax.Array)}
        return updates, zeros | perturbed

    return optax.GradientTransformation(optax.tree.zeros_like, update_fn)


def perturbations(base, *links, params=PROBLEM.params, steps=4):
    """Of each step the state of the base before it, and the perturbation."""
    tx = optax_sam.sharpness_aware(base, optax.chain(*links, remember()))
    step = jax.jit(optax_sam.value_and_update(PROBLEM.loss_fn, tx))
    opt_state = tx.init(params)
    for _ in range(steps):
        before = opt_state.base_state
        _, updates, opt_state = step(params, opt_state, PROBLEM.batch)
        params = optax.apply_updates(params, updates)
        yield before, jax.device_get(opt_state.ascent_state[-1])


def ahead(momentum):
    """Along minus a tree, to the radius."""
    size = 0.5 / (problems.norm(momentum) or 1)
    return jax.tree.map(lambda m: -size * m, momentum)


def assert_along(epsilon, momentum):
    problems.assert_trees_close(epsilon, ahead(momentum), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", defaults(BASES, DEFAULT))
def test_the_perturbation_is_minus_the_momentum_of(name):
    base, names = BASES[name]
    params = PROBLEM.params
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    for before, epsilon in perturbations(base, AHEAD, params=params):
        assert_along(epsilon, kept(before, names))
    assert problems.norm(epsilon) == pytest.approx(0.5, rel=1e-5)
    assert np.any(epsilon["b0"]) == (name not in ("none of biases", "masked"))


def keeps(trace):
    """A base whose trace is another tree than the parameters."""
    return optax.GradientTransformation(
        lambda params: optax.TraceState(trace), lambda *args: args[:2]
    )


NO_MOMENTUM = r"base must keep a tree like params.*optax\.sgd\(0\.1, momentum=0\.9\)"
UPDATES = r"base must accumulate gradients.*got -.*put the trace before"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (optax.sgd(0.1), NO_MOMENTUM),
        (optax.contrib.schedule_free_sgd(0.1), NO_MOMENTUM),
        (optax.contrib.schedule_free_adamw(0.1), NO_MOMENTUM),
        (optax.adafactor(1e-3), NO_MOMENTUM),
        (optax.noisy_sgd(0.1, key=0), NO_MOMENTUM),
        (optax.sm3(0.1), NO_MOMENTUM),  # Its mu is made of lists.
        (keeps({"of other names": np.zeros(3)}), NO_MOMENTUM),
        (optax.chain(optax.scale(-0.1), optax.trace(0.9)), UPDATES),
        (optax.lars(0.1), UPDATES),
        (optax.rmsprop(0.1, momentum=0.9), UPDATES),
        (
            optax.chain(optax.trace(0.9), optax.adam(1e-3)),
            r"base must keep one trace of params\['b0'\], got '2 of them'; leave one",
        ),
    ],
)
def test_refuses_a_base_without_one_momentum_of_gradients(base, message):
    tx = optax_sam.momentum_sam(base, 0.5)
    with pytest.raises(ValueError, match=f"^momentum_sam: {message}"):
        jax.eval_shape(tx.init, PROBLEM.params)


def test_of_no_parameters_there_is_no_momentum_to_miss():
    epsilon, _ = AHEAD.update({}, AHEAD.init({}), base_state=SGD.init({}))
    assert epsilon == {}


def test_masks_before_keep_the_radius_and_those_after_do_not():
    none = {"b0": np.zeros(3, np.float32)}
    for before, epsilon in perturbations(SGD, STATIC, AHEAD):
        assert_along(epsilon, kept(before, "trace") | none)
    for before, epsilon in perturbations(SGD, AHEAD, STATIC):
        whole = ahead(kept(before, "trace"))
        problems.assert_trees_close(epsilon, whole | none, rtol=1e-5, atol=1e-7)
    for before, epsilon in perturbations(SGD, AHEAD, FISHER):
        whole = ahead(kept(before, "trace"))
        masked = jax.tree.map(lambda e, w: np.where(e == 0, 0, w), epsilon, whole)
        problems.assert_trees_close(epsilon, masked, rtol=1e-5, atol=1e-7)
    assert sum(map(np.count_nonzero, jax.tree.leaves(epsilon))) == 7  # Of 15.


def test_refuses_what_another_link_has_made_of_the_gradient():
    message = r"^follow_momentum: a link before it.*put it first"
    with pytest.raises(ValueError, match=message):
        next(perturbations(SGD, optax_sam.suppress_variance(0.4), AHEAD))
