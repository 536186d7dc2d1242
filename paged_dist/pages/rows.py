"""The rows of a batch: which of them a sequence holds, how many tokens it has, and which pages, in its order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Snapshot:
    """A read-only copy of an array of bookkeeping, made when it is asked for and kept until the next change.

    A copy is never written again: a decode step that is still in flight may be reading its memory.
    """

    def __init__(self) -> None:
        self._array: np.ndarray | None = None

    def of(self, source: np.ndarray | Sequence[int]) -> np.ndarray:
        """The copy, int32; of `source` as it is now where it changed."""
        if self._array is None:
            self._array = read_only(np.array(source, np.int32))
        return self._array

    def changed(self) -> None:
        """The source has changed: the next `of` makes a new copy."""
        self._array = None


def read_only(array: np.ndarray) -> np.ndarray:
    """`array`, which nobody can write into from now on."""
    array.flags.writeable = False
    return array


class Lengths:
    """How many tokens each row has, and which rows a sequence holds: a free row has 0, as a held one may.

    `tokens` and `is_held` are for reading. They are Python lists and not arrays: growth reads and writes one element,
    ten times cheaper than through NumPy.
    """

    def __init__(self, num_sequences: int):
        self.tokens = [0] * num_sequences
        self.is_held = [False] * num_sequences
        self._snapshot = Snapshot()

    def snapshot(self) -> np.ndarray:
        """[B] int32, read-only: the tokens of each row."""
        return self._snapshot.of(self.tokens)

    def hold(self, row: int, num_tokens: int) -> None:
        """A sequence of `num_tokens` tokens takes the free row `row`."""
        self.is_held[row] = True
        self.set(row, num_tokens)

    def free(self, row: int) -> None:
        """The sequence in `row` ends."""
        self.is_held[row] = False
        self.set(row, 0)

    def set(self, row: int, num_tokens: int) -> None:
        """The sequence in `row` has `num_tokens` tokens from now on."""
        if self.tokens[row] != num_tokens:
            self.tokens[row] = num_tokens
            self._snapshot.changed()

    def add(self, rows: Sequence[int], num_tokens: int) -> None:
        """The sequence in each of `rows` has `num_tokens` tokens more."""
        for row in rows:
            self.tokens[row] += num_tokens
        if rows:
            self._snapshot.changed()


class RowPages:
    """The pages of each row, in the sequence's order, as lists and as the block table.

    `pages[row]` is for reading, [] for a free row. The methods keep the block table [B, pages_per_sequence] in step
    with it; they neither take pages from the pool nor give any back.
    """

    def __init__(self, num_sequences: int, pages_per_sequence: int):
        self.pages: list[list[int]] = [[] for _ in range(num_sequences)]
        self._table = np.full((num_sequences, pages_per_sequence), -1, np.int32)
        self._snapshot = Snapshot()

    def block_tables(self) -> np.ndarray:
        """[B, pages_per_sequence] int32, read-only: global page ids, -1 in unused entries."""
        return self._snapshot.of(self._table)

    def append(self, row: int, pages: Sequence[int]) -> None:
        """Puts `pages` behind those of the row."""
        mine = self.pages[row]
        start = len(mine)
        mine.extend(pages)
        self._table[row, start : len(mine)] = pages
        self._snapshot.changed()

    def replace_last(self, row: int, page: int) -> None:
        """Puts `page` in place of the row's last page."""
        mine = self.pages[row]
        mine[-1] = self._table[row, len(mine) - 1] = page
        self._snapshot.changed()

    def cut(self, row: int, keep: int) -> None:
        """Leaves the row its first `keep` pages."""
        mine = self.pages[row]
        self._table[row, keep : len(mine)] = -1
        del mine[keep:]
        self._snapshot.changed()
