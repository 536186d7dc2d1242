"""Live pages from devices to the files of a save, and back: a chunk at a time, through staging caches.

Each process writes, and reads, what its own devices hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import BinaryIO

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from paged_dist._errors import require
from paged_dist.cache import CacheSpec, PagedKVCache
from paged_dist.kernels.tiling import LANES
from paged_dist.mesh import MeshAxes
from paged_dist.pages import PageAllocator
from paged_dist.transfer import lockstep
from paged_dist.transfer.files import write_file
from paged_dist.transfer.saved_pages import FileKey, RecordWriter, SavedPages
from paged_dist.transfer.staging import (
    copy_between,
    page_shards,
    power_of_two,
    round_slots,
    staging_spec,
    zeros_like_cache,
)


def write_pages(
    saved: SavedPages, cache: PagedKVCache, mesh: Mesh, allocator: PageAllocator, axes: MeshAxes, chunk_bytes: int
) -> None:
    """Writes the live pages of this process's shards of `cache`, which is on `mesh`, into the files of `saved`."""
    shards, live = saved.page_shards, allocator.live_pages
    each = cache.spec.num_pages // shards
    leaving = [live[live // each == r] for r in range(shards)]
    longest = max(map(len, leaving))
    slots = _slots_of_chunk(cache.spec, mesh, axes, longest, chunk_bytes)
    with contextlib.ExitStack() as stack:
        files: dict[FileKey, RecordWriter] = {}
        for key in own_files(cache, saved):
            files[key] = stack.enter_context(RecordWriter(saved.path(saved.name(key))))
        for begin in range(0, longest, slots):
            part = [some[begin : begin + slots] for some in leaving]
            lists = [np.stack([some % each, np.arange(len(some))], axis=1) for some in part]
            staged = zeros_like_cache(staging_spec(cache.spec, shards, slots), mesh, axes)
            staged = copy_between(staged, cache.without_smoothing(), lists, slots, axes=axes)
            for key, arrays in host_parts(staged, saved, slots):
                for i, page in enumerate(part[key.page_shard]):
                    files[key].add(int(page), b"".join(np.ascontiguousarray(x[i]).tobytes() for x in arrays))
        for writer in files.values():
            writer.finish()


def write_smoothing(path: str, smoothing: jax.Array) -> None:
    """Writes a key smoothing, gathered from all processes, as process 0's file."""
    from jax.experimental import multihost_utils

    several = jax.process_count() > 1
    host = multihost_utils.process_allgather(smoothing, tiled=True) if several else np.asarray(smoothing)
    if lockstep.is_first_process():
        write_file(path, np.ascontiguousarray(host, np.float32).tobytes())


def read_pages(
    saved: SavedPages, spec: CacheSpec, mesh: Mesh, axes: MeshAxes, moves: np.ndarray, chunk_bytes: int
) -> PagedKVCache:
    """A cache of `spec` on `mesh` with the saved pages, zeros in all other pages.

    Args:
      moves: [m, 2] int32: (page as it was saved, page of the cache).
    """
    shards = page_shards(mesh, axes)
    each = spec.num_pages // shards
    arriving = [moves[moves[:, 1] // each == r] for r in range(shards)]
    longest = max(map(len, arriving))
    slots = _slots_of_chunk(spec, mesh, axes, longest, chunk_bytes)
    cache = zeros_like_cache(spec, mesh, axes)
    for begin in range(0, longest, slots):
        part = [some[begin : begin + slots] for some in arriving]
        staged = _read_staged(saved, staging_spec(spec, shards, slots), mesh, axes, [some[:, 0] for some in part])
        lists = [np.stack([np.arange(len(some)), some[:, 1] % each], axis=1) for some in part]
        cache = copy_between(cache, staged, lists, slots, axes=axes)
        jax.block_until_ready(cache)  # or the next chunks' staging would pile up
    return cache


def read_smoothing(saved: SavedPages, spec: CacheSpec, mesh: Mesh, axes: MeshAxes) -> jax.Array:
    """The saved key smoothing, for a cache of `spec` on `mesh`."""
    smoothing = saved.read_smoothing()
    at = NamedSharding(mesh, spec.key_smoothing_partition_spec(axes))
    return jax.make_array_from_callback(smoothing.shape, at, lambda index: smoothing[index])


def _slots_of_chunk(spec: CacheSpec, mesh: Mesh, axes: MeshAxes, longest: int, chunk_bytes: int) -> int:
    """Pages of each shard in a chunk, where `longest` are the most that a shard has."""
    require(chunk_bytes >= 1, "chunk_bytes", chunk_bytes, "must be at least 1")
    page_bytes = spec.bytes_per_token * spec.page_size // axes.size(mesh, "model")
    return round_slots(spec, max(1, min(power_of_two(longest), chunk_bytes // page_bytes)))


# From devices.


def own_files(cache: PagedKVCache, saved: SavedPages) -> list[FileKey]:
    """The files that this process writes. Every file is written by one process."""
    return [_file_of(s, saved, cache.spec.num_pages // saved.page_shards) for s in _owned(cache.key_pages)]


def _owned(array: jax.Array) -> list[jax.Shard]:
    """The shards of an array on this process's devices, repeated ones left out."""
    return [s for s in array.addressable_shards if s.replica_id == 0]


def _file_of(shard: jax.Shard, saved: SavedPages, pages: int) -> FileKey:
    """The file for a shard of a pool that has `pages` pages on each shard."""
    axis = _head_axis(saved.spec)
    heads, some = shard.index[axis], shard.index[axis + 1]
    return FileKey((some.start or 0) // pages, (heads.start or 0) // saved.heads)


def _head_axis(spec: CacheSpec) -> int:
    """The axis of a stored array along which its heads lie; its pages, or rows of scales, lie along the next."""
    return 0 if spec.num_layers is None else 1


def host_parts(staged: PagedKVCache, saved: SavedPages, slots: int) -> Iterator[tuple[FileKey, list[np.ndarray]]]:
    """(file, its part of each array [slots, L, heads, ...]) of each file of this process, one after another."""
    for shards in zip(*(_owned(getattr(staged, name)) for name in saved.parts), strict=True):
        yield _file_of(shards[0], saved, slots), [_page_major(np.asarray(s.data), saved.spec, slots) for s in shards]


def _page_major(x: np.ndarray, spec: CacheSpec, slots: int) -> np.ndarray:
    """A shard of an array with its pages first: [slots, L, heads, rows, lanes], of scales [slots, L, heads, P]."""
    x = x if spec.num_layers is not None else x[None]
    if x.ndim == 4:  # rows of scales
        x = x.reshape(*x.shape[:2], slots, spec.page_size)
    return np.moveaxis(x, 2, 0)


# To devices.


def _read_staged(
    saved: SavedPages, spec: CacheSpec, mesh: Mesh, axes: MeshAxes, pages: list[np.ndarray]
) -> PagedKVCache:
    """A staging cache of `spec` with the saved page pages[r][i] in slot i of shard r."""
    like = PagedKVCache.abstract(spec, mesh, axes=axes)
    slots, axis = spec.num_pages // len(pages), _head_axis(spec)
    read: dict[tuple[range, int], dict[str, np.ndarray]] = {}  # once for all devices with the same heads and pages
    found: dict[str, list[jax.Array]] = {name: [] for name in saved.parts}
    for device, index in like.key_pages.sharding.addressable_devices_indices_map(like.key_pages.shape).items():
        assert index is not None  # it is, for a NamedSharding
        heads = range(spec.num_kv_heads)[index[axis]]
        shard = range(spec.num_pages)[index[axis + 1]].start // slots
        if (heads, shard) not in read:
            parts = _read_shard(saved, heads, pages[shard].tolist(), slots)
            read[heads, shard] = {name: _as_stored(x, spec, getattr(like, name).dtype) for name, x in parts.items()}
        for name, x in read[heads, shard].items():
            found[name].append(jax.device_put(x, device))
    put = lambda a, parts: jax.make_array_from_single_device_arrays(a.shape, a.sharding, parts)
    return PagedKVCache(spec=spec, mesh=mesh, **{name: put(getattr(like, name), x) for name, x in found.items()})


def _read_shard(saved: SavedPages, heads: range, pages: list[int], slots: int) -> dict[str, np.ndarray]:
    """Each array's part [L, heads, slots, ...] of one shard: some of the heads, and a saved page in each slot."""
    each = saved.spec.num_pages // saved.page_shards
    made = {
        name: np.zeros((layers, len(heads), slots, *rest), dtype)
        for name, ((layers, _, *rest), dtype) in saved.parts.items()
    }
    for part in sorted({head // saved.heads for head in heads}):
        first = part * saved.heads
        mine = range(max(heads.start, first), min(heads.stop, first + saved.heads))
        here, there = (slice(mine.start - x, mine.stop - x) for x in (heads.start, first))
        with contextlib.ExitStack() as stack:
            files: dict[FileKey, BinaryIO] = {}
            for i, page in enumerate(pages):
                key = FileKey(page // each, part)
                if key not in files:
                    files[key] = stack.enter_context(open(saved.path(saved.name(key)), "rb"))
                for name, x in saved.read_record(files[key], key, page).items():
                    made[name][:, here, i] = x[:, there]
    return made


def _as_stored(x: np.ndarray, spec: CacheSpec, dtype: np.dtype) -> np.ndarray:
    """Read pages [L, heads, slots, ...] as an array of the cache stores them."""
    if x.ndim == 4:  # scales
        x = x.reshape(*x.shape[:2], -1, LANES)
    x = np.ascontiguousarray(x if spec.num_layers is not None else x[0])
    return x.view(np.dtype(dtype))
