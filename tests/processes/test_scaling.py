"""`scaling`: the points of a sweep, efficiency, table and plot, and sweeps that are run, killed and gone on with."""

import json
import os
import subprocess
import sys

import pytest
from commands import clean_environment, json_rows, launcher, run_launcher, wait_for
from one_process import run_in_one_process

LIMIT = 120  # seconds, for one sweep
SMALL = ["--num_requests=4", "--max_context=60", "--max_generated=6", "--layers=1", "--num_q_heads=4", "--batch=4"]
SMALL += ["--oracle_samples=2"]


# Sweeps that run


def of_this_sweep(mark):
    """Processes that have `mark` in their command line."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if mark.encode() in file.read() and int(pid) != os.getpid():
                    found.append(int(pid))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def test_a_sweep_that_was_killed_goes_on_where_it_stopped_and_leaves_nobody(tmp_path):
    out, plot = tmp_path / "rows.jsonl", tmp_path / "plots" / "rows.svg"
    seed = int.from_bytes(os.urandom(3))  # marks the processes as this test's
    sweep = ["--processes=1,2", "--devices=1", "--scaling=strong", f"--output={out}", f"--seed={seed}", *SMALL]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean_environment())
    with subprocess.Popen(launcher("scaling", *sweep), **quiet) as p:
        try:
            wait_for(
                lambda: len(json_rows(out)) == 1 and any(i != p.pid for i in of_this_sweep(f"--seed={seed}")), LIMIT
            )
        finally:
            p.kill()
    wait_for(lambda: not of_this_sweep(f"--seed={seed}"), LIMIT)
    (first,) = json_rows(out)
    with open(out, "a") as file:
        file.write('{"benchmark": "sca')  # and the machine went down in the middle of a line
    code, text, err = run_launcher("scaling", *sweep, f"--plot={plot}")
    assert code == 0, err
    assert f"1 of 2 rows are in {out} already" in err
    kept, _, second = out.read_text().splitlines()
    assert json.loads(kept) == first
    second = json.loads(second)
    assert (first["mesh"]["data"], first["processes"]) == (1, 1) and first["mode"] == "strong"
    assert (second["mesh"]["data"], second["processes"]) == (2, 2)
    assert first["checksum"] == second["checksum"], "the same work"
    for r in (first, second):
        assert r["flags"]["--batch"] == 4 and r["versions"]["jax"] and r["time"] and r["devices"] and "git_commit" in r
        assert r["warmup_s"] > 0 and r["compile_s"] > 0 and r["live_kv_bytes_per_step"] > 0 and not r["projected"]
    assert "1x1x1" in text and "2x1x1" in text and plot.read_text().startswith("<?xml")
    assert os.listdir(plot.parent) == ["rows.svg"]
    assert run_launcher("scaling", *sweep)[1] == text, "nothing is measured again"


def test_sigterm_ends_a_sweep_with_75_and_its_rows_are_kept(tmp_path):
    out, seed = tmp_path / "rows.jsonl", int.from_bytes(os.urandom(3))
    sweep = ["--processes=1,2", "--devices=1", "--scaling=weak", f"--output={out}", f"--seed={seed}", *SMALL]
    with subprocess.Popen(launcher("scaling", *sweep), stderr=subprocess.PIPE, text=True, env=clean_environment()) as p:
        try:
            wait_for(lambda: len(json_rows(out)) == 1 and len(of_this_sweep(f"--seed={seed}")) > 1, LIMIT)
            p.terminate()
            _, err = p.communicate(timeout=LIMIT)
        finally:
            p.kill()
    assert p.returncode == 75 and "the same command goes on from here" in err and "Traceback" not in err
    assert len(json_rows(out)) == 1 and not of_this_sweep(f"--seed={seed}")


def test_sub_meshes_of_what_is_there_are_measured_by_all_processes_together(tmp_path):
    out = tmp_path / "rows.jsonl"
    pod = [sys.executable, "-P", "-m", "paged_dist.launch.local_pod", "--processes=2", "--devices=2", "--", "scaling"]
    sweep = ["--sizes=1,2,4", "--scaling=strong", f"--output={out}", *SMALL]
    done = subprocess.run([*pod, *sweep], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert [(r["chips"], r["processes"]) for r in json_rows(out)] == [(1, 1), (2, 1), (4, 2)]
    assert len({r["checksum"] for r in json_rows(out)}) == 1
    assert "4x1x1" in done.stdout


BAD_FLAGS = [
    (["--scaling=linear"], "--scaling='linear': must be strong, weak or both"),
    (["--processes=1,x"], "--processes='x': must be whole numbers"),
    (["--data=2"], "--data=2: is no flag of this launcher; the sweep sets it"),
    (["--plot=a.pdf"], "--plot='a.pdf': must end in .svg or .png"),
    (["--plan=v5p:8x8x9", "--sizes=1"], "not together with --sizes"),
    (["--plan=v5p:7x8x8"], "the nearest is v5p:8x8x8"),
    (["--output=/proc/x"], "--output='/proc/x'"),
    (["--plan="], "--plan='': must name a slice"),
    (["--width=512"], "--width=512: is a flag of --plan"),
    (["--plan=v5e:2x2", "--implementation=xla"], "--implementation='xla': is a flag of measured sweeps"),
    (["--oracle_samples=-1"], "--oracle_samples=-1: must be at least 0"),
    (["--model_parallelism=2"], "--model_parallelism=2: is no flag of this launcher"),
    (["--plan=v5e:2x2", "--processes=1"], "--processes=['1']: is of local pods"),
    (["--plan=v5e:2x2", "--num_pages=9"], "--num_pages=9: is no flag of this launcher"),
]


@pytest.fixture(scope="module")
def scaling_refusals():
    return run_in_one_process([("scaling", arguments) for arguments, _ in BAD_FLAGS])


@pytest.mark.parametrize("index", range(len(BAD_FLAGS)), ids=[" ".join(arguments) for arguments, _ in BAD_FLAGS])
def test_bad_flags_end_with_one_line_before_anything_runs(scaling_refusals, index):
    _, code, text, err = scaling_refusals[index]
    assert (code, text) == (2, "") and err.count("\n") == 1 and BAD_FLAGS[index][1] in err, err


def test_a_dry_run_prints_the_points_and_starts_nothing(tmp_path):
    out = tmp_path / "rows.jsonl"
    code, text, _ = run_launcher("scaling", "--dry_run", "--processes=1,2", f"--output={out}", *SMALL)
    assert code == 0 and not out.exists()
    assert text.splitlines()[-1] == "dry run: 4 runs; nothing was started or written"
    assert "weak 2x1x2 (4 devices, 2 processes): batch 8, requests 2 times over" in text
