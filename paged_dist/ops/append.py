"""Write: new tokens' keys and values into the cache, in place, each shard its own heads and pages."""

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
from paged_dist.cache.head_dim import pad_heads
from paged_dist.kernels.cache_update import write_kv_pages
from paged_dist.mesh import MeshAxes
from paged_dist.ops.in_shard_map import (
    Implementation,
    as_arrays,
    check_batch,
    check_shard,
    in_place,
    interpret_of,
    local_pages,
    op_mesh,
    run_sharded,
)
from paged_dist.ops.write_conflicts import check_rows_apart, on_host


def append_kv(
    cache: PagedKVCache,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    block_tables: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    axes: MeshAxes = MeshAxes(),
    implementation: Implementation = None,
) -> PagedKVCache:
    """Appends a decode step's new tokens to their sequences' pages, in place: `cache` is donated.

    On TPU a Pallas kernel reads the aligned tiles that the tokens fall in, blends them and writes them back;
    nothing else of the pools moves, and no shard talks to another.

    Args:
      cache: the cache; after an eager call use the returned one only. Inside a jit, donate it to the jit.
      key, value: [B, Hkv, D], or [B, Q, Hkv, D] for Q tokens a sequence; any float dtype, cast to the cache's. An
        int8 or fp8 cache gets them as `quantize_kv` makes them, keys divided by `cache.key_smoothing` first, and
        their scales into the same pages' rows of scales, in the same pass.
      positions: [B] int32, 0-based position of each row's (first) new token, as `PageAllocator.grow_all` returns
        them: `lengths - Q` where all rows grew by Q. A negative one writes nothing of that row: a row that is held
        and gets no token must have one.
      block_tables: [B, pages_per_sequence] int32 global page ids, placed as in `sharded_paged_attention`. Positions
        outside the table are not written, nor are pages that are not on the shard where their place in the row puts
        them. Rows that get a token must not share the page that it goes into, or tokens are lost: forks get their own
        by `PageAllocator.grow_all` and `copy_pages`. That is checked in NumPy, lists and arrays on CPU, not in a jit
        nor on an accelerator.
      layer, mesh, axes, implementation: as in `sharded_paged_attention`.

    Returns:
      The cache with the tokens written.

    Raises:
      ValueError: shapes or dtypes that disagree, or that do not divide over the mesh; two rows that write one page.
    """
    seen = on_host(positions, block_tables)
    key, value, positions, block_tables = as_arrays(key, value, positions, block_tables)
    mesh = op_mesh(cache, mesh, axes, implementation)
    cache.check_layer(layer)
    _check_append(cache, key, value, positions, block_tables, implementation)
    check_batch(key.shape[0], mesh, axes, "key.shape[0]")
    if seen is not None:
        starts, tables = seen
        ends = starts.astype(np.int64) + (1 if key.ndim == 3 else key.shape[1])
        check_rows_apart(cache.spec, mesh, axes, starts, ends, tables)
    return _append_sharded(
        cache, key, value, positions, block_tables, layer, mesh=mesh, axes=axes, implementation=implementation
    )


@in_place
def _append_sharded(cache, key, value, positions, block_tables, layer, *, mesh, axes, implementation):
    data, model = axes.names("data") or None, axes.names("model") or None
    new = P(data, model, None) if key.ndim == 3 else P(data, None, model, None)
    pools = cache.partition_specs(axes)
    in_specs = (pools, new, new, P(data), P(data, None), None if layer is None else P())
    local = functools.partial(_append_local, axes=axes, implementation=implementation)
    return run_sharded(
        local,
        mesh,
        in_specs,
        pools,
        cache,
        key,
        value,
        positions,
        block_tables,
        layer,
    )


def append_kv_local(
    cache: PagedKVCache,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    block_tables: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    axes: MeshAxes = MeshAxes(),
    implementation: Implementation = None,
) -> PagedKVCache:
    """`append_kv` inside a caller's `shard_map` (with `check_vma=True` too): this shard's rows, heads and pages.

    Args:
      cache: this shard's pools, passed in and out with `cache.partition_specs(axes)`.
      key, value: [B / data, Hkv / model, D] or [B / data, Q, Hkv / model, D].
      positions, block_tables: this shard's rows; page ids are global, as outside.
      Everything else as in `append_kv`.

    Returns:
      This shard's pools with the tokens written.

    Raises:
      ValueError: as `append_kv`; no `shard_map` around the call, or one with another part of the cache.
    """
    key, value, positions, block_tables = as_arrays(key, value, positions, block_tables)
    check_shard(cache, axes)
    _check_append(cache, key, value, positions, block_tables, implementation)
    return _append_local(cache, key, value, positions, block_tables, layer, axes=axes, implementation=implementation)


