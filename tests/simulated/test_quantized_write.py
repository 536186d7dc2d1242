"""Writing quantised tokens: values and scales of every form against NumPy, in place, and nothing else touched."""

from __future__ import annotations

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import needs_libtpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from simulated import RACES, assert_no_races
from test_composed import PODS, loop_arguments, pod_mesh
from test_kv_write import bits, pod, shard_tables

import paged_dist as pd
from paged_dist.kernels import write_kv_pages
from paged_dist.kernels.cache_update.tiles import choose_tile_rows, pool_shape
from paged_dist.kernels.scale_layout import pack_scales, unpack_scales
from paged_dist.launch.planning.hlo_text import ops_around_kernels


def write_in_numpy(arrays, new, starts, ends, tables, layer=0):
    """arrays: pages [L, Hkv, N, P, D] of K and V and their scales [L, Hkv, N, P], with `new` written by token."""
    written = [np.array(x) for x in arrays]
    page_size, pages = arrays[0].shape[3], arrays[0].shape[2]
    for b, t in np.ndindex(new[0].shape[:2]):
        position = starts[b] + t
        if starts[b] < 0 or position >= ends[b] or position // page_size >= tables.shape[1]:
            continue
        page = tables[b, position // page_size]
        if 0 <= page < pages:
            for pool, x in zip(written, new, strict=True):
                pool[layer, :, page, position % page_size] = np.asarray(x)[b, t]
    return written


def arrays_of(rng, layers, heads, pages, page_size, head_dim, dtype):
    """Pages of any bits and scales of any, NaN among them: what is not written stays."""
    shape = (layers, heads, pages, page_size, head_dim)
    pools = [rng.integers(0, 256, shape, np.uint8).view(dtype) for _ in "kv"]
    scales = [rng.random(shape[:-1]).astype(np.float32) for _ in "kv"]
    for x in scales:
        x[..., ::3] = np.nan
    return pools + scales


def stored(arrays, interpret, head_dim):
    """(pools, scales by name) as a cache keeps them: in XLA's form fp8 is its bits, as on CPU."""
    tokens_per_row = max(1, 128 // head_dim)
    packed = lambda x: jnp.asarray(x.reshape(*x.shape[:-2], -1, max(128, head_dim)))
    pools = [packed(x if interpret or x.dtype == np.int8 else x.view(np.uint8)) for x in arrays[:2]]
    scales = (pack_scales(jnp.asarray(x), tokens_per_row) for x in arrays[2:])
    return pools, dict(zip(("key_scales", "value_scales"), scales, strict=True))


def check(written, expected, head_dim):
    page_size = expected[0].shape[-2]
    for got, want in zip(written[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(bits(got).reshape(-1), bits(want).reshape(-1))
    for got, want in zip(written[2:], expected[2:], strict=True):
        got = unpack_scales(got, page_size, max(1, 128 // head_dim))
        np.testing.assert_array_equal(bits(got), bits(want))


# head_dim, page_size, new tokens, kv heads, dtype
CASES = [
    (128, 16, 1, 2, "int8"),  # all sequences' scales in one row
    (128, 128, 1, 3, "float8_e4m3fn"),
    (64, 128, 1, 2, "int8"),
    (64, 256, 1, 1, "float8_e4m3fn"),
    (64, 16, 5, 2, "float8_e4m3fn"),
    (128, 8, 3, 1, "int8"),
    (256, 64, 70, 1, "float8_e4m3fn"),
    (64, 32, 70, 2, "int8"),
    (128, 256, 300, 1, "int8"),
    (64, 384, 40, 1, "float8_e4m3fn"),  # a page's second tokens begin inside a row of scales
]
OTHER = {"int8": "float8_e4m3fn", "float8_e4m3fn": "int8"}


@pytest.mark.parametrize(
    ("head_dim", "page_size", "tokens", "heads", "dtype", "interpret"),
    [
        pytest.param(
            *case,
            kind,
            interpret,
            marks=() if kind == dtype and (interpret is None) == (i % 2 == 1) else pytest.mark.slow,
            id="-".join(map(str, (*case, kind, "simulated" if interpret else "xla"))),
        )
        for i, (*case, dtype) in enumerate(CASES)
        for kind in (dtype, OTHER[dtype])
        for interpret in (None, RACES)
    ],
)
def test_tokens_and_scales_are_where_the_table_says_and_nothing_else_moved(
    head_dim, page_size, tokens, heads, dtype, interpret
):
    batch, width, pages = 5, 4, 32
    rng = np.random.default_rng(head_dim + page_size + tokens)
    arrays = arrays_of(rng, 2, heads, pages, page_size, head_dim, dtype)
    new = [jnp.asarray(rng.standard_normal((batch, tokens, heads, head_dim)), jnp.float32) for _ in "kv"]
    smoothing = jnp.exp(jnp.asarray(rng.standard_normal((heads, head_dim)), jnp.float32))
    tables = rng.permutation(pages)[: batch * width].reshape(batch, width).astype(np.int32)
    if tokens == 1:
        tables = np.arange(batch * width, dtype=np.int32).reshape(width, batch).T  # neighbours write side by side
    tables[1, 1:] = [-1, 2**30, -(2**30)]  # outside the pool: skipped
    starts = np.array([page_size - 1, page_size - 2, 3, -1, 2 if tokens == 1 else width * page_size - 1], np.int32)
    ends = starts + tokens
    ends[0] = min(ends[0], page_size + 3)

    pools, scales = stored(arrays, interpret, head_dim)
    write = jax.jit(lambda *a, **k: write_kv_pages(*a, jnp.int32(1), **k, interpret=interpret))
    got = write(*pools, *new, starts, ends, tables, **scales, key_smoothing=smoothing)
    (key, key_scales), (value, value_scales) = (
        pd.quantize_kv(x, dtype, smoothing=s) for x, s in zip(new, (smoothing, None), strict=True)
    )
    expected = write_in_numpy(arrays, (key, value, key_scales, value_scales), starts, ends, tables, layer=1)
    check(got, expected, head_dim)
    if interpret is RACES:
        assert_no_races()


@pytest.mark.parametrize("interpret", [None, RACES], ids=["xla", "simulated"])
def test_rounds_of_writes_of_more_sequences_than_a_step_takes_agree_with_numpy(interpret):
    """40 sequences, so two steps, with rows of scales that eight pages of either step share."""
    rng, batch, page_size = np.random.default_rng(7), 40, 16
    arrays = arrays_of(rng, 1, 1, 2 * batch, page_size, 128, "int8")
    tables = rng.permutation(2 * batch).reshape(batch, 2).astype(np.int32)
    pools, scales = stored(arrays, interpret, 128)
    write = jax.jit(functools.partial(write_kv_pages, interpret=interpret))
    for tokens in (1, 3) if interpret else (1, 3, 1):
        new = [rng.standard_normal((batch, tokens, 1, 128)).astype(np.float32) for _ in "kv"]
        starts = rng.integers(-1, 2 * page_size + 2, batch).astype(np.int32)
        ends = (starts + rng.integers(0, tokens + 2, batch)).astype(np.int32)
        *pools, key_scales, value_scales = write(*pools, *new, starts, ends, tables, **scales)
        scales = dict(key_scales=key_scales, value_scales=value_scales)
        made = [pd.quantize_kv(jnp.asarray(x), "int8") for x in new]
        ends = np.minimum(ends, starts + tokens)
        arrays = write_in_numpy(arrays, [m[0] for m in made] + [m[1] for m in made], starts, ends, tables)
        check((*pools, *scales.values()), arrays, 128)


@pytest.mark.parametrize("interpret", [None, RACES], ids=["xla", "simulated"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_odd_vectors_are_stored_as_quantize_kv_makes_them(dtype, interpret):
    rng = np.random.default_rng(1)
    new = rng.standard_normal((16, 1, 2, 128)) * 10.0 ** rng.integers(-38, 38, (16, 1, 2, 1))
    new[0], new[1], new[2, :, 0, 0] = 0.0, new[1] * 1e-30, 1e30
    new = jnp.asarray(new, jnp.float32)
    arrays = arrays_of(rng, 1, 2, 16, 128, 128, dtype)
    tables, starts = np.arange(16, dtype=np.int32)[:, None], np.arange(16, dtype=np.int32)
    pools, scales = stored(arrays, interpret, 128)
    got = write_kv_pages(*pools, new, -new, starts, starts + 1, tables, **scales, interpret=interpret)
    (key, key_scales), (value, value_scales) = pd.quantize_kv(new, dtype), pd.quantize_kv(-new, dtype)
    made = (key, value, key_scales, value_scales)
    check(got, write_in_numpy(arrays, made, starts, starts + 1, tables), 128)


POOL = ((1, 2, 8, 128, 128), "int8")
GOOD = dict(key_scales=((1, 2, 8, 128), "float32"), value_scales=((1, 2, 8, 128), "float32"))


@pytest.mark.parametrize(
    ("pool", "scales", "names"),
    [
        (POOL, {}, "key_scales=None"),
        (POOL, GOOD | dict(value_scales=((1, 2, 8, 64), "float32")), r"value_scales\.shape=\(1, 2, 8, 64\)"),
        (POOL, GOOD | dict(key_scales=((1, 2, 8, 128), "bfloat16")), r"key_scales\.dtype='bfloat16'"),
        (POOL, GOOD | dict(key_smoothing=((128,), "float32")), r"key_smoothing\.shape=\(128,\).*\(2, 128\)"),
        ((POOL[0], "float32"), GOOD, r"key_scales=\(1, 2, 8, 128\): must be None where the pools are float32"),
        ((POOL[0], "bfloat16"), dict(key_smoothing=((2, 128), "float32")), "key_smoothing=.*bfloat16"),
        (((1, 2, 8, 24, 128), "int8"), GOOD, "page_size=24.*divide 128"),
        (((1, 2, 12, 16, 128), "int8"), GOOD, "num_pages=12.*multiple of 8"),
    ],
)
def test_scales_that_do_not_fit_the_pools_are_refused(pool, scales, names):
    int32 = jnp.zeros(1, jnp.int32)
    new = jnp.zeros((1, 1, 2, 128))
    with pytest.raises(ValueError, match=names):
        write_kv_pages(
            jnp.zeros(*pool), jnp.zeros(*pool), new, new, int32, int32, int32[None],
            **{name: jnp.zeros(*x) for name, x in scales.items()},
        )  # fmt: skip


@pytest.mark.parametrize("page_size", [8, 24, 128, 256])
def test_a_tile_of_8_rows_serves_8_bit_pools_too(page_size):
    pool = pool_shape(np.zeros((1, 8, 4, page_size, 128), np.int8), 128)
    assert choose_tile_rows(pool, 1, 1) == 8


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_the_xla_form_widens_no_pool(dtype):
    cache = pd.PagedKVCache.create(pd.CacheSpec(4, 128, 256, dtype=dtype), pod(shape=(1, 1, 1)))
    new, int32 = jnp.ones((2, 4, 128)), jnp.zeros(2, jnp.int32)
    append = jax.jit(pd.append_kv, donate_argnums=0)
    memory = append.lower(cache, new, new, int32, int32[:, None]).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**18 and memory.alias_size_in_bytes >= cache.spec.bytes_total


# ---------------------------------------------------------------------------------------------- the sharded ops


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize(
    ("kind", "implementation"),
    [(AxisType.Auto, RACES), (AxisType.Explicit, None)],
    ids=["auto_simulated", "explicit_xla"],
)
@pytest.mark.parametrize(("head_dim", "page_size", "dtype"), [(128, 128, "float8_e4m3fn"), (64, 16, "int8")])
def test_append_kv_quantises_each_row_on_its_own_shard(head_dim, page_size, dtype, kind, implementation):
    mesh, rng, pages = pod(kind), np.random.default_rng(3), max(16, 2048 // page_size)
    tables = shard_tables(rng, 2, pages, 4)
    arrays = arrays_of(rng, 2, 4, pages, page_size, head_dim, dtype)
    smoothing = np.exp(rng.standard_normal((2, 4, head_dim))).astype(np.float32)
    cache = pd.PagedKVCache.from_pages(*map(jnp.asarray, arrays), key_smoothing=smoothing, mesh=mesh)
    positions = np.array([3, -1, page_size + 6, page_size * 4], np.int32)  # row 1 is idle, row 3 past its table
    new = [rng.standard_normal((4, 4, head_dim)).astype(np.float32) for _ in "kv"]
    cache = pd.append_kv(
        cache, *map(jnp.asarray, (*new, positions, tables)), layer=jnp.int32(1), implementation=implementation
    )
    (key, key_scales), (value, value_scales) = (
        pd.quantize_kv(jnp.asarray(x)[:, None], dtype, smoothing=s)
        for x, s in zip(new, (smoothing[1], None), strict=True)
    )
    made = (key, value, key_scales, value_scales)
    expected = write_in_numpy(arrays, made, positions, positions + 1, tables, layer=1)
    for got, want in zip(cache.to_pages(), expected, strict=True):
        np.testing.assert_array_equal(bits(got), bits(want))
    np.testing.assert_array_equal(cache.key_smoothing, smoothing)


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize(
    "implementation", [None, pytest.param("pallas_interpret", marks=pytest.mark.slow)], ids=["xla", "simulated"]
)
def test_prompts_in_chunks_of_some_rows_equal_all_at_once(implementation):
    mesh, rng = pod(), np.random.default_rng(9)
    spec = pd.CacheSpec(4, 128, 32, 64, dtype="int8", num_layers=2)
    tables = jnp.asarray(shard_tables(rng, 2, 32, 4))
    lengths = np.array([150, 0, 64, 129], np.int32)
    key, value = (rng.standard_normal((4, 150, 4, 128)).astype(np.float32) for _ in "kv")
    create = lambda: pd.PagedKVCache.create(spec, mesh, key_smoothing=np.full((2, 4, 128), 3.0))
    whole = pd.write_prefill_kv(create(), *map(jnp.asarray, (key, value, lengths)), tables, layer=1)
    parts = create()
    for start in (0, 75):
        rows = np.array([3, 0, 2, -1], np.int32)  # the last of them is padding
        chunk = lambda x, rows=rows, start=start: jnp.asarray(x[rows, start : start + 75])
        parts = pd.write_prefill_kv(
            parts, chunk(key), chunk(value), jnp.asarray(lengths[rows]), tables, starts=jnp.full(4, start, jnp.int32),
            rows=jnp.asarray(rows), layer=jnp.int32(1), implementation=implementation,
        )  # fmt: skip
    empty = [np.asarray(x) for x in create().to_pages()]
    (key, key_scales), (value, value_scales) = (
        pd.quantize_kv(jnp.asarray(x), "int8", smoothing=s) for x, s in ((key, jnp.float32(3.0)), (value, None))
    )
    made = (key, value, key_scales, value_scales)
    expected = write_in_numpy(empty, made, np.zeros(4, np.int32), lengths, np.asarray(tables), layer=1)
    for cache in (whole, parts):
        for got, want in zip(cache.to_pages(), expected, strict=True):
            np.testing.assert_array_equal(got, want)


# ------------------------------------------------------------------------------------- compiled for absent chips


def append_loop(cache, key, value, lengths, tables):
    """Eight steps of appends to every layer."""

    def layer(carry, index):
        cache, lengths = carry
        return (pd.append_kv(cache, key, value, lengths - 1, tables, layer=index), lengths), None

    def step(_, carry):
        layers = cache.spec.num_layers
        carry = layer(carry, None)[0] if layers is None else jax.lax.scan(layer, carry, jnp.arange(layers))[0]
        return carry[0], carry[1] + 1

    return jax.lax.fori_loop(0, 8, step, (cache, lengths))


def assert_in_place(compiled, spec: pd.CacheSpec, mesh) -> None:
    """No value as large as a layer's scales on a chip is made, no shard talks, and the whole cache is aliased."""
    scales = 4 * spec.num_kv_heads * spec.num_pages * spec.page_size // mesh.size
    assert aot.values_as_large_as(compiled.as_text(), scales) == []
    assert aot.collectives(compiled.as_text()) == []
    assert compiled.memory_analysis().alias_size_in_bytes >= spec.bytes_per_chip(mesh)


@needs_libtpu
@pytest.mark.parametrize(
    ("head_dim", "page_size", "heads", "layers", "dtype"),
    [(128, 128, 8, 4, "int8"), pytest.param(64, 64, 1, None, "float8_e4m3fn", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("topology", "data", "model"), PODS, ids=[p[0] for p in PODS])
def test_appends_copy_neither_pool_nor_scales(topology, data, model, head_dim, page_size, heads, layers, dtype):
    mesh = pod_mesh(topology, data, model)
    spec = pd.CacheSpec(heads * model, head_dim, 4096 * data, page_size, dtype=dtype, num_layers=layers)
    cache = pd.PagedKVCache.abstract(spec, mesh, key_smoothing=True)
    compiled = aot.compile_on(mesh, append_loop, cache, *loop_arguments(spec, mesh)[2:], donate_argnums=0)
    assert_in_place(compiled, spec, mesh)


@needs_libtpu
@pytest.mark.parametrize(
    ("head_dim", "page_size", "heads", "dtype"),
    [(128, 128, 8, "float8_e4m3fn"), pytest.param(64, 16, 1, "int8", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("chip", aot.CHIP_TOPOLOGIES)
def test_prompts_copy_neither_pool_nor_scales(chip, head_dim, page_size, heads, dtype):
    mesh = pod_mesh(aot.CHIP_TOPOLOGIES[chip], 1, 1)
    spec = pd.CacheSpec(heads, head_dim, 2**22 // (page_size * heads), page_size, dtype=dtype, num_layers=2)
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
    new, cache = of("bfloat16", 2, 300, heads, head_dim), pd.PagedKVCache.abstract(spec, mesh)
    write = lambda *a: pd.write_prefill_kv(*a, layer=1)
    compiled = aot.compile_on(mesh, write, cache, new, new, of("int32", 2), of("int32", 2, 32), donate_argnums=0)
    assert_in_place(compiled, spec, mesh)


@needs_libtpu
@pytest.mark.parametrize("head_dim", [128, 64])
def test_one_token_quantised_takes_no_more_xla_ops_than_bf16(head_dim):
    """The hot path: a step of many layers feels every microsecond beside the kernel."""
    mesh, ops = pod_mesh("v6e:2x2", 1, 1), {}
    for dtype in ("bfloat16", "int8", "float8_e4m3fn"):
        spec = pd.CacheSpec(8, head_dim, 512, 128, dtype=dtype)
        cache = pd.PagedKVCache.abstract(spec, mesh)
        args = loop_arguments(spec, mesh)[2:]
        compiled = aot.compile_on(mesh, pd.append_kv, cache, *args, donate_argnums=0)
        ops[dtype] = len(ops_around_kernels(compiled.as_text()))
    assert ops["int8"] == ops["float8_e4m3fn"] == ops["bfloat16"]
