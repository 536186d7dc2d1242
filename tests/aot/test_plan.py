"""`plan`: what it reads from a compiled step, what it says of a pod, what it refuses and with what advice."""

import dataclasses
import json
import math
import re

import flagsaver
import hypothesis
import jax
import jax.numpy as jnp
import pytest
from aot import compile_on, needs_libtpu
from commands import run_launcher
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from one_process import run_in_one_process
from plan_settings import TOPOLOGIES, advised_settings, default_plan_settings, plan_settings

from paged_dist import make_pod_mesh
from paged_dist.launch import plan
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.chip_rates import V6E
from paged_dist.launch.common.flag_registry import FLAGS
from paged_dist.launch.common.slices import chip_of_topology
from paged_dist.launch.planning import (
    absent_chips,
    fitting,
    hlo_text,
    plan_text,
    pod_step,
    sizing,
    step_facts,
)
from paged_dist.launch.planning.plan_record import plan_record
from paged_dist.launch.planning.plan_text import plan_table
from paged_dist.ops.collectives import attention_collectives


@needs_libtpu
def test_a_sum_over_slices_is_seen_as_what_is_sent_over_dcn():
    mesh = make_pod_mesh(model=4, topology="v5p:2x2x2", num_slices=2)
    at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    x = jax.ShapeDtypeStruct((8, 4096), jnp.float32, sharding=at("data", "model"))
    text = compile_on(mesh, lambda x: x.sum(0), x, out_shardings=at("model")).as_text()
    (sent,) = hlo_text.sends(text)
    assert sent.bytes == 4096 and sent.loops == 0


@needs_libtpu
@pytest.mark.parametrize("topology", sorted({m for _, m in TOPOLOGIES if isinstance(m, str)}))
def test_a_slice_that_is_taken_is_one_that_libtpu_knows(topology):
    count = math.prod(int(n) for n in topology.split(":")[1].split("x"))
    assert make_pod_mesh(topology=topology).devices.size == count * chip_of_topology(topology).devices


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
        s = plan_settings(*arguments, topology=topology)
        fitting.checked_sizes(s, absent_chips.absent_pod_mesh(s), chip)

    with pytest.raises(ValueError, match="--") as e:
        check(*arguments)
    assert words in str(e.value)
    check(*arguments, *re.findall(r"--\w+=[\d.]+\d", str(e.value).partition("; ")[2]))


@needs_libtpu
@pytest.mark.slow
def test_pages_that_leave_the_program_no_room_are_refused_with_a_number_that_compiles():
    shape = ["--context_tokens=100", "--layers=1"]
    with pytest.raises(ValueError, match="--num_pages=258048: cache and step take more") as e:
        plan_record(plan_settings("--num_pages=258048", *shape, topology="v5e:2x2"))
    most = advised_settings(e.value)["num_pages"]
    assert (
        plan_record(plan_settings(f"--num_pages={most}", *shape, topology="v5e:2x2"))["settings"]["num_pages"] == most
    )


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
    s = plan_settings(*shape, *more, topology=topology)
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
    r = plan_record(plan_settings(*heads, shape, f"--mlp_width={mlp}", topology="v5e:4x4"))
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
    s = plan_settings("--num_pages=1024", "--layers=2", "--context_tokens=50", topology="v6e:2x2")
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
        s = plan_settings("--layers=1", "--num_kv_heads=4", "--model=4", topology=topology)
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


@needs_libtpu
def test_the_launcher_prints_80_columns_and_writes_the_same_as_json(tmp_path):
    out, trace = tmp_path / "plan.jsonl", tmp_path / "trace.csv"
    trace.write_text("ContextTokens,GeneratedTokens\n1000,24\n3000,200\n")
    code, text, err = run_launcher(
        "plan",
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


@pytest.fixture(scope="module")
def plan_refusals():
    return run_in_one_process([("plan", arguments) for arguments, _ in BAD_FLAGS])


@needs_libtpu
@pytest.mark.parametrize("index", range(len(BAD_FLAGS)), ids=[" ".join(arguments) for arguments, _ in BAD_FLAGS])
def test_bad_flags_end_with_one_line(plan_refusals, index):
    _, code, text, err = plan_refusals[index]
    line = err.strip().splitlines()[-1]
    assert (code, text) == (2, "") and line.startswith("paged-dist-plan: error: ") and BAD_FLAGS[index][1] in line, err


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
    s = dataclasses.replace(default_plan_settings(), **sizes, **more)
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
    r = plan_record(plan_settings("--layers=40", "--kv_dtype=int8", topology=topology))
    assert plan_text.problems(r) == [] and r["chips"] == 1 and r["sequences"] > 0
    assert r["used_bytes"] > 0.95 * r["hbm_bytes"]


@needs_libtpu
def test_the_launcher_takes_its_own_advice():
    bad = ["--topology=v5e:4x8", "--batch=100001", "--dry_run"]
    code, _, err = run_launcher("plan", *bad)
    advice = re.findall(r"--\w+=\d+", err.partition("; ")[2])
    assert (code, len(advice)) == (2, 1)
    assert run_launcher("plan", *bad, *advice)[0] == 0


@needs_libtpu
def test_a_plan_prints_what_its_attention_does():
    arguments = ["--topology=v5e:2x2", "--layers=1", "--soft_cap=30", "--sliding_window=512", "--hbm_gib=1"]
    with flagsaver.flagsaver():
        FLAGS(["plan", *arguments])
        text = plan_table(plan_record(plan.plan_settings()))
    assert "cache bfloat16, soft cap 30, window 512" in " ".join(text.split())


def planned_with_mlp(mlp_width, topology="tpu7x:2x2x1"):
    shape = ["--num_kv_heads=8", "--num_q_heads=16", "--layers=4", "--width=1024", "--num_pages=2048"]
    with flagsaver.flagsaver():
        flags.FLAGS(["plan", f"--topology={topology}", *shape, f"--mlp_width={mlp_width}"])
        return plan_record(plan.plan_settings())


@needs_libtpu
def test_stacked_weights_are_not_copied_on_v7x():
    """As [layers, n, width] XLA stored them anew, in other tiles, in each step."""
    r = planned_with_mlp(8 * 256)
    assert r["other_copies"] == [] and r["floor"]["copied_bytes"] == 0 and "copies  " not in plan_text.plan_table(r)
    assert r["temp_bytes"] < r["cache_bytes"] // (2 * 4)  # a layer's pool


@needs_libtpu
def test_weights_that_are_copied_are_reported_and_counted():
    """A hidden width without whole rows of 128 on each device is stored as [layers, width, F], which XLA copies."""
    r = planned_with_mlp(8 * 192)
    copied = [c for c in r["other_copies"] if c["array"] == "bf16[4,1024,192]"]
    assert len(copied) == 3 and {(c["bytes"], c["times"]) for c in copied} == {(2 * 4 * 1024 * 192, 1)}
    total = sum(2 * c["bytes"] * c["times"] for c in r["other_copies"])
    assert r["floor"]["copied_bytes"] == total
    read = r["floor"]["live_kv_bytes"] + r["weights_bytes"] + total
    assert r["floor"]["hbm_s"] == pytest.approx(read / 3690e9)
    assert "copies     1 x bf16[4,1024,192], 1.57 MB, in each step" in plan_text.plan_table(r)
