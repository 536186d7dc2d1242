"""How far int8 and fp8 caches are from unquantised keys and values, by context length: `paged-dist-accuracy`.

Decode attention as users run it, `write_prefill_kv` into a `PagedKVCache` and `sharded_paged_attention` over it, on one
CPU device, against float64. Keys and values are Gaussian in f32, queries Gaussian in bf16, sm_scale 1 / sqrt(head_dim).
Three cases: plain; outliers, where a few channels of the keys are 20 times the others; and smoothed, the same keys with
key smoothing, calibrated on a sample of other keys. In every case each query head is scaled until its logits have a
standard deviation of one: with outliers they would be larger, the softmax would pick one token, and the error would be
that token's. An error is the root mean square of the difference over that of the output. The op's own error is against
float64 attention over what the cache holds, dequantised.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_dist import (
    CacheSpec,
    PagedKVCache,
    calibrate_key_smoothing,
    make_pod_mesh,
    sharded_paged_attention,
    write_prefill_kv,
)
from paged_dist._errors import require
from paged_dist.kernels.attention.oracle import attention_oracle
from paged_dist.launch.common import flag_checks, host, shared_flags
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.program import Program
from paged_dist.launch.common.provenance import versions
from paged_dist.launch.common.record_output import deliver
from paged_dist.launch.common.report_lines import head_dim_words, report_line
from paged_dist.launch.common.run_program import UsageError
from paged_dist.launch.common.shape_flags import attention_shapes_from_flags
from paged_dist.launch.serving.workload import whole_pool

CONTEXT_LENGTHS = flags.DEFINE_list(
    "context_lengths", ["128", "512", "2048", "8192", "32768"], "Live tokens of the sequences, one measurement each."
)

ACCURACY_PROGRAM = Program(
    "paged-dist-accuracy",
    takes=("batch", "num_q_heads", "num_kv_heads", "head_dim", "page_size", "seed", "output"),
    defaults={"batch": 2, "num_q_heads": 8, "num_kv_heads": 2},
)

CASES = ("plain", "outliers", "smoothed")
# The largest relative root mean square error allowed, by dtype and case; none where outliers are not smoothed.
BOUNDS = {
    ("int8", "plain"): 0.015,
    ("int8", "smoothed"): 0.02,
    ("float8_e4m3fn", "plain"): 0.05,
    ("float8_e4m3fn", "smoothed"): 0.06,  # e4m3 gains nothing: its error is relative to each channel anyway
}
OWN_BOUND = 0.005  # of the op itself; rounding the output to bf16 is 0.0017 of it
GROWTH_BOUND = 1.4  # of any length's error over the shortest's, which a few heads' draws move by a fifth
DTYPES = ("int8", "float8_e4m3fn")
_OUTLIERS, _OUTLIER_SIZE = 4, 20.0
_SAMPLE = 512  # tokens that the smoothing is calibrated on
_PREFILL_TOKENS = 2048  # tokens of a sequence that one prefill call writes


class AccuracySettings(NamedTuple):
    """What to measure: B, Hq, Hkv, D, P, a seed, and the context lengths in tokens, ascending."""

    batch: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    seed: int
    lengths: tuple[int, ...]


def accuracy_settings() -> AccuracySettings:
    """The settings that the flags name.

    Raises:
      ValueError: a value outside its rule, or a flag of another launcher.
    """
    ACCURACY_PROGRAM.refuse_other_flags()
    shapes = attention_shapes_from_flags()
    flag_checks.check_seed()
    text = ",".join(CONTEXT_LENGTHS.value)
    lengths = flag_checks.whole_numbers(CONTEXT_LENGTHS.value) or [0]
    require(min(lengths) >= 1, "--context_lengths", text, "must be whole numbers of tokens, at least 1", "e.g. 128,512")
    drawn = 2 * 4 * shapes.batch * max(lengths) * shapes.num_kv_heads * shapes.head_dim
    flag_checks.check_host_memory("--context_lengths", text, drawn)
    flag_checks.check_output(shared_flags.OUTPUT.value)
    return AccuracySettings(**shapes._asdict(), seed=shared_flags.SEED.value, lengths=tuple(sorted(set(lengths))))


class CaseData(NamedTuple):
    """One case's arrays, T the longest context."""

    query: np.ndarray  # [B, Hq, D] bf16
    keys: np.ndarray  # [B, T, Hkv, D] f32
    values: np.ndarray  # [B, T, Hkv, D] f32
    smoothing: jax.Array | None  # [Hkv, D] f32


