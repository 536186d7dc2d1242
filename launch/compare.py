"""How much the runs in two files differ, and whether that is noise: `paged-dist-compare`.

    python -m paged_dist.launch.compare before.jsonl after.jsonl

Each file holds JSON lines as `decode --output` appends them. Rows of the same work (`WORK`) in one file are repeats;
for each metric of a work that both files hold there is the ratio b/a of medians, its spread and a verdict.

Verdict: the two-sided rank test of Mann and Whitney (1947) at 5 %, up to about 60 + 60 runs exact over every split of
the pooled runs, tied runs sharing their mean rank (Lehmann, "Nonparametrics", 1975, 1.4). It assumes no distribution,
and a run that a busy host spoilt is one rank, however slow it was. p cannot be below 2 / C(n_a + n_b, n_a): 0.1 with
3 + 3 runs, so these are too few whatever they say, and 4 + 4, 3 + 5 or 2 + 8 are the fewest that can tell. Every
verdict stands alone: of 20 metrics that did not change, one is called changed.

Spread: the 95 % interval that goes with that test, between two order statistics of the n_a x n_b pairwise ratios
(Hodges and Lehmann, 1963; Bauer, JASA 67, 1972). Neither knows of a clock or a neighbour that changed between the
runs of a and those of b: run them in turn.

No jax is imported here, but Python imports the package first, which does; run as a script this file starts without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np

NAME = "paged-dist-compare"
METRICS = ("tokens_per_s", "step_ms_p50", "step_ms_p99", "prefill_s", "compile_s")
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
ALPHA = 0.05
_Z = statistics.NormalDist().inv_cdf(1 - ALPHA / 2)
_EXACT_COST = 1e8  # additions, about 0.1 s: reached at 60 + 60 runs; the normal approximation is good to 2 % of p there
_WIDTH = 80


class NothingComparable(Exception):
    """Why two files have nothing in common, in one line or several."""


# Reading


def _finite(text: str) -> float | None:
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
            row = json.loads(line.decode(), parse_constant=lambda _: None, parse_float=_finite)
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


def _flat(value, name: str = "") -> Iterator[tuple[str, object]]:
    """('settings.layers', 2), ... of nested dicts, without nulls."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _flat(value[key], f"{name}.{key}" if name else key)
    elif value is not None:
        yield name, value


def work_of(row: dict) -> dict[str, object]:
    """What a row's run did, flat; a null, such as a setting that an older version had not, counts as missing."""
    return dict(_flat({key: row.get(key) for key in WORK})) | {"projected": bool(row.get("projected"))}


def group(a: list[dict], b: list[dict]) -> list[tuple[dict, list[dict], list[dict]]]:
    """(work, its rows in a, its rows in b), in the files' order; either list may be empty."""
    found: dict[str, tuple[dict, list[dict], list[dict]]] = {}
    for side, rows in enumerate((a, b)):
        for row in rows:
            work = work_of(row)
            found.setdefault(json.dumps(work, sort_keys=True), (work, [], []))[1 + side].append(row)
    return list(found.values())


