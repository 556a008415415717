"""Whether the library's promises on numbers hold on the device at hand."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))
# The small problems and the reference trajectories are those of the tests.
sys.path.append(str(Path(__file__).parents[2] / "tests"))

import problems  # type: ignore[import-not-found]
import trajectories  # type: ignore[import-not-found]
from sam_examples.benchmarking import measure
from sam_examples.benchmarking.together import together

import optax_sam

RHO = 0.1


@dataclasses.dataclass(frozen=True)
class Options:
    """Replays the reference trajectories and checks the numerics contract.

    Runs on JAX's default device, from a checkout, whose tests hold the trajectories.
    Prints each figure beside its bound, and ends with status 1 if one is exceeded.
    """

    only: tuple[str, ...] = ()
    """Checks whose names contain one of these; without any, all."""
    json: Path | None = None
    """File for all figures."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A figure and the most that it may be.

    Attributes:
      find: finds the figure.
      at_most: its bound.
      alone: whether it changes the library while it runs, so that nothing else may.
    """

    find: Callable[[], float | tuple[float, float]]
    at_most: float = 0.0
    alone: bool = False


# What a check finds, of which not all have the second, and what is printed.
FOUND = ("figure", "largest_difference")
FIGURES = ("figure", "at_most", "largest_difference")

SGD = optax.sgd(0.1, momentum=0.9)
# In half precision 1e-8, the default, is zero.
ADAMW = optax.adamw(1e-2, eps=1e-4)
Method = Callable[..., optax.GradientTransformation]


def fisher(
    base: optax.GradientTransformation, rho: float, sparsity: float = 0.5
) -> optax.GradientTransformation:
    """Sparse SAM by Fisher scores, masks changed every third step."""
    pattern = optax_sam.unstructured(sparsity)
    return optax_sam.sparse_sam(base, rho, pattern, refresh_every=3)


def dynamic(
    base: optax.GradientTransformation, rho: float, sparsity: float = 0.5
) -> optax.GradientTransformation:
    """Sparse SAM by dynamic masks, changed every third step."""
    return optax_sam.dynamic_sparse_sam(
        base, rho, sparsity, refresh_every=3, decay_steps=15
    )


METHODS: Mapping[str, Method] = {
    "SAM": optax_sam.sam,
    "ASAM": optax_sam.asam,
    "VaSSO": functools.partial(optax_sam.vasso, theta=0.4),
    "SSAM-F": fisher,
    "SSAM-D": dynamic,
    "RW-SAM": functools.partial(optax_sam.rw_sam, strength=0.1),
}
BATCH = 16  # The examples of the problem.
LIMITS: Mapping[str, Method] = {
    "VaSSO, theta = 1": functools.partial(optax_sam.vasso, theta=1.0),
    "SSAM-F, sparsity = 0": functools.partial(fisher, sparsity=0.0),
    "SSAM-D, sparsity = 0": functools.partial(dynamic, sparsity=0.0),
    "RW-SAM, strength = 0": functools.partial(optax_sam.rw_sam, strength=0.0),
    "m-SAM, m = B": functools.partial(optax_sam.m_sam, micro_batch_size=BATCH),
}


def trained(tx: optax.GradientTransformation, dtype: Any) -> Any:
    """Parameters after 20 compiled steps on the tests' perceptron."""
    return problems.train(tx, problems.perceptron(dtype, batch_size=BATCH), 20)[0]


def differing(actual: Any, expected: Any) -> int:
    """How many entries of two trees differ."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return sum(int(np.sum(np.asarray(a) != np.asarray(e))) for a, e in pairs)


def differing_from(
    expected: optax.GradientTransformation,
    tx: optax.GradientTransformation,
    dtype: Any,
) -> tuple[float, float]:
    """How many parameters two optimizers train to something else, and how far."""
    trees = trained(tx, dtype), trained(expected, dtype)
    distance = jax.tree.map(lambda a, e: np.max(np.abs(a - e)), *trees)
    return differing(*trees), float(np.max(jax.tree.leaves(distance)))


def epsilon(grads: Any) -> Any:
    """SAM's perturbation for these gradients, compiled."""
    ascent = optax_sam.scale_to_radius(RHO)
    return jax.jit(lambda g: ascent.update(g, ascent.init(g))[0])(grads)


def length(tree: Any) -> float:
    """The norm of a tree, in float64 on the host."""
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return float(np.linalg.norm(np.concatenate(leaves)))


def length_error(dtype: Any, size: float) -> float:
    """Relative error of the length of `epsilon`, for gradients of this size."""
    rng = np.random.default_rng(0)
    shape = (64, 64)
    grads = size * rng.uniform(0.5, 1.0, shape) * rng.choice([-1, 1], shape)
    return abs(length(epsilon(jnp.asarray(grads, dtype))) / RHO - 1)


