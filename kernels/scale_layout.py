"""How the scales of 8-bit pages are stored: 128 to a row, so that a kernel's DMA takes them and XLA pads nothing.

    as users pass them                           f32 [..., Hkv, N, P], one for each token and kv head
    as a cache holds them and the kernels read   f32 [..., Hkv, N * P / 128, 128], in the order of `pack_scales`

The rule of which sizes fit, the checks of both forms and the way from one to the other are here. Who changes the layout
changes other files too. What knows the order of a page's scales:

    kernels/decode/scales.py                     the decode kernel's reader
    kernels/attention/xla_form.py                its XLA form: `_gather_scales`
    kernels/cache_update/tiles.py                the write: `spread_scales`
    kernels/cache_update/kernel.py               the write on TPU: `_token_of_scale`
    kernels/cache_update/xla_form.py             the write in XLA: `write_scales`
    paged_dist/transfer/manifest.py              pages are saved as stored, so another order needs another `FORMAT`

What knows that rows are cut at 128 scales, and that a page's scales lie side by side:

    kernels/decode/                              scales, copy_schedule, launch_plan, iteration, traffic, refs
    kernels/cache_update/                        kernel, tiles, page_copy, xla_form
    kernels/attention/                           xla_form
    paged_dist/cache/                            spec, pools
    paged_dist/transfer/                         staging, exchange, device_io
    launch/                                      planning/pool_copies, kernel_report
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from paged_dist._compat import reshape_minor
from paged_dist._errors import bad_value, require
from paged_dist.kernels.tiling import LANES, SUBLANES


def check_scale_rows(num_pages: int, page_size: int, argument: str = "page_size") -> None:
    """Raises ValueError where a pool's scales do not fill whole rows of 128, or a page's would straddle two."""
    fits = page_size % LANES == 0 or LANES % page_size == 0
    rule = "with int8 and fp8 must divide 128 or be a multiple of it, for scales are stored 128 to a row"
    require(fits, argument, page_size, rule)
    pages = max(1, LANES // page_size)  # that share a row
    require(
        num_pages % pages == 0,
        "num_pages",
        num_pages,
        f"with int8 and fp8 at page_size {page_size} must be a multiple of {pages} on each shard, for {pages} pages "
        "share a row of scales",
    )


def scale_rows(num_pages: int, page_size: int) -> int:
    """Rows of 128 that the scales of `num_pages` pages of one head take."""
    return num_pages * page_size // LANES


def rows_of_page(page_size: int) -> int:
    """Rows of 128 that hold the scales of one page of one head; pages of 64 tokens and less share a row."""
    return max(1, page_size // LANES)


def pages_of_whole_tiles(page_size: int) -> int:
    """How many pages' scales fill whole tiles of (8, 128): a shard has a multiple of them.

    Another number of rows XLA would lay out in a way that every call copies.
    """
    return math.lcm(SUBLANES * LANES, page_size) // page_size


def check_scales(key_scales: jax.Array | None, value_scales: jax.Array | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the scales of keys and of values are both given, f32, of this shape."""
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        if scales is None:
            raise bad_value(name, None, "8-bit pages need both key_scales and value_scales")
        require(scales.shape == shape, f"{name}.shape", scales.shape, f"must be {shape}, one for each token and head")
        require(scales.dtype == jnp.float32, f"{name}.dtype", jnp.dtype(scales.dtype).name, "must be float32")


def check_stored_scales(
    key_scales: jax.Array | None,
    value_scales: jax.Array | None,
    layers_and_heads: tuple[int, int],
    *,
    num_pages: int,
    page_size: int,
) -> None:
    """Raises ValueError unless both scales are given as `pack_scales` stores them: f32 [L, Hkv, N * P / 128, 128]."""
    check_scale_rows(num_pages, page_size)
    check_scales(key_scales, value_scales, (*layers_and_heads, scale_rows(num_pages, page_size), LANES))


def pack_scales(scales: jax.Array, tokens_per_row: int = 1) -> jax.Array:
    """Scales [..., N, P] as they are stored, [..., N * P / 128, 128].

    `tokens_per_row` is 2 where the stored head_dim is 64, else 1. Where two tokens share a row of the pool, a page has
    first the scales of all rows' first tokens, then those of their second tokens: as the kernel's scores lie side by
    side. A page of tokens 0 to 3:

        tokens_per_row    K's (and V's) rows          scales, in this order
        1                 [0], [1], [2], [3]          0 1 2 3
        2                 [0 1], [2 3]                0 2 1 3

    In general token t of page n is number n * P + (t % tokens_per_row) * R + t // tokens_per_row, counted through all
    rows of 128, with R = P / tokens_per_row.
    """
    *lead, pages, page_size = scales.shape
    if tokens_per_row > 1:
        scales = reshape_minor(scales, (*lead, pages, page_size // tokens_per_row, tokens_per_row))
        scales = jnp.swapaxes(scales, -1, -2)
    return reshape_minor(scales, (*lead, scale_rows(pages, page_size), LANES))


def unpack_scales(stored: jax.Array, page_size: int, tokens_per_row: int = 1) -> jax.Array:
    """The inverse of `pack_scales`: [..., N, P]."""
    *lead, rows, lanes = stored.shape
    pages = rows * lanes // page_size
    if tokens_per_row > 1:
        stored = reshape_minor(stored, (*lead, pages, tokens_per_row, page_size // tokens_per_row))
        stored = jnp.swapaxes(stored, -1, -2)
    return reshape_minor(stored, (*lead, pages, page_size))
