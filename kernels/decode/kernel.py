"""The body of the decode kernel: one loop over steps, in which four stages of two neighbouring steps overlap.

A cell is up to `pages_per_cell` consecutive pages of one sequence, all local kv heads. A step is `cells_per_step`
cells, of one sequence or several. `work_list` lists the cells. Iteration s of the loop

    weighs   step s-1: exp(score - max), from the scores that the iteration before left in VMEM (`summing.weigh`);
    scores   step s: q.K, masks, each row's maximum, running maxima (`scoring`);
    issues   copies (`copy_schedule`): of K of step s + `steps_ahead`, between the scores' products, and of V of the
             step before that one, between the sums' products;
    sums     step s-1: weights times V into the running sums; where a sequence ends they are divided and copied out
             (`summing.sum_up`).

Within an iteration `sums` waits for the weights that `weighs` computes, and `scores` overwrites the scores of step s-1
only when `weighs` has read them. No other stage waits for another. All stand in one basic block: K and V are pushed
into the MXU back to back while the copies' scalar work, the lane reductions and the exponentials run beside them. A
product's latency (some 200 cycles), a reduction's (100) and the exponentials are paid once an iteration, not once a
block.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from paged_dist.kernels.decode.copy_schedule import StepCopies
from paged_dist.kernels.decode.iteration import Iteration
from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.decode.refs import Refs
from paged_dist.kernels.decode.row_copies import prepare, query_copy, wait_for_rows
from paged_dist.kernels.decode.scoring import score_cell
from paged_dist.kernels.decode.summing import sum_up, weigh
from paged_dist.kernels.decode.work_list import Ring, WorkList, div, rem


def decode_kernel(plan: LaunchPlan, refs: Refs) -> None:
    """The body of a launch, on a grid of (cores, 1).

    Fills the pipeline with the first steps' copies, loops while there are steps, and sums up the last one.
    """
    core = pl.program_id(0)
    query_copy(plan, refs).start()
    work = WorkList.build(plan, refs, core)
    ring, ahead = Ring.start(plan), plan.sizes.steps_ahead
    cursor = (jnp.int32(0), jnp.int32(0))
    # V is issued as in the loop, a step behind K or with it, but only once its buffers are cleared.
    together = plan.values_with_keys and not plan.cache_may_hold_nan
    for a in range(ahead):
        copies = StepCopies(plan, refs, work, cursor)
        copies.start_keys(ring.plus(a), with_values=together)
        cursor = copies.cursor
    if plan.cache_may_hold_nan:
        pl.when(work.is_ragged)(lambda: _clear_values(plan, refs))  # while the first K is on its way
    for a in range(0 if together else ahead if plan.values_with_keys else ahead - 1):
        StepCopies(plan, refs, work, None).start_values(ring.plus(a))
    # Everything from here to the first wait hides behind the first copies' latency.
    rows = prepare(plan, refs, work, core)
    query_copy(plan, refs).wait()

    def step(carry):
        ring, cursor = carry
        at = Iteration(plan, refs, work, ring)
        at.wait_for_copies()
        return ring.plus(1), _compute(at, cursor)

    @pl.when(work.rows > 0)
    def _():
        behind, _ = lax.while_loop(lambda carry: work.has_step(carry[0].cells), step, (ring, cursor))
        last = Iteration(plan, refs, work, behind)
        last.wait_for_values()
        last.clear_edges()
        sum_up(last, weigh(last))

    wait_for_rows(plan, refs, rows)


def _clear_values(plan: LaunchPlan, refs: Refs) -> None:
    """Zeros V's buffers: rows that no copy fills are summed too, with weight 0, and 0 x NaN is NaN.

    From then on a buffer holds nothing but rows of live tiles, whose dead tokens `Iteration.clear_edges` clears.
    """

    def clear(i, _):
        part = refs.v.at[div(i, plan.C), rem(i, plan.C)]
        part[...] = jnp.zeros_like(part)

    lax.fori_loop(0, refs.v.shape[0] * plan.C, clear, None)


def _compute(at: Iteration, cursor):
    """One iteration's basic block. Returns the work list's place behind the step whose K was issued."""
    plan, refs, ring = at.plan, at.refs, at.ring
    copies = StepCopies(plan, refs, at.work, cursor)
    keys = copies.keys(ring.plus(plan.sizes.steps_ahead), with_values=plan.values_with_keys)
    values = keys if plan.values_with_keys else copies.values(ring.plus(plan.sizes.steps_ahead - 1))
    at.clear_edges()
    at.clear_key_edges()
    weights = weigh(at)
    tops = [refs.run_top[g] for g in range(plan.H)]
    for c in range(plan.C):
        score_cell(at, c, tops, keys)
    for g in range(plan.H):
        refs.run_top[g] = tops[g]
    sum_up(at, weights, values)
    return copies.cursor
