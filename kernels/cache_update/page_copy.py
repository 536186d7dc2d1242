"""Copies of whole pages inside the stored pools of one chip, or from other pools into them, in place."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist._compat import out_struct
from paged_dist.kernels.dispatch import Interpret, as_kernel_dtype, as_stored_dtype, dispatch, in_hbm
from paged_dist.kernels.scale_layout import rows_of_page
from paged_dist.kernels.tiling import LANES

Pools = tuple[jax.Array, ...]  # key and value pages, and of 8-bit pages their scales
Start = tuple[jax.Array | int, ...]  # where a page begins in a pool's third and later axes

PAIRS_PER_STEP = 1024  # 8 KiB of scalar memory, twice; a step's copies are all in flight before one is waited for


def copy_stored_pages(
    pools: tuple[jax.Array, ...],
    copies: jax.Array,
    count: jax.Array,
    page_size: int,
    interpret: Interpret = None,
    *,
    sources: tuple[jax.Array, ...] | None = None,
) -> tuple[jax.Array, ...]:
    """Copies pages onto other pages, all heads and layers, in place where the pools are donated.

    On TPU each page goes from HBM to HBM, a thousand copies in flight together. Below 128 tokens a page, scales share
    their rows with those of other pages: XLA copies them.

    Args:
      pools: key and value pages [L, Hkv, N, R, W] as they are stored; of 8-bit pages also their scales, each
        [L, Hkv, N * P / 128, 128].
      copies: [M, 2] int32: (page to read, page to write), both in range. No page is written twice, and none is both
        written and read.
      count: int32 scalar: how many of the pairs, from the first on, are copied.
      page_size: P.
      interpret: see `paged_dist.kernels.dispatch.dispatch`.
      sources: the pools to read from, which differ from `pools` in their number of pages only; None: `pools`.
    """
    stored, count, number = pools[0].dtype, jnp.asarray(count, jnp.int32), len(pools)
    by_kernel = number if page_size >= LANES else 2

    def kernel(copies, count, *arrays, interpret):
        groups = [arrays[i : i + number] for i in range(0, len(arrays), number)]
        dma = [(*as_kernel_dtype(*group[:2]), *group[2:by_kernel]) for group in groups]
        made = _copy_by_dma(dma, copies, count, page_size, interpret)
        others = _copy_in_xla([group[by_kernel:] for group in groups], copies, count, page_size)
        return (*as_stored_dtype(stored, *made[:2]), *made[2:], *others)

    def xla(copies, count, *arrays):
        return _copy_in_xla([arrays[i : i + number] for i in range(0, len(arrays), number)], copies, count, page_size)

    return dispatch(kernel, xla, copies, count, *pools, *(sources or ()), interpret=interpret)


def _copy_kernel(
    count: jax.Ref, copies: jax.Ref, *refs: jax.Ref, pairs: int, rows: tuple[int, ...], has_sources: bool
) -> None:
    """One grid step: the next `pairs` copies, all in flight together.

    rows: for each pool, how many elements of its third axis are one page.
    """
    *arrays, sem = refs
    pools = arrays[-len(rows) :]
    sources = arrays[len(rows) : 2 * len(rows)] if has_sources else pools

    def each(act):
        def visit(i, _):
            for source, pool, n in zip(sources, pools, rows, strict=True):
                at = lambda ref, page, n=n: ref.at[0, :, :, page if n == 1 else pl.ds(page * n, n)]
                act(pltpu.make_async_copy(at(source, copies[2 * i]), at(pool, copies[2 * i + 1]), sem))

        lax.fori_loop(0, jnp.clip(count[0] - pl.program_id(0) * pairs, 0, pairs), visit, None)

    each(lambda copy: copy.start())
    each(lambda copy: copy.wait())


def _copy_by_dma(
    groups: Sequence[Pools], copies: jax.Array, count: jax.Array, page_size: int, interpret: Interpret
) -> Pools:
    """The pools with the pages copied, by the kernel. groups: the pools, and the sources where they are others."""
    # As in kernel.py: pinned to HBM, with an extra leading axis for jax 0.10, and an axis for each row of scales.
    name_rows = lambda x: x if x.ndim == 5 else x.reshape(*x.shape[:3], 1, LANES)
    stored = in_hbm(*(name_rows(x)[None] for group in groups for x in group), interpret=interpret)
    pools = groups[0]
    # Pairs come through scalar memory a part at a time: it does not hold all pairs of a large pool.
    pairs = min(PAIRS_PER_STEP, copies.shape[0])
    steps = pl.cdiv(copies.shape[0], pairs)
    copies = jnp.pad(copies.reshape(-1), (0, 2 * (steps * pairs - copies.shape[0])))
    operands = (count.reshape(1), copies, *stored)
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    made = pl.pallas_call(
        functools.partial(
            _copy_kernel,
            pairs=pairs,
            rows=(1, 1, *(rows_of_page(page_size) for _ in pools[2:])),
            has_sources=len(groups) > 1,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[
                pl.BlockSpec((2 * pairs,), lambda i, *_: (i,), memory_space=pltpu.SMEM),
                *(in_place for _ in stored),
            ],
            out_specs=[in_place for _ in pools],
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=[out_struct(x.shape, x.dtype, *operands) for x in stored[: len(pools)]],
        input_output_aliases={2 + i: i for i in range(len(pools))},
        interpret=interpret,
        name="copy_pages",
    )(*operands)
    return tuple(x.reshape(pool.shape) for x, pool in zip(made, pools, strict=True))


def _copy_in_xla(groups: Sequence[Pools], copies: jax.Array, count: jax.Array, page_size: int) -> Pools:
    """The pools with the pages copied, one page after another: a slice, and an update in place."""
    pools, sources = groups[0], groups[1] if len(groups) > 1 else None

    def copy(i, pools):
        place = functools.partial(_place, page_size=page_size, source=copies[i, 0], to=copies[i, 1])
        return tuple(_copy_part(x, *place(x), y) for x, y in zip(pools, sources or pools, strict=True))

    return lax.fori_loop(0, count, copy, tuple(pools)) if pools else ()


def _place(pool: jax.Array, page_size: int, source: jax.Array, to: jax.Array) -> tuple[Start, Start, tuple[int, ...]]:
    """(where the source page begins, where the other one begins, a page's shape) in a pool's third and later axes."""
    if pool.ndim == 5:
        return (source, 0, 0), (to, 0, 0), (1, *pool.shape[3:])
    # Scales: one after another in rows of 128, whole rows or a part of one.
    at = lambda page: (page * page_size // LANES, page * page_size % LANES)
    return at(source), at(to), (rows_of_page(page_size), min(page_size, LANES))


def _copy_part(x: jax.Array, source: Start, to: Start, shape: tuple[int, ...], y: jax.Array) -> jax.Array:
    """`x` [L, Hkv, ...] with `y`'s part of `shape` that begins at `source` at `to`, for all L and Hkv."""
    index = lambda place: (jnp.int32(0), jnp.int32(0), *(jnp.asarray(i, jnp.int32) for i in place))
    part = lax.dynamic_slice(y, index(source), (*x.shape[:2], *shape))
    return lax.dynamic_update_slice(x, part, index(to))
