"""Several new tokens of a sequence in one call: the tokens that each attends to, and the layout as rows of one product.

Each kv head's K is multiplied by all query rows that read it, Q tokens x G heads. Before: query [B, Q, Hkv * G, D].
After: [B, Hkv * Q * G, D]. With one kv head on a chip the two are the same in memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paged_dist._compat import broadcasts
from paged_dist.kernels.attention.problem import Problem


@broadcasts
def causal_spans(lengths, starts, num_queries: int, most: int) -> tuple[jax.Array, jax.Array | None]:
    """The span [starts, lengths) that each of the last Q tokens of a sequence attends to, both int32 [B, Q].

    The tokens are causal among themselves: each sees those before it and itself.

    Args:
      lengths: [B] int32, the Q tokens included; more than `most`, a full table, counts as that. The token q of a
        sequence is at lengths - Q + q and sees all up to itself: of a sequence of less than Q the first see nothing.
      starts: [B] int32, or None for None.
    """
    ahead = jnp.arange(num_queries - 1, -1, -1, dtype=jnp.int32)
    ends = jnp.maximum(jnp.minimum(lengths, most)[:, None] - ahead, 0)
    return ends, None if starts is None else jnp.broadcast_to(starts[:, None], ends.shape)


def queries_as_rows(p: Problem, query, lengths, starts):
    """query [B, Q, Hq, D] as rows [B, Hkv * Q * G, D]; lengths and starts stay [B, Q], or become [B] where Q is 1."""
    if p.num_queries == 1:
        return query[:, 0], lengths[:, 0], None if starts is None else starts[:, 0]
    split = query.reshape(p.batch, p.num_queries, p.num_kv_heads, p.group, p.head_dim)
    return jnp.swapaxes(split, 1, 2).reshape(p.batch, -1, p.head_dim), lengths, starts


def rows_as_queries(p: Problem, x):
    """The inverse for results: [B, Hkv * Q * G, ...] as [B, Q, Hq, ...]."""
    if p.num_queries == 1:
        return x[:, None]
    split = x.reshape(p.batch, p.num_kv_heads, p.num_queries, p.group, *x.shape[2:])
    return jnp.swapaxes(split, 1, 2).reshape(p.batch, p.num_queries, p.num_q_heads, *x.shape[2:])
