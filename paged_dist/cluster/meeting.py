"""The meeting of the processes at the start of a run, over a plain TCP connection from each to process 0.

Each process calls `join`: it sends the line "paged-dist/1 PROCESS_ID NUM_PROCESSES HOST PID". Process 0 calls
`await_others`: it answers "paged-dist/1 go" when all are there, or "paged-dist/1 no REASON". The connections stay open,
for the watch over the processes.
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
from paged_dist.cluster.distributed_info import DistributedInfo, coordinator_of
from paged_dist.cluster.host_claims import claim_process_id, other_holder, this_process

_HELLO = b"paged-dist/1"  # first word of the line that a process sends; the answer starts with it too
_MAX_LINE = 1000
_RETRY_SECONDS = 0.1


class StartRefused(RuntimeError):
    """Process 0 has answered that these processes cannot start, and why."""


# Process 0


def await_others(bind: str, info: DistributedInfo, deadline: float) -> dict[int, socket.socket]:
    """Waits on process 0 until all other processes have said who they are, and answers them.

    Args:
      bind: host:port on which process 0 listens.
      info: this process, process 0.
      deadline: time.monotonic() at which it answers that some did not come.

    Returns:
      The open connections to the others, by process id.

    Raises:
      RuntimeError: it cannot listen, two processes have one id or disagree about their number, or some did not come.
    """
    _allow_open_files(2 * info.num_processes + 256)
    try:
        server = _listen_on(bind)
    except OSError as e:
        raise _cannot_listen(bind, e, info) from e
    with server, selectors.DefaultSelector() as events, contextlib.ExitStack() as stack:
        claim_process_id(info)
        elsewhere = None
        if info.num_processes > 1 and not is_on_this_host(coordinator_of(info)):
            elsewhere = stack.enter_context(_SearchElsewhere(info))
        server.setblocking(False)
        events.register(server, selectors.EVENT_READ)
        arrivals = _Arrivals(info)
        while arrivals.refusal is None and not arrivals.complete:
            left = deadline - time.monotonic()
            if left <= 0:
                arrivals.refusal = arrivals.who_is_missing(elsewhere is not None)
                break
            for key, _ in events.select(left if elsewhere is None else min(left, 0.5)):
                if key.fileobj is server:
                    with contextlib.suppress(OSError):
                        connection, _ = server.accept()
                        connection.setblocking(False)
                        events.register(connection, selectors.EVENT_READ, connection)
                        arrivals.accept(connection)
                elif not arrivals.read(key.data):
                    events.unregister(key.data)
                    key.data.close()
            if elsewhere is not None:
                arrivals.refusal = arrivals.refusal or elsewhere.refusal
        return arrivals.answer_all()


class _Arrivals:
    """Who has come to process 0 so far.

    Attributes:
      refusal: why the run cannot start, once that is known.
    """

    def __init__(self, info: DistributedInfo):
        self._info = info
        self._lines: dict[socket.socket, bytes] = {}  # what each connection has sent
        self._here: dict[int, socket.socket] = {}  # process id -> its connection
        self._who = {0: this_process()}  # process id -> host and pid
        self.refusal: str | None = None

    @property
    def complete(self) -> bool:
        """Whether all other processes have come."""
        return len(self._here) == self._info.num_processes - 1

    def accept(self, connection: socket.socket) -> None:
        """A connection, of which nothing is known yet."""
        self._lines[connection] = b""

    def read(self, connection: socket.socket) -> bool:
        """Reads what a connection has sent; False where it has died, or is none of ours, and is forgotten."""
        try:
            received = connection.recv(_MAX_LINE)
        except OSError:
            received = b""
        self._lines[connection] += received
        if not received or len(self._lines[connection]) > _MAX_LINE:
            self._here = {i: c for i, c in self._here.items() if c is not connection}
            del self._lines[connection]
            return False
        if received.endswith(b"\n") and connection not in self._here.values():
            self.refusal = self.refusal or self._admit(self._lines[connection], connection)
        return True

    def _admit(self, line: bytes, connection: socket.socket) -> str | None:
        """Takes in the process that said `line`; returns why the start-up fails instead, if it does."""
        words = line.split()
        if len(words) != 5 or words[0] != _HELLO or not all(words[i].isdigit() for i in (1, 2, 4)):
            return None  # a health check or a port scan
        process_id, num_processes = int(words[1]), int(words[2])
        speaker = b" ".join(words[3:]).decode(errors="replace")
        if num_processes != self._info.num_processes:
            return (
                f"process {process_id} on {_named(speaker)} was started with num_processes={num_processes}, process 0 "
                f"on {_named(self._who[0])} with {self._info.num_processes}: give all the same"
            )
        if process_id == 0 and speaker == self._who[0]:
            return None  # this one: it looked for another
        if process_id == 0 or process_id in self._here:
            return _same_id_twice(process_id, self._who[process_id], speaker)
        self._here[process_id], self._who[process_id] = connection, speaker
        return None

    def who_is_missing(self, elsewhere: bool) -> str:
        """The error of a time-out; `elsewhere` where the coordinator's address is none of this host's."""
        num_processes = self._info.num_processes
        missing = [i for i in range(1, num_processes) if i not in self._here]
        listed = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
        wrong = f" (which is no address of {_named(this_process())}, that was started as process 0)"
        return (
            f"timed out: {len(missing)} of {num_processes} processes did not reach the coordinator at "
            f"{self._info.coordinator_address}{wrong if elsewhere else ''}, process {listed}; check that they were "
            "started, each with its own process_id and all with this address, and that their hosts can reach it"
        )

    def answer_all(self) -> dict[int, socket.socket]:
        """Tells all whether the run starts; returns the connections by process id, or raises the refusal."""
        answer = "go" if self.refusal is None else f"no {self.refusal}"
        for connection in self._lines:
            with contextlib.suppress(OSError):
                connection.sendall(b"%s %s\n" % (_HELLO, answer.encode()))
            if self.refusal is not None or connection not in self._here.values():
                connection.close()
        if self.refusal is not None:
            raise RuntimeError(self.refusal)
        for connection in self._here.values():
            connection.setblocking(True)
        return self._here


class _SearchElsewhere:
    """A thread of process 0 that looks for another process 0 at the coordinator's address, which refuses both.

    Needed where that address is none of this host's: a port may be forwarded, or this is a mistake.

    Attributes:
      refusal: what the other one says, once it is found.
    """

    def __init__(self, info: DistributedInfo):
        self._info, self._over = info, False
        self.refusal: str | None = None
        threading.Thread(target=self._look, name="another process 0", daemon=True).start()

    def _look(self) -> None:
        address = split_address("coordinator_address", coordinator_of(self._info))
        while not self._over:
            try:
                join(*address, self._info, time.monotonic() + 1).close()
            except StartRefused as e:
                self.refusal, self._over = str(e), True
            except RuntimeError:
                pass  # nobody there yet, or it is this one

    def __enter__(self) -> _SearchElsewhere:
        return self

    def __exit__(self, *_) -> None:
        self._over = True  # JAX has the port from then on


def _listen_on(bind: str) -> socket.socket:
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
            join(*split_address("coordinator_address", coordinator_of(info)), info, time.monotonic() + 1).close()
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


def _allow_open_files(count: int) -> None:
    """Raises this process's soft limit towards `count`: a connection to each other process, JAX's own after it.

    Often 1024, which a pod of 1536 hosts is over.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# The other processes


