"""The methods that the scripts can train with, and their combinations.

A method is a sum of names, such as `vasso` or `rw_sam+vasso+sparse_sam`: each brings a
link of the ascent or, as `gsam` does, of the base or, as `m_sam` and `every` do, an
argument of the engine; `functional_sam` has the loss taken in two parts. Its
hyperparameters have defaults here, which can be changed on the command line.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import optax

import optax_sam


def _sparsify_by_fisher(
    *,
    sparsity: float,
    refresh_every: int,
    pattern: str = "unstructured",
    num_examples: int = 128,
    fisher_estimator: Any = "per_example",
) -> optax.GradientTransformation:
    link: optax.GradientTransformation = optax_sam.sparsify_by_fisher(
        _make_pattern(pattern, sparsity),
        refresh_every=refresh_every,
        num_examples=num_examples,
        estimator=fisher_estimator,
    )
    return link


def _precondition(*, b2: float, eps: float) -> optax.GradientTransformation:
    link: optax.GradientTransformation = optax.scale_by_rms(b2, eps, eps_in_sqrt=False)
    return link


_N_M = r"\d+:\d+"  # The pattern that fixes the sparsity.


def _make_pattern(name: str, sparsity: float) -> Any:
    if name == "unstructured":
        return optax_sam.unstructured(sparsity)
    if name in ("layer", "filter"):
        return optax_sam.structured(sparsity, unit=name)
    if re.fullmatch(_N_M, name):
        return optax_sam.n_m(*map(int, name.split(":")))
    raise ValueError(
        "pattern must be unstructured, layer, filter or of the form 2:4, which keeps "
        f"two of every four weights, got {name!r}."
    )


# By the name of the method, then by that of the hyperparameter.
Hyperparameters = Mapping[str, Mapping[str, Any]]

# With these compare.py, as it stands, does best on the validation split, out of rho
# 0.4, 0.5 and 0.6 (ASAM: 2 and 3) and theta 0.4 and 0.9.
METHODS: Hyperparameters = {
    "sgd": {},
    "sam": {"rho": 0.5},
    "vasso": {"rho": 0.5, "theta": 0.9},
    # Of these three the best of three to five settings, by three seeds.
    "friendly_sam": {"rho": 0.5, "sigma": 0.5, "decay": 0.9},
    "gsam": {"rho": 0.5, "alpha": 0.05},
    "wsam": {"rho": 0.35, "gamma": 0.6},
    "asam": {"rho": 3.0, "eta": 0.0},
    # Of these two nothing was tuned; the rho is SAM's.
    "functional_sam": {"rho": 0.5},
    "preconditioned_sam": {"rho": 0.5, "b2": 0.999, "eps": 1e-8},
    # The rho is that of study/digits.py sparse; a new mask each epoch.
    "sparse_sam": {
        "rho": 0.7,
        "sparsity": 0.5,
        "refresh_every": 16,
        "pattern": "unstructured",
        "num_examples": 128,
        "fisher_estimator": "per_example",
    },
    "dynamic_sparse_sam": {
        "rho": 0.7,
        "sparsity": 0.5,
        "refresh_every": 16,
        "drop_fraction": 0.5,
        "drop_by": "gradient",
        "grow_by": "random",
    },
    # The rho and the strength are those of study/digits.py reweight.
    "rw_sam": {
        "rho": 0.5,
        "strength": 0.1,
        "num_probes": 1,
        "delta": 1e-4,
        "estimator": "auto",
        "normalize": False,
    },
    # SAM's rho times the root of 16 / 64, the share of the batch that ascends together.
    "m_sam": {"rho": 0.25, "micro_batch_size": 16},
    # Whose steps cost less than two gradients.
    "momentum_sam": {"rho": 4.0},
    "one_pass_vasso": {"rho": 0.7, "theta": 0.4},
    "look_sam": {"rho": 0.125, "every": 5, "alpha": 0.7},
    "every": {"rho": 1.0, "k": 2},
    # From the middle of a training of 40 epochs to its end.
    "between": {"rho": 1.0, "first": 320, "last": None},
}

# The papers' values on CIFAR-10, where they differ from those for the noisy digits; of
# m_sam SAM's rho times the root of 32 / 128.
CIFAR10_HYPERPARAMETERS: Hyperparameters = {
    "sam": {"rho": 0.1},
    "vasso": {"rho": 0.1, "theta": 0.9},
    "friendly_sam": {"rho": 0.1},
    "gsam": {"rho": 0.1},
    "wsam": {"rho": 0.1},
    "asam": {"rho": 0.5},
    # Whose paper has language models only; the rho is SAM's.
    "functional_sam": {"rho": 0.1},
    "preconditioned_sam": {"rho": 0.1},
    "sparse_sam": {"rho": 0.1},  # And a new mask each epoch, see config.py.
    "dynamic_sparse_sam": {"rho": 0.1},
    "rw_sam": {"rho": 0.1},
    "m_sam": {"rho": 0.05, "micro_batch_size": 32},
    "momentum_sam": {"rho": 1.0},
    "one_pass_vasso": {"rho": 0.1},
    # The paper's alpha, 0.7, stalls where the study tried it.
    "look_sam": {"rho": 0.1, "alpha": 0.1},
    "every": {"rho": 0.1},
    "between": {"rho": 0.1},
}
# Names whose rho is of another size than SAM's.
_OF_OTHER_SIZE = ("every", "between", "m_sam", "look_sam", "asam", "momentum_sam")


def _every(*, every: int) -> Callable[[Any], Any]:
    return optax_sam.every(every)


# Links before and after that of the radius, in the order of a chain.
_BEFORE: Mapping[str, Callable[..., Any]] = {
    "rw_sam": optax_sam.reweight_by_sharpness,
    "vasso": optax_sam.suppress_variance,
    "one_pass_vasso": optax_sam.follow_average,
    "friendly_sam": optax_sam.remove_common_direction,
    "preconditioned_sam": _precondition,
}
# In place of scale_to_radius.
_RADII: Mapping[str, Callable[..., Any]] = {
    "asam": optax_sam.adapt_to_scale,
    "momentum_sam": optax_sam.follow_momentum,
}
_AFTER: Mapping[str, Callable[..., Any]] = {
    "sparse_sam": _sparsify_by_fisher,
    "dynamic_sparse_sam": optax_sam.sparsify_dynamically,
}
# First links of the base, in their order.
_DESCENTS: Mapping[str, Callable[..., Any]] = {
    "one_pass_vasso": optax_sam.keep_average,
    "gsam": optax_sam.gap_descent,
    "wsam": optax_sam.weighted_descent,
    "look_sam": optax_sam.reuse_ascent,
}
_ASCEND_WHEN: Mapping[str, Callable[..., Any]] = {
    "look_sam": _every,
    "every": optax_sam.every,
    "between": optax_sam.between,
}
# Of which a method may have one only, and why.
_ONE_OF = (
    (
        ("sam", *_RADII),
        "each scale the ascent to a radius, and only one of them would have an effect",
    ),
    (
        ("gsam", "wsam", "look_sam"),
        "each make a descent of the clean and the perturbed gradient",
    ),
    (tuple(_ASCEND_WHEN), "each say which steps ascend"),
    (("momentum_sam", "one_pass_vasso"), "each have a direction of their own"),
)
# Whose ascents take no gradient of the batch, and what acts on one.
_TAKE_NONE = ("momentum_sam", "one_pass_vasso")
_NEED_ONE = (
    *("rw_sam", "vasso", "friendly_sam", "preconditioned_sam"),
    *("m_sam", "look_sam"),
)


def parts(method: str) -> list[str]:
    """The names that a method is a sum of.

    Raises:
      ValueError: if one is unknown or there twice, the base alone is among others, or
        two of them do not go together.
    """
    names = method.split("+")
    for name in names:
        if name not in METHODS:
            raise ValueError(
                f"unknown method {name!r}; choose from {', '.join(METHODS)}, or "
                "several of them joined by +."
            )
    if len(set(names)) < len(names):
        raise ValueError(f"method {method!r} has a name twice; leave one out.")
    if "sgd" in names and len(names) > 1:
        raise ValueError(
            f"method {method!r}: sgd has no ascent that others could be added to; "
            "leave it out."
        )
    for group, reason in _ONE_OF:
        found = [name for name in group if name in names]
        if len(found) > 1:
            raise ValueError(
                f"method {method!r}: {' and '.join(found)} {reason}; leave one out."
            )
    without = [name for name in _TAKE_NONE if name in names]
    needing = [name for name in _NEED_ONE if name in names]
    if without and needing:
        raise ValueError(
            f"method {method!r}: the ascent of {without[0]} takes no gradient of the "
            f"batch, and so {needing[0]} has nothing to act on; leave one out."
        )
    return names


def takes_gradient(method: str) -> bool:
    """Whether a method has an ascent that reads the gradient of the batch."""
    return not set(parts(method)).intersection(("sgd", *_TAKE_NONE))


def is_functional(method: str) -> bool:
    """Whether a method takes the loss in two parts, see `optax_sam.functional_loss`."""
    return "functional_sam" in method.split("+")


def make_ascent(
    method: str,
    values: Mapping[str, Any],
    num_steps: int,
    *,
    key: int = 0,
    perturb: Sequence[str] = (),
) -> optax.GradientTransformation | None:
    """The ascent of a method, None for the base alone.

    Args:
      method: names out of `METHODS`, joined by +.
      values: the method's hyperparameters.
      num_steps: length of the training, for methods that want to know it.
      key: seeds the methods that draw at random.
      perturb: names of the layers that are perturbed, by a static mask; without any
        all are.

    Raises:
      ValueError: if a hyperparameter is out of range.
    """
    names = parts(method)
    if names == ["sgd"]:
        return None
    mask = optax_sam.select_layers(*perturb)
    static = [optax_sam.perturb_only(mask)] if perturb else []
    with _naming(method):
        links = _links(names, {**values, "key": key, "decay_steps": num_steps})
    ascent: optax.GradientTransformation = optax.chain(*static, *links)
    return ascent


def _links(names: Sequence[str], known: Mapping[str, Any]) -> list[Any]:
    """The links of the ascents of these names, in the order of a chain."""
    radius = _of(names, _RADII) or [optax_sam.scale_to_radius]
    links = [*_of(names, _BEFORE), *radius, *_of(names, _AFTER)]
    return [_call(link, known) for link in links]


def _of(names: Sequence[str], by_name: Mapping[str, Any]) -> list[Any]:
    return [value for name, value in by_name.items() if name in names]


@contextmanager
def _naming(method: str) -> Iterator[None]:
    """Has errors of values begin with the method."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{method}: {error}") from None


