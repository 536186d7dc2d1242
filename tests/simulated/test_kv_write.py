"""Writing new tokens: every form against NumPy, in place, and nothing else touched."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_bits import array_bits
from jax.sharding import AxisType
from pod_cases import shard_tables
from pod_meshes import simulated_pod
from simulated import RACES, assert_no_races

import paged_dist as pd
from paged_dist.kernels import write_kv_pages
from paged_dist.kernels.cache_update.tiles import VMEM_BUDGET, choose_tile_rows, pool_shape, tile_bytes


def write_in_numpy(pool, new, starts, ends, tables, layer, page_size):
    """pool [L, Hkv, N, R, W] with new [B, T, Hkv, D] written token by token."""
    layers, heads, pages, rows, lanes = pool.shape
    written = pool.copy().reshape(layers, heads, pages, page_size, rows * lanes // page_size)
    for b in range(new.shape[0]):
        for t in range(new.shape[1]):
            position = starts[b] + t
            if starts[b] < 0 or position >= ends[b] or position // page_size >= tables.shape[1]:
                continue
            page = tables[b, position // page_size]
            if 0 <= page < pages:
                written[layer, :, page, position % page_size] = new[b, t]
    return written.reshape(pool.shape)


# head_dim, page_size, new tokens, dtype, kv heads
CASES = [
    (128, 16, 1, "bfloat16", 2),
    (128, 128, 1, "float32", 1),
    (64, 16, 1, "bfloat16", 2),
    (64, 32, 5, "float32", 2),
    (128, 8, 3, "bfloat16", 1),
    (256, 16, 16, "bfloat16", 1),
    (128, 32, 70, "bfloat16", 2),
    (64, 32, 70, "bfloat16", 1),
]


@pytest.mark.parametrize("interpret", [None, RACES], ids=["xla", "simulated"])
@pytest.mark.parametrize(("head_dim", "page_size", "tokens", "dtype", "heads"), CASES)
def test_written_tokens_are_where_the_table_says_and_nothing_else_moved(
    head_dim, page_size, tokens, dtype, heads, interpret
):
    layers, pages, batch, width = 2, 20, 5, 4
    rng = np.random.default_rng(head_dim + page_size + tokens)
    lanes = max(128, head_dim)
    pools = [
        rng.standard_normal((layers, heads, pages, page_size * head_dim // lanes, lanes)).astype(dtype) for _ in "kv"
    ]
    for pool in pools:
        pool[:, :, :, -1, -1] = np.nan  # what is not written stays, whatever it is
    new = [rng.standard_normal((batch, tokens, heads, head_dim)).astype(dtype) for _ in "kv"]
    tables = rng.permutation(pages).reshape(batch, width).astype(np.int32)
    tables[1, 1:] = [-1, 2**30, -(2**30)]  # outside the pool: skipped
    starts = np.array([page_size - 1, page_size - 2, 3, -1, width * page_size - 1], np.int32)
    ends = starts + tokens
    ends[0] = min(ends[0], page_size + 3)
    out = jax.jit(lambda *a: write_kv_pages(*a, jnp.int32(1), interpret=interpret))(*pools, *new, starts, ends, tables)
    for got, pool, x in zip(out, pools, new, strict=True):
        np.testing.assert_array_equal(
            array_bits(got), array_bits(write_in_numpy(pool, x, starts, ends, tables, 1, page_size))
        )
    if interpret is RACES:
        assert_no_races()


@pytest.mark.parametrize("interpret", [None, RACES], ids=["xla", "simulated"])
def test_random_rounds_of_writes_agree_with_numpy(interpret):
    rng = np.random.default_rng(7)
    pages, page_size, batch, width, heads = 16, 16, 4, 4, 2
    tables = rng.permutation(pages).reshape(batch, width).astype(np.int32)
    pools = [np.zeros((1, heads, pages, page_size, 128), np.float32) for _ in "kv"]
    got = [jnp.asarray(p) for p in pools]
    for _ in range(4 if interpret else 25):
        tokens = int(rng.choice([1, 1, 2, 9, 40]))
        new = [rng.standard_normal((batch, tokens, heads, 128)).astype(np.float32) for _ in "kv"]
        starts = rng.integers(-1, width * page_size + 2, batch).astype(np.int32)
        ends = (starts + rng.integers(0, tokens + 2, batch)).astype(np.int32)
        got = write_kv_pages(*got, *new, starts, ends, tables, interpret=interpret)
        pools = [
            write_in_numpy(p, x, starts, np.minimum(ends, starts + tokens), tables, 0, page_size)
            for p, x in zip(pools, new, strict=True)
        ]
        for a, b in zip(got, pools, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("interpret", [None, RACES], ids=["xla", "simulated"])
@pytest.mark.parametrize("tokens", [1, pytest.param(8, marks=pytest.mark.slow), 100])
@pytest.mark.parametrize("start", [64, 2**31 - 4, 2**31 - 1, -(2**31)])
def test_positions_outside_the_table_write_nothing(start, tokens, interpret):
    """At the table's edge and at int32's."""
    pool = jnp.ones((1, 1, 8, 16, 128))
    new = jnp.full((2, tokens, 1, 128), 7.0)
    starts = jnp.array([start, -1], jnp.int32)
    tables = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    ends = jnp.array([2**31 - 1, 5], jnp.int32)
    for pages in write_kv_pages(pool, pool, new, new, starts, ends, tables, interpret=interpret):
        assert (np.asarray(pages) == 1).all()


@pytest.mark.parametrize("tokens", [1, 16, 4096])
@pytest.mark.parametrize("heads", [1, 8, 128])
def test_tiles_divide_a_page_and_fit_vmem(heads, tokens):
    for page_size in (8, 16, 24, 64, 128, 256):
        pool = pool_shape(np.zeros((1, heads, 4, page_size, 128), np.int8), 128)
        rows = choose_tile_rows(pool, tokens, 2)
        assert rows % 8 == 0
        assert page_size % rows == 0
        assert rows == 8 or tile_bytes(pool, rows, 2) <= VMEM_BUDGET


# ---------------------------------------------------------------------------------------------- the sharded ops


@pytest.mark.parametrize("implementation", [None, RACES], ids=["xla", "simulated"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("head_dim", [128, 64])
def test_append_kv_writes_each_row_on_its_own_shard(head_dim, kind, implementation):
    mesh, rng = simulated_pod(2, 1, 4, kind), np.random.default_rng(3)
    tables = shard_tables(rng, 2, 16, 4)
    pages = [jnp.asarray(rng.standard_normal((2, 4, 16, 64, head_dim)), jnp.bfloat16) for _ in "kv"]
    before = [np.asarray(p) for p in pages]
    cache = pd.PagedKVCache.from_pages(*pages, mesh=mesh)
    positions = np.array([3, -1, 70, 64 * 4], np.int32)  # row 1 is idle, row 3 past its table
    new = [rng.standard_normal((4, 4, head_dim)).astype("bfloat16") for _ in "kv"]
    cache = pd.append_kv(
        cache, *map(jnp.asarray, (*new, positions, tables)), layer=jnp.int32(1), implementation=implementation
    )
    for got, old, x in zip(cache.to_pages(), before, new, strict=True):
        expected = old.copy()
        expected[1, :, tables[0, 0], 3] = x[0]
        expected[1, :, tables[2, 1], 6] = x[2]
        np.testing.assert_array_equal(array_bits(got), array_bits(expected))


def test_ids_of_another_data_shard_are_not_written():
    mesh = simulated_pod(2, 1, 4)
    cache = pd.PagedKVCache.create(pd.CacheSpec(4, 128, 16, 64), mesh)
    tables = np.array([[8], [0], [0], [15]], np.int32)  # rows 0, 1 live on pages 0..7, rows 2, 3 on 8..15
    new = jnp.ones((4, 4, 128), jnp.bfloat16)
    cache = pd.append_kv(cache, new, new, jnp.zeros(4, jnp.int32), jnp.asarray(tables))
    written = np.asarray(cache.to_pages()[0]).any(axis=(0, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(written), [0, 15])


def test_append_of_several_tokens_a_row_crosses_pages():
    mesh, rng = simulated_pod(2, 1, 4), np.random.default_rng(5)
    cache = pd.PagedKVCache.create(pd.CacheSpec(4, 128, 16, 64, dtype="float32"), mesh)
    tables = shard_tables(rng, 2, 16, 4)
    new = rng.standard_normal((4, 3, 4, 128)).astype(np.float32)
    positions = np.array([62, 0, -2, 255], np.int32)
    cache = pd.append_kv(cache, *map(jnp.asarray, (new, 2 * new, positions, tables)))
    expected = np.zeros((4, 16, 64, 128), np.float32)
    for b, t in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (3, 0)]:
        position = positions[b] + t
        expected[:, tables[b, position // 64], position % 64] = new[b, t]
    np.testing.assert_array_equal(cache.to_pages()[0], expected)
    np.testing.assert_array_equal(cache.to_pages()[1], 2 * expected)


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        pytest.param(AxisType.Auto, None, id="auto-xla"),
        pytest.param(AxisType.Explicit, None, id="explicit-xla"),
        pytest.param(AxisType.Auto, "pallas_interpret", id="auto-simulated"),
        pytest.param(AxisType.Explicit, "pallas_interpret", id="explicit-simulated", marks=pytest.mark.slow),
    ],
)
def test_prefill_in_chunks_of_some_rows_equals_all_at_once(implementation, kind):
    mesh, rng = simulated_pod(2, 1, 4, kind), np.random.default_rng(9)
    spec = pd.CacheSpec(4, 128, 16, 64, dtype="float32", num_layers=2)
    tables = jnp.asarray(shard_tables(rng, 2, 16, 4))
    lengths = np.array([200, 0, 64, 129], np.int32)
    key, value = (rng.standard_normal((4, 200, 4, 128)).astype(np.float32) for _ in "kv")

    whole = pd.PagedKVCache.create(spec, mesh)
    whole = pd.write_prefill_kv(whole, jnp.asarray(key), jnp.asarray(value), jnp.asarray(lengths), tables, layer=1)

    parts = pd.PagedKVCache.create(spec, mesh)
    for start in (0, 75, 150):
        rows = np.array([3, 0, 2, -1], np.int32)  # the last of them is padding
        chunk = lambda x, rows=rows, start=start: jnp.asarray(
            np.pad(x, [(0, 0), (0, 75), (0, 0), (0, 0)])[rows, start : start + 75]
        )
        parts = pd.write_prefill_kv(
            parts, chunk(key), chunk(value), jnp.asarray(lengths[rows]), tables, starts=jnp.full(4, start, jnp.int32),
            rows=jnp.asarray(rows), layer=jnp.int32(1), implementation=implementation,
        )  # fmt: skip
    expected = np.zeros((2, 4, 16, 64, 128), np.float32)
    for b, length in enumerate(lengths):
        for t in range(length):
            expected[1, :, tables[b, t // 64], t % 64] = key[b, t]
    np.testing.assert_array_equal(whole.to_pages()[0], expected)
    for a, b in zip(whole.to_pages(), parts.to_pages(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_eager_write_takes_the_cache_over():
    cache = pd.PagedKVCache.create(pd.CacheSpec(4, 128, 16), simulated_pod(2, 1, 4))
    address = cache.key_pages.addressable_shards[0].data.unsafe_buffer_pointer()
    new, zeros = jnp.ones((2, 4, 128), jnp.bfloat16), jnp.zeros(2, jnp.int32)
    after = pd.append_kv(cache, new, new, zeros, jnp.zeros((2, 1), jnp.int32))
    assert cache.key_pages.is_deleted()
    assert after.key_pages.addressable_shards[0].data.unsafe_buffer_pointer() == address


GOOD = dict(
    key=((4, 4, 128), "bfloat16"), value=((4, 4, 128), "bfloat16"), positions=((4,), "int32"),
    block_tables=((4, 4), "int32"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(key=((4, 4, 64), "bfloat16"), value=((4, 4, 64), "bfloat16")), r"key\.shape=\(4, 4, 64\).*\(4, 128\)"),
        (dict(value=((4, 2, 128), "bfloat16")), r"value\.shape=\(4, 2, 128\).*key\.shape \(4, 4, 128\)"),
        (dict(key=((4, 4, 128), "int8")), r"key\.dtype='int8'.*float"),
        (dict(positions=((3,), "int32")), r"positions\.shape=\(3,\).*\(4,\)"),
        (dict(positions=((4,), "float32")), r"positions\.dtype='float32'.*int32"),
        (dict(block_tables=((2, 4), "int32")), r"block_tables\.shape=\(2, 4\).*\[4"),
        (dict(layer=0), r"layer=0.*no layer axis"),
        (dict(implementation="cuda"), r"implementation='cuda'.*one of"),
    ],
)
def test_bad_appends_are_refused_before_anything_compiles(changes, names):
    cache = pd.PagedKVCache.create(pd.CacheSpec(4, 128, 16), simulated_pod(2, 1, 4))
    options = {k: v for k, v in changes.items() if k not in GOOD}
    arrays = {k: jnp.zeros(*v) for k, v in (GOOD | {k: v for k, v in changes.items() if k in GOOD}).items()}
    with pytest.raises(ValueError, match=names):
        pd.append_kv(cache, **arrays, **options)
    assert not cache.key_pages.is_deleted()


def test_batch_that_does_not_divide_over_data_is_refused():
    cache = pd.PagedKVCache.create(pd.CacheSpec(4, 128, 16), simulated_pod(2, 1, 4))
    new = jnp.zeros((3, 4, 128))
    with pytest.raises(ValueError, match=r"key\.shape\[0\]=3.*multiple of the mesh's data size 2"):
        pd.append_kv(cache, new, new, jnp.zeros(3, jnp.int32), jnp.zeros((3, 4), jnp.int32))
