"""A pod on this host: N processes of any launcher, M simulated CPU devices each: `paged-dist-local-pod`.

    python -m paged_dist.launch.local_pod --processes=2 --devices=4 -- decode --batch=64

The processes find each other over loopback. When one fails the others are ended, and its exit code is this one's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

NAME = "paged-dist-local-pod"
GRACE_SECONDS = 1.0  # between asking and killing: jax.distributed catches SIGTERM and may sit in a collective
OWN_END_SECONDS = 3.0  # for the others to end by themselves after one failed: the launchers' say who was lost
LOST, PREEMPTED = 3, 75  # exit codes of launchers, of paged_dist.cluster.watchdog, which would import jax
MOST_PROCESSES = 256
MOST_DEVICES = 1024  # of a process: 4,096 take 16 s to start, 100,000 eight minutes in which no signal is heard
# Asks the kernel (prctl 1 is PR_SET_PDEATHSIG) and becomes the command. It is no preexec_fn: that runs Python in a fork
# of this process, and hangs where another thread, such as one of JAX's, holds a lock. Two signals are as they were:
# Python ignores them, and exec would keep that.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)
if os.getppid() != int(sys.argv[1]):  # it died before
    os._exit(128 + signal.SIGKILL)
for number in (signal.SIGPIPE, signal.SIGXFSZ):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Child:
    """One process of the pod, leader of its own process group, its output read through pipes."""

    def __init__(self, index: int, command: Sequence[str], environment: dict[str, str]):
        self.index = index
        self.process = subprocess.Popen(
            dies_with_parent(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.code: int | None = None  # as a shell shows it: 128 + n for signal n
        self._partial = {self.process.stdout: b"", self.process.stderr: b""}
        for pipe in self._partial:
            os.set_blocking(pipe.fileno(), False)

    @property
    def pipes(self):
        """The child's stdout and stderr."""
        return tuple(self._partial)

    def poll(self) -> int | None:
        """The exit code once the process has ended."""
        if self.code is None and self.process.returncode is None:
            # Not reaped yet: until then its process group's number cannot become another program's.
            ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                self.code = ended.si_status + (0 if ended.si_code == os.CLD_EXITED else 128)
        return self.code

    def read(self, pipe) -> bool:
        """Passes on what `pipe` holds, whole lines with the child's prefix; False at its end."""
        try:
            data = os.read(pipe.fileno(), 65536)
        except BlockingIOError:
            return True
        lines = (self._partial[pipe] + data).split(b"\n")
        self._partial[pipe] = lines.pop()
        if not data and self._partial[pipe]:
            lines, self._partial[pipe] = [self._partial[pipe]], b""
        out = sys.stdout.buffer if pipe is self.process.stdout else sys.stderr.buffer
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
            os.killpg(self.process.pid, number)


