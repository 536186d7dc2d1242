"""What a decode launch fetches from HBM: a pure function of the lengths, shared by the report and the tests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax import numpy as jnp

from paged_dist.kernels._tiling import LANES
from paged_dist.kernels.paged_attention.decode_plan import Plan


class Cost(NamedTuple):
    """Copies out of the pools, the bytes that they move, and the bytes of live K and V."""

    copies: int
    bytes_read: int
    live_bytes: int


def decode_cost(plan: Plan, lengths, starts=None) -> Cost:
    """The cost of the decode kernel for `lengths` [B] (and `starts` [B]): each page that holds a live token, once.

    A page is one copy of all heads (of each head and 128 lanes where rows are wider), and as many bytes as its live
    tiles: whole pages but at a sequence's ends.
    """
    lengths = np.minimum(np.asarray(lengths, np.int64), plan.S * plan.page_size)
    first = np.zeros_like(lengths) if starts is None else np.maximum(np.asarray(starts, np.int64), 0)
    if plan.sliding_window is not None:
        first = np.maximum(first, lengths - plan.sliding_window)
    live = np.maximum(lengths - first, 0)
    tile = plan.tile * plan.tokens_per_row
    some = live > 0
    pages = (-(-lengths // plan.page_size) - first // plan.page_size)[some].sum()
    rows = (-(-lengths // tile) - first // tile)[some].sum() * plan.tile
    row_bytes = plan.Hkv * plan.W * jnp.dtype(plan.cache_dtype).itemsize
    pieces = 1 if plan.W == LANES else plan.Hkv * plan.W // LANES
    token_bytes = row_bytes // plan.tokens_per_row
    return Cost(int(2 * pages * pieces), int(2 * rows * row_bytes), int(2 * live.sum() * token_bytes))
