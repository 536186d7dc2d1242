"""Two rows that would write one page in one call are refused where the host sees it, and nothing else is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pod_meshes import simulated_pod

import paged_dist as pd
from paged_dist.ops.write_conflicts import check_rows_apart, on_host

SPEC = pd.CacheSpec(1, 128, 32, 8, "float32")
pytestmark = pytest.mark.filterwarnings("ignore:.*page_size=")


def new(*lead) -> np.ndarray:
    return np.ones((*lead, 1, 128), np.float32)


def append(positions, tables, tokens=1, as_array=np.asarray, mesh=None):
    lead = (len(positions),) if tokens == 1 else (len(positions), tokens)
    at = (as_array(np.array(x, np.int32)) for x in (positions, tables))
    return pd.append_kv(pd.PagedKVCache.create(SPEC, mesh or simulated_pod(1, 1, 1)), new(*lead), new(*lead), *at)


def prefill(starts, lengths, tables, rows=None, tokens=8):
    given = dict(starts=np.array(starts, np.int32), rows=None if rows is None else np.array(rows, np.int32))
    cache = pd.PagedKVCache.create(SPEC, simulated_pod(1, 1, 1))
    lengths, tables = (np.array(x, np.int32) for x in (lengths, tables))
    return pd.write_prefill_kv(cache, *(new(len(lengths), tokens),) * 2, lengths, tables, **given)


SAME = r"block_tables='page 5 in rows 0 and 2': is written twice in one call.*take_copies.*position -1"


@pytest.mark.parametrize("as_array", [np.asarray, np.ndarray.tolist, jnp.asarray], ids=["numpy", "lists", "cpu"])
def test_an_append_of_two_rows_to_one_page_is_refused(as_array):
    with pytest.raises(ValueError, match=SAME):
        append([3, 0, 4], [[5, 6], [7, 8], [5, 9]], as_array=as_array)


@pytest.mark.parametrize(
    "call",
    [
        lambda: append([6, 0, 8], [[4, 5], [7, 8], [6, 5]], tokens=3),  # the third token of row 0 is the page's first
        lambda: prefill([0, 0, 8], [8, 8, 16], [[5, 6], [7, 8], [9, 5]]),
        lambda: prefill([0, 3], [3, 8], [[5, 6], [7, 8], [5, 9]], rows=[0, 2]),
    ],
    ids=["tokens", "prefill", "rows"],
)
def test_tokens_and_prompts_that_meet_in_a_page_are_refused(call):
    with pytest.raises(ValueError, match=SAME):
        call()


def test_a_chunk_of_the_same_row_in_the_same_page_is_refused():
    with pytest.raises(ValueError, match="page 5 in rows 0 and 0"):
        prefill([0, 3], [3, 8], [[5, 6], [7, 8]], rows=[0, 0])


def test_what_is_not_written_may_be_shared():
    tables = [[5, 6], [5, 7], [5, 6]]
    cases = [  # starts, ends
        ([8, 8, -1], [9, 9, 0]),  # forks behind a shared page; an idle row
        ([0, 8, 16], [1, 9, 17]),  # past the table
        ([0, 8, 0], [1, 9, 0]),  # nothing new
        ([8, -1, 2**31 - 1], [9, 0, 2**31]),
    ]
    for starts, ends in cases:
        check_rows_apart(
            SPEC, simulated_pod(1, 1, 1), pd.MeshAxes(), np.array(starts), np.array(ends), np.array(tables)
        )
    with pytest.raises(ValueError, match="page 6 in rows 0 and 2"):
        check_rows_apart(
            SPEC, simulated_pod(1, 1, 1), pd.MeshAxes(), np.array([8, 8, 8]), np.array([9, 9, 9]), np.array(tables)
        )


def test_pages_that_are_not_where_the_row_is_are_not_written_nor_counted():
    mesh = simulated_pod(2, 2, 1)  # 8 pages a shard: data 0 has 0 to 15, of context shards 0 and 1
    check = lambda tables, at: check_rows_apart(
        SPEC, mesh, pd.MeshAxes(), np.array(at), np.array(at) + 1, np.array(tables, np.int32)
    )
    check([[0, 8], [17, 0]], [0, 8])  # page 0 in a row of data shard 1
    check([[0, 8, 1], [17, 24, 25], [0, 1, 1], [16, 24, 25]], [16, 16, 8, 0])  # row 2 is on data shard 1
    check([[0, 8], [1, 0], [16, 24], [17, 25]], [0, 8, 0, 0])  # page 0 is no second page of row 1
    with pytest.raises(ValueError, match="page 8 in rows 0 and 1"):
        check([[0, 8], [1, 8], [16, 24], [17, 25]], [8, 8, 0, 0])


def test_random_calls_are_refused_exactly_where_two_rows_meet():
    rng, mesh = np.random.default_rng(0), simulated_pod(2, 2, 1)
    refused = 0
    for _ in range(300):
        shard = np.arange(4)[:, None] // 2 * 2 + (rng.integers(0, 2, (4, 1)) + np.arange(3)) % 2
        tables = shard * 8 + rng.integers(0, 4, (4, 3))
        tables = np.where(rng.random((4, 3)) < 0.2, rng.integers(-2, 34, (4, 3)), tables).astype(np.int32)
        starts = rng.integers(-4, 30, 4)
        ends = starts + rng.integers(0, 12, 4)
        written: dict[int, int] = {}
        for row in range(4):
            begin = max(tables[row, 0], 0) // 8
            for i in range(3):
                page = int(tables[row, i])
                is_here = page // 8 == row // 2 * 2 + (begin + i) % 2
                touched = starts[row] >= 0 and max(starts[row], 8 * i) < min(ends[row], 8 * i + 8)
                if is_here and 0 <= page < 32 and touched:
                    written[page] = written.get(page, 0) + 1
        meets = any(n > 1 for n in written.values())
        refused += meets
        try:
            check_rows_apart(SPEC, mesh, pd.MeshAxes(), starts, ends, tables)
            assert not meets
        except ValueError:
            assert meets
    assert 30 < refused < 270


def test_nothing_is_looked_at_that_is_traced():
    seen = []
    jax.jit(lambda x: seen.append(on_host(x)))(np.zeros(3, np.int32))
    jax.eval_shape(lambda x: seen.append(on_host(np.zeros(3), x)), jnp.zeros(3))
    assert seen == [None, None]
    key = new(2)
    lost = jax.jit(lambda c, at, tables: pd.append_kv(c, key, key, at, tables), donate_argnums=0)
    tables = np.array([[5], [5]], np.int32)
    lost(
        pd.PagedKVCache.create(SPEC, simulated_pod(1, 1, 1)), np.array([0, 1], np.int32), tables
    )  # documented, not refused


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([[1, 4], [2, 4]], "copies=4: is a page that two pairs write"),
        ([[1, 4], [-1, -1], [4, 6]], "copies=4: is a page that one pair writes and another reads"),
    ],
)
@pytest.mark.parametrize("as_array", [np.array, jnp.array], ids=["numpy", "cpu"])
def test_copies_that_meet_in_a_page_are_refused(pairs, says, as_array):
    cache = pd.PagedKVCache.create(SPEC, simulated_pod(1, 1, 1))
    with pytest.raises(ValueError, match=says):
        pd.copy_pages(cache, as_array(pairs, np.int32))
    assert not cache.key_pages.is_deleted()


def test_q_tokens_are_attended_to_from_lengths_minus_q():
    """As the docstring of `append_kv` says: grow by Q, append at lengths - Q, attend with lengths."""
    mesh, rng = simulated_pod(1, 1, 1), np.random.default_rng(1)
    pages = pd.PageAllocator(SPEC, mesh, 1, 2)
    pages.allocate(0, 0)
    pages.grow(0, 4)
    key, value, query = (rng.standard_normal((1, 4, 1, 128)).astype(np.float32) for _ in "kvq")
    cache = pd.PagedKVCache.create(SPEC, mesh)
    assert "`lengths - Q`" in pd.append_kv.__doc__
    cache = pd.append_kv(cache, key, value, pages.lengths - 4, pages.block_tables)
    got = pd.sharded_paged_attention(query, cache, pages.lengths, pages.block_tables, sm_scale=0.1)
    scores = np.where(np.tri(4, dtype=bool), 0.1 * query[0, :, 0] @ key[0, :, 0].T, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(got)[0, :, 0], weights @ value[0, :, 0], rtol=1e-4, atol=1e-4)
