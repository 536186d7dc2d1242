"""The pages of a pool, host side: which are free, who holds one, and which hold a prompt's beginning for the next."""

from __future__ import annotations

import collections
import hashlib
import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """What a cached page holds: page `index` of every prompt whose first tokens hash to `digest`.

    Attributes:
      first: the context shard of the prompt's page 0; page i is on context shard (first + i) mod C, so pages serve
        only prompts that begin on the same one.
      index: which page of the prompt.
      digest: of all tokens up to this page's last; see `digests`.
      parent: the digest of the page before, b"" for page 0.
    """

    first: int
    index: int
    digest: bytes
    parent: bytes


def digests(token_ids: np.ndarray, page_size: int) -> Iterator[bytes]:
    """The chained digest of each full page of a prompt: blake2b of the digest before and the page's tokens."""
    tokens, digest = np.ascontiguousarray(token_ids, "<i8"), b""
    for start in range(0, len(tokens) // page_size * page_size, page_size):
        digest = hashlib.blake2b(digest + tokens[start : start + page_size].tobytes(), digest_size=16).digest()
        yield digest


class Pages:
    """The pages of every shard r = data shard * context + context shard, which owns ids [r * n, (r + 1) * n).

    A page is free, held by one or more rows, pinned (a copy that is due reads it) or cached: nobody's, but with
    content that a prompt may begin with. Cached pages count as available, and go when no free one is left, the least
    recently used first.
    """

    def __init__(self, data: int, context: int, pages_per_shard: int):
        self.context, self.per_shard = context, pages_per_shard
        n, shards = pages_per_shard, data * context
        self.holders = [0] * (shards * n)
        self._free = [list(range(r * n, (r + 1) * n)) for r in range(shards)]  # heaps, for sorted lists are heaps
        self._pins: collections.Counter[int] = collections.Counter()
        self._entries: dict[int, Entry] = {}
        self._found: dict[tuple[int, int, bytes], int] = {}  # (data shard, first, digest) -> page
        self._cached = [collections.OrderedDict[int, int]() for _ in range(shards)]  # page -> when, oldest first
        self._clock = 0

    def shard_of(self, page: int) -> int:
        """The shard that owns `page`."""
        return page // self.per_shard

    def available(self, shard: int) -> int:
        """Pages that `take` could give: free ones and cached ones."""
        return len(self._free[shard]) + len(self._cached[shard])

    def is_cached(self, page: int) -> bool:
        """Whether `page` is nobody's and kept for its content."""
        return page in self._cached[self.shard_of(page)]

    def may_write(self, page: int) -> bool:
        """Whether a row that holds `page` has it to itself, and nobody will look for its content."""
        return self.holders[page] == 1 and page not in self._entries

    def take(self, shard: int) -> int:
        """The lowest free page of `shard`, else its least recently used cached one, held once; there must be one."""
        if self._free[shard]:
            page = heapq.heappop(self._free[shard])
        else:
            page, _ = self._cached[shard].popitem(last=False)
            self.forget(page)
        self.holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more row holds `page`, which is held or cached."""
        self.holders[page] += 1
        self._cached[self.shard_of(page)].pop(page, None)

    def release(self, page: int) -> None:
        """One row less holds `page`."""
        self.holders[page] -= 1
        self._retire(page)

    def pin(self, page: int) -> None:
        """Keeps what `page` holds, whoever lets go of it."""
        self._pins[page] += 1

    def unpin(self, page: int) -> None:
        """Ends one `pin`."""
        self._pins[page] -= 1
        self._retire(page)

    def _retire(self, page: int) -> None:
        if self.holders[page] or self._pins[page]:
            return
        del self._pins[page]
        if page in self._entries:
            self._clock += 1
            self._cached[self.shard_of(page)][page] = self._clock
        else:
            heapq.heappush(self._free[self.shard_of(page)], page)

    # What a page holds.

    def entry(self, page: int) -> Entry | None:
        """What `page` is known to hold."""
        return self._entries.get(page)

    def find(self, data_shard: int, first: int, digest: bytes) -> int | None:
        """The page with that content on a data shard, for prompts that begin on context shard `first`."""
        return self._found.get((data_shard, first, digest))

    def remember(self, page: int, entry: Entry) -> None:
        """Makes a page findable; nothing where another one has the same content."""
        if self._found.setdefault(self._key(page, entry), page) == page:
            self._entries[page] = entry

    def forget(self, page: int) -> None:
        """Nobody finds `page` from now on: its content goes, or a row writes into it."""
        entry = self._entries.pop(page, None)
        if entry is not None:
            del self._found[self._key(page, entry)]

    def cache(self, shard: int, entry: Entry) -> int:
        """The lowest free page of `shard` as a cached one with that content; there must be a free one."""
        page = heapq.heappop(self._free[shard])
        self.remember(page, entry)
        self._retire(page)
        return page

    def touch(self, page: int) -> None:
        """Makes a cached page the most recently used."""
        self._cached[self.shard_of(page)].pop(page)
        self._retire(page)

    def load(self, holders: dict[int, int], known: Iterable[tuple[int, Entry]], cached: Iterable[int]) -> None:
        """The state of other pages, of which none was taken yet: how many hold each, what they hold, who is cached."""
        for page, count in holders.items():
            self.holders[page] = count
        for page, entry in known:
            self.remember(page, entry)
        cached = list(cached)
        taken = holders.keys() | set(cached)
        self._free = [[page for page in free if page not in taken] for free in self._free]
        for page in cached:
            self._retire(page)

    def _key(self, page: int, entry: Entry) -> tuple[int, int, bytes]:
        return self.shard_of(page) // self.context, entry.first, entry.digest

    # Over all.

    def num_free(self, shard: int) -> int:
        """Free pages of `shard`, cached ones not counted."""
        return len(self._free[shard])

    def cached(self) -> list[int]:
        """All cached pages, the least recently used first."""
        return sorted((page for part in self._cached for page in part), key=lambda p: self._cached[self.shard_of(p)][p])

    def entries(self) -> list[tuple[int, Entry]]:
        """(page, what it holds) of all whose content is known, by page."""
        return sorted(self._entries.items())

    def update(self, h) -> None:
        """Feeds a hash with everything that later calls depend on."""
        for free, cached in zip(self._free, self._cached, strict=True):
            h.update(np.asarray([len(free), *sorted(free), len(cached), *cached], "<i8").tobytes())
        for page, entry in self.entries():
            h.update(repr((page, *entry)).encode())
