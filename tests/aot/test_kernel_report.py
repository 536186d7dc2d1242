"""`kernel_report`: that it prints what was counted and compiled, and what it refuses."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import flagsaver
import jax
import jax.numpy as jnp
import pytest
from aot import needs_libtpu

from paged_dist.kernels import BlockSizes, paged_decode_attention
from paged_dist.kernels.decode import pallas_call, traffic
from paged_dist.kernels.target import Target
from paged_dist.launch import accuracy, kernel_report, xla_report
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.help_text import help_text
from paged_dist.launch.common.run_program import UsageError
from paged_dist.launch.common.slices import CHIP_OF_GENERATION
from paged_dist.launch.planning import absent_chips, hlo_text

# What is read from a compiled program

HLO = """
%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %n = bf16[8,128]{1,0:T(8,128)(2,1)} negate(%p)
}

ENTRY %main (q: bf16[8,128], k: bf16[64,128]) -> bf16[8,128] {
  %q = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %c = s32[1]{0:T(128)} constant({0})
  %copy-start.1 = (s32[8]{0:T(128)S(1)}, s32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%c)
  %copy-done.1 = s32[8]{0:T(128)S(1)} copy-done(%copy-start.1)
  %fusion.2 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%q), kind=kLoop, calls=%fused
  %copy.3 = bf16[64,128]{1,0:T(8,128)(2,1)} copy(%k)
  %kernel.4 = (bf16[8,128]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)}) custom-call(%c, %fusion.2, %copy.3), \
