"""The context axis: one sequence's pages over several shards, merged into the attention over all of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pod_cases import PodCase, lay_tables
from pod_meshes import simulated_pod
from simulated import RACES, assert_no_races

import paged_dist as pd

SCALE = 128**-0.5
SINKS = np.array([-3.0, 0.5, -np.inf, 2.0, 1.0, 0.0, -1.0, 4.0], np.float32)
XLA_OR_SIMULATED = pytest.mark.parametrize(
    "implementation", [None, pytest.param(RACES, marks=pytest.mark.slow)], ids=["xla", "simulated"]
)
FOUR = dict(lengths=(33, 0, 20, 64), data=2, context=2, model=2, kv_heads=2, group=4)


def edges(rng, page_size: int, most: int, count: int) -> list[int]:
    """Lengths from 0 to `most`: on, before and behind page edges, and anywhere."""
    pages = most // page_size
    near = page_size * rng.integers(0, pages, count) + rng.integers(-1, 2, count)
    lengths = np.where(rng.random(count) < 0.7, near, rng.integers(0, most + 1, count))
    return [0, most, *np.clip(lengths, 0, most)[2:]]


often = lambda values, rest: [*values, *(pytest.param(v, marks=pytest.mark.slow) for v in rest)]


WINDOWS = [(2, None), (2, 11), (3, 1), (3, 1000), (4, 11), (8, None), (8, 24)]
WINDOWS += [pytest.param(c, w, marks=pytest.mark.slow) for c, w in ((4, None), (8, 1))]
WINDOWS += [pytest.param(c, w, marks=pytest.mark.slow) for c in (2, 3, 4, 8) for w in (50, 8)]
WINDOWS += [pytest.param(c, w, marks=pytest.mark.slow) for c, w in ((2, 1), (2, 1000), (3, None), (3, 11), (4, 1))]
WINDOWS += [pytest.param(c, w, marks=pytest.mark.slow) for c, w in ((4, 1000), (8, 11), (8, 1000), (1, None), (1, 11))]


@pytest.mark.parametrize(("context", "window"), WINDOWS)
def test_attention_over_context_shards_is_the_oracle(context, window):
    """Every first shard, every page edge, windows from one token to more than there are."""
    rng = np.random.default_rng([context, window or 0])
    case = PodCase(tuple(map(int, edges(rng, 8, 8 * (2 * context + 3), 6 * context))), context=context)
    mesh = case.mesh()
    query, lengths, tables = case.arguments
    output, lse = pd.sharded_paged_attention(
        query, case.cache(mesh), lengths, tables, sm_scale=SCALE, sliding_window=window, return_lse=True
    )
    case.check(output, lse, sm_scale=SCALE, sliding_window=window)


KERNELS = [
    dict(data=2, context=2, model=2, kv_heads=2, group=4, lengths=(3, 0, 33, 64)),
    dict(context=4, kv_heads=1, group=8, head_dim=64, page_size=16, dtype="bfloat16", lengths=(5, 130, 64, 0, 17, 200)),
    dict(context=3, kv_heads=2, page_size=16, dtype="bfloat16", lengths=(16, 47, 48, 100)),
    dict(data=2, context=4, group=8, lengths=(70, 1, 9, 40, 8, 0, 32, 64)),
]


@pytest.mark.parametrize("options", [dict(), dict(sliding_window=19)], ids=["", "window"])
@pytest.mark.parametrize("shape", [KERNELS[0], *(pytest.param(k, marks=pytest.mark.slow) for k in KERNELS[1:])])
def test_the_kernel_on_simulated_context_shards_is_the_oracle(shape, options):
    case = PodCase(**shape)
    query, lengths, tables = case.arguments
    output, lse = pd.sharded_paged_attention(
        query,
        case.cache(case.mesh()),
        lengths,
        tables,
        sm_scale=SCALE,
        return_lse=True,
        implementation=RACES,
        **options,
    )
    case.check(output, lse, sm_scale=SCALE, **options)
    assert_no_races()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("output_heads", ["replicated", "scattered"])
def test_sinks_enter_once_and_heads_come_as_asked(output_heads, kind):
    case = PodCase((0, 33, 7, 64), data=2, context=2, model=2, kv_heads=2, group=4)
    mesh = case.mesh(kind)
    query, lengths, tables = case.arguments
    output, lse = pd.sharded_paged_attention(
        query, case.cache(mesh), lengths, tables, sm_scale=SCALE, sinks=jnp.asarray(SINKS), return_lse=True,
        output_heads=output_heads,
    )  # fmt: skip
    case.check(output, lse, sm_scale=SCALE, sinks=SINKS)
    heads = ("model", "context") if output_heads == "scattered" else "model"
    assert output.sharding.is_equivalent_to(NamedSharding(mesh, P("data", heads, None)), 3)
    assert lse.sharding.is_equivalent_to(NamedSharding(mesh, P("data", heads)), 2)


def test_empty_sequences_give_zero_and_minus_infinity_or_the_sink():
    case = PodCase((0, 0, 0, 0), data=2, context=4, group=4)
    query, lengths, tables = case.arguments
    run = functools.partial(
        pd.sharded_paged_attention, query, case.cache(case.mesh()), lengths, tables, return_lse=True
    )
    for sinks in (None, jnp.asarray(SINKS[:4])):
        output, lse = run(sinks=sinks)
        assert not np.asarray(output).any()
        np.testing.assert_array_equal(lse, np.broadcast_to(-np.inf if sinks is None else sinks, (4, 4)))


@pytest.mark.parametrize(
    ("context", "num_queries", "window"),
    [
        pytest.param(*shape, window, marks=() if window == often else pytest.mark.slow)
        for *shape, often in ((1, 3, 11), (2, 16, None), (3, 4, 11), (8, 2, None), (4, 1, 11))
        for window in (None, 11, 1, 40)
    ],
)
def test_several_new_tokens_attend_each_up_to_itself(context, num_queries, window):
    """Their spans end on page edges, and on shards that hold none of them, and before the sequence's start."""
    rng = np.random.default_rng([context, num_queries])
    lengths = tuple(map(int, edges(rng, 8, 8 * (2 * context + 3), 4 * context)))
    case = PodCase((1, 2, *lengths[2:]), context=context, num_queries=num_queries)
    query, lengths, tables = case.arguments
    output, lse = pd.sharded_paged_attention(
        query, case.cache(case.mesh()), lengths, tables, sm_scale=SCALE, sliding_window=window, return_lse=True
    )
    case.check(output, lse, sm_scale=SCALE, sliding_window=window)


