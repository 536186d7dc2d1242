"""Eight-bit keys and values: rounding and scales, how scales are stored, the cache that holds them, reading it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import paged_dist as pd
from paged_dist.kernels.attention.oracle import attention_oracle
from paged_dist.kernels.attention.xla_form import attend_pages_xla
from paged_dist.kernels.quantization import LARGEST, fp8_bits
from paged_dist.kernels.scale_layout import pack_scales, unpack_scales
from paged_dist.ops.attention import smoothed_query

DTYPES = ["int8", "float8_e4m3fn"]


def rows(*shape, seed=0) -> np.ndarray:
    """Vectors of very different sizes, zeros and the ends of f32 among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 7, shape[:-1])[..., None]
    x[0] = 0.0
    x[1] = -np.abs(x[1])
    x[2] *= 1e-42 / np.abs(x[2]).max()  # below the normal numbers
    x[3] *= 3e38 / np.abs(x[3]).max()
    return x.astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_x_over_scale_rounded_to_nearest_even(dtype):
    x = rows(64, 128)
    values, scales = map(np.asarray, pd.quantize_kv(jnp.asarray(x), dtype))
    assert values.dtype == dtype and scales.dtype == np.float32 and scales.shape == (64,)
    assert np.isfinite(values.astype(np.float32)).all() and np.isfinite(scales).all()
    assert np.abs(values.astype(np.float32)).max() == LARGEST[dtype]  # so int8 never takes -128
    live = scales > 0
    np.testing.assert_array_equal(~live, [i in (0, 2) for i in range(64)])  # zeros, and what a TPU takes for zeros
    assert not values[~live].astype(np.float32).any()
    np.testing.assert_allclose(scales[live], np.abs(x[live]).max(axis=-1) / LARGEST[dtype], rtol=1e-6)
    exact = x[live].astype(np.float64) / np.abs(x[live]).max(axis=-1, keepdims=True) * LARGEST[dtype]
    if dtype == "int8":  # within half a step, and an ulp of x / scale
        assert np.abs(values[live] - exact).max() <= 0.5 + 1e-4
    else:
        step = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(np.abs(exact), 1e-9))), -6) / 8
        assert (np.abs(values[live].astype(np.float64) - exact) <= step * 0.5 + 1e-4).all()


def test_halves_go_to_the_even_value():
    x = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    np.testing.assert_array_equal(pd.quantize_kv(x, "int8")[0], [[127, 0, 2, 2, 0, -2]])
    x = jnp.array([[448.0, 17.0, 19.0, -21.0]])  # steps of 2 from 16 on
    np.testing.assert_array_equal(pd.quantize_kv(x, "float8_e4m3fn")[0].astype(np.float32), [[448, 16, 20, -20]])


