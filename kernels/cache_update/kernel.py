"""The write of new tokens and their scales on TPU, in place: DMA aligned tiles from the pool, blend, DMA them back.

`tiles` plans which tiles are written. `write_tiles_pallas` brings the new tokens into the form of tiles and launches
`_update_kernel`, which treats some tiles in each grid step, with all their DMAs in flight together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist._compat import out_struct
from paged_dist.kernels.arithmetic import round_up
from paged_dist.kernels.cache_update.tiles import (
    ITEMS_PER_STEP,
    VMEM_BUDGET,
    PoolShape,
    align,
    as_stored_rows,
    choose_tile_rows,
    plan_tiles,
    scale_unit,
    spread_scales,
    tile_bytes,
    token_in_tile,
)
from paged_dist.kernels.dispatch import Interpret, in_hbm
from paged_dist.kernels.quantization import fp8_bits, quantize_kv, scaled_to, smooth
from paged_dist.kernels.stripes import Stripes
from paged_dist.kernels.tiling import LANES, SUBLANES

ITEMS_PER_LAUNCH = 32768  # five int32 a tile in SMEM, at most: 640 KiB of its 1 MiB
QUANTIZE_ELEMENTS = 8192  # at a time, eight f32 registers: their maxima over lanes do not wait for one another


class _Plan(NamedTuple):
    """Which tiles a launch writes, in SMEM: [M] int32 each, as in `Tiles`."""

    layer: jax.Ref  # [1]
    page: jax.Ref
    row: jax.Ref
    first: jax.Ref
    last: jax.Ref
    leader: jax.Ref | None  # the step's first tile whose scales lie in the same rows; None: no two tiles share rows


class _Pool(NamedTuple):
    """The key pool or the value pool inside the kernel, with its buffers for the C tiles of a step."""

    pages: jax.Ref  # [1, L, Hkv, N, rows, W] in HBM, aliased to the operand
    new: jax.Ref  # [C, Hkv, tile_rows, W] in the pool's dtype; with one token a tile [C, Hkv, W] f32, or int32 bits
    tile: jax.Ref  # [C, Hkv, tile_rows, W] what was read, then what is written
    read: jax.Ref  # [C] DMA semaphores
    write: jax.Ref  # [C]


class _Scales(NamedTuple):
    """The scales of one of the pools: U rows of 128 a head are read, blended and written together."""

    stored: jax.Ref  # [1, L, Hkv, rows, 1, 128] in HBM, aliased to the operand; a DMA can name a single row
    new: jax.Ref  # [C, Hkv, U, 128] f32; [C, Hkv, 128] where U is 1 or one token is a tile
    unit: jax.Ref  # [C, Hkv, U, 128] f32; [C, Hkv, 128] where U is 1. What was read, then what is written
    read: jax.Ref  # [C]
    write: jax.Ref  # [C]


def _update_kernel(
    *refs: jax.Ref, shape: PoolShape, tile_rows: int, items: int, one_token: bool, shared: bool, quantized: bool
) -> None:
    """One grid step: `items` tiles, all their DMAs in flight together.

    Args:
      refs: see `_group`.
      one_token: each tile gets one new token.
      shared: tiles of a step may have their scales in the same rows, which are then read and written once.
      quantized: the pools are 8-bit, with scales.
    """
    step = pl.program_id(0)
    plan, pools, scales, raw = _group(refs, one_token, shared, quantized)
    tile_tokens = tile_rows * shape.tokens_per_row
    unit = scale_unit(shape)
    layer = plan.layer[0]
    is_layer = (layer >= 0) & (layer < shape.layers)

    def stored(pool: _Pool, item) -> jax.Ref:
        row = pl.multiple_of(plan.row[item], tile_rows)
        return pool.pages.at[0, layer, :, plan.page[item], pl.ds(row, tile_rows), :]

    def stored_unit(scale: _Scales, item) -> jax.Ref:
        row = plan.page[item] * shape.page_size // LANES
        return scale.stored.at[0, layer, :, row if unit == 1 else pl.ds(row, unit), 0, :]

    def leader(c, item):
        return c if plan.leader is None else plan.leader[item]

    def touched(item):
        return is_layer & (plan.last[item] > plan.first[item])

    def whole(item):  # every token of the tile is new: nothing is read, and the new rows are written as they are
        return plan.last[item] - plan.first[item] == tile_tokens

    def each_tile(body):
        def visit(c, _):
            item = step * items + c
            pl.when(touched(item))(functools.partial(body, c, item))

        lax.fori_loop(0, items, visit, None)

    def partial_only(item, body):
        body() if one_token and tile_tokens > 1 else pl.when(jnp.logical_not(whole(item)))(body)

    def leading_only(c, item, body):
        pl.when(leader(c, item) == c)(body) if shared else body()

    def start_read(c, item):
        def read():
            for pool in pools:
                pltpu.make_async_copy(stored(pool, item), pool.tile.at[c], pool.read.at[c]).start()

        def read_scales():
            for scale in scales:
                pltpu.make_async_copy(stored_unit(scale, item), scale.unit.at[c], scale.read.at[c]).start()

        partial_only(item, read)
        leading_only(c, item, read_scales)

    def blend_and_write(c, item):
        def blend():
            token = token_in_tile(tile_rows, shape.tokens_per_row, shape.lanes)
            mask = (token >= plan.first[item]) & (token < plan.last[item])
            for pool in pools:
                pltpu.make_async_copy(stored(pool, item), pool.tile.at[c], pool.read.at[c]).wait()
                for head in range(shape.kv_heads):
                    new = pool.new[c, head : head + 1] if one_token else pool.new[c, head]
                    pool.tile[c, head] = _blend(mask, new, pool.tile[c, head])
                pltpu.make_async_copy(pool.tile.at[c], stored(pool, item), pool.write.at[c]).start()

        partial_only(item, blend)
        if not one_token:

            @pl.when(whole(item))
            def _write_whole():
                for pool in pools:
                    pltpu.make_async_copy(pool.new.at[c], stored(pool, item), pool.write.at[c]).start()

    def blend_scales(c, item):
        def wait():
            for scale in scales:
                pltpu.make_async_copy(stored_unit(scale, item), scale.unit.at[c], scale.read.at[c]).wait()

        leading_only(c, item, wait)  # a leader comes before the tiles that it leads
        into = leader(c, item)
        page = plan.page[item] * shape.page_size % (unit * LANES)  # where in the rows the page's scales are
        token = _token_of_scale(shape, page, scales[0].unit.shape[1:]) - plan.row[item] * shape.tokens_per_row
        mask = (token >= plan.first[item]) & (token < plan.last[item])
        for scale in scales:
            new = scale.new[c]
            if one_token and unit > 1:
                new = jnp.broadcast_to(new[:, None], mask.shape)
            scale.unit[into] = jnp.where(mask, new, scale.unit[into])

    def write_scales(c, item):
        def write():
            for scale in scales:
                pltpu.make_async_copy(scale.unit.at[c], stored_unit(scale, item), scale.write.at[c]).start()

        leading_only(c, item, write)

    def finish(c, item):
        for pool in pools:  # blended or all new, a tile has the same bytes, and a wait counts nothing else
            pltpu.make_async_copy(pool.tile.at[c], stored(pool, item), pool.write.at[c]).wait()

        def finish_scales():
            for scale in scales:
                pltpu.make_async_copy(scale.unit.at[c], stored_unit(scale, item), scale.write.at[c]).wait()

        leading_only(c, item, finish_scales)

    each_tile(start_read)
    for x, pool, scale in zip(raw, pools, scales, strict=True) if raw else ():
        _quantize_rows(x, pool.new, scale.new, pools[0].tile.dtype)  # while the reads are on their way
    each_tile(blend_and_write)
    if quantized:
        each_tile(blend_scales)
        each_tile(write_scales)  # after the last tile that a leader leads
    each_tile(finish)


def _group(
    refs: Sequence[jax.Ref], one_token: bool, shared: bool, quantized: bool
) -> tuple[_Plan, list[_Pool], list[_Scales], list[jax.Ref]]:
    """The launch's refs as (_Plan, two _Pools, two or no _Scales, what is still to be quantised).

    `_launch_write` lists them in the order in which they are taken here: the plan, new tokens, pools as operands and as
    results, buffers like tiles, semaphores, and buffers for what is quantised.
    """
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    plan = _Plan(*take(5), leader=take(1)[0] if shared else None)
    count = 4 if quantized else 2
    here = quantized and one_token
    new = take(2 if here else count)
    take(count)  # the operands that the results alias
    stored, buffers, (read, write), made = take(count), take(count), take(2), take(4 if here else 0)
    raw, new = (new, made) if here else ([], new)
    of = lambda i: (stored[i], new[i], buffers[i], read.at[i], write.at[i])
    return plan, [_Pool(*of(i)) for i in range(2)], [_Scales(*of(i)) for i in range(2, count)], raw


def _quantize_rows(rows: jax.Ref, bits: jax.Ref, scales: jax.Ref, dtype: jnp.dtype) -> None:
    """Quantises rows [C, Hkv, W] f32 as `quantize_kv` does: into bits [C, Hkv, W] int32 and scales [C, Hkv, 128].

    A row's scale fills all 128 lanes. This is done in the kernel because XLA makes six small loops of it, which take
    longer than everything else around the kernel.
    """
    items, heads, lanes = rows.shape
    group = max(1, QUANTIZE_ELEMENTS // (round_up(heads, SUBLANES) * lanes))
    group = max(n for n in range(1, min(group, items) + 1) if items % n == 0)

    def quantize(i, _):
        at = pl.ds(i * group, group)
        values, scale = scaled_to(rows[at], dtype)
        bits[at] = fp8_bits(values) if dtype == jnp.float8_e4m3fn else values.astype(jnp.int32)
        scales[at] = jnp.broadcast_to(scale, (group, *scales.shape[1:]))

    lax.fori_loop(0, items // group, quantize, None)


def _blend(mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`old` [tile_rows, W], and `new` where `mask` is true: `new` is such a tile, or one row for all rows."""
    if new.dtype == jnp.int32:  # the bits of one 8-bit row: fp8 is never computed with
        bits = pltpu.bitcast(old, jnp.int8).astype(jnp.int32)
        blended = jnp.where(mask, jnp.broadcast_to(new, old.shape), bits).astype(jnp.int8)
        return pltpu.bitcast(blended, old.dtype)
    return jnp.where(mask, jnp.broadcast_to(new, old.shape).astype(old.dtype), old)


