"""Paged attention of one query token a sequence: the op, its kernel bodies, and the plain reference."""

from paged_dist.kernels.paged_attention.api import page_attention
from paged_dist.kernels.paged_attention.checks import DEFAULT_MASK_VALUE
from paged_dist.kernels.paged_attention.decode import paged_decode_attention
from paged_dist.kernels.paged_attention.decode_plan import BlockSizes
from paged_dist.kernels.paged_attention.descriptor import MultiPageAsyncCopyDescriptor
from paged_dist.kernels.paged_attention.kernel import (
    paged_flash_attention_kernel,
    paged_flash_attention_kernel_inline_seq_dim,
)
from paged_dist.kernels.paged_attention.reference import ref_paged_attention

__all__ = [
    "DEFAULT_MASK_VALUE",
    "BlockSizes",
    "MultiPageAsyncCopyDescriptor",
    "page_attention",
    "paged_decode_attention",
    "paged_flash_attention_kernel",
    "paged_flash_attention_kernel_inline_seq_dim",
    "ref_paged_attention",
]
