"""One chip's share of a decode step: its heads, its pages and its sequences, as arrays over a mesh."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import paged_dist as pd


@dataclasses.dataclass(frozen=True)
class Shard:
    """What one chip attends to in a step: `batch` sequences of `context` tokens, or of `lengths`.

    On a mesh of C chips along model (or context) there are C times these heads (or tokens), so that each chip has the
    same work as a single one.
    """

    num_q_heads: int
    num_kv_heads: int
    context: int = 4096
    batch: int = 32
    page_size: int = 128
    head_dim: int = 128
    dtype: str = "bfloat16"
    new_tokens: int = 1
    sliding_window: int | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def tokens(self) -> np.ndarray:
        """[batch] int32: live tokens of each sequence."""
        return np.array(self.lengths or (self.context,) * self.batch, np.int32)

    def live_bytes(self, written: int = 0) -> int:
        """Bytes of K, V and scales that a step must read on one chip, and write of `written` new tokens a sequence."""
        seen = np.minimum(self.tokens, self.sliding_window or self.tokens)
        spec = self.spec(1)
        return int(seen.sum() + written * len(self.tokens)) * spec.bytes_per_token

    def spec(self, chips: int, context: int = 1) -> pd.CacheSpec:
        """The cache of `chips` such shards along model, times `context` along context."""
        pages = int((-(-self.tokens // self.page_size)).sum()) * context
        whole = math.lcm(8, 128 // min(self.page_size, 128)) * context  # rows of scales come in eights
        return pd.CacheSpec(
            num_kv_heads=self.num_kv_heads * chips,
            head_dim=self.head_dim,
            num_pages=-(-pages // whole) * whole,
            page_size=self.page_size,
            dtype=self.dtype,
        )

    def small(self) -> Shard:
        """The same work at a size that a CPU does in a moment."""
        shrunk = tuple(-(-n // 16) for n in self.lengths[:4]) if self.lengths else None
        return dataclasses.replace(
            self,
            batch=4,
            context=min(self.context, 256),
            lengths=shrunk,
            sliding_window=self.sliding_window and min(self.sliding_window, 64),
        )


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The arrays of a `Shard` on a mesh.

    query: [B, Hq, D] or [B, Q, Hq, D]; key, value: [B, Hkv, D] or [B, Q, Hkv, D]; lengths, positions: [B];
    block_tables: [B, pages_per_seq], page ids in no order.
    """

    cache: pd.PagedKVCache
    query: jax.Array
    key: jax.Array
    value: jax.Array
    positions: jax.Array
    lengths: jax.Array
    block_tables: jax.Array


def make_arrays(shard: Shard, mesh: Mesh, seed: int = 0) -> Arrays:
    """Random pages, queries and new tokens of `shard` on each chip of `mesh`, data 1 x context x model."""
    chips, context = mesh.shape["model"], mesh.shape["context"]
    if mesh.shape["data"] != 1:
        raise ValueError(f"mesh {dict(mesh.shape)}: must have data 1: each chip has all sequences of its share")
    spec = shard.spec(chips, context)
    rng = np.random.default_rng(seed)
    lengths = shard.tokens * context
    block_tables = _tables(rng, lengths, shard.page_size, spec.num_pages, context)
    queries = () if shard.new_tokens == 1 else (shard.new_tokens,)
    normal = lambda heads: rng.standard_normal((len(shard.tokens), *queries, heads, shard.head_dim), np.float32)
    put = lambda x, *axes: _put(np.asarray(x), mesh, P(*axes))
    heads = lambda x: put(x.astype(jnp.bfloat16), *(None,) * (x.ndim - 2), "model", None)
    return Arrays(
        cache=_filled(spec, mesh, seed),
        query=heads(normal(shard.num_q_heads * chips)),
        key=heads(normal(shard.num_kv_heads * chips)),
        value=heads(normal(shard.num_kv_heads * chips)),
        positions=put(lengths - shard.new_tokens),
        lengths=put(lengths),
        block_tables=put(block_tables),
    )


def _put(x: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """A global array of what each process has whole."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def _filled(spec: pd.CacheSpec, mesh: Mesh, seed: int) -> pd.PagedKVCache:
    """A cache whose pages are all random, made on the devices that hold them."""

    @functools.partial(jax.jit, out_shardings=pd.PagedKVCache.shardings(spec, mesh))
    def random_pages():
        shape = (spec.num_kv_heads, spec.num_pages, spec.page_size, spec.head_dim)
        pages = [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(seed))]
        if not spec.is_quantized:
            return pd.PagedKVCache.from_pages(*(x.astype(spec.dtype) for x in pages), mesh=mesh)
        (keys, key_scales), (values, value_scales) = (pd.quantize_kv(x, spec.dtype) for x in pages)
        return pd.PagedKVCache.from_pages(keys, values, key_scales, value_scales, mesh=mesh)

    return random_pages()


def _tables(rng, lengths: np.ndarray, page_size: int, num_pages: int, context: int) -> np.ndarray:
    """[B, pages_per_seq] int32: page i of each row on context shard i mod `context`, ids in no order, -1 unused."""
    own = num_pages // context
    free = [list(rng.permutation(own) + c * own) for c in range(context)]
    counts = -(-lengths // page_size)
    tables = np.full((len(lengths), int(counts.max())), -1, np.int32)
    for row, count in enumerate(counts):
        for i in range(count):
            tables[row, i] = free[i % context].pop()
    return tables
