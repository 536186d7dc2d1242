"""The attention alone, over K and V that are in their pages: its share of the HBM floor, the whole program counted.

JAX's own paged attention, the one published kernel that does just this, runs beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import peers
from measure import time_program
from report import Row, floor_us, run
from workload import Shard, make_arrays

import paged_dist as pd

CLAIM = "attention"
CASES = {
    "32 q heads, 8 kv heads, page 128, context 4096": Shard(32, 8),
    "8 q, 1 kv, page 128, context 4096": Shard(8, 1),
    "8 q, 1 kv, page 64, context 4096": Shard(8, 1, page_size=64),
    "8 q, 1 kv, page 16, context 4096": Shard(8, 1, page_size=16),
    "8 q, 1 kv, page 128, context 512": Shard(8, 1, context=512),
    "32 q, 8 kv, page 128, context 512": Shard(32, 8, context=512),
    "4 q, 4 kv, page 128, context 4096": Shard(4, 4),
    "16 q, 2 kv, head_dim 256, page 128, context 4096": Shard(16, 2, head_dim=256),
    "8 q, 1 kv, window 1024, page 128, context 8192": Shard(8, 1, context=8192, sliding_window=1024),
}


def attend(shard: Shard, small: bool, runs: int, case: str, claim: str, mesh: jax.sharding.Mesh | None = None) -> Row:
    """The row of `sharded_paged_attention` over all devices, each with the work of one `shard`."""
    shard = shard.small() if small else shard
    mesh = pd.make_pod_mesh(data=1, model=jax.device_count()) if mesh is None else mesh
    arrays = make_arrays(shard, mesh)

    def program(state, query, cache, lengths, tables):
        window = shard.sliding_window
        return state, pd.sharded_paged_attention(query, cache, lengths, tables, sliding_window=window, mesh=mesh)

    inputs = (arrays.query, arrays.cache, arrays.lengths, arrays.block_tables)
    times, _ = time_program(program, (), *inputs, name="attend", runs=runs)
    device = jax.local_devices()[0]
    return Row(claim, case, "paged-dist", device.device_kind, times, floor_us(shard.live_bytes(), device), small)


def peer_rows(claim: str, case: str, shard: Shard, prepared: dict, written: int, runs: int) -> Iterator[Row]:
    """The peers' rows of a case, on one device of this process."""
    device = jax.local_devices()[0]
    for name, prepare in prepared.items():
        if device.platform == "tpu" and peers.takes(name, shard):
            state, inputs, program = prepare(shard, device)
            times, _ = time_program(program, state, *inputs, name="peer", runs=runs)
            yield Row(claim, case, name, device.device_kind, times, floor_us(shard.live_bytes(written), device))


def measure(small: bool, runs: int) -> Iterator[Row]:
    """A row a case, the peers' behind it."""
    for case, shard in CASES.items():
        yield attend(shard, small, runs, case, CLAIM)
        yield from peer_rows(CLAIM, case, shard, peers.attention_peers(), 0, runs)


if __name__ == "__main__":
    run(CLAIM, measure)
