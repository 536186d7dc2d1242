"""Copies of any number of pages: in parts that scalar memory holds, by one program, each page where it should be."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pod_meshes import simulated_pod
from simulated import RACES, assert_no_races

import paged_dist as pd
from paged_dist.kernels.cache_update import page_copy
from paged_dist.kernels.cache_update.page_copy import copy_stored_pages
from paged_dist.ops import page_copies
from paged_dist.transfer import resize, staging


def numbered(spec: pd.CacheSpec, mesh) -> pd.PagedKVCache:
    """A cache whose page n is full of n."""
    cache = pd.PagedKVCache.create(spec, mesh)
    return jax.tree.map(lambda x: x + jnp.arange(spec.num_pages, dtype=x.dtype)[:, None, None], cache)


def numbers(cache: pd.PagedKVCache) -> list[int]:
    """What each page is full of."""
    pages = np.asarray(cache.key_pages)
    assert (pages == pages[:, :, :1, :1]).all() and (pages == np.asarray(cache.value_pages)).all()
    return pages[0, :, 0, 0].astype(int).tolist()


@pytest.mark.parametrize("interpret", [None, RACES], ids=["xla", "simulated"])
@pytest.mark.parametrize("count", [0, 3, 4, 5, 9])
def test_pairs_go_through_scalar_memory_in_parts(monkeypatch, count, interpret):
    monkeypatch.setattr(page_copy, "PAIRS_PER_STEP", 4)
    pool = jnp.broadcast_to(jnp.arange(32, dtype=jnp.float32)[:, None, None], (1, 1, 32, 8, 128))
    pairs = np.array([[i, 16 + i] for i in range(10)], np.int32)
    run = jax.jit(functools.partial(copy_stored_pages, page_size=8, interpret=interpret))
    made = run((pool, pool), jnp.asarray(pairs), jnp.int32(count))
    if interpret is RACES:
        assert_no_races()
    want = list(range(32))
    want[16 : 16 + count] = range(count)
    for x in made:
        assert np.asarray(x)[0, 0, :, 0, 0].astype(int).tolist() == want


def test_eager_copies_of_any_number_are_one_program(monkeypatch):
    monkeypatch.setattr(page_copies, "PAIRS_PER_LAUNCH", 4)
    spec, mesh = pd.CacheSpec(1, 128, 64, 128, "float32"), simulated_pod(2, 1, 1)
    program = page_copies._copy_sharded.jitted
    before = program._cache_size()
    for as_array in (np.int64, np.ndarray.tolist, jnp.asarray):
        for count in (0, 1, 4, 9):
            pairs = np.array([[i, 16 + i] for i in range(count)], np.int32).reshape(-1, 2)
            pairs = np.concatenate([pairs, np.full((3, 2), -1, np.int32)])  # as the allocator gives them
            want = list(range(64))
            want[16 : 16 + count] = range(count)
            assert numbers(pd.copy_pages(numbered(spec, mesh), as_array(pairs))) == want
    assert program._cache_size() - before == 1


def test_pools_of_any_number_of_live_pages_are_resized_by_one_program(monkeypatch):
    monkeypatch.setattr(resize, "RESIZE_COPIES", 2)
    spec, mesh = pd.CacheSpec(1, 128, 16, 128, "float32"), simulated_pod(1, 1, 1)
    before = staging.copy_chunk._cache_size()
    for live in (1, 2, 5):
        pages = pd.PageAllocator(spec, mesh, 2, 8)
        pages.allocate(0, 128)
        pages.allocate(1, 128 * live)
        pages.free(0)  # so that pages move
        made, there = pd.resize(numbered(spec, mesh), 32, pages)
        found = [numbers(made)[page] for page in there.block_tables[1, :live]]
        assert found == pages.block_tables[1, :live].tolist()
    assert staging.copy_chunk._cache_size() - before == 1


def test_chunks_of_moves_and_saves_have_few_sizes():
    sizes = {staging.power_of_two(live) for live in range(1, 1000)}
    assert sizes == {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024}
    assert all(staging.power_of_two(live) >= live for live in range(1, 1000))
