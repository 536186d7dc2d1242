"""`plan`: what it reads from a compiled step, what it says of a pod, what it refuses and with what advice."""

import json
import math
import subprocess
import sys

import flagsaver
import jax
import jax.numpy as jnp
import pytest
from aot import compile_on, needs_libtpu
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from paged_dist import make_pod_mesh
from paged_dist.collectives import attention_collectives
from paged_dist.launch import compiled, plan, pod_step
from paged_dist.launch import own_flags as flags
from paged_dist.launch.chips import V5P, V6E, V7X, chip_of_topology
from paged_dist.launch.workload import sequences_on_shards
from paged_dist.mesh import AXIS_NAMES

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
    assert {c.groups: c.loops for c in compiled.collectives(HLO)} == {
        ((0, 2), (1, 3)): 1,  # in a computation that the loop's body calls
        ((0, 1), (2, 3)): 1,
        ((0, 1, 2, 3),): 0,
    }
    (sent,) = compiled.crossings(HLO)
    assert sent == (("f32[4,8]",), 128, 1)


@needs_libtpu
def test_a_sum_over_slices_is_seen_as_what_is_sent_over_dcn():
    mesh = make_pod_mesh(model=4, topology="v5p:2x2x2", num_slices=2)
    at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    x = jax.ShapeDtypeStruct((8, 4096), jnp.float32, sharding=at("data", "model"))
    text = compile_on(mesh, lambda x: x.sum(0), x, out_shardings=at("model")).as_text()
    (sent,) = compiled.crossings(text)
    assert sent.bytes == 4096 and sent.loops == 0


TOPOLOGIES = [
    ("v5p:8x8x7", None),
    ("v5p:16x20x28", None),
    ("v5p:28x16x20", None),  # a pod's axes in any order
    ("v5p:16x20x32", "v5p:16x20x28"),
    ("v5p:3x4x4", "v5p:4x4x4"),
    ("v5p:8x8", "v5p:8x8x1"),
    ("v5e:1x1", "v5e:2x2"),
    ("v5e:32x16", "v5e:16x16"),
    ("v6e:2x2x2", "v6e:2x2"),
    ("tpu7x:16x16x16", None),
    ("v7x:4x4x4", "tpu7x is its name"),
    ("v9:2x2", "use one of v4, v5e"),
    ("v5p", "GENERATION:SHAPE"),
    ("v5p:0x2x2", "v5p:2x2x2"),
]


@pytest.mark.parametrize(("topology", "works"), TOPOLOGIES)
def test_a_slice_that_no_pod_has_is_refused_with_the_nearest_that_one_has(topology, works):
    if works is None:
        assert chip_of_topology(topology).name == topology.split(":")[0].replace("tpu7x", "v7x")
        return
    with pytest.raises(ValueError, match="--topology=") as e:
        chip_of_topology(topology)
    assert works in str(e.value)
    if works.startswith(topology.split(":")[0]):
        chip_of_topology(works)


@needs_libtpu
@pytest.mark.parametrize("topology", [t for t, works in TOPOLOGIES if works is None])
def test_a_slice_that_is_taken_is_one_that_libtpu_knows(topology):
    chips = math.prod(int(n) for n in topology.split(":")[1].split("x"))
    assert make_pod_mesh(topology=topology).devices.size == chips * chip_of_topology(topology).devices


def settings(*arguments, topology="v5p:4x4x4"):
    """The settings of a command line; the flags are as before afterwards."""
    with flagsaver.flagsaver():
        flags.FLAGS(["plan", f"--topology={topology}", *arguments])
        return plan.settings_from_flags()


def sizes(s, shape=(4, 4, 4), chip=V5P):
    return plan.sizes_of(s, AbstractMesh(shape, AXIS_NAMES), chip)


def test_the_cache_fills_what_weights_and_the_program_leave():
    s = settings("--num_kv_heads=8", "--num_q_heads=64", "--layers=10", "--width=8192", "--hbm_gib=20")
    found = sizes(s)
    weights = 2 * 10 * 8192 * (64 + 8 + 8 + 64) * 128 // 4
    assert found.weights_bytes == weights
    a_page = 2 * 10 * 2 * 128 * 128 * 2  # K and V, layers, 2 heads of 8, tokens, channels, bytes
    pages = (int(20 * 2**30 * 0.98) - weights) // a_page
    assert found.spec.num_pages == pages * 16
    assert found.spec.bytes_per_chip(AbstractMesh((4, 4, 4), AXIS_NAMES)) == pages * a_page


def test_an_8_bit_cache_is_filled_in_whole_tiles_of_scales():
    found = sizes(settings("--kv_dtype=int8", "--page_size=64", "--hbm_gib=1"))
    assert found.spec.num_pages % (16 * 16) == 0
    found.spec.check_mesh(AbstractMesh((4, 4, 4), AXIS_NAMES))


