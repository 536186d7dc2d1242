"""Several new tokens a sequence, causal among themselves, through the decode kernel and the XLA form, against float64.

Everything that no new token attends to is NaN, and so are the other layers; unused table entries are ids far outside.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import CHIP_TOPOLOGIES, needs_libtpu
from jax.extend.core import jaxprs_in_params
from page_attention_cases import Case, make, stack
from simulated import assert_no_races, simulated
from test_decode_aot import compiled_text, kernels, shapes
from test_decode_quantized import FP8, INT8, make_quantized

from paged_dist.kernels import BlockSizes, paged_decode_attention
from paged_dist.kernels.attention.oracle import attention_oracle
from paged_dist.kernels.attention.problem import Problem
from paged_dist.kernels.attention.queries import causal_spans
from paged_dist.kernels.attention.xla_form import attend_pages_xla
from paged_dist.kernels.decode import pallas_call, plan_choice, traffic
from paged_dist.kernels.decode.api import decode_stored_pages
from paged_dist.kernels.decode.pallas_call import decode_pages_pallas
from paged_dist.kernels.target import Target

SMALL = BlockSizes(pages_per_cell=2, cells_per_step=2, steps_ahead=2)
ONE_PAGE = BlockSizes(pages_per_cell=1, cells_per_step=4, steps_ahead=1)
BF16 = dict(dtype="bfloat16", query_dtype="bfloat16")


def check(case: Case, expected, output, lse, dtype=None):
    """Against the oracle; both must agree, exactly, on which queries see nothing."""
    assert output.dtype == (dtype or case.query_dtype) and lse.dtype == jnp.float32
    tolerance = 2e-2 if case.query_dtype == "bfloat16" else 1e-4  # weights go into a product as the query's dtype
    np.testing.assert_allclose(np.asarray(output, np.float64), expected[0], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(lse, expected[1], atol=1e-4, rtol=1e-4)
    assert not np.asarray(output)[np.isneginf(expected[1])].any()


CASES = [
    (Case("two", Q=2, lengths=(0, 1, 2, 8, 9, 32)), SMALL, 1),
    (Case("on_two_cores", Q=3, Hkv=1, S=3, lengths=(17, 0, 2)), ONE_PAGE, 2),
    (Case("three_window", Q=3, S=5, lengths=(40, 1, 17, 24), sliding_window=9), SMALL, 1),
    (Case("window_of_one_heads_share_a_register", Q=2, Hkv=4, lengths=(32, 9, 1), sliding_window=1), SMALL, 1),
    (Case("eight_starts_cap", Q=8, Hq=4, Hkv=1, lengths=(32, 5, 13), starts=(17, 3, 13), soft_cap=2.0), SMALL, 1),
    (Case("sixteen_bf16", Q=16, Hkv=1, P=16, lengths=(64, 7, 33), **BF16), BlockSizes(4, 1, 2), 1),
    (Case("group_of_three", Q=3, Hq=6, P=16, lengths=(33, 2), **BF16), ONE_PAGE, 1),
    (Case("packed", Q=2, D=64, P=16, lengths=(64, 1, 17), sliding_window=20), SMALL, 1),
    (Case("packed_bf16", Q=5, Hkv=1, D=64, P=32, lengths=(100, 3), starts=(31, 0), **BF16), ONE_PAGE, 1),
    (Case("head_dim_256", Q=3, D=256, lengths=(9, 2)), ONE_PAGE, 1),
    (Case("default_sizes", Q=4, P=128, S=2, lengths=(256, 0, 130)), None, 1),
    (Case("longer_than_the_table", Q=3, lengths=(32, 3), sliding_window=5), SMALL, 1),
    (Case("one", Q=1, lengths=(32, 0, 3)), SMALL, 1),
    (Case("int8", Q=4, P=128, lengths=(500, 2, 129), dtype=INT8, query_dtype="bfloat16"), SMALL, 1),
    (Case("fp8_window", Q=3, Hkv=1, P=128, S=3, lengths=(300, 1), sliding_window=130, dtype=FP8), SMALL, 1),
    (Case("int8_packed", Q=2, D=64, P=128, S=3, lengths=(300, 1, 129), dtype=INT8), SMALL, 1),
    (
        Case("int8_page_16_starts", Q=8, P=16, S=8, lengths=(128, 33), starts=(120, 26), dtype=INT8),
        BlockSizes(8, 1, 1),
        1,
    ),
]
# The others repeat their claims; run with `-m slow`.
OFTEN = ("three_window", "eight_starts_cap", "sixteen_bf16", "on_two_cores", "fp8_window")


def mark(case):
    return () if case.name in OFTEN else pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "sizes", "cores"),
    [pytest.param(*x, id=x[0].name, marks=mark(x[0])) for x in CASES],
)
def test_kernel_equals_the_oracle_and_races_with_nothing(case, sizes, cores):
    check(case, *run(case, sizes, simulated(cores)))
    assert_no_races()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(x[0], id=x[0].name, marks=pytest.mark.slow if x[0].name == "on_two_cores" else mark(x[0]))
        for x in CASES
    ],
)
def test_xla_form_equals_the_oracle(case):
    check(case, *run(case, None, None))


def run(case: Case, sizes, interpret, *, seed=0, sinks=None):
    """The oracle's results, and the op's (output, lse), over layer 1 of poisoned pools."""
    scales = {}
    if case.dtype in (INT8, FP8):
        (query, k, v, lengths, tables), scales, expected = make_quantized(case, seed)
        pools = [jnp.full((3, *x.shape), 77, x.dtype).at[1].set(x) for x in (k, v)]
        scales = {name: jnp.full((3, *x.shape), jnp.nan).at[1].set(x) for name, x in scales.items()}
    else:
        (query, k, v, lengths, tables), expected = make(case, seed)
        pools = [stack(x, max(128, case.D)) for x in (k, v)]
    if sinks is not None:
        k, v = (np.asarray(x) for x in (k, v))
        expected = attention_oracle(query, k, v, lengths, tables, starts=case.starts, sinks=sinks, **case.options)
    if case.name.startswith("longer_than"):
        lengths = lengths + 10**6 * (lengths == case.S * case.P)
    starts = None if case.starts is None else jnp.asarray(case.starts, jnp.int32)
    options = dict(layer=1, starts=starts, sinks=sinks, return_lse=True, block_sizes=sizes, interpret=interpret)
    made = paged_decode_attention(query, *pools, lengths, tables, **scales, **options, **case.options)
    return expected, *made


@pytest.mark.parametrize(
    "interpret", [pytest.param(simulated(), id="kernel", marks=pytest.mark.slow), pytest.param(None, id="xla")]
)
@pytest.mark.parametrize("D", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_sinks_join_each_query_s_denominator(D, interpret):
    """Those of -inf too, of queries that see nothing."""
    case = Case("sinks", Q=3, Hq=8, P=16, D=D, lengths=(33, 0, 1))
    sinks = np.array([0.5, -1.0, 3.0, -np.inf, 0.0, 20.0, -30.0, 1.0], np.float32)
    expected, output, lse = run(case, SMALL, interpret, sinks=sinks)
    check(case, expected, output, lse)
    np.testing.assert_array_equal(lse[1], np.broadcast_to(sinks, (3, 8)))


def on_context_shard(lengths, starts, tables, P, shards, shard):
    """(lengths, starts, tables) of the pages shard, shard + shards, ... of each sequence."""
    count = lambda n: n // (P * shards) * P + np.clip(n % (P * shards) - shard * P, 0, P)
    return count(lengths).astype(np.int32), count(starts).astype(np.int32), np.asarray(tables)[:, shard::shards]


@pytest.mark.parametrize("form", ["kernel", "xla"])
def test_parts_of_context_shards_with_queries_that_see_nothing_merge_to_the_whole(form):
    """Each query's own span: on a shard some queries of a sequence have no token where others do."""
    case = Case("context", Q=4, Hq=2, Hkv=1, P=16, S=5, lengths=(80, 34, 3), sliding_window=14, **BF16)
    (query, k, v, lengths, tables), expected = make(case)
    ends, _ = causal_spans(lengths, None, case.Q, case.S * case.P)
    starts = np.maximum(np.asarray(ends) - case.sliding_window, 0)
    parts, hits = [], 0
    for shard in range(2):
        n, first, table = on_context_shard(np.asarray(ends), starts, tables, case.P, 2, shard)
        alone = attention_oracle(query, k, v, n, table, starts=first, sm_scale=case.sm_scale)
        options = dict(starts=jnp.asarray(first), sm_scale=case.sm_scale, output_dtype="float32")
        if form == "xla":
            output, lse = attend_pages_xla(query, k[None], v[None], n, table, **options)
        else:
            options |= dict(block_sizes=SMALL, target=Target(), interpret=simulated())
            output, lse = decode_pages_pallas(query, k[None], v[None], jnp.asarray(n), jnp.asarray(table), **options)
            assert_no_races()
        assert (output.astype(jnp.bfloat16) != output).any()
        check(case, alone, output, lse, "float32")
        empty = np.isneginf(alone[1])[..., 0]
        hits += (empty.any(axis=1) & ~empty.all(axis=1)).sum()
        parts.append((np.asarray(output, np.float64), np.asarray(lse, np.float64)))
    assert hits >= 2
    lse = np.logaddexp.reduce([x[1] for x in parts])
    shares = [np.exp(x[1] - np.where(np.isneginf(lse), 0, lse)) for x in parts]
    merged = sum(x[0] * share[..., None] for x, share in zip(parts, shares, strict=True))
    np.testing.assert_allclose(merged, expected[0], atol=4e-3, rtol=4e-3)  # the kernel's weights are bf16
    np.testing.assert_allclose(lse, expected[1], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_kernel_equals_the_oracle_on_random_shapes(seed):
    rng = np.random.default_rng(seed)
    Q, D = int(rng.integers(2, 17)), int(rng.choice([64, 128, 256]))
    P, S = int(rng.choice([16, 32, 128])), int(rng.integers(1, 6))
    Hkv, G = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    edges = [0, 1, Q - 1, Q, P - 1, P, P + 1, S * P]
    lengths = [int(min(rng.choice([*edges, rng.integers(0, S * P + 1)]), S * P)) for _ in range(rng.integers(1, 6))]
    case = Case(
        "random",
        Q=Q,
        Hq=Hkv * G,
        Hkv=Hkv,
        D=D,
        P=P,
        S=S,
        lengths=(*lengths, 1),
        dtype=str(rng.choice(["bfloat16", "float32", INT8, FP8])),
        query_dtype=str(rng.choice(["bfloat16", "float32"])),
        starts=None if rng.random() < 0.5 else tuple(int(rng.integers(-3, S * P)) for _ in (*lengths, 1)),
        sliding_window=None if rng.random() < 0.5 else int(rng.integers(1, S * P + 2)),
        soft_cap=None if rng.random() < 0.7 else 3.0,
    )
    sizes = BlockSizes(int(rng.choice([1, 2, 4])), int(rng.choice([1, 2, 4])), int(rng.integers(1, 4)))
    cores = int(rng.integers(1, 3)) if P < 128 else 1  # of two, each has less vector memory than sizes at random take
    check(case, *run(case, sizes, simulated(cores), seed=seed))
    assert_no_races()


@pytest.mark.slow
def test_new_tokens_that_do_not_fit_beside_each_other_take_several_launches(monkeypatch):
    case = Case("split", Q=3, Hkv=1, S=2, lengths=(9, 2), sliding_window=6)
    launches, launch = [], pallas_call.launch_once
    monkeypatch.setattr(
        pallas_call, "launch_once", lambda plan, *x, **k: launches.append(plan.Q) or launch(plan, *x, **k)
    )
    monkeypatch.setattr(pallas_call, "fits", lambda plan: plan.Q <= 2)
    check(case, *run(case, None, simulated()))
    assert launches == [1, 2]


@pytest.mark.parametrize("form", ["kernel", "xla"])
@pytest.mark.parametrize("starts", [pytest.param(False, marks=pytest.mark.slow), True])
def test_one_new_token_is_the_plain_program(form, starts):
    """The kernel's whole program, and the XLA form's, but for axes of 1 at its ends."""
    query, *pools, lengths, tables = shapes(B=3, Hq=16, Hkv=2, L=1)
    interpret = False if form == "kernel" else "xla"

    def program(query, lengths):
        given = dict(starts=lengths, sinks=jax.ShapeDtypeStruct((16,), jnp.float32)) if starts else {}
        attend = lambda q, k, v, n, t, given: decode_stored_pages(
            q, k, v, n, t, **given, sm_scale=0.1, soft_cap=None, return_lse=True, interpret=interpret
        )
        jaxpr = jax.make_jaxpr(attend)(query, *pools, lengths, tables, given)
        name = "pallas_call" if form == "kernel" else "scan"
        found = [eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == name]
        assert found
        return [str(eqn.params) for eqn in found]

    expand = lambda x: jax.ShapeDtypeStruct((x.shape[0], 1, *x.shape[1:]), x.dtype)
    assert program(query, lengths) == program(expand(query), expand(lengths))


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _equations(inner)


@pytest.mark.parametrize(
    "interpret", [pytest.param(simulated(), id="kernel", marks=pytest.mark.slow), pytest.param(None, id="xla")]
)
def test_an_output_in_f32_is_not_rounded(interpret):
    case = Case("f32", Q=2, P=16, lengths=(33, 0), **BF16)
    (query, k, v, lengths, tables), expected = make(case)
    ends, _ = causal_spans(lengths, None, 2, 64)
    attend = lambda dtype: decode_stored_pages(
        query, k[None], v[None], ends, tables, return_lse=False, output_dtype=dtype, interpret=interpret, sm_scale=0.1
    )
    wide = attend(jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), attend(None))
    np.testing.assert_allclose(wide, expected[0], atol=3e-3)
    with pytest.raises(ValueError, match=r"output_dtype='int8'.*None or one of"):
        attend("int8")


