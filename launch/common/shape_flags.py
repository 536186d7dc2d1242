"""The shapes of one attention call, as the shared flags of the reports name them."""

from __future__ import annotations

from typing import NamedTuple

from paged_dist.launch.common import flag_checks, shared_flags


class AttentionShapes(NamedTuple):
    """B, Hq, Hkv, D and P."""

    batch: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int


def attention_shapes_from_flags() -> AttentionShapes:
    """The shapes that the flags name. The program has a default of --batch.

    Raises:
      ValueError: a size outside its rule, or query heads that the key/value heads do not divide.
    """
    batch = shared_flags.BATCH.value
    assert batch is not None
    shapes = AttentionShapes(
        batch,
        shared_flags.NUM_Q_HEADS.value,
        shared_flags.NUM_KV_HEADS.value,
        shared_flags.HEAD_DIM.value,
        shared_flags.PAGE_SIZE.value,
    )
    flag_checks.at_least(1, **shapes._asdict())
    flag_checks.check_sizes()
    flag_checks.check_head_counts()
    return shapes
