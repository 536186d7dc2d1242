"""`scaling`: the points of a sweep, efficiency, table and plot, and sweeps that are run, killed and gone on with."""

import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import flagsaver
import pytest
from aot import needs_libtpu

from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.scaling import SCALING_PROGRAM
from paged_dist.launch.sweeps import absent_pods, scaling_report, sub_meshes, sweep_flags
from paged_dist.launch.sweeps.points import SweepSize, points_of
from paged_dist.launch.sweeps.sweep_rows import SweepRows
from paged_dist.mesh.topology import topology_devices

LIMIT = 120  # seconds, for one sweep
SMALL = ["--num_requests=4", "--max_context=60", "--max_generated=6", "--layers=1", "--num_q_heads=4", "--batch=4"]
SMALL += ["--oracle_samples=2"]


def points(sizes, *arguments):
    with flagsaver.flagsaver():
        flags.FLAGS(["scaling", *arguments])
        return points_of([SweepSize(n) for n in sizes])


def test_strong_points_do_the_same_work_and_weak_ones_the_same_a_device():
    found = points([2, 4, 16], "--num_kv_heads=4", "--context=1")
    strong, weak = [[p for p in found if p.mode == mode] for mode in ("strong", "weak")]
    assert [p.mesh for p in strong] == [(1, 1, 2), (2, 1, 2), (8, 1, 2)] == [p.mesh for p in weak]
    assert [(p.batch, p.times) for p in strong] == [(128, 1)] * 3
    assert [(p.batch, p.times) for p in weak] == [(16, 1), (32, 2), (128, 8)]
    found = points([2, 8], "--context=2", "--model=1", "--batch=12", "--runs=2", "--scaling=weak")
    assert [(p.mesh, p.batch, p.repeat) for p in found] == [
        ((1, 2, 1), 12, 0),
        ((1, 2, 1), 12, 1),
        ((4, 2, 1), 48, 0),
        ((4, 2, 1), 48, 1),
    ]


@pytest.mark.parametrize(
    ("sizes", "arguments", "message"),
    [
        ([2, 6], ["--model=4", "--num_kv_heads=4"], "--model=4: context x model = 1 x 4 must divide each size"),
        ([2, 3], ["--context=2"], "--context=2: context x model = 2 x 1 must divide each size, and 3"),
        ([2, 3], ["--model=1", "--batch=6"], "3 devices are no multiple of 2"),
        ([1, 4], ["--batch=6"], "--batch=6: must be a multiple of every mesh's data size, so of 4"),
        ([2, 4, 6], ["--batch=8", "--model=2", "--scaling=strong"], "every mesh's data size, so of 6"),
    ],
)
def test_a_sweep_that_does_not_divide_is_refused(sizes, arguments, message):
    with pytest.raises(ValueError, match="--") as e:
        points(sizes, *arguments)
    assert message in str(e.value)


def key(*arguments, point=0, origin=("jax 1", "commit", {"cpu": 2}, 77)):
    with flagsaver.flagsaver():
        flags.FLAGS(["scaling", *arguments])
        return points_of([SweepSize(1), SweepSize(2)])[point].key(list(origin))


def test_a_row_is_known_by_its_point_the_work_and_its_origin_and_not_by_where_it_goes():
    where = ["--output=c", "--scaling=strong", "--timeout_seconds=99", "--trace=/else/where.csv", "--layers=2"]
    where += ["--start_timeout_seconds=9", "--phase_timeout_seconds=9"]
    assert key("--output=a", "--plot=b.svg") == key(*where)
    others = [key("--layers=4"), key(point=1), key(origin=["jax 2"]), key("--repeat_requests=2")]
    assert len({key(), *others}) == 5


def row(mode, chips, tokens_per_s, projected=False, repeat=0, partial=False):
    return {
        "mode": mode,
        "projected": projected,
        "partial": partial,
        "repeat": repeat,
        "chip": "v5p",
        "devices": {"cpu": chips},
        "mesh": {"data": chips, "context": 1, "model": 1},
        "settings": {"layers": 2},
        "workload": "a trace, 2 times over",
        "processes": 1,
        "chips": chips,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_chip": tokens_per_s / chips,
        "step_ms_p50": 2.0,
        "step_ms_p99": None if projected else 3.0,
    }


