import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

TREE = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "head": jnp.ones(1)}
ABSENT = optax.MaskedNode()


def apply(mask, tree=TREE, params=None):
    link = optax_sam.perturb_only(mask)
    return link.update(tree, link.init(tree), params)[0]


def test_absent_where_false():
    mask = {"layer": {"kernel": True, "bias": False}, "head": np.bool_(False)}
    out = apply(mask)
    assert out == {"layer": {"kernel": out["layer"]["kernel"], "bias": ABSENT}} | {
        "head": ABSENT
    }
    assert out["layer"]["kernel"] is TREE["layer"]["kernel"]


def test_prefixes_and_callables():
    out = apply({"layer": False, "head": True})
    assert out["layer"] == {"kernel": ABSENT, "bias": ABSENT}
    matrices = apply(lambda tree: jax.tree.map(lambda p: p.ndim == 2, tree))
    assert matrices["head"] == matrices["layer"]["bias"] == ABSENT
    assert jax.tree.leaves(apply(True)) == jax.tree.leaves(TREE)


def test_a_callable_sees_the_parameters():
    seen = []
    apply(lambda tree: seen.append(tree) or True, params={"the": "parameters"})
    assert seen == [{"the": "parameters"}]


def test_two_masks_in_one_chain_intersect():
    first = apply({"layer": {"kernel": True, "bias": False}, "head": True})
    both = apply({"layer": True, "head": False}, tree=first)
    assert both["head"] == both["layer"]["bias"] == ABSENT
    assert both["layer"]["kernel"] is TREE["layer"]["kernel"]


def test_norm_is_that_of_the_perturbed_part_or_of_all():
    mask = {"layer": True, "head": False}
    link, radius = optax_sam.perturb_only(mask), optax_sam.scale_to_radius(0.5)
    for chain, expected in [
        ((link, radius), 0.5),
        ((radius, link), 0.5 * np.sqrt(0.9)),
    ]:
        ascent = optax.chain(*chain)
        epsilon, _ = ascent.update(TREE, ascent.init(TREE), TREE)
        assert epsilon["head"] == ABSENT
        assert problems.norm(epsilon) == pytest.approx(expected)


@pytest.mark.parametrize("entry", [1, jnp.array(True), "yes", 0.0])
def test_entries_that_are_no_bools(entry):
    with pytest.raises(TypeError, match=r"mask\['head'\] must be a Python bool.*got"):
        apply({"layer": True, "head": entry})


@pytest.mark.parametrize(
    "mask",
    [{"layer": True}, {"layer": {"kernel": True}, "head": True}, [True, False]],
)
def test_masks_that_do_not_fit(mask):
    with pytest.raises(ValueError, match="the mask does not fit the parameters"):
        apply(mask)


def test_error_names_the_path_where_the_mask_departs():
    with pytest.raises(ValueError, match="layer"):
        apply({"layer": {"kernel": True}, "head": True})


def test_frozen_parameters_neither_move_nor_are_perturbed():
    """The recipe in the docstring of perturb_only."""
    problem = problems.perceptron()
    trained = {name: name in ("w2", "b2") for name in problem.params}
    frozen = {name: not flag for name, flag in trained.items()}
    seen = []
    tx = optax_sam.sharpness_aware(
        optax.chain(
            optax.sgd(0.1, momentum=0.9), optax.masked(optax.set_to_zero(), frozen)
        ),
        optax.chain(
            optax_sam.perturb_only(trained), optax_sam.scale_to_radius(rho=0.5)
        ),
    )
    grads = jax.grad(problems.mean_loss(problem))(problem.params)
    with jax.disable_jit():
        updates, _ = tx.update(
            grads,
            tx.init(problem.params),
            problem.params,
            grad_fn=lambda p: seen.append(p) or grads,
        )
    for name in problem.params:
        moved = np.any(np.asarray(updates[name]) != 0)
        perturbed = np.any(np.asarray(seen[-1][name] != problem.params[name]))
        assert moved == perturbed == trained[name], name
