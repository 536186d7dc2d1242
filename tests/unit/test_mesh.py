"""make_pod_mesh and describe_mesh: sizes, placement over the torus, and the words for both."""

import dataclasses
import itertools
import math
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import hypothesis
import jax
import numpy as np
import pytest
from aot import collectives, compile_on, needs_libtpu
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from slices import crossings, groups_along, partitions

from paged_dist.cache import CacheSpec
from paged_dist.describe import describe_mesh
from paged_dist.launch.sweeps.sub_meshes import sub_devices
from paged_dist.mesh import make_pod_mesh
from paged_dist.mesh.axes import AXIS_NAMES
from paged_dist.mesh.devices import memory_limit, place_of, slice_of
from paged_dist.mesh.facts import mesh_facts
from paged_dist.mesh.placement import place_devices, split_physical_axes
from paged_dist.mesh.sizes import infer_sizes
from paged_dist.mesh.topology import topology_devices


@dataclasses.dataclass(frozen=True)
class Chip:
    """A stand-in for a TPU device: what placement reads of one."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def chips(x, y, z, slices=1, origin=0):
    places = itertools.product(range(slices), range(z), range(y), range(x))
    return [
        Chip(i, (a + origin, b + origin, c + origin), slice_index=s, process_index=i // 4)
        for i, (s, c, b, a) in enumerate(places)
    ]


@pytest.mark.parametrize(
    ("num_devices", "asked", "shape"),
    [
        (512, {"data": 16, "context": 4, "model": 8}, (16, 4, 8)),
        (512, {}, (512, 1, 1)),
        (512, {"model": 8}, (64, 1, 8)),
        (512, {"num_kv_heads": 8, "model_parallelism": 32}, (16, 4, 8)),
        (512, {"num_kv_heads": 8, "model_parallelism": 4}, (128, 1, 4)),
        (512, {"num_kv_heads": 2, "model_parallelism": 16}, (32, 8, 2)),
        (96, {"num_kv_heads": 12, "model_parallelism": 32}, (3, 8, 4)),
        (64, {"num_kv_heads": 8, "model_parallelism": 16, "context": 4}, (4, 4, 4)),
        (64, {"num_kv_heads": 8, "model_parallelism": 16, "model": 2}, (4, 8, 2)),
        (64, {"model_parallelism": 16}, (4, 1, 16)),
        (64, {"num_kv_heads": 8, "model": 4}, (16, 1, 4)),
        (64, {"num_kv_heads": 8}, (64, 1, 1)),
        (1, {}, (1, 1, 1)),
    ],
)
def test_sizes_left_out_are_inferred(num_devices, asked, shape):
    assert infer_sizes(num_devices, **asked) == shape


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"data": 3},
            r"data=3: .*3 x 1 x 1 = 3 must be the number of devices, 8; data=8 \(or None\) works .* list of 3",
        ),
        (
            {"data": 4, "model": 4},
            r"data=4: .*4 x 1 x 4 = 16 must be the number of devices, 8; data=2 \(or None\) works",
        ),
        ({"model": 3}, "model=3: must divide the number of devices, 8; model=1, 2, 4 or 8 works"),
        ({"context": 3, "model": 2}, "context x model=6: must divide the number of devices, 8; context=4 works"),
        ({"model": 16}, "model=16: must divide the number of devices, 8; model=4 or 8 works"),
        ({"model": 16, "num_kv_heads": 32}, "model=16: must divide the number of devices, 8; model=4 or 8 works"),
        ({"model": 3, "num_kv_heads": 32}, "model=3: must divide num_kv_heads 32.*; model=1, 2, 4 or 8 works"),
        ({"data": 3, "model": 5}, "model=5: must divide the number of devices, 8; model=4, data=2 works"),
        (
            {"model": 8, "num_kv_heads": 2},
            "model=8: must divide num_kv_heads 2.*; model=2, context=4 uses as many devices",
        ),
        ({"model": 3, "model_parallelism": 8}, "model=3: must divide model_parallelism 8"),
        ({"context": 3, "model_parallelism": 8}, "context=3: must divide model_parallelism 8"),
        (
            {"context": 2, "num_kv_heads": 2, "model_parallelism": 8},
            "context=2: model 2 x context must be .*, or pass 4",
        ),
        ({"model": 0}, "model=0: must be a positive integer or None"),
        ({"data": 2.0}, r"data=2.0: must be a positive integer"),
        ({"model": True}, "model=True: must be a positive integer"),
        ({"num_slices": 0}, "num_slices=0: must be a positive integer"),
        ({"num_slices": 2}, "num_slices=2: the 8 cpu devices lie on 1 slice; pass 1 or None"),
        (
            {"model_parallelism": 6, "num_kv_heads": 2},
            "context x model=6: must divide the number of devices, 8; model_parallelism=8 works",
        ),
        (
            {"data": 2, "num_kv_heads": 2, "model_parallelism": 8},
            r"data=2: data x context x model = 2 x 4 x 2 = 16 must be .* 8; data=1 \(or None\) works with context 4",
        ),
        ({"devices": []}, r"devices=\[\]: is empty"),
        ({"devices": [0, 0]}, "1 devices are listed more than once"),
        ({"devices": [0], "topology": "v5p:2x2x1"}, "topology='v5p:2x2x1': devices are given too"),
        ({"axis_types": (AxisType.Auto,)}, "axis_types=.*: must be one AxisType, or one each"),
    ],
)
def test_a_shape_that_cannot_work_explains_itself(asked, message):
    if "devices" in asked:
        asked["devices"] = [jax.devices()[i] for i in asked["devices"]]
    with pytest.raises(ValueError, match=message):
        make_pod_mesh(**asked)


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({"model": 16}, 16),
        ({"num_kv_heads": 8, "model_parallelism": 32}, 32),
        ({"data": 3, "context": 2, "model": 2}, 12),
        ({"model": 3}, None),  # there are enough for it, but they do not divide
        ({"model": 16, "num_kv_heads": 8}, None),  # no number of devices would do
        ({"model": 2**20}, None),
    ],
)
def test_too_few_cpu_devices_say_how_more_are_simulated(asked, count):
    with pytest.raises(ValueError, match=r"devices|num_kv_heads") as e:
        make_pod_mesh(**asked)
    assert ("simulated" in str(e.value)) == (count is not None)
    if count is not None:
        assert re.findall(r"device_count=(\d+) .*jax_num_cpu_devices', (\d+)\)", str(e.value)) == [(str(count),) * 2]
        assert math.prod(infer_sizes(count, **asked)) == count
    with pytest.raises(ValueError, match=r"devices|num_kv_heads") as e:
        make_pod_mesh(**asked, devices=jax.devices())
    assert "simulated" not in str(e.value)  # the list was the caller's choice


def test_the_mesh_of_the_readme_on_a_host_with_one_cpu_device_takes_the_advice():
    script = "import jax, sys, paged_dist as pd; exec(sys.argv[1]); print(dict(pd.make_pod_mesh(model=4).shape))"
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    run = lambda call: subprocess.run(
        [sys.executable, "-P", "-c", script, call], env=environment, capture_output=True, text=True, timeout=120
    )
    alone = run("")
    assert alone.returncode == 1 and "XLA_FLAGS=--xla_force_host_platform_device_count=4" in alone.stderr, alone.stderr
    done = run(re.search(r"jax\.config\.update\(.*?\)", alone.stderr)[0])
    assert done.stdout.strip() == "{'data': 1, 'context': 1, 'model': 4}", done.stderr


SIZE = st.none() | st.integers(1, 33)


@given(
    st.sampled_from([1, 4, 8, 24, 256, 8960]),
    st.fixed_dictionaries(dict.fromkeys(("data", "context", "model", "num_kv_heads", "model_parallelism"), SIZE)),
    st.sampled_from([1, 1, 2, 4]),
)
@hypothesis.settings(derandomize=True, max_examples=100, deadline=None)
def test_whatever_sizes_are_asked_the_ones_advised_work(num_devices, asked, slices):
    if slices > 1:
        num_devices, asked = num_devices * slices, asked | {"slice_devices": num_devices}
    try:
        infer_sizes(num_devices, **asked)
    except ValueError as e:
        works = str(e).partition("; ")[2]
        if several := re.fullmatch(r"(\w+)=([\d, ]+) or (\d+) works", works):
            changes = [{several[1]: int(size)} for size in [*several[2].split(", "), several[3]]]
        elif "leave it out" in works:
            changes = [{"context": None}, {"context": int(works.split()[-1])}]
        else:
            changes = [{name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", works)}]
        for change in changes:
            assert change
            infer_sizes(num_devices, **asked | change)


def test_devices_of_several_platforms_are_refused():
    with pytest.raises(ValueError, match=r"devices=\['cpu', 'tpu'\]: are of several platforms"):
        make_pod_mesh(devices=[jax.devices()[0], Chip(0, (0, 0, 0))])


def test_cpu_devices_keep_their_order():
    mesh = make_pod_mesh(context=2, model=2)
    assert mesh.axis_names == AXIS_NAMES == ("data", "context", "model")
    assert [d.id for d in mesh.devices.flat] == list(range(8))
    assert mesh.axis_types == (AxisType.Auto,) * 3
    backwards = make_pod_mesh(model=4, devices=jax.devices()[3::-1])
    assert [d.id for d in backwards.devices.flat] == [3, 2, 1, 0]


def test_axis_types_can_be_explicit():
    assert make_pod_mesh(axis_types=AxisType.Explicit).axis_types == (AxisType.Explicit,) * 3
    mixed = (AxisType.Explicit, AxisType.Auto, AxisType.Auto)
    mesh = make_pod_mesh(model=2, axis_types=mixed)
    assert mesh.axis_types == mixed
    assert "axis types data Explicit, context Auto, model Auto" in describe_mesh(mesh)


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


@pytest.mark.parametrize(
    ("physical", "shape", "shares"),
    [
        ((8, 8, 8, 1), (16, 4, 8), [(1, 2, 8, 1), (1, 4, 1, 1), (8, 1, 1, 1)]),
        ((16, 16, 1, 1), (8, 4, 8), [(2, 4, 1, 1), (1, 4, 1, 1), (8, 1, 1, 1)]),  # not (2, 2): its steps would be of 8
        ((4, 4, 8, 1), (8, 1, 16), [(1, 1, 8, 1), (1, 1, 1, 1), (4, 4, 1, 1)]),  # a square of whole axes
        ((4, 4, 4, 2), (32, 1, 4), [(2, 4, 4, 1), (1, 1, 1, 1), (2, 1, 1, 2)]),  # the cores of a chip stay together
        (
            (4, 8, 2, 1),
            (8, 1, 8),
            [(1, 8, 1, 1), (1, 1, 1, 1), (4, 1, 2, 1)],
        ),  # two whole axes have more links than one
        ((14, 3, 1, 1), (3, 7, 2), [(1, 3, 1, 1), (7, 1, 1, 1), (2, 1, 1, 1)]),
        ((1, 1, 1, 1), (1, 1, 1), [(1, 1, 1, 1)] * 3),
    ],
)
def test_a_physical_axis_is_split_by_rule(physical, shape, shares):
    assert split_physical_axes(physical, shape) == shares


@pytest.mark.parametrize("physical", [(2, 2, 1, 1), (4, 6, 1, 1), (4, 4, 4, 2), (6, 2, 10, 1), (16, 16, 24, 1)])
def test_every_shape_of_the_right_size_can_be_laid(physical):
    total = math.prod(physical)
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    for model in divisors[::3]:
        for context in [d for d in divisors if total // model % d == 0][::3]:
            shape = (total // model // context, context, model)
            shares = split_physical_axes(physical, shape)
            assert tuple(map(math.prod, shares)) == shape
            assert tuple(map(math.prod, zip(*shares, strict=True))) == physical


def test_slices_are_split_over_data_alone():
    devices = chips(4, 4, 4, slices=2)
    placed = place_devices(devices[::-1], (32, 1, 4))
    assert placed.shape == (32, 1, 4)
    assert {d.slice_index for d in placed[:16].flat} == {0} and {d.slice_index for d in placed[16:].flat} == {1}
    with pytest.raises(ValueError, match="data=1: must be a multiple of the 2 slices, over which only data is split"):
        place_devices(devices, (1, 2, 64))


def test_placement_does_not_depend_on_the_order_of_the_devices_or_where_the_box_lies():
    rng = np.random.default_rng(0)
    devices = chips(4, 8, 1, origin=5)
    placed = place_devices(devices, (2, 2, 8))
    shuffled = place_devices([devices[i] for i in rng.permutation(len(devices))], (2, 2, 8))
    assert (placed == shuffled).all()
    assert [d.coords[1] for d in placed[0, 0]] == list(range(5, 13))


def test_devices_with_holes_are_taken_in_order_with_a_warning(caplog):
    devices = chips(4, 4, 1)
    devices = devices[:5] + devices[6:-1]
    placed = place_devices(devices, (7, 1, 2))
    assert [d.id for d in placed.flat] == [d.id for d in devices]
    assert "do not fill a box" in caplog.text


V5P_TEXT = """\
mesh: data 16 x context 4 x model 8 = 512 devices (TPU v5), 128 processes, physical x 8, y 8, z 8
  data 16: a quarter of physical axis y (2 of 8, 4 apart), all 8 of physical axis z
  context 4: half of physical axis y (4 of 8, neighbours)
  model 8: all 8 of physical axis x
  split: physical axis y between data and context"""

CPU_TEXT = """\
mesh: data 4 x context 1 x model 2 = 8 devices (cpu), 1 process, no physical coordinates
  data 4: half of the devices of a process (4 of 8, 2 apart)
  context 1: nothing is split
  model 2: a quarter of the devices of a process (2 of 8, neighbours)"""


@needs_libtpu
def test_describe_says_which_physical_axis_was_split():
    assert describe_mesh(make_pod_mesh(context=4, model=8, topology="v5p:8x8x8")) == V5P_TEXT


def test_describe_works_without_coordinates():
    assert describe_mesh(make_pod_mesh(model=2)) == CPU_TEXT


def test_describe_reads_any_mesh_not_only_its_own():
    devices = np.array(jax.devices())[[0, 3, 5, 6, 1, 2, 4, 7]].reshape(2, 4)
    facts = mesh_facts(Mesh(devices, ("rows", "columns")))
    assert [a.name for a in facts.axes] == ["rows", "columns"]
    assert not facts.axes[1].runs[0].regular and "unevenly" in describe_mesh(Mesh(devices, ("rows", "columns")))


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A stand-in for a GPU. It has no other attribute: no core, no memory that it tells."""

    id: int
    coords: tuple[int, ...]
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "NVIDIA H200"


