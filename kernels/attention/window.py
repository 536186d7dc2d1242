"""Sliding windows: a Python number is compiled into the kernel, a traced one becomes each sequence's first token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paged_dist._errors import require

_MOST = 2**31 - 1


def split_window(sliding_window) -> tuple[int | None, jax.Array | None]:
    """(the window as a Python number, the window as an int32 scalar): one of the two, or neither where there is none.

    A jax array, traced or not, is a number of the running program, as one layer's in a `lax.scan` over layers is.

    Raises:
      ValueError: an array that is no integer scalar. Python numbers are left to `check_options`.
    """
    if not isinstance(sliding_window, jax.Array):
        return sliding_window, None
    require(
        sliding_window.ndim == 0 and jnp.issubdtype(sliding_window.dtype, jnp.integer),
        "sliding_window",
        jax.typeof(sliding_window).str_short(),
        "an array must be an int32 scalar",
        "0 or less is no window",
    )
    if sliding_window.dtype != jnp.int32:
        most = min(_MOST, jnp.iinfo(sliding_window.dtype).max)
        sliding_window = jnp.clip(sliding_window, 0, most).astype(jnp.int32)
    return None, sliding_window


def later_starts(ends: jax.Array, starts: jax.Array | None, window: jax.Array | int) -> jax.Array:
    """The first tokens attended to, int32 like `ends`: the later of `starts` and a window's.

    Args:
      ends: [B] or [B, Q] int32, one past the last token attended to, not negative nor beyond the table.
      starts: int32 of the same shape; None for 0.
      window: tokens before each end; 0 or less for all of them where it is an array.
    """
    first = ends - window
    if isinstance(window, jax.Array):
        first = jnp.where(window > 0, first, 0)
    return jnp.maximum(first, 0 if starts is None else jnp.maximum(starts, 0))
