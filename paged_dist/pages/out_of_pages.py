"""Whether the shards have the pages that a call needs, and the error where one has not."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from paged_dist.pages.ledger import PageLedger


class OutOfPages(RuntimeError):
    """A call of `PageAllocator` needed more pages than a shard has free. The allocator is as it was before the call.

    Attributes:
      asked: pages the call needed of that shard.
      free: pages free on it; for `place`, the most on any data shard that has a free row (0: none has).
      shard: the data shard that ran out; None where `place` looked at all of them.
      context_shard: which of its context shards ran out; None where there is one only.
      rows: the rows of that data shard that needed pages; empty where `place` looked for a row.

    Example:
      >>> spec = pd.CacheSpec(num_kv_heads=8, head_dim=128, num_pages=2)
      >>> pages = pd.PageAllocator(spec, pd.make_pod_mesh(model=8), num_sequences=2, pages_per_sequence=4)
      >>> _ = pages.allocate(0, 256)
      >>> try:
      ...     pages.grow_all([0])
      ... except pd.OutOfPages as error:  # a scheduler would end or preempt a row of that shard
      ...     print(error, error.rows, error.shard)
      row 0 on data shard 0: 1 more pages needed, 0 of its 2 are free (0,) 0
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


def lacking_shard(ledger: PageLedger, asked: Mapping[int, int]) -> tuple[int, int] | None:
    """(shard, pages asked of it) of the first shard that has fewer pages than are `asked` of it; None: none has.

    Args:
      asked: how many pages each shard is asked for.
    """
    return next(((r, n) for r, n in sorted(asked.items()) if n > ledger.pool.available(r)), None)


def check_room(ledger: PageLedger, asked: Mapping[int, int], rows: Sequence[int]) -> None:
    """Raises OutOfPages where a shard has fewer pages than `rows` together ask of it."""
    lacks = lacking_shard(ledger, asked)
    if lacks is not None:
        raise out_of_pages(ledger, *lacks, rows)


def out_of_pages(ledger: PageLedger, shard: int, asked: int, rows: Sequence[int]) -> OutOfPages:
    """The error of `rows` that together ask `asked` pages of `shard`, which has fewer."""
    geometry, free = ledger.geometry, ledger.pool.available(shard)
    data_shard, context_shard = divmod(shard, geometry.context)
    mine = [row for row in rows if geometry.data_shard_of_row(row) == data_shard]
    who = f"row{'s' if len(mine) > 1 else ''} {', '.join(map(str, mine[:8]))}{', ...' if len(mine) > 8 else ''}"
    several = geometry.context > 1
    where = f"{who} on data shard {data_shard}" + (f", context shard {context_shard}" if several else "")
    return OutOfPages(
        f"{where}: {asked} more pages needed, {free} of its {geometry.pages_per_context_shard} are free",
        asked=asked,
        free=free,
        shard=data_shard,
        context_shard=context_shard if several else None,
        rows=mine,
    )
