"""How the processes of a run meet at its start, over a plain TCP connection from each to process 0.

Each process sends the line "paged-dist/1 PROCESS_ID NUM_PROCESSES HOST PID" to process 0, which answers
"paged-dist/1 go" when all are there, or "paged-dist/1 no REASON". The connections stay open, for the watchdog.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import selectors
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

from paged_dist._errors import require

if TYPE_CHECKING:
    from paged_dist.cluster.startup import DistributedInfo

_HELLO = b"paged-dist/1"  # first word of the line that a process sends; the answer starts with it too
_MAX_LINE = 1000
_RETRY_SECONDS = 0.1


def split_address(argument: str, address: str) -> tuple[str, int]:
    """(host, port) of `host:port` or `[ipv6]:port`; raises ValueError, naming `argument`, for anything else."""
    example = "write host:port, such as 10.0.0.1:8476 or [::1]:8476"
    require(isinstance(address, str), argument, address, "must be a string", example)
    host, colon, port = address.rpartition(":")
    require(
        bool(colon) and bool(host) and not any(c.isspace() or c == "/" for c in host),
        argument,
        address,
        "must be a host and a port",
        example,
    )
    bracketed = host.startswith("[") and host.endswith("]")
    require(bracketed or ":" not in host, argument, address, "must have an IPv6 host in brackets", example)
    require(
        port.isascii() and port.isdigit() and 1 <= int(port) <= 65535,
        argument,
        address,
        "must have a port from 1 to 65535",
        example,
    )
    return host[1:-1] if bracketed else host, int(port)


def _here() -> str:
    """This process, as an error names it and as two words of a line: host and pid."""
    return f"{''.join(socket.gethostname().split()) or 'unknown'} {os.getpid()}"


def _named(who: str) -> str:
    host, _, pid = who.partition(" ")
    return f"{host}, pid {pid}"


def _two(process_id: int, first: str, second: str) -> str:
    return (
        f"two processes were started with process_id={process_id}: one on {_named(first)}, one on {_named(second)}; "
        "give each process its own"
    )


class Refused(RuntimeError):
    """Process 0 says that these processes cannot start."""


# Process 0


def _listen(bind: str) -> socket.socket:
    host, port = split_address("bind_address", bind)
    if host == "::":  # every interface
        dual = socket.has_dualstack_ipv6()
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=1024
        )
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=1024)


def _cannot_listen(bind: str, e: OSError, info: DistributedInfo) -> RuntimeError:
    """Why process 0 has no port: another process 0 has it, which is told as well, or any other program."""
    if e.errno == errno.EADDRINUSE:
        try:
            join(*split_address("coordinator_address", info.coordinator_address), info, time.monotonic() + 1).close()
        except Refused as refused:
            return refused
        except RuntimeError:
            pass
        if holder := _holder(info):
            return RuntimeError(_two(0, holder, _here()))
    return RuntimeError(
        f"process 0 cannot listen on {bind}: {e}; check that the host part is this machine's and that no other process "
        "(an earlier run, a second one with process_id=0?) has the port, or choose another"
    )


class _Elsewhere:
    """Process 0 where the coordinator's address is not this host's: by a forwarded port, or by mistake. It looks there,
    in a thread, for another process 0, which refuses both.

    Attributes:
      refusal: what that says.
    """

    def __init__(self, info: DistributedInfo):
        self._info, self._over, self.refusal = info, False, None
        threading.Thread(target=self._look, name="another process 0", daemon=True).start()

    def _look(self) -> None:
        address = split_address("coordinator_address", self._info.coordinator_address)
        while not self._over:
            try:
                join(*address, self._info, time.monotonic() + 1).close()
            except Refused as e:
                self.refusal, self._over = str(e), True
            except RuntimeError:
                pass  # nobody there yet, or it is this one

    def __enter__(self) -> _Elsewhere:
        return self

    def __exit__(self, *_) -> None:
        self._over = True  # JAX has the port from then on


def _is_here(address: str) -> bool:
    """Whether the host of `address` is this one, as far as can be told."""
    host, _ = split_address("coordinator_address", address)
    try:
        family, *_, found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as s:
            s.bind(found)
    except OSError as e:
        return e.errno != errno.EADDRNOTAVAIL
    return True


def await_others(bind: str, info: DistributedInfo, deadline: float) -> dict[int, socket.socket]:
    """Process 0's part: answers when all other processes have said who they are; their connections."""
    here: dict[int, socket.socket] = {}
    who = {0: _here()}
    refusal = None
    _allow_open_files(2 * info.num_processes + 256)
    try:
        server = _listen(bind)
    except OSError as e:
        raise _cannot_listen(bind, e, info) from e
    with server, selectors.DefaultSelector() as events, contextlib.ExitStack() as stack:
        claim(info)
        elsewhere = None
        if info.num_processes > 1 and not _is_here(info.coordinator_address):
            elsewhere = stack.enter_context(_Elsewhere(info))
        server.setblocking(False)
        events.register(server, selectors.EVENT_READ)
        lines: dict[socket.socket, bytes] = {}
        while refusal is None and len(here) < info.num_processes - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                refusal = _who_is_missing(here, info, elsewhere is not None)
                break
            for key, _ in events.select(left if elsewhere is None else min(left, 0.5)):
                if key.fileobj is server:
                    with contextlib.suppress(OSError):
                        peer, _ = server.accept()
                        peer.setblocking(False)
                        lines[peer] = b""
                        events.register(peer, selectors.EVENT_READ)
                    continue
                peer = key.fileobj
                try:
                    received = peer.recv(_MAX_LINE)
                except OSError:
                    received = b""
                lines[peer] += received
                if not received or len(lines[peer]) > _MAX_LINE:  # it died, or is none of ours: forget it
                    here = {i: p for i, p in here.items() if p is not peer}
                    del lines[peer]
                    events.unregister(peer)
                    peer.close()
                elif received.endswith(b"\n") and peer not in here.values():
                    refusal = refusal or _admit(lines[peer], peer, here, who, info)
            refusal = refusal or (elsewhere and elsewhere.refusal)
        answer = "go" if refusal is None else f"no {refusal}"
        for peer in lines:
            with contextlib.suppress(OSError):
                peer.sendall(b"%s %s\n" % (_HELLO, answer.encode()))
            if refusal is not None or peer not in here.values():
                peer.close()
    if refusal is not None:
        raise RuntimeError(refusal)
    for peer in here.values():
        peer.setblocking(True)
    return here


