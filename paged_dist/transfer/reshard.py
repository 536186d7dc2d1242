"""`reshard`: the live pages on another mesh, a bounded part at a time."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh

from paged_dist._errors import bad_value, require
from paged_dist.cache import PagedKVCache
from paged_dist.mesh import MeshAxes
from paged_dist.pages import PageAllocator
from paged_dist.transfer.exchange import Side, exchange_pages
from paged_dist.transfer.source import CHUNK_BYTES, source_mesh


def reshard(
    cache: PagedKVCache,
    allocator: PageAllocator,
    new_mesh: Mesh,
    *,
    num_pages: int | None = None,
    num_sequences: int | None = None,
    axes: MeshAxes = MeshAxes(),
    new_axes: MeshAxes | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[PagedKVCache, PageAllocator]:
    """The live pages on another mesh: another shape over the same devices, or other devices (prefill to decode pod).

    Pages go in chunks: every shard stages some for each shard of the new mesh, one exchange brings them there, each
    shard writes them into its pool. All chunks run one program. No device and no host ever holds a whole pool. A device
    that both meshes have holds its parts of both caches, and about `chunk_bytes` twice.

    Args:
      cache, allocator: as they are; see `resize`.
      new_mesh: the devices and the shape. Where it has other devices than the cache's mesh, all of them must belong to
        this process; for a mesh of other processes take `save` and `restore`.
      num_pages, num_sequences: of the new pool and batch; default: as before.
      axes, new_axes: which mesh axes are data, context and model, here and there; new_axes None: as here.
      chunk_bytes: what each device stages at once; at least a page for each shard of the other side.

    Returns:
      (cache, allocator) on the new mesh: the same rows and lengths, other page ids.

    Raises:
      ValueError: sizes that do not divide over the new mesh, an allocator of another cache, copies that are due, or
        other devices in a run of several processes.
      OutOfPages: the live pages do not fit. Nothing is moved then.

    Example:
      >>> prefill, decode = pd.make_pod_mesh(model=8), pd.make_pod_mesh(data=2, model=4)
      >>> cache = pd.PagedKVCache.create(pd.CacheSpec(8, 128, num_pages=8), prefill)
      >>> pages = pd.PageAllocator(cache.spec, prefill, num_sequences=2, pages_per_sequence=4)
      >>> _ = pages.allocate(1, 300)
      >>> cache, pages = pd.reshard(cache, pages, decode)
      >>> dict(cache.mesh.shape), pages.block_tables[1].tolist()  # row 1 is on data shard 1, which owns pages 4 to 7
      ({'data': 2, 'context': 1, 'model': 4}, [4, 5, 6, -1])
    """
    new_axes = axes if new_axes is None else new_axes
    mesh = source_mesh(cache, allocator, axes)
    require(isinstance(new_mesh, Mesh), "new_mesh", new_mesh, "must be a jax.sharding.Mesh: it has devices")
    require(chunk_bytes >= 1, "chunk_bytes", chunk_bytes, "must be at least 1")
    if set(mesh.devices.flat) != set(new_mesh.devices.flat) and jax.process_count() > 1:
        works = "save() from this mesh and restore() on that one"
        raise bad_value("new_mesh", dict(new_mesh.shape), "is of other devices, in a run of several processes", works)
    spec = cache.spec if num_pages is None else dataclasses.replace(cache.spec, num_pages=num_pages)
    new, moves = allocator.moved(spec, new_mesh, num_sequences=num_sequences, axes=new_axes)
    here, there = Side(cache.spec, mesh, axes), Side(spec, new_mesh, new_axes)
    return exchange_pages(cache, here, there, moves, chunk_bytes), new
