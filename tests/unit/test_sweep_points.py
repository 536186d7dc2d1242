"""scaling, before anything runs: the points of a sweep, its rows' keys, efficiency, table and plot."""

import json
import os
import sys

import flagsaver
import pytest

from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.scaling import SCALING_PROGRAM
from paged_dist.launch.sweeps import scaling_report
from paged_dist.launch.sweeps.points import SweepSize, points_of
from paged_dist.launch.sweeps.sweep_rows import SweepRows


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
