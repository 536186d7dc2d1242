"""PageAllocator, each rule by itself; random calls are in test_allocator_properties.py."""

import math
import pickle
import time

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from small_allocators import abstract_pod, small_allocator

from paged_dist.cache import CacheSpec
from paged_dist.mesh import MeshAxes
from paged_dist.pages import OutOfPages, PageAllocator


def test_ids_come_lowest_first_from_the_rows_own_shard():
    a = small_allocator(2)
    a.allocate(0, 17)
    a.allocate(2, 8)
    a.allocate(1, 1)
    a.free(0)
    a.allocate(0, 32)
    np.testing.assert_array_equal(a.block_tables, [[0, 1, 2, 4], [3, -1, -1, -1], [8, -1, -1, -1], [-1] * 4])
    np.testing.assert_array_equal(a.lengths, [32, 1, 8, 0])


def test_snapshots_are_read_only_and_kept_until_a_change():
    a = small_allocator(2)
    a.allocate(0, 7)
    lengths, tables = a.lengths, a.block_tables
    assert lengths.dtype == tables.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        lengths[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        tables[0, 0] = 1
    a.grow(0)  # token 8 fits the page: the table is as it was
    assert a.block_tables is tables and a.lengths is not lengths
    assert lengths[0] == 7 and a.lengths[0] == 8
    a.grow(0)
    assert a.block_tables is not tables and tables[0, 1] == -1 and a.block_tables[0, 1] == 1


def test_truncate_frees_whole_pages_only_and_keeps_an_empty_row_held():
    a = small_allocator(2)
    a.allocate(0, 32)
    a.truncate(0, 9)
    assert a.used_pages == 2
    a.truncate(0, 8)
    assert a.used_pages == 1
    a.truncate(0, 0)
    assert a.used_pages == 0 and a.is_held(0)
    with pytest.raises(ValueError, match="is held"):
        a.allocate(0, 1)
    a.free(0)
    assert not a.is_held(0)


def test_place_prefers_the_emptiest_shard_then_the_lowest_row_and_takes_nothing():
    a = small_allocator(2)
    assert a.place(32) == 0 == a.place(32)
    a.allocate(0, 1)
    assert a.place(1) == 2
    a.allocate(2, 24)
    assert a.place(1) == 1
    a.allocate(1, 32)
    assert a.place(1) == 3
    a.allocate(3, 8)
    with pytest.raises(OutOfPages, match="no free row") as e:
        a.place(0)
    assert (e.value.asked, e.value.free, e.value.shard) == (0, 0, None)


def test_place_says_when_no_shard_will_ever_have_the_pages():
    a = small_allocator(2, columns=12)
    with pytest.raises(OutOfPages, match="none ever will: a shard owns 8") as e:
        a.place(9 * 8)
    assert (e.value.asked, e.value.free, e.value.shard) == (9, 8, None)


def test_out_of_pages_says_what_was_asked_and_what_is_free_where():
    a = small_allocator(2, columns=6)
    a.allocate(2, 48)
    a.allocate(3, 8)
    with pytest.raises(OutOfPages, match="row 3 on data shard 1: 2 more pages needed, 1 of its 8 are free") as e:
        a.grow(3, 9)
    assert (e.value.asked, e.value.free, e.value.shard) == (2, 1, 1)


def test_out_of_pages_survives_pickling():
    e = pickle.loads(pickle.dumps(OutOfPages("text", asked=3, free=1, shard=2, rows=[4, 5])))
    assert (str(e), e.asked, e.free, e.shard, e.context_shard, e.rows) == ("text", 3, 1, 2, None, (4, 5))


def test_place_looks_past_a_shard_whose_free_pages_are_on_one_context_shard():
    mesh = AbstractMesh((2, 2, 1), ("data", "context", "model"))
    a = PageAllocator(CacheSpec(1, 128, 8, 8), mesh, 6, 4)
    for row in range(3):
        a.allocate(row, 8)
    a.free(1)
    a.allocate(3, 16)
    assert (a.free_pages(0), a.free_pages(1)) == (2, 2) and a.free_pages(0, 0) == 0
    assert a.place(16) == 4
    a.allocate(4, 16)
    with pytest.raises(OutOfPages, match="has 2 pages free in turn on its 2 context shards, the most is 2") as e:
        a.place(16)
    assert (e.value.asked, e.value.free) == (2, 2)


def test_grow_all_names_the_row_whose_table_is_full():
    a = small_allocator(2)
    for row, tokens in enumerate([5, 30, 32]):
        a.allocate(row, tokens)
    digest = a.digest()
    with pytest.raises(ValueError, match=r"num_tokens=4: .* with the 30 there already in row 1.*; at most 2 for row 1"):
        a.grow_all([0, 1, 2], 4)
    with pytest.raises(ValueError, match="with the 32 there already in row 2"):
        a.grow_all([2])
    with pytest.raises(ValueError, match="row=3: is free"):
        a.grow_all([0, 3])
    assert a.digest() == digest


def test_positions_are_those_of_the_rows_that_grew():
    a = small_allocator(2, rows=6, columns=4, pages=24)
    a.allocate(0, 7)
    a.allocate(1, 3)  # held, and does not grow: its last token must not be written again
    a.allocate(4, 0)
    got = a.grow_all([4, 0])
    assert got.dtype == np.int32 and got.tolist() == [7, -1, -1, -1, 0, -1]
    with pytest.raises(ValueError, match="read-only"):
        got[1] = 2
    assert a.grow_all([0, 1], 3).tolist() == [8, 3, -1, -1, -1, -1]
    a.truncate(0, 9)  # two of the three were rejected
    assert a.grow_all([0, 1]).tolist() == [9, 6, -1, -1, -1, -1]
    assert a.grow_all([]).tolist() == a.grow_all([0, 1], 0).tolist() == [-1] * 6
    assert [a.grow(1), a.grow(4, 2), a.grow(0, 0)] == [7, 1, -1]
    assert a.positions([1]).tolist() == [-1, 7, -1, -1, -1, -1]
    assert a.positions([4], 2).tolist() == [-1, -1, -1, -1, 1, -1]
    for rows, count, message in [
        ([2], 1, "row=2: is free"), ([4], 4, "num_tokens=4: must be at most the 3 tokens of row 4"),
        ([0], 0, "num_tokens=0: must be at least 1"), ([True], 1, "row=True: must be a whole number"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            a.positions(rows, count)


def test_grow_all_is_all_or_nothing():
    a = small_allocator(2, rows=4, columns=8, pages=8)  # 4 pages a shard
    for row, tokens in enumerate([8, 16, 8, 7]):
        a.allocate(row, tokens)
    digest = a.digest()
    with pytest.raises(OutOfPages, match="rows 0, 1 on data shard 0: 2 more pages needed, 1 of its 4") as e:
        a.grow_all(range(4))
    assert (e.value.shard, e.value.rows) == (0, (0, 1)) and a.digest() == digest
    with pytest.raises(ValueError, match=r"rows=\[2, 2\]: names row 2 twice"):
        a.grow_all([2, 2])
    with pytest.raises(ValueError, match="negative"):
        a.grow_all([2], -1)
    assert a.digest() == digest
    b = small_allocator(2, rows=4, columns=8, pages=8)
    for row, tokens in enumerate([8, 16, 8, 7]):
        b.allocate(row, tokens)
    a.grow_all([3, 2, 1])
    for row in (3, 2, 1):
        b.grow(row)
    assert a.digest() == b.digest() != digest
    np.testing.assert_array_equal(a.lengths, b.lengths)


BAD_CALLS = [
    (lambda a: a.allocate(4, 1), r"row=4: must be between 0 and 3"),
    (lambda a: a.allocate(-1, 1), r"row=-1: must be between 0 and 3"),
    (lambda a: a.allocate(0, 1), r"row=0: is held by a sequence of 5 tokens"),
    (lambda a: a.allocate(1, -1), r"num_tokens=-1: must be between 0 and 32"),
    (lambda a: a.allocate(1, 33), r"num_tokens=33: must be between 0 and 32: pages_per_sequence 4 x"),
    (lambda a: a.grow(1), r"row=1: is free"),
    (lambda a: a.grow(0, -1), r"num_tokens=-1: must not be negative"),
    (lambda a: a.grow(0, 28), r"num_tokens=28: must be between 0 and 32 with the 5 there already"),
    (lambda a: a.truncate(0, 6), r"num_tokens=6: must be between 0 and the 5 tokens of row 0"),
    (lambda a: a.truncate(0, -1), r"num_tokens=-1: must be between 0"),
    (lambda a: a.truncate(1, 0), r"row=1: is free"),
    (lambda a: a.free(1), r"row=1: is free"),
    (lambda a: a.place(33), r"num_tokens=33"),
    (lambda a: a.free_pages(2), r"shard=2: there are 2 data shards"),
    (lambda a: a.free_pages(0.5), r"shard=0.5: must be a whole number"),
    (lambda a: a.free_pages(0, True), r"context_shard=True: must be a whole number"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[m[:18] for _, m in BAD_CALLS])
def test_a_bad_call_names_the_argument_and_changes_nothing(call, message):
    a = small_allocator(2)
    a.allocate(0, 5)
    digest = a.digest()
    with pytest.raises(ValueError, match=message):
        call(a)
    assert a.digest() == digest


def test_numpy_integers_are_taken():
    a, b = small_allocator(2), small_allocator(2)
    a.allocate(np.int64(2), np.int32(9))
    b.allocate(2, 9)
    a.grow(np.int32(2), np.uint8(8))
    b.grow(2, 8)
    assert a.digest() == b.digest() and a.lengths[2] == 17


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 3}, "num_sequences=3: must be a multiple of the mesh's data size 2"),
        ({"rows": 0}, "num_sequences=0: must be at least 1"),
        ({"columns": 0}, "pages_per_sequence=0"),
        ({"pages": 15}, "num_pages=15: must be a multiple"),
        ({"columns": 2**28}, "must fit in int32"),
    ],
)
def test_a_geometry_that_does_not_divide_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_allocator(2, **options)


