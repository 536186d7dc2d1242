"""The decoder layers of examples/ compiled for absent pods."""

from __future__ import annotations

import aot
import jax
import jax.numpy as jnp
import pytest
from aot import needs_libtpu
from example_layers import BOTH_EXAMPLES
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from slices import crossings, groups_along, partitions

import paged_dist as pd
from paged_dist.ops.collectives import attention_collectives


@needs_libtpu
@BOTH_EXAMPLES
@pytest.mark.parametrize(
    ("topology", "num_slices"),
    [("v5p:4x4x4", 1), ("v5e:4x8", 2), pytest.param("tpu7x:4x4x2", 2, marks=pytest.mark.slow)],
)
def test_a_pods_program_of_the_layers_talks_where_it_should_and_copies_no_pool(layers, topology, num_slices):
    """Attention over context only, one sum over (model, context) for each of wo and w_down, and nothing else."""
    mesh = pd.make_pod_mesh(num_kv_heads=8, model_parallelism=32, topology=topology, num_slices=num_slices)
    config = layers.module.Config(width=1024, num_q_heads=64, num_kv_heads=8, hidden=4096, num_layers=4)
    spec = pd.CacheSpec(8, 128, 256 * mesh.shape["data"] * mesh.shape["context"], num_layers=4)
    rows, place = 16, lambda *axes: NamedSharding(mesh, P(*axes))
    batch = rows * mesh.shape["data"]
    step, weights = layers.abstract_step(config, mesh)
    compiled = aot.compile_on(
        mesh,
        step,
        *weights,
        jax.ShapeDtypeStruct((batch, config.width), jnp.bfloat16, sharding=place("data", None)),
        pd.PagedKVCache.abstract(spec, mesh),
        *(jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=place("data")) for _ in ("positions", "lengths")),
        jax.ShapeDtypeStruct((batch, 32), jnp.int32, sharding=place("data", None)),
        donate_argnames="cache",
    )
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text.count('custom_call_target="tpu_custom_call"') == 2  # append and attend, for all layers
    assert partitions(text) == mesh.size // num_slices and crossings(text) == []

    groups = lambda one: frozenset(map(frozenset, one.groups))
    over = {names: groups_along(mesh, names, num_slices) for names in (("context",), ("model", "context"))}
    found = aot.collectives(text)
    attention = [one for one in found if groups(one) == over["context",]]
    projections = [one for one in found if groups(one) == over["model", "context"]]
    assert len(attention) + len(projections) == len(found)
    assert [(one.kind, one.arrays) for one in projections] == [("all-reduce", (f"bf16[{rows},{config.width}]",))] * 2
    predicted = attention_collectives(spec, mesh, batch, config.num_q_heads, output_heads="scattered")
    assert sorted(one.kind for one in attention) == sorted(one.kind for one in predicted)
    assert sum(one.bytes for one in attention) == sum(one.bytes for one in predicted)

    layer_pool = spec.bytes_per_chip(mesh) // 2 // 4
    assert aot.values_as_large_as(text, layer_pool) == []
    assert memory.temp_size_in_bytes < layer_pool
    assert memory.alias_size_in_bytes >= spec.bytes_per_chip(mesh)