ROWS = [
    row("strong", 4, 280.0),
    row("strong", 1, 100.0),
    row("strong", 1, 90.0, repeat=1),
    row("strong", 1, 500.0, repeat=2),  # an odd run: medians do not see it
    row("strong", 4, 1.0, partial=True),
    row("weak", 1, 100.0),
    row("weak", 4, 300.0),
    row("strong", 1, 1000.0, projected=True),
    row("strong", 4, 4000.0, projected=True),
]


def test_efficiency_is_that_of_a_chip_over_the_smallest_point_s():
    strong, projected, weak = scaling_report.series(ROWS)
    assert (strong.mode, strong.projected, weak.mode, projected.projected) == ("strong", False, "weak", True)
    assert [(p.chips, p.tokens_per_s, p.efficiency, p.repeats) for p in strong.points] == [
        (1, 100.0, 1.0, 3),
        (4, 280.0, 0.7, 1),
    ]
    assert [p.efficiency for p in weak.points] == [1.0, 0.75]
    assert [p.efficiency for p in projected.points] == [1.0, 1.0]


def test_other_work_is_another_series_with_a_name_of_its_own():
    other = row("strong", 1, 5.0) | {"settings": {"layers": 9}}
    found = scaling_report.series([ROWS[0], ROWS[1], other, ROWS[0] | {"workload": "a trace"}])
    assert sorted(len(one.points) for one in found) == [1, 2] and len({one.work for one in found} - {""}) == 2
    assert len({one.title for one in found}) == 2


def test_the_table_says_what_is_projected_in_80_columns():
    text = scaling_report.sweep_table([*ROWS, row("weak", 8192, 3.2e8), row("weak", 8192, 3.2e8, projected=True)])
    assert max(map(len, text.splitlines())) <= 80
    heads = [line for line in text.splitlines() if "scaling" in line]
    assert [("measured" in h, "projected" in h) for h in heads] == [(True, False), (False, True)] * 2
    assert "        4x1x1     1      4         280        70        2        3   70%    1" in text.splitlines()


@pytest.mark.parametrize("fails", ["stdout", "plot"])
def test_a_table_or_a_plot_that_cannot_be_written_costs_a_line(tmp_path, monkeypatch, capfd, fails):
    rows, said = tmp_path / "rows.jsonl", []
    rows.write_text(json.dumps(row("strong", 1, 100.0) | {"benchmark": "scaling", "key": "other"}) + "\n")

    class Figure:
        def savefig(self, path, format):
            with open(path, "w") as file:
                file.write("half")
            if fails == "plot":
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(scaling_report, "sweep_figure", lambda rows: Figure())
    with flagsaver.flagsaver():
        flags.FLAGS(["scaling", f"--output={rows}", f"--plot={tmp_path}/rows.svg"])
        sweep = SweepRows(SCALING_PROGRAM, [], said.append, [])
        sweep.points, sweep.done = ["one"], {"one": row("strong", 2, 150.0) | {"key": "mine"}}
        with open("/dev/full" if fails == "stdout" else os.devnull, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert sweep.conclude() == 1
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", *(["rows.svg"] if fails == "stdout" else [])]
    assert ("could not be written" in capfd.readouterr().err) == (fails == "stdout")
    assert len(said) == (fails == "plot") and all("--plot=" in line for line in said)


def test_measured_and_projected_are_never_in_one_line_style():
    pytest.importorskip("matplotlib")
    speed, share = scaling_report.sweep_figure(ROWS).axes
    for axes in (speed, share):
        lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
        assert len(lines) == 3
        for line in lines:
            looks = line.get_linestyle(), line.get_fillstyle()
            assert looks == (("--", "none") if "projected" in line.get_label() else ("-", "full"))
        ideal = [line for line in axes.get_lines() if line.get_label().startswith("_")]
        assert ideal and all(line.get_linestyle() == ":" for line in ideal)
    assert [list(line.get_ydata()) for line in share.get_lines()[:3]] == [[100, 70], [100, 100], [100, 75]]


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "size", "box"),
    [
        ("v5p:4x4x4", 4, (1, 2, 2)),
        ("v5p:4x4x4", 8, (2, 2, 2)),
        ("v5p:4x4x4", 16, (2, 2, 4)),
        ("v6e:4x8", 8, (2, 4, 1)),
        ("tpu7x:2x2x4", 8, (1, 2, 2)),
    ],
)
def test_a_sub_mesh_of_a_slice_is_a_box(topology, size, box):
    devices = list(topology_devices(topology))
    chosen = sub_meshes.sub_devices(devices, size)
    assert len(set(chosen)) == size and devices[0] in chosen
    extent = [len({d.coords[i] for d in chosen}) for i in range(3)]
    assert sorted(extent) == sorted(box)
    chips_a_host = 4
    assert len({d.process_index for d in chosen}) == max(1, len({tuple(d.coords) for d in chosen}) // chips_a_host)


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "slices", "sizes"),
    [
        ("tpu7x:2x2x1", 1, [2, 4, 8]),
        ("v5p:4x4x12", 1, [1, 2, 4, 8, 16, 32, 64, 192]),
        ("v5e:4x4", 2, [1, 2, 4, 8, 16, 32]),
    ],
)
def test_the_sizes_there_are_by_default_are_those_of_which_there_is_a_sub_mesh(topology, slices, sizes):
    with flagsaver.flagsaver():
        flags.FLAGS(["scaling"])
        assert sub_meshes.sub_mesh_sizes(list(topology_devices(topology, slices))) == sizes


