"""Sequences whose every token the host knows, in a cache that is poisoned everywhere else."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import paged_dist as pd
from paged_dist.kernels.attention.oracle import attention_oracle

# Largest error allowed, of the largest output: bf16's rounding of query, weights and output; exact products of f32.
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4, "int8": 2e-2, "float8_e4m3fn": 2e-2}


@dataclasses.dataclass(frozen=True)
class OpCase:
    """A batch of `lengths` tokens a sequence, over H kv heads with G query heads each.

    `options` are those of `sharded_paged_attention`; `new_tokens` are appended by the last step.
    """

    name: str
    lengths: tuple[int, ...]
    num_kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    page_size: int = 128
    dtype: str = "bfloat16"
    new_tokens: int = 1
    options: tuple[tuple[str, int | float], ...] = ()

    def __str__(self) -> str:
        return self.name

    def small(self) -> OpCase:
        """At a size that the simulated kernel and the CPU do in a moment."""
        shrunk = dict(page_size=min(self.page_size, 32), num_kv_heads=min(self.num_kv_heads, 2), group=2)
        return dataclasses.replace(self, lengths=tuple(n // 16 for n in self.lengths[:4]), **shrunk)


class OpBatch:
    """The arrays of an `OpCase` on a mesh, and the float64 answer."""

    def __init__(self, case: OpCase, mesh: Mesh, seed: int = 0):
        self.case, self.mesh = case, mesh
        shards = mesh.shape["data"] * mesh.shape["context"]
        rows = len(case.lengths) * mesh.shape["data"]
        self.lengths = np.tile(np.array(case.lengths, np.int32), mesh.shape["data"])
        heads = max(case.num_kv_heads, mesh.shape["model"])
        columns = -(-int(self.lengths.max() + case.new_tokens) // case.page_size) + 1
        whole = 1024 if case.dtype in ("int8", "float8_e4m3fn") else case.page_size
        pages = -(-rows * (columns + 1) * case.page_size // (whole * shards)) * (whole // case.page_size) * shards
        self.spec = pd.CacheSpec(heads, case.head_dim, pages, case.page_size, case.dtype)
        self.allocator = pd.PageAllocator(self.spec, mesh, rows, columns)
        rng = np.random.default_rng(seed)
        most = int(self.lengths.max()) + case.new_tokens
        self.keys, self.values = (
            np.asarray(rng.standard_normal((rows, most, heads, case.head_dim), np.float32), self.input_dtype)
            for _ in "kv"
        )
        self.query = np.asarray(
            rng.standard_normal((rows, case.new_tokens, heads * case.group, case.head_dim), np.float32),
            self.input_dtype,
        )

    @property
    def input_dtype(self):
        """Of queries, keys and values: f32 beside an f32 cache, else bf16."""
        return jnp.float32 if self.case.dtype == "float32" else jnp.bfloat16

    def poisoned(self) -> pd.PagedKVCache:
        """A cache in which everything is NaN, scales too; int8 pages have no NaN: their scales do."""
        spec = self.spec

        def poison():
            shape = (spec.num_kv_heads, spec.num_pages, spec.page_size, spec.head_dim)
            pages = jnp.full(shape, jnp.nan, jnp.float32).astype(spec.dtype)
            scales = (jnp.full(shape[:3], jnp.nan, jnp.float32),) * 2 if spec.is_quantized else ()
            return pd.PagedKVCache.from_pages(pages, pages, *scales, mesh=self.mesh)

        return jax.jit(poison, out_shardings=pd.PagedKVCache.shardings(spec, self.mesh))()

    def prompts_written(self, cache: pd.PagedKVCache, implementation=None) -> pd.PagedKVCache:
        """All rows allocated, and all but the new tokens written, in two chunks."""
        for row, tokens in enumerate(self.lengths):
            self.allocator.allocate(row, int(tokens))
        most = int(self.lengths.max())
        for start, end in ((0, most // 2), (most // 2, most)):
            cache = pd.write_prefill_kv(
                cache,
                self.keys[:, start:end],
                self.values[:, start:end],
                np.clip(self.lengths, start, end).astype(np.int32),
                self.allocator.block_tables,
                starts=np.full(len(self.lengths), start, np.int32),
                mesh=self.mesh,
                implementation=implementation,
            )
        return cache

    def step(self, cache: pd.PagedKVCache, implementation=None) -> tuple[pd.PagedKVCache, np.ndarray, np.ndarray]:
        """Each row's new tokens appended and attended to: (cache, output, lse), the last two on every host."""
        positions = np.array(self.allocator.lengths)
        for row in range(len(positions)):
            self.allocator.grow(row, self.case.new_tokens)
        cache = pd.copy_pages(cache, self.allocator.take_copies(), mesh=self.mesh, implementation=implementation)
        at = positions[:, None] + np.arange(self.case.new_tokens)
        rows = np.arange(len(positions))[:, None]
        squeeze = (lambda x: x[:, 0]) if self.case.new_tokens == 1 else (lambda x: x)
        tables = self.allocator.block_tables
        cache = pd.append_kv(
            cache,
            squeeze(self.keys[rows, at]),
            squeeze(self.values[rows, at]),
            positions.astype(np.int32),
            tables,
            mesh=self.mesh,
            implementation=implementation,
        )
        output, lse = pd.sharded_paged_attention(
            squeeze(self.query),
            cache,
            np.array(self.allocator.lengths),
            tables,
            return_lse=True,
            mesh=self.mesh,
            implementation=implementation,
            **dict(self.case.options),
        )
        return cache, on_every_host(output), on_every_host(lse)

    def answer(self) -> tuple[np.ndarray, np.ndarray]:
        """(output, lse) in float64, over what the cache holds: quantised keys and values where it is an 8-bit one."""
        held = [self._held(x) for x in (self.keys, self.values)]  # [B, T, H, D]
        rows, most, heads, head_dim = held[0].shape
        pages = [np.moveaxis(x, 2, 0).reshape(heads, rows, most, head_dim) for x in held]  # a page a row
        query = self.query[:, 0] if self.case.new_tokens == 1 else self.query
        options = {k: v for k, v in self.case.options if k != "output_heads"}
        lengths = self.lengths + self.case.new_tokens
        return attention_oracle(query, *pages, lengths, np.arange(rows)[:, None], **options)

    def _held(self, x: np.ndarray) -> np.ndarray:
        if not self.spec.is_quantized:
            return np.asarray(x, np.float32)
        with jax.default_device(jax.local_devices()[0]):
            values, scales = pd.quantize_kv(jnp.asarray(x), self.spec.dtype)
            return np.asarray(pd.dequantize_kv(values, scales, dtype=jnp.float32))

    def check(self, output: np.ndarray, lse: np.ndarray) -> None:
        """Holds the op's output and lse to float64."""
        want, want_lse = self.answer()
        bound = TOLERANCE[self.case.dtype]
        scale = np.abs(want).max()
        assert np.isfinite(output.astype(np.float64)).all(), "NaN or infinity from what is not live"
        assert np.abs(output.astype(np.float64) - want).max() <= bound * scale
        np.testing.assert_allclose(lse, want_lse, rtol=bound, atol=bound)


def on_every_host(x: jax.Array) -> np.ndarray:
    """The whole of a global array, whoever holds its parts."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def meshes() -> list[Mesh]:
    """Over all devices: each axis by itself, and where there are four or more, two and three together."""
    n = jax.device_count()
    shapes = [(1, 1, n), (1, n, 1), (n, 1, 1)]
    if n >= 4 and n % 2 == 0:
        shapes += [(2, 1, n // 2), (1, 2, n // 2), (2, n // 2, 1)]
    if n >= 8 and n % 4 == 0:
        shapes += [(2, 2, n // 4)]
    return [pd.make_pod_mesh(data=data, context=context, model=model) for data, context, model in dict.fromkeys(shapes)]