BAD = [
    (dict(query=jnp.zeros((2, 17, 4, 128))), r"query\.shape=.*17 new tokens a sequence must be 1 to 16.*several calls"),
    (dict(query=jnp.zeros((2, 0, 4, 128))), r"query\.shape=.*0 new tokens a sequence must be 1 to 16"),
    (dict(query=jnp.zeros((2, 1, 1, 4, 128))), r"query\.shape=.*\[B, Hq, head_dim\] or \[B, Q, Hq, head_dim\]"),
    (dict(lengths=jnp.zeros((2, 3), jnp.int32)), r"lengths\.shape=\(2, 3\).*\(2,\)"),
    (dict(lengths=jnp.zeros(2)), r"lengths\.dtype='float32'.*int32"),
    (dict(starts=jnp.zeros((2, 3), jnp.int32)), r"starts\.shape=\(2, 3\).*\(2,\)"),
    (dict(sinks=jnp.zeros(3)), r"sinks\.shape=\(3,\).*\(4,\)"),
]


@pytest.mark.parametrize(("changes", "names"), BAD, ids=[f"{next(iter(x[0]))}{i}" for i, x in enumerate(BAD)])
def test_bad_arguments_are_named(changes, names):
    (query, k, v, lengths, tables), _ = make(Case("bad", Q=3, lengths=(8, 3)))
    given = dict(query=query, lengths=lengths) | changes
    with pytest.raises(ValueError, match=names):
        paged_decode_attention(given.pop("query"), k, v, given.pop("lengths"), tables, **given)


