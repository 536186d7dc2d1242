"""Wrong page ids: no op reads or writes outside the pool, and a check on request names the entry."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from one_chip_cases import OneChipCase, poisoned_arrays
from pod_cases import PodCase
from simulated import RACES, assert_no_races

import paged_dist as pd
from paged_dist.kernels import BlockSizes, paged_decode_attention

POD = PodCase((33, 0, 20, 64), data=2, context=2, model=2, kv_heads=2, group=4)
WRONG = {
    "beyond": ((2, 1), 999, "block_tables[2, 1]=999: must be a page id in [0, 32), for the row has 20 tokens"),
    "negative": ((3, 2), -5, "block_tables[3, 2]=-5: must be a page id in [0, 32), for the row has 64 tokens"),
    "other_context_shard": (
        (0, 1),
        0,
        "block_tables[0, 1]=0: must be on data shard 0 and context shard 1, which own ids [8, 16)",
    ),
    "other_data_shard": (
        (3, 0),
        1,
        "block_tables[3, 0]=1: must be on data shard 1 and context shard 0, which own ids [16, 24)",
    ),
}


def arguments(kind, at=None, page=None):
    mesh = POD.mesh(kind)
    _, lengths, tables = POD.arguments
    if at is not None:
        tables[at] = page
    put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    return put(tables), put(lengths), POD.cache(mesh)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_right_table_passes_and_each_wrong_entry_is_named(kind):
    pd.check_block_tables(*arguments(kind))
    checked = jax.jit(checkify.checkify(pd.check_block_tables))
    checked(*arguments(kind))[0].throw()
    for at, page, message in WRONG.values():
        given = arguments(kind, at, page)
        with pytest.raises(ValueError, match=re.escape(message)):
            pd.check_block_tables(*given)
        with pytest.raises(checkify.JaxRuntimeError, match=re.escape(message)):
            checked(*given)[0].throw()


def test_a_whole_step_can_be_checked():
    query, *_ = POD.arguments

    @jax.jit
    @checkify.checkify
    def step(tables, lengths, cache):
        pd.check_block_tables(tables, lengths, cache)
        return pd.sharded_paged_attention(query, cache, lengths, tables)

    step(*arguments(AxisType.Auto))[0].throw()
    at, page, message = WRONG["beyond"]
    with pytest.raises(checkify.JaxRuntimeError, match=re.escape(message)):
        step(*arguments(AxisType.Auto, at, page))[0].throw()


def test_entries_before_a_start_may_hold_anything():
    tables, lengths, cache = arguments(AxisType.Auto, (3, 2), -1)
    pd.check_block_tables(tables, lengths, cache, starts=jnp.array([0, 0, 0, 24], jnp.int32))
    with pytest.raises(ValueError, match=r"block_tables\[3, 2\]=-1"):
        pd.check_block_tables(tables, lengths, cache, starts=jnp.array([0, 0, 0, 23], jnp.int32))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(block_tables=jnp.zeros(4, jnp.int32)), r"block_tables\.shape=\(4,\)"),
        (dict(lengths=jnp.zeros(3, jnp.int32)), r"lengths\.shape=\(3,\): must be \(4,\)"),
        (dict(starts=jnp.zeros(4)), r"starts\.dtype='float32': must be int32"),
        (dict(axes=pd.MeshAxes(data="rows")), r"axes\.data='rows'"),
    ],
    ids=["table", "lengths", "starts", "axes"],
)
def test_bad_arguments_are_named(changes, names):
    tables, lengths, cache = arguments(AxisType.Auto)
    given = dict(block_tables=tables, lengths=lengths, cache=cache) | changes
    with pytest.raises(ValueError, match=names):
        pd.check_block_tables(**given)


SMALL = BlockSizes(pages_per_cell=2, cells_per_step=2, steps_ahead=2)


@pytest.mark.parametrize("interpret", [pytest.param(RACES, id="kernel"), pytest.param(None, id="xla")])
def test_live_ids_and_a_layer_outside_the_pool_read_inside_it(interpret):
    """Pages of 8, on one chip; the simulation raises where a copy leaves an array."""
    (query, k, v, lengths, tables), _ = poisoned_arrays(OneChipCase("wrong", lengths=(32, 9, 20)))
    k, v = (jnp.nan_to_num(x, nan=1.0)[None].repeat(2, axis=0) for x in (k, v))
    right = np.clip(tables, 0, k.shape[2] - 1)
    right[1, 1] = 0
    wrong = right.copy()
    wrong[[0, 2], [1, 0]] = (2**31 - 1, -(2**31))
    attend = lambda tables, layer: np.asarray(
        paged_decode_attention(query, k, v, lengths, tables, layer=layer, block_sizes=SMALL, interpret=interpret)
    )
    made = attend(wrong, jnp.int32(7))
    assert np.isfinite(made).all()
    np.testing.assert_allclose(made[1], attend(right, 1)[1], atol=1e-6)
    if interpret is RACES:
        assert_no_races()


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize("implementation", [None, RACES], ids=["xla", "kernel"])
def test_writes_to_no_page_or_layer_of_the_pool_change_nothing(implementation):
    spec = pd.CacheSpec(1, 128, 4, 8, "float32", num_layers=2)
    mesh = pd.make_pod_mesh(devices=jax.devices()[:1])
    new, positions = jnp.ones((2, 1, 128)), jnp.array([3, 9], jnp.int32)
    tables = jnp.array([[1, -1], [0, 2]], jnp.int32)
    append = lambda layer, tables: pd.append_kv(
        pd.PagedKVCache.create(spec, mesh), new, new, positions, tables, layer=layer, implementation=implementation
    )
    for layer in (-1, 2):
        assert not np.asarray(append(jnp.int32(layer), tables).key_pages).any()
    made = append(jnp.int32(1), tables.at[0, 0].set(7)).to_pages()[0]
    assert np.asarray(made).sum() == 128 and np.asarray(made)[1, 0, 2, 1].all()
