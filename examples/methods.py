"""The methods that the scripts can train with, and the optimizer beneath them.

A method is a function of a base optimizer and its own hyperparameters, whose defaults
stand here and can be changed on the command line. One line adds a method, two or three
a method whose hyperparameters are not all numbers.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import optax

import optax_sam


def _base_alone(base: optax.GradientTransformation) -> optax.GradientTransformation:
    return base


def _sparse_sam(
    base: optax.GradientTransformation, rho: float, sparsity: float, refresh_every: int
) -> optax.GradientTransformation:
    pattern = optax_sam.unstructured(sparsity)
    return optax_sam.sparse_sam(base, rho, pattern, refresh_every=refresh_every)


def _m_sam(
    base: optax.GradientTransformation, rho: float, micro_batch_size: int
) -> optax.GradientTransformation:
    # Side by side, since loops over convolutions are slow on the CPU.
    return optax_sam.m_sam(base, rho, micro_batch_size, micro_batches_at_once=None)


# By the name of the method, then by that of the hyperparameter.
Hyperparameters = Mapping[str, Mapping[str, Any]]

# With these compare.py, as it stands, does best on the validation split, out of rho
# 0.4, 0.5 and 0.6 (ASAM: 2 and 3) and theta 0.4 and 0.9.
METHODS: Mapping[str, partial[Any]] = {
    "sgd": partial(_base_alone),
    "sam": partial(optax_sam.sam, rho=0.5),
    "vasso": partial(optax_sam.vasso, rho=0.5, theta=0.9),
    "asam": partial(optax_sam.asam, rho=3.0),
    # The rho is that of benchmarks/sparse_accuracy.py; a new mask each epoch.
    "sparse_sam": partial(_sparse_sam, rho=0.7, sparsity=0.5, refresh_every=16),
    "dynamic_sparse_sam": partial(
        optax_sam.dynamic_sparse_sam,
        rho=0.7,
        sparsity=0.5,
        refresh_every=16,
        drop_fraction=0.5,
    ),
    # The rho and the strength are those of benchmarks/reweight_accuracy.py.
    "rw_sam": partial(optax_sam.rw_sam, rho=0.5, strength=0.1, num_probes=1),
    "m_sam": partial(_m_sam, rho=0.5, micro_batch_size=16),
}

# The papers' values on CIFAR-10, where they differ from those for the noisy digits.
CIFAR10_HYPERPARAMETERS: Hyperparameters = {
    "sam": {"rho": 0.1},
    "vasso": {"rho": 0.1, "theta": 0.9},
    "asam": {"rho": 0.5},
    "sparse_sam": {"rho": 0.1, "refresh_every": 390},
    "dynamic_sparse_sam": {"rho": 0.1, "refresh_every": 390},
    "rw_sam": {"rho": 0.1},
    "m_sam": {"rho": 0.1, "micro_batch_size": 32},
}


def momentum_sgd(
    learning_rate: float, num_steps: int, weight_decay: float
) -> optax.GradientTransformation:
    """SGD with momentum 0.9, cosine learning rate down to 0 and L2 weight decay."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=0.9)
    )


def make_tx(
    method: str,
    base: optax.GradientTransformation,
    values: Mapping[str, Any],
    num_steps: int,
) -> optax.GradientTransformation:
    """The optimizer of a method.

    Args:
      method: name out of `METHODS`.
      base: the optimizer that moves the parameters.
      values: the method's hyperparameters.
      num_steps: length of the training, for methods that want to know it.

    Raises:
      ValueError: if a hyperparameter is out of range.
    """
    make = METHODS[method]
    wants_length = "decay_steps" in inspect.signature(make).parameters
    length = {"decay_steps": num_steps} if wants_length else {}
    tx: optax.GradientTransformation = make(base, **values, **length)
    return tx


def hyperparameters(
    methods: Iterable[str],
    assignments: Sequence[str] = (),
    defaults: Hyperparameters = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """The hyperparameters of each method: its defaults, changed by assignments.

    Args:
      methods: names out of `METHODS`.
      assignments: such as `rho=0.1`, for all methods that have a rho, or
        `vasso.rho=0.1` for one. The later one counts.
      defaults: for some methods, what replaces the defaults of `METHODS`.

    Raises:
      ValueError: if a method is unknown, an assignment is no number, or nothing takes
        it.
    """
    chosen = {}
    for method in methods:
        if method not in METHODS:
            raise ValueError(
                f"unknown method {method!r}; choose from {', '.join(METHODS)}."
            )
        chosen[method] = METHODS[method].keywords | dict(defaults.get(method, {}))
    for assignment in assignments:
        _assign(chosen, assignment)
    return chosen


def check_batch(chosen: Mapping[str, Mapping[str, Any]], batch_size: int) -> None:
    """Raises a ValueError unless the micro-batches of every method divide a batch."""
    for method, values in chosen.items():
        size = values.get("micro_batch_size")
        if size is not None and (size < 1 or batch_size % size):
            raise ValueError(
                f"{method}.micro_batch_size must divide --batch-size {batch_size}, "
                f"got {size}."
            )


def _assign(chosen: dict[str, dict[str, Any]], assignment: str) -> None:
    target, _, value = assignment.partition("=")
    method, _, name = target.rpartition(".")
    # Only numbers can be given on a command line.
    takers = [
        values
        for taker, values in chosen.items()
        if method in ("", taker) and isinstance(values.get(name), int | float)
    ]
    if not takers:
        available = ", ".join(
            f"{taker}.{key}" for taker, values in chosen.items() for key in values
        )
        raise ValueError(
            f"no chosen method takes {target!r}; "
            f"they take {available or 'no hyperparameters'}."
        )
    for values in takers:
        number_type: Callable[[str], int | float] = type(values[name])
        try:
            values[name] = number_type(value)
        except ValueError:
            raise ValueError(
                f"{assignment!r} has no {'whole ' if number_type is int else ''}number "
                f"after '='; write for example {target}={values[name]}."
            ) from None
