"""Continuous batching on the host: which request is in which row, step by step.

Every process runs this loop on the same requests and gets the same steps, so that nothing is broadcast. It needs no
device and no result of one, so that a step is scheduled while the step before it runs.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import deque

import numpy as np

from paged_dist._errors import bad_value
from paged_dist.launch.serving.workload import Request, pages_needed, whole_pool


@dataclasses.dataclass(frozen=True)
class Check:
    """One output to compare with the oracle's: in one layer, of a request that has `length` tokens by then."""

    request: int
    length: int
    layer: int
    data_shard: int


@dataclasses.dataclass(frozen=True)
class ScheduledStep:
    """One decode step: what its programs take, and what is counted about it. Its arrays are never changed afterwards.

    Attributes:
      chunks: int32 [n, 4] prompt chunks to write before the step: request id, row, first and last + 1 position.
      rows: int32 [B, 3]: request id, position to append (-1 idle), live tokens after that (0 idle).
      block_tables: int32 [B, S] where it changed since the last step, else None.
      pick: int32 [data, 2], for each data shard, the local row and the layer whose output is shown.
      checks: the shown outputs that are to be checked.
      pages: pages in use.
      admitted, finished: requests that entered before the step and those done after it.
    """

    chunks: np.ndarray
    rows: np.ndarray
    block_tables: np.ndarray | None
    pick: np.ndarray
    checks: tuple[Check, ...]
    pages: int
    admitted: int
    finished: int

    @property
    def live_rows(self) -> int:
        """Rows that decode a token in this step."""
        return int(np.count_nonzero(self.rows[:, 2]))


