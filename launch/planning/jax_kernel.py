"""JAX's own paged attention at the shapes of our decode kernel's plan: its best call, and what it reads from HBM."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from paged_dist.kernels.chips import MEGACORE_CORES, has_megacore
from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.decode.traffic import PageTraffic
from paged_dist.kernels.seed.block_choice import choose_pages_per_compute_block


def jax_pages_per_block(plan: LaunchPlan, block_tokens: int | None) -> int:
    """JAX's `pages_per_compute_block` for blocks of `block_tokens` tokens, at least a page; None: some 2,000 tokens."""
    if block_tokens is None:
        return choose_pages_per_compute_block(plan.problem)
    return max(1, min(plan.S, block_tokens // plan.page_size))


def jax_takes(cache_dtype) -> bool:
    """Whether JAX's kernel takes pages of this dtype: bf16, f32, and int8 with scales; not fp8."""
    return jnp.dtype(cache_dtype).name in ("bfloat16", "float32", "int8")


def jax_call(plan: LaunchPlan, pages: int, mesh: Mesh):
    """(JAX's op, the shapes of its arguments) for the chip of `mesh`, in blocks of `pages` pages, on both cores of two.

    Its table is padded to whole blocks: it refuses another width. Scales of int8 pages come last, [Hkv, N, P, 1] f32.
    """
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    p, mode = plan.problem, None
    if has_megacore(mesh.devices.flat[0]):  # by kv head both cores have the same tokens to read
        mode = next((m for m, n in (("kv_head", p.num_kv_heads), ("batch", p.batch)) if n % MEGACORE_CORES == 0), None)
    op = _over_int8 if p.is_quantized else paged_attention
    op = functools.partial(_not_strict, op, pages_per_compute_block=pages, megacore_mode=mode)
    pool = jax.ShapeDtypeStruct((p.num_kv_heads, p.num_pages, p.page_size, p.head_dim), p.cache_dtype)
    table = (p.batch, -(-plan.S // pages) * pages)
    scales = jax.ShapeDtypeStruct((*pool.shape[:-1], 1), jnp.float32)
    return op, (
        jax.ShapeDtypeStruct((p.batch, p.num_q_heads, p.head_dim), p.query_dtype),
        pool,
        pool,
        jax.ShapeDtypeStruct((p.batch,), jnp.int32),
        jax.ShapeDtypeStruct(table, jnp.int32),
        *((scales, scales) if p.is_quantized else ()),
    )


def _not_strict(op, *args, **options):
    """`op` traced under JAX's default settings: under a caller's strict ones it does not compile."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return op(*args, **options)


def _over_int8(query, keys, values, lengths, table, key_scales, value_scales, **options):
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention, quantization_utils

    keys = quantization_utils.QuantizedTensor(keys, key_scales)
    values = quantization_utils.QuantizedTensor(values, value_scales)
    return paged_attention(query, keys, values, lengths, table, **options)


def jax_page_copies(plan: LaunchPlan, lengths, pages: int) -> PageTraffic:
    """The copies that JAX's kernel makes from the pools for `lengths` [B], in blocks of `pages` pages.

    Its own semantics (jax 0.10.2 to 0.12): for each sequence and each kv head it visits the blocks that begin before
    the sequence's end, and copies every page of such a block, the dead ones too, whole, K and V each by itself: one
    copy a page and head. It has no sliding window and no first token: it reads from token 0 on. Of int8 pages it
    copies the scales too, a copy a page, head_dim of them a token: XLA makes them so on every call.
    """
    lengths = np.clip(np.asarray(lengths, np.int64), 0, plan.S * plan.page_size)
    blocks = int((-(-lengths // (pages * plan.page_size))).sum())
    of_pages = 2 * blocks * pages * plan.Hkv
    element, count = plan.cache_dtype.itemsize, of_pages
    if plan.is_quantized:
        element, count = element + 4, 2 * of_pages
    return PageTraffic(count, of_pages * plan.page_size * plan.D * element)


def jax_smem_bytes(plan: LaunchPlan, pages: int) -> int:
    """Bytes of SMEM that JAX's kernel takes: lengths, flat table, buffer number and flag, each padded."""
    table = plan.B * (-(-plan.S // pages) * pages)
    return sum(-(-4 * n // 512) * 512 for n in (plan.B, table, 1, 1))
