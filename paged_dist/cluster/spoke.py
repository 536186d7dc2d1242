"""The watching thread of a process other than 0: it reports to process 0 and listens to it.

No collective holds it up. It ends its process where process 0 is lost, or says that the run ends.
"""

from __future__ import annotations

import selectors
import socket
import time
from typing import Any, NoReturn

from paged_dist.cluster.exit_codes import LOST
from paged_dist.cluster.progress import START, Progress
from paged_dist.cluster.verdicts import NOT_HERE, PATIENCE, SILENT, Verdict
from paged_dist.cluster.watch_state import WatchState
from paged_dist.cluster.wire import Peer, drain, encoded

_LAST_LINE = encoded({"end": True})


class Spoke:
    """Says that this process lives and what its main thread has to say, and hears process 0.

    Args:
      state: what is shared with the main thread.
      hub: process 0.
      wake: has something to read when the main thread has changed `state`.
    """

    def __init__(self, state: WatchState, hub: Peer, wake: socket.socket):
        self._state, self._hub, self._wake = state, hub, wake
        self._hub_name, self._hub_progress = "process 0", START

    def run(self) -> None:
        """Until the main thread has left its block."""
        state, hub = self._state, self._hub
        settings = state.settings
        heard, due, told, last = time.monotonic(), 0.0, False, False
        with selectors.DefaultSelector() as events:
            hub.register(events, 0)
            events.register(self._wake, selectors.EVENT_READ)
            self._hear_all(hub.messages())
            while not last and not state.is_handed_over:
                if (now := time.monotonic()) >= due:
                    due = now + settings.beat
                    hub.put(encoded({"at": state.progress}))
                if state.is_asked_to_stop and not told:
                    told = True
                    hub.put(encoded({"stop": True}) + encoded(state.vote_on_stop()))
                for line in state.take_outbox():
                    hub.put(encoded({"at": state.progress}) + line)  # where it is when it says so
                    last = last or line == _LAST_LINE
                hub.flush(events)
                for key, _ in events.select(max(0.0, due - time.monotonic())):
                    if key.fileobj is self._wake:
                        drain(self._wake)
                        continue
                    messages = hub.read(events)
                    if messages is None and not state.is_over:
                        self._end_without_hub("its connection ended, the process is gone")
                    if messages is None:
                        return
                    if hub.present:
                        heard = time.monotonic()
                    self._hear_all(messages)
                silent, limit = time.monotonic() - heard, settings.limit if hub.present else settings.start_limit
                if silent > limit and not state.is_over:
                    self._end_without_hub((SILENT if hub.present else NOT_HERE).format(silent))
            hub.flush_until(time.monotonic() + PATIENCE)

    def _hear_all(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            self._hear(message)

    def _end_without_hub(self, how: str) -> NoReturn:
        """Ends this process: process 0 is lost."""
        last = f"the coordinator, last heard of {self._hub_progress}"
        self._state.end_process(LOST, f"lost {self._hub_name}, {last}: {how}; this one is {self._state.progress}")

    def _hear(self, message: dict[str, Any]) -> None:
        """What process 0 said; see `wire`."""
        state = self._state
        if "alive" in message:
            self._hub_progress = Progress(*message["alive"])
        elif "hello" in message:
            self._hub_name += f" ({message['hello']})"
        elif "verdict" in message:
            verdict = Verdict(*message["verdict"])
            if verdict.culprit is not None and state.error is not None:  # each that failed by itself says so itself
                state.put_error_is_known()
            elif not state.is_over:
                state.end_process(verdict.code, verdict.text)
        elif "decided" in message:
            state.put_decision(*message["decided"])
        elif "stop" in message:
            state.is_asked_to_stop = True
        elif "stop_at" in message:
            state.put_stop(message["stop_at"])
