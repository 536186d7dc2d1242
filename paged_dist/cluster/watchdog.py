"""A watch over the processes of a run: where one is lost, stuck or different, all of them end, with a reason.

A process that dies or hangs leaves the others in a collective for ever. So each process has a thread that tells
process 0 every second or so that it lives and how far it is, over the connection on which the processes met at
start-up (`distributed`). Process 0's thread judges: a connection that ended, a silence, a step that does not end, two
values that differ. It tells all, each prints the verdict as its last line and ends at once, whatever its main thread
waits for. None of this is a JAX collective, and nothing is unpickled: lines of JSON, a few bytes a second.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax

from paged_dist._errors import whole_number
from paged_dist.cluster import startup as distributed
from paged_dist.cluster.exit_codes import DISAGREE, LOST
from paged_dist.cluster.signals import SlowAbort, action_of, set_action
from paged_dist.cluster.verdicts import IDLE, PATIENCE, START, Place
from paged_dist.cluster.watchers import END, MARGIN, STOP, Hub, Spoke
from paged_dist.cluster.wire import as_json, encoded, peer_of

_MANY = 256  # processes, of which process 0 hears each less often
_LAST_WORDS = 10.0  # seconds in which a process that failed ends; see SlowAbort


class Disagreement(RuntimeError):
    """Two processes of a run hold different values; the text names them, the key, and both values."""

    exit_code = DISAGREE


class Watchdog:
    """Watches over the processes of one run, from `initialize_distributed` on; a context::

        with paged_dist.Watchdog(timeout_seconds=60) as watch:
            watch.agree({"mesh": mesh, "cache": cache.spec})
            for i in range(steps):
                watch.step(i)
                ...

    Where another process is lost, this one ends: the reason on stderr, exit code 3, no clean-up. Where the block
    raises, the others end so and the exception goes on; leave the process then with os._exit, for JAX's own shut-down
    waits for the others. In a run of one process it watches nobody, and everything works. Every process calls the
    same methods in the same order, but for `step` and `stops`. A process may have several, one after the other, if
    all processes have as many; each is entered once. Until the end of the block it takes, on processes other than 0,
    the place of a handler of SIGABRT, with which JAX's client ends a process whose coordinator is gone.

    Args:
      timeout_seconds: how long a process may be silent, or a step may take, before the run ends; the end comes within
        that time.
      name: the program's, in front of the lines that it prints.
      start_timeout_seconds: how long a process waits at the start of the block for the others to come there; None:
        timeout_seconds.
      phase_timeout_seconds: how long a phase may take of which nothing else is said, see `phase`.

    Attributes:
      process_id, num_processes: as `initialize_distributed` found them.

    Raises:
      ValueError: a time-out that is no positive number.
      RuntimeError: on entering it a second time, or inside the block of another.
    """

    def __init__(
        self,
        timeout_seconds: float = 60,
        *,
        name: str = "paged-dist",
        start_timeout_seconds: float | None = None,
        phase_timeout_seconds: float = 3600,
    ):
        start = timeout_seconds if start_timeout_seconds is None else start_timeout_seconds
        distributed.check_seconds("timeout_seconds", timeout_seconds)
        distributed.check_seconds("start_timeout_seconds", start)
        distributed.check_seconds("phase_timeout_seconds", phase_timeout_seconds, endless=True)
        self.process_id, self.num_processes, self._peers = distributed.peers()
        self._name = name
        self._beat = min(0.2 if self.num_processes <= _MANY else 1.0, timeout_seconds / 10)
        self._last_words = min(PATIENCE, timeout_seconds / 8)  # from a verdict to the end
        before = 2 * self._beat + self._last_words  # a beat to be heard, one to be judged
        self._limit = timeout_seconds - before
        self._start_limit = max(start - before, start / 2)
        self._phase_limit = float(phase_timeout_seconds)
        self._here = f"{socket.gethostname()}, pid {os.getpid()}"
        self._place = self._last_place = START  # the last: before it was idle
        self._changed = threading.Condition()  # guards what follows
        self._values: dict[str, dict[int, Any]] = collections.defaultdict(dict)  # name -> process -> value
        self._decided: dict[str, Any] = {}
        self._outbox: list[bytes] = []  # what the main thread has to say
        self._error: BaseException | None = None  # what the main thread has failed with
        self._mine = False  # which was no other process's fault
        self._over = False  # nothing is a loss any more
        self._stopping, self._voted_at, self._stop_at = False, None, None
        self._next_step = 0
        self._agreements, self._asked_at, self._sigterm_before = 0, None, None
        self._thread = self._wake = self._slow_abort = None
        self._entered = self._inside = False
        self._quits = False  # another Watchdog takes over the connections

    def __enter__(self) -> Watchdog:
        if self._entered:
            raise RuntimeError("this Watchdog was entered before: make another for another block")
        if self.num_processes > 1:
            self._take_over()
            self._wake, wake = socket.socketpair()
            for end in (self._wake, wake):
                end.setblocking(False)
            work = Hub(self, wake) if self.process_id == 0 else Spoke(self, wake)
            if self.process_id != 0 and jax.distributed.is_initialized():
                self._slow_abort = SlowAbort()
            self._thread = threading.Thread(target=self._guarded, args=(work.run, wake), name="watchdog", daemon=True)
            self._thread.start()
        self._entered = self._inside = True
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._thread is not None:
            if error is None:
                self.meet(END)
            elif not isinstance(error, Disagreement):  # of that all know
                self._error = error
                self._say({"failed": f"{kind.__name__}: {' '.join(str(error).split())[:300]}"})
                with self._changed:  # another process may be the reason: that ends this one here
                    self._changed.wait_for(lambda: self._mine, 2 * PATIENCE + 2 * self._beat)
            self._over = True
            self._say({"end": True})
            self._thread.join(PATIENCE)
            if not self._thread.is_alive():
                self._wake.close()
        self._inside = False
        if self._slow_abort is not None:
            if error is None:
                self._slow_abort.release()
            else:  # it has something to say, and the coordinator may be gone before it has
                restored = threading.Timer(_LAST_WORDS, self._slow_abort.release)
                restored.daemon = True
                restored.start()
        self._give_back_sigterm()

    def _take_over(self) -> None:
        """Takes the connections from the Watchdog before, whose thread may still wait for others to leave it."""
        peers = [peer_of(connection) for connection in self._peers.values()]
        before = {peer.owner for peer in peers} - {None}
        if any(watch._inside for watch in before):
            raise RuntimeError("another Watchdog of this process is in its block: one watches at a time")
        for watch in before:
            watch._quits = True
            watch._stir()
            watch._thread.join()
            watch._wake.close()
            if watch._slow_abort is not None:
                watch._slow_abort.release()
        for peer in peers:
            peer.begin(self, self._here)

    # What the run says

    def phase(self, name: str, timeout_seconds: float | None = None) -> None:
        """Says that the run now does `name` ('compile', 'checkpoint'): no step, and what waits for it is not late.

        What is not said to be a phase or a step, before the first of them, has no time-out of its own.

        Args:
          timeout_seconds: how long it may take, `math.inf` for as long as it takes; None: the Watchdog's
            phase_timeout_seconds, an hour if nothing is said.
        """
        if timeout_seconds is not None:
            distributed.check_seconds("timeout_seconds", timeout_seconds, endless=True)
        limit = self._phase_limit if timeout_seconds is None else float(timeout_seconds)
        self._place = self._last_place = self._last_place.next_phase(str(name), limit)

    def idle(self) -> None:
        """Says that this process has nothing to do for now, and is behind nobody."""
        self._place = IDLE

    def step(self, number: int, digest: str | int | None = None) -> None:
        """Says that step `number` begins, which has to end in time.

        Args:
          digest: what must be the same on all processes at this step, such as `PageAllocator.digest()`: a string or a
            whole number. Process 0 compares them while the run goes on, and ends it with exit code 4 where one
            differs.
        """
        number = whole_number("number", number)
        if digest is not None and not isinstance(digest, str):
            digest = f"{whole_number('digest', digest):x}"
        self._place = self._last_place = Place.of_step(number)
        self._next_step = number + 1
        if digest is not None and self._inside and self._thread is not None:
            self._say({"digest": [number, digest]})

    def dispatched(self) -> None:
        """Says that the rest of the step is the devices' work: a process that hangs before is told from its victims."""
        if self._place.step is not None:
            self._place = self._last_place = Place.of_step(self._place.step, waits=True)

    # What the processes do together

    def decide(self, name: str, value: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Waits until every process brought its `value`; what `decide` makes of them on process 0 is the result on all.

        Args:
          name: of this meeting; a name is used once.
          value: what JSON holds, as is what `decide` returns. It gets the list of all values, process by process.

        Raises:
          RuntimeError: several processes, and not inside the `with` block.
        """
        if self.num_processes == 1:
            return as_json(decide([as_json(value)]))
        if not self._inside:
            raise RuntimeError("a Watchdog of several processes is used as a context: with Watchdog() as watch")
        self._say({"value": [name, value]})
        with self._changed:
            if self.process_id == 0:
                self._changed.wait_for(lambda: len(self._values[name]) == self.num_processes)
                values = self._values.pop(name)
                everyone = [values[i] for i in range(self.num_processes)]
            else:
                self._changed.wait_for(lambda: name in self._decided)
                return self._decided.pop(name)
        result = as_json(decide(everyone))
        self._say({"decided": [name, result]})
        return result

    def meet(self, name: str) -> None:
        """Waits until every process is here."""
        self.decide(name, None, lambda _: None)

    def agree(self, values: Mapping[str, object]) -> None:
        """Checks that every process holds the same `values`, by their text, before they go on together.

        Raises:
          Disagreement: on all of them; names a key, the processes and hosts that differ, and both values.
        """
        mine = {key: str(value) for key, value in values.items()}
        self._agreements += 1
        text = self.decide(f"agreement {self._agreements}", [self._here, mine], _difference)
        if text is not None:
            raise Disagreement(text)

    # Preemption

    def watch_for_preemption(self) -> None:
        """Makes SIGTERM on any process stop all of them before the same step, see `stops`.

        One that comes again 5 seconds later or more, a person's, kills; one that comes sooner, from a supervisor that
        tells parent and child, changes nothing. Python sets signal handlers in the main thread only: called in
        another, it warns, and SIGTERM stays as it was on this process. The other processes' still stops it too.
        """
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "watch_for_preemption() was called off the main thread, where Python sets no signal handlers: SIGTERM "
                "of this process does not stop the run; call it in the main thread",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        if self._sigterm_before is not None:
            return

        def asked(number, frame):
            now = time.monotonic()
            if self._asked_at is not None and now - self._asked_at > 5:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.raise_signal(signal.SIGTERM)
            self._asked_at = self._asked_at or now
            self._stopping = True  # no lock: this may have interrupted the thread that holds it
            self._stir()

        action = action_of(signal.SIGTERM)  # JAX's runtime has set one from C
        self._sigterm_before = signal.signal(signal.SIGTERM, asked), action

    def _give_back_sigterm(self) -> None:
        """Makes SIGTERM what it was before `watch_for_preemption`; after one came, ignored."""
        if self._sigterm_before is None:
            return
        handler, action = self._sigterm_before
        if self._stopping:
            # A process that was asked to stop is about to; others of its cluster may be asked, and it again, later.
            handler, action = signal.SIG_IGN, None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
        if action is not None:
            set_action(signal.SIGTERM, action)
        self._sigterm_before = None

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether a process was asked to stop, as far as this one has heard."""
        return self._stopping

    def stops(self, step: int) -> bool:
        """Whether the run ends before step `step`, because a process was asked to; call it before each step.

        All end before the same one. As a process hears of it, its watching thread, which no collective holds up, says
        which step comes next; from there it does at most two more until it knows of all others, and all end two after
        the furthest of them. So none waits inside a collective for one that has stopped already.
        """
        if not self._stopping or self.num_processes == 1:
            return self._stopping
        with self._changed:
            if self._voted_at is not None and step >= self._voted_at + MARGIN:
                self._changed.wait_for(lambda: self._stop_at is not None)
            return self._stop_at is not None and step >= self._stop_at

    def _vote(self) -> dict:
        """What this process says of where it could stop."""
        with self._changed:
            self._voted_at = self._next_step
            return {"value": [STOP, self._voted_at]}

    # Between the main thread and the other

    def _say(self, message: dict) -> None:
        line = encoded(message)  # here: what is no JSON is the caller's error
        with self._changed:
            self._outbox.append(line)
        self._stir()

    def _stir(self) -> None:
        if self._wake is not None:
            with contextlib.suppress(OSError):
                self._wake.send(b".")

    def _take_outbox(self) -> list[bytes]:
        with self._changed:
            messages, self._outbox = self._outbox, []
        return messages

    def _set(self, **fields) -> None:
        with self._changed:
            for name, value in fields.items():
                setattr(self, name, value)
            self._changed.notify_all()

    def _guarded(self, run: Callable[[], None], wake: socket.socket) -> None:
        try:
            with wake:
                run()
        except Exception as e:  # a watch that has gone blind must not look like one that sees nothing
            if not self._over:
                self._end(LOST, f"the watch over the processes failed: {e!r}")

    def _end(self, code: int, text: str) -> NoReturn:
        """Ends this process. Not by an exception: the main thread may wait in a collective for ever, and hold locks."""
        threading.Timer(1, os._exit, (code,)).start()  # stderr may be a pipe that nobody reads
        try:
            own = [] if self._error is None else traceback.format_exception(self._error)
            os.write(2, ("".join(own) + f"{self._name}: error: {text}\n").encode())
        finally:
            os._exit(code)


def _difference(everyone: list) -> str | None:
    """The first key on which one of the processes' [host, values] differs from process 0's, in words."""
    (host, first), *_ = everyone
    for key in dict.fromkeys(key for _, values in everyone for key in values):
        odd = [i for i, (_, values) in enumerate(everyone) if values.get(key) != first.get(key)]
        if odd:
            other, values = everyone[odd[0]]
            more = f"; {len(odd) - 1} more differ from process 0" if len(odd) > 1 else ""
            return (
                f"the processes disagree on {key}: {_clip(first.get(key))} on process 0 ({host}), "
                f"{_clip(values.get(key))} on process {odd[0]} ({other}){more}"
            )
    return None


def _clip(text: str | None) -> str:
    if text is None:
        return "nothing"
    return text if len(text) <= 200 else f"{text[:197]}..."
