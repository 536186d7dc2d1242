"""Eight-bit keys and values: one f32 scale for each token and kv head. `scale_layout` says how scales are stored."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from paged_dist._compat import broadcasts
from paged_dist._errors import require

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # what a token's largest channel becomes


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether pages of this dtype come with scales."""
    return jnp.dtype(dtype).name in LARGEST


@broadcasts
def quantize_kv(x: jax.Array, dtype: DTypeLike, *, smoothing: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Symmetric absmax quantisation of keys or values, as `append_kv` and `write_prefill_kv` store them.

    Each token and head has one scale, max_d |x[..., d]| / 127 (int8) or / 448 (e4m3). Its values are x / scale, rounded
    to nearest even; int8 never takes -128. A vector of zeros has scale 0 and stays zero.

    Args:
      x: [..., Hkv, D], or [..., D], any float dtype.
      dtype: int8 or float8_e4m3fn.
      smoothing: [Hkv, D] (anything that broadcasts to x), divides x first. For keys only: their queries are then
        multiplied by it. See `calibrate_key_smoothing`.

    Returns:
      (values, scales): values of x's shape in `dtype`; scales f32 of x's shape without D.

    Raises:
      ValueError: another dtype.

    Example:
      >>> x = jnp.array([[1.0, -2.0, 0.5, 0.0]])
      >>> values, scales = pd.quantize_kv(x, jnp.int8)
      >>> values.tolist(), scales.shape
      ([[64, -127, 32, 0]], (1,))
      >>> bool(jnp.allclose(pd.dequantize_kv(values, scales), x, atol=0.01))
      True
    """
    name = jnp.dtype(dtype).name
    require(name in LARGEST, "dtype", name, f"must be one of {tuple(LARGEST)}")
    values, scales = scaled_to(smooth(x, smoothing).astype(jnp.float32), dtype)
    return values.astype(name), scales[..., 0]


def smooth(x: jax.Array, smoothing: jax.Array | None) -> jax.Array:
    """x / smoothing in f32; x itself where there is no smoothing."""
    return x if smoothing is None else x.astype(jnp.float32) / smoothing.astype(jnp.float32)


def scaled_to(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """(x / scale [..., D] f32, scale [..., 1] f32): x [..., D] f32 in the range of `dtype`; for int8 it is rounded."""
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
    """The bits of x (f32, between -448 and 448, or NaN) as float8_e4m3fn, rounded to nearest even: int32.

    For use inside a kernel: only some chips convert to fp8 there.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # the exponent's bias is 7, not 127
    subnormal = jnp.round(jnp.abs(x) * 512.0).astype(jnp.int32)  # in units of 2^-9
    made = jnp.where(size < 0x3C800000, subnormal, normal)  # 2^-6
    made = jnp.where(size > 0x7F800000, 0x7F, made)
    return made | ((bits >> 24) & 0x80)


@broadcasts
def dequantize_kv(
    values: jax.Array, scales: jax.Array, *, smoothing: jax.Array | None = None, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """The inverse of `quantize_kv`, but for its rounding: values * scales, times `smoothing` if given.

    Args:
      values: [..., D], int8 or float8_e4m3fn (any dtype).
      scales: [...] f32, values' shape without D.
      smoothing: [Hkv, D], what x was divided by.
      dtype: of the result.

    Returns:
      [..., D] in `dtype`.

    Raises:
      ValueError: scales of another shape.

    Example:
      >>> values, scales = jnp.array([[[100, -127]]], jnp.int8), jnp.array([[0.5]])
      >>> pd.dequantize_kv(values, scales, smoothing=jnp.array([[2.0, 1.0]])).tolist()
      [[[100.0, -63.5]]]
    """
    require(scales.shape == values.shape[:-1], "scales.shape", scales.shape, f"must be {values.shape[:-1]}")
    x = values.astype(jnp.float32) * scales[..., None]
    return (x if smoothing is None else x * smoothing.astype(jnp.float32)).astype(dtype)


@broadcasts
def calibrate_key_smoothing(keys: jax.Array, *, num_layers: int | None = None) -> jax.Array:
    """A divisor for each channel of the keys, from a sample of keys: keys divided by it lose less in 8 bits.

    Each channel's divisor is its root mean square, in units of the head's geometric mean. Divided by it, all channels
    are about as large. A token's scale follows its largest channel, so that otherwise a large channel takes the bits of
    all others. This is the idea of SmoothQuant (arXiv:2211.10438) with its exponent at 1: for given queries no other
    divisor of the same largest quotient has less error.

    A sample may show a channel smaller than it will be, and a channel that is divided by too little takes the others'
    bits. So root mean squares are bounded by the quartiles of their head. One that lies far below the rest (by two
    interquartile ranges of their logarithms, and under a quarter of the upper quartile) counts as lying just that far
    below. None counts as less than 1/1024 of the upper quartile, or as more than 1024 of it. Channels that are zero
    throughout get 1.

    Args:
      keys: [..., Hkv, D], any float dtype, as they go to `append_kv`. All axes before Hkv are tokens; a few hundred are
        enough. With `num_layers` [L, ..., Hkv, D].
      num_layers: L of a cache with stacked layers, each of which gets divisors of its own. `spec.num_layers` is right
        for every cache. None: keys are of one layer.

    Returns:
      [Hkv, D] f32, or [L, Hkv, D] with `num_layers`; finite and positive.

    Raises:
      ValueError: too few axes, no token, another number of layers; keys that are not finite in f32 (inside a jit,
        where that cannot be seen, the head they are in becomes NaN).

    Example:
      >>> keys = jnp.array([1.0, 8.0, -8.0, 1.0]).reshape(2, 1, 2)  # two tokens of one head; D = 2
      >>> smoothing = pd.calibrate_key_smoothing(keys * jnp.array([1.0, 4.0]))
      >>> smoothing.round(2).tolist()  # channel 1 is four times as large as channel 0
      [[0.5, 2.0]]
    """
    keys = jnp.asarray(keys).astype(jnp.float32)
    layered = num_layers is not None
    shape, rule = keys.shape, f"must be [{'num_layers, ' * layered}..., Hkv, D], at least one token"
    require(keys.ndim >= 3 + layered and 0 not in shape, "keys.shape", shape, rule)
    require(not layered or shape[0] == num_layers, "num_layers", num_layers, f"keys.shape is {shape}: {rule}")
    if not isinstance(keys, jax.core.Tracer):
        odd = int(jnp.sum(~jnp.isfinite(keys)))
        require(odd == 0, "keys", f"{odd} of {keys.size} not finite in f32", "must be finite", "leave those tokens out")
    tokens = tuple(range(1 if layered else 0, keys.ndim - 2))
    # In units of the largest, whose square might not be a number.
    largest = jnp.max(jnp.abs(keys), axis=tokens, keepdims=True)
    live = ~(largest < float(jnp.finfo(jnp.float32).tiny))  # NaN is, and shows
    size = jnp.sqrt(jnp.mean(jnp.square(keys / jnp.where(live, largest, 1.0)), axis=tokens, keepdims=True))
    live, log = (jnp.squeeze(x, tokens) for x in (live, jnp.log(jnp.where(live, size * largest, 1.0))))
    low, high = (jnp.nanquantile(jnp.where(live, log, jnp.nan), q, axis=-1, keepdims=True) for q in (0.25, 0.75))
    least = jnp.clip(low - 2 * (high - low), high - math.log(1024.0), high - math.log(4.0))
    log = jnp.clip(log, least, high + math.log(1024.0))
    mean = jnp.sum(jnp.where(live, log, 0.0), axis=-1, keepdims=True)
    mean = mean / jnp.maximum(jnp.sum(live, axis=-1, keepdims=True, dtype=jnp.float32), 1.0)
    return jnp.where(live, jnp.exp(log - mean), 1.0)
