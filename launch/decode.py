"""Continuous decoding of a request trace over a pod: the benchmark `paged-dist-decode`.

Requests enter as rows free up, in arrival order (arrival times are not replayed); their prompts' pages are filled;
each step appends and attends for every live row and every layer; finished ones free their pages, until all are
done. A sample of the outputs is checked against the float64 oracle as it goes.
"""

from __future__ import annotations

from paged_dist import Watchdog
from paged_dist.cluster import FAILED, PREEMPTED
from paged_dist.launch.common import flag_checks, record_output, shared_flags
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.program import Program
from paged_dist.launch.common.run_program import usage_errors
from paged_dist.launch.common.start_jax import start_jax, watchdog
from paged_dist.launch.serving import report, workload_flags
from paged_dist.launch.serving.measure_run import measure_run
from paged_dist.launch.serving.programs import Model
from paged_dist.launch.serving.run_setup import (
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


def main(argv) -> int:
    """Runs the benchmark that the flags describe.

    Returns:
      The exit code: 0; 1 where an output was wrong or a file could not be written; 75 where the run was asked to stop
      (SIGTERM), its record being a partial one; 130 where that was Ctrl-C.
    """
    del argv
    with usage_errors():
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
        watch.phase("set-up")  # a phase has a time-out, which the time before the first one has not
        watch.watch_for_preemption()
        return serve(model, requests, workload, watch)


def serve(model: Model, requests: list[Request], workload: str, watch: Watchdog) -> int:
    """Agrees on the run with the other processes, measures it, and returns the exit code, the same on every process."""
    say = DECODE_PROGRAM.sayer(watch)
    watch.agree(flags_to_agree_on(requests))
    with usage_errors():
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

    code = measure_run(
        DECODE_PROGRAM,
        run,
        watch,
        say,
        finish,
        oracle_samples=ORACLE_SAMPLES.value,
        profile_dir=shared_flags.PROFILE_DIR.value,
    )
    if code == FAILED and watch.process_id != 0:
        DECODE_PROGRAM.say("error: process 0 says that the run failed")
    return code


def cli() -> None:
    """The console script."""
    DECODE_PROGRAM.run(main)


if __name__ == "__main__":
    cli()
