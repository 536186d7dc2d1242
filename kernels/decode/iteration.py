"""`Iteration`: one turn of the decode kernel's loop, and what it waits for before it computes."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist.kernels.decode.edges import clear_edges
from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.decode.refs import Refs, given
from paged_dist.kernels.decode.work_list import Ring, WorkList
from paged_dist.kernels.tiling import LANES

_LOG2_E = 1.4426950408889634  # the hardware raises 2 to a power


@dataclasses.dataclass(frozen=True)
class Iteration:
    """One turn of the loop: scores of step s, which `ring` has the place of, and sums of step s-1."""

    plan: LaunchPlan
    refs: Refs
    work: WorkList
    ring: Ring

    @property
    def copy_turns(self) -> int:
        """How often an iteration calls `advance` on a stream of copies.

        After each score product for K, after each sum product for V. Where K's and V's copies are one stream, after
        each product of both kinds.
        """
        plan = self.plan
        return (2 if plan.values_with_keys else 1) * plan.C * plan.H * len(plan.parts)

    def wait_for_copies(self) -> None:
        """Waits for step s's K and step s-1's V."""
        self._wait(self.ring, self.refs.k, self.refs.k_sems)
        if self.plan.is_quantized:
            self._wait_for_scales()
        self.wait_for_values()

    def wait_for_values(self) -> None:
        """Waits for step s-1's V."""
        if not self.plan.values_with_keys:
            self._wait(self.ring.plus(-1), self.refs.v, self.refs.v_sems)

    def _wait_for_scales(self) -> None:
        """Waits for step s's scales of K and V, which came with its K."""
        plan, ref = self.plan, given(self.refs.v_scales)
        rows = self.work.pages_of(self.ring.cells) * (2 * plan.Hkv * plan.scale_rows_per_page)
        part = ref.reshape(math.prod(ref.shape[:-2]), 1, LANES).at[pl.ds(0, rows)]
        pl.when(rows > 0)(pltpu.make_async_copy(part, part, self.refs.k_sems.at[self.ring.here]).wait)

    def _wait(self, ring: Ring, ref, sems) -> None:
        """Waits for a step's tiles. A wait only counts bytes: one of as many bytes stands for all the copies."""
        plan, tiles = self.plan, self.work.tiles_of(ring.cells) * (2 if self.plan.values_with_keys else 1)
        if plan.tile == plan.register_rows:
            blocks = ref.reshape(math.prod(ref.shape[:-1]) // plan.tile, plan.tile, LANES)
            part = blocks.at[pl.ds(0, tiles * ref.shape[-3])]
        else:  # pages, which a buffer pads to whole registers: those of HBM count right
            part = self.refs.key_pages.at[0, 0, pl.ds(0, tiles * plan.Hkv)]
        pl.when(tiles > 0)(pltpu.make_async_copy(part, part, sems.at[ring.here]).wait)

    def clear_edges(self) -> None:
        """Zeros the dead tokens of step s-1's V that share a tile with live ones: they may hold NaN."""
        before = self.ring.plus(-1)
        clear_edges(self.plan, self.refs.cells, before, self.refs.v.at[before.of_values(self.plan)])

    def clear_key_edges(self) -> None:
        """The same for step s's K where two tokens share a row; elsewhere a dead K only makes a dead score."""
        if self.plan.tokens_per_row > 1:
            clear_edges(self.plan, self.refs.cells, self.ring, self.refs.k.at[self.ring.here])

    def widened(self, pages):
        """Pages as the matrix unit takes them."""
        return pages.astype(jnp.bfloat16) if self.plan.widens_pages else pages

    def each_head(self, g, product, shape):
        """Computes `product(h)` for each kv head h in row group g, and keeps from each only that head's rows."""
        plan = self.plan
        row = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 0), jnp.int32(plan.M // plan.tokens_per_row))
        merged = product(g * plan.heads_per_group)
        for t in range(1, plan.heads_per_group):
            merged = jnp.where(row < t * plan.rows_per_head, merged, product(g * plan.heads_per_group + t))
        return merged


def exp_of_difference(x):
    """exp(x), x a difference of scores. Subtract first: multiplying scores by log2(e) before could overflow f32."""
    return jnp.exp2(x * _LOG2_E)
