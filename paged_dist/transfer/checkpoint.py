"""Store: the live pages and their allocator in a folder, which is whole or not there.

A folder holds a manifest (`_manifest`) and, for each shard of pages and heads, a file of records, one a live page, with
the digest of each record beside it. Records are read one by one and checked as they are read. Nothing in it is executed
or unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from paged_dist._errors import require
from paged_dist.cache import CacheSpec, PagedKVCache
from paged_dist.mesh import MeshAxes
from paged_dist.pages import PageAllocator
from paged_dist.transfer import manifest as _manifest
from paged_dist.transfer.files import create, digest, digest_of_file, sync, write_all, write_file
from paged_dist.transfer.reshard import CHUNK_BYTES, mesh_of
from paged_dist.transfer.staging import (
    copy_between,
    page_shards,
    power_of_two,
    round_slots,
    staging_spec,
    zeros_like_cache,
)

_ARRAYS = ("key_pages", "value_pages", "key_scales", "value_scales")


def save(
    folder: str | os.PathLike,
    cache: PagedKVCache,
    allocator: PageAllocator,
    *,
    overwrite: bool = False,
    axes: MeshAxes = MeshAxes(),
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Writes the live pages, and the sequences and cached prefixes that they belong to, for `restore`.

    Every process calls it and writes its own shards, a chunk at a time, into a new folder in FOLDER; process 0 then
    writes the manifest that names them, and with it the save is there. Until then the one before is, whole, whatever
    interrupts the call, and what that leaves behind the next call removes. Nothing is renamed, so that FOLDER may be on
    a mounted bucket. One save at a time goes to a folder. What else lies in FOLDER stays.

    Args:
      folder: on a filesystem that all processes share. It is made where there is none; its parent must be there.
      cache, allocator: as they are. Copies that are due must be made first.
      overwrite: whether it may hold a save, which this one replaces, or other files.
      axes: which mesh axes are data, context and model.
      chunk_bytes: of pages that each device stages, and the host holds of each device, at once.

    Raises:
      ValueError: an allocator of another cache, copies that are due, a folder that exists, a file, a symbolic link
        (also with `overwrite`), or a folder that another save is being written to.
      OSError: it could not be written; on every process, whichever it was that could not. Says what is there where that
        is more than the save before.
    """
    mesh, folder = mesh_of(cache, allocator, axes), os.path.abspath(folder)
    state = allocator.to_state()
    new = _manifest.NewSave(folder, _token())
    saved = _Saved(folder, new.data, cache.spec, axes.size(mesh, "model"), page_shards(mesh, axes))

    def begin() -> None:
        _manifest.check_place(folder, overwrite)
        new.begin(_is_first())

    def write() -> None:
        with contextlib.ExitStack() as stack:
            _write_pages(stack, saved, cache, allocator, axes, chunk_bytes)

    def write_smoothing() -> None:  # by itself: it gathers, and all processes must have come as far
        if cache.key_smoothing is not None:
            _write_smoothing(saved.path("key_smoothing.bin"), cache.key_smoothing)

    def describe() -> dict | None:
        return _made_manifest(saved, state, cache.key_smoothing is not None) if _is_first() else None

    try:
        for step in (begin, write, write_smoothing, describe):
            manifest = _together(step, otherwise=new.withdraw)
        _together(lambda: new.commit(manifest) if _is_first() else None)
    except BaseException:
        if _is_first():  # no other may where it cannot know whether the save has become valid
            new.withdraw()
        raise
    finally:
        new.close()


