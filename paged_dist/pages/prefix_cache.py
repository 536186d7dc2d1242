"""The prefix cache: full pages are published by the hash of their tokens, and found by prompts that begin alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from paged_dist._errors import require
from paged_dist.pages.ledger import PageLedger
from paged_dist.pages.page_content import PageContent, page_digests
from paged_dist.pages.page_pool import PagePool


class PrefixChain(NamedTuple):
    """Pages of one data shard that hold a prompt's first tokens, in the prompt's order, and what each is known to hold.

    The pages of a chain follow from one page 0, which is on one context shard. A data shard may have a chain for each
    of its context shards.
    """

    data_shard: int
    pages: tuple[int, ...]
    contents: tuple[PageContent | None, ...]

    def is_current(self, pool: PagePool) -> bool:
        """Whether the pages still hold what they held."""
        return all(pool.content(p) == content for p, content in zip(self.pages, self.contents, strict=True))


@dataclasses.dataclass(frozen=True)
class PrefixMatch:
    """Cached pages that hold the first tokens of a prompt; `PageAllocator.prefix_match` gives it.

    The fields tell of the longest chain of pages. A row on another data shard begins with what that shard has, or with
    nothing: `PageAllocator.allocate` returns with how many tokens.

    Attributes:
      data_shard: where the longest chain is. None where nothing was found.
      num_tokens: tokens that the chain holds, a multiple of page_size.
      pages: the chain's global page ids, in the prompt's order.

    Example:
      >>> spec = pd.CacheSpec(num_kv_heads=8, head_dim=128, num_pages=16)
      >>> pages = pd.PageAllocator(spec, pd.make_pod_mesh(model=8), num_sequences=2, pages_per_sequence=4)
      >>> _ = pages.allocate(0, 300), pages.cache_prefix(0, range(300))
      >>> pages.prefix_match(range(200))
      PrefixMatch(data_shard=0, num_tokens=128, pages=(0,))
      >>> pages.prefix_match([7, 7, 7])
      PrefixMatch(data_shard=None, num_tokens=0, pages=())
    """

    data_shard: int | None
    num_tokens: int
    pages: tuple[int, ...]
    _chains: tuple[PrefixChain, ...] = dataclasses.field(default=(), repr=False)  # the longest first

    def chains(self, data_shard: int | None = None) -> list[PrefixChain]:
        """What there is for the rows of one data shard, or of any, the longest first."""
        return [chain for chain in self._chains if data_shard in (None, chain.data_shard)]


def find_prefix(ledger: PageLedger, token_ids: np.ndarray, namespace: bytes, data_shards: Iterable[int]) -> PrefixMatch:
    """The chains of cached pages that `token_ids` [n] begin with: the longest, then the lowest shards, first."""
    geometry, pool = ledger.geometry, ledger.pool
    wanted, chains = list(page_digests(token_ids, geometry.page_size, namespace)), []
    for data_shard in data_shards:
        for first in range(geometry.context):
            pages: list[int] = []
            for digest in wanted:
                page = pool.find(data_shard, first, digest)
                if page is None:
                    break
                pages.append(page)
            if pages:
                chains.append(PrefixChain(data_shard, tuple(pages), tuple(map(pool.content, pages))))
    if not chains:
        return PrefixMatch(None, 0, ())
    chains.sort(key=lambda chain: -len(chain.pages))  # stable
    best = chains[0]
    return PrefixMatch(best.data_shard, len(best.pages) * geometry.page_size, best.pages, tuple(chains))


def check_prefix(
    ledger: PageLedger, prefix: PrefixMatch | None, num_tokens: int, data_shard: int | None = None
) -> None:
    """Raises ValueError for a prefix of more than `num_tokens` tokens, or out of date on a data shard (None: any)."""
    if prefix is None:
        return
    require(prefix.num_tokens <= num_tokens, "prefix", prefix, f"must not be longer than the {num_tokens} tokens asked")
    require(
        all(chain.is_current(ledger.pool) for chain in prefix.chains(data_shard)),
        "prefix",
        prefix,
        "is out of date: a page of it holds something else now",
        "prefix_match() again",
    )


def publish_prefix(ledger: PageLedger, row: int, token_ids: np.ndarray, namespace: bytes) -> int:
    """Makes the full pages of `token_ids` [n], the first tokens of a held row, findable. Returns how many pages it was.

    Raises:
      ValueError: a page was published with other tokens or another namespace, or a copy into one is due.
    """
    page_size, pool, pages = ledger.geometry.page_size, ledger.pool, ledger.row_pages.pages[row]
    first = ledger.geometry.first_context_shard(pages)
    contents, parent = [], b""
    for i, digest in enumerate(page_digests(token_ids, page_size, namespace)):
        known = pool.content(pages[i])
        contents.append(PageContent(first, i, digest, parent, namespace))
        require(
            known is None or known.namespace == namespace,
            "namespace",
            namespace,
            f"page {pages[i]} of row {row} was cached under {known.namespace if known else b''!r}",
            "forget_prefixes() first, where the row holds what belongs to this one",
        )
        require(
            known is None or known.digest == digest,
            "token_ids",
            f"[..., {', '.join(map(str, token_ids[i * page_size :][:4]))}, ...]",
            f"differ, from token {i * page_size} on, from those that page {pages[i]} was cached with",
        )
        parent = digest
    ledger.copies.check_written(row, pages[: len(contents)])
    for page, content in zip(pages, contents, strict=False):
        pool.remember(page, content)
    return len(contents)


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
