"""Pallas kernels for one chip, each in a folder with the form that CPUs and GPUs run.

`decode` is the attention kernel that every op runs. `cache_update` writes new tokens and copies pages. `attention`
holds what all attention kernels share, and the XLA form of attention. `seed` holds the kernels that this project began
with: they have the signatures of JAX's and ejkernel's paged attention, and are kept for code that calls those.
"""

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