def scale_error() -> float:
    """What scaling the loss changes in `epsilon`, in entries."""
    grads = problems.quadratic().params

    def changed(scale: float) -> int:
        scaled = jax.tree.map(lambda g: g * scale, grads)
        return differing(epsilon(scaled), epsilon(grads))

    return changed(2.0**-100) + changed(2.0**100)


def trace_of_a_bad_gradient(method: Method, bad: float) -> float:
    """Entries of ascent state and perturbed point that a gradient with `bad` changes.

    Infinite if a good gradient perturbs nothing either.
    """
    points: list[Any] = []

    def grad_fn(params: Any) -> Any:
        points.append(params)
        return params

    problem = problems.perceptron()
    tx, params = method(optax.sgd(0.1), RHO), problem.params
    grads = problems.gradient(problem)
    _, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    spoilt = {**grads, "b1": problems.replaced(grads["b1"], 3, bad)}
    _, after = tx.update(spoilt, state, params, grad_fn=grad_fn)
    if not differing(points[0], params):
        return float("inf")
    changed = differing(after.ascent_state, state.ascent_state)
    return changed + differing(points[1], params)


def largest_deviation(method: str) -> float:
    """Largest difference from the authors' parameters, losses and masks."""
    deviation = trajectories.deviation(method)
    return float(np.max([deviation.params, deviation.losses, deviation.masks]))


def make_checks() -> Iterator[tuple[str, Check]]:
    """All checks by name."""
    partial: Any = functools.partial
    for name in trajectories.METHODS:
        find = partial(largest_deviation, name)
        alone = name in trajectories.DYNAMIC
        yield f"golden: {name}", Check(find, trajectories.TOLERANCE, alone)
    for dtype in (jnp.float32, jnp.bfloat16):
        for name, method in METHODS.items():
            find = partial(differing_from, ADAMW, method(ADAMW, 0.0), dtype)
            yield f"{name}, rho = 0, is the base, {dtype.__name__}", Check(find)
        sam = optax_sam.sam(SGD, RHO)
        for name, method in LIMITS.items():
            find = partial(differing_from, sam, method(SGD, RHO), dtype)
            yield f"{name}, is SAM, {dtype.__name__}", Check(find)
    yield "|eps| is rho, float32", Check(partial(length_error, jnp.float32, 1.0), 1e-6)
    for dtype, size in ((jnp.bfloat16, 1.0), (jnp.float16, 6e4)):
        # Each entry is rounded, up and down alike.
        find = partial(length_error, dtype, size)
        yield f"|eps| is rho, {dtype.__name__} of size {size:g}", Check(find, 1e-3)
    yield "the scale of the loss drops out", Check(scale_error)
    yield "a zero gradient gives 0", Check(lambda: length(epsilon(jnp.zeros(64))))
    for name in ("SAM", "ASAM", "VaSSO"):
        for bad in ("nan", "inf"):
            find = partial(trace_of_a_bad_gradient, METHODS[name], float(bad))
            yield f"{name}: {bad} in a gradient leaves no trace", Check(find)


def chosen(only: Sequence[str]) -> dict[str, Check]:
    """The checks whose names contain one of these, all if there are none."""
    checks = dict(make_checks())
    return {
        name: check
        for name, check in checks.items()
        if not only or any(part in name for part in only)
    }


def run(checks: Mapping[str, Check]) -> dict[str, dict[str, Any]]:
    """Measures all, side by side where that is possible; what raises has failed."""

    def attempt(name: str) -> dict[str, Any]:
        check = checks[name]
        try:
            found = check.find()
        except Exception as error:
            # One that cannot run must not hide the rest.
            return {"error": f"{type(error).__name__}: {error}", "holds": False}
        row = dict(
            zip(FOUND, found if isinstance(found, tuple) else (found,), strict=False)
        )
        holds = bool(row["figure"] <= check.at_most)
        return {**row, "at_most": check.at_most, "holds": holds}

    alone = {name: attempt(name) for name, check in checks.items() if check.alone}
    others = [name for name in checks if name not in alone]
    rows = together([functools.partial(attempt, name) for name in others])
    found = alone | dict(zip(others, rows, strict=True))
    return {name: found[name] for name in checks}


def print_checks(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints each figure beside its bound."""
    device = jax.devices()[0].device_kind
    table = Table("check", title=f"Numerics, on {device}", title_justify="left")
    for header in (*FIGURES, ""):
        table.add_column(header.replace("_", " "), justify="right")
    for name, row in rows.items():
        figures = (f"{row[key]:.2g}" if key in row else "" for key in FIGURES)
        verdict = "" if row["holds"] else row.get("error", "exceeded")
        table.add_row(name, *figures, verdict)
    Console(highlight=False).print(table)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the checks that the command line asks for."""
    options = tyro.cli(Options, args=args)
    measure.check(options)
    rows = run(chosen(options.only))
    print_checks(rows)
    measure.save(options, rows=rows)
    failed = [name for name, row in rows.items() if not row["holds"]]
    if failed:
        print(f"{len(failed)} of {len(rows)} do not hold: {'; '.join(failed)}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
