"""What attention communicates: predicted from shapes, told by describe_mesh, found in compiled programs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from aot import collectives, compile_on, needs_libtpu, values_as_large_as
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from slices import crossings, groups_along, partitions

import paged_dist as pd
from paged_dist.cache import CacheSpec
from paged_dist.describe import describe_mesh
from paged_dist.mesh import make_pod_mesh
from paged_dist.ops.collectives import attention_collectives

WHY = [
    (
        dict(num_kv_heads=8, model_parallelism=32),
        CacheSpec(8, 128, 8192, num_layers=32),
        "  heads: model 8 is the greatest common divisor of the 8 kv heads and a sequence's 32 chips, context takes "
        "the other 4; 1 kv head a chip, no K or V is stored twice",
        "  cache: 8192 pages over data 16 x context 4, 128 a chip: 268.44 MB a chip in bfloat16, 32 layers",
    ),
    (
        dict(num_kv_heads=8, model_parallelism=4),
        CacheSpec(8, 128, 8192, dtype="int8"),
        "  heads: model 4 is the greatest common divisor of the 8 kv heads and a sequence's 4 chips, nothing is left "
        "for context; 2 kv heads a chip, no K or V is stored twice",
        "  cache: 8192 pages over data 128 x context 1, 64 a chip: 4.33 MB a chip in int8",
    ),
    (
        dict(context=8, model=4),
        CacheSpec(8, 128, 8192),
        "  heads: model 4 was chosen, context 8 takes the rest of a sequence's 32 chips (model could be 8, the "
        "greatest common divisor with the 8 kv heads); 2 kv heads a chip, no K or V is stored twice",
        "  cache: 8192 pages over data 16 x context 8, 64 a chip: 8.39 MB a chip in bfloat16",
    ),
    (
        dict(),
        CacheSpec(1, 128, 8192),
        "  heads: model is 1 and context is 1, each chip has its sequences to itself; 1 kv head a chip, no K or V is "
        "stored twice",
        "  cache: 8192 pages over data 512 x context 1, 16 a chip: 1.05 MB a chip in bfloat16",
    ),
]


@needs_libtpu
@pytest.mark.parametrize(("asked", "spec", "heads", "cache"), WHY)
def test_describe_says_why_and_what_each_chip_holds(asked, spec, heads, cache):
    mesh = make_pod_mesh(**asked, topology="v5p:8x8x8")
    text = describe_mesh(mesh, spec)
    assert text.splitlines()[-2:] == [heads, cache]
    assert text.startswith(describe_mesh(mesh))
    assert spec.bytes_per_chip(mesh) * 512 == spec.bytes_total


TALK = [
    (
        dict(),
        "    all-reduce (max) of f32 [8, 8]: 256 B a chip, 384 B sent in a ring\n"
        "    all-reduce (sum) of f32 [8, 8, 128] and [8, 8]: 33.02 kB a chip, 49.54 kB sent in a ring\n"
        "  collectives of a step, 32 layers: 1.06 MB a chip, 1.60 MB sent in a ring",
    ),
    (
        dict(output_heads="scattered", num_query_tokens=4),
        "    all-reduce (max) of f32 [8, 4, 8]: 1.02 kB a chip, 1.54 kB sent in a ring\n"
        "    reduce-scatter (sum) of f32 [8, 4, 8, 128]: 131.07 kB a chip, 98.30 kB sent in a ring\n"
        "    all-reduce (sum) of f32 [8, 4, 8]: 1.02 kB a chip, 1.54 kB sent in a ring\n"
        "  collectives of a step, 32 layers: 4.26 MB a chip, 3.24 MB sent in a ring",
    ),
]


@needs_libtpu
@pytest.mark.parametrize(("options", "expected"), TALK)
def test_describe_says_what_a_step_communicates(options, expected):
    mesh = make_pod_mesh(num_kv_heads=8, model_parallelism=32, topology="v5p:8x8x8")
    text = describe_mesh(mesh, CacheSpec(8, 128, 8192, num_layers=32), num_q_heads=64, batch=128, **options)
    assert text.endswith(
        "\n  collectives of an attention call, over context 4 only, for 8 rows and 8 q heads a chip:\n" + expected
    )


def prompts_and_steps(cache, query, new, prompts, lengths, tables, *, output_heads):
    """Prompts written, then 8 steps that append and attend in each layer. Returns (cache, sum of outputs)."""

    tokens = query.shape[1] if query.ndim == 4 else 1
    attend = functools.partial(pd.sharded_paged_attention, query, output_heads=output_heads)

    def layer(cache, index):
        cache = pd.append_kv(cache, new, new, lengths - tokens, tables, layer=index)
        return cache, attend(cache, lengths, tables, layer=index)

    def step(_, carry):
        cache, total = carry
        cache, outputs = jax.lax.scan(layer, cache, jnp.arange(cache.spec.num_layers))
        return cache, total + outputs.sum(axis=0)

    cache = pd.write_prefill_kv(cache, prompts, prompts, lengths, tables, layer=0)
    heads = "model" if output_heads == "replicated" else ("model", "context")
    split = P("data", heads) if query.ndim == 3 else P("data", None, heads)
    start = jax.lax.with_sharding_constraint(jnp.zeros_like(query), NamedSharding(cache.mesh, split))
    return jax.lax.fori_loop(0, 8, step, (cache, start))


# topology, slices, what is asked of make_pod_mesh, rows a data shard, query tokens a row, output_heads
PODS = [
    ("v5e:4x4", 2, dict(num_kv_heads=4, model_parallelism=8), 8, 1, "scattered"),
    ("v5p:2x2x4", 2, dict(num_kv_heads=4, model_parallelism=8), 8, 1, "replicated"),
    ("v5p:4x4x4", 1, dict(num_kv_heads=8, model_parallelism=32), 16, 2, "scattered"),
]
SLOW_PODS = [
    ("v5p:4x4x4", 1, dict(num_kv_heads=8, model_parallelism=32), 8, 1, "scattered"),  # an all-reduce after all: 4 KiB
    ("v5p:2x2x4", 2, dict(num_kv_heads=4, model_parallelism=8), 16, 1, "scattered"),
    ("v5e:4x4", 4, dict(context=4, model=4), 8, 5, "replicated"),
    ("v4:2x2x2", 2, dict(context=2, model=2), 8, 1, "replicated"),
    ("v4:2x2x2", 2, dict(context=2, model=2), 8, 1, "scattered"),
    ("v6e:4x4", 2, dict(num_kv_heads=8, model_parallelism=16), 8, 1, "replicated"),
    ("v6e:4x4", 2, dict(num_kv_heads=8, model_parallelism=16), 8, 1, "scattered"),
    ("tpu7x:2x2x1", 2, dict(context=2, model=4), 8, 1, "replicated"),
    ("tpu7x:2x2x1", 2, dict(context=2, model=4), 8, 1, "scattered"),
]
PODS += [pytest.param(*pod, marks=pytest.mark.slow) for pod in SLOW_PODS]


@needs_libtpu
@pytest.mark.parametrize(("topology", "num_slices", "asked", "rows", "tokens", "output_heads"), PODS)
def test_compiled_attention_talks_over_context_alone_as_predicted(
    topology, num_slices, asked, rows, tokens, output_heads
):
    """On several slices too, where libtpu compiles one program a slice and what crosses DCN is a send and a receive
    (`test_a_compiled_program_tells_what_crosses_slices` sees one): attention and writes have none."""
    mesh = make_pod_mesh(**asked, topology=topology, num_slices=num_slices)
    data, context, model = mesh.shape.values()
    spec = CacheSpec(model, 128, 256 * data * context, num_layers=4)
    batch, heads, some = rows * data, 4 * model, () if tokens == 1 else (tokens,)
    array = lambda dtype, *dims, over: jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P(*over)))
    arguments = (
        pd.PagedKVCache.abstract(spec, mesh),
        array(jnp.bfloat16, batch, *some, heads, 128, over=("data", *[None] * len(some), "model")),
        array(jnp.bfloat16, batch, *some, model, 128, over=("data", *[None] * len(some), "model")),
        array(jnp.bfloat16, batch, 256, model, 128, over=("data", None, "model")),
        array(jnp.int32, batch, over=("data",)),
        array(jnp.int32, batch, 16, over=("data",)),
    )
    program = functools.partial(prompts_and_steps, output_heads=output_heads)
    text = compile_on(mesh, program, *arguments, donate_argnums=0).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 3  # the kernels: prompts, append, attend

    assert crossings(text) == []
    assert partitions(text) == mesh.devices.size // num_slices
    found = collectives(text)
    assert {frozenset(map(frozenset, one.groups)) for one in found} == {groups_along(mesh, ("context",), num_slices)}
    options = dict(num_query_tokens=tokens, output_heads=output_heads)
    predicted = attention_collectives(spec, mesh, batch, heads, **options)
    printed = lambda shape: f"f32[{','.join(map(str, shape))}]"
    if rows * tokens * heads * 128 // model // context * 4 > 4096 or output_heads == "replicated":
        expected = sorted((one.kind, tuple(map(printed, one.shapes))) for one in predicted)
        assert sorted((one.kind, one.arrays) for one in found) == expected
    assert sorted(a for one in found for a in one.arrays) == sorted(printed(s) for one in predicted for s in one.shapes)
    assert sum(one.bytes for one in found) == sum(one.bytes for one in predicted)
    assert values_as_large_as(text, spec.bytes_per_chip(mesh) // 2 // 4) == []
