"""How a program gives out its result: a record as one line of JSON, appended to --output, then the text on stdout."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time

from paged_dist.transfer.files import try_lock, write_all


def deliver(name: str, text: str, path: str | None, record: dict) -> bool:
    """Appends a launcher's record to its output, if it has one, then prints `text`; False where either fails, which it
    says. In this order: a reader of stdout that has gone away must not cost the record."""
    written = append_output(name, path, record)
    return print_text(name, text) and written


def print_text(name: str, text: str) -> bool:
    """Prints launcher `name`'s `text`; False where stdout cannot be written, which it says."""
    try:
        print(text, flush=True)
    except OSError as e:
        print(f"{name}: error: stdout could not be written: {e}", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again at its end
        return False
    return True


def append_output(name: str, path: str | None, record: dict) -> bool:
    """`append_json_line` where a path is given; where that fails launcher `name` says so, and it is False."""
    try:
        if path is not None:
            append_json_line(path, record)
    except OSError as e:
        print(f"{name}: error: --output={path!r}: could not be written: {e}", file=sys.stderr, flush=True)
        return False
    return True


def append_json_line(path: str, record: dict) -> None:
    """Appends `record` as one line of JSON, in one write, so that no reader and no other run sees half a line.

    Folders on the way are made. A last line that an earlier writer left unfinished is ended first. Where a write takes
    a part only, as on a full disk, the rest is tried too; what cannot be written leaves a broken line, which
    readers leave out. Nothing that is in the file is ever changed: others may have written after it.

    Raises:
      OSError: the line could not be written.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    data = json.dumps(_null_for_non_finite(record), sort_keys=True, allow_nan=False).encode() + b"\n"
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        is_locked = _lock(fd)
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            data = b"\n" + data
        written = os.write(fd, data)
        if written < len(data) and is_locked:
            write_all(fd, data[written:])
        elif written < len(data):  # another's line may have come: the whole line once more, on a line of its own
            data = b"\n" + data.lstrip(b"\n")
            if os.write(fd, data) < len(data):
                raise OSError(errno.ENOSPC, "a part of the line only could be written", path)
    finally:
        os.close(fd)


def _null_for_non_finite(value):
    """`value` with JSON's null for NaN and infinities, which it has not, however deep they are."""
    if isinstance(value, dict):
        return {key: _null_for_non_finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_non_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_LOCK_SECONDS = 10  # a writer holds it for one write


def _lock(fd: int) -> bool:
    """Locks a file against others that append to it, until it is closed; False where that cannot be had."""
    until = time.monotonic() + _LOCK_SECONDS
    while (is_locked := try_lock(fd)) is False and time.monotonic() < until:
        time.sleep(0.01)
    return bool(is_locked)