def _allow_open_files(count: int) -> None:
    """Raises this process's soft limit towards `count`: a connection to each other process, JAX's own after it.

    Often 1024, which a pod of 1536 hosts is over.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _admit(
    line: bytes, peer: socket.socket, here: dict[int, socket.socket], who: dict[int, str], info: DistributedInfo
) -> str | None:
    """Enters the process that said `line` in `here` and `who`; returns why the start-up fails instead, if it does."""
    words = line.split()
    if len(words) != 5 or words[0] != _HELLO or not all(words[i].isdigit() for i in (1, 2, 4)):
        return None  # a health check or a port scan
    process_id, num_processes = int(words[1]), int(words[2])
    speaker = b" ".join(words[3:]).decode(errors="replace")
    if num_processes != info.num_processes:
        return (
            f"process {process_id} on {_named(speaker)} was started with num_processes={num_processes}, process 0 on "
            f"{_named(who[0])} with {info.num_processes}: give all the same"
        )
    if process_id == 0 and speaker == who[0]:
        return None  # this one: it looked for another
    if process_id == 0 or process_id in here:
        return _two(process_id, who[process_id], speaker)
    here[process_id], who[process_id] = peer, speaker
    return None


def _who_is_missing(here: dict[int, socket.socket], info: DistributedInfo, elsewhere: bool) -> str:
    missing = [i for i in range(1, info.num_processes) if i not in here]
    listed = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
    wrong = f" (which is no address of {_named(_here())}, that was started as process 0)" if elsewhere else ""
    return (
        f"timed out: {len(missing)} of {info.num_processes} processes did not reach the coordinator at "
        f"{info.coordinator_address}{wrong}, process {listed}; check that they were started, each with its own "
        "process_id and all with this address, and that their hosts can reach it"
    )


# The others


def join(host: str, port: int, info: DistributedInfo, deadline: float) -> socket.socket:
    """The other processes' part: says who this is, waits for the answer; tries again while nobody listens.

    Returns the connection to process 0."""
    last = "no answer"
    claim(info)
    while (left := deadline - time.monotonic()) > 0:
        try:
            peer = socket.create_connection((host, port), timeout=left)
            with contextlib.ExitStack() as stack:
                stack.enter_context(peer)
                words = info.process_id, info.num_processes, _here().encode(errors="replace")
                peer.sendall(b"%s %d %d %s\n" % (_HELLO, *words))
                last = "it accepts connections, but the other processes did not all come"
                # Process 0 gives up when its own time is over, perhaps after this one's, and says who is missing.
                answer = _read_line(peer, deadline + 2)
                if answer == _HELLO + b" go":
                    stack.pop_all()  # stays open
                    peer.settimeout(None)
                    return peer
        except OSError as e:
            last = last if isinstance(e, TimeoutError) and last != "no answer" else str(e)
        else:
            if answer.startswith(_HELLO + b" no "):
                raise Refused(answer[len(_HELLO) + 4 :].decode(errors="replace"))
            if holder := _holder(info):  # and so the run has begun, without this one
                raise RuntimeError(_two(info.process_id, holder, _here()))
            last = (
                "something answers there that is not the process 0 of this start-up: another program, or a run that "
                f"has begun, perhaps with another process of process_id={info.process_id}"
            )
        time.sleep(max(0.0, min(_RETRY_SECONDS, deadline - time.monotonic())))
    raise RuntimeError(
        f"timed out: process {info.process_id} of {info.num_processes} waited for the coordinator at "
        f"{info.coordinator_address} ({last}); check that process 0 runs and listens there, that the "
        "address is the same in all processes, and that no firewall or proxy is between them"
    )


def _read_line(peer: socket.socket, deadline: float) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < _MAX_LINE:
        peer.settimeout(max(0.01, deadline - time.monotonic()))
        received = peer.recv(1)  # what follows the line is for others to read
        line += received
        if not received or not line.startswith(_HELLO[: len(line)]):
            break
    return line.strip()


# Who has a place in a run, on one host: it holds a local socket of that name while it lives. Nobody is refused for that
# alone, an earlier run's process may be about to end; it explains why a port is taken.

_claims: dict[str, socket.socket] = {}


def _claim_name(info: DistributedInfo) -> str:
    return f"\0paged-dist {info.coordinator_address} {info.process_id}"  # no file: it is gone with the process


def claim(info: DistributedInfo) -> None:
    """Takes the place of `info` on this host, if it is free."""
    name = _claim_name(info)
    if name in _claims:
        return
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        held = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        held.bind(name)
        held.listen(128)
        stack.pop_all()
        _claims[name] = held


def _holder(info: DistributedInfo) -> str | None:
    """Host and pid of another process of this host that has the place of `info`; None where there is none."""
    name = _claim_name(info)
    if name in _claims:
        return None
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.setblocking(False)
        s.connect(name)
        pid, _, _ = struct.unpack("3i", s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        if pid:
            os.kill(pid, 0)  # a fork of it may hold the socket longer
        return f"{_here().split()[0]} {pid or 'unknown'}"
    return None
