"""How the decode kernel starts the DMAs of pages: a few at a time, between pieces of vector work.

Looking up a page and starting its copies is scalar work. Done in one go it would leave the vector units idle; spread
over a step's products it is scheduled beside them.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.decode.refs import Ref, Refs, given
from paged_dist.kernels.decode.work_list import Cell, Ring, WorkList, div, rem
from paged_dist.kernels.tiling import LANES

_EARLY = 0.85  # where K's and V's copies are one stream; between 0.8 and 0.9 by replay


class PacedWork:
    """Small pieces of scalar work, of which each `advance` does an equal part.

    `early`: the fraction done by `advance`; `finish` does the rest while the last products are still in flight.
    """

    def __init__(self, pieces, count: int, early: float = 1.0):
        self._pieces, self._count, self._parts = pieces, int(count * early), 0

    def advance(self, parts: int) -> None:
        """Does the pieces of one turn, of `parts` turns in all."""
        before, self._parts = self._parts, self._parts + 1
        for _ in range(self._count * self._parts // parts - self._count * before // parts):
            next(self._pieces)

    def finish(self) -> None:
        """Does what is left."""
        for _ in self._pieces:
            pass


@dataclasses.dataclass
class StepCopies:
    """Starts the copies of one step's K and of one step's V.

    `cursor` is where the work list goes on: K's copies take the step's cells from there, V's use the same cells later.
    """

    plan: LaunchPlan
    refs: Refs
    work: WorkList
    cursor: tuple | None

    def start_keys(self, ring: Ring, *, with_values: bool) -> None:
        """All of `keys` at once."""
        self.keys(ring, with_values=with_values).finish()

    def start_values(self, ring: Ring) -> None:
        """All of `values` at once."""
        self.values(ring).finish()

    def keys(self, ring: Ring, *, with_values: bool) -> PacedWork:
        """The copies of K (and V) of the next step: its cells are taken from the cursor and noted at `ring`."""

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

        plan, refs, layer = self.plan, self.refs, self._layer
        pages = [(refs.key_pages.at[layer], refs.k.at[ring.here])]
        if with_values:
            pages.append((refs.value_pages.at[layer], refs.v.at[ring.of_values(plan)]))
        scales = []
        if plan.is_quantized:  # V's scales come with K's: their page is looked up anyway
            scales.append((given(refs.key_scales).at[layer], given(refs.k_scales).at[ring.here]))
            scales.append((given(refs.value_scales).at[layer], given(refs.v_scales).at[ring.cells]))
        early = _EARLY if with_values else 1.0
        return self._paced(cells(), PageCopies(pages, scales, refs.k_sems.at[ring.here]), early)

    def values(self, ring: Ring) -> PacedWork:
        """The copies of V of the step whose cells `keys` noted at `ring`."""
        plan, refs = self.plan, self.refs
        cells = (Cell.load(refs.cells, ring.cells, c, plan) for c in range(plan.C))
        pages = [(refs.value_pages.at[self._layer], refs.v.at[ring.of_values(plan)])]
        sems = refs.k_sems if plan.values_with_keys else refs.v_sems
        return self._paced(cells, PageCopies(pages, [], sems.at[ring.here]))

    @property
    def _layer(self):
        # A layer that there is, whatever the caller says: bounds are not checked.
        layers = self.plan.problem.num_layers
        return 0 if self.refs.layer is None else jnp.clip(self.refs.layer[0], 0, layers - 1)

    def _paced(self, cells, copies: PageCopies, early: float = 1.0) -> PacedWork:
        plan = self.plan

        def pieces():
            for c, cell in enumerate(cells):
                for p in range(plan.pages_per_cell):
                    self._start_page(cell, p, copies.of_cell(c))
                    yield

        return PacedWork(pieces(), plan.C * plan.pages_per_cell, early)

    def _start_page(self, cell: Cell, p: int, copies: PageCopies) -> None:
        """Starts the copy of the cell's page p: whole, or the live tiles of a sequence's first or last page."""
        plan = self.plan
        page = self.work.page_id(cell, p)
        is_whole = cell.rows >= (p + 1) * plan.R
        skipped = cell.rows_skipped(plan) if p == 0 else jnp.int32(0)
        if p == 0 and plan.has_starts:
            is_whole &= skipped == 0

        @pl.when(is_whole)  # small enough to become a predicate, not a branch
        def _():
            copies.start(plan, page, pl.ds(0, plan.R), pl.ds(p * plan.page_rows, plan.R))

        if copies.scales:
            pl.when(cell.rows > p * plan.R)(lambda: copies.start_scales(plan, page, p))

        if plan.tile == plan.R:
            return
        if p == 0 and plan.has_starts:
            rows = jnp.minimum(cell.rows, plan.R) - skipped
            self._start_tiles(copies, page, 0, skipped, rows, skipped > 0)
        if p + 1 == plan.pages_per_cell:  # the live tiles of the last page, where they are not all
            last, some = div(cell.rows, plan.R), rem(cell.rows, plan.R)
            starts_here = some > 0
            if plan.has_starts:
                starts_here &= (last > 0) | (cell.start < plan.tile * plan.tokens_per_row)
            page = self.work.page_id(cell, jnp.minimum(last, plan.pages_per_cell - 1))
            self._start_tiles(copies, page, last, 0, some, starts_here)

    def _start_tiles(self, copies: PageCopies, page, p, first, rows, condition) -> None:
        """Rows [first, first + rows) of a page, both multiples of a tile, to the place of the cell's page p."""
        plan, tile = self.plan, self.plan.tile
        rows = pl.multiple_of(rows, tile)
        source = pl.ds(first if isinstance(first, int) else pl.multiple_of(first, tile), rows)
        there = pl.ds(pl.multiple_of(p * plan.R + first, tile), rows)
        pl.when(condition)(lambda: copies.start(plan, page, source, there))


