"""The decode kernel compiled for chips that are not here: `paged-dist-kernel-report`.

For each chip it compiles `paged_decode_attention` at one chip's shapes, ahead of time on this host's CPU, and says how
long that took, what it takes of VMEM and SMEM, how many copies it makes out of the pools and how many bytes they move
against the live ones; beside it JAX's own paged attention at the same shapes. Needs libtpu, the TPU compiler, and no
TPU; nothing runs, so it gives no time on a chip.
"""

from __future__ import annotations

import csv
import re
import sys
import time

from absl import flags

from paged_dist._errors import bad_value, require
from paged_dist.launch import flags as shared

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
WHICH = flags.DEFINE_list("chips", ["v5e", "v5p", "v6e", "v7x"], f"Chips to compile for, of {', '.join(CHIPS)}.")
CONTEXT_TOKENS = flags.DEFINE_integer("context_tokens", 4096, "Tokens of each sequence.")
TRACE = flags.DEFINE_string(
    "lengths_trace", None, "CSV with ContextTokens, GeneratedTokens: lengths of its first rows."
)
BLOCKS = flags.DEFINE_list("block_sizes", None, "pages_per_cell,cells_per_step,steps_ahead. Default: the kernel's own.")
COMPARE = flags.DEFINE_bool("jax", True, "Compile JAX's own paged attention too.")

NAME = "paged-dist-kernel-report"
_SHARED = ("batch", "num_q_heads", "num_kv_heads", "head_dim", "kv_dtype", "page_size", "sliding_window", "output")
_DEFAULTS = {"batch": 32, "num_q_heads": 8, "num_kv_heads": 1}
_JAX_BLOCK_TOKENS = 2048
for _name in _SHARED:
    flags.declare_key_flag(_name)


def settings_from_flags() -> dict:
    """What to compile, checked.

    Raises:
      ValueError, NotImplementedError: a flag's value that does not fit.
    """
    values = flags.FLAGS.flag_values_dict()
    for flag in flags.FLAGS.flags_by_module_dict()[shared.__name__]:
        if flag.name not in _SHARED and flag.present:
            raise bad_value(f"--{flag.name}", values[flag.name], "is no flag of this launcher", "see --help")
    s = {name: values[name] for name in ("batch", "num_q_heads", "num_kv_heads", "head_dim", "page_size")}
    s["context_tokens"] = CONTEXT_TOKENS.value
    shared.at_least(1, sliding_window=values["sliding_window"], **s)
    q, kv = s["num_q_heads"], s["num_kv_heads"]
    require(q % kv == 0, "--num_q_heads", q, f"must be a multiple of --num_kv_heads={kv}")
    s["sliding_window"], s["dtype"] = values["sliding_window"], shared.kv_dtype(shared.KV_DTYPE.value)
    for chip in WHICH.value:
        require(chip in CHIPS, "--chips", chip, f"must be some of {', '.join(CHIPS)}")
    s["chips"] = WHICH.value
    s["lengths"] = _trace_lengths(s["batch"]) if TRACE.value is not None else [s["context_tokens"]] * s["batch"]
    shared.check_output(shared.OUTPUT.value)
    return s


