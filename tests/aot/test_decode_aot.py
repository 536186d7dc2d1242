"""The fast decode kernel compiled ahead of time for real chips: what Mosaic and XLA make of it."""

import contextlib
import re

import jax
import jax.numpy as jnp
import pytest
from aot import CHIP_TOPOLOGIES, compile_on, needs_libtpu, one_chip_mesh, values_as_large_as
from decode_programs import decode_program_text, decode_shapes, num_kernels
from one_chip_cases import FP8, INT8

from paged_dist.kernels import paged_decode_attention
from paged_dist.launch.planning.hlo_text import ops_around_kernels

pytestmark = needs_libtpu
on_every_chip = pytest.mark.parametrize("chip", CHIP_TOPOLOGIES)


SHAPES = {
    "gqa": (dict(), {}),
    "one_head": (dict(Hq=8, Hkv=1, N=512), {}),
    "mha_page_64": (dict(Hq=4, Hkv=4, R=64, N=256), {}),
    "page_16": (dict(Hq=8, Hkv=1, R=16, S=256, N=4096), {}),
    "page_8": (dict(Hq=16, Hkv=2, R=8, S=40, N=4096), {}),
    "page_24": (dict(Hq=4, Hkv=2, R=24, S=7, N=512), dict(starts=True)),
    "page_24_f32": (dict(Hq=4, Hkv=2, R=24, S=7, N=512, dtype="float32"), {}),
    "page_256_window": (dict(R=256, S=3), dict(sliding_window=1000, soft_cap=30.0)),
    "group_of_seven_starts": (dict(B=3, Hq=28, Hkv=4, S=5, N=128), dict(starts=True)),
    "group_of_three_f32_query": (dict(Hq=24, query_dtype="float32"), {}),
    "head_dim_256": (dict(Hq=16, Hkv=2, D=256, W=256, N=128), dict(sinks=True)),
    "head_dim_64_packed": (dict(Hq=64, Hkv=8, D=64, R=64, N=128), dict(sliding_window=100, sinks=True)),
    "large_batch_packed": (dict(B=1024, Hq=32, Hkv=4, D=64, R=64, S=8, N=4096), dict(sinks=True)),
    "many_heads": (dict(Hq=32, Hkv=32, N=32), {}),
    "layers": (dict(L=4), dict(layer=True)),
}


WITH_LSE = ("gqa", "head_dim_64_packed")  # the others' takes the same path as the first's


# Hundreds of copies in straight-line code take the compiler long; one chip's prove it, `-m slow` does the others.
LONG = ("page_8", "page_16", "many_heads")
# v7x compiles every shape, the others, whose compilers take what it takes, a fifth each;
# `-m slow` the rest.
OFTEN = {"v7x": (0, 1), "v4": (0, 5), "v5p": (1, 5), "v5e": (3, 5), "v6e": (2, 5)}  # from which shape on, every n-th
ALSO_SLOW = {(chip, name) for chip, (i, n) in OFTEN.items() for name in SHAPES if name not in list(SHAPES)[i::n]}
ALSO_SLOW |= {(chip, name) for chip in CHIP_TOPOLOGIES for name in LONG if chip != "v7x"}
ALSO_SLOW.add(("v7x", "page_24"))  # as long, and page_24_f32 has its tables
SPLIT = ("large_batch_packed",)


@pytest.mark.parametrize(
    ("chip", "name", "lse"),
    [
        pytest.param(
            chip,
            name,
            lse,
            marks=pytest.mark.slow if (chip, name) in ALSO_SLOW or (lse and chip != "v7x") else (),
        )
        for chip in CHIP_TOPOLOGIES
        for name in SHAPES
        for lse in (False, True)
        if not lse or name in WITH_LSE
    ],
)
def test_one_kernel_and_no_copy_on_every_chip(chip, name, lse):
    shape, options = SHAPES[name]
    arrays = decode_shapes(**shape)
    B, Hq, _ = arrays[0].shape
    kinds = dict(starts=((B,), jnp.int32), sinks=((Hq,), jnp.float32), layer=((), jnp.int32))
    given = {k: jax.ShapeDtypeStruct(*kinds[k]) if k in kinds else v for k, v in options.items()}
    assert num_kernels(decode_program_text(chip, arrays, return_lse=lse, **given)) == 1 or name in SPLIT


