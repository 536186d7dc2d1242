"""Which sequence owns which pages: host-side bookkeeping in NumPy, no device is touched."""

from __future__ import annotations

import hashlib
import heapq
import numbers
from collections.abc import Iterable

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from paged_dist._errors import bad_value, not_yet, require
from paged_dist.cache import CacheSpec
from paged_dist.mesh import MeshAxes


class OutOfPages(RuntimeError):
    """A call asked for more pages than its data shard has free. The allocator is as it was before the call.

    Attributes:
      asked: pages the call needed.
      free: pages free on `shard`; for `place`, the most on any data shard that has a free row (0: none has).
      shard: the data shard that ran out; None where `place` looked at all of them.
    """

    def __init__(self, message: str, *, asked: int, free: int, shard: int | None):
        super().__init__(message)
        self.asked, self.free, self.shard = asked, free, shard

    def __reduce__(self):  # keyword-only fields would be lost when a worker process sends it home
        return _rebuild_out_of_pages, (str(self), self.asked, self.free, self.shard)


def _rebuild_out_of_pages(message: str, asked: int, free: int, shard: int | None) -> OutOfPages:
    return OutOfPages(message, asked=asked, free=free, shard=shard)


def _whole(argument: str, value: int) -> int:
    """`value` as an int; raises ValueError for what is no whole number, True and False among it."""
    if type(value) is int:  # the usual case, first: it is on the decode loop's path
        return value
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise bad_value(argument, value, "must be a whole number")
    return int(value)


