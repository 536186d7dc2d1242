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
import ctypes
import json
import math
import os
import selectors
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax

from paged_dist import distributed
from paged_dist._errors import require
from paged_dist._judge import DISAGREE, FAILED, IDLE, LOST, PATIENCE, PREEMPTED, Judge, Place, Verdict

__all__ = ["DISAGREE", "FAILED", "LOST", "PREEMPTED", "Disagreement", "Watchdog"]

_MANY = 256  # processes, of which process 0 hears each less often
_MARGIN = 2  # steps that a process may do after it heard of a preemption before it must know where to stop
_END = "the end"
_CHUNK = 1 << 20
_LONGEST = 1 << 28  # bytes of a line, more than any report has


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
    same methods in the same order, but for `step` and `stops`. On processes other than 0 it takes the place of a
    handler of SIGABRT, with which JAX's client ends a process whose coordinator is gone.

    Args:
      timeout_seconds: how long a process may be silent, or a step may take, before the run ends; the end comes within
        that time.
      name: the program's, in front of the lines that it prints.

    Attributes:
      process_id, num_processes: as `initialize_distributed` found them.

    Raises:
      ValueError: timeout_seconds that is no positive number.
    """

    def __init__(self, timeout_seconds: float = 60, *, name: str = "paged-dist"):
        timely = isinstance(timeout_seconds, int | float) and 0 < timeout_seconds < math.inf
        require(timely, "timeout_seconds", timeout_seconds, "must be a positive number of seconds")
        self.process_id, self.num_processes, self._peers = distributed.peers()
        self._name = name
        self._beat = min(0.2 if self.num_processes <= _MANY else 1.0, timeout_seconds / 10)
        self._last_words = min(PATIENCE, timeout_seconds / 8)  # from a verdict to the end
        self._limit = timeout_seconds - 2 * self._beat - self._last_words  # a beat to be heard, one to be judged
        self._here = f"{socket.gethostname()}, pid {os.getpid()}"
        self._place = Place("start")
        self._changed = threading.Condition()  # guards what follows
        self._values: dict[str, dict[int, Any]] = collections.defaultdict(dict)  # name -> process -> value
        self._decided: dict[str, Any] = {}
        self._outbox: list[bytes] = []  # what the main thread has to say
        self._error: BaseException | None = None  # what the main thread has failed with
        self._mine = False  # which was no other process's fault
        self._over = False  # nothing is a loss any more
        self._stopping, self._voted_at, self._stop_at = False, None, None
        self._next_step = 0
        self._agreements, self._asked_at, self._signal_before = 0, None, None
        self._thread = self._wake = None

    def __enter__(self) -> Watchdog:
        if self.num_processes > 1:
            self._wake, wake = socket.socketpair()
            for end in (self._wake, wake):
                end.setblocking(False)
            work = _Hub(self, wake) if self.process_id == 0 else _Spoke(self, wake)
            if self.process_id != 0 and jax.distributed.is_initialized():
                _hold_up_aborts()
            self._thread = threading.Thread(target=self._guarded, args=(work.run,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._thread is not None:
            if error is None:
                self.meet(_END)
            elif not isinstance(error, Disagreement):  # of that all know
                self._error = error
                self._say({"failed": f"{kind.__name__}: {' '.join(str(error).split())[:300]}"})
                with self._changed:  # another process may be the reason: that ends this one here
                    self._changed.wait_for(lambda: self._mine, 2 * PATIENCE + 2 * self._beat)
            self._over = True
            self._say({"end": True})
            self._thread.join(PATIENCE)
        if self._signal_before is not None:
            # A process that was asked to stop is about to; others of its cluster may be asked, and it again, later.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if self._stopping else self._signal_before)

    # What the run says

    def phase(self, name: str) -> None:
        """Says that the run now does `name` ('compile', 'report'), which may take as long as it takes."""
        self._place = self._place.next_phase(name)

    def idle(self) -> None:
        """Says that this process has nothing to do for now, and is behind nobody."""
        self._place = IDLE

    def step(self, number: int, digest: int | None = None) -> None:
        """Says that step `number` begins, which has to end in time.

        Args:
          digest: a number that must be the same on all processes at this step, such as an allocator's digest. Process 0
            compares them while the run goes on, and ends it with exit code 4 where one differs.
        """
        self._place = Place.of_step(number)
        self._next_step = number + 1
        if digest is not None and self._thread is not None:
            self._say({"digest": [number, f"{digest:x}"]})

    def dispatched(self) -> None:
        """Says that the rest of the step is the devices' work: a process that hangs before is told from its victims."""
        if self._place.step is not None:
            self._place = Place.of_step(self._place.step, waits=True)

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
            return _as_json(decide([_as_json(value)]))
        if self._thread is None:
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
        result = _as_json(decide(everyone))
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
        tells parent and child, changes nothing.
        """

        def asked(number, frame):
            now = time.monotonic()
            if self._asked_at is not None and now - self._asked_at > 5:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.raise_signal(signal.SIGTERM)
            self._asked_at = self._asked_at or now
            self._stopping = True  # no lock: this may have interrupted the thread that holds it
            self._stir()

        self._signal_before = signal.signal(signal.SIGTERM, asked)

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
            if self._voted_at is not None and step >= self._voted_at + _MARGIN:
                self._changed.wait_for(lambda: self._stop_at is not None)
            return self._stop_at is not None and step >= self._stop_at

    def _vote(self) -> dict:
        """What this process says of where it could stop."""
        with self._changed:
            self._voted_at = self._next_step
            return {"value": [_STOP, self._voted_at]}

    # Between the main thread and the other

    def _say(self, message: dict) -> None:
        line = _encoded(message)  # here: what is no JSON is the caller's error
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

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
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


_STOP = "the step to stop before"


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


def _hold_up_aborts() -> None:
    """Makes abort() wait 6 seconds. JAX's client aborts its process as soon as the coordinator is gone, and might be
    faster than the watch, which says who that was and ends the process itself.

    The handler is C's sleep(), which is called with the signal's number, 6, as seconds; abort() goes on after it.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


