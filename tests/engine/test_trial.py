"""What is seen of an ascent and a base when the state is made."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_sam

PARAMS = {"w": jnp.ones((3, 8)), "b": jnp.ones(8)}
ONE = {"w": True, "b": False}
RADIUS = optax_sam.scale_to_radius(0.1)
REWEIGHT = optax_sam.reweight_by_sharpness(0.1, key=0)
PERTURB_ONE = optax_sam.perturb_only(ONE)
MATRICES = optax_sam.perturb_only(
    lambda params: jax.tree.map(lambda x: jnp.ndim(x) > 1, params)
)
SPARSIFY = optax_sam.sparsify_by_fisher(optax_sam.unstructured(0.5), refresh_every=2)


def by_leaf(on_matrices):
    """Matrices by a transformation, others to a radius."""
    return optax.partition(
        {"matrix": on_matrices, "other": RADIUS},
        lambda p: jax.tree.map(lambda x: "matrix" if jnp.ndim(x) > 1 else "other", p),
    )


@pytest.mark.parametrize(
    "ascent",
    [
        optax.sgd(0.05),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
        optax.chain(REWEIGHT, optax.sgd(0.05)),
        optax.chain(RADIUS, optax.scale(-1.0)),
        optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)),
        optax.apply_if_finite(optax.lion(1e-3), 3),
        optax.chain(PERTURB_ONE, optax.sgd(0.05)),
        optax.chain(MATRICES, optax.sgd(0.05)),
        optax.chain(SPARSIFY, optax.sgd(0.05)),
        optax.polyak_sgd(),
        optax.MultiSteps(optax.sgd(0.5), 2),
        optax.sgd(optax.linear_schedule(0.0, 0.1, 100)),
        by_leaf(optax.sgd(0.05)),
        pytest.param(optax.lbfgs(), marks=pytest.mark.full),
    ],
)
def test_an_optimizer_as_the_ascent_is_refused(ascent):
    tx = optax_sam.sharpness_aware(optax.adam(1e-3), ascent)
    message = (
        r"^sharpness_aware: .*uphill.*got -.*pass optax_sam\.scale_to_radius.*for the "
        r"adversary chain\(normalize.*, and optax\.scale\(rho\) for sgd\(rho\) alone"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.init, PARAMS)


def test_outside_of_jit_and_in_each_others_place():
    tx = optax_sam.sharpness_aware(RADIUS, optax.sgd(0.05))
    for init in (tx.init, jax.jit(tx.init)):
        with pytest.raises(ValueError, match=r"uphill.*gradient of 1 of params must"):
            init(PARAMS)
    tx = optax_sam.sharpness_aware(RADIUS, by_leaf(optax.sgd(0.05)))
    with pytest.raises(ValueError, match=r"gradient of 1 of params\['w'\] must"):
        tx.init(PARAMS)


def stateless(function):
    return optax.stateless(lambda updates, params: jax.tree.map(function, updates))


@pytest.mark.parametrize(
    "ascent",
    [
        optax.chain(optax.trace(0.9), RADIUS),
        optax.chain(optax.scale_by_adam(), RADIUS),
        optax.add_noise(1.0, 0.0, key=0),
        optax.add_noise(1.0, 0.0, key=1),
        optax.chain(PERTURB_ONE, RADIUS),
        optax.masked(RADIUS, ONE),
        by_leaf(optax.scale(0.1)),
        optax.clip(1.0),
        optax.chain(optax.identity(), optax_sam.scale_to_radius(1.0)),
        stateless(lambda g: g[0] / 2),
        stateless(lambda g: -jnp.ones_like(g)),
        optax.set_to_zero(),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_other_ascents_are_not(ascent, dtype):
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    jax.eval_shape(tx.init, jax.tree.map(lambda p: p.astype(dtype), PARAMS))


def test_ascents_of_injected_hyperparameters_are_not():
    def make(scale):
        ascent = optax.chain(optax.scale(scale), RADIUS)
        return optax_sam.sharpness_aware(optax.sgd(0.1), ascent)

    jax.jit(optax.inject_hyperparams(make)(scale=2.0).init)(PARAMS)


@pytest.mark.parametrize("empty", [{}, {"none": None}, {"w": jnp.ones((0, 2))}])
def test_trees_without_entries(empty):
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), optax.chain(MATRICES, RADIUS))
    tx.init(empty)


@pytest.mark.parametrize(
    "ascent",
    [optax.identity(), REWEIGHT, optax_sam.suppress_variance(0.4), PERTURB_ONE],
)
def test_an_ascent_without_a_length_is_warned_of_once(ascent):
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    message = r"^sharpness_aware: .*gradient as it is.*end it with optax_sam\.scale_to"
    with pytest.warns(UserWarning, match=message) as seen:
        jax.eval_shape(tx.init, PARAMS)
    assert len(seen) == 1


def test_an_ascent_of_links_from_here_is_not_tried():
    traced = []
    radius = optax_sam.scale_to_radius(lambda count: traced.append(count) or 0.1)
    tx = optax_sam.sharpness_aware(
        optax.sgd(0.1), optax.chain(optax_sam.suppress_variance(0.4), radius)
    )
    tx.init(PARAMS)
    assert not traced


@pytest.mark.parametrize(
    ("inner", "state"),
    [
        (optax_sam.sam(optax.sgd(0.1), 0.1), "SharpnessAwareState"),
        (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), "SAMState"),
        (optax.chain(optax.sgd(0.1), optax_sam.m_sam(optax.sgd(0.1), 0.1, 2)), "Sharp"),
    ],
)
def test_sharpness_aware_within_sharpness_aware_is_refused(inner, state):
    remedy = rf"got '{state}.*pass.*chain their ascents, sharpness_aware\(base, optax"
    with pytest.raises(ValueError, match=f"^sam: base must not.*{remedy}"):
        optax_sam.sam(inner, 0.1).init(PARAMS)
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), inner)
    with pytest.raises(ValueError, match=f"aware: ascent must not.*{remedy}"):
        tx.init(PARAMS)


@pytest.mark.parametrize(
    "base",
    [
        RADIUS,
        optax.chain(PERTURB_ONE, RADIUS),
        optax.MultiSteps(RADIUS, 2),
        optax.chain(optax.clip(1.0), optax_sam.suppress_variance(0.4)),
    ],
)
def test_an_ascent_as_the_base_is_refused(base):
    message = r"^sam: base must lead downhill.*got \d.*such as optax\.sgd"
    with pytest.raises(ValueError, match=message):
        optax_sam.sam(base, 0.1).init(PARAMS)


@pytest.mark.parametrize(
    "base",
    [
        optax.chain(RADIUS, optax.sgd(0.1)),
        optax.chain(optax_sam.suppress_variance(0.4), optax.scale(-0.1)),
        optax.inject_hyperparams(lambda r: optax.chain(RADIUS, optax.sgd(r)))(0.1),
    ],
)
def test_a_base_that_descends_by_links_of_ascents_is_not(base):
    optax_sam.sam(base, 0.1).init(PARAMS)


@pytest.mark.parametrize(
    "link",
    [
        optax_sam.keep_average(0.4),
        optax_sam.reuse_ascent(0.7),
        optax_sam.gap_descent(0.1),
    ],
)
def test_a_link_of_the_base_in_the_ascent_is_refused(link):
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), optax.chain(link, RADIUS))
    message = r"^sharpness_aware: ascent must have no link of the base.*State.*; put it"
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)


def test_warns_of_an_average_without_a_length():
    base = optax.chain(optax_sam.keep_average(0.4), optax.sgd(0.1))
    with pytest.warns(UserWarning, match="as long as the gradient; end it with"):
        optax_sam.sharpness_aware(base, optax_sam.follow_average()).init(PARAMS)


def test_an_average_of_updates_is_refused():
    base = optax.chain(optax.sgd(0.1), optax_sam.keep_average(0.4))
    tx = optax_sam.sharpness_aware(
        base, optax.chain(optax_sam.follow_average(), RADIUS)
    )
    message = "base must accumulate gradients in its average.*got -.*in this order"
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)


def test_warns_of_a_second_length():
    ascent = optax.chain(optax_sam.follow_momentum(4.0), RADIUS)
    tx = optax_sam.sharpness_aware(optax.sgd(0.1, momentum=0.9), ascent)
    with pytest.warns(
        UserWarning, match="^sharpness_aware: two links .* second one counts"
    ):
        tx.init(PARAMS)
