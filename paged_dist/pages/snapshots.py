"""An allocator's sequences and cached prefixes elsewhere: in other pages, or from what was saved of them."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from jax.sharding import AbstractMesh

from paged_dist._errors import bad_value, require, whole_number
from paged_dist.pages.page_pool import DIGEST_BYTES, Entry

if TYPE_CHECKING:
    from paged_dist.cache import CacheSpec
    from paged_dist.pages.allocator import PageAllocator


def load_state(kind: type[PageAllocator], state: dict, spec: CacheSpec) -> PageAllocator:
    """The allocator that `PageAllocator.to_state` told of. Raises ValueError for a state that none can be in."""
    try:
        sizes = {name: state[name] for name in ("data", "context", "num_sequences", "pages_per_sequence")}
        for name, value in sizes.items():
            _holds(whole_number(name, value) >= 1, f"{name} {value!r}")
        mesh = AbstractMesh((sizes["data"], sizes["context"], 1), ("data", "context", "model"))
        made = kind(spec, mesh, sizes["num_sequences"], sizes["pages_per_sequence"])
        place_of = _load_rows(made, state["rows"])
        _load_prefixes(made, place_of, state["known"], state["cached"])
    except (KeyError, TypeError, IndexError, AttributeError) as e:
        raise bad_value("state", f"{type(e).__name__}: {e}", "is not what to_state() gives") from e
    return made


def _holds(condition: bool, what: str) -> None:
    require(bool(condition), "state", what, "is not what to_state() gives")


def _load_rows(to: PageAllocator, rows: list) -> dict[int, int]:
    """Gives `to` the sequences of a saved state. Returns where in its rows each page is."""
    _holds(len(rows) == to.num_sequences, f"{len(rows)} rows")
    C, each, place_of = to.num_context_shards, to._pages.per_shard, {}
    for row, held in enumerate(rows):
        if held is None:
            continue
        _holds(len(held) == 2, f"row {row}: {held}")
        length, pages = held
        length, pages = whole_number("state", length), [whole_number("state", page) for page in pages]
        _holds(0 <= length <= to.max_tokens and len(pages) == to.pages_for(length), f"row {row}: {held}")
        told = f"row {row} with the pages {pages}"
        base, first = row // to.rows_per_shard * C, pages[0] // each if pages else 0
        _holds([page // each for page in pages] == [base + (first - base + i) % C for i in range(len(pages))], told)
        _holds(len(set(pages)) == len(pages), f"{told}: one twice")
        for i, page in enumerate(pages):
            where = place_of.setdefault(page, i)
            _holds(where == i, f"{told}: page {page} is number {where} of another row")
            to._pages.holders[page] += 1
        to._lengths[row], to._row_pages[row] = length, pages
        to._table[row, : len(pages)] = pages
    return place_of


def _load_prefixes(to: PageAllocator, place_of: dict[int, int], known: list, cached: list) -> None:
    """Gives `to`, whose sequences are there, what is known of the content of its pages."""
    C, each, total = to.num_context_shards, to._pages.per_shard, to.spec.num_pages
    cached = [whole_number("state", page) for page in cached]
    is_cached = set(cached)
    _holds(all(len(told) in (5, 6) for told in known), "a known page that is told in another form")
    entries = {whole_number("state", page): _read_entry(*told) for page, *told in known}
    _holds(len(entries) == len(known), "a page that is known twice")
    _holds(len(is_cached) == len(cached), "a page that is cached twice")
    _holds(is_cached <= entries.keys(), f"cached pages that are not known, {sorted(is_cached - entries.keys())[:4]}")
    of_digest: dict[bytes, tuple] = {}
    twins = collections.Counter((page // each // C, e.first, e.digest) for page, e in entries.items())
    for page, entry in entries.items():
        told, (first, index, digest, *rest) = f"page {page}, known as {entry}", entry
        _holds(0 <= page < total and 0 <= first < C and 0 <= index < to.pages_per_sequence, told)
        _holds(page // each % C == (first + index) % C and bool(entry.parent) == (index > 0), told)
        _holds(of_digest.setdefault(digest, (index, *rest)) == (index, *rest), f"{told}: two contents of one digest")
        if page in is_cached:
            alone = twins[page // each // C, first, digest] == 1
            _holds(page not in place_of and alone, f"{told}: cached, and held or held elsewhere")
        else:
            _holds(place_of.get(page) == index, f"{told}: number {place_of.get(page)} of its rows")
    to._pages.load(entries.items(), cached)


def _read_entry(first: int, index: int, digest: str, parent: str, namespace: str = "") -> Entry:
    """An entry as `to_state` writes it; states from before there were namespaces have none."""
    try:
        entry = Entry(
            whole_number("state", first),
            whole_number("state", index),
            *(bytes.fromhex(told) for told in (digest, parent, namespace)),
        )
    except ValueError as e:
        raise bad_value("state", (first, index, digest, parent, namespace), "is not what to_state() gives") from e
    _holds(len(entry.digest) == DIGEST_BYTES and len(entry.parent) in (0, DIGEST_BYTES), f"{entry}")
    return entry


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
        new._check_room(asked, [row])
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
    cached = old._pages.cached()  # in the order in which they were used, and after them those that rows use
    used = [page for page in reversed(gone_to) if not old._pages.is_cached(page)]  # a chain's end before its beginning
    for page in (*cached, *used):
        if page in gone_to:
            new._pages.touch(gone_to[page])


def _stays(old: PageAllocator, new: PageAllocator) -> bool:
    """Whether every page can stay on its shard."""
    return (old.num_shards, old.num_context_shards) == (new.num_shards, new.num_context_shards)
