"""Move: live pages to a pool of another size, or to another mesh, a bounded part at a time."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paged_dist._errors import bad_value, require
from paged_dist.cache import CacheSpec, PagedKVCache
from paged_dist.mesh import MeshAxes
from paged_dist.ops.sharded_call import run_sharded
from paged_dist.pages import PageAllocator
from paged_dist.transfer.staging import (
    copy_between,
    page_shards,
    power_of_two,
    round_slots,
    staging_spec,
    zeros_like_cache,
)

COPIES_AT_ONCE = 2048  # pages that one launch of `resize` copies on each shard, however many there are
CHUNK_BYTES = 64 << 20  # of pages that are on their way at once, on each device


def resize(
    cache: PagedKVCache, num_pages: int, allocator: PageAllocator, *, axes: MeshAxes = MeshAxes()
) -> tuple[PagedKVCache, PageAllocator]:
    """The live pages in a pool of `num_pages`, on the same mesh: for more or fewer sequences than were planned.

    Page ids change, for shard r owns [r * n, (r + 1) * n): use the new allocator's tables. Each shard copies its own
    pages, nothing crosses a link. Both pools are in memory until `cache` is dropped. One program copies some pages at a
    time, however many are live.

    Args:
      cache: as it is; its pages that no sequence holds and no prompt may begin with are left behind.
      num_pages: N of the new pool, over all shards.
      allocator: the pages' owner, of which nothing changes; its copies that are due must be made first.
      axes: which mesh axes are data, context and model.

    Returns:
      (cache, allocator) of the new pool; what no live page fills is zeros.

    Raises:
      ValueError: sizes that do not divide over the mesh, an allocator of another cache, or copies that are due.
      OutOfPages: the live pages of a shard do not fit. Nothing is moved then.
    """
    mesh = mesh_of(cache, allocator, axes)
    spec = dataclasses.replace(cache.spec, num_pages=num_pages)
    new, moves = allocator.moved(spec, mesh, axes=axes)
    shards = page_shards(mesh, axes)
    here, there = cache.spec.num_pages // shards, num_pages // shards
    if (moves[:, 0] // here != moves[:, 1] // there).any():  # a prefix went to another context shard
        return _reshard(cache, spec, mesh, moves, axes, axes, CHUNK_BYTES), new
    lists = [moves[moves[:, 1] // there == r] - np.array([r * here, r * there], np.int32) for r in range(shards)]
    made = copy_between(zeros_like_cache(spec, mesh, axes), cache.without_smoothing(), lists, COPIES_AT_ONCE, axes=axes)
    return made.with_smoothing(_copied_smoothing(cache, mesh, spec, axes)), new


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
    shard writes them into its pool. So no device and no host holds a whole pool, but where both meshes have a device,
    it holds its parts of both caches, and about `chunk_bytes` twice. All chunks run one program.

    Args:
      cache, allocator: as they are; see `resize`.
      new_mesh: the devices and the shape. Over other devices than the cache's every device must be this process's: a
        mesh of other processes takes `save` and `restore`.
      num_pages, num_sequences: of the new pool and batch; default: as before.
      axes, new_axes: which mesh axes are data, context and model, here and there; new_axes None: as here.
      chunk_bytes: what each device stages at once; at least a page for each shard of the other side.

    Returns:
      (cache, allocator) on the new mesh: the same rows and lengths, other page ids.

    Raises:
      ValueError: sizes that do not divide over the new mesh, an allocator of another cache, copies that are due, or
        other devices in a run of several processes.
      OutOfPages: the live pages do not fit. Nothing is moved then.
    """
    new_axes = axes if new_axes is None else new_axes
    mesh = mesh_of(cache, allocator, axes)
    require(isinstance(new_mesh, Mesh), "new_mesh", new_mesh, "must be a jax.sharding.Mesh: it has devices")
    require(chunk_bytes >= 1, "chunk_bytes", chunk_bytes, "must be at least 1")
    if set(mesh.devices.flat) != set(new_mesh.devices.flat) and jax.process_count() > 1:
        works = "save() from this mesh and restore() on that one"
        raise bad_value("new_mesh", dict(new_mesh.shape), "is of other devices, in a run of several processes", works)
    spec = cache.spec if num_pages is None else dataclasses.replace(cache.spec, num_pages=num_pages)
    new, moves = allocator.moved(spec, new_mesh, num_sequences=num_sequences, axes=new_axes)
    return _reshard(cache, spec, new_mesh, moves, axes, new_axes, chunk_bytes), new


def mesh_of(cache: PagedKVCache, allocator: PageAllocator, axes: MeshAxes) -> Mesh:
    """The mesh of a cache that `allocator` gives the pages of."""
    mesh = cache.mesh
    require(
        isinstance(mesh, Mesh), "cache.mesh", mesh, "must be a jax.sharding.Mesh", "PagedKVCache.create(spec, mesh)"
    )
    require(allocator.spec == cache.spec, "allocator.spec", allocator.spec, f"must be the cache's, {cache.spec}")
    sizes = tuple(axes.size(mesh, part) for part in ("data", "context"))
    has = allocator.num_shards, allocator.num_context_shards
    require(has == sizes, "allocator", has, f"must have the data and context sizes of the cache's mesh, {sizes}")
    return mesh