def test_axes_of_other_names_are_taken():
    mesh = AbstractMesh((2, 2, 3), ("replica", "fsdp", "tp"))
    axes = MeshAxes(data=("replica", "fsdp"), context=None, model="tp")
    a = PageAllocator(CacheSpec(3, 128, 16), mesh, 8, 4, axes=axes)
    assert (a.num_shards, a.rows_per_shard, a.pages_per_shard) == (4, 2, 4)
    assert a.shard_of(5) == 2


def test_growing_where_no_page_is_needed_costs_a_few_times_a_bare_loop_over_the_rows():
    a = PageAllocator(CacheSpec(8, 128, 4096), abstract_pod(4), 256, 64)
    for row in range(256):
        a.allocate(row, 1)

    def one_step(step):
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def bare():
        for row in rows:
            count[row] += 1

    rows, count = range(256), [0] * 256
    best = dict.fromkeys(("bare", "singly", "together"), math.inf)
    for _ in range(30):  # in turn, so that a busy moment of the machine meets all three
        best["bare"] = min(best["bare"], one_step(bare))
        best["singly"] = min(best["singly"], one_step(lambda: [a.grow(row) for row in rows]))
        best["together"] = min(best["together"], one_step(lambda: a.grow_all(rows)))
    assert a.lengths[0] == 61 and a.used_pages == 256
    assert max(best["singly"], best["together"]) < 60 * best["bare"], best  # it is 16 times


@pytest.mark.parametrize("value", [2.5, 1.0, "1", None, True])
def test_what_is_no_whole_number_is_refused_by_name(value):
    spec = CacheSpec(4, 128, 16)
    mesh = AbstractMesh((2, 1, 4), ("data", "context", "model"))
    allocator = PageAllocator(spec, mesh, 4, 4)
    before = allocator.digest()
    calls = {
        "row": [lambda: allocator.allocate(value, 1), lambda: allocator.grow(value), lambda: allocator.free(value)],
        "num_tokens": [lambda: allocator.allocate(1, value), lambda: allocator.place(value)],
        "num_sequences": [lambda: PageAllocator(spec, mesh, value, 4)],
        "pages_per_sequence": [lambda: PageAllocator(spec, mesh, 4, value)],
    }
    for argument, cases in calls.items():
        for call in cases:
            with pytest.raises(ValueError, match=rf"{argument}={value!r}: must be a whole number"):
                call()
    assert allocator.digest() == before
