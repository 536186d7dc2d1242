"""The decode kernel over int8 and fp8 pages, simulated with race detection, and the XLA form, against float64.

Everything that must not count is NaN: scales of dead tokens, also where pages share a row of scales, and fp8 values.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from page_attention_cases import Case, make
from simulated import assert_no_races, simulated

from paged_dist.kernels import BlockSizes, page_attention, paged_decode_attention
from paged_dist.kernels.attention.oracle import attention_oracle
from paged_dist.kernels.attention.problem import Problem
from paged_dist.kernels.decode import plan_choice
from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.decode.pallas_call import decode_pages_pallas
from paged_dist.kernels.quantization import dequantize_kv, quantize_kv
from paged_dist.kernels.scale_layout import pack_scales
from paged_dist.kernels.target import Target

SMALL = BlockSizes(pages_per_cell=2, cells_per_step=2, steps_ahead=2)
INT8, FP8 = "int8", "float8_e4m3fn"


def make_quantized(case: Case, seed: int = 0):
    """(query, key_pages, value_pages, lengths, block_tables), both scales, and the oracle's (output, lse)."""
    (query, k, v, lengths, tables), _ = make(dataclasses.replace(case, dtype="float32"), seed)
    spare = -k.shape[1] % max(1, 128 // case.P)  # whole rows of scales
    pools, scales = [], []
    for x in (k, v):
        x = jnp.pad(x, ((0, 0), (0, spare), (0, 0), (0, 0)), constant_values=jnp.nan)
        dead = jnp.isnan(x[..., 0])
        values, scale = quantize_kv(jnp.nan_to_num(x), case.dtype)
        worst = jnp.asarray(-128, jnp.int8) if case.dtype == INT8 else jnp.asarray(jnp.nan, FP8)
        pools.append(jnp.where(dead[..., None], worst, values))
        scales.append(jnp.where(dead, jnp.nan, scale))
    exact = [np.asarray(dequantize_kv(p, s), np.float64) for p, s in zip(pools, scales, strict=True)]
    expected = attention_oracle(query, *exact, lengths, tables, starts=case.starts, **case.options)
    return (query, *pools, lengths, tables), dict(zip(("key_scales", "value_scales"), scales, strict=True)), expected


def check(case: Case, expected, output, lse):
    np.testing.assert_allclose(lse, expected[1], atol=1e-4, rtol=1e-4)
    error = np.linalg.norm(np.asarray(output, np.float64) - expected[0])
    assert error <= (5e-3 if case.query_dtype == "bfloat16" else 1e-4) * np.linalg.norm(expected[0])  # 0 if all empty
    empty = np.array(case.first_tokens) == np.array(case.lengths)
    assert not np.asarray(output)[empty].any() and np.isneginf(np.asarray(lse)[empty]).all()


BF16 = dict(query_dtype="bfloat16")
CASES = [
    (Case("gqa", P=128, lengths=(0, 1, 130, 256, 500), dtype=INT8, **BF16), SMALL, 1),
    (Case("default_sizes", P=128, S=2, lengths=(256, 0, 77), dtype=FP8, **BF16), None, 1),
    (Case("default_sizes_two_cores", P=128, S=3, lengths=(256, 0, 77, 384), dtype=INT8, **BF16), None, 2),
    (Case("four_heads_share_a_register", Hq=4, Hkv=4, P=128, lengths=(7, 300), dtype=INT8, **BF16), SMALL, 1),
    (Case("page_64", P=64, lengths=(250, 7, 129), dtype=FP8, **BF16), BlockSizes(4, 2, 2), 1),
    (Case("page_16", P=16, S=8, lengths=(128, 33), dtype=INT8, **BF16), BlockSizes(8, 1, 1), 1),
    (Case("page_16_window", P=16, S=8, lengths=(128, 33), sliding_window=20, dtype=FP8), BlockSizes(4, 2, 1), 1),
    (Case("page_256", P=256, S=2, lengths=(500, 130), dtype=INT8, **BF16), BlockSizes(1, 2, 2), 1),
    (Case("head_dim_256", Hq=8, D=256, P=128, S=2, lengths=(200, 7), dtype=FP8, **BF16), BlockSizes(1, 2, 2), 1),
    (Case("packed", D=64, P=128, S=3, lengths=(300, 1, 129), dtype=INT8, **BF16), SMALL, 1),
    (Case("packed_page_32", D=64, P=32, lengths=(100, 33), dtype=FP8, **BF16), BlockSizes(4, 2, 2), 1),
    (Case("packed_page_256", D=64, P=256, S=2, lengths=(301, 512), dtype=INT8), BlockSizes(1, 2, 1), 1),
    (Case("starts", P=128, lengths=(500, 300, 129), starts=(131, 299, 5), soft_cap=2.0, dtype=FP8), SMALL, 1),
    (Case("window", P=128, lengths=(500, 300), sliding_window=150, dtype=INT8), SMALL, 1),
]
SLOW = (
    "gqa",
    "page_16",
    "page_64",
    "default_sizes",
    "four_heads_share_a_register",
    "page_16_window",
    "packed_page_256",
    "head_dim_256",
    "window",
    "page_256",
)
OF_CASE = [
    pytest.param(*x, id=f"{x[0].name}-{x[0].dtype}", marks=pytest.mark.slow if x[0].name in SLOW else ()) for x in CASES
]


@pytest.mark.parametrize(("case", "sizes", "cores"), OF_CASE)
def test_kernel_equals_the_oracle_and_races_with_nothing(case, sizes, cores):
    arrays, scales, expected = make_quantized(case)
    starts = None if case.starts is None else jnp.asarray(case.starts, jnp.int32)
    options = dict(starts=starts, return_lse=True, block_sizes=sizes, interpret=simulated(cores))
    check(case, expected, *paged_decode_attention(*arrays, **scales, **case.options, **options))
    assert_no_races()


@pytest.mark.parametrize(
    ("case", "target"),
    [
        (Case("v7x", P=128, lengths=(0, 1, 130, 256, 500, 512), dtype=FP8, **BF16), Target(1, True, True)),
        (Case("v7x_starts", P=128, lengths=(500, 300), starts=(131, 299), dtype=INT8, **BF16), Target(1, True, True)),
        (Case("v4", P=128, S=2, lengths=(130, 0, 256), dtype=FP8, **BF16), Target(2, False)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_what_single_chips_do_differently_equals_the_oracle(case, target):
    """V's copies with K's, which share one semaphore, and pages widened before they are multiplied."""
    (query, k, v, *rest), scales, expected = make_quantized(case)
    starts = None if case.starts is None else jnp.asarray(case.starts, jnp.int32)
    scales = {name: pack_scales(x)[None] for name, x in scales.items()}
    options = dict(block_sizes=SMALL, target=target, interpret=simulated(target.num_cores), **case.options)
    check(case, expected, *decode_pages_pallas(query, k[None], v[None], *rest, starts=starts, **scales, **options))
    assert_no_races()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            x[0],
            id=f"{x[0].name}-{x[0].dtype}",
            marks=pytest.mark.slow if x[0].name in ("starts", "page_16_window") else (),
        )
        for x in CASES[::3]
    ],
)
def test_xla_form_equals_the_oracle(case):
    arrays, scales, expected = make_quantized(case)
    starts = None if case.starts is None else jnp.asarray(case.starts, jnp.int32)
    check(case, expected, *paged_decode_attention(*arrays, **scales, starts=starts, return_lse=True, **case.options))


@pytest.mark.parametrize("interpret", [None, simulated()], ids=["xla", "kernel"])
def test_layers_are_picked_with_their_scales(interpret):
    case = Case("layers", P=128, S=2, lengths=(200, 3), dtype=INT8)
    (query, k, v, *rest), scales, expected = make_quantized(case)
    pools = [jnp.full((3, *x.shape), 77, x.dtype).at[1].set(x) for x in (k, v)]
    scales = {name: jnp.full((3, *x.shape), jnp.nan).at[1].set(x) for name, x in scales.items()}

    def attend(layer):
        options = dict(block_sizes=SMALL, interpret=interpret, return_lse=True, **case.options)
        return paged_decode_attention(query, *pools, *rest, layer=layer, **scales, **options)

    check(case, expected, *jax.jit(attend)(1))


def test_page_attention_takes_scales():
    case = Case("page_attention", P=128, lengths=(500, 0, 300), soft_cap=2.0, sliding_window=150, dtype=FP8)
    arrays, scales, expected = make_quantized(case)
    output = page_attention(*arrays, **scales, **case.page_attention_options)
    np.testing.assert_allclose(output, expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kernel_equals_the_oracle_on_random_shapes(seed):
    rng = np.random.default_rng(seed)
    P, S, D = int(rng.choice([16, 32, 64, 128, 256])), int(rng.integers(1, 6)), int(rng.choice([64, 128, 256]))
    Hkv, G = int(rng.integers(1, 4)), int(rng.integers(1, 9))
    edges = [0, 1, P - 1, P, P + 1, S * P]
    lengths = [int(min(rng.choice([*edges, rng.integers(0, S * P + 1)]), S * P)) for _ in range(rng.integers(1, 7))]
    case = Case(
        "random",
        Hq=Hkv * G,
        Hkv=Hkv,
        D=D,
        P=P,
        S=S,
        lengths=(*lengths, 1),
        dtype=str(rng.choice([INT8, FP8])),
        query_dtype=str(rng.choice(["bfloat16", "float32"])),
        starts=None if rng.random() < 0.5 else tuple(int(rng.integers(-3, S * P)) for _ in (*lengths, 1)),
        sliding_window=None if rng.random() < 0.6 else int(rng.integers(1, S * P + 2)),
    )
    sizes = BlockSizes(int(rng.choice([1, 2, 4])), int(rng.choice([1, 2, 4])), int(rng.integers(1, 4)))
    arrays, scales, expected = make_quantized(case, seed)
    starts = None if case.starts is None else jnp.asarray(case.starts, jnp.int32)
    options = dict(starts=starts, return_lse=True, block_sizes=sizes, interpret=simulated())
    check(case, expected, *paged_decode_attention(*arrays, **scales, **case.options, **options))
    assert_no_races()


def _without(name):
    return lambda arrays, scales: (arrays, {k: v for k, v in scales.items() if k != name})


def _scales(change):
    return lambda arrays, scales: (arrays, scales | {"key_scales": change(scales["key_scales"])})


def _pages(dtype):
    return lambda arrays, scales: ((arrays[0], *(x.astype(dtype) for x in arrays[1:3]), *arrays[3:]), scales)


BAD = {
    "no_value_scales": (_without("value_scales"), "value_scales=None.*both key_scales and value_scales"),
    "no_scales": (lambda arrays, scales: (arrays, {}), "dtype='int8'.*need key_scales, value_scales"),
    "shape": (_scales(lambda x: x[:, :-1]), r"key_scales\.shape=.*must be \(2, 10, 128\)"),
    "broadcast_over_head_dim": (_scales(lambda x: x[..., None]), r"key_scales\.shape=.*one for each token and head"),
    "dtype": (_scales(lambda x: x.astype(jnp.bfloat16)), r"key_scales\.dtype='bfloat16'.*float32"),
    "bf16_pages": (_pages(jnp.bfloat16), "key_scales='given'.*int8 and float8_e4m3fn.*not bfloat16"),
}


@pytest.mark.parametrize(("change", "names"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("op", [paged_decode_attention, page_attention])
def test_scales_that_do_not_go_with_the_pages_are_refused(op, change, names):
    arrays, scales, _ = make_quantized(Case("bad", P=128, lengths=(8, 3), dtype=INT8))
    arrays, scales = change(arrays, scales)
    with pytest.raises(ValueError, match=names):
        op(*arrays, **scales)


def test_pages_whose_scales_would_straddle_rows_are_refused():
    int8 = lambda P, N: jnp.zeros((1, N, P, 128), jnp.int8)
    call = lambda P, N: paged_decode_attention(
        jnp.zeros((1, 1, 128)),
        int8(P, N),
        int8(P, N),
        jnp.ones(1, jnp.int32),
        jnp.zeros((1, 1), jnp.int32),
        key_scales=jnp.ones((1, N, P)),
        value_scales=jnp.ones((1, N, P)),
    )
    with pytest.raises(ValueError, match=r"=24.*must divide 128 or be a multiple of it"):
        call(24, 16)
    with pytest.raises(ValueError, match=r"num_pages=9.*multiple of 8"):
        call(16, 9)


def test_default_sizes_fit():
    for Hkv in (1, 2, 3, 8, 32):
        for D, W, P in ((64, 128, 16), (128, 128, 64), (128, 128, 128), (128, 128, 256), (256, 256, 128)):
            for dtype in (INT8, FP8):
                for B, S in ((1, 1), (32, 32), (256, 1024)):
                    p = Problem(B, Hkv * 4, Hkv, D, 1, 4096, P * D // W, W, S, "bfloat16", dtype)
                    for cores in (1, 2):
                        plan = LaunchPlan(p, plan_choice.choose_block_sizes(p, None, cores), num_cores=cores)
                        plan_choice.check_block_sizes(plan)
                        assert plan_choice.rows_per_launch(plan) >= 1