def _trace_lengths(batch: int) -> list[int]:
    """Context and half of what was generated, of the trace's first requests."""
    try:
        with open(TRACE.value, newline="") as f:
            rows = list(csv.DictReader(f))[:batch]
        lengths = [int(row["ContextTokens"]) + int(row["GeneratedTokens"]) // 2 for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as e:
        rule = f"cannot be read as a CSV with whole numbers ContextTokens and GeneratedTokens ({e})"
        raise bad_value("--lengths_trace", TRACE.value, rule) from e
    require(len(lengths) == batch, "--lengths_trace", TRACE.value, f"holds {len(lengths)} requests of --batch={batch}")
    return lengths


def plan_of(s: dict, num_cores: int):
    """The launch that `paged_decode_attention` makes of these shapes.

    Raises:
      ValueError: shapes or block sizes that it refuses.
    """
    import jax.numpy as jnp

    from paged_dist.kernels import BlockSizes
    from paged_dist.kernels.paged_attention import decode_plan

    lanes = max(128, s["head_dim"])
    rows = s["page_size"] * s["head_dim"] // lanes
    columns = -(-max(s["lengths"]) // s["page_size"])
    heads, dtype = (s["num_q_heads"], s["num_kv_heads"], s["head_dim"]), s["dtype"]
    problem = decode_plan.Problem(s["batch"], *heads, 1, s["batch"] * columns, rows, lanes, columns, dtype, dtype)
    sizes = decode_plan.choose_block_sizes(problem, s["sliding_window"], num_cores)
    if BLOCKS.value is not None:
        parts = [int(x) if x.strip().isdecimal() else x for x in BLOCKS.value]
        require(len(parts) == 3, "--block_sizes", ",".join(BLOCKS.value), "must be three whole numbers")
        sizes = BlockSizes(*parts)
    plan = decode_plan.Plan(problem, sizes, sliding_window=s["sliding_window"], num_cores=num_cores)
    decode_plan.check_block_sizes(plan)
    assert plan.cache_dtype == jnp.dtype(dtype)
    return plan


def compile_for(chip: str, fn, arrays) -> tuple[float, float, str, int]:
    """(seconds to lower, seconds to compile, the compiled program, its temporary bytes)."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from paged_dist._compat import lowering_for
    from paged_dist.topology import topology_devices

    mesh = Mesh(np.array(topology_devices(CHIPS[chip])[:1]), ("chip",))
    place = NamedSharding(mesh, PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in arrays]
    start = time.perf_counter()
    with lowering_for(mesh):
        lowered = jax.jit(fn).lower(*arrays)
        middle = time.perf_counter()
        compiled = lowered.compile()
    end = time.perf_counter()
    return middle - start, end - middle, compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


def ops_around(text: str) -> int:
    """Instructions of a compiled program's entry that do work beside its kernels."""
    entry = text[text.index("ENTRY") :]
    names = re.findall(r"= (?:\([^)]*\)|\S+) ([\w-]+)\(", entry)
    free = {"parameter", "custom-call", "bitcast", "tuple", "get-tuple-element", "constant"}
    return sum(name not in free for name in names)


def rows_for(chip: str, s: dict) -> list[dict]:
    """One record for the kernel, and one for JAX's own where it is asked for."""
    import jax
    import jax.numpy as jnp

    from paged_dist.kernels import paged_decode_attention
    from paged_dist.kernels.paged_attention import decode_plan
    from paged_dist.kernels.paged_attention.decode_cost import decode_cost

    plan = plan_of(s, 2 if chip in ("v4", "v5p") else 1)
    p = plan.problem
    query = jax.ShapeDtypeStruct((p.batch, p.num_q_heads, p.head_dim), p.query_dtype)
    pool = jax.ShapeDtypeStruct((p.num_kv_heads, p.num_pages, p.rows, p.width), p.cache_dtype)
    int32 = lambda *dims: jax.ShapeDtypeStruct((p.batch, *dims), jnp.int32)
    arrays = (query, pool, pool, int32(), int32(p.pages_per_sequence))
    sizes = plan.sizes if BLOCKS.value is not None else None
    ours = lambda *x: paged_decode_attention(*x, sliding_window=s["sliding_window"], block_sizes=sizes)
    lower, compile_, text, temp = compile_for(chip, ours, arrays)
    cost = decode_cost(plan, s["lengths"])
    record = dict(chip=chip, kernel="paged_dist", lower_s=lower, compile_s=compile_, vmem_bytes=plan.vmem_bytes)
    record |= dict(smem_bytes=plan.smem_bytes, temp_bytes=temp, ops_around=ops_around(text), **cost._asdict())
    record |= dict(
        launches=-(-p.batch // decode_plan.rows_per_launch(plan)), block_sizes=list(vars(plan.sizes).values())
    )
    return [record, *(_jax_row(chip, s, plan, arrays, cost) if COMPARE.value else [])]


def _jax_row(chip: str, s: dict, plan, arrays, cost) -> list[dict]:
    """JAX's paged attention: for each sequence and kv head, all pages of each block that has a live token."""
    import numpy as np
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    record = dict(chip=chip, kernel="jax")
    columns = plan.S
    pages = max(n for n in range(1, max(1, _JAX_BLOCK_TOKENS // plan.page_size) + 1) if columns % n == 0)
    try:
        own = lambda q, k, v, n, t: paged_attention(q, k, v, n, t, pages_per_compute_block=pages)
        lower, compile_, text, temp = compile_for(chip, own, arrays)
    except Exception as e:
        return [record | dict(error=f"{type(e).__name__}: {str(e).splitlines()[0][:100]}")]
    blocks = int((-(-np.asarray(s["lengths"]) // (pages * plan.page_size))).sum()) * plan.Hkv
    copies = 2 * blocks * pages
    itemsize = plan.cache_dtype.itemsize
    buffers = 4 * pages * plan.page_size * plan.D * itemsize
    record |= dict(lower_s=lower, compile_s=compile_, vmem_bytes=buffers, temp_bytes=temp, ops_around=ops_around(text))
    record |= dict(copies=copies, bytes_read=copies * plan.page_size * plan.D * itemsize, live_bytes=cost.live_bytes)
    return [record]


def table(s: dict, rows: list[dict]) -> str:
    """The report as lines."""
    heads = f"{s['num_q_heads']} q / {s['num_kv_heads']} kv heads of {s['head_dim']}, {s['dtype']}"
    lines = [
        f"batch {s['batch']}, {heads}, pages of {s['page_size']}, {sum(s['lengths'])} tokens"
        + (f", window {s['sliding_window']}" if s["sliding_window"] else ""),
        f"{'chip':<5}{'kernel':<11}{'lower s':>8}{'compile s':>10}{'VMEM KiB':>9}{'SMEM KiB':>9}{'copies':>8}"
        f"{'read MB':>9}{'read/live':>10}{'XLA ops':>8}",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"{r['chip']:<5}{r['kernel']:<11}does not compile: {r['error']}")
            continue
        smem = f"{r['smem_bytes'] / 1024:9.0f}" if "smem_bytes" in r else f"{'-':>9}"
        ratio = r["bytes_read"] / r["live_bytes"] if r["live_bytes"] else float("nan")
        lines.append(
            f"{r['chip']:<5}{r['kernel']:<11}{r['lower_s']:8.2f}{r['compile_s']:10.2f}{r['vmem_bytes'] / 1024:9.0f}"
            f"{smem}{r['copies']:8d}{r['bytes_read'] / 1e6:9.2f}{ratio:10.3f}{r['ops_around']:8d}"
        )
    return "\n".join(lines)


def main(argv) -> int:
    """Compiles what the flags describe."""
    del argv
    try:
        s = settings_from_flags()
        shared.simulate_devices(1, many_processes=False)
        plan_of(s, 1)
    except (ValueError, NotImplementedError) as e:
        raise shared.UsageError(str(e)) from e

    from paged_dist.launch import report
    from paged_dist.topology import has_libtpu

    if not has_libtpu():
        raise shared.UsageError("libtpu, the TPU compiler, is not installed: pip install 'jax[tpu]'")
    try:
        rows = [row for chip in s["chips"] for row in rows_for(chip, s)]
    except ValueError as e:
        raise shared.UsageError(str(e)) from e
    print(table(s, rows), flush=True)
    if shared.OUTPUT.value is not None:
        record = {"benchmark": "kernel_report", "settings": s, "rows": rows, "versions": report.versions()}
        try:
            report.append_json_line(shared.OUTPUT.value, record)
        except OSError as e:
            print(f"{NAME}: error: --output={shared.OUTPUT.value!r}: could not be written: {e}", file=sys.stderr)
            return 1
    return 0


def cli() -> None:
    """The console script."""
    for name, value in _DEFAULTS.items():
        flags.FLAGS.set_default(name, value)
    shared.cli(main, NAME)


if __name__ == "__main__":
    cli()
