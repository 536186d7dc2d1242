"""Writes of new tokens, compiled for absent chips and pods: in place, and in as few launches as they fit."""

from __future__ import annotations

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import CHIP_TOPOLOGIES, needs_libtpu
from decode_loops import loop_arguments
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from pod_meshes import ABSENT_PODS, absent_pod

import paged_dist as pd
from paged_dist.kernels import write_kv_pages
from paged_dist.kernels.cache_update.kernel import ITEMS_PER_LAUNCH
from paged_dist.launch.planning.hlo_text import ops_around_kernels

# kv heads, pages, page_size, head_dim, dtype, batch, new tokens
COMPILED = [
    (8, 512, 128, 128, "bfloat16", 32, 1),
    (1, 4096, 8, 128, "bfloat16", 256, 1),
    (2, 2048, 16, 64, "bfloat16", 32, 1),
    (1, 512, 128, 256, "float32", 32, 4),
    (8, 512, 128, 128, "bfloat16", 4, 1024),
    (32, 512, 256, 256, "bfloat16", 4, 700),
]


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "heads", "pages", "page_size", "head_dim", "dtype", "batch", "tokens"),
    [
        pytest.param(chip, *shape, marks=pytest.mark.slow if (i + j) % 2 else ())
        for i, chip in enumerate(CHIP_TOPOLOGIES)
        for j, shape in enumerate(COMPILED)
    ],
)
def test_compiled_write_is_in_place(chip, heads, pages, page_size, head_dim, dtype, batch, tokens):
    lanes = max(128, head_dim)
    shape = (2, heads, pages, page_size * head_dim // lanes, lanes)
    pool = jax.ShapeDtypeStruct(shape, dtype)
    new = jax.ShapeDtypeStruct((batch, tokens, heads, head_dim), dtype)
    int32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
    args = (pool, pool, new, new, int32(batch), int32(batch), int32(batch, 16), int32())
    compiled = aot.compile_on(aot.one_chip_mesh(chip), write_kv_pages, *args, donate_argnums=(0, 1))
    layer_pool = int(np.prod(shape[1:])) * jnp.dtype(dtype).itemsize
    assert "tpu_custom_call" in compiled.as_text()
    assert aot.values_as_large_as(compiled.as_text(), layer_pool) == []
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * layer_pool


@needs_libtpu
@pytest.mark.parametrize("chip", CHIP_TOPOLOGIES)
def test_a_lone_write_into_a_pool_that_would_fit_vmem_stays_in_hbm(chip):
    pool = jax.ShapeDtypeStruct((2, 1, 64, 128, 128), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((4, 2048, 1, 128), jnp.bfloat16)
    int32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
    args = (pool, pool, new, new, int32(4), int32(4), int32(4, 16), int32())
    compiled = aot.compile_on(aot.one_chip_mesh(chip), write_kv_pages, *args, donate_argnums=(0, 1))
    assert [v for v in aot.values_as_large_as(compiled.as_text(), 2**21) if "64,128,128]" in v] == []


@needs_libtpu
def test_more_tiles_than_scalar_memory_holds_become_several_launches():
    batch, tokens, page_size = 256, 2048, 8
    pool = jax.ShapeDtypeStruct((1, 1, 80000, page_size, 128), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((batch, tokens, 1, 128), jnp.bfloat16)
    int32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
    args = (pool, pool, new, new, int32(batch), int32(batch), int32(batch, tokens // page_size + 1))
    compiled = aot.compile_on(aot.one_chip_mesh("v6e"), write_kv_pages, *args, donate_argnums=(0, 1))
    tiles = batch * (tokens // page_size + 1)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == -(-tiles // ITEMS_PER_LAUNCH)


def append_loop(cache, key, value, lengths, tables):
    """Eight steps of appends to every layer."""

    def layer(carry, index):
        cache, lengths = carry
        return (pd.append_kv(cache, key, value, lengths - 1, tables, layer=index), lengths), None

    def step(_, carry):
        layers = cache.spec.num_layers
        carry = layer(carry, None)[0] if layers is None else jax.lax.scan(layer, carry, jnp.arange(layers))[0]
        return carry[0], carry[1] + 1

    return jax.lax.fori_loop(0, 8, step, (cache, lengths))


def assert_in_place(compiled, spec: pd.CacheSpec, mesh) -> None:
    """No value as large as a layer's scales on a chip is made, no shard talks, and the whole cache is aliased."""
    scales = 4 * spec.num_kv_heads * spec.num_pages * spec.page_size // mesh.size
    assert aot.values_as_large_as(compiled.as_text(), scales) == []
    assert aot.collectives(compiled.as_text()) == []
    assert compiled.memory_analysis().alias_size_in_bytes >= spec.bytes_per_chip(mesh)


@needs_libtpu
@pytest.mark.parametrize(
    ("head_dim", "page_size", "heads", "layers", "dtype"),
    [(128, 128, 8, 4, "int8"), pytest.param(64, 64, 1, None, "float8_e4m3fn", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("topology", "data", "model"), ABSENT_PODS, ids=[p[0] for p in ABSENT_PODS])
def test_appends_copy_neither_pool_nor_scales(topology, data, model, head_dim, page_size, heads, layers, dtype):
    mesh = absent_pod(topology, data, model)
    spec = pd.CacheSpec(heads * model, head_dim, 4096 * data, page_size, dtype=dtype, num_layers=layers)
    cache = pd.PagedKVCache.abstract(spec, mesh, key_smoothing=True)
    compiled = aot.compile_on(mesh, append_loop, cache, *loop_arguments(spec, mesh)[2:], donate_argnums=0)
    assert_in_place(compiled, spec, mesh)


@needs_libtpu
@pytest.mark.parametrize(
    ("head_dim", "page_size", "heads", "dtype"),
    [(128, 128, 8, "float8_e4m3fn"), pytest.param(64, 16, 1, "int8", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("chip", aot.CHIP_TOPOLOGIES)
def test_prompts_copy_neither_pool_nor_scales(chip, head_dim, page_size, heads, dtype):
    mesh = absent_pod(aot.CHIP_TOPOLOGIES[chip], 1, 1)
    spec = pd.CacheSpec(heads, head_dim, 2**22 // (page_size * heads), page_size, dtype=dtype, num_layers=2)
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
    new, cache = of("bfloat16", 2, 300, heads, head_dim), pd.PagedKVCache.abstract(spec, mesh)
    write = lambda *a: pd.write_prefill_kv(*a, layer=1)
    compiled = aot.compile_on(mesh, write, cache, new, new, of("int32", 2), of("int32", 2, 32), donate_argnums=0)
    assert_in_place(compiled, spec, mesh)


@needs_libtpu
@pytest.mark.parametrize("head_dim", [128, 64])
def test_one_token_quantised_takes_no_more_xla_ops_than_bf16(head_dim):
    """The hot path: a step of many layers feels every microsecond beside the kernel."""
    mesh, ops = absent_pod("v6e:2x2", 1, 1), {}
    for dtype in ("bfloat16", "int8", "float8_e4m3fn"):
        spec = pd.CacheSpec(8, head_dim, 512, 128, dtype=dtype)
        cache = pd.PagedKVCache.abstract(spec, mesh)
        args = loop_arguments(spec, mesh)[2:]
        compiled = aot.compile_on(mesh, pd.append_kv, cache, *args, donate_argnums=0)
        ops[dtype] = len(ops_around_kernels(compiled.as_text()))
    assert ops["int8"] == ops["float8_e4m3fn"] == ops["bfloat16"]
