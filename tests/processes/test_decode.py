"""The decode benchmark: one answer on every layout of processes, checked outputs, honest numbers, clear refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import collectives, needs_libtpu

from paged_dist import CacheSpec, PageAllocator, make_pod_mesh
from paged_dist.launch.common import provenance, record_output
from paged_dist.launch.common.chips import chip_of
from paged_dist.launch.serving import programs as step
from paged_dist.launch.serving import results
from paged_dist.launch.serving.engine import Engine, Measured
from paged_dist.launch.serving.output_checks import ERROR_BOUNDS, relative_error
from paged_dist.launch.serving.programs import Model
from paged_dist.launch.serving.row_schedule import Pool, RowSchedule
from paged_dist.launch.serving.workload import Request, whole_pool

LIMIT = 240  # seconds until a run under test is killed
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


def run(command, **environment):
    """A finished process; its whole process group is killed where it takes too long."""
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS", "PJRT_NPROC")}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=clean | environment,
    )
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


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
        code, out, err = run([*command, *SMALL, f"--output={path}"])
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
    code, out, err = run([*POD, "--processes=4", "--devices=2", "--", "decode", *SMALL, f"--output={path}"])
    assert code == 0, out + err
    got = json.loads(path.read_text())
    assert got["checksum"] == records["2x4"][0]["checksum"] and got["processes"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
def test_8_bit_caches_have_one_checksum_too(records, tmp_path, kv_dtype):
    path, bytes_per_token = tmp_path / "results.jsonl", 2 * 2 * 2 * (64 + 4)  # layers, kv heads, K and V
    for command in ([*POD, "--processes=2", "--devices=4", "--", "decode"], DECODE):
        code, out, err = run([*command, *SMALL, f"--kv_dtype={kv_dtype}", f"--output={path}"])
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
        code, out, err = run([*command, *flags])
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
    code, out, err = run(
        [*DECODE, *SMALL, "--seed=1", "--oracle_samples=0", "--kv_dtype=f32", "--sliding_window=70", "--soft_cap=20"]
    )
    assert code == 0, err
    assert records["bare"][0]["checksum"] not in out and "no output was checked" in out


# The engine in this process


MESH_SHAPE = dict(data=4, context=1, model=2)


def engine_run(model, requests, batch=8, page_size=16):
    """(record-like summary, Measured) of a run over eight devices, checking one output of every request."""
    mesh = make_pod_mesh(**MESH_SHAPE)
    columns = max(-(-r.tokens // page_size) for r in requests)
    pages = whole_pool(batch * columns, page_size, model.dtype, shards=4)
    spec = CacheSpec(model.num_kv_heads, model.head_dim, pages, page_size, model.dtype, model.num_layers)
    engine = Engine(model, spec, mesh, batch, columns)
    checks = {r.id: (r.context + (r.generated + 1) // 2, r.id % model.num_layers) for r in requests}
    pool = Pool(batch, 4, 1, spec.num_pages // 4, page_size)
    engine.compile()
    return engine.run(
        RowSchedule(requests, PageAllocator(spec, mesh, batch, columns), pool, engine.chunk_tokens, checks)
    )


REQUESTS = [Request(i, 20 + 37 * i % 300, 3 + i % 4) for i in range(12)]
CASES = [
    Model(2, 4, 2, 64, "float32", seed=3),
    Model(1, 8, 2, 128, "bfloat16", soft_cap=2.0, sliding_window=33),
    pytest.param(Model(3, 2, 2, 128, "float32", sliding_window=16), marks=pytest.mark.slow),
    pytest.param(Model(2, 4, 2, 64, "int8", sliding_window=100), marks=pytest.mark.slow),
    Model(1, 4, 2, 128, "float8_e4m3fn", soft_cap=3.0),
    Model(2, 4, 2, 80, "bfloat16", sliding_window=40),
]


@pytest.mark.filterwarnings("ignore:.*page_size")
@pytest.mark.parametrize("model", CASES, ids=str)
def test_outputs_agree_with_the_oracle(model):
    measured = engine_run(model, REQUESTS)
    assert measured.checked == len(REQUESTS)
    assert measured.worst_error < ERROR_BOUNDS[model.dtype] / 2
    assert sum(measured.live_rows) == sum(r.generated for r in REQUESTS)


@pytest.mark.filterwarnings("ignore:.*page_size")
@pytest.mark.parametrize("page_size", [48, 96, 512])
def test_pages_that_no_power_of_two_of_tokens_fills(page_size):
    """A prompt's chunks are whole pages: several of them are written in one call, and none may undo another."""
    requests = [Request(i, context, 3) for i, context in enumerate((700, 512, 97, 300))]
    measured = engine_run(CASES[0], requests, page_size=page_size)
    assert measured.checked == len(requests)
    assert measured.worst_error < ERROR_BOUNDS["float32"] / 2


def _last_token_lost(attend):
    return lambda q, cache, lengths, tables, **kw: attend(q, cache, jnp.maximum(lengths - 1, 0), tables, **kw)


def _pages_of_a_neighbour(attend):
    return lambda q, cache, lengths, tables, **kw: attend(q, cache, lengths, jnp.roll(tables, 1, axis=0), **kw)


def _other_layer(attend):
    return lambda *args, layer, **kw: attend(*args, layer=1 - layer, **kw)


def _heads_swapped(attend):
    return lambda q, *args, **kw: attend(q[:, ::-1], *args, **kw)


