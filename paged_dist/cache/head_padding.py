"""Padding of heads: a head_dim D that is no stored size gets zeros, [..., D] to [..., stored_head_dim] and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paged_dist.cache.spec import CacheSpec


def pad_heads(x: jax.Array, spec: CacheSpec, fill: float = 0) -> jax.Array:
    """x [..., D] as [..., `spec.stored_head_dim`], `fill` behind the D; x itself where no lane is left over.

    Keys are stored with zeros there, never with what a reused page held: a query's zero times NaN would be NaN.
    """
    lanes = spec.stored_head_dim - spec.head_dim
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lanes)], constant_values=fill) if lanes else x


def cut_heads(x: jax.Array, spec: CacheSpec) -> jax.Array:
    """The inverse of `pad_heads`: the D elements of x [..., `spec.stored_head_dim`]."""
    return x[..., : spec.head_dim] if spec.stored_head_dim > spec.head_dim else x
