"""What every benchmark script does: its flags, a row a case, a table beside the projections, JSON lines."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence

import jax
from measure import Times

from paged_dist.launch.common.chip_rates import chip_of

PROJECTIONS = json.loads((pathlib.Path(__file__).parent / "projections.json").read_text())


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes:
      claim: the script, as in `projections.json`.
      case: the shapes, in words, as in `projections.json`.
      kernel: 'paged-dist', or a peer's name.
      device_kind: what JAX calls the device.
      times: microseconds of each run.
      floor_us: the least that HBM lets the case take on this device; None where its bandwidth is not known.
      small: the shapes were shrunk for a CPU: the row says nothing of the claim.
      baseline_us: median time of what the claim compares with, where it is a ratio.
    """

    claim: str
    case: str
    kernel: str
    device_kind: str
    times: Times
    floor_us: float | None
    small: bool = False
    baseline_us: float | None = None

    @property
    def share(self) -> float | None:
        """Floor over time: 1 is the HBM limit."""
        return None if self.floor_us is None else self.floor_us / self.times.median

    @property
    def ratio(self) -> float | None:
        """Time over that of the baseline."""
        return None if self.baseline_us is None else self.times.median / self.baseline_us

    @property
    def projected(self) -> float | None:
        """What `projections.json` has for this chip, in the unit of the claim."""
        chip = chip_of(self.device_kind)
        if chip is None or self.small:
            return None
        return PROJECTIONS[self.claim]["cases"].get(self.case, {}).get(self.kernel, {}).get(chip.name)

    def as_json(self) -> dict:
        """The row as one line of JSON."""
        return {
            "claim": self.claim,
            "case": self.case,
            "kernel": self.kernel,
            "device_kind": self.device_kind,
            "clock": self.times.clock,
            "runs": len(self.times.program),
            "us": self.times.median,
            "us_kernels": self.times.kernels_median,
            "spread": self.times.spread,
            "floor_us": self.floor_us,
            "share": self.share,
            "ratio": self.ratio,
            "projected": self.projected,
            "unit": PROJECTIONS[self.claim]["unit"],
            "small": self.small,
            "jax": jax.__version__,
        }


def floor_us(live_bytes: int, device: jax.Device) -> float | None:
    """Microseconds that HBM takes for so many bytes at the published bandwidth of `device`; None where unknown."""
    chip = chip_of(device.device_kind)
    return None if chip is None else 1e6 * live_bytes / chip.device_hbm_bytes_per_s


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: measured beside projected, in the unit that the claim has."""
    lines = [
        "| case | kernel | device | us | kernels alone | spread | share of the HBM floor | ratio | projected |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    show = lambda value, form: "-" if value is None else format(value, form)
    for row in rows:
        unit = PROJECTIONS[row.claim]["unit"]
        form = {"share": ".0%", "us": ".1f", "ratio": ".2f"}[unit]
        lines.append(
            f"| {row.case}{' (small)' if row.small else ''} | {row.kernel} | {row.device_kind}, {row.times.clock} "
            f"| {row.times.median:.1f} | {show(row.times.kernels_median, '.1f')} | {row.times.spread:.0%} "
            f"| {show(row.share, '.0%')} | {show(row.ratio, '.2f')} | {show(row.projected, form)} |"
        )
    return "\n".join(lines)


def run(claim: str, measure: Callable[[bool, int], Iterable[Row]], argv: Sequence[str] | None = None) -> list[Row]:
    """A script's main: prints the table of `measure(small, runs)`, and appends the rows to `--output`."""
    parser = argparse.ArgumentParser(description=PROJECTIONS[claim]["claim"])
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each case")
    parser.add_argument("--small", action="store_true", help="small shapes; always so where there is no TPU")
    parser.add_argument("--output", type=pathlib.Path, help="file to which one JSON line a row is appended")
    options = parser.parse_args(argv)
    if options.runs < 1:
        parser.error(f"--runs={options.runs}: must be at least 1")
    small = options.small or jax.default_backend() != "tpu"
    if small:
        print(
            f"{claim}: small shapes on {jax.default_backend()}: this tries the script and measures nothing",
            file=sys.stderr,
        )
    rows = list(measure(small, options.runs))
    if jax.process_index() == 0:
        print(table(rows))
        if options.output is not None:
            with options.output.open("a") as file:
                file.writelines(json.dumps(row.as_json()) + "\n" for row in rows)
    return rows
