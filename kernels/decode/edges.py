"""Clears the dead tokens that share a fetched tile with live ones, at a sequence's two ends.

They may hold NaN. Their weight is 0, and 0 x NaN is NaN.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.decode.work_list import Cell, Ring, div
from paged_dist.kernels.tiling import LANES, SUBLANES


def clear_edges(plan: LaunchPlan, notes, ring: Ring, buffers) -> None:
    """Clears the tiles in which the sequences of the step at `ring` begin and end, in `buffers` [C, blocks, T, 128].

    notes: `Refs.cells`. Every other tile that was fetched is live throughout.
    """
    if not plan.cache_may_hold_nan:
        return
    for c in range(plan.C):
        cell = Cell.load(notes, ring.cells, c, plan)
        for edge in (cell.end, cell.start) if plan.has_starts else (cell.end,):
            _clear_tile(plan, buffers.at[c], cell, edge)


def _clear_tile(plan: LaunchPlan, buffer, cell: Cell, edge) -> None:
    """Clears the tile that `edge`'s token is in, by whole registers' rows."""
    rows = plan.register_rows
    edge = jnp.clip(edge, 0, plan.tokens_per_cell - 1)
    if plan.tile == rows:
        first, count = div(edge, rows * plan.tokens_per_row), 1
    else:  # the whole page
        count = plan.page_rows // rows
        first = div(edge, plan.page_size) * count
    for i in range(count):
        _clear_register(plan, buffer, cell, first + i)


def _clear_register(plan: LaunchPlan, buffer, cell: Cell, at) -> None:
    """Clears the dead tokens in one register's rows, register number `at` of each block.

    Packed rows (2 of bf16, 4 of 8 bits in a word) are cleared by masking bits, without unpacking.
    """
    rows, in_word = plan.register_rows, plan.register_rows // SUBLANES
    word, lane = (lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), axis) for axis in (0, 1))
    mask = jnp.zeros((SUBLANES, LANES), jnp.int32)
    for i in range(in_word):
        token = plan.token_of_row(at * rows + word * in_word + i)
        if plan.tokens_per_row > 1:
            token += lax.div(lane, jnp.int32(plan.D))
        live = token < cell.end
        if plan.has_starts:
            live &= token >= cell.start
        bits = 32 // in_word
        part = -1 if in_word == 1 else np.uint32(((1 << bits) - 1) << (bits * i)).view(np.int32)
        mask |= jnp.where(live, jnp.int32(part), 0)
    for block in range(buffer.shape[0]):
        part = buffer.at[block, pl.ds(pl.multiple_of(at * rows, rows), rows)]
        part[...] = pltpu.bitcast(pltpu.bitcast(part[...], jnp.int32) & mask, part.dtype)
