"""Eight-bit keys and values: one f32 scale for each token and kv head, and how the scales are stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paged_dist._compat import reshape_minor
from paged_dist._errors import require
from paged_dist.kernels._tiling import LANES

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # what a token's largest channel becomes


def is_quantized(dtype) -> bool:
    """Whether pages of this dtype come with scales."""
    return jnp.dtype(dtype).name in LARGEST


def quantize_kv(x: jax.Array, dtype, *, smoothing: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Symmetric absmax quantisation of keys or values: `append_kv` and `write_prefill_kv` store just this.

    scale = max_d |x[..., d]| / 127 (int8) or / 448 (e4m3); value = x / scale, rounded to nearest even. int8 never
    takes -128. A vector of zeros has scale 0 and stays zero.

    Args:
      x: [..., Hkv, D], or [..., D], any float dtype.
      dtype: int8 or float8_e4m3fn.
      smoothing: [Hkv, D] (anything that broadcasts to x), divides x first; of keys only, whose queries are then
        multiplied by it. See `calibrate_key_smoothing`.

    Returns:
      (values, x's shape in `dtype`; scales, x's shape less D, f32).

    Raises:
      ValueError: another dtype.
    """
    name = jnp.dtype(dtype).name
    require(name in LARGEST, "dtype", name, f"must be one of {tuple(LARGEST)}")
    values, scales = scaled_to(smooth(x, smoothing).astype(jnp.float32), dtype)
    return values.astype(name), scales[..., 0]


def smooth(x: jax.Array, smoothing: jax.Array | None) -> jax.Array:
    """x / smoothing in f32; x itself where there is none."""
    return x if smoothing is None else x.astype(jnp.float32) / smoothing.astype(jnp.float32)


def scaled_to(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """x [..., D] f32 in the range of `dtype`, f32, for int8 rounded; and what it was divided by, [..., 1] f32."""
    name = jnp.dtype(dtype).name
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    # Below the smallest normal number its reciprocal is infinite, and TPUs take it for 0 anyway.
    tiny = largest < float(jnp.finfo(jnp.float32).tiny) * LARGEST[name]
    scaled = x * jnp.where(tiny, 0.0, LARGEST[name] / jnp.where(tiny, 1.0, largest))
    if name == "int8":
        scaled = jnp.round(scaled)
    values = jnp.clip(scaled, -LARGEST[name], LARGEST[name])
    return values, jnp.where(tiny, 0.0, largest * (1.0 / LARGEST[name]))


def fp8_bits(x: jax.Array) -> jax.Array:
    """The bits of x f32, at most 448 either way or NaN, as float8_e4m3fn, to nearest even: int32.

    Inside a kernel, where only some chips convert to fp8.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # the exponent's bias is 7, not 127
    subnormal = jnp.round(jnp.abs(x) * 512.0).astype(jnp.int32)  # in units of 2^-9
    made = jnp.where(size < 0x3C800000, subnormal, normal)  # 2^-6
    made = jnp.where(size > 0x7F800000, 0x7F, made)
    return made | ((bits >> 24) & 0x80)


def dequantize_kv(
    values: jax.Array, scales: jax.Array, *, smoothing: jax.Array | None = None, dtype=jnp.float32
) -> jax.Array:
    """What `quantize_kv` made stands for: values * scales, times `smoothing` if given.

    Args:
      values: [..., D], int8 or float8_e4m3fn (any dtype).
      scales: [...] f32, values' shape less D.
      smoothing: [Hkv, D], what x was divided by.
      dtype: of the result.

    Returns:
      [..., D] in `dtype`.

    Raises:
      ValueError: scales of another shape.
    """
    require(scales.shape == values.shape[:-1], "scales.shape", scales.shape, f"must be {values.shape[:-1]}")
    x = values.astype(jnp.float32) * scales[..., None]
    return (x if smoothing is None else x * smoothing.astype(jnp.float32)).astype(dtype)


def calibrate_key_smoothing(keys: jax.Array) -> jax.Array:
    """A per-channel divisor of keys, [Hkv, D] f32, from a sample of them [..., Hkv, D] (a few hundred tokens do).

    It is each channel's root mean square, in units of the head's geometric mean: channels come out alike, so that
    none loses its bits to a large one, as a token's scale has to follow its largest channel. The idea of SmoothQuant
    (arXiv:2211.10438) with its exponent at 1: for given queries no other divisor of the same largest quotient has
    less error. Channels that are zero throughout get 1.

    Raises:
      ValueError: fewer than three axes.
    """
    keys = jnp.asarray(keys)
    require(keys.ndim >= 3, "keys.shape", keys.shape, "must be [..., Hkv, D], at least one token")
    size = jnp.sqrt(jnp.mean(jnp.square(keys.astype(jnp.float32)), axis=tuple(range(keys.ndim - 2))))
    live = size > 0
    log = jnp.log(jnp.where(live, size, 1.0))
    mean = jnp.sum(log, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(live, axis=-1, keepdims=True), 1)
    return jnp.where(live, jnp.exp(log - mean), 1.0)


def check_scale_rows(num_pages: int, page_size: int, argument: str = "page_size") -> None:
    """Raises ValueError where a pool's scales do not fill whole rows of 128, or a page's would straddle two."""
    fits = page_size % LANES == 0 or LANES % page_size == 0
    rule = "with int8 and fp8 must divide 128 or be a multiple of it, for scales are stored 128 to a row"
    require(fits, argument, page_size, rule)
    pages = max(1, LANES // page_size)
    require(
        num_pages % pages == 0,
        "num_pages",
        num_pages,
        f"with int8 and fp8 at page_size {page_size} must be a multiple of {pages} on each shard, for so many pages "
        "share a row of scales",
    )


def scale_rows(num_pages: int, page_size: int) -> int:
    """Rows of 128 that the scales of one head's pages take."""
    return num_pages * page_size // LANES


def pack_scales(scales: jax.Array, tokens_per_row: int = 1) -> jax.Array:
    """Scales [..., N, P] as stored, [..., N * P / 128, 128].

    Token t of page n is number n * P + (t % tokens_per_row) * R + t // tokens_per_row, R = P / tokens_per_row: where
    two tokens share a row of the pool, first come all the first ones of a page, then the second ones, as the kernel's
    scores have them side by side.
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
