"""`CacheSpec`: what a KV cache holds. Shapes, splits over a mesh and byte counts follow from it."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from paged_dist._errors import require, whole_number
from paged_dist.kernels.quantization import is_quantized
from paged_dist.kernels.scale_layout import check_scale_rows, pages_of_whole_tiles, scale_rows
from paged_dist.kernels.tiling import LANES, SUBLANES, stored_head_dim
from paged_dist.mesh import MeshAxes

CACHE_DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a KV cache holds, over the whole pod. Shapes and byte counts follow from it; nothing is allocated.

    Attributes:
      num_kv_heads: Hkv, key/value heads of the model.
      head_dim: D, the model's, of any size. 64 and multiples of 128 are stored as they are, others with zeros behind
        them (`stored_head_dim`). Keys, values, queries and outputs have D elements everywhere else.
      num_pages: N, pages in a layer's pool over all shards.
      page_size: P, tokens a page: a multiple of 8, and of 16 up to head_dim 64. With int8 and fp8 it divides 128 or is
        a multiple of it, and below 128 the pages of each shard fill whole rows of 128 scales.
      dtype: 'bfloat16', 'float32', 'int8' or 'float8_e4m3fn' (anything that `jnp.dtype` takes for them). The last
        two come with one f32 scale for each token and kv head, of keys and of values.
      num_layers: L layers stacked in one pool, with `layer=` in every op; None: one layer, no layer axis.

    Raises:
      ValueError: a value outside these rules.

    Example:
      >>> spec = pd.CacheSpec(num_kv_heads=8, head_dim=128, num_pages=8192, dtype="int8", num_layers=32)
      >>> spec.bytes_per_token  # K and V, 8 heads, 128 bytes and a scale of 4, 32 layers
      67584
      >>> spec.bytes_per_chip(pd.make_pod_mesh(model=8))
      8858370048
    """

    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int = 128
    dtype: str = "bfloat16"
    num_layers: int | None = None

    def __post_init__(self) -> None:
        try:
            name = jnp.dtype(self.dtype).name
        except TypeError:
            name = f"{self.dtype}"
        require(name in CACHE_DTYPES, "dtype", self.dtype, "not a cache dtype", f"use one of {CACHE_DTYPES}")
        object.__setattr__(self, "dtype", name)
        for field in ("num_kv_heads", "head_dim", "num_pages", "page_size", "num_layers"):
            value = getattr(self, field)
            if field == "num_layers" and value is None:
                continue
            object.__setattr__(self, field, whole_number(field, value, at_least=1))
        rule = SUBLANES * self.tokens_per_row
        require(
            self.page_size % rule == 0,
            "page_size",
            self.page_size,
            f"must be a multiple of {rule} at head_dim {self.head_dim}",
            "128 is the default",
        )
        if self.is_quantized:
            check_scale_rows(self.num_pages, self.page_size)

    @property
    def is_quantized(self) -> bool:
        """Whether the pages are 8-bit, with scales."""
        return is_quantized(self.dtype)

    @property
    def stored_head_dim(self) -> int:
        """Elements that one head's token takes in the pools: 64 for D up to 64, else the next multiple of 128.

        Those behind D are zeros: 96 is stored as 128, 192 as 256. XLA would pad narrower rows to these sizes, or copy
        the pool for each kernel.
        """
        return stored_head_dim(self.head_dim)

    @property
    def tokens_per_row(self) -> int:
        """Tokens in one stored row: 2 up to head_dim 64, else 1."""
        return max(1, LANES // self.stored_head_dim)

    @property
    def stored_page_shape(self) -> tuple[int, int]:
        """(rows, lanes) of one page of one head as stored; rows x lanes = page_size x stored_head_dim."""
        return self.page_size // self.tokens_per_row, self.stored_head_dim * self.tokens_per_row

    @property
    def pool_shape(self) -> tuple[int, ...]:
        """Shape of the stored key pool (and of the value pool): [Hkv, N, rows, lanes], or [L, ...]."""
        return (*self._layers, self.num_kv_heads, self.num_pages, *self.stored_page_shape)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Shape of the stored key scales (and of the value scales) of 8-bit pages: [Hkv, N * P / 128, 128]."""
        return (*self._layers, self.num_kv_heads, scale_rows(self.num_pages, self.page_size), LANES)

    @property
    def shard_page_multiple(self) -> int:
        """The number of pages on each shard must be a multiple of this.

        8-bit pages fill whole (8, 128) tiles of scales; 1 for others.
        """
        return pages_of_whole_tiles(self.page_size) if self.is_quantized else 1

    @property
    def key_smoothing_shape(self) -> tuple[int, ...]:
        """Shape of a key smoothing: [Hkv, D], or [L, Hkv, D]."""
        return (*self._layers, self.num_kv_heads, self.head_dim)

    @property
    def _layers(self) -> tuple[int, ...]:
        """The leading axis of stacked layers, in the shapes: (L,), or none."""
        return () if self.num_layers is None else (self.num_layers,)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's K and V as stored, all heads, all layers, scales and padding counted."""
        scale = 4 if self.is_quantized else 0
        one = self.stored_head_dim * jnp.dtype(self.dtype).itemsize + scale
        return 2 * self.num_kv_heads * one * (self.num_layers or 1)

    @property
    def bytes_total(self) -> int:
        """Bytes of both pools, scales and padding counted, over the whole pod."""
        return self.bytes_per_token * self.page_size * self.num_pages

    def bytes_per_chip(self, mesh: Mesh | AbstractMesh, axes: MeshAxes = MeshAxes()) -> int:
        """Bytes of both pools, scales and padding counted, on each device of `mesh`."""
        self.check_mesh(mesh, axes)
        return self.bytes_total // math.prod(axes.size(mesh, part) for part in ("data", "context", "model"))

    def check_mesh(self, mesh: Mesh | AbstractMesh, axes: MeshAxes = MeshAxes()) -> None:
        """Raises ValueError where heads or pages do not divide over `mesh`."""
        axes.check(mesh.axis_names)
        model, data, context = (axes.size(mesh, part) for part in ("model", "data", "context"))
        require(
            self.num_kv_heads % model == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"must be a multiple of the mesh's model size {model}, for heads are never repeated",
            f"make_pod_mesh(num_kv_heads={self.num_kv_heads}, model_parallelism={model * context}) gives the surplus "
            "to context",
        )
        require(
            self.num_pages % (data * context) == 0,
            "num_pages",
            self.num_pages,
            f"must be a multiple of the mesh's data x context size {data} x {context}",
            f"{-(-self.num_pages // (data * context)) * data * context} works",
        )
        pages = self.shard_page_multiple
        if pages > 1:
            require(
                self.num_pages % (pages * data * context) == 0,
                "num_pages",
                self.num_pages,
                f"with {self.dtype} at page_size {self.page_size} must be a multiple of {pages} on each of the mesh's "
                f"data x context = {data * context} shards: their rows of scales must fill whole tiles, or XLA lays "
                "them out in a way that every call would copy",
                f"{-(-self.num_pages // (pages * data * context)) * pages * data * context} works",
            )

    def partition_spec(self, axes: MeshAxes = MeshAxes()) -> PartitionSpec:
        """How a stored pool is split: heads over model, pages over (data, context), layers not at all."""
        return PartitionSpec(*self._head_axes(axes), axes.pages or None, None, None)

    def scales_partition_spec(self, axes: MeshAxes = MeshAxes()) -> PartitionSpec:
        """How stored scales are split: as their pages."""
        return PartitionSpec(*self._head_axes(axes), axes.pages or None, None)

    def key_smoothing_partition_spec(self, axes: MeshAxes = MeshAxes()) -> PartitionSpec:
        """How a key smoothing is split: as the heads."""
        return PartitionSpec(*self._head_axes(axes), None)

    def _head_axes(self, axes: MeshAxes) -> tuple[tuple[str, ...] | None, ...]:
        """The leading axes of a PartitionSpec: layers not split, heads over model."""
        return (*(None for _ in self._layers), axes.names("model") or None)
