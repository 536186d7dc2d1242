"""What a race would show: the same program many times, over the same and over changing memory, gives the same bits."""

import jax
import numpy as np
import pytest
from op_cases import OpBatch, OpCase, on_every_host

import paged_dist as pd

# Where copies overlap most: many short cells, pages that share tiles, both cores, several launches' worth of rows.
CASES = [
    OpCase("short_and_uneven", (1, 700, 3, 128, 0, 129, 2000, 17) * 4, num_kv_heads=1, group=8),
    OpCase("eight_heads", (512,) * 8),
    OpCase("page_16", (300, 5, 16, 17) * 4, page_size=16, num_kv_heads=1, group=8),
    OpCase("int8", (300, 5, 128, 129) * 4, dtype="int8", num_kv_heads=1, group=8),
    OpCase("four_tokens", (300, 5, 128, 129) * 4, new_tokens=4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_repeated_gives_the_same_bits(rehearsed, case):
    repeats = 3 if rehearsed else 200
    batch = OpBatch(case.small() if rehearsed else case, pd.make_pod_mesh(data=1, model=jax.device_count()))
    kind = "xla" if rehearsed else None
    cache = batch.prompts_written(batch.poisoned(), kind)
    cache, output, lse = batch.step(cache, kind)
    batch.check(output, lse)
    query = batch.query[:, 0] if case.new_tokens == 1 else batch.query
    attend = jax.jit(
        lambda query, cache, lengths, tables: pd.sharded_paged_attention(
            query, cache, lengths, tables, mesh=batch.mesh, implementation=kind
        )
    )
    lengths, tables = np.array(batch.allocator.lengths), batch.allocator.block_tables
    first = on_every_host(attend(query, cache, lengths, tables))
    shorter = np.maximum(lengths - 1, 0)  # runs in between leave other things in the buffers
    for _ in range(repeats):
        attend(query, cache, shorter, tables)
        np.testing.assert_array_equal(on_every_host(attend(query, cache, lengths, tables)), first)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_tokens_written_step_by_step_are_those_of_one_prompt(rehearsed, dtype):
    """Many in-place writes of the same tiles, each read back by the next, against one write of all of them."""
    steps = 4 if rehearsed else 300
    case = OpCase("steps", (steps,) * 8, dtype=dtype, page_size=32 if rehearsed else 128)
    kind = "xla" if rehearsed else None
    mesh = pd.make_pod_mesh(data=1, model=jax.device_count())
    whole = OpBatch(case, mesh)
    cache = whole.prompts_written(whole.poisoned(), kind)
    _, want, want_lse = whole.step(cache, kind)
    whole.check(want, want_lse)
    one_by_one = OpBatch(case, mesh)
    cache = one_by_one.poisoned()
    for row in range(8):
        one_by_one.allocator.allocate(row, 0)
    for t in range(steps):
        positions = one_by_one.allocator.grow_all(range(8))
        cache = pd.append_kv(
            cache,
            one_by_one.keys[:, t],
            one_by_one.values[:, t],
            positions,
            one_by_one.allocator.block_tables,
            mesh=mesh,
            implementation=kind,
        )
    _, got, got_lse = one_by_one.step(cache, kind)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got_lse, want_lse)
