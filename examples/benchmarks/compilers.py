"""What the compilers for TPUs and GPUs make of a training step, without having either.

Compiled from shapes and never run: what is counted is exact, and nothing is timed.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import optax
import tyro

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import measure, steps
from sam_examples.benchmarking.problems import (
    NETWORKS,
    Case,
    Placement,
    choose,
    make_case,
)
from sam_examples.benchmarking.sharded import bytes_on_a_device, compile_step
from sam_examples.benchmarking.topologies import (
    Compiler,
    DoesNotFitError,
    Platform,
    describe,
    figures,
    memory_errors,
)
from sam_examples.settings.command_line import (
    Int,
    one_line_errors,
    require,
    versions,
    write_json,
)

BASES: Mapping[str, steps.Base] = {"sgd": measure.BASE, "adamw": optax.adamw(1e-3)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles training steps for TPUs or GPUs on a machine that has none.

    Each method is a row: the base alone, methods written out by hand, and those of the
    library. It is printed, and written to the file of --json, as soon as it is known.
    All figures are the compiler's, of one device; nothing is run.
    """

    platform: Platform = "tpu"
    """Whose compiler; tpu needs the extra tpu, cuda jax[cuda12] (5.6 GB)."""
    topology: str = "v5e:2x2"
    """A TPU's topology such as v5e:2x4, or slices x hosts x GPUs such as 1x1x8."""
    target: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Description of the GPU, as those in XLA's repository, see the README."""
    devices: Int = None
    """How many of the topology's devices share the work; all by default."""
    problem: Annotated[
        str, tyro.conf.arg(help=f"The network, out of {', '.join(NETWORKS)}.")
    ] = "matrices"
    layout: Placement | None = None
    """Sharded arrays, whole copies or parts of them, or a program for each device; by
    default jit, and fully_sharded for the transformer."""
    base: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    methods: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="METHOD ...")] = (
        None
    )
    """Rows; all by default. What they are compared with should be among them."""
    batch_size: Int = None
    """Examples of each device, in place of the network's own number."""
    layers: Int = None
    """Number of layers, where there is a choice."""
    width: Int = None
    """Inputs and outputs of a layer, where there is a choice."""
    image_size: Int = None
    """Height and width of images."""
    json: Path | None = None
    """File for all figures."""


def measure_method(
    case: Case, compiler: Compiler, method: steps.Method, base: steps.Base
) -> Any:
    """The figures of a row, in bytes on each device.

    Raises:
      DoesNotFitError: if the step wants more memory than a device has.
    """
    tx, update = method.make(case, base)
    with memory_errors():
        step = compile_step(
            case.problem,
            tx,
            update,
            count=method.at,
            compiler_options=compiler.options,
        )
    return {
        "param_bytes": bytes_on_a_device(case.problem.params),
        "state_bytes": bytes_on_a_device(step.opt_state),
        **figures(step.compiled),
        "compile_seconds": step.seconds,
    }


# The columns of the table: a figure of `compare`, and how it is written.
COLUMNS: Mapping[str, str] = {
    "FLOPs / base": ".3f",
    "bytes / base": ".3f",
    "bytes / hand": ".3f",
    "temp / params": ".2f",
    "temp - hand": "+.2f",
    "peak / params": ".2f",
    "state / params": ".2f",
    "fusions": ".0f",
    "convs": ".0f",
    "colls": ".0f",
    "sent / params": ".2f",
    "refresh / params": ".2f",
    "compile s": ".0f",
}


def compare(
    row: Mapping[str, float],
    base: Mapping[str, float],
    by_hand: Mapping[str, float],
) -> dict[str, float]:
    """What the table shows of a row, without what there is nothing to say of.

    Args:
      row: its figures.
      base: those of the base alone, empty if not measured.
      by_hand: those of the same method by hand, likewise.
    """
    params = row["param_bytes"]
    shown = {
        "temp / params": row["temp_bytes"] / params,
        "peak / params": row["peak_bytes"] / params,
        "state / params": row["state_bytes"] / params,
        "fusions": row["fusions"],
        "convs": row["convolutions"],
        "colls": row["collectives"],
        "sent / params": row["sent_bytes"] / params,
        "refresh / params": row["refresh_bytes"] / params,
        "compile s": row["compile_seconds"],
    }
    for name, key in (("FLOPs", "flops"), ("bytes", "bytes_accessed")):
        for label, other in (("base", base), ("hand", by_hand)):
            if key in row and key in other:
                shown[f"{name} / {label}"] = row[key] / other[key]
    if by_hand:
        shown["temp - hand"] = (row["temp_bytes"] - by_hand["temp_bytes"]) / params
    return shown