custom_call_target="tpu_custom_call", backend_config={"scoped_memory_configs":[{"memory_space":"1","offset":"0",\
"size":"99"}],"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"5120"}]}
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%kernel.4), index=0
}
"""


def test_what_is_read_from_a_compiled_program_s_text():
    assert hlo_text.ops_around_kernels(HLO) == ["copy-start copy-start.1", "fusion fusion.2", "copy copy.3"]
    assert hlo_text.kernel_vmem(HLO) == [5120]
    pool = 64 * 128 * 2
    assert [value.split()[:2] for value in hlo_text.values_as_large_as(HLO, pool)] == [["copy", "copy.3"]]
    assert hlo_text.values_as_large_as(HLO, pool + 1) == []


# The launcher


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "paged_dist.launch.kernel_report", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout, done.stderr


@needs_libtpu
def test_the_report_prints_and_writes_what_was_counted_and_compiled(tmp_path):
    out, trace = tmp_path / "out.jsonl", tmp_path / "trace.csv"
    trace.write_text("ContextTokens,GeneratedTokens\n64,1\n100,60\n1,1\n9,9\n")
    small = ["--num_q_heads=8", "--num_kv_heads=1", "--page_size=64", "--block_sizes=2,1,2", "--jax_block_tokens=128"]
    code, text, err = run(
        "--chips=v5e,v5p",
        "--batch=3",
        f"--lengths_trace={trace}",
        "--sliding_window=70",
        f"--output={out}",
        *small,
    )
    assert code == 0, err
    # Lengths 64, 100 + 30, 1; a window of 70 begins at 0, 60, 0. Pages of 64: [0], [0 1 2], [0]. Rows in sixteens:
    # 64; 16 of the first page (48 to 64), 64, 16 of the last (128 to 144); 16.
    token = 2 * 128 * 2
    ours = dict(copies=2 * 5, bytes_read=(64 + 16 + 64 + 16 + 16) * token, live_bytes=(64 + 70 + 1) * token)
    # Blocks of two pages, whole, from token 0 on: 1, 2 and 1 of them.
    theirs = dict(copies=2 * 4 * 2, bytes_read=4 * 128 * token, live_bytes=ours["live_bytes"])
    rows = [line.split() for line in text.splitlines() if line.startswith(("v5e", "v5p"))]
    assert [row[:2] for row in rows] == [[chip, kernel] for chip in ("v5e", "v5p") for kernel in ("paged_dist", "jax")]
    record = json.loads(out.read_text())
    assert record["settings"]["lengths"] == [64, 130, 1] and record["versions"]["jax"] == jax.__version__.split("+")[0]
    for row, kernel in zip(rows, record["kernels"], strict=True):
        expected = ours if kernel["kernel"] == "paged_dist" else theirs
        assert {name: kernel[name] for name in expected} == expected
        read, live = expected["bytes_read"], expected["live_bytes"]
        assert row[8:11] == [str(expected["copies"]), f"{read / 1e6:.2f}", f"{read / live:.3f}"]
        assert row[-1] == "0" and kernel["pool_copies"] == [] and row[-2] == str(len(kernel["xla_ops"]))
        assert kernel["launches"] == 1 and kernel["lower_s"] > 0 and kernel["compile_s"] > 0
        assert 0 < kernel["vmem_used"] < 16 << 20
        if kernel["kernel"] == "paged_dist":
            assert kernel["block_sizes"] == dict(pages_per_cell=2, cells_per_step=1, steps_ahead=2)
            assert kernel["vmem_used"] <= kernel["vmem_planned"] and row[5] == f"{kernel['vmem_used'] / 1024:.0f}"
            # Buffers of 128 rows: three of K, three of V; and the rest of the plan's.
            assert kernel["vmem_planned"] > 2 * 3 * 128 * 128 * 2
    assert "no sliding window" in text


@needs_libtpu
@pytest.mark.parametrize("kv_dtype", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_8_bit_pages_are_reported_with_their_scales(tmp_path, kv_dtype):
    out = tmp_path / "out.jsonl"
    small = ["--num_q_heads=4", "--num_kv_heads=2", "--page_size=64", "--context_tokens=100"]
    code, text, err = run("--chips=v6e", "--batch=3", f"--kv_dtype={kv_dtype}", f"--output={out}", *small)
    assert code == 0, err
    record = json.loads(out.read_text())
    ours, *theirs = record["kernels"]
    assert record["settings"]["dtype"] == {"int8": "int8", "fp8": "float8_e4m3fn"}[kv_dtype]
    plan = kernel_report.plan_of(kernel_report.KernelReportSettings(**record["settings"]), Target())
    assert (plan.query_dtype.name, plan.cache_dtype.name) == ("bfloat16", record["settings"]["dtype"])
    assert (ours["copies"], ours["bytes_read"]) == traffic.page_traffic(plan, [100] * 3)
    assert ours["live_bytes"] == traffic.live_bytes(plan, [100] * 3)
    assert ours["pool_copies"] == [] and ours["launches"] == 1 and f"{ours['bytes_read'] / 1e6:.2f}" in text
    assert "and scales" in text
    if kv_dtype == "fp8":
        assert theirs == [] and "JAX's own has no fp8 pages with scales" in text
    else:  # a block of two pages for each sequence and head, scales as wide as the pages and four times their bytes
        assert theirs[0]["copies"] == 2 * 2 * (3 * 2 * 2)
        assert theirs[0]["bytes_read"] == 2 * (3 * 2 * 2) * 64 * 128 * (1 + 4)


@pytest.mark.parametrize(
    ("sizes", "window", "dtype"),
    [
        (None, 100, "bfloat16"),
        ((4, 2, 2), None, "bfloat16"),
        pytest.param(None, 2**40, "bfloat16", marks=pytest.mark.slow),
        (None, None, "int8"),
        pytest.param(None, 100, "float8_e4m3fn", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("chip", ["v5p", "v7x", *(pytest.param(c, marks=pytest.mark.slow) for c in ("v4", "v6e"))])
def test_the_plan_is_the_one_that_the_op_launches(monkeypatch, chip, sizes, window, dtype):
    head_dim = 64 if dtype == "bfloat16" else 128
    settings = kernel_report.KernelReportSettings(
        ("v5e",), (500, 20), 8, 2, head_dim, 32, window, dtype, sizes, False, None
    )
    kind = {"v4": "TPU v4", "v5p": "TPU v5", "v6e": "TPU v6 lite", "v7x": "TPU7x"}[chip]
    plan = kernel_report.plan_of(settings, Target.of(SimpleNamespace(device_kind=kind)))
    launched, kernel = [], pallas_call.decode_kernel
    monkeypatch.setattr(pallas_call, "decode_kernel", lambda plan, refs: (launched.append(plan), kernel(plan, refs)))
    p = plan.problem
    query = jax.ShapeDtypeStruct((p.batch, p.num_q_heads, p.head_dim), p.query_dtype)
    pool = jax.ShapeDtypeStruct((p.num_kv_heads, p.num_pages, p.rows, p.width), p.cache_dtype)
    lengths, table = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((p.batch,), (p.batch, p.pages_per_sequence)))

    scales = ()
    if p.is_quantized:
        scales = 2 * (jax.ShapeDtypeStruct(pool.shape[:-1], jnp.float32),)

    def attend(*arrays):
        scales = dict(zip(("key_scales", "value_scales"), arrays[5:], strict=False))
        block_sizes = None if sizes is None else BlockSizes(*sizes)
        options = dict(sliding_window=window, block_sizes=block_sizes, interpret=False)
        return paged_decode_attention(*arrays[:5], **scales, **options)

    jax.clear_caches()
    jax.eval_shape(attend, query, pool, pool, lengths, table, *scales)  # for an unknown chip: traced for every kind
    assert plan in launched


@needs_libtpu
def test_a_kernel_that_does_not_compile_is_said_to_and_ours_fails_the_run(monkeypatch, capsys):
    def refuse(*_):
        raise ValueError("too large\nfor this chip")

    monkeypatch.setattr(absent_chips, "timed_compile", refuse)
    with settings_of(chips=["v6e"], batch=2):
        assert kernel_report.main(()) == 1
    assert capsys.readouterr().out.count("does not compile: ValueError: too large\n") == 2


def test_without_libtpu_the_report_says_what_to_install(monkeypatch):
    monkeypatch.setattr("paged_dist.mesh.topology.has_libtpu", lambda: False)
    with settings_of(), pytest.raises(UsageError, match=r"libtpu.*not installed: pip install"):
        kernel_report.main(())


def settings_of(**values):
    """The flags as the console script sets them, and `values`."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])
    return flagsaver.flagsaver(**{**kernel_report.KERNEL_REPORT_PROGRAM.defaults, **values})