@needs_libtpu
def test_a_size_that_is_no_box_is_refused():
    with pytest.raises(ValueError, match="--sizes=3: no box of so many devices"):
        sub_meshes.sub_devices(list(topology_devices("v5p:4x4x4")), 3)
    with pytest.raises(ValueError, match="--sizes=3: there are 2 devices"):
        sub_meshes.sub_devices([SimpleNamespace(coords=None)] * 2, 3)


@needs_libtpu
@pytest.mark.parametrize(
    ("slices", "arguments", "flag"),
    [
        ("v5e-16,v5e:4x8", ["--batch=100000", "--layers=20"], "--batch="),
        ("v5e:4x4,v5e:8x8,v5e:2x2", ["--batch=43008", "--layers=20", "--scaling=weak"], "--batch="),
        ("v5e:4x4,v6e:2x4", ["--layers=3000", "--num_kv_heads=8", "--num_q_heads=8"], "--batch="),
        ("v5e:2x2,v5p:4x4x4", ["--layers=900000", "--width=4096"], "--width="),
        ("v5e:2x2,v5p:4x4x4", ["--context_tokens=10000000", "--model=1"], "--batch="),
        ("v5p:2x2x1,v5e:2x2", ["--hbm_gib=90"], "--hbm_gib=90.0: a v5e chip"),
    ],
)
def test_advice_for_one_slice_of_a_plan_fits_all_when_given_back(slices, arguments, flag):
    def check(*more):
        with flagsaver.flagsaver():
            flags.FLAGS(["scaling", f"--plan={slices}", *arguments, *more])
            sweep_flags.check_sweep_flags()
            return absent_pods.plan_sweep(slices.split(","))

    with pytest.raises(ValueError, match="--") as e:
        check()
    assert str(e.value).startswith(flag)
    advice = re.findall(r"--\w+=[\d.]*\d", str(e.value).partition("; ")[2])
    settings, fits = check(*advice)
    if flag == "--batch=" and len(advice) == 1:  # the largest
        (s, *_) = settings.values()
        assert not fits({"batch": s.batch + s.batch_step})


# Sweeps that run


def command(*arguments):
    return [sys.executable, "-P", "-m", "paged_dist.launch.scaling", *arguments]


def run(*arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=LIMIT)
    return done.returncode, done.stdout, done.stderr


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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


