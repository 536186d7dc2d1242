"""Copies of pages: the right ones, in place, and what forks and prefixes make of them on a mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_bits import array_bits
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from pod_meshes import simulated_pod
from simulated import RACES, assert_no_races

import paged_dist as pd
from paged_dist.kernels.attention.oracle import attention_oracle


def random_cache(spec: pd.CacheSpec, mesh) -> pd.PagedKVCache:
    """A cache of random bits, NaN among them."""
    rng = np.random.default_rng(0)
    abstract = pd.PagedKVCache.abstract(spec, mesh)
    fill = lambda a: jax.device_put(
        rng.integers(0, 256, (*a.shape, a.dtype.itemsize), np.uint8).view(a.dtype)[..., 0], a.sharding
    )
    return jax.tree.map(fill, abstract)


# data, context, model, head_dim, page_size, dtype, layers
CASES = [
    (1, 1, 1, 128, 16, "bfloat16", None),
    (2, 2, 2, 64, 16, "float32", 3),
    (2, 1, 2, 128, 128, "int8", 2),
    (1, 4, 2, 64, 64, "float8_e4m3fn", None),
    (1, 2, 1, 256, 16, "int8", 2),
    (2, 2, 1, 128, 256, "int8", None),
]


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize(
    ("kind", "implementation"),
    [(AxisType.Auto, None), (AxisType.Auto, RACES), pytest.param(AxisType.Explicit, None, marks=pytest.mark.slow)],
    ids=["xla", "simulated", "explicit"],
)
@pytest.mark.parametrize(("data", "context", "model", "head_dim", "page_size", "dtype", "layers"), CASES)
def test_each_page_is_where_it_should_be_and_no_other_moved(
    data, context, model, head_dim, page_size, dtype, layers, kind, implementation
):
    shards, each = data * context, 64
    spec = pd.CacheSpec(2, head_dim, shards * each, page_size, dtype, layers)
    cache = random_cache(spec, simulated_pod(data, context, model, kind))
    rng = np.random.default_rng(1)
    copies = np.concatenate([rng.permutation(each)[:6].reshape(3, 2) + r * each for r in range(shards)])
    copies[-1, 0] = copies[-2, 0]  # a page may be read twice
    left_out = [[-1, -1], [-1, 3], [5, -1], [0, spec.num_pages], *([[0, each]] if shards > 1 else [])]
    given = rng.permutation(np.concatenate([copies, left_out]).astype(np.int32))
    before = [np.array(x) for x in cache.to_pages()]
    after = pd.copy_pages(cache, jnp.asarray(given), implementation=implementation).to_pages()
    if implementation is RACES:
        assert_no_races()
    assert len(after) == (4 if spec.is_quantized else 2)
    for old, new in zip(before, after, strict=True):
        axis = 1 if layers is None else 2
        old, new = np.moveaxis(old, axis, 0), np.moveaxis(np.asarray(new), axis, 0)
        want = old.copy()
        want[copies[:, 1]] = old[copies[:, 0]]
        np.testing.assert_array_equal(array_bits(new), array_bits(want))


def test_inside_a_callers_shard_map_that_checks_and_under_other_names():
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    axes = pd.MeshAxes(data="rows", context=None, model="heads")
    cache = pd.PagedKVCache.create(pd.CacheSpec(2, 128, 8, 128), mesh, axes=axes)
    cache = jax.tree.map(lambda x: x + np.arange(8, dtype=x.dtype)[:, None, None], cache)
    copies = jnp.array([[1, 0], [7, 4], [-1, -1]], jnp.int32)
    specs = cache.partition_specs(axes)
    local = functools.partial(pd.copy_pages_local, axes=axes)
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs, P()), out_specs=specs, check_vma=True))
    for made in (run(cache, copies), pd.copy_pages(cache, copies, axes=axes)):
        np.testing.assert_array_equal(np.asarray(made.key_pages)[:, :, 0, 0], [[1, 1, 2, 3, 7, 5, 6, 7]] * 2)


@pytest.mark.parametrize(
    ("copies", "says"),
    [
        (np.zeros((3, 3), np.int32), r"copies\.shape=\(3, 3\): must be \[M, 2\]"),
        (np.zeros((3, 2), np.float32), r"copies\.dtype='float32': must be int32"),
    ],
)
def test_other_copies_are_refused(copies, says):
    cache = pd.PagedKVCache.create(pd.CacheSpec(2, 128, 8, 128), simulated_pod(1, 1, 1))
    with pytest.raises(ValueError, match=says):
        pd.copy_pages(cache, copies)


# What is compiled for a pod


# Forks and prefixes on a mesh


def poison(cache: pd.PagedKVCache, pages: pd.PageAllocator) -> pd.PagedKVCache:
    """`cache` with NaN in every page that nobody may read."""
    dead = np.ones(cache.spec.num_pages, bool)
    dead[pages.live_pages] = False
    nan = lambda x: jnp.where(dead[:, None, None], jnp.nan, x)
    key, value = cache.to_pages()
    return pd.PagedKVCache.from_pages(nan(key), nan(value), mesh=cache.mesh)


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 3, 1)], ids=str)
def test_forks_and_cached_prompts_attend_to_their_own_tokens(shape):
    """Beams that part, a prompt that goes on behind another's pages; NaN wherever nobody owns the page."""
    data, context, _ = shape
    mesh, page_size, rows = simulated_pod(*shape), 8, 4 * data
    spec = pd.CacheSpec(2, 128, data * context * 12, page_size, "float32")
    pages = pd.PageAllocator(spec, mesh, rows, 6)
    cache = pd.PagedKVCache.create(spec, mesh)
    rng = np.random.default_rng(3)
    made = lambda *shape: rng.standard_normal((*shape, 2, 128)).astype(np.float32)
    tokens: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # K and V of each row, by token
    prompt = rng.integers(0, 9, 21)
    k, v = made(40), made(40)  # of the prompt and what follows it, the same for all that share it

    def prefill(cache, row, start, length):
        block = np.zeros((2, 1, length - start, 2, 128), np.float32)
        block[:, 0] = tokens[row][0][start:length], tokens[row][1][start:length]
        return pd.write_prefill_kv(
            cache, *map(jnp.asarray, block), jnp.array([length], jnp.int32), pages.block_tables,
            starts=jnp.array([start], jnp.int32), rows=jnp.array([row], jnp.int32),
        )  # fmt: skip

    def step(cache, new: dict[int, tuple[np.ndarray, np.ndarray]]):
        pages.grow_all(sorted(new))
        cache = pd.copy_pages(cache, pages.take_copies())
        cache = poison(cache, pages)
        key, value = np.zeros((2, rows, 2, 128), np.float32)
        positions = np.full(rows, -1, np.int32)
        for row, (one, other) in new.items():
            tokens[row] = tuple(np.concatenate([x, y[None]]) for x, y in zip(tokens[row], (one, other), strict=True))
            key[row], value[row], positions[row] = one, other, pages.lengths[row] - 1
        return pd.append_kv(cache, jnp.asarray(key), jnp.asarray(value), positions, pages.block_tables)

    def check(cache):
        query = rng.standard_normal((rows, 4, 128)).astype(np.float32)
        got = pd.sharded_paged_attention(jnp.asarray(query), cache, pages.lengths, pages.block_tables, sm_scale=0.1)
        for row, (key, value) in tokens.items():
            n = len(key)
            assert pages.lengths[row] == n
            pool = [np.ascontiguousarray(x.swapaxes(0, 1))[:, None] for x in (key, value)]  # one page of n tokens
            want, _ = attention_oracle(
                query[row : row + 1], *pool, np.array([n]), np.zeros((1, 1), np.int32), sm_scale=0.1
            )
            np.testing.assert_allclose(np.asarray(got)[row], want[0], rtol=2e-5, atol=2e-5)

    tokens[0] = k[:21], v[:21]
    pages.allocate(0, 21)
    cache = prefill(poison(cache, pages), 0, 0, 21)
    pages.cache_prefix(0, prompt)
    pages.fork(0, 1)
    pages.fork(0, 2)
    tokens[1] = tokens[2] = tokens[0]
    check(cache)
    for _ in range(4):  # the three part inside page 2, and go on into page 3
        cache = step(cache, {row: (made(), made()) for row in (0, 1, 2)})
        check(cache)
    pages.truncate(1, 18)
    tokens[1] = tuple(x[:18] for x in tokens[1])
    pages.free(0)
    del tokens[0]
    cache = step(cache, {1: (made(), made())})
    check(cache)

    match = pages.prefix_match(prompt[:-1])
    assert (match.data_shard, match.num_tokens) == (0, 16)
    row = pages.place(20, match)
    pages.allocate(row, 20, match)
    tokens[row] = k[:20], v[:20]
    cache = prefill(poison(cache, pages), row, match.num_tokens, 20)
    check(cache)
    cache = step(cache, {row: (made(), made()) for row in tokens})
    check(cache)
    for row in list(tokens):
        pages.free(row)
    match = pages.prefix_match(prompt)
    assert match.num_tokens == 16 and pages.used_pages == 0
    tokens.clear()
    pages.allocate(3, 17, match)  # nobody has held them in between
    tokens[3] = k[:17], v[:17]
    cache = prefill(poison(cache, pages), 3, 16, 17)
    check(cache)


