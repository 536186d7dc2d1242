"""What a layer pays for a step: the write of the new token and the attention, beside kernels that do both."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import peers
from attention import peer_rows
from measure import time_program
from report import Row, floor_us, run
from workload import Shard, make_arrays

import paged_dist as pd

CLAIM = "write_and_attend"
CASES = {
    "32 q, 8 kv, 4096": Shard(32, 8),
    "8 q, 1 kv, 4096": Shard(8, 1),
    "32 q, 8 kv, 512": Shard(32, 8, context=512),
    "8 q, 1 kv, 512": Shard(8, 1, context=512),
    "8 q, 1 kv, 1434, batch 128": Shard(8, 1, context=1434, batch=128),
}


def write_and_attend(shard: Shard, small: bool, runs: int, case: str) -> Row:
    """The row of `append_kv` and `sharded_paged_attention` over all devices, the cache donated as in a step."""
    shard = shard.small() if small else shard
    mesh = pd.make_pod_mesh(data=1, model=jax.device_count())
    arrays = make_arrays(shard, mesh)

    def program(cache, query, key, value, positions, lengths, tables):
        cache = pd.append_kv(cache, key, value, positions, tables, mesh=mesh)
        return cache, pd.sharded_paged_attention(query, cache, lengths, tables, mesh=mesh)

    new = (arrays.query, arrays.key, arrays.value, arrays.positions, arrays.lengths, arrays.block_tables)
    times, _ = time_program(program, arrays.cache, *new, name="write_and_attend", runs=runs)
    device = jax.local_devices()[0]
    return Row(CLAIM, case, "paged-dist", device.device_kind, times, floor_us(shard.live_bytes(1), device), small)


def measure(small: bool, runs: int) -> Iterator[Row]:
    """A row a case, the peers' behind it."""
    for case, shard in CASES.items():
        yield write_and_attend(shard, small, runs, case)
        yield from peer_rows(CLAIM, case, shard, peers.write_and_attend_peers(), 1, runs)


if __name__ == "__main__":
    run(CLAIM, measure)
