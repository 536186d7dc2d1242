"""Placement: which shards the next pages of a row come from, and which row a new sequence takes."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple

from paged_dist.pages.ledger import PageLedger
from paged_dist.pages.out_of_pages import OutOfPages, lacking_shard
from paged_dist.pages.prefix_cache import PrefixMatch


def next_shards(
    ledger: PageLedger, row: int, pages: Sequence[int], count: int, asked: collections.Counter[int]
) -> list[int]:
    """The shards of the next `count` pages of a row that holds `pages`. They are added to `asked`.

    A row that holds pages goes on in turn over the context shards. Where it holds none, its pages begin on the context
    shard that `_evenest_start` chooses.

    Args:
      asked: how many pages each shard is asked for already, by the same call.
    """
    if count == 0:
        return []
    geometry, data_shard = ledger.geometry, ledger.geometry.data_shard_of_row(row)
    first = geometry.first_context_shard(pages) if pages else _evenest_start(ledger, data_shard, count, asked)
    shards = geometry.shards_in_turn(data_shard, first, len(pages), len(pages) + count)
    asked.update(shards)
    return shards


def _evenest_start(ledger: PageLedger, data_shard: int, count: int, asked: collections.Counter[int]) -> int:
    """The context shard for page 0 of a new row with `count` pages that leaves the free pages most even over shards.

    Each row's next page counts as half taken. (Counted not at all or whole, the shards were less even over a request
    trace.)
    """
    geometry = ledger.geometry
    C, base = geometry.context, data_shard * geometry.context
    if C == 1:
        return 0
    free = [ledger.pool.available(r) - asked[r] for r in geometry.shards_of(data_shard)]
    due = [0] * C
    for row in geometry.rows_of(data_shard):
        pages = ledger.row_pages.pages[row]
        if pages:
            due[geometry.shard_in_turn(data_shard, geometry.first_context_shard(pages), len(pages)) - base] += 1

    def evenness(first: int) -> tuple[bool, int]:
        left = [free[(first + i) % C] - len(range(i, count, C)) for i in range(C)]
        if min(left) < 0:
            return False, min(left)
        soon = [2 * x - due[(first + i) % C] - (i == count % C) for i, x in enumerate(left)]
        return True, sum(soon) ** 2 - C * sum(x * x for x in soon)  # minus C^2 times their variance

    return max(range(C), key=evenness)


class NewRowPlan(NamedTuple):
    """The pages of a new row, none of them taken yet.

    Attributes:
      shared: cached pages that it begins with.
      shards: the shards of the pages behind them.
      lacks: (shard, pages asked of it) of the first shard that has too few; None where all have enough.
    """

    shared: tuple[int, ...]
    shards: list[int]
    lacks: tuple[int, int] | None


def plan_new_row(ledger: PageLedger, data_shard: int, count: int, prefix: PrefixMatch | None) -> NewRowPlan:
    """How a new row of a data shard gets its `count` pages: with the most cached pages of `prefix` that leave it room.

    Where no choice leaves it room, the plan is that of the longest chain of cached pages.
    """
    geometry, pool = ledger.geometry, ledger.pool
    chains = [chain.pages for chain in prefix.chains(data_shard)] if prefix is not None else []
    plans = []
    for shared in (*chains, ()):
        asked = collections.Counter(geometry.shard_of_page(page) for page in shared if pool.is_cached(page))
        row = geometry.rows_of(data_shard)[0]
        shards = next_shards(ledger, row, shared, count - len(shared), asked)
        plan = NewRowPlan(shared, shards, lacking_shard(ledger, asked))
        if plan.lacks is None:
            return plan
        plans.append(plan)
    return plans[0]


def choose_row(ledger: PageLedger, count: int, prefix: PrefixMatch | None) -> int:
    """The free row for a new sequence of `count` pages; see `PageAllocator.place` for the order of preference.

    Raises:
      OutOfPages: no shard has both a free row and the pages.
    """
    geometry = ledger.geometry
    best, best_score, most_free = None, (-1, -1), -1
    for data_shard in range(geometry.data):
        row = next((row for row in geometry.rows_of(data_shard) if not ledger.lengths.is_held[row]), None)
        if row is None:
            continue
        free = sum(map(ledger.pool.available, geometry.shards_of(data_shard)))
        most_free = max(most_free, free)
        plan = plan_new_row(ledger, data_shard, count, prefix)
        score = len(plan.shared), free
        if plan.lacks is None and score > best_score:
            best, best_score = row, score
    if best is not None:
        return best
    if most_free < 0:
        raise OutOfPages(f"no free row: all {geometry.num_sequences} are held", asked=count, free=0, shard=None)
    ever = geometry.pages_per_context_shard * geometry.context
    in_turn = f" in turn on its {geometry.context} context shards" if geometry.context > 1 else ""
    raise OutOfPages(
        f"no data shard with a free row has {count} pages free{in_turn}, the most is {most_free}"
        + (f"; none ever will: a shard owns {ever}" if count > ever else ""),
        asked=count,
        free=most_free,
        shard=None,
    )
