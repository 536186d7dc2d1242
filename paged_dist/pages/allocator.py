"""`PageAllocator`: which sequence owns which pages. Host-side bookkeeping in NumPy, no device is touched.

The class is the public face: it checks arguments, asks another module for the decision, and has `PageLedger` carry it
out. Each decision is a module: `placement` (which shards, which row), `growth`, `copy_on_write`, `prefix_cache`;
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
from paged_dist.pages.placement import choose_row, plan_new_row
from paged_dist.pages.prefix_cache import (
    PrefixMatch,
    as_namespace,
    as_token_ids,
    check_prefix,
    find_prefix,
    publish_prefix,
)
from paged_dist.pages.relocation import relocate
from paged_dist.pages.rows import read_only
from paged_dist.pages.saved_state import load_state, state_of, state_sizes


class PageAllocator(AllocatorView):
    """Gives pages of a pool to the rows (sequences) of a batch, one instance in every process.

    Row b lives on data shard d = `b // (num_sequences / data)`. Its page i is on context shard (o + i) mod C of the C
    that the mesh has, o being that of its first page: the allocator chooses o so that all fill alike. Shard
    r = d * C + c owns the page ids `[r*n, (r+1)*n)`, n = `spec.num_pages / (data * C)`, and gives the lowest free
    one first, so a sequence's ids tend to come in runs. Processes that make the same calls in the same order get the
    same ids: nothing depends on time, Python's hashes or the host; `digest()` compares them.

    A row is free, or held by a sequence of 0 or more tokens: `allocate` takes a row, `free` gives it back. A
    call that raises changes nothing. Not thread-safe.

    Pages are shared by reference count, within one data shard: `fork` makes a second sequence of the same tokens,
    `cache_prefix` and `prefix_match` let prompts begin with the full pages of others. A row never writes into a page
    that another holds: growth gives it one of its own, and a copy falls due, for each step to make first::

        positions = pages.grow_all(rows)  # of the new tokens, -1 in rows that did not grow: those write nothing
        cache = copy_pages(cache, pages.take_copies())  # nothing where nothing was forked
        cache = append_kv(cache, key, value, positions, pages.block_tables)

    `lengths - 1` is no substitute for `positions`: in a row that is held and did not grow it is the last token's, which
    would be written over, in a page that others may hold too.

    Args:
      spec: the cache whose pages are given out.
      mesh: a `Mesh` or `AbstractMesh`; only its axis sizes matter.
      num_sequences: B, rows of the batch; a multiple of the mesh's data size.
      pages_per_sequence: columns of the block table: a row holds up to pages_per_sequence * page_size tokens.
      axes: which mesh axes are data, context and model.

    Raises:
      ValueError: sizes that are not positive or do not divide over the mesh.
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

    # What changes it.

    def place(self, num_tokens: int, prefix: PrefixMatch | None = None) -> int:
        """A free row with room for a sequence of `num_tokens` tokens: it looks, `allocate` takes the row.

        Of the data shards that have a free row and the room, the row is on the one with the most free pages; the lowest
        shard, then the lowest row, where several are alike. With a `prefix` the shard where most of it is cached and
        can be used comes first; where no such shard has a free row and the room, another one is taken without it.
        `allocate` says how many tokens are cached there.

        Raises:
          ValueError: num_tokens is negative or more than a block table holds; a prefix that is longer, or of which a
            page holds something else by now.
          OutOfPages: no shard has both a free row and the pages (`shard` is None; `free` the most there are
            beside a free row). A sequence that ends may help, unless `asked` is above `pages_per_shard`.
        """
        num_tokens = whole_number("num_tokens", num_tokens)
        count = self._ledger.pages_asked(num_tokens)
        check_prefix(self._ledger, prefix, num_tokens)
        return choose_row(self._ledger, count, prefix)

    def allocate(self, row: int, num_tokens: int, prefix: PrefixMatch | None = None) -> int:
        """Takes the free row `row` for a sequence of `num_tokens` tokens (0 allowed), gives it their pages.

        Args:
          prefix: what `prefix_match` found for the sequence's first tokens: the row begins with those of the pages
            that are on its data shard, or with none where none are, or where only other pages have the room.

        Returns:
          How many tokens the row begins with, a multiple of page_size: `write_prefill_kv(..., starts=)` goes on
          behind them. 0 without a prefix.

        Raises:
          ValueError: no such row, the row is held, num_tokens is negative or more than a block table holds; the
            prefix is longer than num_tokens, or a page of it on the row's shard holds something else by now.
          OutOfPages: the row's shard has too few pages free.
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
        """`grow(row, num_tokens)` for each of `rows` in turn, all of them or, where one is refused, none.

        Returns:
          [B] int32, read-only: the position of each row's first new token, -1 in all other rows. It is what
          `append_kv` takes, which then writes the rows that grew and no other.

        Raises:
          ValueError: as `grow`, or a row named twice. It names the row.
          OutOfPages: a shard has too few pages free for all its rows together. It names both.
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
        """A second sequence, in the free row `new_row`, of the tokens that `row` holds: it takes no page.

        All pages are shared, the last one too. The first of their holders to grow into a last page that is not full
        gets one of its own on the same shard, and `take_copies` says what to copy into it; the last one left writes in
        place. Fork after the writes of what `row` has grown by.

        Raises:
          ValueError: no such row, `row` is free, `new_row` is held, or it is on another data shard: pages are shared
            within one. Or a copy into the row's last page is due: what the row has grown by is not written yet, and a
            fork that grew would never get it.
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
        """[num_sequences, 2] int32: the copies that are due, (page to read, page to write), -1 in the rest.

        They are the caller's from now on: `copy_pages(cache, ...)` makes them, before anything is written. There is
        one at most for each row.
        """
        made = np.full((self.num_sequences, 2), -1, np.int32)
        due = self._ledger.copies.take()
        made[: len(due)] = np.array(due, np.int32).reshape(-1, 2)
        return made

    def cache_prefix(self, row: int, token_ids: np.ndarray | Sequence[int], namespace: bytes = b"") -> int:
        """Makes the full pages that hold the first tokens of `row` findable by `prefix_match`, once they are written.

        They stay so when the sequence ends, until their space is needed: the least recently used go first. Of rows
        that hold the same tokens each has its own pages; while one of them is left, the tokens are found.

        Args:
          token_ids: [n] integers, the row's first tokens; what of them fills no page, or lies past its length, is
            left out.
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

    def prefix_match(
        self, token_ids: np.ndarray | Sequence[int], data_shard: int | None = None, namespace: bytes = b""
    ) -> PrefixMatch:
        """The longest run of cached full pages that a prompt begins with; it looks, `allocate` takes them.

        Pages are found by a hash of the namespace, their tokens and all before (blake2b, 128 bits). To get logits at
        least one token must be run, so leave the prompt's last out. `allocate` says how many tokens are there::

            match = pages.prefix_match(token_ids[:-1])
            row = pages.place(len(token_ids), match)
            num_cached = pages.allocate(row, len(token_ids), match)  # 0 where only shards without them had room

        Args:
          token_ids: [n] integers, the prompt.
          data_shard: where to look; None: everywhere, the lowest of those that hold the most.
          namespace: what the pages were cached under, see `cache_prefix`.

        Returns:
          A PrefixMatch, of 0 tokens where nothing was found. It is good until the next call that changes the allocator.

        Raises:
          ValueError: token_ids are not integers in one dimension, no such data shard, or a namespace that is no bytes.
        """
        shards = range(self.num_shards) if data_shard is None else (whole_number("data_shard", data_shard),)
        rule = f"there are {self.num_shards} data shards"
        require(0 <= shards[0] < self.num_shards, "data_shard", data_shard, rule)
        tokens, namespace = as_token_ids(token_ids)[: self.max_tokens], as_namespace(namespace)
        return find_prefix(self._ledger, tokens, namespace, shards)

    def forget_prefixes(self, namespace: bytes | None = None) -> int:
        """Makes what `cache_prefix` published under a namespace, or under any, not findable any more.

        For new weights, or an adapter that went. Rows keep their pages and tokens; `cache_prefix` may publish them
        anew. Pages that no row holds are free at once.

        Args:
          namespace: whose pages; None: all.

        Returns:
          How many pages it was.

        Raises:
          ValueError: a namespace that is no bytes.
        """
        return self._ledger.pool.forget_all(None if namespace is None else as_namespace(namespace))

    # Elsewhere.

    def moved(
        self,
        spec: CacheSpec,
        mesh: Mesh | AbstractMesh,
        *,
        num_sequences: int | None = None,
        axes: MeshAxes = MeshAxes(),
    ) -> tuple[PageAllocator, np.ndarray]:
        """The same sequences, in the same rows, in the pages of another pool size or mesh shape.

        Pages stay shared where their rows are on one data shard still, and are doubled where not. Cached prefixes come
        along while they fit, the most recently used first.

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

    def to_state(self) -> dict[str, Any]:
        """The sequences and cached prefixes as numbers, strings and lists: what JSON can hold. See `from_state`.

        Raises:
          ValueError: copies are due, see `take_copies`.
        """
        return state_of(self._ledger)

    @classmethod
    def from_state(cls, state: dict[str, Any], spec: CacheSpec) -> PageAllocator:
        """The allocator that `to_state` told of, over a mesh of the same data and context sizes.

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
