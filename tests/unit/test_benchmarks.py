"""The benchmarks' clock and tables: what is read from a trace of TPUs, and what is said beside a projection."""

import pytest
from jax.profiler import ProfileData
from measure import Times, kernels_in, read_times
from report import PROJECTIONS, Row, table
from repository import TREE


def written_plane(name: str, lines: dict[str, list[tuple[str, float, float]]]) -> str:
    """A plane of a trace in text form: of each line (event, start, duration) in microseconds."""
    names = sorted({event for events in lines.values() for event, *_ in events})
    quoted = lambda text: '"' + text.replace('"', '\\"') + '"'
    metadata = [f"event_metadata {{ key: {i} value {{ id: {i} name: {quoted(n)} }} }}" for i, n in enumerate(names, 1)]
    of_line = lambda events: " ".join(
        f"events {{ metadata_id: {names.index(event) + 1} offset_ps: {int(1e6 * start)} duration_ps: {int(1e6 * us)} }}"
        for event, start, us in events
    )
    return (
        f"planes {{ name: {quoted(name)} {' '.join(metadata)} "
        + " ".join(f"lines {{ name: {quoted(line)} {of_line(events)} }}" for line, events in lines.items())
        + " }"
    )


def written_trace(*planes: str) -> ProfileData:
    return ProfileData.from_text_proto(" ".join(planes))


HLO = """
ENTRY %main (a: f32[8]) -> f32[8] {
  %copy.1 = f32[8] copy(%a)
  %kv_cache_update.2 = f32[8] custom-call(%copy.1), custom_call_target="tpu_custom_call", backend_config={}
  ROOT %decode.3 = f32[8] custom-call(%kv_cache_update.2), custom_call_target="tpu_custom_call"
  %other.4 = f32[8] custom-call(%a), custom_call_target="Sharding"
}
"""
RUN = {
    "XLA Modules": [
        ("jit_step(123)", 10, 50),
        ("jit_other(9)", 70, 5),
        ("jit_step(123)", 100, 60),
        ("jit_step2(5)", 200, 1),
    ],
    "XLA Ops": [
        ("%copy.1 = f32[8] copy(%a)", 10, 5),
        ("%kv_cache_update.2 = f32[8] custom-call(...)", 16, 10),
        ("decode.3", 30, 20),
        ("decode.3", 71, 3),  # of another program
        ("%kv_cache_update.2 = f32[8] custom-call(...)", 101, 11),
        ("decode.3", 120, 25),
    ],
}


def test_a_program_and_its_kernels_are_timed_by_the_devices_own_events():
    kernels = kernels_in(HLO)
    assert kernels == ("kv_cache_update.2", "decode.3")
    times = read_times(
        written_trace(
            written_plane("/host:CPU", {"python": [("jit_step(1)", 0, 999)]}), written_plane("/device:TPU:0", RUN)
        ),
        "step",
        kernels,
    )
    assert times == Times((50.0, 60.0), (30.0, 36.0), "device trace")
    assert times.median == 55 and times.kernels_median == 33 and times.spread == pytest.approx(5 / 55)


def test_of_several_devices_the_slowest_counts_run_by_run():
    slower = {line: [(e, s, 2 * d if s < 60 else d) for e, s, d in events] for line, events in RUN.items()}
    slower["XLA Modules"][0] = ("jit_step(123)", 10, 55)
    profile = written_trace(
        written_plane("/device:TPU:0", RUN),
        written_plane("/device:TPU:1", slower),
        written_plane("/device:TPU:0 SparseCore 0", {}),
    )
    assert read_times(profile, "step", ("decode.3",)) == Times((55.0, 60.0), (40.0, 25.0), "device trace")


@pytest.mark.parametrize(
    ("planes", "program", "kernels", "message"),
    [
        ([written_plane("/host:CPU", {"python": []})], "step", (), "no run of jit_step on each TPU; its planes are"),
        ([written_plane("/device:TPU:0", RUN)], "absent", (), "no run of jit_absent"),
        ([written_plane("/device:TPU:0", RUN)], "step", ("gone.1",), r"no event of the kernels \['gone.1'\]"),
        (
            [
                written_plane("/device:TPU:0", RUN),
                written_plane("/device:TPU:1", {"XLA Modules": [("jit_step(1)", 0, 1)]}),
            ],
            "step",
            (),
            r"ran \[2, 1\] times",
        ),
    ],
)
def test_a_trace_that_does_not_show_the_program_is_refused(planes, program, kernels, message):
    with pytest.raises(ValueError, match=message):
        read_times(written_trace(*planes), program, kernels)


def test_a_row_stands_beside_its_projection_in_the_claims_unit():
    case = "8 q, 1 kv, 512"
    row = Row("write_and_attend", case, "paged-dist", "TPU v6 lite", Times((13.0,), (11.0,), "device trace"), 5.2)
    assert row.projected == PROJECTIONS["write_and_attend"]["cases"][case]["paged-dist"]["v6e"]
    assert "| 13.0 | 11.0 | 0% | 40% | - | 40% |" in table([row])
    cpu = Row("write_and_attend", case, "paged-dist", "cpu", Times((13.0,), (), "wall clock"), None, small=True)
    assert "(small)" in table([cpu]) and table([cpu]).endswith("| 13.0 | - | 0% | - | - | - |")


def test_each_projection_is_of_a_case_that_a_script_measures():
    import importlib

    for claim, projection in PROJECTIONS.items():
        module = importlib.import_module(claim)
        assert claim == module.CLAIM and projection["unit"] in ("share", "us", "ratio")
        if hasattr(module, "CASES"):
            assert set(projection["cases"]) == set(module.CASES)
        else:
            assert all(case.rpartition(", ")[0] in module.SHARDS for case in projection["cases"])


def test_each_script_is_in_the_benchmarks_page():
    page = (TREE / "benchmarks" / "README.md").read_text()
    for file in (TREE / "benchmarks").iterdir():
        if file.suffix in (".py", ".json"):
            assert f"`{file.name}`" in page, file.name
