"""The same sequences and cached prefixes in other pages: of a pool of another size, or of another mesh's shards.

Bookkeeping alone. What moves on the devices follows from the result, (page here, page there) of each page: see
`PageAllocator.moved` and the package `transfer`.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from paged_dist.pages.ledger import PageLedger
from paged_dist.pages.out_of_pages import check_room
from paged_dist.pages.page_content import PageContent
from paged_dist.pages.page_placement import next_shards


def relocate(old: PageLedger, new: PageLedger) -> list[tuple[int, int]]:
    """Gives `new`, which is empty, the sequences of `old` and as many of its cached prefixes as fit.

    Returns:
      (page of old, page of new) of each page that `new` has, by the page of new.

    Raises:
      OutOfPages: the sequences do not fit.
    """
    came_from: dict[int, int] = {}  # page of new -> page of old
    _relocate_rows(old, new, came_from)
    _relocate_prefixes(old, new, came_from)
    return [(page, to) for to, page in sorted(came_from.items())]


def _relocate_rows(old: PageLedger, new: PageLedger, came_from: dict[int, int]) -> None:
    """Gives `new` the sequences, and notes where each page of it comes from."""
    geometry, pool = new.geometry, new.pool
    gone_to: dict[tuple[int, int], int] = {}  # (page of old, data shard of new) -> page of new
    for row, pages in enumerate(old.row_pages.pages):
        if not old.lengths.is_held[row]:
            continue
        data_shard = geometry.data_shard_of_row(row)
        first = _first_context_shard(old, new, row, pages, gone_to)
        shards = geometry.shards_in_turn(data_shard, first, 0, len(pages))
        shared: list[int | None] = []  # pages that a row before has brought to this shard, in the turn of this row
        for page, shard in zip(pages, shards, strict=True):
            to = gone_to.get((page, data_shard))
            shared.append(to if to is not None and geometry.shard_of_page(to) == shard else None)
        asked = collections.Counter(shard for to, shard in zip(shared, shards, strict=True) if to is None)
        check_room(new, asked, [row])
        there: list[int] = []
        for page, to, shard in zip(pages, shared, shards, strict=True):
            if to is None:
                to = pool.take(shard)
                gone_to[page, data_shard], came_from[to] = to, page
            else:
                pool.hold(to)
            content = old.pool.content(page)
            if content is not None:
                pool.remember(to, content._replace(first=first))
            there.append(to)
        new.row_pages.append(row, there)
        new.lengths.hold(row, old.lengths.tokens[row])


def _first_context_shard(
    old: PageLedger, new: PageLedger, row: int, pages: Sequence[int], gone_to: dict[tuple[int, int], int]
) -> int:
    """The context shard of `new` on which the pages of a row begin."""
    geometry = new.geometry
    if not pages:
        return 0
    there = gone_to.get((pages[0], geometry.data_shard_of_row(row)))
    if there is not None:  # where a row that shares the page has begun
        return geometry.context_shard_of_page(there)
    if _has_same_shards(old, new):  # so that each shard's pages stay on it
        return old.geometry.context_shard_of_page(pages[0])
    return next_shards(new, row, (), len(pages), collections.Counter())[0] % geometry.context


def _relocate_prefixes(old: PageLedger, new: PageLedger, came_from: dict[int, int]) -> None:
    """Gives `new` the cached prefixes that no sequence holds, as long as there are free pages; notes whence."""
    geometry, pool, gone_to = new.geometry, new.pool, {}
    for last in reversed(old.pool.cached()):
        chain = _chain_to(old, last)
        root = chain[-1][1]
        if root.index != 0:
            continue  # what leads to it went before: nobody can find it
        data_shard = old.geometry.data_shard_of_page(last) * geometry.data // old.geometry.data
        first = _first_of_prefix(old, new, data_shard, root)
        missing = [
            (page, content._replace(first=first))
            for page, content in reversed(chain)
            if pool.find(data_shard, first, content.digest) is None
        ]
        shards = [geometry.shard_in_turn(data_shard, first, content.index) for _, content in missing]
        needed = collections.Counter(shards)
        if all(count <= pool.num_free(shard) for shard, count in needed.items()):
            for (page, content), shard in zip(missing, shards, strict=True):
                gone_to[page] = pool.cache(shard, content)
                came_from[gone_to[page]] = page
    cached = old.pool.cached()  # in the order in which they were used, and after them those that rows use
    used = [page for page in reversed(gone_to) if not old.pool.is_cached(page)]  # a chain's end before its beginning
    for page in (*cached, *used):
        if page in gone_to:
            pool.touch(gone_to[page])


def _chain_to(ledger: PageLedger, last: int) -> list[tuple[int, PageContent]]:
    """A cached page and those that lead to it from its prompt's beginning, the last first, as far as they are known."""
    data_shard, chain = ledger.geometry.data_shard_of_page(last), []
    page: int | None = last
    while page is not None:
        content = ledger.pool.content(page)
        assert content is not None  # a page that is cached, or found
        chain.append((page, content))
        page = ledger.pool.find(data_shard, content.first, content.parent) if content.parent else None
    return chain


def _first_of_prefix(old: PageLedger, new: PageLedger, data_shard: int, root: PageContent) -> int:
    """The context shard of `new` for page 0 of a prefix: where its first page is already, else the emptiest."""
    context = range(new.geometry.context)
    found = [first for first in context if new.pool.find(data_shard, first, root.digest) is not None]
    if found:
        return found[0]
    if _has_same_shards(old, new):
        return root.first
    free = [new.pool.num_free(shard) for shard in new.geometry.shards_of(data_shard)]
    return max(context, key=free.__getitem__)


def _has_same_shards(old: PageLedger, new: PageLedger) -> bool:
    """Whether every page can stay on its shard."""
    sizes = [(ledger.geometry.data, ledger.geometry.context) for ledger in (old, new)]
    return sizes[0] == sizes[1]
