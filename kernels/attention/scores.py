"""The range of a score (q.k, scaled and capped): a live token's is finite in f32, a masked token's is -inf."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

LOWEST = float(np.finfo(np.float32).min)  # of a live token's score, and what a running maximum starts from
DEAD = -float("inf")  # a masked token's score: below every live one, so that its weight exp(DEAD - maximum) is 0


def in_range(scores: jax.Array) -> jax.Array:
    """f32 scores with those beyond f32's range as its ends, and NaN as NaN.

    The difference of a score and the maximum then is never that of two infinities, and a sequence whose every score
    is far below zero has a largest one all the same.
    """
    return jnp.clip(scores, LOWEST, -LOWEST)
