"""Paged attention compiled ahead of time for real chips: what Mosaic and XLA make of it."""

import jax
import jax.numpy as jnp
import pytest
from aot import CHIPS, compile_on, needs_libtpu, one_chip_mesh, values_as_large_as
from test_page_attention_kernel import BODIES, drive

from paged_dist._compat import lowering_for
from paged_dist.kernels import page_attention
from paged_dist.kernels.attention.checks import check_pools
from paged_dist.kernels.chips import SMEM_LIMIT
from paged_dist.kernels.seed import block_choice, pallas_call
from paged_dist.kernels.seed.pallas_call import attend_pages_pallas

pytestmark = needs_libtpu
on_every_chip = pytest.mark.parametrize("chip", CHIPS)


def shapes(B=8, Hq=32, Hkv=8, N=64, R=128, W=128, D=128, S=33, L=2, dtype="bfloat16", query_dtype="bfloat16"):
    """(query, key_pages, value_pages, lengths, block_tables, layer) of stored pools, by shape."""
    pool = jax.ShapeDtypeStruct((L, Hkv, N, R, W), dtype)
    return (
        jax.ShapeDtypeStruct((B, Hq, D), query_dtype),
        pool,
        pool,
        jax.ShapeDtypeStruct((B,), jnp.int32),
        jax.ShapeDtypeStruct((B, S), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )


def attend(**options):
    return lambda *arrays: attend_pages_pallas(*arrays, **options)


def assert_one_kernel_and_no_copy(compiled, pool, kernels=1):
    """That the program is `kernels` custom calls, and makes no value as large as a layer of the pool."""
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels
    layer = pool.size // pool.shape[0] * pool.dtype.itemsize
    assert values_as_large_as(text, layer) == []
    assert compiled.memory_analysis().temp_size_in_bytes < layer


SHAPES = {
    "mha_page_128": (dict(Hq=8), {}),
    "gqa_page_16_window_cap": (dict(R=16, N=2048), dict(sliding_window=100, soft_cap=30.0, inline_seq_dim=False)),
    "mqa_page_8": (dict(Hq=16, Hkv=1, R=8, N=4096), {}),
    "packed_head_dim_64_page_16": (dict(Hq=24, D=64, R=8, N=2048), {}),
    "packed_head_dim_64_page_128_f32": (
        dict(Hq=24, D=64, R=64, N=128, dtype="float32", query_dtype="float32"),
        dict(inline_seq_dim=False),
    ),
    "head_dim_256_page_8_f32": (dict(Hkv=4, D=256, W=256, R=8, N=2048, dtype="float32"), dict(sliding_window=100)),
    "head_dim_256_page_256": (
        dict(Hq=64, D=256, W=256, R=256, N=16, query_dtype="float32"),
        dict(inline_seq_dim=False, soft_cap=30.0),
    ),
}


@pytest.mark.parametrize(
    ("chip", "name"),
    [
        pytest.param(chip, name, marks=() if chip == "v7x" or (i + j) % 3 == 0 else pytest.mark.slow)
        for j, chip in enumerate(CHIPS)
        for i, name in enumerate(SHAPES)
    ],
)
def test_compiles_for_every_chip_and_copies_no_pool(chip, name):
    shape, options = SHAPES[name]
    arrays = shapes(**shape)
    assert_one_kernel_and_no_copy(compile_on(one_chip_mesh(chip), attend(**options), *arrays), arrays[1])


@pytest.mark.parametrize("mode, inline", [("batch", True), ("kv_head", False)])
@pytest.mark.parametrize("chip", ["v4", "v5p"])
def test_megacore_compiles_where_there_is_one(chip, mode, inline):
    arrays = shapes()
    compiled = compile_on(one_chip_mesh(chip), attend(megacore_mode=mode, inline_seq_dim=inline), *arrays)
    assert_one_kernel_and_no_copy(compiled, arrays[1])


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v7x"])
def test_megacore_is_refused_where_there_is_none(chip):
    query, pool, _, lengths, tables, _ = shapes(L=1)
    pool = jax.ShapeDtypeStruct(pool.shape[1:], pool.dtype)
    mesh = one_chip_mesh(chip)
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        pytest.raises(ValueError, match=r"megacore_mode='batch'.*TPU ?\w.*v4 and v5p only"),
    ):
        jax.jit(lambda *x: page_attention(*x, megacore_mode="batch")).lower(query, pool, pool, lengths, tables)


