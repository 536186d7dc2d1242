"""Caches whose live pages hold random numbers and whose other pages hold NaN, and what must hold after they move."""

from __future__ import annotations

import jax
import numpy as np
from array_bits import array_bits

import paged_dist as pd


def fill_live_pages(spec: pd.CacheSpec, mesh, rows: int, columns: int, seed=0):
    """(cache of random numbers in live pages and NaN or all ones in others, allocator), forks and prefixes among it."""
    rng = np.random.default_rng(seed)
    pages = pd.PageAllocator(spec, mesh, rows, columns)
    size, per = spec.page_size, pages.rows_per_shard
    for row in range(rows):
        if row % per != 1 or per == 1:
            pages.allocate(row, int(rng.integers(0, columns * size + 1)))
    if per > 1:
        pages.fork(0, 1)
    ended = per - 1
    if pages.lengths[ended] >= size and ended > 1:
        pages.cache_prefix(ended, range(int(pages.lengths[ended])))
        pages.free(ended)
    abstract = pd.PagedKVCache.abstract(spec, mesh, key_smoothing=spec.is_quantized)
    live = np.zeros(spec.num_pages, bool)
    live[pages.live_pages] = True

    def make(x):
        if x.ndim <= 3 and x.shape == spec.key_smoothing_shape:
            return jax.device_put(rng.uniform(0.5, 2, x.shape).astype(np.float32), x.sharding)
        size = x.dtype.itemsize
        made = rng.integers(0, 200, (*x.shape, size), np.uint8).view(x.dtype)[..., 0].copy()
        if x.shape == spec.pool_shape:
            made[..., ~live, :, :] = np.full(size, 255, np.uint8).view(x.dtype)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: made[index])

    return jax.tree.map(make, abstract), pages


def row_contents(cache: pd.PagedKVCache, pages: pd.PageAllocator) -> list:
    """Bytes of every row's pages in its order, all arrays, heads and layers."""
    axis = 1 if cache.spec.num_layers is None else 2
    arrays = [np.moveaxis(np.asarray(x), axis, 0) for x in cache.to_pages()]
    tables = pages.block_tables
    return [[array_bits(x[tables[row][tables[row] >= 0]]) for x in arrays] for row in range(pages.num_sequences)]


def check_moved(cache, pages, made, new_pages, before):
    assert new_pages.lengths[: pages.num_sequences].tolist() == pages.lengths.tolist()
    for row, (want, got) in enumerate(zip(before, row_contents(made, new_pages), strict=False)):
        for a, b in zip(want, got, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"row {row}")
    dead = np.ones(made.spec.num_pages, bool)
    dead[new_pages.live_pages] = False
    axis = 1 if made.spec.num_layers is None else 2
    for x in made.to_pages():
        assert not array_bits(np.moveaxis(np.asarray(x), axis, 0)[dead]).any(), "no dead page travels"
    if cache.key_smoothing is not None:
        np.testing.assert_array_equal(made.key_smoothing, cache.key_smoothing)
    want = pd.PagedKVCache.shardings(made.spec, made.mesh, key_smoothing=made.key_smoothing is not None)
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), made, want)
    assert all(jax.tree.leaves(same))


MOVED_SPECS = {
    "bf16": dict(dtype="bfloat16", page_size=16),
    "layers": dict(dtype="float32", page_size=8, num_layers=3),
    "int8": dict(dtype="int8", page_size=128, num_layers=2),
    "fp8_page_64": dict(dtype="float8_e4m3fn", page_size=64),
    "packed": dict(dtype="int8", head_dim=64, page_size=32),
}
