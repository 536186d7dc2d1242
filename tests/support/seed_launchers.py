"""A launcher as users of ejkernel's kernels have written them: it drives the seed's kernel bodies."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist.kernels import (
    DEFAULT_MASK_VALUE,
    paged_flash_attention_kernel,
    paged_flash_attention_kernel_inline_seq_dim,
)


def launch_seed_body(
    body,
    query,
    k_pages,
    v_pages,
    lengths,
    tables,
    *,
    pages,
    scale=1.0,
    sliding_window=None,
    megacore_mode=None,
    interpret=False,
):
    """A launcher by hand, as users have them: the output, cast and reshaped by its caller."""
    B, Hq, D = query.shape
    Hkv, _, page_size, _ = k_pages.shape
    G, S = Hq // Hkv, tables.shape[1]
    cores = 1 if megacore_mode is None else 2
    inline = body is paged_flash_attention_kernel_inline_seq_dim
    grid = (cores, B // cores if megacore_mode == "batch" else B, Hkv // cores if megacore_mode == "kv_head" else Hkv)
    if G % 8:  # one row a head, so that XLA picks a layout the block fits
        q, block, tail = query.reshape(B, Hq, 1, D).astype(jnp.float32), (None, G, None, D), (0, 0)
    else:
        q, block, tail = query, (None, G, D), (0,)

    def at(core, b, h, *_):
        return (
            b * cores + core if megacore_mode == "batch" else b,
            h * cores + core if megacore_mode == "kv_head" else h,
            *tail,
        )

    spec = pl.BlockSpec(block, at)
    buffer = pltpu.VMEM((2, pages, page_size, D), k_pages.dtype)
    output, _, _ = pl.pallas_call(
        functools.partial(
            body,
            batch_size=B,
            pages_per_compute_block=pages,
            pages_per_sequence=S,
            mask_value=DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            megacore_mode=megacore_mode,
            sliding_window=sliding_window,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid if inline else (*grid, -(-S // pages)),
            in_specs=[spec, pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[spec, spec, spec],
            scratch_shapes=(buffer, buffer, pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2,))),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) + ("arbitrary",) * (2 if inline else 3)),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:-1], 1), jnp.float32),
            jax.ShapeDtypeStruct((*q.shape[:-1], 1), jnp.float32),
        ],
        interpret=interpret,
    )(
        jnp.asarray(lengths),
        jnp.asarray(tables).reshape(-1),
        jnp.zeros((1,), jnp.int32),
        jnp.ones((1,), jnp.int32),
        (q * scale).astype(q.dtype),
        k_pages,
        v_pages,
    )
    return output.reshape(B, Hq, D).astype(query.dtype)


SEED_BODIES = pytest.mark.parametrize(
    "body",
    [paged_flash_attention_kernel, paged_flash_attention_kernel_inline_seq_dim],
    ids=["blocks_in_grid", "inline"],
)