REFUSED = [
    (["--num_pages=100000000"], "--num_pages=100000000: a cache of", "pages fit"),
    (["--num_pages=33"], "must be a multiple of the mesh's data x context size 4 x 4", "48 works"),
    (["--batch=6"], "--batch=6: must be a multiple of the mesh's data size 4", "8 works"),
    (["--num_pages=160", "--batch=64", "--context_tokens=1000"], "--batch=64: 16 rows of 1000", "--batch=20 fits"),
    (["--width=65536", "--layers=800"], "--width=65536: 125.00 GiB of weights", "--layers=589 fit"),
    (["--layers=90000", "--num_kv_heads=32", "--num_q_heads=32"], "rows of 1434 tokens", "--batch=4 --context_tokens="),
    (["--pages_per_sequence=2"], "--context_tokens=1434: a row's 2 pages hold 256", "--pages_per_sequence=12"),
    (["--context_tokens=9000", "--pages_per_sequence=4"], "hold 512", "--pages_per_sequence=71"),
    (["--num_q_heads=6", "--num_kv_heads=2"], "--num_q_heads=6: must be a multiple of model 4", ""),
]


@pytest.mark.parametrize(("arguments", "rule", "works"), REFUSED)
def test_what_does_not_fit_is_refused_by_its_limit_with_what_does(arguments, rule, works):
    with pytest.raises(ValueError) as e:
        sizes(settings(*arguments))
    assert rule in str(e.value) and works in str(e.value)
    if " fit" in str(e.value):  # what is advised is no empty word
        advised = [word for word in str(e.value).split("; ")[1].split() if word.startswith("--")]
        sizes(settings(*arguments, *advised)) if advised else None


def test_the_most_pages_that_are_advised_do_fit():
    with pytest.raises(ValueError) as e:
        sizes(settings("--num_pages=100000000", "--hbm_gib=1", "--context_tokens=100"))
    most = int(str(e.value).split("; ")[1].split()[0])
    assert sizes(settings(f"--num_pages={most}", "--hbm_gib=1", "--context_tokens=100")).spec.num_pages == most


def test_the_floor_is_live_bytes_and_weights_over_hbm_and_what_a_ring_sends_over_its_links():
    s = settings("--context_tokens=4096", "--batch=64", "--width=4096", "--layers=3", "--sliding_window=1024")
    mesh = AbstractMesh((4, 2, 2), AXIS_NAMES)
    talk = [dict(bytes_sent=9e6, links="ici", torus_axes=1), dict(bytes_sent=9e9, links="dcn", torus_axes=0)]
    talk += [dict(bytes_sent=8e6, links="ici", torus_axes=2), dict(bytes_sent=9e9, links="ici", torus_axes=0)]
    found = plan.floor_of(s, sizes(s, mesh.axis_sizes, V7X), mesh, V7X, talk)
    live = 16 * 1024 * 4 * 2 * 3 * 128 * 2 // 4  # rows, tokens, heads, K and V, layers, channels, bytes; devices
    weights = 2 * 3 * 4096 * 2 * (16 + 4) * 128 // 2
    assert found["live_kv_bytes"] == live
    assert found["hbm_s"] == pytest.approx((live + weights) / 3690e9)
    assert found["ici_s"] == pytest.approx(9e6 / 200e9 + 8e6 / 400e9) and found["ici_bytes_sent"] == 17e6
    assert found["tokens_per_s"] == pytest.approx(64 / (found["hbm_s"] + found["ici_s"]))


def test_the_axes_of_a_collective_are_those_along_which_its_members_differ():
    mesh = make_pod_mesh(data=2, context=2, model=2)
    assert pod_step.axes_of(mesh, ((0, 2), (1, 3), (4, 6), (5, 7))) == (("context",), False)
    assert pod_step.axes_of(mesh, ((0, 1, 2, 3), (4, 5, 6, 7))) == (("context", "model"), False)
    assert pod_step.axes_of(mesh, ((0, 4),)) == (("data",), False)
    assert pod_step.axes_of(mesh, ((0, 2), (1, 3)), num_slices=2) == (("context",), False)  # one slice's program


