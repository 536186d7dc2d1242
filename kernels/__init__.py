"""Pallas kernels for one chip: paged attention and the KV cache update."""

from paged_dist.kernels.kv_cache_update import write_kv_pages

__all__ = ["write_kv_pages"]
