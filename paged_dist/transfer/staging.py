"""Staging caches: small caches that hold the pages of one chunk while they go elsewhere.

A transfer copies some pages of each shard into a staging cache, brings that to another mesh or to a file (or fills it
from there), and copies its pages into the pool where they belong. All chunks of a transfer have one size, so that they
run one program.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paged_dist.cache import CacheSpec, PagedKVCache
from paged_dist.kernels.cache_update.page_copy import copy_stored_pages
from paged_dist.kernels.scale_layout import pages_of_whole_tiles
from paged_dist.mesh import MeshAxes
from paged_dist.ops.arguments import Implementation, interpret_of
from paged_dist.ops.sharded_call import run_sharded


def page_shards(mesh: Mesh, axes: MeshAxes) -> int:
    """Shards of a pool's pages: data x context."""
    return axes.size(mesh, "data") * axes.size(mesh, "context")


def round_slots(spec: CacheSpec, slots: int) -> int:
    """`slots` pages a shard, rounded up to what a cache of `spec` may have."""
    unit = pages_of_whole_tiles(spec.page_size) if spec.is_quantized else 1
    return -(-slots // unit) * unit


def power_of_two(count: int) -> int:
    """`count`, rounded up to a power of two: so few sizes of staging there are, whatever the number of live pages."""
    return 1 << max(0, count - 1).bit_length()


def staging_spec(spec: CacheSpec, shards: int, slots: int) -> CacheSpec:
    """The spec of a cache with `slots` pages on each shard."""
    return dataclasses.replace(spec, num_pages=shards * slots)


def _padded(lists: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Each shard's list of copies [n, 2], padded to one length: ([shards, length, 2], [shards]) int32, the n's."""
    made = np.zeros((len(lists), max(1, length), 2), np.int32)
    for shard, some in zip(made, lists, strict=True):
        shard[: len(some)] = some
    return made, np.array([len(some) for some in lists], np.int32)


def _global_array(array: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """A global array from every process's own copy of it."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def copy_between(
    into: PagedKVCache,
    source: PagedKVCache,
    lists: list[np.ndarray],
    length: int,
    *,
    axes: MeshAxes,
    implementation: Implementation = None,
) -> PagedKVCache:
    """`into`, donated, with pages of `source`: two caches of one mesh that differ in their number of pages.

    Args:
      lists: of each page shard [n, 2] int32, local ids: page of source, page of into.
      length: how many of a shard's list are copied at once. Calls with the same one share a program.
    """
    at, mesh = P(axes.pages or None), into.mesh
    assert isinstance(mesh, Mesh)  # `zeros_like_cache` made it, or it holds the pages that go elsewhere
    for begin in range(0, max(map(len, lists)), length):
        part = _padded([some[begin : begin + length] for some in lists], length)
        copies, counts = (_global_array(x, mesh, P(*at, *(None,) * (x.ndim - 1))) for x in part)
        into = copy_chunk(into, source, copies, counts, axes=axes, implementation=implementation)
    return into


@functools.partial(jax.jit, static_argnames=("axes", "implementation"), donate_argnames="into")
def copy_chunk(into, source, copies, counts, *, axes, implementation):
    def local(into, source, copies, counts):
        pools, sources = ((*c.stacked_pages(), *c.stacked_scales().values()) for c in (into, source))
        interpret = interpret_of(implementation)
        made = copy_stored_pages(pools, copies[0], counts[0], into.spec.page_size, interpret, sources=sources)
        return into.with_pools(*made)

    pools, pages = into.partition_specs(axes), axes.pages or None
    specs = (pools, source.partition_specs(axes), P(pages, None, None), P(pages))
    return run_sharded(local, into.mesh, specs, pools, into, source, copies, counts)


def zeros_like_cache(spec: CacheSpec, mesh: Mesh, axes: MeshAxes) -> PagedKVCache:
    """`PagedKVCache.create`, without its warnings: the cache it comes from had them."""
    return _zeros(spec, mesh, axes)()


@functools.lru_cache(maxsize=8)
def _zeros(spec: CacheSpec, mesh: Mesh, axes: MeshAxes):
    """The program of `zeros_like_cache`, compiled once for all chunks."""
    made = PagedKVCache.abstract(spec, mesh, axes=axes)
    shardings = PagedKVCache.shardings(spec, mesh, axes=axes)
    return jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), made), out_shardings=shardings)
