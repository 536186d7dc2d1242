"""Paged attention of one query token a sequence."""

from paged_dist.kernels.paged_attention.checks import DEFAULT_MASK_VALUE

__all__ = ["DEFAULT_MASK_VALUE"]
