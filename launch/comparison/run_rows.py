"""Rows of benchmark runs: read from files of JSON lines, and grouped by the work that they did."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

# What was run. Caps on lengths are in no setting, hence the tokens: other lengths are other work.
WORK = (
    "benchmark",
    "mode",
    "settings",
    "mesh",
    "devices",
    "processes",
    "workload",
    "requests",
    "pool_pages",
    "tokens",
    "prefill_tokens",
)
COMPILERS = ("jax", "jaxlib", "libtpu")  # other versions of these may round otherwise


def _finite_number(text: str) -> float | None:
    """A number of a JSON text; None where it is too large for a float."""
    value = float(text)
    return value if math.isfinite(value) else None


def read_rows(path: str) -> tuple[list[dict], str | None]:
    """The rows of a file of JSON lines, and a warning where lines are broken and left out.

    A run that was killed, or a full disk, leaves a broken line. Blank lines are skipped; NaN and infinities, which are
    no JSON, are read as null.

    Raises:
      ValueError: the file cannot be read, holds no row, or a line is JSON and no object.
    """
    try:
        with open(path, "rb") as file:
            lines = [(n, line) for n, line in enumerate(file.read().split(b"\n"), 1) if line.strip()]
    except OSError as e:
        raise ValueError(f"{path}: cannot be read: {e.strerror or e}") from e
    rows, broken = [], []
    for n, line in lines:
        try:
            row = json.loads(line.decode(), parse_constant=lambda _: None, parse_float=_finite_number)
        except (ValueError, RecursionError):
            broken.append(n)
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {n}: is JSON, but no object")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: holds no row" if lines else f"{path}: is empty")
    if not broken:
        return rows, None
    some = ", ".join(map(str, broken[:5])) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
    return rows, f"{path}: line {some}: not JSON (half-written?), left out"


def flat_items(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested dicts with their paths, nulls left out: ('settings.layers', 2), ..."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from flat_items(value[key], f"{name}.{key}" if name else key)
    elif value is not None:
        yield name, value


def work_of(row: dict) -> dict[str, object]:
    """What a row's run did, flat. A null counts as missing: an older version wrote none for a setting it had not."""
    return dict(flat_items({key: row.get(key) for key in WORK})) | {"projected": bool(row.get("projected"))}


def rows_by_work(a: list[dict], b: list[dict]) -> list[tuple[dict, list[dict], list[dict]]]:
    """(work, its rows in a, its rows in b), in the files' order; either list may be empty."""
    found: dict[str, tuple[dict, tuple[list[dict], list[dict]]]] = {}
    for side, rows in enumerate((a, b)):
        for row in rows:
            work = work_of(row)
            _, sides = found.setdefault(json.dumps(work, sort_keys=True), (work, ([], [])))
            sides[side].append(row)
    return [(work, *sides) for work, sides in found.values()]


def metric_value(row: dict, name: str) -> float | None:
    """A metric's value; None where it is missing, no number, or too large to take medians and products of."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if abs(value) < 1e150 else None
