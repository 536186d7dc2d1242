"""Pallas kernels for one chip: paged attention and the KV cache update."""

from paged_dist.kernels.attention.checks import DEFAULT_MASK_VALUE
from paged_dist.kernels.cache_update import write_kv_pages
from paged_dist.kernels.decode import BlockSizes, paged_decode_attention
from paged_dist.kernels.quantization import calibrate_key_smoothing, dequantize_kv, quantize_kv
from paged_dist.kernels.seed import (
    MultiPageAsyncCopyDescriptor,
    page_attention,
    paged_flash_attention_kernel,
    paged_flash_attention_kernel_inline_seq_dim,
    ref_paged_attention,
)

__all__ = [
    "DEFAULT_MASK_VALUE",
    "BlockSizes",
    "MultiPageAsyncCopyDescriptor",
    "calibrate_key_smoothing",
    "dequantize_kv",
    "page_attention",
    "paged_decode_attention",
    "paged_flash_attention_kernel",
    "paged_flash_attention_kernel_inline_seq_dim",
    "quantize_kv",
    "ref_paged_attention",
    "write_kv_pages",
]
