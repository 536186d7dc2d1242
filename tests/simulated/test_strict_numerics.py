"""Every op under JAX's strict settings: ranks that do not promote, dtypes that do not promote, and 64-bit defaults."""

from __future__ import annotations

import contextlib
import functools

import jax
import numpy as np
import pytest
from pod_meshes import simulated_pod

import paged_dist as pd
from paged_dist import kernels as K
from paged_dist.kernels.cache_update import write_kv_pages

pytestmark = pytest.mark.filterwarnings("ignore:.*page_size=")


@contextlib.contextmanager
def strict(x64: bool):
    """Each setting raises where JAX would have to guess what was meant."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.enable_x64(x64):
        yield


ROWS, HEADS, GROUP, PAGE = 4, 2, 2, 16

# head_dim, page_size, dtype, layers, context
CASES = {
    "f32": (128, 16, "float32", None, 1),
    "bf16_context": (128, 16, "bfloat16", 2, 2),
    "head_dim_64": (64, 32, "bfloat16", None, 1),
    "int8_context": (128, 128, "int8", 2, 2),
    "fp8_64": (64, 64, "float8_e4m3fn", None, 1),
}


class StrictCase:
    """A mesh, an allocator with sequences, and inputs, of NumPy."""

    def __init__(self, head_dim, page_size, dtype, layers, context):
        self.mesh = simulated_pod(2, context, 1)
        self.spec = pd.CacheSpec(HEADS, head_dim, 32 * 2 * context, page_size, dtype, layers)
        self.layer = None if layers is None else 1
        self.pages = pd.PageAllocator(self.spec, self.mesh, ROWS, 4)
        for row, length in enumerate((page_size + 3, 5, 0, 2 * page_size)):
            self.pages.allocate(row, length)
        rng = np.random.default_rng(0)
        self.new = lambda *lead: (rng.standard_normal((*lead, HEADS, head_dim)).astype(np.float32) for _ in "kv")
        self.query = lambda *lead: rng.standard_normal((*lead, HEADS * GROUP, head_dim)).astype(np.float32)
        self.sample = rng.standard_normal((layers or 1, 9, HEADS, head_dim)).astype(np.float32)

    def cache(self) -> pd.PagedKVCache:
        smoothing = None
        if self.spec.is_quantized:
            sample = self.sample if self.layer is not None else self.sample[0]
            smoothing = pd.calibrate_key_smoothing(sample, num_layers=self.spec.num_layers)
        return pd.PagedKVCache.create(self.spec, self.mesh, key_smoothing=smoothing)


def cache_after_writes(case: StrictCase, implementation=None) -> pd.PagedKVCache:
    """The case's cache after every op that writes."""
    lengths, tables, how = case.pages.lengths, case.pages.block_tables, dict(implementation=implementation)
    how |= dict(layer=case.layer)
    cache = pd.write_prefill_kv(case.cache(), *case.new(ROWS, 2 * case.spec.page_size), lengths, tables, **how)
    rows, starts = np.array([1, 3], np.int32), np.array([0, 3], np.int32)
    ends = lengths[rows]
    cache = pd.write_prefill_kv(cache, *case.new(2, 6), ends, tables, starts=starts, rows=rows, **how)
    cache = pd.append_kv(cache, *case.new(ROWS), lengths - 1, tables, **how)
    cache = pd.append_kv(cache, *case.new(ROWS, 3), lengths - 3, tables, **how)
    free = np.setdiff1d(np.arange(32), case.pages.live_pages)
    copies = np.array([[tables[0, 0], free[0]], [-1, -1]], np.int32)
    return pd.copy_pages(cache, copies, implementation=implementation)


def attended(case: StrictCase, cache, implementation=None) -> list:
    """What every form of the attention op gives."""
    lengths, tables = case.pages.lengths, case.pages.block_tables
    ask = functools.partial(
        pd.sharded_paged_attention, cache=cache, lengths=lengths, block_tables=tables, layer=case.layer,
        sm_scale=0.1, implementation=implementation,
    )  # fmt: skip
    sinks = np.linspace(-1, 1, HEADS * GROUP, dtype=np.float32)
    made = [
        ask(case.query(ROWS)),
        *ask(case.query(ROWS), return_lse=True, sinks=sinks, soft_cap=5.0, sliding_window=7, output_heads="scattered"),
        *ask(case.query(ROWS, 3), return_lse=True, sliding_window=20),
    ]
    return made


