"""`resize`: the live pages in a pool of another size, on the same mesh."""

from __future__ import annotations

import dataclasses

import numpy as np

from paged_dist.cache import PagedKVCache
from paged_dist.mesh import MeshAxes
from paged_dist.pages import PageAllocator
from paged_dist.transfer.exchange import Side, exchange_pages
from paged_dist.transfer.source import CHUNK_BYTES, copy_smoothing, source_mesh
from paged_dist.transfer.staging import copy_between, page_shards, zeros_like_cache

RESIZE_COPIES = 2048  # pages that one launch copies on each shard, however many are live: all launches are one program


def resize(
    cache: PagedKVCache, num_pages: int, allocator: PageAllocator, *, axes: MeshAxes = MeshAxes()
) -> tuple[PagedKVCache, PageAllocator]:
    """The live pages in a pool of `num_pages`, on the same mesh: for more or fewer sequences than were planned.

    Page ids change, for shard r owns the ids [r * n, (r + 1) * n): use the new allocator's tables. Each shard copies
    its own pages; nothing crosses a link between chips. Both pools are in memory until `cache` is dropped.

    Args:
      cache: as it is. Pages that no sequence holds and no prompt may begin with are left behind.
      num_pages: N of the new pool, over all shards.
      allocator: gives out the cache's pages; it stays as it is. Its copies that are due must be made first.
      axes: which mesh axes are data, context and model.

    Returns:
      (cache, allocator) of the new pool. Pages that are not live are zeros.

    Raises:
      ValueError: sizes that do not divide over the mesh, an allocator of another cache, or copies that are due.
      OutOfPages: the live pages of a shard do not fit. Nothing is moved then.

    Example:
      >>> mesh = pd.make_pod_mesh(model=8)
      >>> cache = pd.PagedKVCache.create(pd.CacheSpec(8, 128, num_pages=4), mesh)
      >>> pages = pd.PageAllocator(cache.spec, mesh, num_sequences=2, pages_per_sequence=4)
      >>> _ = pages.allocate(0, 300)
      >>> cache, pages = pd.resize(cache, 16, pages)
      >>> cache.spec.num_pages, pages.lengths.tolist(), pages.free_pages()
      (16, [300, 0], 13)
    """
    mesh = source_mesh(cache, allocator, axes)
    spec = dataclasses.replace(cache.spec, num_pages=num_pages)
    new, moves = allocator.moved(spec, mesh, axes=axes)
    shards = page_shards(mesh, axes)
    here, there = cache.spec.num_pages // shards, num_pages // shards
    if (moves[:, 0] // here != moves[:, 1] // there).any():  # a cached prefix goes to another context shard
        return exchange_pages(cache, Side(cache.spec, mesh, axes), Side(spec, mesh, axes), moves, CHUNK_BYTES), new
    lists = [moves[moves[:, 1] // there == r] - np.array([r * here, r * there], np.int32) for r in range(shards)]
    made = copy_between(zeros_like_cache(spec, mesh, axes), cache.without_smoothing(), lists, RESIZE_COPIES, axes=axes)
    return made.with_smoothing(copy_smoothing(cache, mesh, spec, axes)), new
