"""A decode step for a pod that is not here, compiled ahead of time: `paged-dist-plan`.

    paged-dist-plan --topology=v5p:8x8x8 --num_kv_heads=8 --num_q_heads=64 --layers=80 --model_parallelism=32

It fills the pod's HBM with a cache, compiles the step (append and attend in every layer; with --width also the
attention's projections, with --mlp_width the MLP) with libtpu on this host's CPU, and prints what it read from the
compiled program: memory, collectives, copies, the kernels' vector and scalar memory; how many tokens and sequences of a
trace, or of --context_tokens, fit; and the least time that a step can take. Without --batch a data shard has 16 rows,
or as many as there is room for. Nothing runs, no TPU is needed.
"""

from __future__ import annotations

from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common import host, record_output, shared_flags
from paged_dist.launch.common.program import Program
from paged_dist.launch.common.run_program import UsageError
from paged_dist.launch.planning import plan_flags
from paged_dist.launch.planning.plan_record import plan_record
from paged_dist.launch.planning.plan_text import plan_dry_text, plan_table, problems
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.launch.serving import workload_flags

flags.adopt_module_key_flags(plan_flags)
flags.adopt_module_key_flags(workload_flags)

PLAN_PROGRAM = Program(
    "paged-dist-plan",
    takes=(
        "data",
        "context",
        "model",
        "layers",
        "num_q_heads",
        "num_kv_heads",
        "head_dim",
        "kv_dtype",
        "soft_cap",
        "sliding_window",
        "seed",
        "batch",
        "page_size",
        "num_pages",
        "pages_per_sequence",
        "context_tokens",
        "hbm_gib",
        "dry_run",
        "output",
    ),
)


def plan_settings() -> PodSettings:
    """The settings that the command line names.

    Raises:
      ValueError: a value outside its rule, or a flag of another program.
    """
    PLAN_PROGRAM.refuse_other_flags()
    return plan_flags.pod_settings_from_flags(plan_flags.TOPOLOGY.value)


def main(argv) -> int:
    """Plans what the flags describe; returns 0, or 1 where the step has problems or the record cannot be written."""
    del argv
    try:
        s = plan_settings()
        host.start_tpu_compiler()
        if shared_flags.DRY_RUN.value:
            print(plan_dry_text(s))
            return 0
        record = plan_record(s)
    except (ValueError, NotImplementedError) as e:
        raise UsageError(str(e)) from e
    except RuntimeError as e:
        PLAN_PROGRAM.say(f"error: {e}")
        return 1
    written = record_output.deliver(PLAN_PROGRAM.name, plan_table(record), shared_flags.OUTPUT.value, record)
    return int(not written or bool(problems(record)))


def cli() -> None:
    """The console script."""
    PLAN_PROGRAM.run(main)


if __name__ == "__main__":
    cli()
