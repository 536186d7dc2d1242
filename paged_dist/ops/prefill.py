"""Prefill: the keys and values of prompts, or of chunks of them, into their sequences' pages, in place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from paged_dist._compat import broadcasts
from paged_dist._errors import require
from paged_dist.cache import PagedKVCache
from paged_dist.mesh import MeshAxes
from paged_dist.ops.arguments import (
    Implementation,
    as_arrays,
    as_optional_arrays,
    check_batch,
    check_int32,
)
from paged_dist.ops.in_shard_map import check_shard
from paged_dist.ops.sharded_call import InPlaceOp, op_mesh, run_sharded
from paged_dist.ops.token_write import check_new_tokens, write_tokens_local
from paged_dist.ops.write_conflicts import check_rows_apart, on_host


def write_prefill_kv(
    cache: PagedKVCache,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    block_tables: jax.Array,
    *,
    starts: jax.Array | None = None,
    rows: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    axes: MeshAxes = MeshAxes(),
    implementation: Implementation = None,
) -> PagedKVCache:
    """Writes prompts, or chunks of prompts, into their pages, in place: `cache` is donated.

    key[r, t] and value[r, t] become token starts[r] + t of sequence rows[r], where that is below lengths[r]. So a
    prompt can be written in chunks, and after a shared prefix. Whole pages are written without being read.

    Args:
      cache: the cache; after an eager call use the returned one only. Inside a jit, donate it to the jit.
      key, value: [R, T, Hkv, D], any float dtype, cast to the cache's, or quantised as in `append_kv`.
      lengths: [R] int32, one past the last token to write; at most starts[r] + T are.
      block_tables: [B, pages_per_sequence] int32 global page ids, all rows' (not only those of `rows`), placed and
        written as in `append_kv`: no two of the R rows into one page.
      starts: [R] int32, position of key[r, 0]; None: 0. A negative one writes nothing.
      rows: [R] int32 indices into block_tables' rows; a negative one, or one past B, writes nothing. The same row may
        come twice if its two chunks share no page. key and value then are the same on every data shard. None: R = B,
        row r is sequence r, and all of them are sharded over data.
      layer, mesh, axes, implementation: as in `sharded_paged_attention`.

    Returns:
      The cache with the tokens written.

    Raises:
      ValueError: shapes or dtypes that disagree, or that do not divide over the mesh; two rows that write one page.

    Example:
      >>> mesh = pd.make_pod_mesh(num_kv_heads=2, model_parallelism=4)
      >>> spec = pd.CacheSpec(num_kv_heads=2, head_dim=128, num_pages=16)
      >>> cache = pd.PagedKVCache.create(spec, mesh)
      >>> pages = pd.PageAllocator(spec, mesh, num_sequences=2, pages_per_sequence=4)
      >>> [pages.allocate(row, num_tokens) for row, num_tokens in enumerate((200, 5))]
      [0, 0]
      >>> key = value = jnp.ones((2, 200, 2, 128), jnp.bfloat16)  # [R, T, Hkv, D]
      >>> cache = pd.write_prefill_kv(cache, key, value, pages.lengths, pages.block_tables)
      >>> int(jnp.sum(cache.to_pages()[0][0, ..., 0], dtype=jnp.float32))  # tokens of head 0, over all pages
      205
    """
    seen = on_host(lengths, block_tables, *(x for x in (starts, rows) if x is not None))
    key, value, lengths, block_tables = as_arrays(key, value, lengths, block_tables)
    starts, rows = as_optional_arrays(starts, rows)
    mesh = op_mesh(cache, mesh, axes, implementation)
    cache.check_layer(layer)
    _check_prefill_arguments(cache, key, value, lengths, block_tables, starts, rows, implementation)
    check_batch(block_tables.shape[0], mesh, axes, "block_tables.shape[0]")
    if seen is not None:
        ends, tables, *given = seen
        begins = np.zeros_like(ends) if starts is None else given[0]
        ends = np.minimum(ends, begins.astype(np.int64) + key.shape[1])
        check_rows_apart(cache.spec, mesh, axes, begins, ends, tables, None if rows is None else given[-1])
    return _prefill_sharded(
        cache,
        key,
        value,
        lengths,
        block_tables,
        starts,
        rows,
        layer,
        mesh=mesh,
        axes=axes,
        implementation=implementation,
    )


@InPlaceOp
def _prefill_sharded(
    cache, key, value, lengths, block_tables, starts, rows, layer, *, mesh, axes, implementation
) -> PagedKVCache:
    """`write_prefill_kv` of checked arguments: its `shard_map` over `mesh`."""
    data, model = axes.names("data") or None, axes.names("model") or None
    by_row = data if rows is None else None
    new, pools = P(by_row, None, model, None), cache.partition_specs(axes)
    in_specs = (
        pools,
        new,
        new,
        P(by_row),
        P(data, None),
        None if starts is None else P(by_row),
        None if rows is None else P(None),
        None if layer is None else P(),
    )
    local = functools.partial(_prefill_local, axes=axes, implementation=implementation)
    return run_sharded(
        local,
        mesh,
        in_specs,
        pools,
        cache,
        key,
        value,
        lengths,
        block_tables,
        starts,
        rows,
        layer,
    )


def write_prefill_kv_local(
    cache: PagedKVCache,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    block_tables: jax.Array,
    *,
    starts: jax.Array | None = None,
    rows: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    axes: MeshAxes = MeshAxes(),
    implementation: Implementation = None,
) -> PagedKVCache:
    """`write_prefill_kv` inside a caller's `shard_map` (with `check_vma=True` too): this shard's heads and pages.

    Args:
      cache: this shard's pools, passed in and out with `cache.partition_specs(axes)`.
      key, value: [R, T, Hkv / model, D].
      lengths, starts: [R] int32.
      block_tables: [B / data, pages_per_sequence] int32, this shard's rows, with global page ids.
      rows: [R] int32, global row indices: rows of other data shards are skipped here. None: R = B / data, row r
        is this shard's row r.
      Everything else as in `write_prefill_kv`.

    Returns:
      This shard's pools with the tokens written.

    Raises:
      ValueError: as `write_prefill_kv`; no `shard_map` around the call, or one with another part of the cache.

    Example:
      >>> mesh, P = pd.make_pod_mesh(model=2), jax.P
      >>> cache = pd.PagedKVCache.create(pd.CacheSpec(num_kv_heads=2, head_dim=128, num_pages=16), mesh)
      >>> pools, rows, new = cache.partition_specs(), P("data"), P("data", None, "model", None)
      >>> specs = dict(in_specs=(pools, new, new, rows, rows), out_specs=pools)
      >>> write = jax.jit(jax.shard_map(pd.write_prefill_kv_local, mesh=mesh, **specs), donate_argnums=0)
      >>> key = value = jnp.ones((4, 130, 2, 128), jnp.bfloat16)  # [R, T, Hkv, D]
      >>> tables = jnp.array([[0, 1], [4, 5], [8, 9], [12, 13]])  # data shard d owns pages 4 d to 4 d + 3, and row d
      >>> cache = write(cache, key, value, jnp.array([130, 5, 0, 128]), tables)
      >>> np.asarray(cache.to_pages()[0]).any(axis=(0, 2, 3)).nonzero()[0].tolist()  # the pages written
      [0, 1, 4, 12]
    """
    key, value, lengths, block_tables = as_arrays(key, value, lengths, block_tables)
    starts, rows = as_optional_arrays(starts, rows)
    check_shard(cache, axes)
    _check_prefill_arguments(cache, key, value, lengths, block_tables, starts, rows, implementation)
    return _prefill_local(
        cache, key, value, lengths, block_tables, starts, rows, layer, axes=axes, implementation=implementation
    )


@broadcasts
def _prefill_local(
    cache, key, value, lengths, block_tables, starts, rows, layer, *, axes, implementation
) -> PagedKVCache:
    """`write_prefill_kv_local` of checked arguments."""
    starts = jnp.zeros_like(lengths) if starts is None else starts
    if rows is not None:
        count = block_tables.shape[0]
        if axes.names("data"):
            rows = rows - jax.lax.axis_index(axes.names("data")).astype(rows.dtype) * count
        starts = jnp.where((rows >= 0) & (rows < count), starts, -1)
        block_tables = block_tables[jnp.clip(rows, 0, count - 1)]
    with jax.named_scope("prefill_write"):
        return write_tokens_local(cache, key, value, starts, lengths, block_tables, layer, axes, implementation)


def _check_prefill_arguments(
    cache: PagedKVCache,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    block_tables: jax.Array,
    starts: jax.Array | None,
    rows: jax.Array | None,
    implementation: Implementation,
) -> None:
    """Raises ValueError where the arguments disagree, be they whole ones or a shard's."""
    require(key.ndim == 4, "key.shape", key.shape, "must be [R, T, Hkv, D]")
    check_new_tokens(cache, key, value, implementation)
    count = key.shape[0]
    for name, array in (("lengths", lengths), ("starts", starts), ("rows", rows)):
        require(
            array is None or array.shape == (count,),
            f"{name}.shape",
            getattr(array, "shape", None),
            f"must be ({count},), one for each row of key",
        )
    require(
        block_tables.ndim == 2 and 0 not in block_tables.shape,
        "block_tables.shape",
        block_tables.shape,
        "must be [B, pages_per_sequence], neither 0",
    )
    require(
        rows is not None or block_tables.shape[0] == count,
        "rows",
        None,
        f"key has {count} rows and block_tables {block_tables.shape[0]}",
        "say with rows= which sequences they are",
    )
    check_int32(lengths=lengths, block_tables=block_tables, starts=starts, rows=rows)
