"""Several new tokens a sequence: K and V are read once for all of them, so 16 take little more than one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from attention import attend
from report import Row, run
from workload import Shard

CLAIM = "several_tokens"
SHARDS = {"8 q, 1 kv": Shard(8, 1), "32 q, 8 kv": Shard(32, 8)}
NEW_TOKENS = (1, 2, 4, 8, 16)


def measure(small: bool, runs: int) -> Iterator[Row]:
    """A row for each shard and number of new tokens."""
    for words, shard in SHARDS.items():
        for count in NEW_TOKENS:
            yield attend(dataclasses.replace(shard, new_tokens=count), small, runs, f"{words}, Q = {count}", CLAIM)


if __name__ == "__main__":
    run(CLAIM, measure)