@dataclasses.dataclass(frozen=True)
class Bare:
    """A stand-in for a device of a back end that tells the least."""

    id: int
    process_index: int = 0
    platform: str = "npu"
    device_kind: str = "NPU"


@dataclasses.dataclass(frozen=True)
class Coreless:
    """A stand-in for a TPU device that tells its coordinates alone."""

    id: int
    coords: tuple[int, int, int]
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


@pytest.mark.parametrize(
    "devices",
    [
        [Gpu(i, (i % 4,), process_index=i // 4) for i in range(8)],
        [Gpu(i, (0, 0, i % 4), process_index=i // 4) for i in range(8)],
        [Gpu(i, (0, 0, 0), process_index=i // 4) for i in range(8)],
        [Bare(i, process_index=i // 4) for i in range(8)],
    ],
    ids=["one coordinate", "three", "all alike", "none"],
)
def test_devices_that_are_on_no_torus_are_taken_and_described_by_process(devices):
    assert [place_of(d) for d in devices] == [None] * 8
    assert {slice_of(d) for d in devices} == {0} and memory_limit(devices[0]) == math.inf
    placed = place_devices(devices, (2, 1, 4))
    assert placed.flatten().tolist() == devices
    assert describe_mesh(Mesh(placed, AXIS_NAMES)) == (
        f"mesh: data 2 x context 1 x model 4 = 8 devices ({devices[0].device_kind}), 2 processes, no physical "
        "coordinates\n"
        "  data 2: all 2 processes\n"
        "  context 1: nothing is split\n"
        "  model 4: all 4 devices of a process"
    )
    assert mesh_facts(Mesh(placed, AXIS_NAMES)).num_slices == 1
    assert sub_devices(devices, 2) == devices[:2] and sub_devices(devices, 8) == devices
    mesh = make_pod_mesh(devices=devices, context=2, model=2)
    assert mesh.devices.flatten().tolist() == devices
    text = describe_mesh(mesh, CacheSpec(4, 128, 64), num_q_heads=8, batch=4)
    assert "16 a device: 2.10 MB a device" in text and "over context 2 only" in text


def test_slices_of_devices_that_are_on_no_torus_are_counted():
    class Host(Gpu):
        slice_index = property(lambda self: self.process_index)

    placed = place_devices([Host(i, (i % 4,), process_index=i // 4) for i in range(8)], (2, 1, 4))
    assert mesh_facts(Mesh(placed, AXIS_NAMES)).num_slices == 2
    assert "2 processes, 2 slices, no physical coordinates" in describe_mesh(Mesh(placed, AXIS_NAMES))


@pytest.mark.parametrize("shape", [(4, 1, 4), (1, 1, 16), (2, 4, 2)])
def test_tpus_that_do_not_tell_their_core_are_placed_like_those_that_do(shape):
    told = place_devices(chips(4, 4, 1), shape)
    placed = place_devices([Coreless(d.id, d.coords, d.process_index) for d in chips(4, 4, 1)], shape)
    assert sorted(d.id for d in placed.flat) == list(range(16))
    if max(shape) < 16:  # else jax's own placement knows the rings of some kinds
        assert [d.id for d in placed.flat] == [d.id for d in told.flat]
    assert "physical x 4, y 4" in describe_mesh(Mesh(placed, AXIS_NAMES))
    assert len(sub_devices(list(placed.flat), 4)) == 4


@pytest.mark.parametrize(
    ("stats", "limit"),
    [
        (lambda: None, math.inf),
        (dict, math.inf),
        (lambda: {"bytes_limit": 0}, math.inf),
        (lambda: {"bytes_limit": 5 * 2**30}, 5 * 2**30),
        (lambda: jax.errors.JaxRuntimeError("UNIMPLEMENTED"), math.inf),
        (NotImplementedError, math.inf),
    ],
)
def test_memory_that_a_device_does_not_tell_has_no_limit(stats, limit):
    def memory_stats():
        if isinstance(told := stats(), Exception):
            raise told
        return told

    assert memory_limit(SimpleNamespace(memory_stats=memory_stats)) == limit


def test_what_not_every_device_tells_is_asked_in_one_place_alone():
    tree = pathlib.Path(__file__).parents[2]
    files = [
        file for folder in ("paged_dist", "kernels", "launch", "examples") for file in (tree / folder).rglob("*.py")
    ]
    asked = r"\.(coords|core_on_chip|slice_index|local_hardware_id|memory_stats|num_cores)\b(?!=)"
    device = r"\b(d|device|devices\[\d+\]|\w+\.flat\[\w+\])"
    found = {
        file.name
        for file in files
        if re.search(device + asked, file.read_text()) or '"slice_index"' in file.read_text()
    }
    assert found == {"devices.py"}


def test_an_abstract_mesh_has_nothing_to_describe():
    with pytest.raises(ValueError, match="is abstract"):
        describe_mesh(make_pod_mesh().abstract_mesh)


def test_facts_of_several_slices_say_so():
    class Fake:
        """What `mesh_facts` reads of a mesh: jax builds none of stand-in devices."""

        devices = place_devices(chips(4, 4, 2, slices=2), (8, 1, 8))
        shape = {"data": 8, "context": 1, "model": 8}  # noqa: RUF012
        axis_names = AXIS_NAMES
        axis_types = (AxisType.Auto,) * 3

    facts = mesh_facts(Fake)
    assert facts.num_slices == 2 and facts.fills_box and facts.num_processes == 16
    assert [(r.physical, r.count) for r in facts.axes[0].runs] == [("slice", 2), ("y", 4)]
    assert [(r.physical, r.count) for r in facts.axes[2].runs] == [("x", 4), ("z", 2)]
    assert "2 slices" in describe_mesh(Fake) and "all 2 slices (across the data-centre network)" in describe_mesh(Fake)


@pytest.mark.parametrize(
    ("devices", "shape", "message"),
    [
        (
            chips(4, 4, 4, slices=2),
            (1, 16, 8),
            "data=1: must be a multiple of the 2 slices.*; context x model 128 must divide a slice's 64 devices: "
            "the nearest divisors of 64 are 32, 64",
        ),
        (chips(3, 1, 1, slices=2), (3, 1, 2), "data=3: .* 2 must divide a slice's 3 devices: .* of 3 are 1, 3"),
        (
            [d for d in chips(4, 2, 1, slices=2) if d.id < 12],  # 8 and 4
            (2, 1, 6),
            "context x model=6: must divide the devices of each slice, 8, 4, .* the nearest divisors of 4 are 2, 4",
        ),
    ],
)
def test_context_and_model_that_do_not_fit_into_a_slice_are_refused(devices, shape, message):
    with pytest.raises(ValueError, match=message):
        place_devices(devices, shape)


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_every_context_and_model_lies_on_one_slice(slices):
    devices = chips(4, 2, 2, slices=slices)
    for context, model in itertools.product((1, 2, 4), (1, 2, 4)):
        placed = place_devices(devices, (16 * slices // context // model, context, model))
        assert all(len({d.slice_index for d in row.flat}) == 1 for row in placed)


def test_slices_of_unequal_size_still_keep_context_and_model_inside(caplog):
    devices = [d for d in chips(4, 2, 1, slices=2) if d.id < 12]  # 8 and 4
    placed = place_devices(devices, (6, 1, 2))
    assert all(len({d.slice_index for d in row.flat}) == 1 for row in placed)
    assert "do not fill a box on each slice alike" in caplog.text


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
