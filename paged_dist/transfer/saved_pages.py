"""The files of a saved cache: their names, the records of pages and their scales, and how records are written and read.

For each shard of pages and each shard of heads there is a file of records, one a live page, and beside it a file with
the digest of each record. Records are read one by one and checked as they are read. Nothing is executed or unpickled.
`manifest` says which of a folder's files count.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from paged_dist._errors import require
from paged_dist.cache import CacheSpec
from paged_dist.transfer.files import create, digest, digest_of_file, sync, write_all, write_file

SMOOTHING_FILE = "key_smoothing.bin"


class FileKey(NamedTuple):
    """Which file of a save: that of one shard of pages and one shard of heads."""

    page_shard: int
    head_shard: int


@dataclasses.dataclass(frozen=True)
class SavedPages:
    """The files of one save: one for each of `page_shards` x `model` shards, with a record for each live page of it.

    A record is the page's part of each array, one after another, as stored: [L, heads, rows, lanes] of K and of V, and
    of 8-bit pages [L, heads, P] f32 of their scales, the page's tokens in the stored order of `pack_scales`.

    Attributes:
      folder: what the user named.
      data: the folder in it where the files are.
      spec: of the cache that was saved.
      model, page_shards: into how many shards its heads, and its pages, were split.
    """

    folder: str
    data: str
    spec: CacheSpec
    model: int
    page_shards: int

    def name(self, key: FileKey) -> str:
        """The name of a file of records."""
        return f"pages-{key.page_shard:05d}-{key.head_shard:05d}.bin"

    def path(self, name: str) -> str:
        """A file's path."""
        return os.path.join(self.data, name)

    @property
    def smoothing_path(self) -> str:
        """The path of the key smoothing's file."""
        return self.path(SMOOTHING_FILE)

    @functools.cached_property
    def heads(self) -> int:
        """Heads in a file."""
        return self.spec.num_kv_heads // self.model

    @functools.cached_property
    def parts(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, dtype) of each array's part of a record."""
        spec, layers = self.spec, self.spec.num_layers or 1
        pages: tuple[int, ...] = (layers, self.heads, *spec.pool_shape[-2:])
        scales: tuple[int, ...] = (layers, self.heads, spec.page_size)
        parts = {name: (pages, np.dtype(jnp.dtype(spec.dtype))) for name in ("key_pages", "value_pages")}
        if spec.is_quantized:
            parts |= {name: (scales, np.dtype(np.float32)) for name in ("key_scales", "value_scales")}
        return parts

    @functools.cached_property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.parts.values())

    def check_files(self, files: dict[str, dict[str, Any]]) -> None:
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
        """What `_index` has read, by file."""
        return {}

    def _index(self, name: str) -> dict[int, tuple[int, str]]:
        """page id -> (place in the file, digest) of each record of one file."""
        if name not in self._indices:
            with open(self.path(name + ".json"), "rb") as f:
                told = json.loads(f.read())
            self._indices[name] = {page: (i, digest) for i, (page, digest) in enumerate(told)}
        return self._indices[name]

    def read_record(self, file: BinaryIO, key: FileKey, page: int) -> dict[str, np.ndarray]:
        """A page's part of each array, by name. Raises ValueError where it is not what was written."""
        name = self.name(key)
        place, told = self._index(name)[page]
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
        return np.fromfile(self.smoothing_path, np.float32).reshape(self.spec.key_smoothing_shape)


class RecordWriter:
    """Writes a file of records, and beside it the file of their digests. A context that holds the file open."""

    def __init__(self, path: str):
        self._path = path
        self._digests: list[tuple[int, str]] = []  # (page, digest of its record), in the order of the file

    def __enter__(self) -> RecordWriter:
        self._file = create(self._path)
        return self

    def add(self, page: int, record: bytes) -> None:
        """Appends a page's record."""
        write_all(self._file, record)
        self._digests.append((page, digest(record)))

    def finish(self) -> None:
        """Records and digests are on the disk when this returns."""
        sync(self._file)
        write_file(self._path + ".json", json.dumps(self._digests).encode())

    def __exit__(self, *error: object) -> None:
        os.close(self._file)


def manifest_of(saved: SavedPages, state: dict[str, Any], has_smoothing: bool) -> dict[str, Any]:
    """What the manifest of a save says, whose files must all be there; FileNotFoundError where one is not.

    Args:
      state: the allocator's, as `to_state` gives it.
      has_smoothing: whether the cache has a key smoothing.
    """
    files: dict[str, dict[str, Any]] = {}
    for shard in range(saved.page_shards):
        for part in range(saved.model):
            name = saved.name(FileKey(shard, part))
            for one in (name, name + ".json"):
                if not os.path.isfile(saved.path(one)):
                    why = "does every process see this folder? It must be on a filesystem that all share"
                    raise FileNotFoundError(f"{saved.path(one)}: no process wrote it; {why}")
            files[name] = {"bytes": os.path.getsize(saved.path(name))}
            files[name + ".json"] = _size_and_digest(saved.path(name + ".json"))
    if has_smoothing:
        files[SMOOTHING_FILE] = _size_and_digest(saved.smoothing_path)
    return {
        "spec": dataclasses.asdict(saved.spec),
        "model": saved.model,
        "page_shards": saved.page_shards,
        "has_key_smoothing": has_smoothing,
        "allocator": state,
        "files": files,
    }


def _size_and_digest(path: str) -> dict[str, Any]:
    """What a manifest says of a file that is read whole."""
    return {"bytes": os.path.getsize(path), "digest": digest_of_file(path)}
