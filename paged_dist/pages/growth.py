"""Growth of rows: first the plan, which takes nothing and may be refused, then the pages."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple

from paged_dist.pages.ledger import PageLedger
from paged_dist.pages.out_of_pages import check_room
from paged_dist.pages.page_placement import next_shards


def changes_pages(ledger: PageLedger, row: int, num_tokens: int) -> bool:
    """Whether `num_tokens` more tokens take a page for the row, or go into one that others hold or may find.

    Most steps of a decode loop change none: the row's length is all there is to do.
    """
    old = ledger.lengths.tokens[row]
    if old + num_tokens > len(ledger.row_pages.pages[row]) * ledger.geometry.page_size:
        return True
    return num_tokens > 0 and ledger.copies.writes_into_shared_or_findable_page(row, old)


class GrowthPlan(NamedTuple):
    """The pages of rows that grow, none of them taken yet.

    Attributes:
      shards: for each row, in turn, the shards of its new pages.
      copies: the rows that first get a last page of their own.
    """

    shards: dict[int, list[int]]
    copies: frozenset[int]


def plan_growth(ledger: PageLedger, rows: Sequence[int], num_tokens: int) -> GrowthPlan:
    """The pages for `num_tokens` more tokens, at least one, in each of `rows`.

    Raises:
      ValueError: a row would be longer than a block table holds.
      OutOfPages: a shard has too few pages for all rows together.
    """
    asked: collections.Counter[int] = collections.Counter()
    copies = ledger.copies.rows_to_copy(rows, ledger.lengths.tokens)
    shards: dict[int, list[int]] = {}
    for row in rows:
        pages = ledger.row_pages.pages[row]
        count = ledger.pages_asked(num_tokens, row) - len(pages)
        if row in copies:
            asked[ledger.geometry.shard_of_page(pages[-1])] += 1
        shards[row] = next_shards(ledger, row, pages, count, asked)
    check_room(ledger, asked, rows)
    return GrowthPlan(shards, copies)


def give_planned_pages(ledger: PageLedger, plan: GrowthPlan) -> None:
    """Gives rows the pages of a plan that was made just before. Their lengths stay as they are."""
    for row, shards in plan.shards.items():
        if row in plan.copies:
            ledger.copies.give_own_last_page(row)
        elif ledger.lengths.tokens[row] % ledger.geometry.page_size:
            ledger.pool.forget(ledger.row_pages.pages[row][-1])  # it is written into: its content is another then
        ledger.give(row, shards)
