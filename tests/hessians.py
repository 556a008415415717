"""Quadratic losses of a tree whose Hessians have known eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

TREE = {"a": np.zeros((2, 3)), "b": {"c": np.zeros(1), "d": np.zeros((1, 3))}}
D = 10
SPECTRA = {
    "distinct": np.arange(1.0, D + 1),
    "negative": np.linspace(-7.0, 2.0, D),
    "repeated": np.array([5.0, 5, 5, 2, 2, 0, 0, -3, -3, -3]),
    "identity": np.ones(D),
    "zero": np.zeros(D),
    "rank one": np.array([4.0] + [0.0] * (D - 1)),
    "tiny": 1e-25 * np.arange(D),
    "huge": 1e25 * np.arange(D),
}


def loss_fn(params, batch):
    """Losses `w.H_i w / 2 + b_i.w` on a tree."""
    H, b = batch
    w, _ = ravel_pytree(params)
    return 0.5 * jnp.einsum("i,bij,j->b", w, H, w) + b @ w


def problem(eigenvalues, dtype=None):
    """Parameters and a batch of two losses, whose mean has these eigenvalues."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(D, D)))
    H = q * eigenvalues @ q.T
    other = rng.normal(size=(D, D)) * np.abs(eigenvalues).max()
    other += other.T
    batch = np.stack([H + other, H - other]), rng.normal(size=(2, D))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape), TREE)
    return jax.tree.map(lambda x: np.asarray(x, dtype), (params, batch)), H