class _Spoke:
    """The thread of a process that is not 0: says that it lives and what its main thread has to say, and listens."""

    def __init__(self, watch: Watchdog, wake: socket.socket):
        self._watch, self._wake, self._hub = watch, wake, _Peer(watch._peers[0])
        self._who, self._at = "process 0", Place("start")  # of the coordinator

    def run(self) -> None:
        watch, hub = self._watch, self._hub
        heard, due, told, last = time.monotonic(), 0.0, False, False
        hub.put(_encoded({"hello": watch._here}))
        with selectors.DefaultSelector() as events:
            hub.register(events, 0)
            events.register(self._wake, selectors.EVENT_READ)
            while not last:
                if (now := time.monotonic()) >= due:
                    due = now + watch._beat
                    hub.put(_encoded({"at": watch._place}))
                if watch._stopping and not told:
                    told = True
                    hub.put(_encoded({"stop": True}) + _encoded(watch._vote()))
                for line in watch._take_outbox():
                    hub.put(_encoded({"at": watch._place}) + line)  # where it is when it says so
                    last = last or line == _LAST
                hub.flush(events)
                for key, _ in events.select(max(0.0, due - time.monotonic())):
                    if key.fileobj is self._wake:
                        _drain(self._wake)
                        continue
                    messages = hub.read(events)
                    if messages is None and not watch._over:
                        self._lost("its connection ended, the process is gone")
                    if messages is None:
                        return
                    heard = time.monotonic()
                    for message in messages:
                        self._hear(message)
                if (silent := time.monotonic() - heard) > watch._limit and not watch._over:
                    self._lost(f"it has been silent for {silent:.0f} s")
            hub.flush_until(time.monotonic() + PATIENCE)

    def _lost(self, how: str) -> NoReturn:
        here = f"this one is {self._watch._place}"
        self._watch._end(LOST, f"lost {self._who}, the coordinator, last heard of {self._at}: {how}; {here}")

    def _hear(self, message: dict) -> None:
        watch = self._watch
        if "alive" in message:
            self._at = Place(*message["alive"])
        elif "hello" in message:
            self._who += f" ({message['hello']})"
        elif "verdict" in message:
            verdict = Verdict(*message["verdict"])
            if verdict.culprit is not None and watch._error is not None:  # each that failed by itself says so itself
                watch._set(_mine=True)
            elif not watch._over:
                watch._end(verdict.code, verdict.text)
        elif "decided" in message:
            name, result = message["decided"]
            watch._set(_decided=watch._decided | {name: result}, _over=watch._over or name == _END)
        elif "stop" in message:
            watch._stopping = True
        elif "stop_at" in message:
            watch._set(_stop_at=message["stop_at"])


