"""PageAllocator, cached prefixes and saved state against `page_model.Model`, over random sequences of calls.

Each call is refused exactly where the model says so, and then changes nothing; else the same pages change hands as in
the model. Seeds are fixed: a failure comes again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import random

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from jax.sharding import AbstractMesh
from page_model import PAGE_TOKENS, Model

from paged_dist.cache import CacheSpec
from paged_dist.pages import OutOfPages, PageAllocator

SHARED = [
    [random.Random(i).randrange(50) for _ in range(8 * PAGE_TOKENS)] for i in range(2)
]  # prompts share their beginnings
NAMESPACES = [b"", b"", b"", b"adapter"]
CALLS = dict(
    allocate=8, grow=10, truncate=4, free=5, fork=6, cache_prefix=10, forget=1, flush=3, save_and_load=3, move=1
)


@dataclasses.dataclass(frozen=True)
class Geometry:
    data: int = 1
    context: int = 1
    rows: int = 3  # of a data shard
    columns: int = 4
    pages: int = 6  # of a shard

    @property
    def spec(self) -> CacheSpec:
        return CacheSpec(1, 128, self.data * self.context * self.pages, PAGE_TOKENS)

    @property
    def mesh(self) -> AbstractMesh:
        return AbstractMesh((self.data, self.context, 1), ("data", "context", "model"))

    def allocator(self) -> PageAllocator:
        return PageAllocator(self.spec, self.mesh, self.data * self.rows, self.columns)

    def model(self) -> Model:
        return Model(self.data, self.context, self.data * self.rows, self.columns, self.spec.num_pages)


class Machine(RuleBasedStateMachine):
    """One allocator and its model. `seen` counts what happened in all runs, so that a test can want all of it.

    Hypothesis chooses the calls. Their arguments come from a generator that it seeds: drawn one by one they would be
    alike too often.
    """

    def __init__(self, geometry: Geometry, seen: collections.Counter):
        super().__init__()
        self.a, self.m, self.seen = geometry.allocator(), geometry.model(), seen
        self.matches: list = []  # the last three: (tokens, match, chains, what their pages were known by)
        self.next_token = 100
        self.snapshots: list = []  # (what was handed out, what it said)

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed):
        self.rng = random.Random(seed)

    # Helpers.

    def held(self) -> int:
        return self.rng.choice(sorted(self.m.tokens))

    def free_row(self, rows) -> int:
        """One of `rows` that is free, if need be after the end of one; once in a while any row."""
        if not rows or self.rng.random() < 0.1:
            return self.rng.randrange(self.m.rows)
        free = [row for row in rows if row not in self.m.tokens]
        return self.rng.choice(free) if free else self.free(self.rng.choice(rows))

    def fresh(self, count: int) -> list[int]:
        """Tokens that no other row has."""
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def row(self, row: int) -> list[int]:
        return [page for page in self.a.block_tables[row].tolist() if page >= 0]

    @contextlib.contextmanager
    def refused(self, error: type[Exception], match: str):
        """A call that must raise, and change nothing."""
        before = self.a.digest(), self.a.lengths, self.a.block_tables
        with pytest.raises(error, match=match):
            yield
        assert (self.a.digest(), self.a.lengths, self.a.block_tables) == before
        self.seen[f"refused: {match}"] += 1

    def flush(self) -> None:
        """What a step does: first the copies, then the writes."""
        taken = self.a.take_copies()
        made = self.m.step()
        self.seen["copied"] += bool(made)
        assert taken[taken[:, 0] >= 0].tolist() == [list(pair) for pair in made]
        assert len(taken) == self.m.rows and (taken[len(made) :] == -1).all()

    # Calls.

    @rule(call=st.sampled_from([call for call, often in CALLS.items() for _ in range(often)]))
    def call(self, call):
        """One rule and not eight, of which Hypothesis would leave out some in most runs."""
        getattr(self, call if self.m.tokens else "allocate")()

    def allocate(self):
        """A new sequence, in a row that `place` finds or in any, behind a match or without."""
        rng = self.rng
        row = None if rng.random() < 0.6 else self.free_row(range(self.m.rows))  # None: place() says
        how = rng.choice(["without", "without", "with", "with", "with", "with one of before"])
        tokens = rng.choice(SHARED)[: rng.randrange(4 * PAGE_TOKENS)] + self.fresh(rng.randrange(PAGE_TOKENS))
        if self.m.tokens and rng.random() < 0.3:  # the tokens of another row
            tokens = self.m.tokens[self.held()]
        tokens, ns = tokens[: self.a.max_tokens], rng.choice(NAMESPACES)
        match = chains = was = None
        if how != "without":
            match, chains = self.a.prefix_match(tokens, namespace=ns), self.m.chains(ns, tokens)
            was = [[self.m.known[page] for page in pages] for _, pages in chains]
            self.check_match(match, chains, tokens)
            self.matches = [*self.matches, (tokens, match, chains, was)][-3:]
            if how == "with one of before":
                tokens, match, chains, was = rng.choice(self.matches)
        chains = chains or []
        known = [[self.m.known.get(page) for page in pages] for _, pages in chains]
        stale = {shard for (shard, _), then, now in zip(chains, was or [], known, strict=True) if then != now}
        if row is None:
            if stale:
                with self.refused(ValueError, "out of date"):
                    self.a.place(len(tokens), match)
                return
            row = self.m.place(len(tokens), chains)
            if row is None:
                with self.refused(OutOfPages, "^no "):
                    self.a.place(len(tokens), match)
                return
            assert self.a.place(len(tokens), match) == row
            self.seen["placed elsewhere"] += bool(chains) and chains[0][0] != self.m.data_shard(row)
        if row in self.m.tokens:
            with self.refused(ValueError, "is held"):
                self.a.allocate(row, len(tokens), match)
        elif self.m.data_shard(row) in stale:
            with self.refused(ValueError, "out of date"):
                self.a.allocate(row, len(tokens), match)
        elif (begin := self.m.begin(self.m.data_shard(row), len(tokens), chains)) is None:
            with self.refused(OutOfPages, f"^row {row} on data shard {self.m.data_shard(row)}"):
                self.a.allocate(row, len(tokens), match)
        else:
            assert self.a.allocate(row, len(tokens), match) == len(begin) * PAGE_TOKENS
            self.m.allocate(row, tokens, begin, self.row(row))
            self.seen["matched"] += bool(begin)

    def check_match(self, match, chains, tokens):
        shard, pages = chains[0] if chains else (None, [])
        assert (match.data_shard, match.pages, match.num_tokens) == (shard, tuple(pages), len(pages) * PAGE_TOKENS)
        assert self.m.pool[pages].ravel().tolist() == tokens[: len(pages) * PAGE_TOKENS]

    def grow(self):
        rows = sorted(self.m.tokens)
        rows = self.rng.sample(rows, self.rng.randint(1, len(rows)))
        count = self.rng.choice([0, 1, 1, 1, 1, 3, PAGE_TOKENS, 2 * PAGE_TOKENS + 1])
        empty = [row for row in rows if not self.m.pages[row]]
        rows = [row for row in rows if self.m.pages[row]] + empty[:1]  # see Model.may_grow
        starts = {row: len(self.m.tokens[row]) for row in rows}
        full = [row for row in rows if starts[row] + count > self.a.max_tokens]
        one = len(rows) == 1
        call = (lambda: self.a.grow(rows[0], count)) if one else (lambda: self.a.grow_all(rows, count))
        if full:
            with self.refused(ValueError, f"in row {full[0]}"):
                call()
        elif not self.m.may_grow(rows, count):
            with self.refused(OutOfPages, "more pages needed"):
                call()
        else:
            got = call()
            expected = [starts[row] if row in starts and count else -1 for row in range(self.m.rows)]
            assert got == expected[rows[0]] if one else got.tolist() == expected
            self.m.grow(rows, [self.fresh(count) for _ in rows], [self.row(row) for row in rows])
            if count:
                assert self.a.positions(rows, count).tolist() == expected

    def truncate(self):
        row = self.held()
        length = len(self.m.tokens[row])
        keep = self.rng.randint(0, length + 1)
        if keep > length:
            with self.refused(ValueError, "must be between 0 and the"):
                self.a.truncate(row, keep)
            return
        self.a.truncate(row, keep)
        self.m.truncate(row, keep)

    def free(self, row=None):
        row = self.held() if row is None else row
        self.a.free(row)
        self.m.end(row)
        return row

    def fork(self):
        row = self.held()
        new = self.free_row([r for r in self.m.rows_of(self.m.data_shard(row)) if r != row])
        if self.m.data_shard(new) != self.m.data_shard(row):
            with self.refused(ValueError, "pages are shared within one only"):
                self.a.fork(row, new)
            return
        if new in self.m.tokens:
            with self.refused(ValueError, "is held"):
                self.a.fork(row, new)
            return
        if any(page in self.m.copies for page in self.m.pages[row]):
            with self.refused(ValueError, "copies are due first"):
                self.a.fork(row, new)
        if row in self.m.unwritten:
            self.flush()
        if not any(page in self.m.copies for page in self.m.pages[row]):  # one may be due that nothing is written after
            self.a.fork(row, new)
            self.m.fork(row, new)

    def cache_prefix(self):
        row = max(self.held(), self.held(), key=lambda row: len(self.m.pages[row]))
        tokens, pages = list(self.m.tokens[row]), self.m.pages[row]
        ns = self.m.known[pages[0]][0] if pages and pages[0] in self.m.known else self.rng.choice(NAMESPACES)
        known = [self.m.known.get(page) for page in pages[: len(tokens) // PAGE_TOKENS]]
        if self.rng.random() < 0.2 and known and known[0]:  # what it was not cached with
            if self.rng.random() < 0.5:
                ns = b"adapter" if ns == b"" else b""
            else:
                tokens[0] += 1
        if any(k and (k[0] != ns or k[2] != tuple(tokens[: len(k[2])])) for k in known):
            with self.refused(ValueError, "cached"):
                self.a.cache_prefix(row, tokens, ns)
            return
        if any(page in self.m.copies for page in pages[: len(tokens) // PAGE_TOKENS]):
            with self.refused(ValueError, "copies are due first"):
                self.a.cache_prefix(row, tokens, ns)
        self.flush()
        assert self.a.cache_prefix(row, tokens, ns) == len(tokens) // PAGE_TOKENS * PAGE_TOKENS
        self.m.cache_prefix(row, len(tokens), ns)

    def forget(self):
        ns = self.rng.choice([None, *NAMESPACES])
        gone = self.m.forget(ns)
        assert self.a.forget_prefixes(ns) == gone
        self.seen["forgotten"] += bool(gone)

    def save_and_load(self):
        if self.m.copies:
            with self.refused(ValueError, "must be made first"):
                self.a.to_state()
            return
        saved = json.loads(json.dumps(self.a.to_state()))
        again = PageAllocator.from_state(saved, self.a.spec)
        assert again.digest() == self.a.digest() and again.to_state() == saved
        self.a = again  # everything from here on is asked of the one that was loaded
        self.seen["loaded"] += 1

    def move(self):
        """To a pool of another size, over another mesh."""
        m, rng = self.m, self.rng
        data = rng.choice([d for d in (1, 2, 3) if m.rows % d == 0])
        new = Geometry(data, rng.choice([1, 2, 3]), m.rows // data, m.columns, rng.randint(2, 3 + 12 // data))
        if m.copies:
            with self.refused(ValueError, "must be made first"):
                self.a.moved(new.spec, new.mesh)
            return
        self.flush()
        try:
            there, moves = self.a.moved(new.spec, new.mesh)
        except OutOfPages as e:
            rows = [m.pages.get(row, []) for row in range(e.shard * new.rows, (e.shard + 1) * new.rows)]
            assert sum(-(-len(pages) // new.context) for pages in rows) > new.pages, "there was room for all"
            self.seen["refused: moved"] += 1
            return
        assert moves[:, 1].tolist() == there.live_pages.tolist()
        self.a, self.matches = there, []
        self.m = m.moved(
            new.data,
            new.context,
            new.spec.num_pages,
            {row: self.row(row) for row in m.tokens},
            moves.tolist(),
            there.to_state()["cached"],
        )
        self.seen["moved"] += 1
        self.seen["moved prefixes"] += bool(self.m.cached)

    # What must hold between calls.

    @invariant()
    def is_as_the_model(self):
        a, m = self.a, self.m
        m.check()
        lengths = [len(m.tokens.get(row, ())) for row in range(m.rows)]
        assert a.lengths.tolist() == lengths and [a.is_held(row) for row in range(m.rows)] == [
            row in m.tokens for row in range(m.rows)
        ]
        assert a.block_tables.tolist() == [
            m.pages.get(row, []) + [-1] * (m.columns - len(m.pages.get(row, []))) for row in range(m.rows)
        ]
        for shard in range(m.data * m.context):
            assert a.free_pages(*divmod(shard, m.context)) == m.available(shard)
        held = {page for pages in m.pages.values() for page in pages}
        assert a.live_pages.tolist() == sorted(held | set(m.cached))
        assert not set(m.cached) & held and len(set(m.cached)) == len(m.cached)
        assert all(len(set(pages)) == len(pages) for pages in m.pages.values())
        self.snapshots += [(array, array.copy()) for array in (a.lengths, a.block_tables)]

    def teardown(self):
        assert all((array == said).all() for array, said in self.snapshots), "one was written after it was handed out"
        self.seen["evicted"] += self.m.evicted
        self.seen["twins"] += self.m.twins
        for row in list(self.m.tokens):
            self.a.free(row)
        self.a.take_copies()
        assert self.a.used_pages == 0 and self.a.free_pages() == self.a.spec.num_pages
        self.a.forget_prefixes()
        assert self.a.live_pages.size == 0


GEOMETRIES = [
    Geometry(pages=8),
    Geometry(data=2, rows=2),
    Geometry(context=2, pages=5, columns=5),
    Geometry(data=2, context=2, rows=2, pages=4, columns=5),
]
SLOW = [*GEOMETRIES, Geometry(context=4, pages=3, columns=9), Geometry(data=4, rows=2), Geometry(rows=6, pages=12)]


HAPPENS = {"copied", "matched", "forgotten", "loaded", "evicted", "moved"}
HAPPENS |= {f"refused: {what}" for what in ("^no ", "is held", "cached", "copies are due first")}
HAPPENS_ALSO = {
    "twins",
    "refused: out of date",
    "refused: must be made first",
    "refused: more pages needed",
    "refused: moved",
    "moved prefixes",
}


def run_calls(geometry: Geometry, examples: int, steps: int) -> collections.Counter:
    """What happened. A failure is shown as it was found: Phase.shrink would shorten it, for minutes."""
    seen: collections.Counter = collections.Counter()
    fixed = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(
        lambda: Machine(geometry, seen),
        settings=settings(fixed, max_examples=examples, stateful_step_count=steps, phases=[Phase.generate]),
    )
    return seen


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_calls_do_what_the_model_does_and_are_refused_where_it_says(geometry):
    seen = run_calls(geometry, 35, 60)
    assert {what for what in HAPPENS if not seen[what]} == set(), seen


@pytest.mark.slow
@pytest.mark.parametrize("geometry", SLOW, ids=str)
def test_many_calls_do_what_the_model_does_and_are_refused_where_it_says(geometry):
    seen = run_calls(geometry, 100, 100)
    assert {what for what in HAPPENS | HAPPENS_ALSO if not seen[what]} == set(), seen
    assert geometry.data == 1 or seen["placed elsewhere"]
