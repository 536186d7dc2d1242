"""kernel_report before anything is compiled: the plan that it counts, and what it refuses."""

import re
from types import SimpleNamespace

import flagsaver
import jax
import jax.numpy as jnp
import pytest

from paged_dist.kernels import BlockSizes, paged_decode_attention
from paged_dist.kernels.decode import pallas_call
from paged_dist.kernels.target import Target
from paged_dist.launch import accuracy, kernel_report, xla_report
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common import slices
from paged_dist.launch.common.help_text import help_text
from paged_dist.launch.common.run_program import UsageError
from paged_dist.launch.planning import absent_chips


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


def test_without_libtpu_the_report_says_what_to_install(monkeypatch):
    monkeypatch.setattr("paged_dist.mesh.topology.has_libtpu", lambda: False)
    with (
        flagsaver.launcher_flags(kernel_report),
        pytest.raises(UsageError, match=r"libtpu.*not installed: pip install"),
    ):
        kernel_report.main(())


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
    with flagsaver.launcher_flags(kernel_report, **change), pytest.raises(UsageError) as refusal:
        kernel_report.main(())
    assert message in str(refusal.value)


def test_a_trace_of_too_few_requests_is_refused(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("ContextTokens,GeneratedTokens\n5,3\n")
    with (
        flagsaver.launcher_flags(kernel_report, lengths_trace=str(path), batch=2),
        pytest.raises(ValueError, match="has 1 requests, --batch=2"),
    ):
        kernel_report.kernel_report_settings()


def test_the_chips_of_the_flag_are_those_of_the_slices_that_can_be_planned():
    assert set(kernel_report.KNOWN_CHIPS) == {chip.name for chip in slices.CHIP_OF_GENERATION.values()}


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
