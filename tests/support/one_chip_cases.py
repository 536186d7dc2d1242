"""Inputs for the paged-attention tests: ragged batches in which everything that must not be read is poison."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from paged_dist.kernels import BlockSizes
from paged_dist.kernels.attention.oracle import attention_oracle
from paged_dist.kernels.attention.problem import Problem
from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.quantization import dequantize_kv, quantize_kv


@dataclasses.dataclass(frozen=True)
class OneChipCase:
    """One problem. Letters as in the arrays' shapes; lengths and starts count tokens."""

    name: str
    Hq: int = 4
    Hkv: int = 2
    D: int = 128
    P: int = 8
    S: int = 4
    lengths: tuple[int, ...] = (0, 1, 8, 9, 32, 31)
    dtype: str = "float32"
    query_dtype: str = "float32"
    soft_cap: float | None = None
    sliding_window: int | None = None
    starts: tuple[int, ...] | None = None
    sm_scale: float = 0.1
    Q: int | None = None  # new tokens a sequence, an axis of the query

    @property
    def options(self) -> dict:
        return dict(sm_scale=self.sm_scale, soft_cap=self.soft_cap, sliding_window=self.sliding_window)

    @property
    def page_attention_options(self) -> dict:
        return dict(sm_scale=self.sm_scale, attn_logits_soft_cap=self.soft_cap, sliding_window=self.sliding_window)

    @property
    def first_tokens(self) -> list[int]:
        """The first token that each sequence attends to, its first query's; its length where there is none."""
        starts = self.starts or (0,) * len(self.lengths)
        before = (self.Q or 1) - 1
        window = [0 if self.sliding_window is None else n - before - self.sliding_window for n in self.lengths]
        return [min(max(start, w, 0), n) for start, w, n in zip(starts, window, self.lengths, strict=True)]

    @property
    def tolerance(self) -> float:
        return 2e-2 if self.query_dtype == "bfloat16" else 2e-5