def test_sequences_are_counted_on_the_data_shard_that_holds_them():
    s = settings("--num_kv_heads=1", "--model=1", "--hbm_gib=4", "--max_context=4000", "--layers=1")
    needs = [-(-r.tokens // 128) for r in s.requests]
    pages = 3 * 41
    held = []
    for d in range(3):
        mine = [needs[(d + 3 * i) % len(needs)] for i in range(1000)]
        held.append(next(i for i in range(1000) if sum(mine[: i + 1]) > 41))
    assert sequences_on_shards(s.requests, pages, 128, 3) == sum(held) < sequences_on_shards(s.requests, pages, 128, 1)


@needs_libtpu
@pytest.mark.slow
def test_pages_that_leave_the_program_no_room_are_refused_with_a_number_that_compiles():
    shape = ["--context_tokens=100", "--layers=1"]
    with pytest.raises(ValueError, match="--num_pages=258048: cache and step take more") as e:
        plan.plan(settings("--num_pages=258048", *shape, topology="v5e:2x2"))
    most = int(str(e.value).split("; ")[1].split()[0])
    assert plan.plan(settings(f"--num_pages={most}", *shape, topology="v5e:2x2"))["settings"]["num_pages"] == most


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "slices", "more"),
    [
        ("v4:2x2x4", 1, []),
        ("v5e:4x4", 1, ["--kv_dtype=fp8"]),
        ("v5p:4x4x4", 2, []),
        ("v6e:4x4", 1, ["--kv_dtype=int8"]),
        ("tpu7x:2x2x4", 1, []),
    ],
)
def test_a_planned_step_is_in_place_and_communicates_what_attention_does(topology, slices, more):
    shape = ["--num_kv_heads=4", "--num_q_heads=32", "--layers=5", "--model_parallelism=8", f"--num_slices={slices}"]
    s = settings(*shape, *more, topology=topology)
    r = plan.plan(s)
    assert plan.problems(r) == [] and r["pool_copies"] == [] and r["sends"] == []
    assert r["aliased_bytes"] >= r["cache_bytes"] > 0.9 * r["hbm_bytes"]
    mesh = plan.mesh_of(s)
    assert r["mesh"] == dict(mesh.shape) and r["mesh"]["context"] == 2 and r["mesh"]["model"] == 4
    spec = plan.sizes_of(s, mesh, chip_of_topology(topology)).spec
    due = attention_collectives(spec, mesh, r["settings"]["batch"], 32)
    assert {c["times"] for c in r["collectives"]} == {5}
    assert {tuple(c["axes"]) for c in r["collectives"]} == {("context",)}
    assert {c["links"] for c in r["collectives"]} == {"ici"}
    assert sum(c["bytes"] for c in r["collectives"]) == 5 * sum(c.bytes for c in due)
    assert sum(c["bytes_sent"] for c in r["collectives"]) == 5 * sum(c.bytes_sent for c in due)
    assert len(r["kernels"]) == 2 and all(k["vmem_bytes"] > 0 for k in r["kernels"])
    assert r["sequences"] > 0 and r["tokens"] == spec.num_pages * spec.page_size
    assert max(map(len, plan.table(r).splitlines())) <= 80


@needs_libtpu
def test_projections_add_their_weights_and_one_sum_over_model():
    s = settings("--num_kv_heads=4", "--num_q_heads=8", "--layers=3", "--width=256", "--model=4", topology="v5e:4x4")
    r = plan.plan(s)
    assert plan.problems(r) == []
    assert r["weights_bytes"] == 2 * 3 * 256 * (8 + 4 + 4 + 8) * 128 // 4
    (one,) = r["collectives"]
    assert (one["kind"], one["axes"], one["times"]) == ("all-reduce", ["model"], 3)
    assert one["bytes"] in (3 * 16 * 256 * 2, 3 * 16 * 256 * 4)  # XLA chooses whether it sums in bf16 or f32


@needs_libtpu
def test_a_step_that_copies_its_cache_is_reported_as_a_problem(monkeypatch):
    s = settings("--num_pages=1024", "--layers=2", "--context_tokens=50", topology="v6e:2x2")
    mesh = plan.mesh_of(s)
    found = plan.sizes_of(s, mesh, V6E)
    kept = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, donate_argnums=None: kept(f))
    r = pod_step.read_program(s, found, mesh, pod_step.compile_step(s, found, mesh)[0])
    r["hbm_bytes"] = found.hbm_bytes
    assert r["pool_copies"] and r["aliased_bytes"] == 0
    copied, not_in_place = plan.problems(r)
    assert "as large as a layer's pool" in copied and "written in place" in not_in_place


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_hbm_of_a_chip_is_what_its_compiler_gives(topology):
    chip = chip_of_topology(topology)
    for share, fits in ((0.995, True), (1.005, False)):
        shape = ["--layers=1", "--num_kv_heads=4", "--model=4", f"--hbm_gib={chip.hbm_gib * chip.devices * 1.1}"]
        mesh = plan.mesh_of(settings(*shape, topology=topology))
        pages = int(chip.device_hbm_bytes * share) // (2 * 128 * 128 * 2) * mesh.shape["data"]
        s = settings(*shape, f"--num_pages={pages}", topology=topology)
        found = plan.sizes_of(s, mesh, chip)
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
    pages = r["settings"]["num_pages"]
    a_shard = pages // 32  # 16 of the data shards get requests of 8 pages, 16 those of 25
    assert r["sequences"] == 16 * (a_shard // 8) + 16 * (a_shard // 25)
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
    (["--topology=v5p:8x9x8"], "the nearest is v5p:8x10x8"),
    (["--topology=v6e:4x4", "--implementation=xla"], "--implementation='xla': is no flag of this launcher"),
    (["--topology=v6e:4x4", "--model=3"], "must divide"),
    (["--topology=v6e:4x4", "--head_dim=96"], "head_dim=96"),
    (["--topology=v6e:4x4", "--trace=nowhere.csv"], "trace='nowhere.csv'"),
    (["--topology=v6e:4x4", "--output=/proc/x"], "--output='/proc/x'"),
]


@needs_libtpu
@pytest.mark.parametrize(("arguments", "words"), BAD_FLAGS)
def test_bad_flags_end_with_one_line(arguments, words):
    code, text, err = run(*arguments)
    line = err.strip().splitlines()[-1]
    assert (code, text) == (2, "") and line.startswith("paged-dist-plan: error: ") and words in line, err
