"""Sequences whose pages are dealt out over several chips in turn: which pages and tokens this chip has."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.tree_util.register_dataclass, data_fields=["first"], meta_fields=["stride"])
@dataclasses.dataclass(frozen=True)
class Stripes:
    """Which pages of each sequence lie on this chip: page first + k * stride is column k of its row's table here.

    Tokens are counted in two ways: in the sequence, or locally, in the order of the pages that lie here.

    Attributes:
      first: [B] int32 in [0, stride).
      stride: how many chips the pages are dealt out to.
    """

    first: jax.Array
    stride: int

    def tokens_before(self, end: jax.Array, page_size: int) -> jax.Array:
        """How many of each sequence's first `end` tokens lie here. end: int32 [B] or [B, Q], not negative."""
        size = jnp.int32(page_size)
        first = self.first.reshape(-1, *(1 for _ in end.shape[1:]))
        page, token = lax.div(end, size), lax.rem(end, size)
        before = page - first + (self.stride - 1)  # divided by the stride, rounded down: the whole pages here
        is_here = lax.rem(before, jnp.int32(self.stride)) == self.stride - 1
        return lax.div(before, jnp.int32(self.stride)) * size + jnp.where(is_here, token, 0)

    def token(self, column: jax.Array, token_in_page: jax.Array, page_size: int) -> jax.Array:
        """The place in its sequence of a token of a page here. column, token_in_page: int32 [B, ...]."""
        first = self.first.reshape(-1, *(1 for _ in column.shape[1:]))
        return (first + column * self.stride) * page_size + token_in_page
