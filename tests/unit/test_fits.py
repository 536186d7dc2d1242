"""Long requests and small memories: the real limit is named, and the advice works when it is given back."""

from __future__ import annotations

import dataclasses
import re

import flagsaver
import pytest

from paged_dist import make_pod_mesh
from paged_dist.launch import plan
from paged_dist.launch.common.flag_registry import FLAGS
from paged_dist.launch.serving import fits, run_setup, workload_flags
from paged_dist.launch.serving.workload import MOST_TOKENS


def planned(*arguments):
    """What `decode` with `arguments` would run, on the 8 simulated devices of the tests."""
    with flagsaver.flagsaver():
        FLAGS(["decode", *arguments])
        return run_setup.prepare_run(run_setup.model_from_flags(), *workload_flags.requests_from_flags())


@pytest.fixture
def trace(tmp_path):
    def write(*lengths):
        path = tmp_path / "long.csv"
        path.write_text("\n".join(["ContextTokens,GeneratedTokens", *(f"{c},{g}" for c, g in lengths)]) + "\n")
        return f"--trace={path}"

    return write


def advice(error):
    """The flags that an error advises."""
    return re.findall(r"--\w+=\d+", str(error).rpartition("; ")[2])


def test_ten_million_tokens_fit_where_the_memory_holds_them(monkeypatch, trace):
    monkeypatch.setattr(fits.host, "memory_bytes", lambda: 10**12)
    run = planned(trace((10_000_000, 5), (100, 5)))
    assert run.pages_per_sequence == -(-10_000_005 // 128)


@pytest.mark.parametrize(
    ("arguments", "advised"),
    [
        ((), ["--num_pages", "--max_context"]),  # the long request alone is too long
        (("--context=4", "--model=2", "--kv_dtype=int8"), ["--num_pages", "--max_context"]),
        (("--length_scale=0.1",), ["--num_pages"]),  # it fits, but not beside the others
        (("--num_pages=2000000",), ["--num_pages", "--max_context"]),
        (("--num_pages=2000000", "--length_scale=0.1"), ["--num_pages"]),
    ],
)
def test_a_cache_over_the_memory_is_told_flags_that_fit(monkeypatch, trace, arguments, advised):
    monkeypatch.setattr(fits.host, "memory_bytes", lambda: 2 * 10**10)
    requests = trace((10_000_000, 5), *[(2_000_000, 40)] * 40)
    with pytest.raises(ValueError, match="devices has") as e:
        planned(requests, *arguments)
    given = "--num_pages=2000000" in arguments
    start = "--num_pages=2000000: a cache of " if given else r"num_pages=\d+: what the requests take where none waits"
    assert re.match(start, str(e.value))
    assert [flag.partition("=")[0] for flag in advice(e.value)] == advised
    planned(requests, *arguments, *advice(e.value))  # the later of two values of a flag counts


def test_memory_that_nothing_fits_into_is_told_what_makes_a_page_smaller(monkeypatch, trace):
    monkeypatch.setattr(fits.host, "memory_bytes", lambda: 10**6)
    with pytest.raises(ValueError, match="give fewer layers or heads, or a smaller --batch"):
        planned(trace((100, 5)))


@dataclasses.dataclass(frozen=True)
class GpuWithMemory:
    """A stand-in for a GPU that tells its memory, or does not."""

    id: int
    limit: int | None
    platform: str = "gpu"
    process_index: int = 0
    device_kind: str = "NVIDIA H200"

    def memory_stats(self):
        return self.limit and {"bytes_limit": self.limit}


def test_a_device_that_tells_its_memory_is_taken_at_its_word(trace):
    with flagsaver.flagsaver():
        FLAGS(["decode", trace((1_000_000, 5))])
        model, requests = run_setup.model_from_flags(), workload_flags.requests_from_flags()
        mesh = lambda limit: make_pod_mesh(devices=[GpuWithMemory(i, limit) for i in range(4)], model=4)
        for limit in (None, 2 * 10**9):
            run_setup.prepare_run(model, *requests, mesh(limit))
        with pytest.raises(ValueError, match=r"a cache of 1\.0 GB a device, where a device has 1\.0 GB; --num_pages=5"):
            run_setup.prepare_run(model, *requests, mesh(10**9))


def test_page_tables_count_too(monkeypatch, trace):
    monkeypatch.setattr(fits.host, "memory_bytes", lambda: 10**9)
    planned(trace((100, 5)))
    with pytest.raises(
        ValueError, match=r"and page tables of 0\.6 GB, where each of this host's 8 devices has 0\.1 GB"
    ):
        planned(trace((100, 5)), "--pages_per_sequence=10000000")


def test_the_limits_of_a_table_are_those_of_positions_and_of_the_mesh():
    with pytest.raises(ValueError, match=f"--pages_per_sequence=99999999: must be at most {MOST_TOKENS // 128}: "):
        planned("--pages_per_sequence=99999999")
    arguments = ["plan", "--topology=v5p:4x4x4"]
    for flag, most in (
        ("--pages_per_sequence=99999999", MOST_TOKENS // 128),
        ("--context_tokens=3000000000", MOST_TOKENS),
    ):
        with flagsaver.flagsaver(), pytest.raises(ValueError, match=f"{flag}: must be at most {most}: "):
            FLAGS([*arguments, flag])
            plan.plan_settings()
    with pytest.raises(ValueError, match=r"--batch=100000000: must be at most 65536"):
        planned("--batch=100000000")
