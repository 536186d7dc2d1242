"""The start of a run: the processes meet, JAX is told its devices, the `Watchdog` is made, all as the flags say."""

from __future__ import annotations

import math
import os
import sys

from paged_dist._errors import require
from paged_dist.cluster.startup import DistributedInfo, initialize_distributed
from paged_dist.cluster.watchdog import Watchdog
from paged_dist.launch.common import host
from paged_dist.launch.common.flag_checks import at_least, at_most
from paged_dist.launch.common.local_processes import MOST_DEVICES
from paged_dist.launch.common.run_program import end_with_error
from paged_dist.launch.common.shared_flags import (
    BIND_ADDRESS,
    COORDINATOR,
    CPU_DEVICES,
    IMPLEMENTATION,
    NUM_PROCESSES,
    PHASE_TIMEOUT_SECONDS,
    PROCESS_ID,
    START_TIMEOUT_SECONDS,
    TIMEOUT_SECONDS,
)


def _environment_int(name: str) -> int | None:
    """The whole number in an environment variable; None where it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    require(text.isdecimal(), f"${name}", text, "must be a whole number")
    return int(text)


def start_jax(name: str) -> DistributedInfo:
    """Starts JAX as the flags and the environment say: first the other processes, then simulated devices.

    Call it once, before anything that looks at devices. Where the other processes do not come, it says so and ends
    this one with exit code 1.

    Returns:
      Which process this is, of how many.

    Raises:
      ValueError: --cpu_devices below 1 or above 1024, pallas_interpret in several processes, a time-out that is no
        positive number, or coordinator flags of which some are missing or wrong.
    """
    at_least(1, cpu_devices=CPU_DEVICES.value)
    at_most(MOST_DEVICES, cpu_devices=CPU_DEVICES.value)
    timeout, start_timeout = TIMEOUT_SECONDS.value, START_TIMEOUT_SECONDS.value
    for flag in (TIMEOUT_SECONDS, START_TIMEOUT_SECONDS, PHASE_TIMEOUT_SECONDS):
        timely = flag.value is None or 0 < flag.value < math.inf
        require(timely, f"--{flag.name}", flag.value, "must be above 0 and finite")
    place, told_by = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value), "flags"
    if place == (None, None, None) and "JAX_NUM_PROCESSES" in os.environ and "JAX_PROCESS_ID" in os.environ:
        told_by = "environment"
        place = (
            os.environ.get("JAX_COORDINATOR_ADDRESS"),
            _environment_int("JAX_NUM_PROCESSES"),
            _environment_int("JAX_PROCESS_ID"),
        )
    if place != (None, None, None):
        _keep_stdout_to_ourselves()
        _refuse_simulated_kernels(place[1])
    host.choose_platform()
    try:
        info = initialize_distributed(
            *place,
            bind_address=BIND_ADDRESS.value,
            timeout_seconds=timeout if start_timeout is None else start_timeout,
            silence_timeout_seconds=timeout,
        )
    except RuntimeError as e:
        end_with_error(name, str(e), 1)
    if info.num_processes > 1:
        if place == (None, None, None):
            _keep_stdout_to_ourselves()
            _refuse_simulated_kernels(info.num_processes)
        how = f"told by {told_by}" if info.how == "explicit" else f"detected: {info.how.partition(':')[2]}"
        print(
            f"{name}: process {info.process_id} of {info.num_processes} (pid {os.getpid()}), coordinator "
            f"{info.coordinator_address}, {how}",
            file=sys.stderr,
            flush=True,
        )
    if IMPLEMENTATION.value == "pallas_interpret":  # each simulated device waits on a thread of its own
        os.environ.setdefault("PJRT_NPROC", str(max(8, 2 * (CPU_DEVICES.value or 8))))
    host.simulate_devices(CPU_DEVICES.value, place != (None, None, None) or info.num_processes > 1)
    return info


def watchdog(name: str) -> Watchdog:
    """The `paged_dist.Watchdog` of this run, as the flags say; a context, entered after `start_jax`."""
    return Watchdog(
        TIMEOUT_SECONDS.value,
        name=name,
        start_timeout_seconds=START_TIMEOUT_SECONDS.value,
        phase_timeout_seconds=PHASE_TIMEOUT_SECONDS.value,
    )


def _refuse_simulated_kernels(num_processes: int | None) -> None:
    """Raises ValueError where --implementation is pallas_interpret in several processes.

    The simulation waits for every device of the mesh at once: forever for those of another process.
    """
    interpreted = IMPLEMENTATION.value == "pallas_interpret"
    require(
        not interpreted or num_processes in (None, 1),
        "--implementation",
        "pallas_interpret",
        "runs in one process only",
        "use xla",
    )


def _keep_stdout_to_ourselves() -> None:
    """Sends what native code writes to file descriptor 1 to stderr; Python's stdout stays what it was.

    gloo reports each connection on file descriptor 1, in pieces that fall into the middle of a table's lines.
    """
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
