"""The composed program, a loop of steps that append and attend: nothing copies a pool, and no shard talks."""

from __future__ import annotations

import functools

import aot
import jax
import jax.numpy as jnp
import pytest
from aot import needs_libtpu
from decode_loops import decode_loop, loop_arguments
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pod_meshes import ABSENT_PODS, absent_pod

import paged_dist as pd


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "data", "model", "local_heads", "num_layers", "head_dim", "page_size"),
    [
        pytest.param(
            *pod,
            local_heads,
            num_layers,
            *shape,
            marks=() if pod is often and (shape[0] == 128 or (local_heads, num_layers) == (1, 8)) else pytest.mark.slow,
        )
        for shape, often in (((128, 128), ABSENT_PODS[0]), ((64, 64), ABSENT_PODS[1]), ((256, 16), ABSENT_PODS[0]))
        for num_layers in (None, 8)  # one layer, or a scan over 8
        for local_heads in (1, 8)
        for pod in ABSENT_PODS[:2]
    ],
)
def test_decode_loop_copies_no_pool_and_has_no_collective(
    topology, data, model, local_heads, num_layers, head_dim, page_size
):
    mesh = absent_pod(topology, data, model)
    spec = pd.CacheSpec(local_heads * model, head_dim, 256 * data, page_size, num_layers=num_layers)
    _assert_in_place(spec, mesh)


@needs_libtpu
@pytest.mark.parametrize(("topology", "data", "model"), ABSENT_PODS[2:], ids=[p[0] for p in ABSENT_PODS[2:]])
def test_decode_loop_is_in_place_on_the_other_generations(topology, data, model):
    mesh = absent_pod(topology, data, model)
    _assert_in_place(pd.CacheSpec(2 * model, 128, 256 * data, 128, num_layers=4), mesh)


CONTEXT = [
    ("v5p:4x4x4", (4, 4, 4), dict(num_layers=8)),
    ("v5e:4x8", (2, 8, 2), dict(head_dim=64, page_size=64, num_layers=4)),
    ("v6e:8x8", (8, 4, 2), dict(dtype="int8", num_layers=4)),
    ("v4:4x4x4", (4, 4, 4), dict(dtype="float8_e4m3fn")),
    ("tpu7x:4x4x4", (4, 8, 4), dict(num_layers=4)),
]


@needs_libtpu
@pytest.mark.parametrize(("topology", "shape", "options"), CONTEXT, ids=[p[0] for p in CONTEXT])
def test_decode_loop_over_context_shards_copies_no_pool_and_merges_only(topology, shape, options):
    data, context, model = shape
    options = dict(head_dim=128, page_size=128) | options
    spec = pd.CacheSpec(model, num_pages=256 * data * context, **options)
    _assert_in_place(spec, absent_pod(topology, data, model, context))


@needs_libtpu
@pytest.mark.parametrize("way", ["explicit_axes", "x64"])
def test_decode_loop_is_in_place_on_explicit_axes_and_under_x64(way):
    """Under jax_enable_x64 a caller's Python numbers are 64 bits wide; the kernels know 32."""
    kind = AxisType.Explicit if way == "explicit_axes" else AxisType.Auto
    mesh = absent_pod("v6e:8x8", 2, 2, 2)
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(kind,) * 3)
    with jax.enable_x64(way == "x64"):
        _assert_in_place(pd.CacheSpec(2, 128, 256 * 4, 128, dtype="int8", num_layers=2), mesh)


@needs_libtpu
@pytest.mark.parametrize(("topology", "shape", "options"), [CONTEXT[0], ("v6e:8x8", (4, 1, 4), dict(dtype="int8"))])
def test_decode_loop_of_several_tokens_a_step_is_in_place(topology, shape, options):
    data, context, model = shape
    spec = pd.CacheSpec(model, 128, 256 * data * context, **options)
    _assert_in_place(spec, absent_pod(topology, data, model, context), new_tokens=(4,))


