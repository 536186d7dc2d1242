"""The pages of a pool, host side: which are free, who holds one, and which hold a prompt's beginning for the next."""

from __future__ import annotations

import bisect
import collections
import hashlib
import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

DIGEST_BYTES = 16


class Entry(NamedTuple):
    """What a cached page holds: page `index` of every prompt whose first tokens hash to `digest`.

    Attributes:
      first: the context shard of the prompt's page 0; page i is on context shard (first + i) mod C, so pages serve
        only prompts that begin on the same one.
      index: which page of the prompt.
      digest: of the namespace and all tokens up to this page's last; see `digests`.
      parent: the digest of the page before, b"" for page 0.
      namespace: what else decides the page's content: an adapter, an image, a version of the weights.
    """

    first: int
    index: int
    digest: bytes
    parent: bytes
    namespace: bytes = b""


def digests(token_ids: np.ndarray, page_size: int, namespace: bytes = b"") -> Iterator[bytes]:
    """The chained digest of each full page of a prompt: blake2b of the digest before and the page's tokens.

    Page 0 follows the digest of the namespace, or nothing where that is empty.
    """
    tokens, digest = np.ascontiguousarray(token_ids, "<i8"), b""
    if namespace:
        digest = hashlib.blake2b(namespace, digest_size=DIGEST_BYTES, person=b"namespace").digest()
    for start in range(0, len(tokens) // page_size * page_size, page_size):
        digest = hashlib.blake2b(
            digest + tokens[start : start + page_size].tobytes(), digest_size=DIGEST_BYTES
        ).digest()
        yield digest


class Pages:
    """The pages of every shard r = data shard * context + context shard, which owns ids [r * n, (r + 1) * n).

    A page is free, held by one or more rows, pinned (a copy that is due reads it) or cached: nobody's, but with
    content that a prompt may begin with. Cached pages count as available, and go when no free one is left, the least
    recently used first.

    Pages of one content are twins: rows that were filled with the same tokens. The lowest is found first. A page that
    is nobody's any more stays cached only where it has no twin, so that no content is kept twice.
    """

    def __init__(self, data: int, context: int, pages_per_shard: int):
        self.context, self.per_shard = context, pages_per_shard
        n, shards = pages_per_shard, data * context
        self.holders = [0] * (shards * n)
        self._free = [list(range(r * n, (r + 1) * n)) for r in range(shards)]  # heaps, for sorted lists are heaps
        self._pins: collections.Counter[int] = collections.Counter()
        self._entries: dict[int, Entry] = {}
        self._found: dict[tuple[int, int, bytes], list[int]] = {}  # (data shard, first, digest) -> twins, ascending
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
        if page in self._entries and len(self._twins(page)) == 1:
            self._clock += 1
            self._cached[self.shard_of(page)][page] = self._clock
        else:
            self.forget(page)
            heapq.heappush(self._free[self.shard_of(page)], page)

    # What a page holds.

    def entry(self, page: int) -> Entry | None:
        """What `page` is known to hold."""
        return self._entries.get(page)

    def find(self, data_shard: int, first: int, digest: bytes) -> int | None:
        """The page with that content on a data shard, for prompts that begin on context shard `first`."""
        twins = self._found.get((data_shard, first, digest))
        return twins[0] if twins else None

    def remember(self, page: int, entry: Entry) -> None:
        """Makes findable a page that is somebody's: a twin of it that was only cached goes free."""
        if page in self._entries:
            return
        self._entries[page] = entry
        twins = self._found.setdefault(self._key(page, entry), [])
        unused = [twin for twin in twins if self.is_cached(twin)]  # one at most
        bisect.insort(twins, page)
        for twin in unused:
            self._drop(twin)

    def forget(self, page: int) -> None:
        """Nobody finds `page` from now on: its content goes, or a row writes into it. A twin is found instead."""
        if page not in self._entries:
            return
        twins, key = self._twins(page), self._key(page, self._entries.pop(page))
        twins.remove(page)
        if not twins:
            del self._found[key]

    def forget_all(self, namespace: bytes | None) -> int:
        """Forgets the pages of one namespace, or of all; cached ones go free. Returns how many they were."""
        gone = [page for page, entry in self.entries() if namespace is None or entry.namespace == namespace]
        for page in gone:
            self._drop(page) if self.is_cached(page) else self.forget(page)
        return len(gone)

    def _twins(self, page: int) -> list[int]:
        return self._found[self._key(page, self._entries[page])]

    def _drop(self, page: int) -> None:
        """A cached page goes free."""
        del self._cached[self.shard_of(page)][page]
        self.forget(page)
        heapq.heappush(self._free[self.shard_of(page)], page)

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

    def load(self, known: Iterable[tuple[int, Entry]], cached: Iterable[int]) -> None:
        """What pages hold, and which of them are cached, the least recently used first; `holders` are set already."""
        for page, entry in known:
            self.remember(page, entry)
        cached = list(cached)
        taken = set(cached)
        self._free = [[page for page in free if not self.holders[page] and page not in taken] for free in self._free]
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
        for free in self._free:
            h.update(np.asarray([len(free), *sorted(free)], "<i8").tobytes())
        h.update(np.asarray(self.cached(), "<i8").tobytes())  # in one order over all shards, which `moved` follows
        for page, entry in self.entries():
            h.update(repr((page, *entry)).encode())
