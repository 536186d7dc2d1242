"""`BlockSizes`: how a launch of the decode kernel cuts its work."""

from __future__ import annotations

import dataclasses

from paged_dist._errors import require


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How a launch cuts its work. It changes speed, and results only by f32 rounding.

    Attributes:
      pages_per_cell: consecutive pages of one sequence that share a softmax step; a power of two.
      cells_per_step: cells, of one sequence or several, in one iteration of the kernel's loop; a power of two.
      steps_ahead: steps whose pages are in flight while one is computed; 1 waits for them.

    Raises:
      ValueError: a value outside these rules.

    Example:
      >>> sizes = kernels.BlockSizes(pages_per_cell=4, cells_per_step=2)
      >>> sizes.steps_ahead
      2
      >>> pages, query = jnp.ones((2, 8, 128, 128), jnp.bfloat16), jnp.ones((1, 8, 128), jnp.bfloat16)
      >>> lengths, tables = jnp.array([300], jnp.int32), jnp.array([[5, 2, 6]], jnp.int32)
      >>> kernels.paged_decode_attention(query, pages, pages, lengths, tables, block_sizes=sizes).shape
      (1, 8, 128)
      >>> kernels.BlockSizes(pages_per_cell=3, cells_per_step=2)
      Traceback (most recent call last):
      paged_dist._errors.BadValue: pages_per_cell=3: must be a power of two
    """

    pages_per_cell: int
    cells_per_step: int
    steps_ahead: int = 2

    def __post_init__(self):
        for name in ("pages_per_cell", "cells_per_step", "steps_ahead"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(whole, name, value, "must be a whole number, at least 1")
            require(name == "steps_ahead" or value & (value - 1) == 0, name, value, "must be a power of two")
