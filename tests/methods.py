"""Every method and the base optimizers that the tests put into it."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_sam


class Method(NamedTuple):
    """A method as the tests call it: `method(base)`."""

    alias: Callable[..., optax.GradientTransformationExtraArgs]
    # What may be a schedule or be injected, and what is fixed when a step is compiled.
    hyperparameters: Mapping[str, Any]
    static: Mapping[str, Any] = {}
    # Instead of these, where hyperparameters are injected.
    injected: Mapping[str, Any] = {}
    needs_momentum: bool = False  # Of the base.
    is_always_of_two_passes: bool = True

    def __call__(self, base):
        return self.alias(base, **self.hyperparameters, **self.static)


def sam_on_matrices(base, rho):
    def matrices(params):
        return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)

    return optax_sam.sharpness_aware(
        base,
        optax.chain(optax_sam.perturb_only(matrices), optax_sam.scale_to_radius(rho)),
    )


METHODS = {
    "sam": Method(optax_sam.sam, {"rho": 0.1}),
    "asam": Method(optax_sam.asam, {"rho": 0.5}, injected={"eta": 0.01}),
    "vasso": Method(optax_sam.vasso, {"rho": 0.1, "theta": 0.4}),
    "vasso scheduled": Method(
        optax_sam.vasso,
        {
            "rho": optax.linear_schedule(0.0, 0.1, 5),
            "theta": optax.cosine_decay_schedule(1.0, 5),
        },
        {"accumulator_dtype": jnp.bfloat16},
    ),
    "sparse": Method(
        optax_sam.sparse_sam,
        {"rho": 0.1},
        {"pattern": optax_sam.n_m(2, 4), "refresh_every": 2, "num_examples": 8},
    ),
    "dynamic sparse": Method(
        optax_sam.dynamic_sparse_sam,
        {"rho": 0.1},
        {"sparsity": 0.5, "refresh_every": 2, "decay_steps": 10},
        injected={"drop_fraction": 0.5},
    ),
    "reweighted": Method(
        optax_sam.rw_sam,
        {"rho": 0.1, "strength": 0.05},
        {"estimator": "jvp"},
        injected={"delta": 1e-3, "estimator": "finite_difference"},
    ),
    "micro-batches": Method(optax_sam.m_sam, {"rho": 0.1}, {"micro_batch_size": 4}),
    "friendly": Method(
        optax_sam.friendly_sam, {"rho": 0.1, "sigma": 0.8, "decay": 0.9}
    ),
    "gsam": Method(optax_sam.gsam, {"rho": 0.1, "alpha": 0.2}),
    "wsam": Method(optax_sam.wsam, {"rho": 0.1, "gamma": 0.8}),
    "sam on matrices": Method(sam_on_matrices, {"rho": 0.1}),
    "momentum": Method(
        optax_sam.momentum_sam,
        {"rho": 0.1},
        needs_momentum=True,
        is_always_of_two_passes=False,
    ),
    "vasso of one pass": Method(
        optax_sam.vasso,
        {"rho": 0.1, "theta": 0.4},
        {"one_pass": True},
        is_always_of_two_passes=False,
    ),
    "look": Method(
        optax_sam.look_sam,
        {"rho": 0.1, "alpha": 0.3},
        {"every": 2},
        is_always_of_two_passes=False,
    ),
}
HALF = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}
DTYPES = {"float32": jnp.float32} | HALF
NO_MOMENTUM = ("schedule", "schedule free", "prng key")
BASES = {
    "sgd momentum": lambda: optax.sgd(0.05, momentum=0.9),
    # The default eps of 1e-8 is zero in float16.
    "adamw": lambda: optax.adamw(1e-2, eps=1e-4),
    "lion": lambda: optax.lion(1e-3),
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 50)),
    "schedule free": lambda: optax.contrib.schedule_free_sgd(0.05),
    "needs value": lambda: optax.contrib.momo(0.05),
    "prng key": lambda: optax.noisy_sgd(0.05, eta=1e-4, key=0),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "multi steps": lambda: optax.MultiSteps(optax.contrib.momo(0.05), 2),
    "partition": lambda: optax.partition(
        {"move": optax.adam(1e-2), "stay": optax.set_to_zero()},
        lambda p: jax.tree.map(lambda x: "move" if jnp.ndim(x) else "stay", p),
    ),
    "masked": lambda: optax.chain(
        optax.masked(
            optax.add_decayed_weights(1e-3),
            lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 1, p),
        ),
        optax.sgd(0.05, momentum=0.9),
    ),
}


def defaults(names, chosen):
    """Parameters, those that are not chosen only in the full tier."""
    return [
        pytest.param(name, marks=() if name in chosen else pytest.mark.full)
        for name in names
    ]


def cover(default=None, **axes):
    """Parametrizes a test by a product, of which a fixed part is in the default tier.

    An axis is a list, or a dictionary from names to values. The part is given by its
    names, `"a-b"`, or is where the positions along the axes add up to a multiple of the
    length of the shortest: every value at least once and, of three axes or more, every
    pair.
    """
    shortest = min(map(len, axes.values()))
    rows = {}
    for row in itertools.product(*(enumerate(axis) for axis in axes.values())):
        positions, names = zip(*row, strict=True)
        name = "-".join(getattr(x, "__name__", str(x)) for x in names)
        covered = sum(positions) % shortest == 0 if default is None else name in default
        values = [
            axis[name] if isinstance(axis, Mapping) else name
            for axis, name in zip(axes.values(), names, strict=True)
        ]
        marks = () if covered else pytest.mark.full
        rows[name] = pytest.param(*values, marks=marks, id=name)
    assert rows.keys() >= set(default or ()), f"{default} are not all of {rows.keys()}"
    return pytest.mark.parametrize(tuple(axes), list(rows.values()))


def pairs():
    """A method with a base: either with all of the other at least once.

    In the full tier every base with two methods, and every method with the bases that
    ask the most, but for those that take long to compile.
    """
    slow = ("sparse", "dynamic sparse")
    for (i, method), (j, base) in itertools.product(
        enumerate(METHODS), enumerate(BASES)
    ):
        default = (i + j) % min(len(METHODS), len(BASES)) == 0
        if METHODS[method].needs_momentum and base in NO_MOMENTUM:
            continue
        if (
            default
            or method in ("sam", "vasso")
            or base == "adamw"
            or (base in ("needs value", "prng key") and method not in slow)
        ):
            yield pytest.param(
                METHODS[method],
                BASES[base],
                marks=() if default else pytest.mark.full,
                id=f"{method}-{base}",
            )


every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_pair = pytest.mark.parametrize(("method", "base"), list(pairs()))
