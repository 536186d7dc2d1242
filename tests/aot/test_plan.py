"""`plan`: what it reads from a compiled step, what it says of a pod, what it refuses and with what advice."""

import contextlib
import dataclasses
import functools
import json
import math
import re
import subprocess
import sys

import flagsaver
import hypothesis
import jax
import jax.numpy as jnp
import pytest
from aot import compile_on, needs_libtpu
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from paged_dist import CacheSpec, OutOfPages, PageAllocator, make_pod_mesh
from paged_dist.launch import plan
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common import slices
from paged_dist.launch.common.chips import V5E, V5P, V6E, V7X
from paged_dist.launch.common.slices import chip_of_topology
from paged_dist.launch.planning import (
    absent_chips,
    fitting,
    hlo_text,
    plan_text,
    pod_step,
    sizing,
    step_facts,
    step_floor,
)
from paged_dist.launch.planning.plan_record import plan_record
from paged_dist.launch.serving.workload import draw_requests, sequences_on_shards
from paged_dist.mesh.axes import AXIS_NAMES
from paged_dist.ops.collectives import attention_collectives

HLO = """
%adds (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%called (param.9: f32[4,8]) -> f32[4,8] {
  %param.9 = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.9 = f32[4,8]{1,0:T(8,128)} all-reduce(%param.9), replica_groups={{0,2},{1,3}}, to_apply=%adds
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0:T(8,128)}) parameter(0)
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %inside.1 = f32[4,8]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%adds
  %start.1 = ((f32[4,8]), f32[4,8]) call-start(%x), async_execution_thread="sparsecore", to_apply=%called
  %tok = token[] after-all()
  %send.1 = (f32[4,8], u32[], token[]) send(%inside.1, %tok), channel_id=7
  ROOT %out = (s32[], f32[4,8]) tuple(%i, %inside.1)
}

%enough (p.2: (s32[], f32[4,8])) -> pred[] {
  ROOT %lt = pred[] compare(%a.2, %b.2), direction=LT
}

ENTRY %main (q: f32[4,8]) -> f32[4,8] {
  %q = f32[4,8]{1,0:T(8,128)} parameter(0)
  %once = f32[4,8]{1,0:T(8,128)} all-reduce(%q), replica_groups={{0,1,2,3}}, to_apply=%adds
  %while.1 = (s32[], f32[4,8]) while(%t), condition=%enough, body=%body
  ROOT %out.2 = f32[4,8]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
"""


def test_what_stands_in_a_loop_is_told_from_what_does_not():
    assert {c.groups: c.loops for c in hlo_text.collectives(HLO)} == {
        ((0, 2), (1, 3)): 1,  # in a computation that the loop's body calls
        ((0, 1), (2, 3)): 1,
        ((0, 1, 2, 3),): 0,
    }
    (sent,) = hlo_text.sends(HLO)
    assert sent == (("f32[4,8]",), 128, 1)


@needs_libtpu
def test_a_sum_over_slices_is_seen_as_what_is_sent_over_dcn():
    mesh = make_pod_mesh(model=4, topology="v5p:2x2x2", num_slices=2)
    at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    x = jax.ShapeDtypeStruct((8, 4096), jnp.float32, sharding=at("data", "model"))
    text = compile_on(mesh, lambda x: x.sum(0), x, out_shardings=at("model")).as_text()
    (sent,) = hlo_text.sends(text)
    assert sent.bytes == 4096 and sent.loops == 0


