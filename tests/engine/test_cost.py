"""Compiled steps of a small ResNet: FLOPs, temporary memory, state. No timings."""

import collections
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from benchmarks import sparse_cost, step_cost, top_k
from methods import defaults
from sam_examples.benchmarking import by_hand, measure

import optax_sam

# Convolutions make up nearly all of the FLOPs, or parameters half of the memory.
MANY_FLOPS = step_cost.Options(stage_sizes=(1, 1), width=16, batch_size=16)
MANY_PARAMETERS = step_cost.Options((1, 1), width=64, batch_size=2, image_size=8)
RESNET18 = step_cost.Options(width=16, batch_size=8)
STAGE = ("BasicBlock_1", "Dense_0")


def rw_sam(**options):
    base, rho = measure.BASE, measure.RHO
    return measure.engine(optax_sam.rw_sam(base, rho, 1.0, **options))


def m_sam(size, at_once=1):
    base, rho = measure.BASE, measure.RHO
    return measure.engine(
        optax_sam.m_sam(base, rho, size, micro_batches_at_once=at_once)
    )


def written_out(method, init, *options):
    """A method that ascends in every fifth step, in plain JAX."""
    tx = by_hand.with_state(measure.BASE, init)
    arguments = (measure.BASE, measure.RHO, *options, optax_sam.every(5))
    return step_cost.from_gradients(tx, lambda grad: method(grad, *arguments))


def ascending(when, *links):
    """SAM, where links come first in the base, in some steps."""
    radius = optax_sam.scale_to_radius(measure.RHO)
    base = optax.chain(*links, measure.BASE)
    return measure.engine(optax_sam.sharpness_aware(base, radius, ascend_when=when))


# Each branch by itself, and both by a condition.
WHEN = {"ascends": lambda count: True, "waits": lambda count: False}
WHEN |= {"both": optax_sam.every(5)}
LINKS = {"sam": (), "look_sam": (optax_sam.reuse_ascent(0.7),)}

ROWS = {
    **step_cost.ROWS,
    "momentum_sam": measure.engine(optax_sam.momentum_sam(measure.BASE, measure.RHO)),
    "one_pass_vasso": measure.engine(
        optax_sam.vasso(measure.BASE, measure.RHO, 0.4, one_pass=True)
    ),
    **{
        f"{method} {name}": ascending(when, *links)
        for method, links in LINKS.items()
        for name, when in WHEN.items()
    },
    "sam by hand": written_out(by_hand.sam_in_some_steps, lambda _: jnp.int32(0)),
    "look_sam by hand": written_out(
        by_hand.look_sam, lambda params: tuple(by_hand.init_average(params)), 0.7
    ),
    **sparse_cost.make_steps(RESNET18.stage_sizes),
    "2 probes": sparse_cost.sparse_sam("probes", num_probes=2),
    "8 probes": sparse_cost.sparse_sam("probes", num_probes=8),
    "nothing": sparse_cost.perturbing(),
    "last stage": sparse_cost.perturbing(*STAGE),
    "last stage, scaled first": sparse_cost.perturbing(*STAGE, mask_first=False),
    "rw_sam": rw_sam(),
    "rw_sam by jvp": rw_sam(estimator="jvp"),
    "rw_sam of 4 probes": rw_sam(num_probes=4),
    "all examples": m_sam(MANY_PARAMETERS.batch_size),
    "1 example, 1 at once": m_sam(1),
    "1 example, all at once": m_sam(1, at_once=None),
    "4 examples, all at once": m_sam(4, at_once=None),
}

problem = functools.cache(measure.make_problem)


@functools.cache
def cost(options, row, count=None):
    # The effort that goes into machine code changes none of the figures.
    level = {"xla_backend_optimization_level": "0"}
    return measure.compile_step(ROWS[row], problem(options), level, count=count).cost


def flops_over_sgd(row, options=MANY_FLOPS, count=None):
    return cost(options, row, count)["flops"] / cost(options, measure.SGD)["flops"]


TWO_PASSES = ["sam", "asam", "vasso", "friendly_sam", "gsam", "wsam"]


@pytest.mark.parametrize("method", defaults(TWO_PASSES, ["sam"]))
def test_a_method_costs_two_passes_and_nothing_else(method):
    assert 1.99 < flops_over_sgd(f"optax_sam.{method}") < 2.005


