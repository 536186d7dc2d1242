"""The seed's kernel bodies: flash attention of one sequence and kv head over blocks of pages.

The schedule is that of JAX's paged attention (jax.experimental.pallas.ops.tpu.paged_attention): a double buffer
of blocks of pages, and the next block, be it of this head, the next head or the next sequence that is not empty,
in flight while this one is computed. Beyond it, blocks start at the window's first page, only live pages are
fetched, what else lies in a buffer is masked in K's scores and in V, and head_dim 64 may come two tokens a row.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from paged_dist._compat import broadcasts
from paged_dist.kernels.attention.products import dot
from paged_dist.kernels.attention.scores import LOWEST, in_range
from paged_dist.kernels.seed.block_schedule import BlockSchedule
from paged_dist.kernels.seed.descriptor import MultiPageAsyncCopyDescriptor


def paged_flash_attention_kernel(
    lengths_ref,
    page_indices_ref,
    buffer_index_ref,
    init_flag_ref,
    q_ref,
    k_pages_hbm_ref,
    v_pages_hbm_ref,
    o_ref,
    m_ref,
    l_ref,
    k_vmem_buffer,
    v_vmem_buffer,
    k_sems,
    v_sems,
    *,
    batch_size,
    pages_per_compute_block,
    pages_per_sequence,
    mask_value,
    attn_logits_soft_cap,
    megacore_mode,
    sliding_window=None,
    program_ids=(),
):
    """One (sequence, kv head, block) a step of the grid (cores, sequences, kv heads, blocks).

    Args:
      lengths_ref: SMEM int32 [B] live tokens. page_indices_ref: SMEM int32 [B * pages_per_sequence].
      buffer_index_ref, init_flag_ref: SMEM int32 [1], 0 and 1 at launch: which half of the double buffer holds
        the block, and whether no block is in flight yet.
      q_ref: VMEM [G, D], the query times its scale: logits are q.k.
      k_pages_hbm_ref, v_pages_hbm_ref: HBM [Hkv, N, P, D].
      o_ref: VMEM like q_ref, any float dtype: the output, 0 for an empty sequence. It also holds the sum so far
        between blocks, so a narrow dtype rounds it once a block; the inline form keeps it in f32.
      m_ref, l_ref: VMEM f32 [G, n], any n: the largest logit and the softmax's denominator relative to it,
        the same in all n lanes; l is 0 for an empty sequence.
      k_vmem_buffer, v_vmem_buffer: VMEM [2, pages_per_compute_block, P, D] in the pages' dtype.
      k_sems, v_sems: DMA semaphores [2].
      batch_size, pages_per_sequence: B, and the width of the block table.
      megacore_mode: 'batch' or 'kv_head' split these over the grid's leading axis of cores; None is one core.
      mask_value: what a dead token's logit becomes. Whatever it is, a dead token has weight 0.
      attn_logits_soft_cap: logits become cap * tanh(logits / cap); None: they stay.
      sliding_window: attend to the last so many tokens; pages before them are not read.
      program_ids: (core, sequence, kv head, block) where it is called from another body.

    Example:
      Two sequences of 8 and 16 tokens; page n holds the value n, and all scores are alike.

      >>> from functools import partial
      >>> from jax.experimental import pallas as pl
      >>> from jax.experimental.pallas import tpu as pltpu
      >>> kernel = partial(kernels.paged_flash_attention_kernel, batch_size=2, pages_per_sequence=2,
      ...     pages_per_compute_block=1, mask_value=kernels.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None,
      ...     megacore_mode=None)
      >>> a_head = pl.BlockSpec((None, None, 8, 128), lambda core, b, h, *_: (b, h, 0, 0))
      >>> hbm, buffer = pl.BlockSpec(memory_space=pl.ANY), pltpu.VMEM((2, 1, 8, 128), jnp.float32)
      >>> grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=4, grid=(1, 2, 1, 2),
      ...     in_specs=[a_head, hbm, hbm], out_specs=[a_head] * 3,
      ...     scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2,))])
      >>> query, keys = jnp.ones((2, 1, 8, 128)), jnp.zeros((1, 4, 8, 128))  # [B, Hkv, G, D], [Hkv, N, P, D]
      >>> values = jnp.broadcast_to(jnp.arange(4.0)[None, :, None, None], keys.shape)
      >>> lengths, table = jnp.array([8, 16]), jnp.array([3, 0, 1, 2])
      >>> output, m, l = pl.pallas_call(kernel, grid_spec=grid, out_shape=[query] * 3, interpret=True)(
      ...     lengths, table, jnp.array([0]), jnp.array([1]), query, keys, values)
      >>> output[:, 0, 0, 0].tolist(), l[:, 0, 0, 0].tolist()
      ([3.0, 1.5], [8.0, 16.0])
    """
    core, b, h, i = program_ids or tuple(pl.program_id(axis) for axis in range(4))
    body = FlashKernel(
        core,
        lengths_ref,
        page_indices_ref,
        buffer_index_ref,
        init_flag_ref,
        q_ref,
        k_pages_hbm_ref,
        v_pages_hbm_ref,
        k_vmem_buffer,
        v_vmem_buffer,
        k_sems,
        v_sems,
        batch_size=batch_size,
        pages_per_compute_block=pages_per_compute_block,
        pages_per_sequence=pages_per_sequence,
        attn_logits_soft_cap=attn_logits_soft_cap,
        megacore_mode=megacore_mode,
        sliding_window=sliding_window,
    )
    attend_block(body, b, h, i, o_ref, m_ref, l_ref)


@broadcasts
def attend_block(body: FlashKernel, b, h, i, o_ref, m_ref, l_ref) -> None:
    """One step of the grid with blocks in it; refs as in `paged_flash_attention_kernel`, pages as in `FlashKernel`."""
    b, h = body.place(b, h)
    blocks = body.schedule.num_blocks(b)

    @pl.when(i == 0)
    def clear():
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        l_ref[...] = jnp.zeros_like(l_ref)
        o_ref[...] = jnp.zeros_like(o_ref)

    @pl.when(i < blocks)
    def attend():
        carry = m_ref[:, :1], l_ref[:, :1], o_ref[...].astype(jnp.float32)
        m, l, acc = body.step(b, h, i, carry)
        m_ref[...] = jnp.broadcast_to(m, m_ref.shape)
        l_ref[...] = jnp.broadcast_to(l, l_ref.shape)
        o_ref[...] = jnp.where(i == blocks - 1, _divide(acc, l), acc).astype(o_ref.dtype)


def paged_flash_attention_kernel_inline_seq_dim(
    lengths_ref,
    page_indices_ref,
    buffer_index_ref,
    init_flag_ref,
    q_ref,
    k_pages_hbm_ref,
    v_pages_hbm_ref,
    o_ref,
    m_ref,
    l_ref,
    k_vmem_buffer,
    v_vmem_buffer,
    k_sems,
    v_sems,
    *,
    batch_size,
    pages_per_compute_block,
    pages_per_sequence,
    mask_value,
    attn_logits_soft_cap,
    megacore_mode,
    sliding_window=None,
):
    """`paged_flash_attention_kernel` with the blocks in a loop: one (sequence, kv head) a step of the grid.

    The grid is (cores, sequences, kv heads); refs and arguments are those of the other form.

    Example:
      Two sequences of 8 and 16 tokens; page n holds the value n, and all scores are alike.

      >>> from functools import partial
      >>> from jax.experimental import pallas as pl
      >>> from jax.experimental.pallas import tpu as pltpu
      >>> kernel = partial(kernels.paged_flash_attention_kernel_inline_seq_dim, batch_size=2, pages_per_sequence=2,
      ...     pages_per_compute_block=1, mask_value=kernels.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None,
      ...     megacore_mode=None)
      >>> a_head = pl.BlockSpec((None, None, 8, 128), lambda core, b, h, *_: (b, h, 0, 0))
      >>> hbm, buffer = pl.BlockSpec(memory_space=pl.ANY), pltpu.VMEM((2, 1, 8, 128), jnp.float32)
      >>> grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=4, grid=(1, 2, 1),
      ...     in_specs=[a_head, hbm, hbm], out_specs=[a_head] * 3,
      ...     scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2,))])
      >>> query, keys = jnp.ones((2, 1, 8, 128)), jnp.zeros((1, 4, 8, 128))  # [B, Hkv, G, D], [Hkv, N, P, D]
      >>> values = jnp.broadcast_to(jnp.arange(4.0)[None, :, None, None], keys.shape)
      >>> lengths, table = jnp.array([8, 16]), jnp.array([3, 0, 1, 2])
      >>> output, m, l = pl.pallas_call(kernel, grid_spec=grid, out_shape=[query] * 3, interpret=True)(
      ...     lengths, table, jnp.array([0]), jnp.array([1]), query, keys, values)
      >>> output[:, 0, 0, 0].tolist(), l[:, 0, 0, 0].tolist()
      ([3.0, 1.5], [8.0, 16.0])
    """
    core, b, h = (pl.program_id(axis) for axis in range(3))
    body = FlashKernel(
        core,
        lengths_ref,
        page_indices_ref,
        buffer_index_ref,
        init_flag_ref,
        q_ref,
        k_pages_hbm_ref,
        v_pages_hbm_ref,
        k_vmem_buffer,
        v_vmem_buffer,
        k_sems,
        v_sems,
        batch_size=batch_size,
        pages_per_compute_block=pages_per_compute_block,
        pages_per_sequence=pages_per_sequence,
        attn_logits_soft_cap=attn_logits_soft_cap,
        megacore_mode=megacore_mode,
        sliding_window=sliding_window,
    )
    attend_head(body, b, h, o_ref, m_ref, l_ref)


@broadcasts
def attend_head(body: FlashKernel, b, h, o_ref, m_ref, l_ref) -> None:
    """One step of the grid without blocks in it: all of a head's; refs as in `attend_block`."""
    b, h = body.place(b, h)
    rows, width = body.q_ref.shape
    start = (
        jnp.full((rows, 1), -jnp.inf, jnp.float32),
        jnp.zeros((rows, 1), jnp.float32),
        jnp.zeros((rows, width), jnp.float32),
    )
    m, l, acc = lax.fori_loop(0, body.schedule.num_blocks(b), lambda i, carry: body.step(b, h, i, carry), start)
    m_ref[...] = jnp.broadcast_to(m, m_ref.shape)
    l_ref[...] = jnp.broadcast_to(l, l_ref.shape)
    o_ref[...] = _divide(acc, l).astype(o_ref.dtype)


