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
import json
import math
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from paged_dist import distributed
from paged_dist._errors import require
from paged_dist._judge import DISAGREE, FAILED, IDLE, LOST, PATIENCE, PREEMPTED, Judge, Place, Verdict

__all__ = ["DISAGREE", "FAILED", "LOST", "PREEMPTED", "Disagreement", "Watchdog"]

_MANY = 256  # processes, of which process 0 hears each less often
_MARGIN = 2  # steps that a process may do after it heard of a preemption before it must know where to stop
_END = "the end"


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
    same methods in the same order, but for `step` and `stops`.

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
        self._limit = timeout_seconds - 3 * self._beat  # a beat to be heard, one to be judged, one to end
        self._here = f"{socket.gethostname()}, pid {os.getpid()}"
        self._place = Place("start")
        self._changed = threading.Condition()  # guards what follows
        self._values: dict[str, dict[int, Any]] = collections.defaultdict(dict)  # name -> process -> value
        self._decided: dict[str, Any] = {}
        self._outbox: list[dict] = []  # what the main thread has to say
        self._raising = self._mine = False  # this process has failed; that was no other's fault
        self._over = False  # nothing is a loss any more
        self._stopping, self._voted_at, self._stop_at = False, None, None
        self._thread = self._wake = self._signal_before = None

    def __enter__(self) -> Watchdog:
        if self.num_processes > 1:
            self._wake, wake = socket.socketpair()
            wake.setblocking(False)
            work = _Hub(self, wake) if self.process_id == 0 else _Spoke(self, wake)
            self._thread = threading.Thread(target=self._guarded, args=(work.run,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._signal_before is not None:
            signal.signal(signal.SIGTERM, self._signal_before)
        if self._thread is None:
            return
        if error is None:
            self.meet(_END)
        elif not isinstance(error, Disagreement):  # of that all know
            self._raising = True
            self._say({"failed": f"{kind.__name__}: {' '.join(str(error).split())[:300]}"})
            with self._changed:  # another process may be the reason: that ends this one here
                self._changed.wait_for(lambda: self._mine, 2 * PATIENCE + 2 * self._beat)
        self._over = True
        self._say({"end": True})
        self._thread.join(PATIENCE)

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
            return decide([json.loads(json.dumps(value))])
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
        result = decide(everyone)
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
        text = self.decide("agreement", [self._here, mine], _difference)
        if text is not None:
            raise Disagreement(text)

    # Preemption

    def watch_for_preemption(self) -> None:
        """Makes SIGTERM on any process stop all of them before the same step (see `stops`); a second one kills."""

        def asked(number, frame):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._stopping = True  # no lock: this may have interrupted the thread that holds it
            self._stir()

        self._signal_before = signal.signal(signal.SIGTERM, asked)

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether a process was asked to stop, as far as this one has heard."""
        return self._stopping

    def stops(self, step: int) -> bool:
        """Whether the run ends before step `step`, because a process was asked to; call it before each step.

        All end before the same one. Each says where it is when it hears of it, does at most two more steps until it
        knows of all others, and ends two after the furthest of them: none waits inside a collective for one that has
        stopped already.
        """
        if not self._stopping or self.num_processes == 1:
            return self._stopping
        if self._voted_at is None:
            self._voted_at = step
            self._say({"value": [_STOP, step]})
        with self._changed:
            if step >= self._voted_at + _MARGIN:
                self._changed.wait_for(lambda: self._stop_at is not None)
            return self._stop_at is not None and step >= self._stop_at

    # Between the main thread and the other

    def _say(self, message: dict) -> None:
        with self._changed:
            self._outbox.append(message)
        self._stir()

    def _stir(self) -> None:
        if self._wake is not None:
            with contextlib.suppress(OSError):
                self._wake.send(b".")

    def _take_outbox(self) -> list[dict]:
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
        """Ends this process. Not by an exception: the main thread may wait in a collective for ever."""
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os.write(2, f"{self._name}: error: {text}\n".encode())
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


class _Spoke:
    """The thread of a process that is not 0: says that it lives and what its main thread has to say, and listens."""

    def __init__(self, watch: Watchdog, wake: socket.socket):
        self._watch, self._wake, self._hub = watch, wake, watch._peers[0]

    def run(self) -> None:
        watch, hub = self._watch, self._hub
        lines, heard, due, told = _Lines(hub), time.monotonic(), 0.0, False
        _put(hub, {"hello": watch._here})
        with selectors.DefaultSelector() as events:
            events.register(hub, selectors.EVENT_READ)
            events.register(self._wake, selectors.EVENT_READ)
            while True:
                if (now := time.monotonic()) >= due:
                    due = now + watch._beat
                    _put(hub, {"at": watch._place})
                if watch._stopping and not told:
                    told = True
                    _put(hub, {"stop": True})
                for message in watch._take_outbox():
                    _put(hub, {"at": watch._place})  # where it is when it says so
                    _put(hub, message)
                    if "end" in message:
                        return
                for key, _ in events.select(max(0.0, due - time.monotonic())):
                    if key.fileobj is self._wake:
                        _drain(self._wake)
                        continue
                    messages = lines.read()
                    if messages is None and not watch._over:
                        self._lost("its connection ended, the process is gone")
                    heard = time.monotonic()
                    for message in messages or ():
                        self._hear(message)
                    if messages is None:
                        return
                if (silent := time.monotonic() - heard) > watch._limit and not watch._over:
                    self._lost(f"it has been silent for {silent:.0f} s")

    def _lost(self, how: str) -> NoReturn:
        self._watch._end(LOST, f"lost process 0, the coordinator, while this one was {self._watch._place}: {how}")

    def _hear(self, message: dict) -> None:
        watch = self._watch
        if "verdict" in message:
            verdict = Verdict(*message["verdict"])
            if verdict.culprit is not None and watch._raising:  # each that failed by itself says so itself
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
        self._judge = Judge(watch.num_processes, watch._limit, watch._beat, time.monotonic())
        self._judge.names[0] += f" ({watch._here})"

    def run(self) -> None:
        watch, judge = self._watch, self._judge
        due, told, verdict = 0.0, False, None
        lines = {i: _Lines(peer) for i, peer in watch._peers.items()}
        with selectors.DefaultSelector() as events:
            for i, peer in watch._peers.items():
                events.register(peer, selectors.EVENT_READ, i)
            events.register(self._wake, selectors.EVENT_READ, 0)
            while judge.present:
                if (now := time.monotonic()) >= due:
                    due = now + watch._beat
                    self._tell({"alive": True})
                if watch._stopping and not told:
                    told = True
                    self._tell({"stop": True})
                judge.heard(0, now)
                for message in watch._take_outbox():
                    self._take(0, message)
                for key, _ in events.select(max(0.0, due - time.monotonic())):
                    if key.data == 0:
                        _drain(self._wake)
                        continue
                    messages = lines[key.data].read()
                    if messages is None:
                        events.unregister(key.fileobj)
                        judge.gone(key.data)
                    for message in messages or ():
                        judge.heard(key.data, time.monotonic())
                        self._take(key.data, message)
                judge.at(0, watch._place, time.monotonic())
                if verdict is None and not watch._over and (verdict := judge.verdict(time.monotonic())):
                    self._pronounce(verdict)

    def _tell(self, message: dict) -> None:
        for i in self._judge.present:
            if i:
                _put(self._watch._peers[i], message)

    def _take(self, i: int, message: dict) -> None:
        """What process i said."""
        watch, judge, now = self._watch, self._judge, time.monotonic()
        if "at" in message:
            judge.at(i, Place(*message["at"]), now)
        elif "hello" in message:
            judge.names[i] += f" ({message['hello']})"
        elif "failed" in message:
            judge.failed(i, message["failed"], now)
        elif "digest" in message:
            judge.digest(i, *message["digest"])
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
        if verdict.culprit is not None and self._watch._raising:
            self._watch._set(_mine=True)
            return
        until = time.monotonic() + min(PATIENCE, 2 * self._watch._beat)
        for i in self._judge.present:
            if i and i != verdict.culprit:
                distributed.wait_for_end(self._watch._peers[i], until)
        self._watch._end(verdict.code, verdict.text)


class _Lines:
    """Messages from one connection."""

    def __init__(self, peer: socket.socket):
        self._peer, self._rest = peer, b""

    def read(self) -> list[dict] | None:
        """The whole messages that have come; None where the connection has ended."""
        try:
            data = self._peer.recv(1 << 20)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


def _put(peer: socket.socket, message: dict) -> None:
    """Sends a message; that the connection has ended is found by who reads from it."""
    with contextlib.suppress(OSError):
        peer.sendall(json.dumps(message).encode() + b"\n")


def _drain(wake: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while wake.recv(4096):
            pass
