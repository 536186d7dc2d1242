"""`PagedKVCache`: a model's pools of key pages and value pages, sharded over a mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from paged_dist._compat import reshape_minor
from paged_dist._errors import is_whole_number, require
from paged_dist.cache.head_padding import cut_heads, pad_heads
from paged_dist.cache.spec import CacheSpec
from paged_dist.kernels.dispatch import as_kernel_dtype, as_stored_dtype, bits_dtype
from paged_dist.kernels.scale_layout import check_scales, pack_scales, unpack_scales
from paged_dist.kernels.tiling import LANES
from paged_dist.mesh import MeshAxes


def stored_dtype(spec: CacheSpec, mesh: Mesh | AbstractMesh | None) -> jnp.dtype:
    """The dtype of a cache's pools on `mesh`: the spec's, but the bits of bf16 and fp8 on CPU devices."""
    on_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    return bits_dtype(spec.dtype) if on_cpu else jnp.dtype(spec.dtype)


_ARRAY_FIELDS = ("key_pages", "value_pages", "key_scales", "value_scales", "key_smoothing")


@functools.partial(jax.tree_util.register_dataclass, data_fields=list(_ARRAY_FIELDS), meta_fields=["spec", "mesh"])
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """The key and value pools of a model, sharded over a mesh: a pytree of two arrays, or of four with scales.

    How a page of one head [P, D] is stored:

        head_dim 128, 256, ...    [P, D]
        head_dim 64               [P/2, 128], two tokens a row
        others                    the next larger of these, with zeros behind the D elements: 96 as [P, 128]
        scales [P]                128 to a row; `pack_scales` has the order

    So a stored row is a multiple of 128 wide: XLA pads nothing, and a kernel's DMA takes the pool as it lies. On CPU,
    bf16 and fp8 are stored as their bits, uint16 and uint8. XLA's CPU back end (bf16 in jax 0.10, fp8 in 0.12 too)
    would otherwise widen a whole pool to f32 or f16 and back for every write into it.

    Attributes:
      key_pages, value_pages: [Hkv, N, rows, lanes] or [L, Hkv, N, rows, lanes], `spec.dtype` (its
        bits on CPU); inside a `shard_map`, this shard's part of them. `to_pages` gives them as pages.
      spec: the CacheSpec of the whole cache.
      mesh: where the cache was made; the ops run on it unless told otherwise. May be None.
      key_scales, value_scales: [Hkv, N * P / 128, 128] or [L, Hkv, N * P / 128, 128] f32; None unless
        `spec.is_quantized`.
      key_smoothing: [Hkv, D] or [L, Hkv, D] f32: keys are divided by it before they are quantised, queries
        multiplied by it, which changes no logit (see `calibrate_key_smoothing`). May be None, as without 8-bit pages.

    Example:
      >>> mesh = pd.make_pod_mesh(num_kv_heads=2, model_parallelism=4)
      >>> cache = pd.PagedKVCache.create(pd.CacheSpec(num_kv_heads=2, head_dim=64, num_pages=16), mesh)
      >>> cache.key_pages.shape  # as stored, two tokens a row
      (2, 16, 64, 128)
      >>> key_pages, value_pages = cache.to_pages()
      >>> key_pages.shape  # as the kernels take pages, [Hkv, N, P, D]
      (2, 16, 128, 64)
      >>> pd.PagedKVCache.from_pages(key_pages, value_pages, mesh=mesh).spec == cache.spec
      True
    """

    key_pages: jax.Array
    value_pages: jax.Array
    spec: CacheSpec
    mesh: Mesh | AbstractMesh | None = None
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None
    key_smoothing: jax.Array | None = None

    @classmethod
    def create(
        cls, spec: CacheSpec, mesh: Mesh, *, key_smoothing: jax.Array | None = None, axes: MeshAxes = MeshAxes()
    ) -> PagedKVCache:
        """An empty cache (zeros), allocated shard by shard on the devices of `mesh`; no host copy is made.

        Args:
          spec, mesh, axes: what it holds, and where.
          key_smoothing: [Hkv, D] or [L, Hkv, D], finite and positive, for int8 and fp8; stored as f32. The cache
            gets a copy of it.

        Raises:
          ValueError: heads or pages that do not divide over `mesh`; a smoothing outside its rule.
        """
        spec.check_mesh(mesh, axes)
        if spec.page_size < 64:
            warnings.warn(
                f"CacheSpec(page_size={spec.page_size}): below 64 tokens a page the DMA engine, not HBM, sets "
                "the pace on TPU; 128 is the default",
                stacklevel=2,
            )
        elif spec.is_quantized and spec.page_size < LANES:
            warnings.warn(
                f"CacheSpec(page_size={spec.page_size}, dtype={spec.dtype!r}): below {LANES} tokens 8-bit pages share "
                "rows of scales, and with one kv head a chip save no time on TPU; 128 is the default",
                stacklevel=2,
            )
        key_smoothing = _own_key_smoothing(spec, key_smoothing)
        arrays = _stored_arrays(spec, mesh, axes, key_smoothing is not None)
        smoothing = arrays.pop("key_smoothing", None)
        zeros = lambda: cls(spec=spec, mesh=mesh, **{name: jnp.zeros(a.shape, a.dtype) for name, a in arrays.items()})
        cache = jax.jit(zeros, out_shardings=cls.shardings(spec, mesh, axes=axes))()
        if smoothing is None:
            return cache
        return dataclasses.replace(cache, key_smoothing=jax.device_put(key_smoothing, smoothing.sharding))

    @classmethod
    def shardings(
        cls, spec: CacheSpec, mesh: Mesh, *, key_smoothing: bool = False, axes: MeshAxes = MeshAxes()
    ) -> PagedKVCache:
        """The same pytree with a NamedSharding for each array, e.g. for `jax.jit(..., out_shardings=...)`.

        `key_smoothing` says whether the cache has one.
        """
        return jax.tree.map(lambda a: a.sharding, cls.abstract(spec, mesh, key_smoothing=key_smoothing, axes=axes))

    @classmethod
    def abstract(
        cls, spec: CacheSpec, mesh: Mesh, *, key_smoothing: bool = False, axes: MeshAxes = MeshAxes()
    ) -> PagedKVCache:
        """The same pytree with a ShapeDtypeStruct for each array: to compile ahead of time, also for absent chips.

        `key_smoothing` says whether the cache has one.
        """
        spec.check_mesh(mesh, axes)
        shapes: dict[str, Any] = {**_stored_arrays(spec, mesh, axes, key_smoothing)}  # where arrays would be
        return cls(spec=spec, mesh=mesh, **shapes)

    def partition_specs(self, axes: MeshAxes = MeshAxes()) -> PagedKVCache:
        """The same pytree with a PartitionSpec for each array: the in_specs and out_specs of a caller's `shard_map`."""
        specs = _partition_specs(self.spec, axes)
        return dataclasses.replace(self, **{k: p for k, p in specs.items() if getattr(self, k) is not None})

    @classmethod
    def from_pages(
        cls,
        key_pages: jax.Array,
        value_pages: jax.Array,
        key_scales: jax.Array | None = None,
        value_scales: jax.Array | None = None,
        *,
        key_smoothing: jax.Array | None = None,
        mesh: Mesh | None = None,
        axes: MeshAxes = MeshAxes(),
    ) -> PagedKVCache:
        """A cache from pages in the kernels' layout: `from_pages(*cache.to_pages())` holds what `cache` did.

        Args:
          key_pages, value_pages: [Hkv, N, P, D] or [L, Hkv, N, P, D], bf16, f32, int8 or float8_e4m3fn. D is the
            model's: pages padded beforehand would make `spec.head_dim`, and so 1 / sqrt(D), that of the padding.
          key_scales, value_scales: [Hkv, N, P] or [L, Hkv, N, P] f32, of int8 and fp8 pages; see `quantize_kv`.
          key_smoothing: what the keys were divided by, as in `create`.
          mesh: where to put them, sharded; None leaves them where they are, and takes over the mesh of their
            NamedSharding if they have one. Pages and scales in place already, and at their stored size, are not
            copied: an eager write then takes the caller's arrays over too.

        Raises:
          ValueError: arrays that disagree, or a shape or dtype that CacheSpec refuses; 8-bit pages without scales,
            others with; a smoothing outside its rule.
        """
        shape = key_pages.shape
        require(key_pages.ndim in (4, 5), "key_pages.shape", shape, "must be [Hkv, N, P, D] or [L, Hkv, N, P, D]")
        for field in ("shape", "dtype"):
            key, value = getattr(key_pages, field), getattr(value_pages, field)
            require(value == key, f"value_pages.{field}", value, f"must equal key_pages.{field} {key}")
        *layers, heads, pages, page_size, head_dim = shape
        spec = CacheSpec(heads, head_dim, pages, page_size, str(key_pages.dtype), *layers)
        arrays = dict(key_pages=key_pages, value_pages=value_pages)
        if spec.is_quantized:
            check_scales(key_scales, value_scales, shape[:-1])
            arrays |= dict(key_scales=key_scales, value_scales=value_scales)
        for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
            rule = f"must be None with {spec.dtype} pages"
            require(scales is None or spec.is_quantized, name, getattr(scales, "shape", scales), rule)
        key_smoothing = _own_key_smoothing(spec, key_smoothing)

        pack = lambda x: pack_scales(x, spec.tokens_per_row)
        rows = lambda x: reshape_minor(pad_heads(x, spec), spec.pool_shape)
        store = lambda name, x: pack(x) if name.endswith("scales") else rows(x)
        arrays = {name: store(name, x) for name, x in arrays.items()}
        if key_smoothing is not None:
            arrays["key_smoothing"] = key_smoothing
        if mesh is not None:
            put = cls.shardings(spec, mesh, key_smoothing=key_smoothing is not None, axes=axes)
            arrays = jax.device_put(arrays, {name: getattr(put, name) for name in arrays})
        where = mesh if mesh is not None else _mesh_of_array(key_pages)
        dtype = stored_dtype(spec, where)
        arrays["key_pages"], arrays["value_pages"] = as_stored_dtype(dtype, arrays["key_pages"], arrays["value_pages"])
        return cls(spec=spec, mesh=where, **arrays)

    def to_pages(self) -> tuple[jax.Array, ...]:
        """(key_pages, value_pages) in the kernels' layout [Hkv, N, P, D] or [L, Hkv, N, P, D].

        Of 8-bit pages (key_pages, value_pages, key_scales, value_scales), scales [Hkv, N, P] or [L, Hkv, N, P]. Keys
        are as stored: divided by `key_smoothing`, if any.

        Pages are no copy on TPU at head_dim 128 and its multiples. Inside a `shard_map`, this shard's heads and pages.
        """
        spec = self.spec
        pages = lambda x: cut_heads(reshape_minor(x, (*x.shape[:-2], spec.page_size, spec.stored_head_dim)), spec)
        made = tuple(map(pages, as_kernel_dtype(self.key_pages, self.value_pages)))
        if not self.spec.is_quantized:
            return made
        unpack = lambda x: unpack_scales(x, self.spec.page_size, self.spec.tokens_per_row)
        return *made, unpack(self.key_scales), unpack(self.value_scales)

    def check_part(self, mesh: Mesh | AbstractMesh, axes: MeshAxes) -> None:
        """Raises ValueError where an array is not what a shard of `mesh` holds of the cache split over `axes`."""
        mesh = AbstractMesh(mesh.axis_sizes, mesh.axis_names)  # of a partly manual one jax knows no shard's shape
        for name, whole in _stored_arrays(self.spec, mesh, axes, self.key_smoothing is not None).items():
            shape, part = getattr(self, name).shape, whole.sharding.shard_shape(whole.shape)
            require(
                shape == part,
                f"cache.{name}.shape",
                shape,
                f"must be {part} here, of {whole.shape} in all",
                "pass the cache through the shard_map with cache.partition_specs(axes)",
            )

    def check_layer(self, layer: jax.Array | int | None) -> None:
        """Raises ValueError where `layer` is missing for a stacked cache, given for a lone one, or out of range."""
        layers = self.spec.num_layers
        if layers is None:
            require(
                layer is None, "layer", layer, "must be None: the cache has no layer axis", "CacheSpec(num_layers=...)"
            )
            return
        rule = f"must be an int32 scalar in [0, {layers}): the cache stacks {layers} layers"
        is_scalar = layer is not None and jnp.ndim(layer) == 0
        require(is_scalar and jnp.issubdtype(jnp.result_type(layer), jnp.integer), "layer", layer, rule)
        if is_whole_number(layer):
            require(0 <= layer < layers, "layer", operator.index(layer), rule)

    def stacked(self, layer: jax.Array | int | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(key_pages, value_pages, layer) as the kernels take them: pools [L, ...]. A cache of one layer has L = 1."""
        self.check_layer(layer)
        layer = jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32)
        return *self.stacked_pages(), layer

    def stacked_pages(self) -> tuple[jax.Array, jax.Array]:
        """(key_pages, value_pages) with a layer axis."""
        if self.spec.num_layers is None:
            return self.key_pages[None], self.value_pages[None]
        return self.key_pages, self.value_pages

    def stacked_scales(self) -> dict[str, jax.Array]:
        """key_scales and value_scales with a layer axis, by name, as the kernels take them; empty without scales."""
        if not self.spec.is_quantized:
            return {}
        lead = (lambda x: x[None]) if self.spec.num_layers is None else (lambda x: x)
        return dict(key_scales=lead(self.key_scales), value_scales=lead(self.value_scales))

    def layer_smoothing(self, layer: jax.Array | int | None) -> jax.Array | None:
        """`key_smoothing` [Hkv, D] of one layer, or None."""
        return self.key_smoothing if self.key_smoothing is None or layer is None else self.key_smoothing[layer]

    def without_smoothing(self) -> PagedKVCache:
        """The pools and scales alone: what the ops write."""
        return dataclasses.replace(self, key_smoothing=None)

    def with_smoothing(self, key_smoothing: jax.Array | None) -> PagedKVCache:
        """The cache with this `key_smoothing`, not copied."""
        return dataclasses.replace(self, key_smoothing=key_smoothing)

    def with_pools(self, *arrays: jax.Array) -> PagedKVCache:
        """The cache with new contents: two pools, and two arrays of scales if it has them, each with a layer axis."""
        if self.spec.num_layers is None:
            arrays = tuple(x[0] for x in arrays)
        return dataclasses.replace(self, **dict(zip(_ARRAY_FIELDS, arrays, strict=False)))


def _mesh_of_array(array: jax.Array) -> Mesh | AbstractMesh | None:
    """The mesh of an array's NamedSharding; None for another sharding, or where the array is traced."""
    sharding = None if isinstance(array, jax.core.Tracer) else getattr(array, "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _partition_specs(spec: CacheSpec, axes: MeshAxes) -> dict[str, PartitionSpec]:
    """How each array that a cache may have is split, by its field's name."""
    pools, scales = spec.partition_spec(axes), spec.scales_partition_spec(axes)
    return dict(
        zip(_ARRAY_FIELDS, (pools, pools, scales, scales, spec.key_smoothing_partition_spec(axes)), strict=True)
    )


def _stored_arrays(
    spec: CacheSpec, mesh: Mesh | AbstractMesh, axes: MeshAxes, key_smoothing: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the arrays that a cache of `spec` has on `mesh`, by their fields' names."""
    pools, f32 = (spec.pool_shape, stored_dtype(spec, mesh)), jnp.dtype("float32")
    shapes = dict(key_pages=pools, value_pages=pools)
    if spec.is_quantized:
        shapes |= dict(key_scales=(spec.scales_shape, f32), value_scales=(spec.scales_shape, f32))
    if key_smoothing:
        _require_no_smoothing_unless_quantized(spec, key_smoothing)
        shapes["key_smoothing"] = (spec.key_smoothing_shape, f32)
    split = {name: NamedSharding(mesh, p) for name, p in _partition_specs(spec, axes).items()}
    return {name: jax.ShapeDtypeStruct(*shape, sharding=split[name]) for name, shape in shapes.items()}


def _require_no_smoothing_unless_quantized(spec: CacheSpec, key_smoothing: bool | tuple[int, ...]) -> None:
    """Raises ValueError for a cache without scales; `key_smoothing` is what the error shows of the smoothing."""
    require(spec.is_quantized, "key_smoothing", key_smoothing, f"must be None in a cache of {spec.dtype}")


def _own_key_smoothing(spec: CacheSpec, key_smoothing: ArrayLike | None) -> jax.Array | None:
    """A copy of `key_smoothing` as f32: a cache that owns it can be donated without donating the caller's array.

    Raises ValueError for another shape, a cache without scales, or values out of range.
    """
    if key_smoothing is None:
        return None
    shape = spec.key_smoothing_shape
    _require_no_smoothing_unless_quantized(spec, jnp.shape(key_smoothing))
    letters = "(Hkv, D)" if spec.num_layers is None else "(L, Hkv, D)"
    works = f"calibrate_key_smoothing(sample, num_layers={spec.num_layers}) gives that"
    given = jnp.shape(key_smoothing)
    require(given == shape, "key_smoothing.shape", given, f"must be {shape}, {letters}", works)
    key_smoothing = jnp.array(key_smoothing, jnp.float32, copy=True)
    if not isinstance(key_smoothing, jax.core.Tracer):
        for part in key_smoothing.addressable_shards:
            least, most = float(jnp.min(part.data)), float(jnp.max(part.data))
            in_range = least > 0 and most < math.inf  # NaN is neither
            require(in_range, "key_smoothing", (least, most), "its least and largest must be finite and positive")
    return key_smoothing