def _call(make: Callable[..., Any], known: Mapping[str, Any]) -> Any:
    """Calls with those of the values that the function has parameters for."""
    wanted = inspect.signature(make).parameters
    return make(**{name: known[name] for name in wanted if name in known})


def sharpen(
    method: str,
    base: optax.GradientTransformation,
    ascent: optax.GradientTransformation | None,
    values: Mapping[str, Any],
    micro_batches_at_once: int | None = None,
) -> optax.GradientTransformation:
    """The optimizer of an ascent and of values such as the micro-batch size.

    By default micro-batches are side by side, since loops over convolutions are slow on
    the CPU.

    Raises:
      ValueError: if a hyperparameter is out of range.
    """
    if ascent is None:
        return base
    names = parts(method)
    with _naming(method):
        descents = [_call(link, values) for link in _of(names, _DESCENTS)]
        whens = [_call(when, values) for when in _of(names, _ASCEND_WHEN)]
    tx: optax.GradientTransformation = optax_sam.sharpness_aware(
        optax.chain(*descents, base) if descents else base,
        ascent,
        ascend_when=whens[0] if whens else None,
        micro_batch_size=values.get("micro_batch_size"),
        micro_batches_at_once=micro_batches_at_once,
    )
    return tx


def make_tx(
    method: str,
    base: optax.GradientTransformation,
    values: Mapping[str, Any],
    num_steps: int,
) -> optax.GradientTransformation:
    """The optimizer of a method.

    Args:
      method: names out of `METHODS`, joined by +.
      base: the optimizer that moves the parameters.
      values: the method's hyperparameters.
      num_steps: length of the training, for methods that want to know it.

    Raises:
      ValueError: if a hyperparameter is out of range.
    """
    return sharpen(method, base, make_ascent(method, values, num_steps), values)


