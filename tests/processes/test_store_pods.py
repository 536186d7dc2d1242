"""Pods of several processes that save, and others that restore."""

from __future__ import annotations

import os

import pytest
from commands import SUPPORT
from processes import free_port, run_processes


def run_pod(tmp_path, processes: int, steps: str, ends: bool = True):
    """What the processes of a pod of 8 devices printed of `steps`, in `store_process.py`; each has a hard end."""
    script = os.path.join(SUPPORT, "store_process.py")
    address = f"127.0.0.1:{free_port()}"
    code = "import runpy, sys; sys.argv = [{0!r}, {1!r}, {2!r}, '{3}', '{4}', {5!r}]; runpy.run_path({0!r})"
    scripts = [code.format(script, str(tmp_path), address, processes, i, steps) for i in range(processes)]
    devices = f"--xla_force_host_platform_device_count={8 // processes}"
    results = run_processes(scripts, 120, XLA_FLAGS=devices, PYTHONPATH=SUPPORT)
    for code, out, err in results:
        assert code == 0 or not ends, out + err
    return ["\n".join(line for line in out.splitlines() if line.startswith("TOLD")) for _, out, _ in results]


@pytest.mark.parametrize("there", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_two_processes_save_and_others_restore(tmp_path, there):
    first, second = run_pod(tmp_path, 2, "save,reshard")
    assert first == second and first.count("TOLD") == 2 and len({line.split()[-1] for line in first.splitlines()}) == 1
    assert len(list((tmp_path / "saved").rglob("pages-*.bin"))) == 8
    for restored in run_pod(tmp_path, there, "restore"):
        assert restored.split()[-1] == first.split()[-1]


def test_where_one_process_cannot_write_all_are_told_and_nothing_is_left(tmp_path):
    first, second = run_pod(tmp_path, 2, "fail")
    assert "No space left on device" in second
    assert "process 1 could not go on" in first
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(("process", "fsync"), [(0, 3), (0, 11), (0, 12), (1, 2)])
def test_where_a_process_is_killed_the_old_save_is_left_or_the_new(tmp_path, process, fsync):
    """Process 0 syncs 4 files of pages and their indices, the smoothing, 3 folders, the manifest (12: written)."""
    said = run_pod(tmp_path, 2, f"save,die-{process}-{fsync}", ends=False)
    old, new = (line.split()[-1] for line in said[1 - process].splitlines())
    (restored,) = run_pod(tmp_path, 1, "restore")
    assert old != new and restored.split()[-1] == (new if (process, fsync) == (0, 12) else old)
