"""`write_kv_pages`: writes new tokens into the stored page pools of one chip."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from paged_dist._errors import require
from paged_dist.kernels.cache_update.kernel import write_tiles_pallas
from paged_dist.kernels.cache_update.tiles import PoolShape, pool_shape
from paged_dist.kernels.cache_update.xla_form import write_tiles_xla
from paged_dist.kernels.dispatch import Interpret, as_kernel_dtype, as_stored_dtype, dispatch, meant_dtype
from paged_dist.kernels.quantization import is_quantized
from paged_dist.kernels.scale_layout import check_stored_scales
from paged_dist.kernels.stripes import Stripes


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
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
    key_smoothing: jax.Array | None = None,
    stripes: Stripes | None = None,
    interpret: Interpret = None,
) -> tuple[jax.Array, ...]:
    """Writes the keys and values of new tokens into their pages, in place where the pools are donated.

    On TPU the kernel reads the aligned tiles of stored rows that the tokens fall in by DMA, blends the tokens in and
    writes the tiles back. Tiles of which every row is new are written only. Into 8-bit pools it writes the tokens as
    `quantize_kv` makes them, and their scales likewise, in rows of 128. Nothing else of the pools moves.

    Args:
      key_pages, value_pages: [L, Hkv, N, R, W], the stored form: a page of one head is R rows of W lanes. A row holds
        W // D consecutive tokens: one, or two at head_dim D = 64. bf16, f32, int8 or float8_e4m3fn; uint16 and uint8
        are the bits of bf16 and fp8.
      key, value: [B, T, Hkv, D], any float dtype; cast to the pool's. Row t becomes token starts[b] + t.
      starts: [B] int32, position of the first new token (0-based); a negative one writes nothing.
      ends: [B] int32, one past the last token to write; at most starts + T are.
      block_tables: [B, S] int32 page ids; a page whose id lies outside [0, N), or a position past S pages, is
        not written. No two sequences may write one page in one call: tokens would be lost.
      layer: int32 scalar, traced or not; None is 0. Outside [0, L) nothing is written.
      key_scales, value_scales: [L, Hkv, N * P / 128, 128] f32 of 8-bit pools, as `pack_scales` stores them.
      key_smoothing: [Hkv, D], divides the keys before they are quantised.
      stripes: which pages the table's columns are, where a sequence's pages lie on several chips. starts and ends still
        count the sequence's tokens; tokens whose pages lie on other chips are not written.
      interpret: see `paged_dist.kernels.dispatch.dispatch`.

    Returns:
      The two pools, and where they are 8-bit the two scales.

    Raises:
      ValueError: shapes that disagree; 8-bit pools without scales, others with scales or a smoothing.

    Example:
      >>> pool = jnp.zeros((1, 1, 4, 8, 128))  # one layer, one head, 4 pages of 8 tokens, head_dim 128
      >>> new = jnp.ones((1, 2, 1, 128))  # two tokens of one sequence
      >>> starts, ends, block_tables = jnp.array([7]), jnp.array([9]), jnp.array([[3, 1]])
      >>> write = jax.jit(kernels.write_kv_pages)
      >>> key_pages, value_pages = write(pool, pool, new, new, starts, ends, block_tables)
      >>> jnp.argwhere(key_pages[0, 0, :, :, 0]).tolist()  # [page, token in it] of tokens 8 and 7
      [[1, 0], [3, 7]]
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
    _check_written_scales(pool, key_pages.dtype, key_scales, value_scales, key_smoothing)
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    stored, quantized = key_pages.dtype, key_scales is not None
    pools = (key_pages, value_pages, key_scales, value_scales)[: 4 if quantized else 2]
    last = (key_smoothing, stripes)
    if not quantized:
        key, value = as_stored_dtype(stored, key, value)
    count = len(pools)

    def kernel(*operands, interpret):
        pools, (key, value, *rest) = as_kernel_dtype(*operands[:count]), operands[count:]
        key, value = (key, value) if quantized else as_kernel_dtype(key, value)
        pools = write_tiles_pallas(pools, key, value, *rest, pool=pool, interpret=interpret)
        return (*as_stored_dtype(stored, *pools[:2]), *pools[2:])

    def xla(*operands):
        return write_tiles_xla(operands[:count], *operands[count:], pool=pool)

    starts, ends, block_tables = (x.astype(jnp.int32) for x in (starts, ends, block_tables))
    return dispatch(kernel, xla, *pools, key, value, starts, ends, block_tables, layer, *last, interpret=interpret)


def _check_written_scales(
    pool: PoolShape,
    stored: DTypeLike,
    key_scales: jax.Array | None,
    value_scales: jax.Array | None,
    key_smoothing: jax.Array | None,
) -> None:
    """Raises ValueError unless scales and smoothing go with the pools' dtype and shape."""
    dtype = meant_dtype(stored)
    if is_quantized(dtype):
        layers_and_heads = pool.layers, pool.kv_heads
        check_stored_scales(key_scales, value_scales, layers_and_heads, num_pages=pool.pages, page_size=pool.page_size)
        shape = (pool.kv_heads, pool.head_dim)
        given = shape if key_smoothing is None else key_smoothing.shape
        require(given == shape, "key_smoothing.shape", given, f"must be {shape}, (Hkv, D)")
        return
    named = dict(key_scales=key_scales, value_scales=value_scales, key_smoothing=key_smoothing)
    for name, array in named.items():
        require(array is None, name, getattr(array, "shape", None), f"must be None where the pools are {dtype.name}")
