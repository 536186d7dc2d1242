"""`kernel_report`: that it prints what was counted and compiled, and what it refuses."""

import json

import flagsaver
import jax
import pytest
from aot import needs_libtpu, one_chip_mesh
from commands import run_launcher
from one_chip_cases import OneChipCase, launch_plan_of

from paged_dist.kernels.decode import traffic
from paged_dist.kernels.target import Target
from paged_dist.launch import kernel_report
from paged_dist.launch.planning import absent_chips, jax_kernel

# What is read from a compiled program


# The launcher


@needs_libtpu
def test_the_report_prints_and_writes_what_was_counted_and_compiled(tmp_path):
    out, trace = tmp_path / "out.jsonl", tmp_path / "trace.csv"
    trace.write_text("ContextTokens,GeneratedTokens\n64,1\n100,60\n1,1\n9,9\n")
    small = ["--num_q_heads=8", "--num_kv_heads=1", "--page_size=64", "--block_sizes=2,1,2", "--jax_block_tokens=128"]
    code, text, err = run_launcher(
        "kernel_report",
        "--chips=v5e,v5p",
        "--batch=3",
        f"--lengths_trace={trace}",
        "--sliding_window=70",
        f"--output={out}",
        *small,
    )
    assert code == 0, err
    # Lengths 64, 100 + 30, 1; a window of 70 begins at 0, 60, 0. Pages of 64: [0], [0 1 2], [0]. Rows in sixteens:
    # 64; 16 of the first page (48 to 64), 64, 16 of the last (128 to 144); 16.
    token = 2 * 128 * 2
    ours = dict(copies=2 * 5, bytes_read=(64 + 16 + 64 + 16 + 16) * token, live_bytes=(64 + 70 + 1) * token)
    # Blocks of two pages, whole, from token 0 on: 1, 2 and 1 of them.
    theirs = dict(copies=2 * 4 * 2, bytes_read=4 * 128 * token, live_bytes=ours["live_bytes"])
    rows = [line.split() for line in text.splitlines() if line.startswith(("v5e", "v5p"))]
    assert [row[:2] for row in rows] == [[chip, kernel] for chip in ("v5e", "v5p") for kernel in ("paged_dist", "jax")]
    record = json.loads(out.read_text())
    assert record["settings"]["lengths"] == [64, 130, 1] and record["versions"]["jax"] == jax.__version__.split("+")[0]
    for row, kernel in zip(rows, record["kernels"], strict=True):
        expected = ours if kernel["kernel"] == "paged_dist" else theirs
        assert {name: kernel[name] for name in expected} == expected
        read, live = expected["bytes_read"], expected["live_bytes"]
        assert row[8:11] == [str(expected["copies"]), f"{read / 1e6:.2f}", f"{read / live:.3f}"]
        assert row[-1] == "0" and kernel["pool_copies"] == [] and row[-2] == str(len(kernel["xla_ops"]))
        assert kernel["launches"] == 1 and kernel["lower_s"] > 0 and kernel["compile_s"] > 0
        assert 0 < kernel["vmem_used"] < 16 << 20
        if kernel["kernel"] == "paged_dist":
            assert kernel["block_sizes"] == dict(pages_per_cell=2, cells_per_step=1, steps_ahead=2)
            assert kernel["vmem_used"] <= kernel["vmem_planned"] and row[5] == f"{kernel['vmem_used'] / 1024:.0f}"
            # Buffers of 128 rows: three of K, three of V; and the rest of the plan's.
            assert kernel["vmem_planned"] > 2 * 3 * 128 * 128 * 2
    assert "no sliding window" in text


@needs_libtpu
@pytest.mark.parametrize("kv_dtype", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_8_bit_pages_are_reported_with_their_scales(tmp_path, kv_dtype):
    out = tmp_path / "out.jsonl"
    small = ["--num_q_heads=4", "--num_kv_heads=2", "--page_size=64", "--context_tokens=100"]
    code, text, err = run_launcher(
        "kernel_report", "--chips=v6e", "--batch=3", f"--kv_dtype={kv_dtype}", f"--output={out}", *small
    )
    assert code == 0, err
    record = json.loads(out.read_text())
    ours, *theirs = record["kernels"]
    assert record["settings"]["dtype"] == {"int8": "int8", "fp8": "float8_e4m3fn"}[kv_dtype]
    plan = kernel_report.plan_of(kernel_report.KernelReportSettings(**record["settings"]), Target())
    assert (plan.query_dtype.name, plan.cache_dtype.name) == ("bfloat16", record["settings"]["dtype"])
    assert (ours["copies"], ours["bytes_read"]) == traffic.page_traffic(plan, [100] * 3)
    assert ours["live_bytes"] == traffic.live_bytes(plan, [100] * 3)
    assert ours["pool_copies"] == [] and ours["launches"] == 1 and f"{ours['bytes_read'] / 1e6:.2f}" in text
    assert "and scales" in text
    if kv_dtype == "fp8":
        assert theirs == [] and "JAX's own has no fp8 pages with scales" in text
    else:  # a block of two pages for each sequence and head, scales as wide as the pages and four times their bytes
        assert theirs[0]["copies"] == 2 * 2 * (3 * 2 * 2)
        assert theirs[0]["bytes_read"] == 2 * (3 * 2 * 2) * 64 * 128 * (1 + 4)


@needs_libtpu
def test_a_kernel_that_does_not_compile_is_said_to_and_ours_fails_the_run(monkeypatch, capsys):
    def refuse(*_):
        raise ValueError("too large\nfor this chip")

    monkeypatch.setattr(absent_chips, "timed_compile", refuse)
    with flagsaver.launcher_flags(kernel_report, chips=["v6e"], batch=2):
        assert kernel_report.main(()) == 1
    assert capsys.readouterr().out.count("does not compile: ValueError: too large\n") == 2


@needs_libtpu
def test_padded_heads_are_counted_as_stored_with_what_pads_the_query():
    s = kernel_report.KernelReportSettings(("v6e",), (500, 20), 8, 2, 96, 64, None, "bfloat16", None, False, None)
    mesh = absent_chips.one_chip_mesh("v6e")
    plan = kernel_report.plan_of(s, Target.of(mesh.devices.flat[0]))
    (ours,) = kernel_report.report_chip(s, "v6e", mesh, plan)
    token = 2 * 2 * 128 * 2
    assert ours["live_bytes"] == 520 * token and ours["bytes_read"] == (448 + 64 + 32) * token
    assert ours["pool_copies"] == [] and any("pad" in op for op in ours["xla_ops"])
    assert "head_dim 96 (stored as 128), bfloat16" in kernel_report.kernel_report_table(s, [ours], {})


@needs_libtpu
def test_jax_s_own_uses_both_cores_where_there_are_two():
    plan = launch_plan_of(OneChipCase("", Hq=8, Hkv=2))
    modes = [jax_kernel.jax_call(plan, 2, one_chip_mesh(chip))[0].keywords["megacore_mode"] for chip in ("v5e", "v5p")]
    assert modes == [None, "kv_head"]
