"""The sharded op over int8 and fp8 caches: appended, attended to, against the oracle on what the cache stands for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from pod_cases import shard_tables
from pod_meshes import simulated_pod
from simulated import RACES, assert_no_races

import paged_dist as pd
from paged_dist.kernels.attention.oracle import attention_oracle

LENGTHS = np.array([150, 0, 64, 201], np.int32)


def filled(dtype: str, head_dim: int, page_size: int, mesh, *, smoothed: bool, layers: int = 2):
    """(cache with LENGTHS - 1 tokens in layer 1, tables, each row's last key and value, the oracle's pages)."""
    rng, pages = np.random.default_rng(1), 2048 // page_size
    tables = shard_tables(rng, 2, pages, 4)
    key, value = (rng.standard_normal((4, 201, 4, head_dim)).astype(np.float32) for _ in "kv")
    key[..., 3] *= 20  # an outlier channel
    spec = pd.CacheSpec(4, head_dim, pages, page_size, dtype=dtype, num_layers=layers)
    smoothing = jnp.stack([pd.calibrate_key_smoothing(jnp.asarray(key))] * layers) if smoothed else None
    cache = pd.PagedKVCache.create(spec, mesh, key_smoothing=smoothing)
    arrays = (key, value, np.maximum(LENGTHS - 1, 0), tables)
    cache = pd.write_prefill_kv(cache, *map(jnp.asarray, arrays), layer=1)

    exact = [np.zeros((4, pages, page_size, head_dim)) for _ in "kv"]
    for pool, new, by in zip(exact, (key, value), (None if smoothing is None else smoothing[1], None), strict=True):
        new = np.asarray(pd.dequantize_kv(*pd.quantize_kv(jnp.asarray(new), dtype, smoothing=by), smoothing=by))
        for b, length in enumerate(LENGTHS):
            for t in range(length):
                pool[:, tables[b, t // page_size], t % page_size] = new[b, t]
    last = [np.stack([x[b, max(n - 1, 0)] for b, n in enumerate(LENGTHS)]) for x in (key, value)]
    return cache, jnp.asarray(tables), last, exact


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "smoothed", "kind", "implementation"),
    [
        pytest.param(
            *shape, *way, id="-".join(map(str, (*shape, name))), marks=() if name in often else pytest.mark.slow
        )
        for shape, often in (
            (("int8", 128, 128, True), ("explicit_xla", "auto_simulated")),
            (("float8_e4m3fn", 64, 64, False), ("explicit_xla",)),
        )
        for name, way in {
            "auto_xla": (AxisType.Auto, None),
            "explicit_xla": (AxisType.Explicit, None),
            "auto_simulated": (AxisType.Auto, RACES),
        }.items()
    ],
)
def test_append_and_attend_equal_the_oracle(dtype, head_dim, page_size, smoothed, kind, implementation):
    cache, tables, (key, value), exact = filled(
        dtype, head_dim, page_size, simulated_pod(2, 1, 4, kind), smoothed=smoothed
    )
    query = np.random.default_rng(2).standard_normal((4, 8, head_dim)).astype(np.float32)
    options = dict(sm_scale=0.02, soft_cap=5.0, sliding_window=170)
    cache = pd.append_kv(cache, *map(jnp.asarray, (key, value, LENGTHS - 1)), tables, layer=1)
    output, lse = pd.sharded_paged_attention(
        jnp.asarray(query),
        cache,
        jnp.asarray(LENGTHS),
        tables,
        layer=jnp.int32(1),
        return_lse=True,
        implementation=implementation,
        **options,
    )
    expected = attention_oracle(query, *exact, LENGTHS, np.asarray(tables), **options)
    np.testing.assert_allclose(output, expected[0], atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(lse, expected[1], atol=2e-4, rtol=2e-4)
    if implementation is not None:
        assert_no_races()


@pytest.mark.filterwarnings("ignore:.*page_size=")
def test_local_forms_inside_a_callers_shard_map():
    """The caller's own `shard_map`, vma checked, gives what the sharded ops give, scales and smoothing included."""
    mesh = simulated_pod(2, 1, 4)
    cache, tables, (key, value), _ = filled("int8", 128, 128, mesh, smoothed=True)
    query = jnp.asarray(np.random.default_rng(2).standard_normal((4, 8, 128)), jnp.bfloat16)
    heads, rows = P("data", "model", None), P("data")
    pools = cache.partition_specs()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(pools, heads, heads, heads, rows, P("data", None)),
        out_specs=(pools, heads),
    )
    def local(cache, query, key, value, lengths, tables):
        cache = pd.append_kv_local(cache, key, value, lengths - 1, tables, layer=1)
        return cache, pd.paged_attention_local(query, cache, lengths, tables, layer=1)

    arrays = (*map(jnp.asarray, (key, value, LENGTHS)), tables)
    made, output = local(cache, query, *arrays)
    cache = pd.append_kv(cache, *arrays[:2], arrays[2] - 1, tables, layer=1)
    np.testing.assert_array_equal(output, pd.sharded_paged_attention(query, cache, *arrays[2:], layer=1))
    for got, want in zip(made.to_pages(), cache.to_pages(), strict=True):
        np.testing.assert_array_equal(got, want)
