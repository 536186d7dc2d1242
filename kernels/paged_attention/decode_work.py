"""The scalar side of the decode kernel: which pages make a cell, and where in the rings a step lives.

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

from paged_dist.kernels.paged_attention.decode_plan import Plan

_SPANS_AT_ONCE = 8  # sequences looked at in one turn of the list's loop: a turn costs some 20 cycles by itself


class Cell(NamedTuple):
    """Up to `pages_per_cell` pages of one sequence. `start` and `end` count tokens from the cell's first."""

    b: jax.Array  # the sequence; B where there is none
    start: jax.Array  # first live token: 0 or less but in a sequence's first cell
    end: jax.Array  # behind the last live token, beyond the cell where the sequence goes on; 0 where there is none
    is_first: jax.Array  # of its sequence
    is_last: jax.Array

    @classmethod
    def load(cls, ref, slot, c: int | jax.Array, plan: Plan) -> Cell:
        """The cell `c` of the step in `slot`, from SMEM."""
        at = slot * (plan.C * NUM_FIELDS)
        packed, end = (ref[at + (c * NUM_FIELDS + i)] for i in range(2))
        start = ref[at + (c * NUM_FIELDS + 2)] if plan.has_starts else jnp.int32(0)
        return cls(lax.shift_right_logical(packed, 2), start, end, (packed & 1) != 0, (packed & 2) != 0)

    def store(self, ref, slot, c: int, plan: Plan) -> None:
        at = slot * (plan.C * NUM_FIELDS)
        flags = jnp.where(self.is_first, 1, 0) + jnp.where(self.is_last, 2, 0)
        ref[at + (c * NUM_FIELDS)] = self.b * 4 + flags
        ref[at + (c * NUM_FIELDS + 1)] = self.end
        if plan.has_starts:
            ref[at + (c * NUM_FIELDS + 2)] = self.start


NUM_FIELDS = 3


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k", "v"), meta_fields=("ahead",))
@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of step s: K's ring has `ahead` + 1 of them; V's, and the cells', one more."""

    k: jax.Array
    v: jax.Array
    ahead: int

    @classmethod
    def start(cls, plan: Plan) -> Ring:
        return cls(jnp.int32(0), jnp.int32(0), plan.sizes.steps_ahead)

    def next(self) -> Ring:
        """Step s + 1's."""
        return Ring(_wrap(self.k, 1, self.ahead + 1), _wrap(self.v, 1, self.ahead + 2), self.ahead)

    @property
    def k_ahead(self):
        """K's slot of step s + ahead."""
        return _wrap(self.k, self.ahead, self.ahead + 1)

    @property
    def v_ahead(self):
        """V's slot of step s + ahead."""
        return _wrap(self.v, self.ahead, self.ahead + 2)

    @property
    def v_before(self):
        """V's slot of step s - 1."""
        return _wrap(self.v, self.ahead + 1, self.ahead + 2)


def _wrap(slot, by: int, size: int):
    moved = slot + by
    return jnp.where(moved >= size, moved - size, moved)


