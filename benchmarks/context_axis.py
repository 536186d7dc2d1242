"""What a context axis adds: the same tokens on each chip, with their sequence on one chip or over all of them."""

from __future__ import annotations

from collections.abc import Iterator

import jax
from attention import attend
from report import Row, run
from workload import Shard

import paged_dist as pd

CLAIM = "context_axis"
SHARDS = {"32 q heads, 8 kv heads": Shard(32, 8), "8 q, 1 kv": Shard(8, 1)}


def measure(small: bool, runs: int) -> Iterator[Row]:
    """For each shard a row without, and with all devices along context where there are several."""
    for words, shard in SHARDS.items():
        yield attend(shard, small, runs, f"{words}, context 1", CLAIM)
        count = jax.device_count()
        if count > 1:
            mesh = pd.make_pod_mesh(data=1, context=count, model=1)
            yield attend(shard, small, runs, f"{words}, context {count}", CLAIM, mesh)


if __name__ == "__main__":
    run(CLAIM, measure)
