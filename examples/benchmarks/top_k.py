"""Exact top-k masks of a tree of scores, next to concatenating and `lax.top_k`."""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import optax_sam

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import measure
from sam_examples.models.resnet import ResNet
from sam_examples.settings.command_line import one_line_errors

SPARSITY = 0.5
Pattern = Callable[[chex.ArrayTree], chex.ArrayTree]


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures `unstructured(0.5)`: its time, its temporary memory and its masks.

    Times are taken in turns, one call of each row in each round, and compared round by
    round with those of `lax.top_k` on the concatenated scores; medians are shown.
    """

    width: int = 64
    """Width of the ResNet-18 whose tensors are scored; 64 makes 11 million scores."""
    rounds: int = 3
    """Timed rounds."""
    json: Path | None = None
    """File for all figures."""


def concatenated(scores: chex.ArrayTree) -> chex.ArrayTree:
    """The same masks by `jax.lax.top_k`, of equals the earlier as well."""
    leaves, structure = jax.tree.flatten(scores)
    flat = jnp.concatenate([x.ravel() for x in leaves])
    _, indices = jax.lax.top_k(flat, int(flat.size * (1 - SPARSITY)))
    mask = jnp.zeros(flat.shape, bool).at[indices].set(True)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    parts = jnp.split(mask, ends)
    return jax.tree.unflatten(
        structure, [m.reshape(x.shape) for m, x in zip(parts, leaves, strict=True)]
    )


# The library's own, and what it is measured against.
EXACT, NAIVE = "unstructured", "lax.top_k"
PATTERNS: Mapping[str, Pattern] = {
    NAIVE: concatenated,
    EXACT: optax_sam.unstructured(SPARSITY),
}


def make_scores(width: int) -> dict[str, chex.ArrayTree]:
    """Squares of normal variables in the shapes of ResNet-18; with and without ties."""
    model = ResNet((2, 2, 2, 2), num_classes=10, width=width)
    images = jnp.zeros([1, 32, 32, 3])
    init = partial(model.init, jax.random.key(0), images, train=False)
    shapes = jax.eval_shape(init)["params"]
    rng = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape) ** 2, jnp.float32), shapes
    )
    ties = jax.tree.map(lambda x: jnp.round(8 * x) / 8, tree)
    one = jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    return {
        "ResNet-18": tree,
        "ResNet-18, ties": ties,
        "one tensor": one,
        "one tensor, ties": jnp.round(8 * one) / 8,
    }


class Compiled(NamedTuple):
    """A compiled pattern, its scores and the memory it takes."""

    run: Any
    scores: chex.ArrayTree
    temp_bytes: int


def compile_pattern(pattern: Pattern, scores: chex.ArrayTree) -> Compiled:
    """Compiles a pattern for scores, which may be shapes only."""
    compiled: Any = jax.jit(pattern).lower(scores).compile()
    return Compiled(compiled, scores, compiled.memory_analysis().temp_size_in_bytes)


def count_differences(a: chex.ArrayTree, b: chex.ArrayTree) -> int:
    """In how many entries two trees of masks differ."""
    differences = jax.tree.map(lambda x, y: int(jnp.sum(x != y)), a, b)
    return sum(jax.tree.leaves(differences))


def measure_masks(scores: chex.ArrayTree, rounds: int) -> dict[str, dict[str, float]]:
    """The figures of both patterns on one tree of scores."""
    compiled = {name: compile_pattern(p, scores) for name, p in PATTERNS.items()}

    def turn(pattern: Compiled) -> float:
        return measure.timed(pattern.run, scores)[1]

    turns = {name: partial(turn, pattern) for name, pattern in compiled.items()}
    seconds = measure.in_turns(turns, rounds, warm_up=1)
    expected = compiled[NAIVE].run(scores)
    num_bytes = measure.num_bytes(scores)
    return {
        name: {
            "seconds": float(np.median(seconds[name])),
            "ms_per_call": 1e3 * float(np.median(seconds[name])),
            "time_of_top_k_over_time": measure.time_ratio(seconds, NAIVE, name),
            "temp_bytes": pattern.temp_bytes,
            "temp_over_scores": pattern.temp_bytes / num_bytes,
            "wrong_over_all": count_differences(pattern.run(scores), expected)
            / sum(x.size for x in jax.tree.leaves(scores)),
        }
        for name, pattern in compiled.items()
    }


def main(args: Sequence[str] | None = None) -> None:
    """Runs the measurement that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        measure.check(options, "width", "rounds")
    rows = {
        f"{case}: {name}": row
        for case, scores in make_scores(options.width).items()
        for name, row in measure_masks(scores, options.rounds).items()
    }
    title = f"Masks of half the scores, {os.cpu_count()} cores"
    measure.print_table(rows, title, first="scores: by")
    measure.save(options, rows=rows)


if __name__ == "__main__":
    main()
