"""The XLA form of paged attention against gathering everything, timed on this host's CPU: `paged-dist-xla-report`.

The op runs as CPU users run it, `sharded_paged_attention` on a `PagedKVCache`. Against it stands what one writes
without it, under jit: gather every page of the tables (8-bit ones times their scales), mask, softmax in f32. All forms
get the same pages and lengths, take turns in one process, each repeat in another order, and must agree. The ratio is
that to the fastest plain form.
"""

from __future__ import annotations

import functools
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from paged_dist import CacheSpec, PagedKVCache, make_pod_mesh, quantize_kv, sharded_paged_attention
from paged_dist._compat import broadcasts
from paged_dist._errors import BadValue, require
from paged_dist.launch.common import flag_checks, host, shared_flags
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.program import Program
from paged_dist.launch.common.provenance import versions
from paged_dist.launch.common.record_output import deliver
from paged_dist.launch.common.report_lines import head_dim_words, report_line
from paged_dist.launch.common.run_program import UsageError
from paged_dist.launch.common.shape_flags import attention_shapes_from_flags
from paged_dist.launch.serving.output_checks import ERROR_BOUNDS, relative_error
from paged_dist.launch.serving.synthetic import input_dtype
from paged_dist.launch.serving.workload import whole_pool

TABLE_TOKENS = flags.DEFINE_integer("table_tokens", 2048, "Tokens that each sequence's row of the table has room for.")
LIVE = flags.DEFINE_list("live", ["1", "0.25"], "Shares of those tokens that are live, one measurement each.")
REPEATS = flags.DEFINE_integer("repeats", 20, "Timed calls of each form, for each live share.")

XLA_REPORT_PROGRAM = Program(
    "paged-dist-xla-report",
    takes=("batch", "num_q_heads", "num_kv_heads", "head_dim", "kv_dtype", "page_size", "output"),
    defaults={"batch": 32, "num_q_heads": 32, "num_kv_heads": 8},
)


def sizes_from_flags() -> dict:
    """What to measure, as the flags name it: shapes, dtype, table_tokens, repeats and live shares, checked.

    Raises:
      ValueError, NotImplementedError: a flag's value that does not fit.
    """
    XLA_REPORT_PROGRAM.refuse_other_flags()
    shapes = attention_shapes_from_flags()
    tokens, page = TABLE_TOKENS.value, shapes.page_size
    flag_checks.at_least(1, table_tokens=tokens, repeats=REPEATS.value)
    require(tokens % page == 0, "--table_tokens", tokens, f"must be a multiple of --page_size={page}")
    pools = 2 * 4 * shapes.batch * tokens * shapes.num_kv_heads * shapes.head_dim  # drawn in f32
    flag_checks.check_host_memory("--table_tokens", tokens, pools)
    dtype, live = flag_checks.kv_dtype(shared_flags.KV_DTYPE.value), [_share(text) for text in LIVE.value]
    require(len(live) > 0, "--live", "", "must name at least one share", "--live=1,0.25 is the default")
    flag_checks.check_output(shared_flags.OUTPUT.value)
    return {**shapes._asdict(), "table_tokens": tokens, "repeats": REPEATS.value, "dtype": dtype, "live": live}


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    require(0 <= share <= 1, "--live", text, "must be shares between 0 and 1")
    return share


