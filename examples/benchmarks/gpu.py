"""Everything that a GPU is wanted for, in one command and in minutes."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.settings.command_line import one_line_errors, require, write_json

HERE = Path(__file__).parent
STUDY = HERE.parent / "study" / "cifar10.py"
DTYPES = {"bfloat16": 0.4, "float32": 0.25}  # And what is left after them.
# Two programs that compute the same agree to the last bit only if XLA gives both the
# same kernels, and not those that it finds fastest in each.
FIXED_KERNELS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
BITS = '--only "is the base" "is SAM"'
LAST_SECONDS = 10.0  # Of the study, in which nothing new is begun.


@dataclasses.dataclass(frozen=True)
class Options:
    """Checks the numerics, times every method and adds runs to the study.

    Each part is a program of its own, which is stopped when the minutes are over. What
    it finds is written as it ends, a part to a file: numerics.json,
    numerics-fixed-kernels.json, throughput-bfloat16.json, throughput-float32.json and
    the runs; what became of the parts is in gpu.json.
    """

    out: Path
    """Directory of all but the runs."""
    data_dir: Path | None = None
    """Where CIFAR-10 is, for the study; without it there are no runs."""
    minutes: float = 8.0
    """What all parts take at most, together."""
    runs: Path | None = None
    """Directory of the runs; by default that of the study."""
    numerics: str = ""
    """Further arguments of numerics.py, such as "--only golden"."""
    throughput: str = "--rounds 10"
    """Further arguments of throughput.py."""
    study: str = ""
    """Further arguments of study/cifar10.py full."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A program, and what is left of the minutes when it has to end.

    Attributes:
      name: what it is called in gpu.json.
      arguments: the script and its arguments.
      reserve: share of all minutes that later parts are sure to have.
      xla_flags: added to those of the environment.
      is_told: whether it is told when to end, by --minutes.
    """

    name: str
    arguments: Sequence[str]
    reserve: float
    xla_flags: str = ""
    is_told: bool = False


def make_parts(options: Options) -> Iterator[Part]:
    """The parts in order; the study takes what time is left."""

    def script(name: str, further: str, *arguments: object) -> Sequence[str]:
        return (name, *map(str, arguments), *shlex.split(further))

    path = options.out / "numerics.json"
    arguments = script("numerics.py", options.numerics, "--json", path)
    yield Part("numerics", arguments, reserve=0.7)
    path = options.out / "numerics-fixed-kernels.json"
    arguments = script("numerics.py", options.numerics or BITS, "--json", path)
    yield Part("numerics, fixed kernels", arguments, 0.6, FIXED_KERNELS)
    for dtype, reserve in DTYPES.items():
        path = options.out / f"throughput-{dtype}.json"
        arguments = script(
            "throughput.py", options.throughput, "--dtype", dtype, "--json", path
        )
        yield Part(f"throughput, {dtype}", arguments, reserve)
    if options.data_dir is not None:
        out = () if options.runs is None else ("--out", options.runs)
        arguments = script(
            str(STUDY), options.study, "full", "--data-dir", options.data_dir, *out
        )
        yield Part("study", arguments, reserve=0.0, is_told=True)


def run(options: Options) -> list[dict[str, Any]]:
    """Runs all parts; returns what became of each."""
    end = time.monotonic() + 60 * options.minutes
    parts: list[dict[str, Any]] = []
    for part in make_parts(options):
        seconds = end - time.monotonic() - 60 * options.minutes * part.reserve
        outcome, taken = run_part(part, seconds)
        parts.append({"part": part.name, "outcome": outcome, "seconds": taken})
        print(f"{part.name}: {outcome}, {taken:.0f} s", flush=True)
        write_json(options.out / "gpu.json", {"card": describe_card(), "parts": parts})
    return parts


def run_part(part: Part, seconds: float) -> tuple[str, float]:
    """Runs a program for at most so long; returns what became of it, and its time."""
    script, *arguments = part.arguments
    command = [sys.executable, str(HERE / script), *arguments]
    if part.is_told:
        # It ends by itself, with a table, before it is stopped.
        command += ["--minutes", str(max(0.0, seconds - LAST_SECONDS) / 60)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {part.xla_flags}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags}
    start = time.monotonic()
    try:
        status = subprocess.run(
            command, env=environment, timeout=max(seconds, 0.0)
        ).returncode
        outcome = f"status {status}" if status else "done"
    except subprocess.TimeoutExpired:
        outcome = "out of time"
    return outcome, time.monotonic() - start


def describe_card() -> str | None:
    """Name and driver of NVIDIA's cards, as their own tool tells them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def main(args: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        require(options.minutes > 0, "--minutes must be above 0", options.minutes)
        options.out.mkdir(parents=True, exist_ok=True)
    parts = run(options)
    failed = [part["part"] for part in parts if part["outcome"] != "done"]
    print(json.dumps({"parts": len(parts), "not done": failed}))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
