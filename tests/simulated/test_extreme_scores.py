"""Scores at the ends of f32: the largest live one has weight 1, however far below zero or beyond range it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_chip_cases import OneChipCase, poisoned_arrays
from pod_cases import PodCase
from simulated import RACES, assert_no_races, simulated

import paged_dist as pd
from paged_dist.kernels import BlockSizes, page_attention, paged_decode_attention, ref_paged_attention
from paged_dist.kernels.attention.oracle import attention_oracle

SMALL = BlockSizes(pages_per_cell=2, cells_per_step=2, steps_ahead=2)
SLOW_KERNEL = pytest.mark.parametrize(
    "interpret", [pytest.param(None, id="xla"), pytest.param(RACES, id="kernel", marks=pytest.mark.slow)]
)
LARGEST = float(np.finfo(np.float32).max)


def arrays_of_scores(case: OneChipCase, scores):
    """The case's arrays with q . k equal to `scores` [B] at every live token, and V that tells the tokens apart."""
    (query, k, v, lengths, tables), _ = poisoned_arrays(case)
    live = np.isfinite(np.asarray(k, np.float32))
    size = np.sqrt(np.abs(np.asarray(scores, np.float64)) / case.D)
    query = np.broadcast_to(size.reshape(-1, *(1,) * (query.ndim - 1)), query.shape)
    k = np.where(live, 0.0, np.nan)
    for b, length in enumerate(case.lengths):
        pages = tables[b, : -(-length // case.P)]
        k[:, pages] = np.where(live[:, pages], np.sign(scores[b]) * size[b], np.nan)
    return jnp.asarray(query, case.query_dtype), jnp.asarray(k, case.dtype), v, lengths, tables


ONE_TOKEN = [
    OneChipCase("f32", lengths=(1, 0, 1, 1), sm_scale=1.0),
    OneChipCase("packed", D=64, P=16, lengths=(1, 0, 1, 1), sm_scale=1.0),
    OneChipCase("queries", Q=3, lengths=(1, 0, 3, 2), sm_scale=1.0),
    OneChipCase("bf16", P=16, dtype="bfloat16", query_dtype="bfloat16", lengths=(1, 0, 1, 1), sm_scale=1.0),
]
SCORES = (-3.0e38, -3.0e38, -2.5e38, 3.0e38)  # the first and the third below DEFAULT_MASK_VALUE


@pytest.mark.parametrize(
    ("case", "interpret"),
    [
        pytest.param(
            case,
            interpret,
            id=f"{case.name}-{'kernel' if interpret else 'xla'}",
            marks=() if (case.name, interpret) in (("packed", RACES), ("f32", None)) else pytest.mark.slow,
        )
        for case in ONE_TOKEN
        for interpret in (None, RACES)
    ],
)
def test_equal_live_scores_far_from_zero_weigh_the_same(case, interpret):
    query, k, v, lengths, tables = arrays_of_scores(case, SCORES)
    output, lse = paged_decode_attention(
        query, k, v, lengths, tables, return_lse=True, block_sizes=SMALL, interpret=interpret
    )
    expected = attention_oracle(query, k, v, lengths, tables)
    close = dict(atol=2e-2, rtol=2e-2) if case.dtype == "bfloat16" else dict(atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(output, np.float64), expected[0], **close)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5)
    if interpret is RACES:
        assert_no_races()


@pytest.mark.parametrize(
    ("Q", "interpret"),
    [
        pytest.param(None, None, id="xla", marks=pytest.mark.slow),
        pytest.param(2, None, id="queries-xla"),
        pytest.param(None, RACES, id="kernel"),
        pytest.param(2, RACES, id="queries-kernel", marks=pytest.mark.slow),
    ],
)
def test_scores_beyond_f32_count_as_its_ends(Q, interpret):
    """q . k is an infinity there; no output is NaN, and the lse is finite, for merges take -inf for empty."""
    scores = (-1e39, 1e39, 1.0, -1e39, 1e39)
    case = OneChipCase("beyond", Q=Q, lengths=(1, 1, 0, 9, 9), sm_scale=1.0)
    query, k, v, lengths, tables = arrays_of_scores(case, scores)
    output, lse = paged_decode_attention(
        query, k, v, lengths, tables, return_lse=True, block_sizes=SMALL, interpret=interpret
    )
    expected, sees = attention_oracle(query, k, v, lengths, tables)
    np.testing.assert_allclose(output, expected, atol=1e-5, rtol=1e-5)
    ends = (np.sign(scores) * np.float32(LARGEST)).reshape(-1, *(1,) * (sees.ndim - 1))
    np.testing.assert_array_equal(lse, np.where(np.isneginf(sees), -np.inf, ends))


@SLOW_KERNEL
def test_the_largest_of_live_scores_takes_all_across_cells_and_sinks_join(interpret):
    case = OneChipCase("across", Hq=4, Hkv=1, S=5, lengths=(40, 40), sm_scale=1.0)
    query, k, v, lengths, tables = arrays_of_scores(case, (-3.3e38, -3.3e38))
    k = k.at[:, tables[0, 3], 5].multiply(0.5)  # one token of sequence 0 at half the others' distance
    for sinks in (None, np.array([-1.0, -3.4e38, -np.inf, -2e38], np.float32)):
        output, lse = paged_decode_attention(
            query, k, v, lengths, tables, sinks=sinks, return_lse=True, block_sizes=SMALL, interpret=interpret
        )
        expected = attention_oracle(query, k, v, lengths, tables, sinks=sinks)
        np.testing.assert_allclose(output, expected[0], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(lse, expected[1], rtol=1e-5)


@SLOW_KERNEL
def test_a_soft_cap_bounds_them(interpret):
    case = OneChipCase("cap", lengths=(1, 9), soft_cap=30.0, sm_scale=1.0)
    query, k, v, lengths, tables = arrays_of_scores(case, (-1e39, 1e39))
    output, lse = paged_decode_attention(
        query, k, v, lengths, tables, soft_cap=30.0, return_lse=True, block_sizes=SMALL, interpret=interpret
    )
    expected = attention_oracle(query, k, v, lengths, tables, soft_cap=30.0)
    np.testing.assert_allclose(output, expected[0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5)


@pytest.mark.parametrize("sinks", [None, (-1.0, 1e38)])
@pytest.mark.parametrize("implementation", [None, pytest.param(RACES, marks=pytest.mark.slow)], ids=["xla", "kernel"])
def test_context_shards_merge_them(implementation, sinks):
    """Two shards hold tokens, a third and a fourth none."""
    case = PodCase((1, 16, 3, 0), context=4)
    size = np.sqrt(3.0e38 / 128)
    for name, value in (("query", size), ("key", -size)):
        case.arrays[name] = np.where(np.isnan(case.arrays[name]), np.nan, value).astype(np.float32)
    query, lengths, tables = case.arguments
    sinks = None if sinks is None else np.array(sinks, np.float32)
    output, lse = pd.sharded_paged_attention(
        query, case.cache(case.mesh()), lengths, tables, sinks=sinks, return_lse=True, implementation=implementation
    )
    expected = case.oracle(sinks=sinks)
    np.testing.assert_allclose(output, expected[0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5)


SEED = {
    "xla": dict(),
    "inline": dict(interpret=simulated()),
    "blocks_in_grid": dict(interpret=simulated(), inline_seq_dim=False, pages_per_compute_block=1),
    "reference": dict(),
}


@pytest.mark.parametrize(
    ("form", "case", "mask_value"),
    [
        pytest.param(
            form,
            case,
            mask_value,
            id=f"{form}-{case.name}-{mask_value}",
            marks=pytest.mark.slow if "interpret" in SEED[form] and (case.name, mask_value) != ("f32", -1.0) else (),
        )
        for form in SEED
        for case in ONE_TOKEN[:2]
        for mask_value in (None, -1.0)
    ],
)
def test_the_seeds_op_too_whatever_its_mask_value(form, case, mask_value):
    given = arrays_of_scores(case, SCORES)
    options = {} if mask_value is None else dict(mask_value=mask_value)
    if form == "reference":
        output = ref_paged_attention(*given, **options)
    else:
        output = page_attention(*given, **SEED[form], **options)
    np.testing.assert_allclose(output, attention_oracle(*given)[0], atol=1e-5, rtol=1e-5)


@SLOW_KERNEL
def test_nan_in_a_live_key_is_not_hidden(interpret):
    case = OneChipCase("nan", lengths=(9, 9), sm_scale=1.0)
    query, k, v, lengths, tables = arrays_of_scores(case, (1.0, 1.0))
    k = k.at[:, tables[0, 0], 2].set(jnp.nan)
    output = paged_decode_attention(query, k, v, lengths, tables, block_sizes=SMALL, interpret=interpret)
    assert np.isnan(output[0]).all() and np.isfinite(output[1]).all()


@pytest.mark.parametrize("name", ["sm_scale", "soft_cap"])
def test_options_beyond_f32_are_refused(name):
    given, _ = poisoned_arrays(OneChipCase("bad", lengths=(8, 3)))
    with pytest.raises(ValueError, match=rf"{name}=1e\+39"):
        jax.eval_shape(lambda *x: paged_decode_attention(*x, **{name: 1e39}), *given)
