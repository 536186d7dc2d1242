"""What a paged-attention call may look like: shapes, dtypes, options, and the bytes a launch needs on chip.

Pure functions of shapes and dtypes, shared by the op, the launchers and the tests: nothing here compiles or
allocates.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from paged_dist._errors import require
from paged_dist.kernels.quantization import LARGEST, is_quantized
from paged_dist.kernels.scale_layout import check_stored_scales
from paged_dist.kernels.tiling import LANES, SUBLANES, stored_head_dim

DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)

MAX_QUERIES = 16  # new tokens a sequence

_FLOATS = ("bfloat16", "float32")
_CACHE_NAMES = ("query", "key_cache", "value_cache", "context_lens", "block_tables")
_POOL_NAMES = ("query", "key_pages", "value_pages", "lengths", "block_tables")


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static half of a call, letters as in the arrays' shapes."""

    batch: int  # B
    num_q_heads: int  # Hq
    num_kv_heads: int  # Hkv
    head_dim: int  # D
    num_layers: int  # L
    num_pages: int  # N
    rows: int  # R, stored rows a page
    width: int  # W, stored lanes a row
    pages_per_sequence: int  # S
    query_dtype: str
    cache_dtype: str
    num_queries: int = 1  # Q, new tokens a sequence

    @property
    def is_quantized(self) -> bool:
        """Whether the pages are 8-bit, with scales."""
        return is_quantized(self.cache_dtype)

    @property
    def group(self) -> int:
        """G, query heads that share a kv head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def rows_per_head(self) -> int:
        """Query rows that are multiplied by one kv head's K: a group's heads, of each of the new tokens."""
        return self.group * self.num_queries

    @property
    def tokens_per_row(self) -> int:
        """Tokens side by side in one stored row."""
        return self.width // self.head_dim

    @property
    def page_size(self) -> int:
        """P, tokens a page."""
        return self.rows * self.tokens_per_row

    def replace(self, **changes) -> Problem:
        """This problem with other values in some fields."""
        return dataclasses.replace(self, **changes)


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
    return _check(_CACHE_NAMES, query, key_cache, value_cache, context_lens, block_tables, layers=1)


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
    problem = _check(
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


def _check(
    names,
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

    Raises ValueError for an option outside its rule; all four are numbers known before tracing.
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
    require(_finite(sm_scale), "sm_scale", sm_scale, "must be a finite number")
    require(
        soft_cap is None or (_finite(soft_cap) and soft_cap > 0),
        soft_cap_name,
        soft_cap,
        "must be None or a positive number",
    )
    require(
        sliding_window is None
        or (
            isinstance(sliding_window, int | np.integer)
            and sliding_window >= 1
            and not isinstance(sliding_window, bool)
        ),
        "sliding_window",
        sliding_window,
        "must be None or a whole number of tokens, at least 1",
    )
    require(
        _finite(mask_value) and mask_value < 0,
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
    """`starts` [B] int32 ([B, Q] beside such lengths), or None, as an array. Raises ValueError for anything else."""
    if starts is None:
        return None
    starts = jnp.asarray(starts)
    require(starts.shape == shape, "starts.shape", starts.shape, f"must be {shape}, the batch of query")
    require(starts.dtype == jnp.int32, "starts.dtype", jnp.dtype(starts.dtype).name, "must be int32")
    return starts


def check_sinks(sinks, num_q_heads: int) -> jax.Array | None:
    """`sinks` [Hq] f32 or bf16, or None, as an array. Raises ValueError for another shape or dtype."""
    if sinks is None:
        return None
    sinks = jnp.asarray(sinks)
    dtype = jnp.dtype(sinks.dtype).name
    require(sinks.shape == (num_q_heads,), "sinks.shape", sinks.shape, f"must be ({num_q_heads},), the heads of query")
    require(dtype in _FLOATS, "sinks.dtype", dtype, f"must be one of {_FLOATS}")
    return sinks


def check_interpret(interpret) -> None:
    """Raises ValueError unless `interpret` is one of the values that `_dispatch.dispatch` takes."""
    require(
        interpret is None or isinstance(interpret, bool | pltpu.InterpretParams),
        "interpret",
        interpret,
        "must be None, True, False or a pltpu.InterpretParams",
    )


def _finite(value) -> bool:
    """Whether `value` is a number within f32's range, in which it is used."""
    try:
        return abs(float(value)) <= float(np.finfo(np.float32).max)
    except (TypeError, ValueError):
        return False


MEGACORE_MODES = (None, "kv_head", "batch")
NUM_CORES = 2  # of a megacore chip

