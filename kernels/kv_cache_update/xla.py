"""The write as XLA operations, for CPU and GPU: gather the tiles, blend, scatter them back."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paged_dist.kernels.kv_cache_update.tiles import PoolShape, plan_tiles


def write_tiles_xla(
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
) -> tuple[jax.Array, jax.Array]:
    """Same arguments and results as `write_tiles_pallas`. One token is one row here, more are whole pages."""
    tile_rows = 1 if key.shape[1] == 1 else pool.rows
    tiles = plan_tiles(key, value, starts, ends, block_tables, pool, tile_rows)
    mask = tiles.blend_mask(tile_rows, pool.tokens_per_row, pool.lanes)
    target = jnp.where(tiles.last > tiles.first, tiles.page, pool.pages)  # out of range: dropped

    def write(pages: jax.Array, new: jax.Array) -> jax.Array:
        if tile_rows == pool.rows:
            old = pages[layer, :, tiles.page]  # [M, Hkv, rows, W]
            return pages.at[layer, :, target].set(jnp.where(mask, new, old), mode="drop")
        old = pages[layer, :, tiles.page, tiles.row][:, :, None]  # [M, Hkv, 1, W]
        return pages.at[layer, :, target, tiles.row].set(jnp.where(mask, new, old)[:, :, 0], mode="drop")

    return write(key_pages, tiles.key), write(value_pages, tiles.value)
