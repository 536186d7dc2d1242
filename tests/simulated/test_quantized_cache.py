"""Caches of 8-bit keys and values over simulated devices, and attention over them in plain XLA."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pod_meshes import simulated_pod

import paged_dist as pd
from paged_dist.kernels.attention.oracle import attention_oracle
from paged_dist.kernels.attention.xla_form import attend_pages_xla
from paged_dist.kernels.scale_layout import pack_scales
from paged_dist.ops.attention import smoothed_query


def pages_and_scales(dtype, head_dim, page_size, layers, seed=0):
    """Key and value pages and scales [Hkv = 4, N, P(, D)], layers before."""
    rng = np.random.default_rng(seed)
    shape = (*([layers] if layers else []), 4, max(32, 2048 // page_size), page_size, head_dim)
    pages = [jnp.asarray(rng.integers(-100, 100, shape), jnp.int8).astype(dtype) for _ in "kv"]
    return *pages, *(jnp.asarray(rng.random(shape[:-1]), jnp.float32) for _ in "kv")


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("head_dim", "page_size", "layers"), [(128, 128, None), (64, 64, 2), (64, 16, None)])
def test_pages_round_trip_through_a_sharded_cache(head_dim, page_size, layers, dtype, kind):
    mesh, arrays = simulated_pod(2, 1, 4, kind), pages_and_scales(dtype, head_dim, page_size, layers)
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


KEYS, VALUES, KEY_SCALES, VALUE_SCALES = pages_and_scales("int8", 128, 16, None)


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
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
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
    cache = pd.PagedKVCache.create(spec, simulated_pod(1, 1, 1), key_smoothing=smoothing)
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
