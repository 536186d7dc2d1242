"""Lines of JSON that several runs append to one file: no byte of another's is touched, a broken line costs itself."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import threading

import pytest

from paged_dist.launch.common import record_output
from paged_dist.launch.comparison.run_rows import read_rows
from paged_dist.launch.sweeps.sweep_rows import rows_in_file

OTHERS = b'{"benchmark": "scaling", "of": "another"}\n'


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(OTHERS)
    return path


def short_writes(monkeypatch, path, takes: list[int | None], between: bytes = b""):
    """Each os.write takes so many bytes (None: all), after the first another program appends `between`."""
    real, left = os.write, list(takes)

    def write(fd, data):
        take = left.pop(0)
        if take == -1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(fd, data[:take])
        if len(left) == len(takes) - 1:
            with open(path, "ab") as file:
                file.write(between)
        return written

    monkeypatch.setattr(os, "write", write)


def no_locks(monkeypatch, error):
    def flock(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_numbers_that_json_has_not_are_null_however_deep(path):
    record_output.append_json_line(str(path), {"a": math.nan, "b": {"c": [1.5, (math.inf, "x", True)]}})
    assert json.loads(path.read_text().splitlines()[1]) == {"a": None, "b": {"c": [1.5, [None, "x", True]]}}


@pytest.mark.parametrize("error", [None, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_short_write_is_gone_on_with(path, monkeypatch, error):
    short_writes(monkeypatch, path, [7, None])
    if error is not None:
        no_locks(monkeypatch, error)
    record_output.append_json_line(str(path), {"a": 1, "b": 2})
    broken = b"" if error is None else b'{"a": 1\n'
    assert path.read_bytes() == OTHERS + broken + b'{"a": 1, "b": 2}\n'


def test_what_another_wrote_after_a_short_write_stays(path, monkeypatch):
    """The other holds to no lock; d082498 cut its line off the end."""
    no_locks(monkeypatch, errno.ENOLCK)
    short_writes(monkeypatch, path, [7, None], between=b"\n" + OTHERS)
    record_output.append_json_line(str(path), {"a": 1, "b": 2})
    assert path.read_bytes() == OTHERS + b'{"a": 1\n' + OTHERS + b'\n{"a": 1, "b": 2}\n'


@pytest.mark.parametrize("takes", [[7, -1], [7, 3, -1], [7, 9, None]])
def test_a_full_disk_is_an_error_and_costs_one_line(path, monkeypatch, takes):
    with monkeypatch.context() as patch:
        short_writes(patch, path, takes)
        if takes[-1] is None:
            no_locks(patch, errno.ENOLCK)
        with pytest.raises(OSError) as raised:
            record_output.append_json_line(str(path), {"a": 1, "b": 2})
        assert raised.value.errno == errno.ENOSPC
    record_output.append_json_line(str(path), {"benchmark": "scaling", "c": 3})
    first, *broken, last = path.read_bytes().splitlines(keepends=True)
    assert first == OTHERS and all(line.startswith(b'{"a": 1') for line in broken) and json.loads(last)["c"] == 3
    rows, warning = read_rows(str(path))
    which = "2, 3" if takes[-1] is None else "2"
    assert len(rows) == 2 and warning == f"{path}: line {which}: not JSON (half-written?), left out"
    said = []
    assert [r.get("c") for r in rows_in_file(str(path), said.append)] == [None, 3]
    assert said == [f"warning: {path}: line {n}: not JSON (half-written?), left out" for n in which.split(", ")]


def test_writers_at_the_same_time_keep_all_lines_whole_though_writes_are_short(path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: -(-2 * len(data) // 3)]))
    one = lambda i: [record_output.append_json_line(str(path), {"i": i, "n": n, "pad": "x" * 30}) for n in range(20)]
    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    rows = [json.loads(line) for line in path.read_bytes().splitlines()[1:]]
    assert sorted((r["i"], r["n"]) for r in rows) == [(i, n) for i in range(4) for n in range(20)]


def test_a_lock_that_is_never_given_up_is_not_waited_for_for_ever(path, monkeypatch):
    monkeypatch.setattr(record_output, "_LOCK_SECONDS", 0.05)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        record_output.append_json_line(str(path), {"a": 1})
    assert path.read_bytes() == OTHERS + b'{"a": 1}\n'