@pytest.mark.parametrize(
    "method", defaults(["momentum_sam", "one_pass_vasso"], ["momentum_sam"])
)
def test_an_ascent_along_what_the_base_keeps_costs_no_pass(method):
    assert 0.99 < flops_over_sgd(method) < 1.01


@pytest.mark.full
@pytest.mark.parametrize("method", LINKS)
def test_to_ascend_in_every_fifth_step_costs_a_fifth_of_a_pass(method):
    ascends, waits = (
        flops_over_sgd(f"{method} {name}") for name in ("ascends", "waits")
    )
    assert 1.99 < ascends < 2.01
    assert 0.99 < waits < 1.01
    assert (ascends + 4 * waits) / 5 < 1.21


@pytest.mark.full
@pytest.mark.parametrize("method", LINKS)
def test_a_condition_sets_aside_what_it_does_by_hand(method):
    ascends, waits, both = (cost(MANY_PARAMETERS, f"{method} {name}") for name in WHEN)
    # XLA on the CPU keeps the clean gradient, which both branches get, until the other
    # is made.
    dearer = max(ascends["temp_bytes"], waits["temp_bytes"])
    assert both["temp_bytes"] < dearer + both["param_bytes"]
    written = cost(MANY_PARAMETERS, f"{method} by hand")
    assert both["temp_bytes"] < 1.05 * written["temp_bytes"]


def test_value_and_update_costs_the_base_nothing():
    plain = cost(MANY_FLOPS, measure.SGD)
    assert cost(MANY_FLOPS, "SGD value_and_update") == plain


@pytest.mark.full
@pytest.mark.parametrize("method", ["sam", "vasso"])
def test_temporary_memory_is_that_of_optax_contrib(method):
    expected = cost(MANY_PARAMETERS, step_cost.CONTRIB)["temp_bytes"]
    assert cost(MANY_PARAMETERS, f"optax_sam.{method}")["temp_bytes"] < 1.05 * expected


@pytest.mark.full
def test_asam_takes_less_than_a_fifth_of_the_parameters_more():
    sam, asam = (cost(MANY_PARAMETERS, f"optax_sam.{m}") for m in ("sam", "asam"))
    # XLA on the CPU keeps the scaled gradient of one layer instead of making it again.
    assert asam["temp_bytes"] - sam["temp_bytes"] < 0.2 * sam["param_bytes"]


@pytest.mark.full
def test_vasso_keeps_no_temporary_beyond_those_of_sam():
    sam, vasso = (cost(MANY_PARAMETERS, f"optax_sam.{m}") for m in ("sam", "vasso"))
    assert vasso["temp_bytes"] - sam["temp_bytes"] < 0.02 * sam["param_bytes"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_vasso_adds_one_float32_tree_and_scalars_to_the_state_of_sam(dtype):
    params = jax.eval_shape(problem(MANY_FLOPS).init)["params"]
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)

    def arrays(tree):
        """How often each shape and dtype comes up, scalars left out."""
        leaves = [x for x in jax.tree.leaves(tree) if x.ndim]
        return collections.Counter((x.shape, jnp.dtype(x.dtype)) for x in leaves)

    def state(tx):
        return arrays(jax.eval_shape(tx.init, params))

    average = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, "float32"), params)
    base, rho = measure.BASE, measure.RHO
    assert state(optax_sam.sam(base, rho)) == state(base)
    assert state(optax_sam.vasso(base, rho, 0.4)) == state(base) + arrays(average)


@pytest.mark.full
def test_gradients_that_no_perturbation_reads_are_not_computed():
    everything = flops_over_sgd("optax_sam.sam")
    # Scaled first, the norm reads every gradient: less is saved.
    scaled_first = flops_over_sgd("last stage, scaled first")
    assert flops_over_sgd("last stage") < 1.55 < scaled_first < 1.8 < everything


@pytest.mark.full
def test_the_last_block_of_resnet18_costs_what_the_readme_says():
    params = jax.eval_shape(problem(RESNET18).init)["params"]
    perturbed = measure.num_bytes([params["BasicBlock_7"], params["Dense_0"]])
    assert 0.57 < 1 - perturbed / measure.num_bytes(params) < 0.58
    assert 1 < flops_over_sgd("static, last block and head", RESNET18) < 1.39