def _token_of_scale(shape: PoolShape, page: jax.Array, at: tuple[int, ...]) -> jax.Array:
    """Which token of its page each scale in rows of shape `at` belongs to: [Hkv, U, 128], or [Hkv, 128] where U is 1.

    The page's scales begin at number `page` of these rows. Scales of other pages in the same rows get tokens outside
    the page.
    """
    number = lax.broadcasted_iota(jnp.int32, at, len(at) - 1) - page
    if len(at) == 3:
        number = number + LANES * lax.broadcasted_iota(jnp.int32, at, 1)
    if shape.tokens_per_row == 1:
        return number
    second = number >= shape.rows  # packed: first come the first tokens of all rows
    return 2 * number - jnp.where(second, 2 * shape.rows - 1, 0)


def write_tiles_pallas(
    pools: tuple[jax.Array, ...],
    key: jax.Array,
    value: jax.Array,
    starts: jax.Array,
    ends: jax.Array,
    block_tables: jax.Array,
    layer: jax.Array,
    key_smoothing: jax.Array | None = None,
    stripes: Stripes | None = None,
    *,
    pool: PoolShape,
    interpret: Interpret = False,
) -> tuple[jax.Array, ...]:
    """Writes new tokens into stored pools [L, Hkv, N, rows, W] and their scales, in place.

    Arguments as in `write_kv_pages`; `pools` are key and value pages, and key and value scales where those are 8-bit.
    """
    dtype, new_tokens, quantized = pools[0].dtype, key.shape[1], len(pools) == 4
    tile_rows = choose_tile_rows(pool, new_tokens, dtype.itemsize)
    tiles = plan_tiles(starts, ends, block_tables, new_tokens, pool, tile_rows, stripes)
    new = tuple(align(x, tiles, tile_rows * pool.tokens_per_row) for x in (smooth(key, key_smoothing), value))
    if quantized and new_tokens > 1:  # after `align`: to gather scales is slow, and XLA of jax 0.12 dies of it
        made, unit = [quantize_kv(x, dtype) for x in new], scale_unit(pool)
        lanes = [spread_scales(scales, pool, max(pool.page_size, LANES)) for _, scales in made]
        new = (
            *(values for values, _ in made),
            *(x if unit == 1 else x.reshape(*x.shape[:2], unit, LANES) for x in lanes),
        )
    new = (*(as_stored_rows(x, pool) for x in new[:2]), *new[2:])
    if new_tokens == 1:  # f32, in which a row broadcasts over a tile at no cost; the values are exact in it
        new = tuple(x[:, :, 0].astype(jnp.float32) for x in new)
    plan = (tiles.page, tiles.row, tiles.first, tiles.last)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    for begin in range(0, tiles.page.shape[0], ITEMS_PER_LAUNCH):
        part = lambda x, begin=begin: x[begin : begin + ITEMS_PER_LAUNCH]
        pools = _launch_write(pools, jax.tree.map(part, plan), jax.tree.map(part, new), layer, pool, tile_rows,
                        new_tokens == 1, interpret)  # fmt: skip
    return pools


