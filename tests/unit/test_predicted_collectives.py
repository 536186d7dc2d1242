"""What attention communicates, predicted from shapes and told by describe_mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

from paged_dist.cache import CacheSpec
from paged_dist.describe import describe_mesh
from paged_dist.mesh import MeshAxes, make_pod_mesh
from paged_dist.mesh.axes import AXIS_NAMES
from paged_dist.ops.collectives import attention_collectives


def test_describe_of_a_mesh_without_context_has_no_collectives():
    text = describe_mesh(make_pod_mesh(model=2), CacheSpec(2, 128, 64), num_q_heads=8, batch=16)
    assert text.splitlines()[-1] == "  collectives of an attention call: none, for context is 1"
    assert "1 kv head a device" in text


def test_describe_knows_axes_by_other_names_and_those_that_store_copies():
    devices = np.array(jax.devices()).reshape(2, 2, 2)
    mesh = Mesh(devices, ("replica", "seq", "tensor"))
    axes = MeshAxes(data=None, context="seq", model="tensor")
    text = describe_mesh(mesh, CacheSpec(2, 128, 64), num_q_heads=8, batch=3, axes=axes)
    assert "1 kv head a device, K and V are stored 2 times, for replica splits nothing of them" in text
    assert "over seq 2 only, for 3 rows and 4 q heads a device" in text


def test_collectives_follow_from_shapes_alone():
    mesh = AbstractMesh((2, 4, 8), AXIS_NAMES)
    spec = CacheSpec(8, 256, 64)
    top, total = attention_collectives(spec, mesh, 6, 32)
    assert (top.kind, top.reduction, top.axes, top.group, top.shapes) == (
        "all-reduce",
        "max",
        ("context",),
        4,
        ((3, 4),),
    )
    assert (total.kind, total.shapes, total.bytes) == ("all-reduce", ((3, 4, 256), (3, 4)), 4 * 3 * 4 * 257)
    assert total.bytes_sent == 2 * total.bytes * 3 // 4
    _, scattered, weights = attention_collectives(spec, mesh, 6, 32, output_heads="scattered")
    assert (scattered.kind, weights.kind) == ("reduce-scatter", "all-reduce")
    assert scattered.bytes + weights.bytes == total.bytes
    assert scattered.bytes_sent == scattered.bytes * 3 // 4
    assert attention_collectives(spec, AbstractMesh((8, 1, 8), AXIS_NAMES), 8, 32) == ()


@pytest.mark.parametrize(
    ("spec", "more", "message"),
    [
        (CacheSpec(8, 128, 60), {}, "num_pages=60: .* data x context size 2 x 4; 64 works"),
        (CacheSpec(8, 128, 60, dtype="int8"), {}, "num_pages=60: .* data x context size 2 x 4; 64 works"),
        (CacheSpec(8, 128, 72, dtype="int8"), {}, "num_pages=72: .*; 128 works"),
        (
            CacheSpec(2, 128, 64),
            {},
            r"num_kv_heads=2: must be a multiple of the mesh's model size 8.*; "
            r"make_pod_mesh\(num_kv_heads=2, model_parallelism=32\) gives",
        ),
        (CacheSpec(8, 128, 64), dict(batch=3), "batch=3: must be a multiple of the mesh's data size 2; 4 works"),
        (CacheSpec(8, 128, 64), dict(num_q_heads=36), "num_q_heads=36: .* the cache's 8 kv heads; 40 works"),
        (CacheSpec(8, 128, 64), dict(batch=0), "batch=0: must be a whole number, at least 1"),
        (
            CacheSpec(8, 128, 64),
            dict(num_q_heads=16, output_heads="scattered"),
            "output_heads='scattered': the 2 query heads of a model shard must be a multiple of the 4 context shards; "
            "'replicated' takes any",
        ),
        (CacheSpec(8, 128, 64), dict(num_query_tokens=17), "num_query_tokens=17: must be at most 16"),
        (CacheSpec(8, 128, 64), dict(output_heads="split"), "output_heads='split': must be one of"),
        (CacheSpec(8, 128, 64), dict(axes=MeshAxes(context="seq")), "axes.context='seq': the mesh has axes"),
    ],
)
def test_a_cache_or_batch_that_does_not_divide_says_what_would(spec, more, message):
    with pytest.raises(ValueError, match=message):
        attention_collectives(spec, AbstractMesh((2, 4, 8), AXIS_NAMES), **(dict(batch=4, num_q_heads=32) | more))


def test_describe_wants_all_that_the_collectives_follow_from():
    for more in (dict(num_q_heads=8), dict(batch=8), dict(batch=8, num_q_heads=8)):
        with pytest.raises(ValueError, match=r"num_q_heads, batch, spec=.*: the collectives of attention follow from"):
            describe_mesh(make_pod_mesh(model=2), **more)