class PageAllocator:
    """Gives pages of a pool to the rows (sequences) of a batch, one instance in every process.

    Row b lives on data shard d = `b // (num_sequences / data)`, which owns the page ids `[d*n, (d+1)*n)`,
    n = `spec.num_pages / data`. The lowest free id of the shard goes first, so a sequence's ids tend to come
    in runs. Processes that make the same calls in the same order get the same ids: nothing depends on time,
    hashes or the host; `digest()` compares them.

    A row is free, or held by a sequence of 0 or more tokens: `allocate` takes a row, `free` gives it back. A
    call that raises changes nothing. Not thread-safe.

    Args:
      spec: the cache whose pages are given out.
      mesh: a `Mesh` or `AbstractMesh`; only its axis sizes matter.
      num_sequences: B, rows of the batch; a multiple of the mesh's data size.
      pages_per_sequence: columns of the block table: a row holds up to pages_per_sequence * page_size tokens.
      axes: which mesh axes are data, context and model.

    Raises:
      ValueError: sizes that are not positive or do not divide over the mesh.
      NotImplementedError: a mesh whose context size is above 1.
    """

    def __init__(
        self,
        spec: CacheSpec,
        mesh: Mesh | AbstractMesh,
        num_sequences: int,
        pages_per_sequence: int,
        *,
        axes: MeshAxes = MeshAxes(),
    ):
        spec.check_mesh(mesh, axes)
        data, context = axes.size(mesh, "data"), axes.size(mesh, "context")
        if context > 1:
            raise not_yet(
                f"PageAllocator on a mesh of context size {context}",
                "build the mesh with context=1 and more data or model shards",
            )
        num_sequences = _whole("num_sequences", num_sequences)
        pages_per_sequence = _whole("pages_per_sequence", pages_per_sequence)
        require(num_sequences >= 1, "num_sequences", num_sequences, "must be at least 1")
        require(
            num_sequences % data == 0,
            "num_sequences",
            num_sequences,
            f"must be a multiple of the mesh's data size {data}",
        )
        require(pages_per_sequence >= 1, "pages_per_sequence", pages_per_sequence, "must be at least 1")
        require(
            pages_per_sequence * spec.page_size < 2**31,
            "pages_per_sequence",
            pages_per_sequence,
            f"times page_size {spec.page_size} must fit in int32, which lengths are",
            f"at most {(2**31 - 1) // spec.page_size}",
        )
        self.spec = spec
        self.num_sequences = num_sequences
        self.pages_per_sequence = pages_per_sequence
        self.num_shards = data
        self.rows_per_shard = self.num_sequences // data
        self.pages_per_shard = spec.num_pages // data
        self._page_size = spec.page_size
        # Python lists, not arrays: `grow` reads and writes one element, ten times cheaper than through NumPy.
        self._lengths = [0] * self.num_sequences
        self._pages: list[list[int] | None] = [None] * self.num_sequences  # None: the row is free
        n = self.pages_per_shard
        self._free = [list(range(d * n, (d + 1) * n)) for d in range(data)]  # heaps, for sorted lists are heaps
        self._table = np.full((self.num_sequences, self.pages_per_sequence), -1, np.int32)
        # Snapshots handed out, until the next change. The arrays themselves are never written again: a decode
        # step still in flight may be reading the memory of one.
        self._lengths_out: np.ndarray | None = None
        self._table_out: np.ndarray | None = None

    # What a decode step takes.

    @property
    def lengths(self) -> np.ndarray:
        """[B] int32, read-only: live tokens of each row, 0 for a free one. The same object until a change."""
        if self._lengths_out is None:
            self._lengths_out = np.array(self._lengths, np.int32)
            self._lengths_out.flags.writeable = False
        return self._lengths_out

    @property
    def block_tables(self) -> np.ndarray:
        """[B, pages_per_sequence] int32, read-only: global page ids, -1 in unused entries. As `lengths`."""
        if self._table_out is None:
            self._table_out = self._table.copy()
            self._table_out.flags.writeable = False
        return self._table_out

    # What there is.

    @property
    def max_tokens(self) -> int:
        """Tokens that a row's block table has room for."""
        return self.pages_per_sequence * self._page_size

    @property
    def used_pages(self) -> int:
        """Pages that sequences hold, over all shards."""
        return self.spec.num_pages - self.free_pages()

    def free_pages(self, shard: int | None = None) -> int:
        """Free pages of data shard `shard`, or of all shards."""
        if shard is None:
            return sum(map(len, self._free))
        require(0 <= shard < self.num_shards, "shard", shard, f"there are {self.num_shards} data shards")
        return len(self._free[shard])

    def shard_of(self, row: int) -> int:
        """The data shard on which `row` lives."""
        self._check_row(row)
        return row // self.rows_per_shard

    def is_held(self, row: int) -> bool:
        """Whether a sequence has `row`, be it empty."""
        self._check_row(row)
        return self._pages[row] is not None

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take."""
        return -(-num_tokens // self._page_size)

    def digest(self) -> str:
        """SHA-256 (hex) of the whole state: spec, geometry, rows held, lengths, block tables and free pages.

        Equal on processes that made the same calls. Two states with the same digest answer every later call
        alike; how they were reached does not enter (an `allocate` that was freed again leaves no mark).
        """
        h = hashlib.sha256()
        h.update(repr((self.spec, self.num_sequences, self.pages_per_sequence, self.num_shards)).encode())
        h.update(bytes(p is not None for p in self._pages))
        h.update(np.asarray(self._lengths, "<i4").tobytes())
        h.update(self._table.astype("<i4", copy=False).tobytes())
        for free in self._free:
            h.update(np.asarray([len(free), *sorted(free)], "<i4").tobytes())
        return h.hexdigest()

    # What changes it.

    def place(self, num_tokens: int) -> int:
        """A free row with room for a sequence of `num_tokens` tokens: it looks, `allocate` takes the row.

        The row is on the data shard with the most free pages of those that have a free row; the lowest shard,
        then the lowest row, where several are alike.

        Raises:
          ValueError: num_tokens is negative or more than a block table holds.
          OutOfPages: no shard has both a free row and the pages (`shard` is None; `free` the most there are
            beside a free row). A sequence that ends may help, unless `asked` is above `pages_per_shard`.
        """
        asked = self._pages_asked(_whole("num_tokens", num_tokens))
        best: tuple[int, int] | None = None  # (free pages, row)
        for shard, free in enumerate(self._free):
            if best is None or len(free) > best[0]:
                first = shard * self.rows_per_shard
                rows = range(first, first + self.rows_per_shard)
                row = next((r for r in rows if self._pages[r] is None), None)
                if row is not None:
                    best = (len(free), row)
        if best is None:
            raise OutOfPages(f"no free row: all {self.num_sequences} are held", asked=asked, free=0, shard=None)
        if best[0] < asked:
            ever = self.pages_per_shard
            raise OutOfPages(
                f"no data shard with a free row has {asked} pages free, the most is {best[0]}"
                + (f"; none ever will: a shard owns {ever}" if asked > ever else ""),
                asked=asked,
                free=best[0],
                shard=None,
            )
        return best[1]

    def allocate(self, row: int, num_tokens: int) -> None:
        """Takes the free row `row` for a sequence of `num_tokens` tokens (0 allowed), gives it their pages.

        Raises:
          ValueError: no such row, the row is held, num_tokens is negative or more than a block table holds.
          OutOfPages: the row's shard has too few pages free.
        """
        num_tokens = _whole("num_tokens", num_tokens)
        self._check_row(row)
        if self._pages[row] is not None:
            raise bad_value(
                "row",
                row,
                f"is held by a sequence of {self._lengths[row]} tokens",
                "free() it first, or let place() find a free row",
            )
        count = self._pages_asked(num_tokens)
        self._check_room(row, count)
        self._pages[row] = []
        self._give(row, count)
        self._set_length(row, num_tokens)

    def grow(self, row: int, num_tokens: int = 1) -> None:
        """Adds `num_tokens` tokens to the sequence in `row`, and the pages they need.

        Raises:
          ValueError: no such row, the row is free, num_tokens is negative, or the sum is more than a block
            table holds.
          OutOfPages: the row's shard has too few pages free.
        """
        num_tokens = _whole("num_tokens", num_tokens)
        pages = self._held(row)
        if num_tokens < 0:
            raise bad_value("num_tokens", num_tokens, "must not be negative", "truncate() shortens a sequence")
        length = self._lengths[row] + num_tokens
        if length > len(pages) * self._page_size:
            count = self._pages_asked(length, self._lengths[row]) - len(pages)
            self._check_room(row, count)
            self._give(row, count)
        self._set_length(row, length)

    def grow_all(self, rows: Iterable[int], num_tokens: int = 1) -> None:
        """`grow(row, num_tokens)` for each of `rows` in turn, all of them or, where one is refused, none.

        Raises:
          ValueError: as `grow`, or a row named twice.
          OutOfPages: a shard has too few pages free for all its rows together.
        """
        num_tokens = _whole("num_tokens", num_tokens)
        if num_tokens < 0:
            raise bad_value("num_tokens", num_tokens, "must not be negative", "truncate() shortens a sequence")
        rows = list(rows)
        require(len(set(rows)) == len(rows), "rows", rows, "names a row twice")
        needed: list[tuple[int, int]] = []  # (row, pages) of the rows that need any
        asked = dict.fromkeys(range(self.num_shards), 0)
        for row in rows:
            pages = self._held(row)
            length = self._lengths[row] + num_tokens
            if length > len(pages) * self._page_size:
                count = self._pages_asked(length, self._lengths[row]) - len(pages)
                needed.append((row, count))
                asked[row // self.rows_per_shard] += count
        for shard, count in asked.items():
            if count > len(self._free[shard]):
                raise self._out_of_pages(shard, count, "the rows of")
        for row, count in needed:
            self._give(row, count)
        for row in rows:
            self._lengths[row] += num_tokens
        if rows:
            self._lengths_out = None

    def truncate(self, row: int, num_tokens: int) -> None:
        """Shortens the sequence in `row` to its first `num_tokens` tokens; pages wholly past them are freed.

        At 0 the row stays held, by an empty sequence.

        Raises:
          ValueError: no such row, the row is free, or num_tokens is not between 0 and its length.
        """
        num_tokens = _whole("num_tokens", num_tokens)
        pages = self._held(row)
        if not 0 <= num_tokens <= self._lengths[row]:
            raise bad_value(
                "num_tokens",
                num_tokens,
                f"must be between 0 and the {self._lengths[row]} tokens of row {row}",
                "grow() lengthens a sequence",
            )
        self._take_back(row, pages, self.pages_for(num_tokens))
        self._set_length(row, num_tokens)

    def free(self, row: int) -> None:
        """Ends the sequence in `row`: its pages and the row become free.

        Raises:
          ValueError: no such row, or the row is free already.
        """
        self._take_back(row, self._held(row), 0)
        self._pages[row] = None
        self._set_length(row, 0)

    def fork(self, row: int, new_row: int) -> None:
        """Not in this release: a second sequence that shares the pages of `row`."""
        raise not_yet("PageAllocator.fork", "allocate the new row and write its prompt's pages")

    # How.

    def _check_row(self, row: int) -> None:
        _whole("row", row)
        if not 0 <= row < self.num_sequences:  # a negative index would silently be another row
            raise bad_value("row", row, f"must be between 0 and {self.num_sequences - 1}")

    def _held(self, row: int) -> list[int]:
        """The pages of the sequence in `row`, which must be held."""
        self._check_row(row)
        pages = self._pages[row]
        if pages is None:
            raise bad_value("row", row, "is free, no sequence has it", "allocate() it first")
        return pages

    def _pages_asked(self, num_tokens: int, of_them_there: int = 0) -> int:
        """The pages of `num_tokens` tokens, which must fit in a block table."""
        if not 0 <= num_tokens <= self.max_tokens:
            there = f" with the {of_them_there} there already" if of_them_there else ""
            raise bad_value(
                "num_tokens",
                num_tokens - of_them_there,
                f"must be between 0 and {self.max_tokens}{there}: pages_per_sequence "
                f"{self.pages_per_sequence} x page_size {self._page_size}",
            )
        return self.pages_for(num_tokens)

    def _check_room(self, row: int, count: int) -> None:
        shard = row // self.rows_per_shard
        if count > len(self._free[shard]):
            raise self._out_of_pages(shard, count, f"row {row} on")

    def _out_of_pages(self, shard: int, asked: int, who: str) -> OutOfPages:
        free = len(self._free[shard])
        return OutOfPages(
            f"{who} data shard {shard}: {asked} more pages needed, {free} of its {self.pages_per_shard} are free",
            asked=asked,
            free=free,
            shard=shard,
        )

    def _give(self, row: int, count: int) -> None:
        """Appends the `count` lowest free pages of the row's shard; there must be as many."""
        if count == 0:
            return
        pages, free = self._pages[row], self._free[row // self.rows_per_shard]
        start = len(pages)
        pages.extend(heapq.heappop(free) for _ in range(count))
        self._table[row, start : start + count] = pages[start:]
        self._table_out = None

    def _take_back(self, row: int, pages: list[int], keep: int) -> None:
        """Frees all but the first `keep` of the row's pages."""
        if len(pages) == keep:
            return
        free = self._free[row // self.rows_per_shard]
        for page in pages[keep:]:
            heapq.heappush(free, page)
        self._table[row, keep : len(pages)] = -1
        del pages[keep:]
        self._table_out = None

    def _set_length(self, row: int, length: int) -> None:
        if self._lengths[row] != length:
            self._lengths[row] = length
            self._lengths_out = None