def wait_for(holds):
    until = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_sweep_that_was_killed_goes_on_where_it_stopped_and_leaves_nobody(tmp_path):
    out, plot = tmp_path / "rows.jsonl", tmp_path / "plots" / "rows.svg"
    seed = int.from_bytes(os.urandom(3))  # marks the processes as this test's
    sweep = ["--processes=1,2", "--devices=1", "--scaling=strong", f"--output={out}", f"--seed={seed}", *SMALL]
    with subprocess.Popen(command(*sweep), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        try:
            wait_for(lambda: len(rows_in(out)) == 1 and any(i != p.pid for i in of_this_sweep(f"--seed={seed}")))
        finally:
            p.kill()
    wait_for(lambda: not of_this_sweep(f"--seed={seed}"))
    (first,) = rows_in(out)
    with open(out, "a") as file:
        file.write('{"benchmark": "sca')  # and the machine went down in the middle of a line
    code, text, err = run(*sweep, f"--plot={plot}")
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
    assert run(*sweep)[1] == text, "nothing is measured again"


def test_sigterm_ends_a_sweep_with_75_and_its_rows_are_kept(tmp_path):
    out, seed = tmp_path / "rows.jsonl", int.from_bytes(os.urandom(3))
    sweep = ["--processes=1,2", "--devices=1", "--scaling=weak", f"--output={out}", f"--seed={seed}", *SMALL]
    with subprocess.Popen(command(*sweep), stderr=subprocess.PIPE, text=True) as p:
        try:
            wait_for(lambda: len(rows_in(out)) == 1 and len(of_this_sweep(f"--seed={seed}")) > 1)
            p.terminate()
            _, err = p.communicate(timeout=LIMIT)
        finally:
            p.kill()
    assert p.returncode == 75 and "the same command goes on from here" in err and "Traceback" not in err
    assert len(rows_in(out)) == 1 and not of_this_sweep(f"--seed={seed}")


def test_sub_meshes_of_what_is_there_are_measured_by_all_processes_together(tmp_path):
    out = tmp_path / "rows.jsonl"
    pod = [sys.executable, "-P", "-m", "paged_dist.launch.local_pod", "--processes=2", "--devices=2", "--", "scaling"]
    sweep = ["--sizes=1,2,4", "--scaling=strong", f"--output={out}", *SMALL]
    done = subprocess.run([*pod, *sweep], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert [(r["chips"], r["processes"]) for r in rows_in(out)] == [(1, 1), (2, 1), (4, 2)]
    assert len({r["checksum"] for r in rows_in(out)}) == 1
    assert "4x1x1" in done.stdout


@needs_libtpu
def test_a_projected_sweep_says_so_in_every_row(tmp_path):
    out = tmp_path / "rows.jsonl"
    shape = ["--num_kv_heads=4", "--num_q_heads=8", "--layers=2", "--batch=64", f"--output={out}", "--model=4"]
    assert run("--plan=v5e:2x4,v6e:2x4,v5e:2x2", "--scaling=weak", "--dry_run", *shape)[1].count("weak") == 3
    code, text, err = run("--plan=v5e:2x2,v5e:2x4", *shape)
    assert code == 0, err
    rows = rows_in(out)
    assert [(r["mode"], r["chips"], r["settings"]["batch"]) for r in rows] == [
        ("strong", 4, 64),
        ("strong", 8, 64),
        ("weak", 4, 64),
        ("weak", 8, 128),
    ]
    assert all(r["projected"] and r["step_ms_p99"] is None and r["tokens_per_s"] > 0 for r in rows)
    assert "measured" not in text and text.count("projected") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
    ],
)
def test_bad_flags_end_with_one_line_before_anything_runs(arguments, message):
    code, text, err = run(*arguments)
    assert (code, text) == (2, "") and err.count("\n") == 1 and message in err, err


def test_a_dry_run_prints_the_points_and_starts_nothing(tmp_path):
    out = tmp_path / "rows.jsonl"
    code, text, _ = run("--dry_run", "--processes=1,2", f"--output={out}", *SMALL)
    assert code == 0 and not out.exists()
    assert text.splitlines()[-1] == "dry run: 4 runs; nothing was started or written"
    assert "weak 2x1x2 (4 devices, 2 processes): batch 8, requests 2 times over" in text
