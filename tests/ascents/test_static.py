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
    grads = problems.gradient(problem)
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


PARAMS = {
    "stem": {"conv": {"kernel": jnp.ones((2, 3))}, "norm": {"scale": jnp.ones(3)}},
    "Dense_1": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
    "Dense_10": {"kernel": jnp.ones((2, 2))},
}


def selected(mask, tree=PARAMS):
    paths = jax.tree.leaves_with_path(mask)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert {type(keep) for _, keep in paths} == {bool}
    simple = {"simple": True, "separator": "/"}
    return {jax.tree_util.keystr(p, **simple) for p, keep in paths if keep}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["stem"], {"stem/conv/kernel", "stem/norm/scale"}),
        (["Dense_1"], {"Dense_1/kernel", "Dense_1/bias"}),
        (["stem/norm", "bias"], {"stem/norm/scale", "Dense_1/bias"}),
        ([lambda path: path.endswith("kernel") and "stem" not in path],
         {"Dense_1/kernel", "Dense_10/kernel"}),
        ([], set()),
    ],
)  # fmt: skip
def test_layers_are_selected_by_path(layers, expected):
    assert selected(optax_sam.select_layers(*layers)(PARAMS)) == expected


def test_layers_of_lists_and_of_nnx_variables():
    @jax.tree_util.register_pytree_with_keys_class
    class Variable:
        def __init__(self, value):
            self.value = value

        def tree_flatten_with_keys(self):
            return [(jax.tree_util.GetAttrKey("value"), self.value)], None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    tree = {"blocks": [{"kernel": 1.0}, {"kernel": 2.0}]}
    wrapped = jax.tree.map(Variable, tree)
    for params in (tree, wrapped):
        last = optax_sam.select_layers("blocks/1/kernel")(params)
        assert jax.tree.leaves(last) == [False, True]
    assert jax.tree.leaves(
        optax_sam.select_layers(lambda path: path == "blocks/0/kernel")(wrapped)
    ) == [True, False]


def test_names_that_are_nowhere():
    with pytest.raises(
        ValueError, match=r"no parameter .*'Dense_2'.*Dense_1, Dense_10"
    ):
        optax_sam.select_layers("Dense_2")(PARAMS)
    with pytest.raises(TypeError, match="select_layers: got 3"):
        optax_sam.select_layers(3)


def scores(**values):
    return {name: {"w": jnp.full(size, v)} for name, (size, v) in values.items()}


def test_layers_are_chosen_by_mean_score_within_the_budget():
    of = scores(a=(6, 1.0), b=(4, 3.0), c=(8, 2.0), d=(2, 0.5))  # 20 weights.
    for sparsity, expected in [
        (0.0, "abcd"),
        (0.05, "abc"),
        (0.4, "bc"),
        (0.5, "ba"),  # c has no room beside b, a has.
        (0.7, "bd"),
        (0.8, "b"),
        (1.0, ""),
    ]:
        mask = optax_sam.choose_layers(of, sparsity)
        assert selected(mask, of) == {f"{name}/w" for name in expected}, sparsity


def test_leaves_with_a_parent_in_common_are_one_layer():
    tree = {
        "a": {"w": jnp.ones(6), "b": jnp.full(2, 9.0)},
        "c": {"w": jnp.full(8, 2.9)},
    }
    assert selected(optax_sam.choose_layers(tree, 0.5), tree) == {"a/w", "a/b"}


def test_costs_change_rank_and_budget():
    of = scores(a=(6, 1.0), b=(4, 3.0), c=(8, 2.0))  # Sums 6, 12 and 16.
    cost = {"a": 1.0, "b": 3.0, "c": 4.0}
    assert selected(optax_sam.choose_layers(of, 0.5, cost=cost), of) == {"a/w", "b/w"}
    free = {"a": 0.0, "b": 1.0, "c": 1.0}
    assert selected(optax_sam.choose_layers(of, 1.0, cost=free), of) == {"a/w"}


def test_a_chosen_mask_can_be_perturbed_by():
    mask = optax_sam.choose_layers(scores(a=(6, 1.0), b=(4, 3.0)), 0.5)
    out = apply(mask, tree=scores(a=(6, 1.0), b=(4, 3.0)))
    assert out["a"]["w"] == ABSENT
    assert out["b"]["w"].shape == (4,)
    assert hash(tuple(jax.tree.leaves(mask))) == hash((False, True))


def test_scores_and_costs_that_no_mask_can_be_made_of():
    of = scores(a=(6, 1.0), b=(4, 3.0))
    with pytest.raises(TypeError, match=r"scores\['a'\]\['w'\] is traced"):
        jax.jit(lambda s: optax_sam.choose_layers(s, 0.5))(of)
    with pytest.raises(ValueError, match="NaN or an infinity"):
        optax_sam.choose_layers(scores(a=(2, np.nan)), 0.5)
    with pytest.raises(ValueError, match=r"costs must be finite and >= 0.*-1"):
        optax_sam.choose_layers(of, 0.5, cost={"a": -1.0, "b": 1.0})
    with pytest.raises(ValueError, match="cost does not fit the scores"):
        optax_sam.choose_layers(of, 0.5, cost={"a": 1.0})
    with pytest.raises(ValueError, match=r"room for a cost of 1, .* costs 4"):
        optax_sam.choose_layers(of, 0.9)
    with pytest.raises(ValueError, match="sparsity = 2 is out of range"):
        optax_sam.choose_layers(of, 2)
    assert optax_sam.choose_layers({}, 0.5) == {}
