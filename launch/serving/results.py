"""The results of a decode run: what each process measured, gathered, and summarised as one flat record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from paged_dist import CacheSpec
from paged_dist.launch.common import provenance, shared_flags
from paged_dist.launch.common.chip_rates import Chip, chip_of
from paged_dist.launch.serving.engine import Measured
from paged_dist.launch.serving.output_checks import ERROR_BOUNDS
from paged_dist.launch.serving.run_setup import DecodeRun
from paged_dist.launch.serving.workload import Request, sequences_that_fit
from paged_dist.mesh.devices import memory_limit

_HBM_GIB_ELSEWHERE = 16.0  # where no device tells its memory


def slowest(per_process: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Each step's time on the process that was slowest in it: [processes, steps] seconds to [steps]."""
    return np.asarray(per_process, np.float64).max(axis=0)


def process_results(measured: Measured, digest: int) -> dict:
    """What a process sends to process 0 at the end of a run, as JSON can hold it."""
    m = measured
    return {
        "step_seconds": m.step_seconds,
        "seconds": [m.compile_seconds, m.prefill_seconds, m.host_seconds, m.check_seconds, m.warmup_seconds],
        "worst_error": m.worst_error if math.isfinite(m.worst_error) else None,
        "checked": int(m.checked),
        "tally": list(m.tally),
        "digest": digest,
        "profile_error": m.profile_error,
    }


def gather_results(everyone: Sequence[dict]) -> dict[str, np.ndarray]:
    """`process_results` of all processes as one array [processes, ...] for each name; errors are left out."""
    dtypes = {"checked": np.int32, "tally": np.uint32, "digest": np.uint32}
    of = lambda name: [math.inf if (value := one[name]) is None else value for one in everyone]
    return {name: np.asarray(of(name), dtypes.get(name, np.float64)) for name in everyone[0] if name != "profile_error"}


def summarise_run(
    gathered: dict[str, np.ndarray],
    measured: Measured,
    *,
    bytes_per_token: int,
    num_pages: int,
    devices: dict[str, int],
    dtype: str,
) -> dict:
    """The numbers of a run, as a flat record.

    Args:
      gathered: as `gather_results` returns it. Times are those of the slowest process, step by step: decode_s, from
        which tokens/s follows, is the sum of each step's slowest time and the most that any host spent between steps.
        With context 1 the op has no collective, so processes may drift apart and end sooner than that; a model's would
        keep them in step.
      measured: any process's; what is used of it is the same on all.
      bytes_per_token: K and V of one token over all heads and layers. What a step reads is live tokens times this;
        pages held but not yet filled, and tokens outside a sliding window, are not counted.
      devices: device kind -> how many.
    """
    steps = slowest(gathered["step_seconds"])
    compile_s, prefill_s, host_s, check_s, warmup_s = map(float, gathered["seconds"].max(axis=0))
    decode_s = float(steps.sum()) + host_s
    kinds = [chip_of(kind) for kind in devices]
    chips = sum(n / (chip.devices if chip else 1) for n, chip in zip(devices.values(), kinds, strict=True))
    known = [chip.hbm_bytes_per_s for chip in kinds if chip is not None]
    peak = min(known) if len(known) == len(kinds) else None
    tokens, live = sum(measured.live_rows), sum(measured.live_tokens)
    bandwidth = live * bytes_per_token / steps.sum()
    low, high = (int(x) for x in gathered["tally"].astype(np.uint64).sum(axis=0) % 2**32)
    worst = float(gathered["worst_error"].max())
    return {
        "tokens": tokens,
        "steps": len(steps),
        "tokens_per_s": tokens / decode_s,
        "tokens_per_s_per_chip": tokens / decode_s / chips,
        "step_ms_p25": 1e3 * float(np.percentile(steps, 25)),
        "step_ms_p50": 1e3 * float(np.percentile(steps, 50)),
        "step_ms_p75": 1e3 * float(np.percentile(steps, 75)),
        "step_ms_p99": 1e3 * float(np.percentile(steps, 99)),
        "step_ms_mean": 1e3 * float(steps.mean()),
        "rows_mean": tokens / len(steps),
        "live_kv_bytes_per_step": live * bytes_per_token / len(steps),
        "live_kv_bytes_per_s": bandwidth,
        "live_kv_bytes_per_s_per_chip": bandwidth / chips,
        "peak_share": None if peak is None else bandwidth / chips / peak,
        "pool_pages": num_pages,
        "pool_use_peak": max(measured.pages) / num_pages,
        "pool_use_mean": sum(measured.pages) / len(steps) / num_pages,
        "compile_s": compile_s,
        "warmup_s": warmup_s,
        "decode_s": decode_s,
        "steps_s": float(steps.sum()),
        "prefill_s": prefill_s,
        "prefill_tokens": measured.prefill_tokens,
        "oracle_s": check_s,
        "oracle_checked": int(gathered["checked"].sum()),
        "oracle_worst_error": worst,
        "oracle_bound": ERROR_BOUNDS[dtype],
        "oracle_passed": worst <= ERROR_BOUNDS[dtype],
        "checksum": f"{high:08x}{low:08x}",
        "chips": chips,
        "devices": devices,
    }