def test_megacore_is_refused_inside_a_shard_map_for_a_chip_without_it():
    mesh = one_chip_mesh("v6e")
    sharded = jax.shard_map(attend(megacore_mode="batch"), mesh=mesh, in_specs=jax.P(), out_specs=jax.P())
    with lowering_for(mesh), pytest.raises(ValueError, match="'TPU v6 lite'"):
        jax.jit(sharded).lower(*shapes())


@on_every_chip
@pytest.mark.parametrize(
    "D, P",
    [
        (64, 8),
        pytest.param(128, 16, marks=pytest.mark.slow),
        pytest.param(64, 16, marks=pytest.mark.slow),
        pytest.param(256, 8, marks=pytest.mark.slow),
    ],
)
def test_page_attention_follows_the_platform_it_is_lowered_for(chip, D, P):
    query, _, _, lengths, tables, _ = shapes(D=D)
    cache = jax.ShapeDtypeStruct((8, 64, P, D), jnp.bfloat16)
    compiled = compile_on(one_chip_mesh(chip), page_attention, query, cache, cache, lengths, tables)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    here = jax.jit(page_attention).lower(query, cache, cache, lengths, tables).as_text()
    assert "tpu_custom_call" not in here


@pytest.mark.parametrize("chip", [pytest.param(c, marks=() if c in ("v4", "v7x") else pytest.mark.slow) for c in CHIPS])
@BODIES
@pytest.mark.parametrize("Hq", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_a_launcher_written_for_ejkernel_compiles(chip, body, Hq):
    query, _, _, lengths, tables, _ = shapes(Hq=Hq, S=32)
    cache = jax.ShapeDtypeStruct((8, 64, 16, 128), jnp.bfloat16)
    compiled = compile_on(
        one_chip_mesh(chip),
        lambda *x: drive(body, *x, pages=8, sliding_window=100),
        query,
        cache,
        cache,
        lengths,
        tables,
    )
    assert "tpu_custom_call" in compiled.as_text()


@on_every_chip
def test_the_largest_table_that_is_let_through_fits_in_scalar_memory(chip):
    def fits(S):
        return block_choice.launch_smem_bytes(256, S) <= SMEM_LIMIT

    widest = max(S for S in range(900, 1025) if fits(S))
    arrays = shapes(B=256, Hq=8, S=widest)
    assert_one_kernel_and_no_copy(compile_on(one_chip_mesh(chip), attend(), *arrays), arrays[1])


@pytest.mark.parametrize(
    "chip", ["v4", "v6e", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5e", "v5p", "v7x"))]
)
def test_a_table_over_scalar_memory_is_refused_by_mosaic_and_split_by_us(chip, monkeypatch):
    arrays = shapes(B=256, Hq=8, S=1024)  # 1 MiB, all there is
    mesh = one_chip_mesh(chip)
    assert_one_kernel_and_no_copy(compile_on(mesh, attend(), *arrays), arrays[1], kernels=2)
    monkeypatch.setattr(pallas_call, "sequences_per_launch", lambda problem, multiple: problem.batch)
    with pytest.raises(Exception, match=r"(?i)smem"):
        compile_on(mesh, attend(), *arrays)


@pytest.mark.parametrize("chip", [pytest.param(c, marks=() if c == "v7x" else pytest.mark.slow) for c in CHIPS])
@pytest.mark.parametrize(
    "shape",
    [
        dict(Hq=128, Hkv=1, R=8),
        pytest.param(dict(Hq=8), marks=pytest.mark.slow),
        pytest.param(dict(Hq=256, Hkv=1, R=256, D=256, W=256, N=16), marks=pytest.mark.slow),
        pytest.param(dict(D=64, R=8, dtype="float32"), marks=pytest.mark.slow),
    ],
)
def test_the_largest_block_that_is_let_through_fits_in_vector_memory(chip, shape):
    arrays = shapes(**shape, S=4096, B=4)
    problem = check_pools(*arrays[:5])
    most = max(n for n in range(1, 1000) if block_choice.block_vmem_bytes(problem, n) <= block_choice.BLOCK_VMEM)
    compile_on(one_chip_mesh(chip), attend(pages_per_compute_block=most, soft_cap=2.0, sliding_window=99), *arrays)
