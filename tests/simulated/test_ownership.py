"""Who owns what of a cache: writes donate what they write, and nothing that is only read or that the caller made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import pod
from jax.sharding import AxisType, NamedSharding

import paged_dist as pd
from paged_dist.ops import append

ROWS, HEADS, DIM = 4, 2, 128


def spec_of(shards: int, layers: int | None = None) -> pd.CacheSpec:
    return pd.CacheSpec(HEADS, DIM, 8 * shards, 128, "int8", layers)


def smoothing_of(layers: int | None = None) -> jax.Array:
    return jnp.asarray(
        np.random.default_rng(0).uniform(0.5, 2, spec_of(1, layers).key_smoothing_shape).astype(np.float32)
    )


def new_tokens(seed: int = 1) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((ROWS, HEADS, DIM)).astype(np.float32)) for _ in "kv")


def writes(pages: pd.PageAllocator, layer=None) -> dict:
    """Each op that writes: cache -> cache."""
    key, value = new_tokens()
    at = (pages.lengths - 1, pages.block_tables)
    return {
        "append": lambda c: pd.append_kv(c, key, value, *at, layer=layer),
        "prefill": lambda c: pd.write_prefill_kv(
            c, key[:, None], value[:, None], pages.lengths, pages.block_tables, starts=at[0], layer=layer
        ),
        "copy": lambda c: pd.copy_pages(c, np.array([[0, 1], [-1, -1]], np.int32)),
    }


def allocator(spec, mesh) -> pd.PageAllocator:
    pages = pd.PageAllocator(spec, mesh, ROWS, 4)
    for row in range(ROWS):
        pages.allocate(row, 5)
    return pages


@pytest.mark.parametrize(
    ("op", "kind", "layers"),
    [
        ("append", AxisType.Auto, 2),
        ("prefill", AxisType.Auto, None),
        ("copy", AxisType.Auto, None),
        *(
            pytest.param(op, AxisType.Explicit, layers, marks=pytest.mark.slow)
            for op in ("append", "prefill", "copy")
            for layers in (None, 2)
        ),
    ],
)
def test_a_write_leaves_the_smoothing_to_those_who_share_it(op, kind, layers):
    mesh = pod(2, 1, 1, kind)
    spec, smoothing = spec_of(2, layers), smoothing_of(layers)
    pages, before = allocator(spec, mesh), np.array(smoothing)
    one, other = (pd.PagedKVCache.create(spec, mesh, key_smoothing=smoothing) for _ in "ab")
    shared = jax.tree.map(jnp.copy, one).with_smoothing(one.key_smoothing)
    old = one.key_pages
    layer = None if layers is None else jnp.int32(1)
    written = writes(pages, layer)[op](one)
    assert old.is_deleted() and not smoothing.is_deleted(), "pools are donated, and nothing of the caller's"
    for cache in (written, other, shared):  # and all three can be written and read
        made = writes(pages, layer)["append"](cache)
        pd.sharded_paged_attention(new_tokens()[0], made, pages.lengths, pages.block_tables, layer=layer)
        np.testing.assert_array_equal(made.key_smoothing, before)
    np.testing.assert_array_equal(smoothing, before)


@pytest.mark.parametrize("op", ["append", *(pytest.param(op, marks=pytest.mark.slow) for op in ("prefill", "copy"))])
def test_a_users_jit_that_donates_a_whole_cache_takes_no_smoothing_of_the_callers(op):
    mesh = pod(1, 1, 1)
    spec, pages = spec_of(1), allocator(spec_of(1), pod(1, 1, 1))
    smoothing = jax.device_put(
        smoothing_of(), pd.PagedKVCache.shardings(spec, mesh, key_smoothing=True).key_smoothing
    )  # where it will be: nothing asks for a copy of it
    step = jax.jit(writes(pages)[op], donate_argnums=0)
    for _ in range(2):
        cache = step(step(pd.PagedKVCache.create(spec, mesh, key_smoothing=smoothing)))
        made = pd.PagedKVCache.from_pages(*cache.to_pages(), key_smoothing=smoothing, mesh=mesh)
        made = step(made)
        assert not smoothing.is_deleted()
        np.testing.assert_array_equal(cache.key_smoothing, smoothing)
        np.testing.assert_array_equal(made.key_smoothing, smoothing)


def test_a_resized_or_resharded_cache_and_the_old_one_do_not_take_from_each_other():
    mesh, spec = pod(2, 1, 1), spec_of(2)
    pages, step = allocator(spec, mesh), jax.jit(lambda c: writes(pages)["append"](c), donate_argnums=0)
    for move in (
        lambda c: pd.resize(c, 32, pages),
        lambda c: pd.reshard(c, pages, mesh),
    ):
        cache = pd.PagedKVCache.create(spec, mesh, key_smoothing=smoothing_of())
        moved, there = move(cache)
        step(cache)  # donates all of the old one
        key, value = new_tokens()
        moved = pd.append_kv(moved, key, value, there.lengths - 1, there.block_tables)
        np.testing.assert_array_equal(moved.key_smoothing, smoothing_of())


def test_what_the_caller_has_of_numpy_may_change_afterwards():
    mesh, host = pod(1, 1, 1), np.ones((HEADS, DIM), np.float32)
    cache = pd.PagedKVCache.create(spec_of(1), mesh, key_smoothing=host)
    host[:] = 7
    assert (np.asarray(cache.key_smoothing) == 1).all()


def test_the_jitted_write_aliases_pools_and_scales_and_not_the_smoothing():
    """Read in the lowered program: each of the four arrays is the argument that it comes from, the fifth is none."""
    mesh = pod(1, 1, 1)
    spec, pages = spec_of(1), allocator(spec_of(1), pod(1, 1, 1))
    cache = pd.PagedKVCache.abstract(spec, mesh, key_smoothing=True)
    key, value = new_tokens()
    at = (jnp.asarray(pages.lengths - 1), jnp.asarray(pages.block_tables))
    lowered = append._append_sharded.jitted.lower(
        cache.without_smoothing(), cache.key_smoothing, key, value, *at, None, mesh=mesh, axes=pd.MeshAxes(),
        implementation=None,
    )  # fmt: skip
    assert lowered.as_text().count("tf.aliasing_output") == 4
    assert lowered.compile().memory_analysis().alias_size_in_bytes == spec.bytes_per_chip(mesh)


@pytest.mark.parametrize(
    "call",
    [
        lambda mesh, spec, cache, pages: pd.PagedKVCache.create(spec, mesh),
        lambda mesh, spec, cache, pages: pd.PageAllocator(spec, mesh, ROWS, 4),
        lambda mesh, spec, cache, pages: pd.append_kv(cache, *new_tokens(), pages.lengths - 1, pages.block_tables),
        lambda mesh, spec, cache, pages: pd.copy_pages(cache, pages.take_copies()),
        lambda mesh, spec, cache, pages: pd.sharded_paged_attention(
            new_tokens()[0], cache, pages.lengths, pages.block_tables
        ),
        lambda mesh, spec, cache, pages: pd.resize(cache, 64, pages),
        lambda mesh, spec, cache, pages: pd.reshard(cache, pages, mesh),
        lambda mesh, spec, cache, pages: pd.save("/nonexistent/folder", cache, pages),
        lambda mesh, spec, cache, pages: pd.describe_mesh(mesh, spec, num_q_heads=8, batch=8),
    ],
    ids=["create", "allocator", "append", "copy", "attend", "resize", "reshard", "save", "describe"],
)
def test_a_mesh_with_other_names_is_told_to_say_them(call):
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    spec, axes = spec_of(2), pd.MeshAxes("rows", None, "heads")
    pages = pd.PageAllocator(spec, mesh, ROWS, 4, axes=axes)
    cache = pd.PagedKVCache.create(spec, mesh, axes=axes)
    assert isinstance(cache.key_pages.sharding, NamedSharding)
    says = (
        r"axes\.data='data': the mesh has axes \('rows', 'heads'\); .*"
        r"axes=MeshAxes\(data='rows', context=None, model='heads'\)"
    )
    with pytest.raises(ValueError, match=says):
        call(mesh, spec, cache, pages)
