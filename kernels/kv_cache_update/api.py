"""Writing new tokens into stored page pools, one chip's worth."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from paged_dist._errors import require
from paged_dist.kernels._dispatch import Interpret, as_kernel_dtype, as_stored_dtype, dispatch
from paged_dist.kernels.kv_cache_update.kernel import write_tiles_pallas
from paged_dist.kernels.kv_cache_update.tiles import pool_shape
from paged_dist.kernels.kv_cache_update.xla import write_tiles_xla


def write_kv_pages(
    key_pages: jax.Array,
    value_pages: jax.Array,
    key: jax.Array,
    value: jax.Array,
    starts: jax.Array,
    ends: jax.Array,
    block_tables: jax.Array,
    layer: jax.Array | int | None = None,
    *,
    interpret: Interpret = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes new tokens' keys and values into their pages, in place where the pools are donated.

    Each touched page is read, blended and written back in aligned tiles by DMA; tiles that are all new are only
    written. Nothing else of the pools moves.

    Args:
      key_pages, value_pages: [L, Hkv, N, R, W], the stored form: a page of one head is R rows of W lanes, one
        token a row at head_dim D = W, W // D consecutive tokens a row below. uint16 are the bits of bf16.
      key, value: [B, T, Hkv, D], any float dtype; cast to the pool's. Row t becomes token starts[b] + t.
      starts: [B] int32, position of the first new token (0-based); a negative one writes nothing.
      ends: [B] int32, one past the last token to write; at most starts + T are.
      block_tables: [B, S] int32 page ids; a page whose id lies outside [0, N), or a position past S pages, is
        not written.
      layer: int32 scalar, traced or not, below L; None is 0.
      interpret: see `paged_dist.kernels._dispatch.dispatch`.

    Returns:
      The two pools. Two sequences must not write the same page in one call.

    Raises:
      ValueError: shapes that disagree.
    """
    batch, _, kv_heads, head_dim = key.shape
    require(key.shape == value.shape, "value.shape", value.shape, f"must equal key.shape {key.shape}")
    require(
        key_pages.shape == value_pages.shape and key_pages.dtype == value_pages.dtype,
        "value_pages.shape",
        value_pages.shape,
        f"must equal key_pages' {key_pages.shape} {key_pages.dtype}",
    )
    require(
        kv_heads == key_pages.shape[1],
        "key.shape",
        key.shape,
        f"axis 2 must be the pool's {key_pages.shape[1]} kv heads",
    )
    require(
        key_pages.shape[-1] % head_dim == 0,
        "key.shape",
        key.shape,
        f"head_dim must divide the pool's row of {key_pages.shape[-1]}",
    )
    for name, array, shape in (
        ("starts", starts, (batch,)),
        ("ends", ends, (batch,)),
        ("block_tables", block_tables, (batch, *block_tables.shape[-1:])),
    ):
        require(array.shape == shape, f"{name}.shape", array.shape, f"must be {shape}")
        require(jnp.issubdtype(array.dtype, jnp.integer), f"{name}.dtype", array.dtype, "must be an integer dtype")
    pool = pool_shape(key_pages, head_dim)
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    stored = key_pages.dtype
    options = dict(pool=pool)

    def kernel(key_pages, value_pages, key, value, *rest, interpret):
        pools = as_kernel_dtype(key_pages, value_pages, key, value)
        return as_stored_dtype(stored, *write_tiles_pallas(*pools, *rest, **options, interpret=interpret))

    return dispatch(
        kernel,
        functools.partial(write_tiles_xla, **options),
        key_pages,
        value_pages,
        *as_stored_dtype(stored, key, value),
        starts.astype(jnp.int32),
        ends.astype(jnp.int32),
        block_tables.astype(jnp.int32),
        layer,
        interpret=interpret,
    )
