"""Programs run as commands, each with a hard end, and the rows that they write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

SUPPORT = os.path.dirname(__file__)  # the PYTHONPATH of a command that imports from here
COMMAND_LIMIT = 200  # seconds until a command under test is killed; less than faulthandler_timeout
OF_THIS_PROCESS = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "PJRT_NPROC")  # its simulated devices


def launcher(name: str, *arguments) -> list[str]:
    """The command line of `python -m paged_dist.launch.NAME`."""
    return [sys.executable, "-P", "-m", f"paged_dist.launch.{name}", *map(str, arguments)]


def clean_environment() -> dict[str, str]:
    """This process's environment, less what simulates its devices."""
    return {k: v for k, v in os.environ.items() if k not in OF_THIS_PROCESS}


def run_command(command, *, limit: float = COMMAND_LIMIT, cwd=None, **environment) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command that knows nothing of this process's simulated devices.

    Where it takes longer than `limit` seconds, its whole process group is killed.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=cwd,
        env=clean_environment() | environment,
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def run_launcher(name: str, *arguments) -> tuple[int, str, str]:
    return run_command(launcher(name, *arguments))


def json_rows(path) -> list[dict]:
    """What a file of JSON lines holds; nothing where it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds: float = 20.0) -> None:
    """Until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)
