"""The fast decode kernel in TPU interpret mode with race detection, against the float64 oracle.

Everything that must not be read is NaN: pages nobody owns, owned pages' tails, what lies before a start or a window,
the other layers. Unused table entries are ids far outside the pool.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from page_attention_cases import Case, assert_close, make, stack
from simulated import assert_no_races, simulated

from paged_dist.kernels import BlockSizes, paged_decode_attention
from paged_dist.kernels.attention.oracle import attention_oracle
from paged_dist.kernels.attention.problem import Problem
from paged_dist.kernels.chips import SMEM_LIMIT
from paged_dist.kernels.decode import pallas_call, plan_choice
from paged_dist.kernels.decode.launch_plan import LaunchPlan

SMALL = BlockSizes(pages_per_cell=2, cells_per_step=2, steps_ahead=2)
ONE_PAGE = BlockSizes(pages_per_cell=1, cells_per_step=4, steps_ahead=1)

CASES = [
    (Case("gqa"), SMALL),
    (Case("gqa_three_steps_ahead"), BlockSizes(1, 1, 3)),
    (Case("default_sizes", P=128, S=2, lengths=(256, 0, 1, 130)), None),
    (Case("mqa_odd_table", Hq=3, Hkv=1, S=5, lengths=(40, 0, 0, 33, 1)), SMALL),
    (Case("four_heads_share_a_register", Hq=8, Hkv=4, lengths=(32, 5)), SMALL),
    (Case("group_of_five", Hq=10, Hkv=2, lengths=(9, 31)), SMALL),
    (Case("group_of_24", Hq=24, Hkv=1, lengths=(9, 0, 32)), SMALL),
    (Case("bf16", P=32, dtype="bfloat16", query_dtype="bfloat16", lengths=(0, 17, 128, 96, 33)), SMALL),
    (Case("bf16_pages_f32_query", P=16, dtype="bfloat16", lengths=(64, 16, 17, 0, 15)), ONE_PAGE),
    (Case("page_24", P=24, lengths=(96, 24, 25, 95)), SMALL),
    (Case("page_24_bf16", P=24, S=5, dtype="bfloat16", query_dtype="bfloat16", lengths=(120, 3, 25, 95)), SMALL),
    (Case("page_24_bf16_window", P=24, S=5, dtype="bfloat16", sliding_window=33, lengths=(120, 60)), SMALL),
    (Case("page_8_bf16", dtype="bfloat16", query_dtype="bfloat16", lengths=(32, 3, 9, 31)), SMALL),
    (Case("page_48_bf16", P=48, S=3, dtype="bfloat16", query_dtype="bfloat16", lengths=(144, 47, 49, 1)), SMALL),
    (Case("cells_of_sixteen_pages", P=32, S=16, lengths=(512, 311, 33), dtype="bfloat16"), BlockSizes(16, 2, 1)),
    (Case("head_dim_256", Hq=8, Hkv=1, D=256, lengths=(9, 31)), ONE_PAGE),
    (Case("packed_head_dim_64", D=64, P=16, lengths=(0, 1, 17, 64)), SMALL),
    (Case("packed_bf16", D=64, P=64, S=2, dtype="bfloat16", query_dtype="bfloat16", lengths=(128, 31, 33)), ONE_PAGE),
    (Case("packed_window_and_cap", D=64, P=16, lengths=(64, 20, 3), sliding_window=7, soft_cap=2.0), SMALL),
    (Case("window_under_a_page", sliding_window=3, lengths=(0, 1, 8, 9, 32)), SMALL),
    (Case("window_of_two_pages", sliding_window=16, S=5, lengths=(40, 15, 0, 17)), ONE_PAGE),
    (Case("window_inside_large_pages", P=64, S=3, sliding_window=40, lengths=(192, 50, 64, 65)), SMALL),
    (Case("starts", P=32, S=4, lengths=(128, 100, 33, 32, 9), starts=(31, 32, 33, 5, 200)), SMALL),
    (Case("starts_and_window", P=32, lengths=(128, 100, 33), starts=(120, 3, -5), sliding_window=30), ONE_PAGE),
    (Case("starts_in_cells_of_many_pages", P=32, S=16, lengths=(512, 300), starts=(17, 290)), BlockSizes(16, 1, 1)),
    (Case("window_and_cells_of_no_sequence", P=32, S=3, lengths=(90, 0), sliding_window=2), BlockSizes(2, 4, 1)),
    (Case("ends_that_look_like_a_cells", P=48, S=8, lengths=(128, 0)), BlockSizes(8, 1, 1)),
    (Case("window_beyond_int32", lengths=(32, 3), sliding_window=2**40), SMALL),
    (Case("longer_than_a_table_of_part_of_a_cell", S=3, lengths=(24, 3)), SMALL),
    (Case("soft_cap", soft_cap=1.5, lengths=(0, 12, 32)), SMALL),
    (Case("longer_than_the_table", lengths=(32, 3)), SMALL),
    (Case("all_empty", lengths=(0, 0)), SMALL),
    (Case("nine_sequences", S=2, lengths=(16, 0, 3, 8, 9, 0, 1, 16, 5)), SMALL),
]
# Repeats of a claim that another case makes; run with `-m slow`.
LONG = {("packed_head_dim_64", 2), ("nine_sequences", 2), ("starts", 2), ("page_48_bf16", 1), ("group_of_24", 1)}
LONG |= {("packed_window_and_cap", 1), ("starts_and_window", 1), ("page_24_bf16", 1), ("soft_cap", 1)}
LONG |= {("window_beyond_int32", 1), ("all_empty", 2), ("bf16", 2), ("mqa_odd_table", 1), ("window_of_two_pages", 1)}
LONG |= {("longer_than_the_table", 1), ("page_24", 1), ("window_inside_large_pages", 1), ("bf16_pages_f32_query", 1)}
LONG |= {("starts_in_cells_of_many_pages", 1), ("group_of_five", 1), ("cells_of_sixteen_pages", 1), ("bf16", 1)}
LONG |= {("longer_than_a_table_of_part_of_a_cell", 1), ("nine_sequences", 1), ("page_24_bf16_window", 1)}
LONG |= {
    ("window_and_cells_of_no_sequence", 1),
    ("four_heads_share_a_register", 1),
    ("page_8_bf16", 1),
    ("packed_bf16", 1),
}
ON_TWO_CORES = ("gqa", "bf16", "starts", "all_empty", "nine_sequences", "packed_head_dim_64")


def run(case: Case, sizes, interpret, *, seed=0, layer=1, **options):
    """(output, lse) of the case in stacked, poisoned pools, and the oracle's."""
    (query, k, v, lengths, tables), expected = make(case, seed)
    width = max(128, case.D)
    starts = None if case.starts is None else jnp.asarray(case.starts, jnp.int32)
    attend = jax.jit(
        lambda q, k, v, n, t, layer: paged_decode_attention(
            q,
            k,
            v,
            n,
            t,
            layer=layer,
            starts=starts,
            return_lse=True,
            block_sizes=sizes,
            interpret=interpret,
            **case.options,
            **options,
        )
    )
    if case.name.startswith("longer_than"):
        lengths = lengths + 10**6 * (lengths == case.S * case.P)
    return attend(query, stack(k, width), stack(v, width), lengths, tables, layer), expected


