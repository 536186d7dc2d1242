"""The decode kernel compiled for chips that are not here: `paged-dist-kernel-report`.

For each chip it compiles `paged_decode_attention` at one chip's shapes, over a cache as it is stored, ahead of time on
this host's CPU. It prints how long lowering and compiling took; the program's VMEM, SMEM and temporary HBM; how many
DMAs of K and V and their scales the kernel issues for the given lengths, and the bytes that they read over those that
are live; and how many XLA operations stand around the kernel. Beside it stands JAX's own paged attention, at the same
shapes. It needs libtpu, the TPU compiler, and no TPU. Nothing runs: it says nothing about time on a chip.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from paged_dist import CacheSpec
from paged_dist._errors import require
from paged_dist.cache.head_padding import cut_heads, pad_heads
from paged_dist.kernels import BlockSizes
from paged_dist.kernels.attention.checks import check_pools
from paged_dist.kernels.decode import plan_choice, traffic
from paged_dist.kernels.decode.api import decode_stored_pages
from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.decode.traffic import PageTraffic
from paged_dist.kernels.scale_layout import scale_rows
from paged_dist.kernels.target import Target
from paged_dist.launch.common import flag_checks, host, provenance, record_output, shared_flags
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.program import Program
from paged_dist.launch.common.report_lines import head_dim_words
from paged_dist.launch.common.run_program import UsageError
from paged_dist.launch.common.shape_flags import attention_shapes_from_flags
from paged_dist.launch.planning import absent_chips, hlo_text, jax_kernel
from paged_dist.launch.serving.synthetic import input_dtype
from paged_dist.launch.serving.traces import read_trace
from paged_dist.launch.serving.workload import pages_needed, whole_pool

KNOWN_CHIPS = tuple(absent_chips.CHIP_TOPOLOGIES)
CHIPS = flags.DEFINE_list("chips", list(KNOWN_CHIPS[1:]), f"Chips to compile for: {', '.join(KNOWN_CHIPS)}.")
LENGTHS_TRACE = flags.DEFINE_string(
    "lengths_trace",
    None,
    "File of requests, in a format that decode's --trace takes: its first --batch requests, each halfway through its "
    "answer, are the sequences, in place of --context_tokens.",
)
BLOCK_SIZES = flags.DEFINE_list(
    "block_sizes", None, "pages_per_cell,cells_per_step,steps_ahead of the decode kernel. Default: its own choice."
)
JAX = flags.DEFINE_bool("jax", True, "Compile JAX's own paged attention too.")
JAX_BLOCK_TOKENS = flags.DEFINE_integer(
    "jax_block_tokens", None, "Tokens of a block of JAX's own. Default: some two thousand, as many as VMEM holds."
)

KERNEL_REPORT_PROGRAM = Program(
    "paged-dist-kernel-report",
    takes=(
        *("batch", "num_q_heads", "num_kv_heads", "head_dim", "page_size", "sliding_window"),
        *("kv_dtype", "context_tokens", "output"),
    ),
    defaults={"batch": 32, "num_q_heads": 8, "num_kv_heads": 1},  # a chip's share of 64 heads over 8 chips
)
_CONTEXT_TOKENS = 4096  # where no flag names other lengths


@dataclasses.dataclass(frozen=True)
class KernelReportSettings:
    """What to compile: the chips, one chip's shapes, and the lengths to count DMAs for."""

    chips: tuple[str, ...]
    lengths: tuple[int, ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    sliding_window: int | None
    dtype: str
    block_sizes: tuple[int, ...] | None
    jax: bool
    jax_block_tokens: int | None
    lengths_of: str | None = None  # the trace that has them, and what to know of it


def kernel_report_settings() -> KernelReportSettings:
    """The settings that the flags name.

    Raises:
      ValueError, NotImplementedError: a value outside its rule, or a flag of another launcher.
    """
    KERNEL_REPORT_PROGRAM.refuse_other_flags({"context": "give --context_tokens"})
    shapes = attention_shapes_from_flags()
    tokens, window = shared_flags.CONTEXT_TOKENS.value, shared_flags.SLIDING_WINDOW.value
    flag_checks.at_least(1, context_tokens=tokens, jax_block_tokens=JAX_BLOCK_TOKENS.value, sliding_window=window)
    flag_checks.at_most(flag_checks.MOST_ROWS, batch=shapes.batch)
    require(len(CHIPS.value) > 0, "--chips", "", f"must name some of {', '.join(KNOWN_CHIPS)}")
    for chip in CHIPS.value:
        require(chip in KNOWN_CHIPS, "--chips", chip, f"must be some of {', '.join(KNOWN_CHIPS)}")
    sizes = None
    if BLOCK_SIZES.value is not None:
        text = ",".join(BLOCK_SIZES.value)
        sizes = tuple(flag_checks.whole_numbers(BLOCK_SIZES.value) or ())
        rule = "must be pages_per_cell,cells_per_step,steps_ahead"
        require(len(sizes) == 3, "--block_sizes", text, rule, "e.g. 4,8,2")
    flag_checks.check_output(shared_flags.OUTPUT.value)
    lengths, lengths_of = (tokens or _CONTEXT_TOKENS,) * shapes.batch, None
    if LENGTHS_TRACE.value is not None:
        lengths, lengths_of = trace_lengths(LENGTHS_TRACE.value, shapes.batch)
    return KernelReportSettings(
        chips=tuple(CHIPS.value),
        lengths=lengths,
        lengths_of=lengths_of,
        num_q_heads=shapes.num_q_heads,
        num_kv_heads=shapes.num_kv_heads,
        head_dim=shapes.head_dim,
        page_size=shapes.page_size,
        sliding_window=window,
        dtype=flag_checks.kv_dtype(shared_flags.KV_DTYPE.value),
        block_sizes=sizes,
        jax=JAX.value,
        jax_block_tokens=JAX_BLOCK_TOKENS.value,
    )


def trace_lengths(path: str, batch: int) -> tuple[tuple[int, ...], str]:
    """Live tokens of the trace's first `batch` requests, each halfway through its answer, and what the trace is."""
    require(not flags.FLAGS["context_tokens"].present, "--lengths_trace", path, "not together with --context_tokens")
    trace = read_trace(path, batch, flag="--lengths_trace")
    requests = trace.requests
    require(len(requests) == batch, "--lengths_trace", path, f"has {len(requests)} requests, --batch={batch}")
    return tuple(r.context + r.generated // 2 for r in requests), trace.name


def plan_of(s: KernelReportSettings, target: Target) -> LaunchPlan:
    """The launch plan of `paged_decode_attention` for the whole batch, on a chip that `target` describes.

    Raises:
      ValueError: shapes or block sizes that the op refuses.
    """
    pages = [pages_needed(n, s.page_size) for n in s.lengths]
    num_pages = whole_pool(sum(pages), s.page_size, s.dtype)
    spec = CacheSpec(s.num_kv_heads, s.head_dim, num_pages, s.page_size, s.dtype, num_layers=1)
    pool, scales = jax.ShapeDtypeStruct(spec.pool_shape, s.dtype), None
    if spec.is_quantized:
        scales = jax.ShapeDtypeStruct(spec.scales_shape, jnp.float32)
    batch = len(s.lengths)
    problem = check_pools(
        jax.ShapeDtypeStruct((batch, s.num_q_heads, spec.stored_head_dim), input_dtype(s.dtype)),
        pool,
        pool,
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch, max(pages)), jnp.int32),
        scales,
        scales,
    )
    sizes = None if s.block_sizes is None else BlockSizes(*s.block_sizes)
    plan = plan_choice.make_launch_plan(problem, target, sizes, sliding_window=s.sliding_window)
    plan_choice.check_block_sizes(plan)
    plan_choice.rows_per_launch(plan)  # refuses a row of the table that scalar memory cannot hold
    return plan


