"""What can be asked of an allocator, without a change: tables, free pages, where a sequence can go, a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from paged_dist._errors import require, whole_number
from paged_dist.cache import CacheSpec
from paged_dist.pages.geometry import Geometry
from paged_dist.pages.ledger import PageLedger
from paged_dist.pages.page_placement import choose_row
from paged_dist.pages.prefix_cache import PrefixMatch, as_namespace, as_token_ids, check_prefix, find_prefix
from paged_dist.pages.saved_state import state_of


class AllocatorView:
    """The questions that a `PageAllocator` answers, apart from the calls that change it.

    Attributes:
      spec: the cache whose pages are given out.
      num_sequences, pages_per_sequence: as they were given.
      num_shards: data shards.
      num_context_shards: context shards of each data shard.
      rows_per_shard: rows of a data shard.
      pages_per_shard: pages of a data shard, on all its context shards.
    """

    def __init__(self, spec: CacheSpec, geometry: Geometry):
        self.spec = spec
        self.num_sequences = geometry.num_sequences
        self.pages_per_sequence = geometry.pages_per_sequence
        self.num_shards = geometry.data
        self.num_context_shards = geometry.context
        self.rows_per_shard = geometry.rows_per_shard
        self.pages_per_shard = geometry.pages_per_context_shard * geometry.context
        self._geometry = geometry
        self._ledger = PageLedger(geometry)

    # What a decode step takes.

    @property
    def lengths(self) -> np.ndarray:
        """[B] int32, read-only: live tokens of each row, 0 for a free one. The same object until the next change."""
        return self._ledger.lengths.snapshot()

    @property
    def block_tables(self) -> np.ndarray:
        """[B, pages_per_sequence] int32, read-only: global page ids, -1 in unused entries. The same until a change."""
        return self._ledger.row_pages.block_tables()

    # What there is.

    @property
    def max_tokens(self) -> int:
        """Tokens that a row's block table has room for."""
        return self._geometry.max_tokens

    @property
    def used_pages(self) -> int:
        """Pages that sequences hold, over all shards; a shared page counts once."""
        return self.spec.num_pages - self.free_pages()

    def free_pages(self, shard: int | None = None, context_shard: int | None = None) -> int:
        """Free pages of one data shard, or of all; on one context shard, or on all.

        Pages that are kept as cached prefixes and that no sequence holds count as free: they are given out last.
        """
        data, context = self.num_shards, self.num_context_shards
        for name, value in (("shard", shard), ("context_shard", context_shard)):
            if value is not None:
                whole_number(name, value)
        require(shard is None or 0 <= shard < data, "shard", shard, f"there are {data} data shards")
        rule = f"there are {context} context shards"
        require(context_shard is None or 0 <= context_shard < context, "context_shard", context_shard, rule)
        return sum(
            self._ledger.pool.available(d * context + c)
            for d in (range(data) if shard is None else (shard,))
            for c in (range(context) if context_shard is None else (context_shard,))
        )

    @property
    def live_pages(self) -> np.ndarray:
        """[m] int32, ascending: the pages with content, which a sequence holds or a prompt may begin with."""
        held = {page for pages in self._ledger.row_pages.pages for page in pages}
        return np.array(sorted(held | set(self._ledger.pool.cached())), np.int32)

    def shard_of(self, row: int) -> int:
        """The data shard on which `row` lives."""
        self._geometry.check_row(row)
        return self._geometry.data_shard_of_row(row)

    def is_held(self, row: int) -> bool:
        """Whether a sequence has `row`; it may have 0 tokens."""
        self._geometry.check_row(row)
        return self._ledger.lengths.is_held[row]

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take."""
        return self._geometry.pages_for(num_tokens)

    # Where a new sequence can go.

    def place(self, num_tokens: int, prefix: PrefixMatch | None = None) -> int:
        """A free row for a sequence of `num_tokens` tokens, on a data shard that has the pages. `allocate` takes it.

        Of the data shards with a free row and the pages, it is the one with the most free pages; the lowest shard, then
        its lowest row, where several are alike. With a `prefix`, the shard on which the row can begin with the most
        cached tokens comes first. Where no such shard has a free row and the pages, it is another shard, without the
        prefix: `allocate` returns how many tokens are cached there.

        Raises:
          ValueError: num_tokens is negative or more than a block table holds; a prefix that is longer, or of which a
            page holds something else by now.
          OutOfPages: no shard has both a free row and the pages (`shard` is None; `free` the most there are
            beside a free row). A sequence that ends may help, unless `asked` is above `pages_per_shard`.

        Example:
          >>> pages = pd.PageAllocator(pd.CacheSpec(4, 128, num_pages=8), pd.make_pod_mesh(data=2, model=4), 4, 4)
          >>> pages.allocate(pages.place(200), 200)  # row 0, on data shard 0
          0
          >>> pages.place(500)  # data shard 1 has more pages free; its rows are 2 and 3
          2
        """
        num_tokens = whole_number("num_tokens", num_tokens)
        count = self._ledger.pages_asked(num_tokens)
        check_prefix(self._ledger, prefix, num_tokens)
        return choose_row(self._ledger, count, prefix)

    def prefix_match(
        self, token_ids: np.ndarray | Sequence[int], data_shard: int | None = None, namespace: bytes = b""
    ) -> PrefixMatch:
        """The longest chain of cached full pages that a prompt begins with. `allocate` takes them.

        A page is found by a hash of the namespace, its tokens and all tokens before them (blake2b, 128 bits). At least
        one token of a prompt must be run for its logits, so leave the last one out.

        Args:
          token_ids: [n] integers, the prompt.
          data_shard: where to look; None: everywhere, the lowest of those that hold the most.
          namespace: what the pages were cached under, see `cache_prefix`.

        Returns:
          A PrefixMatch, of 0 tokens where nothing was found. It holds until the next call that changes the allocator.

        Raises:
          ValueError: token_ids are not integers in one dimension, no such data shard, or a namespace that is no bytes.

        Example:
          >>> pages = pd.PageAllocator(pd.CacheSpec(8, 128, num_pages=16), pd.make_pod_mesh(model=8), 2, 4)
          >>> prompt = list(range(300))
          >>> _ = pages.allocate(0, 300), pages.cache_prefix(0, prompt)  # once its 2 full pages are written
          >>> match = pages.prefix_match(prompt[:-1])
          >>> row = pages.place(300, match)
          >>> pages.allocate(row, 300, match)  # tokens that are there; 0 where only shards without them had room
          256
          >>> pages.block_tables.tolist()
          [[0, 1, 2, -1], [0, 1, 3, -1]]
        """
        shards = range(self.num_shards) if data_shard is None else (whole_number("data_shard", data_shard),)
        rule = f"there are {self.num_shards} data shards"
        require(0 <= shards[0] < self.num_shards, "data_shard", data_shard, rule)
        tokens, namespace = as_token_ids(token_ids)[: self.max_tokens], as_namespace(namespace)
        return find_prefix(self._ledger, tokens, namespace, shards)

    # The whole state.

    def digest(self) -> str:
        """SHA-256 (hex) of the whole state: spec, geometry, rows held, lengths, block tables, free and cached pages.

        Equal on processes that made the same calls. Two states with the same digest answer every later call alike. How
        a state was reached does not matter: an `allocate` that was freed again leaves no mark.
        """
        h = hashlib.sha256()
        geometry = self.num_sequences, self.pages_per_sequence, self.num_shards, self.num_context_shards
        h.update(repr((self.spec, *geometry)).encode())
        h.update(bytes(self._ledger.lengths.is_held))
        h.update(self.lengths.astype("<i4", copy=False).tobytes())
        h.update(self.block_tables.astype("<i4", copy=False).tobytes())
        h.update(np.asarray(self._ledger.copies.due(), "<i4").tobytes())
        self._ledger.pool.update_digest(h)
        return h.hexdigest()

    def to_state(self) -> dict[str, Any]:
        """The sequences and cached prefixes as numbers, strings and lists, which JSON can hold; `from_state` reads it.

        Raises:
          ValueError: copies are due, see `take_copies`.
        """
        return state_of(self._ledger)
