"""The kernel report: what it counts, what it prints, what it refuses."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from aot import needs_libtpu

from paged_dist.kernels.paged_attention import decode_plan
from paged_dist.kernels.paged_attention.decode_cost import decode_cost


def run(module, *flags, code=0):
    command = [sys.executable, "-P", "-m", f"paged_dist.launch.{module}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize(("D", "P", "dtype"), [(128, 128, "bfloat16"), (64, 64, "bfloat16"), (256, 24, "float32")])
@pytest.mark.parametrize("window", [None, 1, 100])
def test_the_cost_is_that_of_a_count_token_by_token(D, P, dtype, window):
    rng = np.random.default_rng(P)
    S, Hkv, W = 5, 2, max(128, D)
    lengths = np.array([0, 1, P - 1, P, P + 1, S * P, *rng.integers(0, S * P, 6)])
    starts = rng.integers(-5, S * P, lengths.size)
    p = decode_plan.Problem(len(lengths), 8, Hkv, D, 1, 64, P * D // W, W, S, "bfloat16", dtype)
    plan = decode_plan.Plan(p, decode_plan.BlockSizes(1, 1), sliding_window=window)
    tile = plan.tile * plan.tokens_per_row
    pages, tiles, live = set(), set(), 0
    for b, (end, start) in enumerate(zip(lengths, starts, strict=True)):
        for t in range(max(start, 0, end - window if window else 0), end):
            pages.add((b, t // P))
            tiles.add((b, t // tile))
            live += 1
    element = jnp.dtype(dtype).itemsize
    cost = decode_cost(plan, lengths, starts)
    assert cost.copies == 2 * len(pages) * (1 if W == 128 else Hkv * W // 128)
    assert cost.bytes_read == 2 * len(tiles) * tile * Hkv * D * element
    assert cost.live_bytes == 2 * live * Hkv * D * element


@needs_libtpu
def test_the_report_counts_live_bytes_and_compares_with_jax(tmp_path):
    out = tmp_path / "out.jsonl"
    flags = ["--chips=v5p,v6e", "--batch=4", "--context_tokens=300", "--page_size=64", f"--output={out}"]
    text = run("kernel_report", *flags)
    lines = [line.split() for line in text.splitlines()[2:]]
    assert [line[:2] for line in lines] == [[c, k] for c in ("v5p", "v6e") for k in ("paged_dist", "jax")]
    record = json.loads(out.read_text())
    ours, theirs = record["rows"][2:]
    assert ours["live_bytes"] == 2 * 4 * 300 * 128 * 2
    assert ours["bytes_read"] == 2 * 4 * 304 * 128 * 2  # rows in sixteens
    assert ours["copies"] == 2 * 4 * 5
    assert theirs["bytes_read"] == 2 * 4 * 320 * 128 * 2
    assert ours["launches"] == 1 and ours["block_sizes"][2] == 2


@pytest.mark.parametrize(
    ("module", "flags", "names"),
    [
        ("kernel_report", ["--chips=v9"], "--chips='v9': must be some of v4"),
        ("kernel_report", ["--num_q_heads=3", "--num_kv_heads=2"], "--num_q_heads=3: must be a multiple"),
        ("kernel_report", ["--model=2"], "--model=2: is no flag of this launcher"),
        ("kernel_report", ["--lengths_trace=/none"], "--lengths_trace='/none': cannot be read"),
        ("kernel_report", ["--block_sizes=3,1,2"], "pages_per_cell=3: must be a power of two"),
        ("kernel_report", ["--block_sizes=1024,16,2"], "bytes of VMEM"),
        ("kernel_report", ["--kv_dtype=int8"], "int8"),
    ],
)
def test_bad_flags_end_the_run_with_one_line(module, flags, names):
    error = run(module, *flags, code=2)
    assert names in error and len(error.splitlines()) == 1
