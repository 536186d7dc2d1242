"""A decode step for a pod that is not here, compiled ahead of time: `paged-dist-plan`.

    paged-dist-plan --topology=v5p:8x8x8 --num_kv_heads=8 --num_q_heads=64 --layers=80 --model_parallelism=32

It fills the pod's HBM with a cache, compiles the step (append and attend in every layer; with --width also the
attention's projections, with --mlp_width the MLP) with libtpu on this host's CPU, and prints what it read from the
compiled program: memory, collectives, copies, the kernels' vector and scalar memory; how many tokens and sequences of a
trace, or of --context_tokens, fit; and the least time that a step can take. Without --batch a data shard has 16 rows,
or as many as there is room for. Nothing runs, no TPU is needed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

from paged_dist import describe_mesh
from paged_dist.describe import mesh_facts
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common import host, provenance, record_output, shared_flags
from paged_dist.launch.common.program import Program
from paged_dist.launch.common.run_program import UsageError
from paged_dist.launch.common.slices import chip_of_topology
from paged_dist.launch.planning import plan_flags
from paged_dist.launch.planning.absent_chips import absent_pod_mesh
from paged_dist.launch.planning.fitting import compile_what_fits
from paged_dist.launch.planning.plan_text import plan_dry_text, plan_table, problems
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.launch.planning.pod_step import attention_launch
from paged_dist.launch.planning.step_facts import read_step
from paged_dist.launch.planning.step_floor import floor_of
from paged_dist.launch.planning.step_weights import output_heads
from paged_dist.launch.serving import workload_flags
from paged_dist.launch.serving.workload import Request, sequences_on_shards

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


def plan_record(s: PodSettings, fits: Callable[[Mapping[str, int]], bool] | None = None) -> dict:
    """Sizes and compiles the step for the pod, and returns the plan as one flat record.

    Args:
      fits: as in `sizing.sizes_of`.

    Raises:
      ValueError, NotImplementedError: settings that do not fit the pod, each with what does.
      RuntimeError: no libtpu; the compiler refused the program, in its own words.
    """
    chip = chip_of_topology(s.topology)
    start = time.perf_counter()
    mesh = absent_pod_mesh(s)
    mesh_s = time.perf_counter() - start
    sizes, step = compile_what_fits(s, mesh, chip, fits)
    launch = attention_launch(s, sizes, mesh)
    found = read_step(s, sizes, mesh, step.program)
    spec, devices = sizes.spec, mesh.devices.size
    counted, workload = s.requests, s.workload
    if not counted:
        counted, workload = (Request(0, sizes.context_tokens, 0),), f"{sizes.context_tokens} tokens"
    settings = {k: v for k, v in dataclasses.asdict(s).items() if k not in ("requests", "times", "batch_step")}
    return {
        "benchmark": "plan",
        "projected": True,
        "settings": settings
        | {
            "batch": sizes.batch,
            "num_pages": spec.num_pages,
            "pages_per_sequence": sizes.pages_per_sequence,
            "context_tokens": sizes.context_tokens,
        },
        "chip": chip.name,
        "chips": devices / chip.devices,
        "devices": provenance.device_counts(mesh),
        "mesh": dict(mesh.shape),
        "axes": dataclasses.asdict(mesh_facts(mesh))["axes"],
        "mesh_text": describe_mesh(
            mesh, spec, num_q_heads=s.num_q_heads, batch=sizes.batch, output_heads=output_heads(s, mesh)
        ),
        "output_heads": output_heads(s, mesh),
        "workload": workload,
        "requests": len(counted),
        "hbm_bytes": sizes.hbm_bytes,
        "bytes_per_token": spec.bytes_per_token,
        "tokens": spec.num_pages * spec.page_size,
        "sequences": sequences_on_shards(counted, spec.num_pages, spec.page_size, mesh.shape["data"]),
        **found,
        "launch": launch,
        "floor": floor_of(s, sizes, mesh, chip, found["collectives"], found["other_copies"]),
        "mesh_s": mesh_s,
        "lower_s": step.lower_s,
        "compile_s": step.compile_s,
        "processes": len({d.process_index for d in mesh.devices.flat}),
        "partial": False,
        **provenance.record_origin(shared_flags.given_flags()),
    }


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
