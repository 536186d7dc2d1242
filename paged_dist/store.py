"""Store: the live pages and their allocator in a folder, which is whole or not there.

A folder holds `manifest.json` and, for each shard of pages and heads, a file of records, one a live page, with the
digest of each record beside it. Records are read one by one and checked as they are read. Nothing in it is executed
or unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from paged_dist._errors import bad_value, require
from paged_dist._staging import (
    copy_between,
    page_shards,
    round_slots,
    staging_spec,
    zeros_like_cache,
)
from paged_dist.allocator import PageAllocator
from paged_dist.cache import PagedKVCache
from paged_dist.mesh import MeshAxes
from paged_dist.move import CHUNK_BYTES, mesh_of
from paged_dist.spec import CacheSpec

FORMAT = "paged-dist cache 1"
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

    Every process calls it and writes its own shards, a chunk at a time, into FOLDER.saving; process 0 then names them
    in the manifest and renames the folder. An interrupted call leaves FOLDER as it was, and at worst a FOLDER.saving,
    which the next call removes. With `overwrite`, the old folder is FOLDER.replaced between two renames.

    Args:
      folder: on a filesystem that all processes share.
      cache, allocator: as they are. Copies that are due must be made first.
      overwrite: whether a folder of that name is replaced.
      axes: which mesh axes are data, context and model.
      chunk_bytes: of pages that each device stages, and the host holds of each device, at once.

    Raises:
      ValueError: an allocator of another cache, copies that are due, or a folder that exists.
      OSError: it could not be written; on every process, whichever it was that could not.
    """
    mesh, folder = mesh_of(cache, allocator, axes), os.path.abspath(folder)
    state = allocator.to_state()
    making, replaced = folder + ".saving", folder + ".replaced"

    def begin() -> None:
        require(
            overwrite or not os.path.lexists(folder), "folder", folder, "exists", "pass overwrite=True to replace it"
        )
        parent = os.path.dirname(folder)
        require(os.path.isdir(parent), "folder", folder, f"{parent} is not a folder that this process sees")
        if _is_first():
            shutil.rmtree(making, ignore_errors=True)
            os.mkdir(making)

    def write() -> None:
        saved = _Saved(making, cache.spec, axes.size(mesh, "model"), page_shards(mesh, axes))
        with contextlib.ExitStack() as stack:
            _write_pages(stack, saved, cache, allocator, axes, chunk_bytes)

    def write_smoothing() -> None:  # by itself: it gathers, and all processes must have come as far
        if cache.key_smoothing is not None:
            _write_smoothing(os.path.join(making, "key_smoothing.bin"), cache.key_smoothing)

    def finish() -> None:
        if not _is_first():
            return
        saved = _Saved(making, cache.spec, axes.size(mesh, "model"), page_shards(mesh, axes))
        _write_manifest(saved, state, cache.key_smoothing is not None)
        _sync_folder(making)
        if os.path.lexists(folder):
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(folder, replaced)
        try:
            os.rename(making, folder)
        except OSError:
            if os.path.lexists(replaced):
                os.rename(replaced, folder)
            raise
        _sync_folder(os.path.dirname(folder))
        shutil.rmtree(replaced, ignore_errors=True)

    try:
        for step in (begin, write, write_smoothing, finish):
            _together(step)
    except BaseException:
        if _is_first():
            shutil.rmtree(making, ignore_errors=True)
        raise


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
    manifest = _read_manifest(folder)
    spec = CacheSpec(**manifest["spec"])
    saved = _Saved(folder, spec, manifest["model"], manifest["page_shards"])
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

    folder: str
    spec: CacheSpec
    model: int
    page_shards: int

    def name(self, shard: int, part: int) -> str:
        """The file of one shard of pages and one of heads."""
        return f"pages-{shard:05d}-{part:05d}.bin"

    def path(self, name: str) -> str:
        """A file's path."""
        return os.path.join(self.folder, name)

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
        """Raises ValueError where a file that the manifest names is missing, or longer or shorter than it says."""
        for name, told in files.items():
            path = self.path(name)
            require(os.path.isfile(path), "folder", self.folder, f"{name} is missing")
            size = os.path.getsize(path)
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
        place, digest = self.index(name)[page]
        file.seek(place * self.record_bytes)
        record = file.read(self.record_bytes)
        require(_digest(record) == digest, "folder", self.folder, f"{name} is damaged: the record of page {page}")
        found, at = {}, 0
        for array, (shape, dtype) in self.parts.items():
            size = math.prod(shape) * dtype.itemsize
            found[array] = np.frombuffer(record[at : at + size], dtype).reshape(shape)
            at += size
        return found

    def read_smoothing(self) -> np.ndarray:
        """The key smoothing [..., Hkv, D]."""
        return np.fromfile(self.path("key_smoothing.bin"), np.float32).reshape(self.spec.key_smoothing_shape)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _digest_of_file(path: str) -> str:
    h = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def _write_manifest(saved: _Saved, state: dict, has_smoothing: bool) -> None:
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
    manifest = {
        "format": FORMAT,
        "spec": dataclasses.asdict(saved.spec),
        "model": saved.model,
        "page_shards": saved.page_shards,
        "has_key_smoothing": has_smoothing,
        "allocator": state,
        "files": files,
    }
    text = json.dumps(manifest, sort_keys=True)
    _write_file(saved.path("manifest.json"), json.dumps({"digest": _digest(text.encode()), "manifest": text}).encode())


