"""A pod on this host: N processes of any launcher, M simulated CPU devices each: `paged-dist-local-pod`.

    python -m paged_dist.launch.local_pod --processes=2 --devices=4 -- decode --batch=64

The processes find each other over loopback. When one fails the others are ended, and its exit code is this one's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import selectors
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from paged_dist.cluster import LOST, PREEMPTED
from paged_dist.launch.common.local_processes import (
    MOST_DEVICES,
    MOST_PROCESSES,
    ChildProcess,
    launcher_command,
    pod_environment,
    reserve_port,
)

NAME = "paged-dist-local-pod"
GRACE_SECONDS = 1.0  # between asking and killing: jax.distributed catches SIGTERM and may sit in a collective
OWN_END_SECONDS = 3.0  # for the others to end by themselves after one failed: the launchers' say who was lost


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
    children: list[ChildProcess] = []
    before = signal.signal(signal.SIGTERM, _on_terminate)
    try:
        with reserve_port() as held, selectors.DefaultSelector() as selector:
            port = held.getsockname()[1]
            try:
                for index in range(processes):
                    environment = pod_environment(index, processes, devices, port, dict(os.environ))
                    children.append(ChildProcess(index, command, environment))
                    for pipe in children[-1].pipes:
                        selector.register(pipe, selectors.EVENT_READ, children[-1])
                code = _watch_children(children, selector, deadline)
            except (_Terminated, KeyboardInterrupt) as asked:
                is_ctrl_c = isinstance(asked, KeyboardInterrupt)
                if is_ctrl_c:
                    _print_line("interrupted: the processes are asked to stop; Ctrl-C once more kills them")
                code = _preempt_children(children, selector, grace_seconds)
                code = 130 if is_ctrl_c else code
            _end_children(children)
            _drain(selector)
            return code
    except (KeyboardInterrupt, _Terminated):  # after Ctrl-C
        return 130
    finally:
        # Ctrl-C once more must not leave a process behind.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        _end_children(children)
        for child in children:
            child.close()
        signal.signal(signal.SIGINT, previous)
        signal.signal(signal.SIGTERM, before)


class _Terminated(Exception):
    """SIGTERM came."""


def _on_terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise _Terminated


def _watch_children(children: list[ChildProcess], selector: selectors.BaseSelector, deadline: float | None) -> int:
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
            _print_line(f"time is up; still running: {running}")
            return 124


def _first_failure(children: list[ChildProcess], first: ChildProcess, selector: selectors.BaseSelector) -> int:
    """The exit code of `first`, or of the one that it is about, which may end after it; says whose that is."""
    until = time.monotonic() + OWN_END_SECONDS
    while time.monotonic() < until and any(child.poll() is None for child in children):
        _pass_on(selector, 0.05)
    guilty = first
    if first.code == LOST:
        guilty = next((child for child in children if child.code not in (None, 0, LOST)), first)
    _print_line(f"process {guilty.index} ended with exit code {guilty.code}")
    assert guilty.code is not None
    return guilty.code


def _preempt_children(children: list[ChildProcess], selector: selectors.BaseSelector, grace_seconds: float) -> int:
    """Passes SIGTERM on and waits for the children's own end: their exit code, 143 where one has to be killed."""
    for child in children:
        if child.poll() is None:
            child.signal_group(signal.SIGTERM)
    until = time.monotonic() + grace_seconds
    while any(child.poll() is None for child in children):
        if time.monotonic() > until:
            return 128 + signal.SIGTERM
        _pass_on(selector, 0.05)
    codes = {child.code for child in children if child.code}
    return max(codes - {PREEMPTED, LOST}, default=max(codes, default=0))


def _pass_on(selector: selectors.BaseSelector, seconds: float) -> None:
    """Passes on the output that comes within `seconds`, or the first of it."""
    if not selector.get_map():
        time.sleep(seconds)
    for key, _ in selector.select(timeout=seconds):
        if not key.data.read(key.fileobj):
            selector.unregister(key.fileobj)


def _drain(selector: selectors.BaseSelector) -> None:
    """Passes on what processes that have ended left in their pipes."""
    while selector.get_map() and (ready := selector.select(timeout=0)):
        for key, _ in ready:
            if not key.data.read(key.fileobj):
                selector.unregister(key.fileobj)


def _end_children(children: list[ChildProcess]) -> None:
    """Ends the children that still run: asks, waits a little, kills. Kills also what they left in their groups."""
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        if child.poll() is None:
            child.signal_group(signal.SIGTERM)
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    for child in children:
        child.kill()


def _print_line(line: str) -> None:
    print(f"{NAME}: {line}", file=sys.stderr, flush=True)


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line; argparse's own prints the usage first."""
        _print_line(f"error: {message}")
        sys.exit(2)


def main(argv: Sequence[str]) -> int:
    """Parses `argv` (without the program's name) and runs the pod."""
    parser = _ArgumentParser(
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


def _count(most: int) -> Callable[[str], int]:
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
        _print_line("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    cli()