def report_ours(s: KernelReportSettings, mesh: Mesh, plan: LaunchPlan) -> dict:
    """The decode kernel, compiled for the chip of `mesh`: blocks, memory, DMAs, and the XLA operations around it."""
    p = plan.problem
    spec = CacheSpec(p.num_kv_heads, s.head_dim, p.num_pages, p.page_size, p.cache_dtype, num_layers=1)
    query = jax.ShapeDtypeStruct((p.batch, p.num_q_heads, s.head_dim), p.query_dtype)
    pool = jax.ShapeDtypeStruct((1, p.num_kv_heads, p.num_pages, p.rows, p.width), p.cache_dtype)
    lengths = jax.ShapeDtypeStruct((p.batch,), jnp.int32)
    table = jax.ShapeDtypeStruct((p.batch, p.pages_per_sequence), jnp.int32)
    sizes = None if s.block_sizes is None else plan.sizes
    scales = ()
    if p.is_quantized:
        rows = scale_rows(p.num_pages, p.page_size)
        scales = 2 * (jax.ShapeDtypeStruct((1, p.num_kv_heads, rows, 128), jnp.float32),)

    def attend(query, *arrays):
        arrays, scales = arrays[:4], dict(zip(("key_scales", "value_scales"), arrays[4:], strict=False))
        output = decode_stored_pages(
            pad_heads(query, spec),
            *arrays,
            **scales,
            sm_scale=1.0,
            soft_cap=None,
            sliding_window=s.sliding_window,
            return_lse=False,
            block_sizes=sizes,
        )
        return cut_heads(output, spec)

    rows = min(p.batch, plan_choice.rows_per_launch(plan))
    launch = dataclasses.replace(plan, problem=p.replace(batch=rows))
    return {
        "block_sizes": dataclasses.asdict(plan.sizes),
        "vmem_planned": launch.vmem_bytes,
        "smem_planned": launch.smem_bytes,
        **_dma_counts(traffic.page_traffic(plan, s.lengths), traffic.live_bytes(plan, s.lengths)),
        **_program_facts(absent_chips.timed_compile(mesh, attend, query, pool, pool, lengths, table, *scales), plan),
    }


