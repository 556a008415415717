"""Steps whose clean pass has a sparse backward."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems

import optax_sam
from optax_sam import implicit, reweight_by_sharpness


def test_gradients_of_an_implicit_backward_are_weighted():
    """Its forward is exact: the weights are those of the dense network."""
    problem = problems.perceptron(sizes=(6, 8, 4))

    def loss_by(product):
        def loss_fn(params, batch):
            x, labels = batch
            for i in range(2):
                x = product(x, params[f"w{i}"], (((1,), (0,)), ((), ())))
                x = x + params[f"b{i}"][None]
                x = jnp.tanh(x) if i == 0 else x
            return optax.softmax_cross_entropy_with_integer_labels(x, labels)

        return loss_fn

    sparse = loss_by(implicit.Channels(0.5).dot_general)
    link = reweight_by_sharpness(0.5, key=0)
    gradient, state = problems.ascend_by(sparse, link, problem)
    dense, dense_state = problems.ascend(link, problem)
    np.testing.assert_allclose(state[2:], dense_state[2:], rtol=1e-2)
    problems.assert_trees_differ(gradient, dense)
    # The last layer's bias is behind no product: its gradient is the dense one.
    np.testing.assert_allclose(gradient["b1"], dense["b1"], rtol=2e-2, atol=1e-3)


def test_step_by_hand_has_a_sparse_clean_pass_and_a_dense_perturbed_one():
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    masked = partial(nn.Dense, dot_general_cls=implicit.MaskedDotGeneral)
    model = nn.Sequential([masked(8), nn.tanh, masked(8), nn.tanh, masked(3)])
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    masks = jax.tree.map(lambda p: rng.random(p.shape) < 0.5, params)

    def loss_fn(params, batch, **collections):
        return jnp.sum(model.apply({"params": params, **collections}, batch) ** 2, -1)

    @jax.jit
    def gradient(params, **collections):
        return jax.grad(lambda p: loss_fn(p, batch, **collections).mean())(params)

    tx = optax_sam.sam(optax.sgd(0.1), rho=0.5)
    grads = gradient(params, masks=masks)
    updates, _ = jax.jit(partial(tx.update, loss_fn=loss_fn))(
        grads, tx.init(params), params, batch=batch
    )
    problems.assert_trees_differ(grads, gradient(params))
    scale = 0.5 / problems.norm(grads)
    perturbed = jax.tree.map(lambda p, g: p + scale * g, params, grads)
    expected = jax.tree.map(lambda g: -0.1 * g, gradient(perturbed))
    problems.assert_trees_close(updates, expected, rtol=1e-4, atol=1e-6)
    sparse = jax.tree.map(lambda g: -0.1 * g, gradient(perturbed, masks=masks))
    assert np.any(
        np.abs(sparse["layers_0"]["kernel"] - updates["layers_0"]["kernel"]) > 1e-3
    )
