"""The decode launcher with a fault in it: FAULT=KIND:PROCESS:STEP, before that step is dispatched on that process."""

import os
import signal
import sys
import time

from paged_dist.launch import decode
from paged_dist.launch.serving.engine import Engine

kind, process, step = os.environ["FAULT"].split(":")
dispatch = Engine.dispatch


def dispatch_with_fault(self, plan, tables):
    import jax

    if jax.process_index() == int(process) and len(self.measured.step_seconds) == int(step):
        print(f"fault: {kind} of pid {os.getpid()}", file=sys.stderr, flush=True)
        if kind in ("SIGKILL", "SIGSTOP", "SIGTERM", "SIGINT"):
            os.kill(os.getpid(), getattr(signal, kind))
        elif kind == "raise":
            raise ZeroDivisionError("as the test wants it")
        elif kind == "hang":
            time.sleep(1000)
        elif kind == "pages":
            decode.faulty_schedule.fingerprint ^= 1
    return dispatch(self, plan, tables)


if kind == "set-up":
    prepare_run = decode.prepare_run

    def hang_once(*arguments, **options):
        import jax

        if jax.process_index() == int(process):
            print(f"fault: {kind} of pid {os.getpid()}", file=sys.stderr, flush=True)
            time.sleep(1000)
        return prepare_run(*arguments, **options)

    decode.prepare_run = hang_once

if kind == "pages":
    from paged_dist.launch.serving import row_schedule

    start = row_schedule.RowSchedule.__init__

    def keep(self, *arguments):
        start(self, *arguments)
        decode.faulty_schedule = self

    row_schedule.RowSchedule.__init__ = keep

if kind == "profile":
    import jax

    write = jax.profiler.stop_trace

    def full():
        write()
        raise OSError(28, "No space left on device")

    jax.profiler.stop_trace = full

if kind == "compile":
    Engine.compile = lambda _: signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in a shell's background has it ignored
Engine.dispatch = dispatch_with_fault
decode.cli()
