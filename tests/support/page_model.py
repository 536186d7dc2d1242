"""What a `PageAllocator` may do, in the plainest terms: a model that knows the tokens of every page.

It says of each call whether it must be refused, and else exactly what comes of it; the one thing that it takes from
the allocator is on which context shard a new sequence begins, which it only holds to be one with room.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

PAGE_TOKENS = 8  # tokens a page
POISON = -1  # what lies in a page that nobody may read


class Model:
    """A pool of pages that hold token ids, and who holds, copies and finds them.

    Attributes:
      tokens: row -> the tokens that it must show. Rows that no sequence has are missing.
      pages: row -> its page ids.
      unwritten: row -> its first token that is not in the pool yet.
      pool: [N, P] token ids.
      known: page -> what it can be found by: (namespace, context shard of page 0, all tokens up to the page's end).
      cached: pages that are nobody's and kept for their content, the least recently used first.
      copies: due: page to write -> page to read.
    """

    def __init__(self, data: int, context: int, rows: int, columns: int, pages: int):
        self.data, self.context, self.rows, self.columns = data, context, rows, columns
        self.each = pages // (data * context)
        self.tokens: dict[int, list[int]] = {}
        self.pages: dict[int, list[int]] = {}
        self.unwritten: dict[int, int] = {}
        self.pool = np.full((pages, PAGE_TOKENS), POISON)
        self.known: dict[int, tuple[bytes, int, tuple[int, ...]]] = {}
        self.cached: list[int] = []
        self.copies: dict[int, int] = {}
        self.evicted = self.twins = 0  # how often that happened

    # What there is.

    def data_shard(self, row: int) -> int:
        return row // (self.rows // self.data)

    def rows_of(self, shard: int) -> range:
        each = self.rows // self.data
        return range(shard * each, (shard + 1) * each)

    def holders(self, page: int) -> list[int]:
        return [row for row, pages in self.pages.items() if page in pages]

    def is_used(self, page: int) -> bool:
        return bool(self.holders(page)) or page in self.copies.values()

    def free(self, shard: int) -> list[int]:
        """Free pages of shard data * C + context, cached ones not among them."""
        mine = range(shard * self.each, (shard + 1) * self.each)
        used = {page for pages in self.pages.values() for page in pages} | set(self.copies.values()) | set(self.cached)
        return [page for page in mine if page not in used]

    def available(self, shard: int) -> int:
        return len(self.free(shard)) + sum(page // self.each == shard for page in self.cached)

    def turn(self, first: int, count: int, start: int = 0) -> list[int]:
        """The shards of pages `start` to `count` of a sequence whose page 0 is on shard `first`."""
        base, C = first // self.context * self.context, self.context
        return [base + (first - base + i) % C for i in range(start, count)]

    def has(self, asked: Sequence[int]) -> bool:
        """Whether there is a page on each of these shards, counted."""
        return all(self.available(r) >= n for r, n in collections.Counter(asked).items())

    # What can be found.

    def key(self, namespace: bytes, page0: int, tokens: Sequence[int], index: int) -> tuple:
        return namespace, page0 // self.each % self.context, tuple(tokens[: (index + 1) * PAGE_TOKENS])

    def twins_of(self, page: int) -> list[int]:
        per = self.each * self.context
        return [p for p, key in self.known.items() if p != page and p // per == page // per and key == self.known[page]]

    def chains(self, namespace: bytes, tokens: Sequence[int]) -> list[tuple[int, list[int]]]:
        """(data shard, pages) of every run of pages that the tokens begin with, the longest first."""
        found = []
        for shard in range(self.data):
            for first in range(self.context):
                pages: list[int] = []
                for i in range(min(len(tokens) // PAGE_TOKENS, self.columns)):
                    key = namespace, first, tuple(tokens[: (i + 1) * PAGE_TOKENS])
                    same = [p for p, k in self.known.items() if k == key and p // self.each // self.context == shard]
                    if not same:
                        break
                    pages.append(min(same))
                if pages:
                    found.append((shard, pages))
        return sorted(found, key=lambda chain: -len(chain[1]))

    def begin(self, shard: int, num_tokens: int, chains: list[tuple[int, list[int]]]) -> list[int] | None:
        """The cached pages with which a new row of a data shard begins; None where it has no room."""
        count = -(-num_tokens // PAGE_TOKENS)
        for pages in [pages for d, pages in chains if d == shard]:
            asked = [page // self.each for page in pages if page in self.cached]
            if self.has(asked + self.turn(pages[0] // self.each, count, len(pages))):
                return pages
        C = self.context
        return [] if any(self.has(self.turn(shard * C + o, count)) for o in range(C)) else None

    def place(self, num_tokens: int, chains: list[tuple[int, list[int]]]) -> int | None:
        """The row that must be chosen; None: no shard has a row and the room."""
        choices = []
        for shard in range(self.data):
            row = next((r for r in self.rows_of(shard) if r not in self.tokens), None)
            shared = self.begin(shard, num_tokens, chains)
            if row is not None and shared is not None:
                free = sum(self.available(shard * self.context + c) for c in range(self.context))
                choices.append((-len(shared), -free, row))
        return min(choices)[2] if choices else None

    # What changes it.

    def allocate(self, row: int, tokens: list[int], shared: list[int], given: list[int]) -> None:
        """`given`: the pages that the row has now, of which the model takes the first one's shard."""
        count = -(-len(tokens) // PAGE_TOKENS)
        assert given[: len(shared)] == shared and len(given) == count
        self.cached = [page for page in self.cached if page not in shared]
        self.pages[row], self.tokens[row] = list(shared), list(tokens)
        for shard in self.turn(given[0] // self.each, count, len(shared)) if given else ():
            assert shard // self.context == self.data_shard(row)
            self.take(row, shard)
        if len(tokens) > len(shared) * PAGE_TOKENS:
            self.unwritten[row] = len(shared) * PAGE_TOKENS

    def may_grow(self, rows: Sequence[int], num_tokens: int) -> bool:
        """Whether the pages are there. A row without pages may be the last one only: it is free where to begin."""
        asked, holders = [], {p: len(self.holders(p)) for row in rows for p in self.pages[row]}
        for row in rows if num_tokens else ():
            pages, old = self.pages[row], len(self.tokens[row])
            count = -(-(old + num_tokens) // PAGE_TOKENS)
            if old % PAGE_TOKENS and holders[pages[-1]] > 1:
                holders[pages[-1]] -= 1
                asked.append(pages[-1] // self.each)
            if pages:
                asked += self.turn(pages[0] // self.each, count, len(pages))
            else:
                assert row == rows[-1]
                begins = range(self.data_shard(row) * self.context, (self.data_shard(row) + 1) * self.context)
                return any(self.has(asked + self.turn(first, count)) for first in begins)
        return self.has(asked)

    def grow(self, rows: Sequence[int], new: list[list[int]], given: list[list[int]]) -> None:
        """`given`: the pages that the rows have now, of which the model takes an empty row's first shard."""
        for row, tokens, now in zip(rows, new, given, strict=True):
            pages, old = self.pages[row], len(self.tokens[row])
            if not tokens:
                continue
            if old % PAGE_TOKENS:
                if len(self.holders(pages[-1])) > 1:
                    end = pages.pop()
                    self.copies[self.take(row, end // self.each)] = end
                else:
                    self.known.pop(pages[-1], None)
            first = (pages or now)[0] // self.each
            for shard in self.turn(first, -(-(old + len(tokens)) // PAGE_TOKENS), len(pages)):
                self.take(row, shard)
            self.tokens[row] += tokens
            self.unwritten[row] = min(old, self.unwritten.get(row, old))

    def truncate(self, row: int, num_tokens: int) -> None:
        while len(self.pages[row]) > -(-num_tokens // PAGE_TOKENS):
            self.let_go(self.pages[row].pop())
        del self.tokens[row][num_tokens:]
        if self.unwritten.get(row, -1) >= num_tokens:
            del self.unwritten[row]

    def end(self, row: int) -> None:
        self.truncate(row, 0)
        del self.pages[row], self.tokens[row]

    def fork(self, row: int, new_row: int) -> None:
        self.pages[new_row], self.tokens[new_row] = list(self.pages[row]), list(self.tokens[row])

    def cache_prefix(self, row: int, num_tokens: int, namespace: bytes) -> None:
        pages = self.pages[row]
        for i, page in enumerate(pages[: num_tokens // PAGE_TOKENS]):
            if page in self.known:
                continue
            self.known[page] = self.key(namespace, pages[0], self.tokens[row], i)
            for twin in self.twins_of(page):
                self.twins += 1
                if twin in self.cached:
                    self.drop(twin)

    def forget(self, namespace: bytes | None) -> int:
        gone = [page for page, key in self.known.items() if namespace in (None, key[0])]
        for page in gone:
            self.drop(page) if page in self.cached else self.known.pop(page)
        return len(gone)

    def step(self) -> list[tuple[int, int]]:
        """Makes the copies and writes what is unwritten. Returns the copies."""
        made = [(source, to) for to, source in sorted(self.copies.items())]
        for source, to in made:
            self.pool[to] = self.pool[source]
        for to in sorted(self.copies):
            source = self.copies.pop(to)
            if not self.is_used(source):
                self.retire(source)
        for row, start in self.unwritten.items():
            for t in range(start, len(self.tokens[row])):
                page = self.pages[row][t // PAGE_TOKENS]
                assert self.holders(page) == [row], f"row {row} writes token {t} into {page} of {self.holders(page)}"
                assert page not in self.known, f"row {row} writes into page {page}, which others may find"
                self.pool[page, t % PAGE_TOKENS] = self.tokens[row][t]
        self.unwritten.clear()
        return made

    def moved(
        self, data: int, context: int, pages: int, given: dict[int, list[int]], moves: list, cached: list[int]
    ) -> Model:
        """The same sequences elsewhere.

        Args:
          given: the rows' pages there.
          moves: (page here, page there), as they came.
          cached: nobody's pages there, in their order.
        """
        new = Model(data, context, self.rows, self.columns, pages)
        new.evicted, new.twins = self.evicted, self.twins
        new.tokens, new.pages = {row: list(tokens) for row, tokens in self.tokens.items()}, given
        came_from = {to: page for page, to in moves}
        for to, page in came_from.items():
            new.pool[to] = self.pool[page]
            if page in self.known:
                namespace, _, tokens = self.known[page]
                first = (to // new.each - len(tokens) // PAGE_TOKENS + 1) % context
                new.known[to] = namespace, first, tokens
        new.cached = cached
        assert sorted(cached) == [to for to in came_from if not new.holders(to)]
        assert not any(new.twins_of(to) for to in cached)
        was = [self.cached.index(came_from[to]) for to in cached if came_from[to] in self.cached]
        assert was == sorted(was) and all(came_from[to] in self.cached for to in cached[: len(was)])
        length = {to: len(new.known[to][2]) for to in cached}
        for i, to in enumerate(cached[len(was) :]):  # rows here hold it; a prompt's end goes before its beginning
            later = cached[len(was) + i :]
            assert not any(length[to] < length[p] and new.known[p][2][: length[to]] == new.known[to][2] for p in later)
        for row, there in given.items():
            assert [p // new.each for p in there] == new.turn(there[0] // new.each if there else 0, len(there))
            assert all(page // new.each // context == new.data_shard(row) for page in there)
            here = self.pages[row]
            assert [self.pool[p].tolist() for p in here] == [new.pool[p].tolist() for p in there]
        return new

    # Single pages.

    def take(self, row: int, shard: int) -> int:
        """The lowest free page of a shard, else the cached one that was used the longest ago."""
        free = self.free(shard)
        page = free[0] if free else next(page for page in self.cached if page // self.each == shard)
        if not free:
            self.evicted += 1
            self.drop(page)
        self.pages[row].append(page)
        return page

    def let_go(self, page: int) -> None:
        """A row let go of it."""
        if not self.is_used(page):
            self.retire(page)
        if not self.holders(page) and page in self.copies:
            source = self.copies.pop(page)
            if not self.is_used(source):
                self.retire(source)

    def retire(self, page: int) -> None:
        """Nobody uses it any more."""
        if page in self.known and not self.twins_of(page):
            self.cached.append(page)
        else:
            self.known.pop(page, None)
            self.pool[page] = POISON

    def drop(self, page: int) -> None:
        """It is not cached any more."""
        self.cached.remove(page)
        del self.known[page]
        self.pool[page] = POISON

    # What must hold.

    def check(self) -> None:
        """Every row shows its own tokens, and every page that can be found what it is found by."""
        for row, tokens in self.tokens.items():
            written = tokens[: self.unwritten.get(row, len(tokens))]
            shown = [token for page in self.pages[row] for token in self.shown(page)]
            assert shown[: len(written)] == written, f"row {row}"
        for page, (_, first, tokens) in self.known.items():
            assert self.pool[page].tolist() == list(tokens[-PAGE_TOKENS:]), f"page {page}"
            assert page // self.each % self.context == (first + len(tokens) // PAGE_TOKENS - 1) % self.context

    def shown(self, page: int) -> list[int]:
        return self.pool[self.copies.get(page, page)].tolist()
