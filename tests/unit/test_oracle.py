"""The float64 oracle itself: against the softmax written out, and against what the options mean."""

import numpy as np
import pytest

from paged_dist.kernels.attention.oracle import attention_oracle

B, HQ, HKV, D, P, S, N = 3, 4, 2, 8, 4, 3, 16
LENGTHS = np.array([11, 0, 5])


@pytest.fixture
def random_arrays():
    rng = np.random.default_rng(1)
    q = rng.normal(size=(B, HQ, D))
    k, v = (rng.normal(size=(HKV, N, P, D)) for _ in "kv")
    return q, k, v, LENGTHS, rng.permutation(N)[: B * S].reshape(B, S)


def written_out(q, k, v, lengths, tables, b, h, first=0):
    """sum_t exp(q.k_t) v_t / sum_t exp(q.k_t) and its log denominator, a token at a time."""
    total, value = 0.0, np.zeros(D)
    for t in range(first, lengths[b]):
        page, row = tables[b, t // P], t % P
        weight = np.exp(sum(q[b, h, d] * k[h // (HQ // HKV), page, row, d] for d in range(D)))
        total, value = total + weight, value + weight * v[h // (HQ // HKV), page, row]
    return value / total, np.log(total)


@pytest.mark.parametrize(
    "options, first",
    [
        ({}, (0, 0, 0)),
        ({"starts": [2, 0, 4]}, (2, 0, 4)),
        ({"sliding_window": 3}, (8, 0, 2)),
        ({"sliding_window": 9, "starts": [1, 0, 3]}, (2, 0, 3)),
    ],
)
def test_equals_the_softmax_written_out(random_arrays, options, first):
    output, lse = attention_oracle(*random_arrays, **options)
    for b in (0, 2):
        for h in range(HQ):
            value, log_total = written_out(*random_arrays, b, h, first[b])
            np.testing.assert_allclose(output[b, h], value, rtol=1e-12)
            np.testing.assert_allclose(lse[b, h], log_total, rtol=1e-12)


def test_scale_and_cap_act_on_logits_in_that_order(random_arrays):
    q, k, v, lengths, tables = random_arrays
    k = k.copy()
    k[..., 1:], q[..., 1:] = 0.0, 0.0  # one element a head: the logit is a plain product
    output, lse = attention_oracle(q, k, v, lengths, tables, sm_scale=0.5, soft_cap=0.3)
    page, rows = tables[2, :2], np.arange(5)
    logits = 0.3 * np.tanh(0.5 * q[2, 0, 0] * k[0, page[rows // P], rows % P, 0] / 0.3)
    np.testing.assert_allclose(lse[2, 0], np.log(np.exp(logits).sum()), rtol=1e-12)
    weights = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(output[2, 0], weights @ v[0, page[rows // P], rows % P], rtol=1e-12)


def test_lse_is_a_natural_log(random_arrays):
    q, *rest = random_arrays
    _, lse = attention_oracle(np.zeros_like(q), *rest)
    np.testing.assert_allclose(lse[0], np.log(11), rtol=1e-12)


def test_a_sink_joins_the_denominator_only(random_arrays):
    sinks = np.array([0.5, -2.0, 3.0, 0.0])
    plain, lse = attention_oracle(*random_arrays)
    output, with_sink = attention_oracle(*random_arrays, sinks=sinks)
    np.testing.assert_allclose(with_sink[[0, 2]], np.logaddexp(lse[[0, 2]], sinks), rtol=1e-12)
    np.testing.assert_allclose(output[[0, 2]], plain[[0, 2]] * np.exp(lse - with_sink)[[0, 2], :, None], rtol=1e-12)
    np.testing.assert_array_equal(with_sink[1], sinks)
    assert not output[1].any()


def test_an_empty_sequence_is_zero_and_minus_infinity(random_arrays):
    output, lse = attention_oracle(*random_arrays)
    assert not output[1].any() and np.isneginf(lse[1]).all()


def test_a_start_at_the_length_or_beyond_leaves_nothing_and_one_below_zero_all(random_arrays):
    output, lse = attention_oracle(*random_arrays, starts=[11, 4, -3])
    plain, plain_lse = attention_oracle(*random_arrays)
    assert not output[:2].any() and np.isneginf(lse[:2]).all()
    np.testing.assert_array_equal(output[2], plain[2])
    np.testing.assert_array_equal(lse[2], plain_lse[2])
    sinks = np.array([0.5, -2.0, 3.0, -np.inf])
    output, lse = attention_oracle(*random_arrays, starts=[12, 0, 0], sinks=sinks)
    assert not output[0].any()
    np.testing.assert_array_equal(lse[0], sinks)


def test_large_logits_do_not_overflow(random_arrays):
    q, *rest = random_arrays
    output, lse = attention_oracle(1e4 * q, *rest)
    assert np.isfinite(output).all() and np.isfinite(lse[[0, 2]]).all()


def test_reads_live_tokens_only(random_arrays):
    _, k, v, lengths, tables = random_arrays
    expected = attention_oracle(*random_arrays, sliding_window=6)
    dead = np.ones((N, P), bool)
    for b, start in ((0, 5), (2, 0)):
        tokens = np.arange(start, lengths[b])
        dead[tables[b, tokens // P], tokens % P] = False
    k[:, dead], v[:, dead] = np.nan, np.nan
    tables[1], tables[2, 2:] = 10**6, -7
    for poisoned, clean in zip(attention_oracle(*random_arrays, sliding_window=6), expected, strict=True):
        np.testing.assert_array_equal(poisoned, clean)
