"""How a script joins the other processes of a training, on this machine or others."""

import dataclasses
from typing import Annotated

import jax
import tyro

from sam_examples.devices.sharding import simulate_devices
from sam_examples.settings.command_line import require

Int = Annotated[int | None, tyro.conf.arg(metavar="INT")]


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """The options of a script that is started once for each process."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Where the first process listens, and all others find it."""
    num_processes: Int = None
    """How many processes there are."""
    process_id: Int = None
    """Which of them this is, from 0."""
    cluster: bool = False
    """Whether JAX shall find the processes in the environment, such as Slurm's."""
    devices_per_process: Int = None
    """Simulated CPU devices of each process; by default there is what there is."""


def check_processes(options: ProcessOptions) -> None:
    """Raises a ValueError unless the options say where all processes are, or none."""
    given = (options.coordinator, options.num_processes, options.process_id)
    address, count, index = given
    devices = options.devices_per_process
    require(
        devices is None or devices >= 1,
        "--devices-per-process must be at least 1",
        devices,
    )
    if address is None or count is None or index is None:
        names = "--coordinator, --num-processes and --process-id"
        require(given == (None, None, None), f"{names} go together", given)
        return
    require(not options.cluster, "--cluster needs no --coordinator", address)
    host, _, port = address.rpartition(":")
    require(bool(host) and port.isdecimal(), "--coordinator must be HOST:PORT", address)
    require(count >= 1, "--num-processes must be at least 1", count)
    require(0 <= index < count, f"--process-id must be from 0 to {count - 1}", index)


def start(options: ProcessOptions) -> None:
    """Joins the other processes. Nothing may have asked JAX for its devices before."""
    if options.devices_per_process is not None:
        simulate_devices(options.devices_per_process)
    if options.cluster:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                "--cluster: JAX knows no such environment; give --coordinator, "
                f"--num-processes and --process-id instead ({error})"
            ) from error
    elif options.coordinator is not None:
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            # The default is to listen on all of the machine's addresses.
            coordinator_bind_address=(
                options.coordinator if options.process_id == 0 else None
            ),
        )
