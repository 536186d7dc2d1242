"""The weights of a step's scores, and their products with V, added to the running sums of each sequence."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist.kernels.attention.products import dot
from paged_dist.kernels.attention.scores import DEAD, LOWEST
from paged_dist.kernels.decode.copy_schedule import PacedWork
from paged_dist.kernels.decode.iteration import Iteration, exp_of_difference
from paged_dist.kernels.decode.refs import given
from paged_dist.kernels.decode.row_copies import row_copies
from paged_dist.kernels.decode.scales import scales_of_rows
from paged_dist.kernels.decode.work_list import Cell
from paged_dist.kernels.tiling import LANES, SUBLANES


class Weights(NamedTuple):
    """The softmax weights of one cell and row group."""

    of_heads: list[jax.Array]  # [M, T], the same for all kv heads of the group, or (8-bit pages) one for each
    lane_sums: jax.Array  # [M, 128], each lane's part of their sum
    decay: jax.Array  # [M, 128], as in `Refs`
    top: jax.Array  # [M, 128], as in `Refs`


def weigh(at: Iteration) -> list[Weights]:
    """exp(score - maximum) of step s-1, for each cell, and in it each row group."""
    plan, refs, before = at.plan, at.refs, at.ring.plus(-1)
    dtype = jnp.float32 if jnp.float32 in (plan.query_dtype, plan.cache_dtype) else jnp.bfloat16
    weights: list[Weights] = []
    for c in range(plan.C):
        cell = Cell.load(refs.cells, before.cells, c, plan) if plan.is_quantized else None
        for g in range(plan.H):
            top = refs.top[c, g]
            scores = [refs.scores[c, g, :, t : t + LANES] for t in range(0, plan.T, LANES)]
            parts = [exp_of_difference(score - top) for score in scores]
            of_heads = [parts]
            if cell is not None:
                heads = range(g * plan.heads_per_group, (g + 1) * plan.heads_per_group)
                ref, rows = given(refs.v_scales).at[before.cells, c], pl.Slice(0, plan.T)
                scales = [scales_of_rows(plan, at.work, ref, cell, h, rows) for h in heads]
                # Dead tokens' scales may be NaN, and 0 x NaN is NaN.
                of_heads = [
                    [jnp.where(score == DEAD, 0.0, part * x) for score, part, x in zip(scores, parts, row, strict=True)]
                    for row in scales
                ]
            of_heads = [jnp.concatenate(x, axis=1).astype(dtype) for x in of_heads]
            weights.append(Weights(of_heads, _balanced_sum(parts), refs.decay[c, g], top))
    return weights


def sum_up(at: Iteration, weights: list[Weights], copies: PacedWork | None = None) -> None:
    """Adds step s-1's weights times V to the running sums, and copies out the sequences that are finished."""
    plan, refs, before = at.plan, at.refs, at.ring.plus(-1)
    outs, sums = ([ref[g] for g in range(plan.H)] for ref in (refs.run_out, refs.run_sum))
    first_sums = [_sink_sum(at, g) for g in range(plan.H)] if plan.has_sinks else [0.0] * plan.H
    for c in range(plan.C):
        cell = Cell.load(refs.cells, before.cells, c, plan)
        for g in range(plan.H):
            w = weights[c * plan.H + g]
            new = []
            for part in plan.parts:
                product = functools.partial(_times_values, at, c, w.of_heads, part)
                new.append(at.each_head(g, product, (plan.M, plan.W)))
                if copies is not None:
                    copies.advance(at.copy_turns)
            new = _balanced_sum(new)
            new = jnp.where(cell.end > 0, new, 0.0)  # a cell of no sequence holds anything
            # A select, for the sequence before may have left NaN.
            outs[g] = jnp.where(cell.is_first, 0.0, outs[g]) * _repeat_lanes(w.decay, plan.W) + new
            sums[g] = jnp.where(cell.is_first, first_sums[g], sums[g]) * w.decay + w.lane_sums
        _write_row(at, cell, outs, sums, [w.top for w in weights[c * plan.H : (c + 1) * plan.H]])
    if copies is not None:
        copies.finish()
    for g in range(plan.H):
        refs.run_out[g], refs.run_sum[g] = outs[g], sums[g]


