"""Processes of this host that play the hosts of a pod: their environment, their start, their output, their signals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

MOST_PROCESSES = 256
MOST_DEVICES = 1024  # of a process: 4,096 take 16 s to start, 100,000 eight minutes in which no signal is heard
# A program that asks the kernel to be killed with its parent (prctl 1 is PR_SET_PDEATHSIG) and becomes the command. It
# is no preexec_fn: that runs Python in a fork of this process, and hangs where another thread, such as one of JAX's,
# holds a lock. Python ignores two signals, and exec would keep that: they are set to their defaults.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)
if os.getppid() != int(sys.argv[1]):  # it died before
    os._exit(128 + signal.SIGKILL)
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ChildProcess:
    """One process of a local pod: the leader of its own process group, its output read through pipes.

    Attributes:
      index: which process of the pod it is.
      code: its exit code as a shell shows it, 128 + n for signal n; None until `poll` has found that it has ended.
    """

    def __init__(self, index: int, command: Sequence[str], environment: dict[str, str]):
        self.index = index
        self._process = subprocess.Popen(
            dies_with_parent(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.code: int | None = None
        assert self._process.stdout is not None and self._process.stderr is not None  # both are pipes
        # Of each pipe the line that has not ended yet.
        self._partial: dict[IO[bytes], bytes] = {self._process.stdout: b"", self._process.stderr: b""}
        for pipe in self._partial:
            os.set_blocking(pipe.fileno(), False)

    @property
    def pipes(self) -> tuple[IO[bytes], ...]:
        """The child's stdout and stderr."""
        return tuple(self._partial)

    def poll(self) -> int | None:
        """The exit code once the process has ended."""
        if self.code is None and self._process.returncode is None:
            # Not reaped yet: until then its process group's number cannot become another program's.
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                self.code = ended.si_status + (0 if ended.si_code == os.CLD_EXITED else 128)
        return self.code

    def read(self, pipe: IO[bytes]) -> bool:
        """Passes on what `pipe` holds, whole lines with the child's prefix; False at its end."""
        try:
            data = os.read(pipe.fileno(), 65536)
        except BlockingIOError:
            return True
        lines = (self._partial[pipe] + data).split(b"\n")
        self._partial[pipe] = lines.pop()
        if not data and self._partial[pipe]:
            lines, self._partial[pipe] = [self._partial[pipe]], b""
        out = sys.stdout.buffer if pipe is self._process.stdout else sys.stderr.buffer
        if lines:
            prefix = b"[p%d] " % self.index  # an empty line is its prefix alone
            with contextlib.suppress(BrokenPipeError):
                out.write(b"".join((prefix + line).rstrip(b" ") + b"\n" for line in lines))
                out.flush()
        return bool(data)

    def close(self) -> None:
        """Closes the pipes; what they still hold is lost."""
        for pipe in self._partial:
            pipe.close()

    def signal_group(self, number: int) -> None:
        """Sends a signal to the child and to what it started; nothing where all are gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Kills the child, unless that was done before, and what it has left in its process group."""
        if self._process.returncode is None:
            self.signal_group(signal.SIGKILL)
            self._process.wait()


def dies_with_parent(command: Sequence[str]) -> list[str]:
    """`command` for a child of this process that the kernel kills when this process dies, however it does.

    Strictly, the kernel kills it when the thread that starts it ends.
    """
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def reserve_port() -> socket.socket:
    """A loopback socket on a free port, to be held open while the pod runs.

    It never listens. The coordinator can bind the same port, for it sets one of the two options too. No other program
    is given the port meanwhile.
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        held.setsockopt(socket.SOL_SOCKET, option, 1)
    held.bind(("127.0.0.1", 0))
    return held


def pod_environment(process: int, processes: int, devices: int, port: int, base: dict[str, str]) -> dict[str, str]:
    """The environment variables of one process: where the others are, and how many CPU devices are simulated."""
    xla = re.sub(r"--xla_force_host_platform_device_count=\S*", "", base.get("XLA_FLAGS", ""))
    environment = base | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{xla} --xla_force_host_platform_device_count={devices}".strip(),
        "PYTHONUNBUFFERED": "1",
    }
    for name in (
        "JAX_NUM_CPU_DEVICES",  # it would win over XLA_FLAGS
        "JAX_COORDINATOR_ADDRESS",
        "JAX_COORDINATOR_BIND_ADDRESS",
        "JAX_NUM_PROCESSES",
        "JAX_PROCESS_ID",
        "JAX_LOCAL_DEVICE_IDS",
    ):
        environment.pop(name, None)
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(process),
        }
    return environment


def launcher_command(launcher: str, arguments: Sequence[str]) -> list[str]:
    """The command of one process.

    Args:
      launcher: a program of launch/ by its name (decode), a module by its dotted name, or a script ending in .py.
      arguments: its flags.
    """
    python = [sys.executable, *(["-P"] if sys.flags.safe_path else [])]
    if launcher.endswith(".py"):
        return [*python, launcher, *arguments]
    module = launcher if "." in launcher else f"paged_dist.launch.{launcher}"
    return [*python, "-m", module, *arguments]
