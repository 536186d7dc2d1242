"""The sharded ops compiled for absent pods: the collectives that they need and no other, and no copy of a pool."""

from __future__ import annotations

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import CHIP_TOPOLOGIES, needs_libtpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pod_meshes import absent_pod
from slices import groups_along

import paged_dist as pd
from paged_dist._compat import lowering_for
from paged_dist.mesh.topology import topology_devices


@needs_libtpu
@pytest.mark.parametrize("output_heads", ["replicated", "scattered"])
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v5e:8x8"])
@pytest.mark.parametrize("context", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_pods_program_has_the_mergers_collectives_and_no_other(topology, output_heads, context):
    """A maximum of [B, Hq] and a sum of [B, Hq, D + 1] over context; nothing with one context shard."""
    mesh = pd.make_pod_mesh(topology=topology, data=16 // context, context=context, model=4)
    spec, rows, heads = pd.CacheSpec(4, 128, 1024), 8, 8  # of one shard
    int32 = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    batch = rows * mesh.shape["data"]
    query = jax.ShapeDtypeStruct((batch, 4 * heads, 128), jnp.bfloat16)
    attend = functools.partial(pd.sharded_paged_attention, output_heads=output_heads, return_lse=True)
    args = query, pd.PagedKVCache.abstract(spec, mesh), int32(batch), int32(batch, 32)
    place = lambda x, *axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*axes)))
    args = place(query, "data", "model"), args[1], place(args[2], "data"), place(args[3], "data")
    compiled = aot.compile_on(mesh, attend, *args)
    top, output = f"f32[{rows},{heads}]", f"f32[{rows},{heads},128]"
    expected = [("all-reduce", top), ("all-reduce", output, top)]
    if output_heads == "scattered":
        expected = [("all-reduce", top), ("all-reduce", top), ("reduce-scatter", output)]
    found = aot.collectives(compiled.as_text())
    assert sorted((c.kind, *sorted(c.arrays)) for c in found) == sorted(expected if context > 1 else [])
    for collective in found:
        assert frozenset(map(frozenset, collective.groups)) == groups_along(mesh, ("context",))
    if context > 1:
        assert sum(c.bytes for c in found) == 4 * rows * heads * (1 + 129)
    assert aot.values_as_large_as(compiled.as_text(), spec.bytes_per_chip(mesh) // 2) == []


@needs_libtpu
@pytest.mark.parametrize("chip", CHIP_TOPOLOGIES)
@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_local_forms_compile_for_every_chip(chip, check_vma):
    mesh = absent_pod(CHIP_TOPOLOGIES[chip], 2, 2)
    spec = pd.CacheSpec(4, 128, 256, num_layers=2)
    cache = pd.PagedKVCache.abstract(spec, mesh)
    heads, pools = P("data", "model", None), cache.partition_specs()

    def step(query, cache, new, lengths, tables):
        cache = pd.append_kv_local(cache, new, new, lengths - 1, tables, layer=1)
        cache = pd.write_prefill_kv_local(cache, new[:, None], new[:, None], lengths, tables, layer=0)
        return pd.paged_attention_local(query, cache, lengths, tables, layer=1, sliding_window=300), cache

    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(heads, pools, heads, P("data"), P("data")),
        out_specs=(heads, pools),
        check_vma=check_vma,
    )

    def shape(*dims, dtype=jnp.int32, spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    rows, bf16 = P("data"), jnp.bfloat16
    args = (shape(8, 16, 128, dtype=bf16, spec=heads), cache, shape(8, 4, 128, dtype=bf16, spec=heads))
    args += (shape(8, spec=rows), shape(8, 16, spec=rows))
    compiled = aot.compile_on(mesh, step, *args, donate_argnums=1)
    layer_pool = spec.bytes_per_chip(mesh) // 4
    assert aot.collectives(compiled.as_text()) == []
    assert aot.values_as_large_as(compiled.as_text(), layer_pool) == []


@needs_libtpu
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_op_compiles_for_a_pod_with_either_axis_type(kind):
    mesh = pd.make_pod_mesh(topology="v5p:8x8x8", model=8, axis_types=kind)
    spec = pd.CacheSpec(8, 128, 64 * 256)
    query = jax.ShapeDtypeStruct((256, 64, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P("data", "model", None)))
    int32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32, sharding=NamedSharding(mesh, P("data")))
    run = functools.partial(pd.sharded_paged_attention, sm_scale=128**-0.5, return_lse=True)
    compiled = aot.compile_on(mesh, run, query, pd.PagedKVCache.abstract(spec, mesh), int32(256), int32(256, 64))
    assert aot.collectives(compiled.as_text()) == []
    assert aot.values_as_large_as(compiled.as_text(), spec.bytes_per_chip(mesh) // 2) == []


@needs_libtpu
@pytest.mark.parametrize("chip", ["v4", "v5p", "v5e", "v6e", "v7x"])
def test_both_cores_of_a_megacore_chip_work(chip):
    mesh = absent_pod(CHIP_TOPOLOGIES[chip], 2, 2)
    cache = pd.PagedKVCache.abstract(pd.CacheSpec(4, 128, 64), mesh)
    query = jax.ShapeDtypeStruct((6, 32, 128), jnp.bfloat16)
    int32 = lambda *dims: jax.ShapeDtypeStruct((6, *dims), jnp.int32)
    with lowering_for(mesh):
        jaxpr = str(jax.make_jaxpr(pd.sharded_paged_attention)(query, cache, int32(), int32(8)))
    assert ("paged_decode_attention_on_two_cores" in jaxpr) == (chip in ("v4", "v5p"))


@needs_libtpu
@pytest.mark.parametrize("Q", [None, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("context", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("topology", ["v5e:4x4", pytest.param("tpu7x:2x2x2", marks=pytest.mark.slow)])
def test_a_scan_of_windows_compiles_for_a_pod_and_copies_no_layer(topology, context, Q):
    """One kernel for all layers, and the merge's collectives alone."""
    mesh = pd.make_pod_mesh(topology=topology, context=context, model=4)
    spec, batch = pd.CacheSpec(4, 128, 512 * mesh.shape["data"], num_layers=3), 8 * mesh.shape["data"]
    place = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))
    queries = () if Q is None else (Q,)
    query = place((batch, *queries, 32, 128), jnp.bfloat16, "data", *(None for _ in queries), "model")
    int32 = lambda *shape: place(shape, jnp.int32, "data")

    def step(query, cache, lengths, tables, starts, windows):
        def one(x, layer_and_window):
            layer, window = layer_and_window
            attend = functools.partial(pd.sharded_paged_attention, layer=layer, sliding_window=window, starts=starts)
            return attend(x, cache, lengths, tables), None

        return jax.lax.scan(one, query, (jnp.arange(3), windows))[0]

    args = query, pd.PagedKVCache.abstract(spec, mesh), int32(batch), int32(batch, 32), int32(batch)
    compiled = aot.compile_on(mesh, step, *args, place((3,), jnp.int32))
    text = compiled.as_text()
    layer = spec.bytes_per_chip(mesh) // 2 // 3
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert aot.values_as_large_as(text, layer) == []
    assert compiled.memory_analysis().temp_size_in_bytes < layer
    merged = 8 * 8 * (Q or 1) * (128 + 2) * 4 if context > 1 else 0  # maximum, sums and outputs of a device in f32
    assert sum(c.bytes for c in aot.collectives(text)) == merged  # XLA may join two all-reduces into one


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5p:4x4x4", pytest.param("v6e:8x8", marks=pytest.mark.slow)])
def test_a_pods_program_inside_a_shard_map_over_stages_is_in_place(topology):
    devices = np.array(topology_devices(topology)[:32]).reshape(2, 2, 4, 2)
    mesh = Mesh(devices, ("stage", "data", "context", "model"))
    spec = pd.CacheSpec(2, 128, 256 * 8)
    caches = pd.PagedKVCache.abstract(spec, mesh)

    def append_and_attend(cache, query, key, value, lengths, tables):
        cache = pd.append_kv(cache, key, value, lengths - 1, tables)
        return pd.sharded_paged_attention(query, cache, lengths, tables, sm_scale=128**-0.5), cache

    run = jax.shard_map(
        append_and_attend,
        mesh=mesh,
        in_specs=(jax.tree.map(lambda _: P(), caches), *(P(),) * 5),
        out_specs=(P("stage"), jax.tree.map(lambda _: P("stage"), caches)),
        axis_names={"stage"},
        check_vma=False,
    )
    split = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))
    heads = lambda count: split((16, count, 128), jnp.bfloat16, "data", "model")
    args = caches, heads(16), heads(2), heads(2), split((16,), jnp.int32, "data"), split((16, 16), jnp.int32, "data")
    compiled = aot.compile_on(mesh, run, *args, donate_argnums=0)
    assert aot.values_as_large_as(compiled.as_text(), spec.bytes_per_chip(mesh) // 2) == []
    assert [c.kind for c in aot.collectives(compiled.as_text())] == ["all-reduce"] * 2
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
