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

No jax is imported by the program's own modules, but Python imports the package first, which does. From the tree,
`python -m launch.compare` starts without it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

# Relative, as in comparison/: `launch.compare` must not import `paged_dist`, which imports jax.
from .comparison.record import NothingComparable, compare
from .comparison.run_rows import read_rows
from .comparison.text import comparison_table

COMPARE_NAME = "paged-dist-compare"
METRICS = ("tokens_per_s", "step_ms_p50", "step_ms_p99", "prefill_s", "compile_s")


def _on_stderr(line: str) -> None:
    print(f"{COMPARE_NAME}: {line}", file=sys.stderr, flush=True)


class _OneLineParser(argparse.ArgumentParser):
    """Ends on bad usage with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        _on_stderr(f"error: {' '.join(message.split())}")
        sys.exit(2)


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
    parser = _OneLineParser(COMPARE_NAME, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("a", metavar="a.jsonl", help="runs before, a JSON line each")
    parser.add_argument("b", metavar="b.jsonl", help="runs after")
    default = ",".join(METRICS)
    parser.add_argument("--metrics", type=_metric_names, default=default, help=f"fields to compare (default {default})")
    parser.add_argument("--output", default=None, help="file to which one JSON line with the results is appended")
    args = parser.parse_args(argv)
    files = [args.a, args.b]
    try:
        rows, warnings = zip(*map(read_rows, files), strict=True)
        _check_output(args.output, files)
    except ValueError as e:
        parser.error(str(e))
    for warning in filter(None, warnings):
        _on_stderr(f"warning: {warning}")
    try:
        record = compare(files, rows, args.metrics)
    except NothingComparable as e:
        _on_stderr(f"error: {e}")
        return 1
    print(comparison_table(record), flush=True)
    if args.output is not None:
        from paged_dist.launch.common.record_output import append_json_line

        try:
            append_json_line(args.output, record)
        except OSError as e:
            _on_stderr(f"error: --output={args.output!r}: could not be written: {e}")
            return 1
    return int(any(g["checksum"] and g["checksum"]["verdict"] == "differs" for g in record["groups"]))


def cli() -> None:
    """The console script."""
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        _on_stderr("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    cli()
