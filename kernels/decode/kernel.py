"""The fast decode kernel: one pass over a flat list of cells, two stages in flight.

A cell is up to `pages_per_cell` consecutive pages of one sequence, all local kv heads; a step is `cells_per_step`
cells, of as many sequences as it takes. Iteration s of the kernel's one loop

    weighs   step s-1: exp(score - max), from scores left in VMEM by the iteration before;
    scores   step s: q.K, masks, each row's maximum, running maxima;
    issues   the copies of step s + `steps_ahead`'s K, between the scores, and of V one step behind, between the sums;
    sums     step s-1: weights times V into the running sums, divided and copied out where a sequence ends.

The four are independent but for step s-1's scores, and stand in one basic block: K and V are pushed into the MXU back
to back while the copies' scalar work, the lane reductions and the exponentials run beside them. A product's latency
(some 200 cycles), a reduction's (100) and the exponentials are paid once an iteration, not once a block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist.kernels.attention.products import dot
from paged_dist.kernels.attention.scores import DEAD, LOWEST, in_range
from paged_dist.kernels.decode.copy_schedule import Copies, Paced
from paged_dist.kernels.decode.edges import clear_edges
from paged_dist.kernels.decode.launch_plan import Plan
from paged_dist.kernels.decode.live_rows import LiveRows
from paged_dist.kernels.decode.scales import scales_of_rows
from paged_dist.kernels.decode.work_list import Cell, Ring, WorkList, div, rem
from paged_dist.kernels.tiling import LANES, SUBLANES

_LOG2_E = 1.4426950408889634  # the hardware raises 2 to a power


class Refs(NamedTuple):
    """A launch's operands, results and scratch, in Pallas's order. Shapes in the letters of `Plan`."""

    lengths: jax.Array  # SMEM int32 [B * Q]
    table: jax.Array  # SMEM int32 [B, S], or [S, B] where `table_is_transposed`
    layer: jax.Array | None  # SMEM int32 [1]
    starts: jax.Array | None  # SMEM int32 [B * Q]
    sinks: jax.Array | None  # SMEM f32 [Hq / Q]
    query: jax.Array  # HBM [B, H * M, W]
    key_pages: jax.Array  # HBM [L, Hkv, N, R, W]
    value_pages: jax.Array
    key_scales: jax.Array | None  # HBM f32 [L, Hkv, N * P / 128, 1, 128]
    value_scales: jax.Array | None
    output: jax.Array  # HBM [B, Hq, D]
    lse: jax.Array | None  # HBM f32 [B, 1, Hq]
    q: jax.Array  # VMEM [B + 1, H * M, W], the whole query; row B, here and below, is for cells of no sequence
    k: jax.Array  # VMEM [steps_ahead + 1, C, Hkv * W / 128, T, 128]
    v: jax.Array  # VMEM, the same shape, or one buffer more where V comes with K
    k_scales: jax.Array | None  # VMEM f32 [steps_ahead + 1, C, Hkv, rows of scales in a cell, 1, 128]
    v_scales: jax.Array | None  # one step more, for they come with K
    scores: jax.Array  # VMEM f32 [C, H, M, T]
    top: jax.Array  # VMEM f32 [C, H, M, 128]: running maximum with the cell, the same in all lanes
    decay: jax.Array  # VMEM f32 [C, H, M, 128]: what the cell's sequence had summed so far is worth now
    run_top: jax.Array  # VMEM f32 [H, M, 128], after the last cell scored
    run_sum: jax.Array  # VMEM f32 [H, M, 128], after the last cell summed: each lane's part of the denominator
    run_out: jax.Array  # VMEM f32 [H, M, W]
    sink: jax.Array  # VMEM f32 [H, M, 128]: what `run_top` starts from
    out_rows: jax.Array  # VMEM [B + 1, Hq, D]: a sequence's row is copied to `output` when it is done
    lse_rows: jax.Array | None  # VMEM f32 [B + 1, 1, Hq]
    no_output: jax.Array  # VMEM [Hq, D]: the row of an empty sequence
    no_lse: jax.Array | None  # VMEM f32 [1, Hq]
    work: jax.Array  # SMEM int32 [B + 1]
    cells: jax.Array  # SMEM int32 [(steps_ahead + 2) * C * NUM_FIELDS]
    tiles: jax.Array  # SMEM int32 [steps_ahead + 2]
    pages: jax.Array | None  # SMEM int32 [steps_ahead + 2]
    q_sem: jax.Array
    k_sems: jax.Array  # DMA [steps_ahead + 1]
    v_sems: jax.Array  # DMA [steps_ahead + 1]
    out_sem: jax.Array
    lse_sem: jax.Array | None


def decode_kernel(plan: Plan, refs: Refs) -> None:
    """The body of a launch: grid (cores, 1)."""
    core = pl.program_id(0)
    _query_copy(plan, refs).start()
    work = WorkList.build(plan, refs, core)
    ring, ahead = Ring.start(plan), plan.sizes.steps_ahead
    cursor = (jnp.int32(0), jnp.int32(0))
    # V as in the loop, a step behind K or with it, but that it waits for its buffers to be cleared.
    together = plan.values_with_keys and not plan.cache_may_hold_nan
    for a in range(ahead):
        copies = Copies(plan, refs, work, cursor)
        copies.start_keys(ring.plus(a), with_values=together)
        cursor = copies.cursor
    if plan.cache_may_hold_nan:
        pl.when(work.is_ragged)(lambda: _clear_values(plan, refs))  # while the first K is on its way
    for a in range(0 if together else ahead if plan.values_with_keys else ahead - 1):
        Copies(plan, refs, work, None).start_values(ring.plus(a))
    # Everything from here to the first wait hides behind the first copies' latency.
    rows = _prepare(plan, refs, work, core)
    _query_copy(plan, refs).wait()

    def step(carry):
        ring, cursor = carry
        body = Body(plan, refs, work, ring)
        body.wait_for_copies()
        return ring.plus(1), body.compute(cursor)

    @pl.when(work.rows > 0)
    def _():
        behind, _ = lax.while_loop(lambda carry: work.has_step(carry[0].cells), step, (ring, cursor))
        body = Body(plan, refs, work, behind)
        body.wait_for_values()
        body.clear_edges()
        body.sum_up(body.weigh())

    _wait_for_rows(plan, refs, rows)


def _clear_values(plan: Plan, refs: Refs) -> None:
    """Zeros in V's buffers, for rows that no copy fills are summed too, with weight 0, and 0 x NaN is NaN.

    From then on all that a buffer holds are rows of live tiles, whose dead tokens `Body.clear_edges` clears.
    """

    def clear(i, _):
        part = refs.v.at[div(i, plan.C), rem(i, plan.C)]
        part[...] = jnp.zeros_like(part)

    lax.fori_loop(0, refs.v.shape[0] * plan.C, clear, None)


def _prepare(plan: Plan, refs: Refs, work: WorkList, core):
    """Initial state, and the rows of empty sequences. Returns the number of rows that this core copies out."""
    refs.run_top[...] = jnp.full_like(refs.run_top, LOWEST)
    refs.run_sum[...] = jnp.zeros_like(refs.run_sum)
    refs.run_out[...] = jnp.zeros_like(refs.run_out)
    refs.no_output[...] = jnp.zeros_like(refs.no_output)
    work.clear_before_first()
    if plan.has_sinks:
        for row in range(plan.H * plan.M):
            head = plan.head_of_row(row)
            refs.sink[row // plan.M, pl.ds(row % plan.M, 1), :] = jnp.full((1, LANES), refs.sinks[head])
        refs.sink[...] = in_range(refs.sink[...])  # a sink of -inf is none
    if plan.return_lse:
        none = jnp.full((1, plan.Hq), -jnp.inf, jnp.float32)
        if plan.has_sinks:
            head_of_lane = lax.broadcasted_iota(jnp.int32, none.shape, 1)
            if plan.Q > 1:
                head_of_lane = div(head_of_lane, plan.rows_per_head) * plan.G + rem(head_of_lane, plan.G)
            for head in range(plan.problem.num_q_heads):
                none = jnp.where(head_of_lane == head, refs.sinks[head], none)
        refs.no_lse[...] = none

    @pl.when((core == 0) & (work.live_rows < plan.B))
    def _():
        def copy_empty(b, _):
            @pl.when(WorkList.span(plan, refs, b)[1] == 0)
            def _():
                for copy in _row_copies(plan, refs, b, empty=True):
                    copy.start()

        lax.fori_loop(0, plan.B, copy_empty, None)

    return work.rows + jnp.where(core == 0, plan.B - work.live_rows, 0)


def _query_copy(plan: Plan, refs: Refs):
    return pltpu.make_async_copy(refs.query, refs.q.at[pl.ds(0, plan.B)], refs.q_sem)


def _row_copies(plan: Plan, refs: Refs, b, *, empty=False):
    copies = [pltpu.make_async_copy(refs.no_output if empty else refs.out_rows.at[b], refs.output.at[b], refs.out_sem)]
    if plan.return_lse:
        source = refs.no_lse if empty else refs.lse_rows.at[b]
        copies.append(pltpu.make_async_copy(source, refs.lse.at[b], refs.lse_sem))
    return copies


def _wait_for_rows(plan: Plan, refs: Refs, rows) -> None:
    """Waits for the copies of `rows` rows: a wait only counts bytes."""
    pairs = [(refs.out_rows, refs.out_sem)] + ([(refs.lse_rows, refs.lse_sem)] if plan.return_lse else [])
    for ref, sem in pairs:
        part = ref.at[pl.ds(0, rows)]
        pl.when(rows > 0)(pltpu.make_async_copy(part, part, sem).wait)


@dataclasses.dataclass(frozen=True)
class Body:
    """One iteration of the loop, at `ring`'s place."""

    plan: Plan
    refs: Refs
    work: WorkList
    ring: Ring

    @property
    def _stages_of_keys(self) -> int:
        """1 where K's copies are issued between the scores alone, 2 where between the sums too."""
        return 2 if self.plan.values_with_keys else 1

    def wait_for_copies(self) -> None:
        """Waits for step s's K and step s-1's V."""
        self._wait(self.ring, self.refs.k, self.refs.k_sems)
        if self.plan.is_quantized:
            self._wait_for_scales()
        self.wait_for_values()

    def wait_for_values(self) -> None:
        """Waits for step s-1's V."""
        if not self.plan.values_with_keys:
            self._wait(self.ring.plus(-1), self.refs.v, self.refs.v_sems)

    def _wait_for_scales(self) -> None:
        """Waits for step s's scales of K and V, which came with its K."""
        plan, ref = self.plan, self.refs.v_scales
        rows = self.work.pages_of(self.ring.cells) * (2 * plan.Hkv * plan.scale_rows_per_page)
        part = ref.reshape(math.prod(ref.shape[:-2]), 1, LANES).at[pl.ds(0, rows)]
        pl.when(rows > 0)(pltpu.make_async_copy(part, part, self.refs.k_sems.at[self.ring.here]).wait)

    def _wait(self, ring: Ring, ref, sems) -> None:
        """Waits for a step's tiles. A wait only counts bytes, so here are as many in one piece."""
        plan, tiles = self.plan, self.work.tiles_of(ring.cells) * (2 if self.plan.values_with_keys else 1)
        if plan.tile == plan.register_rows:
            blocks = ref.reshape(math.prod(ref.shape[:-1]) // plan.tile, plan.tile, LANES)
            part = blocks.at[pl.ds(0, tiles * ref.shape[-3])]
        else:  # pages, which a buffer pads to whole registers: those of HBM count right
            part = self.refs.key_pages.at[0, 0, pl.ds(0, tiles * plan.Hkv)]
        pl.when(tiles > 0)(pltpu.make_async_copy(part, part, sems.at[ring.here]).wait)

    def clear_edges(self) -> None:
        """Zeros for the dead tokens of step s-1's V that share a tile with live ones: there may be NaN."""
        before = self.ring.plus(-1)
        clear_edges(self.plan, self.refs.cells, before, self.refs.v.at[before.of_values(self.plan)])

    def clear_key_edges(self) -> None:
        """The same for step s's K where two tokens share a row; elsewhere a dead K only makes a dead score."""
        if self.plan.tokens_per_row > 1:
            clear_edges(self.plan, self.refs.cells, self.ring, self.refs.k.at[self.ring.here])

    def compute(self, cursor):
        """The basic block that the module's docstring describes. Returns the cursor behind the issued step."""
        plan, refs, ring = self.plan, self.refs, self.ring
        copies = Copies(plan, refs, self.work, cursor)
        keys = copies.keys(ring.plus(plan.sizes.steps_ahead), with_values=plan.values_with_keys)
        values = keys if plan.values_with_keys else copies.values(ring.plus(plan.sizes.steps_ahead - 1))
        self.clear_edges()
        self.clear_key_edges()
        weights = self.weigh()
        tops = [refs.run_top[g] for g in range(plan.H)]
        for c in range(plan.C):
            self.score(c, tops, keys)
        for g in range(plan.H):
            refs.run_top[g] = tops[g]
        self.sum_up(weights, values)
        return copies.cursor

    def score(self, c, tops, copies: Paced) -> None:
        """Scores of step s's cell c, to `refs.scores`; moves the running maxima in `tops`."""
        plan, refs = self.plan, self.refs
        cell = Cell.load(refs.cells, self.ring.cells, c, plan)
        live_rows = LiveRows.of(plan, refs, cell)
        for g in range(plan.H):
            top = []
            for part in plan.parts:
                s = self._masked_scores(c, g, cell, live_rows, part)
                refs.scores[c, g, :, part] = s
                top += [s[:, t : t + LANES] for t in range(0, part.size, LANES)]
                copies.advance(self._stages_of_keys * plan.C * plan.H * len(plan.parts))
            top = jnp.max(functools.reduce(jnp.maximum, top), axis=1, keepdims=True)
            top = jnp.broadcast_to(top, (plan.M, LANES))
            if plan.tokens_per_row > 1:  # a row's tokens share their maximum, and so can be added up at the end
                top = jnp.maximum(top, pltpu.roll(top, plan.M // plan.tokens_per_row, 0))
            before = jnp.where(cell.is_first, refs.sink[g] if plan.has_sinks else LOWEST, tops[g])
            tops[g] = jnp.maximum(before, top)
            refs.top[c, g] = tops[g]
            refs.decay[c, g] = _exp(before - tops[g])

    def _masked_scores(self, c, g, cell: Cell, live_rows: LiveRows, part: pl.Slice):
        """Scores of a part of step s's cell c, [M, part.size]."""
        plan, shape = self.plan, (self.plan.M, part.size)
        row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        token = plan.token_of_row(part.start + column)
        if plan.tokens_per_row > 1:
            token += lax.div(row, jnp.int32(plan.M // plan.tokens_per_row))
        live = live_rows.of_tokens(token)
        q = self.refs.q[cell.b, g * plan.M : (g + 1) * plan.M, :]
        s = self._each_head(g, functools.partial(self._times_keys, c, cell, q, part), shape)
        if plan.soft_cap is None:
            s = in_range(s * plan.sm_scale)
        else:
            s = plan.soft_cap * jnp.tanh(s * (plan.sm_scale / plan.soft_cap))
        return jnp.where(live, s, DEAD)

    def weigh(self):
        """Weights [M, T], one for each kv head of the group, the lanes' sums of them, decay and maximum [M, 128]:
        of each cell and row group of step s-1.
        """
        plan, refs, before = self.plan, self.refs, self.ring.plus(-1)
        dtype = jnp.float32 if jnp.float32 in (plan.query_dtype, plan.cache_dtype) else jnp.bfloat16
        weights = []
        for c in range(plan.C):
            cell = Cell.load(refs.cells, before.cells, c, plan) if plan.is_quantized else None
            for g in range(plan.H):
                top = refs.top[c, g]
                scores = [refs.scores[c, g, :, t : t + LANES] for t in range(0, plan.T, LANES)]
                parts = [_exp(score - top) for score in scores]
                each = [parts]
                if plan.is_quantized:
                    heads = range(g * plan.heads_per_group, (g + 1) * plan.heads_per_group)
                    ref, rows = refs.v_scales.at[before.cells, c], pl.ds(0, plan.T)
                    scales = [scales_of_rows(plan, self.work, ref, cell, h, rows) for h in heads]
                    # Dead tokens' scales may be NaN, and 0 x NaN is NaN.
                    each = [
                        [
                            jnp.where(score == DEAD, 0.0, part * x)
                            for score, part, x in zip(scores, parts, row, strict=True)
                        ]
                        for row in scales
                    ]
                each = [jnp.concatenate(x, axis=1).astype(dtype) for x in each]
                weights.append((each, _sum(parts), refs.decay[c, g], top))
        return weights

    def sum_up(self, weights, copies: Paced | None = None) -> None:
        """Step s-1's weights times V, added to the running sums; finished sequences are copied out."""
        plan, refs, before = self.plan, self.refs, self.ring.plus(-1)
        outs, sums = ([ref[g] for g in range(plan.H)] for ref in (refs.run_out, refs.run_sum))
        first_sums = [self._sink_sum(g) for g in range(plan.H)] if plan.has_sinks else [0.0] * plan.H
        for c in range(plan.C):
            cell = Cell.load(refs.cells, before.cells, c, plan)
            for g in range(plan.H):
                each, lane_sums, decay, _ = weights[c * plan.H + g]
                new = []
                for part in plan.parts:
                    product = functools.partial(self._times_values, c, each, part)
                    new.append(self._each_head(g, product, (plan.M, plan.W)))
                    if copies is not None:
                        copies.advance(self._stages_of_keys * plan.C * plan.H * len(plan.parts))
                new = _sum(new)
                new = jnp.where(cell.end > 0, new, 0.0)  # a cell of no sequence holds anything
                # A select, for the sequence before may have left NaN.
                outs[g] = jnp.where(cell.is_first, 0.0, outs[g]) * _widen(decay, plan.W) + new
                sums[g] = jnp.where(cell.is_first, first_sums[g], sums[g]) * decay + lane_sums
            self._write_row(cell, outs, sums, [w[3] for w in weights[c * plan.H : (c + 1) * plan.H]])
        if copies is not None:
            copies.finish()
        for g in range(plan.H):
            refs.run_out[g], refs.run_sum[g] = outs[g], sums[g]

    def _sink_sum(self, g):
        """What group g's denominators start from: each lane's part of a sink's own weight, 1; once a query head."""
        counts = self.refs.sink[g] > LOWEST
        row = lax.broadcasted_iota(jnp.int32, counts.shape, 0)
        return jnp.where(counts & (row < self.plan.M // self.plan.tokens_per_row), 1 / LANES, 0.0)

    def _write_row(self, cell: Cell, outs, sums, tops) -> None:
        plan, refs = self.plan, self.refs
        rows = plan.M // plan.tokens_per_row
        lses = [jnp.zeros((1, min(LANES, plan.Hq - lane)), jnp.float32) for lane in range(0, plan.Hq, LANES)]
        for g in range(plan.H):
            total = jnp.broadcast_to(jnp.sum(sums[g], axis=1, keepdims=True), (plan.M, LANES))
            out = outs[g]
            if plan.tokens_per_row > 1:  # row j's lanes j * D onwards hold token j's part
                total = total + pltpu.roll(total, rows, 0)
                out = out + pltpu.roll(pltpu.roll(out, plan.D, 1), rows, 0)
            # One of several new tokens may have nothing to attend to.
            out = out / _widen(total if plan.Q == 1 else jnp.where(total > 0, total, 1.0), plan.W)
            refs.out_rows[cell.b, g * rows : (g + 1) * rows, :] = out[:rows, : plan.D].astype(refs.out_rows.dtype)
            if plan.return_lse:
                lse = tops[g] + jnp.log(total)
                lse = jnp.where(total > 0, lse, -jnp.inf) if plan.Q > 1 else lse
                _add_rows_to_lanes(lses, lse[:rows], g * rows)
        if plan.return_lse:
            refs.lse_rows[cell.b] = lses[0] if len(lses) == 1 else jnp.concatenate(lses, axis=1)

        @pl.when(cell.is_last)
        def _():
            for copy in _row_copies(plan, refs, cell.b):
                copy.start()

    def _times_keys(self, c, cell: Cell, q, rows: pl.Slice, h):
        """q [M, W] times some rows of step s's K of kv head h: [M, rows.size]."""
        plan, refs = self.plan, self.refs
        blocks = plan.W // LANES
        part = lambda i: dot(
            q[:, i * LANES : (i + 1) * LANES],
            self._wide(refs.k[self.ring.here, c, h * blocks + i, rows]),
            1,
            plan.query_dtype,
        )
        s = functools.reduce(lambda s, i: s + part(i), range(1, blocks), part(0))
        if plan.is_quantized:
            scales = scales_of_rows(plan, self.work, refs.k_scales.at[self.ring.here, c], cell, h, rows)
            s *= jnp.concatenate(scales, axis=1)
        return s

    def _times_values(self, c, each, rows: pl.Slice, h):
        """Weights [M, T], one or each head's, times some rows of step s-1's V of kv head h: [M, W]."""
        plan, slot = self.plan, self.ring.plus(-1).of_values(self.plan)
        blocks = plan.W // LANES
        weight = each[h % len(each)][:, rows.start : rows.start + rows.size]
        v = [self._wide(self.refs.v[slot, c, h * blocks + i, rows]) for i in range(blocks)]
        parts = [dot(weight, block, 0, plan.query_dtype) for block in v]
        return parts[0] if blocks == 1 else jnp.concatenate(parts, axis=1)

    def _wide(self, pages):
        return pages.astype(jnp.bfloat16) if self.plan.widens_pages else pages

    def _each_head(self, g, product, shape):
        """`product(h)` of the kv heads that share row group g, each in its own rows."""
        plan = self.plan
        row = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 0), jnp.int32(plan.M // plan.tokens_per_row))
        merged = product(g * plan.heads_per_group)
        for t in range(1, plan.heads_per_group):
            merged = jnp.where(row < t * plan.rows_per_head, merged, product(g * plan.heads_per_group + t))
        return merged


def _exp(x):
    """exp(x) of a difference: a scale to base 2 before it would take a score out of f32's range."""
    return jnp.exp2(x * _LOG2_E)


def _sum(parts):
    """A balanced sum: its chain is log2 as long as a running one's."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) & ~1 :]
    return parts[0]


def _widen(x, width):
    """[M, 128], the same in all lanes, as [M, width]."""
    return x if width == LANES else jnp.concatenate([x] * (width // LANES), axis=1)


def _add_rows_to_lanes(tiles, x, offset: int) -> None:
    """Adds x [rows, 128], the same in all lanes, to `tiles` [1, 128 or less] of lanes: x[r] in lane offset + r."""
    for i in range(offset // LANES, pl.cdiv(offset + x.shape[0], LANES)):
        first = max(0, (i * LANES - offset) // SUBLANES * SUBLANES)
        part = x[first : (i + 1) * LANES - offset, : tiles[i].shape[1]]
        row, lane = (lax.broadcasted_iota(jnp.int32, part.shape, axis) for axis in (0, 1))
        is_its = lane == row + (offset + first - i * LANES)
        tiles[i] += jnp.sum(jnp.where(is_its, part, 0.0), axis=0, keepdims=True)
