"""Writes into the page pools of one chip, in place: of new tokens (`write_kv_pages`) and of copies of whole pages."""

from paged_dist.kernels.cache_update.api import write_kv_pages

__all__ = ["write_kv_pages"]