def _told(path: str) -> dict:
    return {"bytes": os.path.getsize(path), "digest": _digest_of_file(path)}


def _read_manifest(folder: str) -> dict:
    """The manifest, and the small files that it has digests of, checked."""
    path = os.path.join(folder, "manifest.json")
    if not os.path.isfile(path):
        replaced = os.path.join(folder + ".replaced", "manifest.json")
        works = f"{folder}.replaced is the save before, rename it back" if os.path.isfile(replaced) else None
        raise bad_value("folder", folder, "holds no finished save: there is no manifest.json", works)
    damaged = lambda name, what: bad_value("folder", folder, f"{name} is damaged: {what}")
    try:
        with open(path, "rb") as f:
            outer = json.loads(f.read())
        text, digest = outer["manifest"], outer["digest"]
        intact = _digest(text.encode()) == digest
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise damaged("manifest.json", f"it cannot be read ({type(e).__name__})") from e
    if not intact:
        raise damaged("manifest.json", "it is not what was written")
    manifest = json.loads(text)
    require(
        manifest.get("format") == FORMAT, "folder", folder, f"is of format {manifest.get('format')!r}, not {FORMAT!r}"
    )
    for name, told in manifest["files"].items():
        path = os.path.join(folder, name)
        require(os.path.isfile(path), "folder", folder, f"{name} is missing")
        if "digest" in told and _digest_of_file(path) != told["digest"]:
            raise damaged(name, "it is not what was written")
    return manifest


# Pages between devices and files


def _slots(spec: CacheSpec, mesh: Mesh, axes: MeshAxes, longest: int, chunk_bytes: int) -> int:
    """Pages a shard in a chunk."""
    require(chunk_bytes >= 1, "chunk_bytes", chunk_bytes, "must be at least 1")
    a_page = spec.bytes_per_token * spec.page_size // axes.size(mesh, "model")
    return round_slots(spec, max(1, min(longest, chunk_bytes // a_page)))


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
        self._file = open(self._path, "xb")
        return self

    def add(self, page: int, record: bytes) -> None:
        """Appends a page's record."""
        self._file.write(record)
        self._index.append([page, _digest(record)])

    def finish(self) -> None:
        """Everything is on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        _write_file(self._path + ".json", json.dumps(self._index).encode())

    def __exit__(self, *error):
        self._file.close()


def _write_file(path: str, data: bytes) -> None:
    with open(path, "xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(path: str) -> None:
    """The names in a folder are on the disk when this returns."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
        _write_file(path, np.ascontiguousarray(host, np.float32).tobytes())


# All processes together


def _is_first() -> bool:
    return jax.process_index() == 0


def _together(step: Callable):
    """`step()` on every process; where it raised on any, all raise, and none waits for another that gave up."""
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
        raise error
    return made
