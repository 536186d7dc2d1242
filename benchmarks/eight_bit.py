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
    """For each shard a row of bf16, then of each 8-bit dtype with its ratio to it."""
    for words, shard in SHARDS.items():
        yield (plain := attend(shard, small, runs, f"{words}, bf16", CLAIM))
        for name, dtype in DTYPES.items():
            row = attend(dataclasses.replace(shard, dtype=dtype), small, runs, f"{words}, {name}", CLAIM)
            yield dataclasses.replace(row, baseline_us=plain.times.median)


if __name__ == "__main__":
    run(CLAIM, measure)
