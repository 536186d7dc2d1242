"""Several new tokens a sequence: what each of them attends to, and the rows that they become beside one K.

Tokens stand before the heads of a group, [Hkv, Q, G]: with one kv head on a chip that is the order they come in.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paged_dist._compat import broadcasts
from paged_dist.kernels.attention.problem import Problem


@broadcasts
def causal_spans(lengths, starts, num_queries: int, most: int) -> tuple[jax.Array, jax.Array | None]:
    """(lengths, starts), both [B, Q]: what the last Q tokens of each sequence attend to, causal among themselves.

    Args:
      lengths: [B] int32, the Q tokens included; more than `most`, a full table, counts as that. The token q of a
        sequence is at lengths - Q + q and sees all up to itself: of a sequence of less than Q the first see nothing.
      starts: [B] int32, or None for None.
    """
    ahead = jnp.arange(num_queries - 1, -1, -1, dtype=jnp.int32)
    ends = jnp.maximum(jnp.minimum(lengths, most)[:, None] - ahead, 0)
    return ends, None if starts is None else jnp.broadcast_to(starts[:, None], ends.shape)


def queries_as_rows(p: Problem, query, lengths, starts):
    """query [B, Q, Hq, D] as [B, Hkv * Q * G, D], with its lengths and starts [B, Q]; those of one token as [B]."""
    if p.num_queries == 1:
        return query[:, 0], lengths[:, 0], None if starts is None else starts[:, 0]
    split = query.reshape(p.batch, p.num_queries, p.num_kv_heads, p.group, p.head_dim)
    return jnp.swapaxes(split, 1, 2).reshape(p.batch, -1, p.head_dim), lengths, starts


def rows_as_queries(p: Problem, x):
    """Results [B, Hkv * Q * G, ...] of `queries_as_rows` as [B, Q, Hq, ...]."""
    if p.num_queries == 1:
        return x[:, None]
    split = x.reshape(p.batch, p.num_kv_heads, p.num_queries, p.group, *x.shape[2:])
    return jnp.swapaxes(split, 1, 2).reshape(p.batch, p.num_queries, p.num_q_heads, *x.shape[2:])
