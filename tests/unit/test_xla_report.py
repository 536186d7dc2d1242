"""The launcher that times the XLA form: it runs, what it says is what it measured, and it refuses what it cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from page_attention_cases import Case, make

from paged_dist.kernels.attention.oracle import attention_oracle
from paged_dist.launch import xla_report

LIMIT = 240  # seconds until a run under test is killed
SMALL = [
    "--batch=3",
    "--num_q_heads=4",
    "--num_kv_heads=2",
    "--head_dim=64",
    "--page_size=64",
    "--table_tokens=256",
    "--repeats=3",
]


def run(*arguments):
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS", "PJRT_NPROC")}
    command = [sys.executable, "-m", "paged_dist.launch.xla_report", *arguments]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=LIMIT)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("dtype, plain_forms", [("bf16", 4), ("f32", 2), ("fp8", 4)])
def test_it_measures_every_form_and_they_agree(tmp_path, dtype, plain_forms):
    path = tmp_path / "report.jsonl"
    code, out, err = run(*SMALL, f"--kv_dtype={dtype}", "--live=1,0.25,0", f"--output={path}")
    assert code == 0, out + err
    assert max(map(len, out.splitlines())) <= 80
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert record["benchmark"] == "xla_report" and record["settings"]["repeats"] == 3
    assert [r["live_tokens"] for r in record["results"]] == [256, 64, 0]
    for r in record["results"]:
        assert len(r["ms"]) == 1 + plain_forms and r["agrees"]
        assert all(0 < low <= mid <= high for low, mid, high in (*r["ms"].values(), r["ratio"]))
        assert r["fastest_plain"] == min((n for n in r["ms"] if n != "paged_dist"), key=lambda n: r["ms"][n][1])
        assert f"{r['ms']['paged_dist'][1]:.2f}" in out and f"{r['ratio'][1]:.2f}" in out


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--layers=3", "--layers=3: is no flag of this launcher"),
        ("--live=0.5,2", "--live='2': must be shares between 0 and 1"),
        ("--live=", "--live"),
        ("--table_tokens=100", "--table_tokens=100: must be a multiple of --page_size=64"),
        ("--head_dim=0", "--head_dim=0: must be at least 1"),
        ("--num_kv_heads=3", "--num_q_heads=4: must be a multiple of --num_kv_heads=3"),
        ("--kv_dtype=int4", "--kv_dtype='int4': is no cache dtype"),
        ("--repeats=0", "--repeats=0: must be at least 1"),
    ],
)
def test_what_it_cannot_do_it_refuses_in_a_line(flag, says):
    code, out, err = run(*SMALL, flag)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert says in err


def test_help_names_its_flags_with_the_defaults_of_this_benchmark():
    code, out, _ = run("--help")
    assert code == 0 and "--table_tokens:" in out and "--sliding_window" not in out
    assert "(default: 32)" in out.partition("--batch:")[2].partition("--page_size")[0]


@pytest.mark.parametrize("pages_first", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_plain_form_is_right(pages_first, dtype):
    """It is no straw man if it computes the same: against the oracle, all pages being there."""
    case = Case("plain", P=8, S=4, lengths=(1, 8, 32, 31), dtype=dtype, query_dtype=dtype, sm_scale=128**-0.5)
    (query, keys, values, lengths, tables), _ = make(case)
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
