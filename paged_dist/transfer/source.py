"""The cache that a resize, a reshard or a save starts from: its mesh, checked, and a copy of its key smoothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from paged_dist._errors import bad_value, require
from paged_dist.cache import CacheSpec, PagedKVCache
from paged_dist.mesh import MeshAxes
from paged_dist.pages import PageAllocator

CHUNK_BYTES = 64 << 20  # of pages that are under way at once, on each device


def source_mesh(cache: PagedKVCache, allocator: PageAllocator, axes: MeshAxes) -> Mesh:
    """The mesh of a cache whose pages `allocator` gives out.

    Raises:
      ValueError: a cache that is on no devices, or an allocator of another cache.
    """
    mesh = cache.mesh
    if not isinstance(mesh, Mesh):
        raise bad_value("cache.mesh", mesh, "must be a jax.sharding.Mesh", "PagedKVCache.create(spec, mesh)")
    require(allocator.spec == cache.spec, "allocator.spec", allocator.spec, f"must be the cache's, {cache.spec}")
    sizes = tuple(axes.size(mesh, part) for part in ("data", "context"))
    has = allocator.num_shards, allocator.num_context_shards
    require(has == sizes, "allocator", has, f"must have the data and context sizes of the cache's mesh, {sizes}")
    return mesh


def copy_smoothing(cache: PagedKVCache, mesh: Mesh, spec: CacheSpec, axes: MeshAxes) -> jax.Array | None:
    """A copy of the key smoothing of `cache`, for a cache of `spec` on `mesh` to own: the old one may be donated."""
    if cache.key_smoothing is None:
        return None
    return jax.device_put(jnp.copy(cache.key_smoothing), NamedSharding(mesh, spec.key_smoothing_partition_spec(axes)))
