"""Copies of page pools in a compiled program: values shaped like a layer's pool, which must not be there.

Also the other large values that a step writes to HBM, such as weights stored anew.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.sharding import Mesh

from paged_dist import CacheSpec
from paged_dist.kernels.tiling import LANES
from paged_dist.launch.planning import hlo_text
from paged_dist.launch.planning.pod_settings import PodSettings
from paged_dist.launch.planning.sizing import Sizes
from paged_dist.launch.planning.step_weights import weight_shards
from paged_dist.launch.serving.synthetic import input_dtype


def pool_copies(spec: CacheSpec, mesh: Mesh, text: str) -> list[str]:
    """The instructions of a program that make a value shaped like a layer's pool on a device, or like its scales."""
    data, context, model = (mesh.shape[name] for name in ("data", "context", "model"))
    heads, pages = spec.num_kv_heads // model, spec.num_pages // (data * context)
    rows, lanes = spec.stored_page_shape
    pools = [((rows, lanes), heads * pages * rows * lanes * jnp.dtype(spec.dtype).itemsize)]
    if spec.is_quantized:
        scale_rows = spec.scales_shape[-2] // (data * context)
        pools.append(((scale_rows, LANES), 4 * heads * scale_rows * LANES))
    return [
        value[:120]
        for (rows, lanes), size in pools
        for value in hlo_text.values_as_large_as(text, size)
        if f",{rows},{lanes}]" in value
    ]


def other_copies(s: PodSettings, sizes: Sizes, mesh: Mesh, text: str, of_pools: list[str]) -> list[dict]:
    """The other values that a step writes to HBM, as large as a layer's pool or as the smallest stack of weights.

    XLA may store weights anew in other tiles, say: that is read and written in each step, beside the weights' own read.
    """
    itemsize = jnp.dtype(input_dtype(s.dtype)).itemsize
    stacks = [itemsize * math.prod(shape) for shape in weight_shards(s, mesh)]
    least = min(stacks, default=sizes.spec.bytes_per_chip(mesh) // (2 * s.num_layers))
    return [
        {"array": value.array, "bytes": value.bytes, "times": s.num_layers**value.loops}
        for value in hlo_text.values_written_to_hbm(text, least)
        if not any(value.name in copy.split()[1:2] for copy in of_pools)
    ]