def _reshard(cache, spec, mesh: Mesh, moves: np.ndarray, axes, new_axes, chunk_bytes: int) -> PagedKVCache:
    """The cache of `spec` on `mesh` with the pages that `moves` names, [m, 2] of ids here and there."""
    sides = (cache.mesh, axes, cache.spec), (mesh, new_axes, spec)
    S, T = (page_shards(*side[:2]) for side in sides)
    each = [side[2].num_pages // n for side, n in zip(sides, (S, T), strict=True)]
    # A slot for each of q pages of each pair of shards: on its way slot t * q + i of s becomes slot s * q + i of t.
    owners, local = np.divmod(moves, np.array(each, np.int32))
    pair = owners[:, 0] * T + owners[:, 1]
    counts = np.bincount(pair, minlength=S * T)
    pairs = np.split(local[np.argsort(pair, kind="stable")], np.cumsum(counts)[:-1])
    by_pair = [pairs[s * T : (s + 1) * T] for s in range(S)]
    longest = int(counts.max())
    a_page = [spec.bytes_per_token * spec.page_size // side[1].size(side[0], "model") for side in sides]
    q = max(1, min(power_of_two(longest), chunk_bytes // max(T * a_page[0], S * a_page[1])))
    unit = S // math.gcd(S, T)  # T * q slots are dealt out to S shards
    q = round_slots(spec, -(-q // unit)) * unit
    made = zeros_like_cache(spec, mesh, new_axes)
    for begin in range(0, longest, q):
        part = [[pair[begin : begin + q] for pair in row] for row in by_pair]
        slots = lambda pairs, column: [
            np.stack([pair[:, column], i * q + np.arange(len(pair))], axis=1) for i, pair in enumerate(pairs)
        ]
        leaving = [np.concatenate(slots(row, 0)) for row in part]
        arriving = [np.concatenate(slots([row[t] for row in part], 1))[:, ::-1] for t in range(T)]
        staged = zeros_like_cache(staging_spec(spec, S, T * q), cache.mesh, axes)
        staged = copy_between(staged, cache.without_smoothing(), leaving, T * q, axes=axes)
        staged = _exchange(staged, mesh, S, T, q, axes, new_axes)
        made = copy_between(made, staged, arriving, S * q, axes=new_axes)
        jax.block_until_ready(made)  # or the next chunks' staging would pile up
    return made.with_smoothing(_copied_smoothing(cache, mesh, spec, new_axes))


def _copied_smoothing(cache: PagedKVCache, mesh: Mesh, spec: CacheSpec, axes: MeshAxes) -> jax.Array | None:
    """The key smoothing of `cache` for one of `spec` on `mesh`, which owns it: the old one may be donated."""
    if cache.key_smoothing is None:
        return None
    return jax.device_put(jnp.copy(cache.key_smoothing), NamedSharding(mesh, spec.key_smoothing_partition_spec(axes)))


def _exchange(staged: PagedKVCache, mesh: Mesh, S: int, T: int, q: int, axes, new_axes) -> PagedKVCache:
    """W = T * q slots of pages on each of S source shards, as S * q on each of T destination shards of `mesh`.

    An all-to-all between the source's page shards, W / S slots of every other to each, which leaves no more to do than
    another split of the same axes: left to XLA as one step it would gather all of a chunk on each device.
    """
    apart = _leave(staged.without_smoothing(), mesh=staged.mesh, axes=axes, shards=S)
    specs = _slot_specs(staged, new_axes)
    there = jax.device_put(apart, jax.tree.map(lambda x, spec: NamedSharding(mesh, spec), apart, specs))
    spec = staging_spec(staged.spec, T, S * q)
    return _arrive(dataclasses.replace(there, spec=spec, mesh=mesh), mesh=mesh, axes=new_axes)


def _page_axis(cache: PagedKVCache) -> int:
    """Where an array's pages are, or its rows of scales."""
    return 1 if cache.spec.num_layers is None else 2


def _slot_specs(cache: PagedKVCache, axes: MeshAxes) -> PagedKVCache:
    """The PartitionSpec of each array once its pages have two axes: [S, W], W split."""
    axis = _page_axis(cache)
    specs = cache.partition_specs(axes)
    return jax.tree.map(lambda p: P(*p[:axis], None, *p[axis:]), specs, is_leaf=lambda x: isinstance(x, P))


@functools.partial(jax.jit, static_argnames=("mesh", "axes", "shards"))
def _leave(cache, *, mesh, axes, shards):
    axis, names = _page_axis(cache), axes.pages

    def local(x):
        if shards > 1:
            x = lax.all_to_all(x, names, axis, axis, tiled=True)
        return x.reshape(*x.shape[:axis], shards, -1, *x.shape[axis + 1 :])

    each = functools.partial(jax.tree.map, local)
    return run_sharded(each, mesh, (cache.partition_specs(axes),), _slot_specs(cache, axes), cache)


@functools.partial(jax.jit, static_argnames=("mesh", "axes"))
def _arrive(cache, *, mesh, axes):
    axis = _page_axis(cache)
    join = lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    each = functools.partial(jax.tree.map, join)
    return run_sharded(each, mesh, (_slot_specs(cache, axes),), cache.partition_specs(axes), cache)
