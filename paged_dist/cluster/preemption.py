"""SIGTERM while a run watches for it: it asks the run to stop at a step, and does not kill the process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from paged_dist.cluster.signals import action_of, set_action

_SECOND_AFTER = 5  # seconds; a supervisor that tells parent and child sends two within them


class SigtermWatch:
    """The process's handler of SIGTERM from `install` to `restore`.

    The first SIGTERM calls `ask_to_stop`. One that comes 5 seconds later or more kills.

    Args:
      ask_to_stop: called by the handler, so in the main thread, which may hold any lock just then.
    """

    def __init__(self, ask_to_stop: Callable[[], None]):
        self._ask_to_stop = ask_to_stop
        self._first_at: float | None = None
        self._before = None  # (Python's handler, C's action), once installed

    def install(self) -> None:
        """Sets the handler, once; in the main thread, where alone Python sets one."""
        if self._before is None:
            action = action_of(signal.SIGTERM)  # JAX's runtime has set one from C
            self._before = signal.signal(signal.SIGTERM, self._handle), action

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is not None and now - self._first_at > _SECOND_AFTER:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self._first_at = self._first_at or now
        self._ask_to_stop()

    def restore(self, was_asked: bool) -> None:
        """Puts back the handler before, from any thread; nothing where none was installed.

        Args:
          was_asked: whether the run was asked to stop, here or elsewhere. SIGTERM is then ignored: this process is
            about to end, and its cluster may ask it again, later.
        """
        if self._before is None:
            return
        handler, action = (signal.SIG_IGN, None) if was_asked else self._before
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
        if action is not None:
            set_action(signal.SIGTERM, action)
        self._before = None
