"""Ctrl-C on a run that has something to report: the run stops before its next step, as after SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

INTERRUPTED = 128 + signal.SIGINT


class CtrlC:
    """A context in which the first Ctrl-C is passed on as SIGTERM; a second one raises KeyboardInterrupt as ever.

    Args:
      name: the program's, in front of the line that the first one prints.

    Attributes:
      came: whether there was one.
    """

    def __init__(self, name: str):
        self.came, self._name = False, name
        self._before: Callable[[int, FrameType | None], Any] | int | signal.Handlers | None = None

    def __enter__(self) -> CtrlC:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell starts what runs in the background
            self._before = signal.signal(signal.SIGINT, self._asked)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(OSError):  # not print(): the main thread may be in one
            text = f"{self._name}: interrupted: stops before the next step; Ctrl-C once more ends it at once\n"
            os.write(2, text.encode())
        signal.raise_signal(signal.SIGTERM)
