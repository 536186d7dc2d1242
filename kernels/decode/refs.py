"""`Refs`: what a launch of the decode kernel reads, writes and keeps, by name and memory."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Refs(NamedTuple):
    """A launch's operands, results and scratch, in Pallas's order. Shapes in the letters of `LaunchPlan`."""

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
