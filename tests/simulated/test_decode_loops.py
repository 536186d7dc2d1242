"""Loops of decode steps on simulated devices: the oracle's numbers, with the pools in place."""

from __future__ import annotations

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_loops import LOOP_STEPS, decode_loop, loop_arguments
from jax.sharding import AxisType
from pod_cases import lay_tables
from pod_meshes import simulated_pod

import paged_dist as pd
from paged_dist.kernels.attention.oracle import attention_oracle


@pytest.mark.parametrize("num_layers", [None, 4], ids=["one_layer", "scan_over_4_layers"])
@pytest.mark.parametrize(("dtype", "shape"), [("bfloat16", (2, 1, 4)), ("float32", (2, 1, 4)), ("bfloat16", (2, 2, 2))])
def test_decode_loop_on_cpu_keeps_its_pools_in_place(dtype, shape, num_layers):
    mesh = simulated_pod(*shape)
    spec = pd.CacheSpec(4, 128, 512, 64, dtype=dtype, num_layers=num_layers)
    compiled = jax.jit(decode_loop(spec), donate_argnums=0).lower(*loop_arguments(spec, mesh)).compile()
    layer_pool = spec.bytes_per_chip(mesh) // 2 // (num_layers or 1)
    assert compiled.memory_analysis().temp_size_in_bytes < layer_pool
    assert len(aot.collectives(compiled.as_text())) == (0 if shape[1] == 1 else 2)


@pytest.mark.filterwarnings("ignore:.*page_size=16")
@pytest.mark.parametrize("kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("head_dim", "shape"), [(128, (2, 1, 4)), (64, (2, 1, 4)), (128, (2, 2, 2)), (64, (1, 4, 2))])
def test_a_loop_of_steps_equals_steps_one_by_one(head_dim, shape, kind):
    """32 steps in one program give the numbers of the oracle on the tokens that they appended."""
    mesh = simulated_pod(*shape, kind)
    tables, pages = lay_tables(np.random.default_rng(0), [64] * 4, 16, 4, *shape[:2], slack=0)  # [4, 4]
    spec = pd.CacheSpec(4, head_dim, pages, 16, dtype="float32", num_layers=2)
    rng = np.random.default_rng(1)
    query, key, value = (rng.standard_normal((4, h, head_dim)).astype(np.float32) for h in (8, 4, 4))
    first = np.array([1, 5, 16, 32], np.int32)  # lengths at the first step; earlier tokens are zeros
    cache = pd.PagedKVCache.create(spec, mesh)
    loop = jax.jit(decode_loop(spec), donate_argnums=0)
    cache, lengths, total = loop(cache, *map(jnp.asarray, (query, key, value, first, tables)))
    np.testing.assert_array_equal(lengths, first + LOOP_STEPS)

    pools = [np.zeros((4, pages, 16, head_dim)) for _ in range(2)]
    expected = np.zeros_like(query)
    for step in range(LOOP_STEPS):
        for pool, new in zip(pools, (key, value), strict=True):
            for b, position in enumerate(first + step - 1):
                pool[:, tables[b, position // 16], position % 16] = new[b]
        expected += 2 * attention_oracle(query, *pools, first + step, tables)[0]
    np.testing.assert_allclose(total, expected, rtol=2e-4, atol=2e-4)
    for stored, pool in zip(cache.to_pages(), pools, strict=True):
        np.testing.assert_array_equal(stored[0], pool)
        np.testing.assert_array_equal(stored[1], pool)