def _leaders(page: jax.Array, first: jax.Array, last: jax.Array, items: int, pool: PoolShape) -> jax.Array:
    """[M]: for each tile the first written tile of its step whose scales lie in the same rows."""
    rows = jnp.where(last > first, page * pool.page_size // LANES, -1).reshape(-1, items)
    same = rows[:, :, None] == rows[:, None, :]
    return jnp.min(jnp.where(same, jnp.arange(items, dtype=jnp.int32), items), axis=-1).reshape(-1)


def _launch_write(
    pools: tuple[jax.Array, ...],
    plan: tuple[jax.Array, ...],
    new: tuple[jax.Array, ...],
    layer: jax.Array,
    pool: PoolShape,
    tile_rows: int,
    one_token: bool,
    interpret: Interpret,
) -> tuple[jax.Array, ...]:
    """One launch of `_update_kernel` over some tiles.

    Args:
      pools: key and value pages, and their scales where they are 8-bit.
      plan: page, row, first and last of each tile, see `Tiles`.
      new: the new tokens in the form of `_Pool.new`, and their scales in that of `_Scales.new`.

    Returns:
      `pools`, written.
    """
    count, dtype, quantized = plan[0].shape[0], pools[0].dtype, len(pools) == 4
    items = min(count, ITEMS_PER_STEP, max(1, VMEM_BUDGET // tile_bytes(pool, tile_rows, dtype.itemsize)))
    steps = pl.cdiv(count, items)
    pad = steps * items - count
    if pad:  # first == last == 0: untouched
        plan, new = jax.tree.map(lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)), (plan, new))
    # Tiles of one token lie in pages of different sequences. From 128 tokens a page on, no two pages share a row.
    shared = quantized and items > 1 and not (one_token and pool.page_size >= LANES)
    page, _, first, last = plan
    leaders = (_leaders(page, first, last, items, pool),) if shared else ()

    block = lambda x: pl.BlockSpec((items, *x.shape[1:]), lambda i, *_: (i,) + (0,) * (x.ndim - 1))
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    scalars = (layer, *plan, *leaders)
    # Pinned to HBM, or XLA moves a pool that fits into VMEM there and back. The extra axis is for jax 0.10: its XLA
    # refuses a pinned operand that is the program's parameter and result as it stands, but takes a reshape of one.
    # A row of scales gets an axis of its own, so that a DMA can name it; to XLA that is a bitcast.
    named_rows = [x.reshape(*x.shape[:3], 1, LANES) for x in pools[2:]]
    stored = in_hbm(*(x[None] for x in (*pools[:2], *named_rows)), interpret=interpret)
    operands = (*scalars, *new, *stored)
    unit = scale_unit(pool)
    tile = pltpu.VMEM((items, pool.kv_heads, tile_rows, pool.lanes), dtype)
    rows = pltpu.VMEM((items, pool.kv_heads, *((unit,) if unit > 1 else ()), LANES), jnp.float32)
    made = []
    if quantized and one_token:
        made += [pltpu.VMEM((items, pool.kv_heads, pool.lanes), jnp.int32)] * 2
        made += [pltpu.VMEM((items, pool.kv_heads, LANES), jnp.float32)] * 2
    semaphores = pltpu.SemaphoreType.DMA((len(pools), items))
    written = pl.pallas_call(
        functools.partial(
            _update_kernel, shape=pool, tile_rows=tile_rows, items=items, one_token=one_token, shared=shared,
            quantized=quantized,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(steps,),
            in_specs=[*map(block, new), *(in_place for _ in stored)],
            out_specs=[in_place for _ in stored],
            scratch_shapes=[tile, tile, *(rows for _ in pools[2:]), semaphores, semaphores, *made],
        ),
        out_shape=[out_struct(x.shape, x.dtype, *operands) for x in stored],
        input_output_aliases={len(scalars) + len(new) + i: i for i in range(len(stored))},
        interpret=interpret,
        name="kv_cache_update",
    )(*operands)  # fmt: skip
    return tuple(x.reshape(pool.shape) for x, pool in zip(written, pools, strict=True))
