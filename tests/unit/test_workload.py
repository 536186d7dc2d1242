"""What the decode benchmark serves: traces, drawn lengths, recomputable tensors, and who sits in which row when."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from paged_dist import CacheSpec, PageAllocator, dequantize_kv, quantize_kv
from paged_dist.launch.serving import results
from paged_dist.launch.serving.row_schedule import Pool, RowSchedule, choose_checks
from paged_dist.launch.serving.synthetic import Kind, as_held, checksum_terms, hash_indices, keys_or_values, values
from paged_dist.launch.serving.workload import (
    CONTEXT_PERCENTILES,
    GENERATED_PERCENTILES,
    Request,
    draw_requests,
    pages_needed,
    sequences_that_fit,
    shorten,
    whole_pool,
)

# Lengths


@pytest.mark.parametrize(("field", "want"), [("context", CONTEXT_PERCENTILES), ("generated", GENERATED_PERCENTILES)])
def test_drawn_lengths_have_the_percentiles_they_were_fitted_to(field, want):
    lengths = np.array([getattr(r, field) for r in draw_requests(19366, seed=3)])
    got = np.percentile(lengths, (5, 50, 90, 99))
    np.testing.assert_allclose(got, want[:4], rtol=0.08)
    assert want[3] < lengths.max() <= want[4]
    assert lengths.min() >= 1


def test_drawn_requests_depend_on_the_seed_alone():
    assert draw_requests(50, seed=1) == draw_requests(50, seed=1)
    assert draw_requests(50, seed=1) != draw_requests(50, seed=2)
    assert draw_requests(50, seed=1)[:20] == draw_requests(20, seed=1), "more requests change no earlier one"
    assert [r.id for r in draw_requests(3)] == [0, 1, 2]


def test_shorten_scales_then_caps_and_keeps_a_token():
    requests = [Request(0, 1000, 10), Request(1, 1, 1)]
    assert shorten(requests, 0.5, max_context=300, max_generated=4) == [Request(0, 300, 4), Request(1, 1, 1)]
    assert shorten(requests) == requests


# How many fit


@pytest.mark.parametrize("num_pages", [0, 3, 4, 9, 10, 13, 1000, 10**12])
def test_sequences_fit_in_order_with_whole_pages_and_over_again(num_pages):
    requests = [Request(0, 10, 6), Request(1, 17, 16), Request(2, 80, 16)]  # 1, 3 and 6 pages of 16
    left, count = num_pages % 10, 0
    while left >= (need := pages_needed(requests[count].tokens, 16)):
        left, count = left - need, count + 1
    assert sequences_that_fit(requests, num_pages, 16) == num_pages // 10 * 3 + count


@pytest.mark.parametrize("page_size", [8, 64, 128, 256, 384, 2048])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_whole_pool_is_the_least_that_the_cache_takes(dtype, page_size):
    mesh = AbstractMesh((3, 1, 1), ("data", "context", "model"))
    pages = whole_pool(100, page_size, dtype, shards=3)
    CacheSpec(1, 128, pages, page_size, dtype).check_mesh(mesh)
    for fewer in range(100, pages):
        with pytest.raises(ValueError, match="num_pages"):
            CacheSpec(1, 128, fewer, page_size, dtype).check_mesh(mesh)


def test_the_capacity_of_a_hand_computed_pod():
    spec = CacheSpec(8, 128, 4, 128, "float32", 10)
    requests = [Request(0, 100, 28), Request(1, 100, 29)]  # 1 and 2 pages
    found = results.capacity(spec, requests, hbm_gib=1.0, chips=2)
    assert found["hbm_gib"] == 1.0 and found["chips"] == 2
    for dtype, token in (
        ("bfloat16", 2 * 10 * 8 * 256),
        ("int8", 2 * 10 * 8 * 132),
        ("float8_e4m3fn", 2 * 10 * 8 * 132),
    ):
        pages = 2**31 // (128 * token)
        fits = pages // 3 * 2 + (pages % 3 >= 1)
        assert found[dtype] == {"bytes_per_token": token, "pages": pages, "sequences": fits}
    assert results.capacity(CacheSpec(1, 128, 4, 48), requests, 1.0, 1)["int8"] is None


# Tensors


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_numpy_and_a_jitted_program_make_the_same_bits(dtype):
    request = np.array([[0], [7], [199]], np.int32)
    position = np.arange(50, dtype=np.int32)[None]
    heads, channels = np.arange(3), np.arange(64)
    made = jax.jit(lambda layer: values(jnp, dtype, 2**32 - 1, Kind.KEY, request, position, layer, heads, channels))(4)
    want = values(np, jnp.dtype(dtype), 2**32 - 1, Kind.KEY, request, position, 4, heads, channels)
    assert made.shape == (3, 50, 3, 64)
    np.testing.assert_array_equal(np.asarray(made).view(np.uint8), want.view(np.uint8))
    terms = jax.jit(lambda x: checksum_terms(jnp, x, 0, Kind.CHECKSUM_LOW, request, position, 4, heads, channels))(made)
    np.testing.assert_array_equal(
        np.asarray(terms), checksum_terms(np, want, 0, Kind.CHECKSUM_LOW, request, position, 4, heads, channels)
    )


def test_values_are_centred_of_variance_four_thirds_and_exact_in_their_dtype():
    x = values(np, np.float32, 0, Kind.VALUE, 3, np.arange(400), 0, np.arange(4), np.arange(64)).astype(np.float64)
    assert abs(x.mean()) < 0.01 and abs(x.var() - 4 / 3) < 0.01 and np.abs(x).max() < 2
    assert np.all(x * 2**15 % 2 == 1), "odd multiples of 2**-15: bfloat16 cannot hold them"
    y = values(np, jnp.dtype("bfloat16"), 0, Kind.VALUE, 3, np.arange(400), 0, np.arange(4), np.arange(64))
    assert np.all(y.astype(np.float64) * 2**7 % 2 == 1)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_keys_of_an_8_bit_cache_differ_in_size_and_the_host_knows_what_it_holds(dtype):
    request, position = np.array([[5]], np.int32), np.arange(200, dtype=np.int32)[None]
    where = (7, Kind.KEY, request, position, 1, np.arange(2), np.arange(64))
    made = jax.jit(lambda: keys_or_values(jnp, dtype, *where))()
    want = keys_or_values(np, dtype, *where)
    assert made.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(made).view(np.uint16), want.view(np.uint16))
    size = np.abs(want.astype(np.float64)).max(axis=-1)
    assert [round(float(q), 1) for q in np.quantile(size, (0.1, 0.35, 0.6, 0.9))] == [0.2, 0.5, 1.0, 2.0]
    other = keys_or_values(np, dtype, *(Kind.VALUE if x is Kind.KEY else x for x in where))
    assert np.corrcoef(np.log(size).ravel(), np.log(np.abs(other.astype(float)).max(-1)).ravel())[0, 1] < 0.2
    held = np.asarray(dequantize_kv(*quantize_kv(made, dtype)), np.float64)
    off = np.abs(as_held(want, dtype) - held) / size[..., None]
    assert (off > 1e-6).mean() < 1e-3, "a tie may round either way, nothing else"


def test_what_a_cache_of_other_dtypes_holds_is_what_it_was_given():
    x = np.linspace(-3, 3, 12).astype(np.float32).reshape(3, 4)
    np.testing.assert_array_equal(as_held(x, "float32"), x)
    np.testing.assert_array_equal(as_held(np.zeros((2, 4), np.float32), "int8"), 0)


def test_every_index_changes_the_hash():
    base = dict(seed=1, kind=Kind.QUERY, request=2, position=3, layer=4)
    hashed = lambda **kw: hash_indices(np, *(base | kw).values(), np.arange(4), np.arange(64))
    every = [hashed(), *(hashed(**{k: 9 if k != "kind" else Kind.VALUE}) for k in base)]
    assert np.unique(np.stack(every)).size > 6 * 256 - 2, "no two share a stream"
    assert np.unique(hashed()).size == 256, "heads and channels differ"


def test_the_checksum_sees_two_rows_that_changed_places():
    output = np.arange(2 * 2 * 8, dtype=np.float32).reshape(2, 2, 8)
    where = (0, Kind.CHECKSUM_LOW, np.array([0, 1]), np.array([5, 5]), 0, np.arange(2), np.arange(8))
    total = lambda x: int(checksum_terms(np, x, *where).sum(dtype=np.uint32))
    assert total(output) != total(output[::-1].copy())
    assert total(output) != total(np.zeros_like(output)) != 0


# Rows and pages


def make_schedule(requests, *, batch=4, data=2, pages_per_shard=8, page_size=16, checks=None, chunk_tokens=10):
    mesh = AbstractMesh((data, 1, 1), ("data", "context", "model"))
    spec = CacheSpec(1, 128, pages_per_shard * data, page_size)
    allocator = PageAllocator(spec, mesh, batch, max(-(-r.tokens // page_size) for r in requests))
    pool = Pool(batch, data, 1, pages_per_shard, page_size)
    return RowSchedule(requests, allocator, pool, chunk_tokens, checks or {}), allocator, pool


def test_every_token_of_every_request_is_decoded_once_with_its_own_pages():
    requests = [
        Request(i, c, g)
        for i, (c, g) in enumerate(
            [(5, 3), (16, 1), (40, 30), (1, 17), (31, 2), (90, 38), (8, 8), (15, 1), (17, 40), (64, 64)]
        )
    ]
    schedule, allocator, pool = make_schedule(requests)
    decoded, filled, entered, tables = {}, {}, [], None
    for plan in schedule:
        tables = plan.block_tables if plan.block_tables is not None else tables
        for request, row, start, stop in plan.chunks.tolist():
            assert 0 < stop - start <= 10 and plan.rows[row, 0] == request
            filled.setdefault(request, []).extend(range(start, stop))
            entered += [request] if start == 0 else []
        owned = []
        for row, (request, position, length) in enumerate(plan.rows.tolist()):
            if length == 0:
                assert position == -1
                continue
            assert length == position + 1
            decoded.setdefault(request, []).append(position)
            pages = tables[row, : -(-length // pool.page_size)].tolist()
            shard = row // (pool.batch // pool.data)
            assert all(page // pool.pages_per_shard == shard for page in pages)
            owned += pages
        assert len(set(owned)) == len(owned) == plan.pages, "no page is another row's too"
    for r in requests:
        assert filled[r.id] == list(range(r.context))
        assert decoded[r.id] == list(range(r.context, r.tokens))
    assert entered == sorted(entered), "arrival order"
    assert allocator.free_pages() == pool.pages_per_shard * pool.data


def test_a_tight_pool_makes_requests_wait_and_never_runs_out():
    requests = [Request(i, 1, 127) for i in range(6)]  # each ends with a whole shard
    schedule, *_ = make_schedule(requests, batch=8)
    live = [plan.live_rows for plan in schedule]
    assert max(live) == 2 and sum(live) == 6 * 127


def test_two_runs_hand_out_the_same_plans_and_an_unchanged_table_is_not_sent_again():
    requests = draw_requests(12, seed=5)
    requests = shorten(requests, 0.05)
    plans = [list(make_schedule(requests, pages_per_shard=64)[0]) for _ in range(2)]
    for a, b in zip(*plans, strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.chunks, b.chunks)
    sent = sum(plan.block_tables is not None for plan in plans[0])
    assert 0 < sent < len(plans[0])


def test_every_chosen_output_is_shown_even_where_two_fall_due_together():
    requests = [Request(i, 4, 6) for i in range(8)]
    checks = {i: (7, i % 3) for i in range(8)}
    schedule, *_ = make_schedule(requests, batch=8, checks=checks)
    shown = []
    for plan in schedule:
        for check in plan.checks:
            row = check.data_shard * 4 + plan.pick[check.data_shard, 0]
            assert plan.rows[row].tolist() == [check.request, check.length - 1, check.length]
            assert plan.pick[check.data_shard, 1] == check.layer == check.request % 3
            shown.append(check.request)
    assert sorted(shown) == list(range(8))


def test_checks_include_the_longest_request_and_lie_within_its_answer():
    requests = draw_requests(30, seed=2)
    checks = choose_checks(requests, 5, num_layers=3, seed=0)
    longest = max(requests, key=lambda r: r.tokens)
    assert len(checks) == 5 and longest.id in checks
    for i, (length, layer) in checks.items():
        assert requests[i].context < length <= requests[i].tokens and 0 <= layer < 3
    assert choose_checks(requests, 0, 3, 0) == {}


def test_a_request_that_no_shard_can_hold_is_refused_with_the_pool_that_would():
    with pytest.raises(ValueError, match=r"num_pages=16: 8 pages a shard, but request 1 .* needs 9; give at least 18"):
        make_schedule([Request(0, 1, 1), Request(1, 128, 1)])


def test_the_default_pool_keeps_nobody_waiting():
    requests = shorten(draw_requests(40, seed=1), 0.1)
    pool = Pool(8, 2, 1, 0, 16)
    pages = pool.pages_that_never_wait(requests)
    schedule, *_ = make_schedule(requests, batch=8, pages_per_shard=pages // 2)
    plans = list(schedule)
    waiting = len(requests) - np.cumsum([p.admitted for p in plans])
    assert all(p.live_rows == 8 for p, left in zip(plans, waiting, strict=True) if left)
