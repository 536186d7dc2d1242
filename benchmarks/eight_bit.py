"""Attention over int8 and fp8 caches: time against the same pages in bf16 (half the bytes and 3% of scales: 0.516)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from attention import attend
from report import Row, run
from workload import Shard

CLAIM = "eight_bit"
SHARDS = {"32 q heads, 8 kv heads": Shard(32, 8), "8 q, 1 kv": Shard(8, 1)}
DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}


def measure(small: bool, runs: int) -> Iterator[Row]:
    """For each shard a row of bf16, then of each 8-bit dtype; `ratio` divides."""
    for words, shard in SHARDS.items():
        yield attend(shard, small, runs, f"{words}, bf16", CLAIM)
        for name, dtype in DTYPES.items():
            yield attend(dataclasses.replace(shard, dtype=dtype), small, runs, f"{words}, {name}", CLAIM)


def ratios(rows: list[Row]) -> dict[str, float]:
    """Time of each 8-bit case over that of bf16."""
    us = {row.case: row.times.median for row in rows}
    return {case: us[case] / us[case.rpartition(", ")[0] + ", bf16"] for case in us if not case.endswith("bf16")}


if __name__ == "__main__":
    for case, ratio in ratios(run(CLAIM, measure)).items():
        print(f"{case}: {ratio:.2f} of bf16's time")
