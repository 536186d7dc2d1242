"""Sweeps over absent slices: their sub-meshes, advice, and rows that say that they are projected."""

import re
from types import SimpleNamespace

import flagsaver
import pytest
from aot import needs_libtpu
from commands import json_rows, run_launcher

from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.sweeps import absent_pods, sub_meshes, sweep_flags
from paged_dist.mesh.topology import topology_devices


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "size", "box"),
    [
        ("v5p:4x4x4", 4, (1, 2, 2)),
        ("v5p:4x4x4", 8, (2, 2, 2)),
        ("v5p:4x4x4", 16, (2, 2, 4)),
        ("v6e:4x8", 8, (2, 4, 1)),
        ("tpu7x:2x2x4", 8, (1, 2, 2)),
    ],
)
def test_a_sub_mesh_of_a_slice_is_a_box(topology, size, box):
    devices = list(topology_devices(topology))
    chosen = sub_meshes.sub_devices(devices, size)
    assert len(set(chosen)) == size and devices[0] in chosen
    extent = [len({d.coords[i] for d in chosen}) for i in range(3)]
    assert sorted(extent) == sorted(box)
    chips_a_host = 4
    assert len({d.process_index for d in chosen}) == max(1, len({tuple(d.coords) for d in chosen}) // chips_a_host)


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "slices", "sizes"),
    [
        ("tpu7x:2x2x1", 1, [2, 4, 8]),
        ("v5p:4x4x12", 1, [1, 2, 4, 8, 16, 32, 64, 192]),
        ("v5e:4x4", 2, [1, 2, 4, 8, 16, 32]),
    ],
)
def test_the_sizes_there_are_by_default_are_those_of_which_there_is_a_sub_mesh(topology, slices, sizes):
    with flagsaver.flagsaver():
        flags.FLAGS(["scaling"])
        assert sub_meshes.sub_mesh_sizes(list(topology_devices(topology, slices))) == sizes


@needs_libtpu
def test_a_size_that_is_no_box_is_refused():
    with pytest.raises(ValueError, match="--sizes=3: no box of so many devices"):
        sub_meshes.sub_devices(list(topology_devices("v5p:4x4x4")), 3)
    with pytest.raises(ValueError, match="--sizes=3: there are 2 devices"):
        sub_meshes.sub_devices([SimpleNamespace(coords=None)] * 2, 3)


@needs_libtpu
@pytest.mark.parametrize(
    ("slices", "arguments", "flag"),
    [
        ("v5e-16,v5e:4x8", ["--batch=100000", "--layers=20"], "--batch="),
        ("v5e:4x4,v5e:8x8,v5e:2x2", ["--batch=43008", "--layers=20", "--scaling=weak"], "--batch="),
        ("v5e:4x4,v6e:2x4", ["--layers=3000", "--num_kv_heads=8", "--num_q_heads=8"], "--batch="),
        ("v5e:2x2,v5p:4x4x4", ["--layers=900000", "--width=4096"], "--width="),
        ("v5e:2x2,v5p:4x4x4", ["--context_tokens=10000000", "--model=1"], "--batch="),
        ("v5p:2x2x1,v5e:2x2", ["--hbm_gib=90"], "--hbm_gib=90.0: a v5e chip"),
    ],
)
def test_advice_for_one_slice_of_a_plan_fits_all_when_given_back(slices, arguments, flag):
    def check(*more):
        with flagsaver.flagsaver():
            flags.FLAGS(["scaling", f"--plan={slices}", *arguments, *more])
            sweep_flags.check_sweep_flags()
            return absent_pods.plan_sweep(slices.split(","))

    with pytest.raises(ValueError, match="--") as e:
        check()
    assert str(e.value).startswith(flag)
    advice = re.findall(r"--\w+=[\d.]*\d", str(e.value).partition("; ")[2])
    settings, fits = check(*advice)
    if flag == "--batch=" and len(advice) == 1:  # the largest
        (s, *_) = settings.values()
        assert not fits({"batch": s.batch + s.batch_step})


@needs_libtpu
def test_a_projected_sweep_says_so_in_every_row(tmp_path):
    out = tmp_path / "rows.jsonl"
    shape = ["--num_kv_heads=4", "--num_q_heads=8", "--layers=2", "--batch=64", f"--output={out}", "--model=4"]
    assert (
        run_launcher("scaling", "--plan=v5e:2x4,v6e:2x4,v5e:2x2", "--scaling=weak", "--dry_run", *shape)[1].count(
            "weak"
        )
        == 3
    )
    code, text, err = run_launcher("scaling", "--plan=v5e:2x2,v5e:2x4", *shape)
    assert code == 0, err
    rows = json_rows(out)
    assert [(r["mode"], r["chips"], r["settings"]["batch"]) for r in rows] == [
        ("strong", 4, 64),
        ("strong", 8, 64),
        ("weak", 4, 64),
        ("weak", 8, 128),
    ]
    assert all(r["projected"] and r["step_ms_p99"] is None and r["tokens_per_s"] > 0 for r in rows)
    assert "measured" not in text and text.count("projected") == 2