@XLA_OR_SIMULATED
@pytest.mark.parametrize(
    "shape", [dict(), dict(head_dim=64, page_size=16), dict(dtype="bfloat16", page_size=16)], ids=str
)
def test_several_new_tokens_over_all_axes(shape, implementation):
    case = PodCase(**(FOUR | shape), num_queries=5)
    mesh = case.mesh(AxisType.Explicit)
    query, lengths, tables = case.arguments
    for output_heads, heads in (("replicated", "model"), ("scattered", ("model", "context"))):
        output, lse = pd.sharded_paged_attention(
            query, case.cache(mesh), lengths, tables, sm_scale=SCALE, sinks=jnp.asarray(SINKS), return_lse=True,
            output_heads=output_heads, implementation=implementation,
        )  # fmt: skip
        case.check(output, lse, sm_scale=SCALE, sinks=SINKS)
        assert output.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, heads, None)), 4)
        assert lse.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, heads)), 3)
    if implementation is RACES:
        assert_no_races()


@pytest.mark.parametrize("implementation", [None, pytest.param("pallas_interpret", marks=pytest.mark.slow)])
def test_numbers_are_the_same_under_x64(implementation):
    case = PodCase(**FOUR, num_queries=3)
    with jax.enable_x64(True):
        query, lengths, tables = case.arguments
        cache = case.cache(case.mesh())
        output = pd.sharded_paged_attention(
            query, cache, lengths, tables, sm_scale=SCALE, sliding_window=9, implementation=implementation
        )
        case.check(output, sm_scale=SCALE, sliding_window=9)
        new = np.full((4, 3, 2, 128), 2, np.float32)
        cache = pd.append_kv(cache, new, new, lengths - 3, tables, implementation=implementation)
        for tokens in written_tokens(cache, [(case.arrays["block_tables"][3], 64)]):
            np.testing.assert_array_equal(tokens[:, 61:], 2)


