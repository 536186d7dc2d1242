"""Which sequence owns which pages: host-side bookkeeping in NumPy, no device is touched."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from paged_dist._errors import bad_value, require, whole_number
from paged_dist.cache import CacheSpec
from paged_dist.mesh import MeshAxes
from paged_dist.pages.page_pool import Entry, Pages, digests
from paged_dist.pages.prefix_cache import PrefixMatch, as_namespace, as_token_ids, find_prefix
from paged_dist.pages.snapshots import load_state, move_prefixes, move_rows


class OutOfPages(RuntimeError):
    """A call asked for more pages than its shard has free. The allocator is as it was before the call.

    Attributes:
      asked: pages the call needed of that shard.
      free: pages free on it; for `place`, the most on any data shard that has a free row (0: none has).
      shard: the data shard that ran out; None where `place` looked at all of them.
      context_shard: which of its context shards ran out; None where there is one only.
      rows: the rows of that data shard that needed pages; empty where `place` looked for a row.
    """

    def __init__(
        self,
        message: str,
        *,
        asked: int,
        free: int,
        shard: int | None,
        context_shard: int | None = None,
        rows: Sequence[int] = (),
    ):
        super().__init__(message)
        self.asked, self.free, self.shard, self.context_shard = asked, free, shard, context_shard
        self.rows = tuple(rows)

    def __reduce__(self):  # keyword-only fields would be lost when a worker process sends it home
        told = dict(asked=self.asked, free=self.free, shard=self.shard, context_shard=self.context_shard)
        return functools.partial(OutOfPages, **told, rows=self.rows), (str(self),)


class _RowPlan(NamedTuple):
    """How a new row gets its pages.

    Attributes:
      shared: cached pages that it begins with.
      shards: of the pages behind them.
      lacks: the first of those shards that has not enough, and what is asked of it; None where all have.
    """

    shared: tuple[int, ...]
    shards: Sequence[int]
    lacks: tuple[int, int] | None


class PageAllocator:
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
        spec.check_mesh(mesh, axes)
        data, context = axes.size(mesh, "data"), axes.size(mesh, "context")
        num_sequences = whole_number("num_sequences", num_sequences)
        pages_per_sequence = whole_number("pages_per_sequence", pages_per_sequence)
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
        self.num_context_shards = context
        self.rows_per_shard = self.num_sequences // data
        self.pages_per_shard = spec.num_pages // data  # on all its context shards
        self._page_size = spec.page_size
        # Python lists, not arrays: `grow` reads and writes one element, ten times cheaper than through NumPy.
        self._lengths = [0] * self.num_sequences
        self._row_pages: list[list[int] | None] = [None] * self.num_sequences  # None: the row is free
        self._pages = Pages(data, context, spec.num_pages // (data * context))
        self._copies: dict[int, int] = {}  # due: page to write -> page to read
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
        """Pages that sequences hold, over all shards; one that several hold counts once."""
        return self.spec.num_pages - self.free_pages()

    def free_pages(self, shard: int | None = None, context_shard: int | None = None) -> int:
        """Free pages of data shard `shard`, or of all; of one context shard there, or of all. Those that are only
        kept as cached prefixes count: they go when no other is left."""
        data, context = self.num_shards, self.num_context_shards
        for name, value in (("shard", shard), ("context_shard", context_shard)):
            if value is not None:
                whole_number(name, value)
        require(shard is None or 0 <= shard < data, "shard", shard, f"there are {data} data shards")
        rule = f"there are {context} context shards"
        require(context_shard is None or 0 <= context_shard < context, "context_shard", context_shard, rule)
        return sum(
            self._pages.available(d * context + c)
            for d in (range(data) if shard is None else (shard,))
            for c in (range(context) if context_shard is None else (context_shard,))
        )

    @property
    def live_pages(self) -> np.ndarray:
        """[m] int32, ascending: pages with content that a sequence holds or a prompt may begin with."""
        held = {page for pages in self._row_pages if pages for page in pages}
        return np.array(sorted(held | set(self._pages.cached())), np.int32)

    def shard_of(self, row: int) -> int:
        """The data shard on which `row` lives."""
        self._check_row(row)
        return row // self.rows_per_shard

    def is_held(self, row: int) -> bool:
        """Whether a sequence has `row`, be it empty."""
        self._check_row(row)
        return self._row_pages[row] is not None

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take."""
        return -(-num_tokens // self._page_size)

    def digest(self) -> str:
        """SHA-256 (hex) of the whole state: spec, geometry, rows held, lengths, block tables, free and cached pages.

        Equal on processes that made the same calls. Two states with the same digest answer every later call
        alike; how they were reached does not enter (an `allocate` that was freed again leaves no mark).
        """
        h = hashlib.sha256()
        geometry = self.num_sequences, self.pages_per_sequence, self.num_shards, self.num_context_shards
        h.update(repr((self.spec, *geometry)).encode())
        h.update(bytes(p is not None for p in self._row_pages))
        h.update(np.asarray(self._lengths, "<i4").tobytes())
        h.update(self._table.astype("<i4", copy=False).tobytes())
        h.update(np.asarray(sorted(self._copies.items()), "<i4").tobytes())
        self._pages.update(h)
        return h.hexdigest()

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
        asked = self._pages_asked(num_tokens)
        self._check_prefix(prefix, num_tokens)
        best, score, most = None, None, -1
        for shard in range(self.num_shards):
            rows = range(shard * self.rows_per_shard, (shard + 1) * self.rows_per_shard)
            row = next((r for r in rows if self._row_pages[r] is None), None)
            if row is None:
                continue
            free = self.free_pages(shard)
            most = max(most, free)
            plan = self._plan_row(shard, asked, prefix)
            if plan.lacks is None and (score is None or (len(plan.shared), free) > score):
                best, score = row, (len(plan.shared), free)
        if most < 0:
            raise OutOfPages(f"no free row: all {self.num_sequences} are held", asked=asked, free=0, shard=None)
        if best is None:
            ever, turns = self.pages_per_shard, self.num_context_shards
            in_turn = f" in turn on its {turns} context shards" if turns > 1 else ""
            raise OutOfPages(
                f"no data shard with a free row has {asked} pages free{in_turn}, the most is {most}"
                + (f"; none ever will: a shard owns {ever}" if asked > ever else ""),
                asked=asked,
                free=most,
                shard=None,
            )
        return best

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
        self._check_row(row)
        if self._row_pages[row] is not None:
            raise bad_value(
                "row",
                row,
                f"is held by a sequence of {self._lengths[row]} tokens",
                "free() it first, or let place() find a free row",
            )
        count, shard = self._pages_asked(num_tokens), row // self.rows_per_shard
        self._check_prefix(prefix, num_tokens, shard)
        plan = self._plan_row(shard, count, prefix)
        if plan.lacks is not None:
            raise self._out_of_pages(*plan.lacks, [row])
        for page in plan.shared:
            self._pages.hold(page)
        self._row_pages[row] = list(plan.shared)
        self._table[row, : len(plan.shared)] = plan.shared
        self._table_out = None
        self._give(row, plan.shards)
        self._set_length(row, num_tokens)
        return len(plan.shared) * self._page_size

    def grow(self, row: int, num_tokens: int = 1) -> int:
        """Adds `num_tokens` tokens to the sequence in `row`, and the pages they need.

        Returns:
          The position of the first of them, for `append_kv`; -1 where num_tokens is 0.

        Raises:
          ValueError: no such row, the row is free, num_tokens is negative, or the sum is more than a block
            table holds.
          OutOfPages: the row's shard has too few pages free.
        """
        num_tokens = whole_number("num_tokens", num_tokens)
        pages = self._held(row)
        if num_tokens < 0:
            raise bad_value("num_tokens", num_tokens, "must not be negative", "truncate() shortens a sequence")
        start = self._lengths[row]
        if self._changes_pages(pages, start, start + num_tokens):
            self._grow((row,), num_tokens)
        self._set_length(row, start + num_tokens)
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
        num_tokens = whole_number("num_tokens", num_tokens)
        if num_tokens < 0:
            raise bad_value("num_tokens", num_tokens, "must not be negative", "truncate() shortens a sequence")
        rows = list(rows)
        lengths, changes = self._lengths, self._changes_pages
        needy = [row for row in rows if changes(self._held(row), lengths[row], lengths[row] + num_tokens)]
        if len(set(rows)) != len(rows):
            twice = next(row for row, count in collections.Counter(rows).items() if count > 1)
            raise bad_value("rows", rows, f"names row {twice} twice")
        self._grow(needy, num_tokens)
        for row in rows:
            lengths[row] += num_tokens
        if rows:
            self._lengths_out = None
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
            self._held(row)
            rule = f"must be at most the {self._lengths[row]} tokens of row {row}"
            require(num_tokens <= self._lengths[row], "num_tokens", num_tokens, rule)
        return self._positions(rows, num_tokens)

    def truncate(self, row: int, num_tokens: int) -> None:
        """Shortens the sequence in `row` to its first `num_tokens` tokens; pages wholly past them are freed.

        At 0 the row stays held, by an empty sequence.

        Raises:
          ValueError: no such row, the row is free, or num_tokens is not between 0 and its length.
        """
        num_tokens = whole_number("num_tokens", num_tokens)
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
        """Ends the sequence in `row`: the row becomes free, and its pages where nobody else holds them.

        Raises:
          ValueError: no such row, or the row is free already.
        """
        self._take_back(row, self._held(row), 0)
        self._row_pages[row] = None
        self._set_length(row, 0)

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
        pages = self._held(row)
        self._check_row(new_row)
        shard, rows = row // self.rows_per_shard, self.rows_per_shard
        require(
            new_row // rows == shard,
            "new_row",
            new_row,
            f"is on data shard {new_row // rows}, row {row} on {shard}: pages are shared within one only",
            f"rows {shard * rows} to {(shard + 1) * rows - 1} are on it",
        )
        held = self._row_pages[new_row] is not None
        require(not held, "new_row", new_row, "is held by a sequence", "free() it first")
        self._check_copied(row, pages)
        for page in pages:
            self._pages.hold(page)
        self._row_pages[new_row] = list(pages)
        self._table[new_row] = self._table[row]
        self._table_out = None
        self._set_length(new_row, self._lengths[row])

    def take_copies(self) -> np.ndarray:
        """[num_sequences, 2] int32: the copies that are due, (page to read, page to write), -1 in the rest.

        They are the caller's from now on: `copy_pages(cache, ...)` makes them, before anything is written. There is
        one at most for each row.
        """
        made = np.full((self.num_sequences, 2), -1, np.int32)
        for i, (to, page) in enumerate(sorted(self._copies.items())):
            made[i] = page, to
            self._pages.unpin(page)
        self._copies.clear()
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
        pages, namespace = self._held(row), as_namespace(namespace)
        tokens = as_token_ids(token_ids)[: self._lengths[row]]
        first = self._pages.shard_of(pages[0]) % self.num_context_shards if pages else 0
        entries, parent = [], b""
        for i, digest in enumerate(digests(tokens, self._page_size, namespace)):
            known = self._pages.entry(pages[i])
            entries.append(Entry(first, i, digest, parent, namespace))
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
                f"[..., {', '.join(map(str, tokens[i * self._page_size :][:4]))}, ...]",
                f"differ, from token {i * self._page_size} on, from those that page {pages[i]} was cached with",
            )
            parent = digest
        self._check_copied(row, pages[: len(entries)])
        for page, entry in zip(pages, entries, strict=False):
            self._pages.remember(page, entry)
        return len(entries) * self._page_size

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
        return find_prefix(self._pages, tokens, self._page_size, namespace, shards)

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
        return self._pages.forget_all(None if namespace is None else as_namespace(namespace))

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
        _check_same(self.spec, spec)
        require(
            not self._copies, "copies due", len(self._copies), "must be made first", "copy_pages(..., take_copies())"
        )
        rows = self.num_sequences if num_sequences is None else whole_number("num_sequences", num_sequences)
        rule = f"must be at least the {self.num_sequences} there are: rows keep their numbers"
        require(rows >= self.num_sequences, "num_sequences", rows, rule)
        new = PageAllocator(spec, mesh, rows, self.pages_per_sequence, axes=axes)
        came_from: dict[int, int] = {}  # page there -> page here
        move_rows(self, new, came_from)
        move_prefixes(self, new, came_from)
        moves = [(page, to) for to, page in sorted(came_from.items())]
        return new, np.array(moves, np.int32).reshape(-1, 2)

    def to_state(self) -> dict:
        """The sequences and cached prefixes as numbers, strings and lists: what JSON can hold. See `from_state`.

        Raises:
          ValueError: copies are due, see `take_copies`.
        """
        require(
            not self._copies, "copies due", len(self._copies), "must be made first", "copy_pages(..., take_copies())"
        )
        held = zip(self._lengths, self._row_pages, strict=True)
        return {
            "num_sequences": self.num_sequences,
            "pages_per_sequence": self.pages_per_sequence,
            "data": self.num_shards,
            "context": self.num_context_shards,
            "rows": [None if pages is None else [length, list(pages)] for length, pages in held],
            "known": [
                [page, e.first, e.index, e.digest.hex(), e.parent.hex(), e.namespace.hex()]
                for page, e in self._pages.entries()
            ],
            "cached": self._pages.cached(),
        }

    @classmethod
    def from_state(cls, state: dict, spec: CacheSpec) -> PageAllocator:
        """The allocator that `to_state` told of, over a mesh of the same data and context sizes.

        Raises:
          ValueError: a state that no allocator of `spec` can be in.
        """
        return load_state(cls, state, spec)

    # How.

    def _check_row(self, row: int) -> None:
        whole_number("row", row)
        if not 0 <= row < self.num_sequences:  # a negative index would silently be another row
            raise bad_value("row", row, f"must be between 0 and {self.num_sequences - 1}")

    def _held(self, row: int) -> list[int]:
        """The pages of the sequence in `row`, which must be held."""
        self._check_row(row)
        pages = self._row_pages[row]
        if pages is None:
            raise bad_value("row", row, "is free, no sequence has it", "allocate() it first")
        return pages

    def _pages_asked(self, num_tokens: int, grown: int | None = None) -> int:
        """The pages of `num_tokens` tokens more than the row `grown` has, or in all; they must fit in a block table."""
        there = 0 if grown is None else self._lengths[grown]
        if not 0 <= num_tokens + there <= self.max_tokens:
            with_those = "" if grown is None else f" with the {there} there already in row {grown}"
            raise bad_value(
                "num_tokens",
                num_tokens,
                f"must be between 0 and {self.max_tokens}{with_those}: pages_per_sequence "
                f"{self.pages_per_sequence} x page_size {self._page_size}",
                None if grown is None else f"at most {self.max_tokens - there} for row {grown}",
            )
        return self.pages_for(num_tokens + there)

    def _check_prefix(self, prefix: PrefixMatch | None, num_tokens: int, shard: int | None = None) -> None:
        """Raises ValueError for a prefix that does not fit, or is out of date on `shard` (None: on any)."""
        if prefix is None:
            return
        require(
            prefix.num_tokens <= num_tokens, "prefix", prefix, f"must not be longer than the {num_tokens} tokens asked"
        )
        require(
            all(chain.is_current(self._pages) for chain in prefix.chains(shard)),
            "prefix",
            prefix,
            "is out of date: a page of it holds something else now",
            "prefix_match() again",
        )

    def _check_copied(self, row: int, pages: Sequence[int]) -> None:
        """Raises ValueError where a copy into one of the row's `pages` is due: nothing was written into it yet."""
        due = next((page for page in pages if page in self._copies), None)
        works = "make them, and write what the row has grown by"
        require(due is None, "row", row, f"copies are due first: take_copies(), one into page {due} of the row", works)

    def _next_shards(
        self, row: int, pages: Sequence[int], count: int, asked: collections.Counter[int]
    ) -> list[int] | None:
        """The shards of the next `count` pages of a row that holds `pages`, added to `asked`.

        Where it holds none, the first is that which leaves the shards' free pages the most even, each row's next page
        counted as half taken (counted not at all or whole, they were less even over a request trace).
        """
        C, base = self.num_context_shards, row // self.rows_per_shard * self.num_context_shards
        if count == 0:
            return []
        if pages:
            first = self._pages.shard_of(pages[0]) + len(pages)
        elif C == 1:
            first = base
        else:
            free = [self._pages.available(r) - asked[r] for r in range(base, base + C)]
            due = [0] * C
            start = row // self.rows_per_shard * self.rows_per_shard
            for other in self._row_pages[start : start + self.rows_per_shard]:
                if other:
                    due[(self._pages.shard_of(other[0]) + len(other) - base) % C] += 1

            def evenness(o: int) -> tuple[bool, int]:
                left = [free[(o + i) % C] - len(range(i, count, C)) for i in range(C)]
                if min(left) < 0:
                    return False, min(left)
                soon = [2 * x - due[(o + i) % C] - (i == count % C) for i, x in enumerate(left)]
                return True, sum(soon) ** 2 - C * sum(x * x for x in soon)  # minus C^2 times their variance

            first = base + max(range(C), key=evenness)
        shards = [base + (first - base + i) % C for i in range(count)]
        asked.update(shards)
        return shards

    def _plan_row(self, shard: int, count: int, prefix: PrefixMatch | None) -> _RowPlan:
        """How a new row of a data shard gets its `count` pages: with the most cached pages that leave it room."""
        first: _RowPlan | None = None
        for shared in (*(chain.pages for chain in (prefix.chains(shard) if prefix is not None else ())), ()):
            asked = collections.Counter(self._pages.shard_of(page) for page in shared if self._pages.is_cached(page))
            shards = self._next_shards(shard * self.rows_per_shard, shared, count - len(shared), asked)
            plan = _RowPlan(shared, shards, self._lacking(asked))
            if plan.lacks is None:
                return plan
            first = first or plan
        return first

    def _lacking(self, asked: collections.Counter[int]) -> tuple[int, int] | None:
        """(shard, pages asked of it) of the first shard that has not what is `asked` of it; None where all have."""
        return next(((r, n) for r, n in sorted(asked.items()) if n > self._pages.available(r)), None)

    def _out_of_pages(self, r: int, count: int, rows: Sequence[int]) -> OutOfPages:
        """The error of `rows` that together ask `count` pages of shard r."""
        free, (shard, context_shard) = self._pages.available(r), divmod(r, self.num_context_shards)
        mine = [row for row in rows if row // self.rows_per_shard == shard]
        who = f"row{'s' if len(mine) > 1 else ''} {', '.join(map(str, mine[:8]))}{', ...' if len(mine) > 8 else ''}"
        several = self.num_context_shards > 1
        where = f"{who} on data shard {shard}" + (f", context shard {context_shard}" if several else "")
        return OutOfPages(
            f"{where}: {count} more pages needed, {free} of its {self._pages.per_shard} are free",
            asked=count,
            free=free,
            shard=shard,
            context_shard=context_shard if several else None,
            rows=mine,
        )

    def _check_room(self, asked: collections.Counter[int], rows: Sequence[int]) -> None:
        """Raises OutOfPages where a shard has not what `rows` ask of it."""
        lacks = self._lacking(asked)
        if lacks is not None:
            raise self._out_of_pages(*lacks, rows)

    def _changes_pages(self, pages: list[int], old: int, new: int) -> bool:
        """Whether growth from `old` to `new` tokens takes a page, or writes into one that is not the row's alone."""
        if new > len(pages) * self._page_size:
            return True
        return new > old and old % self._page_size != 0 and not self._pages.may_write(pages[-1])

    def _grow(self, rows: Sequence[int], num_tokens: int) -> None:
        """Gives each of `rows` the pages for `num_tokens` more tokens, of which there is one at least."""
        asked: collections.Counter[int] = collections.Counter()
        holders: dict[int, int] = {}  # of last pages, as rows before leave them
        plan: list[tuple[int, bool, list[int]]] = []
        for row in rows:
            pages, old = self._row_pages[row], self._lengths[row]
            count = self._pages_asked(num_tokens, row) - len(pages)
            is_shared = False
            if old % self._page_size:
                end = pages[-1]
                held = holders.get(end, self._pages.holders[end])
                is_shared = held > 1
                if is_shared:
                    holders[end] = held - 1
                    asked[self._pages.shard_of(end)] += 1
            plan.append((row, is_shared, self._next_shards(row, pages, count, asked)))
        self._check_room(asked, rows)
        for row, is_shared, shards in plan:
            if self._lengths[row] % self._page_size:
                if is_shared:
                    self._copy_end(row)
                else:
                    self._pages.forget(self._row_pages[row][-1])
            self._give(row, shards)

    def _copy_end(self, row: int) -> None:
        """Gives the row a last page of its own, on the same shard, and notes the copy."""
        pages = self._row_pages[row]
        end = pages[-1]
        page = self._pages.take(self._pages.shard_of(end))
        self._pages.pin(end)
        self._copies[page] = end  # whose own copy is made: `fork` shares no page that one is due into
        pages[-1] = self._table[row, len(pages) - 1] = page
        self._table_out = None
        self._pages.release(end)

    def _give(self, row: int, shards: Sequence[int]) -> None:
        """Appends a page of each of `shards`; there must be as many."""
        if not shards:
            return
        pages = self._row_pages[row]
        start = len(pages)
        pages.extend(map(self._pages.take, shards))
        self._table[row, start : len(pages)] = pages[start:]
        self._table_out = None

    def _take_back(self, row: int, pages: list[int], keep: int) -> None:
        """Lets go of all but the first `keep` of the row's pages."""
        if len(pages) == keep:
            return
        for page in reversed(pages[keep:]):  # of a prompt that stays cached, the end goes before what leads to it
            self._pages.release(page)
            if not self._pages.holders[page] and page in self._copies:
                self._pages.unpin(self._copies.pop(page))
        self._table[row, keep : len(pages)] = -1
        del pages[keep:]
        self._table_out = None

    def _positions(self, rows: Sequence[int], num_tokens: int) -> np.ndarray:
        positions = np.full(self.num_sequences, -1, np.int32)
        if num_tokens and len(rows):
            positions[rows] = [self._lengths[row] - num_tokens for row in rows]
        positions.flags.writeable = False
        return positions

    def _set_length(self, row: int, length: int) -> None:
        if self._lengths[row] != length:
            self._lengths[row] = length
            self._lengths_out = None


def _check_same(old: CacheSpec, new: CacheSpec) -> None:
    """Raises ValueError unless two specs differ in their number of pages alone."""
    same = dataclasses.replace(new, num_pages=old.num_pages) == old
    require(same, "spec", new, f"must be {old} but for num_pages")
