"""`ref_paged_attention`: the plain reference, which gathers all pages and attends in a dozen lines of JAX."""

from __future__ import annotations

import jax.numpy as jnp

from paged_dist._compat import broadcasts
from paged_dist.kernels.attention.checks import DEFAULT_MASK_VALUE, check_cache, check_options
from paged_dist.kernels.attention.scores import LOWEST, in_range


@broadcasts
def ref_paged_attention(
    query,
    key_cache,
    value_cache,
    context_lens,
    block_tables,
    *,
    mask_value=DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    sliding_window=None,
):
    """The plain reference of paged attention, one query token of each sequence: clear, not fast.

    softmax(cap(q k^T)) v over a sequence's live tokens, in f32; the query is not scaled. It gathers every page of
    the table, so its memory grows with B x S x P.

    Args:
      query: [B, Hq, D] bf16 or f32; query head h reads kv head h // (Hq / Hkv).
      key_cache, value_cache: [Hkv, N, P, D] bf16 or f32.
      context_lens: [B] int32 live tokens, 0 allowed.
      block_tables: [B, S] int32 page ids; entries past a sequence's last page may hold anything.
      mask_value: what a masked logit becomes, finite and negative. Whatever it is, a masked token has weight 0.
      attn_logits_soft_cap: logits become cap * tanh(logits / cap), before the mask.
      sliding_window: attend to the last so many tokens.

    Returns:
      [B, Hq, D] in the query's dtype; 0 for an empty sequence.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.

    Example:
      Page n holds the value n; all scores are alike, so that the output is the mean of the live tokens' values.

      >>> keys = jnp.zeros((1, 4, 8, 64))  # [Hkv, N, P, D]
      >>> values = jnp.broadcast_to(jnp.arange(4.0)[None, :, None, None], keys.shape)
      >>> query, tables = jnp.ones((2, 4, 64)), jnp.array([[3, 1], [2, 0]], jnp.int32)
      >>> lengths = jnp.array([16, 5], jnp.int32)  # 8 tokens of page 3 and 8 of page 1; 5 of page 2
      >>> kernels.ref_paged_attention(query, keys, values, lengths, tables)[:, 0, 0].tolist()
      [2.0, 2.0]
    """
    query, key_cache, value_cache, context_lens, block_tables = map(
        jnp.asarray, (query, key_cache, value_cache, context_lens, block_tables)
    )
    p = check_cache(query, key_cache, value_cache, context_lens, block_tables)
    check_options(
        sm_scale=1.0,
        soft_cap=attn_logits_soft_cap,
        sliding_window=sliding_window,
        mask_value=mask_value,
        soft_cap_name="attn_logits_soft_cap",
    )
    ids = jnp.clip(block_tables, 0, p.num_pages - 1)
    k, v = (
        cache[:, ids].reshape(p.num_kv_heads, p.batch, -1, p.head_dim).astype(jnp.float32)
        for cache in (key_cache, value_cache)
    )  # [Hkv, B, T, D]
    q = query.reshape(p.batch, p.num_kv_heads, p.group, p.head_dim).astype(jnp.float32)

    token = jnp.arange(k.shape[2], dtype=jnp.int32)
    live = token < context_lens[:, None]  # [B, T]
    if sliding_window is not None:
        live &= token >= context_lens[:, None] - sliding_window
    logits = jnp.einsum("bhgd,hbtd->bhgt", q, k, precision="highest")
    if attn_logits_soft_cap is not None:
        logits = attn_logits_soft_cap * jnp.tanh(logits / attn_logits_soft_cap)
    live_logits = live[:, None, None]
    logits = jnp.where(live_logits, in_range(logits), LOWEST)
    # Selects, not products: an empty sequence's logits are uniform, and a dead row of V may hold NaN.
    weights = jnp.where(live_logits, jnp.exp(logits - logits.max(axis=-1, keepdims=True)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    v = jnp.where(live[None, :, :, None], v, 0.0)
    output = jnp.einsum("bhgt,hbtd->bhgd", weights, v, precision="highest")
    return output.reshape(query.shape).astype(query.dtype)