@pytest.mark.filterwarnings("ignore:.*page_size")
@pytest.mark.parametrize("fault", [_last_token_lost, _pages_of_a_neighbour, _other_layer, _heads_swapped])
def test_the_oracle_sees_a_wrong_program(monkeypatch, capfd, fault):
    monkeypatch.setattr(step, "sharded_paged_attention", fault(step.sharded_paged_attention))
    measured = engine_run(CASES[0], REQUESTS[:6])
    assert measured.worst_error > ERROR_BOUNDS["float32"]
    assert "wrong output: Check(request=" in capfd.readouterr().err


def _scales_of_the_next_token(attend):
    def rolled(q, cache, *args, **kw):
        scales = {name: jnp.roll(getattr(cache, name), 1, axis=-1) for name in ("key_scales", "value_scales")}
        return attend(q, dataclasses.replace(cache, **scales), *args, **kw)

    return rolled


@pytest.mark.filterwarnings("ignore:.*page_size")
def test_the_oracle_sees_wrong_scales(monkeypatch, capfd):
    monkeypatch.setattr(step, "sharded_paged_attention", _scales_of_the_next_token(step.sharded_paged_attention))
    measured = engine_run(Model(1, 4, 2, 128, "int8"), REQUESTS[:6])
    assert measured.worst_error > 5 * ERROR_BOUNDS["int8"]
    assert "wrong output: Check(request=" in capfd.readouterr().err


def test_an_output_of_nan_is_an_infinite_error():
    assert relative_error(np.array([[1.0, np.nan]]), np.ones((1, 2))) == np.inf
    assert relative_error(np.array([[1.0, 1.5]]), np.array([[1.0, 2.0]])) == 0.25


@needs_libtpu
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_step_has_no_collective_on_a_pod_and_holds_no_second_pool(dtype):
    mesh = make_pod_mesh(topology="v5p:4x4x4", model=8)
    model = Model(4, 32, 8, 128, dtype)
    spec = CacheSpec(8, 128, 8 * 512, 128, dtype, 4)
    engine = Engine(model, spec, mesh, 64, 64)
    for lowered in engine.lowered:
        compiled = lowered.compile()
        assert collectives(compiled.as_text()) == []
        assert compiled.memory_analysis().temp_size_in_bytes < spec.bytes_per_chip(mesh) / spec.num_layers


# The numbers


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


@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_generation_s_own_device_kind_has_a_peak(topology):
    mesh = make_pod_mesh(topology=topology)
    (kind,) = provenance.device_counts(mesh)
    assert chip_of(kind).name == topology.split(":")[0].replace("tpu7x", "v7x")


def test_a_json_line_ends_what_an_earlier_writer_left_unfinished(tmp_path):
    path = tmp_path / "deep" / "er" / "x.jsonl"
    record_output.append_json_line(str(path), {"a": 1})
    with open(path, "a") as file:
        file.write('{"half')
    record_output.append_json_line(str(path), {"a": 2})
    assert path.read_text() == '{"a": 1}\n{"half\n{"a": 2}\n'


# Refusals


def refused(tmp_path, *arguments):
    out_file = tmp_path / "out.jsonl"
    code, out, err = run([*DECODE, f"--output={out_file}", *arguments])
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


@pytest.mark.parametrize(  # each is a process: every second one unless `-m slow`
    ("arguments", "says"), [pytest.param(*x, marks=pytest.mark.slow if i % 2 else ()) for i, x in enumerate(BAD_FLAGS)]
)
def test_a_bad_flag_is_one_line_and_exit_code_2_before_anything_is_written(tmp_path, arguments, says):
    assert says in refused(tmp_path, *arguments)


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
    code, out, err = run(
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
    code, out, err = run([*DECODE, *flags])
    assert code == 0, err
    assert "2 outputs checked" in out
    code, _, err = run([*POD, "--processes=2", "--", "decode", *flags])
    assert code == 2 and "runs in one process only" in err


@pytest.mark.parametrize("name", ["decode", "plan", "scaling", "kernel_report", "accuracy", "xla_report"])
def test_help_groups_the_flags_in_80_columns_and_says_what_exit_codes_mean(name):
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"paged_dist.launch.{name}", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80
    known = {"This launcher:", "Mesh:", "Model and cache:", "Work:", "Output:", "Several processes:"}
    heads = [line for line in done.stdout.splitlines() if line in known]
    assert {"Model and cache:", "Output:"} <= set(heads) and len(heads) == len(set(heads))
    assert re.findall(r"^  --(\w+):", done.stdout, re.M).count("output") == 1
    assert "75 asked to" in done.stdout


def test_a_dry_run_prints_what_would_run_and_writes_nothing(tmp_path):
    out = tmp_path / "out.jsonl"
    code, text, err = run([*DECODE, "--dry_run", f"--output={out}", *SMALL])
    assert code == 0 and "compiling" not in err and not out.exists()
    assert "data 4 x context 1 x model 2 = 8 devices" in text and text.endswith("allocated or written\n")


def test_a_flag_that_there_is_not_suggests_the_nearest():
    code, _, err = run([*DECODE, "--batsh=3"])
    assert code == 2 and "'batsh'. Did you mean: batch ?" in err


def test_processes_given_different_flags_are_told_so_before_they_hang(tmp_path):
    script = tmp_path / "differ.py"
    script.write_text(
        "import os, sys\nfrom paged_dist.launch import decode\n"
        "sys.argv.append('--seed=' + os.environ['JAX_PROCESS_ID'])\ndecode.cli()\n"
    )
    code, _, err = run([*POD, "--processes=2", "--devices=1", "--", str(script), *SMALL])
    assert code == 4, err
    for i in range(2):
        assert f"[p{i}] paged-dist-decode: error: the processes disagree on --seed: 0 on process 0 (" in err, err
    assert "1 on process 1 (" in err
