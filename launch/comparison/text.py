"""The text of a comparison, in lines of at most 80 columns."""

from __future__ import annotations

import json
import textwrap

from .run_rows import COMPILERS

_WIDTH = 80


def shown(value: object) -> str:
    """A value of a row in one line: '-' for None, text as it is unless it has control characters, else as JSON."""
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if text.isprintable() else json.dumps(text)


def wrapped(text: str, first: str = "", then: str = "    ") -> str:
    """`text` filled to 80 columns, with indents of the first line and of those that follow."""
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=then, break_on_hyphens=False)


def _median_text(value: float | None) -> str:
    """At most 10 characters."""
    if value is None:
        return "-"
    if 1e4 <= abs(value) < 1e8:
        return f"{value:.0f}"
    return f"{value:.5g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def _ratio_text(value: float | None) -> str:
    """At most 7 characters."""
    if value is None:
        return "-"
    if not 0.001 <= value < 1e5:
        return "<.001" if value < 1 else ">1e5"
    return f"{value:.3f}" if value < 100 else f"{value:.0f}"


def _metric_lines(r: dict) -> list[str]:
    """A row of the table. A name that is too long for it, and a spread within runs, take a line of their own."""
    runs, name = "{}+{}".format(*r["runs"]), shown(r["metric"])
    lines = [] if len(name) + 1 + len(runs) <= 22 else [wrapped(name)]
    spread = "" if r["spread"] is None or r["spread_of"] == "within-run" else "..".join(map(_ratio_text, r["spread"]))
    spread = f"[{spread}]" if r["spread_of"] == "pairwise ratios" else spread or "-"
    told = r["verdict"] or "-"
    if r["p"] is not None:
        told += " <.001" if r["p"] < 0.0005 else f" {r['p']:.3f}"
    medians = "".join(f"{_median_text(m):>10}" for m in r["medians"])
    ratio = _ratio_text(r["ratio"])
    lines.append(f"{'' if lines else name:<{22 - len(runs)}}{runs}{medians}{ratio:>7}{spread:>17} {told}")
    if r["spread_of"] == "within-run":
        lines.append("    within-run, quartiles of the steps: {}..{}".format(*map(_ratio_text, r["spread"])))
    return lines


_HEADER = f"{'metric':<18}runs{'a':>10}{'b':>10}{'b/a':>7}{'spread':>17} verdict, p"


def _difference_lines(found: dict[str, list[list[str]]]) -> list[str]:
    return [wrapped("{}: {} | {}".format(name, *map(", ".join, seen))) for name, seen in found.items()]


def _checksum_lines(found: dict | None) -> list[str]:
    if found is None:
        return []
    if found["verdict"] == "same":
        return [wrapped(f"checksum same: {found['values'][0][0]}")]
    note = "checksum differs, and so do versions of " + ", ".join(COMPILERS)
    title = "checksum differs: OUTPUTS ARE NOT THE SAME" if found["verdict"] == "differs" else note
    return [title, wrapped("{} | {}".format(*(", ".join(map(shown, v)) for v in found["values"])), "    ")]


def comparison_table(record: dict) -> str:
    """The comparison as lines of at most 80 columns. `record`: as `compare` returns it."""
    lines = []
    for side in "ab":
        f = record[side]
        told = f"{f['runs']} run{'s' * (f['runs'] != 1)}"
        told += f", {f['wrong']} with oracle_passed false" if f["wrong"] else ""
        told += f", {f['partial']} partial left out" if f["partial"] else ""
        lines.append(wrapped(f"{shown(f['file'])}: {told}", f"{side}  "))
    works = [g["work"] for g in (*record["groups"], *record["only_a"], *record["only_b"])]
    keys = dict.fromkeys(key for work in works for key in work)
    own = [key for key in keys if len({json.dumps(work.get(key)) for work in works}) > 1]
    pairs = lambda work, keys: "; ".join(f"{key}={shown(work.get(key))}" for key in keys)
    lines += ["", wrapped(pairs(works[0], [key for key in keys if key not in own]), "work: ")]
    told = [g["differs"] for g in record["groups"]]
    together = all(found == told[0] for found in told)
    if told[0] and together:
        lines += ["", "differs, a | b", *_difference_lines(told[0])]
    for g in record["groups"]:
        lines.append("")
        if own:
            lines.append(wrapped(pairs(g["work"], own)))
        if not together:
            lines += [f"differs, a | b{'' if g['differs'] else ': nothing'}", *_difference_lines(g["differs"])]
        lines += [_HEADER, *(line for r in g["metrics"] for line in _metric_lines(r))]
        few = dict.fromkeys((*r["runs"], *r["runs_needed"]) for r in g["metrics"] if r["runs_needed"])
        lines += ["{}+{} runs are too few for a verdict: {}+{} are needed".format(*n) for n in few]
        lines += _checksum_lines(g["checksum"])
    for side in "ab":
        found = record[f"only_{side}"]
        lines += ["", f"only in {side}"] if found else []
        lines += [wrapped(f"{pairs(g['work'], own)}: {g['runs']} run{'s' * (g['runs'] != 1)}") for g in found]
    rows = [r for g in record["groups"] for r in g["metrics"]]
    notes = []
    if any(r["p"] is not None for r in rows):
        notes.append("spread: 95 % interval of b/a. verdict: rank test at 5 %, each alone")
    if any(r["spread_of"] == "pairwise ratios" for r in rows):
        notes.append("[..]: from the smallest to the largest ratio of two runs, no 95 % interval")
    return "\n".join([*lines, *[""] * bool(notes), *notes])
