"""The watch's connections: lines of JSON, and to which of several Watchdogs, one after the other, a line belongs.

The connections are those of the processes' meeting at start-up and outlive a Watchdog. A session is one Watchdog on
every process. A line {"hello": who, "session": n} opens session n in its direction; what follows is of session n until
the next such line. So a process that is late may find the lines of two sessions in one read, and drops none of the
later one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import selectors
import socket
import time
from typing import Any

_CHUNK = 1 << 20
_LONGEST = 1 << 28  # bytes of a line, more than any report has


@functools.cache
def peer_of(connection: socket.socket) -> Peer:
    """The one `Peer` of this connection: what it has read and not yet used is kept between Watchdogs."""
    return Peer(connection)


class Peer:
    """One connection: lines to send, which never block, and lines that came.

    Attributes:
      owner: the Watchdog that uses it, or used it last.
      present: whether the other end is in this end's session.
    """

    def __init__(self, connection: socket.socket):
        self._connection, self._out, self._in, self._waits = connection, bytearray(), b"", False
        self.owner: Any = None
        self._session = self._theirs = 0

    @property
    def present(self) -> bool:
        return self._theirs == self._session

    def begin(self, owner: Any, here: str) -> None:
        """Opens this end's next session, and says so."""
        self.owner = owner
        self._session += 1
        self._connection.setblocking(False)
        self.put(encoded({"hello": here, "session": self._session}))

    def register(self, events: selectors.BaseSelector, data: int) -> None:
        """Makes `events` tell with `data` when there is something to read."""
        self._data, self._waits = data, False
        events.register(self._connection, selectors.EVENT_READ, data)

    def put(self, lines: bytes) -> None:
        """Lines to send, at the next `flush`; that the connection has ended is found by `read`."""
        self._out += lines

    def flush(self, events: selectors.BaseSelector | None = None) -> None:
        """Sends what goes without waiting; `events` then tells when the rest will."""
        with contextlib.suppress(OSError):
            while self._out:
                del self._out[: self._connection.send(self._out[:_CHUNK])]
        if events is not None and self._waits != bool(self._out):
            self._waits = bool(self._out)
            with contextlib.suppress(KeyError, ValueError):  # not registered any more: it has ended
                write = selectors.EVENT_WRITE if self._waits else 0
                events.modify(self._connection, selectors.EVENT_READ | write, self._data)

    def flush_until(self, until: float) -> None:
        """Sends all, and waits for it until that time."""
        self.flush()
        while self._out and time.monotonic() < until:
            time.sleep(0.01)
            self.flush()

    def read(self, events: selectors.BaseSelector) -> list[dict] | None:
        """This session's whole messages that have come; None where the connection has ended, which `events` then
        forgets."""
        try:
            data = self._connection.recv(_CHUNK)
        except BlockingIOError:
            return []  # it was told that it can write
        except OSError:
            data = b""
        if not data or len(self._in) > _LONGEST:
            events.unregister(self._connection)
            self._out.clear()
            return None
        self._in += data
        return self.messages()

    def messages(self) -> list[dict]:
        """This session's messages among what was read already: those of an earlier one are dropped, of a later kept."""
        *lines, rest = self._in.split(b"\n")
        found = []
        for i, line in enumerate(lines):
            message = json.loads(line)
            if "hello" in message:
                if message["session"] > self._session:
                    rest = b"\n".join([*lines[i:], rest])
                    break
                self._theirs = message["session"]
            if self.present:
                found.append(message)
        self._in = rest
        return found


def encoded(message: dict) -> bytes:
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
