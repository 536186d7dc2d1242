"""The context axis: one sequence's pages over several shards, merged into the attention over all of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import Case, lay_tables, pod
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from simulated import RACES, assert_no_races

import paged_dist as pd

SCALE = 128**-0.5
SINKS = np.array([-3.0, 0.5, -np.inf, 2.0, 1.0, 0.0, -1.0, 4.0], np.float32)


def edges(rng, page_size: int, most: int, count: int) -> list[int]:
    """Lengths from 0 to `most`: on, before and behind page edges, and anywhere."""
    pages = most // page_size
    near = page_size * rng.integers(0, pages, count) + rng.integers(-1, 2, count)
    lengths = np.where(rng.random(count) < 0.7, near, rng.integers(0, most + 1, count))
    return [0, most, *np.clip(lengths, 0, most)[2:]]


@pytest.mark.parametrize("window", [None, 1, 8, 11, 24, 50, 1000])
@pytest.mark.parametrize("context", [1, 2, 3, 4, 8])
def test_attention_over_context_shards_is_the_oracle(context, window):
    """Every first shard, every page edge, windows from one token to more than there are."""
    rng = np.random.default_rng([context, window or 0])
    case = Case(tuple(map(int, edges(rng, 8, 8 * (2 * context + 3), 6 * context))), context=context)
    mesh = case.mesh()
    query, lengths, tables = case.arguments
    output, lse = pd.sharded_paged_attention(
        query, case.cache(mesh), lengths, tables, sm_scale=SCALE, sliding_window=window, return_lse=True
    )
    case.check(output, lse, sm_scale=SCALE, sliding_window=window)
