"""Staging caches: small caches that hold the pages of one chunk while they go elsewhere.

A transfer copies some pages of each shard into a staging cache, brings that to another mesh or to a file (or fills it
from there), and copies its pages into the pool where they belong. All chunks of a transfer have one size, so that they
run one program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paged_dist.cache import CacheSpec, PagedKVCache
from paged_dist.kernels.arithmetic import power_of_two_at_least, round_up
from paged_dist.kernels.cache_update.page_copy import copy_stored_pages
from paged_dist.mesh import MeshAxes
from paged_dist.ops.arguments import Implementation, interpret_of
from paged_dist.ops.sharded_call import run_sharded


def page_shards(mesh: Mesh, axes: MeshAxes) -> int:
    """Shards of a pool's pages: data x context."""
    return axes.size(mesh, "data") * axes.size(mesh, "context")


def round_slots(spec: CacheSpec, slots: int) -> int:
    """`slots` pages on each shard, rounded up to a number that a cache of `spec` may have."""
    return round_up(slots, spec.shard_page_multiple)


def power_of_two(count: int) -> int:
    """`count`, rounded up to a power of two, so that staging caches come in few sizes: each size is a program."""
    return power_of_two_at_least(max(1, count))


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
    """Copies pages of `source` into `into`, which is donated: caches on one mesh that differ in num_pages only.

    Args:
      lists: for each shard of pages [n, 2] int32: (page of source, page of into), ids local to the shard.
      length: how many copies of each shard one launch makes. Calls with the same length share a program.

    Returns:
      `into` with the pages copied.
    """
    at, mesh = P(axes.pages or None), into.mesh
    assert isinstance(mesh, Mesh)  # `zeros_like_cache` made it, or it holds the pages that go elsewhere
    for begin in range(0, max(map(len, lists)), length):
        part = _padded([some[begin : begin + length] for some in lists], length)
        copies, counts = (_global_array(x, mesh, P(*at, *(None,) * (x.ndim - 1))) for x in part)
        into = copy_chunk(into, source, copies, counts, axes=axes, implementation=implementation)
    return into


@functools.partial(jax.jit, static_argnames=("axes", "implementation"), donate_argnames="into")
def copy_chunk(
    into: PagedKVCache,
    source: PagedKVCache,
    copies: jax.Array,
    counts: jax.Array,
    *,
    axes: MeshAxes,
    implementation: Implementation,
) -> PagedKVCache:
    """One launch of `copy_between`: `counts` [shards] of each shard's `copies` [shards, length, 2]."""

    def local(into: PagedKVCache, source: PagedKVCache, copies: jax.Array, counts: jax.Array) -> PagedKVCache:
        pools, sources = ((*c.stacked_pages(), *c.stacked_scales().values()) for c in (into, source))
        interpret = interpret_of(implementation)
        made = copy_stored_pages(pools, copies[0], counts[0], into.spec.page_size, interpret, sources=sources)
        return into.with_pools(*made)

    mesh, pools, pages = into.mesh, into.partition_specs(axes), axes.pages or None
    assert mesh is not None  # see `copy_between`
    specs = (pools, source.partition_specs(axes), P(pages, None, None), P(pages))
    return run_sharded(local, mesh, specs, pools, into, source, copies, counts)


def zeros_like_cache(spec: CacheSpec, mesh: Mesh, axes: MeshAxes) -> PagedKVCache:
    """`PagedKVCache.create` without its warnings, which the cache that the pages come from has given."""
    return _zeros(spec, mesh, axes)()


@functools.lru_cache(maxsize=8)
def _zeros(spec: CacheSpec, mesh: Mesh, axes: MeshAxes) -> Callable[[], PagedKVCache]:
    """The program of `zeros_like_cache`, which is compiled once for all chunks of a transfer."""
    made = PagedKVCache.abstract(spec, mesh, axes=axes)
    shardings = PagedKVCache.shardings(spec, mesh, axes=axes)
    return jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), made), out_shardings=shardings)
