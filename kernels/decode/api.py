"""`paged_decode_attention`: the checks of a call, and the choice between the Pallas kernel and plain XLA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from paged_dist._errors import require
from paged_dist.kernels.attention.checks import (
    check_interpret,
    check_lengths,
    check_options,
    check_queries,
    check_sinks,
    check_starts,
)
from paged_dist.kernels.attention.queries import causal_spans
from paged_dist.kernels.attention.window import later_starts, split_window
from paged_dist.kernels.attention.xla_form import attend_pages_xla
from paged_dist.kernels.decode.block_sizes import BlockSizes
from paged_dist.kernels.decode.pallas_call import decode_pages_pallas
from paged_dist.kernels.dispatch import Interpret, as_kernel_dtype, dispatch
from paged_dist.kernels.quantization import is_quantized
from paged_dist.kernels.scale_layout import check_scale_rows, check_scales, pack_scales, unpack_scales
from paged_dist.kernels.target import on_target
from paged_dist.kernels.tiling import LANES, SUBLANES


def paged_decode_attention(
    query,
    key_cache,
    value_cache,
    lengths,
    block_tables,
    *,
    key_scales=None,
    value_scales=None,
    starts=None,
    layer=None,
    sm_scale: float = 1.0,
    soft_cap: float | None = None,
    sliding_window: jax.Array | int | None = None,
    sinks=None,
    return_lse: bool = False,
    block_sizes: BlockSizes | None = None,
    interpret: Interpret = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of the newest token of each sequence, or its newest few, over the sequence's pages, on one chip.

    Each live page is read once.

    out[b, h] = softmax_t(cap(sm_scale * q[b, h] . k[t, h // G])) v[t, h // G] over tokens starts[b] <= t < lengths[b].
    Of Q new tokens a sequence, as a speculative decoder verifies them, token q is at position lengths[b] - Q + q, and
    sees the tokens up to itself.

    Args:
      query: [B, Hq, D] bf16 or f32, Hq a multiple of Hkv, D 64 or a multiple of 128 (a `PagedKVCache` pads others to
        these; to do it here would copy the pages on each call). Pages below f32 are multiplied beside bf16 with f32
        sums; an f32 query over them goes in as the sum of two bf16. Or [B, Q, Hq, D], Q new tokens of each sequence,
        1 <= Q <= 16, whose keys and values are in the pages.
      key_cache, value_cache: [Hkv, N, P, D] bf16, f32, int8 or float8_e4m3fn, or [L, Hkv, N, P, D] with `layer`; P a
        multiple of 8, for 8 bits one that divides 128 or a multiple of it. At D = 64 two tokens of bf16 or f32 may
        share a row, [.., P / 2, 128], which is read in place; [.., P, 64] is copied on a TPU.
      lengths: [B] int32 live tokens of each sequence, 0 allowed; more than the table holds counts as a full table.
        They count the Q new ones: of a sequence of less than Q the first queries see nothing.
      block_tables: [B, S] int32 page ids. Entries past a sequence's last page, or before its first, may hold
        anything. Another id outside the pool, which only a wrong table has, reads some page of it.
      key_scales, value_scales: [Hkv, N, P] f32, or [L, Hkv, N, P], of int8 and fp8 pages (`quantize_kv`): a token's
        key and value are its elements times its scale. They multiply scores and weights, in f32. Read in place at
        P = 128; for other P the scales (3% of the pools) are copied on a TPU. A `PagedKVCache` is never copied.
      starts: [B] int32, first token attended to, default 0. Pages wholly before it are not read.
      layer: int32 scalar, may be traced, for caches with a layer axis: the kernel's own copies pick it.
      sm_scale: logits are sm_scale * q.k.
      soft_cap: cap(x) = soft_cap * tanh(x / soft_cap); None: none.
      sliding_window: attend to the last so many tokens, each query up to itself; pages wholly before them are not read.
        A number of the program, or an int32 scalar, traced or not, 0 or less for none: layers with different windows
        go through one `lax.scan`.
      sinks: [Hq] f32 logits added to the softmax denominator.
      return_lse: also return the natural log of the softmax denominator, sinks included.
      block_sizes: a `BlockSizes`, which changes speed only; None picks by shape.
      interpret: None follows the platform that the program is lowered for: the Pallas kernel on TPU (on both cores
        of a v4 or v5p chip), plain XLA elsewhere. False is the kernel; True or a `pltpu.InterpretParams` simulates it.

    Returns:
      [B, Hq, D] in the query's dtype; with `return_lse`, also [B, Hq] f32; or [B, Q, Hq, D] and [B, Q, Hq]. A query
      that sees nothing gives 0 and -inf, with sinks the sink.

    Raises:
      ValueError: arguments that disagree or are outside the rules above; block sizes that do not fit in VMEM; a row
        of the table that does not fit in SMEM. (A whole table need not: the batch is split into several launches.)

    Method: PagedAttention (arXiv:2309.06180), online softmax (arXiv:1805.02867), and the schedule that
    `decode/kernel.py` describes.

    Example:
      Two sequences of 5 and 130 tokens in pages of 128, 8 query heads over 2 kv heads.

      >>> pages = jnp.ones((2, 8, 128, 64), jnp.bfloat16)  # [Hkv, N, P, D], here of keys and values alike
      >>> query = jnp.ones((2, 8, 64), jnp.bfloat16)
      >>> lengths = jnp.array([5, 130], jnp.int32)
      >>> tables = jnp.array([[3, 0], [1, 7]], jnp.int32)  # the first sequence has one page: 3
      >>> options = dict(sm_scale=64**-0.5, return_lse=True)
      >>> output, lse = kernels.paged_decode_attention(query, pages, pages, lengths, tables, **options)
      >>> output.shape, output.dtype.name, lse.shape
      ((2, 8, 64), 'bfloat16', (2, 8))
      >>> np.round(np.exp(lse[:, 0] - 64**0.5)).tolist()  # every token has the same score, 8
      [5.0, 130.0]
    """
    query, key_cache, value_cache, lengths, block_tables = map(
        jnp.asarray, (query, key_cache, value_cache, lengths, block_tables)
    )
    rank = 4 if layer is None else 5
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        rule = "[Hkv, N, P, D]" if layer is None else "[L, Hkv, N, P, D], for a layer was given"
        require(cache.ndim == rank, f"{name}.shape", cache.shape, f"must be {rule}")
    if layer is not None:
        layer = jnp.asarray(layer)
        whole = layer.ndim == 0 and jnp.issubdtype(layer.dtype, jnp.integer)
        require(whole, "layer", layer, "must be an int32 scalar")
        layer = layer.astype(jnp.int32)
    check_queries(query)
    starts, sinks = check_starts(starts, query.shape[0]), check_sinks(sinks, query.shape[-2])
    sliding_window, window = split_window(sliding_window)
    options = check_options(sm_scale=sm_scale, soft_cap=soft_cap, sliding_window=sliding_window)
    check_interpret(interpret)
    require(
        block_sizes is None or isinstance(block_sizes, BlockSizes),
        "block_sizes",
        block_sizes,
        "must be None or a BlockSizes",
    )
    if query.ndim == 4 or window is not None:
        most = block_tables.shape[-1] * (key_cache.shape[-2] * key_cache.shape[-1] // query.shape[-1])
        check_lengths(lengths, query.shape[0])
        if query.ndim == 4:
            lengths, starts = causal_spans(lengths, starts, query.shape[1], most)
        if window is not None:
            starts = later_starts(jnp.clip(lengths, 0, most), starts, window)
    scales = _checked_and_packed_scales(key_cache, key_scales, value_scales)
    pools = (key_cache, value_cache) if layer is not None else (key_cache[None], value_cache[None])
    key_scales, value_scales = scales if layer is not None or scales[0] is None else (x[None] for x in scales)
    return decode_stored_pages(
        query,
        *pools,
        lengths,
        block_tables,
        layer,
        starts,
        sinks,
        key_scales,
        value_scales,
        **options,
        return_lse=bool(return_lse),
        block_sizes=block_sizes,
        interpret=interpret,
    )


def _checked_and_packed_scales(key_cache, key_scales, value_scales):
    """The scales [.., Hkv, N, P] as `pack_scales` stores them, or (None, None) where there are none.

    Raises ValueError where they do not go with the pages.
    """
    if key_scales is None and value_scales is None:
        return None, None
    dtype = jnp.dtype(key_cache.dtype).name
    require(is_quantized(dtype), "key_scales", "given", f"go with int8 and float8_e4m3fn pages only, not {dtype}")
    key_scales, value_scales = (x if x is None else jnp.asarray(x) for x in (key_scales, value_scales))
    check_scales(key_scales, value_scales, key_cache.shape[:-1])
    num_pages, page_size = key_cache.shape[-3:-1]
    check_scale_rows(num_pages, page_size, "key_cache.shape[-2]")
    assert key_scales is not None and value_scales is not None  # `check_scales` refuses one alone
    return pack_scales(key_scales), pack_scales(value_scales)


@functools.partial(
    jax.jit,
    static_argnames=(
        "sm_scale",
        "soft_cap",
        "sliding_window",
        "return_lse",
        "output_dtype",
        "block_sizes",
        "interpret",
    ),
)
def decode_stored_pages(
    query,
    key_pages,
    value_pages,
    lengths,
    block_tables,
    layer=None,
    starts=None,
    sinks=None,
    key_scales=None,
    value_scales=None,
    *,
    return_lse,
    block_sizes=None,
    interpret: Interpret = None,
    **options,
):
    """`paged_decode_attention` over stored, stacked pools [L, Hkv, N, R, W], its options checked.

    W is D, or 128 at head_dim 64 with two tokens a row; bf16 pools may come as their bits, as on CPU. Scales come as
    `pack_scales` stores them. With query [B, Q, Hq, D], lengths and starts are [B, Q], each new token's own span, as
    `attend_pages_xla` has them (`causal_spans` makes them). output_dtype: of the output; None for the query's.
    """
    given = dict(layer=layer, starts=starts, sinks=sinks, key_scales=key_scales, value_scales=value_scales)
    given = {name: x for name, x in given.items() if x is not None}
    operands = (query, key_pages, value_pages, lengths, block_tables, *given.values())

    def kernel(query, key_pages, value_pages, *rest, interpret):
        head_dim, page_size = query.shape[-1], key_pages.shape[-2] * key_pages.shape[-1] // query.shape[-1]
        stored = value_pages.shape[-1] // head_dim
        query, *pools = _whole_rows(query, *as_kernel_dtype(key_pages, value_pages))
        made = pools[0].shape[-1] // query.shape[-1]
        if key_scales is not None and made != stored:
            rest = [*rest[:-2], *(pack_scales(unpack_scales(x, page_size, stored), made) for x in rest[-2:])]

        def launch(*operands, target):
            query, key_pages, value_pages, lengths, block_tables, *rest = operands
            made = decode_pages_pallas(
                query,
                key_pages,
                value_pages,
                lengths,
                block_tables,
                **dict(zip(given, rest, strict=True)),
                **options,
                return_lse=return_lse,
                block_sizes=block_sizes,
                target=target,
                interpret=interpret,
            )
            return made if return_lse else (made,)

        asks = ("num_cores",)
        if key_scales is not None:
            fp8 = pools[0].dtype == jnp.float8_e4m3fn
            asks += ("multiplies_fp8", "outruns_core") if fp8 else ("outruns_core",)
        output, *lse = on_target(launch, query, *pools, *rest, asks=asks, interpret=interpret)
        return (output[..., :head_dim], *lse)

    def xla(*operands):
        *pages, rest = *operands[:5], dict(zip(given, operands[5:], strict=True))
        sinks = rest.pop("sinks", None)
        output, lse = attend_pages_xla(*pages, **rest, **options)
        if sinks is not None:
            output, lse = add_sinks(output, lse, sinks)
        return (output, lse) if return_lse else (output,)

    made = dispatch(kernel, xla, *operands, interpret=interpret)
    return made if return_lse else made[0]


def _whole_rows(query, *pools):
    """Query and pools with rows of at least 128 lanes: two tokens of head_dim 64 a row, or one and zeros."""
    head_dim, rows, width = query.shape[-1], *pools[0].shape[-2:]
    if width >= LANES:
        return query, *pools
    if rows % (SUBLANES * LANES // head_dim):  # pages of 8 tokens would pack into half a tile
        widen = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, LANES - head_dim)])
        return tuple(map(widen, (query, *pools)))
    return query, *(pool.reshape(*pool.shape[:-2], -1, LANES) for pool in pools)


def add_sinks(output: jax.Array, lse: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds the logits `sinks` [Hq] to the softmax denominators of output [.., Hq, D] and lse [.., Hq].

    exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink); an empty sequence (lse -inf) stays 0.
    """
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32), lse.shape)
    share = jnp.where(jnp.isneginf(lse), 0.0, jax.nn.sigmoid(lse - sinks))  # -inf less a sink of -inf is NaN
    return (output.astype(jnp.float32) * share[..., None]).astype(output.dtype), jnp.logaddexp(lse, sinks)
