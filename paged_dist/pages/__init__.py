"""Who owns which page: the allocator and its prefix cache, on the host alone; no device is touched."""

from paged_dist.pages.allocator import PageAllocator
from paged_dist.pages.out_of_pages import OutOfPages
from paged_dist.pages.prefix_cache import PrefixMatch

__all__ = ["OutOfPages", "PageAllocator", "PrefixMatch"]