def _times_values(at: Iteration, c, of_heads: list[jax.Array], rows: pl.Slice, h):
    """Weights [M, T] (the one of all heads, or head h's) times rows `rows` of step s-1's V of kv head h: [M, W]."""
    plan, slot = at.plan, at.ring.plus(-1).of_values(at.plan)
    blocks = plan.W // LANES
    weight = of_heads[h % len(of_heads)][:, rows.start : rows.start + rows.size]
    v = [at.widened(at.refs.v[slot, c, h * blocks + i, rows]) for i in range(blocks)]
    parts = [dot(weight, block, 0, plan.query_dtype) for block in v]
    return parts[0] if blocks == 1 else jnp.concatenate(parts, axis=1)


def _sink_sum(at: Iteration, g):
    """What group g's denominators start from: a sink's own weight, 1 for each query head, split over the lanes."""
    counts = at.refs.sink[g] > LOWEST
    row = lax.broadcasted_iota(jnp.int32, counts.shape, 0)
    return jnp.where(counts & (row < at.plan.M // at.plan.tokens_per_row), 1 / LANES, 0.0)


def _write_row(at: Iteration, cell: Cell, outs, sums, tops) -> None:
    """The cell's sequence as it stands: output and lse, of the sums so far; copied out if the cell is its last."""
    plan, refs = at.plan, at.refs
    rows = plan.M // plan.tokens_per_row
    lses = [jnp.zeros((1, min(LANES, plan.Hq - lane)), jnp.float32) for lane in range(0, plan.Hq, LANES)]
    for g in range(plan.H):
        total = jnp.broadcast_to(jnp.sum(sums[g], axis=1, keepdims=True), (plan.M, LANES))
        out = outs[g]
        if plan.tokens_per_row > 1:  # row j's lanes j * D onwards hold token j's part
            total = total + pltpu.roll(total, rows, 0)
            out = out + pltpu.roll(pltpu.roll(out, plan.D, 1), rows, 0)
        # One of several new tokens may have nothing to attend to.
        out = out / _repeat_lanes(total if plan.Q == 1 else jnp.where(total > 0, total, 1.0), plan.W)
        refs.out_rows[cell.b, g * rows : (g + 1) * rows, :] = out[:rows, : plan.D].astype(refs.out_rows.dtype)
        if plan.return_lse:
            lse = tops[g] + jnp.log(total)
            lse = jnp.where(total > 0, lse, -jnp.inf) if plan.Q > 1 else lse
            _add_rows_to_lanes(lses, lse[:rows], g * rows)
    if plan.return_lse:
        given(refs.lse_rows)[cell.b] = lses[0] if len(lses) == 1 else jnp.concatenate(lses, axis=1)

    @pl.when(cell.is_last)
    def _():
        for copy in row_copies(plan, refs, cell.b):
            copy.start()


def _balanced_sum(parts):
    """The sum as a balanced tree: its dependency chain is the logarithm of a running sum's."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) & ~1 :]
    return parts[0]


def _repeat_lanes(x, width):
    """[M, 128], the same in all lanes, as [M, width]."""
    return x if width == LANES else jnp.concatenate([x] * (width // LANES), axis=1)


def _add_rows_to_lanes(tiles, x, offset: int) -> None:
    """Adds x [rows, 128], the same in all lanes, to a row of lanes in `tiles` of [1, 128]: x[r] to lane offset + r."""
    for i in range(offset // LANES, pl.cdiv(offset + x.shape[0], LANES)):
        first = max(0, (i * LANES - offset) // SUBLANES * SUBLANES)
        part = x[first : (i + 1) * LANES - offset, : tiles[i].shape[1]]
        row, lane = (lax.broadcasted_iota(jnp.int32, part.shape, axis) for axis in (0, 1))
        is_its = lane == row + (offset + first - i * LANES)
        tiles[i] += jnp.sum(jnp.where(is_its, part, 0.0), axis=0, keepdims=True)