def _divide(acc, l):
    """acc / l, 0 where nothing was attended to."""
    return acc / jnp.where(l == 0.0, 1.0, l)


@dataclasses.dataclass(frozen=True)
class FlashKernel:
    """The refs and options of a kernel, named as `paged_flash_attention_kernel`'s arguments, and one step's work.

    Attributes:
      core: which of the cores this is, the grid's first index.
      sm_scale: logits are sm_scale * q.k; the public bodies want it in the query.
      tokens_per_row: 2 for packed pages, [Hkv, N, P / 2, 128]: q_ref then is [2G, 128], with q[g] in the lanes of
        token j of a row in row j * G + g, and o, m and l have as many rows, one of each for each token of a row, to
        be merged afterwards.
    """

    core: jax.Array
    lengths_ref: jax.Array
    page_indices_ref: jax.Array
    buffer_index_ref: jax.Array
    init_flag_ref: jax.Array
    q_ref: jax.Array
    k_pages_hbm_ref: jax.Array
    v_pages_hbm_ref: jax.Array
    k_vmem_buffer: jax.Array
    v_vmem_buffer: jax.Array
    k_sems: jax.Array
    v_sems: jax.Array
    batch_size: int
    pages_per_compute_block: int
    pages_per_sequence: int
    attn_logits_soft_cap: float | None
    megacore_mode: str | None
    sliding_window: int | None
    sm_scale: float = 1.0
    tokens_per_row: int = 1

    @property
    def schedule(self) -> BlockSchedule:
        num_kv_heads, _, rows, _ = self.k_pages_hbm_ref.shape
        cores = pl.num_programs(0)
        b_start, b_step = (self.core, cores) if self.megacore_mode == "batch" else (0, 1)
        h_start, h_step = (self.core, cores) if self.megacore_mode == "kv_head" else (0, 1)
        return BlockSchedule(
            self.lengths_ref,
            self.batch_size,
            num_kv_heads,
            rows * self.tokens_per_row,
            self.pages_per_compute_block,
            self.pages_per_sequence,
            self.sliding_window,
            b_start,
            b_step,
            h_start,
            h_step,
        )

    def place(self, b, h):
        """The absolute sequence and head of the grid's (b, h) on this core."""
        s = self.schedule
        return b * s.b_step + s.b_start, h * s.h_step + s.h_start

    def copies(self, b, h, i, buffer):
        """The copies of block i's K and V pages."""
        first, count = self.schedule.block(b, i)
        offset = b * self.pages_per_sequence + first
        return tuple(
            MultiPageAsyncCopyDescriptor(
                pages, into.at[buffer], sems.at[buffer], self.page_indices_ref, offset, count, h
            )
            for pages, into, sems in (
                (self.k_pages_hbm_ref, self.k_vmem_buffer, self.k_sems),
                (self.v_pages_hbm_ref, self.v_vmem_buffer, self.v_sems),
            )
        )

    def step(self, b, h, i, carry):
        """(m, l [rows, 1], sum [rows, D]) after block i, whose successor's copies are started meanwhile."""
        buffer = self.buffer_index_ref[0]
        next_b, next_h, next_i = self.schedule.after(b, h, i)
        more = next_b < self.batch_size

        @pl.when(self.init_flag_ref[0] != 0)
        def start_first():
            for copy in self.copies(b, h, i, buffer):
                copy.start()

        # After a core's last block nothing is in flight: where one core runs both halves of a megacore grid,
        # one after the other, the second begins like the first instead of waiting for a copy nobody started.
        self.init_flag_ref[0] = jnp.where(more, 0, 1)

        @pl.when(more)
        def start_next():
            for copy in self.copies(next_b, next_h, next_i, 1 - buffer):
                copy.start()
            self.buffer_index_ref[0] = 1 - buffer

        k_copy, v_copy = self.copies(b, h, i, buffer)
        load_k, load_v = (
            functools.partial(self.load_clean, b, i, copy, ref.at[buffer])
            for copy, ref in ((k_copy, self.k_vmem_buffer), (v_copy, self.v_vmem_buffer))
        )
        # Dead rows of K only make dead scores, but packed rows of both are shared.
        return self.attend(b, i, load_k if self.tokens_per_row > 1 else k_copy.wait_and_get_loaded, load_v, carry)

    def load_clean(self, b, i, copy, ref):
        """What `copy` loads into `ref` [pages, R, W], as f32 [pages * R, W], with zeros for dead tokens.

        A buffer's dead rows may hold NaN, and 0 x NaN is NaN. They are cleared in the buffer, and only in a block
        that has some: a select over every block's V takes as long as its matrix product.
        """
        copy.wait()
        first, _ = self.schedule.block(b, i)
        start, end = self.schedule.tokens(b)
        page_size = self.schedule.page_size
        has_dead = (first * page_size < start) | ((first + self.pages_per_compute_block) * page_size > end)

        @pl.when(has_dead)
        def clear():
            pages, rows, lanes = ref.shape
            for page in range(pages):
                row = _iota((rows, lanes), 0) * self.tokens_per_row
                stream = lax.div(_iota((rows, lanes), 1), jnp.int32(lanes // self.tokens_per_row))
                token = (first + page) * page_size + row + stream
                kept = jnp.where((token >= start) & (token < end), ref[page].astype(jnp.float32), 0.0)
                ref[page] = kept.astype(ref.dtype)

        return ref[...].astype(jnp.float32).reshape(-1, ref.shape[-1])

    def live_scores(self, b, i, shape):
        """bool [query rows, T]: whether the token that a score belongs to is live."""
        first, _ = self.schedule.block(b, i)
        start, end = self.schedule.tokens(b)
        token = first * self.schedule.page_size + _iota(shape, 1) * self.tokens_per_row
        if self.tokens_per_row > 1:  # the query rows of a row's first token, then of its second
            token += lax.div(_iota(shape, 0), jnp.int32(shape[0] // self.tokens_per_row))
        return (token >= start) & (token < end)

    def attend(self, b, i, load_k, load_v, carry):
        """Online softmax (Milakov and Gimelshein, arXiv:1805.02867) over one block, in f32."""
        m, l, acc = carry
        q = self.q_ref[...]
        k = load_k().astype(self.k_vmem_buffer.dtype)  # [T, W]: T rows of a block, a token each or two
        live = self.live_scores(b, i, (q.shape[0], k.shape[0]))
        s = dot(q, k, 1, q.dtype) * self.sm_scale
        if self.attn_logits_soft_cap is not None:
            s = self.attn_logits_soft_cap * jnp.tanh(s / self.attn_logits_soft_cap)
        # Dead tokens never raise the maximum: beside them a live score below theirs would have no weight.
        s = jnp.where(live, in_range(s), LOWEST)
        m_next = jnp.maximum(m, s.max(axis=1, keepdims=True))
        # A select, for with every score of the block masked exp(s - m_next) is 1.
        weight = jnp.where(live, jnp.exp(s - m_next), 0.0)
        keep = jnp.exp(m - m_next)
        l = keep * l + weight.sum(axis=1, keepdims=True)
        acc = keep * acc + dot(weight, load_v().astype(self.v_vmem_buffer.dtype), 0, q.dtype)
        return m_next, l, acc


def _iota(shape, axis):
    return lax.broadcasted_iota(jnp.int32, shape, axis)