def draw(s: AccuracySettings) -> dict[str, CaseData]:
    """The data of every case. All come from the same draws, so that cases differ in nothing else."""
    rng = np.random.default_rng([s.seed, 3])
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    query = normal((s.batch, s.num_q_heads, s.head_dim))
    keys, values = (normal((s.batch, max(s.lengths), s.num_kv_heads, s.head_dim)) for _ in "kv")
    size = np.ones((s.num_kv_heads, s.head_dim), np.float32)
    for head in size:
        head[rng.choice(s.head_dim, min(_OUTLIERS, s.head_dim), replace=False)] = _OUTLIER_SIZE
    sample = normal((_SAMPLE, s.num_kv_heads, s.head_dim)) * size

    def scaled(size):
        """The query in bf16, each head's logits over keys of `size` [Hkv, D] of standard deviation 1."""
        over = query * np.repeat(size, s.num_q_heads // s.num_kv_heads, axis=0)
        over = np.sqrt(np.mean(np.square(over), axis=-1, keepdims=True))
        return np.asarray(jnp.asarray(query / over, jnp.bfloat16))

    plain = CaseData(scaled(np.ones_like(size)), keys, values, None)
    outliers = CaseData(scaled(size), keys * size, values, None)
    return {
        "plain": plain,
        "outliers": outliers,
        "smoothed": outliers._replace(smoothing=calibrate_key_smoothing(sample)),
    }


def shuffled_tables(s: AccuracySettings) -> np.ndarray:
    """A block table [B, S] int32 of shuffled page ids, with room for the longest context."""
    columns = -(-max(s.lengths) // s.page_size)
    rng = np.random.default_rng([s.seed, 4])
    return rng.permutation(s.batch * columns).reshape(s.batch, columns).astype(np.int32)


def fill(s: AccuracySettings, dtype: str, data: CaseData, tables: np.ndarray) -> PagedKVCache:
    """A cache of `dtype` on one device that holds data's keys and values on the pages of `tables` [B, S]."""
    spec = CacheSpec(s.num_kv_heads, s.head_dim, whole_pool(tables.size, s.page_size, dtype), s.page_size, dtype)
    mesh = make_pod_mesh(model=1, devices=jax.devices()[:1])
    cache = PagedKVCache.create(spec, mesh, key_smoothing=data.smoothing)
    write = jax.jit(write_prefill_kv, donate_argnums=0)
    chunk = min(_PREFILL_TOKENS, max(s.lengths))
    for start in range(0, max(s.lengths), chunk):
        ends = np.full(s.batch, min(start + chunk, max(s.lengths)), np.int32)
        more = ((0, 0), (0, start + chunk - int(ends[0])), (0, 0), (0, 0))
        new = (np.pad(x[:, start : start + chunk], more) for x in (data.keys, data.values))
        cache = write(cache, *new, ends, tables, starts=jnp.full(s.batch, start, jnp.int32))
    return cache


def held_pages(cache: PagedKVCache) -> tuple[np.ndarray, np.ndarray]:
    """(keys, values) [Hkv, N, P, D] float64: what the cache's pages stand for, dequantised in NumPy."""
    keys, values, *scales = (np.asarray(x).astype(np.float64) for x in cache.to_pages())
    keys, values = (x * scale[..., None] for x, scale in zip((keys, values), scales, strict=True))
    if cache.key_smoothing is not None:
        keys *= np.asarray(cache.key_smoothing, np.float64)[:, None, None]
    return keys, values


def given_pages(s: AccuracySettings, data: CaseData) -> tuple[np.ndarray, np.ndarray]:
    """(keys, values) [Hkv, B * S, P, D] f32: the data itself, on pages in order."""
    rest = -max(s.lengths) % s.page_size

    def paged(x):
        x = np.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0)))
        return np.moveaxis(x, 2, 0).reshape(s.num_kv_heads, -1, s.page_size, s.head_dim)

    return paged(data.keys), paged(data.values)


def relative_rms(output: np.ndarray, want: np.ndarray) -> float:
    """Root mean square of output - want over that of want; infinite where output is not finite."""
    error = float(np.sqrt(np.mean((output - want) ** 2) / np.mean(want**2)))
    return error if math.isfinite(error) else math.inf


