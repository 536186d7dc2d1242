"""What the two threads of a watched process share: the main thread that runs the program, and the watching thread.

The main thread says how far it is, what it has to tell the others, and that it is asked to stop. The watching thread
(`hub` on process 0, `spoke` on the others) sends that, and brings what the others said.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import socket
import threading
import traceback
from typing import Any, NoReturn

from paged_dist.cluster.progress import START, Progress
from paged_dist.cluster.wire import encoded

# Names of meetings that no caller would take.
END_MEETING = "\nthe end"
STOP_MEETING = "\nthe step to stop before"

STEPS_TO_STOP = 2  # that a process may do after it heard of a preemption before it must know where to stop


@dataclasses.dataclass(frozen=True)
class WatchSettings:
    """What a `Watchdog` was made with.

    Attributes:
      process_id, num_processes: this process, and how many there are.
      program: its name, in front of the lines that are printed.
      this_process: its host and pid, for the others' errors.
      beat: seconds between signs of life.
      limit: seconds that a process may be silent, or a step may take.
      start_limit: seconds until another process must have come into its Watchdog's block.
      last_words: seconds from a verdict to the end of process 0.
    """

    process_id: int
    num_processes: int
    program: str
    this_process: str
    beat: float
    limit: float
    start_limit: float
    last_words: float


class WatchState:
    """What the main thread and the watching thread of one process share.

    Attributes:
      progress: how far the main thread is; it alone sets this.
      next_step: the step after the one that it has begun last.
      error: what the main thread has failed with.
      is_over: nothing that happens from now on is a loss.
      is_handed_over: another Watchdog takes the connections; the watching thread ends.
      is_asked_to_stop: some process was asked to, as far as this one has heard.
    """

    def __init__(self, settings: WatchSettings):
        self.settings = settings
        self.progress: Progress = START
        self.next_step = 0
        self.error: BaseException | None = None
        self.is_over = self.is_handed_over = self.is_asked_to_stop = False
        self._wake: socket.socket | None = None
        self._changed = threading.Condition()  # guards what follows
        self._outbox: list[bytes] = []
        self._values: dict[str, dict[int, Any]] = collections.defaultdict(dict)  # meeting -> process -> value
        self._decided: dict[str, Any] = {}
        self._error_is_known = False
        self._voted_at: int | None = None
        self._stop_at: int | None = None

    # The main thread speaks

    def say(self, message: dict[str, Any]) -> None:
        """Gives `message` to the watching thread; raises TypeError where it is no JSON."""
        line = encoded(message)
        with self._changed:
            self._outbox.append(line)
        self.wake()

    def take_outbox(self) -> list[bytes]:
        """What the main thread has said since the last call, as lines."""
        with self._changed:
            lines, self._outbox = self._outbox, []
        return lines

    def open_wake(self) -> socket.socket:
        """Makes `wake` work; returns the socket that has something to read after it."""
        self._wake, wake = socket.socketpair()
        for end in (self._wake, wake):
            end.setblocking(False)
        return wake

    def wake(self) -> None:
        """Makes the watching thread look at what has changed here."""
        if self._wake is not None:
            with contextlib.suppress(OSError):
                self._wake.send(b".")

    def close_wake(self) -> None:
        """Closes this end, once the watching thread has ended."""
        if self._wake is not None:
            self._wake.close()

    # Meetings: every process brings a value, process 0 decides

    def wait_for_values(self, meeting: str) -> list[Any]:
        """On process 0: the values of all processes, by number, as soon as all have brought one."""
        everyone = range(self.settings.num_processes)
        with self._changed:
            self._changed.wait_for(lambda: len(self._values[meeting]) == len(everyone))
            values = self._values.pop(meeting)
        return [values[i] for i in everyone]

    def put_value(self, meeting: str, process_id: int, value: Any) -> dict[int, Any]:
        """On process 0: what process `process_id` brought. Returns all that were brought to this meeting so far."""
        with self._changed:
            values = self._values[meeting]
            values[process_id] = value
            self._changed.notify_all()
        return values

    def wait_for_decision(self, meeting: str) -> Any:
        """On the other processes: what process 0 has decided, as soon as it has."""
        with self._changed:
            self._changed.wait_for(lambda: meeting in self._decided)
            return self._decided.pop(meeting)

    def put_decision(self, meeting: str, result: Any) -> None:
        """On the other processes: what process 0 has decided."""
        with self._changed:
            self._decided[meeting] = result
            self.is_over = self.is_over or meeting == END_MEETING
            self._changed.notify_all()

    # The step before which all stop

    def ask_to_stop(self) -> None:
        """This process is asked to stop. Takes no lock: a signal handler may have interrupted who holds it."""
        self.is_asked_to_stop = True
        self.wake()

    def vote_on_stop(self) -> dict[str, Any]:
        """The message that says which step comes next here."""
        with self._changed:
            self._voted_at = self.next_step
            return {"value": [STOP_MEETING, self._voted_at]}

    def put_stop(self, step: int) -> None:
        """All stop before `step`."""
        with self._changed:
            self._stop_at = step
            self._changed.notify_all()

    def stops_before(self, step: int) -> bool:
        """Whether all stop before `step`; waits for the others' votes where this process may go no further."""
        with self._changed:
            if self._voted_at is not None and step >= self._voted_at + STEPS_TO_STOP:
                self._changed.wait_for(lambda: self._stop_at is not None)
            return self._stop_at is not None and step >= self._stop_at

    # How it ends

    def put_error_is_known(self) -> None:
        """Process 0 says that the main thread's error was no other process's fault: it has nothing to wait for."""
        with self._changed:
            self._error_is_known = True
            self._changed.notify_all()

    def wait_until_error_is_known(self, seconds: float) -> None:
        """Waits for `put_error_is_known`, `seconds` at most; another verdict ends this process meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._error_is_known, seconds)

    def end_process(self, code: int, text: str) -> NoReturn:
        """Prints `text` as the last line and ends this process at once.

        Not by an exception: the main thread may wait in a collective for ever, and hold locks.
        """
        threading.Timer(1, os._exit, (code,)).start()  # stderr may be a pipe that nobody reads
        try:
            own = [] if self.error is None else traceback.format_exception(self.error)
            os.write(2, ("".join(own) + f"{self.settings.program}: error: {text}\n").encode())
        finally:
            os._exit(code)
