"""Replays the authors' trajectories that `ascents/golden/` holds, see its README."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems

import optax_sam
from optax_sam._ascents import sparse_dynamic

_DIRECTORY = Path(__file__).parent / "ascents" / "golden"
# Read at once: an open archive cannot be shared by threads.
GOLDEN = dict(np.load(_DIRECTORY / "trajectories.npz"))
NAMES = ("w0", "b0", "w1", "b1", "w2", "b2")
# The references add 1e-7 to norms, and agree with each other to about 1e-6.
TOLERANCE = 2e-6

BASE = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
DENSE = {
    "sam": lambda: optax_sam.sam(BASE, rho=0.1),
    "vasso_t04": lambda: optax_sam.vasso(BASE, rho=0.1, theta=0.4),
    "vasso_t09": lambda: optax_sam.vasso(BASE, rho=0.2, theta=0.9),
    "asam": lambda: optax_sam.asam(BASE, rho=0.5),
}
FISHER = {
    "ssamf_unstructured": optax_sam.unstructured(0.5),
    "ssamf_unstructured90": optax_sam.unstructured(0.9),
    "ssamf_structured": optax_sam.structured(0.5, unit="layer"),
    "ssamf_nm24": optax_sam.n_m(2, 4),
}
DYNAMIC = {
    "ssamd_grad": {"sparsity": 0.5, "drop_fraction": 0.5, "drop_by": "gradient"},
    "ssamd_weight": {"sparsity": 0.8, "drop_fraction": 0.3, "drop_by": "weight"},
}
METHODS = (*DENSE, *FISHER, *DYNAMIC)


class Deviation(NamedTuple):
    """How far a replay is from the authors' trajectory.

    Attributes:
      params: largest difference of a parameter, after any step.
      losses: largest difference of a loss.
      masks: entries of all masks that differ.
    """

    params: float
    losses: float
    masks: int


def deviation(method: str) -> Deviation:
    """Takes the steps of a trajectory, in float64."""
    with jax.enable_x64(True):
        if method in DENSE:
            return _replay_dense(method)
        if method in FISHER:
            return _replay_fisher(method)
        return _replay_dynamic(method)


def _replay_dense(method: str) -> Deviation:
    tx, start = DENSE[method](), _arrays("init")
    step = optax_sam.value_and_update(_loss_fn, tx)
    return _run(method, step, start, tx.init(start))


def _replay_fisher(method: str) -> Deviation:
    """From step 1 on: the authors' step 0 has an empty mask and is the base's."""
    tx = optax_sam.sparse_sam(
        BASE, 0.1, FISHER[method], refresh_every=6, num_examples=12
    )
    start = _arrays("init")
    first_step = jax.jit(optax_sam.value_and_update(_loss_fn, BASE))
    _, updates, base_state = first_step(
        start, BASE.init(start), (GOLDEN["X"][0], GOLDEN["Y"][0])
    )
    params = optax.apply_updates(start, updates)
    opt_state = tx.init(params)._replace(base_state=base_state)
    step = optax_sam.value_and_update(_loss_fn, tx, scoring_loss_fn=_scoring_loss_fn)
    return _run(method, step, params, opt_state, first=1)


def _replay_dynamic(method: str) -> Deviation:
    """With the authors' counts, whose density drifts; all else is as it ships."""
    total = 164 * (1 - DYNAMIC[method]["sparsity"])

    def authors_counts(kept: Any, free: Any, share: Any) -> Any:
        return tuple((total * x).astype(kept.dtype) for x in (1 - share, share))

    tx = optax_sam.dynamic_sparse_sam(
        BASE,
        0.1,
        refresh_every=6,
        decay_steps=30,
        grow_by="gradient",
        **DYNAMIC[method],
    )
    start = _arrays("init")
    opt_state = optax.tree.set(tx.init(start), mask=_arrays(f"{method}/mask0"))
    step = optax_sam.value_and_update(_loss_fn, tx)
    with mock.patch.object(sparse_dynamic, "_counts", authors_counts):
        return _run(method, step, start, opt_state)


def _run(
    method: str, step: Any, params: Any, opt_state: Any, first: int = 0
) -> Deviation:
    """Compares parameters, losses and masks with those from step `first` on."""

    @jax.jit
    def run(params: Any, opt_state: Any) -> Any:
        def body(carry: Any, batch: Any) -> Any:
            params, opt_state = carry
            value, updates, opt_state = step(params, opt_state, batch)
            params = optax.apply_updates(params, updates)
            mask = optax.tree.get(opt_state, "mask", {})
            return (params, opt_state), (params, value, mask)

        return jax.lax.scan(body, (params, opt_state), _batches(first))[1]

    trajectory, losses, masks = run(params, opt_state)
    assert {x.dtype for x in jax.tree.leaves(trajectory)} == {jnp.dtype(jnp.float64)}
    # A mask that is made at the start of a step is the authors' after the one before.
    last = len(losses) if first else None
    return Deviation(
        _largest(
            _distance(trajectory[name], GOLDEN[f"{method}/{name}"][first:])
            for name in NAMES
        ),
        _distance(losses, GOLDEN[f"{method}/losses"][first:]),
        sum(
            int(np.sum(mask != GOLDEN[f"{method}/mask/{name}"][:last]))
            for name, mask in masks.items()
        ),
    )


def _largest(distances: Iterable[float]) -> float:
    return float(np.max(list(distances)))  # NaN if one is, unlike Python's max.


def _distance(actual: Any, expected: Any) -> float:
    return float(np.max(np.abs(np.asarray(actual) - expected)))


def _arrays(name: str) -> dict[str, np.ndarray]:
    return {key: GOLDEN[f"{name}/{key}"] for key in NAMES}


def _loss_fn(params: Any, batch: Any) -> jax.Array:
    return problems.perceptron(jnp.float64).loss_fn(params, batch[:2])


def _scoring_loss_fn(params: Any, batch: Any) -> jax.Array:
    return _loss_fn(params, batch[2:])


def _batches(first: int) -> tuple[np.ndarray, ...]:
    x, y = (GOLDEN[name][first:] for name in "XY")
    # Refresh i scores examples i; the four more that make the lengths equal are unused.
    refresh = [(t - first) // 6 for t in range(first, 30)]
    fx = np.pad(GOLDEN["FX"], ((0, 0), (0, 4), (0, 0)))[refresh]
    fy = np.pad(GOLDEN["FY"], ((0, 0), (0, 4)))[refresh]
    return x, y, fx, fy
