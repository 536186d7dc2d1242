"""The check that no two rows, or page copies, write one page in one call: on the host, if it has the ids."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from paged_dist._errors import bad_value
from paged_dist.cache import CacheSpec
from paged_dist.mesh import MeshAxes
from paged_dist.ops.page_owners import PageOwners


def on_host(*values) -> tuple[np.ndarray, ...] | None:
    """`values` as NumPy arrays, if all are NumPy's, lists, or on this process's CPU devices; else None.

    So nothing is read back from an accelerator, and traced values, which have no content, are not looked at.
    """
    seen = []
    for x in values:
        if isinstance(x, jax.Array):
            if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
                return None
            if any(device.platform != "cpu" for device in x.devices()):
                return None
        seen.append(np.asarray(x))
    return tuple(seen)


def check_rows_apart(
    spec: CacheSpec,
    mesh: Mesh | AbstractMesh,
    axes: MeshAxes,
    starts: np.ndarray,
    ends: np.ndarray,
    block_tables: np.ndarray,
    rows: np.ndarray | None = None,
) -> None:
    """Raises ValueError where two rows write tokens into one page, or one row into one page twice: some would be lost.

    Args:
      starts, ends: [R] tokens that each row writes; a negative start writes nothing.
      block_tables: [B, S] global page ids, as the ops take them.
      rows: [R], which of the table's rows those are; None: R = B, all of them.
    """
    count, columns = block_tables.shape
    starts, ends = (np.asarray(x, np.int64) for x in (starts, ends))
    rows = np.arange(count) if rows is None else rows
    live = (starts >= 0) & (ends > starts) & (rows >= 0) & (rows < count)
    rows, starts, ends = rows[live], starts[live], ends[live]
    first, last = starts // spec.page_size, np.minimum((ends - 1) // spec.page_size, columns - 1)
    column = first[:, None] + np.arange(max(0, int((last - first).max(initial=-1)) + 1))
    page = block_tables[rows[:, None], np.minimum(column, columns - 1)]
    # A page on another shard than its place in the row says is not written, so it is not counted.
    owners, first_page = PageOwners.of(spec, mesh, axes), np.maximum(block_tables[rows, :1], 0)
    shard = owners.of_column(column, rows[:, None], first_page, count)
    written = (column <= last[:, None]) & (page >= 0) & (owners.of_page(page) == shard)
    page, row = page[written], np.broadcast_to(rows[:, None], written.shape)[written]
    order = np.argsort(page, kind="stable")
    page, row = page[order], row[order]
    same = np.flatnonzero(page[1:] == page[:-1])
    if same.size:
        one, other = int(row[same[0]]), int(row[same[0] + 1])
        raise bad_value(
            "block_tables",
            f"page {page[same[0]]} in rows {one} and {other}",
            "is written twice in one call: tokens would be lost",
            "after a fork copy_pages(cache, pages.take_copies()) first; a row without a new token has position -1",
        )


def check_copies_apart(spec: CacheSpec, mesh: Mesh | AbstractMesh, axes: MeshAxes, copies: np.ndarray) -> None:
    """Raises ValueError where a pair of `copies` [M, 2] writes a page that another pair writes or reads."""
    shard = PageOwners.of(spec, mesh, axes).of_page(copies)
    inside = (copies >= 0).all(axis=1) & (copies < spec.num_pages).all(axis=1)
    read, write = copies[inside & (shard[:, 0] == shard[:, 1]) & (copies[:, 0] != copies[:, 1])].T
    pages, times = np.unique(write, return_counts=True)
    if (times > 1).any():
        raise bad_value("copies", int(pages[times > 1][0]), "is a page that two pairs write", "call twice, in order")
    both = np.intersect1d(pages, read)
    if both.size:
        raise bad_value("copies", int(both[0]), "is a page that one pair writes and another reads", "call twice")
