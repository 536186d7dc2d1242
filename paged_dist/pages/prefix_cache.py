"""Cached prefixes: what `PageAllocator.prefix_match` finds of a prompt, on every data shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from paged_dist._errors import require
from paged_dist.pages.page_pool import Entry, Pages, digests


class Chain(NamedTuple):
    """Pages of one data shard that hold a prompt's first tokens, in the prompt's order, and what each is known to hold.

    All of a chain begin on one context shard: a data shard may have a chain for each of its context shards.
    """

    data_shard: int
    pages: tuple[int, ...]
    entries: tuple[Entry, ...]

    def is_current(self, pages: Pages) -> bool:
        """Whether the pages still hold what they held."""
        return all(pages.entry(p) == e for p, e in zip(self.pages, self.entries, strict=True))


@dataclasses.dataclass(frozen=True)
class PrefixMatch:
    """Cached pages that hold the first tokens of a prompt, see `PageAllocator.prefix_match`.

    The fields tell of the longest run of pages. A row on another data shard begins with what that shard has, or with
    nothing: `PageAllocator.allocate` returns with how many tokens.

    Attributes:
      data_shard: where the longest run is. None where nothing was found.
      num_tokens: tokens that it holds, a multiple of page_size.
      pages: its global ids, in the prompt's order.
    """

    data_shard: int | None
    num_tokens: int
    pages: tuple[int, ...]
    _chains: tuple[Chain, ...] = dataclasses.field(default=(), repr=False)  # the longest first

    def chains(self, data_shard: int | None = None) -> list[Chain]:
        """What there is for the rows of one data shard, or of any, the longest first."""
        return [chain for chain in self._chains if data_shard in (None, chain.data_shard)]


def find_prefix(
    pages: Pages, token_ids: np.ndarray, page_size: int, namespace: bytes, data_shards: Iterable[int]
) -> PrefixMatch:
    """The runs of cached pages that `token_ids` [n] begin with: the longest, then the lowest shards, first."""
    wanted, chains = list(digests(token_ids, page_size, namespace)), []
    for shard in data_shards:
        for first in range(pages.context):
            found: list[int] = []
            for digest in wanted:
                page = pages.find(shard, first, digest)
                if page is None:
                    break
                found.append(page)
            if found:
                chains.append(Chain(shard, tuple(found), tuple(map(pages.entry, found))))
    if not chains:
        return PrefixMatch(None, 0, ())
    chains.sort(key=lambda chain: -len(chain.pages))  # stable
    best = chains[0]
    return PrefixMatch(best.data_shard, len(best.pages) * page_size, best.pages, tuple(chains))


def as_token_ids(token_ids: np.ndarray | Sequence[int]) -> np.ndarray:
    """Token ids as int64 [n]. Raises ValueError for anything but integers in one dimension."""
    tokens = np.asarray(token_ids)
    if tokens.size == 0 and tokens.ndim == 1:
        return tokens.astype(np.int64)
    whole = tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer)
    require(whole, "token_ids", (tokens.shape, str(tokens.dtype)), "must be integers in one dimension")
    return tokens.astype(np.int64)


def as_namespace(namespace: bytes) -> bytes:
    """`namespace`. Raises ValueError for anything but bytes."""
    works = f"{namespace!r}.encode()" if isinstance(namespace, str) else None
    require(isinstance(namespace, bytes), "namespace", namespace, "must be bytes", works)
    return namespace