def test_each_query_s_own_span_needs_lengths_and_starts_of_its_shape():
    (query, k, v, lengths, tables), _ = make(Case("bad", Q=3, lengths=(8, 3)))
    with pytest.raises(ValueError, match=r"lengths\.shape=\(2,\).*must be \(2, 3\)"):
        attend_pages_xla(query, k[None], v[None], lengths, tables)
    spans = jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"starts\.shape=\(2,\).*must be \(2, 3\)"):
        attend_pages_xla(query, k[None], v[None], spans, tables, starts=lengths)


@pytest.mark.parametrize("window", [None, 1, 37])
def test_bytes_are_counted_from_the_first_query_s_start_to_the_last_s_end(window):
    rng, P, S, Q = np.random.default_rng(0), 32, 4, 5
    lengths = (0, 1, 4, 5, P, P + 1, S * P, S * P + 99, *rng.integers(0, S * P, 20).tolist())
    starts = rng.integers(-5, S * P + 5, len(lengths))
    p = Problem(len(lengths), 4, 2, 128, 1, 999, P, 128, S, "bfloat16", "bfloat16", Q)
    plan = plan_choice.make_launch_plan(p, Target(), sliding_window=window)
    pages, tiles, live = 0, set(), 0
    for b, n in enumerate(min(n, S * P) for n in lengths):
        end = [max(n - Q + 1 + q, 0) for q in range(Q)]
        spans = [range(max(starts[b], 0, 0 if window is None else e - window), e) for e in end]
        tokens = sorted(set().union(*spans))
        pages += len({t // P for t in tokens})
        tiles |= {(b, t // plan.tile) for t in tokens}
        live += len(tokens)
    token_bytes = 2 * 2 * 128 * 2
    assert traffic.page_traffic(plan, lengths, starts) == (2 * pages, len(tiles) * plan.tile * token_bytes)
    assert traffic.live_bytes(plan, lengths, starts) == live * token_bytes
    own = causal_spans(np.array(lengths), starts, Q, S * P)
    assert traffic.page_traffic(plan, *own) == traffic.page_traffic(plan, lengths, starts)


def test_default_sizes_fit_all_new_tokens_but_where_they_are_rows_by_the_thousand():
    for Q in (2, 5, 16):
        for Hkv, G in ((1, 1), (1, 8), (1, 16), (3, 5), (8, 4), (8, 16)):
            for D, W, P in ((64, 128, 16), (128, 128, 128), (128, 128, 256), (256, 256, 64)):
                for dtype in ("bfloat16", "float32", INT8):
                    for target in (Target(), Target(2, False), Target(1, True, True)):
                        shape = (32, Hkv * G, Hkv, D, 1, 4096, P * D // W, W, 32)
                        for tokens in (Q, Q // 2, Q // 4, Q // 8):
                            p = Problem(*shape, "bfloat16", dtype, tokens)
                            plan = plan_choice.make_launch_plan(p, target, return_lse=True)
                            if plan_choice.fits(plan):
                                break
                        assert tokens == Q or (Hkv == 8 and (target.num_cores == 2 or G * Q == 256))
                        plan_choice.check_block_sizes(plan)
                        rows = plan_choice.rows_per_launch(plan)
                        part = dataclasses.replace(plan, problem=plan.problem.replace(batch=rows))
                        assert part.vmem_bytes <= plan_choice.vmem_limit(target.num_cores)


ONE_HEAD = dict(Hq=8, Hkv=1, N=512)
COMPILED = {
    "four": (4, ONE_HEAD, {}),
    "sixteen_of_sixteen_heads": (16, dict(Hq=16, Hkv=1, N=512), dict(return_lse=True)),
    "gqa_window": (3, dict(), dict(sliding_window=1000)),
    "gqa_sixteen": (16, dict(Hq=64), dict(return_lse=True)),
    "packed_sinks": (5, dict(Hq=16, Hkv=2, D=64, R=64, N=512), dict(sinks=True)),
    "head_dim_256_f32_query": (8, dict(Hq=16, Hkv=2, D=256, W=256, N=128, query_dtype="float32"), {}),
    "many_heads": (2, dict(Hq=32, Hkv=32, N=32), {}),
    "page_16": (4, dict(Hq=8, Hkv=1, R=16, S=256, N=4096), {}),
    "int8": (4, dict(N=512, dtype=INT8), dict(scales=True)),
    "fp8_sixteen": (16, dict(**ONE_HEAD, dtype=FP8), dict(scales=True)),
    "fp8_sixteen_gqa": (16, dict(Hq=64, N=512, dtype=FP8), dict(scales=True)),
}
AT_ONCE = {"v4": "four", "v5e": "packed_sinks", "v5p": "sixteen_of_sixteen_heads", "v6e": "gqa_window", "v7x": "int8"}


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "name"),
    [
        pytest.param(chip, name, marks=() if name == AT_ONCE[chip] else pytest.mark.slow)
        for chip in CHIP_TOPOLOGIES
        for name in COMPILED
    ],
)
def test_it_compiles_on_every_chip_and_no_pool_is_copied(chip, name):
    Q, shape, options = COMPILED[name]
    query, *arrays = shapes(**shape)
    B, Hq, D = query.shape
    query_bytes = Q * Hq * D * query.dtype.itemsize  # of a sequence; with more, a batch may take several launches
    query = jax.ShapeDtypeStruct((B, Q, Hq, D), query.dtype)
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = jax.ShapeDtypeStruct((Hq,), jnp.float32)
    if options.pop("scales", False):
        scales = jax.ShapeDtypeStruct(arrays[0].shape[:-1], jnp.float32)
        options |= dict(key_scales=scales, value_scales=scales)
    assert kernels(compiled_text(chip, (query, *arrays), **options)) == 1 or query_bytes > 1 << 16
