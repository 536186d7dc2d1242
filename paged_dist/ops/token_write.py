"""New tokens' keys and values into this shard's pages: what `append_kv` and `write_prefill_kv` share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paged_dist._errors import require
from paged_dist.cache import PagedKVCache
from paged_dist.cache.head_padding import pad_heads
from paged_dist.kernels.cache_update import write_kv_pages
from paged_dist.mesh import MeshAxes
from paged_dist.ops.arguments import Implementation, interpret_of
from paged_dist.ops.in_shard_map import local_pages


def write_tokens_local(
    cache: PagedKVCache,
    key: jax.Array,
    value: jax.Array,
    starts: jax.Array,
    ends: jax.Array,
    block_tables: jax.Array,
    layer: jax.Array | int | None,
    axes: MeshAxes,
    implementation: Implementation,
) -> PagedKVCache:
    """Inside a `shard_map`: the cache with key[r, t] and value[r, t] as token starts[r] + t of row r, below ends[r].

    Args:
      cache: this shard's pools.
      key, value: [R, T, Hkv, D], this shard's heads.
      starts, ends: [R] int32; a negative start writes nothing.
      block_tables: [R, S] int32 global page ids; this shard writes into those that it owns.
    """
    smoothing = cache.layer_smoothing(layer)
    key, value = (pad_heads(x, cache.spec) for x in (key, value))
    if smoothing is not None:
        smoothing = pad_heads(smoothing, cache.spec, fill=1)
    key_pages, value_pages, layer = cache.stacked(layer)
    tables, stripes = local_pages(block_tables, key_pages.shape[2], axes)
    written = write_kv_pages(
        key_pages,
        value_pages,
        key,
        value,
        starts,
        ends,
        tables,
        layer,
        **cache.stacked_scales(),
        key_smoothing=smoothing,
        stripes=stripes,
        interpret=interpret_of(implementation),
    )
    return cache.with_pools(*written)


def check_new_tokens(cache: PagedKVCache, key: jax.Array, value: jax.Array, implementation: Implementation) -> None:
    """Raises ValueError where key and value differ in shape, do not fit the cache's heads, or are of no float dtype."""
    spec, kv_heads = cache.spec, cache.key_pages.shape[-4]
    interpret_of(implementation)
    require(value.shape == key.shape, "value.shape", value.shape, f"must equal key.shape {key.shape}")
    require(
        key.shape[-2:] == (kv_heads, spec.head_dim),
        "key.shape",
        key.shape,
        f"its last axes must be the cache's (Hkv, D) = ({kv_heads}, {spec.head_dim})",
    )
    for name, array in (("key", key), ("value", value)):
        require(jnp.issubdtype(array.dtype, jnp.floating), f"{name}.dtype", str(array.dtype), "must be a float dtype")
