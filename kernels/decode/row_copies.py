"""A launch's rows: the whole query comes in as one copy, each sequence's output goes out as one when it is done."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist.kernels.attention.scores import LOWEST, in_range
from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.decode.refs import Refs, given
from paged_dist.kernels.decode.work_list import WorkList, div, rem
from paged_dist.kernels.tiling import LANES


def query_copy(plan: LaunchPlan, refs: Refs):
    """The copy of all sequences' queries into VMEM."""
    return pltpu.make_async_copy(refs.query, refs.q.at[pl.ds(0, plan.B)], refs.q_sem)


def row_copies(plan: LaunchPlan, refs: Refs, b, *, empty: bool = False) -> list:
    """The copies of sequence b's output, and of its lse, to HBM; `empty`: of a sequence without live tokens."""
    copies = [pltpu.make_async_copy(refs.no_output if empty else refs.out_rows.at[b], refs.output.at[b], refs.out_sem)]
    if plan.return_lse:
        source = refs.no_lse if empty else given(refs.lse_rows).at[b]
        copies.append(pltpu.make_async_copy(source, given(refs.lse).at[b], refs.lse_sem))
    return copies


def wait_for_rows(plan: LaunchPlan, refs: Refs, rows) -> None:
    """Waits for the copies of `rows` rows: a wait only counts bytes."""
    pairs = [(refs.out_rows, refs.out_sem)] + ([(refs.lse_rows, refs.lse_sem)] if plan.return_lse else [])
    for ref, sem in pairs:
        part = ref.at[pl.ds(0, rows)]
        pl.when(rows > 0)(pltpu.make_async_copy(part, part, sem).wait)


def prepare(plan: LaunchPlan, refs: Refs, work: WorkList, core) -> jax.Array:
    """Initial state, and the rows of empty sequences. Returns the number of rows that this core copies out."""
    refs.run_top[...] = jnp.full_like(refs.run_top, LOWEST)
    refs.run_sum[...] = jnp.zeros_like(refs.run_sum)
    refs.run_out[...] = jnp.zeros_like(refs.run_out)
    refs.no_output[...] = jnp.zeros_like(refs.no_output)
    work.clear_before_first()
    if plan.has_sinks:
        _spread_sinks(plan, refs)
    if plan.return_lse:
        _write_empty_lse(plan, refs)

    @pl.when((core == 0) & (work.live_rows < plan.B))
    def _():
        def copy_empty(b, _):
            @pl.when(WorkList.span(plan, refs, b)[1] == 0)
            def _():
                for copy in row_copies(plan, refs, b, empty=True):
                    copy.start()

        lax.fori_loop(0, plan.B, copy_empty, None)

    return work.rows + jnp.where(core == 0, plan.B - work.live_rows, 0)


def _spread_sinks(plan: LaunchPlan, refs: Refs) -> None:
    """Each query row's sink, in all lanes."""
    for row in range(plan.H * plan.M):
        head = plan.head_of_row(row)
        refs.sink[row // plan.M, pl.ds(row % plan.M, 1), :] = jnp.full((1, LANES), given(refs.sinks)[head])
    refs.sink[...] = in_range(refs.sink[...])  # a sink of -inf is none


def _write_empty_lse(plan: LaunchPlan, refs: Refs) -> None:
    """The lse of an empty sequence: -inf, with sinks each head's sink."""
    none = jnp.full((1, plan.Hq), -jnp.inf, jnp.float32)
    if plan.has_sinks:
        head_of_lane = lax.broadcasted_iota(jnp.int32, none.shape, 1)
        if plan.Q > 1:
            head_of_lane = div(head_of_lane, plan.rows_per_head) * plan.G + rem(head_of_lane, plan.G)
        for head in range(plan.problem.num_q_heads):
            none = jnp.where(head_of_lane == head, given(refs.sinks)[head], none)
    given(refs.no_lse)[...] = none