# What is written, and what it means; or, in brackets, what is advised instead.
TOPOLOGIES = [
    ("v6e:1x1", "v6e:1x1"),
    ("v5e:1x1", "v5e:1x1"),
    ("tpu7x:1x1x1", "tpu7x:1x1x1"),
    ("v5p:12x24x24", "v5p:12x24x24"),
    ("tpu7x:4x4x64", "tpu7x:4x4x64"),
    ("v5p:4x4x560", "v5p:4x4x560"),
    ("tpu7x:16x24x24", "tpu7x:16x24x24"),
    ("v5p:28x16x20", "v5p:28x16x20"),  # axes in any order
    ("v5e:8x4", "v5e:8x4"),
    ("v5p-4x4x8", "v5p:4x4x8"),
    # Accelerator types: TensorCores of v4, v5p and tpu7x, chips of v5e and v6e. Shapes as on Google's pages.
    ("v6e-16", "v6e:4x4"),
    ("v6e-1", "v6e:1x1"),
    ("v5litepod-16", "v5e:4x4"),
    ("v5e-128", "v5e:8x16"),
    ("v5p-8", "v5p:2x2x1"),
    ("v5p-128", "v5p:4x4x4"),
    ("v5p-1536", "v5p:8x8x12"),
    ("v5p-3072", "v5p:8x12x16"),
    ("v5p-10368", "v5p:12x12x36"),
    ("v5p-13824", "v5p:12x24x24"),
    ("v4-32", "v4:2x2x4"),
    ("v4-1536", "v4:8x8x12"),
    ("tpu7x-2", "tpu7x:1x1x1"),
    ("tpu7x-256", "tpu7x:4x4x8"),
    # Nobody can book these, whatever libtpu compiles.
    ("v5p:16x20x32", ["v5p:16x20x28"]),
    ("v5p:8x8x7", ["v5p:8x8x8"]),
    ("v5p:3x3x3", ["v5p:4x4x4"]),
    ("v5p:3x4x4", ["v5p:4x4x4"]),
    ("v5p:1x1x1", ["v5p:2x2x1"]),
    ("v5p:1x2x2", ["v5p:2x2x1"]),  # the host's chips lie in the first two axes
    ("v5p:0x2x2", ["v5p:2x2x1"]),
    ("v5p:8x8", ["v5p:4x4x4"]),  # as many chips
    ("v6e:2x2x2", ["v6e:2x4"]),
    ("v5e:6x6", ["v5e:8x8"]),
    ("v5e:32x16", ["v5e:16x16"]),
    ("v5p-100", ["v5p-64", "v5p:2x4x4", "v5p-128", "v5p:4x4x4"]),
    ("v6e-512", ["v6e-256", "v6e:16x16"]),
    ("v5p-1", ["v5p-8"]),
    ("v7x:4x4x4", ["tpu7x"]),
    ("ironwood-8", ["tpu7x"]),
    ("v9:2x2", ["v4", "v5e"]),
    ("v5p", ["v5p:8x8x8", "v6e:16x16", "v5p-1024", "v6e-256"]),
    ("v5p:4x4x4x", ["v5p:8x8x8"]),
]


@pytest.mark.parametrize(("written", "means"), TOPOLOGIES)
def test_a_slice_is_one_that_can_be_booked_or_refused_with_the_nearest(written, means):
    if isinstance(means, str):
        assert slices.bookable_slice(written).topology == means
        return
    with pytest.raises(ValueError, match="--topology=") as e:
        slices.bookable_slice(written)
    works = str(e.value).split("; ")[1]
    for name in means:
        assert name in works
    for name in re.findall(r"\S+[:-]\d[\dx]*", works):
        slices.bookable_slice(name)  # what is advised can be booked


@given(
    st.sampled_from(sorted(slices.CHIP_OF_GENERATION)),
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
    st.booleans(),
)
@hypothesis.settings(derandomize=True, max_examples=100, deadline=None)
def test_whatever_slice_is_asked_the_one_advised_is_taken(generation, dims, by_count):
    name = f"{generation}-{dims[0] * 37}" if by_count else f"{generation}:{'x'.join(map(str, dims))}"
    try:
        found = slices.bookable_slice(name)
    except ValueError as e:
        advised = re.findall(r"\S+[:-]\d[\dx]*", str(e).split("; ")[1])
        assert advised
        for other in advised:
            assert tuple(
                map(int, slices.bookable_slice(other).topology.split(":")[1].split("x"))
            ) in slices.slices_sold(generation)
    else:
        dims = sorted(int(n) for n in found.topology.split(":")[1].split("x"))
        assert dims in map(sorted, slices.slices_sold(generation))


@needs_libtpu
@pytest.mark.parametrize("topology", sorted({m for _, m in TOPOLOGIES if isinstance(m, str)}))
def test_a_slice_that_is_taken_is_one_that_libtpu_knows(topology):
    count = math.prod(int(n) for n in topology.split(":")[1].split("x"))
    assert make_pod_mesh(topology=topology).devices.size == count * chip_of_topology(topology).devices


