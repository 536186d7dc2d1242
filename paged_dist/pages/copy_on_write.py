"""Copy-on-write: rows share pages until one of them is about to write into a page that others hold too.

Of the pages a row already holds, growth writes only into the last, where that one is not full. So the decision is made
when rows grow (`growth.py`): `CopyOnWrite.rows_to_copy` says which rows need a last page of their own first, and
`give_own_last_page` gives it. The content follows on the device: `PageAllocator.take_copies` hands out the copies that
are due, for `copy_pages` to make.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paged_dist._errors import require
from paged_dist.pages.geometry import Geometry
from paged_dist.pages.page_pool import PagePool
from paged_dist.pages.rows import RowPages


class CopyOnWrite:
    """Which rows get a last page of their own before they grow, and the copies that are due because of it.

    A copy is due from the moment when a row gets the new page until `take` hands the copy out. Its source is pinned
    meanwhile: the content stays, whichever row lets go of it. `PageAllocator.fork` raises ValueError for a row with a
    page that a copy is due into, so a source is never itself waiting for its content.
    """

    def __init__(self, geometry: Geometry, pool: PagePool, row_pages: RowPages):
        self._geometry, self._pool, self._row_pages = geometry, pool, row_pages
        self._source_of: dict[int, int] = {}  # page to write -> page to read

    def __len__(self) -> int:
        return len(self._source_of)

    def due(self) -> list[tuple[int, int]]:
        """The copies that are due, (page to read, page to write), in the order of the pages to write."""
        return [(source, page) for page, source in sorted(self._source_of.items())]

    def writes_into_shared_or_findable_page(self, row: int, num_tokens: int) -> bool:
        """Whether a row of `num_tokens` tokens would, as it grows, write into a page that others hold or may find.

        True in more cases than those that `rows_to_copy` names: also for the last holder, and for a page that only this
        row holds but that `prefix_match` may find. Such a row writes in place, and `prefix_match` finds the page no
        more.
        """
        pages = self._row_pages.pages[row]
        return num_tokens % self._geometry.page_size != 0 and not self._pool.may_write(pages[-1])

    def rows_to_copy(self, rows: Iterable[int], lengths: Sequence[int]) -> frozenset[int]:
        """Those of `rows`, which grow in this order, that need a last page of their own first.

        They are the rows whose last page is not full and is held by another row too. The last holder that is left
        writes in place: of two rows that share a page and grow together, one copies. Whether `prefix_match` may find
        the page does not count here: a page that only one row holds is not copied.
        """
        copies: list[int] = []
        holders: dict[int, int] = {}  # of shared last pages, as the rows before leave them
        for row in rows:
            if lengths[row] % self._geometry.page_size:
                end = self._row_pages.pages[row][-1]
                count = holders.get(end, self._pool.num_holders(end))
                if count > 1:
                    holders[end] = count - 1
                    copies.append(row)
        return frozenset(copies)

    def give_own_last_page(self, row: int) -> None:
        """Puts a new page of the same shard in place of the row's last one; the copy of its content is due."""
        end = self._row_pages.pages[row][-1]
        page = self._pool.take(self._geometry.shard_of_page(end))
        self._pool.pin(end)
        self._source_of[page] = end
        self._row_pages.replace_last(row, page)
        self._pool.release(end)

    def cancel(self, page: int) -> None:
        """A row let go of `page`: where nobody holds it any more, no copy into it is due."""
        if page in self._source_of and not self._pool.num_holders(page):
            self._pool.unpin(self._source_of.pop(page))

    def take(self) -> list[tuple[int, int]]:
        """Hands out what `due` returns, for the caller to make. None is due then."""
        handed_out = self.due()
        for source, _ in handed_out:
            self._pool.unpin(source)
        self._source_of.clear()
        return handed_out

    def check_none_due(self) -> None:
        """Raises ValueError where any copy is due."""
        require(not self._source_of, "copies due", len(self), "must be made first", "copy_pages(..., take_copies())")

    def check_written(self, row: int, pages: Iterable[int]) -> None:
        """Raises ValueError where a copy into one of the row's `pages` is due: nothing was written into it yet."""
        due = next((page for page in pages if page in self._source_of), None)
        works = "make them, and write what the row has grown by"
        require(due is None, "row", row, f"copies are due first: take_copies(), one into page {due} of the row", works)