def test_bits_of_fp8_by_integers_are_those_of_the_conversion():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    middle = (codes[1:] + codes[:-1]) / 2
    x = np.concatenate([codes, middle, np.nextafter(middle, 999), np.nextafter(middle, -999), [np.nan, -0.0, 1e-30]])
    x = x.astype(np.float32)
    want = x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(jax.jit(fp8_bits)(x), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_the_inverse_within_the_rounding(dtype):
    x = jnp.asarray(rows(32, 4, 128)[4:])
    smoothing = jnp.exp(jnp.asarray(rows(4, 128, seed=1) % 1.0))
    made = pd.dequantize_kv(*pd.quantize_kv(x, dtype, smoothing=smoothing), smoothing=smoothing)
    size = jnp.abs(x / smoothing).max(axis=-1, keepdims=True) * smoothing
    assert jnp.all(jnp.abs(made - x) <= size * (0.5 / 127 if dtype == "int8" else 1 / 16) * 1.001)
    assert pd.dequantize_kv(*pd.quantize_kv(x, dtype), dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_smoothing_evens_channels_out_and_lowers_the_error_of_logits():
    rng = np.random.default_rng(2)
    size = np.exp(rng.standard_normal((2, 128)) * 1.5)
    size[:, 5] = 0.0
    keys = jnp.asarray(rng.standard_normal((300, 2, 128)) * size, jnp.float32)
    query = jnp.asarray(rng.standard_normal((2, 128)), jnp.float32)
    smoothing = pd.calibrate_key_smoothing(keys)
    assert smoothing.shape == (2, 128) and smoothing.dtype == jnp.float32
    assert np.isfinite(smoothing).all() and (smoothing > 0).all() and (smoothing[:, 5] == 1).all()
    even = np.sqrt(np.mean(np.square(keys / smoothing), axis=0))
    np.testing.assert_allclose(np.delete(even, 5, axis=1), even[:, :1].repeat(127, axis=1), rtol=1e-4)

    def error(smoothing):
        made = pd.dequantize_kv(*pd.quantize_kv(keys, "int8", smoothing=smoothing))
        logits = jnp.einsum("thd,hd->th", made, query if smoothing is None else query * smoothing)
        return np.abs(logits - jnp.einsum("thd,hd->th", keys, query)).mean()

    assert error(smoothing) < error(None) / 2


def int8_error(keys, smoothing=None) -> float:
    """Relative error of keys that go through int8, whole array."""
    made = pd.dequantize_kv(*pd.quantize_kv(jnp.asarray(keys), "int8", smoothing=smoothing), smoothing=smoothing)
    return float(np.linalg.norm(np.asarray(made, np.float64) - keys) / np.linalg.norm(keys))


@pytest.mark.parametrize("quiet", [1e-6, 1e-30, 1e-42], ids=str)
def test_a_channel_that_the_sample_shows_too_small_takes_little_from_the_others(quiet):
    rng = np.random.default_rng(3)
    sample, keys = (rng.standard_normal((n, 2, 128)).astype(np.float32) for n in (300, 100))
    sample[:, 1, 7] *= quiet
    smoothing = pd.calibrate_key_smoothing(jnp.asarray(sample))
    assert int8_error(keys, smoothing) < 2 * int8_error(keys)
    assert float(smoothing[1].min()) > 0.2 and float(smoothing[1].max()) < 1.5


def test_whatever_the_sample_factors_are_finite_and_their_ratio_bounded():
    rng = np.random.default_rng(4)
    normal = rng.standard_normal((64, 2, 128)).astype(np.float32)
    loud, half = np.ones((2, 128), np.float32), np.ones((2, 128), np.float32)
    loud[0, 3], half[:, 64:] = 1e20, 1e-20
    for scale in (1e25, 1e-25, 1e38 / np.abs(normal).max(), loud, half, 1e30 * half):
        smoothing = np.asarray(pd.calibrate_key_smoothing(normal * np.float32(scale)), np.float64)
        assert np.isfinite(smoothing).all() and (smoothing > 0).all()
        assert (smoothing.max(axis=-1) / smoothing.min(axis=-1) < 1025 * 1024).all()
    even = pd.calibrate_key_smoothing(jnp.asarray(normal * np.float32(1e25)))
    np.testing.assert_allclose(even, pd.calibrate_key_smoothing(jnp.asarray(normal)), rtol=1e-4)
    assert (pd.calibrate_key_smoothing(jnp.zeros((3, 2, 128))) == 1).all()


def test_one_call_calibrates_stacked_layers_each_by_its_own_sample():
    rng = np.random.default_rng(5)
    keys = (rng.standard_normal((3, 40, 2, 128)) * rng.uniform(0.1, 10, (3, 1, 2, 128))).astype(np.float32)
    mesh, spec = pod(shape=(1, 1, 1)), pd.CacheSpec(2, 128, 8, 128, "int8", 3)
    smoothing = pd.calibrate_key_smoothing(keys, num_layers=spec.num_layers)
    for layer, mine in enumerate(smoothing):
        np.testing.assert_allclose(mine, pd.calibrate_key_smoothing(keys[layer]), rtol=1e-6)
    assert pd.PagedKVCache.create(spec, mesh, key_smoothing=smoothing).key_smoothing.shape == (3, 2, 128)
    says = r"key_smoothing\.shape=\(2, 128\): must be \(3, 2, 128\).*calibrate_key_smoothing\(sample, num_layers=3\)"
    with pytest.raises(ValueError, match=says):
        pd.PagedKVCache.create(spec, mesh, key_smoothing=pd.calibrate_key_smoothing(keys))
    in_jit = jax.jit(lambda x: pd.calibrate_key_smoothing(x, num_layers=3))
    np.testing.assert_allclose(in_jit(keys), smoothing, rtol=1e-5)
    for odd in (np.nan, np.inf):
        keys[1, 3, 0, 5] = odd
        shows = ~np.isfinite(in_jit(keys)).all(axis=-1)
        assert shows.tolist() == [[False, False], [True, False], [False, False]], "a cache refuses such factors"


ODD = np.where(np.arange(256).reshape(1, 2, 128) == 3, np.inf, np.float32(1))


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: pd.calibrate_key_smoothing(ODD), r"keys='1 of 256 not finite in f32': must be finite; leave those"),
        (lambda: pd.calibrate_key_smoothing(-ODD), "keys='1 of 256 not finite"),
        (lambda: pd.calibrate_key_smoothing(np.where(ODD < 2, ODD, np.nan)), "keys='1 of 256 not finite"),
        (lambda: pd.calibrate_key_smoothing(jnp.ones((0, 2, 4))), r"keys\.shape=\(0, 2, 4\).*one token"),
        (lambda: pd.calibrate_key_smoothing(jnp.ones((3, 2, 4)), num_layers=3), r"keys\.shape=\(3, 2, 4\).*num_layers"),
        (lambda: pd.calibrate_key_smoothing(jnp.ones((3, 5, 2, 4)), num_layers=2), "num_layers=2: keys"),
        (lambda: pd.quantize_kv(jnp.ones((2, 4)), "bfloat16"), "dtype='bfloat16'.*int8"),
        (lambda: pd.dequantize_kv(jnp.ones((2, 4)), jnp.ones(3)), r"scales\.shape=\(3,\).*\(2,\)"),
        (lambda: pd.calibrate_key_smoothing(jnp.ones((2, 4))), r"keys\.shape=\(2, 4\).*one token"),
    ],
)
def test_bad_arguments_are_refused(call, names):
    with pytest.raises(ValueError, match=names):
        call()


