"""The watching thread of process 0: it hears all processes, has a `Judge` say whether the run ends, and tells all.

No collective holds it up. It ends its process last: JAX's coordinator, in the same process, ends with it.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any

from paged_dist.cluster.progress import Progress
from paged_dist.cluster.verdicts import PATIENCE, Judge, Verdict
from paged_dist.cluster.watch_state import STEPS_TO_STOP, STOP_MEETING, WatchState
from paged_dist.cluster.wire import Peer, drain, encoded


class Hub:
    """Hears the other processes and its own main thread, judges, and tells all.

    Args:
      state: what is shared with the main thread.
      peers: the other processes, by number.
      wake: has something to read when the main thread has changed `state`.
    """

    def __init__(self, state: WatchState, peers: Mapping[int, Peer], wake: socket.socket):
        self._state, self._peers, self._wake = state, peers, wake
        settings = state.settings
        self._judge = Judge(
            settings.num_processes, settings.limit, settings.beat, time.monotonic(), settings.start_limit
        )
        self._judge.names[0] += f" ({settings.this_process})"
        self._urgent = False  # something came that may be a verdict now

    def run(self) -> None:
        """Until all processes have left their blocks."""
        state, judge = self._state, self._judge
        due, told, pronounced = 0.0, False, False
        with selectors.DefaultSelector() as events:
            for i, peer in self._peers.items():
                peer.register(events, i)
                self._hear_all(i, peer.messages())
            events.register(self._wake, selectors.EVENT_READ, 0)
            while judge.present and not state.is_handed_over:
                if (now := time.monotonic()) >= due:
                    due = now + state.settings.beat
                    self._tell({"alive": state.progress})
                    judge.heard(0, now)
                    self._urgent = True
                if state.is_asked_to_stop and not told:
                    told = True
                    self._tell({"stop": True})
                    self._hear(0, state.vote_on_stop())
                for line in state.take_outbox():
                    self._hear(0, json.loads(line))
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
                    self._hear_all(key.data, messages)
                if self._urgent and not pronounced and not state.is_over:
                    self._urgent = False
                    judge.at(0, state.progress, time.monotonic())
                    if verdict := judge.verdict(time.monotonic()):
                        pronounced = True
                        self._pronounce(verdict)
            for peer in self._peers.values():
                peer.flush_until(time.monotonic() + PATIENCE)

    def _hear_all(self, i: int, messages: list[dict[str, Any]]) -> None:
        if self._peers[i].present:
            self._judge.heard(i, time.monotonic())  # a part of a long line is a sign of life too
        for message in messages:
            self._hear(i, message)

    def _tell(self, message: dict[str, Any]) -> None:
        """Says `message` to all other processes that are still there."""
        line = encoded(message)
        for i in self._judge.present:
            if i:
                self._peers[i].put(line)

    def _hear(self, i: int, message: dict[str, Any]) -> None:
        """What process i said; see `wire`."""
        state, judge, now = self._state, self._judge, time.monotonic()
        if "at" in message:
            judge.at(i, Progress(*message["at"]), now)
        elif "hello" in message:
            judge.names[i] += f" ({message['hello']})"
        elif "failed" in message:
            judge.failed(i, message["failed"], now)
            self._urgent = True
        elif "digest" in message:
            judge.digest(i, *message["digest"])
            self._urgent = True
        elif "stop" in message:
            state.is_asked_to_stop = True
        elif "end" in message:
            judge.left(i)
        elif "decided" in message:
            judge.met(message["decided"][0])
            self._tell(message)
        elif "value" in message:
            meeting, value = message["value"]
            values = state.put_value(meeting, i, value)
            if meeting != STOP_MEETING:
                judge.waits(i, meeting)
            elif len(values) == state.settings.num_processes:
                stop_at = max(values.values()) + STEPS_TO_STOP
                self._tell({"stop_at": stop_at})
                state.put_stop(stop_at)

    def _pronounce(self, verdict: Verdict) -> None:
        """Tells all why the run ends, waits a little for their ends, and ends this process."""
        self._tell({"verdict": verdict})
        until = time.monotonic() + self._state.settings.last_words
        others = [i for i in self._judge.present if i not in (0, verdict.lost)]
        for i in others:
            self._peers[i].flush_until(until)
        if verdict.culprit is not None and self._state.error is not None:  # each that failed by itself says so itself
            self._state.put_error_is_known()
            return
        for i in others:
            if i != verdict.culprit:
                self._peers[i].wait_for_end(until)
        self._state.end_process(verdict.code, verdict.text)
