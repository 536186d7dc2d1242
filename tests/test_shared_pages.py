"""Pages over a context axis, forks and cached prefixes: against a model that says which tokens every page holds."""

import collections
import dataclasses
import json
import random

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from paged_dist.allocator import OutOfPages, PageAllocator
from paged_dist.cache import CacheSpec
from paged_dist.launch.schedule import Pool, Schedule
from paged_dist.launch.workload import draw_requests

P = 8  # tokens a page
POISON = -1  # what no page that anybody holds may show


def allocator(data=1, context=1, rows=4, columns=4, pages=16, page_size=P):
    mesh = AbstractMesh((data, context, 1), ("data", "context", "model"))
    return PageAllocator(CacheSpec(1, 128, pages, page_size), mesh, rows, columns)


class Written:
    """A pool whose pages hold token ids, written as a model would, and every row's true tokens."""

    def __init__(self, pages: PageAllocator):
        self.pages = pages
        self.pool = np.full((pages.spec.num_pages, P), POISON)
        self.rows: dict[int, list[int]] = {}

    def step(self, written: dict[int, int]) -> None:
        """Copies what is due, then writes row r's tokens from `written[r]` on. Pages nobody may read are poisoned."""
        copies = self.pages.take_copies()
        assert len(copies) == self.pages.num_sequences
        copies = copies[copies[:, 0] >= 0]
        assert len(set(copies[:, 1].tolist())) == len(copies) and not set(copies[:, 0]) & set(copies[:, 1])
        self.pool[copies[:, 1]] = self.pool[copies[:, 0]]
        tables = self.pages.block_tables
        for row, start in written.items():
            for t in range(start, len(self.rows[row])):
                page = tables[row, t // P]
                holders = [r for r in self.rows if page in tables[r]]
                assert holders == [row], f"row {row} writes token {t} into page {page}, which rows {holders} hold"
                self.pool[page, t % P] = self.rows[row][t]
        dead = np.ones(len(self.pool), bool)
        dead[self.pages.live_pages] = False
        self.pool[dead] = POISON

    def check(self) -> None:
        a, tables = self.pages, self.pages.block_tables
        n = a.pages_per_shard // a.num_context_shards
        for row in range(a.num_sequences):
            tokens = self.rows.get(row)
            assert a.is_held(row) == (tokens is not None) and a.lengths[row] == len(tokens or ())
            count = a.pages_for(len(tokens or ()))
            used = tables[row, :count]
            assert (tables[row, count:] == -1).all() and (used >= 0).all()
            np.testing.assert_array_equal(self.pool[used].ravel()[: len(tokens or ())], tokens or [])
            owner = used // n
            assert (owner // a.num_context_shards == a.shard_of(row)).all()
            if count:
                turn = (owner[0] + np.arange(count)) % a.num_context_shards
                np.testing.assert_array_equal(owner % a.num_context_shards, turn)
        held = set(tables[tables >= 0].tolist())
        assert held <= set(a.live_pages.tolist()) and a.used_pages == len(held)
        assert a.free_pages() == a.spec.num_pages - len(held)


class Both:
    """Two allocators that get the same calls. `done` names those of the last try."""

    def __init__(self, *pages: PageAllocator):
        self.pages, self.done = pages, []

    def __call__(self, name: str, *args):
        results = [getattr(pages, name)(*args) for pages in self.pages]
        self.done.append(name)
        return results[0]


@pytest.mark.parametrize(
    ("data", "context"), [(1, 1), (1, 2), (2, 3), (1, 4), pytest.param(2, 8, marks=pytest.mark.slow), (2, 1)]
)
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 6))])
def test_random_calls_never_show_a_row_another_rows_tokens(data, context, seed):
    rng = random.Random(1000 * seed + 10 * data + context)
    each = 9 + 8 // context  # pages a shard
    make = lambda: allocator(data, context, rows=6 * data, columns=2 * context + 3, pages=data * context * each)
    a, twin = make(), make()
    w, seen = Written(a), collections.Counter()
    for _ in range(700):
        random_call(rng, Both(a, twin), w, seen)
    assert min(seen[what] for what in ("refused", "matched", "copied", "evicted")) > 5, seen
    for row in list(w.rows):
        a.free(row)
    assert a.used_pages == 0 and a.free_pages() == a.spec.num_pages