@pytest.mark.full
@pytest.mark.parametrize("method", [sparse_cost.SSAM_F, sparse_cost.SSAM_D])
def test_array_masks_cost_nothing_between_refreshes(method):
    between = cost(MANY_FLOPS, method, sparse_cost.NOT_DUE)
    sam = cost(MANY_FLOPS, sparse_cost.SAM)
    num_params = sam["param_bytes"] // 4
    # One choice for every parameter is what is left; a refresh takes far more.
    assert between["flops"] - sam["flops"] <= 1.1 * num_params
    due = cost(MANY_FLOPS, method, sparse_cost.DUE)
    assert due["flops"] - sam["flops"] > 10 * num_params
    assert flops_over_sgd(method, count=sparse_cost.NOT_DUE) < 2.02


@pytest.mark.full
def test_array_masks_take_a_byte_for_each_parameter_of_the_state():
    sam, masked = (cost(MANY_FLOPS, m) for m in (sparse_cost.SAM, sparse_cost.SSAM_F))
    added = masked["state_bytes"] - sam["state_bytes"]
    assert sam["param_bytes"] / 4 <= added < sam["param_bytes"] / 4 + 100


@pytest.mark.full
def test_an_implicit_backward_of_half_the_channels_saves_a_third_of_a_pass():
    assert 1.6 < flops_over_sgd("implicit, 1/2 kept", RESNET18) < 1.7


@pytest.mark.full
def test_the_memory_of_scores_does_not_grow_with_the_number_of_examples():
    few, many = (
        sparse_cost.scoring_memory(problem(MANY_PARAMETERS), n) for n in (16, 128)
    )
    # Gradients of 4 examples at a time, their sum, and what the layers keep.
    assert many < 1.01 * few < 8


@pytest.mark.full
def test_the_memory_of_scores_does_not_grow_with_the_number_of_probes():
    few, many = (cost(MANY_PARAMETERS, row) for row in ("2 probes", "8 probes"))
    assert many["temp_bytes"] < 1.01 * few["temp_bytes"]


@pytest.mark.full
@pytest.mark.parametrize("case", ["ResNet-18", "one tensor"])
def test_an_exact_top_k_takes_no_more_than_twice_the_scores(case):
    scores = top_k.make_scores(width=16)[case]
    exact = top_k.compile_pattern(top_k.PATTERNS[top_k.EXACT], scores)
    assert exact.temp_bytes < 2 * measure.num_bytes(scores)


@pytest.mark.full
def test_an_ascent_that_perturbs_nothing_costs_no_second_gradient():
    # At most a forward pass, a third of a step, if the compiler leaves it in twice.
    assert 0.99 < flops_over_sgd("nothing") < 1.34


@pytest.mark.full
@pytest.mark.parametrize(("row", "bound"), [("rw_sam", 2.35), ("rw_sam by jvp", 2.75)])
def test_a_probe_costs_a_forward_pass_and_nothing_else(row, bound):
    assert bound - 0.15 < flops_over_sgd(row) < bound


@pytest.mark.full
def test_four_probes_take_the_memory_of_one():
    one, four = (cost(MANY_PARAMETERS, f"rw_sam{n}") for n in ("", " of 4 probes"))
    assert four["temp_bytes"] - one["temp_bytes"] < 0.1 * one["param_bytes"]


@pytest.mark.full
def test_m_sam_costs_two_gradients_and_nothing_else():
    # All at once: the compiler counts the body of a loop once. Beyond two gradients,
    # there are four norms and four perturbations.
    assert 1.99 < flops_over_sgd("4 examples, all at once") < 2.015


@pytest.mark.full
def test_micro_batches_that_wait_take_no_memory():
    sam, waiting, at_once = (
        cost(MANY_PARAMETERS, row)
        for row in ("all examples", "1 example, 1 at once", "1 example, all at once")
    )
    # The mean of the gradients so far; that of the clean ones is not kept for SAM.
    added = (waiting["temp_bytes"] - sam["temp_bytes"]) / sam["param_bytes"]
    assert 0.85 < added < 1.1
    assert at_once["temp_bytes"] > waiting["temp_bytes"]
