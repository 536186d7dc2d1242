"""Which tiles of stored rows new tokens fall in, planned in XLA; new tokens and scales in the order of those tiles.

A DMA cannot write one token's row into a page: in HBM rows are packed into (8, 128) tiles. So a write reads an aligned
tile, blends the new tokens in and writes the tile back. The plan, made from starts, ends and page tables, lists the
tiles; a tile with `first == last` gets no token. The Pallas kernel and the XLA form both follow it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from paged_dist.kernels.scale_layout import rows_of_page
from paged_dist.kernels.stripes import Stripes
from paged_dist.kernels.tiling import LANES, SUBLANES

VMEM_BUDGET = 8 * 2**20  # bytes for a launch's buffers: half of the smallest chip's default scope
ITEMS_PER_STEP = 32  # tiles whose DMAs are in flight together: enough to hide 600 ns of latency at 1.6 TB/s


class PoolShape(NamedTuple):
    """A stored pool [L, Hkv, N, rows, lanes] and the head_dim of its tokens."""

    layers: int
    kv_heads: int
    pages: int
    rows: int  # R: rows a page
    lanes: int  # W: tokens_per_row * head_dim
    head_dim: int

    @property
    def tokens_per_row(self) -> int:
        """Tokens side by side in one stored row."""
        return self.lanes // self.head_dim

    @property
    def page_size(self) -> int:
        """P, tokens a page."""
        return self.rows * self.tokens_per_row


def pool_shape(pool: jax.Array, head_dim: int) -> PoolShape:
    """The PoolShape of a stored pool [L, Hkv, N, rows, lanes]."""
    layers, kv_heads, pages, rows, lanes = pool.shape
    return PoolShape(layers, kv_heads, pages, rows, lanes, head_dim)


class Tiles(NamedTuple):
    """The tiles of a write: M = B * tiles_per_sequence of them, sequence-major."""

    page: jax.Array  # [M] int32, in [0, N)
    row: jax.Array  # [M] int32, first stored row inside the page, a multiple of tile_rows
    first: jax.Array  # [M] int32, first token written, counted from the tile's start
    last: jax.Array  # [M] int32, one past the last token written; == first where nothing is written
    source: jax.Array  # [M] int32, which new token is the tile's first; may be negative or past the last

    def blend_mask(self, tile_rows: int, tokens_per_row: int, lanes: int) -> jax.Array:
        """[M, 1, tile_rows, W] bool: which stored elements are replaced."""
        token = token_in_tile(tile_rows, tokens_per_row, lanes)
        at = lambda x: x[:, None, None, None]
        return (token >= at(self.first)) & (token < at(self.last))


def token_in_tile(tile_rows: int, tokens_per_row: int, lanes: int) -> jax.Array:
    """[tile_rows, lanes] int32: which token of the tile each stored element belongs to."""
    row = lax.broadcasted_iota(jnp.int32, (tile_rows, lanes), 0)
    if tokens_per_row == 1:
        return row
    return row * tokens_per_row + lax.broadcasted_iota(jnp.int32, (tile_rows, lanes), 1) // (lanes // tokens_per_row)


def choose_tile_rows(pool: PoolShape, new_tokens: int, itemsize: int) -> int:
    """Rows of a tile: the fewest that a DMA takes where a few tokens are written, up to a page for a prompt.

    Mosaic takes 8 rows of any dtype, 8-bit ones too. A prompt's tile is the largest 8 * 2^k rows that divide a page
    and leave the launch within VMEM_BUDGET, so that most tiles are written whole and never read.
    """
    rows = math.gcd(pool.rows, SUBLANES)
    if new_tokens <= 2 * rows * pool.tokens_per_row:
        return rows
    while rows * 2 <= pool.rows and pool.rows % (rows * 2) == 0 and tile_bytes(pool, rows * 2, itemsize) <= VMEM_BUDGET:
        rows *= 2
    return rows


def scale_unit(pool: PoolShape) -> int:
    """U, the rows of 128 scales that are read and written together: a page's rows, or the one that pages share."""
    return rows_of_page(pool.page_size)


def tile_bytes(pool: PoolShape, tile_rows: int, itemsize: int) -> int:
    """VMEM that one tile in flight takes: for K and for V a buffer, and the new rows, which are double-buffered.

    8-bit tiles have their scales beside them. Where one token is written, its row and scale are 32-bit numbers.
    """
    row = pool.lanes * itemsize
    scales = scale_unit(pool) * LANES * 4 if itemsize == 1 else 0
    new = max(tile_rows * row, 4 * pool.lanes)
    return 2 * pool.kv_heads * (tile_rows * row + 2 * new + 3 * scales)


