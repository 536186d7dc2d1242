"""How the rows of a batch and the pages of a pool are dealt out over the shards of a mesh.

The mesh has `data` x `context` shards of pages. Row b lives on data shard b // (num_sequences / data). Shard
r = data shard * context + context shard owns the page ids [r * n, (r + 1) * n). Page i of a row is on context shard
(o + i) mod context, o being the context shard of its page 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh

from paged_dist._errors import bad_value, require, whole_number
from paged_dist.cache import CacheSpec
from paged_dist.mesh import MeshAxes


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of a batch and of a pool, and which row and which page belongs to which shard.

    Attributes:
      num_sequences: B, rows of the batch.
      pages_per_sequence: columns of the block table, the most pages of a row.
      page_size: P, tokens of a page.
      data, context: data shards, and context shards of each.
      rows_per_shard: rows of a data shard.
      pages_per_context_shard: n, pages of one shard, which is one context shard of one data shard.
      max_tokens: the most tokens of a row.
    """

    num_sequences: int
    pages_per_sequence: int
    page_size: int
    data: int
    context: int
    pages_per_context_shard: int
    rows_per_shard: int = dataclasses.field(init=False)
    max_tokens: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows_per_shard", self.num_sequences // self.data)
        object.__setattr__(self, "max_tokens", self.pages_per_sequence * self.page_size)

    @classmethod
    def of(
        cls, spec: CacheSpec, mesh: Mesh | AbstractMesh, num_sequences: int, pages_per_sequence: int, axes: MeshAxes
    ) -> Geometry:
        """The geometry of a batch of `num_sequences` rows over a cache of `spec` on `mesh`.

        Raises:
          ValueError: sizes that are not positive or do not divide over the mesh.
        """
        spec.check_mesh(mesh, axes)
        data, context = axes.size(mesh, "data"), axes.size(mesh, "context")
        rows = whole_number("num_sequences", num_sequences)
        columns = whole_number("pages_per_sequence", pages_per_sequence)
        require(rows >= 1, "num_sequences", rows, "must be at least 1")
        require(rows % data == 0, "num_sequences", rows, f"must be a multiple of the mesh's data size {data}")
        require(columns >= 1, "pages_per_sequence", columns, "must be at least 1")
        require(
            columns * spec.page_size < 2**31,
            "pages_per_sequence",
            columns,
            f"times page_size {spec.page_size} must fit in int32, which lengths are",
            f"at most {(2**31 - 1) // spec.page_size}",
        )
        return cls(rows, columns, spec.page_size, data, context, spec.num_pages // (data * context))

    # Rows.

    def check_row(self, row: int) -> None:
        """Raises ValueError where there is no row `row`."""
        whole_number("row", row)
        if not 0 <= row < self.num_sequences:  # a negative index would silently be another row
            raise bad_value("row", row, f"must be between 0 and {self.num_sequences - 1}")

    def data_shard_of_row(self, row: int) -> int:
        """The data shard on which `row` lives."""
        return row // self.rows_per_shard

    def rows_of(self, data_shard: int) -> range:
        """The rows of a data shard."""
        return range(data_shard * self.rows_per_shard, (data_shard + 1) * self.rows_per_shard)

    # Pages.

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take."""
        return -(-num_tokens // self.page_size)

    def shard_of_page(self, page: int) -> int:
        """The shard that owns `page`."""
        return page // self.pages_per_context_shard

    def data_shard_of_page(self, page: int) -> int:
        """The data shard of the shard that owns `page`."""
        return page // self.pages_per_context_shard // self.context

    def context_shard_of_page(self, page: int) -> int:
        """The context shard, within its data shard, that owns `page`."""
        return page // self.pages_per_context_shard % self.context

    def first_context_shard(self, pages: Sequence[int]) -> int:
        """The context shard of page 0 of a row with these pages; 0 where it has none."""
        return self.context_shard_of_page(pages[0]) if pages else 0

    def shards_of(self, data_shard: int) -> range:
        """The shards of a data shard, one for each context shard."""
        return range(data_shard * self.context, (data_shard + 1) * self.context)

    def shard_in_turn(self, data_shard: int, first: int, index: int) -> int:
        """The shard of page `index` of a row whose page 0 is on context shard `first`."""
        return data_shard * self.context + (first + index) % self.context

    def shards_in_turn(self, data_shard: int, first: int, start: int, stop: int) -> list[int]:
        """The shards of pages `start` to `stop` - 1 of a row whose page 0 is on context shard `first`."""
        base, context = data_shard * self.context, self.context
        return [base + (first + i) % context for i in range(start, stop)]
