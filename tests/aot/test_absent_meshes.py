"""Meshes over absent pods: where model and context run on the torus, how slices are split, what crosses them."""

import math

import jax
import numpy as np
import pytest
from aot import collectives, compile_on, needs_libtpu
from jax.sharding import NamedSharding, PartitionSpec
from slices import crossings, groups_along, partitions

from paged_dist.describe import describe_mesh, mesh_facts
from paged_dist.mesh import make_pod_mesh
from paged_dist.mesh.axes import AXIS_NAMES
from paged_dist.mesh.topology import topology_devices

POD_SHAPES = [
    # topology, sizes asked for, shape, the physical axes of model, those of context
    ("v5p:8x8x8", {"data": 16, "context": 4, "model": 8}, (16, 4, 8), {"x": 8}, {"y": 4}),
    ("v5p:16x16x24", {"model": 8}, (768, 1, 8), {"x": 8}, {}),
    ("v5p:16x16x24", {"num_kv_heads": 8, "model_parallelism": 32}, (192, 4, 8), {"x": 8}, {"y": 4}),
    ("v5p:16x16x24", {"context": 3, "model": 8}, (256, 3, 8), {"x": 8}, {"y": 1, "z": 3}),
    ("v5e:16x16", {"model": 8}, (32, 1, 8), {"x": 8}, {}),
    ("v5e:16x16", {"context": 4, "model": 8}, (8, 4, 8), {"x": 8}, {"y": 4}),
    ("v6e:16x16", {"context": 4, "model": 16}, (4, 4, 16), {"x": 16}, {"y": 4}),
    ("v4:4x4x4", {"model": 8}, (8, 1, 8), {"x": 4, "y": 2}, {}),
    ("v4:4x4x8", {"context": 4, "model": 8}, (4, 4, 8), {"z": 8}, {"x": 4}),
    ("tpu7x:4x4x4", {"model": 8}, (16, 1, 8), {"x": 4, "core": 2}, {}),
    ("tpu7x:4x4x4", {"context": 2, "model": 4}, (16, 2, 4), {"x": 2, "core": 2}, {"y": 2}),
    ("v5e:2x2", {"model": 2}, (2, 1, 2), {"x": 2}, {}),
    ("v5e:4x4", {"model": 16}, (1, 1, 16), {"x": 4, "y": 4}, {}),
]


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "asked", "shape", "model_runs", "context_runs"),
    POD_SHAPES,
    ids=[f"{t}-{'x'.join(map(str, s))}" for t, _, s, *_ in POD_SHAPES],
)
def test_model_then_context_run_over_neighbours_of_an_absent_pod(topology, asked, shape, model_runs, context_runs):
    mesh = make_pod_mesh(**asked, topology=topology)
    facts = mesh_facts(mesh)
    assert tuple(mesh.shape.values()) == shape
    assert len(set(mesh.devices.flat)) == len(topology_devices(topology))
    _, context, model = facts.axes
    assert {r.physical: r.count for r in model.runs} == model_runs
    assert {r.physical: r.count for r in context.runs} == {k: v for k, v in context_runs.items() if v > 1}
    assert all(r.stride == 1 and r.regular for axis in (context, model) for r in axis.runs)
    for axis in facts.axes:
        assert math.prod(r.count for r in axis.runs) == axis.size
    # Every position along model is a step of one chip or one core, but where it turns into the next physical axis.
    line = np.array([(*d.coords, d.core_on_chip) for d in mesh.devices[0, 0]])
    steps = np.abs(np.diff(line, axis=0)).sum(axis=1)
    assert (steps == 1).mean() >= 0.5


