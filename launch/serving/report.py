"""What a decode run says at its end: one table for a reader, one JSON line for a program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from paged_dist import CacheSpec
from paged_dist.launch.common.chips import chip_of
from paged_dist.launch.common.number_formats import quantity
from paged_dist.launch.common.report_lines import attention_options, head_dim_words, report_line
from paged_dist.launch.serving.engine import ERROR_BOUNDS, Measured
from paged_dist.launch.serving.workload import Request, sequences_that_fit


def slowest(per_process: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """[steps] seconds of each step on its slowest process, from [processes, steps]."""
    return np.asarray(per_process, np.float64).max(axis=0)


def told(measured: Measured, digest: int) -> dict:
    """What a process tells of its run at its end, as JSON holds it."""
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


def gather(everyone: Sequence[dict]) -> dict[str, np.ndarray]:
    """What the processes `told`, each an array [processes, ...], but for errors."""
    dtypes = {"checked": np.int32, "tally": np.uint32, "digest": np.uint32}
    of = lambda name: [math.inf if (value := one[name]) is None else value for one in everyone]
    return {name: np.asarray(of(name), dtypes.get(name, np.float64)) for name in everyone[0] if name != "profile_error"}


def summarise(
    gathered: dict[str, np.ndarray],
    measured: Measured,
    *,
    bytes_per_token: int,
    num_pages: int,
    devices: dict[str, int],
    dtype: str,
) -> dict:
    """The numbers of a run.

    Args:
      gathered: as `gather` returns it. Times are those of the slowest process, step by step: decode_s, from which
        tokens/s follows, is the sum of each step's slowest time and the most that any host spent between steps. With
        context 1 the op has no collective, so processes may drift apart and end sooner than that; a model's would keep
        them in step.
      measured: any process's; what is used of it is the same on all.
      bytes_per_token: K and V of one token over all heads and layers. What a step reads is live tokens times this;
        pages held but not yet filled, and tokens outside a sliding window, are not counted.
      devices: device kind -> how many.
    """
    steps = slowest(gathered["step_seconds"])
    compile_s, prefill_s, host_s, check_s, warmup_s = map(float, gathered["seconds"].max(axis=0))
    decode_s = float(steps.sum()) + host_s
    known = [chip_of(kind) for kind in devices]
    chips = sum(n / (chip.devices if chip else 1) for n, chip in zip(devices.values(), known, strict=True))
    peak = None if None in known else min(chip.hbm_bytes_per_s for chip in known)
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
    """How many of the workload's sequences fit at once, were all of the chips' HBM one cache like `spec`.

    Args:
      spec: whose heads, layers and page size count; of any dtype and number of pages.
      requests: over and over again in their order, see `sequences_that_fit`.
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


def _capacity_lines(found: dict) -> list[tuple[str, str]]:
    first = f"{found['hbm_gib']:g} GiB of HBM x {found['chips']:g} chips hold so many sequences like these:"
    base, lines = found["bfloat16"]["sequences"], [("capacity", first)]
    for dtype in CAPACITY_DTYPES:
        if (fit := found[dtype]) is None:
            lines.append(("", f"{dtype}: has no pages of this size"))
            continue
        ratio = f" ({fit['sequences'] / base:.2f} x)" if base and dtype != "bfloat16" else ""
        lines.append(("", f"{dtype}: {fit['sequences']}{ratio}, {fit['bytes_per_token']} B a token"))
    return lines


def work_lines(r: dict) -> list[tuple[str, str]]:
    """What is run on what, of a record or of a run that was only planned: all that flags may change of the work."""
    s, processes = r["settings"], f"{r['processes']} process{'es' * (r['processes'] > 1)}"
    implementation = s["implementation"] or ("pallas" if r["platform"] == "tpu" else "xla")
    return [
        ("devices", ", ".join(f"{n} x {kind}" for kind, n in r["devices"].items()) + f", {processes}"),
        ("mesh", " x ".join(f"{name} {size}" for name, size in r["mesh"].items())),
        (
            "model",
            f"{s['layers']} layers, {s['num_q_heads']} q heads, {s['num_kv_heads']} kv heads, "
            f"{head_dim_words(s['head_dim'])}, {s['input_dtype']}",
        ),
        ("attention", f"{implementation}{attention_options(s)}"),
        (
            "cache",
            f"{r['pool_pages']} pages of {s['page_size']} tokens, {quantity(r['cache_bytes'], 'B')}, {s['dtype']}, "
            f"{r['bytes_per_token']} B a token",
        ),
        (
            "workload",
            f"{r['requests']} requests of {r['workload']}, seed {s['seed']}, batch {s['batch']}, tables of "
            f"{s['pages_per_sequence']} pages",
        ),
    ]


def table(r: dict) -> str:
    """The report as lines of at most 80 columns. `r`: a summary with what was run and the versions added."""
    share = "" if r["peak_share"] is None else f", {r['peak_share']:.1%} of the chip's peak"
    lines = [
        *work_lines(r),
        ("versions", " ".join(f"{name} {version}" for name, version in r["versions"].items())),
        None,
        ("tokens/s", f"{r['tokens_per_s']:.1f} ({r['tokens_per_s_per_chip']:.2f} a chip)"),
        ("step time", f"p50 {r['step_ms_p50']:.2f} ms, p99 {r['step_ms_p99']:.2f} ms, slowest process"),
        ("steps", f"{r['steps']}, {r['tokens']} tokens, {r['rows_mean']:.1f} live rows on average"),
        ("live KV", f"{quantity(r['live_kv_bytes_per_step'], 'B')} read a step"),
        (
            "bandwidth",
            f"{quantity(r['live_kv_bytes_per_s'], 'B/s')}, "
            f"{quantity(r['live_kv_bytes_per_s_per_chip'], 'B/s')} a chip{share}",
        ),
        *_capacity_lines(r["capacity"]),
        ("pool use", f"peak {r['pool_use_peak']:.1%}, mean {r['pool_use_mean']:.1%}"),
        (
            "time",
            f"compile {r['compile_s']:.2f} s, warm-up {r['warmup_s']:.2f} s, decode {r['decode_s']:.2f} s (steps "
            f"{r['steps_s']:.2f} s)",
        ),
        ("", f"prefill {r['prefill_s']:.2f} s for {r['prefill_tokens']} tokens, oracle {r['oracle_s']:.2f} s"),
        (
            "oracle",
            "no output was checked"
            if r["oracle_checked"] == 0
            else f"{r['oracle_checked']} outputs checked in float64, worst {r['oracle_worst_error']:.1e} of scale, "
            f"bound {r['oracle_bound']:.0e}: {'ok' if r['oracle_passed'] else 'FAILED'}",
        ),
        ("checksum", r["checksum"]),
    ]
    if r["partial"]:
        lines.append(("PARTIAL", f"asked to stop after {r['steps']} steps: not the whole workload was served"))
    return "\n".join(report_line(*line) if line else "" for line in lines)
