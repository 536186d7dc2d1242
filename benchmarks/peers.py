"""The same work by the kernels that others publish, where they are installed: JAX's own, RPA v3 and FlyWheel.

Each peer is a function that takes a `Shard` and a device and gives `(state, inputs, program)` for `time_program`, in
that library's own layout of pages, with its own choice of block sizes. JAX's kernel only attends; the other two write
the step's new token too.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from workload import Shard

_JAX_BLOCK_TOKENS = (
    2048  # of a block of JAX's kernel, which has no default: as good as any on the chips that were replayed
)

Prepared = tuple[Any, tuple[jax.Array, ...], Callable]


def attention_peers() -> dict[str, Callable[[Shard, jax.Device], Prepared]]:
    """Kernels that attend to pages that are written already."""
    return {"jax": _jax}


def write_and_attend_peers() -> dict[str, Callable[[Shard, jax.Device], Prepared]]:
    """Kernels that write the step's new token and attend: those that are installed."""
    peers = {"rpa v3": ("tpu_inference", _rpa_v3), "flywheel": ("flywheel_tpu", _flywheel)}
    return {name: prepare for name, (package, prepare) in peers.items() if importlib.util.find_spec(package)}


def takes(name: str, shard: Shard) -> bool:
    """Whether the peer does this shard's work at all: bf16, one new token; a window only RPA v3 and FlyWheel."""
    plain = shard.dtype == "bfloat16" and shard.new_tokens == 1
    return (
        plain and (shard.sliding_window is None or name != "jax") and not (name == "flywheel" and shard.page_size % 128)
    )


def _normal(rng, device: jax.Device, *shape: int) -> jax.Array:
    return jax.device_put(jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16), device)


def _tables(rng, shard: Shard) -> tuple[np.ndarray, int]:
    """([B, pages_per_seq] page ids in no order, pages of the pool)."""
    columns = -(-int(shard.tokens.max()) // shard.page_size)
    rows = len(shard.tokens)
    return rng.permutation(rows * columns).reshape(rows, columns).astype(np.int32), rows * columns


def _jax(shard: Shard, device: jax.Device) -> Prepared:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    from paged_dist.kernels.chips import has_megacore

    rng = np.random.default_rng(0)
    tables, pages = _tables(rng, shard)
    block = max(1, min(tables.shape[1], _JAX_BLOCK_TOKENS // shard.page_size))
    by = (("kv_head", shard.num_kv_heads), ("batch", len(tables)))  # by kv head both cores have the same to read
    mode = next((mode for mode, parts in by if parts % 2 == 0), None) if has_megacore(device) else None
    columns = -(-tables.shape[1] // block) * block  # its table is as wide as whole blocks are
    tables = np.pad(tables, ((0, 0), (0, columns - tables.shape[1])))
    pool = (shard.num_kv_heads, pages, shard.page_size, shard.head_dim)
    inputs = (
        _normal(rng, device, len(tables), shard.num_q_heads, shard.head_dim),
        _normal(rng, device, *pool),
        _normal(rng, device, *pool),
        jax.device_put(shard.tokens, device),
        jax.device_put(tables, device),
    )

    def program(state, query, keys, values, lengths, tables):
        out = paged_attention(query, keys, values, lengths, tables, pages_per_compute_block=block, megacore_mode=mode)
        return state, out

    return (), inputs, program


def _rpa_v3(shard: Shard, device: jax.Device) -> Prepared:
    kernel = importlib.import_module("tpu_inference.kernels.ragged_paged_attention.v3.kernel")
    rng = np.random.default_rng(0)
    tables, pages = _tables(rng, shard)
    rows = len(tables)
    pool = kernel.get_kv_cache_shape(pages, shard.page_size, shard.num_kv_heads, shard.head_dim, jnp.bfloat16)
    put = lambda x: jax.device_put(np.asarray(x, np.int32), device)
    inputs = (
        _normal(rng, device, rows, shard.num_q_heads, shard.head_dim),
        _normal(rng, device, rows, shard.num_kv_heads, shard.head_dim),
        _normal(rng, device, rows, shard.num_kv_heads, shard.head_dim),
        put(shard.tokens),
        put(tables.reshape(-1)),
        put(np.arange(rows + 1)),
        put([rows, rows, rows]),  # all sequences decode
    )

    def program(cache, query, key, value, lengths, tables, query_starts, kinds):
        out, cache = kernel.ragged_paged_attention(
            query, key, value, cache, lengths, tables, query_starts, kinds, sliding_window=shard.sliding_window
        )
        return cache, out

    return _normal(rng, device, *pool), inputs, program


def _flywheel(shard: Shard, device: jax.Device) -> Prepared:
    attend = importlib.import_module("flywheel_tpu").flash_attn_with_kvcache
    rng = np.random.default_rng(0)
    tables, pages = _tables(rng, shard)
    rows = len(tables)
    pool = (pages, shard.page_size, 2 * shard.num_kv_heads, shard.head_dim)
    put = lambda x: jax.device_put(np.asarray(x, np.int32), device)
    inputs = (
        _normal(rng, device, rows, 1, shard.num_q_heads, shard.head_dim),
        _normal(rng, device, rows, 1, shard.num_kv_heads, shard.head_dim),
        _normal(rng, device, rows, 1, shard.num_kv_heads, shard.head_dim),
        put(shard.tokens - 1),  # valid entries before the append
        put(tables),
    )
    window = (-1, -1) if shard.sliding_window is None else (shard.sliding_window - 1, 0)

    def program(cache, query, key, value, lengths, tables):
        out, cache = attend(
            query, cache, None, key, value, cache_seqlens=lengths, block_table=tables, causal=True, window_size=window
        )
        return cache, out

    return _normal(rng, device, *pool), inputs, program