# Pages that are padded behind each token's elements; the queries and new tokens are padded in XLA, on every call.
PADDED = [
    ("v6e:2x2", (1, 1, 1), dict(head_dim=96, num_layers=4)),
    ("v5p:4x4x4", (4, 4, 4), dict(head_dim=192, dtype="int8", num_layers=4)),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("v4:4x4x4", (1, 1, 1), dict(head_dim=112, dtype="float8_e4m3fn", num_layers=4)),
            ("v4:4x4x4", (8, 1, 8), dict(head_dim=96, num_layers=4)),
            ("v5e:4x8", (1, 1, 1), dict(head_dim=48, page_size=64, dtype="int8")),
            ("v5e:4x8", (2, 8, 2), dict(head_dim=80, num_layers=4)),
            ("v5p:4x4x4", (1, 1, 1), dict(head_dim=192, dtype="float32", num_layers=4)),
            ("v6e:8x8", (8, 1, 8), dict(head_dim=112, dtype="int8", num_layers=4)),
            ("tpu7x:4x4x4", (1, 1, 1), dict(head_dim=80, num_layers=4)),
            ("tpu7x:4x4x4", (4, 8, 4), dict(head_dim=192, dtype="float8_e4m3fn")),
        )
    ),
]


@needs_libtpu
@pytest.mark.parametrize(("topology", "shape", "options"), PADDED, ids=str)
def test_decode_loop_of_padded_heads_copies_no_pool_and_pads_nothing_but_new_tokens(topology, shape, options):
    data, context, model = shape
    mesh = absent_pod(topology, data, model, context)
    spec = pd.CacheSpec(2 * model, num_pages=1024 * data * context, **dict(page_size=128) | options)
    text = _assert_in_place(spec, mesh)
    layer_pool = spec.bytes_per_chip(mesh) // 2 // (spec.num_layers or 1)
    assert aot.values_as_large_as(text, layer_pool // 32) == []  # nor a part of one
    for merge in aot.collectives(text):
        assert not any(f",{spec.stored_head_dim}]" in array for array in merge.arrays), "padding crosses no link"


QUANTIZED = [
    ("v5p:4x4x4", 8, 8, dict(dtype="int8")),
    ("v6e:8x8", 8, 8, dict(dtype="float8_e4m3fn", num_layers=8)),
    ("v5e:4x8", 8, 4, dict(dtype="int8", head_dim=64, page_size=64, num_layers=4)),
    ("v4:4x4x4", 8, 8, dict(dtype="float8_e4m3fn", num_layers=4)),
    ("tpu7x:4x4x4", 8, 8, dict(dtype="float8_e4m3fn", head_dim=256)),
    ("tpu7x:4x4x4", 16, 8, dict(dtype="int8", num_layers=4)),
]


@needs_libtpu
@pytest.mark.parametrize("local_heads", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("topology", "data", "model", "options"),
    [
        pytest.param(*p, id=f"{p[0]}-{p[3]}", marks=() if p[0][:3] in ("v4:", "v5p", "v6e") else pytest.mark.slow)
        for p in QUANTIZED
    ],
)
def test_decode_loop_of_8_bit_caches_copies_neither_pools_nor_scales(topology, data, model, options, local_heads):
    mesh = absent_pod(topology, data, model)
    options = dict(head_dim=128, page_size=128) | options
    spec = pd.CacheSpec(local_heads * model, num_pages=4096 * data, **options)
    text = _assert_in_place(spec, mesh)
    layer_scales = 4 * local_heads * 4096 * spec.page_size
    assert aot.values_as_large_as(text, layer_scales) == []


def _assert_in_place(spec: pd.CacheSpec, mesh: Mesh, **arguments) -> str:
    compiled = aot.compile_on(mesh, decode_loop(spec), *loop_arguments(spec, mesh, **arguments), donate_argnums=0)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    layer_pool = spec.bytes_per_chip(mesh) // 2 // (spec.num_layers or 1)
    assert text.count('custom_call_target="tpu_custom_call"') >= 2  # the kernels, not their XLA forms
    assert aot.values_as_large_as(text, layer_pool) == []
    merges = ["all-reduce"] * 2 if mesh.shape["context"] > 1 else []
    assert [c.kind for c in aot.collectives(text)] == merges  # once each, in the loops' body
    assert memory.temp_size_in_bytes < layer_pool
    assert memory.alias_size_in_bytes >= spec.bytes_per_chip(mesh)
    return text


@needs_libtpu
@pytest.mark.parametrize("some_rows", [False, True], ids=["all_rows", "some_rows"])
@pytest.mark.parametrize("num_layers", [None, 4], ids=["loop", "scan_over_4_layers"])
@pytest.mark.parametrize(
    "pages", [64, pytest.param(256, marks=pytest.mark.slow)]
)  # 2 and 8 MiB a layer's pool on a chip: such tempt XLA into VMEM
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "v7x"])
def test_prompts_are_written_in_place(chip, pages, num_layers, some_rows):
    _assert_prompts_in_place(chip, pages, num_layers, some_rows)


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "head_dim"),
    [
        ("v6e", 96),
        *(pytest.param(c, d, marks=pytest.mark.slow) for c in ("v4", "v5e", "v5p", "v7x") for d in (80, 192)),
    ],
)
def test_prompts_of_padded_heads_are_written_in_place(chip, head_dim):
    _assert_prompts_in_place(chip, 256, 4, False, head_dim)


