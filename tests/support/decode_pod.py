"""Real processes of the decode launcher with a fault in one of them."""

import json
import os
import subprocess
import sys
import time

from commands import COMMAND_LIMIT

from paged_dist.launch.local_pod import pod_environment, reserve_port

SHORT_RUN = ["--max_context=50", "--layers=1", "--num_kv_heads=2", "--num_q_heads=2", "--batch=4", "--oracle_samples=2"]
FAULTY_DECODE = [sys.executable, "-P", os.path.join(os.path.dirname(__file__), "faulty_decode.py")]


class DecodePod:
    """`count` processes of the decode launcher, each with one device and a context shard of every sequence."""

    def __init__(self, tmp_path, count=2, fault="none:0:0", arguments=(), start=None, timeout=15, generated=400):
        self.output = tmp_path / "out.jsonl"
        self.processes, self._held = [], reserve_port()
        port = self._held.getsockname()[1]
        shape = ["--num_requests=4", f"--max_generated={generated}", "--length_scale=5", *SHORT_RUN]
        shape += [f"--context={count}", "--model=1", f"--timeout_seconds={timeout}", f"--output={self.output}"]
        self.logs = [tmp_path / f"log{i}" for i in range(count)]
        for i in range(count) if start is None else start:
            environment = pod_environment(i, count, 1, port, dict(os.environ)) | {"FAULT": fault}
            with open(self.logs[i], "ab") as log:
                command = [*FAULTY_DECODE, *shape, *arguments]
                self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for p in self.processes:
            p.kill()  # SIGKILL, also to what was stopped
            p.wait()
        self._held.close()

    def log(self, i):
        return self.logs[i].read_text()

    def wait_for(self, holds, limit=COMMAND_LIMIT):
        until = time.monotonic() + limit
        while not holds():
            assert time.monotonic() < until, [self.log(i) for i in range(len(self.processes))]
            time.sleep(0.02)

    def ends(self, *which, limit=COMMAND_LIMIT):
        """The exit codes of these processes, and the seconds that the last took since the fault."""
        self.wait_for(lambda: any("fault: " in path.read_text() for path in self.logs if path.exists()))
        begin = time.monotonic()
        self.wait_for(lambda: all(self.processes[i].poll() is not None for i in which), limit)
        return [self.processes[i].returncode for i in which], time.monotonic() - begin

    def last_line(self, i):
        return self.log(i).strip().splitlines()[-1]

    def records(self):
        return [json.loads(line) for line in self.output.read_text().splitlines()] if self.output.exists() else []
