"""How decoding scales over mesh shapes, strong and weak: `paged-dist-scaling`.

Strong: the same work on every mesh. Weak: the same work a device. Each point is a run of the decode benchmark:

- on a host without accelerators, local pods of --processes=1,2,4 processes of --devices simulated devices;
- on accelerators, or with --sizes, sub-meshes of the devices that are there; several hosts all run this command;
- with --plan=v5p:2x2x1,v5p:4x4x4 nothing runs: the floor of a step on each of these slices, projected.

Each row goes to --output when it is measured, and a sweep that was ended goes on where it stopped: rows that are there,
of the same point, work, devices, versions and commit, are not measured again.
"""

from __future__ import annotations

from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common import host, shared_flags
from paged_dist.launch.common.program import Program
from paged_dist.launch.common.run_program import UsageError
from paged_dist.launch.common.start_jax import start_jax
from paged_dist.launch.serving import run_setup, workload_flags
from paged_dist.launch.sweeps import sweep_flags
from paged_dist.launch.sweeps.absent_pods import plan_sweep, run_plans
from paged_dist.launch.sweeps.local_pods import points_in_pods, run_in_pods
from paged_dist.launch.sweeps.points import print_points
from paged_dist.launch.sweeps.sub_meshes import run_on_sub_meshes
from paged_dist.launch.sweeps.sweep_rows import SweepRows

flags.adopt_module_key_flags(sweep_flags)

SCALING_PROGRAM = Program("paged-dist-scaling")


def main(argv) -> int:
    """Runs the sweep; 0, 1 where a run or a file failed, 75 where it was asked to stop, to be gone on with."""
    del argv
    try:
        sweep_flags.check_sweep_flags()
        if sweep_flags.PLAN.value is not None:
            host.start_tpu_compiler()
            sweep = plan_sweep(sweep_flags.PLAN.value)
            if shared_flags.DRY_RUN.value:
                return print_points(list(sweep.settings))
            return run_plans(SCALING_PROGRAM, sweep)
        model = run_setup.model_from_flags()
        requests, workload = workload_flags.requests_from_flags()
        if sweep_flags.SIZES.value is None and host.is_lone_cpu_host():
            points = points_in_pods()
            if shared_flags.DRY_RUN.value:
                return print_points(points)
            return run_in_pods(SweepRows(SCALING_PROGRAM, points, SCALING_PROGRAM.say, requests))
        start_jax(SCALING_PROGRAM.name)
    except (ValueError, NotImplementedError) as e:
        raise UsageError(str(e)) from e
    return run_on_sub_meshes(SCALING_PROGRAM, model, requests, workload)


def cli() -> None:
    """The console script."""
    SCALING_PROGRAM.run(main)


if __name__ == "__main__":
    cli()
