"""The KV cache: pools of pages, sharded over a mesh, and what they weigh."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from paged_dist._errors import not_yet, require
from paged_dist.mesh import MeshAxes

LANES = 128  # a TPU register's minor axis: a stored row is a multiple of it, or XLA pads or relayouts the pool
SUBLANES = 8  # rows of the smallest aligned tile

_DTYPES = ("bfloat16", "float32")
_DTYPES_TO_COME = ("int8", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a KV cache holds, the whole pod's. Shapes and byte counts follow from it, nothing is allocated.

    Attributes:
      num_kv_heads: Hkv, key/value heads of the model.
      head_dim: D, 64 or a multiple of 128.
      num_pages: N, pages in a layer's pool over all shards.
      page_size: P, tokens a page: a multiple of 8, and of 16 at head_dim 64.
      dtype: 'bfloat16' or 'float32' (anything that `jnp.dtype` takes for them).
      num_layers: L layers stacked in one pool, with `layer=` in every op; None: one layer, no layer axis.

    Raises:
      ValueError: a value outside these rules.
      NotImplementedError: dtype int8 or float8_e4m3fn.
    """

    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int = 128
    dtype: str = "bfloat16"
    num_layers: int | None = None

    def __post_init__(self):
        try:
            name = jnp.dtype(self.dtype).name
        except TypeError:
            name = str(self.dtype)
        if name in _DTYPES_TO_COME:
            raise not_yet(f"CacheSpec(dtype={name!r})", f"use one of {_DTYPES}")
        require(name in _DTYPES, "dtype", self.dtype, "not a cache dtype", f"use one of {_DTYPES}")
        object.__setattr__(self, "dtype", name)
        for field in ("num_kv_heads", "num_pages", "page_size", "head_dim"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1")
        require(self.num_layers is None or self.num_layers >= 1, "num_layers", self.num_layers, "must be None or at least 1")
        require(self.head_dim == 64 or self.head_dim % LANES == 0, "head_dim", self.head_dim,
                "must be 64 or a multiple of 128")
        rule = SUBLANES * self.tokens_per_row
        require(self.page_size % rule == 0, "page_size", self.page_size,
                f"must be a multiple of {rule} at head_dim {self.head_dim}", "128 is the default")

    @property
    def tokens_per_row(self) -> int:
        """Tokens that share one stored row: 2 at head_dim 64, else 1."""
        return max(1, LANES // self.head_dim)

    @property
    def stored_page_shape(self) -> tuple[int, int]:
        """(rows, lanes) of one page of one head as stored; rows x lanes = page_size x head_dim."""
        return self.page_size // self.tokens_per_row, self.head_dim * self.tokens_per_row

    @property
    def pool_shape(self) -> tuple[int, ...]:
        """Shape of the stored key pool (and of the value pool): [Hkv, N, rows, lanes], or [L, ...]."""
        layers = () if self.num_layers is None else (self.num_layers,)
        return (*layers, self.num_kv_heads, self.num_pages, *self.stored_page_shape)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's K and V, all heads, all layers."""
        return 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize * (self.num_layers or 1)

    @property
    def bytes_total(self) -> int:
        """Bytes of both pools over the whole pod."""
        return self.bytes_per_token * self.page_size * self.num_pages

    def bytes_per_chip(self, mesh: Mesh | AbstractMesh, axes: MeshAxes = MeshAxes()) -> int:  # noqa: B008
        """Bytes of both pools on each device of `mesh`."""
        self.check_mesh(mesh, axes)
        return self.bytes_total // math.prod(axes.size(mesh, part) for part in ("data", "context", "model"))

    def check_mesh(self, mesh: Mesh | AbstractMesh, axes: MeshAxes = MeshAxes()) -> None:  # noqa: B008
        """Raises ValueError where heads or pages do not divide over `mesh`."""
        axes.check(mesh)
        model, data, context = (axes.size(mesh, part) for part in ("model", "data", "context"))
        require(self.num_kv_heads % model == 0, "num_kv_heads", self.num_kv_heads,
                f"must be a multiple of the mesh's model size {model}, for heads are never repeated",
                "make_pod_mesh(num_kv_heads=..., model_parallelism=...) gives the surplus to context")
        require(self.num_pages % (data * context) == 0, "num_pages", self.num_pages,
                f"must be a multiple of the mesh's data x context size {data} x {context}")
