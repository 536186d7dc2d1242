"""The decode kernel's copies of pages: scalar work in small pieces, to be done between pieces of vector work."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist.kernels._tiling import LANES
from paged_dist.kernels.paged_attention.decode_plan import Plan
from paged_dist.kernels.paged_attention.decode_work import Cell, Ring, WorkList, div, rem


class Paced:
    """A stream of small pieces of scalar work, done in equal parts between pieces of vector work."""

    def __init__(self, pieces, count: int):
        self._pieces, self._count, self._parts = pieces, count, 0

    def advance(self, parts: int) -> None:
        """Does the next of `parts` parts."""
        before, self._parts = self._parts, self._parts + 1
        for _ in range(self._count * self._parts // parts - self._count * before // parts):
            next(self._pieces)


@dataclasses.dataclass
class Copies:
    """Starts the copies of pages: the next step's K, and the V of a step whose K was taken before."""

    plan: Plan
    refs: NamedTuple  # decode_kernel.Refs
    work: WorkList
    cursor: tuple | None

    def start_keys(self, ring: Ring) -> None:
        self.keys(ring).advance(1)

    def start_values(self, ring: Ring) -> None:
        self.values(ring).advance(1)

    def keys(self, ring: Ring) -> Paced:
        """The next step's cells are taken from the cursor into `ring`'s slots."""

        def cells():
            tiles = pages = jnp.int32(0)
            for c in range(self.plan.C):
                cell, self.cursor = self.work.take(self.cursor)
                cell.store(self.refs.cells, ring.cells, c, self.plan)
                tiles += div(cell.rows - cell.rows_skipped(self.plan), self.plan.tile)
                pages += div(cell.rows + (self.plan.R - 1), self.plan.R)
                if c + 1 == self.plan.C:
                    self.work.note_step(ring.cells, tiles, pages)
                yield cell

        refs = self.refs
        return self._paced(cells(), ring.here, refs.k_sems, (refs.key_pages, refs.k), (refs.key_scales, refs.k_scales))

    def values(self, ring: Ring) -> Paced:
        """The cells that `keys` noted in `ring`'s slots."""
        refs = self.refs
        cells = (Cell.load(refs.cells, ring.cells, c, self.plan) for c in range(self.plan.C))
        return self._paced(
            cells, ring.here, refs.v_sems, (refs.value_pages, refs.v), (refs.value_scales, refs.v_scales)
        )

    def _paced(self, cells, slot, sems, pages, scales) -> Paced:
        """`pages` and `scales` are (pool, ring of buffers); no scales are (None, None)."""
        plan = self.plan
        layer = 0 if self.refs.layer is None else self.refs.layer[0]
        pool, scale_pool = (x if x is None else x.at[layer] for x in (pages[0], scales[0]))
        sem = sems.at[slot]

        def pieces():
            for c, cell in enumerate(cells):
                for p in range(plan.pages_per_cell):
                    page = self.work.page_id(cell, p)
                    self._start_page(cell, p, page, pool, pages[1].at[slot, c], sem)
                    if plan.is_quantized:
                        self._start_scales(cell, p, page, scale_pool, scales[1].at[slot, c], sem)
                    yield

        return Paced(pieces(), plan.C * plan.pages_per_cell)

    def _start_scales(self, cell: Cell, p: int, page, pool, to, sem) -> None:
        """The rows of scales of the cell's page p, all heads; a row that pages share comes once for each."""
        plan, rows = self.plan, self.plan.scale_rows_per_page
        first = page * rows if plan.page_size >= LANES else div(page, LANES // plan.page_size)

        @pl.when(cell.rows > p * plan.R)
        def _():
            there = to.at[:, pl.ds(p * rows, rows)]
            pltpu.make_async_copy(pool.at[:, pl.ds(first, rows)], there, sem).start()

    def _start_page(self, cell: Cell, p: int, page, pool, to, sem) -> None:
        plan = self.plan
        is_whole = cell.rows >= (p + 1) * plan.R
        skipped = cell.rows_skipped(plan) if p == 0 else jnp.int32(0)
        if p == 0 and plan.has_starts:
            is_whole &= skipped == 0

        @pl.when(is_whole)  # small enough to become a predicate, not a branch
        def _():
            self._start(pool, page, pl.ds(0, plan.R), to, pl.ds(p * plan.page_rows, plan.R), sem)

        if plan.tile == plan.R:
            return
        if p == 0 and plan.has_starts:
            self._start_tiles(page, skipped, jnp.minimum(cell.rows, plan.R) - skipped, 0, pool, to, sem, skipped > 0)
        if p + 1 == plan.pages_per_cell:  # the live tiles of the last page, where they are not all
            last, some = div(cell.rows, plan.R), rem(cell.rows, plan.R)
            starts_here = some > 0
            if plan.has_starts:
                starts_here &= (last > 0) | (cell.start < plan.tile * plan.tokens_per_row)
            page = self.work.page_id(cell, jnp.minimum(last, plan.pages_per_cell - 1))
            self._start_tiles(page, 0, some, last * plan.R, pool, to, sem, starts_here)

    def _start_tiles(self, page, first, rows, at, pool, to, sem, condition) -> None:
        """Rows [first, first + rows) of a page to row `at` + `first` on, both multiples of a tile."""
        tile = self.plan.tile
        rows = pl.multiple_of(rows, tile)
        source = pl.ds(first if isinstance(first, int) else pl.multiple_of(first, tile), rows)
        there = pl.ds(pl.multiple_of(at + first, tile), rows)

        @pl.when(condition)
        def _():
            self._start(pool, page, source, to, there, sem)

    def _start(self, pool, page, source, to, there, sem) -> None:
        """All heads in one copy; rows of more than 128 lanes, whose tiles differ in HBM and VMEM, in pieces."""
        plan = self.plan
        if plan.W == LANES:
            pltpu.make_async_copy(pool.at[:, page, source], to.at[:, there], sem).start()
            return
        for h in range(plan.Hkv):
            for i in range(plan.W // LANES):
                lanes = pl.ds(i * LANES, LANES)
                block = to.at[h * (plan.W // LANES) + i, there]
                pltpu.make_async_copy(pool.at[h, page, source, lanes], block, sem).start()