@pytest.mark.parametrize(
    ("name", "x64"),
    [
        ("int8_context", False),
        ("fp8_64", True),
        *(
            pytest.param(name, x64, marks=pytest.mark.slow)
            for name, x64 in (
                ("f32", False), ("f32", True), ("head_dim_64", False), ("head_dim_64", True),
                ("bf16_context", False), ("bf16_context", True), ("int8_context", True), ("fp8_64", False),
            )
        ),
    ],
)  # fmt: skip
def test_every_op_can_be_traced(name, x64):
    """In all forms, the TPU's kernel among them, which is a branch of the program; nothing is compiled."""
    with strict(x64):
        case = StrictCase(*CASES[name])
        made = jax.eval_shape(lambda: attended(case, cache_after_writes(case)))
    head_dim = case.spec.head_dim
    assert [x.shape for x in made] == [(4, 4, head_dim), (4, 4, head_dim), (4, 4), (4, 3, 4, head_dim), (4, 3, 4)]
    assert {x.dtype for x in made} == {np.dtype(np.float32)}


@pytest.mark.slow  # the launcher below is held to its oracle
def test_a_step_gives_the_same_numbers():
    def step():
        case = StrictCase(*CASES["int8_context"])
        at = (case.pages.lengths, case.pages.block_tables)
        cache = pd.append_kv(case.cache(), *case.new(ROWS), at[0] - 1, at[1], layer=1)
        return pd.sharded_paged_attention(case.query(ROWS), cache, *at, layer=1)

    want = step()
    with strict(False):
        np.testing.assert_array_equal(step(), want)


shape = jax.ShapeDtypeStruct


def kernel_calls(head_dim, page_size, dtype):
    """Each function of `paged_dist.kernels` with shapes to trace it with."""
    query, pool = shape((2, 4, head_dim), dtype), shape((2, 8, page_size, head_dim), dtype)
    of = (pool, pool, shape((2,), np.int32), shape((2, 3), np.int32))
    starts, sinks = np.array([0, 3], np.int32), np.zeros(4, np.float32)
    several = shape((2, 3, 4, head_dim), dtype)
    more = dict(starts=starts, sinks=sinks, return_lse=True)
    yield "reference", K.ref_paged_attention, (query, *of), dict(attn_logits_soft_cap=3.0, sliding_window=5)
    for interpret in (None, True):
        how = dict(interpret=interpret)
        for inline in (True, False):
            options = dict(inline_seq_dim=inline, attn_logits_soft_cap=3.0, sliding_window=5)
            yield "page_attention", K.page_attention, (query, *of), options | how
        yield "decode", K.paged_decode_attention, (query, *of), dict(soft_cap=2.0) | more | how
        yield "decode several", K.paged_decode_attention, (several, *of), dict(sliding_window=9) | more | how
    for mode in ("kv_head", "batch"):
        yield "megacore", K.page_attention, (query, *of), dict(megacore_mode=mode, interpret=True)


@pytest.mark.parametrize(
    ("head_dim", "page_size", "dtype", "x64"),
    [
        (128, 16, "bfloat16", True),
        (64, 8, "float32", False),
        pytest.param(128, 16, "bfloat16", False, marks=pytest.mark.slow),
        pytest.param(64, 8, "float32", True, marks=pytest.mark.slow),
    ],
)
def test_every_kernel_can_be_traced_also_as_its_simulation(head_dim, page_size, dtype, x64):
    with strict(x64):
        for name, fn, operands, options in kernel_calls(head_dim, page_size, jax.numpy.dtype(dtype)):
            made = jax.eval_shape(functools.partial(fn, **options), *operands)
            assert jax.tree.leaves(made)[0].shape == operands[0].shape, name


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_every_write_kernel_can_be_traced_also_as_its_simulation(dtype, x64):
    pool, scales = shape((2, 2, 8, 128, 128), dtype), shape((2, 2, 8, 128), np.float32)
    int32, smoothing = (lambda *s: shape(s, np.int32)), shape((2, 128), np.float32)

    def write(pool, new, scales, starts, tables, smoothing, interpret):
        how = dict(key_scales=scales, value_scales=scales, key_smoothing=smoothing, interpret=interpret)
        return write_kv_pages(pool, pool, new, new, starts, starts + new.shape[1], tables, 1, **how)

    with strict(x64):
        for tokens in (1, 40):
            for interpret in (None, True):
                run = functools.partial(write, interpret=interpret)
                new = shape((2, tokens, 2, 128), np.float32)
                made = jax.eval_shape(run, pool, new, scales, int32(2), int32(2, 3), smoothing)
                assert made[0].dtype == dtype and made[2].dtype == np.float32


@pytest.mark.slow  # its parts, the copies, are traced above
def test_moves_and_saves_work(tmp_path):
    case = StrictCase(*CASES["int8_context"])
    with strict(True):
        cache, pages = pd.resize(cache_after_writes(case), 256, case.pages)
        cache, pages = pd.reshard(cache, pages, simulated_pod(1, 4, 2))
        pd.save(tmp_path / "saved", cache, pages)
        cache, pages = pd.restore(tmp_path / "saved", case.mesh)
    assert pages.lengths.tolist() == case.pages.lengths.tolist()
