"""Signal handlers as the C library holds them: read, and put back exactly as they were; `SlowAbort` delays abort().

Python's `signal` knows only those set in Python. JAX's runtime and faulthandler set theirs from C, and `signal.signal`
would put the default action in their place.
"""

from __future__ import annotations

import ctypes
import signal

_ACTION_BYTES = 512  # more than a struct sigaction of any platform; its first member is the handler's address

_libc = ctypes.CDLL(None, use_errno=True)
_libc.signal.argtypes, _libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p


def action_of(number: int) -> bytes:
    """What the process does on signal `number` now, as bytes for `set_action`."""
    action = ctypes.create_string_buffer(_ACTION_BYTES)
    if _libc.sigaction(number, None, action):
        raise OSError(ctypes.get_errno(), f"sigaction({number})")
    return action.raw


def handler_in(action: bytes) -> int:
    """The address of the handler in `action`. Compare that alone: glibc leaves other bytes undefined."""
    return ctypes.c_void_p.from_buffer_copy(action).value or 0


def set_action(number: int, action: bytes) -> None:
    """Makes the process do `action`, which `action_of` found, on signal `number`. Works in any thread."""
    if _libc.sigaction(number, action, None):
        raise OSError(ctypes.get_errno(), f"sigaction({number})")


class SlowAbort:
    """Makes abort() wait 6 seconds, until `release`.

    JAX's client aborts its process as soon as the coordinator is gone. It might be faster than the watching thread,
    which says who is lost and ends the process itself. The handler of SIGABRT is C's sleep(), which is called with the
    signal's number, 6, as seconds; abort() goes on after it.
    """

    def __init__(self):
        self._before = action_of(signal.SIGABRT)
        _libc.signal(signal.SIGABRT, ctypes.cast(_libc.sleep, ctypes.c_void_p))
        self._mine = handler_in(action_of(signal.SIGABRT))

    def release(self) -> None:
        """Puts the former handler back, unless somebody has set another since. A second call does nothing."""
        if handler_in(action_of(signal.SIGABRT)) == self._mine:
            set_action(signal.SIGABRT, self._before)
