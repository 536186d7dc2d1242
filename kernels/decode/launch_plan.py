"""What a launch of the decode kernel looks like: block sizes, row groups, bytes. Nothing here compiles or allocates."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from paged_dist._errors import require
from paged_dist.kernels.attention.checks import SMEM_BYTES, SMEM_RESERVED, Problem
from paged_dist.kernels.target import Target
from paged_dist.kernels.tiling import LANES, SUBLANES

NUM_FIELDS = 5  # words of scalar memory that a cell takes, see decode_work.Cell
_STEP_BYTES = 1 << 20  # of K in a step: 4096 tokens of one head of 128 in bf16
# Tokens in a cell of few heads, by least page size: a cell's own scalar work weighs most where each page's does too,
# and a long cell is paid whole for a short sequence.
_CELL_TOKENS = ((128, 512), (32, 1024), (0, 2048))
# Of 8-bit pages, which take two copies more and half the time: in a cell, and in a step at most. The larger sizes are
# for a chip whose core they keep busier than its HBM; they cost short and uneven sequences more than they give there.
_QUANTIZED_TOKENS = (1024, 4096)
_QUANTIZED_TOKENS_CORE_BOUND = (2048, 8192)
_FEW_TOKENS = 64
_PART_ROWS = 512
# Tokens a page from which on the kernel clamps page ids, an instruction for each copy. Below, where copies' scalar work
# is all of the time, it costs a tenth of it; clamping the table before is an operation of a microsecond, of which a
# program whose layers share a table has one.
_CLAMPED_TOKENS = 64
# Of several new tokens a sequence: registers that a step's scores take at most, and steps ahead at most, to have as
# many bytes in flight in shorter steps.
_SCORE_REGISTERS = 256
_SHORT_STEPS_AHEAD = 8
_WINDOW_TOKENS = 1024  # as long a cell as a window fills is worth it
VMEM_LIMIT = 40 << 20  # what a kernel asks for at most; a core of v5e, v5p, v6e and v7x has 64 MiB and more
VMEM_LIMIT_TWO_CORES = 14 << 20  # the chip may be a v4, with 16 MiB a core


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How a launch cuts its work. It changes speed, and results only by f32 rounding.

    Attributes:
      pages_per_cell: consecutive pages of one sequence that share a softmax step; a power of two.
      cells_per_step: cells, of one sequence or several, in one iteration of the kernel's loop; a power of two.
      steps_ahead: steps whose pages are in flight while one is computed; 1 waits for them.

    Raises:
      ValueError: a value outside these rules.
    """

    pages_per_cell: int
    cells_per_step: int
    steps_ahead: int = 2

    def __post_init__(self):
        for name in ("pages_per_cell", "cells_per_step", "steps_ahead"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(whole, name, value, "must be a whole number, at least 1")
            require(name == "steps_ahead" or value & (value - 1) == 0, name, value, "must be a power of two")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch. B, Q, Hkv, G, D, S, R, W as in `Problem`; and

    Attributes:
      Hq: query rows of a sequence: its heads, of each new token, as `queries.as_rows` orders them.
      C: cells a step.
      T: rows of a head that a cell's buffer holds, `rows_per_cell` of them filled by pages.
      tile: rows that a sequence's last page is fetched in: a register's, or the page where it is no multiple of them.
      page_rows: rows between a cell's pages: R, or a multiple of a register's where R is none.
      H: row groups; `heads_per_group` kv heads share one, so that few query heads still fill a register's rows.
      M: query rows of a group; with two tokens a stored row, first the rows of the first token, then the second's.
    """

    problem: Problem
    sizes: BlockSizes
    sm_scale: float = 1.0
    soft_cap: float | None = None
    sliding_window: int | None = None
    has_starts_operand: bool = False
    has_sinks: bool = False
    return_lse: bool = False
    num_cores: int = 1
    widens_pages: bool = False  # 8-bit pages are multiplied as bf16
    output_dtype: str | None = None  # None: the query's
    values_with_keys: bool = False  # V's copies are issued with K's, not a step behind: less scalar work, a later end

    B = property(lambda self: self.problem.batch)
    Q = property(lambda self: self.problem.num_queries)
    Hq = property(lambda self: self.problem.num_q_heads * self.problem.num_queries)
    Hkv = property(lambda self: self.problem.num_kv_heads)
    G = property(lambda self: self.problem.group)
    D = property(lambda self: self.problem.head_dim)
    S = property(lambda self: self.problem.pages_per_sequence)
    R = property(lambda self: self.problem.rows)
    W = property(lambda self: self.problem.width)
    page_size = property(lambda self: self.problem.page_size)
    tokens_per_row = property(lambda self: self.problem.tokens_per_row)
    query_dtype = property(lambda self: jnp.dtype(self.problem.query_dtype))
    cache_dtype = property(lambda self: jnp.dtype(self.problem.cache_dtype))
    out_dtype = property(lambda self: jnp.dtype(self.output_dtype or self.problem.query_dtype))
    rows_per_head = property(lambda self: self.problem.rows_per_head)
    C = property(lambda self: self.sizes.cells_per_step)
    pages_per_cell = property(lambda self: self.sizes.pages_per_cell)
    page_rows = property(lambda self: _round_up(self.R, self.register_rows))
    rows_per_cell = property(lambda self: self.pages_per_cell * self.page_rows)
    tokens_per_cell = property(lambda self: self.pages_per_cell * self.page_size)
    T = property(lambda self: _round_up(self.rows_per_cell, LANES))
    register_rows = property(lambda self: SUBLANES * 4 // self.cache_dtype.itemsize)
    tile = property(lambda self: self.register_rows if self.R % self.register_rows == 0 else self.R)
    H = property(lambda self: self.Hkv // self.heads_per_group)
    M = property(lambda self: self.heads_per_group * self.rows_per_head * self.tokens_per_row)
    has_starts = property(lambda self: self.has_starts_operand or self.sliding_window is not None)
    is_quantized = property(lambda self: self.problem.is_quantized)
    cache_may_hold_nan = property(lambda self: self.cache_dtype != jnp.int8)
    scale_rows_per_page = property(lambda self: max(1, self.page_size // LANES))  # pages of less than 128 share one
    clamps_before = property(lambda self: self.page_size < _CLAMPED_TOKENS)  # page ids, in XLA and not in the kernel
    table_is_transposed = property(lambda self: xla_transposes(self.B, self.S))

    @property
    def parts(self) -> list[pl.Slice]:
        """A cell's rows in parts, between which copies are issued."""
        return [pl.ds(t, min(_PART_ROWS, self.T - t)) for t in range(0, self.T, _PART_ROWS)]

    @functools.cached_property
    def heads_per_group(self) -> int:
        """How many kv heads' query rows share a register of 8 rows."""
        return _heads_per_group(self.problem)

    def token_of_row(self, row):
        """The first token of each of a cell's rows (int32, any shape); beyond every token where no page fills it."""
        if self.page_rows == self.R:
            return row * self.tokens_per_row
        page, row = lax.div(row, jnp.int32(self.page_rows)), lax.rem(row, jnp.int32(self.page_rows))
        return jnp.where(row < self.R, page * self.page_size + row * self.tokens_per_row, jnp.int32(1 << 30))

    def head_of_row(self, row: int) -> int:
        """The query head of one of the H * M rows."""
        group, row = divmod(row, self.M)
        head, row = divmod(row % (self.M // self.tokens_per_row), self.rows_per_head)
        return (group * self.heads_per_group + head) * self.G + row % self.G

    def query_of_row(self, row: int) -> int:
        """The new token, of Q, of one of a group's M rows."""
        return row % (self.M // self.tokens_per_row) % self.rows_per_head // self.G

    @property
    def scratch_shapes(self) -> dict[str, tuple[tuple[int, ...], object]]:
        """(shape, dtype) of each VMEM scratch buffer, by its name in `Refs`."""
        p, ahead, f32 = self.problem, self.sizes.steps_ahead, jnp.float32
        block = (self.C, self.Hkv * self.W // LANES, self.T, LANES)
        stat = (self.H, self.M, LANES)
        shapes = dict(
            q=((self.B + 1, self.H * self.M, self.W), p.query_dtype),
            k=((ahead + 1, *block), p.cache_dtype),
            v=((ahead + (2 if self.values_with_keys else 1), *block), p.cache_dtype),
            scores=((self.C, self.H, self.M, self.T), f32),
            top=((self.C, *stat), f32),
            decay=((self.C, *stat), f32),
            run_top=(stat, f32),
            run_sum=(stat, f32),
            run_out=((self.H, self.M, self.W), f32),
            sink=(stat, f32),
            out_rows=((self.B + 1, self.Hq, self.D), self.out_dtype),
            no_output=((self.Hq, self.D), self.out_dtype),
        )
        if self.is_quantized:
            rows = (self.C, self.Hkv, self.pages_per_cell * self.scale_rows_per_page, 1, LANES)
            shapes |= dict(k_scales=((ahead + 1, *rows), f32), v_scales=((ahead + 2, *rows), f32))
        if self.return_lse:
            shapes |= dict(lse_rows=((self.B + 1, 1, self.Hq), f32), no_lse=((1, self.Hq), f32))
        return shapes

    @property
    def vmem_bytes(self) -> int:
        """Vector memory of the launch: the buffers, padded to whole tiles, and room for what the compiler spills."""
        stats = self.H * _round_up(self.M, SUBLANES) * 4
        scores = self.C * stats * self.T
        spilled = 2 * scores
        if self.widens_pages:  # a part of K and one of V as bf16
            spilled += 4 * min(_PART_ROWS, self.T) * self.W * 2
        if self.Q > 1:  # as v4's and v7x's compilers were seen to, of a MiB of scores
            spilled = (5 if self.is_quantized else 2) * (scores + stats * self.W)
            if self.is_quantized:  # a step's K and V as bf16
                spilled += 4 * self.C * self.Hkv * self.T * self.W
        return sum(_padded_bytes(*x) for x in self.scratch_shapes.values()) + spilled + (1 << 20)

    @property
    def smem_bytes(self) -> int:
        """Scalar memory of the launch."""
        table = (self.S, self.B) if self.table_is_transposed else (self.B, self.S)
        cells = (self.sizes.steps_ahead + 2) * self.C * NUM_FIELDS
        flat = (self.B * self.Q, self.B * self.Q, self.problem.num_q_heads, 1, self.B + 1, cells, 64)
        return 4 * _round_up(table[0], SUBLANES) * _round_up(table[1], LANES) + sum(_round_up(4 * n, 512) for n in flat)


def _heads_per_group(p: Problem) -> int:
    most = max(1, SUBLANES // (p.rows_per_head * p.tokens_per_row))
    return next(n for n in range(most, 0, -1) if p.num_kv_heads % n == 0)


def xla_transposes(rows: int, columns: int) -> bool:
    """Whether XLA stores an int32 [rows, columns] argument column by column, as it does where that pads less.

    The kernel then takes the transpose, which is no copy, where a fixed order would cost a relayout on each call.
    """
    return _tiled(columns, rows) < _tiled(rows, columns)


def _tiled(major: int, minor: int) -> int:
    sublanes = next((n for n in (1, 2, 4) if major <= n), _round_up(major, SUBLANES))
    return sublanes * _round_up(minor, LANES)


def choose_block_sizes(
    problem: Problem, sliding_window: int | None = None, num_cores: int = 1, outruns_core: bool = False
) -> BlockSizes:
    """The sizes where the caller names none: about a MiB of K a step, in cells as long as the work is likely to be.

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
    page_rows = _round_up(p.rows, SUBLANES * 4 // jnp.dtype(p.cache_dtype).itemsize)  # as they lie in a cell
    pages = _power_of_two(min(rows, tokens // p.tokens_per_row) // page_rows)
    pages = min(pages, _power_of_two_above(p.pages_per_sequence))
    cells = _power_of_two(rows // max(LANES, pages * page_rows))
    sequences = _power_of_two_above(-(-p.batch // num_cores))
    cells = min(cells, sequences * _power_of_two_above(-(-p.pages_per_sequence // pages)))
    if p.num_queries > 1:
        return _shorten(p, BlockSizes(pages, cells), num_cores)
    buffers = 6 * cells * max(LANES, pages * page_rows) * row_bytes
    ahead = 1 if buffers > vmem_limit(num_cores) // 2 else 2  # only for pages of megabytes
    return BlockSizes(pages, cells, ahead)


def _shorten(p: Problem, sizes: BlockSizes, num_cores: int) -> BlockSizes:
    """`sizes` with as few tokens a step as many query rows leave room for."""
    plan = Plan(p.replace(batch=num_cores), sizes, num_cores=num_cores)
    pages, cells, ahead = sizes.pages_per_cell, sizes.cells_per_step, sizes.steps_ahead

    def is_too_long():
        made = dataclasses.replace(plan, sizes=BlockSizes(pages, cells, min(ahead, _SHORT_STEPS_AHEAD)))
        registers = made.C * made.H * pl.cdiv(made.M, SUBLANES) * pl.cdiv(made.T, LANES)
        return registers > _SCORE_REGISTERS or made.vmem_bytes > vmem_limit(num_cores)

    while is_too_long() and pages * cells > 1:
        pages, cells, ahead = (pages, cells // 2, 2 * ahead) if cells > 1 else (pages // 2, cells, 2 * ahead)
    return BlockSizes(pages, cells, min(ahead, _SHORT_STEPS_AHEAD))


def make_plan(
    problem: Problem,
    target: Target,
    block_sizes: BlockSizes | None = None,
    *,
    sm_scale: float = 1.0,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    output_dtype=None,
    **fields,
) -> Plan:
    """The plan of a launch on the chip that `target` describes; block sizes of None are `choose_block_sizes`'s."""
    p = problem
    if sliding_window is not None:  # a larger one changes nothing, and need not fit in int32
        sliding_window = min(sliding_window, p.pages_per_sequence * p.page_size)
    if block_sizes is None:
        block_sizes = choose_block_sizes(p, sliding_window, target.num_cores, target.outruns_core)
    return Plan(
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
    return VMEM_LIMIT if num_cores == 1 else VMEM_LIMIT_TWO_CORES


def _least_vmem_bytes(plan: Plan) -> int:
    """Vector memory of the smallest launch: a sequence for each core."""
    return dataclasses.replace(plan, problem=plan.problem.replace(batch=plan.num_cores)).vmem_bytes


def fits(plan: Plan) -> bool:
    """Whether the smallest launch fits in a core's vector memory."""
    return _least_vmem_bytes(plan) <= vmem_limit(plan.num_cores)


def check_block_sizes(plan: Plan) -> None:
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
def rows_per_launch(plan: Plan) -> int:
    """The most sequences that one launch holds: their page table in SMEM, their queries and outputs in VMEM."""
    rows, least = plan.B, min(plan.B, plan.num_cores)

    def part(rows):
        return dataclasses.replace(plan, problem=plan.problem.replace(batch=rows))

    def fits(rows):
        smem = part(rows).smem_bytes <= SMEM_BYTES - SMEM_RESERVED
        return smem and part(rows).vmem_bytes <= vmem_limit(plan.num_cores)

    while rows > least and not fits(rows):
        rows = -(-rows // 2)
    require(
        part(rows).smem_bytes <= SMEM_BYTES - SMEM_RESERVED,
        "block_tables.shape",
        (plan.B, plan.S),
        f"one row needs more than the {SMEM_BYTES - SMEM_RESERVED} bytes of SMEM that there are",
        "use larger pages",
    )
    return rows


def _padded_bytes(shape, dtype) -> int:
    size = jnp.dtype(dtype).itemsize
    *lead, rows, lanes = shape
    count = (1 if rows == 1 else _round_up(rows, SUBLANES * 4 // size)) * _round_up(lanes, LANES)
    for n in lead:
        count *= n
    return count * size


def _power_of_two(n: int) -> int:
    """The largest power of two not above n, at least 1."""
    return 1 << max(0, n.bit_length() - 1)


def _power_of_two_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
