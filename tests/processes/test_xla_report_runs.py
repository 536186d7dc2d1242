"""xla_report as a command: it measures, and refuses what it cannot do."""

from __future__ import annotations

import json

import pytest
from commands import run_launcher
from one_process import run_in_one_process

SMALL = [
    "--batch=3",
    "--num_q_heads=4",
    "--num_kv_heads=2",
    "--head_dim=64",
    "--page_size=64",
    "--table_tokens=256",
    "--repeats=3",
]


@pytest.mark.parametrize("dtype, plain_forms", [("bf16", 4), ("f32", 2), ("fp8", 4)])
def test_it_measures_every_form_and_they_agree(tmp_path, dtype, plain_forms):
    path = tmp_path / "report.jsonl"
    code, out, err = run_launcher("xla_report", *SMALL, f"--kv_dtype={dtype}", "--live=1,0.25,0", f"--output={path}")
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


BAD_FLAGS = [
    ("--layers=3", "--layers=3: is no flag of this launcher"),
    ("--live=0.5,2", "--live='2': must be shares between 0 and 1"),
    ("--live=", "--live"),
    ("--table_tokens=100", "--table_tokens=100: must be a multiple of --page_size=64"),
    ("--head_dim=0", "--head_dim=0: must be at least 1"),
    ("--num_kv_heads=3", "--num_q_heads=4: must be a multiple of --num_kv_heads=3"),
    ("--kv_dtype=int4", "--kv_dtype='int4': is no cache dtype"),
    ("--repeats=0", "--repeats=0: must be at least 1"),
]


@pytest.fixture(scope="module")
def xla_report_refusals():
    return run_in_one_process([("xla_report", [*SMALL, flag]) for flag, _ in BAD_FLAGS])


@pytest.mark.parametrize("index", range(len(BAD_FLAGS)), ids=[flag for flag, _ in BAD_FLAGS])
def test_what_it_cannot_do_it_refuses_in_a_line(xla_report_refusals, index):
    _, code, out, err = xla_report_refusals[index]
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert BAD_FLAGS[index][1] in err


def test_help_names_its_flags_with_the_defaults_of_this_benchmark():
    code, out, _ = run_launcher("xla_report", "--help")
    assert code == 0 and "--table_tokens:" in out and "--sliding_window" not in out
    assert "(default: 32)" in out.partition("--batch:")[2].partition("--page_size")[0]
