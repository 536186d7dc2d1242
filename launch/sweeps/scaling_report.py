"""The report of a scaling sweep: efficiency against ideal scaling, as a table and as a plot.

Projected points never look like measured ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from typing import NamedTuple


class SeriesPoint(NamedTuple):
    """One mesh of a series: medians over its repeats."""

    mesh: str
    processes: int
    chips: float
    tokens_per_s: float
    tokens_per_s_per_chip: float
    step_ms_p50: float
    step_ms_p99: float | None
    efficiency: float  # tokens/s/chip over that of the series' smallest point
    repeats: int


class Series(NamedTuple):
    """Points that differ in size alone, by chips: one line of a plot."""

    mode: str  # 'strong' or 'weak'
    projected: bool
    device: str  # 'cpu', 'TPU v5p', ...
    work: str  # a digest of the model and its cache, where the rows have several; else empty
    points: tuple[SeriesPoint, ...]

    @property
    def title(self) -> str:
        """What it is called in table and plot."""
        how = "projected" if self.projected else "measured"
        work = "the same work on all" if self.mode == "strong" else "the same work a chip"
        other = f" (work {self.work})" if self.work else ""
        return f"{self.mode} scaling, {how}, {self.device}{other}: {work}"


def series(rows: list[dict]) -> list[Series]:
    """The rows of a sweep's file as series, strong before weak, measured before projected.

    Ideal is the tokens/s/chip of the smallest point: for strong scaling that is linear speed-up, for weak scaling the
    same time a step. Rows of a run that was asked to stop do not count.
    """
    found: dict[tuple[str, bool, str, str], dict[tuple, list[dict]]] = {}
    several = len({work_digest(r) for r in rows}) > 1
    for r in rows:
        if r["partial"]:
            continue
        device = r["chip"] if r["projected"] else " and ".join(sorted(r["devices"]))
        mesh = "x".join(str(r["mesh"][name]) for name in ("data", "context", "model"))
        points = found.setdefault((r["mode"], r["projected"], device, work_digest(r) if several else ""), {})
        points.setdefault((r["chips"], mesh, r["processes"]), []).append(r)
    return [Series(*which, _series_points(points)) for which, points in sorted(found.items(), key=lambda item: item[0])]


def work_digest(row: dict) -> str:
    """Four hex digits of what a row served and with what model.

    Points of a series agree in it: they differ in the data axis, the batch, and how often the requests are served.
    """
    names = ("layers", "num_layers", "num_q_heads", "num_kv_heads", "head_dim", "dtype", "page_size", "sliding_window")
    settings = [
        row["settings"].get(name)
        for name in (*names, "soft_cap", "width", "mlp_width", "implementation", "context_tokens")
    ]
    workload = re.sub(r", \d+ times over$", "", row["workload"])  # weak points serve it more often
    kept = [settings, workload, row["mesh"]["context"], row["mesh"]["model"]]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:4]


def _series_points(points: dict[tuple, list[dict]]) -> tuple[SeriesPoint, ...]:
    median = lambda runs, name: statistics.median(r[name] for r in runs)
    ordered = sorted(points.items(), key=lambda item: item[0])
    base = median(ordered[0][1], "tokens_per_s_per_chip")
    means = []
    for (chips, mesh, processes), runs in ordered:
        a_chip = median(runs, "tokens_per_s_per_chip")
        p99 = None if runs[0]["step_ms_p99"] is None else median(runs, "step_ms_p99")
        times = median(runs, "tokens_per_s"), a_chip, median(runs, "step_ms_p50"), p99
        means.append(SeriesPoint(mesh, processes, chips, *times, a_chip / base, len(runs)))
    return tuple(means)


def sweep_table(rows: list[dict]) -> str:
    """The sweep as lines of at most 80 columns: a table for each series."""
    lines = []
    for one in series(rows):
        lines += ["", one.title, "         mesh procs  chips    tokens/s    a chip   p50 ms   p99 ms ideal runs"]
        for p in one.points:
            p99 = "-" if p.step_ms_p99 is None else _four_digits(p.step_ms_p99)
            lines.append(
                f"{p.mesh:>13}{p.processes:>6}{p.chips:>7g}{_four_digits(p.tokens_per_s):>12}"
                f"{_four_digits(p.tokens_per_s_per_chip):>10}{_four_digits(p.step_ms_p50):>9}{p99:>9}{p.efficiency:>6.0%}"
                f"{p.repeats:>5}"
            )
    return "\n".join(lines[1:])


def _four_digits(value: float) -> str:
    """At most 6 characters below a million: four digits, or all of a whole number's."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


STYLES = {  # projected -> matplotlib's line style: a glance must tell one from the other
    False: {"linestyle": "-", "marker": "o", "fillstyle": "full"},
    True: {"linestyle": "--", "marker": "s", "fillstyle": "none"},
}


def sweep_figure(rows: list[dict]):
    """A matplotlib Figure: tokens/s and efficiency over chips, measured solid, projected dashed, ideal dotted grey."""
    from matplotlib.figure import Figure

    found = Figure(figsize=(10, 4.5), layout="constrained")
    speed, share = found.subplots(1, 2)
    for one in series(rows):
        chips = [p.chips for p in one.points]
        style = STYLES[one.projected] | {"label": one.title.partition(":")[0]}
        (line,) = speed.plot(chips, [p.tokens_per_s for p in one.points], **style)
        share.plot(chips, [100 * p.efficiency for p in one.points], color=line.get_color(), **style)
        first = one.points[0].tokens_per_s_per_chip
        speed.plot(chips, [first * n for n in chips], ":", color="0.7", zorder=0)
    share.axhline(100, linestyle=":", color="0.7", zorder=0)
    for axes, what in ((speed, "tokens/s"), (share, "% of ideal")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("chips")
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
    speed.set_yscale("log")
    share.set_ylim(bottom=0)
    speed.legend(fontsize=8)
    return found
