"""Which process of this host has which process id of a run, to explain why a port is taken.

A process holds a local socket named after its coordinator and process id while it lives. Nobody is refused for that
alone: a process of an earlier run may be about to end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct

from paged_dist.cluster.distributed_info import DistributedInfo

_claims: dict[str, socket.socket] = {}


def this_process() -> str:
    """Host and pid of this process, with a space between: two words of a line that other processes read."""
    return f"{''.join(socket.gethostname().split()) or 'unknown'} {os.getpid()}"


def _claim_name(info: DistributedInfo) -> str:
    return f"\0paged-dist {info.coordinator_address} {info.process_id}"  # no file: it is gone with the process


def claim_process_id(info: DistributedInfo) -> None:
    """Makes this process the one of this host that has the process id of `info`, unless another is."""
    name = _claim_name(info)
    if name in _claims:
        return
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        held = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        held.bind(name)
        held.listen(128)
        stack.pop_all()
        _claims[name] = held


def other_holder(info: DistributedInfo) -> str | None:
    """Host and pid of another process of this host with the process id of `info`; None where there is none."""
    name = _claim_name(info)
    if name in _claims:
        return None
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.setblocking(False)
        s.connect(name)
        pid, _, _ = struct.unpack("3i", s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        if pid:
            os.kill(pid, 0)  # a fork of it may hold the socket longer
        return f"{this_process().split()[0]} {pid or 'unknown'}"
    return None