CAPACITY_DTYPES = ("bfloat16", "int8", "float8_e4m3fn")


def capacity(spec: CacheSpec, requests: list[Request], hbm_gib: float, chips: float) -> dict:
    """How many of the workload's sequences would fit at once if all HBM of the chips were one cache like `spec`.

    Args:
      spec: its heads, layers and page size count, its dtype and number of pages do not.
      requests: taken in order, and from the first again where they end, see `sequences_that_fit`.
      hbm_gib: HBM of one chip in GiB, all of it for pages (and their scales).

    Returns:
      hbm_gib, chips, and for each dtype of CAPACITY_DTYPES `bytes_per_token`, `pages` and `sequences`; None for a
      dtype that has no pages of that size.
    """
    found: dict = {"hbm_gib": hbm_gib, "chips": chips}
    for dtype in CAPACITY_DTYPES:
        try:
            one = dataclasses.replace(spec, dtype=dtype, num_pages=128)
        except ValueError:  # scales fill whole rows at some page sizes only
            found[dtype] = None
            continue
        pages = int(hbm_gib * 2**30 * chips) // (one.bytes_per_token * one.page_size)
        sequences = sequences_that_fit(requests, pages, one.page_size)
        found[dtype] = {"bytes_per_token": one.bytes_per_token, "pages": pages, "sequences": sequences}
    return found


def chip_hbm_gib(mesh: Mesh) -> float:
    """HBM of one chip in GiB: that of --hbm_gib, else of the chip's kind, else what a device of this process tells."""
    if shared_flags.HBM_GIB.value is not None:
        return shared_flags.HBM_GIB.value
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if isinstance(chip, Chip):
        return chip.hbm_gib * chip.devices
    here = (d for d in mesh.devices.flat if d.process_index == jax.process_index())
    told = min(map(memory_limit, here), default=math.inf)
    return told / 2**30 if told < math.inf else _HBM_GIB_ELSEWHERE


def work_record(run: DecodeRun) -> dict:
    """What is run on what: the part of a record that is known before the run."""
    m = run.model
    settings = {
        "layers": m.num_layers,
        "num_q_heads": m.num_q_heads,
        "num_kv_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "dtype": m.dtype,
        "input_dtype": m.input_dtype,
        "page_size": run.spec.page_size,
        "batch": run.pool.batch,
        "pages_per_sequence": run.pages_per_sequence,
        "soft_cap": m.soft_cap,
        "sliding_window": m.sliding_window,
        "seed": m.seed,
        "implementation": shared_flags.IMPLEMENTATION.value,
    }
    return {
        "settings": settings,
        "platform": run.mesh.devices.flat[0].platform,
        "devices": provenance.device_counts(run.mesh),
        "processes": len({d.process_index for d in run.mesh.devices.flat}),
        "mesh": dict(run.mesh.shape),
        "requests": len(run.requests),
        "workload": run.workload,
        "pool_pages": run.spec.num_pages,
        "cache_bytes": run.spec.bytes_total,
        "bytes_per_token": run.spec.bytes_per_token,
    }


def run_record(run: DecodeRun, measured: Measured, everyone: Sequence[dict | None]) -> dict:
    """The run's results as one flat record.

    `everyone`: `process_results` of each process; None of one that has no device of the mesh.
    """
    gathered = gather_results([one for one in everyone if one is not None])
    if len(set(gathered["digest"].tolist())) > 1:
        raise RuntimeError("processes gave out different pages: their allocators were called differently")
    record = summarise_run(
        gathered,
        measured,
        bytes_per_token=run.spec.bytes_per_token,
        num_pages=run.spec.num_pages,
        devices=provenance.device_counts(run.mesh),
        dtype=run.model.dtype,
    )
    record["capacity"] = capacity(run.spec, run.requests, chip_hbm_gib(run.mesh), record["chips"])
    return (
        record
        | work_record(run)
        | {
            "benchmark": "decode",
            "partial": measured.stopped,
            "profile_error": next((text for one in everyone if one and (text := one["profile_error"])), None),
            "projected": False,
            **provenance.record_origin(shared_flags.given_flags()),
        }
    )
