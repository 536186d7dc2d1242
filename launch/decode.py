"""Continuous decoding of a request trace over a pod: the benchmark `paged-dist-decode`.

Requests enter as rows free up, in arrival order (arrival times are not replayed); their prompts' pages are filled;
each step appends and attends for every live row and every layer; finished ones free their pages, until all are
done. A sample of the outputs is checked against the float64 oracle as it goes.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable

import jax

from paged_dist import PageAllocator, Watchdog, describe_mesh
from paged_dist._errors import BadValue
from paged_dist.cluster import FAILED, PREEMPTED
from paged_dist.launch.common import flag_checks, record_output, shared_flags
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.interrupt import INTERRUPTED, CtrlC
from paged_dist.launch.common.program import Program
from paged_dist.launch.common.run_program import UsageError
from paged_dist.launch.common.start_jax import start_jax, watchdog
from paged_dist.launch.serving import report, workload_flags
from paged_dist.launch.serving.engine import Engine
from paged_dist.launch.serving.programs import Model
from paged_dist.launch.serving.results import process_results, run_record
from paged_dist.launch.serving.row_schedule import RowSchedule, choose_checks
from paged_dist.launch.serving.run_setup import (
    DecodeRun,
    flags_to_agree_on,
    model_from_flags,
    prepare_run,
    setup_to_agree_on,
)
from paged_dist.launch.serving.workload import Request

ORACLE_SAMPLES = flags.DEFINE_integer("oracle_samples", 32, "Outputs to check against the float64 oracle.")

flags.adopt_module_key_flags(shared_flags)  # --help has --context_tokens too, which is refused with advice
flags.adopt_module_key_flags(workload_flags)

DECODE_PROGRAM = Program("paged-dist-decode", takes=[name for name in shared_flags.names() if name != "context_tokens"])


@contextlib.contextmanager
def _as_usage_errors(kinds: tuple[type[Exception], ...] = (ValueError, NotImplementedError)):
    """An error of these kinds, in a block that compiles and writes nothing, is one of usage: one line, exit code 2."""
    try:
        yield
    except kinds as e:
        raise UsageError(str(e)) from e


def main(argv) -> int:
    """Runs the benchmark that the flags describe.

    Returns:
      The exit code: 0; 1 where an output was wrong or a file could not be written; 75 where the run was asked to stop
      (SIGTERM), its record being a partial one; 130 where that was Ctrl-C.
    """
    del argv
    with _as_usage_errors():
        model = model_from_flags()
        requests, workload = workload_flags.requests_from_flags()
        flag_checks.at_least(0, oracle_samples=ORACLE_SAMPLES.value)
        DECODE_PROGRAM.refuse_other_flags(
            {"context_tokens": "lengths are the requests', see --trace and --length_scale"}
        )
        flag_checks.check_hbm_flag()
        flag_checks.check_output(shared_flags.OUTPUT.value)
        flag_checks.check_output(shared_flags.PROFILE_DIR.value, "profile_dir", folder=True)
        start_jax(DECODE_PROGRAM.name)

    with watchdog(DECODE_PROGRAM.name) as watch:
        watch.watch_for_preemption()
        return serve(model, requests, workload, watch)


def serve(model: Model, requests: list[Request], workload: str, watch: Watchdog) -> int:
    """Agrees on the run with the other processes, measures it, and returns the exit code, the same on every process."""
    say = sayer(DECODE_PROGRAM.name, watch)
    watch.agree(flags_to_agree_on(requests))
    with _as_usage_errors():
        run = prepare_run(model, requests, workload)
    watch.agree(setup_to_agree_on(run))
    if shared_flags.DRY_RUN.value:
        if watch.process_id == 0:
            print(report.decode_dry_text(run))
        return 0

    def finish(record: dict) -> int:
        table, path = report.decode_table(record), shared_flags.OUTPUT.value
        if not record_output.deliver(DECODE_PROGRAM.name, table, path, record) or not record["oracle_passed"]:
            return FAILED
        return PREEMPTED if record["partial"] else FAILED if record["profile_error"] else 0

    code = measure_run(run, watch, say, finish, profile_dir=shared_flags.PROFILE_DIR.value)
    if code == FAILED and watch.process_id != 0:
        DECODE_PROGRAM.say("error: process 0 says that the run failed")
    return code


def sayer(name: str, watch: Watchdog) -> Callable[[str], None]:
    """A function that prints a line on stderr, on process 0 alone. Warnings go the same way from now on."""

    def say(line: str) -> None:
        if watch.process_id == 0:
            print(f"{name}: {line}", file=sys.stderr, flush=True)

    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    return say


def _compile_part(run: DecodeRun, watch: Watchdog, say: Callable[[str], None]) -> tuple[Engine, RowSchedule]:
    """This process's part of the run: the programs, compiled and warmed up, and the schedule that feeds them."""
    m, requests = run.model, run.requests
    batch, columns = run.pool.batch, run.pages_per_sequence
    watch.phase("compile")
    with _as_usage_errors((BadValue, NotImplementedError)):  # it traces the step: JAX's own errors are no flag's
        engine = Engine(m, run.spec, run.mesh, batch, columns, shared_flags.IMPLEMENTATION.value)
        allocator = PageAllocator(run.spec, run.mesh, batch, columns)
        checks = choose_checks(requests, ORACLE_SAMPLES.value, m.num_layers, shared_flags.SEED.value)
        schedule = RowSchedule(requests, allocator, run.pool, engine.chunk_tokens, checks)
    say(describe_mesh(run.mesh).partition("\n")[0])
    say(f"compiling for {len(requests)} requests, {sum(r.generated for r in requests)} tokens to generate")
    engine.compile()
    engine.warm_up()
    return engine, schedule


def measure_run(
    run: DecodeRun,
    watch: Watchdog,
    say: Callable[[str], None],
    finish: Callable[[dict], int],
    *,
    tag: str = "",
    profile_dir: str | None = None,
    sweep: int | None = None,
) -> int:
    """Decodes the requests of `run` and reports how it went; a process without a device of the mesh calls it too.

    Args:
      finish: takes the record, on process 0, and returns the exit code, which all return.
      tag: tells this run from others under the same watch.
      sweep: steps done before under the same watch, where it is one of several runs: SIGTERM then does not end it.

    Where this process was asked to stop by Ctrl-C, and all stopped, it returns 130 and the others 75.
    """
    measured = results = None
    ctrl_c = CtrlC(DECODE_PROGRAM.name)
    takes_part = any(d.process_index == jax.process_index() for d in run.mesh.devices.flat)
    part = _compile_part(run, watch, say) if takes_part else None
    watch.meet(f"compiled{tag}")
    if part is not None:
        engine, schedule = part
        with contextlib.nullcontext() if sweep is not None else ctrl_c:
            measured = engine.run(schedule, say, profile_dir, watch, first_step=sweep or 0, stops=sweep is None)
        if measured.profile_error:
            why = measured.profile_error
            DECODE_PROGRAM.say(f"error: --profile_dir={profile_dir!r}: no profile could be written: {why}")
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


def cli() -> None:
    """The console script."""
    DECODE_PROGRAM.run(main)


if __name__ == "__main__":
    cli()
