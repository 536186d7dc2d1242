"""The pages of a pool: which are free, how many rows hold each, and which are cached for prompts that begin alike."""

from __future__ import annotations

import bisect
import collections
import heapq
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from paged_dist.pages.geometry import Geometry
from paged_dist.pages.page_content import PageContent


class Hash(Protocol):
    """A hash of hashlib's that is being fed."""

    def update(self, data: bytes, /) -> None: ...


class PagePool:
    """The state of every page of a pool; see `Geometry` for which shard owns which page.

    A page is in one of three states:
      free: nobody's, its content means nothing;
      held: by one or more rows, or pinned, for a copy that is still to be made reads it;
      cached: nobody's, but its content is kept: a prompt may begin with it.

    Cached pages count as available. They are given out when no free page is left, the least recently used first.

    Pages of the same content are twins: rows that were filled with the same tokens have them. A search finds the twin
    with the lowest id. A page that nobody holds any more stays cached only where it has no twin, so that no content is
    kept twice.
    """

    def __init__(self, geometry: Geometry):
        n, shards = geometry.pages_per_context_shard, geometry.data * geometry.context
        self._geometry = geometry
        self._holders = [0] * (shards * n)
        self._free = [list(range(r * n, (r + 1) * n)) for r in range(shards)]  # heaps, for sorted lists are heaps
        self._pins: collections.Counter[int] = collections.Counter()
        self._contents: dict[int, PageContent] = {}
        self._found: dict[tuple[int, int, bytes], list[int]] = {}  # (data shard, first, digest) -> twins, ascending
        self._cached = [collections.OrderedDict[int, int]() for _ in range(shards)]  # page -> when, oldest first
        self._clock = 0

    # Who has a page.

    def available(self, shard: int) -> int:
        """Pages that `take` could give: free ones and cached ones."""
        return len(self._free[shard]) + len(self._cached[shard])

    def num_free(self, shard: int) -> int:
        """Free pages of `shard`, cached ones not counted."""
        return len(self._free[shard])

    def num_holders(self, page: int) -> int:
        """How many rows hold `page`."""
        return self._holders[page]

    def is_cached(self, page: int) -> bool:
        """Whether `page` is nobody's and kept for its content."""
        return page in self._cached[self._shard_of(page)]

    def may_write(self, page: int) -> bool:
        """Whether a row that holds `page` has it to itself, and no search finds its content."""
        return self._holders[page] == 1 and page not in self._contents

    def take(self, shard: int) -> int:
        """The lowest free page of `shard`, else its least recently used cached one, held once; there must be one."""
        if self._free[shard]:
            page = heapq.heappop(self._free[shard])
        else:
            page, _ = self._cached[shard].popitem(last=False)
            self.forget(page)
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more row holds `page`, which is held or cached."""
        self._holders[page] += 1
        self._cached[self._shard_of(page)].pop(page, None)

    def release(self, page: int) -> None:
        """One row less holds `page`."""
        self._holders[page] -= 1
        self._retire(page)

    def pin(self, page: int) -> None:
        """Keeps the content of `page`, whichever row lets go of it, until `unpin`."""
        self._pins[page] += 1

    def unpin(self, page: int) -> None:
        """Ends one `pin`."""
        self._pins[page] -= 1
        self._retire(page)

    def _retire(self, page: int) -> None:
        """Makes `page` cached or free, where nobody holds or pins it any more."""
        if self._holders[page] or self._pins[page]:
            return
        del self._pins[page]
        if page in self._contents and len(self._twins(page)) == 1:
            self._clock += 1
            self._cached[self._shard_of(page)][page] = self._clock
        else:
            self.forget(page)
            heapq.heappush(self._free[self._shard_of(page)], page)

    # What a page holds.

    def content(self, page: int) -> PageContent | None:
        """What `page` is known to hold."""
        return self._contents.get(page)

    def contents(self) -> list[tuple[int, PageContent]]:
        """(page, what it holds) of all pages whose content is known, by page."""
        return sorted(self._contents.items())

    def cached(self) -> list[int]:
        """All cached pages, the least recently used first."""
        return sorted(
            (page for part in self._cached for page in part), key=lambda page: self._cached[self._shard_of(page)][page]
        )

    def find(self, data_shard: int, first: int, digest: bytes) -> int | None:
        """The page with that content on a data shard, for prompts that begin on context shard `first`."""
        twins = self._found.get((data_shard, first, digest))
        return twins[0] if twins else None

    def remember(self, page: int, content: PageContent) -> None:
        """Makes a held page findable by its content. A twin of it that was only cached becomes free."""
        if page in self._contents:
            return
        self._contents[page] = content
        twins = self._found.setdefault(self._key(page, content), [])
        unused = [twin for twin in twins if self.is_cached(twin)]  # one at most
        bisect.insort(twins, page)
        for twin in unused:
            self._drop(twin)

    def forget(self, page: int) -> None:
        """Nobody finds `page` from now on: its content goes, or a row writes into it. A twin is found instead."""
        if page not in self._contents:
            return
        twins, key = self._twins(page), self._key(page, self._contents.pop(page))
        twins.remove(page)
        if not twins:
            del self._found[key]

    def forget_all(self, namespace: bytes | None) -> int:
        """Forgets the pages of one namespace, or of all; cached ones become free. Returns how many pages it were."""
        gone = [page for page, content in self.contents() if namespace is None or content.namespace == namespace]
        for page in gone:
            self._drop(page) if self.is_cached(page) else self.forget(page)
        return len(gone)

    def cache(self, shard: int, content: PageContent) -> int:
        """The lowest free page of `shard`, as a cached one with that content; there must be a free one."""
        page = heapq.heappop(self._free[shard])
        self.remember(page, content)
        self._retire(page)
        return page

    def touch(self, page: int) -> None:
        """Makes a cached page the most recently used."""
        self._cached[self._shard_of(page)].pop(page)
        self._retire(page)

    def _shard_of(self, page: int) -> int:
        return self._geometry.shard_of_page(page)

    def _key(self, page: int, content: PageContent) -> tuple[int, int, bytes]:
        return self._geometry.data_shard_of_page(page), content.first, content.digest

    def _twins(self, page: int) -> list[int]:
        """The pages of the same content on its data shard, itself included, ascending."""
        return self._found[self._key(page, self._contents[page])]

    def _drop(self, page: int) -> None:
        """A cached page becomes free."""
        del self._cached[self._shard_of(page)][page]
        self.forget(page)
        heapq.heappush(self._free[self._shard_of(page)], page)

    # The whole state.

    def load(
        self, holders: Mapping[int, int], contents: Iterable[tuple[int, PageContent]], cached: Iterable[int]
    ) -> None:
        """Makes a pool of free pages one with these.

        Args:
          holders: how many rows hold a page, of those that are held.
          contents: (page, what it is known to hold).
          cached: the cached pages, the least recently used first.
        """
        for page, count in holders.items():
            self._holders[page] = count
        for page, content in contents:
            self.remember(page, content)
        cached = list(cached)
        taken = {*holders, *cached}
        self._free = [[page for page in free if page not in taken] for free in self._free]
        for page in cached:
            self._retire(page)

    def update_digest(self, h: Hash) -> None:
        """Feeds `h` with everything that later calls depend on."""
        for free in self._free:
            h.update(np.asarray([len(free), *sorted(free)], "<i8").tobytes())
        h.update(np.asarray(self.cached(), "<i8").tobytes())  # in one order over all shards, which `moved` follows
        for page, content in self.contents():
            h.update(repr((page, *content)).encode())
