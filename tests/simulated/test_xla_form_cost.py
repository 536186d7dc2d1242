"""What the XLA form costs: it gathers live pages only, however wide the tables, and never a batch of them at once."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_dist.kernels.attention import xla_form as xla
from paged_dist.launch.xla_report import gather_everything

B, HQ, HKV, D, P, N = 16, 8, 4, 128, 64, 8
CHUNK_PAGES = 256 // P  # what a step takes of a sequence: gathers are counted in whole ones


def arrays_of_shared_pages(columns: int, dtype="bfloat16"):
    """(query, key_pages, value_pages, tables) whose rows share the pages of a pool smaller than all tables together."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    tables = jnp.asarray(rng.integers(0, N, (B, columns)), jnp.int32)
    return draw(B, HQ, D), draw(HKV, N, P, D), draw(HKV, N, P, D), tables


def largest_value(compiled) -> int:
    """Elements of the largest array in an optimized program."""
    shapes = re.findall(r"\b(?:bf16|[fsu]\d+|pred)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_value_holds_what_the_tables_name(dtype):
    columns = 32
    everything = B * columns * P * HKV * D
    query, keys, values, tables = arrays_of_shared_pages(columns, dtype)
    lengths = jnp.full(B, columns * P, jnp.int32)
    assert everything > 32 * keys.size, "the pool must not be what is found"

    plain = jax.jit(functools.partial(gather_everything, pages_first=False, f32_products=False))
    assert largest_value(plain.lower(query, keys, values, lengths, tables).compile()) >= everything
    op = jax.jit(xla.attend_pages_xla).lower(query, keys[None], values[None], lengths, tables).compile()
    assert largest_value(op) < everything / 16


@pytest.fixture
def pages_gathered(monkeypatch):
    """A function of the op's arguments: how many pages a run of the compiled program gathers of the key pool."""
    counts: list[int] = []
    gather = xla._gather

    def counting(pool, ids, step):
        jax.debug.callback(lambda _: counts.append(ids.size // HKV), ids)  # at run time: once an iteration
        return gather(pool, ids, step)

    monkeypatch.setattr(xla, "_gather", counting)

    def count(query, keys, values, tables, lengths, **options):
        attend = lambda *x, starts: xla.attend_pages_xla(*x, starts=starts, **options)
        starts = options.pop("starts", None)
        lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), B)
        starts = None if starts is None else jnp.broadcast_to(jnp.asarray(starts, jnp.int32), B)
        counts.clear()
        jax.block_until_ready(jax.jit(attend)(query, keys[None], values[None], lengths, tables, starts=starts))
        jax.effects_barrier()
        return sum(counts) // 2

    return count


@pytest.mark.parametrize("columns", [8, 64])
@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_gathered_are_live_pages_whatever_the_tables_hold(pages_gathered, columns, chunks):
    live = chunks * CHUNK_PAGES
    assert pages_gathered(*arrays_of_shared_pages(columns), live * P) == B * live


@pytest.mark.parametrize(
    "lengths, options, pages",
    [
        (16 * P, dict(starts=12 * P), 4),
        (16 * P, dict(starts=12 * P + 1), 4),
        (16 * P, dict(starts=16 * P), 0),
        (16 * P, dict(starts=3 * P, sliding_window=4 * P), 4),
        (16 * P, dict(sliding_window=4 * P), 4),
        (1, {}, 4),
    ],
)
def test_pages_before_a_start_or_a_window_are_not_gathered(pages_gathered, lengths, options, pages):
    assert pages_gathered(*arrays_of_shared_pages(16), lengths, **options) == B * pages


def test_a_long_sequence_among_short_ones_costs_its_group_only(pages_gathered):
    lengths = np.full(B, CHUNK_PAGES * P, np.int32)
    lengths[5] = 64 * P
    query, keys, values, tables = arrays_of_shared_pages(64)
    _, rows = xla._step_shape(xla.check_pools(query, keys[None], values[None], lengths, tables))
    assert rows < B
    assert pages_gathered(query, keys, values, tables, lengths) == (B - rows) * CHUNK_PAGES + rows * 64


@pytest.mark.parametrize(
    "heads, head_dim, page_size, batch, expected",
    [
        (8, 128, 128, 32, (2, 2)),
        (1, 128, 128, 32, (2, 8)),
        (1, 128, 128, 3, (2, 3)),
        (32, 128, 128, 32, (2, 1)),
        (8, 128, 1024, 32, (1, 1)),
        (8, 64, 16, 32, (16, 4)),
    ],
)
def test_a_step_takes_about_as_much_whatever_the_shapes(heads, head_dim, page_size, batch, expected):
    problem = xla.Problem(batch, heads, heads, head_dim, 1, 64, page_size, head_dim, 16, "bfloat16", "bfloat16")
    assert xla._step_shape(problem) == expected
