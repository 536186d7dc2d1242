"""The attention kernels' matrix products, summed in f32, and how a query meets rows that hold two tokens each."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax


def dot(x, y, axis, query_dtype):
    """x [M, K] times y, contracted over y's `axis`, summed in f32; as many passes as the query's and y's dtypes need.

    The MXU takes bf16: f32 pages go through it in several passes, over bf16 pages an f32 query (and its weights) in
    two, as the sum of two bf16, and a bf16 query's in one. int8 is exact in bf16; e4m3 it takes as it is, beside bf16.
    """
    product = functools.partial(
        lax.dot_general, dimension_numbers=(((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )
    if y.dtype == jnp.float32:
        return product(x.astype(jnp.float32), y, precision=lax.Precision.HIGHEST)
    y = y.astype(jnp.bfloat16) if y.dtype == jnp.int8 else y
    high = x.astype(jnp.bfloat16)
    if query_dtype == jnp.bfloat16:
        return product(high, y)
    return product(high, y) + product((x - high.astype(jnp.float32)).astype(jnp.bfloat16), y)


def block_diagonal(q: jax.Array, streams: int) -> jax.Array:
    """q [B, Hkv, G, D] as [B, Hkv, streams * G, streams * D]: row j * G + g is q[g] in lanes j * D onwards."""
    *lead, group, head_dim = q.shape
    eye = jnp.eye(streams, dtype=bool)[:, None, :, None]
    wide = jnp.where(eye, q[..., None, :, None, :], jnp.zeros((), q.dtype))
    return wide.reshape(*lead, streams * group, streams * head_dim)
