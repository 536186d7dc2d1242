"""The plan of a launch on a given chip: the block sizes where the caller names none, and what fits on chip."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from paged_dist._errors import require
from paged_dist.kernels.arithmetic import power_of_two_at_least, power_of_two_at_most, round_up
from paged_dist.kernels.attention.problem import Problem
from paged_dist.kernels.chips import SMEM_LIMIT
from paged_dist.kernels.decode.block_sizes import BlockSizes
from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.target import Target
from paged_dist.kernels.tiling import LANES, SUBLANES

_STEP_BYTES = 1 << 20  # of K in a step: 4096 tokens of one head of 128 in bf16
# Tokens in a cell of few heads, by least page size: a cell's own scalar work weighs most where each page's does too,
# and a long cell is paid whole for a short sequence.
_CELL_TOKENS = ((128, 512), (32, 1024), (0, 2048))
# Of 8-bit pages, which take two copies more and half the time: in a cell, and in a step at most. The larger sizes are
# for a chip whose core they keep busier than its HBM; they cost short and uneven sequences more than they give there.
_QUANTIZED_TOKENS = (1024, 4096)
_QUANTIZED_TOKENS_CORE_BOUND = (2048, 8192)
_FEW_TOKENS = 64  # of a page: the copies of 8-bit pages below it are too much straight-line code
# Of several new tokens a sequence: registers that a step's scores take at most, and steps ahead at most, to have as
# many bytes in flight in shorter steps.
_SCORE_REGISTERS = 256
_SHORT_STEPS_AHEAD = 8
_WINDOW_TOKENS = 1024  # as long a cell as a window fills is worth it
_VMEM_LIMIT = 40 << 20  # what a kernel asks for at most; a core of v5e, v5p, v6e and v7x has 64 MiB and more
_VMEM_LIMIT_TWO_CORES = 14 << 20  # the chip may be a v4, with 16 MiB a core


def choose_block_sizes(
    problem: Problem, sliding_window: int | None = None, num_cores: int = 1, outruns_core: bool = False
) -> BlockSizes:
    """The block sizes where the caller names none: steps of about a MiB of K, in cells of the usual work's length.

    Found by replaying the compiled schedule for v5e, v5p, v6e and v7x. Two cores have half the work each, and so half
    the step: what is left to compute when the last page arrives is a step.
    """
    p = problem
    row_bytes = p.num_kv_heads * p.width * jnp.dtype(p.cache_dtype).itemsize
    wide = p.width > LANES  # its pages are copied in pieces, whose scalar work larger steps and cells spread
    rows = max(1, _STEP_BYTES * (2 if wide else 1) // num_cores // row_bytes)  # of a step
    if p.is_quantized and p.page_size < _FEW_TOKENS:  # four copies a page in straight-line code: it has to compile
        rows = max(1, rows // 4)
    tokens = next(tokens for page_size, tokens in _CELL_TOKENS if p.page_size >= page_size)
    tokens *= 2 if wide else 1
    if p.is_quantized:
        tokens, most = _QUANTIZED_TOKENS_CORE_BOUND if outruns_core else _QUANTIZED_TOKENS
        rows = min(rows, most // p.tokens_per_row)
    if sliding_window is not None:
        tokens = max(tokens, min(_WINDOW_TOKENS, sliding_window))
    page_rows = round_up(p.rows, SUBLANES * 4 // jnp.dtype(p.cache_dtype).itemsize)  # as they lie in a cell
    pages = power_of_two_at_most(min(rows, tokens // p.tokens_per_row) // page_rows)
    pages = min(pages, power_of_two_at_least(p.pages_per_sequence))
    cells = power_of_two_at_most(rows // max(LANES, pages * page_rows))
    sequences = power_of_two_at_least(-(-p.batch // num_cores))
    cells = min(cells, sequences * power_of_two_at_least(-(-p.pages_per_sequence // pages)))
    if p.num_queries > 1:
        return _shorten(p, BlockSizes(pages, cells), num_cores)
    buffers = 6 * cells * max(LANES, pages * page_rows) * row_bytes
    ahead = 1 if buffers > vmem_limit(num_cores) // 2 else 2  # only for pages of megabytes
    return BlockSizes(pages, cells, ahead)


def _shorten(p: Problem, sizes: BlockSizes, num_cores: int) -> BlockSizes:
    """`sizes` with shorter steps, and more of them ahead, until the scores of many query rows fit in registers."""
    plan = LaunchPlan(p.replace(batch=num_cores), sizes, num_cores=num_cores)
    pages, cells, ahead = sizes.pages_per_cell, sizes.cells_per_step, sizes.steps_ahead

    def is_too_long():
        made = dataclasses.replace(plan, sizes=BlockSizes(pages, cells, min(ahead, _SHORT_STEPS_AHEAD)))
        registers = made.C * made.H * pl.cdiv(made.M, SUBLANES) * pl.cdiv(made.T, LANES)
        return registers > _SCORE_REGISTERS or made.vmem_bytes > vmem_limit(num_cores)

    while is_too_long() and pages * cells > 1:
        pages, cells, ahead = (pages, cells // 2, 2 * ahead) if cells > 1 else (pages // 2, cells, 2 * ahead)
    return BlockSizes(pages, cells, min(ahead, _SHORT_STEPS_AHEAD))


def make_launch_plan(
    problem: Problem,
    target: Target,
    block_sizes: BlockSizes | None = None,
    *,
    sm_scale: float = 1.0,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    output_dtype=None,
    **fields,
) -> LaunchPlan:
    """The plan of a launch on the chip that `target` describes; block sizes of None are `choose_block_sizes`'s.

    fields: the other fields of `LaunchPlan`, by name.
    """
    p = problem
    if sliding_window is not None:  # a larger one changes nothing, and need not fit in int32
        sliding_window = min(sliding_window, p.pages_per_sequence * p.page_size)
    if block_sizes is None:
        block_sizes = choose_block_sizes(p, sliding_window, target.num_cores, target.outruns_core)
    return LaunchPlan(
        p,
        block_sizes,
        sm_scale=float(sm_scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        sliding_window=sliding_window,
        num_cores=target.num_cores,
        widens_pages=p.cache_dtype == "float8_e4m3fn" and not target.multiplies_fp8,
        output_dtype=None if output_dtype is None else jnp.dtype(output_dtype).name,
        values_with_keys=p.is_quantized and target.outruns_core,
        **fields,
    )


def vmem_limit(num_cores: int) -> int:
    """Bytes of vector memory that a launch may take."""
    return _VMEM_LIMIT if num_cores == 1 else _VMEM_LIMIT_TWO_CORES


def _least_vmem_bytes(plan: LaunchPlan) -> int:
    """Vector memory of the smallest launch: a sequence for each core."""
    return dataclasses.replace(plan, problem=plan.problem.replace(batch=plan.num_cores)).vmem_bytes


def fits(plan: LaunchPlan) -> bool:
    """Whether the smallest launch fits in a core's vector memory."""
    return _least_vmem_bytes(plan) <= vmem_limit(plan.num_cores)