QUANTIZED = {
    "one_head": dict(Hq=8, Hkv=1, N=512),
    "gqa": dict(N=512),
    "page_64": dict(Hq=8, Hkv=2, R=64, N=256),
    "page_16": dict(Hq=8, Hkv=1, R=16, S=64, N=4096),
    "page_256_heads_in_one_register": dict(Hq=4, Hkv=4, R=256, S=16),
    "head_dim_256": dict(Hq=16, Hkv=2, D=256, W=256, N=512),
}


# test_composed.py compiles the other dtype for each chip.
QUANTIZED_OFTEN = [("v4", "one_head", "int8"), ("v5e", "gqa", "float8_e4m3fn"), ("v5p", "one_head", "float8_e4m3fn")]
QUANTIZED_OFTEN += [("v6e", "one_head", "int8"), ("v7x", "gqa", "int8")]


@pytest.mark.parametrize(
    ("chip", "name", "dtype"),
    [
        pytest.param(chip, name, dtype, marks=() if (chip, name, dtype) in QUANTIZED_OFTEN else pytest.mark.slow)
        for chip in CHIP_TOPOLOGIES
        for name in QUANTIZED
        for dtype in ("int8", "float8_e4m3fn")
    ],
)
def test_eight_bit_pages_compile_on_every_chip_and_nothing_is_copied(chip, name, dtype):
    arrays = decode_shapes(**QUANTIZED[name], dtype=dtype)
    scales = jax.ShapeDtypeStruct(arrays[1].shape[:-1], jnp.float32)
    text = decode_program_text(chip, arrays, key_scales=scales, value_scales=scales)
    assert num_kernels(text) == 1
    if arrays[1].shape[2] == 128:  # pages of any other size have their scales copied, as the docstring says
        assert values_as_large_as(text, scales.size * 4) == []


@pytest.mark.parametrize(
    ("B", "S"), [(32, 33), (256, 4), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((32, 4), (32, 32), (8, 64)))]
)
@pytest.mark.parametrize("chip", ["v5e", pytest.param("v7x", marks=pytest.mark.slow)])
def test_the_page_table_reaches_the_kernel_as_xla_stores_it(chip, B, S):
    text = decode_program_text(chip, decode_shapes(B=B, S=S, Hq=8, Hkv=1, N=512))
    before, after = text[text.index("ENTRY") :].split("custom-call(", 1)
    for part in (before, after):
        assert re.findall(r" = (\S+) (?:copy|transpose|reshape|fusion)\(", part) == []


@pytest.mark.parametrize("return_lse", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["output", "lse"])
@pytest.mark.parametrize(
    "chip", [pytest.param(c, marks=() if c in ("v5e", "v7x") else pytest.mark.slow) for c in CHIP_TOPOLOGIES]
)
def test_results_stay_in_hbm_where_the_program_goes_on_with_them(chip, return_lse):
    """In VMEM (memory space 1), where XLA likes to put them, each row's DMA became branches: 30% of a v6e step."""

    def projected(weights, *args):
        output, *lse = jax.tree.leaves(paged_decode_attention(*args, return_lse=return_lse))
        return jnp.dot(output.reshape(32, 1024), weights), *(jnp.exp(x) for x in lse)

    weights = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    text = compile_on(one_chip_mesh(chip), projected, weights, *decode_shapes(Hq=8, Hkv=1)).as_text()
    (launch,) = re.findall(r"paged_decode_attention\S* = (.*?) custom-call\(", text)
    assert "bf16[32,8,128]" in launch and "S(1)" not in launch


@pytest.mark.parametrize(
    ("chip", "B", "S"),
    [pytest.param(c, 256, 1024, marks=() if c in ("v5p", "v6e") else pytest.mark.slow) for c in CHIP_TOPOLOGIES]
    + [pytest.param(c, 1024, 1024, marks=pytest.mark.slow) for c in CHIP_TOPOLOGIES],
)
def test_tables_beyond_scalar_memory_become_several_launches(chip, B, S):
    text = decode_program_text(chip, decode_shapes(B=B, S=S, Hq=8, Hkv=1, N=2048))
    assert num_kernels(text) == B // 128


