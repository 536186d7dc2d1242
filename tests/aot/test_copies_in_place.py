"""Copies and moves of pages, compiled for absent pods: in place, in few programs, and no pool held twice."""

from __future__ import annotations

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import paged_dist as pd
from paged_dist._compat import lowering_for
from paged_dist.kernels.cache_update.page_copy import copy_stored_pages
from paged_dist.transfer import exchange, resize, staging

COMPILED = {
    "bf16": (dict(), dict(dtype="bfloat16", num_layers=4)),
    "int8": (dict(), dict(dtype="int8")),
    "fp8_page_64": (dict(), dict(dtype="float8_e4m3fn", page_size=64, num_layers=4)),
    "head_dim_64": (dict(model=2), dict(head_dim=64, page_size=16)),
}


@aot.needs_libtpu
@pytest.mark.parametrize(
    ("topology", "name"),
    [
        ("v5p:4x4x4", "bf16"),
        ("v6e:8x8", "int8"),
        ("tpu7x:4x4x4", "fp8_page_64"),
        ("v5e:4x8", "head_dim_64"),
        ("v4:4x4x4", "int8"),
        *(
            pytest.param(topology, name, marks=pytest.mark.slow)
            for topology, name in (("v5p:4x4x4", "fp8_page_64"), ("v6e:8x8", "bf16"), ("tpu7x:4x4x4", "int8"))
        ),
    ],
)
def test_a_pods_program_copies_in_place_and_talks_to_nobody(topology, name):
    axes, shape = COMPILED[name]
    mesh = pd.make_pod_mesh(**dict(context=4, model=8) | axes, topology=topology)
    shards = mesh.shape["data"] * mesh.shape["context"]
    spec = pd.CacheSpec(8, **dict(head_dim=128, page_size=128) | shape, num_pages=512 * shards)
    cache = pd.PagedKVCache.abstract(spec, mesh)
    copies = jax.ShapeDtypeStruct((64, 2), jnp.int32)
    compiled = aot.compile_on(mesh, lambda c, x: pd.copy_pages(c, x, mesh=mesh), cache, copies, donate_argnums=0)
    memory, per_chip = compiled.memory_analysis(), spec.bytes_per_chip(mesh)
    assert memory.alias_size_in_bytes >= per_chip, "the result is the argument"
    page = per_chip // 512
    assert memory.temp_size_in_bytes < 4 * page + 2**18, "a page or so, no pool"
    assert aot.collectives(compiled.as_text()) == []
    made = aot.values_as_large_as(compiled.as_text(), per_chip // 16)
    assert made == []


@aot.needs_libtpu
def test_the_program_of_a_resize_compiles_for_a_tpu_with_pools_of_any_number_of_live_pages():
    """Its pairs have one shape; a chip's pools hold some 140,000 pages here."""
    mesh, axes = aot.one_chip_mesh("v6e"), pd.MeshAxes(None, None, None)
    caches = [
        pd.PagedKVCache.abstract(pd.CacheSpec(1, 128, n, 128, "int8"), mesh, axes=axes) for n in (150_000, 140_000)
    ]
    pairs = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, resize.RESIZE_COPIES, 2), (1,))]
    run = functools.partial(staging.copy_chunk, axes=axes, implementation=None)
    compiled = aot.compile_on(mesh, run, *caches, *pairs, donate_argnums=0)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    assert compiled.memory_analysis().alias_size_in_bytes >= caches[0].spec.bytes_total
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22


