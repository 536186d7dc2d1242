"""The scales of 8-bit pages in VMEM, put in the order of a cell's scores: each token's scale in its column."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.decode.work_list import Cell, WorkList, rem
from paged_dist.kernels.tiling import LANES


def scales_of_rows(plan: LaunchPlan, work: WorkList, ref, cell: Cell, h: int, rows: pl.Slice) -> list[jax.Array]:
    """Scales of kv head h for the given rows of a cell: a list with one array for each 128 rows.

    An array is [1, 128], or [M, 128] if a row holds two tokens.

    ref: [Hkv, rows of scales, 1, 128], the cell's, as they were fetched.
    """
    columns: list[jax.Array] = []
    for t in range(rows.start, rows.start + rows.size, LANES):
        tokens = [_scales_of_tokens(plan, work, ref, cell, h, t, j) for j in range(plan.tokens_per_row)]
        if plan.tokens_per_row > 1:
            row = lax.broadcasted_iota(jnp.int32, (plan.M, LANES), 0)
            first, second = (jnp.broadcast_to(x, row.shape) for x in tokens)
            columns.append(jnp.where(row < plan.M // 2, first, second))
        else:
            columns.append(tokens[0])
    return columns


def _scales_of_tokens(plan: LaunchPlan, work: WorkList, ref, cell: Cell, h: int, t: int, j: int) -> jax.Array:
    """[1, 128]: the scales of token j of each of the cell's rows t to t + 127."""
    if plan.R % LANES == 0:
        page, row = divmod(t, plan.R)
        return ref[h, page * plan.scale_rows_per_page + (j * plan.R + row) // LANES]
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    merged = None
    for p in range(t // plan.page_rows, min(plan.pages_per_cell, (t + LANES) // plan.page_rows)):
        to = p * plan.page_rows - t
        by = to - j * plan.R
        if plan.page_size < LANES:  # less where in the row, which pages share, this one's scales begin
            by = by - rem(work.page_id(cell, p), LANES // plan.page_size) * plan.page_size
            by = by & (LANES - 1)
        else:
            by = by % LANES
        row = ref[h, p]
        row = row if isinstance(by, int) and by == 0 else pltpu.roll(row, by, 1)
        merged = row if merged is None else jnp.where(lane < to, merged, row)
    assert merged is not None  # 128 rows begin in some page
    return merged
