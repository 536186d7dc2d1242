"""`Refs`: what a launch of the decode kernel reads, writes and keeps, by name and memory."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias, TypeVar

Ref: TypeAlias = Any  # what a Pallas body gets for an operand: jax has no public type for it and its slices
_T = TypeVar("_T")


class Refs(NamedTuple):
    """A launch's operands, results and scratch, in Pallas's order. Shapes in the letters of `LaunchPlan`."""

    lengths: Ref  # SMEM int32 [B * Q]
    table: Ref  # SMEM int32 [B, S], or [S, B] where `table_is_transposed`
    layer: Ref | None  # SMEM int32 [1]
    starts: Ref | None  # SMEM int32 [B * Q]
    sinks: Ref | None  # SMEM f32 [Hq / Q]
    query: Ref  # HBM [B, H * M, W]
    key_pages: Ref  # HBM [L, Hkv, N, R, W]
    value_pages: Ref
    key_scales: Ref | None  # HBM f32 [L, Hkv, N * P / 128, 1, 128]
    value_scales: Ref | None
    output: Ref  # HBM [B, Hq, D]
    lse: Ref | None  # HBM f32 [B, 1, Hq]
    q: Ref  # VMEM [B + 1, H * M, W], the whole query; row B, here and below, is for cells of no sequence
    k: Ref  # VMEM [steps_ahead + 1, C, Hkv * W / 128, T, 128]
    v: Ref  # VMEM, the same shape, or one buffer more where V comes with K
    k_scales: Ref | None  # VMEM f32 [steps_ahead + 1, C, Hkv, rows of scales in a cell, 1, 128]
    v_scales: Ref | None  # one step more, for they come with K
    scores: Ref  # VMEM f32 [C, H, M, T]
    top: Ref  # VMEM f32 [C, H, M, 128]: running maximum with the cell, the same in all lanes
    decay: Ref  # VMEM f32 [C, H, M, 128]: what the cell's sequence had summed so far is worth now
    run_top: Ref  # VMEM f32 [H, M, 128], after the last cell scored
    run_sum: Ref  # VMEM f32 [H, M, 128], after the last cell summed: each lane's part of the denominator
    run_out: Ref  # VMEM f32 [H, M, W]
    sink: Ref  # VMEM f32 [H, M, 128]: what `run_top` starts from
    out_rows: Ref  # VMEM [B + 1, Hq, D]: a sequence's row is copied to `output` when it is done
    lse_rows: Ref | None  # VMEM f32 [B + 1, 1, Hq]
    no_output: Ref  # VMEM [Hq, D]: the row of an empty sequence
    no_lse: Ref | None  # VMEM f32 [1, Hq]
    work: Ref  # SMEM int32 [B + 1]
    cells: Ref  # SMEM int32 [(steps_ahead + 2) * C * NUM_FIELDS]
    tiles: Ref  # SMEM int32 [steps_ahead + 2]
    pages: Ref | None  # SMEM int32 [steps_ahead + 2]
    q_sem: Ref
    k_sems: Ref  # DMA [steps_ahead + 1]
    v_sems: Ref  # DMA [steps_ahead + 1]
    out_sem: Ref
    lse_sem: Ref | None


def given(ref: _T | None) -> _T:
    """`ref`, an optional one of `Refs`, where the plan says that the launch has it."""
    assert ref is not None
    return ref
