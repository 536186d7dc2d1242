"""The ops inside a caller's `shard_map`: over their axes (the _local forms), or over others, as a pipeline's stages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pod_cases import PodCase

import paged_dist as pd

pytestmark = pytest.mark.filterwarnings("ignore:.*page_size=")
SCALE = 128**-0.5
SHAPE = dict(lengths=(33, 1, 20, 64), data=2, context=2, model=2, kv_heads=2, group=4)
COPIES = jnp.zeros((1, 2), jnp.int32)

# Of each _local form, what it is called with beside the cache: as many heads as a shard of SHAPE has.
LOCAL = {
    "attend": lambda c, h, n, t, **o: pd.paged_attention_local(jnp.repeat(h, 4, axis=1), c, n, t, **o),
    "append": lambda c, h, n, t, **o: pd.append_kv_local(c, h, h, n, t, **o).key_pages,
    "prefill": lambda c, h, n, t, **o: pd.write_prefill_kv_local(c, h[:, None], h[:, None], n, t, **o).key_pages,
    "copy": lambda c, h, n, t, **o: pd.copy_pages_local(c, COPIES, **o).key_pages,
}


def local_arguments(case, rows=2):
    return jnp.zeros((rows, 1, 128)), jnp.zeros(rows, jnp.int32), jnp.zeros((rows, case.columns), jnp.int32)


@pytest.mark.parametrize("form", LOCAL)
def test_local_forms_outside_a_shard_map_are_refused(form):
    case = PodCase(**SHAPE)
    cache = case.cache(case.mesh())
    with pytest.raises(ValueError, match=r"axes\.data='data': the shard_maps around this call split \(\);.*_local"):
        LOCAL[form](cache, *local_arguments(case))


@pytest.mark.parametrize("form", LOCAL)
def test_local_forms_want_the_part_of_the_cache_that_its_specs_give(form):
    """Replicated pools, or pools not split over context, hold pages under other ids: numbers would be wrong."""
    case = PodCase(**SHAPE)
    mesh = case.mesh()
    cache = case.cache(mesh)
    rest = local_arguments(case)
    for split in (pd.MeshAxes(None, None, None), pd.MeshAxes(context=None), pd.MeshAxes(model=None)):
        run = jax.shard_map(
            lambda c, *rest: LOCAL[form](c, *rest).sum(),
            mesh=mesh,
            in_specs=(cache.partition_specs(split), P(), P(), P()),
            out_specs=P(),
            check_vma=False,
        )
        with pytest.raises(ValueError, match=r"cache\.key_pages\.shape=.*must be .*cache\.partition_specs\(axes\)"):
            run(cache, *rest)


def test_local_forms_name_an_axis_that_the_shard_map_leaves_whole():
    case = PodCase(**SHAPE)
    mesh = case.mesh()
    cache = case.cache(mesh)
    run = jax.shard_map(
        lambda c, *rest: LOCAL["attend"](c, *rest).sum(),
        mesh=mesh,
        in_specs=(cache.partition_specs(pd.MeshAxes(model=None)), P(), P(), P()),
        out_specs=P(),
        axis_names={"data", "context"},
        check_vma=False,
    )
    with pytest.raises(ValueError, match=r"axes\.model='model': the shard_maps around this call split \('data', 'cont"):
        jax.jit(run)(cache, *local_arguments(case))


def test_local_forms_over_no_axis_need_no_shard_map():
    case = PodCase(lengths=(5, 17), context=1)
    cache = pd.PagedKVCache.from_pages(*(jnp.asarray(case.arrays[k]) for k in ("key", "value")))
    query, lengths, tables = case.arguments
    whole = pd.MeshAxes(None, None, None)
    case.check(pd.paged_attention_local(query, cache, lengths, tables, sm_scale=SCALE, axes=whole), sm_scale=SCALE)


def staged(case, kind=AxisType.Auto) -> Mesh:
    shape = (case.data, case.context, case.model)
    devices = np.array(jax.devices()[: 2 * np.prod(shape)]).reshape(2, *shape)
    return Mesh(devices, ("stage", "data", "context", "model"), axis_types=(kind,) * 4)


def append_and_attend(cache, query, key, value, lengths, tables):
    cache = pd.append_kv(cache, key, value, lengths - 1, tables)
    return pd.sharded_paged_attention(query, cache, lengths, tables, sm_scale=SCALE), cache


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("shape", [dict(data=1), dict(context=1)], ids=["context", "data"])
def test_sharded_ops_inside_a_shard_map_over_another_axis(shape, kind):
    """Each stage appends and attends to its own sequences' tokens, of its own cache."""
    case = PodCase(**(SHAPE | shape))
    mesh = staged(case, kind)
    pools = [jnp.asarray(case.arrays[k]) for k in ("key", "value")]
    cache = pd.PagedKVCache.from_pages(*pools, mesh=mesh)
    query, lengths, tables = case.arguments
    new = np.random.default_rng(0).standard_normal((2, 2, 4, 2, 128)).astype(np.float32)  # stage, K or V
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("stage")))

    def stage(cache, query, new, lengths, tables):
        output, cache = append_and_attend(cache, query[0], new[0, 0], new[0, 1], lengths, tables)
        return output[None], cache.to_pages()[0][None]

    whole = jax.tree.map(lambda _: P(), cache)
    run = jax.shard_map(
        stage,
        mesh=mesh,
        in_specs=(whole, P("stage"), P("stage"), P(), P()),
        out_specs=(P("stage"), P("stage")),
        axis_names={"stage"},
    )
    outputs, _ = map(np.asarray, jax.jit(run)(cache, put(jnp.stack([query, query])), put(new), lengths, tables))
    for s in range(2):
        own = PodCase(**(SHAPE | shape))
        for pool, tokens in zip(("key", "value"), new[s], strict=True):
            for b, length in enumerate(case.lengths):
                page = own.arrays["block_tables"][b, (length - 1) // 8]
                own.arrays[pool][:, page, (length - 1) % 8] = tokens[b]
        own.check(outputs[s], sm_scale=SCALE)


def test_a_shard_map_of_another_mesh_or_over_the_ops_axes_is_refused():
    case = PodCase(**(SHAPE | dict(data=1)))
    mesh, other = staged(case), case.mesh()
    query, lengths, tables = case.arguments

    def call(cache, split, **op):
        attend = lambda q, c, n, t: pd.sharded_paged_attention(q, c, n, t, **op).sum()
        specs = (P(), jax.tree.map(lambda _: P(), cache), P(), P())
        run = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=P(), axis_names=split, check_vma=False)
        jax.jit(run)(query, cache, lengths, tables)

    with pytest.raises(ValueError, match=r"mesh=\{'data': 1, 'context': 2, 'model': 2\}: differs .*'stage': 2"):
        call(jax.tree.map(np.asarray, case.cache(other)), {"stage"})
    with pytest.raises(ValueError, match=r"mesh=.*split by a shard_map already.*_local form"):
        call(case.cache(mesh), {"stage", "model"})
    with pytest.raises(ValueError, match=r"mesh=.*split by a shard_map already.*_local form"):
        call(case.cache(mesh), set(mesh.axis_names))
