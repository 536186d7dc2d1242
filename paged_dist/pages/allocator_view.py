"""What can be asked of an allocator: lengths, block tables, free pages, a digest of the state. Nothing is changed."""

from __future__ import annotations

import hashlib

import numpy as np

from paged_dist._errors import require, whole_number
from paged_dist.cache import CacheSpec
from paged_dist.pages.geometry import Geometry
from paged_dist.pages.ledger import PageLedger


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
