"""Which form of an op runs: the Pallas kernel, its simulation, or the XLA form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Interpret = bool | pltpu.InterpretParams | Literal["xla"] | None


def dispatch(kernel: Callable, xla: Callable, *operands: jax.Array, interpret: Interpret):
    """Calls `kernel(*operands, interpret=...)` or `xla(*operands)`; both return the same shapes and dtypes.

    Args:
      interpret: None follows the platform that the program is lowered for (not the host's default back end):
        the kernel on TPU, the XLA form elsewhere. False is the kernel, True or an InterpretParams its
        simulation in TPU interpret mode, which cannot be a branch of `platform_dependent`. 'xla' is the XLA form
        on every platform.
    """
    if interpret is None:
        return jax.lax.platform_dependent(*operands, tpu=lambda *x: kernel(*x, interpret=False), default=xla)
    if interpret == "xla":
        return xla(*operands)
    return kernel(*operands, interpret=pltpu.InterpretParams() if interpret is True else interpret)


def in_hbm(*pools: jax.Array, interpret: Interpret) -> tuple[jax.Array, ...]:
    """`pools`, pinned to HBM: a block spec alone does not keep XLA from moving a small pool into VMEM."""
    if interpret:
        return pools
    return tuple(pltpu.with_memory_space_constraint(pool, pltpu.HBM) for pool in pools)


def as_kernel_dtype(*pools: jax.Array) -> tuple[jax.Array, ...]:
    """Pools as a kernel takes them: bf16 that is stored as its bits (uint16, on CPU only) as bf16 again."""
    return tuple(jax.lax.bitcast_convert_type(p, jnp.bfloat16) if p.dtype == jnp.uint16 else p for p in pools)


def as_stored_dtype(dtype, *values: jax.Array) -> tuple[jax.Array, ...]:
    """`values` in a pool's stored `dtype`: cast, and for uint16 taken as the bits of bf16."""
    if dtype == jnp.uint16:
        return tuple(jax.lax.bitcast_convert_type(v.astype(jnp.bfloat16), jnp.uint16) for v in values)
    return tuple(v.astype(dtype) for v in values)
