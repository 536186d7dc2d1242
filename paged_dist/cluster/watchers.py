"""The threads of a `Watchdog`, which no collective holds up: process 0's judges, every other's reports to it."""

from __future__ import annotations

import json
import selectors
import socket
import time
from typing import TYPE_CHECKING, NoReturn

from paged_dist.cluster import startup as distributed
from paged_dist.cluster.exit_codes import LOST
from paged_dist.cluster.verdicts import NOT_HERE, PATIENCE, SILENT, START, Judge, Place, Verdict
from paged_dist.cluster.wire import drain, encoded, peer_of

if TYPE_CHECKING:
    from paged_dist.cluster.watchdog import Watchdog

END, STOP = "\nthe end", "\nthe step to stop before"  # meetings' names, none of which a caller would take
LAST = encoded({"end": True})
MARGIN = 2  # steps that a process may do after it heard of a preemption before it must know where to stop


class Spoke:
    """The thread of a process that is not 0: says that it lives and what its main thread has to say, and listens."""

    def __init__(self, watch: Watchdog, wake: socket.socket):
        self._watch, self._wake, self._hub = watch, wake, peer_of(watch._peers[0])
        self._who, self._at = "process 0", START  # of the coordinator

    def run(self) -> None:
        watch, hub = self._watch, self._hub
        heard, due, told, last = time.monotonic(), 0.0, False, False
        with selectors.DefaultSelector() as events:
            hub.register(events, 0)
            events.register(self._wake, selectors.EVENT_READ)
            self._hear_all(hub.messages())
            while not last and not watch._quits:
                if (now := time.monotonic()) >= due:
                    due = now + watch._beat
                    hub.put(encoded({"at": watch._place}))
                if watch._stopping and not told:
                    told = True
                    hub.put(encoded({"stop": True}) + encoded(watch._vote()))
                for line in watch._take_outbox():
                    hub.put(encoded({"at": watch._place}) + line)  # where it is when it says so
                    last = last or line == LAST
                hub.flush(events)
                for key, _ in events.select(max(0.0, due - time.monotonic())):
                    if key.fileobj is self._wake:
                        drain(self._wake)
                        continue
                    messages = hub.read(events)
                    if messages is None and not watch._over:
                        self._lost("its connection ended, the process is gone")
                    if messages is None:
                        return
                    if hub.present:
                        heard = time.monotonic()
                    self._hear_all(messages)
                silent, limit = time.monotonic() - heard, watch._limit if hub.present else watch._start_limit
                if silent > limit and not watch._over:
                    self._lost(SILENT.format(silent) if hub.present else NOT_HERE.format(silent))
            hub.flush_until(time.monotonic() + PATIENCE)

    def _hear_all(self, messages: list[dict]) -> None:
        for message in messages:
            self._hear(message)

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
            watch._set(_decided=watch._decided | {name: result}, _over=watch._over or name == END)
        elif "stop" in message:
            watch._stopping = True
        elif "stop_at" in message:
            watch._set(_stop_at=message["stop_at"])


class Hub:
    """The thread of process 0: hears all, judges, tells all."""

    def __init__(self, watch: Watchdog, wake: socket.socket):
        self._watch, self._wake = watch, wake
        self._peers = {i: peer_of(peer) for i, peer in watch._peers.items()}
        self._judge = Judge(watch.num_processes, watch._limit, watch._beat, time.monotonic(), watch._start_limit)
        self._judge.names[0] += f" ({watch._here})"
        self._urgent = False  # something came that may be a verdict now

    def run(self) -> None:
        watch, judge = self._watch, self._judge
        due, told, pronounced = 0.0, False, False
        with selectors.DefaultSelector() as events:
            for i, peer in self._peers.items():
                peer.register(events, i)
                self._take_all(i, peer.messages())
            events.register(self._wake, selectors.EVENT_READ, 0)
            while judge.present and not watch._quits:
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
                        drain(self._wake)
                        continue
                    messages = self._peers[key.data].read(events)
                    if messages is None:
                        judge.gone(key.data)
                        self._urgent = True
                        continue
                    self._take_all(key.data, messages)
                if self._urgent and not pronounced and not watch._over:
                    self._urgent = False
                    judge.at(0, watch._place, time.monotonic())
                    if verdict := judge.verdict(time.monotonic()):
                        pronounced = True
                        self._pronounce(verdict)
            for peer in self._peers.values():
                peer.flush_until(time.monotonic() + PATIENCE)

    def _take_all(self, i: int, messages: list[dict]) -> None:
        if self._peers[i].present:
            self._judge.heard(i, time.monotonic())  # a part of a long line is a sign of life too
        for message in messages:
            self._take(i, message)

    def _tell(self, message: dict) -> None:
        line = encoded(message)
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
            judge.met(message["decided"][0])
            self._tell(message)
        elif "value" in message:
            name, value = message["value"]
            with watch._changed:
                watch._values[name][i] = value
                votes = watch._values[name]
                watch._changed.notify_all()
            if name != STOP:
                judge.waits(i, name)
            elif len(votes) == watch.num_processes:
                stop_at = max(votes.values()) + MARGIN
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
