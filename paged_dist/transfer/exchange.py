"""Pages from the shards of one mesh to those of another, a bounded part at a time, through staging caches.

For each chunk every source shard stages some pages for each destination shard (`copy_between`), one exchange brings
them to the other mesh (`exchange_staged`), and each destination shard writes them into its pool.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paged_dist.cache import CacheSpec, PagedKVCache
from paged_dist.mesh import MeshAxes
from paged_dist.ops.sharded_call import run_sharded
from paged_dist.transfer.source import copy_smoothing
from paged_dist.transfer.staging import (
    copy_between,
    page_shards,
    power_of_two,
    round_slots,
    staging_spec,
    zeros_like_cache,
)


class Side(NamedTuple):
    """A cache on one mesh: where the pages come from, or where they go."""

    spec: CacheSpec
    mesh: Mesh
    axes: MeshAxes

    @property
    def shards(self) -> int:
        """Shards of its pages."""
        return page_shards(self.mesh, self.axes)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page on a device."""
        return self.spec.bytes_per_token * self.spec.page_size // self.axes.size(self.mesh, "model")


def exchange_pages(cache: PagedKVCache, here: Side, there: Side, moves: np.ndarray, chunk_bytes: int) -> PagedKVCache:
    """A cache on the side `there` with pages of `cache`, which is on the side `here`; zeros in all other pages.

    Args:
      cache: as it is.
      moves: [m, 2] int32, global ids: (page here, page there).
      chunk_bytes: what each device stages at once; at least a page for each shard of the other side.
    """
    S, T = here.shards, there.shards
    by_pair = _moves_by_shards(moves, here, there)
    longest = max(len(pair) for row in by_pair for pair in row)
    # A chunk has q slots for each pair of shards: slot t * q + i of s, as it leaves, is slot s * q + i of t.
    q = max(1, min(power_of_two(longest), chunk_bytes // max(T * here.page_bytes, S * there.page_bytes)))
    unit = S // math.gcd(S, T)  # the T * q slots of a source shard are dealt out to S shards
    q = round_slots(there.spec, -(-q // unit)) * unit
    made = zeros_like_cache(there.spec, there.mesh, there.axes)
    for begin in range(0, longest, q):
        part = [[pair[begin : begin + q] for pair in row] for row in by_pair]
        leaving = [_with_slots(row, 0, q) for row in part]
        arriving = [_with_slots([row[t] for row in part], 1, q)[:, ::-1] for t in range(T)]
        staged = zeros_like_cache(staging_spec(there.spec, S, T * q), here.mesh, here.axes)
        staged = copy_between(staged, cache.without_smoothing(), leaving, T * q, axes=here.axes)
        staged = exchange_staged(staged, here, there, q)
        made = copy_between(made, staged, arriving, S * q, axes=there.axes)
        jax.block_until_ready(made)  # or the next chunks' staging would pile up
    return made.with_smoothing(copy_smoothing(cache, there.mesh, there.spec, there.axes))


def _moves_by_shards(moves: np.ndarray, here: Side, there: Side) -> list[list[np.ndarray]]:
    """Element [s][t] is [n, 2]: the moves from shard s here to shard t there, in ids local to each."""
    S, T = here.shards, there.shards
    per_shard = np.array([here.spec.num_pages // S, there.spec.num_pages // T], np.int32)
    owners, local = np.divmod(moves, per_shard)
    pair = owners[:, 0] * T + owners[:, 1]
    counts = np.bincount(pair, minlength=S * T)
    by_pair = np.split(local[np.argsort(pair, kind="stable")], np.cumsum(counts)[:-1])
    return [by_pair[s * T : (s + 1) * T] for s in range(S)]


def _with_slots(pairs: list[np.ndarray], column: int, q: int) -> np.ndarray:
    """[n, 2] (page, slot): the pages in `column` of each of one shard's pairs; pair i has the slots from i * q on."""
    return np.concatenate(
        [np.stack([pair[:, column], i * q + np.arange(len(pair))], axis=1) for i, pair in enumerate(pairs)]
    )


def exchange_staged(staged: PagedKVCache, here: Side, there: Side, q: int) -> PagedKVCache:
    """T * q slots of pages on each of S source shards, as S * q slots on each of T destination shards.

    An all-to-all between the source's page shards brings T * q / S slots of every shard to each, after which only the
    split of the same axes changes. Left to XLA as one step, it would gather all of a chunk on each device.
    """
    S, T = here.shards, there.shards
    apart = send_slots(staged.without_smoothing(), mesh=here.mesh, axes=here.axes, shards=S)
    specs = slot_specs(staged, there.axes)
    arrived = jax.device_put(apart, jax.tree.map(lambda x, spec: NamedSharding(there.mesh, spec), apart, specs))
    arrived = dataclasses.replace(arrived, spec=staging_spec(staged.spec, T, S * q), mesh=there.mesh)
    return _join_slots(arrived, mesh=there.mesh, axes=there.axes)


def _page_axis(cache: PagedKVCache) -> int:
    """The axis of each array along which its pages lie, or its rows of scales."""
    return 1 if cache.spec.num_layers is None else 2


def slot_specs(cache: PagedKVCache, axes: MeshAxes) -> PagedKVCache:
    """The PartitionSpec of each array between the meshes: its axis of pages is two there, [S, W], of which W is split.

    W = T * q slots of each source shard.
    """
    axis = _page_axis(cache)
    specs = cache.partition_specs(axes)
    return jax.tree.map(lambda p: P(*p[:axis], None, *p[axis:]), specs, is_leaf=lambda x: isinstance(x, P))


@functools.partial(jax.jit, static_argnames=("mesh", "axes", "shards"))
def send_slots(cache: PagedKVCache, *, mesh: Mesh, axes: MeshAxes, shards: int) -> PagedKVCache:
    """The all-to-all of `exchange_staged`: arrays [.., S * W, ..] split over S, as [.., S, W, ..] split over W."""
    axis, names = _page_axis(cache), axes.pages

    def local(x: jax.Array) -> jax.Array:
        if shards > 1:
            x = lax.all_to_all(x, names, axis, axis, tiled=True)
        return x.reshape(*x.shape[:axis], shards, -1, *x.shape[axis + 1 :])

    each = functools.partial(jax.tree.map, local)
    return run_sharded(each, mesh, (cache.partition_specs(axes),), slot_specs(cache, axes), cache)


@functools.partial(jax.jit, static_argnames=("mesh", "axes"))
def _join_slots(cache: PagedKVCache, *, mesh: Mesh, axes: MeshAxes) -> PagedKVCache:
    """Arrays [.., S, W, ..] split over W, as [.., S * W, ..] split over the pages' shards."""
    axis = _page_axis(cache)
    join = lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    each = functools.partial(jax.tree.map, join)
    return run_sharded(each, mesh, (slot_specs(cache, axes),), cache.partition_specs(axes), cache)
