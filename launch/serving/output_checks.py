"""The checks of a decode run's outputs: what an output should be, from indices alone, and how far off it is."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from paged_dist.kernels.attention.oracle import attention_oracle
from paged_dist.launch.serving.programs import Model
from paged_dist.launch.serving.row_schedule import Check
from paged_dist.launch.serving.synthetic import Kind, as_held, keys_or_values, values

# The largest error allowed, relative to the row's largest output, by the cache's dtype. The oracle computes with what
# the cache holds, 8-bit caches too, so that a bound covers the rounding of output and softmax weights alone.
ERROR_BOUNDS = {"bfloat16": 2e-2, "float32": 1e-4, "int8": 2e-2, "float8_e4m3fn": 2e-2}


def oracle_output(model: Model, check: Check, heads: slice, page_size: int) -> np.ndarray:
    """The output that attention should give for a check, float64 [heads, D], recomputed from indices.

    `heads`: those of the Hq query heads to compute.
    """
    group = model.num_q_heads // model.num_kv_heads
    chosen = range(model.num_q_heads)[heads]
    kv_heads = np.arange(chosen.start // group, (chosen.stop - 1) // group + 1)
    channels, tokens = np.arange(model.head_dim), np.arange(check.length)

    def make(kind, position, which):
        where = model.seed, kind, check.request, position, check.layer, which, channels
        if kind == Kind.QUERY:
            return values(np, jnp.dtype(model.input_dtype), *where)
        return as_held(keys_or_values(np, jnp.dtype(model.dtype), *where), jnp.dtype(model.dtype))

    # Query heads start and end inside a group where the mesh does not split between groups: take whole groups.
    q_heads = np.arange(kv_heads[0] * group, (kv_heads[-1] + 1) * group)
    query = make(Kind.QUERY, check.length - 1, q_heads)  # [1, Hq', D]
    pages = -(-check.length // page_size)
    padding = ((0, pages * page_size - check.length), (0, 0), (0, 0))
    keys, values_ = (
        np.pad(make(kind, tokens, kv_heads), padding)
        .swapaxes(0, 1)
        .reshape(len(kv_heads), pages, page_size, model.head_dim)
        for kind in (Kind.KEY, Kind.VALUE)
    )
    output, _ = attention_oracle(
        query,
        keys,
        values_,
        np.array([check.length]),
        np.arange(pages)[None],
        sm_scale=model.sm_scale,
        soft_cap=model.soft_cap,
        sliding_window=model.sliding_window,
    )
    return output[0, chosen.start - q_heads[0] : chosen.stop - q_heads[0]]


def relative_error(output: np.ndarray, want: np.ndarray) -> float:
    """The largest |output - want| over the largest |want|; infinite where output is not finite."""
    error = np.abs(output.astype(np.float64) - want).max() / max(np.abs(want).max(), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")