def number(row: dict, name: str) -> float | None:
    """A metric's value; None where it is missing, no number, or too large to take medians and products of."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if abs(value) < 1e150 else None


# Statistics


def _rank_sums(ranks: np.ndarray, m: int) -> np.ndarray:
    """[sum + 1] float64: how many of the subsets of `m` of the integer `ranks` have each sum; exact below 2**53."""
    ways = np.zeros((m + 1, int(np.sort(ranks)[-m:].sum()) + 1))
    ways[0, 0] = 1
    for rank in ranks:
        ways[1:, rank:] += ways[:-1, :-rank]
    return ways[m]


def _exact(n: int, m: int) -> bool:
    return n * m * m * (2 * n - m) <= _EXACT_COST


def rank_test(a: Sequence[float], b: Sequence[float]) -> tuple[float, int]:
    """(two-sided p, 1 where b ranks above a, -1 below, 0 neither) of the Mann-Whitney test, ties by permutation.

    p is the share of splits of the pooled values whose rank sum is at least as far from its mean. Beyond what can be
    counted quickly it is that of a normal distribution with the rank sum's own variance over splits.
    """
    n, m = len(a) + len(b), min(len(a), len(b))
    _, place, counts = np.unique(np.concatenate([a, b]), return_inverse=True, return_counts=True)
    ranks = (2 * np.cumsum(counts) - counts + 1)[place]  # twice the mean rank, which ties may leave at a half
    mean = m * (n + 1)
    off = int((ranks[: len(a)] if len(a) == m else ranks[len(a) :]).sum()) - mean
    if _exact(n, m):
        ways = _rank_sums(ranks, m)
        p = ways[np.abs(np.arange(len(ways)) - mean) >= abs(off)].sum() / ways.sum()
    else:
        variance = m * (n - m) / (n * (n - 1)) * np.square(ranks - (n + 1.0)).sum()
        p = math.erfc(max(0, abs(off) - 1) / math.sqrt(2 * variance)) if variance else 1.0
    return min(1.0, float(p)), int(np.sign(off)) * (-1 if len(a) == m else 1)


def runs_needed(n_a: int, n_b: int) -> tuple[int, int]:
    """The runs of a and b with which the test can come below 5 %: these, or the fewer of the two raised."""
    k = 1
    while 2 / math.comb(max(n_a, k) + max(n_b, k), max(n_a, k)) > ALPHA:
        k += 1
    return max(n_a, k), max(n_b, k)


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The interval of at least 95 % of the ratio b/a of positive values; all pairwise ratios' where runs are too few.

    From the k-th smallest to the k-th largest pairwise ratio, k the most for which 2 P(U < k) <= 5 %, U being the
    Mann-Whitney statistic of samples without a difference.
    """
    with np.errstate(over="ignore", under="ignore"):
        ratios = np.sort(np.divide.outer(np.asarray(b, np.float64), np.asarray(a, np.float64)), axis=None)
    n, m = len(a) + len(b), min(len(a), len(b))
    if _exact(n, m):
        ways = _rank_sums(np.arange(1, n + 1), m)[m * (m + 1) // 2 :]
        k = int((2 * np.cumsum(ways) <= ALPHA * ways.sum()).sum())
    else:
        k = int(len(ratios) / 2 - _Z * math.sqrt(len(ratios) * (n + 1) / 12))
    return float(ratios[max(k, 1) - 1]), float(ratios[-max(k, 1)])


_RATE = re.compile(r"_per_(s|ms|us)(_|$)|^peak_share$")
_TIME = re.compile(r"(^|_)(s|ms|us|ns)(_(p\d+|mean|median|min|max))?$")


def verdict(metric: str, above: bool) -> str:
    """What b is where its values of `metric` are above, or below, those of a: by the unit in the name."""
    if _RATE.search(metric):
        return "faster" if above else "slower"
    if _TIME.search(metric):
        return "slower" if above else "faster"
    return "higher" if above else "lower"


def _steps_quartiles(a: dict, b: dict) -> tuple[float, float] | None:
    """b/a of one run's step time each, from quartile to quartile: b's p25 over a's p75, and b's p75 over a's p25."""
    (low_a, high_a), (low_b, high_b) = ([number(r, f"step_ms_p{q}") or 0 for q in (25, 75)] for r in (a, b))
    return (low_b / high_a, high_b / low_a) if min(low_a, high_a, low_b, high_b) > 0 else None


def compare_metric(metric: str, a: list[dict], b: list[dict]) -> dict:
    """One metric over the rows of one work.

    Returns:
      metric; runs [n_a, n_b] that have it; medians; ratio and spread [low, high] of b/a, where values are positive;
      spread_of: "95% interval", "pairwise ratios" (too few runs for one) or "within-run" (one run's steps); p; verdict;
      runs_needed, where they are too few. What cannot be said is None.
    """
    values = [[v for v in (number(row, metric) for row in rows) if v is not None] for rows in (a, b)]
    runs = [len(v) for v in values]
    medians = [statistics.median(v) if v else None for v in values]
    r = {"metric": metric, "runs": runs, "medians": medians, "ratio": None, "spread": None, "spread_of": None}
    r |= {"p": None, "verdict": None, "runs_needed": None}
    if not all(runs):
        return r
    needed = list(runs_needed(*runs))
    if needed == runs:
        r["p"], above = rank_test(*values)
        r["verdict"] = verdict(metric, above > 0) if r["p"] <= ALPHA else "noise"
    else:
        r["verdict"], r["runs_needed"] = "too few runs", needed
    if min(map(min, values)) > 0:
        ratio, spread = medians[1] / medians[0], None
        if runs != [1, 1]:
            spread, of = ratio_interval(*values), "95% interval" if needed == runs else "pairwise ratios"
        elif metric == "step_ms_p50" and len(a) == len(b) == 1:
            spread, of = _steps_quartiles(a[0], b[0]), "within-run"
        r["ratio"] = ratio if math.isfinite(ratio) else None
        if spread and all(map(math.isfinite, spread)):
            r["spread"], r["spread_of"] = list(spread), of
    return r


# What else differs


def differences(a: list[dict], b: list[dict]) -> dict[str, list[list[str]]]:
    """What runs of the same work may differ in and do: 'versions.jax' -> [all that a has, all that b has]."""
    sides = []
    for rows in (a, b):
        sides.append([])
        for row in rows:
            flags = row.get("flags")
            if isinstance(flags, list):  # as on a command line
                flags = dict(str(flag).lstrip("-").partition("=")[::2] for flag in flags)
            if isinstance(flags, dict):
                flags = {key: value for key, value in flags.items() if key != "output"}
            told = {"versions": row.get("versions"), "git_commit": row.get("git_commit"), "flags": flags}
            sides[-1].append(dict(_flat(told)))
    found = {}
    for name in dict.fromkeys(name for rows in sides for row in rows for name in row):
        seen = [sorted({_shown(row.get(name)) for row in rows}) for rows in sides]
        if len({*seen[0], *seen[1]}) > 1:
            found[name] = seen
    return found


def compare_checksums(a: list[dict], b: list[dict]) -> dict | None:
    """The outputs' checksums over the rows of one work; None unless both sides have one.

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
            versions = dict(_flat({"versions": row.get("versions")}))
            key = tuple(_shown(versions.get(f"versions.{name}")) for name in COMPILERS)
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


# Telling


def _shown(value) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if text.isprintable() else json.dumps(text)


def _wrap(text: str, first: str = "", then: str = "    ") -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=then, break_on_hyphens=False)


def _quantity(value: float | None) -> str:
    if value is None:
        return "-"
    if 1e4 <= abs(value) < 1e8:
        return f"{value:.0f}"
    return f"{value:.5g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    if not 0.001 <= value < 1e5:
        return "<.001" if value < 1 else ">1e5"
    return f"{value:.3f}" if value < 100 else f"{value:.0f}"


def _metric_lines(r: dict) -> list[str]:
    """A row of the table; a name that is too long for it, and a spread within runs, on a line of their own."""
    runs, name = "{}+{}".format(*r["runs"]), _shown(r["metric"])
    lines = [] if len(name) + 1 + len(runs) <= 22 else [_wrap(name)]
    spread = "" if r["spread"] is None or r["spread_of"] == "within-run" else "..".join(map(_ratio, r["spread"]))
    spread = f"[{spread}]" if r["spread_of"] == "pairwise ratios" else spread or "-"
    told = r["verdict"] or "-"
    if r["p"] is not None:
        told += " <.001" if r["p"] < 0.0005 else f" {r['p']:.3f}"
    medians = "".join(f"{_quantity(m):>10}" for m in r["medians"])
    lines.append(f"{'' if lines else name:<{22 - len(runs)}}{runs}{medians}{_ratio(r['ratio']):>7}{spread:>17} {told}")
    if r["spread_of"] == "within-run":
        lines.append("    within-run, quartiles of the steps: {}..{}".format(*map(_ratio, r["spread"])))
    return lines


_HEADER = f"{'metric':<18}runs{'a':>10}{'b':>10}{'b/a':>7}{'spread':>17} verdict, p"


def _difference_lines(found: dict[str, list[list[str]]]) -> list[str]:
    return [_wrap("{}: {} | {}".format(name, *map(", ".join, seen))) for name, seen in found.items()]


def _checksum_lines(found: dict | None) -> list[str]:
    if found is None:
        return []
    if found["verdict"] == "same":
        return [_wrap(f"checksum same: {found['values'][0][0]}")]
    note = "checksum differs, and so do versions of " + ", ".join(COMPILERS)
    title = "checksum differs: OUTPUTS ARE NOT THE SAME" if found["verdict"] == "differs" else note
    return [title, _wrap("{} | {}".format(*(", ".join(map(_shown, v)) for v in found["values"])), "    ")]


def table(record: dict) -> str:
    """The comparison as lines of at most 80 columns. `record`: as `compare` returns it."""
    lines = []
    for side in "ab":
        f = record[side]
        told = f"{f['runs']} run{'s' * (f['runs'] != 1)}"
        told += f", {f['wrong']} with oracle_passed false" if f["wrong"] else ""
        told += f", {f['partial']} partial left out" if f["partial"] else ""
        lines.append(_wrap(f"{_shown(f['file'])}: {told}", f"{side}  "))
    works = [g["work"] for g in (*record["groups"], *record["only_a"], *record["only_b"])]
    keys = dict.fromkeys(key for work in works for key in work)
    own = [key for key in keys if len({json.dumps(work.get(key)) for work in works}) > 1]
    pairs = lambda work, keys: "; ".join(f"{key}={_shown(work.get(key))}" for key in keys)
    lines += ["", _wrap(pairs(works[0], [key for key in keys if key not in own]), "work: ")]
    told = [g["differs"] for g in record["groups"]]
    together = all(found == told[0] for found in told)
    if told[0] and together:
        lines += ["", "differs, a | b", *_difference_lines(told[0])]
    for g in record["groups"]:
        lines.append("")
        if own:
            lines.append(_wrap(pairs(g["work"], own)))
        if not together:
            lines += [f"differs, a | b{'' if g['differs'] else ': nothing'}", *_difference_lines(g["differs"])]
        lines += [_HEADER, *(line for r in g["metrics"] for line in _metric_lines(r))]
        few = dict.fromkeys((*r["runs"], *r["runs_needed"]) for r in g["metrics"] if r["runs_needed"])
        lines += ["{}+{} runs are too few for a verdict: {}+{} are needed".format(*n) for n in few]
        lines += _checksum_lines(g["checksum"])
    for side in "ab":
        found = record[f"only_{side}"]
        lines += ["", f"only in {side}"] if found else []
        lines += [_wrap(f"{pairs(g['work'], own)}: {g['runs']} run{'s' * (g['runs'] != 1)}") for g in found]
    rows = [r for g in record["groups"] for r in g["metrics"]]
    notes = []
    if any(r["p"] is not None for r in rows):
        notes.append("spread: 95 % interval of b/a. verdict: rank test at 5 %, each alone")
    if any(r["spread_of"] == "pairwise ratios" for r in rows):
        notes.append("[..]: from the smallest to the largest ratio of two runs, no 95 % interval")
    return "\n".join([*lines, *[""] * bool(notes), *notes])


def compare(files: Sequence[str], rows: Sequence[list[dict]], metrics: Sequence[str]) -> dict:
    """The whole comparison as one record, `groups` holding a work each that is in both.

    Raises:
      NothingComparable: no whole run, no work or no metric is in both; says which.
    """
    whole = [[row for row in side if not row.get("partial")] for side in rows]
    for file, side in zip(files, whole, strict=True):
        if not side:
            raise NothingComparable(f"{file}: every run is partial")
    groups, only_a, only_b = [], [], []
    for work, a, b in group(*whole):
        if a and b:
            found = [compare_metric(metric, a, b) for metric in metrics]
            told = {"differs": differences(a, b), "checksum": compare_checksums(a, b)}
            groups.append({"work": work, "metrics": found, **told})
        else:
            (only_a if a else only_b).append({"work": work, "runs": len(a or b)})
    if not groups:
        differs = nearest([g["work"] for g in only_a], [g["work"] for g in only_b])
        lines = [_wrap("{}: {} | {}".format(key, *map(_shown, values)), "  ") for key, values in differs.items()]
        raise NothingComparable("\n".join(["no work is in both; the nearest two, a | b:", *lines]))
    unknown = [m for m in metrics if not any(m in row for side in whole for row in side)]
    if unknown and len(unknown) < len(metrics):
        raise NothingComparable(f"no row has a field {', '.join(unknown)}; see --metrics")
    if not any(all(r["runs"]) for g in groups for r in g["metrics"]):
        raise NothingComparable(f"no row of both files has a value of {', '.join(metrics)}; see --metrics")
    record = {"benchmark": "compare", "groups": groups, "only_a": only_a, "only_b": only_b}
    for side, file, all_rows, used in zip("ab", files, rows, whole, strict=True):
        wrong = sum(row.get("oracle_passed") is False for row in used)
        record[side] = {"file": file, "runs": len(used), "partial": len(all_rows) - len(used), "wrong": wrong}
    return record


def _say(line: str) -> None:
    print(f"{NAME}: {line}", file=sys.stderr, flush=True)


def _metric_names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError("names no metric")
    return names


def _check_output(path: str | None, inputs: Sequence[str]) -> None:
    """Raises ValueError where the results could not be appended to `path`, or would be to what is compared."""
    if path is None:
        return
    from paged_dist.launch.common import flag_checks

    flag_checks.check_output(path)
    if os.path.exists(path) and any(os.path.samefile(path, other) for other in inputs):
        raise ValueError(f"--output={path!r}: is one of the files to compare")


def main(argv: Sequence[str]) -> int:
    """Compares what `argv` (without the program's name) says; 0, or 1 where nothing is comparable or outputs differ."""
    parser = argparse.ArgumentParser(NAME, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("a", metavar="a.jsonl", help="runs before, a JSON line each")
    parser.add_argument("b", metavar="b.jsonl", help="runs after")
    default = ",".join(METRICS)
    parser.add_argument("--metrics", type=_metric_names, default=default, help=f"fields to compare (default {default})")
    parser.add_argument("--output", default=None, help="file to which one JSON line with the results is appended")
    parser.error = lambda message: (_say(f"error: {' '.join(message.split())}"), sys.exit(2))
    args = parser.parse_args(argv)
    files = [args.a, args.b]
    try:
        rows, warnings = zip(*map(read_rows, files), strict=True)
        _check_output(args.output, files)
    except ValueError as e:
        parser.error(str(e))
    for warning in filter(None, warnings):
        _say(f"warning: {warning}")
    try:
        record = compare(files, rows, args.metrics)
    except NothingComparable as e:
        _say(f"error: {e}")
        return 1
    print(table(record), flush=True)
    if args.output is not None:
        from paged_dist.launch.common.record_output import append_json_line

        try:
            append_json_line(args.output, record)
        except OSError as e:
            _say(f"error: --output={args.output!r}: could not be written: {e}")
            return 1
    return int(any(g["checksum"] and g["checksum"]["verdict"] == "differs" for g in record["groups"]))


def cli() -> None:
    """The console script."""
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    cli()