def poisoned_arrays(case: OneChipCase, seed: int = 0):
    """(query, key_pages, value_pages, lengths, block_tables) with poison, and the oracle's (output, lse).

    Every K and V element outside the live tokens is NaN, and every table entry of a page outside them is an id
    far out of range, on either side.
    """
    rng = np.random.default_rng(seed)
    B, N = len(case.lengths), len(case.lengths) * case.S + 2
    shape = (B, case.Hq, case.D) if case.Q is None else (B, case.Q, case.Hq, case.D)
    query = jnp.asarray(rng.normal(size=shape), case.query_dtype)
    k, v = (rng.normal(size=(case.Hkv, N, case.P, case.D)) for _ in "kv")
    lengths = np.array(case.lengths, np.int32)
    tables = rng.permutation(N)[: B * case.S].reshape(B, case.S).astype(np.int32)
    dead = np.ones((N, case.P), bool)
    for b, length in enumerate(lengths):
        start = case.first_tokens[b]
        tokens = np.arange(start, length)
        dead[tables[b, tokens // case.P], tokens % case.P] = False
        tables[b, -(-length // case.P) :] = rng.choice([-1, 2**31 - 1, 10**6, -(2**31)])
        tables[b, : start // case.P] = rng.choice([-1, 2**31 - 1, 10**6, -(2**31)])
    k[:, dead], v[:, dead] = np.nan, np.nan
    k, v = jnp.asarray(k, case.dtype), jnp.asarray(v, case.dtype)
    expected = attention_oracle(query, k, v, lengths, tables, starts=case.starts, **case.options)
    return (query, k, v, lengths, tables), expected


def in_stacked_pools(pages, width: int, layers: int = 3, layer: int = 1):
    """`pages` [Hkv, N, P, D] as layer `layer` of stored pools [L, Hkv, N, R, W]; the other layers are NaN."""
    Hkv, N, P, D = pages.shape
    return among_layers(np.asarray(pages).reshape(Hkv, N, P * D // width, width), np.nan, layers, layer)


def among_layers(x, others, layers: int = 3, layer: int = 1) -> jax.Array:
    """`x` as layer `layer` of a stacked array; the other layers are full of `others`. In NumPy: nothing is compiled."""
    x = np.asarray(x)
    stacked = np.full((layers, *x.shape), others, x.dtype)
    stacked[layer] = x
    return jnp.asarray(stacked)


def assert_close_to_oracle(case: OneChipCase, expected, output, lse=None):
    """`output` (and `lse`) against the oracle's; both must agree on which sequences are empty, exactly."""
    output = np.asarray(output, np.float64)
    np.testing.assert_allclose(output, expected[0], atol=case.tolerance, rtol=case.tolerance)
    empty = np.array(case.first_tokens) == np.array(case.lengths)
    assert not output[empty].any()
    if lse is not None:
        assert lse.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(lse, np.float64), expected[1], atol=2e-5, rtol=2e-5)
        assert np.isneginf(np.asarray(lse)[empty]).all()


ONE_CHIP_CASES = [
    OneChipCase("gqa"),
    OneChipCase("mqa", Hq=8, Hkv=1),
    OneChipCase("mha", Hq=3, Hkv=3),
    OneChipCase("wide_group", Hq=24, Hkv=1, lengths=(9, 0)),
    OneChipCase("bf16", dtype="bfloat16", query_dtype="bfloat16"),
    OneChipCase("bf16_pages_f32_query", dtype="bfloat16"),
    OneChipCase("page_16_bf16", P=16, dtype="bfloat16", query_dtype="bfloat16", lengths=(64, 16, 17, 0, 15)),
    OneChipCase("page_24", P=24, lengths=(96, 24, 25, 95)),
    OneChipCase("page_256", P=256, S=3, lengths=(768, 1, 257, 0), Hq=2),
    OneChipCase("page_128_long_table", P=128, S=9, lengths=(1152, 5), Hq=2),
    OneChipCase("one_page_table", S=1, lengths=(8, 3, 0)),
    OneChipCase("odd_table", S=5, lengths=(40, 33, 0, 8)),
    OneChipCase("all_empty", lengths=(0, 0, 0)),
    OneChipCase("one_sequence", lengths=(17,)),
    OneChipCase("head_dim_256", D=256, lengths=(9, 0, 32)),
    OneChipCase("head_dim_64_page_16", D=64, P=16, lengths=(64, 1, 0, 15, 16, 17)),
    OneChipCase("head_dim_64_page_8", D=64, lengths=(32, 1, 0, 7, 9)),
    OneChipCase("head_dim_64_bf16", D=64, P=32, dtype="bfloat16", query_dtype="bfloat16", lengths=(128, 31, 33, 0)),
    OneChipCase("soft_cap", soft_cap=1.5),
    OneChipCase("window_under_a_page", sliding_window=3),
    OneChipCase("window_of_one", sliding_window=1),
    OneChipCase("window_of_two_pages", sliding_window=16),
    OneChipCase("window_over_all", sliding_window=1000),
    OneChipCase("window_head_dim_64", D=64, P=16, sliding_window=19, lengths=(64, 20, 21, 0, 3)),
    OneChipCase("window_and_cap_bf16", sliding_window=11, soft_cap=2.0, dtype="bfloat16"),
    OneChipCase("default_scale", sm_scale=1.0, lengths=(13, 2)),
]

STARTS_CASES = [
    OneChipCase("starts_at_page_edges", lengths=(32, 31, 9, 8), starts=(8, 24, 8, 0)),
    OneChipCase("starts_inside_pages", lengths=(32, 31, 9, 8), starts=(1, 13, 7, 5)),
    OneChipCase("starts_at_the_last_token", lengths=(32, 25, 9, 8), starts=(31, 24, 8, 7)),
    OneChipCase("starts_at_the_length_and_beyond", lengths=(32, 31, 9, 8, 0, 5), starts=(32, 33, 2**31 - 1, 8, 3, 4)),
    OneChipCase("starts_below_zero", lengths=(32, 9, 0), starts=(-1, -(2**31), -5)),
    OneChipCase("starts_all_beyond", lengths=(5, 8), starts=(9, 8)),
    OneChipCase("starts_before_and_in_the_window", lengths=(32, 31, 9, 8), starts=(9, 30, 0, 8), sliding_window=11),
    OneChipCase("starts_bf16", dtype="bfloat16", query_dtype="bfloat16", lengths=(32, 17, 1), starts=(9, 16, 0)),
    OneChipCase("starts_head_dim_64", D=64, P=16, lengths=(64, 33, 16), starts=(17, 31, 16)),
    OneChipCase("starts_in_a_long_table", P=128, S=9, Hq=2, lengths=(1152, 1100), starts=(640, 1099), soft_cap=2.0),
]


INT8, FP8 = "int8", "float8_e4m3fn"


_quantize = jax.jit(quantize_kv, static_argnums=1)  # one program a shape, where it would be one an operation
_dequantize = jax.jit(dequantize_kv)


def quantized_arrays(case: OneChipCase, seed: int = 0):
    """(query, key_pages, value_pages, lengths, block_tables), both scales, and the oracle's (output, lse)."""
    (query, k, v, lengths, tables), _ = poisoned_arrays(dataclasses.replace(case, dtype="float32"), seed)
    spare = -k.shape[1] % max(1, 128 // case.P)  # whole rows of scales
    worst = -128 if case.dtype == INT8 else np.nan
    pools, scales = [], []
    for x in (k, v):
        x = np.pad(x, ((0, 0), (0, spare), (0, 0), (0, 0)), constant_values=np.nan)
        dead = np.isnan(x[..., 0])
        values, scale = map(np.array, _quantize(np.nan_to_num(x), case.dtype))
        values[dead], scale[dead] = worst, np.nan
        pools.append(jnp.asarray(values))
        scales.append(jnp.asarray(scale))
    exact = [np.asarray(_dequantize(p, s), np.float64) for p, s in zip(pools, scales, strict=True)]
    expected = attention_oracle(query, *exact, lengths, tables, starts=case.starts, **case.options)
    return (query, *pools, lengths, tables), dict(zip(("key_scales", "value_scales"), scales, strict=True)), expected


def launch_plan_of(case: OneChipCase, sizes=None, **options) -> LaunchPlan:
    width = max(128, case.D)
    rows, pages = case.P * case.D // width, len(case.lengths) * case.S
    shape = (len(case.lengths), case.Hq, case.Hkv, case.D, 1, pages, rows, width, case.S)
    problem = Problem(*shape, case.query_dtype, case.dtype)
    return LaunchPlan(problem, sizes or BlockSizes(1, 1), sliding_window=case.sliding_window, **options)
