"""`save` and `restore`: the live pages and their allocator in a folder, where a save is whole or counts for nothing.

`saved_pages` is the form of the files, `device_io` brings pages to them and back, `manifest` makes a save valid or not,
`lockstep` keeps all processes in step.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from jax.sharding import Mesh

from paged_dist._errors import require
from paged_dist.cache import CacheSpec, PagedKVCache
from paged_dist.mesh import MeshAxes
from paged_dist.pages import PageAllocator
from paged_dist.transfer import device_io, lockstep, manifest
from paged_dist.transfer.saved_pages import SavedPages, manifest_of
from paged_dist.transfer.source import CHUNK_BYTES, source_mesh
from paged_dist.transfer.staging import page_shards


def save(
    folder: str | os.PathLike,
    cache: PagedKVCache,
    allocator: PageAllocator,
    *,
    overwrite: bool = False,
    axes: MeshAxes = MeshAxes(),
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Writes the live pages, with the sequences and cached prefixes that they belong to, for `restore`.

    Every process calls it and writes its own shards, a chunk at a time, into a new folder in `folder`. Process 0 then
    writes the manifest that names the files, and with that the save is there. Until then the save before it counts,
    whole, whatever interrupts the call; the next call removes what is left over. Nothing is renamed, so that `folder`
    may be on a mounted bucket. One save at a time goes to a folder. Other files in it stay.

    Args:
      folder: on a filesystem that all processes share. It is made where there is none; its parent must be there.
      cache, allocator: as they are. Copies that are due must be made first.
      overwrite: whether `folder` may hold a save, which this one replaces, or other files.
      axes: which mesh axes are data, context and model.
      chunk_bytes: of pages that each device stages, and the host holds of each device, at once.

    Raises:
      ValueError: an allocator of another cache, copies that are due, a folder that exists, a file, a symbolic link
        (also with `overwrite`), or a folder that another save is being written to.
      OSError: it could not be written. It is raised on every process, whichever could not write, and says what is there
        where that is more than the save before.

    Example:
      >>> import tempfile
      >>> mesh = pd.make_pod_mesh(model=8)
      >>> cache = pd.PagedKVCache.create(pd.CacheSpec(8, 128, num_pages=8), mesh)
      >>> pages = pd.PageAllocator(cache.spec, mesh, num_sequences=2, pages_per_sequence=4)
      >>> _ = pages.allocate(0, 300)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     pd.save(folder, cache, pages, overwrite=True)
      ...     cache, pages = pd.restore(folder, mesh)
      >>> pages.lengths.tolist()
      [300, 0]
    """
    mesh, folder = source_mesh(cache, allocator, axes), os.path.abspath(folder)
    state = allocator.to_state()
    new = manifest.NewSave(folder, lockstep.shared_token(manifest.TOKEN_BYTES))
    saved = SavedPages(folder, new.data, cache.spec, axes.size(mesh, "model"), page_shards(mesh, axes))

    def begin() -> None:
        manifest.check_place(folder, overwrite)
        new.begin(lockstep.is_first_process())

    def write() -> None:
        device_io.write_pages(saved, cache, mesh, allocator, axes, chunk_bytes)

    def write_smoothing() -> None:  # by itself: it gathers, and all processes must have come as far
        if cache.key_smoothing is not None:
            device_io.write_smoothing(saved.smoothing_path, cache.key_smoothing)

    def commit() -> None:
        if lockstep.is_first_process():
            new.commit(told)

    try:
        for step in (begin, write, write_smoothing):
            lockstep.together(step, otherwise=new.withdraw)
        told = lockstep.together(lambda: _manifest_on_first(saved, state, cache), otherwise=new.withdraw)
        lockstep.together(commit)
    except BaseException:
        if lockstep.is_first_process():  # no other may where it cannot know whether the save has become valid
            new.withdraw()
        raise
    finally:
        new.close()


def _manifest_on_first(saved: SavedPages, state: dict[str, Any], cache: PagedKVCache) -> dict[str, Any]:
    """What the manifest says, on process 0; nothing on the others."""
    return manifest_of(saved, state, cache.key_smoothing is not None) if lockstep.is_first_process() else {}


def restore(
    folder: str | os.PathLike,
    mesh: Mesh,
    *,
    num_pages: int | None = None,
    num_sequences: int | None = None,
    axes: MeshAxes = MeshAxes(),
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[PagedKVCache, PageAllocator]:
    """The cache and the allocator that `save` wrote, on any mesh that the heads divide over.

    Each process reads the pages and heads of its own shards, a chunk at a time. It checks every record that it reads
    against the record's digest.

    Args:
      folder: what `save` was given.
      mesh: where to put the cache: of any shape, also of other processes than those that saved.
      num_pages, num_sequences: of the pool and the batch; default: as they were saved.
      axes, chunk_bytes: as in `save`.

    Returns:
      (cache, allocator): the same rows and lengths; page ids differ where the mesh or the pool does.

    Raises:
      ValueError: no finished save there, a file that is damaged or missing (its name, and what is wrong), or sizes that
        do not divide over the mesh.
      OutOfPages: the sequences do not fit in `num_pages`.

    Example:
      >>> import tempfile
      >>> saving, mesh = pd.make_pod_mesh(model=8), pd.make_pod_mesh(data=2, context=2, model=2)
      >>> cache = pd.PagedKVCache.create(pd.CacheSpec(8, 128, num_pages=8), saving)
      >>> pages = pd.PageAllocator(cache.spec, saving, num_sequences=2, pages_per_sequence=4)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     pd.save(folder, cache, pages, overwrite=True)
      ...     cache, pages = pd.restore(folder, mesh, num_pages=32)
      >>> cache.spec.num_pages, dict(cache.mesh.shape)
      (32, {'data': 2, 'context': 2, 'model': 2})
    """
    path = os.path.abspath(folder)
    require(isinstance(mesh, Mesh), "mesh", mesh, "must be a jax.sharding.Mesh: it has devices")
    return lockstep.together(lambda: _restore(path, mesh, num_pages, num_sequences, axes, chunk_bytes))


def _restore(
    folder: str, mesh: Mesh, num_pages: int | None, num_sequences: int | None, axes: MeshAxes, chunk_bytes: int
) -> tuple[PagedKVCache, PageAllocator]:
    """`restore` on this process."""
    data, told = manifest.read_newest(folder)
    spec = CacheSpec(**told["spec"])
    saved = SavedPages(folder, data, spec, told["model"], told["page_shards"])
    saved.check_files(told["files"])
    old = PageAllocator.from_state(told["allocator"], spec)
    new_spec = spec if num_pages is None else dataclasses.replace(spec, num_pages=num_pages)
    new, moves = old.moved(new_spec, mesh, num_sequences=num_sequences, axes=axes)
    cache = device_io.read_pages(saved, new_spec, mesh, axes, moves, chunk_bytes)
    if told["has_key_smoothing"]:
        cache = cache.with_smoothing(device_io.read_smoothing(saved, new_spec, mesh, axes))
    return cache, new