def gather_everything(
    query, keys, values, lengths, tables, key_scales=None, value_scales=None, *, pages_first: bool, f32_products: bool
):
    """Attention as plainly as it can be written: every page of the tables is gathered, whatever the lengths.

    Args:
      query: [B, Hq, D] bf16 or f32; keys, values: [N, Hkv, P, D] with `pages_first`, else [Hkv, N, P, D].
      lengths: [B] int32; tables: [B, S] int32, every entry the id of a page.
      key_scales, value_scales: f32, of int8 and fp8 pages, their shape less D.
      f32_products: products of f32 copies; False: of what is stored, 8-bit pages in the query's dtype, summed in f32.

    Returns:
      [B, Hq, D] in query's dtype.
    """

    def gather(pages):
        """[B, Hkv, T, ...]"""
        found = pages[tables].swapaxes(1, 2) if pages_first else pages[:, tables].swapaxes(0, 1)
        return found.reshape(*found.shape[:2], -1, *found.shape[4:])

    def dequantised(pages, scales):
        """[B, Hkv, T, D]"""
        found = gather(pages)
        if scales is not None:
            found = found.astype(jnp.float32) * gather(scales)[..., None]
            return found if f32_products else found.astype(query.dtype)
        return found.astype(jnp.float32) if f32_products else found

    batch, heads, head_dim = query.shape
    k, v = dequantised(keys, key_scales), dequantised(values, value_scales)
    q = query.reshape(batch, k.shape[1], -1, head_dim).astype(k.dtype)  # [B, Hkv, G, D]
    logits = jnp.einsum("bhgd,bhtd->bhgt", q, k, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
    live = jnp.arange(k.shape[2]) < lengths[:, None]  # [B, T]
    weights = jax.nn.softmax(jnp.where(live[:, None, None], logits, -1e30), axis=-1)
    output = jnp.einsum("bhgt,bhtd->bhgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return output.reshape(batch, heads, head_dim).astype(query.dtype)


def make_forms(sizes: dict) -> dict:
    """Name of a form -> its function of lengths [B], compiled at the first call. The op comes first.

    All read the same pages.
    """
    batch, heads, head_dim, dtype = (sizes[n] for n in ("batch", "num_kv_heads", "head_dim", "dtype"))
    columns = sizes["table_tokens"] // sizes["page_size"]
    num_pages = whole_pool(batch * columns, sizes["page_size"], dtype)
    spec = CacheSpec(heads, head_dim, num_pages, sizes["page_size"], dtype)
    mesh = make_pod_mesh(model=1, devices=jax.devices()[:1])
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), input_dtype(dtype))
    query = draw(batch, sizes["num_q_heads"], head_dim)
    keys, values = (draw(heads, spec.num_pages, spec.page_size, head_dim) for _ in "kv")
    tables = jnp.asarray(rng.permutation(batch * columns).reshape(batch, columns), jnp.int32)
    pools = keys, values
    if spec.is_quantized:
        (keys, key_scales), (values, value_scales) = (quantize_kv(x, dtype) for x in pools)
        pools = keys, values, key_scales, value_scales
    cache = PagedKVCache.from_pages(*pools, mesh=mesh)

    @jax.jit
    def attend(query, cache, lengths, tables):
        return sharded_paged_attention(
            query, cache, lengths, tables, sm_scale=1 / math.sqrt(head_dim), implementation="xla"
        )

    forms = {"paged_dist": lambda lengths: attend(query, cache, lengths, tables)}
    for layout, stored in (
        ("heads first", pools),
        ("pages first", tuple(jnp.copy(x.swapaxes(0, 1)) for x in pools)),
    ):
        for f32_products in (True,) if dtype == "float32" else (False, True):
            gather = functools.partial(
                gather_everything, pages_first=layout == "pages first", f32_products=f32_products
            )
            plain = jax.jit(broadcasts(gather))
            forms[f"{layout}, {'f32' if f32_products else 'bf16'}"] = lambda lengths, plain=plain, stored=stored: plain(
                query, *stored[:2], lengths, tables, *stored[2:]
            )
    return forms


def time_forms(forms: dict, lengths, repeats: int) -> tuple[dict, float]:
    """Runs every form `repeats` times, in turns.

    Returns:
      Form -> [repeats] seconds; and the worst difference of a plain form's output from the op's, over its scale.
    """
    first, *plain = (np.asarray(form(lengths)).astype(np.float64) for form in forms.values())
    # An idle row is 0 here; what the plain form makes of no token means nothing.
    live = np.asarray(lengths) > 0
    worst = max(relative_error(output[live], first[live]) for output in plain) if live.any() else 0.0
    seconds: dict = {name: [] for name in forms}
    names = list(forms)
    for i in range(repeats):
        turn = i % len(names)  # no form always follows the same one
        for name in names[turn:] + names[:turn]:
            # Untimed: the gigabyte that another form gathered is still being freed when its output is ready.
            forms[name](lengths).block_until_ready()
            start = time.perf_counter()
            forms[name](lengths).block_until_ready()
            seconds[name].append(time.perf_counter() - start)
    return seconds, worst