def print_row(name: str, cells: Mapping[str, str]) -> None:
    """Prints a row of the table, in Markdown, at once."""
    shown = (cells.get(column, "").rjust(len(column)) for column in COLUMNS)
    print("|", " | ".join((name.ljust(20), *shown)), "|", flush=True)


def print_header(title: str) -> None:
    """Prints what stands above the rows."""
    print(title, end="\n\n")
    print_row("step", {column: column for column in COLUMNS})
    rules = ("-" * (len(column) - 1) + ":" for column in COLUMNS)
    print("|", " | ".join(("-" * 20, *rules)), "|", flush=True)


def save(path: Path | None, content: Mapping[str, Any]) -> None:
    """Writes the file anew, so that there is a whole one at any time."""
    if path is not None:
        new = path.with_name(f"{path.name}.new")
        write_json(new, content)
        new.replace(path)


def make(options: Options) -> tuple[Compiler, Case, list[str]]:
    """The compiler, the case to compile for it, and the names of the rows."""
    measure.check(options)
    require(
        options.problem in NETWORKS,
        f"--problem must be one of {', '.join(NETWORKS)}",
        options.problem,
    )
    compiler = describe(
        options.platform, options.topology, options.target, options.devices
    )
    given = ("batch_size", "layers", "width", "image_size")
    sizes = choose(options.problem, **{name: getattr(options, name) for name in given})
    layout = options.layout or NETWORKS[options.problem].layout
    case = make_case(
        options.problem,
        sizes,
        compiler.mesh,
        layout,
    )
    known = steps.names(case)
    for name in options.methods or ():
        require(name in known, f"--methods must be of {', '.join(known)}", name)
    return compiler, case, list(options.methods or known)


def measure_all(
    options: Options, compiler: Compiler, case: Case, names: Sequence[str]
) -> list[str]:
    """Prints and writes row by row; returns what did not fit."""
    about = {
        "settings": dataclasses.asdict(options),
        "versions": versions() | dict(compiler.packages),
        "device": compiler.mesh.devices.flat[0].device_kind,
    }
    rows: dict[str, dict[str, float]] = {}
    errors: dict[str, str] = {}
    for name in names:
        method = steps.METHODS[name]
        try:
            row = measure_method(case, compiler, method, BASES[options.base])
        except DoesNotFitError as error:
            errors[name] = str(error)
            print_row(name, {})
        else:
            base = row if name == steps.BASE else rows.get(steps.BASE, {})
            shown = compare(row, base, rows.get(method.by_hand or "", {}))
            rows[name] = row | shown
            written = {
                key: format(shown[key], COLUMNS[key]) for key in shown if key in COLUMNS
            }
            print_row(name, written)
        save(options.json, about | {"rows": rows, "errors": errors})
    return [f"{name} does not fit: {error}" for name, error in errors.items()]


def main(args: Sequence[str] | None = None) -> None:
    """Compiles what the command line asks for."""
    options = tyro.cli(Options, args=args)
    with suppress(RuntimeError):  # Raised if there are devices already.
        update_config: Any = jax.config.update
        update_config("jax_platforms", "cpu")
    with one_line_errors():
        compiler, case, names = make(options)
    device = compiler.mesh.devices.flat[0].device_kind
    num_weights = sum(x.size for x in jax.tree.leaves(case.problem.params))
    print_header(
        f"{options.problem}, {num_weights:,} parameters, {options.base}, on "
        f"{compiler.mesh.size} of {options.topology} ({device}), {case.problem.layout}"
    )
    errors = measure_all(options, compiler, case, names)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
