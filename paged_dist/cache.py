"""The KV cache: pools of pages, sharded over a mesh, and what they weigh."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from paged_dist._compat import reshape_minor
from paged_dist._errors import not_yet, require
from paged_dist.kernels._dispatch import as_kernel_dtype, as_stored_dtype
from paged_dist.kernels._tiling import LANES, SUBLANES
from paged_dist.mesh import MeshAxes

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
        for field in ("num_kv_heads", "head_dim", "num_pages", "page_size", "num_layers"):
            value = getattr(self, field)
            if field == "num_layers" and value is None:
                continue
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            require(whole and value >= 1, field, value, "must be a whole number, at least 1")
            object.__setattr__(self, field, int(value))
        require(
            self.head_dim == 64 or self.head_dim % LANES == 0,
            "head_dim",
            self.head_dim,
            "must be 64 or a multiple of 128",
        )
        rule = SUBLANES * self.tokens_per_row
        require(
            self.page_size % rule == 0,
            "page_size",
            self.page_size,
            f"must be a multiple of {rule} at head_dim {self.head_dim}",
            "128 is the default",
        )

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

    def bytes_per_chip(self, mesh: Mesh | AbstractMesh, axes: MeshAxes = MeshAxes()) -> int:
        """Bytes of both pools on each device of `mesh`."""
        self.check_mesh(mesh, axes)
        return self.bytes_total // math.prod(axes.size(mesh, part) for part in ("data", "context", "model"))

    def check_mesh(self, mesh: Mesh | AbstractMesh, axes: MeshAxes = MeshAxes()) -> None:
        """Raises ValueError where heads or pages do not divide over `mesh`."""
        axes.check(mesh)
        model, data, context = (axes.size(mesh, part) for part in ("model", "data", "context"))
        require(
            self.num_kv_heads % model == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"must be a multiple of the mesh's model size {model}, for heads are never repeated",
            "make_pod_mesh(num_kv_heads=..., model_parallelism=...) gives the surplus to context",
        )
        require(
            self.num_pages % (data * context) == 0,
            "num_pages",
            self.num_pages,
            f"must be a multiple of the mesh's data x context size {data} x {context}",
        )

    def partition_spec(self, axes: MeshAxes = MeshAxes()) -> PartitionSpec:
        """How a stored pool is split: heads over model, pages over (data, context), layers not at all."""
        layers = () if self.num_layers is None else (None,)
        return PartitionSpec(*layers, axes.names("model") or None, axes.pages or None, None, None)


def stored_dtype(spec: CacheSpec, mesh: Mesh | AbstractMesh | None) -> jnp.dtype:
    """The dtype of a cache's pools on `mesh`: the spec's, but the bits of bf16 on CPU devices."""
    on_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    return jnp.dtype("uint16" if on_cpu and spec.dtype == "bfloat16" else spec.dtype)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["key_pages", "value_pages"], meta_fields=["spec", "mesh"]
)
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """The key and value pools of a model, sharded over a mesh: a pytree of two arrays.

    A page of one head is stored as rows of 128 lanes or more: [P, D] from head_dim 128 on, two tokens a row
    ([P/2, 128]) at head_dim 64, so that XLA pads nothing and a kernel's DMA takes the pool as it lies. On CPU
    bf16 is stored as its bits, uint16: XLA's CPU back end (jax 0.10) widens a whole bf16 pool to f32 and back for
    every write into it.

    Attributes:
      key_pages, value_pages: [Hkv, N, rows, lanes] or [L, Hkv, N, rows, lanes], `spec.dtype` (its
        bits on CPU); inside a `shard_map`, this shard's part of them. `to_pages` gives them as pages.
      spec: the CacheSpec of the whole cache.
      mesh: where the cache was made; the ops run on it unless told otherwise. May be None.
    """

    key_pages: jax.Array
    value_pages: jax.Array
    spec: CacheSpec
    mesh: Mesh | AbstractMesh | None = None

    @classmethod
    def create(cls, spec: CacheSpec, mesh: Mesh, *, axes: MeshAxes = MeshAxes()) -> PagedKVCache:
        """An empty cache (zeros), allocated shard by shard on the devices of `mesh`; no host copy is made.

        Raises:
          ValueError: heads or pages that do not divide over `mesh`.
        """
        if spec.page_size < 64:
            warnings.warn(
                f"CacheSpec(page_size={spec.page_size}): below 64 tokens a page the DMA engine, not HBM, sets "
                "the pace on TPU; 128 is the default",
                stacklevel=2,
            )
        shardings = cls.shardings(spec, mesh, axes=axes)
        zeros = lambda: cls(*(jnp.zeros(spec.pool_shape, stored_dtype(spec, mesh)) for _ in range(2)), spec, mesh)
        return jax.jit(zeros, out_shardings=shardings)()

    @classmethod
    def shardings(cls, spec: CacheSpec, mesh: Mesh, *, axes: MeshAxes = MeshAxes()) -> PagedKVCache:
        """The same pytree with a NamedSharding for each array, e.g. for `jax.jit(..., out_shardings=...)`."""
        spec.check_mesh(mesh, axes)
        sharding = NamedSharding(mesh, spec.partition_spec(axes))
        return cls(sharding, sharding, spec, mesh)

    @classmethod
    def abstract(cls, spec: CacheSpec, mesh: Mesh, *, axes: MeshAxes = MeshAxes()) -> PagedKVCache:
        """The same pytree with a ShapeDtypeStruct for each array: to compile ahead of time, also for absent chips."""
        leaf = lambda sharding: jax.ShapeDtypeStruct(spec.pool_shape, stored_dtype(spec, mesh), sharding=sharding)
        return jax.tree.map(leaf, cls.shardings(spec, mesh, axes=axes))

    def partition_specs(self, axes: MeshAxes = MeshAxes()) -> PagedKVCache:
        """The same pytree with a PartitionSpec for each array: the in_specs and out_specs of a caller's `shard_map`."""
        p = self.spec.partition_spec(axes)
        return dataclasses.replace(self, key_pages=p, value_pages=p)

    @classmethod
    def from_pages(
        cls, key_pages: jax.Array, value_pages: jax.Array, *, mesh: Mesh | None = None, axes: MeshAxes = MeshAxes()
    ) -> PagedKVCache:
        """A cache from pages in the kernels' layout.

        Args:
          key_pages, value_pages: [Hkv, N, P, D] or [L, Hkv, N, P, D], bf16 or f32.
          mesh: where to put them, sharded; None leaves them where they are, and takes over the mesh of their
            NamedSharding if they have one. What is in place already is not copied: an eager write then takes
            the caller's arrays over too.

        Raises:
          ValueError: the two disagree, or a shape that CacheSpec refuses.
        """
        require(
            key_pages.ndim in (4, 5), "key_pages.shape", key_pages.shape, "must be [Hkv, N, P, D] or [L, Hkv, N, P, D]"
        )
        require(
            value_pages.shape == key_pages.shape,
            "value_pages.shape",
            value_pages.shape,
            f"must equal key_pages.shape {key_pages.shape}",
        )
        require(
            value_pages.dtype == key_pages.dtype,
            "value_pages.dtype",
            value_pages.dtype,
            f"must equal key_pages.dtype {key_pages.dtype}",
        )
        *layers, heads, pages, page_size, head_dim = key_pages.shape
        spec = CacheSpec(heads, head_dim, pages, page_size, str(key_pages.dtype), *layers)
        key_pages, value_pages = (reshape_minor(x, spec.pool_shape) for x in (key_pages, value_pages))
        if mesh is not None:
            put = cls.shardings(spec, mesh, axes=axes)
            key_pages, value_pages = jax.device_put((key_pages, value_pages), (put.key_pages, put.value_pages))
        else:
            sharding = getattr(key_pages, "sharding", None) if not isinstance(key_pages, jax.core.Tracer) else None
            mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        key_pages, value_pages = as_stored_dtype(stored_dtype(spec, mesh), key_pages, value_pages)
        return cls(key_pages, value_pages, spec, mesh)

    def to_pages(self) -> tuple[jax.Array, jax.Array]:
        """(key_pages, value_pages) in the kernels' layout [Hkv, N, P, D] or [L, Hkv, N, P, D].

        No copy on TPU from head_dim 128 on. Inside a `shard_map`, this shard's heads and pages.
        """
        pages = lambda x: reshape_minor(x, (*x.shape[:-2], self.spec.page_size, self.spec.head_dim))
        key_pages, value_pages = as_kernel_dtype(self.key_pages, self.value_pages)
        return pages(key_pages), pages(value_pages)

    def check_layer(self, layer: jax.Array | int | None) -> None:
        """Raises ValueError where `layer` is missing for a stacked cache, given for a lone one, or out of range."""
        layers = self.spec.num_layers
        if layers is None:
            require(
                layer is None, "layer", layer, "must be None: the cache has no layer axis", "CacheSpec(num_layers=...)"
            )
            return
        rule = f"must be an int32 scalar in [0, {layers}): the cache stacks {layers} layers"
        require(layer is not None, "layer", layer, rule)
        require(jnp.ndim(layer) == 0 and jnp.issubdtype(jnp.result_type(layer), jnp.integer), "layer", layer, rule)
        if isinstance(layer, int | np.integer):
            require(0 <= layer < layers, "layer", int(layer), rule)

    def stacked(self, layer: jax.Array | int | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(key_pages, value_pages, layer) with a layer axis, which the kernels always see: 1 and 0 for a lone layer."""
        self.check_layer(layer)
        if layer is None:
            return self.key_pages[None], self.value_pages[None], jnp.int32(0)
        return self.key_pages, self.value_pages, jnp.asarray(layer, jnp.int32)

    def with_pools(self, key_pages: jax.Array, value_pages: jax.Array) -> PagedKVCache:
        """The cache with new contents, given as `stacked` gave them."""
        if self.spec.num_layers is None:
            key_pages, value_pages = key_pages[0], value_pages[0]
        return dataclasses.replace(self, key_pages=key_pages, value_pages=value_pages)
