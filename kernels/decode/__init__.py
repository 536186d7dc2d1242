"""The decode kernel: paged attention of 1 to 16 new tokens of each sequence. Every attention op runs it."""

from paged_dist.kernels.decode.api import paged_decode_attention
from paged_dist.kernels.decode.block_sizes import BlockSizes

__all__ = ["BlockSizes", "paged_decode_attention"]
