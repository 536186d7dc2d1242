"""A sliding window that is a number of the running program, and first tokens a row, over one chip and over a pod.

Each layer of a stacked cache is poisoned for its own window: what lies before it is NaN, and its pages' ids garbage
in no table, for the layers share one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from one_chip_cases import OneChipCase, poisoned_arrays
from pod_cases import PodCase
from simulated import RACES, assert_no_races

import paged_dist as pd
from paged_dist.kernels import BlockSizes, page_attention, paged_decode_attention

SMALL = BlockSizes(pages_per_cell=2, cells_per_step=2, steps_ahead=2)
WINDOWS = (3, 0, 17, 2**31 - 1, -5)  # of five layers
CASES = [
    OneChipCase("gqa", lengths=(0, 1, 9, 32, 31)),
    OneChipCase("starts", lengths=(32, 31, 9, 8), starts=(9, 30, 0, -4)),
    OneChipCase("packed", D=64, P=16, lengths=(64, 20, 3)),
    OneChipCase("queries", Q=3, lengths=(32, 1, 17, 24)),
    OneChipCase("queries_and_starts", Q=2, lengths=(32, 17), starts=(12, 16)),
]


def of_windows(case: OneChipCase, windows=WINDOWS):
    """(query, stacked keys and values, lengths, table, starts), and the oracle's (output, lse) of each layer."""
    as_window = lambda w: w if 0 < w < 2**30 else None
    made = [poisoned_arrays(OneChipCase(**{**vars(case), "sliding_window": as_window(w)})) for w in windows]
    (query, _, _, lengths, _), _ = made[0]
    tables = made[windows.index(0)][0][4]
    k, v = (jnp.stack([arrays[i] for arrays, _ in made]) for i in (1, 2))
    starts = None if case.starts is None else jnp.asarray(case.starts, jnp.int32)
    return (query, k, v, lengths, tables, starts), [expected for _, expected in made]


@pytest.mark.parametrize(
    ("case", "interpret"),
    [
        pytest.param(
            case,
            interpret,
            id=f"{case.name}-{'kernel' if interpret else 'xla'}",
            marks=() if case.name == ("queries_and_starts" if interpret else "starts") else pytest.mark.slow,
        )
        for case in CASES
        for interpret in (None, RACES)
    ],
)
def test_layers_of_different_windows_go_through_one_scan(case, interpret):
    values = WINDOWS if interpret is None else WINDOWS[:2]
    (query, k, v, lengths, tables, starts), expected = of_windows(case, values)

    @jax.jit
    def layers(windows):
        def one(_, layer_and_window):
            layer, window = layer_and_window
            options = dict(layer=layer, starts=starts, sliding_window=window, sm_scale=case.sm_scale)
            return None, paged_decode_attention(
                query, k, v, lengths, tables, return_lse=True, block_sizes=SMALL, interpret=interpret, **options
            )

        return jax.lax.scan(one, None, (jnp.arange(len(values)), windows))[1]

    outputs, lses = layers(jnp.array(values, jnp.int32))
    for output, lse, (expected_output, expected_lse) in zip(outputs, lses, expected, strict=True):
        np.testing.assert_allclose(output, expected_output, atol=2e-5, rtol=2e-5)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
    if interpret is RACES:
        assert_no_races()


SHARDED = [
    dict(lengths=(33, 0, 20, 64), data=2, context=2, model=2, kv_heads=2, group=4),
    dict(lengths=(70, 1, 9, 40), context=3),
    dict(lengths=(33, 7), data=2),
    dict(lengths=(33, 0, 20, 64), data=2, context=2, model=2, kv_heads=2, group=4, num_queries=3),
    dict(lengths=(2, 40), num_queries=5, context=4),
    dict(lengths=(2, 40), num_queries=5, context=1),
]


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        pytest.param(shape, window, marks=() if (i, window) in ((1, 0), (3, 7)) else pytest.mark.slow)
        for i, shape in enumerate(SHARDED)
        for window in (7, 0)
    ],
    ids=str,
)
def test_windows_and_starts_over_a_pod_are_the_oracle_s(shape, window):
    case, scale = PodCase(**shape), 0.1
    cache = case.cache(case.mesh(AxisType.Explicit if shape.get("num_queries") else AxisType.Auto))
    query, lengths, tables = case.arguments
    starts = jnp.asarray(np.arange(len(case.lengths)) * 9 - 3, jnp.int32)
    attend = functools.partial(
        pd.sharded_paged_attention, query, cache, lengths, tables, sm_scale=scale, return_lse=True
    )
    expected = dict(sm_scale=scale, sliding_window=window or None)
    case.check(*jax.jit(lambda w, s: attend(sliding_window=w, starts=s))(window, starts), **expected, starts=starts)
    case.check(*attend(sliding_window=window or None, starts=starts), **expected, starts=starts)


