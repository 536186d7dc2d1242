"""Queries, keys and values that anyone can recompute: each element is a hash of its indices.

The same function runs in JAX on the devices and in NumPy on a host. So the float64 oracle needs nothing from the
devices, and an error anywhere on the path (page, table, write, shard) shows. The mixer is the 32-bit finaliser of
C. Wellons' `hash-prospector` search (two multiplications, three xor-shifts); counter-based generation as in
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import enum

import numpy as np

_GOLDEN = 0x9E3779B9  # odd, so index -> index * _GOLDEN is one to one


class Kind(enum.IntEnum):
    """What an element is part of. Each kind has its own stream of numbers from one seed."""

    QUERY = 0
    KEY = 1
    VALUE = 2
    CHECKSUM_LOW = 3
    CHECKSUM_HIGH = 4
    KEY_SIZE = 5
    VALUE_SIZE = 6


# What a token's largest channel becomes in an 8-bit cache. It is stated here again, not taken from
# `kernels.quantization`: the oracle must not follow a mistake there.
_LARGEST_STORED = {"int8": 127.0, "float8_e4m3fn": 448.0}


def input_dtype(cache_dtype) -> str:
    """The dtype of query, new keys and values, and output: that of the cache, bfloat16 for an 8-bit cache."""
    name = np.dtype(cache_dtype).name
    return "bfloat16" if name in _LARGEST_STORED else name


def _mix(xp, x):
    """uint32 -> uint32, one to one, every input bit moving every output bit."""
    x = x ^ (x >> xp.uint32(16))
    x = x * xp.uint32(0x7FEB352D)
    x = x ^ (x >> xp.uint32(15))
    x = x * xp.uint32(0x846CA68B)
    return x ^ (x >> xp.uint32(16))


def hash_indices(xp, seed, kind: Kind, request, position, layer, heads, channels):
    """uint32 hash of each element, [..., H, D].

    Args:
      xp: `numpy` or `jax.numpy`; the bits are the same.
      seed, layer: integers, may be traced scalars.
      request, position: int32 arrays that broadcast to [...] (scalars to [1]): request id, 0-based token position.
      heads, channels: int32 [H] and [D], global indices.
    """

    def absorb(state, index):
        # Never a scalar: NumPy warns where a scalar wraps, and wrapping is the point.
        return _mix(xp, state + xp.atleast_1d(xp.asarray(index)).astype(xp.uint32) * xp.uint32(_GOLDEN))

    state = xp.asarray(np.array([seed & 0xFFFFFFFF], np.uint32))
    for index in (int(kind) + 1, layer, request, position):
        state = absorb(state, index)
    for index in (heads, channels):
        state = absorb(state[..., None], index)
    return state


def values(xp, dtype, *indices):
    """Uniform values in (-2, 2), variance 4/3, as `dtype`: `hash_indices(xp, *indices)` mapped to floats.

    Odd multiples of 2**-7 for bfloat16 and of 2**-15 for float32: every one is exact in its dtype, so no rounding
    can differ between back ends, and a float32 value that went through bfloat16 shows.
    """
    bits = {"bfloat16": 8, "float32": 16}[np.dtype(dtype).name]
    top = (hash_indices(xp, *indices) >> xp.uint32(32 - bits)).astype(xp.int32)
    return ((2 * top + (1 - 2**bits)).astype(xp.float32) * xp.float32(2.0 ** (1 - bits))).astype(dtype)


def keys_or_values(xp, cache_dtype, seed, kind: Kind, request, position, layer, heads, channels):
    """Keys or values to write into a cache of `cache_dtype`: `values` in its `input_dtype`, [..., H, D].

    For an 8-bit cache each token and head is divided by one of 1, 2, 4 and 8, which leaves the values exact. All scales
    would be alike within a few percent otherwise, and a scale in another's place would hardly show.
    """
    dtype = np.dtype(input_dtype(cache_dtype))
    made = values(xp, dtype, seed, kind, request, position, layer, heads, channels)
    if np.dtype(cache_dtype).name not in _LARGEST_STORED:
        return made
    size = Kind.KEY_SIZE if kind == Kind.KEY else Kind.VALUE_SIZE
    halvings = hash_indices(xp, seed, size, request, position, layer, heads, np.zeros(1, np.int32)) >> xp.uint32(30)
    return (made.astype(xp.float32) * (xp.float32(1) / (xp.uint32(1) << halvings).astype(xp.float32))).astype(dtype)


def as_held(x: np.ndarray, cache_dtype) -> np.ndarray:
    """What a cache of `cache_dtype` holds of keys or values x [..., D], as float64. NumPy, from the rule alone.

    8 bits: scale = max_d |x| / 127 (int8) or / 448 (e4m3); x / scale is rounded to nearest even, times scale again.
    """
    dtype, x = np.dtype(cache_dtype), x.astype(np.float64)
    if dtype.name not in _LARGEST_STORED:
        return x
    scale = np.abs(x).max(axis=-1, keepdims=True) / _LARGEST_STORED[dtype.name]
    scaled = x / np.where(scale > 0, scale, 1.0)
    held = np.rint(scaled) if dtype.name == "int8" else scaled.astype(np.float32).astype(dtype)
    return held.astype(np.float64) * scale


def checksum_terms(xp, output, *indices):
    """The terms of an output's checksum, uint32 [..., H, D]: its bits times an odd hash of each element's indices.

    Their sum mod 2**32 is the same in any order, so that no layout of processes changes it; an element in another's
    place does.
    """
    bits = output.view(xp.uint16 if np.dtype(output.dtype).itemsize == 2 else xp.uint32).astype(xp.uint32)
    # An output of +0.0 or -0.0 would not count: the odd constant makes that element's presence count too.
    return (bits + xp.uint32(_GOLDEN)) * (hash_indices(xp, *indices) | xp.uint32(1))
