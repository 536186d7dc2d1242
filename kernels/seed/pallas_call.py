"""Launches the seed's kernel bodies over stored, stacked pools."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist._compat import broadcasts, out_struct
from paged_dist._errors import require
from paged_dist.kernels.attention.checks import check_options, check_pools
from paged_dist.kernels.attention.problem import Problem
from paged_dist.kernels.attention.products import block_diagonal
from paged_dist.kernels.dispatch import Interpret, in_hbm
from paged_dist.kernels.seed.block_choice import (
    check_megacore,
    check_megacore_target,
    check_pages_per_compute_block,
    check_smem,
    choose_pages_per_compute_block,
    cores_of,
    sequences_per_launch,
)
from paged_dist.kernels.seed.kernel import FlashKernel, attend_block, attend_head
from paged_dist.kernels.target import simulation
from paged_dist.kernels.tiling import LANES


@broadcasts
def attend_pages_pallas(
    query,
    key_pages,
    value_pages,
    lengths,
    block_tables,
    layer=None,
    *,
    sm_scale=1.0,
    soft_cap=None,
    sliding_window=None,
    pages_per_compute_block=None,
    megacore_mode=None,
    inline_seq_dim=True,
    interpret: Interpret = False,
):
    """`attend_pages_xla` by the Pallas kernel: same arguments, shapes and results, and

    Args:
      key_pages, value_pages: [L, Hkv, N, R, W] with W = max(128, D); they stay in HBM and the layer is picked by
        the kernel's own copies. A window's first page is the first that is read.
      pages_per_compute_block: pages in one block of the schedule; None picks about two thousand tokens.
      megacore_mode: None, or 'kv_head' or 'batch' to split these over a megacore chip's two cores.
      inline_seq_dim: loop over a sequence's blocks inside the kernel (True), or in the grid.
      interpret: False compiles; True or an InterpretParams simulates.

    A batch whose table does not fit in scalar memory becomes several launches.

    Raises:
      ValueError: what `attend_pages_xla` refuses, an unfit option, or a row of the table over scalar memory.
    """
    query, key_pages, value_pages, lengths, block_tables = map(
        jnp.asarray, (query, key_pages, value_pages, lengths, block_tables)
    )
    p = check_pools(query, key_pages, value_pages, lengths, block_tables)
    check_options(sm_scale=sm_scale, soft_cap=soft_cap, sliding_window=sliding_window)
    require(
        p.width == max(LANES, p.head_dim),
        "key_pages.shape",
        key_pages.shape,
        f"the kernel takes rows of {max(LANES, p.head_dim)} lanes at head_dim {p.head_dim}",
        "store two tokens a row, as CacheSpec does",
    )
    check_megacore(p, megacore_mode)
    interpret = simulation(cores_of(megacore_mode), interpret)
    check_megacore_target(megacore_mode, interpret, query, key_pages)
    if pages_per_compute_block is None:
        pages_per_compute_block = choose_pages_per_compute_block(p)
    pages_per_compute_block = check_pages_per_compute_block(p, pages_per_compute_block)
    least = cores_of(megacore_mode) if megacore_mode == "batch" else 1
    check_smem(p, rows=least)
    rows = sequences_per_launch(p, least)
    layer = jnp.zeros((), jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32)
    k_pool, v_pool = in_hbm(key_pages, value_pages, interpret=interpret)
    launch = functools.partial(
        _launch_flash_attention,
        sm_scale=float(sm_scale),
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        pages_per_compute_block=pages_per_compute_block,
        megacore_mode=megacore_mode,
        inline_seq_dim=inline_seq_dim,
        interpret=interpret,
    )
    parts = [
        launch(query[i : i + rows], k_pool, v_pool, lengths[i : i + rows], block_tables[i : i + rows], layer)
        for i in range(0, p.batch, rows)
    ]
    return parts[0] if len(parts) == 1 else tuple(map(jnp.concatenate, zip(*parts, strict=True)))


def _launch_flash_attention(
    query,
    key_pages,
    value_pages,
    lengths,
    block_tables,
    layer,
    *,
    sm_scale,
    soft_cap,
    sliding_window,
    pages_per_compute_block,
    megacore_mode,
    inline_seq_dim,
    interpret,
):
    """One launch: (output [B, Hq, D], lse [B, Hq])."""
    p = check_pools(query, key_pages, value_pages, lengths, block_tables)
    cores = cores_of(megacore_mode)
    b_cores = cores if megacore_mode == "batch" else 1
    h_cores = cores if megacore_mode == "kv_head" else 1
    blocks = () if inline_seq_dim else (-(-p.pages_per_sequence // pages_per_compute_block),)
    grid = (cores, p.batch // b_cores, p.num_kv_heads // h_cores, *blocks)

    q = query.reshape(p.batch, p.num_kv_heads, p.group, p.head_dim)
    if p.tokens_per_row > 1:
        q = block_diagonal(q, p.tokens_per_row)
    # Between the grid's blocks, and until the tokens of a row are merged, the output is a partial sum.
    out_dtype = query.dtype if inline_seq_dim and p.tokens_per_row == 1 else jnp.float32

    def at_head(core, b, h, *_):
        return b * b_cores + core * (b_cores - 1), h * h_cores + core * (h_cores - 1), 0, 0

    def a_head(lanes):
        return pl.BlockSpec((None, None, q.shape[2], lanes), at_head)

    options = dict(
        batch_size=p.batch,
        pages_per_compute_block=pages_per_compute_block,
        pages_per_sequence=p.pages_per_sequence,
        attn_logits_soft_cap=soft_cap,
        megacore_mode=megacore_mode,
        sliding_window=sliding_window,
        sm_scale=sm_scale,
        tokens_per_row=p.tokens_per_row,
    )
    attend = attend_head if inline_seq_dim else attend_block

    def kernel(layer_ref, lengths, table, buffer_index, init_flag, q, k_pages, v_pages, o, m, l, *scratch):
        core, *step = (pl.program_id(axis) for axis in range(len(grid)))
        k_pages, v_pages = (pool.at[layer_ref[0]] for pool in (k_pages, v_pages))
        k_buffer, v_buffer, k_sems, v_sems = scratch
        refs = (lengths, table, buffer_index, init_flag, q, k_pages, v_pages, k_buffer, v_buffer, k_sems, v_sems)
        body = FlashKernel(core, *refs, **options)
        attend(body, *step, o, m, l)

    buffer = pltpu.VMEM((2, pages_per_compute_block, p.rows, p.width), key_pages.dtype)
    pool_spec = pl.BlockSpec(memory_space=pltpu.HBM)
    stats = (*q.shape[:-1], 1)
    operands = (
        layer.reshape(1),
        lengths,
        block_tables.reshape(-1),
        jnp.zeros((1,), jnp.int32),
        jnp.ones((1,), jnp.int32),
        q,
        key_pages,
        value_pages,
    )
    output, m, l = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=grid,
            in_specs=[a_head(p.width), pool_spec, pool_spec],
            out_specs=[a_head(p.width), a_head(1), a_head(1)],
            scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2,))],
        ),
        out_shape=[
            out_struct(q.shape, out_dtype, *operands),
            out_struct(stats, jnp.float32, *operands),
            out_struct(stats, jnp.float32, *operands),
        ],
        # The descriptor clamps page ids, so Mosaic need not check each copy's bounds: that took longer than issuing it.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, *[pltpu.ARBITRARY] * (len(grid) - 1)), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="paged_attention" + ("" if inline_seq_dim else "_blocks_in_grid"),
    )(*operands)
    output, lse = _merge_streams(p, output, m[..., 0], l[..., 0])
    return (output.reshape(p.batch, p.num_q_heads, p.head_dim).astype(query.dtype), lse.reshape(p.batch, p.num_q_heads))


def _merge_streams(p: Problem, output, m, l):
    """(output [B, Hkv, G, D], lse [B, Hkv, G]) of the rows of `block_diagonal`, each with its own m and l."""
    if p.tokens_per_row == 1:
        return output, jnp.where(l == 0.0, -jnp.inf, m + jnp.log(l))
    streams, lead = p.tokens_per_row, m.shape[:-1]
    m, l = (x.reshape(*lead, streams, p.group) for x in (m, l))
    parts = output.reshape(*lead, streams, p.group, streams, p.head_dim)
    parts = jnp.stack([parts[..., j, :, j, :] for j in range(streams)], axis=-3)  # [B, Hkv, streams, G, D]
    top = jnp.max(m, axis=-2)
    weight = jnp.where(l == 0.0, 0.0, l * jnp.exp(m - top[..., None, :]))
    total = weight.sum(axis=-2)
    share = weight / jnp.where(total == 0.0, 1.0, total)[..., None, :]
    return (share[..., None] * parts).sum(axis=-3), jnp.where(total == 0.0, -jnp.inf, top + jnp.log(total))
