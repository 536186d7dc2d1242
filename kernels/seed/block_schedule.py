"""`BlockSchedule`: the order in which a seed kernel's core goes through blocks of pages, and what each block holds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """Which block a core computes after which, and the pages of each.

    b, h and i number the sequence, the kv head and the block in the whole launch, not in the core's part of it.
    """

    lengths_ref: jax.Array
    batch_size: int
    num_kv_heads: int
    page_size: int
    pages_per_block: int
    pages_per_sequence: int
    sliding_window: int | None
    b_start: jax.Array | int  # the core's first sequence and head, and how far it steps
    b_step: jax.Array | int
    h_start: jax.Array | int
    h_step: jax.Array | int

    def tokens(self, b):
        """(start, end) of sequence b's live tokens; a length beyond the table is cut to it."""
        end = jnp.minimum(self.lengths_ref[b], self.pages_per_sequence * self.page_size)
        start = 0 if self.sliding_window is None else jnp.maximum(end - self.sliding_window, 0)
        return start, end

    def pages(self, b):
        """(first page, number of pages) that sequence b reads."""
        start, end = self.tokens(b)
        first = lax.div(jnp.int32(start), jnp.int32(self.page_size))
        return first, lax.div(end + (self.page_size - 1), jnp.int32(self.page_size)) - first

    def num_blocks(self, b):
        """Blocks of sequence b, 0 where it is empty."""
        _, pages = self.pages(b)
        return lax.div(pages + (self.pages_per_block - 1), jnp.int32(self.pages_per_block))

    def block(self, b, i):
        """(first page, pages) of block i: the last one holds what is left."""
        first, pages = self.pages(b)
        done = i * self.pages_per_block
        return first + done, jnp.minimum(pages - done, self.pages_per_block)

    def after(self, b, h, i):
        """(b, h, i) of the block after this one on this core; b >= batch_size after the last."""

        def next_sequence():
            return (
                lax.while_loop(
                    lambda b: (b < self.batch_size) & (self.lengths_ref[jnp.minimum(b, self.batch_size - 1)] <= 0),
                    lambda b: b + self.b_step,
                    b + self.b_step,
                ),
                jnp.int32(self.h_start),
                jnp.int32(0),
            )

        def next_head():
            return lax.cond(
                h + self.h_step < self.num_kv_heads, lambda: (b, h + self.h_step, jnp.int32(0)), next_sequence
            )

        return lax.cond(i + 1 < self.num_blocks(b), lambda: (b, h, i + 1), next_head)
