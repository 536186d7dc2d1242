"""Every op on the chip against float64: prompts, appended tokens, copies, attention, moves, over every kind of mesh."""

import jax
import numpy as np
import pytest
from op_cases import OpBatch, OpCase, meshes, on_every_host

import paged_dist as pd

LENGTHS = (1000, 0, 1, 127, 128, 129, 2048, 511)
CASES = [
    OpCase("bf16", LENGTHS),
    OpCase("f32", LENGTHS, dtype="float32"),
    OpCase("int8", LENGTHS, dtype="int8"),
    OpCase("fp8", LENGTHS, dtype="float8_e4m3fn"),
    OpCase("one_kv_head", LENGTHS, num_kv_heads=1, group=8),
    OpCase("head_dim_64", LENGTHS, head_dim=64),
    OpCase("head_dim_96", LENGTHS, head_dim=96),
    OpCase("head_dim_256", LENGTHS, head_dim=256, num_kv_heads=2),
    OpCase("page_16", LENGTHS, page_size=16),
    OpCase("page_64_int8", LENGTHS, page_size=64, dtype="int8"),
    OpCase("window", LENGTHS, options=(("sliding_window", 100),)),
    OpCase("soft_cap", LENGTHS, options=(("soft_cap", 20.0), ("sm_scale", 0.1))),
    OpCase("four_tokens", LENGTHS, new_tokens=4),
    OpCase("sixteen_tokens_fp8", LENGTHS, new_tokens=16, dtype="float8_e4m3fn"),
]


def implementation(rehearsed):
    return "xla" if rehearsed else None  # the Pallas kernels on TPU


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompts_appended_tokens_and_attention_are_float64s(rehearsed, case):
    few = [meshes()[CASES.index(case) % len(meshes())]]  # in a rehearsal one kind of mesh a case
    for mesh in few if rehearsed else meshes():
        batch = OpBatch(case.small() if rehearsed else case, mesh)
        cache = batch.prompts_written(batch.poisoned(), implementation(rehearsed))
        _, output, lse = batch.step(cache, implementation(rehearsed))
        batch.check(output, lse)


def test_the_simulated_kernels_take_the_same_cases(rehearsed):
    """A rehearsal's own: the Pallas kernels in interpret mode, which a TPU runs as they are."""
    if not rehearsed:
        pytest.skip("of a rehearsal: on a TPU the kernels themselves run")
    if jax.process_count() > 1:
        pytest.skip("of one process: the simulation waits for every device of the run")
    case = OpCase("simulated", (40, 0, 7), page_size=16, num_kv_heads=1, group=2)
    batch = OpBatch(case, pd.make_pod_mesh(devices=jax.devices()[:1]))
    cache = batch.prompts_written(batch.poisoned(), "pallas_interpret")
    _, output, lse = batch.step(cache, "pallas_interpret")
    batch.check(output, lse)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_fork_that_writes_leaves_the_other_rows_tokens(rehearsed, dtype):
    case = OpCase("fork", (200, 0), dtype=dtype, page_size=128)
    batch = OpBatch(case, pd.make_pod_mesh(data=1, model=jax.device_count()))
    batch.allocator.allocate(0, 200)
    cache = pd.write_prefill_kv(
        batch.poisoned(),
        batch.keys[:, :200],
        batch.values[:, :200],
        np.array([200, 0], np.int32),
        batch.allocator.block_tables,
        mesh=batch.mesh,
        implementation=implementation(rehearsed),
    )
    batch.allocator.fork(0, 1)
    batch.keys[1, :200], batch.values[1, :200] = batch.keys[0, :200], batch.values[0, :200]
    batch.lengths[:] = 200
    _, output, lse = batch.step(cache, implementation(rehearsed))  # each row's own token 200, the page copied first
    batch.check(output, lse)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_cache_that_was_moved_saved_and_restored_attends_the_same(rehearsed, dtype, tmp_path):
    case = OpCase("moved", LENGTHS[:4], dtype=dtype)
    n = jax.device_count()
    batch = OpBatch(case.small() if rehearsed else case, pd.make_pod_mesh(data=1, model=n))
    cache = batch.prompts_written(batch.poisoned(), implementation(rehearsed))
    whole = batch.spec.shard_page_multiple * n  # pages that any of these meshes divides
    cache, allocator = pd.resize(cache, -(-2 * batch.spec.num_pages // whole) * whole, batch.allocator)
    batch.mesh = pd.make_pod_mesh(data=1, context=n)
    if jax.process_count() == 1:  # over the devices of several processes: save and restore
        cache, allocator = pd.reshard(cache, allocator, batch.mesh)
    folder = tmp_path / "cache" if jax.process_count() == 1 else None
    if folder is not None:
        pd.save(folder, cache, allocator)
        cache, allocator = pd.restore(folder, batch.mesh)
    batch.allocator, batch.mesh = allocator, cache.mesh
    _, output, lse = batch.step(cache, implementation(rehearsed))
    batch.check(output, lse)


def test_the_kernels_of_one_chip_agree_with_the_plain_reference(rehearsed):
    from paged_dist import kernels

    rng = np.random.default_rng(0)
    lengths = np.array([300, 0, 1, 128], np.int32)
    pool = rng.standard_normal((2, 16, 128, 128), np.float32).astype("bfloat16" if not rehearsed else "float32")
    query = rng.standard_normal((4, 8, 128), np.float32).astype(pool.dtype)
    tables = rng.permutation(16)[:12].reshape(4, 3).astype(np.int32)
    with jax.default_device(jax.local_devices()[0]):
        want = on_every_host(kernels.ref_paged_attention(query, pool, pool, lengths, tables))
        for op in (kernels.paged_decode_attention, kernels.page_attention):
            got = on_every_host(op(query, pool, pool, lengths, tables))
            np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=2e-2, atol=2e-2)