@needs_libtpu
def test_a_program_for_512_absent_chips_puts_its_collective_on_model_alone():
    mesh = make_pod_mesh(context=4, model=8, topology="v5p:8x8x8")
    x = jax.ShapeDtypeStruct((16, 1024), np.float32, sharding=NamedSharding(mesh, PartitionSpec("data", "model")))
    text = compile_on(
        mesh,
        jax.shard_map(
            lambda x: jax.lax.psum(x, "model"),
            mesh=mesh,
            in_specs=PartitionSpec("data", "model"),
            out_specs=PartitionSpec("data"),
        ),
        x,
    ).as_text()
    (one,) = collectives(text)
    assert one.kind == "all-reduce" and set(map(frozenset, one.groups)) == groups_along(mesh, ("model",))


V5P_TEXT = """\
mesh: data 16 x context 4 x model 8 = 512 devices (TPU v5), 128 processes, physical x 8, y 8, z 8
  data 16: a quarter of physical axis y (2 of 8, 4 apart), all 8 of physical axis z
  context 4: half of physical axis y (4 of 8, neighbours)
  model 8: all 8 of physical axis x
  split: physical axis y between data and context"""


@needs_libtpu
def test_describe_says_which_physical_axis_was_split():
    assert describe_mesh(make_pod_mesh(context=4, model=8, topology="v5p:8x8x8")) == V5P_TEXT


SLICES = [
    ("v5e:4x4", 2, {"num_kv_heads": 4, "model_parallelism": 8}, (4, 2, 4)),
    ("v5p:2x2x4", 4, {"model": 8, "context": 2}, (4, 2, 8)),
    ("v4:2x2x2", 2, {"model": 2, "context": 2}, (4, 2, 2)),
    ("v6e:4x4", 2, {"num_kv_heads": 8, "model_parallelism": 16}, (2, 2, 8)),
    ("tpu7x:2x2x1", 2, {"model": 4, "context": 2}, (2, 2, 4)),
]


@needs_libtpu
@pytest.mark.parametrize(("topology", "num_slices", "asked", "shape"), SLICES, ids=[f"{s[0]}-x{s[1]}" for s in SLICES])
def test_slices_of_an_absent_pod_are_split_over_data_alone(topology, num_slices, asked, shape):
    mesh = make_pod_mesh(**asked, topology=topology, num_slices=num_slices)
    assert tuple(mesh.shape.values()) == shape
    assert mesh == make_pod_mesh(**asked, topology=topology, num_slices=num_slices)  # the same devices, not new ones
    of = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    assert (of == np.repeat(np.arange(num_slices), shape[0] // num_slices)[:, None, None]).all()
    facts = mesh_facts(mesh)
    assert facts.num_slices == num_slices and "slice" not in {r.physical for a in facts.axes[1:] for r in a.runs}
    assert f"all {num_slices} slices (across the data-centre network)" in describe_mesh(mesh)
    with pytest.raises(ValueError, match=f"num_slices=3: the .* tpu devices lie on {num_slices} slices; pass"):
        make_pod_mesh(**asked, devices=list(mesh.devices.flat), num_slices=3)


@needs_libtpu
@pytest.mark.parametrize("axis", AXIS_NAMES)
def test_a_compiled_program_tells_what_crosses_slices(axis):
    """What the proof for attention rests on: a sum over data does cross, and is seen; one inside a slice does not."""
    mesh = make_pod_mesh(context=2, model=4, topology="v5e:4x4", num_slices=2)
    split = PartitionSpec(AXIS_NAMES)
    x = jax.ShapeDtypeStruct((64, 1024), np.float32, sharding=NamedSharding(mesh, split))
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, axis),
        mesh=mesh,
        in_specs=split,
        out_specs=PartitionSpec(tuple(name for name in AXIS_NAMES if name != axis)),
    )
    text = compile_on(mesh, total, x).as_text()
    assert partitions(text) == 16  # libtpu compiles one program a slice
    assert bool(crossings(text)) == (axis == "data")
    along = groups_along(mesh, (axis,), num_slices=2)
    assert {frozenset(map(frozenset, one.groups)) for one in collectives(text)} == {along}
    assert {len(group) for group in along} == {2 if axis == "data" else mesh.shape[axis]}
