"""Paged attention in plain XLA, with 8-bit pages' scales: for CPUs and GPUs, and an oracle of shapes and shardings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from paged_dist._compat import vary_like
from paged_dist.kernels.attention.checks import check_options, check_output_dtype, check_pools, check_starts
from paged_dist.kernels.attention.problem import Problem
from paged_dist.kernels.attention.queries import queries_as_rows, rows_as_queries
from paged_dist.kernels.attention.scores import LOWEST, in_range
from paged_dist.kernels.dispatch import meant_dtype

# A step takes _TOKENS_PER_CHUNK tokens of a sequence, and as many sequences side by side as make _STEP_ELEMENTS of K:
# 1 MB of K as bf16 and 2 MB of V as f32 stay cached from gather to product. On two cores, at 8 kv heads of 128, twice
# the size takes the same time, four times 1.5x; at 1 kv head 8 sequences take 0.6 of 2's time.
_TOKENS_PER_CHUNK = 256
_STEP_ELEMENTS = 1 << 19
_MOST_ROWS = 8  # a group runs as long as its longest sequence does


def attend_pages_xla(
    query,
    key_pages,
    value_pages,
    lengths,
    block_tables,
    layer=None,
    *,
    starts=None,
    sm_scale=1.0,
    soft_cap=None,
    sliding_window=None,
    key_scales=None,
    value_scales=None,
    output_dtype=None,
):
    """Attention of a sequence's query token, or of each of several, over its live pages.

    Sequences are sorted by the pages they must read and taken a few at a time; each group loops over chunks
    of pages, as many as its longest member has inside its window, with the online softmax of Milakov and
    Gimelshein (arXiv:1805.02867). Neither a layer nor a sequence is ever gathered whole, and a sequence's
    result does not depend on its neighbours.

    Args:
      query: [B, Hq, D] bf16 or f32, or [B, Q, Hq, D], 1 <= Q <= 16, with `lengths` and `starts` [B, Q]: each new
        token's own span, which does not begin or end before that of the token before it. Together they have no gap;
        some may be empty.
      key_pages, value_pages: [L, Hkv, N, R, W] bf16, f32, int8 or float8_e4m3fn, bf16 and fp8 also as their bits
        (uint16, uint8); a page's P x D elements of a head as R rows of W lanes, W either D or, at D = 64, 128 with
        two consecutive tokens a row.
      lengths: [B] int32 live tokens, 0 allowed; more than the table holds counts as a full table.
      block_tables: [B, S] int32; entries of pages outside [start, length) are never used.
      layer: int32 scalar, may be traced; None is 0.
      starts: [B] int32, the first token that each sequence attends to; below 0 counts as 0, at its length or
        beyond leaves nothing. None is 0. With a sliding window the later of the two holds.
      sm_scale, soft_cap, sliding_window: Python numbers.
      key_scales, value_scales: [L, Hkv, N * P / 128, 128] f32 of int8 and fp8 pages, as `pack_scales` stores them.
        They multiply scores and weights, G a token, not pages, D a token.
      output_dtype: of the output, bf16 or f32; None for the query's.

    Returns:
      (output [B, Hq, D] in `output_dtype`, lse [B, Hq] f32, natural log), or [B, Q, Hq, D] and [B, Q, Hq]; 0 and -inf
      where empty.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    """
    query, key_pages, value_pages, lengths, block_tables = map(
        jnp.asarray, (query, key_pages, value_pages, lengths, block_tables)
    )
    scales = tuple(None if x is None else jnp.asarray(x) for x in (key_scales, value_scales))
    problem = check_pools(
        query, _as_meant(key_pages), _as_meant(value_pages), lengths, block_tables, *scales, takes_queries=True
    )
    check_options(sm_scale=sm_scale, soft_cap=soft_cap, sliding_window=sliding_window)
    p, batch = problem, problem.batch
    layer = jnp.int32(0) if layer is None else jnp.clip(jnp.asarray(layer, jnp.int32), 0, p.num_layers - 1)
    check_output_dtype(output_dtype)
    starts = check_starts(starts, *lengths.shape)
    has_queries, output_dtype = query.ndim == 4, query.dtype if output_dtype is None else output_dtype
    if has_queries:
        query, lengths, starts = queries_as_rows(p, query, lengths, starts)

    # One row of `pool` is one page of one head of one layer, so a gather picks the layer too.
    pools = [pool.reshape(-1, p.rows, p.width) for pool in (key_pages, value_pages)]
    if p.is_quantized:
        pools += [x.reshape(-1, p.page_size) for x in scales if x is not None]
    lengths = jnp.clip(lengths, 0, p.pages_per_sequence * p.page_size)
    starts = jnp.zeros_like(lengths) if starts is None else jnp.clip(starts, 0, lengths)
    if sliding_window is not None:
        starts = jnp.maximum(starts, lengths - min(sliding_window, p.pages_per_sequence * p.page_size))
    lengths = jnp.where(starts < lengths, lengths, 0)  # nothing to attend to is nothing to read
    starts = jnp.minimum(starts, lengths)
    spans = ()
    if p.num_queries > 1:  # what is read is what any of the new tokens attends to
        spans = (starts, lengths)
        starts = jnp.min(jnp.where(starts < lengths, starts, jnp.iinfo(jnp.int32).max), axis=1)
        lengths = jnp.max(lengths, axis=1)
        starts = jnp.minimum(starts, lengths)
    pages = (lengths + p.page_size - 1) // p.page_size - starts // p.page_size  # [B] to read

    chunk, rows = _step_shape(p)
    groups = -(-batch // rows)
    order = jnp.argsort(pages) if groups > 1 else jnp.arange(batch)
    padded = jnp.pad(order, (0, groups * rows - batch), constant_values=-1).reshape(groups, rows)

    def attend(members):  # [rows], -1 where the group is short of a sequence
        member = jnp.maximum(members, 0)
        length = jnp.where(members < 0, 0, lengths[member])
        q = query[member].reshape(rows, p.num_kv_heads, p.rows_per_head, p.head_dim)
        return _attend_rows(
            p,
            chunk,
            q,
            pools,
            layer,
            length,
            jnp.minimum(starts[member], length),
            block_tables[member],
            *(x[member] for x in spans),
            sm_scale=sm_scale,
            soft_cap=soft_cap,
        )

    output, lse = lax.map(attend, padded)
    place = jnp.argsort(order)  # where each sequence was computed
    rows_of_all = p.num_kv_heads * p.rows_per_head
    output = output.reshape(-1, rows_of_all, p.head_dim)[place].astype(output_dtype)
    lse = lse.reshape(-1, rows_of_all)[place]
    return (rows_as_queries(p, output), rows_as_queries(p, lse)) if has_queries else (output, lse)


def _as_meant(pool) -> jax.ShapeDtypeStruct:
    """The pool as it is meant: uint16 and uint8 are the bits of bf16 and fp8."""
    return jax.ShapeDtypeStruct(pool.shape, meant_dtype(pool.dtype))


def _step_shape(p: Problem) -> tuple[int, int]:
    """(C pages of a sequence, M sequences) that one step takes."""
    chunk = max(1, min(p.pages_per_sequence, _TOKENS_PER_CHUNK // p.page_size))
    rows = _STEP_ELEMENTS // (chunk * p.page_size * p.num_kv_heads * p.head_dim)
    return chunk, max(1, min(rows, _MOST_ROWS, p.batch))


def _attend_rows(p: Problem, chunk: int, q, pools, layer, lengths, starts, tables, *spans, sm_scale, soft_cap):
    """(output f32 [M, Hkv, G, D], lse [M, Hkv, G]) of q [M, Hkv, G, D] over [starts, lengths), `chunk` pages a step.

    spans: with several new tokens, of which G then are Q * G rows, their own starts and lengths, both [M, Q].
    """
    m_rows = q.shape[0]
    first = starts // p.page_size  # [M]
    chunks = (lengths + p.page_size - 1) // p.page_size - first
    heads = (layer * p.num_kv_heads + jnp.arange(p.num_kv_heads, dtype=jnp.int32)) * p.num_pages  # [Hkv]
    exact = lax.Precision.HIGHEST if p.cache_dtype == "float32" else None
    # A product of two bf16 is exact in f32: no f32 copy of K is needed to sum in f32.
    narrow = p.query_dtype == p.cache_dtype == "bfloat16"
    q = q if narrow else q.astype(jnp.float32)

    def step(i, carry):
        m, l, acc = carry  # [M, Hkv, G, 1] twice, [M, Hkv, G, D]
        page = first[:, None] + i * chunk + jnp.arange(chunk, dtype=jnp.int32)  # [M, C]
        ids = jnp.take_along_axis(tables, jnp.minimum(page, p.pages_per_sequence - 1), axis=1)
        ids = heads[None, :, None] + jnp.clip(ids, 0, p.num_pages - 1)[:, None, :]  # [M, Hkv, C]
        k, v = (
            _gather(pool, ids, i).reshape(m_rows, p.num_kv_heads, chunk * p.page_size, p.head_dim) for pool in pools[:2]
        )  # [M, Hkv, T, D]
        k = lax.bitcast_convert_type(k, jnp.bfloat16) if narrow else _pages_as_f32(k, p.cache_dtype)
        token = page[:, :, None] * p.page_size + jnp.arange(p.page_size, dtype=jnp.int32)
        token = token.reshape(m_rows, -1)  # [M, T]
        live = ((token >= starts[:, None]) & (token < lengths[:, None]))[:, None]  # [M, 1, T]
        seen = live[:, :, None]  # [M, 1, 1, T], or [M, 1, Q * G, T]
        if spans:
            own_starts, own_ends = (x[..., None] for x in spans)
            seen = (token[:, None] >= own_starts) & (token[:, None] < own_ends)
            seen = jnp.repeat(seen, p.group, axis=1)[:, None]

        s = jnp.einsum("mhgd,mhtd->mhgt", q, k, precision=exact, preferred_element_type=jnp.float32)
        s = sm_scale * s
        scales = [_gather_scales(p, pool, ids) for pool in pools[2:]]  # [M, Hkv, 1, T], of 8-bit pages
        if p.is_quantized:
            s = s * scales[0]
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s / soft_cap)
        s = jnp.where(seen, in_range(s), LOWEST)
        m_next = jnp.maximum(m, s.max(axis=-1, keepdims=True))
        weight = jnp.where(seen, jnp.exp(s - m_next), 0.0)
        keep = jnp.exp(m - m_next)
        l = keep * l + weight.sum(axis=-1, keepdims=True)
        if p.is_quantized:
            weight = weight * jnp.where(seen, scales[1], 0.0)
        # A dead row of V may hold NaN, and 0 x NaN is NaN.
        v = jnp.where(live[..., None], _pages_as_f32(v, p.cache_dtype), 0.0)
        return m_next, l, keep * acc + jnp.einsum("mhgt,mhtd->mhgd", weight, v, precision=exact)

    stat = (*q.shape[:-1], 1)
    start = jnp.full(stat, LOWEST), jnp.zeros(stat), jnp.zeros(q.shape)
    start = tuple(vary_like(x.astype(jnp.float32), q, *pools, lengths, starts, tables, layer) for x in start)
    m, l, acc = lax.fori_loop(0, (jnp.max(chunks) + chunk - 1) // chunk, step, start)
    empty = l == 0.0
    output = acc / jnp.where(empty, 1.0, l)
    return output, jnp.where(empty, -jnp.inf, m + jnp.log(l))[..., 0]


def _gather(pool, ids, step):
    """Pages `ids` [...] of `pool` [pages, R, W] as [..., R, W], f32, int8 or the bits of bf16 or fp8, in step `step`.

    bf16 is gathered as integers: XLA's CPU back end gathers it by widening the pool to f32, the whole of it once
    that is lifted out of the loop. The barrier ties the integers to the step, so that they are not lifted out (and
    copied) either. fp8 likewise.
    """
    bits = {"bfloat16": jnp.uint16, "float8_e4m3fn": jnp.uint8}.get(pool.dtype.name)
    if bits:
        pool, _ = lax.optimization_barrier((pool, step))
        pool = lax.bitcast_convert_type(pool, bits)
    return pool.at[ids].get(mode="promise_in_bounds")


def _gather_scales(p: Problem, pool, ids):
    """Scales [M, Hkv, 1, T], by token, of pages `ids` [M, Hkv, C] of `pool` [pages, P], in `pack_scales`' order."""
    scales = pool.at[ids].get(mode="promise_in_bounds")
    if p.tokens_per_row > 1:
        scales = jnp.swapaxes(scales.reshape(*ids.shape, p.tokens_per_row, p.rows), -1, -2)
    return scales.reshape(*ids.shape[:2], 1, -1)


def _pages_as_f32(pages, dtype: str):
    """What `_gather` gave of a pool of `dtype`, as f32."""
    if dtype == "bfloat16":  # the upper half of the f32 that it stands for
        return lax.bitcast_convert_type(pages.astype(jnp.uint32) << 16, jnp.float32)
    if dtype == "float8_e4m3fn":
        pages = lax.bitcast_convert_type(pages, jnp.float8_e4m3fn)
    return pages.astype(jnp.float32)
