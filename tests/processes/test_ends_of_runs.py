"""How launchers end: Ctrl-C, what cannot be written after a run, and sizes that would keep it from ever beginning."""

from __future__ import annotations

import json
import sys

import pytest
from commands import run_command
from decode_pod import FAULTY_DECODE, DecodePod
from one_process import run_in_one_process

from paged_dist.launch.local_pod import pod_environment

SMALL = ["--num_requests=4", "--max_context=50", "--layers=1", "--num_kv_heads=2", "--num_q_heads=2", "--batch=4"]


def run_with_fault(tmp_path, fault, *flags):
    """(exit code, stdout, its own lines on stderr, record) of a decode run with a fault, see faulty_decode.py."""
    path = tmp_path / "out.jsonl"
    command = [*FAULTY_DECODE, *SMALL, "--max_generated=20", "--cpu_devices=2", f"--output={path}", *flags]
    code, out, err = run_command(command, FAULT=fault)
    assert "Traceback" not in err, err
    lines = [line.removeprefix("paged-dist-decode: ") for line in err.splitlines() if line.startswith("paged-dist-")]
    return code, out, lines, json.loads(path.read_text()) if path.exists() else None


def test_ctrl_c_ends_decoding_before_the_next_step_with_the_partial_record(tmp_path):
    code, out, lines, record = run_with_fault(tmp_path, "SIGINT:0:5")
    assert code == 130 and record["partial"] and record["steps"] == 6 and record["oracle_passed"]
    assert "PARTIAL" in out and "asked to stop after 6 steps" in out
    assert lines[-1] == "interrupted: stops before the next step; Ctrl-C once more ends it at once"


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_ctrl_c_on_one_of_several_stops_all_before_the_same_step(tmp_path, process):
    with DecodePod(tmp_path, 2, f"SIGINT:{process}:5") as pod:
        codes, _ = pod.ends(0, 1)
        assert codes == [130, 75][:: 1 if process == 0 else -1], [pod.log(0), pod.log(1)]
        (record,) = pod.records()
    assert record["partial"] and record["steps"] < 20 and "Traceback" not in pod.log(0) + pod.log(1)


@pytest.mark.slow
def test_ctrl_c_while_it_compiles_is_one_line(tmp_path):
    code, out, lines, record = run_with_fault(tmp_path, "compile:0:0")
    assert (code, out, record) == (130, "", None) and lines[-1] == "interrupted"


def test_a_profile_that_cannot_be_written_costs_a_line_and_not_the_record(tmp_path):
    code, out, lines, record = run_with_fault(tmp_path, "profile:0:1000", f"--profile_dir={tmp_path}/profile")
    assert code == 1 and not record["partial"] and record["steps"] >= 20
    assert record["profile_error"] == "OSError: [Errno 28] No space left on device"
    assert "tokens/s" in out
    said = f"error: --profile_dir='{tmp_path}/profile': no profile could be written: {record['profile_error']}"
    assert [line for line in lines if "profile" in line] == [said]


def test_ctrl_c_is_one_line_and_130_of_every_launcher():
    names = ["decode", "scaling", "plan", "accuracy", "kernel_report", "xla_report", "compare", "local_pod"]
    for name, code, _, err in run_in_one_process([(name, "Ctrl-C") for name in names]):
        assert (code, err) == (130, f"paged-dist-{name.replace('_', '-')}: interrupted\n")


HUGE = [
    ("decode", ["--cpu_devices=100000"], "--cpu_devices=100000: must be at most 1024"),
    ("decode", ["--num_q_heads=4000000000"], "--num_q_heads=4000000000: must be at most 65536"),
    ("decode", ["--layers=1000000000"], "--layers=1000000000: must be at most 65536"),
    ("decode", ["--sliding_window=100000000000"], "--sliding_window=100000000000: must be at most 2147483647"),
    ("scaling", ["--devices=100000"], "--devices=100000: must be at most 1024"),
    ("scaling", ["--processes=1,100000"], "--processes=100000: must be at most 256"),
    ("scaling", ["--runs=1000000000"], "--runs=1000000000: must be at most 1000"),
    ("local_pod", ["--processes=100000", "decode"], "--processes: must be at least 1 and at most 256"),
    ("local_pod", ["--devices=100000", "decode"], "--devices: must be at least 1 and at most 1024"),
    ("accuracy", ["--context_lengths=100000000000"], "--context_lengths='100000000000': takes 409600.0 GB"),
    ("xla_report", ["--table_tokens=128000000000"], "--table_tokens=128000000000: takes"),
    ("kernel_report", ["--batch=1000000000"], "--batch=1000000000: must be at most 65536"),
    ("kernel_report", ["--context_tokens=9999999999"], "--context_tokens=9999999999: must be at most 2147483647"),
]


def test_sizes_of_which_no_run_would_come_are_refused_at_once():
    ends = run_in_one_process([of_launcher[:2] for of_launcher in HUGE])
    assert len(ends) == len(HUGE)
    for (name, _, says), (_, code, _, err) in zip(HUGE, ends, strict=True):
        assert code == 2 and err.startswith(f"paged-dist-{name.replace('_', '-')}: error: "), err
        assert says in err and err.count("\n") == 1, err


# Which number of simulated devices counts


@pytest.mark.parametrize(
    ("flags", "environment", "devices"),
    [
        (["--cpu_devices=6"], {"JAX_NUM_CPU_DEVICES": "4"}, 6),
        ([], {"JAX_NUM_CPU_DEVICES": "4"}, 4),
        pytest.param(
            ["--cpu_devices=6"],
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "tpu"},
            6,
            marks=pytest.mark.slow,
        ),
        pytest.param([], {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4, marks=pytest.mark.slow),
    ],
)
def test_the_flag_counts_and_without_it_the_environment(flags, environment, devices):
    command = [sys.executable, "-P", "-m", "paged_dist.launch.decode", "--dry_run", "--num_requests=1", *flags]
    code, out, err = run_command(command, **environment)
    assert code == 0 and f"= {devices} devices (cpu)" in out, out + err


def test_a_local_pod_s_devices_are_those_of_its_flag():
    made = pod_environment(0, 2, 3, 1, {"JAX_NUM_CPU_DEVICES": "9", "XLA_FLAGS": "--a=1"})
    assert "JAX_NUM_CPU_DEVICES" not in made and made["XLA_FLAGS"].endswith("device_count=3")