def measure_errors(s: AccuracySettings) -> list[dict]:
    """One record for each length, dtype and case: length, dtype, case, `error` and the op's `own_error`."""
    tables, scale = shuffled_tables(s), s.head_dim**-0.5
    in_order = np.arange(tables.size).reshape(tables.shape)
    attend = jax.jit(functools.partial(sharded_paged_attention, sm_scale=scale))

    def exact(data: CaseData, pages: tuple[np.ndarray, np.ndarray], tables: np.ndarray) -> dict[int, np.ndarray]:
        """length -> [B, Hq, D] float64"""
        keys, values = pages
        one = lambda n: attention_oracle(data.query, keys, values, np.full(s.batch, n), tables, sm_scale=scale)[0]
        return {n: one(n) for n in s.lengths}

    found, want = [], {}
    for case, data in draw(s).items():
        if case != "smoothed":  # whose keys and query are those of the outliers
            want = exact(data, given_pages(s, data), in_order)
        for dtype in DTYPES:
            cache = fill(s, dtype, data, tables)
            held = exact(data, held_pages(cache), tables)
            for n in s.lengths:
                output = attend(data.query, cache, np.full(s.batch, n, np.int32), tables)
                output = np.asarray(output).astype(np.float64)
                errors = {"error": relative_rms(output, want[n]), "own_error": relative_rms(output, held[n])}
                found.append({"length": n, "dtype": dtype, "case": case, **errors})
    return found


def failures(results: list[dict]) -> list[str]:
    """What is over its bound, one line each."""
    shortest = min(r["length"] for r in results)
    first = {(r["dtype"], r["case"]): r["error"] for r in results if r["length"] == shortest}
    failed = []
    for r in results:
        kind = r["dtype"], r["case"]
        limits = [
            ("error", r["error"], BOUNDS.get(kind, math.inf)),
            ("own error", r["own_error"], OWN_BOUND),
            (f"error over that at {shortest} tokens", r["error"] / first[kind], GROWTH_BOUND),
        ][: 3 if kind in BOUNDS else 2]
        for name, value, bound in limits:
            if not value <= bound:
                failed.append(f"{r['dtype']}, {r['case']}, {r['length']} tokens: {name} {value:.3g}, bound {bound:g}")
    return failed


def accuracy_table(record: dict) -> str:
    """The report as lines of at most 80 columns."""
    s, results = record["settings"], record["results"]
    at = {(r["length"], r["dtype"], r["case"]): r for r in results}
    percent = lambda x: f"{100 * x:.2f}"
    shapes = (
        f"batch {s['batch']}, {s['num_q_heads']} q heads, {s['num_kv_heads']} kv heads, "
        f"{head_dim_words(s['head_dim'])}, "
        f"pages of {s['page_size']}, bf16 query, seed {s['seed']}"
    )
    columns = lambda cells: "".join(cell.rjust(9) for cell in cells)
    lines = [
        report_line("shapes", shapes),
        report_line("versions", " ".join(f"{name} {version}" for name, version in record["versions"].items())),
        "",
        (" " * 6 + "".join(dtype.center(36) for dtype in DTYPES)).rstrip(),
        "tokens" + columns([*CASES, "own"]) * 2,
    ]
    for n in s["lengths"]:
        line = f"{n:>6}"
        for dtype in DTYPES:
            own = max(at[n, dtype, case]["own_error"] for case in CASES)
            line += columns([percent(at[n, dtype, case]["error"]) for case in CASES] + [percent(own)])
        lines.append(line)
    line = f"{'bound':>6}"
    for dtype in DTYPES:
        bounds = [BOUNDS.get((dtype, case)) for case in CASES] + [OWN_BOUND]
        line += columns(["-" if bound is None else percent(bound) for bound in bounds])
    lines.append(line)
    lines += ["", "% of the output's root mean square; own: the op's, on what the cache holds"]
    lines += [f"FAILED: {line}" for line in record["failures"]] or ["all within their bounds, none growing with length"]
    return "\n".join(lines)


def main(argv) -> int:
    """Measures what the flags describe; 0, or 1 where an error is over its bound."""
    del argv
    try:
        s = accuracy_settings()
        host.simulate_devices(1, many_processes=False)

        CacheSpec(s.num_kv_heads, s.head_dim, 128, s.page_size, "int8")
    except ValueError as e:
        raise UsageError(str(e)) from e

    results = measure_errors(s)
    record = {
        "benchmark": "accuracy",
        "settings": s._asdict(),
        "results": results,
        "bounds": {
            "error": {f"{dtype} {case}": bound for (dtype, case), bound in BOUNDS.items()},
            "own_error": OWN_BOUND,
            "growth": GROWTH_BOUND,
        },
        "failures": failures(results),
        "versions": versions(),
    }
    written = deliver(ACCURACY_PROGRAM.name, accuracy_table(record), shared_flags.OUTPUT.value, record)
    return int(not written or bool(record["failures"]))


def cli() -> None:
    """The console script."""
    ACCURACY_PROGRAM.run(main)


if __name__ == "__main__":
    cli()