def report_jax(s: KernelReportSettings, mesh: Mesh, plan: LaunchPlan) -> dict:
    """The same of JAX's own paged attention, which plans no VMEM."""
    pages = jax_kernel.jax_pages_per_block(plan, s.jax_block_tokens)
    op, arrays = jax_kernel.jax_call(plan, pages, mesh)
    return {
        "pages_per_compute_block": pages,
        "megacore_mode": op.keywords["megacore_mode"],
        "vmem_planned": None,
        "smem_planned": jax_kernel.jax_smem_bytes(plan, pages),
        **_dma_counts(jax_kernel.jax_page_copies(plan, s.lengths, pages), traffic.live_bytes(plan, s.lengths)),
        **_program_facts(absent_chips.timed_compile(mesh, op, *arrays), plan),
    }


def _dma_counts(copies: PageTraffic, live_bytes: int) -> dict:
    """How many DMAs a kernel issues and what they read, beside the bytes that are live."""
    return {"copies": copies.count, "bytes_read": copies.bytes, "live_bytes": live_bytes}


def _program_facts(compiled: absent_chips.CompiledForChip, plan: LaunchPlan) -> dict:
    """What the compiled program says: times, launches, memory, XLA operations, and copies of a pool."""
    p = plan.problem
    pool_bytes = p.num_kv_heads * p.num_pages * p.page_size * p.head_dim * plan.cache_dtype.itemsize
    vmem = hlo_text.kernel_vmem(compiled.text)
    large = hlo_text.values_as_large_as(compiled.text, pool_bytes)
    return {
        "lower_s": compiled.lower_s,
        "compile_s": compiled.compile_s,
        "launches": len(vmem),
        "vmem_used": max(vmem, default=0),
        "temp_bytes": compiled.temp_bytes,
        "xla_ops": hlo_text.ops_around_kernels(compiled.text),
        "pool_copies": [value for value in large if not value.split()[0].endswith("-done")],  # a pair is one copy
    }


