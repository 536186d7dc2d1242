"""The decode kernel's work as a flat list: which pages make a cell, and which ring slots a step uses.

Nothing here branches: the work of the next step's copies is scheduled among this step's vector instructions.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from paged_dist.kernels.decode.launch_plan import NUM_FIELDS, LaunchPlan
from paged_dist.kernels.decode.refs import Refs, given

_SPANS_AT_ONCE = 8  # sequences looked at in one turn of the list's loop: a turn costs some 20 cycles by itself


class Cell(NamedTuple):
    """Up to `pages_per_cell` consecutive pages of one sequence: the unit of work. The last step has empty ones.

    `start` and `end` count tokens from the cell's first.
    """

    b: jax.Array  # the sequence; B where there is none
    is_first: jax.Array  # of its sequence
    is_last: jax.Array
    end: jax.Array  # behind the last live token, beyond the cell where the sequence goes on; 0 where there is none
    column: jax.Array  # the first page's place in the block table
    rows: jax.Array  # stored rows up to the end of the last live tile
    start: jax.Array  # first live token: 0 or less but in a sequence's first cell

    @classmethod
    def load(cls, ref, slot, c: int | jax.Array, plan: LaunchPlan) -> Cell:
        """The cell `c` of the step in `slot`, from SMEM."""
        at = slot * (plan.C * NUM_FIELDS)
        packed, end, column, rows = (ref[at + (c * NUM_FIELDS + i)] for i in range(4))
        start = ref[at + (c * NUM_FIELDS + 4)] if plan.has_starts else jnp.int32(0)
        return cls(div(packed, 4), (packed & 1) != 0, (packed & 2) != 0, end, column, rows, start)

    def store(self, ref, slot, c: int, plan: LaunchPlan) -> None:
        """Notes it in SMEM as the cell `c` of the step in `slot`."""
        at = slot * (plan.C * NUM_FIELDS)
        packed = self.b * 4 + jnp.where(self.is_first, 1, 0) + jnp.where(self.is_last, 2, 0)
        fields = (packed, self.end, self.column, self.rows, self.start)
        for i, value in enumerate(fields if plan.has_starts else fields[:-1]):
            ref[at + (c * NUM_FIELDS + i)] = value

    def rows_skipped(self, plan: LaunchPlan):
        """Stored rows before the first live tile; only the first page has some."""
        if not plan.has_starts:
            return jnp.int32(0)
        tile_tokens = plan.tile * plan.tokens_per_row
        return div(jnp.maximum(self.start, 0), tile_tokens) * plan.tile


@functools.partial(jax.tree_util.register_dataclass, data_fields=("here", "cells"), meta_fields=("ahead",))
@dataclasses.dataclass(frozen=True)
class Ring:
    """The slots of one step s in the ring buffers.

    `here`: in the rings of `ahead` + 1 buffers of K, and of V. `cells`: in the ring of `ahead` + 2 notes of cells. What
    is fetched with K and used a step later (V's scales, or V itself) lies in a ring of `ahead` + 2 too.
    """

    here: jax.Array
    cells: jax.Array
    ahead: int

    @classmethod
    def start(cls, plan: LaunchPlan) -> Ring:
        """Those of step 0."""
        return cls(jnp.int32(0), jnp.int32(0), plan.sizes.steps_ahead)

    def of_values(self, plan: LaunchPlan):
        """V's slot."""
        return self.cells if plan.values_with_keys else self.here

    def plus(self, by: int) -> Ring:
        """Those of step s + by."""
        wrap = lambda slot, size: slot if by % size == 0 else _wrap_slot(slot + by % size, size)
        return Ring(wrap(self.here, self.ahead + 1), wrap(self.cells, self.ahead + 2), self.ahead)


def _wrap_slot(slot, size: int):
    """A slot of 0 to 2 * size - 1, modulo size, without a division."""
    return jnp.where(slot >= size, slot - size, slot)


@dataclasses.dataclass(frozen=True)
class WorkList:
    """The sequences that one core works on: their numbers are in SMEM (`Refs.work`), empty ones left out."""

    plan: LaunchPlan
    refs: Refs
    rows: jax.Array  # this core's live sequences
    live_rows: jax.Array  # those of all cores
    is_ragged: jax.Array  # whether any cell of any core may have a token that is not live

    @staticmethod
    def span(plan: LaunchPlan, refs: Refs, b):
        """(first page, pages, start, end) of sequence b: 0 pages if empty, tokens counted from the first page's.

        Of several new tokens' spans, from where the first's begins to where the last's ends.
        """
        end = jnp.minimum(refs.lengths[of_query(plan, b, plan.Q - 1)], plan.S * plan.page_size)
        if not plan.has_starts:
            return jnp.int32(0), div(jnp.maximum(end, 0) + (plan.page_size - 1), plan.page_size), jnp.int32(0), end
        start = jnp.int32(0)
        if refs.starts is not None:
            start = jnp.maximum(refs.starts[of_query(plan, b, 0)], start)
        if plan.sliding_window is not None:
            first_end = end
            if plan.Q > 1:
                first_end = jnp.minimum(refs.lengths[of_query(plan, b, 0)], plan.S * plan.page_size)
            start = jnp.maximum(first_end - plan.sliding_window, start)
        first = div(start, plan.page_size)
        pages = div(jnp.maximum(end, 0) + (plan.page_size - 1), plan.page_size) - first
        skipped = first * plan.page_size
        return first, jnp.where(end > start, pages, 0), start - skipped, end - skipped

    @classmethod
    def build(cls, plan: LaunchPlan, refs: Refs, core) -> WorkList:
        """Walks the lengths once. Two cores deal the sequences out among them: each goes to the one with less."""
        zero = jnp.int32(0)
        at_once = min(_SPANS_AT_ONCE, plan.B)
        # Their ends' low bits tell, where a cell is a power of two of tokens. Any other is taken for ragged.
        tokens = plan.tokens_per_cell
        cells_may_be_full = plan.pages_per_cell * plan.R == plan.T and tokens & (tokens - 1) == 0

        def look_at(turn, carry):
            for i in range(at_once):
                carry = look_at_one(turn * at_once + i, *carry)
            return carry

        def look_at_one(b, rows, live_rows, mine, others, dead):
            inside = b < plan.B
            b = b if plan.B % at_once == 0 else jnp.minimum(b, plan.B - 1)
            pages, start, end = 0, jnp.int32(0), refs.lengths[of_query(plan, b, plan.Q - 1)]
            if plan.S % plan.pages_per_cell:  # a full table ends inside a cell
                end = jnp.minimum(end, plan.S * plan.page_size)
            live = end > 0
            if plan.has_starts or plan.num_cores > 1:
                _, pages, start, end = cls.span(plan, refs, b)
                live = pages > 0
            if plan.B % at_once:
                live &= inside
            takes = live
            if plan.num_cores > 1:
                # Both cores come to the same verdict: core 0 takes what would be a tie.
                takes &= (mine < others) | ((mine == others) & (core == 0))
                mine = jnp.where(takes, mine + pages, mine)
                others = jnp.where(live & ~takes, others + pages, others)
                live_rows += live.astype(jnp.int32)
            refs.work[rows] = b
            dead |= (end | start) if cells_may_be_full else jnp.int32(1)
            return rows + takes.astype(jnp.int32), live_rows, mine, others, dead

        carry = (zero,) * 5
        turns = pl.cdiv(plan.B, at_once)
        carry = look_at(0, carry) if turns == 1 else lax.fori_loop(0, turns, look_at, carry)
        rows, live_rows, _, _, dead = carry
        return cls(
            plan, refs, rows, live_rows if plan.num_cores > 1 else rows, (dead & (plan.tokens_per_cell - 1)) != 0
        )

    def take(self, cursor):
        """(next cell, cursor behind it) from `cursor`: a sequence's place in the list, its pages taken so far."""
        plan = self.plan
        j, done = cursor
        live = j < self.rows
        b = self.refs.work[jnp.minimum(j, jnp.maximum(self.rows - 1, 0))]
        first, pages, start, end = self.span(plan, self.refs, b)
        left = pages - done
        tokens_done = done * plan.page_size
        end = jnp.where(live, end - tokens_done, 0)
        tile_tokens = plan.tile * plan.tokens_per_row
        cell = Cell(
            b=jnp.where(live, b, plan.B),
            is_first=live & (done == 0),
            is_last=live & (left <= plan.pages_per_cell),
            end=end,
            column=first + done,
            rows=div(jnp.minimum(end, plan.tokens_per_cell) + (tile_tokens - 1), tile_tokens) * plan.tile,
            start=jnp.where(live, start - tokens_done, 0),
        )
        more = left > plan.pages_per_cell
        return cell, (jnp.where(more, j, j + 1), jnp.where(more, done + plan.pages_per_cell, 0))

    def page_id(self, cell: Cell, p: int | jax.Array):
        """The id of the cell's page p; of some page of the table where the cell has fewer.

        An id outside the pool, which only a wrong table has, becomes the pool's last page.
        """
        plan, b, column = self.plan, jnp.minimum(cell.b, self.plan.B - 1), cell.column + p
        if plan.has_starts or plan.S % plan.pages_per_cell:
            column = jnp.minimum(column, plan.S - 1)
        table = self.refs.table
        # .at[b][column] takes half the scalar work of [b, column].
        page = table[column, b] if plan.table_is_transposed else table.at[b][column]
        if plan.clamps_before:
            return page
        last = jnp.uint32(plan.problem.num_pages - 1)
        return jnp.minimum(page.astype(jnp.uint32), last).astype(jnp.int32)

    def note_step(self, slot, tiles, pages) -> None:
        """Keeps how many tiles, and how many pages' scales, a step fetches for K, and for V, until it is waited for."""
        self.refs.tiles[slot] = tiles
        if self.plan.is_quantized:
            given(self.refs.pages)[slot] = pages

    def pages_of(self, slot):
        """How many pages the step in this slot fetches scales of."""
        return given(self.refs.pages)[slot]

    def tiles_of(self, slot):
        """How many tiles of K the step in this slot fetches."""
        return self.refs.tiles[slot]

    def has_step(self, slot):
        """Whether the step in this slot has any cell. Cells fill a step in order, so only cell 0 is looked at."""
        return Cell.load(self.refs.cells, slot, 0, self.plan).end > 0

    def clear_before_first(self) -> None:
        """The step before the first: cells of no sequence."""
        zero, no, slot = jnp.int32(0), jnp.bool_(False), self.plan.sizes.steps_ahead + 1
        self.note_step(slot, zero, zero)
        for c in range(self.plan.C):
            Cell(jnp.int32(self.plan.B), no, no, zero, zero, zero, zero).store(self.refs.cells, slot, c, self.plan)


def of_query(plan: LaunchPlan, b, q: int):
    """The place of sequence b's new token q in `Refs.lengths` and `Refs.starts`."""
    return b if plan.Q == 1 else b * plan.Q + q


def div(x, by: int):
    """x // by for x >= 0: a shift where it can be, for a signed division takes six scalar operations even then."""
    return (
        lax.shift_right_logical(x, jnp.int32(by.bit_length() - 1)) if by & (by - 1) == 0 else lax.div(x, jnp.int32(by))
    )


def rem(x, by: int):
    """x % by for x >= 0."""
    return x & (by - 1) if by & (by - 1) == 0 else lax.rem(x, jnp.int32(by))