@pytest.mark.parametrize(
    ("case", "sizes", "cores"),
    [
        pytest.param(
            case,
            sizes,
            cores,
            id=f"{case.name}-{cores}_core{'s' * (cores - 1)}",
            marks=pytest.mark.slow if (case.name, cores) in LONG else (),
        )
        for case, sizes in CASES
        for cores in (1, 2)
        if cores == 1 or case.name in ON_TWO_CORES
    ],
)
def test_kernel_equals_the_oracle_and_races_with_nothing(case, sizes, cores):
    (output, lse), expected = run(case, sizes, simulated(cores))
    assert output.dtype == case.query_dtype
    assert_close(case, expected, output, lse)
    assert_no_races()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_kernel_equals_the_oracle_on_random_shapes(seed):
    rng = np.random.default_rng(seed)
    P, S, D = int(rng.choice([8, 16, 32, 48])), int(rng.integers(1, 6)), int(rng.choice([64, 128, 256]))
    P = max(P, 16) if D == 64 else P
    Hkv, G = int(rng.integers(1, 5)), int(rng.integers(1, 10))
    edges = [0, 1, P - 1, P, P + 1, S * P]
    lengths = [int(min(rng.choice([*edges, rng.integers(0, S * P + 1)]), S * P)) for _ in range(rng.integers(1, 10))]
    dtype, query_dtype = (str(rng.choice(["bfloat16", "float32"])) for _ in "qk")
    starts = None if rng.random() < 0.5 else tuple(int(rng.integers(-3, S * P)) for _ in lengths)
    case = Case(
        "random",
        Hq=Hkv * G,
        Hkv=Hkv,
        D=D,
        P=P,
        S=S,
        lengths=tuple(lengths),
        dtype=dtype,
        query_dtype=query_dtype,
        starts=starts,
        sliding_window=None if rng.random() < 0.6 else int(rng.integers(1, S * P + 2)),
        soft_cap=None if rng.random() < 0.7 else 3.0,
    )
    sizes = BlockSizes(int(rng.choice([1, 2, 4])), int(rng.choice([1, 2, 4, 8])), int(rng.integers(1, 4)))
    (output, lse), expected = run(case, sizes, simulated(), seed=seed)
    assert_close(case, expected, output, lse)
    assert_no_races()


