"""`check_block_tables`: finds page ids outside the pool or on the wrong shard, for which the ops do not look."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.sharding import AbstractMesh, Mesh

from paged_dist._errors import bad_value, require
from paged_dist.cache import PagedKVCache
from paged_dist.mesh import MeshAxes
from paged_dist.ops.arguments import as_arrays, as_optional_arrays, check_batch
from paged_dist.ops.page_owners import PageOwners

_OUTSIDE = "must be a page id in [0, {pages}), for the row has {tokens} tokens"
_ELSEWHERE = "must be on data shard {data} and context shard {context}, which own ids [{first}, {end})"


def check_block_tables(
    block_tables: jax.Array,
    lengths: jax.Array,
    cache: PagedKVCache,
    *,
    starts: jax.Array | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    axes: MeshAxes = MeshAxes(),
) -> None:
    """Checks that every page of every row is in the pool, and on the shard that its place in the row asks for.

    The ops do not look. With a wrong id attention reads some other page of the pool, so that numbers are wrong, and a
    write is dropped; nothing outside the pool is touched. Where numbers are wrong, call this before a step. Outside of
    a jit it raises. Inside of one it is a `checkify.check`, and what is jitted has to be transformed:

        step = jax.jit(checkify.checkify(step))
        error, out = step(...)
        error.throw()

    (On a mesh with Explicit axes jax's checkify takes no shard_map, and so no op: check beside the step there.)

    Args:
      block_tables: [B, pages_per_sequence] int32 global page ids. Entries past a row's last page, or before the page
        of its start, may hold anything, but for column 0 with several context shards.
      lengths: [B] int32 live tokens.
      cache: whose pages they are.
      starts: [B] int32, first token attended to; None: 0.
      mesh: None: the cache's, else the one in scope.
      axes: as in `sharded_paged_attention`.

    Raises:
      ValueError: the first wrong entry, by row and column, with the ids that would be right; shapes or dtypes that
        disagree. Under checkify the error of `error.throw()` says the same.

    Example:
      >>> mesh, spec = pd.make_pod_mesh(model=8), pd.CacheSpec(num_kv_heads=8, head_dim=128, num_pages=16)
      >>> cache = pd.PagedKVCache.create(spec, mesh)
      >>> pages = pd.PageAllocator(spec, mesh, num_sequences=1, pages_per_sequence=2)
      >>> pages.allocate(0, num_tokens=200)
      0
      >>> pd.check_block_tables(pages.block_tables, pages.lengths, cache)
      >>> pd.check_block_tables([[0, 99]], pages.lengths, cache)
      Traceback (most recent call last):
          ...
      paged_dist._errors.BadValue: block_tables[0, 1]=99: must be a page id in [0, 16), for the row has 200 tokens
    """
    block_tables, lengths = as_arrays(block_tables, lengths)
    (starts,) = as_optional_arrays(starts)
    require(block_tables.ndim == 2, "block_tables.shape", block_tables.shape, "must be [B, pages_per_sequence]")
    batch, columns = block_tables.shape
    for name, array, shape in (("lengths", lengths, (batch,)), ("starts", starts, (batch,))):
        require(
            array is None or array.shape == shape, f"{name}.shape", getattr(array, "shape", None), f"must be {shape}"
        )
    for name, array in (("block_tables", block_tables), ("lengths", lengths), ("starts", starts)):
        integer = array is None or jnp.issubdtype(array.dtype, jnp.integer)
        require(integer, f"{name}.dtype", str(getattr(array, "dtype", None)), "must be int32")
    mesh = mesh if mesh is not None else cache.mesh if cache.mesh is not None else jax.sharding.get_abstract_mesh()
    axes.check(mesh.axis_names)
    check_batch(batch, mesh, axes, "block_tables.shape[0]")
    owners = PageOwners.of(cache.spec, mesh, axes)
    pages, page_size = cache.spec.num_pages, cache.spec.page_size

    row, column = (jax.lax.broadcasted_iota(jnp.int32, (batch, columns), axis) for axis in (0, 1))
    live = column * page_size < lengths[:, None]
    if starts is not None:
        live &= (column + 1) * page_size > starts[:, None]
    outside = (block_tables < 0) | (block_tables >= pages)
    first_page = jnp.clip(block_tables[:, :1], 0, pages - 1)
    shard = owners.of_column(column, row, first_page, batch)  # that must own each entry's page
    elsewhere = ~outside & (owners.of_page(block_tables) != shard)

    _check_no_entry(live & outside, _OUTSIDE, block_tables, pages=pages, tokens=lengths[:, None])
    own = owners.pages_per_shard
    more = dict(data=shard // owners.context, context=shard % owners.context, first=shard * own, end=(shard + 1) * own)
    _check_no_entry(live & elsewhere, _ELSEWHERE, block_tables, **more)


def _check_no_entry(wrong: jax.Array, rule: str, block_tables: jax.Array, **values) -> None:
    """Raises ValueError, or adds a checkify check, for the first entry that `wrong` [B, S] marks.

    The error reads `rule`, filled with that entry of each of `values`.
    """
    batch, columns = wrong.shape
    place = jax.lax.broadcasted_iota(jnp.int32, wrong.shape, 0) * columns
    place += jax.lax.broadcasted_iota(jnp.int32, wrong.shape, 1)
    first = jnp.min(jnp.where(wrong, place, batch * columns))
    there = lambda x: jnp.sum(jnp.where(place == first, x, 0))  # no gather: may be sharded
    values = {name: there(x) for name, x in values.items()} | dict(row=first // columns, column=first % columns)
    page, message = there(block_tables), "block_tables[{row}, {column}]"
    if isinstance(wrong, jax.core.Tracer):
        checkify.check(first == batch * columns, message + "={page}: " + rule, debug=False, page=page, **values)
    elif wrong.any():
        raise bad_value(message.format(**values), int(page), rule.format(**values))
