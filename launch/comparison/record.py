"""The comparison of two files of runs as one record: metrics, checksums, and what else differs."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

from .rank_statistics import ALPHA, rank_test, ratio_interval, runs_needed
from .run_rows import COMPILERS, flat_items, metric_value, rows_by_work
from .text import shown, wrapped


class NothingComparable(Exception):
    """Why two files have nothing in common, in one line or several."""


_RATE = re.compile(r"_per_(s|ms|us)(_|$)|^peak_share$")
_TIME = re.compile(r"(^|_)(s|ms|us|ns)(_(p\d+|mean|median|min|max))?$")


def direction(metric: str, above: bool) -> str:
    """'faster', 'slower', 'higher' or 'lower': what b is where its values of `metric` are above, or below, a's.

    The unit in the metric's name says which way is better.
    """
    if _RATE.search(metric):
        return "faster" if above else "slower"
    if _TIME.search(metric):
        return "slower" if above else "faster"
    return "higher" if above else "lower"


def _steps_quartiles(a: dict, b: dict) -> tuple[float, float] | None:
    """The range of b/a of step times within one run each: b's p25 over a's p75, and b's p75 over a's p25."""
    (low_a, high_a), (low_b, high_b) = ([metric_value(r, f"step_ms_p{q}") or 0 for q in (25, 75)] for r in (a, b))
    return (low_b / high_a, high_b / low_a) if min(low_a, high_a, low_b, high_b) > 0 else None


def compare_metric(metric: str, a: list[dict], b: list[dict]) -> dict:
    """One metric over the rows of one work.

    Returns:
      metric; runs [n_a, n_b] that have it; medians; ratio and spread [low, high] of b/a, where values are positive;
      spread_of: "95% interval", "pairwise ratios" (too few runs for one) or "within-run" (one run's steps); p; verdict;
      runs_needed, where they are too few. What cannot be said is None.
    """
    in_a, in_b = ([v for v in (metric_value(row, metric) for row in rows) if v is not None] for rows in (a, b))
    runs = [len(in_a), len(in_b)]
    medians = [statistics.median(values) if values else None for values in (in_a, in_b)]
    r: dict[str, Any] = {"metric": metric, "runs": runs, "medians": medians}
    r |= dict.fromkeys(("ratio", "spread", "spread_of", "p", "verdict", "runs_needed"))
    if not in_a or not in_b:
        return r
    needed = list(runs_needed(*runs))
    if needed == runs:
        r["p"], above = rank_test(in_a, in_b)
        r["verdict"] = direction(metric, above > 0) if r["p"] <= ALPHA else "noise"
    else:
        r["verdict"], r["runs_needed"] = "too few runs", needed
    if min(*in_a, *in_b) > 0:
        ratio, spread, of = statistics.median(in_b) / statistics.median(in_a), None, None
        if runs != [1, 1]:
            spread, of = ratio_interval(in_a, in_b), "95% interval" if needed == runs else "pairwise ratios"
        elif metric == "step_ms_p50" and len(a) == len(b) == 1:
            spread, of = _steps_quartiles(a[0], b[0]), "within-run"
        r["ratio"] = ratio if math.isfinite(ratio) else None
        if spread and all(map(math.isfinite, spread)):
            r["spread"], r["spread_of"] = list(spread), of
    return r


def differences(a: list[dict], b: list[dict]) -> dict[str, list[list[str]]]:
    """Versions, commit and flags in which runs of the same work differ: 'versions.jax' -> [all of a's, all of b's]."""
    sides = []
    for rows in (a, b):
        sides.append([])
        for row in rows:
            flags = row.get("flags")
            if isinstance(flags, list):  # as on a command line
                split = (str(flag).lstrip("-").partition("=") for flag in flags)
                flags = {name: value for name, _, value in split}
            if isinstance(flags, dict):
                flags = {key: value for key, value in flags.items() if key != "output"}
            told = {"versions": row.get("versions"), "git_commit": row.get("git_commit"), "flags": flags}
            sides[-1].append(dict(flat_items(told)))
    found = {}
    for name in dict.fromkeys(name for rows in sides for row in rows for name in row):
        seen = [sorted({shown(row.get(name)) for row in rows}) for rows in sides]
        if len({*seen[0], *seen[1]}) > 1:
            found[name] = seen
    return found


def compare_checksums(a: list[dict], b: list[dict]) -> dict | None:
    """Whether the outputs of the rows of one work have the same checksum; None unless both sides have one.

    Returns:
      values: [all that a has, all that b has]; verdict: "same", "differs", or "compilers differ", where the rows that
      one set of COMPILERS ran agree and those of others do not.
    """
    values = [sorted({str(r["checksum"]) for r in rows if r.get("checksum") is not None}) for rows in (a, b)]
    if not all(values):
        return None
    by_compiler: dict[tuple, set[str]] = {}
    for row in (*a, *b):
        if row.get("checksum") is not None:
            versions = dict(flat_items({"versions": row.get("versions")}))
            key = tuple(shown(versions.get(f"versions.{name}")) for name in COMPILERS)
            by_compiler.setdefault(key, set()).add(str(row["checksum"]))
    if max(map(len, by_compiler.values())) > 1:
        found = "differs"
    else:
        found = "same" if len({*values[0], *values[1]}) == 1 else "compilers differ"
    return {"values": values, "verdict": found}


def nearest(only_a: list[dict], only_b: list[dict]) -> dict[str, list]:
    """The work in a and the one in b that differ in the fewest keys: key -> [a's value, b's], None where missing."""

    def difference(x, y):
        return {k: [x.get(k), y.get(k)] for k in {**x, **y} if json.dumps(x.get(k)) != json.dumps(y.get(k))}

    return min((difference(x, y) for x in only_a for y in only_b), key=len)


def compare(files: Sequence[str], rows: Sequence[list[dict]], metrics: Sequence[str]) -> dict:
    """The whole comparison as one record. Each of its `groups` is a work that both files have.

    Raises:
      NothingComparable: no whole run, no work or no metric is in both; says which.
    """
    whole = [[row for row in side if not row.get("partial")] for side in rows]
    for file, side in zip(files, whole, strict=True):
        if not side:
            raise NothingComparable(f"{file}: every run is partial")
    groups, only_a, only_b = [], [], []
    for work, a, b in rows_by_work(*whole):
        if a and b:
            found = [compare_metric(metric, a, b) for metric in metrics]
            told = {"differs": differences(a, b), "checksum": compare_checksums(a, b)}
            groups.append({"work": work, "metrics": found, **told})
        else:
            (only_a if a else only_b).append({"work": work, "runs": len(a or b)})
    if not groups:
        differs = nearest([g["work"] for g in only_a], [g["work"] for g in only_b])
        lines = [wrapped("{}: {} | {}".format(key, *map(shown, values)), "  ") for key, values in differs.items()]
        raise NothingComparable("\n".join(["no work is in both; the nearest two, a | b:", *lines]))
    unknown = [m for m in metrics if not any(m in row for side in whole for row in side)]
    if unknown and len(unknown) < len(metrics):
        raise NothingComparable(f"no row has a field {', '.join(unknown)}; see --metrics")
    if not any(all(r["runs"]) for g in groups for r in g["metrics"]):
        raise NothingComparable(f"no row of both files has a value of {', '.join(metrics)}; see --metrics")
    record: dict[str, Any] = {"benchmark": "compare", "groups": groups, "only_a": only_a, "only_b": only_b}
    for side, file, all_rows, used in zip("ab", files, rows, whole, strict=True):
        wrong = sum(row.get("oracle_passed") is False for row in used)
        record[side] = {"file": file, "runs": len(used), "partial": len(all_rows) - len(used), "wrong": wrong}
    return record