@broadcasts
def _append_local(cache, key, value, positions, block_tables, layer, *, axes, implementation):
    if key.ndim == 3:
        key, value = key[:, None], value[:, None]
    ends = positions + key.shape[1]
    with jax.named_scope("append"):
        return _write_local(cache, key, value, positions, ends, block_tables, layer, axes, implementation)


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

    key[r, t] and value[r, t] become token starts[r] + t of sequence rows[r], where that is below lengths[r]: a
    prompt can be written in chunks, and after a shared prefix. Whole pages are written without being read.

    Args:
      cache: the cache; after an eager call use the returned one only. Inside a jit, donate it to the jit.
      key, value: [R, T, Hkv, D], any float dtype, cast to the cache's, or quantised as in `append_kv`.
      lengths: [R] int32, one past the last token to write; at most starts[r] + T are.
      block_tables: [B, pages_per_sequence] int32 global page ids, all rows' (not only those of `rows`), placed and
        written as in `append_kv`: no two of the R rows into one page.
      starts: [R] int32, position of key[r, 0]; None: 0. A negative one writes nothing.
      rows: [R] int32 indices into block_tables' rows, one twice only where its chunks share no page; a negative
        one, or one past B, writes nothing. key, value then are the same on every data shard. None: R = B, row r
        is sequence r, and all of them are sharded over data.
      layer, mesh, axes, implementation: as in `sharded_paged_attention`.

    Returns:
      The cache with the tokens written.

    Raises:
      ValueError: shapes or dtypes that disagree, or that do not divide over the mesh; two rows that write one page.
    """
    seen = on_host(lengths, block_tables, *(x for x in (starts, rows) if x is not None))
    key, value, lengths, block_tables, starts, rows = as_arrays(key, value, lengths, block_tables, starts, rows)
    mesh = op_mesh(cache, mesh, axes, implementation)
    cache.check_layer(layer)
    _check_prefill(cache, key, value, lengths, block_tables, starts, rows, implementation)
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


@in_place
def _prefill_sharded(cache, key, value, lengths, block_tables, starts, rows, layer, *, mesh, axes, implementation):
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
    """
    key, value, lengths, block_tables, starts, rows = as_arrays(key, value, lengths, block_tables, starts, rows)
    check_shard(cache, axes)
    _check_prefill(cache, key, value, lengths, block_tables, starts, rows, implementation)
    return _prefill_local(
        cache, key, value, lengths, block_tables, starts, rows, layer, axes=axes, implementation=implementation
    )


@broadcasts
def _prefill_local(cache, key, value, lengths, block_tables, starts, rows, layer, *, axes, implementation):
    starts = jnp.zeros_like(lengths) if starts is None else starts
    if rows is not None:
        count = block_tables.shape[0]
        if axes.names("data"):
            rows = rows - jax.lax.axis_index(axes.names("data")).astype(rows.dtype) * count
        starts = jnp.where((rows >= 0) & (rows < count), starts, -1)
        block_tables = block_tables[jnp.clip(rows, 0, count - 1)]
    with jax.named_scope("prefill_write"):
        return _write_local(cache, key, value, starts, lengths, block_tables, layer, axes, implementation)


def _write_local(cache, key, value, starts, ends, block_tables, layer, axes, implementation):
    smoothing = cache.layer_smoothing(layer)
    key, value = (pad_heads(x, cache.spec) for x in (key, value))
    if smoothing is not None:
        smoothing = pad_heads(smoothing, cache.spec, fill=1)
    key_pages, value_pages, layer = cache.stacked(layer)
    tables, stripes = local_pages(block_tables, key_pages.shape[2], axes)
    written = write_kv_pages(
        key_pages,
        value_pages,
        key,
        value,
        starts,
        ends,
        tables,
        layer,
        **cache.stacked_scales(),
        key_smoothing=smoothing,
        stripes=stripes,
        interpret=interpret_of(implementation),
    )
    return cache.with_pools(*written)


def _check_new(cache, key, value, implementation) -> None:
    spec, kv_heads = cache.spec, cache.key_pages.shape[-4]
    interpret_of(implementation)
    require(value.shape == key.shape, "value.shape", value.shape, f"must equal key.shape {key.shape}")
    require(
        key.shape[-2:] == (kv_heads, spec.head_dim),
        "key.shape",
        key.shape,
        f"its last axes must be the cache's (Hkv, D) = ({kv_heads}, {spec.head_dim})",
    )
    for name, array in (("key", key), ("value", value)):
        require(jnp.issubdtype(array.dtype, jnp.floating), f"{name}.dtype", str(array.dtype), "must be a float dtype")


def _check_int32(**arrays) -> None:
    for name, array in arrays.items():
        require(
            array is None or array.dtype == jnp.int32,
            f"{name}.dtype",
            str(getattr(array, "dtype", None)),
            "must be int32",
        )


def _check_append(cache, key, value, positions, block_tables, implementation) -> None:
    require(key.ndim in (3, 4), "key.shape", key.shape, "must be [B, Hkv, D] or [B, Q, Hkv, D]")
    _check_new(cache, key, value, implementation)
    batch = key.shape[0]
    require(
        positions.shape == (batch,), "positions.shape", positions.shape, f"must be ({batch},), one for each row of key"
    )
    require(
        block_tables.ndim == 2 and block_tables.shape[0] == batch and block_tables.shape[1] >= 1,
        "block_tables.shape",
        block_tables.shape,
        f"must be [{batch}, pages_per_sequence], one row for each of key's and at least one column",
    )
    _check_int32(positions=positions, block_tables=block_tables)


def _check_prefill(cache, key, value, lengths, block_tables, starts, rows, implementation) -> None:
    require(key.ndim == 4, "key.shape", key.shape, "must be [R, T, Hkv, D]")
    _check_new(cache, key, value, implementation)
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
    _check_int32(lengths=lengths, block_tables=block_tables, starts=starts, rows=rows)