@aot.needs_libtpu
@pytest.mark.parametrize(
    "chip", ["v6e", *(pytest.param(chip, marks=pytest.mark.slow) for chip in aot.CHIP_TOPOLOGIES if chip != "v6e")]
)
def test_more_pairs_than_scalar_memory_holds_compile_as_one_launch(chip):
    """1.1 MiB of pairs. They come flat: making 140,000 of [M, 2] flat takes XLA half a minute."""
    pool = jax.ShapeDtypeStruct((1, 1, 150_000, 128, 128), jnp.int8)
    scales = jax.ShapeDtypeStruct((1, 1, 150_000, 128), jnp.float32)
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)

    def run(pools, flat, count):
        return copy_stored_pages(pools, flat.reshape(-1, 2), count, page_size=128)

    operands = (pool, pool, scales, scales), int32(280_000), int32()
    compiled = aot.compile_on(aot.one_chip_mesh(chip), run, *operands, donate_argnums=0)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * 150_000 * 128 * 128


@aot.needs_libtpu
@pytest.mark.parametrize(
    ("topology", "shape"),
    [
        ("v6e:8x8", dict(dtype="int8", num_layers=4)),
        pytest.param("v5p:4x4x4", dict(dtype="bfloat16", num_layers=4), marks=pytest.mark.slow),
        pytest.param("v5e:8x8", dict(dtype="float8_e4m3fn", page_size=64), marks=pytest.mark.slow),
        pytest.param("v4:4x4x4", dict(dtype="int8", head_dim=64), marks=pytest.mark.slow),
    ],
)
def test_a_pods_programs_stage_a_chunk_and_hold_no_pool(topology, shape):
    """data 2 x context 4 x model 8 to 8 x 2 x 4: what leaves, the exchange, and what arrives."""
    old = pd.make_pod_mesh(data=2, context=4, model=8, topology=topology)
    new = Mesh(old.devices.reshape(8, 2, 4), old.axis_names)
    axes, (S, T, q) = pd.MeshAxes(), (8, 16, 16)
    spec = pd.CacheSpec(**dict(num_kv_heads=8, head_dim=128, num_pages=4096 * T) | shape)
    pool = min(spec.bytes_per_chip(mesh) for mesh in (old, new))
    whole = lambda compiled: aot.values_as_large_as(compiled.as_text(), pool // 16)
    at = lambda mesh, x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, P(axes.pages, *(None,) * (x.ndim - 1)))
    )
    caches = [pd.PagedKVCache.abstract(spec, mesh) for mesh in (old, new)]
    leaving = pd.PagedKVCache.abstract(staging.staging_spec(spec, S, T * q), old)
    arriving = pd.PagedKVCache.abstract(staging.staging_spec(spec, T, S * q), new)
    staged = leaving.spec.bytes_per_chip(old)
    assert staged < pool / 16
    for mesh, into, source, shards in ((old, leaving, caches[0], S), (new, caches[1], arriving, T)):
        lists = [at(mesh, np.zeros(s, np.int32)) for s in ((shards, S * T * q // shards, 2), (shards,))]
        with lowering_for(mesh):
            compiled = staging.copy_chunk.lower(into, source, *lists, axes=axes, implementation=None).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= into.spec.bytes_per_chip(mesh), "written in place"
        assert (
            memory.temp_size_in_bytes <= staged and whole(compiled) == [] and aot.collectives(compiled.as_text()) == []
        )
    leave = functools.partial(exchange.send_slots, mesh=old, axes=axes, shards=S)
    specs = exchange.slot_specs(leaving, axes)
    apart = jax.tree.map(
        lambda a, p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.NamedSharding(old, p)),
        jax.eval_shape(leave, leaving),
        specs,
    )
    there = jax.tree.map(lambda p: jax.sharding.NamedSharding(new, p), specs, is_leaf=lambda x: isinstance(x, P))
    with lowering_for(old):
        steps = [jax.jit(leave).lower(leaving), jax.jit(lambda c: c, out_shardings=there).lower(apart)]
    for lowered in steps:
        compiled = lowered.compile()
        assert whole(compiled) == [] and compiled.memory_analysis().temp_size_in_bytes <= 4 * staged
        kinds = {c.kind for c in aot.collectives(compiled.as_text())}
        assert "all-to-all" in kinds and kinds <= {"all-to-all", "collective-permute"}
