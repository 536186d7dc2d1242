"""Inside a `shard_map`: the check of this shard's part of the cache, and its columns of a block table as local ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paged_dist._compat import varying_axes
from paged_dist.cache import PagedKVCache
from paged_dist.kernels.stripes import Stripes
from paged_dist.mesh import MeshAxes
from paged_dist.ops.arguments import check_axes


def check_shard(cache: PagedKVCache, axes: MeshAxes) -> None:
    """Inside a `shard_map`: `cache` holds this shard's part over `axes`.

    Raises:
      ValueError: no `shard_map` around the call splits one of `axes`, or the pools are another part, in which page
        ids and heads would mean others.
    """
    check_axes(axes)
    scope = jax.sharding.get_abstract_mesh()
    axes.check(scope.manual_axes, "the shard_maps around this call split", "outside of one, use the op without _local")
    cache.check_part(scope, axes)


def context_size(axes: MeshAxes) -> int:
    """Inside a `shard_map`: C, the number of shards that the pages of one sequence are split over."""
    return jax.lax.axis_size(axes.names("context")) if axes.names("context") else 1


def invariant_over_context(x: jax.Array, axes: MeshAxes) -> jax.Array:
    """Inside a `shard_map` with one context shard: `x`, typed as the same on every one.

    In a caller's `shard_map` the pools, and so `x`, vary over context, and only a reduction changes the type; its
    groups are single, and XLA on TPU drops it.
    """
    names = tuple(name for name in axes.names("context") if name in varying_axes(x))
    return jax.lax.psum(x, names) if names else x


def local_pages(block_tables: jax.Array, pages: int, axes: MeshAxes) -> tuple[jax.Array, Stripes | None]:
    """Inside a `shard_map`: this shard's columns of `block_tables`, with local page ids, and which columns they are.

    From [B, S] global ids to [B, ceil(S / C)] local ones: entry [b, k] is the table's [b, first[b] + k * C], less the
    first id that this shard owns. `PageOwners` says which columns belong to which of the C context shards.

    Entries that are not this shard's own come out negative or past the pool: wrong ids, unused entries, and the columns
    that pad the table where C does not divide S.

    Args:
      block_tables: [B, S] int32 global ids. This shard r = data shard * C + context shard owns ids
        [r * pages, (r + 1) * pages).
      pages: pages on each shard.

    Returns:
      ([B, ceil(S / C)] int32, Stripes), or ([B, S] int32, None) with one context shard.
    """
    size, stripes = context_size(axes), None
    if size > 1:
        owner = jax.lax.div(jnp.maximum(block_tables[:, 0], 0), jnp.int32(pages))  # 0 where a row has no page
        here = jax.lax.axis_index(axes.names("context")).astype(jnp.int32)
        stripes = Stripes(jax.lax.rem(here - jax.lax.rem(owner, jnp.int32(size)) + size, jnp.int32(size)), size)
        block_tables = _own_columns(block_tables, stripes)
    names = tuple(name for name in axes.pages if jax.lax.axis_size(name) > 1)  # those of size 1 change no number
    if names:
        block_tables = block_tables - jax.lax.axis_index(names).astype(block_tables.dtype) * pages
    return block_tables, stripes


def _own_columns(block_tables: jax.Array, stripes: Stripes) -> jax.Array:
    """Columns first[b] + k * stride of row b of a table [B, S], for every k: [B, ceil(S / stride)]."""
    stride, (rows, columns) = stripes.stride, block_tables.shape
    groups = -(-columns // stride)
    padded = jnp.pad(block_tables, ((0, 0), (0, groups * stride - columns)), constant_values=-1)
    # No gather, nor a slice for each of the columns: this is two small operations on a TPU.
    is_mine = stripes.first[:, None] == jnp.arange(stride, dtype=jnp.int32)
    return jnp.sum(jnp.where(is_mine[:, None], padded.reshape(rows, groups, stride), 0), axis=-1, dtype=jnp.int32)
