"""Pallas kernels for one chip: paged attention and the KV cache update."""

from paged_dist.kernels.kv_cache_update import write_kv_pages
from paged_dist.kernels.paged_attention import (
    DEFAULT_MASK_VALUE,
    BlockSizes,
    MultiPageAsyncCopyDescriptor,
    page_attention,
    paged_decode_attention,
    paged_flash_attention_kernel,
    paged_flash_attention_kernel_inline_seq_dim,
    ref_paged_attention,
)
from paged_dist.kernels.quantization import calibrate_key_smoothing, dequantize_kv, quantize_kv

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
