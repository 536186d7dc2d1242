"""`page_attention`: paged attention over one layer's pools in the layout that JAX and ejkernel use."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from paged_dist._errors import not_yet, require
from paged_dist.kernels.attention.checks import DEFAULT_MASK_VALUE, check_cache, check_interpret, check_options
from paged_dist.kernels.attention.problem import Problem
from paged_dist.kernels.attention.xla_form import attend_pages_xla
from paged_dist.kernels.decode.api import paged_decode_attention
from paged_dist.kernels.dispatch import Interpret, dispatch
from paged_dist.kernels.seed.block_choice import (
    check_megacore,
    check_megacore_target,
    check_pages_per_compute_block,
    check_smem,
    choose_pages_per_compute_block,
    cores_of,
)
from paged_dist.kernels.seed.pallas_call import attend_pages_pallas
from paged_dist.kernels.target import simulation
from paged_dist.kernels.tiling import LANES, SUBLANES


def page_attention(
    query,
    key_cache,
    value_cache,
    context_lens,
    block_tables,
    *,
    sm_scale: float = 1.0,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
    pages_per_compute_block: int | None = None,
    megacore_mode: str | None = None,
    inline_seq_dim: bool = True,
    interpret: Interpret = None,
    key_scales=None,
    value_scales=None,
) -> jax.Array:
    """Attention of one query token a sequence over its pages, on one chip.

    Call sites of JAX's `paged_attention(q, k_pages, v_pages, lengths, page_indices)` and of ejkernel's
    `page_attention` work as they are. As there, the query is not scaled unless `sm_scale` says so. At head_dim 64
    the seed's layout has no form that a kernel can read in place, so on a TPU both pools are copied on every
    call; a `PagedKVCache` stores such heads packed and is never copied.

    Args:
      query: [B, Hq, D] bf16 or f32, Hq a multiple of Hkv, D 64 or a multiple of 128 (a `PagedKVCache` pads others to
        these; to do it here would copy the pages on each call).
      key_cache, value_cache: [Hkv, N, P, D] bf16 or f32, P tokens a page, a multiple of 8.
      context_lens: [B] int32 live tokens of each sequence, 0 allowed; more than the table holds counts as a full
        table.
      block_tables: [B, S] int32 page ids; entries past a sequence's last page, or before its window, may hold
        anything and are never used.
      sm_scale: logits are sm_scale * q.k. ejkernel calls it `attn_scale`, and takes 1 / sqrt(D) where none is given.
      mask_value: what a masked logit becomes, finite and negative. Whatever it is, a masked token has weight 0.
      attn_logits_soft_cap: logits become cap * tanh(logits / cap), before the mask.
      sliding_window: attend to the last so many tokens; pages wholly before them are not read.
      pages_per_compute_block: pages the kernel loads and computes at a time; None picks about two thousand tokens,
        within VMEM. It need not divide S. It changes speed, and the result only by rounding.
      megacore_mode: None, or 'kv_head' or 'batch' to split these over the two cores of a v4 or v5p chip.
      inline_seq_dim: loop over a sequence's blocks inside the kernel (True), or in its grid.
      interpret: None follows the platform that the program is lowered for: the Pallas kernel on TPU, plain XLA
        elsewhere. False is the kernel; True or a `pltpu.InterpretParams` simulates it on the host.
      key_scales, value_scales: [Hkv, N, P] f32, for int8 and float8_e4m3fn caches. `paged_decode_attention` does the
        work then; what shapes the seed-level kernels (pages_per_compute_block, megacore_mode, inline_seq_dim) is
        refused beside them.

    Returns:
      [B, Hq, D] in the query's dtype, accumulated in f32; 0 for an empty sequence.

    Raises:
      ValueError: arguments that disagree or are outside the rules above; a table that does not fit in scalar
        memory (1 MiB, counted with padding); megacore_mode for a chip without megacore. That is caught where the
        chip is known when the call is traced: a mesh in scope (`shard_map`, `jax.set_mesh`,
        `jax.sharding.use_abstract_mesh`), concrete arguments, arguments on an Explicit mesh, or this host's own
        TPU. A plain `jit` lowered on a host without a TPU for an absent one is not caught; the kernel then runs
        its two halves one after the other.
      NotImplementedError: JAX's QuantizedTensor.

    Method: JAX's jax.experimental.pallas.ops.tpu.paged_attention, after PagedAttention (arXiv:2309.06180) and
    FlashAttention's online softmax (arXiv:2205.14135).

    Example:
      >>> rng = np.random.default_rng(0)
      >>> query = jnp.asarray(rng.normal(size=(2, 4, 64)), jnp.float32)  # [B, Hq, D]
      >>> keys, values = jnp.asarray(rng.normal(size=(2, 1, 8, 16, 64)), jnp.float32)  # [Hkv, N, P, D] each
      >>> lengths, tables = jnp.array([20, 3], jnp.int32), jnp.array([[6, 1], [2, 0]], jnp.int32)
      >>> output = kernels.page_attention(query * 64**-0.5, keys, values, lengths, tables)
      >>> plain = kernels.ref_paged_attention(query * 64**-0.5, keys, values, lengths, tables)
      >>> np.allclose(output, plain, atol=1e-4)
      True
    """
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if hasattr(cache, "weight") and hasattr(cache, "scales"):
            raise not_yet(
                f"{name} as a QuantizedTensor",
                f"pass its weight as {name}, and its scales[..., 0] / 127.5 as {name.split('_')[0]}_scales",
            )
    check_options(
        sm_scale=sm_scale,
        soft_cap=attn_logits_soft_cap,
        sliding_window=sliding_window,
        mask_value=mask_value,
        soft_cap_name="attn_logits_soft_cap",
    )
    if key_scales is not None or value_scales is not None:
        _check_no_shape_of_the_seed(pages_per_compute_block, megacore_mode, inline_seq_dim)
        output = paged_decode_attention(
            query,
            key_cache,
            value_cache,
            context_lens,
            block_tables,
            key_scales=key_scales,
            value_scales=value_scales,
            sm_scale=sm_scale,
            soft_cap=attn_logits_soft_cap,
            sliding_window=sliding_window,
            interpret=interpret,
        )
        assert isinstance(output, jax.Array)  # no lse was asked for
        return output
    query, key_cache, value_cache, context_lens, block_tables = map(
        jnp.asarray, (query, key_cache, value_cache, context_lens, block_tables)
    )
    problem = check_cache(query, key_cache, value_cache, context_lens, block_tables)
    check_interpret(interpret)
    check_megacore(problem, megacore_mode)
    interpret = simulation(cores_of(megacore_mode), interpret)
    check_megacore_target(megacore_mode, interpret, query, key_cache)
    check_smem(problem)
    stored = _stored(problem)
    if pages_per_compute_block is None:
        pages_per_compute_block = choose_pages_per_compute_block(stored)
    pages_per_compute_block = check_pages_per_compute_block(stored, pages_per_compute_block)
    return _page_attention(
        query,
        key_cache,
        value_cache,
        context_lens,
        block_tables,
        sm_scale=float(sm_scale),
        soft_cap=attn_logits_soft_cap,
        sliding_window=sliding_window,
        pages_per_compute_block=pages_per_compute_block,
        megacore_mode=megacore_mode,
        inline_seq_dim=bool(inline_seq_dim),
        interpret=interpret,
    )


def _check_no_shape_of_the_seed(pages_per_compute_block, megacore_mode, inline_seq_dim) -> None:
    """Raises ValueError for what says how the seed-level kernels work, where the decode kernel does the work."""
    for name, value, default, works in (
        ("pages_per_compute_block", pages_per_compute_block, None, "paged_decode_attention takes block_sizes"),
        ("megacore_mode", megacore_mode, None, "both cores work anyway where a device has two"),
        ("inline_seq_dim", bool(inline_seq_dim), True, "leave it out"),
    ):
        rule = f"must be {default} beside key_scales and value_scales, for another kernel does the work"
        require(value is default, name, value, rule, works)


@functools.partial(
    jax.jit,
    static_argnames=(
        "sm_scale",
        "soft_cap",
        "sliding_window",
        "pages_per_compute_block",
        "megacore_mode",
        "inline_seq_dim",
        "interpret",
    ),
)
def _page_attention(
    query,
    key_cache,
    value_cache,
    context_lens,
    block_tables,
    *,
    interpret,
    pages_per_compute_block,
    megacore_mode,
    inline_seq_dim,
    **options,
):
    head_dim = query.shape[-1]

    def kernel(query, key_cache, value_cache, context_lens, block_tables, *, interpret):
        lanes = max(LANES, head_dim)
        if head_dim < lanes and key_cache.shape[2] % (SUBLANES * lanes // head_dim):
            # Pages of 8 tokens would pack into half a tile: each token gets a whole row instead.
            query, key_cache, value_cache = (
                jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lanes - head_dim)]) for x in (query, key_cache, value_cache)
            )
        pools = (cache.reshape(1, *cache.shape[:2], -1, lanes) for cache in (key_cache, value_cache))
        output, _ = attend_pages_pallas(
            query,
            *pools,
            context_lens,
            block_tables,
            pages_per_compute_block=pages_per_compute_block,
            megacore_mode=megacore_mode,
            inline_seq_dim=inline_seq_dim,
            interpret=interpret,
            **options,
        )
        return output[..., :head_dim]

    def xla(query, key_cache, value_cache, context_lens, block_tables):
        output, _ = attend_pages_xla(query, key_cache[None], value_cache[None], context_lens, block_tables, **options)
        return output

    return dispatch(kernel, xla, query, key_cache, value_cache, context_lens, block_tables, interpret=interpret)


def _stored(problem: Problem) -> Problem:
    """The problem as `kernel` above launches it: rows of at least 128 lanes."""
    p, lanes = problem, max(LANES, problem.head_dim)
    streams = lanes // p.head_dim
    if p.page_size % (SUBLANES * streams):
        return p.replace(head_dim=lanes, width=lanes)
    return p.replace(rows=p.page_size // streams, width=lanes)
