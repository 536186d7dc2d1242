"""Memory of a decode run: whether cache and page tables fit into it, and with which flags they would."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from paged_dist import CacheSpec
from paged_dist._errors import bad_value
from paged_dist.launch.common import host
from paged_dist.launch.common.number_formats import gigabytes
from paged_dist.launch.serving.row_schedule import Pool
from paged_dist.launch.serving.workload import Request, whole_pool
from paged_dist.mesh.devices import memory_limit

_ADVISED = 0.75  # share of the memory that advised sizes take: programs and the host's own need some too


def check_memory(
    spec: CacheSpec, mesh: Mesh, pool: Pool, requests: Sequence[Request], columns: int, *, num_pages_given: bool
) -> None:
    """Raises ValueError where this process's part of the cache and of the tables is over the memory of its devices.

    Args:
      spec: the cache.
      pool: its rows and pages.
      columns: of the block table, [B, columns] int32, of which each device holds its data shard's rows.
      num_pages_given: whether --num_pages says spec.num_pages; without it, it is what the requests take.
    """
    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if not here:
        return
    have, where = memory_limit(here[0]), "a device has"
    if here[0].platform == "cpu":  # simulated devices share the host
        have, where = host.memory_bytes() / len(here), f"each of this host's {len(here)} devices has"
    tables = 4 * columns * pool.batch // pool.data
    need = spec.bytes_per_chip(mesh) + tables
    if need <= have:
        return
    raise bad_value(
        "--num_pages" if num_pages_given else "num_pages",
        spec.num_pages,
        ("" if num_pages_given else "what the requests take where none waits for pages: ")
        + f"a cache of {gigabytes(spec.bytes_per_chip(mesh))} a device"
        + (f" and page tables of {gigabytes(tables)}" if tables > need // 100 else "")
        + f", where {where} {gigabytes(have)}",
        _what_fits(spec, mesh, pool, requests, _ADVISED * have - tables),
    )


def _what_fits(spec: CacheSpec, mesh: Mesh, pool: Pool, requests: Sequence[Request], room: float) -> str:
    """Flags with which the cache takes at most `room` bytes of a device: fewer pages, shorter prompts if need be."""
    shards = pool.data * pool.context
    unit = whole_pool(1, spec.page_size, spec.dtype)
    page_bytes = spec.bytes_per_chip(mesh) * shards / spec.num_pages
    pages = max(0, int(room / page_bytes)) // unit * unit  # of each shard
    longest = max(requests, key=lambda r: r.tokens)
    if pages >= pool.pages_on_each_chip(longest.tokens):
        return f"--num_pages={pages * shards} fits, requests then wait for pages"
    prompt = pages * pool.context * spec.page_size - max(r.generated for r in requests)
    if prompt >= 1:
        return (
            f"--num_pages={pages * shards} --max_context={prompt} fit: request {longest.id} has {longest.tokens} tokens"
        )
    return "give fewer layers or heads, or a smaller --batch"
