"""Launches the decode kernel over stored, stacked pools; a batch that does not fit on chip becomes several launches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist._compat import COPIES_A_LONE_RESULT, out_struct
from paged_dist.kernels.attention.checks import check_output_dtype, check_pools
from paged_dist.kernels.attention.products import block_diagonal
from paged_dist.kernels.attention.queries import queries_as_rows, rows_as_queries
from paged_dist.kernels.decode.block_sizes import BlockSizes
from paged_dist.kernels.decode.kernel import decode_kernel
from paged_dist.kernels.decode.launch_plan import NUM_FIELDS, LaunchPlan
from paged_dist.kernels.decode.plan_choice import (
    check_block_sizes,
    fits,
    make_launch_plan,
    rows_per_launch,
    vmem_limit,
)
from paged_dist.kernels.decode.refs import Refs
from paged_dist.kernels.dispatch import Interpret, in_hbm, result_in_hbm
from paged_dist.kernels.target import Target, simulation
from paged_dist.kernels.tiling import LANES


def decode_pages_pallas(
    query,
    key_pages,
    value_pages,
    lengths,
    block_tables,
    layer=None,
    starts=None,
    sinks=None,
    key_scales=None,
    value_scales=None,
    *,
    sm_scale=1.0,
    soft_cap=None,
    sliding_window=None,
    return_lse=True,
    output_dtype=None,
    block_sizes: BlockSizes | None = None,
    target: Target,
    interpret: Interpret = False,
):
    """(output [B, Hq, D], lse [B, Hq] f32), or the output alone, by the decode kernel.

    Args:
      query, key_pages, value_pages, lengths, block_tables, layer: as `attend_pages_xla` takes them, bf16 pages as bf16.
        With query [B, Q, Hq, D] the results are [B, Q, Hq, D] and [B, Q, Hq], as there.
      starts: [B] int32 ([B, Q]), first token attended to; with a window the later of the two counts.
      sinks: [Hq] f32 logits added to the softmax denominator.
      key_scales, value_scales: [L, Hkv, N * P / 128, 128] f32 of 8-bit pages, as `pack_scales` stores them.
      output_dtype: of the output, bf16 or f32; None for the query's.
      block_sizes: None for `choose_block_sizes`.
      target: of the chip: the number of cores, how pages are multiplied, default block sizes.
      interpret: False compiles; True or an InterpretParams simulates.

    A batch whose table does not fit in scalar memory, or whose queries take too much vector memory, becomes several
    launches; new tokens whose scores do not fit beside each other do too, and each launch reads the pages.

    Raises:
      ValueError: shapes that do not fit together, or block sizes that do not fit in VMEM.
    """
    arrays = (key_pages, value_pages, lengths, block_tables, key_scales, value_scales)
    p = check_pools(query, *arrays, takes_queries=True)
    check_output_dtype(output_dtype)
    options: dict[str, Any] = dict(sm_scale=sm_scale, soft_cap=soft_cap, sliding_window=sliding_window)
    options |= dict(return_lse=return_lse, output_dtype=output_dtype)
    plan = make_launch_plan(
        p,
        target,
        block_sizes,
        has_starts_operand=starts is not None,
        has_sinks=sinks is not None,
        **options,
    )
    if block_sizes is None and p.num_queries > 1 and not fits(plan):
        half = slice(None, p.num_queries // 2), slice(p.num_queries // 2, None)
        parts = [
            decode_pages_pallas(
                query[:, q],
                key_pages,
                value_pages,
                lengths[:, q],
                block_tables,
                layer,
                None if starts is None else starts[:, q],
                sinks,
                key_scales,
                value_scales,
                target=target,
                interpret=interpret,
                **options,
            )
            for q in half
        ]
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    check_block_sizes(plan)
    has_queries = query.ndim == 4
    if has_queries:
        query, lengths, starts = queries_as_rows(p, query, lengths, starts)
    rows = rows_per_launch(plan)
    layer = jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32)
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    pools = dict(key_pages=key_pages, value_pages=value_pages)
    if key_scales is not None and value_scales is not None:  # a row by itself is what a copy can address
        one = (*key_scales.shape[:-1], 1, key_scales.shape[-1])
        pools |= dict(key_scales=key_scales.reshape(one), value_scales=value_scales.reshape(one))
    pools = dict(zip(pools, in_hbm(*pools.values(), interpret=interpret), strict=True))
    part = lambda x, i: None if x is None else x[i : i + rows]
    parts = [
        launch_once(
            dataclasses.replace(plan, problem=p.replace(batch=min(rows, p.batch - i))),
            part(query, i),
            pools,
            part(lengths, i),
            part(block_tables, i),
            layer,
            part(starts, i),
            sinks,
            interpret=interpret,
        )
        for i in range(0, p.batch, rows)
    ]
    output, lse = (
        parts[0]
        if len(parts) == 1
        else (None if x[0] is None else jnp.concatenate(x) for x in zip(*parts, strict=True))
    )
    if has_queries:
        output, lse = (None if x is None else rows_as_queries(p, x) for x in (output, lse))
    return (output, lse) if return_lse else output


def launch_once(plan: LaunchPlan, query, pools, lengths, block_tables, layer, starts, sinks, *, interpret: Interpret):
    """One launch: (output [B, Hq, D], lse [B, Hq] or None), rows as `queries_as_rows` orders them.

    pools: key_pages and value_pages, and with 8-bit pages key_scales and value_scales, by name.
    """
    q = query
    if plan.tokens_per_row > 1:
        q = query.reshape(plan.B, plan.H, plan.heads_per_group * plan.rows_per_head, plan.D)
        q = block_diagonal(q, plan.tokens_per_row).reshape(plan.B, plan.H * plan.M, plan.W)
    if plan.clamps_before:
        block_tables = jnp.clip(block_tables, 0, plan.problem.num_pages - 1)
    table = block_tables.T if plan.table_is_transposed else block_tables
    layer = None if plan.problem.num_layers == 1 else layer.reshape(1)
    if plan.Q > 1:  # flat, for scalar memory pads what is not
        lengths, starts = lengths.reshape(-1), None if starts is None else starts.reshape(-1)
    scalars = dict(lengths=lengths, table=table, layer=layer, starts=starts, sinks=sinks)
    scalars = {name: x for name, x in scalars.items() if x is not None}
    arrays = dict(query=q, **pools)
    operands = (*scalars.values(), *arrays.values())
    results = dict(output=out_struct((plan.B, plan.Hq, plan.D), plan.out_dtype, *operands))
    if plan.return_lse:
        results["lse"] = out_struct((plan.B, 1, plan.Hq), jnp.float32, *operands)
    elif COPIES_A_LONE_RESULT and not interpret:
        results["never_written"] = out_struct((1, 1, LANES), jnp.float32, *operands)
    ahead = plan.sizes.steps_ahead
    scratch = {name: pltpu.VMEM(*x) for name, x in plan.scratch_shapes.items()}
    scratch |= dict(
        work=pltpu.SMEM((plan.B + 1,), jnp.int32),
        cells=pltpu.SMEM(((ahead + 2) * plan.C * NUM_FIELDS,), jnp.int32),
        tiles=pltpu.SMEM((ahead + 2,), jnp.int32),
        pages=pltpu.SMEM((ahead + 2,), jnp.int32) if plan.is_quantized else None,
        q_sem=pltpu.SemaphoreType.DMA,
        k_sems=pltpu.SemaphoreType.DMA((ahead + 1,)),
        v_sems=pltpu.SemaphoreType.DMA((ahead + 1,)),
        out_sem=pltpu.SemaphoreType.DMA,
    )
    scratch["lse_sem"] = pltpu.SemaphoreType.DMA if plan.return_lse else None
    scratch = {name: x for name, x in scratch.items() if x is not None}
    names = (*scalars, *arrays, *results, *scratch)

    def kernel(*refs):
        by_name: dict[str, Any] = dict(zip(names, refs, strict=True))
        fields: dict[str, Any] = {name: by_name.get(name) for name in Refs._fields}
        decode_kernel(plan, Refs(**fields))

    whole = pl.BlockSpec(memory_space=pltpu.HBM)
    made = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.num_cores, 1),
            in_specs=[whole] * len(arrays),
            out_specs=[whole] * len(results),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[result_in_hbm(x, query, interpret) for x in results.values()],
        # Page ids are clamped, and the layer; Mosaic's check of each copy's bounds takes longer than issuing it.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=vmem_limit(plan.num_cores),
        ),
        interpret=simulation(plan.num_cores, interpret),
        name="paged_decode_attention" + ("_on_two_cores" if plan.num_cores > 1 else ""),
    )(*operands)
    return made[0], made[1].reshape(plan.B, plan.Hq) if plan.return_lse else None
