"""A sweep on a host without accelerators: each point runs in a local pod of its own, of processes on this host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile

from paged_dist.cluster import PREEMPTED
from paged_dist.launch import decode
from paged_dist.launch.common import flag_checks, shared_flags
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.local_processes import MOST_PROCESSES, dies_with_parent, launcher_command
from paged_dist.launch.serving import workload_flags
from paged_dist.launch.sweeps import sweep_flags
from paged_dist.launch.sweeps.points import Point, SweepSize, points_of
from paged_dist.launch.sweeps.sweep_rows import SweepRows


def points_in_pods() -> list[Point]:
    """The sweep over local pods of --processes.

    Raises:
      ValueError: too many processes, and what `points_of` refuses.
    """
    counts = sweep_flags.sizes_of_sweep("processes", sweep_flags.PROCESSES.value)
    flag_checks.at_most(MOST_PROCESSES, processes=counts[-1])
    return points_of([SweepSize(n * sweep_flags.DEVICES.value, processes=n) for n in counts])


def pod_command(point: Point, output: str) -> list[str]:
    """The command of a point's local pod, whose row goes to the file `output`."""
    data, context, model = point.mesh
    own = {"data": data, "context": context, "model": model, "batch": point.batch}
    own["repeat_requests"] = point.times * workload_flags.REPEAT_REQUESTS.value
    modules = (shared_flags, workload_flags, decode)
    taken = {flag.name for module in modules for flag in flags.FLAGS.get_flags_for_module(module)}
    given = [
        f"{name}={value}"
        for name, value in shared_flags.given_flags(whole_run=True).items()
        if name[2:] in taken and name[2:] not in (*own, *sweep_flags.OF_THE_SWEEP, *sweep_flags.OF_A_PROCESS)
    ]
    assert point.processes is not None
    pod = [f"--processes={point.processes}", f"--devices={point.size // point.processes}", "--", "decode"]
    run = [*given, *(f"--{name}={value}" for name, value in own.items()), f"--output={output}"]
    return launcher_command("local_pod", [*pod, *run])


def run_in_pods(rows: SweepRows) -> int:
    """Measures the points that are not in --output yet, each in a local pod of its own; the exit code."""
    pods = PodRunner()
    with pods:
        for point in rows.due():
            rows.say(str(point))
            with tempfile.TemporaryDirectory() as folder:
                output, log = os.path.join(folder, "row.jsonl"), os.path.join(folder, "log")
                code = pods.run(pod_command(point, output), log)
                if pods.stopped:
                    rows.say_stopped()
                    return pods.stopped
                if code != 0:
                    with open(log, encoding="utf-8", errors="replace") as file:
                        rows.say("\n".join(["the last lines of the run:", *file.read().splitlines()[-8:]]))
                    rows.say(f"error: {point}: exit code {code}")
                    return 1
                with open(output, encoding="utf-8") as file:
                    record = json.loads(file.readline())
            if not rows.add(point, record):
                return 1
    return rows.conclude()


class PodRunner:
    """Runs local pods one after another; Ctrl-C and SIGTERM end the one that runs, and all of its processes.

    Attributes:
      stopped: the exit code after Ctrl-C (130) or SIGTERM (75); 0 where neither came.
    """

    def __init__(self):
        self.stopped = 0
        self._pod: subprocess.Popen | None = None
        self._before: dict = {}  # signal -> its handler before

    def __enter__(self) -> PodRunner:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number, frame) -> None:
        self.stopped = PREEMPTED if number == signal.SIGTERM else 128 + number
        if self._pod is not None and self._pod.poll() is None:
            self._pod.send_signal(signal.SIGINT)

    def run(self, command: list[str], log: str) -> int:
        """The exit code of `command`, whose output goes to the file `log`."""
        with open(log, "wb") as file:
            self._pod = subprocess.Popen(
                dies_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        if self.stopped:  # while it was started
            self._pod.send_signal(signal.SIGINT)
        return self._pod.wait()
