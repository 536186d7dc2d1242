"""Eight-bit keys and values: rounding and scales, how scales are stored, the cache that holds them, reading it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from pod_meshes import simulated_pod

import paged_dist as pd
from paged_dist.kernels.quantization import LARGEST, fp8_bits
from paged_dist.kernels.scale_layout import pack_scales, unpack_scales

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
    mesh, spec = simulated_pod(1, 1, 1), pd.CacheSpec(2, 128, 8, 128, "int8", 3)
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


@pytest.mark.parametrize("page_size", [64, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scales_cost_four_bytes_a_token_and_head(head_dim, page_size):
    spec = pd.CacheSpec(8, head_dim, 64, page_size, dtype="int8", num_layers=3)
    assert spec.bytes_per_token == 2 * 8 * 3 * (head_dim + 4)
    assert spec.bytes_total == spec.bytes_per_token * 64 * page_size


# ------------------------------------------------------------------------------- attention over it, in plain XLA
