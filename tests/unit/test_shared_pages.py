"""Pages over a context axis, forks and cached prefixes, each rule by itself; see test_allocator_properties.py too."""

import json

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from small_allocators import small_allocator

from paged_dist.cache import CacheSpec
from paged_dist.launch.serving.row_schedule import Pool, RowSchedule
from paged_dist.launch.serving.workload import draw_requests
from paged_dist.pages import OutOfPages, PageAllocator

P = 8  # tokens a page


def test_a_sequences_pages_go_round_the_context_shards():
    a = small_allocator(data=2, context=2, rows=4, columns=6, pages=24)  # 6 pages a shard
    a.allocate(0, 5 * P)
    a.allocate(3, 3 * P)
    np.testing.assert_array_equal(a.block_tables[0], [0, 6, 1, 7, 2, -1])
    np.testing.assert_array_equal(a.block_tables[3], [12, 18, 13, -1, -1, -1])
    a.allocate(1, 1)  # shard 0 has a page more in use
    assert a.block_tables[1, 0] == 8 and a.free_pages(0, 0) == 3 and a.free_pages(0, 1) == 3
    a.grow(1, P)
    assert a.block_tables[1, 1] == 3
    a.free(0)
    a.free(3)
    assert (a.used_pages, a.free_pages(0), a.free_pages(1)) == (2, 10, 12)


def test_out_of_pages_names_the_context_shard():
    a = small_allocator(context=2, rows=2, columns=10, pages=8)
    a.allocate(0, 7 * P)
    with pytest.raises(OutOfPages, match=r"row 0 on data shard 0, context shard 0: 1 more.*, 0 of its 4 are free") as e:
        a.grow(0, 3 * P)
    assert (e.value.asked, e.value.free, e.value.shard, e.value.context_shard) == (1, 0, 0, 0)
    with pytest.raises(OutOfPages, match="2 pages free in turn on its 2 context shards, the most is 1"):
        a.place(2 * P)
    assert a.place(P) == 1
    with pytest.raises(ValueError, match="context_shard=2: there are 2"):
        a.free_pages(0, 2)


