"""The seed's kernels: the signatures of JAX's and ejkernel's paged attention, kept and tested for code that has them.

No op of this library runs on them: the ops run `paged_dist.kernels.decode`.
"""

from paged_dist.kernels.seed.api import page_attention
from paged_dist.kernels.seed.descriptor import MultiPageAsyncCopyDescriptor
from paged_dist.kernels.seed.kernel import paged_flash_attention_kernel, paged_flash_attention_kernel_inline_seq_dim
from paged_dist.kernels.seed.reference import ref_paged_attention

__all__ = [
    "MultiPageAsyncCopyDescriptor",
    "page_attention",
    "paged_flash_attention_kernel",
    "paged_flash_attention_kernel_inline_seq_dim",
    "ref_paged_attention",
]
