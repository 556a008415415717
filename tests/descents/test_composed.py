"""Descents with the ascents of other papers: one step of each pair, by hand."""

import jax
import numpy as np
import optax
import problems
import pytest

import optax_sam

PROBLEM = problems.perceptron(sizes=(4, 3), batch_size=8)
RADIUS = optax_sam.scale_to_radius(0.3)
AVERAGE = optax_sam.suppress_variance(0.4)
FISHER = optax_sam.sparsify_by_fisher(optax_sam.unstructured(0.5), refresh_every=2)
DYNAMIC = optax_sam.sparsify_dynamically(0.5, refresh_every=2, decay_steps=9, key=0)
REWEIGHT = optax_sam.reweight_by_sharpness(0.5, key=0, estimator="jvp")
STATIC = optax_sam.perturb_only({"w0": True, "b0": False})
ASCENTS = {
    "average": (AVERAGE, RADIUS),
    "static": (STATIC, RADIUS),
    "fisher": (RADIUS, FISHER),
    "dynamic": (RADIUS, DYNAMIC),
    "reweighted": (REWEIGHT, RADIUS),
    "rest": (optax_sam.remove_common_direction(0.5), RADIUS),
    "micro-batches": (RADIUS,),
}
DESCENTS = {
    "gap": optax_sam.gap_descent(0.4),
    "weighted": optax_sam.weighted_descent(0.8),
    "reuse": optax_sam.reuse_ascent(0.4),
    "keep": optax_sam.keep_average(0.4),
}


def all_of_them():
    """A base that does not move, whose state has what each link hands on, and its."""

    def init_fn(params):
        return {name: (params, link.init(params)) for name, link in DESCENTS.items()}

    def update_fn(updates, state, params, *, grad, ascended, **extra_args):
        del extra_args
        told = {"grad": grad, "ascended": ascended}
        state = {
            name: link.update(updates, state[name][1], params, **told)
            for name, link in DESCENTS.items()
        }
        return optax.tree.zeros_like(updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def remember():
    """A last link, whose state is the perturbation, zeros of what is not perturbed."""

    def update_fn(updates, state, params=None):
        del state
        present = {n: e for n, e in updates.items() if isinstance(e, jax.Array)}
        return updates, optax.tree.zeros_like(params) | present

    return optax.GradientTransformation(optax.tree.zeros_like, update_fn)


def flat(tree):
    return np.concatenate([np.float64(x).reshape(-1) for x in jax.tree.leaves(tree)])


def gradient(epsilon=None, examples=slice(None)):
    """Of some examples at a displacement, a tree."""
    params = PROBLEM.params
    if epsilon is not None:
        params = jax.tree.map(np.add, params, epsilon)
    batch = jax.tree.map(lambda x: x[examples], PROBLEM.batch)
    return problems.gradient(PROBLEM._replace(params=params, batch=batch))


def perturbed_gradient(name, epsilon):
    if name != "micro-batches":
        return flat(gradient(epsilon))
    parts = []
    for examples in (slice(0, 4), slice(4, 8)):
        g = gradient(examples=examples)
        scaled = jax.tree.map(lambda x, g=g: 0.3 * x / problems.norm(g), g)
        parts.append(flat(gradient(scaled, examples)))
    return np.mean(parts, axis=0)


@pytest.mark.parametrize("name", ASCENTS)
def test_a_step_that_ascends_and_one_that_does_not(name):
    tx = optax_sam.sharpness_aware(
        all_of_them(),
        optax.chain(*ASCENTS[name], remember()),
        ascend_when=optax_sam.every(2),
        micro_batch_size=4 if name == "micro-batches" else None,
    )
    step = jax.jit(optax_sam.value_and_update(PROBLEM.loss_fn, tx))
    _, _, first = step(PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch)
    _, _, after = step(PROBLEM.params, first, PROBLEM.batch)
    p = perturbed_gradient(name, jax.device_get(first.ascent_state[-1]))
    g = flat(gradient())
    of_p, of_g = (g @ p) / (p @ p) * p, (g @ p) / (g @ g) * g
    v = (p - of_g) / np.linalg.norm(p - of_g)
    expected = {
        "gap": (p - 0.4 * (g - of_p), g),
        "weighted": (g + 4 * (p - g), g),
        "reuse": (p, g + 0.4 * np.linalg.norm(g) * v),
        "keep": (p, g),
    }
    for link, descents in expected.items():
        for state, descent in zip((first, after), descents, strict=True):
            found = flat(state.base_state[link][0])
            np.testing.assert_allclose(found, descent, rtol=1e-4, atol=1e-5)
    kept = flat(after.base_state["keep"][1].average)
    np.testing.assert_allclose(kept, 0.6 * p + 0.4 * g, rtol=1e-4, atol=1e-6)
