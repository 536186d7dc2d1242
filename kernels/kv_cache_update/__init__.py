"""KV cache update: new tokens into their pages, in place."""

from paged_dist.kernels.kv_cache_update.api import write_kv_pages

__all__ = ["write_kv_pages"]
