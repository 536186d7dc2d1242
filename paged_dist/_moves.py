"""An allocator's sequences and cached prefixes elsewhere: in other pages, or from what was saved of them."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from paged_dist._errors import require, whole_number
from paged_dist._pages import Entry

if TYPE_CHECKING:
    from paged_dist.allocator import PageAllocator


def load_state(to: PageAllocator, state: dict) -> None:
    """Gives `to`, of which no row is held, what `PageAllocator.to_state` told.

    Raises ValueError where it contradicts itself, KeyError and the like where it is none.
    """
    holds = lambda condition, what: require(bool(condition), "state", what, "is not what to_state() gives")
    holds(len(state["rows"]) == to.num_sequences, f"{len(state['rows'])} rows")
    holders: collections.Counter[int] = collections.Counter()
    C, each = to.num_context_shards, to._pages.per_shard
    for row, held in enumerate(state["rows"]):
        if held is None:
            continue
        length, pages = held
        holds(0 <= length <= to.max_tokens and len(pages) == to.pages_for(length), f"row {row}: {held}")
        base, first = row // to.rows_per_shard * C, pages[0] // each if pages else 0
        turn = [base + (first - base + i) % C for i in range(len(pages))]
        holds([page // each for page in pages] == turn, f"row {row} with the pages {pages}")
        to._lengths[row], to._row_pages[row] = whole_number("state", length), [whole_number("state", p) for p in pages]
        to._table[row, : len(pages)] = pages
        holders.update(pages)
    known = {
        whole_number("state", p): Entry(f, i, bytes.fromhex(d), bytes.fromhex(q)) for p, f, i, d, q in state["known"]
    }
    cached = state["cached"]
    is_cached = set(cached)
    for page, entry in known.items():
        on_its_turn = 0 <= page < to.spec.num_pages and page // each % C == (entry.first + entry.index) % C
        holds(on_its_turn and (page in holders) != (page in is_cached), f"page {page}, known as {entry}")
    holds(len(is_cached) == len(cached) and is_cached <= known.keys(), f"cached pages {cached}")
    to._pages.load(holders, known.items(), cached)
    holds(len(to._pages.entries()) == len(known), "two pages of one content")


def move_rows(old: PageAllocator, new: PageAllocator, came_from: dict[int, int]) -> None:
    """Gives `new`, of which no row is held, the sequences of `old`, and notes where each page of it comes from."""
    C, stays = new.num_context_shards, _stays(old, new)
    gone_to: dict[tuple[int, int], int] = {}  # (page here, data shard there) -> page there
    for row, pages in enumerate(old._row_pages):
        if pages is None:
            continue
        shard = row // new.rows_per_shard
        there = [gone_to.get((page, shard)) for page in pages]
        if not pages:
            first = 0
        elif there[0] is not None:
            first = new._pages.shard_of(there[0]) % C
        elif stays:  # so that each shard's pages stay on it
            first = old._pages.shard_of(pages[0]) % C
        else:
            first = new._next_shards(row, (), len(pages), collections.Counter())[0] % C
        shards = [shard * C + (first + i) % C for i in range(len(pages))]
        there = [
            p if p is not None and new._pages.shard_of(p) == r else None for p, r in zip(there, shards, strict=True)
        ]
        asked = collections.Counter(r for p, r in zip(there, shards, strict=True) if p is None)
        new._check_room(asked, f"row {row} on")
        for i, page in enumerate(pages):
            if there[i] is None:
                there[i] = new._pages.take(shards[i])
                gone_to[page, shard], came_from[there[i]] = there[i], page
            else:
                new._pages.hold(there[i])
            entry = old._pages.entry(page)
            if entry is not None:
                new._pages.remember(there[i], entry._replace(first=first))
        new._row_pages[row] = there
        new._table[row, : len(there)] = there
        new._set_length(row, old._lengths[row])


def move_prefixes(old: PageAllocator, new: PageAllocator, came_from: dict[int, int]) -> None:
    """Gives `new` the cached prefixes of `old` that no sequence holds, as long as there are free pages."""
    C, stays, gone_to = new.num_context_shards, _stays(old, new), {}
    for last in reversed(old._pages.cached()):
        shard = old._pages.shard_of(last) // old.num_context_shards
        chain, page = [], last
        while page is not None:
            entry = old._pages.entry(page)
            chain.append((page, entry))
            page = old._pages.find(shard, entry.first, entry.parent) if entry.parent else None
        if chain[-1][1].index != 0:
            continue  # what leads to it went before: nobody can find it
        to, root = shard * new.num_shards // old.num_shards, chain[-1][1].digest
        free = [new._pages.num_free(to * C + c) for c in range(C)]
        found = [c for c in range(C) if new._pages.find(to, c, root) is not None]
        emptiest = chain[-1][1].first if stays else max(range(C), key=free.__getitem__)
        first = found[0] if found else emptiest
        missing = [
            (page, entry._replace(first=first))
            for page, entry in reversed(chain)
            if new._pages.find(to, first, entry.digest) is None
        ]
        place = lambda entry, to=to: to * C + (entry.first + entry.index) % C
        needed = collections.Counter(place(entry) for _, entry in missing)
        if all(count <= new._pages.num_free(r) for r, count in needed.items()):
            for page, entry in missing:
                gone_to[page] = new._pages.cache(place(entry), entry)
                came_from[gone_to[page]] = page
    for page in old._pages.cached():  # in the order in which they were used
        if page in gone_to:
            new._pages.touch(gone_to[page])


def _stays(old: PageAllocator, new: PageAllocator) -> bool:
    """Whether every page can stay on its shard."""
    return (old.num_shards, old.num_context_shards) == (new.num_shards, new.num_context_shards)
