"""Merge: attention over all tokens of a sequence, from the partial results of the shards that hold its pages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def merge_partials(
    output: jax.Array, lse: jax.Array, names: tuple[str, ...], *, scatter: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Inside a `shard_map`: attention over all shards' tokens, from what each computed over its own.

    With w_c = exp(lse_c - max lse) the output is sum(w_c out_c) / sum(w_c), and lse is max lse + log(sum(w_c)): the
    associative step of online softmax (Milakov and Gimelshein, arXiv:1805.02867), as FlashDecoding takes it between
    chunks of a sequence. A shard without tokens of a sequence (lse -inf, output 0) changes nothing.

    What is communicated: a maximum of [..., H], a sum of [..., H, D] and [..., H], all f32.

    Args:
      output: [..., H, D], this shard's attention over its own tokens.
      lse: [..., H] f32, natural log of its softmax denominator.
      names: the mesh axes over which the tokens are split.
      scatter: makes the sum of the outputs a reduce-scatter over H: each shard gets H / shards heads, in the order of
        the shards. Their number must divide H.

    Returns:
      (output, lse) f32, the same on every shard; with `scatter`, this shard's heads of them. 0 and -inf where no shard
      has a token.
    """
    top = lax.pmax(lse, names)
    weight = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(lse - top))  # -inf less -inf is NaN
    output = output.astype(jnp.float32) * weight[..., None]
    if scatter:
        # All of the weights, of which each shard needs some: so small a reduce-scatter XLA makes into this anyway.
        top, total = (my_heads(x, names) for x in (top, lax.psum(weight, names)))
        output = lax.psum_scatter(output, names, scatter_dimension=output.ndim - 2, tiled=True)
    else:
        output, total = lax.psum((output, weight), names)  # one all-reduce of both
    is_empty = total == 0.0
    output = output / jnp.where(is_empty, 1.0, total)[..., None]
    return output, jnp.where(is_empty, -jnp.inf, top + jnp.log(total))


def my_heads(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Inside a `shard_map`: this shard's H / shards heads of x [..., H], the same on every shard of `names`."""
    count = x.shape[-1] // lax.axis_size(names)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(names) * count, count, axis=-1)
