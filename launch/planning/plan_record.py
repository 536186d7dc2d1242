"""The record of a plan: the step sized, compiled for the absent pod and read, as one flat record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

from paged_dist import describe_mesh
from paged_dist.describe import mesh_facts
from paged_dist.launch.common import provenance, shared_flags
from paged_dist.launch.common.slices import chip_of_topology
from paged_dist.launch.planning.absent_chips import absent_pod_mesh
from paged_dist.launch.planning.fitting import compile_what_fits
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.launch.planning.pod_step import attention_launch
from paged_dist.launch.planning.step_facts import read_step
from paged_dist.launch.planning.step_floor import floor_of
from paged_dist.launch.planning.step_weights import output_heads
from paged_dist.launch.serving.workload import Request, sequences_on_shards


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
