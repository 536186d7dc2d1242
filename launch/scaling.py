"""How decoding scales over mesh shapes, strong and weak: `paged-dist-scaling`.

Strong: the same work on every mesh. Weak: the same work a device. Each point is a run of the decode benchmark:

- on a host without accelerators, local pods of --processes=1,2,4 processes of --devices simulated devices;
- on accelerators, or with --sizes, sub-meshes of the devices that are there; several hosts all run this command;
- with --plan=v5p:2x2x1,v5p:4x4x4 nothing runs: the floor of a step on each of these slices, projected.

Each row goes to --output when it is measured, and a sweep that was ended goes on where it stopped: rows that are there,
of the same point, work, devices, versions and commit, are not measured again.
"""

from __future__ import annotations

import sys

from paged_dist.launch import decode
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common import flags as shared
from paged_dist.launch.serving import workload_flags
from paged_dist.launch.sweeps import sweep_flags
from paged_dist.launch.sweeps.absent_pods import plan_sweep, run_plans
from paged_dist.launch.sweeps.local_pods import points_in_pods, run_in_pods
from paged_dist.launch.sweeps.points import print_points
from paged_dist.launch.sweeps.sub_meshes import run_on_sub_meshes
from paged_dist.launch.sweeps.sweep_rows import SweepRows

flags.adopt_module_key_flags(sweep_flags)

NAME = "paged-dist-scaling"


def main(argv) -> int:
    """Runs the sweep; 0, 1 where a run or a file failed, 75 where it was asked to stop, to be gone on with."""
    del argv
    say = lambda line: print(f"{NAME}: {line}", file=sys.stderr, flush=True)
    try:
        sweep_flags.check_sweep_flags()
        if sweep_flags.PLAN.value is not None:
            shared.start_tpu_compiler()
            sweep = plan_sweep()
            return print_points(list(sweep.settings)) if shared.DRY_RUN.value else run_plans(NAME, sweep, say)
        model = decode.model_from_flags()
        requests, workload = workload_flags.requests_from_flags()
        if sweep_flags.SIZES.value is None and shared.is_lone_cpu_host():
            points = points_in_pods()
            if shared.DRY_RUN.value:
                return print_points(points)
            return run_in_pods(SweepRows(NAME, points, say, requests), say)
        shared.start_jax(NAME)
    except (ValueError, NotImplementedError) as e:
        raise shared.UsageError(str(e)) from e
    return run_on_sub_meshes(NAME, model, requests, workload)


def cli() -> None:
    """The console script."""
    shared.cli(main, NAME)


if __name__ == "__main__":
    cli()