def hyperparameters(
    methods: Iterable[str],
    assignments: Sequence[str] = (),
    defaults: Hyperparameters = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """The hyperparameters of each method: its defaults, changed by assignments.

    Of a combination they are those of all its parts. Where these differ the last part
    counts, but after that one whose rho is of another size than SAM's, such as m_sam.

    Args:
      methods: names out of `METHODS`, or some joined by +.
      assignments: such as `rho=0.1`, for all methods that have a rho, or
        `vasso.rho=0.1` for one. The later one counts.
      defaults: for some methods, what replaces the defaults of `METHODS`.

    Raises:
      ValueError: if a method is unknown, an assignment is no number, or nothing takes
        it.
    """
    chosen = {}
    for method in methods:
        names = sorted(parts(method), key=_rank)
        chosen[method] = {
            key: value
            for name in names
            for key, value in {**METHODS[name], **defaults.get(name, {})}.items()
        }
    for assignment in assignments:
        _assign(chosen, assignment)
    for method, values in chosen.items():
        if re.fullmatch(_N_M, values.get("pattern", "")):
            _fix_sparsity(method, values, assignments)
    return chosen


def _rank(name: str) -> int:
    return _OF_OTHER_SIZE.index(name) if name in _OF_OTHER_SIZE else -1


def _fix_sparsity(
    method: str, values: dict[str, Any], assignments: Sequence[str]
) -> None:
    """Sets the sparsity that a pattern of `n` out of `m` has."""
    n, m = map(int, values["pattern"].split(":"))
    sparsity = 1 - n / m if m else None
    asked = any(
        a.partition("=")[0] in ("sparsity", f"{method}.sparsity") for a in assignments
    )
    if asked and values["sparsity"] != sparsity:
        raise ValueError(
            f"{method}: the pattern {values['pattern']} has a sparsity of {sparsity}, "
            f"got sparsity={values['sparsity']}; leave one of the two out."
        )
    values["sparsity"] = sparsity


def check_batch(chosen: Hyperparameters, batch_size: int) -> None:
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
    takers = [
        values
        for taker, values in chosen.items()
        if method in ("", taker) and name in values
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
        kind = type(values[name])
        try:
            values[name] = _READ.get(kind, kind)(value)
        except (KeyError, ValueError):
            raise ValueError(
                f"{assignment!r} has no {_KINDS[kind]} after '='; write for example "
                f"{target}={values[name]}."
            ) from None


_KINDS = {
    float: "number",
    int: "whole number",
    bool: "True or False",
    type(None): "whole number or None",
}
_READ: Mapping[type, Callable[[str], Any]] = {
    bool: {"True": True, "False": False}.__getitem__,
    type(None): lambda text: None if text == "None" else int(text),
}
