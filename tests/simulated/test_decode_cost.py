"""What a decode launch copies out of the pools: counted token by token, and as the simulated kernels do it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import needs_libtpu, one_chip_mesh
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from page_attention_cases import Case, make

from paged_dist.kernels import BlockSizes, paged_decode_attention
from paged_dist.kernels.attention.problem import Problem
from paged_dist.kernels.decode.launch_plan import LaunchPlan
from paged_dist.kernels.decode.traffic import live_bytes, page_traffic
from paged_dist.launch.planning import jax_kernel


def plan_of(case: Case, sizes=None, **options) -> LaunchPlan:
    width = max(128, case.D)
    rows, pages = case.P * case.D // width, len(case.lengths) * case.S
    shape = (len(case.lengths), case.Hq, case.Hkv, case.D, 1, pages, rows, width, case.S)
    problem = Problem(*shape, case.query_dtype, case.dtype)
    return LaunchPlan(problem, sizes or BlockSizes(1, 1), sliding_window=case.sliding_window, **options)


def counted_token_by_token(case: Case, unit: int) -> tuple[int, int, int]:
    """(copies, bytes read, live bytes), from the set of live tokens alone; `unit` counts rows."""
    pages, units, live = set(), set(), 0
    unit_tokens = unit * max(1, 128 // case.D)
    for b, (first, end) in enumerate(zip(case.first_tokens, case.lengths, strict=True)):
        for token in range(first, end):
            page, at = divmod(token, case.P)
            pages.add((b, page))
            units.add((b, page, at // unit_tokens))
            live += 1
    tokens = sum(min(unit_tokens, case.P - at * unit_tokens) for _, _, at in units)
    token_bytes = 2 * case.Hkv * case.D * jnp.dtype(case.dtype).itemsize
    return 2 * len(pages) * (1 if case.D <= 128 else case.Hkv * case.D // 128), tokens * token_bytes, live * token_bytes


@pytest.mark.parametrize("unit", [1, 8, 16, 1024])
@pytest.mark.parametrize(
    ("D", "P", "dtype"), [(128, 128, "bfloat16"), (64, 64, "bfloat16"), (256, 24, "float32"), (128, 8, "float32")]
)
@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize("starts", [False, True])
def test_the_count_is_that_of_each_live_token(D, P, dtype, window, starts, unit):
    rng, S = np.random.default_rng([P, unit]), 3
    lengths = (0, 1, P - 1, P, P + 1, S * P, S * P + 99, *rng.integers(0, S * P, 9).tolist())
    first = tuple(rng.integers(-5, S * P + 5, len(lengths)).tolist()) if starts else None
    # A length beyond the table is a full table's, and a window counts from its end.
    inside = tuple(min(n, S * P) for n in lengths)
    case = Case("", D=D, P=P, S=S, dtype=dtype, lengths=inside, starts=first, sliding_window=window)
    plan = plan_of(case)
    read = page_traffic(plan, lengths, first, unit=unit)
    assert (*read, live_bytes(plan, lengths, first)) == counted_token_by_token(case, unit)


SIMULATED = [
    Case(
        "starts_and_window",
        P=32,
        dtype="bfloat16",
        lengths=(0, 128, 100, 33, 17),
        starts=(0, 31, 99, 33, 0),
        sliding_window=80,
    ),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            Case("no_starts", P=32, lengths=(0, 17, 128, 96, 33)),
            Case("packed", D=64, P=64, S=2, dtype="bfloat16", lengths=(128, 31, 33)),
            Case("wide_rows", Hq=8, Hkv=1, D=256, lengths=(9, 31)),
            Case("page_24", P=24, S=5, dtype="bfloat16", sliding_window=33, lengths=(120, 60)),
        )
    ),
]


@pytest.fixture
def dmas(monkeypatch):
    """Bytes of each DMA out of HBM that simulated kernels execute from now on."""
    sizes, execute = [], interpret_pallas_call.DMA.execute_read
    names = interpret_pallas_call.TPU_MEMORY_SPACE_NAMES

    def execute_and_note(dma):
        execute(dma)
        if names[dma.src_memory_space] in ("any", "hbm"):
            sizes.append(dma.data_size)

    monkeypatch.setattr(interpret_pallas_call.DMA, "execute_read", execute_and_note)
    return sizes


@pytest.mark.parametrize("case", SIMULATED, ids=lambda case: case.name)
def test_the_count_is_what_the_simulated_kernel_copies(case, dmas):
    check_count(case, case.sliding_window, dmas)


def test_a_window_that_is_an_argument_of_the_program_spares_the_same_pages(dmas):
    (case, *_) = SIMULATED
    check_count(case, jnp.int32(case.sliding_window), dmas)


def check_count(case, sliding_window, dmas):
    (query, k, v, lengths, tables), _ = make(case)
    width = max(128, case.D)
    k, v = (x.reshape(*x.shape[:2], -1, width) for x in (k, v))
    plan = plan_of(case)
    starts = None if case.starts is None else jnp.asarray(case.starts, jnp.int32)
    options = dict(sliding_window=sliding_window, block_sizes=plan.sizes, interpret=pltpu.InterpretParams())
    jax.block_until_ready(paged_decode_attention(query, k, v, lengths, tables, starts=starts, **options))
    whole_query = query.size * query.dtype.itemsize * plan.tokens_per_row * plan.tokens_per_row
    dmas.remove(whole_query)
    assert (len(dmas), sum(dmas)) == page_traffic(plan, lengths, case.starts)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("dtype", "pages"), [("float32", 2), pytest.param("float32", 4, marks=SLOW), ("int8", 2)])
def test_jax_s_own_count_is_what_its_simulated_kernel_copies(dtype, pages, dmas):
    case = Case("", Hq=16, Hkv=2, P=8, S=4, lengths=(0, 1, 8, 9, 32, 31, 0))
    (query, k, v, lengths, tables), _ = make(case)
    tables = np.clip(tables, 0, k.shape[1] - 1)  # its dead pages are read: they must exist
    op, scales = paged_attention, ()
    if dtype == "int8":
        op, scales = jax_kernel._over_int8, 2 * (jnp.ones((*k.shape[:-1], 1)),)
        k, v = (jnp.nan_to_num(x).astype(jnp.int8) for x in (k, v))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="zero")):
        jax.block_until_ready(op(query, k, v, lengths, tables, *scales, pages_per_compute_block=pages))
    plan = plan_of(dataclasses.replace(case, dtype=dtype))
    assert (len(dmas), sum(dmas)) == jax_kernel.jax_page_copies(plan, lengths, pages)
    blocks = sum(math.ceil(n / (8 * pages)) for n in case.lengths)
    sizes = [8 * 128 * 4] if dtype == "float32" else [8 * 128, 8 * 128 * 4]  # scales: as wide as the pages
    assert sorted(dmas) == sorted(2 * 2 * blocks * pages * sizes)


@needs_libtpu
def test_jax_s_own_uses_both_cores_where_there_are_two():
    plan = plan_of(Case("", Hq=8, Hkv=2))
    modes = [jax_kernel.call(plan, 2, one_chip_mesh(chip))[0].keywords["megacore_mode"] for chip in ("v5e", "v5p")]
    assert modes == [None, "kv_head"]
