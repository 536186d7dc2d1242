"""The write of tokens and their scales as XLA operations, for CPU and GPU: gather the tiles, blend, scatter them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paged_dist.kernels.cache_update.tiles import (
    PoolShape,
    align,
    as_stored_rows,
    plan_tiles,
    spread_scales,
    token_in_tile,
)
from paged_dist.kernels.dispatch import as_stored_dtype, meant_dtype
from paged_dist.kernels.quantization import quantize_kv, smooth
from paged_dist.kernels.stripes import Stripes


def write_tiles_xla(
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
) -> tuple[jax.Array, ...]:
    """Same arguments and results as `write_tiles_pallas`. A tile is one row where T is 1, else a whole page."""
    new_tokens, tokens_per_row = key.shape[1], pool.tokens_per_row
    tile_rows = 1 if new_tokens == 1 else pool.rows
    tiles = plan_tiles(starts, ends, block_tables, new_tokens, pool, tile_rows, stripes)
    mask = tiles.blend_mask(tile_rows, tokens_per_row, pool.lanes)
    writes = (tiles.last > tiles.first) & (layer >= 0) & (layer < pool.layers)
    target = jnp.where(writes, tiles.page, pool.pages)  # out of range: dropped

    def write(pages: jax.Array, new: jax.Array) -> jax.Array:
        new = as_stored_rows(new, pool)
        if tile_rows == pool.rows:
            old = pages[layer, :, tiles.page]  # [M, Hkv, rows, W]
            return pages.at[layer, :, target].set(jnp.where(mask, new, old), mode="drop")
        old = pages[layer, :, tiles.page, tiles.row][:, :, None]  # [M, Hkv, 1, W]
        return pages.at[layer, :, target, tiles.row].set(jnp.where(mask, new, old)[:, :, 0], mode="drop")

    def write_scales(stored: jax.Array, new: jax.Array) -> jax.Array:
        scales = stored.reshape(pool.layers, pool.kv_heads, pool.pages, pool.page_size)
        if new_tokens == 1:
            lane = tiles.row + tiles.first * pool.rows  # one row, `first` is which of its tokens
            return scales.at[layer, :, target, lane].set(new[:, :, 0], mode="drop").reshape(stored.shape)
        new = spread_scales(new, pool, pool.page_size)  # [M, Hkv, P]
        token = token_in_tile(tile_rows, tokens_per_row, tokens_per_row).T.reshape(-1)  # [P] as stored
        live = ((token >= tiles.first[:, None]) & (token < tiles.last[:, None]))[:, None]
        blended = jnp.where(live, new, scales[layer, :, tiles.page])
        return scales.at[layer, :, target].set(blended, mode="drop").reshape(stored.shape)

    key, value = (align(x, tiles, tile_rows * tokens_per_row) for x in (smooth(key, key_smoothing), value))
    if len(pools) == 2:
        return tuple(map(write, pools, (key, value)))
    (key, key_scales), (value, value_scales) = (quantize_kv(x, meant_dtype(pools[0].dtype)) for x in (key, value))
    new = as_stored_dtype(pools[0].dtype, key, value)
    return (*map(write, pools[:2], new), *map(write_scales, pools[2:], (key_scales, value_scales)))
