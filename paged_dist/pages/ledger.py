"""The books of one cache's pages: the pool, the rows' pages and the copies that are due, kept consistent together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paged_dist._errors import bad_value
from paged_dist.pages.copy_on_write import CopyOnWrite
from paged_dist.pages.geometry import Geometry
from paged_dist.pages.page_pool import PagePool
from paged_dist.pages.rows import Lengths, RowPages


class PageLedger:
    """Who holds which page, and how long each row is: what `PageAllocator` decides over, without any decision.

    Its methods move pages between pool and rows and keep both in step. Which pages to give, and whether they are
    there, is for `page_placement`, `growth`, `copy_on_write` and `prefix_cache` to say.

    Attributes:
      geometry: sizes and shards.
      lengths: tokens of each row.
      pool: the state of each page.
      row_pages: the pages of each row.
      copies: the copies that are due.
    """

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.lengths = Lengths(geometry.num_sequences)
        self.pool = PagePool(geometry)
        self.row_pages = RowPages(geometry.num_sequences, geometry.pages_per_sequence)
        self.copies = CopyOnWrite(geometry, self.pool, self.row_pages)

    def pages_of(self, row: int) -> list[int]:
        """The pages of the sequence in `row`. Raises ValueError for no such row, or one that is free."""
        self.geometry.check_row(row)
        if not self.lengths.is_held[row]:
            raise bad_value("row", row, "is free, no sequence has it", "allocate() it first")
        return self.row_pages.pages[row]

    def pages_asked(self, num_tokens: int, row: int | None = None) -> int:
        """The pages that a new sequence of `num_tokens` tokens takes in all, or `row` with so many tokens more.

        Raises:
          ValueError: they do not fit in a block table.
        """
        there, most = 0 if row is None else self.lengths.tokens[row], self.geometry.max_tokens
        if not 0 <= num_tokens + there <= most:
            with_those = "" if row is None else f" with the {there} there already in row {row}"
            raise bad_value(
                "num_tokens",
                num_tokens,
                f"must be between 0 and {most}{with_those}: pages_per_sequence "
                f"{self.geometry.pages_per_sequence} x page_size {self.geometry.page_size}",
                None if row is None else f"at most {most - there} for row {row}",
            )
        return self.geometry.pages_for(num_tokens + there)

    def give(self, row: int, shards: Sequence[int]) -> None:
        """Appends a new page of each of `shards` to the row; the pages must be there."""
        if shards:
            self.row_pages.append(row, [self.pool.take(shard) for shard in shards])

    def share(self, row: int, pages: Iterable[int]) -> None:
        """Appends `pages`, which others hold or which are cached, to the row."""
        pages = list(pages)
        for page in pages:
            self.pool.hold(page)
        if pages:
            self.row_pages.append(row, pages)

    def take_back(self, row: int, keep: int) -> None:
        """Lets go of all but the first `keep` of the row's pages."""
        pages = self.row_pages.pages[row]
        if len(pages) == keep:
            return
        for page in reversed(pages[keep:]):  # of a prompt that stays cached, the end goes before what leads to it
            self.pool.release(page)
            self.copies.cancel(page)
        self.row_pages.cut(row, keep)
