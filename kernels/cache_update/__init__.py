"""Writes into the page pools, in place: new tokens (`write_kv_pages`) and copies of whole pages."""

from paged_dist.kernels.cache_update.api import write_kv_pages

__all__ = ["write_kv_pages"]
