"""Compilers for TPUs and GPUs, asked on a machine that has neither.

The devices are descriptions: a program for them can be compiled and read, not run.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from sam_examples.benchmarking.collectives import instructions, traffic
from sam_examples.devices.sharding import AXIS
from sam_examples.settings.command_line import require

Platform = Literal["tpu", "cuda"]

# libtpu reads these when it is loaded. Without them it asks a server of Google's cloud
# what it runs on, and refuses to be loaded by two processes.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Without a GPU nothing can be timed, and kernels of Triton are chosen by time.
_CUDA_OPTIONS: Mapping[str, str | bool | int] = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
}
_CUDA_PLUGIN = "jax_cuda12_plugin"
_TPU_EXAMPLES = "v5e:2x4, v6e:4x4 or v5p:2x2x1"
_CUDA_EXAMPLES = "1x1x8: slices, hosts of each, GPUs of each host"

_CUDA_TARGETS = (
    "https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs"
)

_FUSION = re.compile(r" fusion\(")
_CONVOLUTION = re.compile(r' convolution\(|custom_call_target="__cudnn\$conv')


class Compiler(NamedTuple):
    """A compiler and the devices it compiles for.

    Attributes:
      mesh: the devices, along one axis.
      options: what it has to be told at each compilation.
      packages: the version of its package, by name.
    """

    mesh: Mesh
    options: Mapping[str, str | bool | int]
    packages: Mapping[str, str]


class DoesNotFitError(Exception):
    """A program wants more memory than a device has; the text is the compiler's."""


def describe(
    platform: Platform,
    topology: str,
    target: Path | None = None,
    num_devices: int | None = None,
) -> Compiler:
    """Finds the compiler for devices that are not there.

    JAX itself must be kept to the CPU, before it is asked for its devices.

    Args:
      platform: "tpu" or "cuda".
      topology: the name of a TPU's topology, or the shape of one of GPUs.
      target: a file that describes the GPU.
      num_devices: how many of the devices to take; by default all.

    Raises:
      ValueError: if the package is missing, or there is no such topology.
      OSError: if the description cannot be read.
    """
    make = {"tpu": _tpu_devices, "cuda": _cuda_devices}[platform]
    devices = make(topology, target)[:num_devices]
    require(
        num_devices is None or len(devices) == num_devices >= 1,
        f"--devices must be from 1 to the {len(devices)} of {topology}",
        num_devices,
    )
    mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    if platform == "tpu":
        return Compiler(mesh, {}, {"libtpu": version("libtpu")})
    return Compiler(mesh, _CUDA_OPTIONS, {_CUDA_PLUGIN: version(_CUDA_PLUGIN)})


def _tpu_devices(topology: str, target: Path | None) -> Any:
    require(target is None, "--target describes a GPU; leave it out for a TPU", target)
    if find_spec("libtpu") is None:
        raise ValueError(
            "--platform tpu needs the package libtpu, which is not there; "
            "pip install -e '.[tpu]'."
        )
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    # Two cores of a v4 are one device, as in JAX by default.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    return _devices("tpu", topology, _TPU_EXAMPLES, topology_name=topology, **options)


def _cuda_devices(topology: str, target: Path | None) -> Any:
    if find_spec(_CUDA_PLUGIN) is None:
        raise ValueError(
            f"--platform cuda needs the package {_CUDA_PLUGIN}, which is not there; "
            f"pip install 'jax[cuda12]=={jax.__version__}' (5.6 GB)."
        )
    if target is None:
        raise ValueError(
            "--platform cuda needs --target FILE, the description of a GPU; XLA has "
            f"some in {_CUDA_TARGETS}."
        )
    return _devices(
        "cuda",
        f"{topology} with --target {target}",
        _CUDA_EXAMPLES,
        topology_name="gpu",
        topology=topology,
        target_config=target.read_text(),
    )


def _devices(platform: str, asked: str, examples: str, **options: Any) -> Any:
    describe_topology: Any = topologies.get_topology_desc
    try:
        return describe_topology(platform=platform, **options).devices
    except Exception as error:  # Of several types, from several layers.
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the compiler of {platform} has no --topology {asked}: {reason}; write "
            f"for example {examples}."
        ) from error


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns the compiler's error that memory is too small into `DoesNotFitError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        code, _, text = str(error).partition(": ")
        if code != "RESOURCE_EXHAUSTED":
            raise
        raise DoesNotFitError(text.partition("\n")[0]) from error


def figures(compiled: Any) -> dict[str, float]:
    """What the compiler says of a program, of one device.

    FLOPs and bytes accessed are missing where it does not count them. Fusions are those
    of every step; loops count as often as they run. On a TPU matrix products are
    convolutions too, and so are counted.
    """
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    text = compiled.as_text()
    sent = traffic(compiled)
    counted = {"flops": "flops", "bytes_accessed": "bytes accessed"}
    return {
        **{name: cost[key] for name, key in counted.items() if key in cost},
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "fusions": _count(text, _FUSION, within_fusions=False),
        "convolutions": _count(text, _CONVOLUTION, within_fusions=True),
        "collectives": sent.number,
        **{f"{kind}_bytes": size for kind, size in sent.always.items()},
        "sent_bytes": sent.always.total(),
        "refresh_bytes": sent.sometimes.total(),
    }


def _count(text: str, pattern: re.Pattern[str], *, within_fusions: bool) -> int:
    """How often instructions are executed in every step."""
    executed = instructions(text, within_fusions=within_fusions)
    return sum(
        times
        for line, times, conditional in executed
        if not conditional and pattern.search(line)
    )
