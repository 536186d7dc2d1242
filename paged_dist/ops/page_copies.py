"""Page copies inside the cache, in place: the copies of copy-on-write, for sequences that were forked."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from paged_dist._compat import broadcasts
from paged_dist._errors import require
from paged_dist.cache import PagedKVCache
from paged_dist.kernels.cache_update.page_copy import copy_stored_pages
from paged_dist.mesh import MeshAxes
from paged_dist.ops.arguments import Implementation, interpret_of
from paged_dist.ops.in_shard_map import check_shard
from paged_dist.ops.sharded_call import InPlaceOp, op_mesh, run_sharded
from paged_dist.ops.write_conflicts import check_copies_apart, on_host

PAIRS_PER_LAUNCH = 512  # of an eager call


def copy_pages(
    cache: PagedKVCache,
    copies: jax.Array | np.ndarray,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axes: MeshAxes = MeshAxes(),
    implementation: Implementation = None,
) -> PagedKVCache:
    """Copies pages onto other pages of the same shard, all heads and layers, in place: `cache` is donated.

    The second half of copy-on-write: a fork shares its pages, and `PageAllocator` asks for a copy once one of the
    sequences grows into a shared page. K, V and scales of each page move once. No shard talks to another, and a shard
    without copies does nothing.

    Args:
      cache: the cache; after an eager call use the returned one only. Inside a jit, donate it to the jit.
      copies: [M, 2] int32 global page ids, (page to read, page to write), as `PageAllocator.take_copies` gives them:
        both of a pair on one shard, no page written twice, none written that another pair reads. Pairs with a negative
        id, or on two shards, are left out.
      mesh, axes, implementation: as in `sharded_paged_attention`.

    Returns:
      The cache with the pages copied.

    Raises:
      ValueError: copies of another shape or dtype; a cache that does not divide over the mesh; two pairs of one page,
        where the host has them (NumPy, lists, arrays on CPU; not in a jit).

    Example:
      >>> mesh, spec = pd.make_pod_mesh(model=8), pd.CacheSpec(num_kv_heads=8, head_dim=128, num_pages=16)
      >>> cache = pd.PagedKVCache.create(spec, mesh)
      >>> pages = pd.PageAllocator(spec, mesh, num_sequences=2, pages_per_sequence=4)
      >>> pages.allocate(0, num_tokens=100)
      0
      >>> pages.fork(0, 1)  # row 1 holds the tokens of row 0, on the same page
      >>> pages.grow_all([1]).tolist()  # its next token goes into a page of its own
      [-1, 100]
      >>> copies = pages.take_copies()
      >>> copies[0].tolist()  # from page 0 to page 1
      [0, 1]
      >>> cache = pd.copy_pages(cache, copies)
    """
    if not isinstance(copies, jax.Array):
        copies = np.asarray(copies)
        copies = copies.astype(jax.dtypes.canonicalize_dtype(copies.dtype))  # as jnp.asarray would
    mesh = op_mesh(cache, mesh, axes, implementation)
    _check_copies(copies)
    if (seen := on_host(copies)) is not None:
        check_copies_apart(cache.spec, mesh, axes, *seen)
    for part in _parts(copies):
        cache = _copy_sharded(cache, part, mesh=mesh, axes=axes, implementation=implementation)
    return cache


def _parts(copies: np.ndarray | jax.Array) -> list[jax.Array]:
    """`copies` [M, 2] in parts [PAIRS_PER_LAUNCH, 2], padded with -1: an eager call has one program for every M.

    A traced array stays as it is. Of a NumPy array the pairs of -1 are dropped first: with none left nothing runs.
    """
    if isinstance(copies, jax.core.Tracer):
        return [copies]
    xp = np if isinstance(copies, np.ndarray) else jnp
    if xp is np:
        copies = copies[(copies >= 0).all(axis=1)]
    missing = -len(copies) % PAIRS_PER_LAUNCH
    padded = xp.concatenate([copies, xp.full((missing, 2), -1, xp.int32)])
    return [jnp.asarray(part) for part in padded.reshape(-1, PAIRS_PER_LAUNCH, 2)]


@InPlaceOp
def _copy_sharded(cache, copies, *, mesh, axes, implementation) -> PagedKVCache:
    """`copy_pages` of checked arguments: its `shard_map` over `mesh`."""
    pools = cache.partition_specs(axes)
    local = functools.partial(_copy_local, axes=axes, implementation=implementation)
    return run_sharded(local, mesh, (pools, P()), pools, cache, copies)


def copy_pages_local(
    cache: PagedKVCache, copies: jax.Array, *, axes: MeshAxes = MeshAxes(), implementation: Implementation = None
) -> PagedKVCache:
    """`copy_pages` inside a caller's `shard_map` (with `check_vma=True` too).

    Args:
      cache: this shard's pools, passed in and out with `cache.partition_specs(axes)`.
      copies: [M, 2] int32 global page ids, the same on every shard; each copies the pairs of its own pages.
      axes, implementation: as in `sharded_paged_attention`.

    Returns:
      This shard's pools with the pages copied.

    Raises:
      ValueError: as `copy_pages`; no `shard_map` around the call, or one with another part of the cache.

    Example:
      >>> mesh = pd.make_pod_mesh(model=2)
      >>> cache = pd.PagedKVCache.create(pd.CacheSpec(num_kv_heads=2, head_dim=128, num_pages=16), mesh)
      >>> pools = cache.partition_specs()
      >>> copy = jax.shard_map(pd.copy_pages_local, mesh=mesh, in_specs=(pools, jax.P()), out_specs=pools)
      >>> copies = jnp.array([[0, 1], [4, 6]])  # data shard d owns pages 4 d to 4 d + 3
      >>> cache = jax.jit(copy, donate_argnums=0)(cache, copies)
    """
    copies = jnp.asarray(copies)
    check_shard(cache, axes)
    _check_copies(copies)
    return _copy_local(cache, copies, axes=axes, implementation=implementation)


def _check_copies(copies: jax.Array | np.ndarray) -> None:
    shape, rule = copies.shape, "must be [M, 2]: page to read, page to write"
    require(copies.ndim == 2 and shape[1] == 2, "copies.shape", shape, rule)
    require(copies.dtype == jnp.int32, "copies.dtype", str(copies.dtype), "must be int32")


@broadcasts
def _copy_local(cache, copies, *, axes, implementation) -> PagedKVCache:
    """`copy_pages_local` of checked arguments."""
    names, pages = axes.pages, cache.key_pages.shape[-3]
    shard = lax.axis_index(names) if names else 0
    local = copies - jnp.int32(shard * pages)
    is_mine = jnp.all((local >= 0) & (local < pages), axis=1)
    local = local[jnp.argsort(~is_mine, stable=True)]
    pools = (*cache.stacked_pages(), *cache.stacked_scales().values())
    with jax.named_scope("copy_pages"):
        count = jnp.sum(is_mine, dtype=jnp.int32)
        return cache.with_pools(
            *copy_stored_pages(pools, local, count, cache.spec.page_size, interpret_of(implementation))
        )
