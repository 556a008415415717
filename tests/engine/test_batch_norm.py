"""Batch normalisation in steps of devices that share a batch."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import problems
from meshes import DEVICES, PROBLEM, REPLICATED, SPLIT, mesh
from methods import cover

import optax_sam


class Net(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=False, axis_name=self.axis_name)(x)
        return nn.Dense(8)(nn.relu(x))


def norm_loss_fn(model):
    def loss_fn(params, batch, statistics):
        logits, updated = model.apply(
            {"params": params, "batch_stats": statistics},
            batch[0],
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses, updated["batch_stats"]

    return loss_fn


@cover(across_examples=[True, False], default=("True",))
def test_scores_of_examples_that_are_normalised_together_are_by_probes(across_examples):
    """Alone they would have no variance: all of the first layer, none of the second."""
    model = Net() if across_examples else nn.Sequential([nn.Dense(16), nn.Dense(8)])
    variables = jax.jit(model.init)(jax.random.key(0), PROBLEM.batch[0])
    pattern = optax_sam.unstructured(0.5)

    def loss_fn(params, batch):
        if across_examples:
            statistics = variables["batch_stats"]
            return norm_loss_fn(model)(params, batch, statistics)[0]
        logits = model.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])

    def mask(params, batch, estimator="per_example"):
        options = {"refresh_every": 2, "num_probes": 2, "estimator": estimator}
        link = optax_sam.sparsify_by_fisher(pattern, **options)
        arguments = {"loss_fn": loss_fn, "batch": batch}
        return link.update(params, link.init(params), params, **arguments)[1].mask

    @jax.jit
    def exact(params, batch):
        return pattern(optax_sam.fisher_diagonal(loss_fn, params, batch))

    params = variables["params"]
    found = jax.jit(mask)(params, PROBLEM.batch)
    probes = jax.jit(functools.partial(mask, estimator="probes"))
    expected, other = (probes, exact) if across_examples else (exact, probes)
    problems.assert_trees_equal(found, expected(params, PROBLEM.batch))
    problems.assert_trees_differ(found, other(params, PROBLEM.batch))


@cover(across=[True, False], check_vma=[True, False], default=("True-False",))
def test_batch_normalisation_with_and_without_statistics_across_devices(
    across, check_vma
):
    variables = jax.jit(Net().init)(jax.random.key(0), PROBLEM.batch[0])
    params, statistics = variables["params"], variables["batch_stats"]
    tx = optax_sam.sam(optax.sgd(1.0), 0.1)
    opt_state = tx.init(params)

    def whole(params, batch, statistics):
        """One device: one normalisation, or one for what each device would have."""
        if across:
            return norm_loss_fn(Net())(params, batch, statistics)
        parts = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
        losses, updated = jax.vmap(norm_loss_fn(Net()), (None, 0, None))(
            params, parts, statistics
        )
        return losses.reshape(-1), updated

    expected = jax.jit(optax_sam.value_and_update(whole, tx, has_aux=True))(
        params, opt_state, PROBLEM.batch, statistics
    )

    def local(params, opt_state, batch):
        model = Net("data" if across else None)
        step = optax_sam.value_and_update(
            norm_loss_fn(model), tx, has_aux=True, axis_name="data"
        )
        (value, updated), updates, opt_state = step(
            params, opt_state, batch, statistics
        )
        # Statistics are a device's own, even where they are equal.
        updated = jax.tree.map(lambda x: x[None], updated)
        return (value, updated), updates, opt_state

    actual = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh(),
            in_specs=(REPLICATED, REPLICATED, SPLIT),
            out_specs=((REPLICATED, SPLIT), REPLICATED, REPLICATED),
            check_vma=check_vma,
        )
    )(params, opt_state, PROBLEM.batch)
    (value, updated), *others = actual
    (expected_value, expected_updated), *expected_others = expected
    problems.assert_trees_close(
        (value, others), (expected_value, expected_others), rtol=1e-4, atol=2e-6
    )
    expected_updated = jax.tree.map(
        lambda x: np.broadcast_to(x, (DEVICES, *x.shape[-1:])), expected_updated
    )
    problems.assert_trees_close(updated, expected_updated, rtol=1e-4, atol=1e-6)