class _Hub:
    """The thread of process 0: hears all, judges, tells all."""

    def __init__(self, watch: Watchdog, wake: socket.socket):
        self._watch, self._wake = watch, wake
        self._peers = {i: _Peer(peer) for i, peer in watch._peers.items()}
        self._judge = Judge(watch.num_processes, watch._limit, watch._beat, time.monotonic())
        self._judge.names[0] += f" ({watch._here})"
        self._urgent = False  # something came that may be a verdict now

    def run(self) -> None:
        watch, judge = self._watch, self._judge
        due, told, pronounced = 0.0, False, False
        with selectors.DefaultSelector() as events:
            for i, peer in self._peers.items():
                peer.register(events, i)
                peer.put(_encoded({"hello": watch._here}))
            events.register(self._wake, selectors.EVENT_READ, 0)
            while judge.present:
                if (now := time.monotonic()) >= due:
                    due = now + watch._beat
                    self._tell({"alive": watch._place})
                    judge.heard(0, now)
                    self._urgent = True
                if watch._stopping and not told:
                    told = True
                    self._tell({"stop": True})
                    self._take(0, watch._vote())
                for line in watch._take_outbox():
                    self._take(0, json.loads(line))
                for i in judge.present:
                    if i:
                        self._peers[i].flush(events)
                for key, _ in events.select(max(0.0, due - time.monotonic())):
                    if key.data == 0:
                        _drain(self._wake)
                        continue
                    messages = self._peers[key.data].read(events)
                    if messages is None:
                        judge.gone(key.data)
                        self._urgent = True
                        continue
                    judge.heard(key.data, time.monotonic())  # a part of a long line is a sign of life too
                    for message in messages:
                        self._take(key.data, message)
                if self._urgent and not pronounced and not watch._over:
                    self._urgent = False
                    judge.at(0, watch._place, time.monotonic())
                    if verdict := judge.verdict(time.monotonic()):
                        pronounced = True
                        self._pronounce(verdict)
            for peer in self._peers.values():
                peer.flush_until(time.monotonic() + PATIENCE)

    def _tell(self, message: dict) -> None:
        line = _encoded(message)
        for i in self._judge.present:
            if i:
                self._peers[i].put(line)

    def _take(self, i: int, message: dict) -> None:
        """What process i said."""
        watch, judge, now = self._watch, self._judge, time.monotonic()
        if "at" in message:
            judge.at(i, Place(*message["at"]), now)
        elif "hello" in message:
            judge.names[i] += f" ({message['hello']})"
        elif "failed" in message:
            judge.failed(i, message["failed"], now)
            self._urgent = True
        elif "digest" in message:
            judge.digest(i, *message["digest"])
            self._urgent = True
        elif "stop" in message:
            watch._stopping = True
        elif "end" in message:
            judge.left(i)
        elif "decided" in message:
            self._tell(message)
        elif "value" in message:
            name, value = message["value"]
            with watch._changed:
                watch._values[name][i] = value
                votes = watch._values[name]
                watch._changed.notify_all()
            if name == _STOP and len(votes) == watch.num_processes:
                stop_at = max(votes.values()) + _MARGIN
                self._tell({"stop_at": stop_at})
                watch._set(_stop_at=stop_at)

    def _pronounce(self, verdict: Verdict) -> None:
        """Tells all, waits until they have ended, for JAX's coordinator ends with this process, and ends."""
        self._tell({"verdict": verdict})
        until = time.monotonic() + self._watch._last_words
        others = [i for i in self._judge.present if i not in (0, verdict.lost)]
        for i in others:
            self._peers[i].flush_until(until)
        if verdict.culprit is not None and self._watch._error is not None:  # each that failed by itself says so itself
            self._watch._set(_mine=True)
            return
        for i in others:
            if i != verdict.culprit:
                distributed.wait_for_end(self._watch._peers[i], until)
        self._watch._end(verdict.code, verdict.text)


class _Peer:
    """One connection: lines to send, which never block, and lines that came."""

    def __init__(self, connection: socket.socket):
        self._connection, self._out, self._in, self._waits = connection, bytearray(), b"", False
        connection.setblocking(False)

    def register(self, events: selectors.BaseSelector, data: int) -> None:
        self._data = data
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
        """The whole messages that have come; None where the connection has ended, which `events` then forgets."""
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
        *lines, self._in = (self._in + data).split(b"\n")
        return [json.loads(line) for line in lines]


def _encoded(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


_LAST = _encoded({"end": True})


def _as_json(value: Any) -> Any:
    """`value` as it comes out of JSON, so that one process sees what several do."""
    return json.loads(json.dumps(value))


def _drain(wake: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while wake.recv(4096):
            pass
