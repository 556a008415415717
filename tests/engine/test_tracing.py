"""How often a step traces what it is made of: each ascent once, losses once a pass."""

import collections

import jax
import optax
import problems
import pytest

import optax_sam

BASE = optax.chain(optax_sam.keep_average(0.4), optax.sgd(0.1, momentum=0.9))
RADIUS = optax_sam.scale_to_radius(0.1)
ON_ONE_LEAF = optax_sam.perturb_only(lambda p: {name: name == "w0" for name in p})
FISHER = {"refresh_every": 2, "num_examples": 8}


def counted(counts, name, transformation):
    """The transformation, counting how often its update runs."""
    transformation = optax.with_extra_args_support(transformation)

    def update(*args, **kwargs):
        counts[name] += 1
        return transformation.update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(transformation.init, update)


def traced(ascent, problem=None, **kwargs):
    """How often the ascent and the loss run while a step is traced."""
    problem = problem or problems.perceptron()
    counts = collections.Counter()

    def loss_fn(params, batch):
        counts["loss_fn"] += 1
        return problem.loss_fn(params, batch)

    tx = optax_sam.sharpness_aware(BASE, counted(counts, "ascent", ascent), **kwargs)
    step, opt_state = optax_sam.value_and_update(loss_fn, tx), tx.init(problem.params)
    counts.clear()  # Where the ascent leads to may be tried before.
    jax.eval_shape(step, problem.params, opt_state, problem.batch)
    return counts["ascent"], counts["loss_fn"]


ASCENTS = {
    "sam": (RADIUS, 2),
    "asam": (optax_sam.adapt_to_scale(0.5), 2),
    "vasso": (optax.chain(optax_sam.suppress_variance(0.4), RADIUS), 2),
    "friendly": (optax.chain(optax_sam.remove_common_direction(0.8, 0.9), RADIUS), 2),
    # The clean pass is traced, but not compiled.
    "momentum": (optax_sam.follow_momentum(0.1), 2),
    "vasso of one pass": (optax.chain(optax_sam.follow_average(), RADIUS), 2),
    "static mask": (
        optax.chain(
            optax_sam.perturb_only(lambda p: {k: k == "w0" for k in p}), RADIUS
        ),
        2,
    ),
    "dynamic masks": (
        optax.chain(
            RADIUS,
            optax_sam.sparsify_dynamically(
                0.5, refresh_every=2, decay_steps=10, grow_by="gradient", key=0
            ),
        ),
        2,
    ),
    "fisher": (
        optax.chain(
            RADIUS, optax_sam.sparsify_by_fisher(optax_sam.unstructured(0.5), **FISHER)
        ),
        5,  # Of a few examples together and alone, whether they add up.
    ),
    "fisher, chunks and a rest": (
        optax.chain(
            RADIUS,
            optax_sam.sparsify_by_fisher(
                optax_sam.unstructured(0.5), **FISHER | {"chunk_size": 3}
            ),
        ),
        5,
    ),
    "fisher probes": (
        optax.chain(
            RADIUS,
            optax_sam.sparsify_by_fisher(
                optax_sam.n_m(2, 4), **FISHER, estimator="probes"
            ),
        ),
        2,
    ),
    "rw-sam": (optax.chain(optax_sam.reweight_by_sharpness(1.0, key=0), RADIUS), 3),
    "rw-sam, probes": (
        optax.chain(optax_sam.reweight_by_sharpness(1.0, key=0, num_probes=3), RADIUS),
        3,
    ),
    "rw-sam, jvp": (
        optax.chain(
            optax_sam.reweight_by_sharpness(1.0, key=0, estimator="jvp"), RADIUS
        ),
        3,
    ),
}
every_ascent = pytest.mark.parametrize(
    ("ascent", "num_losses"), ASCENTS.values(), ids=ASCENTS
)


@every_ascent
def test_a_step_traces_an_ascent_once_and_the_loss_once_a_pass(ascent, num_losses):
    assert traced(ascent) == (1, num_losses)


@pytest.mark.parametrize("at_once", [1, 2, None])
@every_ascent
def test_micro_batches_trace_an_ascent_once_more_to_advance(
    ascent, num_losses, at_once
):
    ascents, _ = traced(ascent, micro_batch_size=4, micro_batches_at_once=at_once)
    assert ascents == 2


@pytest.mark.parametrize(
    ("when", "num_losses"), [(optax_sam.every(2), 2), (lambda count: False, 1)]
)
def test_a_condition_traces_nothing_twice(when, num_losses):
    assert traced(RADIUS, ascend_when=when) == (1, num_losses)


def test_a_micro_batch_of_all_examples_is_one_pass():
    assert traced(RADIUS, micro_batch_size=16) == (1, 2)


def test_devices_that_ascend_alone_trace_an_ascent_once_more_to_advance():
    counts = collections.Counter()
    problem = problems.perceptron()
    tx = optax_sam.sharpness_aware(
        BASE, counted(counts, "ascent", RADIUS), sync_ascent=False
    )
    step = optax_sam.value_and_update(problem.loss_fn, tx, axis_name="data")
    batch = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), problem.batch)
    state = tx.init(problem.params)
    jax.eval_shape(
        jax.vmap(step, in_axes=(None, None, 0), axis_name="data"),
        problem.params,
        state,
        batch,
    )
    assert counts["ascent"] == 2


def test_diagnostics_trace_an_ascent_once():
    counts = collections.Counter()
    problem = problems.perceptron()
    ascent = counted(counts, "ascent", RADIUS)
    measure = optax_sam.diagnostics.ascent_metrics(problem.loss_fn, ascent)
    jax.eval_shape(measure, problem.params, ascent.init(problem.params), problem.batch)
    assert counts["ascent"] == 1
