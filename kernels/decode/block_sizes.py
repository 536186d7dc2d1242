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