@pytest.mark.parametrize("tokens_per_row", [1, 2])
@pytest.mark.parametrize("page_size", [16, 64, 128, 256])
def test_scales_are_stored_as_documented(page_size, tokens_per_row):
    scales = np.random.default_rng(0).random((2, 3, 16, page_size)).astype(np.float32)
    stored = pack_scales(jnp.asarray(scales), tokens_per_row)
    assert stored.shape == (2, 3, 16 * page_size // 128, 128)
    flat, half = np.asarray(stored).reshape(2, 3, -1), page_size // tokens_per_row
    for page, token in [(0, 0), (0, 1), (3, 7), (15, page_size - 1)]:
        number = page * page_size + token % tokens_per_row * half + token // tokens_per_row
        np.testing.assert_array_equal(flat[..., number], scales[..., page, token])
    np.testing.assert_array_equal(unpack_scales(stored, page_size, tokens_per_row), scales)


# ------------------------------------------------------------------------------------------------ the cache


def pod(kind=AxisType.Auto, shape=(2, 1, 4)):
    return jax.make_mesh(shape, ("data", "context", "model"), axis_types=(kind,) * 3)


def pages_of(dtype, head_dim, page_size, layers, seed=0):
    """Key and value pages and scales [Hkv = 4, N, P(, D)], layers before."""
    rng = np.random.default_rng(seed)
    shape = (*([layers] if layers else []), 4, max(32, 2048 // page_size), page_size, head_dim)
    pages = [jnp.asarray(rng.integers(-100, 100, shape), jnp.int8).astype(dtype) for _ in "kv"]
    return *pages, *(jnp.asarray(rng.random(shape[:-1]), jnp.float32) for _ in "kv")


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "page_size", "layers"), [(128, 128, None), (64, 64, 2), (64, 16, None)])
def test_pages_round_trip_through_a_sharded_cache(head_dim, page_size, layers, dtype, kind):
    mesh, arrays = pod(kind), pages_of(dtype, head_dim, page_size, layers)
    spec = pd.CacheSpec(4, head_dim, arrays[0].shape[-3], page_size, dtype=dtype, num_layers=layers)
    smoothing = np.full(spec.key_smoothing_shape, 2.0)
    cache = pd.PagedKVCache.from_pages(*arrays, key_smoothing=smoothing, mesh=mesh)
    abstract = pd.PagedKVCache.abstract(spec, mesh, key_smoothing=True)
    empty = pd.PagedKVCache.create(spec, mesh, key_smoothing=smoothing)
    again = pd.PagedKVCache.from_pages(*cache.to_pages(), key_smoothing=cache.key_smoothing)
    for made in (cache, empty, again):
        assert jax.tree.structure(made) == jax.tree.structure(abstract)
        for got, want in zip(jax.tree.leaves(made), jax.tree.leaves(abstract), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
    lead = () if layers is None else (None,)
    split = cache.partition_specs()
    assert split.key_scales == P(*lead, "model", ("data", "context"), None)
    assert split.key_smoothing == P(*lead, "model", None)
    for made in (cache, again):
        for got, want in zip(made.to_pages(), arrays, strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))
    plain = pd.PagedKVCache.create(spec, mesh)
    assert plain.key_smoothing is None and plain.partition_specs().key_smoothing is None
    assert sum(x.nbytes for x in jax.tree.leaves(plain)) == spec.bytes_total == 8 * spec.bytes_per_chip(mesh)
    assert isinstance(cache.key_scales.sharding, NamedSharding)


@pytest.mark.parametrize("page_size", [64, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scales_cost_four_bytes_a_token_and_head(head_dim, page_size):
    spec = pd.CacheSpec(8, head_dim, 64, page_size, dtype="int8", num_layers=3)
    assert spec.bytes_per_token == 2 * 8 * 3 * (head_dim + 4)
    assert spec.bytes_total == spec.bytes_per_token * 64 * page_size


KEYS, VALUES, KEY_SCALES, VALUE_SCALES = pages_of("int8", 128, 16, None)


@pytest.mark.parametrize(
    ("arguments", "options", "names"),
    [
        ((KEYS, VALUES), {}, "key_scales=None.*both key_scales and value_scales"),
        ((KEYS, VALUES, KEY_SCALES), {}, "value_scales=None"),
        ((KEYS, VALUES, KEY_SCALES[:, :8], VALUE_SCALES), {}, r"key_scales\.shape=\(4, 8, 16\).*\(4, 128, 16\)"),
        ((KEYS, VALUES, KEY_SCALES, VALUE_SCALES.astype("bfloat16")), {}, r"value_scales\.dtype='bfloat16'.*float32"),
        (
            (KEYS.astype("bfloat16"), VALUES.astype("bfloat16"), KEY_SCALES, VALUE_SCALES),
            {},
            r"key_scales=\(4, 128, 16\): must be None with bfloat16 pages",
        ),
        (
            (KEYS.astype("float32"), VALUES.astype("float32")),
            dict(key_smoothing=np.ones((4, 128))),
            r"key_smoothing=\(4, 128\): must be None in a cache of float32",
        ),
        (
            (KEYS, VALUES, KEY_SCALES, VALUE_SCALES),
            dict(key_smoothing=np.ones(128)),
            r"key_smoothing\.shape=\(128,\).*\(4, 128\)",
        ),
        ((KEYS, VALUES, KEY_SCALES, VALUE_SCALES), dict(key_smoothing=np.zeros((4, 128))), "finite and positive"),
        (
            (KEYS, VALUES, KEY_SCALES, VALUE_SCALES),
            dict(key_smoothing=np.where(np.eye(4, 128), np.nan, 1)),
            "finite and positive",
        ),
    ],
)
def test_arrays_that_do_not_make_a_cache_are_refused(arguments, options, names):
    with pytest.raises(ValueError, match=names):
        pd.PagedKVCache.from_pages(*arguments, **options)


# ------------------------------------------------------------------------------- attention over it, in plain XLA


@pytest.mark.parametrize(
    ("head_dim", "page_size", "dtype"),
    [
        pytest.param(*shape, dtype, marks=() if dtype == often else pytest.mark.slow)
        for shape, often in (
            ((128, 16), "int8"),
            ((64, 64), "uint8"),
            ((128, 128), "float8_e4m3fn"),
            ((64, 256), "int8"),
        )
        for dtype in ("int8", "float8_e4m3fn", "uint8")
    ],
)
def test_attention_over_quantised_pages_is_the_oracle_and_dead_ones_change_nothing(head_dim, page_size, dtype):
    rng, width, tokens_per_row = np.random.default_rng(page_size), 4, max(1, 128 // head_dim)
    lengths = np.array([0, 1, page_size, page_size + 3, width * page_size], np.int32)
    tables = rng.permutation(24)[:20].reshape(5, width).astype(np.int32)
    meant = "float8_e4m3fn" if dtype == "uint8" else dtype  # as its bits
    x = jnp.asarray(rng.standard_normal((2, 1, 2, 24, page_size, head_dim)), jnp.float32)
    values, scales = pd.quantize_kv(x, meant)
    query = rng.standard_normal((5, 4, head_dim)).astype(np.float32)
    kept = np.asarray(pd.dequantize_kv(values, scales))[:, 0]
    options = dict(sm_scale=0.1, soft_cap=3.0, sliding_window=2 * page_size)
    want, want_lse = attention_oracle(query, *kept, lengths, tables, **options)

    live = np.zeros((24, page_size), bool)
    for b, length in enumerate(lengths):
        for t in range(length):
            live[tables[b, t // page_size], t % page_size] = True
        tables[b, -(-length // page_size) :] = 2**30
    scales = pack_scales(jnp.where(live, scales, jnp.nan), tokens_per_row)
    if meant != "int8":
        values = jnp.where(live[..., None], values, jnp.nan)
    pools = values.reshape(*values.shape[:-2], page_size // tokens_per_row, -1)
    pools = jax.lax.bitcast_convert_type(pools, jnp.uint8) if dtype == "uint8" else pools
    got, lse = jax.jit(lambda *a: attend_pages_xla(*a[:5], key_scales=a[5], value_scales=a[6], **options))(
        query, *pools, lengths, tables, *scales
    )
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
def test_no_pool_is_widened_nor_scales_copied(dtype):
    """XLA on CPU gathers what it cannot compute with by converting the whole pool."""
    pool = jax.ShapeDtypeStruct((2, 4, 1024, 128, 128), dtype)
    scales = jax.ShapeDtypeStruct((2, 4, 1024, 128), jnp.float32)
    int32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
    query = jax.ShapeDtypeStruct((8, 8, 128), jnp.bfloat16)
    attend = lambda *a: attend_pages_xla(*a[:5], key_scales=a[5], value_scales=a[6])
    compiled = jax.jit(attend).lower(query, pool, pool, int32(8), int32(8, 16), scales, scales).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**23
    assert not re.search(r"\b(f32|f16|bf16)\[8192,", compiled.as_text().replace("f32[8192,128]", ""))


@pytest.mark.slow  # test_quantized_attend.py makes the claim of the op itself
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [None, 2])
def test_what_a_cache_hands_to_attention_stands_for_the_tokens_written(layers, dtype):
    """Keys divided by the smoothing, queries multiplied by it: the oracle knows of neither."""
    rng, spec = np.random.default_rng(4), pd.CacheSpec(2, 128, 8, dtype=dtype, num_layers=layers)
    key, value = (rng.standard_normal((3, 200, 2, 128)).astype(np.float32) for _ in "kv")
    query = rng.standard_normal((3, 4, 128)).astype(np.float32)
    smoothing = np.exp(0.5 * rng.standard_normal(spec.key_smoothing_shape))
    key = (key * smoothing.reshape(-1, 2, 128)[-1]).astype(np.float32)  # channels as uneven as it says
    lengths, tables = np.array([200, 0, 77], np.int32), np.arange(6, dtype=np.int32).reshape(3, 2)
    layer = None if layers is None else jnp.int32(1)
    cache = pd.PagedKVCache.create(spec, pod(shape=(1, 1, 1)), key_smoothing=smoothing)
    cache = pd.write_prefill_kv(cache, *map(jnp.asarray, (key, value, lengths, tables)), layer=layer)

    smoothed = smoothed_query(jnp.asarray(query), cache.layer_smoothing(layer))
    *pools, stacked_layer = cache.stacked(layer)
    got, _ = attend_pages_xla(
        smoothed, *pools, lengths, tables, stacked_layer, sm_scale=0.1, **cache.stacked_scales()
    )  # fmt: skip
    pages = np.zeros((2, 2, 8, 128, 128), np.float32)
    for pool, new in zip(pages, (key, value), strict=True):
        for b, length in enumerate(lengths):
            for t in range(length):
                pool[:, tables[b, t // 128], t % 128] = new[b, t]
    want, _ = attention_oracle(query, *pages, lengths, tables, sm_scale=0.1)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < (0.02 if dtype == "int8" else 0.08)
