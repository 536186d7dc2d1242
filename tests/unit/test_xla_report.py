"""The launcher that times the XLA form: it runs, what it says is what it measured, and it refuses what it cannot do."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from one_chip_cases import OneChipCase, poisoned_arrays

from paged_dist.kernels.attention.oracle import attention_oracle
from paged_dist.launch import xla_report


@pytest.mark.parametrize("pages_first", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_plain_form_is_right(pages_first, dtype):
    """It is no straw man if it computes the same: against the oracle, all pages being there."""
    case = OneChipCase("plain", P=8, S=4, lengths=(1, 8, 32, 31), dtype=dtype, query_dtype=dtype, sm_scale=128**-0.5)
    (query, keys, values, lengths, tables), _ = poisoned_arrays(case)
    keys, values = (jnp.nan_to_num(x) for x in (keys, values))
    tables = np.clip(tables, 0, keys.shape[1] - 1)
    expected, _ = attention_oracle(query, keys, values, lengths, tables, sm_scale=case.sm_scale)
    pools = [x.swapaxes(0, 1) if pages_first else x for x in (keys, values)]
    for f32_products in (False, True):
        output = xla_report.gather_everything(
            query, *pools, lengths, tables, pages_first=pages_first, f32_products=f32_products
        )
        np.testing.assert_allclose(np.asarray(output, np.float64), expected, atol=case.tolerance, rtol=case.tolerance)


def test_heads_that_are_stored_padded_agree_with_the_plain_forms():
    shape = dict(batch=3, num_q_heads=4, num_kv_heads=2, head_dim=96, page_size=64, table_tokens=128, dtype="float32")
    seconds, worst = xla_report.time_forms(xla_report.make_forms(shape), jnp.array([128, 5, 70], jnp.int32), 1)
    assert len(seconds) == 3 and worst < 1e-5


def test_a_form_that_disagrees_is_told():
    lengths = jnp.array([4, 0], jnp.int32)
    right, wrong = jnp.array([[1.0], [0.0]]), jnp.array([[1.5], [9.0]])  # the idle row is not compared
    seconds, worst = xla_report.time_forms({"ours": lambda _: right, "plain": lambda _: wrong}, lengths, 2)
    assert worst == pytest.approx(0.5) and [len(s) for s in seconds.values()] == [2, 2]
    assert not xla_report.summarise_times(4, seconds, worst, bound=0.1)["agrees"]
    assert xla_report.time_forms({"ours": lambda _: right, "plain": lambda _: right}, lengths * 0, 1)[1] == 0


def test_the_ratio_is_of_the_same_repeats_and_to_the_fastest():
    seconds = {"ours": [1.0, 2.0, 1.0], "slow": [9.0, 9.0, 9.0], "fast": [4.0, 4.0, 2.0]}
    result = xla_report.summarise_times(4, seconds, 0.0, bound=0.1)
    assert result["fastest_plain"] == "fast" and result["ratio"] == [2.0, 2.0, 3.0]
    assert result["ms"]["slow"] == [9000.0] * 3
