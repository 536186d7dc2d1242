"""The decode kernel compiled for chips that jax knows and libtpu may not: skipped until it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import compile_on, needs_libtpu
from jax.sharding import Mesh

from paged_dist.kernels import paged_decode_attention
from paged_dist.mesh.topology import topology_devices

pytestmark = needs_libtpu


@pytest.mark.parametrize("topology", ["tpu8i:2x2x1", "tpu8t:2x2x1"])
def test_the_decode_kernel_compiles_where_libtpu_knows_the_chip(topology):
    try:
        devices = topology_devices(topology)
    except ValueError as e:
        assert "Invalid TPU external name" in str(e)  # libtpu 0.0.42 to 0.0.50
        pytest.skip(f"this libtpu has no compiler for {topology}")
    pool = jax.ShapeDtypeStruct((8, 64, 128, 128), jnp.bfloat16)
    query, lengths = jax.ShapeDtypeStruct((32, 32, 128), jnp.bfloat16), jax.ShapeDtypeStruct((32,), jnp.int32)
    tables = jax.ShapeDtypeStruct((32, 32), jnp.int32)
    mesh = Mesh(np.array(devices[:1]), ("chip",))
    text = compile_on(mesh, paged_decode_attention, query, pool, pool, lengths, tables).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