@dataclasses.dataclass(frozen=True)
class PageCopies:
    """Source and destination of a step's (or one cell's) page copies: pairs of a layer's pool and VMEM buffers."""

    pages: list[tuple[Ref, Ref]]  # [Hkv, N, R, W]; [C, blocks, T, 128], of a cell less C
    scales: list[tuple[Ref, Ref]]  # [Hkv, rows, 1, 128]; [C, Hkv, rows, 1, 128]
    sem: Ref

    def of_cell(self, c: int) -> PageCopies:
        """Those of the step's cell c."""
        pages, scales = ([(pool, to.at[c]) for pool, to in pairs] for pairs in (self.pages, self.scales))
        return PageCopies(pages, scales, self.sem)

    def start(self, plan: LaunchPlan, page, source, there) -> None:
        """Rows `source` of a page to rows `there` of its buffer, all heads in one copy.

        Rows of more than 128 lanes go in pieces of 128, for their tiles differ in HBM and VMEM.
        """
        for pool, to in self.pages:
            if plan.W == LANES:
                pltpu.make_async_copy(pool.at[:, page, source], to.at[:, there], self.sem).start()
                continue
            for h in range(plan.Hkv):
                for i in range(plan.W // LANES):
                    lanes = pl.ds(i * LANES, LANES)
                    block = to.at[h * (plan.W // LANES) + i, there]
                    pltpu.make_async_copy(pool.at[h, page, source, lanes], block, self.sem).start()

    def start_scales(self, plan: LaunchPlan, page, p: int) -> None:
        """All rows of scales of a cell's page p; a row that pages share comes once for each."""
        rows = plan.scale_rows_per_page
        first = page * rows if plan.page_size >= LANES else div(page, LANES // plan.page_size)
        for pool, to in self.scales:
            copy = pltpu.make_async_copy(pool.at[:, pl.ds(first, rows)], to.at[:, pl.ds(p * rows, rows)], self.sem)
            copy.start()
