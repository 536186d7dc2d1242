"""The decode kernel: paged attention of one to sixteen new tokens a sequence, which every op above runs."""

from paged_dist.kernels.decode.api import paged_decode_attention
from paged_dist.kernels.decode.block_sizes import BlockSizes

__all__ = ["BlockSizes", "paged_decode_attention"]