def test_heads_that_cannot_be_scattered_are_refused():
    case = PodCase((8, 8), context=3, group=4)
    query, lengths, tables = case.arguments
    run = functools.partial(pd.sharded_paged_attention, query, case.cache(case.mesh()), lengths, tables)
    with pytest.raises(ValueError, match=r"output_heads='scattered'.*4 query heads.*3 context shards.*'replicated'"):
        run(output_heads="scattered")
    with pytest.raises(ValueError, match=r"output_heads='split'.*replicated"):
        run(output_heads="split")


# ------------------------------------------------------------------------------------------------------- writes


def written_tokens(cache, rows) -> list[np.ndarray]:
    """The tokens of `rows`, a list of (row's table, count): [Hkv, count, D] of keys, then of values."""
    pools = [np.asarray(x, np.float32) for x in cache.to_pages()[:2]]
    page_size = cache.spec.page_size
    return [
        pool[:, table[t // page_size], t % page_size]
        for table, count in rows
        for t in [np.arange(count)]
        for pool in pools
    ]


@pytest.mark.filterwarnings("ignore:.*page_size=")
@XLA_OR_SIMULATED
@pytest.mark.parametrize("new_tokens", [1, 5, 40])
@pytest.mark.parametrize("context", often([2, 8], [3, 4]))
def test_tokens_are_written_where_their_pages_lie(context, new_tokens, implementation):
    """Rows that begin anywhere; what was there before and after stays, also in pages that nobody owns."""
    rng = np.random.default_rng([context, new_tokens])
    starts = np.array([0, 7, 8, 13, 8 * context - 1, 8 * context, -1, 30], np.int32)
    lengths = np.where(starts < 0, 0, starts + new_tokens)
    tables, pages = lay_tables(rng, lengths, 8, -(-int(lengths.max()) // 8), 1, context)
    mesh = simulated_pod(1, context, 1)
    before = [rng.standard_normal((2, pages, 8, 128)).astype(np.float32) for _ in "kv"]
    cache = pd.PagedKVCache.from_pages(*map(jnp.asarray, before), mesh=mesh)
    new = [rng.standard_normal((8, new_tokens, 2, 128)).astype(np.float32) for _ in "kv"]
    key, value = (jnp.asarray(x[:, 0] if new_tokens == 1 else x) for x in new)
    cache = pd.append_kv(cache, key, value, jnp.asarray(starts), jnp.asarray(tables), implementation=implementation)
    for old, x in zip(before, new, strict=True):
        for b in range(8):
            for t in range(new_tokens if starts[b] >= 0 else 0):
                old[:, tables[b, (starts[b] + t) // 8], (starts[b] + t) % 8] = x[b, t]
    for pool, expected in zip(cache.to_pages(), before, strict=True):
        np.testing.assert_array_equal(pool, expected)


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize("dtype", often(["int8"], ["bfloat16", "float8_e4m3fn"]))
def test_prompts_in_chunks_and_appends_end_up_as_with_one_context_shard(dtype):
    """A stacked 8-bit cache of 4 context shards, written in pieces, holds what one of 1 does."""
    held = []
    for context in (1, 4):
        rng = np.random.default_rng(0)
        lengths = np.array([70, 33, 16, 0], np.int32)
        tables, pages = lay_tables(rng, lengths + 1, 16, 6, 1, context)
        mesh = simulated_pod(1, context, 2)
        spec = pd.CacheSpec(2, 128, -(-pages // (64 * context)) * 64 * context, 16, dtype, num_layers=2)
        tables = np.where(tables < 0, -1, tables)
        own, per = pages // context, spec.num_pages // context
        tables = np.where(tables >= 0, tables // own * per + tables % own, -1).astype(np.int32)
        cache = pd.PagedKVCache.create(spec, mesh)
        key, value = (
            jnp.asarray(np.random.default_rng(i).standard_normal((4, 72, 2, 128)), jnp.float32) for i in (1, 2)
        )
        n, t = jnp.asarray(lengths), jnp.asarray(tables)
        cache = pd.write_prefill_kv(cache, key[:, :40], value[:, :40], n, t, layer=1)
        rows = jnp.array([1, 0, 3], jnp.int32)
        cache = pd.write_prefill_kv(
            cache, key[rows, 40:], value[rows, 40:], n[rows], t, starts=jnp.full(3, 40, jnp.int32), rows=rows, layer=1
        )
        cache = pd.append_kv(cache, key[:, 71], value[:, 71], n, t, layer=1)
        query = jnp.asarray(np.random.default_rng(3).standard_normal((4, 8, 128)), jnp.float32)
        output = pd.sharded_paged_attention(query, cache, n + 1, t, layer=1, sm_scale=SCALE)
        last = jax.tree.map(lambda x: x[1], cache)
        held.append((written_tokens(last, zip(tables, lengths + 1, strict=True)), np.asarray(output)))
    for one, four in zip(held[0][0], held[1][0], strict=True):
        np.testing.assert_array_equal(one, four)
    np.testing.assert_allclose(held[0][1], held[1][1], rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*page_size=")
def test_the_write_kernel_on_context_shards_fills_8_bit_pages_as_the_xla_form_does():
    rng, page_size, own = np.random.default_rng(0), 32, 32  # own: pages a shard
    positions = jnp.array([30, 0, -1, 61], jnp.int32)  # over an edge; in one page; idle; over an edge
    free = [list(rng.permutation(own) + own * shard) for shard in range(2)]
    tables = jnp.array([[free[(b + i) % 2].pop() for i in range(4)] for b in range(4)], jnp.int32)
    new = rng.standard_normal((2, 4, 5, 2, 128)).astype(np.float32)
    made = []
    for implementation in ("xla", RACES):
        cache = pd.PagedKVCache.create(pd.CacheSpec(2, 128, 2 * own, page_size, "int8"), simulated_pod(1, 2, 2))
        made.append(pd.append_kv(cache, *new, positions, tables, implementation=implementation).to_pages())
    assert_no_races()
    for xla, simulated in zip(*made, strict=True):
        np.testing.assert_array_equal(simulated, xla)
    assert np.count_nonzero(made[0][2]) == 2 * 3 * 5  # scales of two heads, three rows, five tokens


# -------------------------------------------------------------------------------------------------- composition

KINDS = [AxisType.Auto, AxisType.Explicit]


@pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
@pytest.mark.parametrize("output_heads", ["replicated", "scattered"])
def test_local_forms_inside_a_callers_shard_map_with_check_vma(output_heads, kind):
    """A caller's own shard_map appends, attends and projects; the oracle sees the appended tokens."""
    case = PodCase(**FOUR)
    mesh, cache = case.mesh(kind), case.cache(case.mesh(kind))
    rng = np.random.default_rng(4)
    key, value = (rng.standard_normal((4, 2, 128)).astype(np.float32) for _ in "kv")
    positions = np.array([32, -1, 5, 63], np.int32)
    rows, heads, pools = P("data"), P("data", "model", None), cache.partition_specs()
    split = ("model", "context") if output_heads == "scattered" else "model"

    def step(query, cache, key, value, positions, lengths, tables):
        cache = pd.append_kv_local(cache, key, value, positions, tables)
        output, lse = pd.paged_attention_local(
            query, cache, lengths, tables, sm_scale=SCALE, return_lse=True, output_heads=output_heads
        )
        return output, lse, jax.lax.psum(output.sum(axis=1), split), cache

    step = jax.shard_map(
        step, mesh=mesh, in_specs=(heads, pools, heads, heads, rows, rows, rows),
        out_specs=(P("data", split, None), P("data", split), P("data"), pools), check_vma=True,
    )  # fmt: skip
    put = lambda x, spec: jax.device_put(jnp.asarray(x), NamedSharding(mesh, spec))
    query, lengths, tables = case.arguments
    args = [put(query, heads), cache, put(key, heads), put(value, heads)]
    args += [put(x, rows) for x in (positions, lengths, tables)]
    output, lse, summed, _ = jax.jit(step)(*args)
    for pool, new in (("key", key), ("value", value)):
        for b in (0, 2, 3):
            page = case.arrays["block_tables"][b, positions[b] // 8]
            case.arrays[pool][:, page, positions[b] % 8] = new[b]
    case.check(output, lse, sm_scale=SCALE)
    np.testing.assert_allclose(summed, case.oracle(sm_scale=SCALE)[0].sum(axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P(), P(None, None, ("context", "model")), P(None, "context")], ids=str)
def test_arguments_in_another_sharding_are_resharded(spec, kind):
    case = PodCase(**FOUR)
    mesh = case.mesh(kind)
    query, *rest = case.arguments
    query = jax.device_put(query, NamedSharding(mesh, spec))
    lengths, tables = (jax.device_put(x, NamedSharding(mesh, P())) for x in rest)
    step = jax.jit(functools.partial(pd.sharded_paged_attention, sm_scale=SCALE))
    case.check(step(query, case.cache(mesh), lengths, tables), sm_scale=SCALE)


@pytest.mark.parametrize(
    ("names", "shape", "axes"),
    [
        (("seq", "row", "tensor"), (2, 2, 2), pd.MeshAxes(data="row", context="seq", model="tensor")),
        (("a", "b", "c"), (2, 2, 2), pd.MeshAxes(data=None, context=("a", "c"), model="b")),
        (("x", "context"), (2, 4), pd.MeshAxes(data=None, model=None)),
    ],
    ids=["renamed", "two_axes", "context_alone"],
)
def test_a_users_mesh_may_have_other_axes(names, shape, axes):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), names)
    sizes = {part: axes.size(mesh, part) for part in ("data", "context", "model")}
    case = PodCase(**(FOUR | sizes))
    pools = (jnp.asarray(case.arrays[k]) for k in ("key", "value"))
    cache = pd.PagedKVCache.from_pages(*pools, mesh=mesh, axes=axes)
    query, lengths, tables = case.arguments
    new = np.random.default_rng(1).standard_normal((2, 4, 2, 128)).astype(np.float32)
    cache = pd.append_kv(cache, *new, lengths - 1, tables, axes=axes)
    for pool, tokens in zip(("key", "value"), new, strict=True):
        for b in (0, 2, 3):
            last = case.lengths[b] - 1
            case.arrays[pool][:, case.arrays["block_tables"][b, last // 8], last % 8] = tokens[b]
    for output_heads in ("replicated", "scattered"):
        output = pd.sharded_paged_attention(
            query, cache, lengths, tables, sm_scale=SCALE, axes=axes, output_heads=output_heads
        )
        case.check(output, sm_scale=SCALE)


def test_shapes_can_be_evaluated_and_agree_with_the_arrays():
    case = PodCase(**FOUR)
    query, lengths, tables = case.arguments
    cache, new = case.cache(case.mesh()), jnp.ones((4, 2, 128))

    def step(query, cache, lengths, tables):
        cache = pd.append_kv(cache, new, new, lengths - 1, tables)
        return pd.sharded_paged_attention(query, cache, lengths, tables, output_heads="scattered"), cache

    shapes = jax.eval_shape(step, query, cache, lengths, tables)
    made = step(query, cache, lengths, tables)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), made)


# ------------------------------------------------------------------------------------------------ absent chips
