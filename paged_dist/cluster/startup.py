"""Start-up of several processes as one JAX program: from explicit arguments, a detected cluster, or none at all.

JAX's own `jax.distributed.initialize` ends the process (an abort, not an exception) when the others do not come in
time. So the processes first meet over a plain TCP connection to the coordinator (`meeting`). There a time-out, two
processes with one id, or a disagreement about their number is a Python error that names who is missing. JAX's start-up
begins when all are there, on the same address.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import socket
import time
from collections.abc import Sequence

import jax
from absl import logging

from paged_dist._compat import backends_are_initialized, detect_cluster
from paged_dist._errors import bad_value, require
from paged_dist.cluster.addresses import is_loopback, split_address
from paged_dist.cluster.distributed_info import DistributedInfo, coordinator_of
from paged_dist.cluster.meeting import await_others, join
from paged_dist.cluster.wire import wait_for_end


@dataclasses.dataclass(frozen=True)
class _StartRequest:
    """The arguments of `initialize_distributed` that a second call must repeat."""

    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    local_device_ids: tuple[int, ...] | None
    bind_address: str | None


_done: tuple[_StartRequest, DistributedInfo] | None = None
_peers: dict[int, socket.socket] = {}  # the meeting's connections: process 0's to all others, or one to process 0


def initialize_distributed(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: int | Sequence[int] | None = None,
    bind_address: str | None = None,
    timeout_seconds: float = 60,
    silence_timeout_seconds: float | None = None,
) -> DistributedInfo:
    """Makes this process one of several that run a JAX program together; call it before any JAX computation.

    Give the first three arguments, or none of them: JAX's cluster detection then finds them (Cloud TPU VM, GKE, Slurm,
    Open MPI, Kubernetes). Where it finds no cluster, this is the only process: nothing is started and no network is
    touched. A second call with the same arguments returns the same answer.

    Args:
      coordinator_address: host:port on which process 0 listens and that the others can reach; the same in all.
      num_processes: how many processes there are.
      process_id: which one this is, 0 to num_processes - 1.
      local_device_ids: which of this host's GPUs the process sees; None: all. No effect on CPU, TPU, or where
        there is one process without a coordinator.
      bind_address: host:port on which process 0 listens, if not on every interface at the coordinator's port. For a
        loopback coordinator_address the default is that address. The environment variable
        JAX_COORDINATOR_BIND_ADDRESS comes between the two.
      timeout_seconds: how long to wait until all processes are there: some may still be booting.
      silence_timeout_seconds: how long a process may be silent after that; give the timeout_seconds of the `Watchdog`.
        JAX's own runtime then waits longer for a sign of life, so that the Watchdog comes first, and waits so long for
        the others when a process ends. None: timeout_seconds.

    Raises:
      ValueError: an argument outside its range, or some but not all of the first three.
      RuntimeError: JAX's back ends are running already; a second call with other arguments; the processes did
        not all come within `timeout_seconds`, or disagree about who they are.

    Example:
      The same line on every host of a cluster; a program of one process has nothing to change either.

      >>> info = pd.initialize_distributed()
      >>> info.process_id, info.num_processes, info.how
      (0, 1, 'single')

      Where there is no cluster that JAX knows, the second of two hosts says
      `pd.initialize_distributed("10.0.0.1:8476", num_processes=2, process_id=1)`.
    """
    global _done, _peers
    request = _checked_request(coordinator_address, num_processes, process_id, local_device_ids, bind_address)
    check_seconds("timeout_seconds", timeout_seconds)
    silence = timeout_seconds if silence_timeout_seconds is None else silence_timeout_seconds
    check_seconds("silence_timeout_seconds", silence)
    if _done is not None:
        if _done[0] == request:
            return _done[1]
        raise RuntimeError(
            f"initialize_distributed was called already, with {_done[0]}; a process is initialised "
            f"once, it cannot change to {request}"
        )
    if jax.distributed.is_initialized():
        raise RuntimeError("jax.distributed is initialised already, not by initialize_distributed: call one of the two")
    info = _find_this_process(request, timeout_seconds)
    if info.how == "explicit" or info.num_processes > 1:
        _peers = _start_distributed(info, request, timeout_seconds, silence)
    logging.info(
        "distributed: process %d of %d, coordinator %s, %s",
        info.process_id,
        info.num_processes,
        info.coordinator_address or "none",
        info.how,
    )
    _done = (request, info)
    return info


def peers() -> tuple[int, int, dict[int, socket.socket]]:
    """(process id, number of processes, connections by process id) as `initialize_distributed` left them.

    Process 0 is connected to all others, each of these to process 0. Before it was called: one process, no connection.
    """
    if _done is None:
        return 0, 1, {}
    return _done[1].process_id, _done[1].num_processes, _peers


def wait_for_others_to_end(seconds: float) -> None:
    """On process 0: waits until all other processes have ended, `seconds` at most; nothing on the others.

    JAX's coordinator ends with process 0, and aborts those that are still there.
    """
    until = time.monotonic() + seconds
    if _done is not None and _done[1].process_id == 0:
        for peer in _peers.values():
            wait_for_end(peer, until)


def _checked_request(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    local_device_ids: int | Sequence[int] | None,
    bind_address: str | None,
) -> _StartRequest:
    """The arguments of `initialize_distributed` as one value; raises ValueError where one is out of range."""
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise bad_value(
            missing[0],
            None,
            f"is missing, while {', '.join(n for n in given if n not in missing)} is given",
            "give all three, or none to have the cluster detected",
        )
    for name in ("num_processes", "process_id"):
        whole = isinstance(given[name], numbers.Integral) and not isinstance(given[name], bool)
        require(given[name] is None or whole, name, given[name], "must be an integer")
    if coordinator_address is not None and num_processes is not None and process_id is not None:
        split_address("coordinator_address", coordinator_address)
        require(num_processes >= 1, "num_processes", num_processes, "must be at least 1")
        require(
            0 <= process_id < num_processes,
            "process_id",
            process_id,
            f"must be from 0 to num_processes - 1 = {num_processes - 1}",
        )
        num_processes, process_id = int(num_processes), int(process_id)
    if bind_address is not None:
        split_address("bind_address", bind_address)
    devices = None
    if isinstance(local_device_ids, (int, numbers.Integral)):
        devices = (int(local_device_ids),)
    elif local_device_ids is not None:
        devices = tuple(map(int, local_device_ids))
        rule = "must be one or more device numbers from 0"
        require(min(devices, default=-1) >= 0, "local_device_ids", devices, rule)
    return _StartRequest(coordinator_address, num_processes, process_id, devices, bind_address)


def check_seconds(argument: str, seconds: float, endless: bool = False) -> None:
    """Raises ValueError where `seconds` is no time-out; infinity is one where it may be `endless`."""
    number = isinstance(seconds, numbers.Real) and not isinstance(seconds, bool)
    timely = number and (0 < seconds < math.inf or (endless and seconds == math.inf))
    require(timely, argument, seconds, f"must be a positive number of seconds{', or math.inf' if endless else ''}")


def _find_this_process(request: _StartRequest, timeout_seconds: float) -> DistributedInfo:
    """Which process this is: from the request, or from the cluster that JAX detects."""
    if request.num_processes is not None and request.process_id is not None:
        return DistributedInfo(request.process_id, request.num_processes, request.coordinator_address, "explicit")
    try:
        found = detect_cluster(timeout_seconds)
    except Exception as e:
        raise RuntimeError(
            f"a cluster was detected, but not this process's place in it: {e!r:.300}; give "
            "coordinator_address, num_processes and process_id"
        ) from e
    if found is None:
        if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
            raise RuntimeError(
                f"JAX_COORDINATOR_ADDRESS={address} is set, but no cluster was detected that would say "
                "which process this is: give coordinator_address, num_processes and process_id"
            )
        return DistributedInfo(0, 1, None, "single")
    name, address, num_processes, process_id = found
    return DistributedInfo(process_id, num_processes, address if num_processes > 1 else None, f"detected:{name}")


def _start_distributed(
    info: DistributedInfo, request: _StartRequest, timeout_seconds: float, silence: float
) -> dict[int, socket.socket]:
    """Waits until all processes are there, then starts JAX's distributed runtime.

    Returns:
      The connections of the meeting by process id, which stay open: process 0's to all others, or one to process 0.
    """
    if backends_are_initialized():
        raise RuntimeError(
            "initialize_distributed() must be called before any JAX computation: a back end is running "
            "already (jax.devices(), jnp.zeros() and device_put start it too)"
        )
    # pyrefly: ignore[missing-attribute]  # jax gives its options to `config` as attributes when it is imported
    if jax.config.jax_cpu_collectives_implementation is None:
        # Without one, CPU back ends refuse a program over several processes. gloo is JAX's default, not a must.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    coordinator = coordinator_of(info)
    host, port = split_address("coordinator_address", coordinator)
    bind = request.bind_address or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    if bind is None:
        bind = coordinator if is_loopback(host) else f"[::]:{port}"
    deadline = time.monotonic() + timeout_seconds
    is_first = info.process_id == 0
    connections = await_others(bind, info, deadline) if is_first else {0: join(host, port, info, deadline)}
    # Where the arguments are explicit, JAX's detection would still look for local_device_ids, over the network on a
    # cloud VM. Where a cluster was detected it is left on: under Slurm and Open MPI it gives each process its GPU.
    detection = "deactivate" if info.how == "explicit" else None
    local = None if request.local_device_ids is None else list(request.local_device_ids)
    try:
        jax.distributed.initialize(
            info.coordinator_address,
            info.num_processes,
            info.process_id,
            local_device_ids=local,
            initialization_timeout=max(5, math.ceil(deadline - time.monotonic())),
            shutdown_timeout_seconds=max(1, math.ceil(silence)),
            heartbeat_timeout_seconds=max(100, math.ceil(silence) + 60),  # the watchdog comes first
            coordinator_bind_address=bind,
            cluster_detection_method=detection,
        )
    except Exception as e:
        raise RuntimeError(
            f"jax.distributed did not start as process {info.process_id} of {info.num_processes} with "
            f"coordinator {info.coordinator_address} (process 0 listens on {bind}): {e}"
        ) from e
    return connections