@pytest.mark.parametrize(
    ("interpret", "D"),
    [(simulated(), 128), pytest.param(simulated(), 64, marks=pytest.mark.slow), (None, 128), (None, 64)],
    ids=["kernel-128", "kernel-64", "xla-128", "xla-64"],
)
def test_sinks_join_the_denominator_and_are_an_empty_rows_lse(D, interpret):
    case = Case("sinks", Hq=8, P=16, D=D, lengths=(33, 0, 64, 1))
    (query, k, v, lengths, tables), _ = make(case)
    sinks = jnp.array([0.5, -1.0, 3.0, -jnp.inf, 0.0, 20.0, -30.0, 1.0], jnp.float32)
    expected = attention_oracle(query, k, v, lengths, tables, sinks=np.asarray(sinks), **case.options)
    output, lse = paged_decode_attention(
        query,
        k,
        v,
        lengths,
        tables,
        sinks=sinks,
        return_lse=True,
        block_sizes=SMALL,
        interpret=interpret,
        **case.options,
    )
    np.testing.assert_allclose(output, expected[0], atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(lse, expected[1], atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_block_sizes_change_rounding_only_and_runs_change_nothing():
    case = Case("sizes", P=16, S=6, lengths=(96, 0, 50, 17, 95, 1))
    outputs = [np.asarray(run(case, sizes, simulated())[0][0]) for sizes in (SMALL, SMALL, BlockSizes(4, 1, 1))]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    for output in outputs[2:]:
        np.testing.assert_allclose(output, outputs[0], atol=1e-6, rtol=1e-5)


def test_nan_in_one_sequence_stays_there():
    case = Case("nan", lengths=(32, 20, 32, 9), Hq=2, Hkv=1)
    (query, k, v, lengths, tables), expected = make(case)
    v = v.at[:, tables[1, 0], 3].set(jnp.nan)
    output = paged_decode_attention(
        query, k, v, lengths, tables, block_sizes=SMALL, interpret=simulated(), **case.options
    )
    assert np.isnan(output[1]).all()
    for b in (0, 2, 3):
        np.testing.assert_allclose(output[b], expected[0][b], atol=2e-5, rtol=2e-5)


def test_a_batch_whose_table_overflows_scalar_memory_is_split(monkeypatch):
    """The rule at the real limit is compiled in test_decode_aot.py; here a small limit is run."""
    case = Case("split", lengths=(32, 5, 0, 17, 31, 8, 1), sliding_window=9)
    launches = []
    launch = pallas_call.launch_once
    monkeypatch.setattr(
        pallas_call, "launch_once", lambda plan, *x, **k: launches.append(plan.B) or launch(plan, *x, **k)
    )
    whole = plan_choice.rows_per_launch
    monkeypatch.setattr(pallas_call, "rows_per_launch", lambda plan: min(3, whole(plan)))
    (output, lse), expected = run(case, SMALL, simulated())
    assert launches == [3, 3, 1]
    assert_close(case, expected, output, lse)


def test_a_table_of_256_by_1024_is_split_and_runs():
    """Few live tokens in a table as wide as scalar memory: two launches, simulated."""
    rng = np.random.default_rng(0)
    B, S, P = 256, 1024, 8
    lengths = np.zeros(B, np.int32)
    lengths[[0, 3, 127, 128, 200, 255]] = [5, 16, 1, 24, 9, 8]
    tables = rng.integers(-(2**31), 2**31, (B, S), np.int64).astype(np.int32)
    tables[:, :3] = rng.permutation(B * 3).reshape(B, 3)
    query = rng.normal(size=(B, 2, 128)).astype(np.float32)
    k, v = (rng.normal(size=(1, B * 3, P, 128)).astype(np.float32) for _ in "kv")
    plan = LaunchPlan(pallas_call.check_pools(query, k[None], v[None], lengths, tables), SMALL)
    assert 1 <= plan_choice.rows_per_launch(plan) < B
    output = paged_decode_attention(query, k, v, lengths, tables, block_sizes=SMALL, interpret=simulated())
    np.testing.assert_allclose(output, attention_oracle(query, k, v, lengths, tables)[0], atol=2e-5, rtol=2e-5)


BAD = [
    (dict(layer=0), ValueError, r"key_cache\.shape=.*\[L, Hkv, N, P, D\]"),
    (dict(starts=jnp.zeros(3, jnp.int32)), ValueError, r"starts\.shape=\(3,\).*\(2,\)"),
    (dict(starts=jnp.zeros(2)), ValueError, r"starts\.dtype='float32'"),
    (dict(sinks=jnp.zeros(3)), ValueError, r"sinks\.shape=\(3,\).*\(4,\)"),
    (dict(sliding_window=0), ValueError, "sliding_window=0.*at least 1"),
    (dict(soft_cap=-1.0), ValueError, r"soft_cap=-1\.0.*positive"),
    (dict(sm_scale=float("inf")), ValueError, "sm_scale=inf.*finite"),
    (dict(block_sizes=(1, 2)), ValueError, r"block_sizes=\(1, 2\).*BlockSizes"),
    (dict(block_sizes=BlockSizes(1024, 16), interpret=True), ValueError, r"block_sizes=.*bytes of VMEM.*default here"),
    (dict(interpret="tpu"), ValueError, "interpret='tpu'"),
]


@pytest.mark.parametrize(("changes", "error", "names"), BAD, ids=[next(iter(x[0])) + str(i) for i, x in enumerate(BAD)])
def test_bad_arguments_are_named(changes, error, names):
    (query, k, v, lengths, tables), _ = make(Case("bad", lengths=(8, 3)))
    with pytest.raises(error, match=names):
        paged_decode_attention(query, k, v, lengths, tables, **changes)


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ((3, 1, 2), "pages_per_cell=3.*power of two"),
        ((0, 1, 2), "pages_per_cell=0.*at least 1"),
        ((1, True, 2), "cells_per_step=True.*whole number"),
        ((1, 1, 0), "steps_ahead=0.*at least 1"),
    ],
)
def test_block_sizes_outside_their_rules_are_refused(sizes, names):
    with pytest.raises(ValueError, match=names):
        BlockSizes(*sizes)


def test_default_sizes_keep_their_rules_and_fit():
    """Over every supported shape, a launch of one row fits, and so does the chosen part of any batch."""
    for Hkv in (1, 2, 3, 8, 32):
        for D, W, P in ((64, 128, 16), (128, 128, 8), (128, 128, 128), (128, 128, 256), (256, 256, 64)):
            for dtype in ("bfloat16", "float32"):
                for B, S in ((1, 1), (32, 32), (256, 1024), (1024, 1024)):
                    p = Problem(B, Hkv * 4, Hkv, D, 1, 4096, P * D // W, W, S, dtype, dtype)
                    for cores in (1, 2) if Hkv * P * W < 1 << 19 else (1,):  # a v4's core has 16 MiB
                        plan = LaunchPlan(p, plan_choice.choose_block_sizes(p, None, cores), num_cores=cores)
                        plan_choice.check_block_sizes(plan)
                        rows = plan_choice.rows_per_launch(plan)
                        part = dataclasses.replace(plan, problem=p.replace(batch=rows))
                        assert part.vmem_bytes <= plan_choice.vmem_limit(cores)
                        assert part.smem_bytes <= SMEM_LIMIT
