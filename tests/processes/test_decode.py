"""The decode benchmark: one answer on every layout of processes, checked outputs, honest numbers, clear refusals."""

from __future__ import annotations

import json
import re
import sys

import jax
import pytest
from commands import run_command
from one_process import run_in_one_process

from paged_dist.launch.serving.engine import ERROR_BOUNDS

DECODE = [sys.executable, "-m", "paged_dist.launch.decode"]
POD = [sys.executable, "-m", "paged_dist.launch.local_pod", "--timeout_seconds=200"]
SMALL = [
    "--num_requests=20",
    "--max_context=300",
    "--max_generated=12",
    "--batch=8",
    "--num_q_heads=4",
    "--num_kv_heads=2",
    "--head_dim=64",
    "--page_size=64",
    "--oracle_samples=6",
]


# End to end


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """layout -> (record, stdout, stderr) of the same small job, the three runs appending to one file."""
    path = tmp_path_factory.mktemp("decode") / "made" / "results.jsonl"
    commands = {
        "2x4": [*POD, "--processes=2", "--devices=4", "--", "decode"],
        "1x8": [*POD, "--processes=1", "--devices=8", "--", "decode"],
        "bare": DECODE,
    }
    texts = []
    for command in commands.values():
        code, out, err = run_command([*command, *SMALL, f"--output={path}"])
        assert code == 0, out + err
        texts.append((out, err))
    lines = path.read_text().splitlines()
    assert len(lines) == len(commands), "process 0 alone writes, one line a run"
    return {name: (json.loads(line), *text) for name, line, text in zip(commands, lines, texts, strict=True)}


@pytest.mark.parametrize(("layout", "processes"), [("1x8", 1), ("bare", 1)])
def test_every_layout_of_processes_gives_the_checksum_of_2x4(records, layout, processes):
    want, got = records["2x4"][0], records[layout][0]
    assert want["checksum"] == got["checksum"] and int(want["checksum"], 16) != 0
    assert want["processes"] == 2 and got["processes"] == processes
    same = ("tokens", "steps", "prefill_tokens", "live_kv_bytes_per_step", "pool_use_peak", "oracle_checked", "mesh")
    assert {k: got[k] for k in same} == {k: want[k] for k in same}