FAMILIES = [[random.Random(i).randrange(50) for _ in range(8 * P)] for i in range(3)]  # prompts share their beginnings


def random_call(rng: random.Random, both: Both, w: Written, seen: collections.Counter) -> None:
    """One call, the writes that follow from it, and everything that must hold then."""
    a, twin = both.pages
    call = rng.choices(["allocate", "grow", "truncate", "free", "fork", "cache"], [5, 8, 3, 3, 4, 3])[0]
    held = sorted(w.rows)
    row = rng.choice(held) if held and call != "allocate" else rng.randrange(a.num_sequences)
    before, written, known = a.digest(), {}, len(a._pages.entries())
    try:
        if call == "allocate":
            own = [rng.randrange(50) for _ in range(rng.randrange(5))]
            tokens = [*rng.choice(FAMILIES)[: rng.randrange(8 * P)], *own][: a.max_tokens]
            match = a.prefix_match(tokens)
            if rng.random() < 0.7 and match.pages:
                row = a.place(len(tokens), match)
                both("allocate", row, len(tokens), match)
                written[row] = match.num_tokens
                seen["matched"] += 1
            else:
                row = a.place(len(tokens))
                both("allocate", row, len(tokens))
                written[row] = 0
            w.rows[row] = tokens
        elif not held:
            return
        elif call == "grow":
            rows = rng.sample(held, rng.randint(1, len(held)))
            count = rng.choice([0, 1, 1, 1, 2, P + 1])
            both("grow_all", rows, count) if rng.random() < 0.7 else both("grow", rows[0], count)
            for r in rows if both.done == ["grow_all"] else rows[:1]:
                written[r] = len(w.rows[r])
                w.rows[r] = w.rows[r] + [rng.randrange(50) for _ in range(count)]
        elif call == "truncate":
            length = rng.randrange(len(w.rows[row]) + 1)
            both("truncate", row, length)
            w.rows[row] = w.rows[row][:length]
        elif call == "free":
            both("free", row)
            del w.rows[row]
        elif call == "fork":
            first = row // a.rows_per_shard * a.rows_per_shard
            near = [r for r in range(first, first + a.rows_per_shard) if r not in w.rows]
            new = rng.choice(near or [0, a.num_sequences - 1])
            both("fork", row, new)
            w.rows[new] = list(w.rows[row])
        elif call == "cache":
            assert both("cache_prefix", row, w.rows[row]) == len(w.rows[row]) // P * P
    except (OutOfPages, ValueError):
        seen["refused"] += 1
        assert a.digest() == before and not both.done, "a refused call changes nothing"
        return
    seen["copied"] += len(a._copies)
    seen["evicted"] += len(a._pages.entries()) < known
    w.step(written)
    twin.take_copies()
    w.check()
    assert a.digest() == twin.digest()


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 6))])
def test_sequences_keep_their_tokens_over_moves_and_as_saved_state(seed):
    """From pool to pool, of other sizes and over other shards, with calls between; state goes through JSON."""
    rng, seen = random.Random(seed), collections.Counter()
    a = allocator(1, 2, rows=6, columns=7, pages=60)
    w, moved = Written(a), 0
    shapes = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 4), (1, 3), (6, 2)]
    for i in range(400):
        twin = PageAllocator.from_state(json.loads(json.dumps(a.to_state())), a.spec)
        assert twin.digest() == a.digest()
        random_call(rng, Both(a, twin), w, seen)
        if i % 10:
            continue
        data, context = rng.choice(shapes)
        spec = dataclasses.replace(a.spec, num_pages=data * context * rng.randint(2, 40))
        mesh = AbstractMesh((data, context, 1), ("data", "context", "model"))
        before, known = a.digest(), a._pages.entries()
        try:
            new, moves = a.moved(spec, mesh)
        except OutOfPages:
            assert a.digest() == before
            continue
        assert a.digest() == before
        np.testing.assert_array_equal(moves[:, 1], new.live_pages)
        assert set(moves[:, 0]) <= set(a.live_pages.tolist())
        pool = np.full((spec.num_pages, P), POISON)
        pool[moves[:, 1]] = w.pool[moves[:, 0]]
        a, w.pages, w.pool, moved = new, new, pool, moved + 1
        w.check()
        if data == context == 1 and spec.num_pages > 2 * len(moves):
            assert {e.digest for _, e in known} == {e.digest for _, e in a._pages.entries()}, "they all fit"
        for row in w.rows:  # what can be found of a row's tokens holds them
            match = a.prefix_match(w.rows[row])
            np.testing.assert_array_equal(w.pool[list(match.pages)].ravel(), w.rows[row][: match.num_tokens])
    assert moved > 20 and min(seen[what] for what in ("matched", "copied")) > 3, (moved, seen)


