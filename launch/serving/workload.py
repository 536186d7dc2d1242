"""Requests: their lengths, as drawn from a production service's distribution; how many fit into a number of pages."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from paged_dist.kernels.quantization import is_quantized
from paged_dist.kernels.tiling import LANES, SUBLANES

MOST_TOKENS = 2**31 - 256  # of a sequence: positions are int32, and its last page, of 256 at most, is whole

ROWS_A_SHARD = 16  # rows decoded together on a data shard, where --batch is not given

# Standard-normal scores of the 5th, 50th, 90th and 99th percentile, and of the largest of 19,366 draws.
_SCORES = (-1.6449, 0.0, 1.2816, 2.3263, 3.88)
# Lengths there, in tokens, of a production conversation service over one hour: Azure public dataset,
# AzureLLMInferenceDataset2023 (CC-BY), described in Patel et al., "Splitwise", ISCA 2024.
CONTEXT_PERCENTILES = (181, 1020, 2734, 4142, 14050)
GENERATED_PERCENTILES = (41, 129, 424, 601, 1000)


class Request(NamedTuple):
    """One request: its place in arrival order, prompt tokens, and tokens to generate, both at least 1."""

    id: int
    context: int
    generated: int

    @property
    def tokens(self) -> int:
        """Tokens in the cache when the request is done."""
        return self.context + self.generated


def draw_lengths(rng: np.random.Generator, percentiles: tuple[int, ...], count: int) -> np.ndarray:
    """`count` lengths in tokens, int64, with about the given 5/50/90/99/100th percentiles.

    A log-normal whose sigma changes at the percentiles: the logarithm of the length is piecewise linear in a
    standard normal draw, so that body and tail both fit. Below the 5th percentile the first slope goes on.
    """
    logs = np.log(percentiles)
    slope = (logs[1] - logs[0]) / (_SCORES[1] - _SCORES[0])
    floor = -5.0
    scores = (floor, *_SCORES)
    logs = np.concatenate([[logs[0] + slope * (floor - _SCORES[0])], logs])
    lengths = np.exp(np.interp(rng.standard_normal(count), scores, logs))
    return np.maximum(1, np.rint(lengths)).astype(np.int64)


def draw_requests(count: int, seed: int = 0) -> list[Request]:
    """`count` requests whose lengths follow the conversation trace's percentiles; the same for the same seed."""
    context = draw_lengths(np.random.default_rng([seed, 0]), CONTEXT_PERCENTILES, count)
    generated = draw_lengths(np.random.default_rng([seed, 1]), GENERATED_PERCENTILES, count)
    return [Request(i, int(c), int(g)) for i, (c, g) in enumerate(zip(context, generated, strict=True))]


def shorten(
    requests: list[Request], scale: float = 1.0, max_context: int | None = None, max_generated: int | None = None
) -> list[Request]:
    """The same requests with lengths multiplied by `scale`, then capped; never below one token each."""

    def fit(length: int, most: int | None) -> int:
        length = max(1, round(min(length * scale, 2.0**62)))  # a float may be infinite by now
        return length if most is None else min(length, most)

    return [Request(r.id, fit(r.context, max_context), fit(r.generated, max_generated)) for r in requests]


def repeated(requests: list[Request], times: int) -> list[Request]:
    """The requests, `times` times over, with new ids for each time."""
    return [r._replace(id=r.id + i * len(requests)) for i in range(times) for r in requests]


def sequences_that_fit(requests: Sequence[Request], num_pages: int, page_size: int) -> int:
    """How many sequences fit at once into a pool of `num_pages` pages of `page_size` tokens.

    In the requests' order, and from the first one again where they end, each with the whole pages of its prompt and
    all of its answer, up to the first that no longer fits.
    """
    ends = np.cumsum([pages_needed(r.tokens, page_size) for r in requests], dtype=np.int64)
    rounds, rest = divmod(num_pages, int(ends[-1]))
    return rounds * len(requests) + int(np.searchsorted(ends, rest, side="right"))


def sequences_on_shards(requests: Sequence[Request], num_pages: int, page_size: int, shards: int) -> int:
    """How many sequences an allocator places into a pool of `num_pages` pages over `shards` data shards.

    In the requests' order, and from the first one again where they end, each with all of its pages on the data shard
    that has the most free, up to the first that finds no shard with room: what `PageAllocator.place` does. (On context
    shards a sequence's pages are spread evenly.)
    """
    needs = [pages_needed(r.tokens, page_size) for r in requests]
    there, largest = num_pages // shards, max(needs)
    # While the pool has the largest sequence's room on every shard, all are placed: those are counted, not placed one
    # by one, but for the last ones, with which the shards fill unevenly.
    count = sequences_that_fit(requests, shards * (there - 2 * largest), page_size) if there > 2 * largest else 0
    rounds, more = divmod(count, len(needs))
    left = num_pages // shards * shards - rounds * sum(needs) - sum(needs[:more])
    free = [-(left // shards) - (d < left % shards) for d in range(shards)]  # negative: the first is the most
    heapq.heapify(free)
    while free[0] + needs[count % len(needs)] <= 0:
        heapq.heapreplace(free, free[0] + needs[count % len(needs)])
        count += 1
    return count


def whole_pool(pages: int, page_size: int, dtype, shards: int = 1) -> int:
    """The smallest number of pages, at least `pages`, that a cache of `dtype` can split over `shards`.

    8-bit pages come with rows of 128 scales, and a shard's rows fill whole tiles of 8.
    """
    unit = math.lcm(SUBLANES * LANES, page_size) // page_size if is_quantized(dtype) else 1
    return -(-pages // (unit * shards)) * unit * shards


def pages_needed(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` tokens."""
    return math.ceil(tokens / page_size)
