"""Which shard owns a page id, and on which shard the i-th page of a row must lie: the rule that allocators follow."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from paged_dist.cache import CacheSpec
from paged_dist.mesh import MeshAxes

Ints = TypeVar("Ints", np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True)
class PageOwners:
    """The shards of a pool of N pages: shard r = d * C + c, of data shard d and context shard c, owns n of the ids.

    n = N / (data * C), and the ids are [r * n, (r + 1) * n). Methods take NumPy arrays or jax arrays.

    Attributes:
      num_pages: N.
      data, context: shards of the batch, and C shards of one sequence's pages.
    """

    num_pages: int
    data: int
    context: int

    @classmethod
    def of(cls, spec: CacheSpec, mesh: Mesh | AbstractMesh, axes: MeshAxes) -> PageOwners:
        """Those of a cache of `spec` on `mesh`."""
        return cls(spec.num_pages, axes.size(mesh, "data"), axes.size(mesh, "context"))

    @property
    def pages_per_shard(self) -> int:
        """n."""
        return self.num_pages // (self.data * self.context)

    def of_page(self, page: Ints) -> Ints:
        """The shard that owns the id `page`."""
        return page // self.pages_per_shard

    def of_column(self, column: Ints, row: Ints, first_page: Ints, batch: int) -> Ints:
        """The shard that must own page `column` of `row`, a row of B = `batch` that begins with the id `first_page`.

        Rows are split over data: row b lies on data shard b // (B / data). Its pages go round the C context shards,
        from the one that owns its first page: page i lies on context shard (o + i) mod C.
        """
        data_shard = row // (batch // self.data)
        return data_shard * self.context + (self.of_page(first_page) + column) % self.context