def report_chip(s: KernelReportSettings, chip: str, mesh: Mesh, plan: LaunchPlan) -> list[dict]:
    """One record for each kernel on `chip`; with `error` in place of the numbers where it does not compile."""
    records = []
    for kernel, report in (("paged_dist", report_ours), ("jax", report_jax)):
        if kernel == "jax" and not (s.jax and jax_kernel.jax_takes(s.dtype)):
            continue
        try:
            found = report(s, mesh, plan)
        except Exception as e:  # whatever tracing, Mosaic or XLA raise
            found = {"error": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"}
        records.append({"chip": chip, "kernel": kernel, **found})
    return records


_COLUMNS = (  # heading in two lines, width, what stands there
    ("chip", "", 4, lambda r: r["chip"]),
    ("kernel", "", 10, lambda r: r["kernel"]),
    ("lower", "s", 6, lambda r: f"{r['lower_s']:.2f}"),
    ("compile", "s", 7, lambda r: f"{r['compile_s']:.2f}"),
    ("VMEM plan", "KiB", 9, lambda r: _kib_cell(r["vmem_planned"])),
    ("used", "KiB", 6, lambda r: _kib_cell(r["vmem_used"])),
    ("SMEM", "KiB", 5, lambda r: _kib_cell(r["smem_planned"])),
    ("temp", "KiB", 7, lambda r: _kib_cell(r["temp_bytes"])),
    ("DMAs", "", 8, lambda r: str(r["copies"])),
    ("read", "MB", 9, lambda r: f"{r['bytes_read'] / 1e6:.2f}"),
    ("read", "/live", 6, lambda r: f"{r['bytes_read'] / r['live_bytes']:.3f}"),
    ("XLA", "ops", 4, lambda r: str(len(r["xla_ops"]))),
    ("pool", "copies", 6, lambda r: str(len(r["pool_copies"]))),
)


def _kib_cell(size: int | None) -> str:
    """A column's number of KiB, which stands in its heading; '-' where there is none."""
    return "-" if size is None else f"{size / 1024:.0f}"


def kernel_report_table(s: KernelReportSettings, records: list[dict], versions: dict[str, str]) -> str:
    """The report as lines, a row for each chip and kernel."""
    live = next((r["live_bytes"] for r in records if "error" not in r), None)
    window = "" if s.sliding_window is None else f", window {s.sliding_window}"
    scales = " and scales" if s.dtype in ("int8", "float8_e4m3fn") else ""
    blocks = "" if s.block_sizes is None else f", blocks {','.join(map(str, s.block_sizes))}"
    if s.jax and s.jax_block_tokens is not None:
        blocks += f", JAX's of {s.jax_block_tokens} tokens"
    lines = [
        f"batch {len(s.lengths)}, {s.num_q_heads} q heads, {s.num_kv_heads} kv heads, "
        f"{head_dim_words(s.head_dim)}, "
        f"{s.dtype}{scales}, pages of {s.page_size}{window}{blocks}",
        f"lengths {min(s.lengths)} to {max(s.lengths)}, {sum(s.lengths)} tokens"
        + ("" if live is None else f", {live / 1e6:.2f} MB live")
        + ("" if s.lengths_of is None else f", of {s.lengths_of}"),
        " ".join(f"{name} {version}" for name, version in versions.items()),
        "",
        _line(_COLUMNS, [c[0] for c in _COLUMNS]),
        _line(_COLUMNS, [c[1] for c in _COLUMNS]),
    ]
    for r in records:
        if "error" in r:
            lines.append(f"{_line(_COLUMNS[:2], [r['chip'], r['kernel']])} does not compile: {r['error'][:96]}")
        else:
            lines.append(_line(_COLUMNS, [show(r) for *_, show in _COLUMNS]))
    if s.jax and s.sliding_window is not None:
        lines.append("JAX's own has no sliding window: it reads every token.")
    if s.jax and s.dtype == "float8_e4m3fn":
        lines.append("JAX's own has no fp8 pages with scales.")
    return "\n".join(lines)


def _line(columns, cells) -> str:
    """A row of the table: names to the left of their columns, numbers to the right."""
    widths = [width for _, _, width, _ in columns]
    names = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    return " ".join(names + [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]).rstrip()


def main(argv) -> int:
    """Compiles what the flags describe; 0, or 1 where the decode kernel does not compile for a chip."""
    del argv
    try:
        s = kernel_report_settings()
        host.start_tpu_compiler()

        plan_of(s, Target())  # says what is wrong with the shapes before libtpu takes its seconds to load
        meshes = {chip: absent_chips.one_chip_mesh(chip) for chip in s.chips}
        plans = {chip: plan_of(s, Target.of(mesh.devices.flat[0])) for chip, mesh in meshes.items()}
    except (ValueError, NotImplementedError) as e:
        raise UsageError(str(e)) from e

    records = []
    for chip, mesh in meshes.items():
        KERNEL_REPORT_PROGRAM.say(f"compiling for {chip}")
        records += report_chip(s, chip, mesh, plans[chip])
    versions = provenance.versions()
    record = json_record(s, records, versions)
    if not record_output.deliver(
        KERNEL_REPORT_PROGRAM.name, kernel_report_table(s, records, versions), shared_flags.OUTPUT.value, record
    ):
        return 1
    return int(any("error" in r for r in records if r["kernel"] == "paged_dist"))


def json_record(s: KernelReportSettings, records: list[dict], versions: dict[str, str]) -> dict:
    """The run as one record: settings, and one entry of `kernels` for each chip and kernel."""
    return {
        "benchmark": "kernel_report",
        "settings": dataclasses.asdict(s),
        "kernels": records,
        "versions": versions,
    }


def cli() -> None:
    """The console script."""
    KERNEL_REPORT_PROGRAM.run(main)


if __name__ == "__main__":
    cli()