@pytest.mark.parametrize(("data", "batch"), [(1, 32), (2, 64)])
def test_the_fullest_context_shard_stays_near_the_mean_on_a_workload(data, batch):
    """At its fullest over the run, and at the step that uses most; the drawn lengths are a production trace's."""
    context, requests = 8, draw_requests(400, 0)
    need = Pool(batch, data, context, 0, 128).pages_that_never_wait(requests)
    mesh = AbstractMesh((data, context, 1), ("data", "context", "model"))
    a = PageAllocator(CacheSpec(1, 128, need), mesh, batch, max(-(-r.tokens // 128) for r in requests))
    each = need // (data * context)
    use = []
    for _ in RowSchedule(requests, a, Pool(batch, data, context, each, 128), 1024, {}):
        use.append([[each - a.free_pages(d, c) for c in range(context)] for d in range(data)])
    use = np.array(use)
    fullest = use.max(axis=0)
    assert (fullest.max(axis=1) <= 1.1 * fullest.mean(axis=1)).all()
    at_peak = use[use.sum(axis=(1, 2)).argmax()]
    assert (at_peak.max(axis=1) <= 1.1 * at_peak.mean(axis=1)).all()


# Forks


def test_a_fork_takes_no_page_until_it_writes_into_a_page_that_is_not_full():
    a = small_allocator()
    a.allocate(0, 14)
    a.fork(0, 1)
    a.fork(0, 2)
    assert a.used_pages == 2 and a.lengths.tolist() == [14, 14, 14, 0]
    np.testing.assert_array_equal(a.block_tables[1], a.block_tables[0])
    a.grow_all([0, 1, 2])  # two of the three copy, the last writes in place
    np.testing.assert_array_equal(a.block_tables[:3, :2], [[0, 2], [0, 3], [0, 1]])
    np.testing.assert_array_equal(a.take_copies(), [[1, 2], [1, 3], [-1, -1], [-1, -1]])
    assert (a.take_copies() == -1).all() and a.used_pages == 4
    a.grow_all([0, 1, 2])
    assert (a.take_copies() == -1).all()
    a.free(0)
    a.free(2)
    assert a.used_pages == 2
    np.testing.assert_array_equal(a.block_tables[1, :2], [0, 3])


def test_full_pages_are_shared_for_good():
    a = small_allocator()
    a.allocate(0, 2 * P)
    a.fork(0, 1)
    a.grow_all([0, 1])
    assert (a.take_copies() == -1).all() and a.used_pages == 4


def test_what_a_copy_will_read_is_kept_until_it_is_taken():
    a = small_allocator(rows=3, pages=4)
    a.allocate(0, 2)
    a.fork(0, 1)
    a.grow(1)  # into page 1, a copy of page 0
    a.free(0)  # whose last holder goes before the copy is made
    a.allocate(0, P)
    assert a.block_tables[0, 0] == 2, "page 0 is still to be read"
    np.testing.assert_array_equal(a.take_copies()[0], [0, 1])
    a.allocate(2, P)
    assert a.block_tables[2, 0] == 0


def test_a_row_is_forked_when_its_copy_is_made_and_none_is_made_for_who_is_gone():
    """Before, what the row has grown by is not written: a fork that grew would begin with a page that lacks it."""
    a = small_allocator(rows=4, pages=8)
    a.allocate(0, 2)
    a.fork(0, 1)
    a.grow(1)
    digest = a.digest()
    with pytest.raises(ValueError, match=r"row=1: copies are due first: take_copies\(\), one into page 1 of the row"):
        a.fork(1, 2)
    assert a.digest() == digest
    assert a.take_copies()[:2].tolist() == [[0, 1], [-1, -1]]
    a.fork(1, 2)
    a.grow(2)
    np.testing.assert_array_equal(a.block_tables[:3, 0], [0, 1, 2])
    a.free(2)
    assert (a.take_copies() == -1).all()


def test_copies_stay_on_their_shard():
    a = small_allocator(data=2, context=2, rows=4, columns=4, pages=16)
    a.allocate(2, P + 2)
    a.fork(2, 3)
    a.grow(3)
    ((source, to), *_) = a.take_copies().tolist()
    assert source // 4 == to // 4 == 3


# Cached prefixes


def test_a_prompt_begins_with_the_full_pages_of_another():
    a = small_allocator(rows=2, pages=8)
    prompt = list(range(2 * P + 3))
    a.allocate(0, 2 * P + 3)
    assert a.prefix_match(prompt).num_tokens == 0
    assert a.cache_prefix(0, prompt) == 2 * P
    match = a.prefix_match([*prompt[: 2 * P], 99, 99])
    assert (match.data_shard, match.num_tokens, match.pages) == (0, 2 * P, (0, 1))
    assert a.prefix_match([*prompt[: 2 * P - 1], 99]).num_tokens == P, "whole pages alone"
    assert a.prefix_match([99, *prompt[1:]]).num_tokens == 0
    assert a.prefix_match([*prompt[P : 2 * P], *prompt[:P]]).num_tokens == 0, "a page's place counts"
    a.allocate(1, 2 * P + 2, match)
    np.testing.assert_array_equal(a.block_tables[1, :3], [0, 1, 3])
    assert a.used_pages == 4
    a.free(0)
    a.free(1)
    assert a.used_pages == 0 and a.free_pages() == 8
    np.testing.assert_array_equal(a.live_pages, [0, 1])
    assert a.prefix_match(prompt).pages == (0, 1), "found after their sequences ended"


def test_the_least_recently_used_goes_first_and_a_prompts_end_before_its_beginning():
    a = small_allocator(rows=2, columns=8, pages=8)
    one, two = [1] * 3 * P, [2] * 3 * P
    for prompt in (one, two):
        a.allocate(0, 3 * P)
        a.cache_prefix(0, prompt)
        a.free(0)
    assert a.free_pages() == 8 and len(a.live_pages) == 6
    a.allocate(0, 3 * P, a.prefix_match(one))  # now the more recent
    a.free(0)
    a.allocate(1, 4 * P)
    assert (a.prefix_match(two).num_tokens, a.prefix_match(one).num_tokens) == (P, 3 * P)
    a.grow(1, 2 * P)
    assert (a.prefix_match(two).num_tokens, a.prefix_match(one).num_tokens) == (0, 2 * P)
    a.grow(1, 2 * P)
    assert a.prefix_match(one).num_tokens == 0 and a.free_pages() == 0


def test_a_row_that_writes_into_a_page_takes_it_from_those_that_can_be_found():
    a = small_allocator()
    a.allocate(0, 2 * P)
    a.cache_prefix(0, range(2 * P))
    a.truncate(0, 2 * P - 2)
    assert a.prefix_match(range(2 * P)).num_tokens == 2 * P, "nothing is written yet"
    a.grow(0)
    assert a.prefix_match(range(2 * P)).num_tokens == P
    a.fork(0, 1)
    a.grow(1)
    assert len(a.take_copies()) == 4


def test_prompts_that_begin_on_other_context_shards_do_not_share_pages():
    """Page 1 of a prompt that begins on shard 1 is on shard 0: no page 1 of one that begins on shard 0."""
    a = small_allocator(context=2, rows=4, columns=4, pages=16)
    a.allocate(0, P)
    a.allocate(1, 2 * P)
    first = [int(a.block_tables[r, 0]) // 8 for r in (0, 1)]
    assert first == [0, 1]
    a.cache_prefix(0, [7] * P)
    a.cache_prefix(1, [7] * 2 * P)
    match = a.prefix_match([7] * 3 * P)
    assert match.pages == tuple(a.block_tables[1, :2]), "the longer, all on its own round"
    a.allocate(2, 3 * P, match)
    assert a.block_tables[2, 2] // 8 == 1


def test_a_match_says_on_which_data_shard_and_place_finds_a_row_there():
    a = small_allocator(data=2, rows=4, pages=16)
    a.allocate(2, P)
    a.cache_prefix(2, range(P))
    match = a.prefix_match(range(P + 1))
    assert match.data_shard == 1 and a.prefix_match(range(P + 1), data_shard=0).num_tokens == 0
    assert a.place(9) == 0 and a.place(9, match) == 3
    with pytest.raises(ValueError, match="must not be longer than the 7 tokens"):
        a.allocate(3, 7, match)
    assert a.allocate(3, 9, match) == P
    assert a.place(9, match) == 0, "no row of shard 1 is free"
    assert a.allocate(0, 9, match) == 0, "and none of its pages is on shard 0"
    assert a.block_tables[0, 0] == 0 and a.lengths[0] == 9


def test_a_prefix_that_every_shard_has_is_taken_where_a_row_is_free():
    a = small_allocator(data=2, rows=4, pages=16)
    tokens = list(range(2 * P))
    for row in (0, 2):
        a.allocate(row, 2 * P)
        a.cache_prefix(row, tokens)
    a.allocate(1, 1)
    match = a.prefix_match(tokens)
    assert (match.data_shard, match.num_tokens) == (0, 2 * P)
    assert a.place(3 * P, match) == 3
    assert a.allocate(3, 3 * P, match) == 2 * P
    np.testing.assert_array_equal(a.block_tables[3, :2], a.block_tables[2, :2])


def test_seven_requests_for_one_cached_prompt_find_a_place_on_four_shards():
    a = small_allocator(data=4, rows=12, pages=32)
    tokens, cached = list(range(2 * P + 1)), []
    a.allocate(0, len(tokens))
    a.cache_prefix(0, tokens)
    a.free(0)
    for _ in range(7):
        match = a.prefix_match(tokens[:-1])
        row = a.place(len(tokens), match)
        cached.append((row, a.allocate(row, len(tokens), match)))
    assert cached == [(0, 16), (1, 16), (2, 16), (3, 0), (6, 0), (9, 0), (4, 0)]
    assert a.lengths.tolist() == [17] * 5 + [0, 17, 0, 0, 17, 0, 0]
    for _ in range(5):
        a.allocate(a.place(1), 1)
    with pytest.raises(OutOfPages, match="no free row: all 12 are held"):
        a.place(len(tokens), a.prefix_match(tokens[:-1]))


def test_a_prompt_is_placed_without_its_prefix_where_only_that_leaves_room():
    """Of context shard 0 only the cached page is left: three pages fit from shard 1 on, and take it."""
    a = small_allocator(context=2, rows=4, columns=5, pages=8)
    a.allocate(0, P)
    a.cache_prefix(0, range(P))
    a.free(0)
    a.allocate(1, 5 * P)
    assert (a.free_pages(0, 0), a.free_pages(0, 1)) == (1, 2)
    match = a.prefix_match(range(P))
    assert match.num_tokens == P and a.place(3 * P, match) == 0
    assert a.allocate(0, 3 * P, match) == 0
    assert (a.block_tables[0, :3] // 4).tolist() == [1, 0, 1]
    assert a.prefix_match(range(P)).num_tokens == 0


def twins():
    """Rows 0 and 1 hold the same 16 tokens, each in pages of its own, in a pool of 4 pages."""
    a = small_allocator(rows=3, pages=4)
    for row in (0, 1):
        a.allocate(row, 2 * P)
        assert a.cache_prefix(row, range(2 * P)) == 2 * P
    return a


def write_into(a, row):
    a.truncate(row, P + 1)
    a.grow(row)


@pytest.mark.parametrize(
    ("goes", "found"),
    [
        (lambda a: (a.free(0), a.allocate(2, 2 * P)), (2, 3)),  # freed, and its pages taken by others
        (lambda a: (a.free(1), a.allocate(2, 2 * P)), (0, 1)),
        (lambda a: write_into(a, 0), (0, 3)),
        (lambda a: write_into(a, 1), (0, 1)),
        (lambda a: (a.truncate(0, 0), a.allocate(2, P)), (2, 3)),
    ],
)
def test_a_twin_page_that_a_row_still_holds_is_found_instead(goes, found):
    a = twins()
    assert a.prefix_match(range(2 * P)).pages == (0, 1)
    goes(a)
    assert a.prefix_match(range(2 * P)).pages == found
    restored = PageAllocator.from_state(a.to_state(), a.spec)
    assert restored.digest() == a.digest() and restored.prefix_match(range(2 * P)).pages == found


def test_of_twins_that_nobody_holds_one_stays():
    a = twins()
    a.free(0)
    assert a.live_pages.tolist() == [2, 3], "pages 0 and 1 are free, and not kept beside their twins"
    a.free(1)
    assert a.live_pages.tolist() == [2, 3] and a.prefix_match(range(2 * P)).pages == (2, 3)
    a.allocate(0, 2 * P)  # filled again, though it could have been matched
    a.cache_prefix(0, range(2 * P))
    assert a.live_pages.tolist() == [0, 1] and a.prefix_match(range(2 * P)).pages == (0, 1)
    a.allocate(1, 2 * P)
    assert a.prefix_match(range(2 * P)).num_tokens == 2 * P, "there were free pages to take"


def test_a_prefix_is_not_cached_before_its_copy_is_made():
    a = small_allocator(rows=3, columns=2, pages=6)
    a.allocate(0, 5)
    a.fork(0, 1)
    a.grow(1, 3)
    digest = a.digest()
    with pytest.raises(ValueError, match=r"row=1: copies are due first: take_copies\(\), one into page 1 of the row"):
        a.cache_prefix(1, range(P))
    assert a.digest() == digest and a.prefix_match(range(P)).num_tokens == 0
    assert a.cache_prefix(1, range(P - 1)) == 0, "no page of it is full"
    a.take_copies()
    assert a.cache_prefix(1, range(P)) == P


def test_a_namespace_keeps_the_same_tokens_apart():
    a = small_allocator(rows=4, columns=2, pages=8)
    tokens = list(range(2 * P))
    for row, namespace in enumerate([b"", b"adapter 1", b"adapter 2"]):
        assert a.prefix_match(tokens, namespace=namespace).num_tokens == 0
        a.allocate(row, 2 * P)
        a.cache_prefix(row, tokens, namespace=namespace)
        assert a.prefix_match(tokens, namespace=namespace).pages == (2 * row, 2 * row + 1)
    restored = PageAllocator.from_state(json.loads(json.dumps(a.to_state())), a.spec)
    moved, _ = a.moved(CacheSpec(1, 128, 16, P), AbstractMesh((1, 2, 1), ("data", "context", "model")))
    for b in (a, restored, moved):
        found = [b.prefix_match(tokens, namespace=n) for n in (b"", b"adapter 1", b"adapter 2", b"adapter 3")]
        assert [match.num_tokens for match in found] == [16, 16, 16, 0]
        assert len({match.pages for match in found}) == 4
    with pytest.raises(ValueError, match=r"namespace=b'': page 2 of row 1 was cached under b'adapter 1'"):
        a.cache_prefix(1, tokens)


def test_prefixes_are_forgotten_by_namespace_or_all_and_rows_stay():
    a = small_allocator(rows=4, columns=2, pages=8)
    tokens = list(range(2 * P))
    for row, namespace in enumerate([b"", b"old", b"old"]):
        a.allocate(row, 2 * P)
        a.cache_prefix(row, tokens, namespace)
    a.free(2)
    a.allocate(3, P)
    a.cache_prefix(3, range(50, 50 + P), b"old")
    a.free(3)
    match = a.prefix_match(tokens, namespace=b"old")
    assert a.live_pages.tolist() == [0, 1, 2, 3, 4]
    assert a.forget_prefixes(b"old") == 3
    assert a.live_pages.tolist() == [0, 1, 2, 3] and a.lengths.tolist() == [16, 16, 0, 0]
    assert a.prefix_match(tokens, namespace=b"old").num_tokens == 0 and a.prefix_match(tokens).num_tokens == 16
    with pytest.raises(ValueError, match="is out of date"):
        a.allocate(2, 2 * P, match)
    assert a.cache_prefix(1, tokens, b"new") == 16, "the row holds what belongs to it by now"
    assert a.prefix_match(tokens, namespace=b"new").pages == (2, 3)
    assert a.forget_prefixes(b"old") == 0 and a.forget_prefixes() == 4
    assert a.prefix_match(tokens).num_tokens == 0 and a.used_pages == 4
    a.free(0)
    a.free(1)
    assert a.live_pages.size == 0 and a.digest() == small_allocator(rows=4, columns=2, pages=8).digest()


def test_a_prefix_that_a_move_doubles_goes_end_first_too():
    """Row 2, which holds its beginning, is on data shard 1 there; what nobody holds of it, with all before, on 0."""
    a = small_allocator(rows=4, pages=8)
    a.allocate(2, P)
    a.cache_prefix(2, [7] * P)
    a.allocate(3, 2 * P, a.prefix_match([7] * P))
    a.cache_prefix(3, [7] * 2 * P)
    a.free(3)
    new, moves = a.moved(a.spec, AbstractMesh((2, 1, 1), ("data", "context", "model")))
    assert moves.tolist() == [[0, 0], [1, 1], [0, 4]]
    new.allocate(0, 3 * P)
    assert new.block_tables[0].tolist() == [2, 3, 1, -1]
    assert new.prefix_match([7] * 2 * P, data_shard=0).num_tokens == P


def test_the_order_in_which_cached_pages_go_is_part_of_the_digest_over_all_shards():
    """`moved` brings the most recent along, whichever shard it is on."""
    made = []
    for rows in ((0, 1), (1, 0)):
        a = small_allocator(data=2, rows=2, pages=4)
        for row in rows:
            a.allocate(row, P)
            a.cache_prefix(row, [row] * P)
            a.free(row)
        new, _ = a.moved(CacheSpec(1, 128, 1, P), AbstractMesh((1, 1, 1), ("data", "context", "model")))
        made.append((a, new))
    (a, there), (b, elsewhere) = made
    assert there.digest() != elsewhere.digest() and a.digest() != b.digest()


def test_a_match_that_is_out_of_date_is_refused():
    a = small_allocator(rows=2, columns=4, pages=4)
    a.allocate(0, 2 * P)
    a.cache_prefix(0, range(2 * P))
    match = a.prefix_match(range(2 * P))
    a.free(0)
    a.allocate(0, 4 * P)
    a.free(0)
    digest = a.digest()
    with pytest.raises(ValueError, match=r"is out of date.*prefix_match"):
        a.allocate(1, 2 * P, match)
    assert a.digest() == digest


def test_a_matched_page_that_nobody_holds_counts_as_taken():
    a = small_allocator(rows=2, columns=4, pages=4)
    a.allocate(0, 2 * P)
    a.cache_prefix(0, range(2 * P))
    a.free(0)
    a.allocate(0, 2 * P)
    assert a.free_pages() == 2
    match = a.prefix_match(range(2 * P))
    assert match.num_tokens == 2 * P
    with pytest.raises(OutOfPages, match=r"row 1 on data shard 0: 3 more pages needed, 2 of its 4"):
        a.allocate(1, 3 * P, match)
    a.allocate(1, 2 * P, match)
    assert a.free_pages() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.fork(1, 2), "row=1: is free"),
        (lambda a: a.fork(0, 0), "new_row=0: is held"),
        (lambda a: a.fork(0, 4), "row=4: must be between 0 and 3"),
        (lambda a: a.fork(0, 2), r"new_row=2: is on data shard 1, row 0 on 0.*rows 0 to 1 are on it"),
        (lambda a: a.cache_prefix(1, [1]), "row=1: is free"),
        (lambda a: a.cache_prefix(0, [1.5]), "token_ids=.*must be integers in one dimension"),
        (lambda a: a.cache_prefix(0, [[1]]), "token_ids=.*must be integers in one dimension"),
        (
            lambda a: a.cache_prefix(0, [0, 1, 2, 9, 4, 5, 6, 7]),
            r"\[..., 0, 1, 2, 9, ...\]': differ, from token 0 on",
        ),
        (lambda a: a.prefix_match("ab"), "token_ids="),
        (lambda a: a.prefix_match([1], 2), "data_shard=2: there are 2 data shards"),
        (lambda a: a.prefix_match([1], namespace="x"), r"namespace='x': must be bytes; 'x'.encode\(\)"),
        (lambda a: a.cache_prefix(0, [1], None), "namespace=None: must be bytes"),
        (lambda a: a.forget_prefixes("x"), "namespace='x': must be bytes"),
    ],
)
def test_a_bad_call_names_the_argument_and_changes_nothing(call, message):
    a = small_allocator(data=2)
    a.allocate(0, P + 1)
    a.cache_prefix(0, range(P))
    digest = a.digest()
    with pytest.raises(ValueError, match=message):
        call(a)
    assert a.digest() == digest
