"""The rows of a sweep in --output: which points are measured already, how a new row is kept, the table at the end."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Sequence

from paged_dist.launch.common import shared_flags
from paged_dist.launch.common.program import Program
from paged_dist.launch.common.provenance import git_commit, versions
from paged_dist.launch.common.record_output import append_output, print_text
from paged_dist.launch.serving.workload import Request
from paged_dist.launch.sweeps import scaling_report, sweep_flags
from paged_dist.launch.sweeps.points import Point


def rows_in_file(path: str | None, say: Callable[[str], None] = lambda line: None) -> list[dict]:
    """The rows of scaling sweeps in a file of JSON lines.

    Other programs' rows are passed over; half-written lines too, which `say` is told.
    """
    if path is None or not os.path.isfile(path):  # a device has no end
        return []
    rows = []
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                say(f"warning: {path}: line {n}: not JSON (half-written?), left out")
                continue
            if isinstance(row, dict) and row.get("benchmark") == "scaling":
                rows.append(row)
    return rows


def _is_whole_and_right(row: dict) -> bool:
    """Whether a row is that of a run which was not cut short and whose outputs were right."""
    return not row["partial"] and row.get("oracle_passed", True)


class SweepRows:
    """The rows of a sweep: those that --output has already, and those that come.

    Each new row is in the file before the next run begins, so that a sweep that was ended goes on where it stopped.

    Args:
      say: prints a line, of process 0 alone where there are several.
      requests: what is served.
      devices: the kinds and numbers of what it runs on. None for plans, whose points name their slices.
    """

    def __init__(
        self,
        program: Program,
        points: list[Point],
        say: Callable[[str], None],
        requests: Sequence[Request],
        devices: dict[str, int] | None = None,
    ):
        self._program, self.points, self.say = program, points, say
        origin = [versions(), git_commit(), devices, zlib.crc32(repr(list(requests)).encode())]
        self._keys = {p: p.key(origin) for p in points}
        known = {r["key"]: r for r in rows_in_file(shared_flags.OUTPUT.value, say) if _is_whole_and_right(r)}
        self.done = {p: known[key] for p, key in self._keys.items() if key in known}

    def due(self) -> list[Point]:
        """The points that are not in the file."""
        if self.done:
            self.say(f"{len(self.done)} of {len(self.points)} rows are in {shared_flags.OUTPUT.value} already")
        return [p for p in self.points if p not in self.done]

    def say_stopped(self) -> None:
        """Says what becomes of a sweep that was asked to stop."""
        self.say("asked to stop: the rows measured so far are kept, the same command goes on from here")

    def add(self, point: Point, record: dict) -> bool:
        """Writes a point's row; False where that fails."""
        row = record | {"benchmark": "scaling", "mode": point.mode, "key": self._keys[point], "repeat": point.repeat}
        row["flags"] = shared_flags.given_flags()
        if _is_whole_and_right(row):
            self.done[point] = row
        return append_output(self._program.name, shared_flags.OUTPUT.value, row)

    def conclude(self) -> int:
        """Prints the table of this sweep and draws the plot, which has the file's other sweeps too; the exit code."""
        rows = [self.done[p] for p in self.points if p in self.done]
        printed = not rows or print_text(self._program.name, scaling_report.sweep_table(rows))
        mine = {r["key"] for r in rows}
        rows += [r for r in rows_in_file(shared_flags.OUTPUT.value) if _is_whole_and_right(r) and r["key"] not in mine]
        drawn = sweep_flags.PLOT.value is None or not rows or self._draw(rows, sweep_flags.PLOT.value)
        return int(not printed or not drawn)

    def _draw(self, rows: list[dict], path: str) -> bool:
        """Draws `rows` into the file `path`, which is replaced at once or left as it was; False where that fails."""
        folder = os.path.dirname(os.path.abspath(path))
        beside = os.path.join(folder, f".{os.getpid()}-{os.path.basename(path)}")
        try:
            os.makedirs(folder, exist_ok=True)
            scaling_report.sweep_figure(rows).savefig(beside, format=path.rsplit(".", 1)[1])
            os.replace(beside, path)
        except OSError as e:
            self.say(f"error: --plot={path!r}: could not be written: {e}")
            with contextlib.suppress(OSError):
                os.unlink(beside)
            return False
        return True
