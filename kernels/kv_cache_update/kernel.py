"""The write on TPU: DMA aligned tiles out of the pool, blend the new tokens in, DMA them back, in place."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist._compat import out_struct
from paged_dist.kernels._dispatch import Interpret, in_hbm
from paged_dist.kernels.kv_cache_update.tiles import (
    ITEMS_PER_STEP,
    VMEM_BUDGET,
    PoolShape,
    Tiles,
    choose_tile_rows,
    plan_tiles,
    tile_bytes,
    token_in_tile,
)

ITEMS_PER_LAUNCH = 32768  # four int32 a tile in SMEM: half of its 1 MiB


class _Pool(NamedTuple):
    """One of the two pools inside the kernel."""

    pages: jax.Ref  # [1, L, Hkv, N, rows, W] in HBM, aliased to the operand
    new: jax.Ref  # [C, Hkv, tile_rows, W] in the pool's dtype, or [C, Hkv, W] float32: one token a tile
    tile: jax.Ref  # [C, Hkv, tile_rows, W] what was read, then what is written
    read: jax.Ref  # [C] DMA semaphores
    write: jax.Ref  # [C]


def _update_kernel(
    layer_ref,
    page_ref,
    row_ref,
    first_ref,
    last_ref,
    new_key,
    new_value,
    _key_in,
    _value_in,
    key_pages,
    value_pages,
    key_tile,
    value_tile,
    reads,
    writes,
    *,
    shape: PoolShape,
    tile_rows: int,
    items: int,
):
    """One grid step: `items` tiles, all their DMAs in flight together."""
    step = pl.program_id(0)
    pools = (
        _Pool(key_pages, new_key, key_tile, reads.at[0], writes.at[0]),
        _Pool(value_pages, new_value, value_tile, reads.at[1], writes.at[1]),
    )
    tile_tokens = tile_rows * shape.tokens_per_row
    one_token = len(new_key.shape) == 3
    layer = layer_ref[0]

    def stored(pool: _Pool, item) -> jax.Ref:
        row = pl.multiple_of(row_ref[item], tile_rows)
        return pool.pages.at[0, layer, :, page_ref[item], pl.ds(row, tile_rows), :]

    def touched(item):
        return last_ref[item] > first_ref[item]

    def whole(item):  # every token is new: nothing to read, and the new rows go out as they came in
        return last_ref[item] - first_ref[item] == tile_tokens

    def each_tile(body):
        def visit(c, _):
            item = step * items + c
            pl.when(touched(item))(functools.partial(body, c, item))

        lax.fori_loop(0, items, visit, None)

    def partial_only(item, body):
        body() if one_token and tile_tokens > 1 else pl.when(jnp.logical_not(whole(item)))(body)

    def start_read(c, item):
        def read():
            for pool in pools:
                pltpu.make_async_copy(stored(pool, item), pool.tile.at[c], pool.read.at[c]).start()

        partial_only(item, read)

    def blend_and_write(c, item):
        def blend():
            token = token_in_tile(tile_rows, shape.tokens_per_row, shape.lanes)
            mask = (token >= first_ref[item]) & (token < last_ref[item])
            for pool in pools:
                pltpu.make_async_copy(stored(pool, item), pool.tile.at[c], pool.read.at[c]).wait()
                for head in range(shape.kv_heads):
                    new = pool.new[c, head : head + 1] if one_token else pool.new[c, head]
                    new = jnp.broadcast_to(new, (tile_rows, shape.lanes)).astype(pool.tile.dtype)
                    pool.tile[c, head] = jnp.where(mask, new, pool.tile[c, head])
                pltpu.make_async_copy(pool.tile.at[c], stored(pool, item), pool.write.at[c]).start()

        partial_only(item, blend)
        if not one_token:

            @pl.when(whole(item))
            def _write_whole():
                for pool in pools:
                    pltpu.make_async_copy(pool.new.at[c], stored(pool, item), pool.write.at[c]).start()

    def finish(c, item):
        for pool in pools:  # both sources have the tile's bytes, and a wait counts only those
            pltpu.make_async_copy(pool.tile.at[c], stored(pool, item), pool.write.at[c]).wait()

    each_tile(start_read)
    each_tile(blend_and_write)
    each_tile(finish)


def write_tiles_pallas(
    key_pages: jax.Array,
    value_pages: jax.Array,
    key: jax.Array,
    value: jax.Array,
    starts: jax.Array,
    ends: jax.Array,
    block_tables: jax.Array,
    layer: jax.Array,
    *,
    pool: PoolShape,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array]:
    """Writes new tokens into stored pools [L, Hkv, N, rows, W], in place; arguments as in `write_kv_pages`."""
    itemsize = key_pages.dtype.itemsize
    tile_rows = choose_tile_rows(pool, key.shape[1], itemsize)
    tiles = plan_tiles(key, value, starts, ends, block_tables, pool, tile_rows)
    if key.shape[1] == 1:  # a row of f32 broadcasts over a tile for nothing; the values are exact in it
        tiles = tiles._replace(
            key=tiles.key[:, :, 0].astype(jnp.float32), value=tiles.value[:, :, 0].astype(jnp.float32)
        )
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    for begin in range(0, tiles.page.shape[0], ITEMS_PER_LAUNCH):
        part = Tiles(*(x[begin : begin + ITEMS_PER_LAUNCH] for x in tiles))
        key_pages, value_pages = _launch(key_pages, value_pages, part, layer, pool, tile_rows, interpret)
    return key_pages, value_pages


def _launch(key_pages, value_pages, tiles: Tiles, layer, pool: PoolShape, tile_rows: int, interpret: Interpret):
    count = tiles.page.shape[0]
    items = min(count, ITEMS_PER_STEP, max(1, VMEM_BUDGET // tile_bytes(pool, tile_rows, key_pages.dtype.itemsize)))
    steps = -(-count // items)
    pad = steps * items - count
    if pad:  # first == last == 0: untouched
        tiles = Tiles(*(jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)) for x in tiles))

    new_block = pl.BlockSpec((items, *tiles.key.shape[1:]), lambda i, *_: (i,) + (0,) * (tiles.key.ndim - 1))
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    scalars = (layer, tiles.page, tiles.row, tiles.first, tiles.last)
    # Pinned to HBM, or XLA moves a pool that fits into VMEM there and back. The extra axis is for jax 0.10: its XLA
    # refuses a pinned operand that is the program's parameter and result as it stands, but takes a reshape of one.
    pools = in_hbm(key_pages[None], value_pages[None], interpret=interpret)
    operands = (*scalars, tiles.key, tiles.value, *pools)
    tile = pltpu.VMEM((items, pool.kv_heads, tile_rows, pool.lanes), key_pages.dtype)
    written = pl.pallas_call(
        functools.partial(_update_kernel, shape=pool, tile_rows=tile_rows, items=items),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(steps,),
            in_specs=[new_block, new_block, in_place, in_place],
            out_specs=[in_place, in_place],
            scratch_shapes=[tile, tile, pltpu.SemaphoreType.DMA((2, items)), pltpu.SemaphoreType.DMA((2, items))],
        ),
        out_shape=[
            out_struct(pools[0].shape, key_pages.dtype, *operands),
            out_struct(pools[1].shape, value_pages.dtype, *operands),
        ],
        input_output_aliases={len(scalars) + 2: 0, len(scalars) + 3: 1},
        interpret=interpret,
        name="kv_cache_update",
    )(*operands)
    return tuple(pages.reshape(key_pages.shape) for pages in written)
