"""What changes the work of a launcher stands in what it prints: every flag, and each that will be added."""

from __future__ import annotations

import dataclasses

import flagsaver
import pytest

from paged_dist.launch import accuracy, decode, kernel_report, xla_report
from paged_dist.launch.common import report_lines
from paged_dist.launch.common.flag_registry import FLAGS
from paged_dist.launch.common.help_text import FLAG_GROUPS
from paged_dist.launch.serving import report, results, run_setup, workload_flags
from paged_dist.launch.sweeps import scaling_report

# Another value of each flag that changes what decode does.
OTHERS = dict(
    data=4,
    context=2,
    model=2,
    layers=3,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=64,
    kv_dtype="int8",
    soft_cap=30.0,
    sliding_window=512,
    seed=7,
    implementation="pallas",
    batch=8,
    page_size=64,
    num_pages=1024,
    pages_per_sequence=100,
    trace="other.csv",
    trace_format="burstgpt",
    num_requests=2,
    length_scale=0.5,
    max_context=99,
    max_generated=9,
    repeat_requests=2,
)
# Printed with the results: what was checked, and how many sequences HBM would hold.
WITH_RESULTS = {"oracle_samples", "hbm_gib"}
TRACE = "ContextTokens,GeneratedTokens,Request tokens,Response tokens\n900,90,800,80\n70,20,60,10\n50,7,40,6\n"


def described(**values):
    with flagsaver.flagsaver(**values):
        run = run_setup.prepare_run(run_setup.model_from_flags(), *workload_flags.requests_from_flags())
        lines = [report_lines.report_line(*line) for line in report.work_lines(results.work_record(run))]
        return "\n".join(lines), report.decode_dry_text(run)


def test_every_flag_of_decode_that_changes_the_work_is_printed(tmp_path):
    FLAGS(["decode"])
    known = {flag.name for flag in FLAGS.get_key_flags_for_module(decode.__name__)}
    known -= {"context_tokens", *FLAG_GROUPS["Output"], *FLAG_GROUPS["Several processes"]}
    assert known == OTHERS.keys() | WITH_RESULTS, "a new flag: does it change the work?"
    for name in ("trace.csv", "other.csv"):
        (tmp_path / name).write_text(TRACE)
    base = dict(trace=str(tmp_path / "trace.csv"), trace_format="azure")
    ordinary = described(**base)
    for text in ordinary:
        assert max(map(len, text.splitlines())) <= 80
    for name, value in OTHERS.items():
        value = str(tmp_path / value) if name == "trace" else value
        for text, before in zip(described(**base | {name: value}), ordinary, strict=True):
            assert text != before, name
    assert "\nattention  xla\n" in ordinary[0]
    assert (
        "\nattention  pallas, soft cap 30, window 512\n"
        in described(soft_cap=30.0, sliding_window=512, implementation="pallas")[0]
    )
    assert "seed 7" in described(seed=7)[0]
    changed = described(**base, length_scale=0.5, max_context=99, max_generated=9, repeat_requests=2, num_requests=2)
    assert (
        "4 requests of trace.csv (azure), lengths x 0.5, prompts of at most 99, answers of at most 9, 2 times over, "
        "seed 0, batch 32, tables of 1 pages"
    ) in " ".join(changed[0].split())


def test_the_printed_implementation_is_that_of_the_platform():
    described = dict(zip(("platform", "devices", "processes"), ("tpu", {"TPU v5": 4}, 2), strict=True))
    described |= dict(mesh={"data": 4}, requests=1, workload="x", pool_pages=4, cache_bytes=1, bytes_per_token=1)
    names = ("layers", "num_q_heads", "num_kv_heads", "head_dim", "input_dtype", "page_size", "dtype", "seed", "batch")
    settings = dict.fromkeys((*names, "pages_per_sequence", "soft_cap", "sliding_window", "implementation"))
    settings["head_dim"] = 128
    lines = dict(report.work_lines(described | {"settings": settings}))
    assert lines["attention"] == "pallas" and lines["devices"] == "4 x TPU v5, 2 processes"


def test_every_setting_of_kernel_report_is_printed():
    s = kernel_report.KernelReportSettings(("v5e",), (500, 20), 8, 2, 128, 128, None, "bfloat16", None, True, None)
    others = dict(
        lengths=(500, 30),
        num_q_heads=16,
        num_kv_heads=4,
        head_dim=64,
        page_size=64,
        sliding_window=9,
        dtype="int8",
        block_sizes=(4, 8, 2),
        jax_block_tokens=512,
        lengths_of="trace.csv (azure)",
    )
    rows = {"chips", "jax"}  # a row of the table each
    assert others.keys() | rows == {field.name for field in dataclasses.fields(s)}
    for name, value in others.items():
        changed = kernel_report.kernel_report_table(dataclasses.replace(s, **{name: value}), [], {})
        assert changed != kernel_report.kernel_report_table(s, [], {}), name


def test_every_setting_of_xla_report_and_accuracy_is_printed():
    settings = dict(batch=2, num_q_heads=8, num_kv_heads=2, head_dim=64, page_size=16)
    settings |= dict(table_tokens=64, repeats=3, dtype="float32")
    record = dict(settings=settings, results=[], cpus=2, versions={}, bound=1)
    for name, value in settings.items():
        other = record | dict(settings=settings | {name: "int8" if name == "dtype" else 2 * value})
        assert xla_report.xla_report_table(other) != xla_report.xla_report_table(record), name
    with flagsaver.flagsaver():
        FLAGS(["xla_report", "--batch=2", "--num_q_heads=8", "--num_kv_heads=2"])
        assert settings.keys() | {"live"} == xla_report.sizes_from_flags().keys()  # a block of the table each

    s = accuracy.AccuracySettings(2, 8, 2, 128, 64, 1, (128,))
    of = lambda n: [
        dict(length=n, dtype=dtype, case=case, error=0, own_error=0)
        for dtype in accuracy.DTYPES
        for case in accuracy.CASES
    ]
    table = lambda s: accuracy.accuracy_table(
        dict(settings=s._asdict(), results=of(s.lengths[0]), versions={}, failures=[])
    )
    for name in s._fields:
        other = s._replace(**{name: (256,) if name == "lengths" else 3 * getattr(s, name)})
        assert table(other) != table(s), name


@pytest.mark.parametrize("more", [", lengths x 0.5", ", prompts of at most 9", ", 2 without prompt or answer left out"])
def test_sweeps_over_other_lengths_are_other_series(more):
    row = dict(settings={}, workload="a trace", mesh={"context": 1, "model": 2})
    other = row | {"workload": f"a trace{more}"}
    assert scaling_report.work_digest(row) == scaling_report.work_digest(row | {"workload": "a trace, 4 times over"})
    assert scaling_report.work_digest(other) == scaling_report.work_digest(
        row | {"workload": f"a trace{more}, 4 times over"}
    )
    assert scaling_report.work_digest(other) != scaling_report.work_digest(row)