SMEM_BYTES = 1 << 20  # on every chip from v4 to v7x
SMEM_RESERVED = 8 << 10  # Mosaic keeps 2.5 to 3 KiB of it (seen by compiling at the limit); the rest is headroom
VMEM_BYTES = 15 << 20  # of the 16 MiB that Mosaic gives a kernel by default on the smallest chips
_BLOCK_TOKENS = (
    2048  # the default block: half the core time a token of 1024 (v6e, projected), short beside long sequences
)
_BLOCK_BYTES = 10 << 20  # VMEM the default block may take


def check_megacore(problem: Problem, megacore_mode: str | None) -> None:
    """Raises ValueError for an unknown mode, or heads or sequences that two cores cannot share evenly."""
    require(megacore_mode in MEGACORE_MODES, "megacore_mode", megacore_mode, f"must be one of {MEGACORE_MODES}")
    for mode, name, count in (("kv_head", "kv heads", problem.num_kv_heads), ("batch", "sequences", problem.batch)):
        require(
            megacore_mode != mode or count % NUM_CORES == 0,
            "megacore_mode",
            megacore_mode,
            f"needs an even number of {name}, not {count}",
            "None runs on one core",
        )


def smem_bytes(batch: int, pages_per_sequence: int) -> int:
    """Scalar memory of one launch: lengths, flat table, layer and the two flags, each padded."""
    return sum(_round_up(4 * n, 512) for n in (batch, batch * pages_per_sequence, 1, 1, 1))


def check_smem(problem: Problem, rows: int | None = None) -> None:
    """Raises ValueError where lengths and table, or `rows` rows of them, do not fit in one launch's scalar memory."""
    rows = problem.batch if rows is None else rows
    need, there = smem_bytes(rows, problem.pages_per_sequence), SMEM_BYTES - SMEM_RESERVED
    what, works = (
        ("the table and context_lens need", "split the batch, or use larger pages")
        if rows == problem.batch
        else (f"{rows} of its rows need", "use larger pages")
    )
    require(
        need <= there,
        "block_tables.shape",
        (problem.batch, problem.pages_per_sequence),
        f"{what} {need} bytes of SMEM, of which there are {there}",
        works,
    )


def rows_per_launch(problem: Problem, multiple: int) -> int:
    """The most sequences, a multiple of `multiple`, whose part of the table fits in one launch; 0 if none do."""
    rows = -(-problem.batch // multiple) * multiple
    while rows and smem_bytes(rows, problem.pages_per_sequence) > SMEM_BYTES - SMEM_RESERVED:
        rows -= multiple
    return rows


def vmem_bytes(problem: Problem, pages_per_compute_block: int) -> int:
    """Vector memory of one launch: double buffers of K, V and the grid's blocks, and a block's f32 values."""
    p, size = problem, jnp.dtype(problem.cache_dtype).itemsize
    rows = p.tokens_per_row * p.group
    lanes = _round_up(p.width, LANES)
    buffers = 4 * pages_per_compute_block * _round_up(p.rows, SUBLANES * 4 // size) * lanes * size
    tokens = pages_per_compute_block * p.rows
    values = 2 * tokens * lanes * 4 + 3 * _round_up(rows, SUBLANES) * _round_up(tokens, LANES) * 4
    blocks = 2 * _round_up(rows, 2 * SUBLANES) * (2 * lanes + 2 * LANES) * 4
    return buffers + values + blocks


def choose_pages_per_compute_block(problem: Problem) -> int:
    """Pages a block where the caller names none: about two thousand tokens, less where VMEM is short."""
    most = max(1, min(problem.pages_per_sequence, _BLOCK_TOKENS // problem.page_size))
    while most > 1 and vmem_bytes(problem, most) > _BLOCK_BYTES:
        most -= 1
    return most


def check_pages_per_compute_block(problem: Problem, pages: int) -> int:
    """`pages`, cut to the table's width. Raises ValueError for none, or more than VMEM holds."""
    whole = isinstance(pages, int | np.integer) and not isinstance(pages, bool)
    require(whole and pages >= 1, "pages_per_compute_block", pages, "must be None or a whole number, at least 1")
    pages = min(int(pages), problem.pages_per_sequence)
    need = vmem_bytes(problem, pages)
    require(
        vmem_bytes(problem, 1) <= VMEM_BYTES,
        "page_size",
        problem.page_size,
        f"a block of one page needs {vmem_bytes(problem, 1)} bytes of VMEM, of which there are {VMEM_BYTES}",
        "use smaller pages",
    )
    require(
        need <= VMEM_BYTES,
        "pages_per_compute_block",
        pages,
        f"needs {need} bytes of VMEM, of which there are {VMEM_BYTES}",
        f"{choose_pages_per_compute_block(problem)} is the default here",
    )
    return pages


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
