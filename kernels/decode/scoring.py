"""The scores of a step: query times K, masked, with each row's maximum and the running maxima."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist.kernels.attention.products import dot
from paged_dist.kernels.attention.scores import DEAD, LOWEST, in_range
from paged_dist.kernels.decode.copy_schedule import PacedWork
from paged_dist.kernels.decode.iteration import Iteration, exp_of_difference
from paged_dist.kernels.decode.live_rows import LiveRows
from paged_dist.kernels.decode.refs import given
from paged_dist.kernels.decode.scales import scales_of_rows
from paged_dist.kernels.decode.work_list import Cell
from paged_dist.kernels.tiling import LANES


def score_cell(at: Iteration, c, tops, copies: PacedWork) -> None:
    """Writes the scores of step s's cell c to `refs.scores`; raises the running maxima `tops`, one a row group."""
    plan, refs = at.plan, at.refs
    cell = Cell.load(refs.cells, at.ring.cells, c, plan)
    live_rows = LiveRows.of(plan, refs, cell)
    for g in range(plan.H):
        top = []
        for part in plan.parts:
            s = _masked_scores(at, c, g, cell, live_rows, part)
            refs.scores[c, g, :, part] = s
            top += [s[:, t : t + LANES] for t in range(0, part.size, LANES)]
            copies.advance(at.copy_turns)
        top = jnp.max(functools.reduce(jnp.maximum, top), axis=1, keepdims=True)
        top = jnp.broadcast_to(top, (plan.M, LANES))
        if plan.tokens_per_row > 1:  # a row's tokens share their maximum, and so can be added up at the end
            top = jnp.maximum(top, pltpu.roll(top, plan.M // plan.tokens_per_row, 0))
        before = jnp.where(cell.is_first, refs.sink[g] if plan.has_sinks else LOWEST, tops[g])
        tops[g] = jnp.maximum(before, top)
        refs.top[c, g] = tops[g]
        refs.decay[c, g] = exp_of_difference(before - tops[g])


def _masked_scores(at: Iteration, c, g, cell: Cell, live_rows: LiveRows, part: pl.Slice):
    """Scores of a part of step s's cell c, [M, part.size]."""
    plan, shape = at.plan, (at.plan.M, part.size)
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    token = plan.token_of_row(part.start + column)
    if plan.tokens_per_row > 1:
        token += lax.div(row, jnp.int32(plan.M // plan.tokens_per_row))
    live = live_rows.of_tokens(token)
    q = at.refs.q[cell.b, g * plan.M : (g + 1) * plan.M, :]
    s = at.each_head(g, functools.partial(_times_keys, at, c, cell, q, part), shape)
    if plan.soft_cap is None:
        s = in_range(s * plan.sm_scale)
    else:
        s = plan.soft_cap * jnp.tanh(s * (plan.sm_scale / plan.soft_cap))
    return jnp.where(live, s, DEAD)


def _times_keys(at: Iteration, c, cell: Cell, q, rows: pl.Slice, h):
    """q [M, W] times some rows of step s's K of kv head h: [M, rows.size]."""
    plan, refs = at.plan, at.refs
    blocks = plan.W // LANES
    part = lambda i: dot(
        q[:, i * LANES : (i + 1) * LANES],
        at.widened(refs.k[at.ring.here, c, h * blocks + i, rows]),
        1,
        plan.query_dtype,
    )
    s = functools.reduce(lambda s, i: s + part(i), range(1, blocks), part(0))
    if plan.is_quantized:
        scales = scales_of_rows(plan, at.work, given(refs.k_scales).at[at.ring.here, c], cell, h, rows)
        s *= jnp.concatenate(scales, axis=1)
    return s