def test_a_sequences_pages_go_round_the_context_shards():
    a = allocator(data=2, context=2, rows=4, columns=6, pages=24)  # 6 pages a shard
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
    a = allocator(context=2, rows=2, columns=10, pages=8)
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
    for _ in Schedule(requests, a, Pool(batch, data, context, each, 128), 1024, {}):
        use.append([[each - a.free_pages(d, c) for c in range(context)] for d in range(data)])
    use = np.array(use)
    fullest = use.max(axis=0)
    assert (fullest.max(axis=1) <= 1.1 * fullest.mean(axis=1)).all()
    at_peak = use[use.sum(axis=(1, 2)).argmax()]
    assert (at_peak.max(axis=1) <= 1.1 * at_peak.mean(axis=1)).all()


# Forks


def test_a_fork_takes_no_page_until_it_writes_into_a_page_that_is_not_full():
    a = allocator()
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
    a = allocator()
    a.allocate(0, 2 * P)
    a.fork(0, 1)
    a.grow_all([0, 1])
    assert (a.take_copies() == -1).all() and a.used_pages == 4


def test_what_a_copy_will_read_is_kept_until_it_is_taken():
    a = allocator(rows=3, pages=4)
    a.allocate(0, 2)
    a.fork(0, 1)
    a.grow(1)  # into page 1, a copy of page 0
    a.free(0)  # whose last holder goes before the copy is made
    a.allocate(0, P)
    assert a.block_tables[0, 0] == 2, "page 0 is still to be read"
    np.testing.assert_array_equal(a.take_copies()[0], [0, 1])
    a.allocate(2, P)
    assert a.block_tables[2, 0] == 0


def test_a_copy_of_a_copy_that_is_due_reads_the_first_page_and_none_is_made_for_who_is_gone():
    a = allocator(rows=4, pages=8)
    a.allocate(0, 2)
    a.fork(0, 1)
    a.grow(1)
    a.fork(1, 2)
    a.grow(2)
    np.testing.assert_array_equal(a.block_tables[:3, 0], [0, 1, 2])
    a.free(1)
    np.testing.assert_array_equal(a.take_copies()[:2], [[0, 2], [-1, -1]])


def test_copies_stay_on_their_shard():
    a = allocator(data=2, context=2, rows=4, columns=4, pages=16)
    a.allocate(2, P + 2)
    a.fork(2, 3)
    a.grow(3)
    ((source, to), *_) = a.take_copies().tolist()
    assert source // 4 == to // 4 == 3


# Cached prefixes


def test_a_prompt_begins_with_the_full_pages_of_another():
    a = allocator(rows=2, pages=8)
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
    a = allocator(rows=2, columns=8, pages=8)
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
    a = allocator()
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
    a = allocator(context=2, rows=4, columns=4, pages=16)
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
    a = allocator(data=2, rows=4, pages=16)
    a.allocate(2, P)
    a.cache_prefix(2, range(P))
    match = a.prefix_match(range(P + 1))
    assert match.data_shard == 1 and a.prefix_match(range(P + 1), data_shard=0).num_tokens == 0
    assert a.place(9) == 0 and a.place(9, match) == 3
    with pytest.raises(ValueError, match="is on data shard 1, the row on 0; place"):
        a.allocate(0, 9, match)
    with pytest.raises(ValueError, match="must not be longer than the 7 tokens"):
        a.allocate(3, 7, match)
    a.allocate(3, 9, match)
    with pytest.raises(OutOfPages, match="no free row: all of data shard 1 are held"):
        a.place(9, match)


def test_a_match_that_is_out_of_date_is_refused():
    a = allocator(rows=2, columns=4, pages=4)
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
    a = allocator(rows=2, columns=4, pages=4)
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
    ],
)
def test_a_bad_call_names_the_argument_and_changes_nothing(call, message):
    a = allocator(data=2)
    a.allocate(0, P + 1)
    a.cache_prefix(0, range(P))
    digest = a.digest()
    with pytest.raises(ValueError, match=message):
        call(a)
    assert a.digest() == digest
