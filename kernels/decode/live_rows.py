"""The mask of a cell's scores: which tokens each query row attends to.

With one new token all rows have the same span; with several, each new token's rows have their own.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.decode.refs import Refs
from paged_dist.kernels.decode.work_list import Cell, of_query
from paged_dist.kernels.tiling import LANES, SUBLANES


@dataclasses.dataclass(frozen=True)
class LiveRows:
    """The live span of a cell's score rows, in tokens from the cell's first: an int32 scalar, [M, 128] where Q > 1."""

    end: jax.Array
    start: jax.Array | None

    @classmethod
    def of(cls, plan: LaunchPlan, refs: Refs, cell: Cell) -> LiveRows:
        end = jnp.minimum(cell.end, plan.tokens_per_cell) if plan.rows_per_cell < plan.T else cell.end
        if plan.Q == 1:
            return cls(end, cell.start if plan.has_starts else None)
        b, skipped = jnp.minimum(cell.b, plan.B - 1), cell.column * plan.page_size
        ends, starts = [], []
        for q in range(plan.Q):
            # No later than the last's, which knows of the table's end and of cells of no sequence.
            own_end = jnp.minimum(refs.lengths[of_query(plan, b, q)] - skipped, cell.end)
            ends.append(jnp.minimum(own_end, end))
            own_start = cell.start if refs.starts is None else refs.starts[of_query(plan, b, q)] - skipped
            if plan.sliding_window is not None:
                own_start = jnp.maximum(own_start, own_end - plan.sliding_window)
            starts.append(own_start)
        return cls(_by_row(plan, ends), _by_row(plan, starts) if plan.has_starts else None)

    def of_tokens(self, token: jax.Array) -> jax.Array:
        """Whether each score's token (int32 [M, columns]) is live for its row."""
        wide = lambda x: x if x.ndim == 0 else jnp.concatenate([x] * (token.shape[1] // LANES), axis=1)
        live = token < wide(self.end)
        if self.start is not None:
            live &= token >= wide(self.start)
        return live


def _by_row(plan: LaunchPlan, by_query: list[jax.Array]) -> jax.Array:
    """[M, 128] int32: in each row the scalar of the row's new token.

    Made register by register, for few registers hold more than one token's rows.
    """
    made = {}
    registers = []
    for first in range(0, plan.M, SUBLANES):
        queries = tuple(plan.query_of_row(r) for r in range(first, min(first + SUBLANES, plan.M)))
        if queries not in made:
            shape = (len(queries), LANES)
            row = lax.broadcasted_iota(jnp.int32, shape, 0)
            x = jnp.full(shape, by_query[queries[0]])
            for r in range(1, len(queries)):
                if queries[r] != queries[r - 1]:
                    x = jnp.where(row < r, x, by_query[queries[r]])
            made[queries] = x
        registers.append(made[queries])
    return registers[0] if len(registers) == 1 else jnp.concatenate(registers, axis=0)