def dies_with_parent(command: Sequence[str]) -> list[str]:
    """`command` as a child of this process that the kernel kills when this process dies, however it does.

    Strictly, when the thread that starts it ends.
    """
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def reserve_port() -> socket.socket:
    """A loopback socket on a free port, to be held open while the pod runs.

    It never listens. The coordinator binds the same port, for it sets one of the two options too, and no other
    program is given the port meanwhile.
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        held.setsockopt(socket.SOL_SOCKET, option, 1)
    held.bind(("127.0.0.1", 0))
    return held


def pod_environment(process: int, processes: int, devices: int, port: int, base: dict[str, str]) -> dict[str, str]:
    """The environment of one process: where the others are, and its simulated devices."""
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
    """The command of one process: a launcher of this package by its name, a module by its dotted name, or a script."""
    python = [sys.executable, *(["-P"] if sys.flags.safe_path else [])]
    if launcher.endswith(".py"):
        return [*python, launcher, *arguments]
    module = launcher if "." in launcher else f"paged_dist.launch.{launcher}"
    return [*python, "-m", module, *arguments]


def run_pod(
    command: Sequence[str],
    processes: int,
    devices: int,
    timeout_seconds: float | None = None,
    grace_seconds: float = 15.0,
) -> int:
    """Runs `command` as `processes` processes of `devices` simulated CPU devices each, until all have ended.

    Their output lines come out prefixed `[p0] `, `[p1] `, ... The environment tells each where the coordinator is
    (JAX_COORDINATOR_ADDRESS and the like, which the launchers read).

    Returns:
      0 where all end with 0, else the exit code of the first to fail (128 + n where signal n ended it; not 3, another
      process was lost, where one failed by itself); 124 after `timeout_seconds`, 130 after Ctrl-C. SIGTERM is passed
      on, for launchers to finish their step: the exit code is then theirs, or 143 where one is left after
      `grace_seconds`. Ctrl-C is passed on as SIGTERM, a second one waits for nobody. No process is left in any case.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    children: list[Child] = []
    before = signal.signal(signal.SIGTERM, _on_terminate)
    try:
        with reserve_port() as held, selectors.DefaultSelector() as selector:
            port = held.getsockname()[1]
            try:
                for index in range(processes):
                    environment = pod_environment(index, processes, devices, port, dict(os.environ))
                    children.append(Child(index, command, environment))
                    for pipe in children[-1].pipes:
                        selector.register(pipe, selectors.EVENT_READ, children[-1])
                code = _watch(children, selector, deadline)
            except (_Terminated, KeyboardInterrupt) as asked:
                is_ctrl_c = isinstance(asked, KeyboardInterrupt)
                if is_ctrl_c:
                    _say("interrupted: the processes are asked to stop; Ctrl-C once more kills them")
                code = _preempt(children, selector, grace_seconds)
                code = 130 if is_ctrl_c else code
            _end(children)
            _drain(selector)
            return code
    except (KeyboardInterrupt, _Terminated):  # after Ctrl-C
        return 130
    finally:
        # Ctrl-C once more must not leave a process behind.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        _end(children)
        for child in children:
            child.close()
        signal.signal(signal.SIGINT, previous)
        signal.signal(signal.SIGTERM, before)


class _Terminated(Exception):
    pass


