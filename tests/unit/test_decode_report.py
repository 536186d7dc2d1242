"""The decode launcher's numbers: what a run is summarised as, and how a record is written."""

from __future__ import annotations

import json

import numpy as np
import pytest

from paged_dist.launch.common import record_output
from paged_dist.launch.common.chip_rates import chip_of
from paged_dist.launch.serving import results
from paged_dist.launch.serving.engine import Measured, relative_error


def test_an_output_of_nan_is_an_infinite_error():
    assert relative_error(np.array([[1.0, np.nan]]), np.ones((1, 2))) == np.inf
    assert relative_error(np.array([[1.0, 1.5]]), np.array([[1.0, 2.0]])) == 0.25


def test_the_summary_of_a_hand_computed_run():
    measured = Measured(live_tokens=[100, 200, 300, 400], live_rows=[2, 2, 1, 1], pages=[4, 5, 3, 2], prefill_tokens=90)
    gathered = {
        "step_seconds": np.array([[1.0, 2.0, 1.0, 1.0], [2.0, 1.0, 1.0, 4.0]]),  # the slowest: 2 2 1 4
        "seconds": np.array([[3.0, 0.5, 1.0, 0.1, 0.2], [2.0, 0.6, 0.5, 0.2, 0.3]]),
        "worst_error": np.array([1e-3, 3e-3]),
        "checked": np.array([2, 1]),
        "tally": np.array([[0xFFFFFFFF, 1], [2, 0xFFFFFFFF]], np.uint32),
        "digest": np.array([7, 7], np.uint32),
    }
    r = results.summarise_run(
        gathered, measured, bytes_per_token=1000, num_pages=10, devices={"TPU v5 lite": 4}, dtype="bfloat16"
    )
    assert (r["tokens"], r["steps"], r["chips"]) == (6, 4, 4)
    assert r["steps_s"] == 9.0 and r["decode_s"] == 10.0 and r["tokens_per_s"] == pytest.approx(0.6)
    assert r["tokens_per_s_per_chip"] == pytest.approx(0.15)
    assert r["step_ms_p50"] == pytest.approx(2000) and r["step_ms_p99"] == pytest.approx(3940)
    assert r["live_kv_bytes_per_step"] == 250_000
    assert r["live_kv_bytes_per_s"] == pytest.approx(1_000_000 / 9)
    assert r["peak_share"] == pytest.approx(1_000_000 / 9 / 4 / 819e9)
    assert (r["pool_use_peak"], r["pool_use_mean"]) == (0.5, 0.35)
    assert (r["compile_s"], r["prefill_s"], r["oracle_s"], r["warmup_s"]) == (3.0, 0.6, 0.2, 0.3)
    assert r["checksum"] == "0000000000000001", "each half sums mod 2**32"
    assert r["oracle_checked"] == 3 and r["oracle_worst_error"] == 3e-3 and r["oracle_passed"]


def test_a_wrong_output_on_any_process_fails_the_run_and_nan_is_not_json(tmp_path):
    gathered = {
        "step_seconds": np.ones((2, 1)),
        "seconds": np.ones((2, 5)),
        "worst_error": np.array([0, np.inf]),
        "checked": np.array([1, 1]),
        "tally": np.zeros((2, 2), np.uint32),
    }
    measured = Measured(live_tokens=[1], live_rows=[1], pages=[1])
    r = results.summarise_run(gathered, measured, bytes_per_token=1, num_pages=1, devices={"cpu": 8}, dtype="float32")
    assert not r["oracle_passed"] and r["peak_share"] is None
    record_output.append_json_line(str(tmp_path / "x"), r)
    assert json.loads((tmp_path / "x").read_text())["oracle_worst_error"] is None


@pytest.mark.parametrize(
    ("kind", "peak", "devices_a_chip"),
    [
        ("TPU v4", 1228e9, 1),
        ("TPU v5 lite", 819e9, 1),
        ("TPU v5", 2765e9, 1),
        ("TPU v5p", 2765e9, 1),
        ("TPU v6 lite", 1640e9, 1),
        ("TPU7x", 7380e9, 2),
        ("TPU8i", 8601e9, 2),
        ("TPU8t", 6528e9, 1),
        ("TPU v9 mega", None, 1),
        ("cpu", None, 1),
        ("NVIDIA H200", None, 1),
    ],
)
def test_peak_of_a_chip_by_its_device_kind(kind, peak, devices_a_chip):
    chip = chip_of(kind)
    found = (None, 1) if chip is None else (chip.hbm_bytes_per_s, chip.devices)
    assert found == (peak, devices_a_chip)


def test_a_json_line_ends_what_an_earlier_writer_left_unfinished(tmp_path):
    path = tmp_path / "deep" / "er" / "x.jsonl"
    record_output.append_json_line(str(path), {"a": 1})
    with open(path, "a") as file:
        file.write('{"half')
    record_output.append_json_line(str(path), {"a": 2})
    assert path.read_text() == '{"a": 1}\n{"half\n{"a": 2}\n'
