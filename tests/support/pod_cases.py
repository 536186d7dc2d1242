"""Batches over a mesh with a context axis: pages laid as DESIGN says, everything that is not live NaN or garbage."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jax.sharding import AxisType, Mesh
from pod_meshes import simulated_pod

import paged_dist as pd
from paged_dist.kernels.attention.oracle import attention_oracle


def lay_tables(rng, lengths, page_size: int, columns: int, data: int, context: int, slack: int = 2):
    """(block tables [B, columns] int32 with garbage in unused entries, number of pages).

    Row b's first page is on context shard b % context, page i on the i-th after it; ids are in no order.
    """
    batch = len(lengths)
    counts = -(-np.asarray(lengths) // page_size)
    need = np.zeros((data, context), int)
    for b, count in enumerate(counts):
        for i in range(count):
            need[b * data // batch, (b + i) % context] += 1
    own = int(need.max()) + slack  # pages a shard
    free = [[list(rng.permutation(own) + (d * context + c) * own) for c in range(context)] for d in range(data)]
    tables = rng.choice([-1, -(2**30), 2**30, 3], (batch, columns)).astype(np.int32)
    for b, count in enumerate(counts):
        for i in range(count):
            tables[b, i] = free[b * data // batch][(b + i) % context].pop()
    return tables, own * data * context


@dataclasses.dataclass(frozen=True)
class PodCase:
    """Sequences of `lengths` over data x context shards of pages; H kv heads, G query heads each."""

    lengths: tuple[int, ...]
    data: int = 1
    context: int = 2
    model: int = 1
    kv_heads: int = 1
    group: int = 2
    head_dim: int = 128
    page_size: int = 8
    dtype: str = "float32"
    num_queries: int | None = None  # Q; None: query has no such axis
    seed: int = 0

    @property
    def columns(self) -> int:
        return max(1, -(-max(self.lengths) // self.page_size))

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        tables, pages = lay_tables(rng, self.lengths, self.page_size, self.columns, self.data, self.context)
        shape = (self.kv_heads, pages, self.page_size, self.head_dim)
        pools = [np.full(shape, np.nan, np.float32) for _ in "kv"]
        for pool in pools:
            for b, length in enumerate(self.lengths):
                t = np.arange(length)
                made = rng.standard_normal((self.kv_heads, length, self.head_dim))
                pool[:, tables[b, t // self.page_size], t % self.page_size] = made
        heads = self.kv_heads * self.group
        queries = () if self.num_queries is None else (self.num_queries,)
        query = rng.standard_normal((len(self.lengths), *queries, heads, self.head_dim))
        made = dict(query=query.astype(self.dtype), key=pools[0].astype(self.dtype), value=pools[1].astype(self.dtype))
        return made | dict(lengths=np.array(self.lengths, np.int32), block_tables=tables)

    def mesh(self, kind=AxisType.Auto) -> Mesh:
        return simulated_pod(self.data, self.context, self.model, kind)

    def cache(self, mesh: Mesh) -> pd.PagedKVCache:
        return pd.PagedKVCache.from_pages(*(self.arrays[k].copy() for k in ("key", "value")), mesh=mesh)

    @property
    def arguments(self) -> tuple[np.ndarray, ...]:
        """Of NumPy: each goes to its devices at once, where an array of one device takes a program to be split.

        They are copies: a test may change `arrays` while the work on these is under way.
        """
        return tuple(self.arrays[k].copy() for k in ("query", "lengths", "block_tables"))

    def oracle(self, **options):
        a = self.arrays
        run = lambda query, lengths: attention_oracle(
            query, a["key"], a["value"], lengths, a["block_tables"], **options
        )
        if self.num_queries is None:
            return run(a["query"], a["lengths"])
        ends = [np.maximum(a["lengths"] - (self.num_queries - 1 - q), 0) for q in range(self.num_queries)]
        made = [run(a["query"][:, q], end) for q, end in enumerate(ends)]
        return tuple(np.stack(x, axis=1) for x in zip(*made, strict=True))

    def check(self, output, lse=None, **options) -> None:
        """Holds output (and lse) to the float64 oracle within the dtype's rounding."""
        expected, expected_lse = self.oracle(**options)
        close = dict(rtol=2e-2, atol=2e-2) if self.dtype == "bfloat16" else dict(rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.asarray(output, np.float64), expected, **close)
        if lse is not None:
            np.testing.assert_allclose(np.asarray(lse), expected_lse, rtol=1e-4, atol=1e-4)


def shard_tables(rng, data: int, pages: int, batch: int) -> np.ndarray:
    """[batch, pages / batch] page ids, each data shard's rows owning pages of its own range."""
    per_shard = pages // data
    ids = [d * per_shard + rng.permutation(per_shard) for d in range(data)]
    return np.concatenate(ids).reshape(batch, -1).astype(np.int32)
