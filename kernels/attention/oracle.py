"""The oracle: paged attention in float64 NumPy, which tests compare every other form with."""

from __future__ import annotations

import numpy as np


def attention_oracle(
    query,
    key_pages,
    value_pages,
    lengths,
    block_tables,
    *,
    starts=None,
    sm_scale=1.0,
    soft_cap=None,
    sliding_window=None,
    sinks=None,
):
    """Attention of one query token of each sequence, or of Q, from the formula; it reads live tokens only.

    Args:
      query: [B, Hq, D]; key_pages, value_pages: [Hkv, N, P, D]; lengths: [B]; block_tables: [B, S]. Or
        [B, Q, Hq, D]: the last Q tokens of each sequence, which see the tokens up to themselves; with lengths, and
        starts where given, [B, Q]: each sees its own.
      starts: [B] first token attended to, default 0.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap).
      sliding_window: only the last so many tokens are attended to.
      sinks: [Hq] logits that join the softmax's denominator with no value.

    Returns:
      (output [B, Hq, D] float64, lse [B, Hq] float64, natural log), or [B, Q, Hq, D] and [B, Q, Hq]. An empty
      sequence has output 0 and lse -inf, with sinks lse = sink.
    """
    query = np.asarray(query).astype(np.float64)
    if query.ndim == 4:
        options = dict(sm_scale=sm_scale, soft_cap=soft_cap, sliding_window=sliding_window, sinks=sinks)
        lengths, starts = np.asarray(lengths), None if starts is None else np.asarray(starts)
        made = []
        for q in range(query.shape[1]):
            ends = lengths[:, q] if lengths.ndim == 2 else lengths - query.shape[1] + 1 + q
            first = starts if starts is None or starts.ndim == 1 else starts[:, q]
            made.append(
                attention_oracle(query[:, q], key_pages, value_pages, ends, block_tables, starts=first, **options)
            )
        return tuple(np.stack(x, axis=1) for x in zip(*made, strict=True))
    key_pages, value_pages = np.asarray(key_pages), np.asarray(value_pages)
    batch, num_q_heads, _ = query.shape
    num_kv_heads, _, page_size, _ = key_pages.shape
    group = num_q_heads // num_kv_heads
    output, lse = np.zeros(query.shape), np.full((batch, num_q_heads), -np.inf)
    for b in range(batch):
        end = int(lengths[b])
        start = 0 if starts is None else int(starts[b])
        if sliding_window is not None:
            start = max(start, end - int(sliding_window))
        tokens = np.arange(max(start, 0), end)
        pages = np.asarray(block_tables[b])[tokens // page_size]
        for h in range(num_q_heads):
            k = key_pages[h // group, pages, tokens % page_size].astype(np.float64)  # [T, D]
            v = value_pages[h // group, pages, tokens % page_size].astype(np.float64)
            logits = sm_scale * (k @ query[b, h])
            if soft_cap is not None:
                logits = soft_cap * np.tanh(logits / soft_cap)
            every = logits if sinks is None else np.append(logits, float(sinks[h]))
            if every.size == 0 or every.max() == -np.inf:
                continue
            top = every.max()
            total = np.exp(every - top).sum()
            lse[b, h] = top + np.log(total)
            output[b, h] = (np.exp(logits - top) / total) @ v  # a large top swallows the logarithm in lse
    return output, lse