@needs_libtpu
def test_padded_heads_are_counted_as_stored_with_what_pads_the_query():
    s = kernel_report.KernelReportSettings(("v6e",), (500, 20), 8, 2, 96, 64, None, "bfloat16", None, False, None)
    mesh = absent_chips.one_chip_mesh("v6e")
    plan = kernel_report.plan_of(s, Target.of(mesh.devices.flat[0]))
    (ours,) = kernel_report.report_chip(s, "v6e", mesh, plan)
    token = 2 * 2 * 128 * 2
    assert ours["live_bytes"] == 520 * token and ours["bytes_read"] == (448 + 64 + 32) * token
    assert ours["pool_copies"] == [] and any("pad" in op for op in ours["xla_ops"])
    assert "head_dim 96 (stored as 128), bfloat16" in kernel_report.kernel_report_table(s, [ours], {})


BAD_FLAGS = {
    "chip": (dict(chips=["v5e", "v9"]), "--chips='v9': must be some of v4, v5e, v5p, v6e, v7x"),
    "no_chip": (dict(chips=[]), "--chips='': must name some of v4"),
    "heads": (dict(num_q_heads=3, num_kv_heads=2), "--num_q_heads=3: must be a multiple of --num_kv_heads=2"),
    "batch": (dict(batch=0), "--batch=0: must be at least 1"),
    "context_tokens": (dict(context_tokens=0), "--context_tokens=0: must be at least 1"),
    "window": (dict(sliding_window=0), "--sliding_window=0: must be at least 1"),
    "jax_block": (dict(jax_block_tokens=-1), "--jax_block_tokens=-1: must be at least 1"),
    "head_dim": (dict(head_dim=0), "--head_dim=0: must be at least 1"),
    "page_size": (dict(head_dim=64, page_size=24), "page_size=24: must be a multiple of 16 at head_dim 64"),
    "page_and_scales": (dict(kv_dtype="int8", page_size=48), "page_size=48: with int8 and fp8 must divide 128"),
    "dtype": (dict(kv_dtype="f16"), "--kv_dtype='f16': is no cache dtype"),
    "two_sizes": (dict(block_sizes=["4", "8"]), "--block_sizes='4,8': must be pages_per_cell,cells_per_step,steps_ah"),
    "sizes": (dict(block_sizes=["3", "1", "2"]), "pages_per_cell=3: must be a power of two"),
    "sizes_over_vmem": (dict(block_sizes=["1024", "16", "2"]), "bytes of VMEM, of which the kernel may take"),
    "table_over_smem": (dict(batch=2, page_size=8, context_tokens=9_999_999), "one row needs more than the"),
    "trace": (dict(lengths_trace="/no/such"), "--lengths_trace='/no/such': cannot be read"),
    "output": (dict(output="/proc/out"), "--output='/proc/out': folder /proc cannot be written"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_are_refused_before_anything_is_compiled(monkeypatch, name):
    change, message = BAD_FLAGS[name]
    monkeypatch.setattr("paged_dist.mesh.topology.has_libtpu", lambda: True)
    monkeypatch.setattr(absent_chips, "one_chip_mesh", lambda chip: pytest.fail("went on to compile"))
    with settings_of(**change), pytest.raises(UsageError) as refusal:
        kernel_report.main(())
    assert message in str(refusal.value)


def test_a_trace_of_too_few_requests_is_refused(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("ContextTokens,GeneratedTokens\n5,3\n")
    with settings_of(lengths_trace=str(path), batch=2), pytest.raises(ValueError, match="has 1 requests, --batch=2"):
        kernel_report.kernel_report_settings()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--chips=v9", "--chips='v9': must be some of v4, v5e, v5p, v6e, v7x"),
        ("--context=8", "--context=8: is no flag of this launcher; give --context_tokens"),
    ],
)
def test_a_bad_flag_ends_the_run_with_one_line(argument, message):
    assert run(argument) == (2, "", f"paged-dist-kernel-report: error: {message}\n")


def test_the_chips_of_the_flag_are_those_of_the_slices_that_can_be_planned():
    assert set(kernel_report.KNOWN_CHIPS) == {chip.name for chip in CHIP_OF_GENERATION.values()}


@pytest.mark.parametrize(
    ("launcher", "program"),
    [
        (accuracy, accuracy.ACCURACY_PROGRAM),
        (kernel_report, kernel_report.KERNEL_REPORT_PROGRAM),
        (xla_report, xla_report.XLA_REPORT_PROGRAM),
    ],
)
def test_help_says_one_default_of_each_flag(launcher, program):
    with flagsaver.flagsaver():
        for name, value in program.defaults.items():  # as `Program.run` does
            flags.FLAGS.set_default(name, value)
        words = " ".join(help_text(launcher.__name__).split())
    of_flags = re.split(r" (?=--[\[\w])", words)
    assert [of for of in of_flags if of.lower().count("default: ") > 1] == []
    assert any(of.endswith(f"(default: {program.defaults['batch']})") for of in of_flags if of.startswith("--batch:"))