def settings(*arguments, topology="v5p:4x4x4"):
    """The settings of a command line; the flags are as before afterwards."""
    with flagsaver.flagsaver():
        flags.FLAGS(["plan", f"--topology={topology}", *arguments])
        return plan.plan_settings()


def sizes(s, shape=(4, 4, 4), chip=V5P):
    return sizing.sizes_of(s, AbstractMesh(shape, AXIS_NAMES), chip)


def test_the_cache_fills_what_weights_and_the_program_leave():
    s = settings("--num_kv_heads=8", "--num_q_heads=64", "--layers=10", "--width=8192", "--hbm_gib=20")
    found = sizes(s)
    weights = 2 * 10 * 8192 * ((64 + 8 + 8) // 4 + 64 // 16) * 128  # the output's over context too
    assert found.weights_bytes == weights
    a_page = 2 * 10 * 2 * 128 * 128 * 2  # K and V, layers, 2 heads of 8, tokens, channels, bytes
    pages = (int(20 * 2**30 * 0.98) - weights) // a_page
    assert found.spec.num_pages == pages * 16
    assert found.spec.bytes_per_chip(AbstractMesh((4, 4, 4), AXIS_NAMES)) == pages * a_page


def test_an_output_projection_whose_heads_do_not_divide_over_context_is_whole_on_its_shards():
    s = settings("--num_kv_heads=4", "--num_q_heads=8", "--width=256", "--kv_dtype=f32")
    one = 4 * s.num_layers * 256 * 128  # a head of a projection
    for shape, whole in (((1, 2, 4), 8 // 8), ((1, 4, 4), 8 // 4)):
        assert sizes(s, shape).weights_bytes == one * ((8 + 4 + 4) // 4 + whole)


def test_sequences_of_the_context_that_was_asked_are_counted():
    s = settings("--context_tokens=1000000", "--layers=80", "--num_kv_heads=8", "--num_q_heads=64")
    assert sizes(s).batch == 4 * 4  # as many as there is room for, where no --batch says how many
    assert (s.requests, sizes(s).context_tokens, sizes(s).pages_per_sequence) == ((), 1000000, 7813)
    assert settings("--context_tokens=1000000", "--num_requests=5").requests == tuple(draw_requests(5))


def test_an_8_bit_cache_is_filled_in_whole_tiles_of_scales():
    found = sizes(settings("--kv_dtype=int8", "--page_size=64", "--hbm_gib=1"))
    assert found.spec.num_pages % (16 * 16) == 0
    found.spec.check_mesh(AbstractMesh((4, 4, 4), AXIS_NAMES))


REFUSED = [
    (["--num_pages=100000000"], "--num_pages=100000000: a cache of", "--num_pages=12297856 fits"),
    (["--num_pages=33"], "must be a multiple of the mesh's data x context size 4 x 4", "--num_pages=48 fits"),
    (["--num_pages=33", "--batch=64"], "data x context size 4 x 4", "--num_pages=48 --batch=4 fit"),
    (["--num_pages=3000000000", "--layers=1"], "page ids are int32", "--num_pages=24595712 fits"),
    (["--kv_dtype=int8", "--num_pages=1000"], "with 8 pages on each, whose scales", "--num_pages=1024 fits"),
    (["--batch=6"], "--batch=6: must be a multiple of the mesh's data size 4", "--batch=8 fits"),
    (["--batch=6000001"], "must be a multiple of the mesh's data size 4", "--batch=1024820 fits"),
    (["--num_pages=160", "--batch=64", "--context_tokens=1000"], "--batch=64: 16 rows of 1000", "--batch=20 fits"),
    (["--width=65536", "--layers=1200"], "--width=65536: 131.25 GiB of weights", "--layers=856 fits"),
    (
        ["--layers=90000", "--num_kv_heads=32", "--num_q_heads=32"],
        "1 row of 1434 tokens",
        "--context_tokens=1024 fit",
    ),
    (
        ["--layers=9000000"],
        "--layers=9000000: the program leaves no room for a page of 9000000",
        "--layers=512410 fits",
    ),
    (["--pages_per_sequence=2"], "--context_tokens=1434: a row's 2 pages hold 256", "--pages_per_sequence=12 fits"),
    (["--context_tokens=9000", "--pages_per_sequence=4"], "hold 512", "--pages_per_sequence=71 fits"),
    (["--num_q_heads=6", "--num_kv_heads=2"], "--num_q_heads=6: must be a multiple of model 4", ""),
]


@functools.cache
def as_by_default():
    return settings()


def advised(error):
    """The settings that an error's advice changes."""
    found = re.findall(r"--(\w+)=([\d.]+)", str(error).partition("; ")[2])
    return {"num_layers" if name == "layers" else name: json.loads(value) for name, value in found}


@pytest.mark.parametrize(("arguments", "rule", "works"), REFUSED)
def test_what_does_not_fit_is_refused_by_its_limit_with_what_does(arguments, rule, works):
    s = settings(*arguments)
    with pytest.raises(ValueError) as e:
        sizes(s)
    assert rule in str(e.value) and works in str(e.value)
    if advised(e.value):
        sizes(dataclasses.replace(s, **advised(e.value)))


a_number = lambda largest: st.none() | st.integers(1, 6) | st.integers(1, largest)
ANY = st.fixed_dictionaries(
    {
        "batch": a_number(10**7),
        "num_pages": a_number(10**10),
        "pages_per_sequence": a_number(10**5),
        "context_tokens": a_number(10**10),
        "num_layers": st.integers(1, 200) | st.integers(1, 10**7),
        "width": st.sampled_from([0, 0, 256, 8192, 10**6]),
        "mlp_width": st.sampled_from([0, 0, 1000, 10**7]),
        "page_size": st.sampled_from([8, 64, 128, 256]),
        "dtype": st.sampled_from(["bfloat16", "float32", "int8", "float8_e4m3fn"]),
        "num_kv_heads": st.sampled_from([4, 8, 32]),
        "num_q_heads": st.sampled_from([32, 64, 96]),
        "hbm_gib": st.none() | st.sampled_from([0.01, 1.0, 15.0]),
        "times": st.sampled_from([1, 1, 3, 16]),
    }
)


@given(ANY, st.sampled_from([(1, 1, 1), (4, 4, 4), (6, 2, 1), (64, 1, 4), (7, 8, 2)]), st.sampled_from([V5P, V5E, V7X]))
@hypothesis.settings(derandomize=True, max_examples=70, deadline=None)
def test_whatever_is_asked_the_advice_is_taken_when_given_back(changes, shape, chip):
    s = dataclasses.replace(as_by_default(), **changes)
    try:
        sizes(s, shape, chip)
    except ValueError as e:
        if changed := advised(e):
            sizes(dataclasses.replace(s, **changed), shape, chip)
        else:  # not one row of one token in one layer fits
            least = dict(batch=shape[0] // math.gcd(shape[0], s.times), context_tokens=1, num_layers=1, num_pages=None)
            with pytest.raises(ValueError, match="no room for a page"):
                sizes(dataclasses.replace(s, **least), shape, chip)


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "arguments", "words"),
    [
        ("v5p:4x4x4", ["--hbm_gib=200"], "--hbm_gib=200.0: a v5p chip gives a program 95.74 GiB"),
        ("tpu7x:2x2x1", ["--hbm_gib=190"], "a v7x chip gives a program 189.5 GiB"),
        (
            "v5p:8x8x8",
            ["--num_kv_heads=8", "--num_q_heads=64", "--layers=80", "--model=8", "--batch=108454"],
            "--batch=",
        ),
        ("v6e:1x1", ["--layers=500", "--width=8192"], "--width=8192: 39.06 GiB"),
        ("v5p:4x4x4", ["--num_kv_heads=1", "--layers=1", "--context_tokens=100000000", "--batch=64"], "bytes of SMEM"),
    ],
)
def test_advice_of_the_whole_plan_is_taken_when_given_back(topology, arguments, words):
    chip = chip_of_topology(topology)

    def check(*arguments):
        s = settings(*arguments, topology=topology)
        fitting.checked_sizes(s, absent_chips.absent_pod_mesh(s), chip)

    with pytest.raises(ValueError, match="--") as e:
        check(*arguments)
    assert words in str(e.value)
    check(*arguments, *re.findall(r"--\w+=[\d.]+\d", str(e.value).partition("; ")[2]))


def test_the_floor_is_live_bytes_and_weights_over_hbm_and_what_a_ring_sends_over_its_links():
    s = settings("--context_tokens=4096", "--batch=64", "--width=4096", "--layers=3", "--sliding_window=1024")
    mesh = AbstractMesh((4, 2, 2), AXIS_NAMES)
    talk = [dict(bytes_sent=9e6, links="ici", torus_axes=1), dict(bytes_sent=9e9, links="dcn", torus_axes=0)]
    talk += [dict(bytes_sent=8e6, links="ici", torus_axes=2), dict(bytes_sent=9e9, links="ici", torus_axes=0)]
    found = step_floor.floor_of(s, sizes(s, mesh.axis_sizes, V7X), mesh, V7X, talk, [])
    live = 16 * 1024 * 4 * 2 * 3 * 128 * 2 // 4  # rows, tokens, heads, K and V, layers, channels, bytes; devices
    weights = 2 * 3 * 4096 * 128 * ((16 + 4 + 4) // 2 + 16 // 4)
    assert found["live_kv_bytes"] == live
    assert found["hbm_s"] == pytest.approx((live + weights) / 3690e9)
    assert found["ici_s"] == pytest.approx(9e6 / 200e9 + 8e6 / 400e9) and found["ici_bytes_sent"] == 17e6
    assert found["tokens_per_s"] == pytest.approx(64 / (found["hbm_s"] + found["ici_s"]))


def test_padded_heads_take_what_is_stored_of_them_and_their_projections_what_the_model_has():
    shape = ["--num_kv_heads=4", "--layers=3", "--width=4096", "--batch=64", "--hbm_gib=20", "--context_tokens=1000"]
    mesh, found = AbstractMesh((4, 4, 4), AXIS_NAMES), {}
    for head_dim in (96, 128):
        s = settings(*shape, f"--head_dim={head_dim}")
        made = sizes(s)
        assert made.weights_bytes == 2 * 3 * 4096 * ((16 + 4 + 4) // 4 + 16 // 16) * head_dim
        assert made.spec.head_dim == head_dim
        assert made.spec.bytes_per_token == 2 * 3 * 4 * 128 * 2
        assert made.spec.bytes_per_chip(mesh) + made.weights_bytes <= 0.98 * made.hbm_bytes
        found[head_dim] = step_floor.floor_of(s, made, mesh, V5P, [], [])["live_kv_bytes"]
    assert found[96] == found[128]  # padding is read


def test_the_axes_of_a_collective_are_those_along_which_its_members_differ():
    mesh = make_pod_mesh(data=2, context=2, model=2)
    assert step_facts.axes_of(mesh, ((0, 2), (1, 3), (4, 6), (5, 7))) == (("context",), False)
    assert step_facts.axes_of(mesh, ((0, 1, 2, 3), (4, 5, 6, 7))) == (("context", "model"), False)
    assert step_facts.axes_of(mesh, ((0, 4),)) == (("data",), False)
    assert step_facts.axes_of(mesh, ((0, 2), (1, 3)), num_slices=2) == (("context",), False)  # one slice's program


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_as_many_sequences_are_counted_as_an_allocator_places(seed, context):
    requests = draw_requests(17 + seed, seed)
    pages, mesh = 3 * 4 * (60 + 31 * seed), AbstractMesh((3, context, 1), AXIS_NAMES)
    rows = [r.tokens for r in requests] * 40
    allocator = PageAllocator(CacheSpec(1, 128, pages, 128), mesh, 3 * len(rows), 128)
    placed = 0
    with contextlib.suppress(OutOfPages):
        for tokens in rows:
            allocator.allocate(allocator.place(tokens), tokens)
            placed += 1
    # The allocator looks ahead to growth when it chooses a context shard, and may end some pages earlier.
    counted = sequences_on_shards(requests, pages, 128, 3)
    assert counted == placed if context == 1 else placed <= counted <= placed + 2


@pytest.mark.parametrize("count", [1, 32, 96, 97, 1000])
@pytest.mark.parametrize("shards", [1, 16])
def test_the_count_of_sequences_is_pages_over_mean_pages_whatever_the_number_of_requests(count, shards):
    requests = draw_requests(count, seed=count)
    needs = [-(-r.tokens // 128) for r in requests]
    pages = 15_000 * shards
    counted = sequences_on_shards(requests, pages, 128, shards)
    assert counted == pytest.approx(pages * count / sum(needs), rel=0.01)
    # and just what comes of placing them one by one, to a few: the last ones find the shards filled a little otherwise
    free, placed = [15_000] * shards, 0
    while max(free) >= (need := needs[placed % count]):
        free[free.index(max(free))] -= need
        placed += 1
    assert counted == pytest.approx(placed, rel=0.002)


@needs_libtpu
@pytest.mark.slow
def test_pages_that_leave_the_program_no_room_are_refused_with_a_number_that_compiles():
    shape = ["--context_tokens=100", "--layers=1"]
    with pytest.raises(ValueError, match="--num_pages=258048: cache and step take more") as e:
        plan_record(settings("--num_pages=258048", *shape, topology="v5e:2x2"))
    most = advised(e.value)["num_pages"]
    assert plan_record(settings(f"--num_pages={most}", *shape, topology="v5e:2x2"))["settings"]["num_pages"] == most


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "slices", "more"),
    [
        ("v4:2x2x4", 1, []),
        ("v5e:4x4", 1, ["--kv_dtype=fp8", "--context_tokens=1000"]),
        ("v5p:4x4x4", 2, []),
        ("v6e:4x4", 1, ["--kv_dtype=int8"]),
        pytest.param("v6e:4x4", 1, ["--head_dim=96"], marks=pytest.mark.slow),
        ("tpu7x:2x2x4", 1, []),
    ],
)
def test_a_planned_step_is_in_place_and_communicates_what_attention_does(topology, slices, more):
    shape = ["--num_kv_heads=4", "--num_q_heads=32", "--layers=5", "--model_parallelism=8", f"--num_slices={slices}"]
    s = settings(*shape, *more, topology=topology)
    r = plan_record(s)
    assert plan_text.problems(r) == [] and r["pool_copies"] == [] and r["sends"] == []
    assert r["aliased_bytes"] >= r["cache_bytes"] > 0.9 * r["hbm_bytes"]
    mesh = absent_chips.absent_pod_mesh(s)
    assert r["mesh"] == dict(mesh.shape) and r["mesh"]["context"] == 2 and r["mesh"]["model"] == 4
    spec = sizing.sizes_of(s, mesh, chip_of_topology(topology)).spec
    due = attention_collectives(spec, mesh, r["settings"]["batch"], 32)
    assert {c["times"] for c in r["collectives"]} == {5}
    assert {tuple(c["axes"]) for c in r["collectives"]} == {("context",)}
    assert {c["links"] for c in r["collectives"]} == {"ici"}
    assert sum(c["bytes"] for c in r["collectives"]) == 5 * sum(c.bytes for c in due)
    assert sum(c["bytes_sent"] for c in r["collectives"]) == 5 * sum(c.bytes_sent for c in due)
    assert len(r["kernels"]) == 2 and all(k["vmem_bytes"] > 0 for k in r["kernels"])
    assert r["sequences"] > 0 and r["tokens"] == spec.num_pages * spec.page_size
    words = (
        f"{r['sequences']} sequences of {'1000 tokens' if 'context_tokens' in str(more) else 'the built-in workload'}"
    )
    assert words in " ".join(plan_text.plan_table(r).split())
    assert max(map(len, plan_text.plan_table(r).splitlines())) <= 80


@needs_libtpu
@pytest.mark.parametrize(
    ("shape", "mlp", "over"),
    [
        ("--model=4", 0, ["model"]),
        ("--model_parallelism=8", 512, ["context", "model"]),  # behind attention over both, as in README's layer
        pytest.param("--model_parallelism=8", 0, ["context", "model"], marks=pytest.mark.slow),
        # 8 heads do not divide over 16 chips: whole on each context shard
        pytest.param("--model_parallelism=16", 0, ["model"], marks=pytest.mark.slow),
    ],
)
def test_weights_are_counted_and_split_as_in_readme_s_layer(shape, mlp, over):
    heads = ["--num_kv_heads=4", "--num_q_heads=8", "--layers=3", "--width=256"]
    r = plan_record(settings(*heads, shape, f"--mlp_width={mlp}", topology="v5e:4x4"))
    assert plan_text.problems(r) == []
    split = math.prod(r["mesh"][name] for name in over)
    assert r["weights_bytes"] == 2 * 3 * 256 * ((8 + 4 + 4) * 128 // 4 + 8 * 128 // split + 3 * mlp // split)
    small = 16 * (r["settings"]["pages_per_sequence"] + 1) * 4 + 16 * 256 * 2  # tables, lengths, x
    assert r["argument_bytes"] - r["cache_bytes"] == pytest.approx(r["weights_bytes"] + small, rel=0.1)
    sums = [c for c in r["collectives"] if "model" in c["axes"]]
    assert [(c["kind"], c["axes"], c["times"]) for c in sums] == [("all-reduce", over, 3)] * (1 + bool(mlp))
    # XLA chooses whether it sums in bf16 or f32
    assert {c["bytes"] for c in sums} <= {3 * 16 * 256 * 2, 3 * 16 * 256 * 4}
    said = " ".join(plan_text.plan_table(r).partition("weights    ")[2].partition("fits")[0].split())
    assert "attention's projections" in said and "Not counted are norms" in said
    assert ("the MLP (--mlp_width)" in said) == (mlp == 0)
    assert ("wo over model x context" in said) == (over == ["context", "model"])


@needs_libtpu
def test_a_step_that_copies_its_cache_is_reported_as_a_problem(monkeypatch):
    s = settings("--num_pages=1024", "--layers=2", "--context_tokens=50", topology="v6e:2x2")
    mesh = absent_chips.absent_pod_mesh(s)
    found = sizing.sizes_of(s, mesh, V6E)
    kept = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, donate_argnums=None: kept(f))
    r = step_facts.read_step(s, found, mesh, pod_step.compile_step(s, found, mesh).program)
    r["hbm_bytes"] = found.hbm_bytes
    assert r["pool_copies"] and r["aliased_bytes"] == 0
    copied, not_in_place = plan_text.problems(r)
    assert "as large as a layer's pool" in copied and "written in place" in not_in_place


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_hbm_of_a_chip_is_what_its_compiler_gives(topology):
    chip = chip_of_topology(topology)
    for share, fits in ((0.995, True), (1.005, False)):
        s = settings("--layers=1", "--num_kv_heads=4", "--model=4", topology=topology)
        mesh = absent_chips.absent_pod_mesh(s)
        pages = int(chip.device_hbm_bytes * share) // (2 * 128 * 128 * 2) * mesh.shape["data"]
        # More than the flag takes: what the chip is said to have is what is tried here.
        s = dataclasses.replace(s, num_pages=pages, hbm_gib=chip.hbm_gib * chip.devices * 1.1)
        found = sizing.sizes_of(s, mesh, chip)
        if fits:
            pod_step.compile_step(s, found, mesh)
        else:
            with pytest.raises(Exception, match=r"(?i)exhausted|exceeds|ran out of memory"):
                pod_step.compile_step(s, found, mesh)


# The launcher


def run(*arguments):
    command = [sys.executable, "-P", "-m", "paged_dist.launch.plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout, done.stderr


@needs_libtpu
def test_the_launcher_prints_80_columns_and_writes_the_same_as_json(tmp_path):
    out, trace = tmp_path / "plan.jsonl", tmp_path / "trace.csv"
    trace.write_text("ContextTokens,GeneratedTokens\n1000,24\n3000,200\n")
    code, text, err = run(
        "--topology=v5p:8x8x8",
        "--num_slices=2",
        "--num_kv_heads=8",
        "--num_q_heads=64",
        "--layers=8",
        "--model_parallelism=32",
        f"--trace={trace}",
        f"--output={out}",
    )
    assert code == 0, err
    assert max(map(len, text.splitlines())) <= 80
    (r,) = map(json.loads, out.read_text().splitlines())
    assert r["projected"] is True and r["chips"] == 1024 and r["mesh"] == {"data": 32, "context": 4, "model": 8}
    assert r["settings"]["context_tokens"] == round((1012 + 3100) / 2)
    assert r["sequences"] == pytest.approx(r["settings"]["num_pages"] / ((8 + 25) / 2), rel=1e-4)
    for words in (
        "2 x v5p:8x8x8, 1024 chips",
        f"{r['tokens']} tokens, {r['sequences']} sequences of trace.csv",
        "0 copies",
        "DCN        nothing",
        "paged_decode_attention",
        f"{1e3 * r['floor']['step_s']:.3f} ms a step",
        "projected",
    ):
        assert words in text, words


BAD_FLAGS = [
    ([], "--topology=None: is missing"),
    (["--topology=v5p:8x9x8"], "the nearest is v5p:8x8x8"),
    (["--topology=v6e:4x4", "--implementation=xla"], "--implementation='xla': is no flag of this launcher"),
    (["--topology=v6e:4x4", "--model=3"], "must divide"),
    (["--topology=v6e:4x4", "--head_dim=0"], "--head_dim=0: must be at least 1"),
    (["--topology=v6e:4x4", "--trace=nowhere.csv"], "trace='nowhere.csv'"),
    (["--topology=v6e:4x4", "--output=/proc/x"], "--output='/proc/x'"),
]


@needs_libtpu
@pytest.mark.parametrize(("arguments", "words"), BAD_FLAGS)
def test_bad_flags_end_with_one_line(arguments, words):
    code, text, err = run(*arguments)
    line = err.strip().splitlines()[-1]
    assert (code, text) == (2, "") and line.startswith("paged-dist-plan: error: ") and words in line, err


def each_advised(error):
    """Every change that an error of a mesh's sizes says to work: name -> size."""
    works = str(error).partition("; ")[2]
    if several := re.fullmatch(r"(\w+)=([\d, ]+) or (\d+) works", works):
        return [{several[1]: int(size)} for size in [*several[2].split(", "), several[3]]]
    if "leave it out" in works:
        return [{"context": None}, {"context": int(works.split()[-1])}]
    return [{name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", works)}]


@needs_libtpu
@given(
    st.fixed_dictionaries(
        dict.fromkeys(("data", "context", "model", "model_parallelism"), st.none() | st.integers(1, 9))
    ),
    st.sampled_from(["v6e:4x4", "v5p:2x2x4", "tpu7x:1x1x1"]),
    st.integers(1, 3),
    st.sampled_from([1, 4, 6, 8]),
)
@hypothesis.settings(derandomize=True, max_examples=60, deadline=None)
def test_whatever_mesh_is_asked_the_one_advised_is_taken(sizes, topology, slices, kv_heads):
    more = dict(topology=topology, num_slices=slices, num_kv_heads=kv_heads)
    s = dataclasses.replace(as_by_default(), **sizes, **more)
    try:
        absent_chips.absent_pod_mesh(s)
    except ValueError as e:
        for change in each_advised(e):
            assert change, e
            absent_chips.absent_pod_mesh(dataclasses.replace(s, **change))


@needs_libtpu
@pytest.mark.parametrize(
    "topology", ["v6e:1x1", *(pytest.param(t, marks=pytest.mark.slow) for t in ("v5e:1x1", "tpu7x:1x1x1"))]
)
def test_a_single_chip_is_planned(topology):
    r = plan_record(settings("--layers=40", "--kv_dtype=int8", topology=topology))
    assert plan_text.problems(r) == [] and r["chips"] == 1 and r["sequences"] > 0
    assert r["used_bytes"] > 0.95 * r["hbm_bytes"]


@needs_libtpu
def test_the_launcher_takes_its_own_advice():
    bad = ["--topology=v5e:4x8", "--batch=100001", "--dry_run"]
    code, _, err = run(*bad)
    advice = re.findall(r"--\w+=\d+", err.partition("; ")[2])
    assert (code, len(advice)) == (2, 1)
    assert run(*bad, *advice)[0] == 0