@dataclasses.dataclass(frozen=True)
class Pool:
    """The rows and pages to schedule requests over.

    B rows, split over `data` shards; each data shard has `context` context shards of `pages_per_shard` pages.
    """

    batch: int
    data: int
    context: int
    pages_per_shard: int
    page_size: int

    def pages_on_each_chip(self, tokens: int) -> int:
        """The most pages that a sequence of `tokens` takes on one context shard."""
        return pages_needed(pages_needed(tokens, self.page_size), self.context)

    def check_fits(self, requests: list[Request], dtype="bfloat16") -> None:
        """Raises ValueError where a request does not fit even alone, with the pages that a cache of `dtype` needs."""
        largest = max(requests, key=lambda r: r.tokens)
        need = self.pages_on_each_chip(largest.tokens)
        if need > self.pages_per_shard:
            shards = self.data * self.context
            raise bad_value(
                "num_pages",
                self.pages_per_shard * shards,
                f"{self.pages_per_shard} pages a shard, but request {largest.id} of {largest.tokens} "
                f"tokens needs {need}",
                f"give at least {whole_pool(need * shards, self.page_size, dtype, shards)}",
            )

    def pages_that_never_wait(self, requests: list[Request]) -> int:
        """The number of pages, over all shards, with which no request waits: every row may have a largest one."""
        needs = sorted((self.pages_on_each_chip(r.tokens) for r in requests), reverse=True)
        return sum(needs[: self.batch // self.data]) * self.data * self.context


def choose_checks(requests: list[Request], count: int, num_layers: int, seed: int) -> dict[int, tuple[int, int]]:
    """Draws outputs to check: request id -> (live tokens, layer), of up to `count` requests, the longest among them."""
    rng = np.random.default_rng([seed, 2])
    count = min(count, len(requests))
    if count == 0:
        return {}
    longest = max(requests, key=lambda r: r.tokens).id
    others = [int(i) for i in rng.permutation(len(requests)) if i != longest]
    chosen = {}
    for i in [longest, *others[: count - 1]]:
        r = requests[i]
        chosen[r.id] = (r.context + int(rng.integers(1, r.generated + 1)), int(rng.integers(num_layers)))
    return chosen


_NO_CHUNKS = np.zeros((0, 4), np.int32)


class RowSchedule:
    """Schedules the requests over the rows: an iterator of `ScheduledStep`s, until every request is done.

    Requests enter in arrival order as rows free up; when the next one finds no row, or not the pages that it will
    need by its end, it waits, and all behind it wait too. A request is promised its pages when it enters and takes
    them as it grows, so that none is ever evicted.

    Args:
      requests: ids must be 0, 1, ... in arrival order.
      allocator: `PageAllocator` of these rows and pages, all free.
      checks: as `choose_checks` gives them.

    Attributes:
      fingerprint: a 32-bit hash of every block table handed out so far: equal on processes that agree.
    """

    def __init__(
        self, requests: list[Request], allocator, pool: Pool, chunk_tokens: int, checks: dict[int, tuple[int, int]]
    ):
        pool.check_fits(requests)
        self._pool, self._allocator, self._chunk_tokens = pool, allocator, chunk_tokens
        self._waiting = deque(requests)
        self._unpromised = np.full(pool.data, pool.pages_per_shard)
        self._promised = np.zeros(pool.batch, np.int64)
        self._request = np.zeros(pool.batch, np.int32)
        self._length = np.zeros(pool.batch, np.int32)  # live tokens, 0: the row is idle
        self._last = np.zeros(pool.batch, np.int32)  # live tokens when the request is done
        self._backed = np.zeros(pool.batch, np.int64)  # tokens that the allocator knows of
        self._check_at = np.zeros(pool.batch, np.int32)  # live tokens from which to check, 0: nothing to check
        self._check_layer = np.zeros(pool.batch, np.int32)
        self._checks = checks
        self._table_changed = True
        self.fingerprint = 0

    def __iter__(self):
        return self

    def __next__(self) -> ScheduledStep:
        admitted, chunks = self._admit()
        live = self._length > 0
        if not live.any():
            raise StopIteration
        position = np.where(live, self._length, -1).astype(np.int32)
        self._grow(np.flatnonzero(live & (self._length >= self._backed_tokens())))
        self._length[live] += 1
        rows = np.stack([self._request, position, self._length], axis=1)
        pick, checks = self._show()
        pages = int((-(-self._length // self._pool.page_size)).sum())
        # The allocator's snapshot is its own copy; taken before rows are freed below.
        tables = None
        if self._table_changed:
            tables, self._table_changed = self._allocator.block_tables, False
            self.fingerprint = zlib.crc32(tables.tobytes(), self.fingerprint)
        done = np.flatnonzero(live & (self._length >= self._last))
        for row in done:
            self._free(int(row))
        return ScheduledStep(chunks, rows, tables, pick, checks, pages, admitted, len(done))

    def _backed_tokens(self) -> np.ndarray:
        """[B] tokens that fit in the pages that each row holds."""
        return -(-self._backed // self._pool.page_size) * self._pool.page_size

    def _grow(self, rows: np.ndarray) -> None:
        """Takes a page for each of these rows, whose next token begins one. Once a page, not once a token."""
        for row in map(int, rows):
            self._allocator.grow(row, int(self._length[row] + 1 - self._backed[row]))
            self._backed[row] = self._length[row] + 1
            self._table_changed = True

    def _admit(self) -> tuple[int, np.ndarray]:
        """Lets waiting requests in; returns how many, and their prompts' chunks, int32 [n, 4]."""
        admitted, chunks = 0, []
        if not self._waiting or self._length.all():  # most steps
            return 0, _NO_CHUNKS
        per_shard = self._pool.batch // self._pool.data
        idle = [
            deque(np.flatnonzero(part == 0) + i * per_shard)
            for i, part in enumerate(self._length.reshape(self._pool.data, -1))
        ]
        while self._waiting:
            request = self._waiting[0]
            need = self._pool.pages_on_each_chip(request.tokens)
            shard = max(range(self._pool.data), key=lambda d: (bool(idle[d]), self._unpromised[d], len(idle[d])))
            if not idle[shard] or self._unpromised[shard] < need:
                break
            self._waiting.popleft()
            row = int(idle[shard].popleft())
            self._allocator.allocate(row, request.context)
            self._unpromised[shard] -= need
            self._promised[row], self._request[row] = need, request.id
            self._length[row] = self._backed[row] = request.context
            self._last[row] = request.tokens
            self._check_at[row], self._check_layer[row] = self._checks.get(request.id, (0, 0))
            starts = range(0, request.context, self._chunk_tokens)
            chunks += [(request.id, row, s, min(s + self._chunk_tokens, request.context)) for s in starts]
            admitted += 1
            self._table_changed = True
        return admitted, np.array(chunks, np.int32).reshape(-1, 4)

    def _show(self) -> tuple[np.ndarray, tuple[Check, ...]]:
        """The outputs to show in this step. A data shard shows one, so that a second check that is due waits a step."""
        pick, checks = np.zeros((self._pool.data, 2), np.int32), {}
        per_shard = self._pool.batch // self._pool.data
        due = np.flatnonzero((self._check_at > 0) & (self._length >= self._check_at))
        for row in sorted(map(int, due), key=lambda r: self._last[r] - self._length[r]):
            shard = row // per_shard
            if shard not in checks:
                layer = int(self._check_layer[row])
                pick[shard] = row % per_shard, layer
                checks[shard] = Check(int(self._request[row]), int(self._length[row]), layer, shard)
                self._check_at[row] = 0
        return pick, tuple(checks.values())

    def _free(self, row: int) -> None:
        """Gives a done row's pages back."""
        self._allocator.free(row)
        self._unpromised[row // (self._pool.batch // self._pool.data)] += self._promised[row]
        self._length[row] = self._promised[row] = self._check_at[row] = 0
        self._backed[row] = self._request[row] = 0
