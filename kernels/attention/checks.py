"""The checks of a paged-attention call: shapes, dtypes and options that do not fit raise a ValueError that says why.

Pure functions of shapes and dtypes, shared by the ops, the launchers and the tests: nothing here compiles or allocates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from paged_dist._errors import require
from paged_dist.kernels.attention.problem import Problem
from paged_dist.kernels.quantization import LARGEST
from paged_dist.kernels.scale_layout import check_stored_scales
from paged_dist.kernels.tiling import LANES, SUBLANES, stored_head_dim

# What a masked logit becomes, as in JAX's and ejkernel's paged attention: far below every score, and still finite after
# a difference of two of them. `page_attention(..., mask_value=kernels.DEFAULT_MASK_VALUE)` is what it does by itself.
DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)

MAX_QUERIES = 16  # new tokens a sequence

_FLOATS = ("bfloat16", "float32")
_CACHE_NAMES = ("query", "key_cache", "value_cache", "context_lens", "block_tables")
_POOL_NAMES = ("query", "key_pages", "value_pages", "lengths", "block_tables")


def check_cache(query, key_cache, value_cache, context_lens, block_tables) -> Problem:
    """The problem of the op's arrays: query [B, Hq, D], caches [Hkv, N, P, D], lens [B], tables [B, S].

    Raises:
      ValueError: shapes or dtypes that do not fit together, naming the argument, its value and the rule.
    """
    for name, cache in zip(_CACHE_NAMES[1:3], (key_cache, value_cache), strict=True):
        require(cache.ndim == 4, f"{name}.shape", cache.shape, "must be [Hkv, N, page_size, head_dim]")
    head_dim, width = query.shape[-1] if query.ndim else 0, key_cache.shape[-1]
    require(
        query.ndim != 3 or head_dim == width,
        "query.shape",
        query.shape,
        f"its head_dim {head_dim} must be that of key_cache, {width}",
    )
    page_size = key_cache.shape[2]
    require(
        page_size >= SUBLANES and page_size % SUBLANES == 0,
        "key_cache.shape",
        key_cache.shape,
        f"page_size {page_size} must be a multiple of {SUBLANES}",
    )
    return _check_arrays(_CACHE_NAMES, query, key_cache, value_cache, context_lens, block_tables, layers=1)


def check_pools(
    query,
    key_pages,
    value_pages,
    lengths,
    block_tables,
    key_scales=None,
    value_scales=None,
    *,
    takes_queries: bool = False,
) -> Problem:
    """The problem of stored, stacked pools [L, Hkv, N, R, W]; the rest as in `check_cache`.

    takes_queries: query may be [B, Q, Hq, D], with lengths [B, Q].
    key_scales, value_scales: of 8-bit pages, as `pack_scales` stores them, [L, Hkv, N * P / 128, 128] f32.
    """
    for name, pool in zip(_POOL_NAMES[1:3], (key_pages, value_pages), strict=True):
        require(
            pool.ndim == 5,
            f"{name}.shape",
            pool.shape,
            "must be [L, Hkv, N, rows, lanes]",
            "add a leading axis of 1 to a single layer's pool",
        )
    dtypes = _FLOATS if key_scales is None and value_scales is None else tuple(LARGEST)
    problem = _check_arrays(
        _POOL_NAMES,
        query,
        key_pages,
        value_pages,
        lengths,
        block_tables,
        layers=key_pages.shape[0],
        dtypes=dtypes,
        takes_queries=takes_queries,
    )
    if problem.is_quantized:
        check_stored_scales(
            key_scales,
            value_scales,
            (problem.num_layers, problem.num_kv_heads),
            num_pages=problem.num_pages,
            page_size=problem.page_size,
        )
    return problem


def check_queries(query) -> None:
    """Raises ValueError unless query is [B, Hq, D] or [B, Q, Hq, D] with 1 <= Q <= 16."""
    require(query.ndim in (3, 4), "query.shape", query.shape, "must be [B, Hq, head_dim] or [B, Q, Hq, head_dim]")
    require(
        query.ndim == 3 or 1 <= query.shape[1] <= MAX_QUERIES,
        "query.shape",
        query.shape,
        f"its {query.shape[1]} new tokens a sequence must be 1 to {MAX_QUERIES}",
        "split them over several calls",
    )


def check_output_dtype(output_dtype) -> None:
    """Raises ValueError unless `output_dtype` is None or a dtype that outputs can have."""
    name = None if output_dtype is None else jnp.dtype(output_dtype).name
    require(name is None or name in _FLOATS, "output_dtype", name, f"must be None or one of {_FLOATS}")


def _check_arrays(
    names: tuple[str, str, str, str, str],
    query,
    keys,
    values,
    lengths,
    tables,
    *,
    layers: int,
    dtypes: tuple[str, ...] = _FLOATS,
    takes_queries: bool = False,
) -> Problem:
    """The problem of keys and values [.., Hkv, N, R, W]. Raises ValueError; its text calls the arrays by `names`."""
    q_name, k_name, v_name, n_name, t_name = names
    if takes_queries:
        check_queries(query)
    else:
        require(query.ndim == 3, f"{q_name}.shape", query.shape, "must be [B, Hq, head_dim]")
    batch, *queries, num_q_heads, head_dim = query.shape
    require(min(query.shape) >= 1, f"{q_name}.shape", query.shape, "every axis must be at least 1")
    require(min(keys.shape) >= 1, f"{k_name}.shape", keys.shape, "every axis must be at least 1")
    num_kv_heads, num_pages, rows, width = keys.shape[-4:]
    require(values.shape == keys.shape, f"{v_name}.shape", values.shape, f"must equal {k_name}.shape {keys.shape}")
    require(
        num_q_heads % num_kv_heads == 0,
        f"{q_name}.shape",
        query.shape,
        f"its {num_q_heads} heads must be a multiple of the {num_kv_heads} heads of {k_name}",
    )
    require(
        head_dim == 64 or head_dim % LANES == 0,
        f"{q_name}.shape",
        query.shape,
        f"head_dim {head_dim} must be 64 or a multiple of {LANES}",
        f"a PagedKVCache takes {head_dim} and stores it as {stored_head_dim(head_dim)}; here pad pages with zeros to "
        f"{stored_head_dim(head_dim)} once, when they are made, pad the query and cut the output on each call, and "
        f"take sm_scale of the model's head_dim: {head_dim}**-0.5",
    )
    require(
        width % head_dim == 0 and width in (head_dim, LANES),
        f"{k_name}.shape",
        keys.shape,
        f"a row must hold head_dim {head_dim} or, packed, {LANES} elements",
    )
    of = f"the batch of {q_name}" + (" and its new tokens" if queries else "")
    require(lengths.shape == (batch, *queries), f"{n_name}.shape", lengths.shape, f"must be {(batch, *queries)}, {of}")
    require(
        tables.ndim == 2 and tables.shape[0] == batch and tables.shape[1] >= 1,
        f"{t_name}.shape",
        tables.shape,
        f"must be ({batch}, pages_per_sequence), at least one page, the batch of {q_name}",
    )
    q_dtype, dtype = jnp.dtype(query.dtype).name, jnp.dtype(keys.dtype).name
    require(q_dtype in _FLOATS, f"{q_name}.dtype", q_dtype, f"must be one of {_FLOATS}")
    with_scales = dtypes is not _FLOATS
    require(
        dtype in dtypes,
        f"{k_name}.dtype",
        dtype,
        f"must be one of {dtypes}" + (" where scales are given" if with_scales else ""),
        "leave out key_scales and value_scales"
        if with_scales
        else "int8 and fp8 pages need key_scales, value_scales (page_attention, paged_decode_attention)",
    )
    require(
        values.dtype == keys.dtype,
        f"{v_name}.dtype",
        jnp.dtype(values.dtype).name,
        f"must be that of {k_name}, {dtype}",
    )
    for name, array in ((n_name, lengths), (t_name, tables)):
        require(array.dtype == jnp.int32, f"{name}.dtype", jnp.dtype(array.dtype).name, "must be int32")
    return Problem(
        batch,
        num_q_heads,
        num_kv_heads,
        head_dim,
        layers,
        num_pages,
        rows,
        width,
        tables.shape[1],
        q_dtype,
        dtype,
        *queries,
    )


def check_options(
    *, sm_scale, soft_cap, sliding_window, mask_value=DEFAULT_MASK_VALUE, soft_cap_name: str = "soft_cap"
) -> dict[str, float | int | None]:
    """sm_scale, soft_cap and sliding_window by name, as Python's own numbers.

    Raises ValueError for an option outside its rule, or a traced one: all four are compiled into the kernel.
    """
    for name, value in (
        ("sm_scale", sm_scale),
        (soft_cap_name, soft_cap),
        ("sliding_window", sliding_window),
        ("mask_value", mask_value),
    ):
        require(
            not isinstance(value, jax.core.Tracer),
            name,
            value,
            "must be a Python number, not a traced value",
            "name it in static_argnames"
            + ("; paged_decode_attention takes a traced one" if name == "sliding_window" else ""),
        )
    require(_is_finite_in_f32(sm_scale), "sm_scale", sm_scale, "must be a finite number")
    require(
        soft_cap is None or (_is_finite_in_f32(soft_cap) and soft_cap > 0),
        soft_cap_name,
        soft_cap,
        "must be None or a positive number",
    )
    whole = isinstance(sliding_window, int | np.integer) and not isinstance(sliding_window, bool)
    require(
        sliding_window is None or (whole and bool(sliding_window >= 1)),
        "sliding_window",
        sliding_window,
        "must be None or a whole number of tokens, at least 1",
    )
    require(
        _is_finite_in_f32(mask_value) and mask_value < 0,
        "mask_value",
        mask_value,
        "must be a finite negative number",
        f"DEFAULT_MASK_VALUE is {DEFAULT_MASK_VALUE:.4g}",
    )
    return {
        "sm_scale": float(sm_scale),
        "soft_cap": None if soft_cap is None else float(soft_cap),
        "sliding_window": None if sliding_window is None else int(sliding_window),
    }


def check_lengths(lengths, *shape: int) -> None:
    """Raises ValueError unless `lengths` is int32 of this shape."""
    require(lengths.shape == shape, "lengths.shape", lengths.shape, f"must be {shape}, the batch of query")
    require(lengths.dtype == jnp.int32, "lengths.dtype", jnp.dtype(lengths.dtype).name, "must be int32")


def check_starts(starts, *shape: int) -> jax.Array | None:
    """`starts` as an int32 array of `shape` ([B] or [B, Q], as lengths have it), or None. Else raises ValueError."""
    if starts is None:
        return None
    starts = jnp.asarray(starts)
    require(starts.shape == shape, "starts.shape", starts.shape, f"must be {shape}, the batch of query")
    require(starts.dtype == jnp.int32, "starts.dtype", jnp.dtype(starts.dtype).name, "must be int32")
    return starts


def check_sinks(sinks, num_q_heads: int) -> jax.Array | None:
    """`sinks` as an array [Hq], f32 or bf16, or None. Raises ValueError for another shape or dtype."""
    if sinks is None:
        return None
    sinks = jnp.asarray(sinks)
    dtype = jnp.dtype(sinks.dtype).name
    require(sinks.shape == (num_q_heads,), "sinks.shape", sinks.shape, f"must be ({num_q_heads},), the heads of query")
    require(dtype in _FLOATS, "sinks.dtype", dtype, f"must be one of {_FLOATS}")
    return sinks


def check_interpret(interpret) -> None:
    """Raises ValueError unless `interpret` is one of the values that `dispatch.dispatch` takes."""
    require(
        interpret is None or isinstance(interpret, bool | pltpu.InterpretParams),
        "interpret",
        interpret,
        "must be None, True, False or a pltpu.InterpretParams",
    )


def _is_finite_in_f32(value) -> bool:
    """Whether `value` is a number within f32's range; the kernels use it as f32."""
    try:
        return abs(float(value)) <= float(np.finfo(np.float32).max)
    except (TypeError, ValueError):
        return False