def restore(
    folder: str | os.PathLike,
    mesh: Mesh,
    *,
    num_pages: int | None = None,
    num_sequences: int | None = None,
    axes: MeshAxes = MeshAxes(),
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[PagedKVCache, PageAllocator]:
    """The cache and the allocator of a folder that `save` wrote, on any mesh that the heads divide over.

    Each process reads the pages and heads of its own shards, a chunk at a time, and holds every record that it reads to
    its digest.

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
    """
    folder = os.path.abspath(folder)
    require(isinstance(mesh, Mesh), "mesh", mesh, "must be a jax.sharding.Mesh: it has devices")
    return _together(lambda: _restore(folder, mesh, num_pages, num_sequences, axes, chunk_bytes))


def _restore(folder, mesh, num_pages, num_sequences, axes, chunk_bytes):
    data, manifest = _manifest.read(folder)
    spec = CacheSpec(**manifest["spec"])
    saved = _Saved(folder, data, spec, manifest["model"], manifest["page_shards"])
    saved.check_files(manifest["files"])
    old = PageAllocator.from_state(manifest["allocator"], spec)
    new_spec = spec if num_pages is None else dataclasses.replace(spec, num_pages=num_pages)
    new, moves = old.moved(new_spec, mesh, num_sequences=num_sequences, axes=axes)
    shards = page_shards(mesh, axes)
    each = new_spec.num_pages // shards
    arriving = [moves[moves[:, 1] // each == r] for r in range(shards)]
    longest = max(map(len, arriving))
    slots = _slots(new_spec, mesh, axes, longest, chunk_bytes)
    cache = zeros_like_cache(new_spec, mesh, axes)
    staged_spec = staging_spec(new_spec, shards, slots)
    for begin in range(0, longest, slots):
        part = [some[begin : begin + slots] for some in arriving]
        staged = _read_staged(saved, staged_spec, mesh, axes, part)
        lists = [np.stack([np.arange(len(some)), some[:, 1] % each], axis=1) for some in part]
        cache = copy_between(cache, staged, lists, slots, axes=axes)
        jax.block_until_ready(cache)
    if manifest["has_key_smoothing"]:
        at = PagedKVCache.shardings(new_spec, mesh, key_smoothing=True, axes=axes).key_smoothing
        smoothing = saved.read_smoothing()
        made = jax.make_array_from_callback(smoothing.shape, at, lambda index: smoothing[index])
        cache = dataclasses.replace(cache, key_smoothing=made)
    return cache, new


# What lies in the folder


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A folder's files: one for each of `page_shards` x `model` shards, a record for each live page of it.

    A record is the page's part of each array, one after another, as stored: [L, heads, rows, lanes] of K and of V, and
    of 8-bit pages [L, heads, P] f32 of their scales.
    """

    folder: str  # as the user names it
    data: str  # the folder in it where the files are
    spec: CacheSpec
    model: int
    page_shards: int

    def name(self, shard: int, part: int) -> str:
        """The file of one shard of pages and one of heads."""
        return f"pages-{shard:05d}-{part:05d}.bin"

    def path(self, name: str) -> str:
        """A file's path."""
        return os.path.join(self.data, name)

    @functools.cached_property
    def heads(self) -> int:
        """Heads in a file."""
        return self.spec.num_kv_heads // self.model

    @functools.cached_property
    def parts(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, dtype) of each array's part of a record."""
        spec, layers = self.spec, self.spec.num_layers or 1
        pages = (layers, self.heads, *spec.pool_shape[-2:]), np.dtype(jnp.dtype(spec.dtype))
        parts = dict(key_pages=pages, value_pages=pages)
        if spec.is_quantized:
            scales = (layers, self.heads, spec.page_size), np.dtype(np.float32)
            parts |= dict(key_scales=scales, value_scales=scales)
        return parts

    @functools.cached_property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts.values())

    def check_files(self, files: dict[str, dict]) -> None:
        """Raises ValueError where a file that the manifest names is missing or, by size or digest, not what it says."""
        for name, told in files.items():
            path = self.path(name)
            require(os.path.isfile(path), "folder", self.folder, f"{name} is missing")
            size = os.path.getsize(path)
            intact = "digest" not in told or digest_of_file(path) == told["digest"]
            require(intact, "folder", self.folder, f"{name} is damaged: it is not what was written")
            require(
                size == told["bytes"], "folder", self.folder, f"{name} is damaged: {size} bytes, not {told['bytes']}"
            )

    @functools.cached_property
    def _indices(self) -> dict[str, dict[int, tuple[int, str]]]:
        return {}

    def index(self, name: str) -> dict[int, tuple[int, str]]:
        """page id -> (place, digest) of the records of one file."""
        if name not in self._indices:
            with open(self.path(name + ".json"), "rb") as f:
                told = json.loads(f.read())
            self._indices[name] = {page: (i, digest) for i, (page, digest) in enumerate(told)}
        return self._indices[name]

    def read_record(self, file, shard: int, part: int, page: int) -> dict[str, np.ndarray]:
        """A page's part of each array. Raises ValueError where it is not what was written."""
        name = self.name(shard, part)
        place, told = self.index(name)[page]
        file.seek(place * self.record_bytes)
        record = file.read(self.record_bytes)
        require(digest(record) == told, "folder", self.folder, f"{name} is damaged: the record of page {page}")
        found, at = {}, 0
        for array, (shape, dtype) in self.parts.items():
            size = math.prod(shape) * dtype.itemsize
            found[array] = np.frombuffer(record[at : at + size], dtype).reshape(shape)
            at += size
        return found

    def read_smoothing(self) -> np.ndarray:
        """The key smoothing [..., Hkv, D]."""
        return np.fromfile(self.path("key_smoothing.bin"), np.float32).reshape(self.spec.key_smoothing_shape)


def _made_manifest(saved: _Saved, state: dict, has_smoothing: bool) -> dict:
    """The manifest of files that are all there; FileNotFoundError where one is not."""
    files = {}
    for shard in range(saved.page_shards):
        for part in range(saved.model):
            name = saved.name(shard, part)
            for one in (name, name + ".json"):
                if not os.path.isfile(saved.path(one)):
                    why = "does every process see this folder? It must be on a filesystem that all share"
                    raise FileNotFoundError(f"{saved.path(one)}: no process wrote it; {why}")
            files[name] = {"bytes": os.path.getsize(saved.path(name))}
            files[name + ".json"] = _told(saved.path(name + ".json"))
    if has_smoothing:
        files["key_smoothing.bin"] = _told(saved.path("key_smoothing.bin"))
    return {
        "spec": dataclasses.asdict(saved.spec),
        "model": saved.model,
        "page_shards": saved.page_shards,
        "has_key_smoothing": has_smoothing,
        "allocator": state,
        "files": files,
    }


def _told(path: str) -> dict:
    return {"bytes": os.path.getsize(path), "digest": digest_of_file(path)}


# Pages between devices and files


def _slots(spec: CacheSpec, mesh: Mesh, axes: MeshAxes, longest: int, chunk_bytes: int) -> int:
    """Pages a shard in a chunk."""
    require(chunk_bytes >= 1, "chunk_bytes", chunk_bytes, "must be at least 1")
    a_page = spec.bytes_per_token * spec.page_size // axes.size(mesh, "model")
    return round_slots(spec, max(1, min(power_of_two(longest), chunk_bytes // a_page)))


def _write_pages(stack, saved: _Saved, cache: PagedKVCache, allocator: PageAllocator, axes, chunk_bytes: int) -> None:
    mesh, shards = cache.mesh, saved.page_shards
    each, live = cache.spec.num_pages // shards, allocator.live_pages
    leaving = [live[live // each == r] for r in range(shards)]
    longest = max(map(len, leaving))
    slots = _slots(cache.spec, mesh, axes, longest, chunk_bytes)
    files: dict[tuple[int, int], _Writer] = {}
    for key in _own_shards(cache, saved):
        files[key] = stack.enter_context(_Writer(saved.path(saved.name(*key))))
    for begin in range(0, longest, slots):
        part = [some[begin : begin + slots] for some in leaving]
        lists = [np.stack([some % each, np.arange(len(some))], axis=1) for some in part]
        staged = zeros_like_cache(staging_spec(cache.spec, shards, slots), mesh, axes)
        staged = copy_between(staged, cache.without_smoothing(), lists, slots, axes=axes)
        for key, arrays in _host_parts(staged, saved, slots):
            for i, page in enumerate(part[key[0]]):
                files[key].add(int(page), b"".join(np.ascontiguousarray(x[i]).tobytes() for x in arrays))
    for writer in files.values():
        writer.finish()


class _Writer:
    """A file of records, and the digests of them beside it."""

    def __init__(self, path: str):
        self._path, self._index = path, []

    def __enter__(self):
        self._file = create(self._path)
        return self

    def add(self, page: int, record: bytes) -> None:
        """Appends a page's record."""
        write_all(self._file, record)
        self._index.append([page, digest(record)])

    def finish(self) -> None:
        """Everything is on the disk when this returns."""
        sync(self._file)
        write_file(self._path + ".json", json.dumps(self._index).encode())

    def __exit__(self, *error):
        os.close(self._file)


def _own_shards(cache: PagedKVCache, saved: _Saved) -> list[tuple[int, int]]:
    """(shard of pages, shard of heads) of the files that this process writes: each once over all of them."""
    return [_shard_of(s, saved, cache.spec.num_pages // saved.page_shards) for s in _owned(cache.key_pages)]


def _owned(array: jax.Array):
    return [s for s in array.addressable_shards if s.replica_id == 0]


def _shard_of(shard, saved: _Saved, pages: int) -> tuple[int, int]:
    axis = 0 if saved.spec.num_layers is None else 1
    heads, some = shard.index[axis], shard.index[axis + 1]
    return (some.start or 0) // pages, (heads.start or 0) // saved.heads


def _host_parts(staged: PagedKVCache, saved: _Saved, slots: int) -> Iterator[tuple[tuple[int, int], list[np.ndarray]]]:
    """((shard of pages, shard of heads), [each array's [slots, L, heads, ...]]) of this process's, one by one."""
    arrays = [x for x in (getattr(staged, name) for name in _ARRAYS) if x is not None]
    for shards in zip(*map(_owned, arrays), strict=True):
        yield _shard_of(shards[0], saved, slots), [_page_major(np.asarray(s.data), saved.spec, slots) for s in shards]


def _page_major(x: np.ndarray, spec: CacheSpec, slots: int) -> np.ndarray:
    """A shard of an array with its pages first: [slots, L, heads, rows, lanes], of scales [slots, L, heads, P]."""
    x = x if spec.num_layers is not None else x[None]
    if x.ndim == 4:  # rows of scales
        x = x.reshape(*x.shape[:2], slots, spec.page_size)
    return np.moveaxis(x, 2, 0)


def _read_staged(saved: _Saved, spec: CacheSpec, mesh: Mesh, axes, part: list[np.ndarray]) -> PagedKVCache:
    """A staging cache with part[r][i], a row (page as saved, page there), in slot i of shard r."""
    shape = PagedKVCache.abstract(spec, mesh, axes=axes)
    shards, each = len(part), saved.spec.num_pages // saved.page_shards
    slots = spec.num_pages // shards
    axis = 0 if spec.num_layers is None else 1
    by_device: dict = {}

    def read(index) -> list[np.ndarray]:
        """Each array's part of one shard: of some heads, and of the pages of one shard."""
        heads = range(spec.num_kv_heads)[index[axis]]
        shard = range(spec.num_pages)[index[axis + 1]].start // slots
        made = {}
        for name, ((layers, _, *rest), dtype) in saved.parts.items():
            made[name] = np.zeros((layers, len(heads), slots, *rest), dtype)
        for of in sorted({h // saved.heads for h in heads}):
            first = of * saved.heads
            mine = range(max(heads.start, first), min(heads.stop, first + saved.heads))
            here, there = (slice(mine.start - x, mine.stop - x) for x in (heads.start, first))
            with contextlib.ExitStack() as stack:
                files: dict = {}
                for i, page in enumerate(part[shard][:, 0].tolist()):
                    key = page // each, of
                    if key not in files:
                        files[key] = stack.enter_context(open(saved.path(saved.name(*key)), "rb"))
                    for name, x in saved.read_record(files[key], *key, page).items():
                        made[name][:, here, i] = x[:, there]
        return [_as_stored(made[name], spec, getattr(shape, name)) for name in saved.parts]

    def place(index) -> list[np.ndarray]:
        key = tuple((s.start, s.stop) for s in index[: axis + 2])
        if key not in by_device:
            by_device[key] = read(index)
        return by_device[key]

    pages = shape.key_pages
    indices = pages.sharding.addressable_devices_indices_map(pages.shape)
    made = {}
    for n, name in enumerate(saved.parts):
        like = getattr(shape, name)
        local = [jax.device_put(place(index)[n], device) for device, index in indices.items()]
        made[name] = jax.make_array_from_single_device_arrays(like.shape, like.sharding, local)
    return PagedKVCache(spec=spec, mesh=mesh, **made)


def _as_stored(x: np.ndarray, spec: CacheSpec, like: jax.ShapeDtypeStruct) -> np.ndarray:
    """Read pages [L, heads, slots, ...] as an array of the cache stores them."""
    if x.ndim == 4:  # scales
        x = x.reshape(*x.shape[:2], -1, 128)
    x = np.ascontiguousarray(x if spec.num_layers is not None else x[0])
    return x.view(np.dtype(like.dtype))


def _write_smoothing(path: str, smoothing: jax.Array) -> None:
    from jax.experimental import multihost_utils

    several = jax.process_count() > 1
    host = multihost_utils.process_allgather(smoothing, tiled=True) if several else np.asarray(smoothing)
    if _is_first():
        write_file(path, np.ascontiguousarray(host, np.float32).tobytes())


# All processes together


def _is_first() -> bool:
    return jax.process_index() == 0


def _token() -> bytes:
    """Random bytes that name a save, process 0's on every process."""
    token = os.urandom(_manifest.TOKEN_BYTES)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        token = np.asarray(multihost_utils.process_allgather(np.frombuffer(token, np.uint8)))[0].tobytes()
    return token


def _together(step: Callable, otherwise: Callable = lambda: None):
    """`step()` on every process; where it raised on any, all raise, and none waits for another that gave up.

    They call `otherwise()` then. Where the processes cannot reach each other, so that one may think that all failed and
    another that none did, nobody does.
    """
    error, made = None, None
    try:
        made = step()
    except Exception as e:
        error = e
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = np.asarray(multihost_utils.process_allgather(np.bool_(error is not None))).ravel()
        if error is None and failed.any():
            who = ", ".join(map(str, np.flatnonzero(failed)))
            error = OSError(f"process {who} could not go on; what it was, it says itself")
    if error is not None:
        otherwise()
        raise error
    return made
