"""The KV cache: its description (`CacheSpec`) and its pools of pages, sharded over a mesh (`PagedKVCache`)."""

from paged_dist.cache.pools import PagedKVCache
from paged_dist.cache.spec import CacheSpec

__all__ = ["CacheSpec", "PagedKVCache"]