def join(host: str, port: int, info: DistributedInfo, deadline: float) -> socket.socket:
    """Says to process 0 who this process is, and waits for its answer; tries again while nobody listens.

    Returns:
      The open connection to process 0.

    Raises:
      StartRefused: process 0 answers that the run cannot start.
      RuntimeError: no answer before `deadline`, or another process of this host has this one's id.
    """
    last = "no answer"
    claim_process_id(info)
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=left)
            with contextlib.ExitStack() as stack:
                stack.enter_context(connection)
                words = info.process_id, info.num_processes, this_process().encode(errors="replace")
                connection.sendall(b"%s %d %d %s\n" % (_HELLO, *words))
                last = "it accepts connections, but the other processes did not all come"
                # Process 0 gives up when its own time is over, perhaps after this one's, and says who is missing.
                answer = _read_line(connection, deadline + 2)
                if answer == _HELLO + b" go":
                    stack.pop_all()  # stays open
                    connection.settimeout(None)
                    return connection
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


def _read_line(connection: socket.socket, deadline: float) -> bytes:
    """The answer of process 0 without its end; what came so far where it is no answer of one, or stops."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _MAX_LINE:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        received = connection.recv(1)  # what follows the line is for others to read
        line += received
        if not received or not line.startswith(_HELLO[: len(line)]):
            break
    return line.strip()


# Both


def _named(who: str) -> str:
    """A process as errors name it, from its host and pid as two words."""
    host, _, pid = who.partition(" ")
    return f"{host}, pid {pid}"


def _same_id_twice(process_id: int, first: str, second: str) -> str:
    """The error of two processes with one id, each given as host and pid."""
    return (
        f"two processes were started with process_id={process_id}: one on {_named(first)}, one on {_named(second)}; "
        "give each process its own"
    )