@pytest.mark.parametrize("x64", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_window_that_is_an_array_needs_no_starts(x64):
    case = PodCase(**SHARDED[2])
    query, lengths, tables = case.arguments
    with jax.enable_x64(x64):
        made = pd.sharded_paged_attention(
            query, case.cache(case.mesh()), lengths, tables, sliding_window=jnp.asarray(7), return_lse=True
        )
    case.check(*made, sliding_window=7)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SHARDED[0], SHARDED[3]], ids=str)
def test_the_kernel_on_simulated_shards_too(shape):
    case = PodCase(**shape)
    query, lengths, tables = case.arguments
    starts = jnp.array([30, 0, -1, 3], jnp.int32)
    attend = jax.jit(lambda w: pd.sharded_paged_attention(
        query, case.cache(case.mesh()), lengths, tables, sm_scale=0.1, sliding_window=w, starts=starts,
        return_lse=True, implementation=RACES,
    ))  # fmt: skip
    case.check(*attend(jnp.int32(19)), sm_scale=0.1, sliding_window=19, starts=starts)
    assert_no_races()


def test_the_local_form_in_a_shard_map_that_checks_types():
    case = PodCase(**SHARDED[0])
    mesh = case.mesh()
    cache, heads, rows = case.cache(mesh), P("data", "model"), P("data")

    def step(query, cache, lengths, tables, starts, window):
        return pd.paged_attention_local(
            query, cache, lengths, tables, starts=starts, sliding_window=window, return_lse=True, sm_scale=0.1
        )

    step = jax.jit(jax.shard_map(
        step, mesh=mesh, in_specs=(heads, cache.partition_specs(), rows, rows, rows, P()),
        out_specs=(heads, heads), check_vma=True,
    ))  # fmt: skip
    query, lengths, tables = case.arguments
    starts = jnp.array([30, 0, 2, 3], jnp.int32)
    output, lse = step(query, cache, lengths, tables, starts, jnp.int32(19))
    case.check(output, lse, sm_scale=0.1, sliding_window=19, starts=starts)


BAD = [
    (dict(sliding_window=jnp.float32(3)), r"sliding_window='float32\[\]'.*int32 scalar.*0 or less is no window"),
    (dict(sliding_window=jnp.zeros(2, jnp.int32)), r"sliding_window='int32\[2\]'.*int32 scalar"),
    (dict(sliding_window=0), "sliding_window=0.*at least 1"),
    (dict(starts=jnp.zeros(3, jnp.int32)), r"starts\.shape=\(3,\).*\(2,\)"),
    (dict(starts=jnp.zeros(2)), r"starts\.dtype='float32'.*int32"),
]


@pytest.mark.parametrize(("options", "names"), BAD, ids=range(len(BAD)))
def test_bad_windows_and_starts_are_named(options, names):
    case = PodCase((8, 3))
    query, lengths, tables = case.arguments
    attend = functools.partial(pd.sharded_paged_attention, query, case.cache(case.mesh()), lengths, tables)
    with pytest.raises(ValueError, match=names):
        attend(**options)
    (query, k, v, lengths, tables), _ = poisoned_arrays(OneChipCase("bad", lengths=(8, 3)))
    with pytest.raises(ValueError, match=names):
        jax.eval_shape(lambda: paged_decode_attention(query, k, v, lengths, tables, **options))


def test_page_attention_says_which_op_takes_a_traced_window():
    arrays, _ = poisoned_arrays(OneChipCase("bad", lengths=(8, 3)))
    with pytest.raises(
        ValueError, match=r"sliding_window=.*static_argnames; paged_decode_attention takes a traced one"
    ):
        jax.eval_shape(lambda w: page_attention(*arrays, sliding_window=w), jnp.int32(3))