def _assert_prompts_in_place(chip, pages, num_layers, some_rows, head_dim=128):
    mesh = absent_pod(aot.CHIP_TOPOLOGIES[chip], 2, 1)
    spec = pd.CacheSpec(1, head_dim, pages * 2, 128, num_layers=num_layers)

    def fill(cache, new, lengths, tables, rows):
        def write(cache, layer):
            chosen = rows if some_rows else None
            return pd.write_prefill_kv(cache, new, new, lengths, tables, rows=chosen, layer=layer), None

        if num_layers is None:
            return jax.lax.fori_loop(0, 3, lambda _, cache: write(cache, None)[0], cache)
        return jax.lax.scan(write, cache, jnp.arange(num_layers))[0]

    def shape(dtype, *dims, split=not some_rows):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P("data" if split else None)))

    new, int32 = shape(jnp.bfloat16, 4, 2048, 1, head_dim), functools.partial(shape, jnp.int32)
    args = (pd.PagedKVCache.abstract(spec, mesh), new, int32(4), int32(4, 16, split=True), int32(4, split=False))
    compiled = aot.compile_on(mesh, fill, *args, donate_argnums=0)
    pool = ",".join(map(str, (*spec.pool_shape[:-3], pages, *spec.pool_shape[-2:])))
    moved = aot.values_as_large_as(compiled.as_text(), spec.bytes_per_chip(mesh) // 2 // (num_layers or 1))
    assert [m for m in moved if f"{pool}]" in m] == []  # the prompts themselves may be as large
    assert aot.collectives(compiled.as_text()) == []
    assert compiled.memory_analysis().alias_size_in_bytes >= spec.bytes_per_chip(mesh)


@needs_libtpu
def test_the_copy_test_sees_a_copy():
    """The same loop, entered with a doubled cache that is not donated: the test above can fail."""
    mesh = absent_pod("v6e:8x8", 8, 8)
    spec = pd.CacheSpec(8, 128, 2048, 128)
    loop = decode_loop(spec)

    def copying(cache, *rest):
        doubled = jax.tree.map(lambda x: x + x, cache)
        return loop(doubled, *rest), cache

    compiled = aot.compile_on(mesh, copying, *loop_arguments(spec, mesh))
    assert aot.values_as_large_as(compiled.as_text(), spec.bytes_per_chip(mesh) // 2)
