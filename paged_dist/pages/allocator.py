"""`PageAllocator`: which sequence owns which pages. Host-side bookkeeping in NumPy, no device is touched.

The class is the public face: it checks arguments, asks another module for the decision, and has `PageLedger` carry it
out. Each decision is a module: `page_placement` (which shards, which row), `growth`, `copy_on_write`, `prefix_cache`;
`relocation` and `saved_state` take the whole elsewhere. `allocator_view` is what can be asked of it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from paged_dist._errors import bad_value, require, whole_number
from paged_dist.cache import CacheSpec
from paged_dist.mesh import MeshAxes
from paged_dist.pages.allocator_view import AllocatorView
from paged_dist.pages.geometry import Geometry
from paged_dist.pages.growth import changes_pages, give_planned_pages, plan_growth
from paged_dist.pages.out_of_pages import out_of_pages
from paged_dist.pages.page_placement import plan_new_row
from paged_dist.pages.prefix_cache import (
    PrefixMatch,
    as_namespace,
    as_token_ids,
    check_prefix,
    publish_prefix,
)
from paged_dist.pages.relocation import relocate
from paged_dist.pages.rows import read_only
from paged_dist.pages.saved_state import load_state, state_sizes


class PageAllocator(AllocatorView):
    """Gives the pages of a cache to the rows of a batch, a sequence to a row. Every process has an instance.

    Where pages lie: row b lives on data shard d = `b // (num_sequences / data)`. Its page i is on context shard
    (o + i) mod C of the C that the mesh has; o, the context shard of its page 0, is chosen so that all shards fill
    alike. Shard r = d * C + c owns the page ids `[r*n, (r+1)*n)`, n = `spec.num_pages / (data * C)`. It gives the
    lowest free one first, so a sequence's ids tend to come in runs.

    Determinism: processes that make the same calls in the same order get the same ids. Nothing depends on time,
    Python's hashes or the host. `digest()` compares the processes.

    Rows: a row is free, or held by a sequence of 0 or more tokens. `allocate` takes a row, `free` gives it back. A call
    that raises changes nothing. Not thread-safe.

    Sharing: several rows of a data shard may hold a page. `fork` makes a second sequence of the same tokens;
    `cache_prefix` and `prefix_match` let prompts begin with the full pages of others. A row never writes into a page
    that another row holds (copy-on-write): as it grows it gets a page of its own, and a copy into it is due, which each
    step makes before it writes::

        positions = pages.grow_all(rows)  # of the new tokens, -1 in rows that did not grow: those write nothing
        cache = copy_pages(cache, pages.take_copies())  # nothing where nothing was forked
        cache = append_kv(cache, key, value, positions, pages.block_tables)

    Take `positions` and not `lengths - 1`: in a row that is held and did not grow, `lengths - 1` is the last token's
    position. That token would be written over, in a page that other rows may hold too.

    Args:
      spec: the cache whose pages are given out.
      mesh: a `Mesh` or `AbstractMesh`; only its axis sizes matter.
      num_sequences: B, rows of the batch; a multiple of the mesh's data size.
      pages_per_sequence: columns of the block table: a row holds up to pages_per_sequence * page_size tokens.
      axes: which mesh axes are data, context and model.

    Raises:
      ValueError: sizes that are not positive or do not divide over the mesh.

    Example:
      >>> spec = pd.CacheSpec(num_kv_heads=8, head_dim=128, num_pages=64, page_size=128)
      >>> pages = pd.PageAllocator(spec, pd.make_pod_mesh(model=8), num_sequences=4, pages_per_sequence=8)
      >>> row = pages.place(300)  # a prompt of 300 tokens takes 3 pages
      >>> pages.allocate(row, 300)
      0
      >>> pages.grow_all([row]).tolist()  # a decode step: the position of each row's new token
      [300, -1, -1, -1]
      >>> pages.lengths.tolist(), pages.block_tables[row, :4].tolist()
      ([301, 0, 0, 0], [0, 1, 2, -1])
      >>> pages.free(row)
      >>> pages.free_pages()
      64
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
        super().__init__(spec, Geometry.of(spec, mesh, num_sequences, pages_per_sequence, axes))

    # Rows.

    def allocate(self, row: int, num_tokens: int, prefix: PrefixMatch | None = None) -> int:
        """Gives the free row `row` to a sequence of `num_tokens` tokens (0 allowed), with the pages for them.

        Args:
          row: a free row, see `place`.
          num_tokens: the sequence's length; their keys and values are still to be written.
          prefix: what `prefix_match` found for the sequence's first tokens. The row begins with the cached pages that
            are on its data shard. It begins with none where there are none, or where they leave no room for the rest.

        Returns:
          How many tokens of the prefix the row begins with, a multiple of page_size; 0 without one. They are there:
          `write_prefill_kv(..., starts=)` writes those behind them.

        Raises:
          ValueError: no such row, the row is held, num_tokens is negative or more than a block table holds; the
            prefix is longer than num_tokens, or a page of it on the row's shard holds something else by now.
          OutOfPages: the row's shard has too few pages free.

        Example:
          >>> pages = pd.PageAllocator(pd.CacheSpec(8, 128, num_pages=16), pd.make_pod_mesh(model=8), 2, 4)
          >>> pages.allocate(1, 129)
          0
          >>> pages.block_tables.tolist()
          [[-1, -1, -1, -1], [0, 1, -1, -1]]
        """
        num_tokens = whole_number("num_tokens", num_tokens)
        ledger = self._ledger
        self._geometry.check_row(row)
        if ledger.lengths.is_held[row]:
            raise bad_value(
                "row",
                row,
                f"is held by a sequence of {ledger.lengths.tokens[row]} tokens",
                "free() it first, or let place() find a free row",
            )
        count, shard = ledger.pages_asked(num_tokens), self._geometry.data_shard_of_row(row)
        check_prefix(ledger, prefix, num_tokens, shard)
        plan = plan_new_row(ledger, shard, count, prefix)
        if plan.lacks is not None:
            raise out_of_pages(ledger, *plan.lacks, [row])
        ledger.share(row, plan.shared)
        ledger.give(row, plan.shards)
        ledger.lengths.hold(row, num_tokens)
        return len(plan.shared) * self.spec.page_size

    def grow(self, row: int, num_tokens: int = 1) -> int:
        """Adds `num_tokens` tokens to the sequence in `row`, and the pages they need.

        Returns:
          The position of the first of them, for `append_kv`; -1 where num_tokens is 0.

        Raises:
          ValueError: no such row, the row is free, num_tokens is negative, or the sum is more than a block
            table holds.
          OutOfPages: the row's shard has too few pages free.
        """
        num_tokens, ledger = _new_tokens(num_tokens), self._ledger
        ledger.pages_of(row)
        start = ledger.lengths.tokens[row]
        if changes_pages(ledger, row, num_tokens):
            give_planned_pages(ledger, plan_growth(ledger, (row,), num_tokens))
        ledger.lengths.set(row, start + num_tokens)
        return start if num_tokens else -1

    def grow_all(self, rows: Iterable[int], num_tokens: int = 1) -> np.ndarray:
        """`grow(row, num_tokens)` for each of `rows` in turn: all of them or, where one is refused, none.

        Returns:
          [B] int32, read-only: the position of each row's first new token, -1 in all other rows. It is what
          `append_kv` takes, which then writes the rows that grew and no other.

        Raises:
          ValueError: as `grow`, or a row named twice. It names the row.
          OutOfPages: a shard has too few pages free for all its rows together. It names both.

        Example:
          >>> pages = pd.PageAllocator(pd.CacheSpec(8, 128, num_pages=16), pd.make_pod_mesh(model=8), 3, 4)
          >>> _ = pages.allocate(0, 128), pages.allocate(2, 5)
          >>> pages.grow_all([0, 2]).tolist()
          [128, -1, 5]
          >>> pages.lengths.tolist(), pages.used_pages
          ([129, 0, 6], 3)
        """
        num_tokens, ledger, rows = _new_tokens(num_tokens), self._ledger, list(rows)
        for row in rows:
            ledger.pages_of(row)
        if len(set(rows)) != len(rows):
            twice = next(row for row, count in collections.Counter(rows).items() if count > 1)
            raise bad_value("rows", rows, f"names row {twice} twice")
        needy = [row for row in rows if changes_pages(ledger, row, num_tokens)]
        give_planned_pages(ledger, plan_growth(ledger, needy, num_tokens))
        ledger.lengths.add(rows, num_tokens)
        return self._positions(rows, num_tokens)

    def positions(self, rows: Iterable[int], num_tokens: int = 1) -> np.ndarray:
        """What `grow_all` returned, for rows that were grown one by one: each of `rows` by `num_tokens` just now.

        Returns:
          [B] int32, read-only: lengths - num_tokens in `rows`, -1 in all other rows.

        Raises:
          ValueError: a row that is free or holds fewer tokens; num_tokens below 1.
        """
        num_tokens = whole_number("num_tokens", num_tokens)
        require(num_tokens >= 1, "num_tokens", num_tokens, "must be at least 1")
        rows = list(rows)
        for row in rows:
            self._ledger.pages_of(row)
            length = self._ledger.lengths.tokens[row]
            rule = f"must be at most the {length} tokens of row {row}"
            require(num_tokens <= length, "num_tokens", num_tokens, rule)
        return self._positions(rows, num_tokens)

    def truncate(self, row: int, num_tokens: int) -> None:
        """Shortens the sequence in `row` to its first `num_tokens` tokens; pages wholly past them are freed.

        At 0 the row stays held, by an empty sequence.

        Raises:
          ValueError: no such row, the row is free, or num_tokens is not between 0 and its length.
        """
        num_tokens = whole_number("num_tokens", num_tokens)
        self._ledger.pages_of(row)
        length = self._ledger.lengths.tokens[row]
        if not 0 <= num_tokens <= length:
            raise bad_value(
                "num_tokens",
                num_tokens,
                f"must be between 0 and the {length} tokens of row {row}",
                "grow() lengthens a sequence",
            )
        self._ledger.take_back(row, self.pages_for(num_tokens))
        self._ledger.lengths.set(row, num_tokens)

    def free(self, row: int) -> None:
        """Ends the sequence in `row`: the row becomes free, and its pages where nobody else holds them.

        Raises:
          ValueError: no such row, or the row is free already.
        """
        self._ledger.pages_of(row)
        self._ledger.take_back(row, 0)
        self._ledger.lengths.free(row)

    # Shared pages.

    def fork(self, row: int, new_row: int) -> None:
        """Copy-on-write: the sequence in the free row `new_row` shares all pages of the one in `row`, and takes none.

        It has the same tokens. The last page is shared too: where it is not full, the first of its holders that grows
        gets a page of its own on the same shard, and `take_copies` says what to copy into it. The last holder that is
        left writes in place. Fork after the writes of what `row` has grown by.

        Raises:
          ValueError: no such row, `row` is free, `new_row` is held, or it is on another data shard: pages are shared
            within one. Or a copy into the row's last page is due: what the row has grown by is not written yet, and a
            fork that grew would never get it.

        Example:
          >>> pages = pd.PageAllocator(pd.CacheSpec(8, 128, num_pages=16), pd.make_pod_mesh(model=8), 2, 4)
          >>> _ = pages.allocate(0, 200)
          >>> pages.fork(0, 1)
          >>> pages.block_tables.tolist()
          [[0, 1, -1, -1], [0, 1, -1, -1]]
          >>> _ = pages.grow_all([0, 1])  # row 0 gets a last page of its own, row 1 writes in place
          >>> pages.take_copies().tolist(), pages.block_tables.tolist()
          ([[1, 2], [-1, -1]], [[0, 2, -1, -1], [0, 1, -1, -1]])
        """
        pages = self._ledger.pages_of(row)
        self._geometry.check_row(new_row)
        shard, new_shard = map(self._geometry.data_shard_of_row, (row, new_row))
        rows = self._geometry.rows_of(shard)
        require(
            new_shard == shard,
            "new_row",
            new_row,
            f"is on data shard {new_shard}, row {row} on {shard}: pages are shared within one only",
            f"rows {rows[0]} to {rows[-1]} are on it",
        )
        held = self._ledger.lengths.is_held[new_row]
        require(not held, "new_row", new_row, "is held by a sequence", "free() it first")
        self._ledger.copies.check_written(row, pages)
        self._ledger.share(new_row, pages)
        self._ledger.lengths.hold(new_row, self._ledger.lengths.tokens[row])

    def take_copies(self) -> np.ndarray:
        """[num_sequences, 2] int32: the copies that are due, (page to read, page to write), and -1 in the other rows.

        They are the caller's to make from now on, with `copy_pages(cache, ...)` and before anything is written. At most
        one is due for each row.
        """
        made = np.full((self.num_sequences, 2), -1, np.int32)
        due = self._ledger.copies.take()
        made[: len(due)] = np.array(due, np.int32).reshape(-1, 2)
        return made

    def cache_prefix(self, row: int, token_ids: np.ndarray | Sequence[int], namespace: bytes = b"") -> int:
        """Publishes the full pages that hold the first tokens of `row`: `prefix_match` finds them. Write them before.

        They stay when the sequence ends, until their space is needed; the least recently used go first. Rows that hold
        the same tokens have pages of their own: while one of them is left, the tokens are found.

        Args:
          token_ids: [n] integers, the row's first tokens. Those that fill no whole page, or lie past the row's length,
            are left out.
          namespace: what else decides the pages' content, such as an adapter, an image's hash, a tenant or a version
            of the weights. `prefix_match` finds them under the same one only.

        Returns:
          How many tokens of the row can be found now, a multiple of page_size.

        Raises:
          ValueError: no such row, the row is free, token_ids are not integers in one dimension, or they and the
            namespace differ from those that a page of the row was cached with. Or a copy into one of the pages is
            due: `take_copies` and make it first.
        """
        self._ledger.pages_of(row)
        namespace = as_namespace(namespace)
        tokens = as_token_ids(token_ids)[: self._ledger.lengths.tokens[row]]
        return publish_prefix(self._ledger, row, tokens, namespace) * self.spec.page_size

    def forget_prefixes(self, namespace: bytes | None = None) -> int:
        """Withdraws what `cache_prefix` published under a namespace, or under any: nobody finds it any more.

        For new weights, or an adapter that is gone. Rows keep their pages and tokens; `cache_prefix` may publish them
        again. Pages that no row holds are free at once.

        Args:
          namespace: whose pages; None: all.

        Returns:
          How many pages were withdrawn.

        Raises:
          ValueError: a namespace that is no bytes.
        """
        return self._ledger.pool.forget_all(None if namespace is None else as_namespace(namespace))

    # The whole state, elsewhere.

    def moved(
        self,
        spec: CacheSpec,
        mesh: Mesh | AbstractMesh,
        *,
        num_sequences: int | None = None,
        axes: MeshAxes = MeshAxes(),
    ) -> tuple[PageAllocator, np.ndarray]:
        """A new allocator with the same sequences in the same rows, over another pool size or mesh shape.

        Pages stay shared where their rows are still on one data shard; elsewhere each shard gets a copy. Cached
        prefixes come along while they fit, the most recently used first. `resize` and `reshard` move the pages.

        Args:
          spec: as this one's but for num_pages.
          mesh, axes: where the pages will be.
          num_sequences: B there, at least this one's; default: this one's.

        Returns:
          (the new allocator, moves): moves [m, 2] int32 (page here, page there), each page there once, ascending.
          This allocator is as it was.

        Raises:
          ValueError: a spec that differs in more, sizes that do not divide over the mesh, or copies that are due:
            `take_copies` and make them first.
          OutOfPages: the sequences do not fit.
        """
        _check_same_but_for_pages(self.spec, spec)
        self._ledger.copies.check_none_due()
        rows = self.num_sequences if num_sequences is None else whole_number("num_sequences", num_sequences)
        rule = f"must be at least the {self.num_sequences} there are: rows keep their numbers"
        require(rows >= self.num_sequences, "num_sequences", rows, rule)
        new = PageAllocator(spec, mesh, rows, self.pages_per_sequence, axes=axes)
        return new, np.array(relocate(self._ledger, new._ledger), np.int32).reshape(-1, 2)

    @classmethod
    def from_state(cls, state: dict[str, Any], spec: CacheSpec) -> PageAllocator:
        """The allocator whose `to_state` gave `state`, over a mesh of the same data and context sizes.

        Raises:
          ValueError: a state that no allocator of `spec` can be in.
        """
        sizes = state_sizes(state)
        mesh = AbstractMesh((sizes["data"], sizes["context"], 1), ("data", "context", "model"))
        made = cls(spec, mesh, sizes["num_sequences"], sizes["pages_per_sequence"])
        load_state(made._ledger, state)
        return made

    def _positions(self, rows: Sequence[int], num_tokens: int) -> np.ndarray:
        """[B] int32, read-only: where the last `num_tokens` tokens of each of `rows` begin, -1 in other rows."""
        positions = np.full(self.num_sequences, -1, np.int32)
        if num_tokens and len(rows):
            positions[rows] = [self._ledger.lengths.tokens[row] - num_tokens for row in rows]
        return read_only(positions)


def _new_tokens(num_tokens: int) -> int:
    """`num_tokens` by which a row grows. Raises ValueError where it is negative or no whole number."""
    num_tokens = whole_number("num_tokens", num_tokens)
    if num_tokens < 0:
        raise bad_value("num_tokens", num_tokens, "must not be negative", "truncate() shortens a sequence")
    return num_tokens


def _check_same_but_for_pages(old: CacheSpec, new: CacheSpec) -> None:
    """Raises ValueError unless two specs differ in their number of pages alone."""
    same = dataclasses.replace(new, num_pages=old.num_pages) == old
    require(same, "spec", new, f"must be {old} but for num_pages")
