"""Batch normalisation in steps of devices that share a batch."""

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
