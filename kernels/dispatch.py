"""Which form of an op runs (the Pallas kernel, its simulation, or the XLA form), and pools as each form takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from paged_dist._compat import broadcasts, vary_like

Interpret = bool | pltpu.InterpretParams | Literal["xla"] | None
Results = TypeVar("Results")  # a pytree of arrays


def dispatch(
    kernel: Callable[..., Results], xla: Callable[..., Results], *operands: Any, interpret: Interpret
) -> Results:
    """Calls `kernel(*operands, interpret=...)` or `xla(*operands)`, which return the same shapes and dtypes.

    Args:
      operands: pytrees of arrays; None where the op has no such operand.
      interpret: None follows the platform that the program is lowered for (not the host's default back end): the
        kernel on TPU, the XLA form elsewhere. False is the kernel. True or an InterpretParams is its simulation in TPU
        interpret mode, which cannot be a branch of `platform_dependent`. 'xla' is the XLA form on every platform.
    """
    # All operands vary over the same axes of a `shard_map`, so that the results of both forms do.
    leaves = jax.tree.leaves(operands)
    operands = jax.tree.map(lambda x: vary_like(x, *leaves), operands)

    xla = broadcasts(xla)

    @broadcasts
    def run_kernel(*operands, interpret):
        with jax.enable_x64(False):  # its scalars are int32, whatever a caller's Python numbers would become
            return kernel(*operands, interpret=interpret)

    if interpret is None:
        return jax.lax.platform_dependent(*operands, tpu=lambda *x: run_kernel(*x, interpret=False), default=xla)
    if interpret == "xla":
        return xla(*operands)
    return run_kernel(*operands, interpret=pltpu.InterpretParams() if interpret is True else interpret)


def in_hbm(*pools: jax.Array, interpret: Interpret) -> tuple[jax.Array, ...]:
    """`pools`, pinned to HBM: with a block spec alone, XLA may move a small pool into VMEM."""
    if interpret:
        return pools
    return tuple(pltpu.with_memory_space_constraint(pool, pltpu.HBM) for pool in pools)


def result_in_hbm(result: jax.ShapeDtypeStruct, like: jax.Array, interpret: Interpret):
    """A kernel's `result`, pinned to HBM. `like` is an operand with the same number of axes.

    XLA keeps a small result that it uses itself in VMEM. The kernel's DMA of a row there becomes loads and stores in a
    branch of their own: eight of them a step took twice as long as the step itself (v6e, replayed).
    """
    if interpret:
        return result
    aval = jax.typeof(like).update(
        shape=result.shape, dtype=jnp.dtype(result.dtype), manual_axis_type=result.manual_axis_type
    )
    return pltpu.HBM.from_type(aval)


_MEANT = {"uint16": jnp.bfloat16, "uint8": jnp.float8_e4m3fn}  # pools stored as bits, on CPU only


def meant_dtype(stored: DTypeLike) -> jnp.dtype:
    """The dtype that a pool of dtype `stored` stands for: uint16 and uint8 are the bits of bf16 and float8_e4m3fn."""
    return jnp.dtype(_MEANT.get(jnp.dtype(stored).name, stored))


def bits_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The inverse of `meant_dtype`: the dtype of the bits, as which a pool is stored where XLA would widen it."""
    return jnp.dtype({jnp.dtype(meant).name: bits for bits, meant in _MEANT.items()}.get(jnp.dtype(dtype).name, dtype))


def as_kernel_dtype(*pools: jax.Array) -> tuple[jax.Array, ...]:
    """Pools as a kernel takes them: those that are stored as bits get the dtype that the bits mean."""
    as_meant = lambda p: jax.lax.bitcast_convert_type(p, meant_dtype(p.dtype))
    return tuple(as_meant(p) if meant_dtype(p.dtype) != p.dtype else p for p in pools)


def as_stored_dtype(dtype: DTypeLike, *values: jax.Array) -> tuple[jax.Array, ...]:
    """`values` in a pool's stored `dtype`: cast to the dtype that it stands for, as bits where it is bits."""
    meant = meant_dtype(dtype)
    values = tuple(v.astype(meant) for v in values)
    return values if meant == dtype else tuple(jax.lax.bitcast_convert_type(v, dtype) for v in values)