def check_block_sizes(plan: LaunchPlan) -> None:
    """Raises ValueError where the smallest launch would not fit in a core's vector memory."""
    need = _least_vmem_bytes(plan)
    default = choose_block_sizes(plan.problem, plan.sliding_window, plan.num_cores, plan.values_with_keys)
    require(
        need <= vmem_limit(plan.num_cores),
        "block_sizes",
        plan.sizes,
        f"needs {need} bytes of VMEM, of which the kernel may take {vmem_limit(plan.num_cores)}",
        f"{default} is the default here" if plan.sizes != default else "use smaller pages",
    )


@functools.lru_cache
def rows_per_launch(plan: LaunchPlan) -> int:
    """The most sequences that one launch holds: their page table in SMEM, their queries and outputs in VMEM."""
    rows, least = plan.B, min(plan.B, plan.num_cores)

    def part(rows):
        return dataclasses.replace(plan, problem=plan.problem.replace(batch=rows))

    def fits_on_chip(rows):
        smem = part(rows).smem_bytes <= SMEM_LIMIT
        return smem and part(rows).vmem_bytes <= vmem_limit(plan.num_cores)

    while rows > least and not fits_on_chip(rows):
        rows = -(-rows // 2)
    require(
        part(rows).smem_bytes <= SMEM_LIMIT,
        "block_tables.shape",
        (plan.B, plan.S),
        f"one row needs more than the {SMEM_LIMIT} bytes of SMEM that there are",
        "use larger pages",
    )
    return rows
