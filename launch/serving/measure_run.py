"""One run of the decode benchmark, on every process: compile, decode, and gather what the processes measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import jax

from paged_dist import PageAllocator, Watchdog, describe_mesh
from paged_dist._errors import BadValue
from paged_dist.cluster import PREEMPTED
from paged_dist.launch.common import shared_flags
from paged_dist.launch.common.interrupt import INTERRUPTED, CtrlC
from paged_dist.launch.common.program import Program
from paged_dist.launch.common.run_program import usage_errors
from paged_dist.launch.serving.engine import Engine
from paged_dist.launch.serving.results import process_results, run_record
from paged_dist.launch.serving.row_schedule import RowSchedule, choose_checks
from paged_dist.launch.serving.run_setup import DecodeRun


def _compile_part(
    run: DecodeRun, watch: Watchdog, say: Callable[[str], None], oracle_samples: int
) -> tuple[Engine, RowSchedule]:
    """This process's part of the run: the programs, compiled and warmed up, and the schedule that feeds them."""
    m, requests = run.model, run.requests
    batch, columns = run.pool.batch, run.pages_per_sequence
    watch.phase("compile")
    with usage_errors((BadValue, NotImplementedError)):  # it traces the step: JAX's own errors are no flag's
        engine = Engine(m, run.spec, run.mesh, batch, columns, shared_flags.IMPLEMENTATION.value)
        allocator = PageAllocator(run.spec, run.mesh, batch, columns)
        checks = choose_checks(requests, oracle_samples, m.num_layers, shared_flags.SEED.value)
        schedule = RowSchedule(requests, allocator, run.pool, engine.chunk_tokens, checks)
    say(describe_mesh(run.mesh).partition("\n")[0])
    say(f"compiling for {len(requests)} requests, {sum(r.generated for r in requests)} tokens to generate")
    engine.compile()
    engine.warm_up()
    return engine, schedule


def measure_run(
    program: Program,
    run: DecodeRun,
    watch: Watchdog,
    say: Callable[[str], None],
    finish: Callable[[dict], int],
    *,
    oracle_samples: int,
    tag: str = "",
    profile_dir: str | None = None,
    sweep: int | None = None,
) -> int:
    """Decodes the requests of `run` and reports how it went; a process without a device of the mesh calls it too.

    Args:
      program: in whose name lines are printed.
      say: prints a line, on process 0 alone.
      finish: called with the record, on process 0; returns the exit code of all processes.
      oracle_samples: outputs to check against the float64 oracle.
      tag: tells this run from the others of a sweep.
      sweep: the number of the first step, in a sweep, whose runs SIGTERM does not end; None: no sweep.

    Returns:
      The exit code. Where this process was stopped by Ctrl-C, it is 130, and 75 on the others.
    """
    measured = results = None
    ctrl_c = CtrlC(program.name)
    takes_part = any(d.process_index == jax.process_index() for d in run.mesh.devices.flat)
    part = _compile_part(run, watch, say, oracle_samples) if takes_part else None
    watch.meet(f"compiled{tag}")
    if part is not None:
        engine, schedule = part
        with contextlib.nullcontext() if sweep is not None else ctrl_c:
            measured = engine.run(schedule, say, profile_dir, watch, first_step=sweep or 0, stops=sweep is None)
        if measured.profile_error:
            why = measured.profile_error
            program.say(f"error: --profile_dir={profile_dir!r}: no profile could be written: {why}")
        results = process_results(measured, schedule.fingerprint)
    else:
        watch.idle()

    def conclude(everyone: list[dict | None]) -> int:
        assert measured is not None  # process 0 has a device of every mesh
        if measured.stopped and not measured.step_seconds:
            say("asked to stop before the first step: there is nothing to report")
            return PREEMPTED
        return finish(run_record(run, measured, everyone))

    code = watch.decide(f"the report{tag}", results, conclude)
    return INTERRUPTED if code == PREEMPTED and ctrl_c.came else code