@pytest.mark.filterwarnings("ignore:.*page_size=8")
def test_a_row_that_does_not_grow_keeps_its_last_token_for_all_that_share_it():
    mesh = simulated_pod(1, 1, 1)
    spec = pd.CacheSpec(2, 128, 6, 8, "float32")
    pages, cache = pd.PageAllocator(spec, mesh, 4, 2), pd.PagedKVCache.create(spec, mesh)
    made = lambda token, *shape: jnp.full((*shape, 2, 128), float(token))  # each token its own number
    pages.allocate(0, 5)
    prompt = jnp.arange(1.0, 6.0)[None, :, None, None] * made(1, 1, 5)
    cache = pd.write_prefill_kv(
        cache, prompt, prompt, jnp.array([5], jnp.int32), pages.block_tables, rows=jnp.array([0], jnp.int32)
    )
    pages.fork(0, 1)
    pages.fork(0, 2)
    positions = pages.grow_all([1])  # rows 0 and 2 are held and get nothing
    cache = pd.copy_pages(cache, pages.take_copies())
    cache = pd.append_kv(cache, made(9, 4), made(9, 4), positions, pages.block_tables)
    assert positions.tolist() == [-1, 5, -1, -1]
    for row, tokens in {0: [1, 2, 3, 4, 5], 1: [1, 2, 3, 4, 5, 9], 2: [1, 2, 3, 4, 5]}.items():
        for pool in cache.to_pages():
            shown = np.asarray(pool)[:, pages.block_tables[row, 0], : len(tokens)]
            np.testing.assert_array_equal(shown, np.broadcast_to(np.array(tokens)[None, :, None], shown.shape))