@pytest.mark.slow
def test_four_processes_give_the_checksum_of_two(records, tmp_path):
    path = tmp_path / "results.jsonl"
    code, out, err = run_command([*POD, "--processes=4", "--devices=2", "--", "decode", *SMALL, f"--output={path}"])
    assert code == 0, out + err
    got = json.loads(path.read_text())
    assert got["checksum"] == records["2x4"][0]["checksum"] and got["processes"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
def test_8_bit_caches_have_one_checksum_too(records, tmp_path, kv_dtype):
    path, bytes_per_token = tmp_path / "results.jsonl", 2 * 2 * 2 * (64 + 4)  # layers, kv heads, K and V
    for command in ([*POD, "--processes=2", "--devices=4", "--", "decode"], DECODE):
        code, out, err = run_command([*command, *SMALL, f"--kv_dtype={kv_dtype}", f"--output={path}"])
        assert code == 0, out + err
        assert f"{kv_dtype}, {bytes_per_token} B a token" in out.replace("\n           ", " ")
    several, one = map(json.loads, path.read_text().splitlines())
    assert several["checksum"] == one["checksum"] != records["bare"][0]["checksum"]
    assert one["oracle_checked"] == 6 and one["oracle_passed"]
    full = records["bare"][0]
    assert (one["settings"]["dtype"], one["settings"]["input_dtype"]) == (kv_dtype, "bfloat16")
    assert one["live_kv_bytes_per_step"] == pytest.approx(full["live_kv_bytes_per_step"] * 68 / 128)
    assert one["capacity"] == full["capacity"], "whatever the cache in use"
    assert one["capacity"][kv_dtype]["bytes_per_token"] == one["bytes_per_token"] == bytes_per_token


@pytest.mark.parametrize("mesh", [(1, 4, 2), pytest.param((2, 4, 1), marks=pytest.mark.slow)], ids=["1x4x2", "2x4x1"])
def test_context_shards_in_several_processes_give_what_they_do_in_one(records, tmp_path, mesh):
    """The merge runs over gloo: each sequence's pages lie in both processes, or in two of four."""
    path, shape = tmp_path / "results.jsonl", dict(zip(("data", "context", "model"), mesh, strict=True))
    flags = [*SMALL, *(f"--{name}={size}" for name, size in shape.items()), f"--output={path}"]
    for command in ([*POD, f"--processes={2 * mesh[0]}", f"--devices={4 // mesh[0]}", "--", "decode"], DECODE):
        code, out, err = run_command([*command, *flags])
        assert code == 0, out + err
    several, one = map(json.loads, path.read_text().splitlines())
    assert several["mesh"] == one["mesh"] == shape and several["processes"] == 2 * mesh[0]
    for record in (several, one):
        assert record["oracle_checked"] == 6 and record["oracle_passed"]
    same = ("tokens", "steps", "prefill_tokens", "live_kv_bytes_per_step", "pool_use_peak", "pool_pages")
    assert {k: several[k] for k in same} == {k: one[k] for k in same}
    assert one["tokens"] == records["bare"][0]["tokens"]


def test_every_output_that_was_to_be_checked_was(records):
    for record, *_ in records.values():
        assert record["oracle_checked"] == 6 and record["oracle_passed"]
        assert 0 < record["oracle_worst_error"] < ERROR_BOUNDS["bfloat16"]


def test_the_report_is_one_table_of_80_columns_with_the_record_s_numbers(records):
    record, out, err = records["2x4"]
    said = out.splitlines()
    assert "Gloo" not in out  # XLA's transport between CPU processes would announce its connections in between
    lines = [line[4:].removeprefix(" ") for line in said if line.startswith("[p0]")]
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "Traceback" not in out + err
    for part in (
        record["checksum"],
        f"{record['tokens_per_s']:.1f}",
        "p99",
        "a chip",
        "compile",
        "prefill",
        f"jax {jax.__version__}",
        "data 4 x context 1 x model 2",
        "8 x cpu, 2 processes",
    ):
        assert part in text
    assert len(lines) == len(said), "only process 0 reports"


def test_another_seed_gives_another_checksum(records):
    code, out, err = run_command(
        [*DECODE, *SMALL, "--seed=1", "--oracle_samples=0", "--kv_dtype=f32", "--sliding_window=70", "--soft_cap=20"]
    )
    assert code == 0, err
    assert records["bare"][0]["checksum"] not in out and "no output was checked" in out


# The engine in this process


# The numbers


# Refusals


def refused(tmp_path, *arguments):
    out_file = tmp_path / "out.jsonl"
    code, out, err = run_command([*DECODE, f"--output={out_file}", *arguments])
    assert code == 2, out + err
    assert out == "" and not out_file.exists()
    (line,) = err.splitlines()
    assert line.startswith("paged-dist-decode: error: ")
    return line


BAD_FLAGS = [
    (["--data=3"], "data=3"),
    (["--model=3"], "model=3"),
    (["--context=3"], "context x model=6: must divide the number of devices, 8"),
    (["--num_q_heads=6", "--num_kv_heads=4"], "--num_q_heads=6: must be a multiple of --num_kv_heads=4"),
    (["--kv_dtype=f64"], "--kv_dtype='f64': is no cache dtype; use bf16, f32, int8 or fp8"),
    (["--kv_dtype=int8", "--page_size=48"], "page_size=48: with int8 and fp8 must divide 128"),
    (["--context_tokens=9"], "--context_tokens=9: is no flag of this launcher; lengths are the requests'"),
    (["--hbm_gib=0"], "--hbm_gib=0.0: must be above 0"),
    (["--num_pages=2000000"], "--num_pages=2000000: a cache of"),
    (["--num_pages=16"], "num_pages=16: 8 pages a shard, but request"),
    (["--pages_per_sequence=99999999"], "--pages_per_sequence=99999999: must be at most"),
    (["--pages_per_sequence=2"], "--pages_per_sequence=2: holds 256 tokens"),
    (["--batch=7"], "--batch=7: must be a multiple of the mesh's data size 2"),
    (["--batch=100000000"], "--batch=100000000: must be at most"),
    (["--page_size=20"], "page_size=20"),
    (["--head_dim=0"], "--head_dim=0: must be at least 1"),
    (["--layers=0"], "--layers=0: must be at least 1"),
    (["--layers=none"], "--layers=none"),
    (["extra"], "'extra'"),
    (["--no_such_flag"], "no_such_flag"),
    (["--trace=/proc/none.csv"], "cannot be read"),
    (["--output=/proc/x.jsonl"], "--output='/proc/x.jsonl'"),
]


@pytest.fixture(scope="module")
def decode_refusals(tmp_path_factory):
    """How a run with each of BAD_FLAGS ends, and the folder that none of them wrote to."""
    folder = tmp_path_factory.mktemp("refusals")
    output = f"--output={folder}/out.jsonl"
    return run_in_one_process([("decode", [output, *arguments]) for arguments, _ in BAD_FLAGS]), folder


@pytest.mark.parametrize("index", range(len(BAD_FLAGS)), ids=[" ".join(arguments) for arguments, _ in BAD_FLAGS])
def test_a_bad_flag_is_one_line_and_exit_code_2_before_anything_is_written(decode_refusals, index):
    ends, folder = decode_refusals
    _, code, out, err = ends[index]
    assert (code, out, list(folder.iterdir())) == (2, "", []), err
    (line,) = err.splitlines()
    assert line.startswith("paged-dist-decode: error: ") and BAD_FLAGS[index][1] in line


def test_a_file_that_is_no_trace_is_refused_with_its_line(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nt,5,6\nt,7,\n")
    assert "line 3 has GeneratedTokens ''" in refused(tmp_path, f"--trace={trace}")
    assert "the trace has 2" in refused(tmp_path, f"--trace={write_trace(tmp_path)}", "--num_requests=3")


def write_trace(tmp_path):
    path = tmp_path / "good.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nt,70,2\nt,7,3\n")
    return path


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(tmp_path, f"--output={tmp_path}/file/x.jsonl")
    assert "is a folder" in refused(tmp_path, f"--output={tmp_path}")


def test_a_trace_runs_and_small_pages_are_a_warning_only(tmp_path):
    code, out, err = run_command(
        [
            *DECODE,
            f"--trace={write_trace(tmp_path)}",
            "--page_size=32",
            "--batch=4",
            "--context=2",
            "--cpu_devices=2",
            f"--profile_dir={tmp_path}/profile",
        ]
    )
    assert code == 0, err
    assert "page_size=32" in err and "2 requests of good.csv" in out and "2 x cpu" in out
    (profile,) = (tmp_path / "profile").rglob("*.xplane.pb")  # a short run is profiled too
    assert all(scope in profile.read_bytes() for scope in (b"/append/", b"/attend/", b"/merge/"))


@pytest.mark.slow
def test_the_pallas_kernels_decode_a_trace_in_interpret_mode(tmp_path):
    flags = [
        f"--trace={write_trace(tmp_path)}",
        "--implementation=pallas_interpret",
        "--layers=1",
        "--batch=2",
        "--num_q_heads=4",
        "--num_kv_heads=2",
        "--page_size=64",
        "--cpu_devices=2",
    ]
    code, out, err = run_command([*DECODE, *flags])
    assert code == 0, err
    assert "2 outputs checked" in out
    code, _, err = run_command([*POD, "--processes=2", "--", "decode", *flags])
    assert code == 2 and "runs in one process only" in err


def test_help_groups_the_flags_in_80_columns_and_says_what_exit_codes_mean():
    """Of all launchers in one process; test_xla_report_runs.py asks one as a command."""
    names = ["decode", "plan", "scaling", "kernel_report", "accuracy", "xla_report"]
    ends = run_in_one_process([(name, ["--help"]) for name in names])
    assert [end.launcher for end in ends] == names
    for _, code, text, _ in ends:
        assert code == 0 and max(map(len, text.splitlines())) <= 80
        known = {"This launcher:", "Mesh:", "Model and cache:", "Work:", "Output:", "Several processes:"}
        heads = [line for line in text.splitlines() if line in known]
        assert {"Model and cache:", "Output:"} <= set(heads) and len(heads) == len(set(heads))
        assert re.findall(r"^  --(\w+):", text, re.M).count("output") == 1
        assert "75 asked to" in text


def test_a_dry_run_prints_what_would_run_and_writes_nothing(tmp_path):
    out = tmp_path / "out.jsonl"
    code, text, err = run_command([*DECODE, "--dry_run", f"--output={out}", *SMALL])
    assert code == 0 and "compiling" not in err and not out.exists()
    assert "data 4 x context 1 x model 2 = 8 devices" in text and text.endswith("allocated or written\n")


def test_a_flag_that_there_is_not_suggests_the_nearest():
    code, _, err = run_command([*DECODE, "--batsh=3"])
    assert code == 2 and "'batsh'. Did you mean: batch ?" in err


def test_processes_given_different_flags_are_told_so_before_they_hang(tmp_path):
    script = tmp_path / "differ.py"
    script.write_text(
        "import os, sys\nfrom paged_dist.launch import decode\n"
        "sys.argv.append('--seed=' + os.environ['JAX_PROCESS_ID'])\ndecode.cli()\n"
    )
    code, _, err = run_command([*POD, "--processes=2", "--devices=1", "--", str(script), *SMALL])
    assert code == 4, err
    for i in range(2):
        assert f"[p{i}] paged-dist-decode: error: the processes disagree on --seed: 0 on process 0 (" in err, err
    assert "1 on process 1 (" in err
