"""How the processes of a run meet at its start, over a plain TCP connection from each to process 0.

Each process sends the line "paged-dist/1 PROCESS_ID NUM_PROCESSES HOST PID" to process 0, which answers
"paged-dist/1 go" when all are there, or "paged-dist/1 no REASON". The connections stay open, for the watchdog.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import selectors
import socket
import threading
import time

from paged_dist.cluster.addresses import is_on_this_host, split_address
from paged_dist.cluster.distributed_info import DistributedInfo
from paged_dist.cluster.host_claims import claim_process_id, other_holder, this_process

_HELLO = b"paged-dist/1"  # first word of the line that a process sends; the answer starts with it too
_MAX_LINE = 1000
_RETRY_SECONDS = 0.1


def _named(who: str) -> str:
    host, _, pid = who.partition(" ")
    return f"{host}, pid {pid}"


def _same_id_twice(process_id: int, first: str, second: str) -> str:
    return (
        f"two processes were started with process_id={process_id}: one on {_named(first)}, one on {_named(second)}; "
        "give each process its own"
    )


class StartRefused(RuntimeError):
    """Process 0 says that these processes cannot start."""


# Process 0


def _listen_on(bind: str) -> socket.socket:
    host, port = split_address("bind_address", bind)
    if host == "::":  # every interface
        dual = socket.has_dualstack_ipv6()
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=1024
        )
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=1024)


def _cannot_listen_on(bind: str, e: OSError, info: DistributedInfo) -> RuntimeError:
    """Why process 0 has no port: another process 0 has it, which is told as well, or any other program."""
    if e.errno == errno.EADDRINUSE:
        try:
            join(*split_address("coordinator_address", info.coordinator_address), info, time.monotonic() + 1).close()
        except StartRefused as refused:
            return refused
        except RuntimeError:
            pass
        if holder := other_holder(info):
            return RuntimeError(_same_id_twice(0, holder, this_process()))
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
            except StartRefused as e:
                self.refusal, self._over = str(e), True
            except RuntimeError:
                pass  # nobody there yet, or it is this one

    def __enter__(self) -> _Elsewhere:
        return self

    def __exit__(self, *_) -> None:
        self._over = True  # JAX has the port from then on


def await_others(bind: str, info: DistributedInfo, deadline: float) -> dict[int, socket.socket]:
    """Process 0's part: answers when all other processes have said who they are; their connections."""
    here: dict[int, socket.socket] = {}
    who = {0: this_process()}
    refusal = None
    _allow_open_files(2 * info.num_processes + 256)
    try:
        server = _listen_on(bind)
    except OSError as e:
        raise _cannot_listen_on(bind, e, info) from e
    with server, selectors.DefaultSelector() as events, contextlib.ExitStack() as stack:
        claim_process_id(info)
        elsewhere = None
        if info.num_processes > 1 and not is_on_this_host(info.coordinator_address):
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
                    refusal = refusal or _admit_process(lines[peer], peer, here, who, info)
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


def _admit_process(
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
        return _same_id_twice(process_id, who[process_id], speaker)
    here[process_id], who[process_id] = peer, speaker
    return None


def _who_is_missing(here: dict[int, socket.socket], info: DistributedInfo, elsewhere: bool) -> str:
    missing = [i for i in range(1, info.num_processes) if i not in here]
    listed = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
    wrong = f" (which is no address of {_named(this_process())}, that was started as process 0)" if elsewhere else ""
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
    claim_process_id(info)
    while (left := deadline - time.monotonic()) > 0:
        try:
            peer = socket.create_connection((host, port), timeout=left)
            with contextlib.ExitStack() as stack:
                stack.enter_context(peer)
                words = info.process_id, info.num_processes, this_process().encode(errors="replace")
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
                raise StartRefused(answer[len(_HELLO) + 4 :].decode(errors="replace"))
            if holder := other_holder(info):  # and so the run has begun, without this one
                raise RuntimeError(_same_id_twice(info.process_id, holder, this_process()))
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
