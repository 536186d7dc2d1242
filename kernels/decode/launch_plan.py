"""`LaunchPlan`: one launch of the decode kernel, with the shapes of its buffers and the bytes that they take on chip.

Nothing here compiles or allocates. `plan_choice.py` picks the sizes that a caller leaves open.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from paged_dist.kernels.arithmetic import round_up
from paged_dist.kernels.attention.problem import Problem
from paged_dist.kernels.decode.block_sizes import BlockSizes
from paged_dist.kernels.scale_layout import rows_of_page
from paged_dist.kernels.tiling import LANES, SUBLANES

NUM_FIELDS = 5  # words of scalar memory that a cell takes, see `work_list.Cell`
_PART_ROWS = 512  # of a cell, between whose products a part of the copies is started
# Tokens a page from which on the kernel clamps page ids, an instruction for each copy. Below, where copies' scalar work
# is all of the time, it costs a tenth of it; clamping the table before is an operation of a microsecond, of which a
# program whose layers share a table has one.
_CLAMPED_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """One launch of the decode kernel: the call's sizes, its options, and how the work is cut.

    The letters that shapes are written in (B, Q, Hq, Hkv, G, D, S, R, W, C, T, H, M) are properties.
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

    @property
    def B(self) -> int:
        """Sequences of the launch."""
        return self.problem.batch

    @property
    def Q(self) -> int:
        """New tokens of each sequence."""
        return self.problem.num_queries

    @property
    def Hq(self) -> int:
        """Query rows of a sequence: its heads, of each new token, as `queries_as_rows` orders them."""
        return self.problem.num_q_heads * self.problem.num_queries

    @property
    def Hkv(self) -> int:
        """KV heads."""
        return self.problem.num_kv_heads

    @property
    def G(self) -> int:
        """Query heads that share a kv head."""
        return self.problem.group

    @property
    def D(self) -> int:
        """head_dim."""
        return self.problem.head_dim

    @property
    def S(self) -> int:
        """Pages of a sequence, at most: the width of the block table."""
        return self.problem.pages_per_sequence

    @property
    def R(self) -> int:
        """Stored rows of a page."""
        return self.problem.rows

    @property
    def W(self) -> int:
        """Stored lanes of a row."""
        return self.problem.width

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.problem.page_size

    @property
    def tokens_per_row(self) -> int:
        """Tokens side by side in one stored row: 2 at head_dim 64, else 1."""
        return self.problem.tokens_per_row

    @property
    def query_dtype(self) -> jnp.dtype:
        """The query's."""
        return jnp.dtype(self.problem.query_dtype)

    @property
    def cache_dtype(self) -> jnp.dtype:
        """The pages'."""
        return jnp.dtype(self.problem.cache_dtype)

    @property
    def out_dtype(self) -> jnp.dtype:
        """The output's: the query's where the call names none."""
        return jnp.dtype(self.output_dtype or self.problem.query_dtype)

    @property
    def rows_per_head(self) -> int:
        """Query rows that are multiplied by one kv head's K."""
        return self.problem.rows_per_head

    @property
    def C(self) -> int:
        """Cells of a step."""
        return self.sizes.cells_per_step

    @property
    def pages_per_cell(self) -> int:
        """Pages of a cell."""
        return self.sizes.pages_per_cell

    @property
    def page_rows(self) -> int:
        """Distance in rows from the start of one page to the start of the next in the cell's buffer.

        R, or the next multiple of a register's rows.
        """
        return round_up(self.R, self.register_rows)

    @property
    def rows_per_cell(self) -> int:
        """Rows of a head in a cell that are filled by pages."""
        return self.pages_per_cell * self.page_rows

    @property
    def tokens_per_cell(self) -> int:
        """Tokens of a cell."""
        return self.pages_per_cell * self.page_size

    @property
    def T(self) -> int:
        """Rows of a head that a cell's buffer holds: `rows_per_cell`, in whole rows of 128 scores."""
        return round_up(self.rows_per_cell, LANES)

    @property
    def register_rows(self) -> int:
        """Rows of a register in the pages' dtype."""
        return SUBLANES * 4 // self.cache_dtype.itemsize

    @property
    def tile(self) -> int:
        """Rows that a sequence's last page is fetched in: a register's, or the page where it is no multiple of them."""
        return self.register_rows if self.R % self.register_rows == 0 else self.R

    @property
    def H(self) -> int:
        """Row groups: `heads_per_group` kv heads share one, so that few query heads still fill a register's rows."""
        return self.Hkv // self.heads_per_group

    @property
    def M(self) -> int:
        """Query rows of a group; with two tokens a stored row, first the first token's rows, then the second's."""
        return self.heads_per_group * self.rows_per_head * self.tokens_per_row

    @property
    def has_starts(self) -> bool:
        """Whether a sequence may begin behind its first token."""
        return self.has_starts_operand or self.sliding_window is not None

    @property
    def is_quantized(self) -> bool:
        """Whether the pages are 8-bit, with scales."""
        return self.problem.is_quantized

    @property
    def cache_may_hold_nan(self) -> bool:
        """Whether pages may hold NaN; int8 cannot."""
        return self.cache_dtype != jnp.int8

    @property
    def scale_rows_per_page(self) -> int:
        """Rows of 128 scales that a page's copy takes; pages of less than 128 tokens share one."""
        return rows_of_page(self.page_size)

    @property
    def clamps_before(self) -> bool:
        """Whether page ids are clamped by XLA, before the kernel, and not in it."""
        return self.page_size < _CLAMPED_TOKENS

    @property
    def table_is_transposed(self) -> bool:
        """Whether the kernel takes the block table as [S, B]."""
        return xla_transposes(self.B, self.S)

    @property
    def parts(self) -> list[pl.Slice]:
        """A cell's rows in parts, between which copies are issued."""
        return [pl.Slice(t, min(_PART_ROWS, self.T - t)) for t in range(0, self.T, _PART_ROWS)]

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
    def scratch_shapes(self) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
        """(shape, dtype) of each VMEM scratch buffer, by its name in `Refs`."""
        ahead, f32 = self.sizes.steps_ahead, jnp.dtype(jnp.float32)
        block = (self.C, self.Hkv * self.W // LANES, self.T, LANES)
        stat = (self.H, self.M, LANES)
        shapes: dict[str, tuple[tuple[int, ...], jnp.dtype]] = dict(
            q=((self.B + 1, self.H * self.M, self.W), self.query_dtype),
            k=((ahead + 1, *block), self.cache_dtype),
            v=((ahead + (2 if self.values_with_keys else 1), *block), self.cache_dtype),
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
        stats = self.H * round_up(self.M, SUBLANES) * 4
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
        return 4 * round_up(table[0], SUBLANES) * round_up(table[1], LANES) + sum(round_up(4 * n, 512) for n in flat)


def _heads_per_group(p: Problem) -> int:
    most = max(1, SUBLANES // (p.rows_per_head * p.tokens_per_row))
    return next(n for n in range(most, 0, -1) if p.num_kv_heads % n == 0)


def xla_transposes(rows: int, columns: int) -> bool:
    """Whether XLA stores an int32 [rows, columns] argument column by column, as it does where that pads less.

    The kernel then takes the transpose, which is no copy, where a fixed order would cost a relayout on each call.
    """
    return _tiled(columns, rows) < _tiled(rows, columns)


def _tiled(major: int, minor: int) -> int:
    sublanes = next((n for n in (1, 2, 4) if major <= n), round_up(major, SUBLANES))
    return sublanes * round_up(minor, LANES)


def _padded_bytes(shape, dtype) -> int:
    size = jnp.dtype(dtype).itemsize
    *lead, rows, lanes = shape
    count = (1 if rows == 1 else round_up(rows, SUBLANES * 4 // size)) * round_up(lanes, LANES)
    for n in lead:
        count *= n
    return count * size
