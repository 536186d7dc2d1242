"""Loops of decode steps, with their arguments as shapes: compiled for absent pods, run on simulated devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import paged_dist as pd

LOOP_STEPS, ROWS_A_SHARD, TABLE_WIDTH = 32, 8, 16  # steps of a loop, rows and pages a sequence on each data shard


def decode_loop(spec: pd.CacheSpec, **op):
    """cache, query, key, value, lengths, tables -> (cache, lengths, sum of outputs) after STEPS steps.

    query, key and value of one token a sequence, or with an axis of several.
    """

    def decode(cache, query, key, value, lengths, tables):
        new = 1 if key.ndim == 3 else key.shape[1]

        def layer(carry, index):
            cache, lengths = carry
            cache = pd.append_kv(cache, key, value, lengths - new, tables, layer=index, **op)
            return (cache, lengths), pd.sharded_paged_attention(query, cache, lengths, tables, layer=index, **op)

        def step(_, carry):
            cache, lengths, total = carry
            if spec.num_layers is None:
                (cache, lengths), output = layer((cache, lengths), None)
            else:
                (cache, lengths), outputs = jax.lax.scan(layer, (cache, lengths), jnp.arange(spec.num_layers))
                output = outputs.sum(axis=0)
            return cache, lengths + new, total + output

        return jax.lax.fori_loop(0, LOOP_STEPS, step, (cache, lengths, jnp.zeros_like(query)))

    return decode


def loop_arguments(spec: pd.CacheSpec, mesh: Mesh, group: int = 4, new_tokens: tuple[int, ...] = ()):
    """ShapeDtypeStructs of a decode loop's arguments; on Explicit axes placed as the ops want them."""
    batch, queries = ROWS_A_SHARD * mesh.shape["data"], tuple(None for _ in new_tokens)
    explicit = AxisType.Explicit in mesh.axis_types
    placed = lambda *axes: NamedSharding(mesh, P(*axes)) if explicit else None
    heads, rows = placed("data", *queries, "model"), placed("data")
    struct = lambda count: jax.ShapeDtypeStruct(
        (batch, *new_tokens, count, spec.head_dim), jnp.bfloat16, sharding=heads
    )
    query, new = struct(spec.num_kv_heads * group), struct(spec.num_kv_heads)
    int32 = lambda *shape: jax.ShapeDtypeStruct((batch, *shape), jnp.int32, sharding=rows)
    return pd.PagedKVCache.abstract(spec, mesh), query, new, new, int32(), int32(TABLE_WIDTH)
