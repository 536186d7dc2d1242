"""Allocators of a few small pages, on an abstract mesh."""

from __future__ import annotations

from jax.sharding import AbstractMesh

from paged_dist.cache import CacheSpec
from paged_dist.mesh.axes import AXIS_NAMES
from paged_dist.pages import PageAllocator


def abstract_pod(data: int = 1, context: int = 1, model: int = 1) -> AbstractMesh:
    return AbstractMesh((data, context, model), AXIS_NAMES)


def small_allocator(data=1, context=1, *, rows=4, columns=4, pages=16, page_size=8) -> PageAllocator:
    return PageAllocator(CacheSpec(1, 128, pages, page_size), abstract_pod(data, context), rows, columns)
