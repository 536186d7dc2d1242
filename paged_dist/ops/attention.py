"""Attention: each shard attends over its own heads and pages; the shards of one sequence then merge their results."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from paged_dist._compat import broadcasts
from paged_dist._errors import require
from paged_dist.cache import PagedKVCache
from paged_dist.cache.head_padding import cut_heads, pad_heads
from paged_dist.kernels.attention.checks import check_options, check_queries, check_sinks, check_starts
from paged_dist.kernels.attention.queries import causal_spans
from paged_dist.kernels.attention.window import later_starts, split_window
from paged_dist.kernels.decode.api import add_sinks, decode_stored_pages
from paged_dist.mesh import MeshAxes
from paged_dist.ops.arguments import (
    Implementation,
    as_arrays,
    as_optional_arrays,
    check_batch,
    check_int32,
    check_table_shape,
    interpret_of,
)
from paged_dist.ops.collectives import check_output_heads
from paged_dist.ops.in_shard_map import check_shard, context_size, invariant_over_context, local_pages
from paged_dist.ops.merge import merge_partials, my_heads
from paged_dist.ops.sharded_call import op_mesh, run_sharded


def sharded_paged_attention(
    query: jax.Array,
    cache: PagedKVCache,
    lengths: jax.Array,
    block_tables: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    sm_scale: float = 1.0,
    soft_cap: float | None = None,
    sliding_window: jax.Array | int | None = None,
    starts: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    output_heads: str = "replicated",
    mesh: Mesh | AbstractMesh | None = None,
    axes: MeshAxes = MeshAxes(),
    implementation: Implementation = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Decode attention of one new token a sequence, or of a few, over a sharded paged KV cache.

    out[b, h] = softmax_t(cap(sm_scale * q[b, h] . k[t, h // G])) v[t, h // G] over the live tokens t of sequence
    b. Each shard computes its own sequences and heads from its own pages, and the pools are only read. With one
    context shard the compiled program has no collective. With more, each context shard attends over the pages of a
    sequence that it holds, and their results are merged over `context`: a maximum of [B, Hq] and a sum of
    [B, Hq, D + 1], in f32. The method is paged attention (Kwon et al., SOSP 2023) with the online softmax of
    FlashAttention (Dao et al., 2022).

    Args:
      query: [B, Hq, D], bf16 or f32; Hq a multiple of the cache's Hkv. Resharded to P(data, model, None). Or
        [B, Q, Hq, D], for a speculative decoder's verifying step: the last Q tokens of each sequence, 1 <= Q <= 16,
        each of which attends to the tokens up to itself. P(data, None, model, None).
      cache: a PagedKVCache of Hkv heads. With a `key_smoothing` the query is multiplied by it here.
      lengths: [B] int32, live tokens of each sequence, the new one included; 0 for an idle row. P(data).
      block_tables: [B, pages_per_sequence] int32, global page ids; entries past a sequence's last page may hold
        anything. Row b's pages are on its data shard b // (B / data), and its page i on context shard (o + i) mod C,
        as `PageAllocator` places them, o being the context shard that owns the id in column 0. So where the first
        page was freed behind a window, column 0 must keep an id of the same shard. Tables with pages elsewhere give
        wrong numbers, not an error: `check_block_tables` names the first entry that is wrong. P(data, None).
      layer: int32 scalar, traced or not, for a cache with stacked layers; the kernel's DMA takes it.
      sm_scale: factor on q . k (1.0, as in JAX's paged attention: scale the query or pass 1 / sqrt(D)).
      soft_cap: cap(x) = soft_cap * tanh(x / soft_cap); None: none.
      sliding_window: attend to the last `sliding_window` tokens only; pages wholly before them are not read. A number
        of the program, or an int32 scalar, traced or not, 0 or less for none: layers with different windows go through
        one `lax.scan`.
      starts: [B] int32, the first token that each row attends to; None for 0. With a window the later of the two
        holds. Pages wholly before it are not read. P(data).
      sinks: [Hq] f32 logits, each added to its head's softmax denominator. P(model).
      return_lse: also return the natural log of the softmax denominator, sinks included.
      output_heads: 'replicated' gives every context shard all heads of its model shard. 'scattered' gives each
        Hq / (model x context) heads, as an output projection that is sharded over (model, context) takes them: a
        reduce-scatter in place of the sum, half the bytes.
      mesh: None: the cache's mesh, else the one in scope.
      axes: which mesh axes split sequences, one sequence's pages, and heads.
      implementation: None: the Pallas kernel where the program is lowered for TPU, XLA operations elsewhere;
        'pallas', 'pallas_interpret' (TPU interpret mode, slow) or 'xla'.

    Returns:
      The output [B, Hq, D] in query's dtype, P(data, model, None); with `return_lse`, also lse [B, Hq] f32,
      P(data, model). Scattered: P(data, (model, context), None) and P(data, (model, context)). With Q tokens
      [B, Q, Hq, D] and [B, Q, Hq]. An empty sequence gives output 0 and lse -inf (with sinks: the sink), and so does
      the q-th of the Q last tokens where there are fewer than Q - q.

    Raises:
      ValueError: shapes or dtypes that disagree, or that do not divide over the mesh.

    Example:
      >>> mesh = pd.make_pod_mesh(num_kv_heads=2, model_parallelism=4)
      >>> spec = pd.CacheSpec(num_kv_heads=2, head_dim=128, num_pages=16)
      >>> pages = pd.PageAllocator(spec, mesh, num_sequences=2, pages_per_sequence=4)
      >>> [pages.allocate(row, num_tokens) for row, num_tokens in enumerate((200, 5))]
      [0, 0]
      >>> cache = pd.PagedKVCache.create(spec, mesh)  # zeros: all tokens weigh the same
      >>> query = jnp.ones((2, 8, 128), jnp.bfloat16)  # [B, Hq, D]
      >>> step = (query, cache, pages.lengths, pages.block_tables)
      >>> output, lse = pd.sharded_paged_attention(*step, sm_scale=128**-0.5, return_lse=True)
      >>> output.shape, np.exp(lse[:, 0]).round().tolist()  # so that a softmax denominator counts them
      ((2, 8, 128), [200.0, 5.0])
    """
    query, lengths, block_tables = as_arrays(query, lengths, block_tables)
    sinks, starts = as_optional_arrays(sinks, starts)
    mesh = op_mesh(cache, mesh, axes, implementation)
    cache.check_layer(layer)
    _check_attention_arguments(query, cache, lengths, block_tables, sinks, starts, implementation)
    sliding_window, window = split_window(sliding_window)
    options = check_options(sm_scale=sm_scale, soft_cap=soft_cap, sliding_window=sliding_window)
    check_batch(query.shape[0], mesh, axes, "query.shape[0]")
    context, model = axes.size(mesh, "context"), axes.size(mesh, "model")
    check_output_heads(output_heads, query.shape[-2] // model, context)
    return _attend_sharded(
        query,
        cache,
        lengths,
        block_tables,
        layer,
        sinks,
        starts,
        window,
        **options,
        return_lse=return_lse,
        output_heads=output_heads,
        mesh=mesh,
        axes=axes,
        implementation=implementation,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "sm_scale", "soft_cap", "sliding_window", "return_lse", "output_heads", "mesh", "axes", "implementation",
    ),
)  # fmt: skip
def _attend_sharded(
    query, cache, lengths, block_tables, layer, sinks, starts, window, *, mesh, axes, **options
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`sharded_paged_attention` of checked arguments: its `shard_map` over `mesh`."""
    data, model = axes.names("data") or None, axes.names("model") or None
    local = functools.partial(_attend_local, axes=axes, **options)
    pools = cache.partition_specs(axes)
    if axes.size(mesh, "context") == 1:
        # Pools that are only read need not vary over it, and no reduction makes the output the same.
        pools = cache.partition_specs(dataclasses.replace(axes, context=None))
    queries = () if query.ndim == 3 else (None,)
    in_specs = (
        P(data, *queries, model, None),
        pools,
        P(data),
        P(data, None),
        None if layer is None else P(),
        None if sinks is None else P(model),
        None if starts is None else P(data),
        None if window is None else P(),
    )
    if options["output_heads"] == "scattered":
        model = (axes.names("model") + axes.names("context")) or None
    out_specs = P(data, *queries, model, None)
    if options["return_lse"]:
        out_specs = (out_specs, P(data, *queries, model))
    return run_sharded(
        local,
        mesh,
        in_specs,
        out_specs,
        query,
        cache,
        lengths,
        block_tables,
        layer,
        sinks,
        starts,
        window,
    )


def paged_attention_local(
    query: jax.Array,
    cache: PagedKVCache,
    lengths: jax.Array,
    block_tables: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    sm_scale: float = 1.0,
    soft_cap: float | None = None,
    sliding_window: jax.Array | int | None = None,
    starts: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    output_heads: str = "replicated",
    axes: MeshAxes = MeshAxes(),
    implementation: Implementation = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`sharded_paged_attention` inside a caller's `shard_map` (with `check_vma=True` too): this shard's part.

    Args:
      query: [B / data, Hq / model, D] or [B / data, Q, Hq / model, D], this shard's sequences and heads.
      cache: this shard's pools; pass the cache through the `shard_map` with `cache.partition_specs(axes)`.
      lengths: [B / data] int32.
      block_tables: [B / data, pages_per_sequence] int32 page ids, global as outside: this shard's offset is
        subtracted here.
      starts: [B / data] int32.
      sinks: [Hq / model] f32.
      Everything else as in `sharded_paged_attention`.

    Returns:
      [B / data, Hq / model, D], and lse [B / data, Hq / model] with `return_lse`, or with Q behind B / data;
      scattered, Hq / (model x context) heads of them.

    Raises:
      ValueError: as `sharded_paged_attention`; no `shard_map` around the call, or one with another part of the cache.

    Example:
      >>> mesh, P = pd.make_pod_mesh(model=2), jax.P
      >>> cache = pd.PagedKVCache.create(pd.CacheSpec(num_kv_heads=2, head_dim=128, num_pages=16), mesh)
      >>> rows, heads = P("data"), P("data", "model", None)
      >>> specs = dict(in_specs=(heads, cache.partition_specs(), rows, rows), out_specs=heads)
      >>> attend = jax.jit(jax.shard_map(pd.paged_attention_local, mesh=mesh, **specs))
      >>> query = jnp.ones((4, 8, 128), jnp.bfloat16)  # [B, Hq, D]
      >>> tables = jnp.array([[0], [4], [8], [12]])  # data shard d owns pages 4 d to 4 d + 3, and row d
      >>> attend(query, cache, jnp.array([100, 0, 1, 128]), tables).shape
      (4, 8, 128)
    """
    query, lengths, block_tables = as_arrays(query, lengths, block_tables)
    sinks, starts = as_optional_arrays(sinks, starts)
    check_shard(cache, axes)
    _check_attention_arguments(query, cache, lengths, block_tables, sinks, starts, implementation)
    sliding_window, window = split_window(sliding_window)
    options = check_options(sm_scale=sm_scale, soft_cap=soft_cap, sliding_window=sliding_window)
    check_output_heads(output_heads, query.shape[-2], context_size(axes))
    return _attend_local(
        query,
        cache,
        lengths,
        block_tables,
        layer,
        sinks,
        starts,
        window,
        **options,
        return_lse=return_lse,
        output_heads=output_heads,
        axes=axes,
        implementation=implementation,
    )


@broadcasts
def _attend_local(
    query,
    cache,
    lengths,
    block_tables,
    layer,
    sinks,
    starts,
    window,
    *,
    sm_scale,
    soft_cap,
    sliding_window,
    return_lse,
    output_heads,
    axes,
    implementation,
):
    """Attention of this shard's queries over its pages, merged over the context axis where that has several shards.

    `window` is a traced sliding window, `sliding_window` one that the program knows; at most one of them is given.
    """
    smoothing = cache.layer_smoothing(layer)
    key_pages, value_pages, layer = cache.stacked(layer)
    tables, stripes = local_pages(block_tables, key_pages.shape[2], axes)
    options = dict(sm_scale=sm_scale, soft_cap=soft_cap, interpret=interpret_of(implementation))
    attend = lambda lengths, **more: decode_stored_pages(
        pad_heads(smoothed_query(query, smoothing), cache.spec),
        key_pages,
        value_pages,
        lengths,
        tables,
        layer,
        **cache.stacked_scales(),
        **options,
        **more,
    )
    most, page_size = block_tables.shape[1] * cache.spec.page_size, cache.spec.page_size
    if query.ndim == 4:
        lengths, starts = causal_spans(lengths, starts, query.shape[1], most)  # [B, Q], each token's own
    if window is not None:
        starts = later_starts(jnp.clip(lengths, 0, most), starts, window)
    if stripes is None:  # whole sequences lie here: the kernel's output is the result
        with jax.named_scope("attend"):
            made = attend(lengths, starts=starts, sinks=sinks, sliding_window=sliding_window, return_lse=return_lse)
            made = made if return_lse else (made,)
            output, *lse = (invariant_over_context(x, axes) for x in made)
            output = cut_heads(output, cache.spec)
        return (output, *lse) if return_lse else output

    with jax.named_scope("attend"):
        here = lambda tokens: stripes.tokens_before(tokens, page_size)
        ends = jnp.clip(lengths, 0, most)
        if sliding_window is not None and sliding_window < most:
            starts = later_starts(ends, starts, sliding_window)
        elif starts is not None:
            starts = jnp.maximum(starts, 0)
        starts = None if starts is None else here(starts)
        # f32: the partial results are rounded once, after the merge.
        output, lse = attend(
            here(ends), starts=starts, sliding_window=None, return_lse=True, output_dtype=jnp.dtype("float32")
        )
        output = cut_heads(output, cache.spec)  # before the merge: padding crosses no link
    with jax.named_scope("merge"):
        names, scatter = axes.names("context"), output_heads == "scattered"
        output, lse = merge_partials(output, lse, names, scatter=scatter)
        if sinks is not None:  # once, not in each shard's partial result
            output, lse = add_sinks(output, lse, my_heads(sinks, names) if scatter else sinks)
        output = output.astype(query.dtype)
    return (output, lse) if return_lse else output


def smoothed_query(query: jax.Array, smoothing: jax.Array | None) -> jax.Array:
    """query [..., Hq, D] times smoothing [Hkv, D], by which the keys were divided; the product is made in f32."""
    if smoothing is None:
        return query
    heads = query.shape[-2] // smoothing.shape[0]
    return (query.astype(jnp.float32) * jnp.repeat(smoothing, heads, axis=0)).astype(query.dtype)


def _check_attention_arguments(
    query: jax.Array,
    cache: PagedKVCache,
    lengths: jax.Array,
    block_tables: jax.Array,
    sinks: jax.Array | None,
    starts: jax.Array | None,
    implementation: Implementation,
) -> None:
    """Raises ValueError where the arguments disagree, be they whole ones or a shard's."""
    spec, kv_heads = cache.spec, cache.key_pages.shape[-4]
    interpret_of(implementation)
    check_queries(query)
    batch, *_, heads, head_dim = query.shape
    require(query.dtype in (jnp.bfloat16, jnp.float32), "query.dtype", str(query.dtype), "must be bfloat16 or float32")
    require(head_dim == spec.head_dim, "query.shape", query.shape, f"head_dim must be the cache's {spec.head_dim}")
    require(
        heads % kv_heads == 0,
        "query.shape",
        query.shape,
        f"query heads must be a multiple of the cache's {kv_heads} kv heads",
    )
    require(lengths.shape == (batch,), "lengths.shape", lengths.shape, f"must be ({batch},), one for each row of query")
    check_table_shape(block_tables, batch, "query")
    check_int32(lengths=lengths, block_tables=block_tables)
    check_sinks(sinks, heads)
    check_starts(starts, batch)
