"""Counts the bytes and DMAs that the decode kernel fetches from HBM for given lengths; for reports and tests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.tiling import LANES

_SCALE_BYTES = 4


class PageTraffic(NamedTuple):
    """DMAs out of the pools, K's and V's, and the bytes that they move."""

    count: int
    bytes: int


def page_traffic(plan: LaunchPlan, lengths, starts=None, *, unit: int | None = None) -> PageTraffic:
    """The decode kernel's copies of pages for sequences of `lengths`.

    Copies of the query and the output, a few for each sequence, are not counted.

    A page that holds a live token is copied once, whole but at the ends of its sequence: of the last page the rows up
    to the last live one, of the first those from the first live one, in units of `unit` rows. A copy is of all kv
    heads, or of 128 lanes of one where rows are wider. 8-bit pages come with the rows of 128 scales that hold theirs.
    Block sizes and cores change neither number.

    Args:
      plan: the plan of the whole call, even if it becomes several launches. Not valid if the new tokens of a sequence
        are split over launches, for each then reads the pages again.
      lengths: [B] live tokens, the new ones included; more than the table holds counts as a full table. Or [B, Q],
        where each new token's span ends.
      starts: [B] first tokens attended to, or [B, Q]; with the plan's sliding window the later of the two counts.
      unit: rows of a page that go together; None: the plan's `tile`.
    """
    first, end = live_span(plan, lengths, starts)
    first, end = first[end > first], end[end > first]
    unit_tokens = (plan.tile if unit is None else unit) * plan.tokens_per_row
    page = plan.page_size
    pages = -(-end // page) - first // page
    # Of a page that is no whole number of units the last is shorter.
    behind_end = page - np.minimum(-(-((end - 1) % page + 1) // unit_tokens) * unit_tokens, page)
    before_start = first % page // unit_tokens * unit_tokens
    tokens = (pages * page - behind_end - before_start).sum()
    pieces = 1 if plan.W == LANES else plan.Hkv * plan.W // LANES
    count, size = 2 * int(pages.sum()) * pieces, int(tokens) * _bytes_of_token(plan)
    if plan.is_quantized:
        rows = 2 * int(pages.sum()) * plan.scale_rows_per_page
        count, size = count + 2 * int(pages.sum()), size + rows * plan.Hkv * LANES * _SCALE_BYTES
    return PageTraffic(count, size)


def live_bytes(plan: LaunchPlan, lengths, starts=None) -> int:
    """Bytes of live K and V, and of their scales: the least that any kernel reads."""
    first, end = live_span(plan, lengths, starts)
    return int((end - first).sum()) * bytes_per_token(plan)


def live_span(plan: LaunchPlan, lengths, starts=None) -> tuple[np.ndarray, np.ndarray]:
    """(first live token, one past the last) of each sequence, both int64 [B]; equal where it has none.

    With several new tokens, from where the first's span begins to where the last's ends.
    """
    ends = np.clip(np.asarray(lengths, np.int64), 0, plan.S * plan.page_size)
    first_end, end = (ends[:, 0], ends[:, -1]) if ends.ndim == 2 else (np.maximum(ends - plan.Q + 1, 0), ends)
    if starts is None:
        first = np.zeros_like(end)
    else:
        starts = np.asarray(starts, np.int64)
        first = np.maximum(starts[:, 0] if starts.ndim == 2 else starts, 0)
    if plan.sliding_window is not None:
        first = np.maximum(first, first_end - plan.sliding_window)
    return np.minimum(first, end), end


def bytes_per_token(plan: LaunchPlan) -> int:
    """Bytes of one token's K and V, all local heads, scales included."""
    return _bytes_of_token(plan) + (2 * plan.Hkv * _SCALE_BYTES if plan.is_quantized else 0)


def _bytes_of_token(plan: LaunchPlan) -> int:
    return 2 * plan.Hkv * plan.D * plan.cache_dtype.itemsize
