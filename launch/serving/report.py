"""A decode run as lines of text: what is run on what, and the table of its results."""

from __future__ import annotations

from paged_dist import describe_mesh
from paged_dist.launch.common.number_formats import quantity
from paged_dist.launch.common.report_lines import attention_options, head_dim_words, report_line
from paged_dist.launch.serving.results import CAPACITY_DTYPES, work_record
from paged_dist.launch.serving.run_setup import DecodeRun


def work_lines(r: dict) -> list[tuple[str, str]]:
    """(name, text) of what is run on what: all of the work that a flag may change. `r`: as `work_record` gives it."""
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


def decode_table(r: dict) -> str:
    """The table of a run's results, at most 80 columns wide. `r`: as `run_record` gives it."""
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


def _capacity_lines(found: dict) -> list[tuple[str, str]]:
    """How many sequences fit, by dtype of the cache. `found`: as `capacity` gives it."""
    first = f"{found['hbm_gib']:g} GiB of HBM x {found['chips']:g} chips hold so many sequences like these:"
    base, lines = found["bfloat16"]["sequences"], [("capacity", first)]
    for dtype in CAPACITY_DTYPES:
        if (fit := found[dtype]) is None:
            lines.append(("", f"{dtype}: has no pages of this size"))
            continue
        ratio = f" ({fit['sequences'] / base:.2f} x)" if base and dtype != "bfloat16" else ""
        lines.append(("", f"{dtype}: {fit['sequences']}{ratio}, {fit['bytes_per_token']} B a token"))
    return lines


def decode_dry_text(run: DecodeRun) -> str:
    """What a dry run prints: the work that would be run, at most 80 columns wide."""
    head, *axes = describe_mesh(run.mesh).splitlines()
    more = {
        "mesh": [line.strip() for line in axes],
        "cache": [f"{quantity(run.spec.bytes_per_chip(run.mesh), 'B')} a device"],
        "workload": [f"{sum(r.generated for r in run.requests)} tokens to generate"],
    }
    lines = []
    for name, text in work_lines(work_record(run)):
        lines.append((name, head.removeprefix("mesh: ") if name == "mesh" else text))
        lines += [("", one) for one in more.get(name, [])]
    lines.append(("dry run", "nothing was compiled, allocated or written"))
    return "\n".join(report_line(*line) for line in lines)