@on_every_chip
def test_a_row_that_scalar_memory_cannot_hold_is_refused(chip):
    with pytest.raises(ValueError, match=r"block_tables\.shape=\(2, 300000\).*one row.*SMEM.*larger pages"):
        decode_program_text(chip, decode_shapes(B=2, S=300_000, Hq=8, Hkv=1))


@pytest.mark.parametrize(
    ("chip", "in_scope"),
    [
        pytest.param(chip, scope, marks=pytest.mark.slow if scope and chip in ("v4", "v5e", "v6e") else ())
        for chip in CHIP_TOPOLOGIES
        for scope in (False, True)
    ],
)
def test_both_cores_work_where_a_device_has_two(chip, in_scope):
    """Also in a plain jit that is lowered for an absent chip, where nothing tells the tracer which."""
    mesh = one_chip_mesh(chip)
    scope = jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if in_scope else contextlib.nullcontext()
    with scope:
        text = compile_on(mesh, paged_decode_attention, *decode_shapes(Hq=8, Hkv=1)).as_text()
    assert num_kernels(text) == 1
    assert ("paged_decode_attention_on_two_cores" in text) == (chip in ("v4", "v5p"))


@pytest.mark.parametrize(
    "chip", [c if c in ("v5p", "v7x") else pytest.param(c, marks=pytest.mark.slow) for c in CHIP_TOPOLOGIES]
)
def test_an_output_that_is_all_that_a_program_returns_is_not_copied(chip):
    """The compiler of jax 0.10 copied it: a kernel's only result, pinned to HBM."""
    text = decode_program_text(chip, decode_shapes(Hq=8, Hkv=1, N=512))
    assert [op for op in ops_around_kernels(text) if op.split()[0] == "copy"] == []


ONE_HEAD = dict(Hq=8, Hkv=1, N=512)


COMPILED = {
    "four": (4, ONE_HEAD, {}),
    "sixteen_of_sixteen_heads": (16, dict(Hq=16, Hkv=1, N=512), dict(return_lse=True)),
    "gqa_window": (3, dict(), dict(sliding_window=1000)),
    "gqa_sixteen": (16, dict(Hq=64), dict(return_lse=True)),
    "packed_sinks": (5, dict(Hq=16, Hkv=2, D=64, R=64, N=512), dict(sinks=True)),
    "head_dim_256_f32_query": (8, dict(Hq=16, Hkv=2, D=256, W=256, N=128, query_dtype="float32"), {}),
    "many_heads": (2, dict(Hq=32, Hkv=32, N=32), {}),
    "page_16": (4, dict(Hq=8, Hkv=1, R=16, S=256, N=4096), {}),
    "int8": (4, dict(N=512, dtype=INT8), dict(scales=True)),
    "fp8_sixteen": (16, dict(**ONE_HEAD, dtype=FP8), dict(scales=True)),
    "fp8_sixteen_gqa": (16, dict(Hq=64, N=512, dtype=FP8), dict(scales=True)),
}


AT_ONCE = {"v4": "four", "v5e": "packed_sinks", "v5p": "sixteen_of_sixteen_heads", "v6e": "gqa_window", "v7x": "int8"}


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "name"),
    [
        pytest.param(chip, name, marks=() if name == AT_ONCE[chip] else pytest.mark.slow)
        for chip in CHIP_TOPOLOGIES
        for name in COMPILED
    ],
)
def test_it_compiles_on_every_chip_and_no_pool_is_copied(chip, name):
    Q, shape, options = COMPILED[name]
    query, *arrays = decode_shapes(**shape)
    B, Hq, D = query.shape
    query_bytes = Q * Hq * D * query.dtype.itemsize  # of a sequence; with more, a batch may take several launches
    query = jax.ShapeDtypeStruct((B, Q, Hq, D), query.dtype)
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = jax.ShapeDtypeStruct((Hq,), jnp.float32)
    if options.pop("scales", False):
        scales = jax.ShapeDtypeStruct(arrays[0].shape[:-1], jnp.float32)
        options |= dict(key_scales=scales, value_scales=scales)
    assert num_kernels(decode_program_text(chip, (query, *arrays), **options)) == 1 or query_bytes > 1 << 16