def plan_tiles(
    starts: jax.Array,
    ends: jax.Array,
    block_tables: jax.Array,
    new_tokens: int,
    pool: PoolShape,
    tile_rows: int,
    stripes: Stripes | None = None,
) -> Tiles:
    """The tiles that tokens [starts, ends) of each sequence fall in.

    Args:
      starts, ends: [B] int32; a negative start writes nothing, nor do tokens from starts + new_tokens on.
      block_tables: [B, S] int32; tokens past S pages and pages with ids outside [0, N) are not written.
      new_tokens: T, the most new tokens of a sequence.
      pool: the stored pool.
      tile_rows: rows of a tile, a divisor of `pool.rows`.
      stripes: which pages the table's columns are, where sequences lie on several chips: the tiles are of this chip's
        pages alone. starts and ends still count the sequence's tokens.
    """
    tile, page_size = tile_rows * pool.tokens_per_row, pool.page_size
    stride = 1 if stripes is None else stripes.stride
    most = min(new_tokens, -(-((new_tokens + page_size - 2) // page_size + 1) // stride) * page_size)  # that lie here
    count = 1 if new_tokens == 1 else (most + tile - 2) // tile + 1  # the first may lie anywhere in a tile
    width = block_tables.shape[1]
    live = (starts >= 0) & (
        starts < min(width * stride * page_size, 2**31 - 1)
    )  # past the table nothing is written, nor int32 overrun
    start = jnp.where(live, starts, 0)
    here = start if stripes is None else stripes.tokens_before(start, page_size)
    origin = here // tile * tile  # [B] first token of the first tile, of those that lie here
    tile_start = origin[:, None] + tile * jnp.arange(count, dtype=jnp.int32)  # [B, count]
    end = jnp.where(live, jnp.minimum(ends, starts + new_tokens), 0)

    slot = tile_start // page_size
    token = tile_start if stripes is None else stripes.token(slot, tile_start % page_size, page_size)
    if count <= 3:  # a fused compare and sum; XLA's gather on TPU is a launch of its own
        hit = slot[:, :, None] == jnp.arange(width, dtype=jnp.int32)
        page = jnp.sum(jnp.where(hit, block_tables[:, None], 0), axis=-1)
    else:
        page = jnp.take_along_axis(block_tables, jnp.clip(slot, 0, width - 1), axis=1, mode="promise_in_bounds")
    owned = (slot < width) & (page >= 0) & (page < pool.pages)
    first = jnp.clip(start[:, None] - token, 0, tile)
    last = jnp.where(owned, jnp.clip(end[:, None] - token, first, tile), first)

    flat = lambda x: x.reshape(-1).astype(jnp.int32)
    return Tiles(
        page=flat(jnp.clip(page, 0, pool.pages - 1)),
        row=flat(tile_start % page_size // pool.tokens_per_row),
        first=flat(first),
        last=flat(last),
        source=flat(token - starts[:, None]),
    )


def align(new: jax.Array, tiles: Tiles, tile: int) -> jax.Array:
    """Tokens [B, T, Hkv, D] as tiles of `tile` tokens, [M, Hkv, tile, D]; as [M, Hkv, 1, D] where T = 1.

    Token j of a tile is new token `source` + j. Where there is no such token it is some other one, which `first` and
    `last` mask.
    """
    batch, new_tokens, kv_heads, head_dim = new.shape
    new = jnp.swapaxes(new, 1, 2)
    if new_tokens == 1:
        return new
    count = tiles.page.shape[0] // batch
    source = (tiles.source[:, None] + jnp.arange(tile, dtype=jnp.int32)).reshape(batch, count * tile)
    source = jnp.clip(source, 0, new_tokens - 1)[:, None, :, None]
    rows = jnp.take_along_axis(new, source, axis=2, mode="promise_in_bounds")
    rows = rows.reshape(batch, kv_heads, count, tile, head_dim)
    return jnp.swapaxes(rows, 1, 2).reshape(batch * count, kv_heads, tile, head_dim)


def as_stored_rows(tokens: jax.Array, pool: PoolShape) -> jax.Array:
    """The tiles of `align` as stored rows, [M, Hkv, tile_rows, W]. A lone token fills every place of its one row."""
    if tokens.shape[2] == 1:
        return jnp.tile(tokens, (1, 1, 1, pool.tokens_per_row))
    return tokens.reshape(*tokens.shape[:2], -1, pool.lanes)


def spread_scales(scales: jax.Array, pool: PoolShape, lanes: int) -> jax.Array:
    """Scales of tiles [M, Hkv, tile] in the order of `pack_scales`, repeated to [M, Hkv, lanes], a multiple of P.

    Repeated, because a mask can then pick the tile's place in its page, and nothing has to be shifted. That works
    because a tile's scales lie side by side wherever in the page the tile lies (of two tokens a row: those of the rows'
    first tokens do, and those of their second tokens).
    """
    rows = jnp.swapaxes(scales.reshape(*scales.shape[:2], -1, pool.tokens_per_row), -1, -2)
    page = jnp.tile(rows, pool.rows // rows.shape[-1]).reshape(*rows.shape[:2], pool.page_size)
    return jnp.tile(page, lanes // pool.page_size)