def _on_terminate(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise _Terminated


def _watch(children: list[Child], selector: selectors.BaseSelector, deadline: float | None) -> int:
    """Passes output on until every child has ended with 0, one has failed, or time is up."""
    while True:
        _pass_on(selector, 0.1)
        failed = [child for child in children if child.poll()]
        if failed:
            return _first_failure(children, failed[0], selector)
        if all(child.code == 0 for child in children):
            return 0
        if deadline is not None and time.monotonic() > deadline:
            running = ", ".join(str(c.index) for c in children if c.code is None)
            _say(f"time is up; still running: {running}")
            return 124


def _first_failure(children: list[Child], first: Child, selector: selectors.BaseSelector) -> int:
    """The exit code of `first`, or of the one that it is about, which may end after it; says whose that is."""
    until = time.monotonic() + OWN_END_SECONDS
    while time.monotonic() < until and any(child.poll() is None for child in children):
        _pass_on(selector, 0.05)
    guilty = first
    if first.code == LOST:
        guilty = next((child for child in children if child.code not in (None, 0, LOST)), first)
    _say(f"process {guilty.index} ended with exit code {guilty.code}")
    return guilty.code


def _preempt(children: list[Child], selector: selectors.BaseSelector, grace_seconds: float) -> int:
    """Passes SIGTERM on and waits for the children's own end: their exit code, 143 where one has to be killed."""
    for child in children:
        if child.poll() is None:
            child.signal_group(signal.SIGTERM)
    until = time.monotonic() + grace_seconds
    while any(child.poll() is None for child in children):
        if time.monotonic() > until:
            return 128 + signal.SIGTERM
        _pass_on(selector, 0.05)
    codes = {child.code for child in children} - {0}
    return max(codes - {PREEMPTED, LOST}, default=max(codes, default=0))


def _pass_on(selector: selectors.BaseSelector, seconds: float) -> None:
    if not selector.get_map():
        time.sleep(seconds)
    for key, _ in selector.select(timeout=seconds):
        if not key.data.read(key.fileobj):
            selector.unregister(key.fileobj)


def _drain(selector: selectors.BaseSelector) -> None:
    """What ended processes still had in their pipes."""
    while selector.get_map() and (ready := selector.select(timeout=0)):
        for key, _ in ready:
            if not key.data.read(key.fileobj):
                selector.unregister(key.fileobj)


def _end(children: list[Child]) -> None:
    """Ends what still runs: asks, waits a little, kills. Also what a child has left in its process group."""
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        if child.poll() is None:
            child.signal_group(signal.SIGTERM)
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    for child in children:
        if child.process.returncode is None:
            child.signal_group(signal.SIGKILL)
            child.process.wait()


def _say(line: str) -> None:
    print(f"{NAME}: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Parses `argv` (without the program's name) and runs the pod."""
    parser = argparse.ArgumentParser(
        NAME,
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        epilog="exit codes: 0 all done; 124 time is up; 130 Ctrl-C; else that of the process that failed",
        usage="%(prog)s [--processes=N] [--devices=M] [--timeout_seconds=S] [--grace_seconds=S] -- LAUNCHER [FLAGS]",
    )
    parser.add_argument("--processes", type=_count(MOST_PROCESSES), default=2, help="processes to start (default 2)")
    parser.add_argument(
        "--devices", type=_count(MOST_DEVICES), default=4, help="simulated CPU devices of each (default 4)"
    )
    parser.add_argument("--timeout_seconds", type=float, default=None, help="end all after so long, with exit code 124")
    parser.add_argument(
        "--grace_seconds",
        type=float,
        default=15.0,
        help="after SIGTERM, kill what is left (default 15)",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the command and what each process is told")
    parser.add_argument("launcher", help="a launcher of this package (decode), a module, or a script ending in .py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its flags")
    parser.error = lambda message: (_say(f"error: {message}"), sys.exit(2))
    args = parser.parse_args(argv)
    command = launcher_command(args.launcher, args.arguments)
    if not _exists(args.launcher, command):
        parser.error(f"launcher {args.launcher!r}: there is no {command[-1 - len(args.arguments)]}")
    if args.dry_run:
        print(_dry_text(command, args.processes, args.devices))
        return 0
    return run_pod(command, args.processes, args.devices, args.timeout_seconds, args.grace_seconds)


def _dry_text(command: Sequence[str], processes: int, devices: int) -> str:
    """The command, as a shell takes it, and what the environment of each process adds; port 0 stands for a free one."""
    lines = [shlex.join(command)]
    for i in range(processes):
        told = {
            k: v for k, v in pod_environment(i, processes, devices, 0, {}).items() if k.startswith(("JAX_", "XLA_"))
        }
        lines.append(f"[p{i}] " + " ".join(f"{name}={shlex.quote(value)}" for name, value in told.items()))
    return "\n".join([*lines, f"dry run: {processes} processes; nothing was started"])


def _exists(launcher: str, command: Sequence[str]) -> bool:
    """Whether the script or module that `command` runs is there; imports its parent packages."""
    if launcher.endswith(".py"):
        return os.path.isfile(launcher)
    try:
        return importlib.util.find_spec(command[command.index("-m") + 1]) is not None
    except ModuleNotFoundError:
        return False


def _count(most: int):
    """The type of an argument that is a number from 1 to `most`."""

    def count(text: str) -> int:
        value = int(text)
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(f"must be at least 1 and at most {most}")
        return value

    return count


def cli() -> None:
    """The console script."""
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before or after the pod
        _say("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    cli()