def summarise_times(live_tokens: int, seconds: dict, worst: float, bound: float) -> dict:
    """Quartiles of each form's times (ms) and of the ratio to the fastest plain form, repeat by repeat."""
    quartiles = lambda x: [float(q) for q in np.percentile(x, (25, 50, 75))]
    ours, *plain = seconds
    fastest = min(plain, key=lambda name: np.median(seconds[name]))
    return {
        "live_tokens": live_tokens,
        "ms": {name: quartiles(1e3 * np.asarray(times)) for name, times in seconds.items()},
        "fastest_plain": fastest,
        "ratio": quartiles(np.asarray(seconds[fastest]) / np.asarray(seconds[ours])),
        "worst_difference": worst,
        "agrees": worst <= bound,
    }


def xla_report_table(record: dict) -> str:
    """The report as lines of at most 80 columns."""
    s, results = record["settings"], record["results"]
    lines = [
        report_line(
            "shapes",
            f"batch {s['batch']}, {s['num_q_heads']} q heads, {s['num_kv_heads']} kv heads, "
            f"{head_dim_words(s['head_dim'])}, "
            f"pages of {s['page_size']}, tables of {s['table_tokens']} tokens, {s['dtype']}",
        ),
        report_line("host", f"{record['cpus']} CPUs; {s['repeats']} repeats, median and quartiles in ms"),
        report_line("versions", " ".join(f"{name} {version}" for name, version in record["versions"].items())),
    ]
    for r in results:
        lines += ["", f"{r['live_tokens']} of {s['table_tokens']} tokens live"]
        lines += [f"  {name:<18}{m:9.2f}  ({low:.2f} to {high:.2f})" for name, (low, m, high) in r["ms"].items()]
        low, m, high = r["ratio"]
        lines.append(f"  {'ratio':<18}{m:9.2f}  ({low:.2f} to {high:.2f}), to {r['fastest_plain']}")
        lines.append(
            f"  {'difference':<18}{r['worst_difference']:9.1e}  of scale, bound {record['bound']:.0e}: "
            f"{'ok' if r['agrees'] else 'FAILED'}"
        )
    return "\n".join(lines)


def main(argv) -> int:
    """Measures what the flags describe; 0, or 1 where the forms disagree."""
    del argv
    try:
        sizes = sizes_from_flags()
        host.simulate_devices(1, many_processes=False)
    except (ValueError, NotImplementedError) as e:
        raise UsageError(str(e)) from e

    try:
        forms = make_forms(sizes)
    except BadValue as e:
        raise UsageError(str(e)) from e
    bound = ERROR_BOUNDS[sizes["dtype"]]
    results = []
    for share in sizes["live"]:
        live_tokens = round(share * sizes["table_tokens"])
        lengths = jnp.full(sizes["batch"], live_tokens, jnp.int32)
        results.append(summarise_times(live_tokens, *time_forms(forms, lengths, sizes["repeats"]), bound))
    record = {
        "benchmark": "xla_report",
        "settings": sizes,
        "results": results,
        "bound": bound,
        "cpus": len(os.sched_getaffinity(0)),
        "versions": versions(),
    }
    written = deliver(XLA_REPORT_PROGRAM.name, xla_report_table(record), shared_flags.OUTPUT.value, record)
    return 0 if written and all(r["agrees"] for r in results) else 1


def cli() -> None:
    """The console script."""
    XLA_REPORT_PROGRAM.run(main)


if __name__ == "__main__":
    cli()
