"""What the watching threads say to each other: lines of JSON, over the connections of the meeting at start-up.

A message is an object with one of these keys (hello also has "session"):

| key | from | value |
| --- | --- | --- |
| hello, session | both ends | host and pid of the sender; which Watchdog this is, the first being 1 |
| at | to process 0 | `Progress` of the sender, at each beat |
| alive | process 0 | `Progress` of process 0, at each beat |
| value | to process 0 | [name of a meeting, what the sender brings to it] |
| decided | process 0 | [name of a meeting, what process 0 made of all values] |
| digest | to process 0 | [step, digest of the sender's allocator] |
| stop | both | true: the sender was asked to stop |
| stop_at | process 0 | the step before which all stop |
| failed | to process 0 | the exception that ends the sender's block |
| end | to process 0 | true: the sender has left its block |
| verdict | process 0 | `Verdict`: the run ends |

The connections outlive a Watchdog. A session is one Watchdog on every process. Each side sends a hello to open a
session; all lines that this side sends after it belong to that session, until its next hello. So a process that is late
may find the lines of two sessions in one read, and drops none of the later one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import selectors
import socket
import time
from typing import Any

_BYTES_AT_ONCE = 1 << 20  # that are sent or read
_LONGEST_LINE = 1 << 28  # bytes, more than any report has


@functools.cache
def peer_of(connection: socket.socket) -> Peer:
    """The one `Peer` of this connection: what it has read and not yet used is kept between Watchdogs."""
    return Peer(connection)


class Peer:
    """The process at the other end of a connection: lines to send to it, which never block, and lines that came."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._out = bytearray()  # to be sent
        self._in = b""  # read, and not yet used
        self._key = 0  # under which it is registered
        self._awaits_write = False  # registered for that too
        self._session = self._their_session = 0

    @property
    def present(self) -> bool:
        """Whether the other end is in this end's session."""
        return self._their_session == self._session

    def begin(self, this_process: str) -> None:
        """Opens this end's next session, and says so."""
        self._session += 1
        self._connection.setblocking(False)
        self.put(encoded({"hello": this_process, "session": self._session}))

    def register(self, events: selectors.BaseSelector, key: int) -> None:
        """Makes `events` tell, with `key` as data, when there is something to read."""
        self._key, self._awaits_write = key, False
        events.register(self._connection, selectors.EVENT_READ, key)

    def put(self, lines: bytes) -> None:
        """Lines to send, at the next `flush`; that the connection has ended is found by `read`."""
        self._out += lines

    def flush(self, events: selectors.BaseSelector | None = None) -> None:
        """Sends what goes without waiting; `events` then tells when the rest will."""
        with contextlib.suppress(OSError):
            while self._out:
                del self._out[: self._connection.send(self._out[:_BYTES_AT_ONCE])]
        if events is not None and self._awaits_write != bool(self._out):
            self._awaits_write = bool(self._out)
            with contextlib.suppress(KeyError, ValueError):  # not registered any more: it has ended
                write = selectors.EVENT_WRITE if self._awaits_write else 0
                events.modify(self._connection, selectors.EVENT_READ | write, self._key)

    def flush_until(self, until: float) -> None:
        """Sends all, and waits for it until that time."""
        self.flush()
        while self._out and time.monotonic() < until:
            time.sleep(0.01)
            self.flush()

    def read(self, events: selectors.BaseSelector) -> list[dict[str, Any]] | None:
        """This session's whole messages that have come; None where the connection has ended, which `events` then
        forgets."""
        try:
            data = self._connection.recv(_BYTES_AT_ONCE)
        except BlockingIOError:
            return []  # it was told that it can write
        except OSError:
            data = b""
        if not data or len(self._in) > _LONGEST_LINE:
            events.unregister(self._connection)
            self._out.clear()
            return None
        self._in += data
        return self.messages()

    def messages(self) -> list[dict[str, Any]]:
        """This session's messages among what was read already: those of an earlier one are dropped, of a later kept."""
        *lines, rest = self._in.split(b"\n")
        found = []
        for i, line in enumerate(lines):
            message = json.loads(line)
            if "hello" in message:
                if message["session"] > self._session:
                    rest = b"\n".join([*lines[i:], rest])
                    break
                self._their_session = message["session"]
            if self.present:
                found.append(message)
        self._in = rest
        return found

    def wait_for_end(self, until: float) -> None:
        """Waits for the end of the connection, `until` that time at most; what comes before it is lost."""
        wait_for_end(self._connection, until)


def wait_for_end(connection: socket.socket, until: float) -> None:
    """Reads from `connection` until it ends, `until` that time at most."""
    with contextlib.suppress(OSError):
        while (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            if not connection.recv(1 << 16):
                return


def encoded(message: dict[str, Any]) -> bytes:
    """`message` as a line."""
    return json.dumps(message).encode() + b"\n"


def as_json(value: Any) -> Any:
    """`value` as it comes out of JSON, so that one process sees what several do."""
    return json.loads(json.dumps(value))


def drain(wake: socket.socket) -> None:
    """Takes what `wake` holds, so that it wakes again."""
    with contextlib.suppress(BlockingIOError):
        while wake.recv(4096):
            pass
