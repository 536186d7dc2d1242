"""Append: a decode step's new keys and values into the pages of their sequences, in place."""

from __future__ import annotations

import functools

import jax
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
    check_batch,
    check_int32,
    check_table_shape,
)
from paged_dist.ops.in_shard_map import check_shard
from paged_dist.ops.sharded_call import InPlaceOp, op_mesh, run_sharded
from paged_dist.ops.token_write import check_new_tokens, write_tokens_local
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
        them: `lengths - Q` where all rows grew by Q. A row with a negative position is not written. A row that holds
        a sequence and gets no token must have one.
      block_tables: [B, pages_per_sequence] int32 global page ids, placed as in `sharded_paged_attention`. Positions
        outside the table are not written, nor are pages on another shard than their place in the row says. No two rows
        may write into one page, or tokens are lost: a fork gets a page of its own by `PageAllocator.grow_all` and
        `copy_pages`. That is checked where the ids are NumPy's, lists or on CPU, not in a jit nor on an accelerator.
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
      >>> [pages.allocate(row, num_tokens=0) for row in range(2)]
      [0, 0]
      >>> positions = pages.grow_all(range(2))  # a token more in each row, and the pages that they need
      >>> key = value = jnp.ones((2, 2, 128), jnp.bfloat16)  # [B, Hkv, D]
      >>> cache = pd.append_kv(cache, key, value, positions, pages.block_tables)
      >>> int(jnp.sum(cache.to_pages()[0]))  # 2 rows x 2 heads x 128
      512
    """
    seen = on_host(positions, block_tables)
    key, value, positions, block_tables = as_arrays(key, value, positions, block_tables)
    mesh = op_mesh(cache, mesh, axes, implementation)
    cache.check_layer(layer)
    _check_append_arguments(cache, key, value, positions, block_tables, implementation)
    check_batch(key.shape[0], mesh, axes, "key.shape[0]")
    if seen is not None:
        starts, tables = seen
        ends = starts.astype(np.int64) + (1 if key.ndim == 3 else key.shape[1])
        check_rows_apart(cache.spec, mesh, axes, starts, ends, tables)
    return _append_sharded(
        cache, key, value, positions, block_tables, layer, mesh=mesh, axes=axes, implementation=implementation
    )


@InPlaceOp
def _append_sharded(cache, key, value, positions, block_tables, layer, *, mesh, axes, implementation) -> PagedKVCache:
    """`append_kv` of checked arguments: its `shard_map` over `mesh`."""
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

    Example:
      >>> mesh, P = pd.make_pod_mesh(model=2), jax.P
      >>> cache = pd.PagedKVCache.create(pd.CacheSpec(num_kv_heads=2, head_dim=128, num_pages=16), mesh)
      >>> pools, rows, new = cache.partition_specs(), P("data"), P("data", "model", None)
      >>> specs = dict(in_specs=(pools, new, new, rows, rows), out_specs=pools)
      >>> append = jax.jit(jax.shard_map(pd.append_kv_local, mesh=mesh, **specs), donate_argnums=0)
      >>> key = value = jnp.ones((4, 2, 128), jnp.bfloat16)  # [B, Hkv, D]
      >>> tables = jnp.array([[0], [4], [8], [12]])  # data shard d owns pages 4 d to 4 d + 3, and row d
      >>> cache = append(cache, key, value, jnp.zeros(4, jnp.int32), tables)
      >>> np.asarray(cache.to_pages()[0]).any(axis=(0, 2, 3)).nonzero()[0].tolist()  # the pages written
      [0, 4, 8, 12]
    """
    key, value, positions, block_tables = as_arrays(key, value, positions, block_tables)
    check_shard(cache, axes)
    _check_append_arguments(cache, key, value, positions, block_tables, implementation)
    return _append_local(cache, key, value, positions, block_tables, layer, axes=axes, implementation=implementation)


@broadcasts
def _append_local(cache, key, value, positions, block_tables, layer, *, axes, implementation) -> PagedKVCache:
    """`append_kv_local` of checked arguments."""
    if key.ndim == 3:
        key, value = key[:, None], value[:, None]
    ends = positions + key.shape[1]
    with jax.named_scope("append"):
        return write_tokens_local(cache, key, value, positions, ends, block_tables, layer, axes, implementation)


def _check_append_arguments(
    cache: PagedKVCache,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    block_tables: jax.Array,
    implementation: Implementation,
) -> None:
    """Raises ValueError where the arguments disagree, be they whole ones or a shard's."""
    require(key.ndim in (3, 4), "key.shape", key.shape, "must be [B, Hkv, D] or [B, Q, Hkv, D]")
    check_new_tokens(cache, key, value, implementation)
    batch = key.shape[0]
    require(
        positions.shape == (batch,), "positions.shape", positions.shape, f"must be ({batch},), one for each row of key"
    )
    check_table_shape(block_tables, batch, "key")
    check_int32(positions=positions, block_tables=block_tables)