@dataclasses.dataclass(frozen=True)
class WorkList:
    """One core's sequences that are not empty, by number in SMEM, and the cells that they make."""

    plan: Plan
    refs: NamedTuple
    rows: jax.Array  # this core's live sequences
    live_rows: jax.Array  # those of all cores

    @staticmethod
    def span(plan: Plan, refs, b):
        """(first page, pages, start, end) of sequence b, the two counted in tokens from that page; no pages if empty."""
        end = jnp.minimum(refs.lengths[b], plan.S * plan.page_size)
        if not plan.has_starts:
            return jnp.int32(0), _div(jnp.maximum(end, 0) + (plan.page_size - 1), plan.page_size), jnp.int32(0), end
        start = jnp.int32(0)
        if refs.starts is not None:
            start = jnp.maximum(refs.starts[b], start)
        if plan.sliding_window is not None:
            start = jnp.maximum(end - plan.sliding_window, start)
        first = _div(start, plan.page_size)
        pages = _div(jnp.maximum(end, 0) + (plan.page_size - 1), plan.page_size) - first
        skipped = first * plan.page_size
        return first, jnp.where(end > start, pages, 0), start - skipped, end - skipped

    @classmethod
    def build(cls, plan: Plan, refs, core) -> WorkList:
        """Walks the lengths once. Two cores deal the sequences out among them: each goes to the one with less."""
        zero = jnp.int32(0)
        at_once = min(_SPANS_AT_ONCE, plan.B)

        def look_at(turn, carry):
            for i in range(at_once):
                carry = look_at_one(turn * at_once + i, *carry)
            return carry

        def look_at_one(b, rows, live_rows, mine, others):
            inside = b < plan.B
            b = b if plan.B % at_once == 0 else jnp.minimum(b, plan.B - 1)
            live = refs.lengths[b] > 0
            if plan.has_starts or plan.num_cores > 1:
                pages = cls.span(plan, refs, b)[1]
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
            return rows + takes.astype(jnp.int32), live_rows, mine, others

        carry = (zero, zero, zero, zero)
        turns = pl.cdiv(plan.B, at_once)
        carry = look_at(0, carry) if turns == 1 else lax.fori_loop(0, turns, look_at, carry)
        rows, live_rows, *_ = carry
        return cls(plan, refs, rows, live_rows if plan.num_cores > 1 else rows)

    def take(self, cursor):
        """The next cell from `cursor` (sequence's place in the list, its pages taken so far).

        Returns:
          (cell, its row and first column in the block table, its pages, the cursor behind it).
        """
        plan = self.plan
        j, done = cursor
        live = j < self.rows
        b = self.refs.work[jnp.minimum(j, jnp.maximum(self.rows - 1, 0))]
        first, pages, start, end = self.span(plan, self.refs, b)
        left = pages - done
        tokens_done = done * plan.page_size
        cell = Cell(
            b=jnp.where(live, b, plan.B),
            start=start - tokens_done,
            end=jnp.where(live, end - tokens_done, 0),
            is_first=live & (done == 0),
            is_last=live & (left <= plan.pages_per_cell),
        )
        count = jnp.where(live, jnp.minimum(left, plan.pages_per_cell), 0)
        more = left > plan.pages_per_cell
        cursor = jnp.where(more, j, j + 1), jnp.where(more, done + plan.pages_per_cell, 0)
        return cell, b, first + done, count, cursor

    def page_id(self, b, column, p: int):
        """The id of the cell's page p; of some page of the table where the cell has fewer."""
        plan, column = self.plan, column + p
        if plan.has_starts or plan.S % plan.pages_per_cell:
            column = jnp.minimum(column, plan.S - 1)
        if plan.table_is_transposed:
            return self.refs.table[column, b]
        return self.refs.table.at[b][column]  # half the scalar work of [b, column]

    def note_step(self, slot, pages, dirty) -> None:
        """Keeps a step's pages, and its cells with dead tokens, until it is computed."""
        self.refs.pages[2 * slot] = pages
        self.refs.pages[2 * slot + 1] = dirty

    def pages_of(self, slot):
        return self.refs.pages[2 * slot]

    def dirty_cells_of(self, slot):
        return self.refs.pages[2 * slot + 1]

    def has_step(self, slot):
        """Whether the step in this slot has any cell: its first is taken first."""
        return Cell.load(self.refs.cells, slot, 0, self.plan).end > 0

    def clear_before_first(self) -> None:
        """The step before the first: cells of no sequence."""
        zero, no, slot = jnp.int32(0), jnp.bool_(False), self.plan.sizes.steps_ahead + 1
        self.note_step(slot, zero, zero)
        for c in range(self.plan.C):
            Cell(jnp.int32(self.plan.B), zero, zero, no, no).store(self.refs.cells, slot, c, self.plan)


def _div(x, by: int):
    return lax.div(x, jnp.int32(by))
