"""Copies of whole pages inside stored pools, in place, one chip's worth."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_dist._compat import out_struct
from paged_dist.kernels._dispatch import Interpret, as_kernel_dtype, as_stored_dtype, dispatch, in_hbm
from paged_dist.kernels._tiling import LANES


def copy_stored_pages(
    pools: tuple[jax.Array, ...], copies: jax.Array, count: jax.Array, page_size: int, interpret: Interpret = None
) -> tuple[jax.Array, ...]:
    """Copies pages onto others, all heads and layers, in place where the pools are donated.

    On TPU each page goes from HBM to HBM, all copies in flight together, but scales that share their rows with those of
    other pages, which XLA copies.

    Args:
      pools: two [L, Hkv, N, R, W] as they are stored, and of 8-bit pages two [L, Hkv, N * P / 128, 128] of scales.
      copies: [M, 2] int32 in [0, N): page to read, page to write. No page is written twice, none written that is read.
      count: int32 scalar: the first so many pairs are copied.
      page_size: P.
      interpret: see `paged_dist.kernels._dispatch.dispatch`.
    """
    stored, count = pools[0].dtype, jnp.asarray(count, jnp.int32)
    by_kernel = len(pools) if page_size >= LANES else 2

    def kernel(copies, count, *pools, interpret):
        dma = (*as_kernel_dtype(*pools[:2]), *pools[2:by_kernel])
        made = _copy_by_dma(dma, copies, count, page_size, interpret)
        return (
            *as_stored_dtype(stored, *made[:2]),
            *made[2:],
            *_copy_in_xla(pools[by_kernel:], copies, count, page_size),
        )

    def xla(copies, count, *pools):
        return _copy_in_xla(pools, copies, count, page_size)

    return dispatch(kernel, xla, copies, count, *pools, interpret=interpret)


def _copy_kernel(copies, count, *refs, rows: tuple[int, ...]):
    """`rows`: of each pool, how many of its third axis are a page."""
    pools, sem = refs[len(rows) : 2 * len(rows)], refs[-1]

    def each(act):
        def visit(i, _):
            for pool, n in zip(pools, rows, strict=True):
                at = lambda page, pool=pool, n=n: pool.at[0, :, :, page if n == 1 else pl.ds(page * n, n)]
                act(pltpu.make_async_copy(at(copies[2 * i]), at(copies[2 * i + 1]), sem))

        lax.fori_loop(0, count[0], visit, None)

    each(lambda copy: copy.start())
    each(lambda copy: copy.wait())


def _copy_by_dma(pools, copies, count, page_size: int, interpret: Interpret) -> tuple[jax.Array, ...]:
    # As in kernel.py: pinned to HBM, with an extra axis for jax 0.10, and one for each row of scales.
    named = [x.reshape(*x.shape[:3], 1, LANES) for x in pools[2:]]
    stored = in_hbm(*(x[None] for x in (*pools[:2], *named)), interpret=interpret)
    operands = (copies.reshape(-1), count.reshape(1), *stored)
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    made = pl.pallas_call(
        functools.partial(_copy_kernel, rows=(1, 1, *(page_size // LANES for _ in named))),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[in_place for _ in stored],
            out_specs=[in_place for _ in stored],
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=[out_struct(x.shape, x.dtype, *operands) for x in stored],
        input_output_aliases={2 + i: i for i in range(len(stored))},
        interpret=interpret,
        name="copy_pages",
    )(*operands)
    return tuple(x.reshape(pool.shape) for x, pool in zip(made, pools, strict=True))


def _copy_in_xla(pools, copies, count, page_size: int) -> tuple[jax.Array, ...]:
    """One page after another: a slice, and an update in place."""

    def copy(i, pools):
        source, to = copies[i, 0], copies[i, 1]
        return tuple(
            _copy_part(pool, (source, 0, 0), (to, 0, 0), (1, *pool.shape[3:]))
            if pool.ndim == 5
            else _copy_scales(pool, source, to, page_size)
            for pool in pools
        )

    return lax.fori_loop(0, count, copy, tuple(pools)) if pools else ()


def _copy_scales(scales: jax.Array, source: jax.Array, to: jax.Array, page_size: int) -> jax.Array:
    """A page's scales, one after another in rows of 128: whole rows, or a part of one."""
    at = lambda page: (page * page_size // LANES, page * page_size % LANES)
    return _copy_part(scales, at(source), at(to), (max(1, page_size // LANES), min(page_size, LANES)))


def _copy_part(x: jax.Array, source, to, shape) -> jax.Array:
    """`x` [L, Hkv, ...] with the part of `shape` that begins at `source` also at `to`, for all L and Hkv."""
    index = lambda place: (jnp.int32(0), jnp.int32(0), *(jnp.asarray(i, jnp.int32) for i in place))
    part = lax.dynamic_slice(x, index(source), (*x.shape[:2], *shape))
    return lax.dynamic_update_slice(x, part, index(to))
