"""Live pages to pools of other sizes and to other meshes: every token, no dead page, and no pool held twice."""

from __future__ import annotations

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import pod
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import paged_dist as pd
from paged_dist._compat import lowering_for
from paged_dist.transfer import exchange, staging


def bits(x) -> np.ndarray:
    """Bytes, so that NaN equals itself."""
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)


def on(shape, kind=AxisType.Auto, devices=None) -> Mesh:
    if devices is None:
        return pod(*shape, kind)
    return Mesh(np.array(devices).reshape(shape), ("data", "context", "model"), axis_types=(kind,) * 3)


def fill(spec: pd.CacheSpec, mesh, rows: int, columns: int, seed=0):
    """(cache of random numbers in live pages and NaN or all ones in others, allocator), forks and prefixes among it."""
    rng = np.random.default_rng(seed)
    pages = pd.PageAllocator(spec, mesh, rows, columns)
    size, per = spec.page_size, pages.rows_per_shard
    for row in range(rows):
        if row % per != 1 or per == 1:
            pages.allocate(row, int(rng.integers(0, columns * size + 1)))
    if per > 1:
        pages.fork(0, 1)
    ended = per - 1
    if pages.lengths[ended] >= size and ended > 1:
        pages.cache_prefix(ended, range(int(pages.lengths[ended])))
        pages.free(ended)
    abstract = pd.PagedKVCache.abstract(spec, mesh, key_smoothing=spec.is_quantized)
    live = np.zeros(spec.num_pages, bool)
    live[pages.live_pages] = True

    def make(x):
        if x.ndim <= 3 and x.shape == spec.key_smoothing_shape:
            return jax.device_put(rng.uniform(0.5, 2, x.shape).astype(np.float32), x.sharding)
        size = x.dtype.itemsize
        made = rng.integers(0, 200, (*x.shape, size), np.uint8).view(x.dtype)[..., 0].copy()
        if x.shape == spec.pool_shape:
            made[..., ~live, :, :] = np.full(size, 255, np.uint8).view(x.dtype)
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: made[index])

    return jax.tree.map(make, abstract), pages


def contents(cache: pd.PagedKVCache, pages: pd.PageAllocator) -> list:
    """Bytes of every row's pages in its order, all arrays, heads and layers."""
    axis = 1 if cache.spec.num_layers is None else 2
    arrays = [np.moveaxis(np.asarray(x), axis, 0) for x in cache.to_pages()]
    tables = pages.block_tables
    return [[bits(x[tables[row][tables[row] >= 0]]) for x in arrays] for row in range(pages.num_sequences)]


def check(cache, pages, made, new_pages, before):
    assert new_pages.lengths[: pages.num_sequences].tolist() == pages.lengths.tolist()
    for row, (want, got) in enumerate(zip(before, contents(made, new_pages), strict=False)):
        for a, b in zip(want, got, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"row {row}")
    dead = np.ones(made.spec.num_pages, bool)
    dead[new_pages.live_pages] = False
    axis = 1 if made.spec.num_layers is None else 2
    for x in made.to_pages():
        assert not bits(np.moveaxis(np.asarray(x), axis, 0)[dead]).any(), "no dead page travels"
    if cache.key_smoothing is not None:
        np.testing.assert_array_equal(made.key_smoothing, cache.key_smoothing)
    want = pd.PagedKVCache.shardings(made.spec, made.mesh, key_smoothing=made.key_smoothing is not None)
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), made, want)
    assert all(jax.tree.leaves(same))


# data, context, model: from, to
SHAPES = [
    ((2, 1, 4), (4, 1, 2)),
    ((2, 1, 2), (1, 4, 2)),
    ((1, 4, 2), (2, 2, 2)),
    ((1, 1, 1), (2, 2, 2)),
    ((2, 2, 2), (1, 1, 1)),
    ((1, 8, 1), (1, 1, 4)),
]
SPECS = {
    "bf16": dict(dtype="bfloat16", page_size=16),
    "layers": dict(dtype="float32", page_size=8, num_layers=3),
    "int8": dict(dtype="int8", page_size=128, num_layers=2),
    "fp8_page_64": dict(dtype="float8_e4m3fn", page_size=64),
    "packed": dict(dtype="int8", head_dim=64, page_size=32),
}
OFTEN = ["layers", "int8", "bf16", "packed", "fp8_page_64", "bf16"]


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        pytest.param(shapes, name, marks=() if name == often else pytest.mark.slow, id=f"{shapes}-{name}")
        for shapes, often in zip(SHAPES, OFTEN, strict=True)
        for name in SPECS
    ],
)
def test_reshard_brings_every_live_page_to_its_new_place(shapes, name):
    old, new = (on(shape) for shape in shapes)
    spec = pd.CacheSpec(**dict(num_kv_heads=4, head_dim=128, num_pages=512) | SPECS[name])
    cache, pages = fill(spec, old, 8, 4)
    before, digest = contents(cache, pages), pages.digest()
    a_page = spec.bytes_per_token * spec.page_size
    made, there = pd.reshard(cache, pages, new, num_pages=768, chunk_bytes=4 * a_page)
    assert made.spec.num_pages == 768 and made.mesh == new
    check(cache, pages, made, there, before)
    assert pages.digest() == digest and contents(cache, pages)[0][0].tolist() == before[0][0].tolist()
    shared = there.block_tables[0][: there.pages_for(int(there.lengths[0]))]
    if there.rows_per_shard > 1:
        np.testing.assert_array_equal(there.block_tables[1][: len(shared)], shared, "a fork shares its pages still")


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize("name", ["int8", *(pytest.param(n, marks=pytest.mark.slow) for n in SPECS if n != "int8")])
@pytest.mark.parametrize("num_pages", [128, 1024])
def test_resize_keeps_every_shards_pages_on_it(name, num_pages):
    mesh = on((2, 2, 2))
    spec = pd.CacheSpec(**dict(num_kv_heads=4, head_dim=128, num_pages=512) | SPECS[name])
    cache, pages = fill(spec, mesh, 8, 4)
    before = contents(cache, pages)
    made, there = pd.resize(cache, num_pages, pages)
    assert made.spec.num_pages == num_pages
    check(cache, pages, made, there, before)
    shard = lambda allocator: allocator.block_tables // (allocator.spec.num_pages // 4)
    owners = [np.where(a.block_tables < 0, -1, shard(a)) for a in (pages, there)]
    np.testing.assert_array_equal(*owners)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_from_one_half_of_the_devices_to_the_other_and_on_decoding(kind):
    """A prefill pod hands over to a decode pod, and both give the same attention; the decode pod goes on."""
    old, new = on((1, 1, 4), kind, jax.devices()[:4]), on((2, 2, 1), kind, jax.devices()[4:])
    spec = pd.CacheSpec(4, 128, 64, 128, "float32")
    pages = pd.PageAllocator(spec, old, 4, 4)
    for row, length in enumerate((300, 0, 129, 512)):
        pages.allocate(row, length)
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    prompt = normal(4, 512, 4, 128), normal(4, 512, 4, 128)
    cache = pd.write_prefill_kv(pd.PagedKVCache.create(spec, old), *prompt, pages.lengths, pages.block_tables)
    query, key, value = normal(4, 8, 128), normal(4, 4, 128), normal(4, 4, 128)
    attend = lambda cache, pages: np.asarray(
        pd.sharded_paged_attention(query, cache, pages.lengths, pages.block_tables, sm_scale=0.1)
    )
    before = attend(cache, pages)
    made, there = pd.reshard(cache, pages, new)
    assert set(made.key_pages.devices()) == set(jax.devices()[4:])
    np.testing.assert_allclose(attend(made, there), before, rtol=1e-5, atol=1e-5)
    outputs = []
    pages.truncate(3, 511)
    there.truncate(3, 511)
    for held, allocator in ((cache, pages), (made, there)):
        allocator.grow_all([0, 1, 2, 3])
        written = pd.append_kv(held, key, value, allocator.lengths - 1, allocator.block_tables)
        outputs.append(attend(written, allocator))
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_a_mesh_that_numbers_the_same_devices_otherwise():
    """As topologies do: the exchange is then between devices of other numbers."""
    old, new = on((2, 2, 2)), on((1, 4, 2), devices=[jax.devices()[i] for i in (6, 1, 0, 7, 2, 3, 5, 4)])
    spec = pd.CacheSpec(2, 128, 64, 128, "bfloat16", 2)
    cache, pages = fill(spec, old, 4, 8)
    before = contents(cache, pages)
    check(cache, pages, *pd.reshard(cache, pages, new), before)


def test_cached_prefixes_are_found_after_the_move():
    old, new = on((2, 2, 1)), on((1, 4, 2))
    spec = pd.CacheSpec(2, 128, 64, 128, "float32")
    cache, pages = pd.PagedKVCache.create(spec, old), pd.PageAllocator(spec, old, 4, 8)
    tokens = list(range(128 * 6))
    pages.allocate(2, len(tokens))
    cache = pd.write_prefill_kv(
        cache, *(jnp.broadcast_to(jnp.arange(768.0)[None, :, None, None], (1, 768, 2, 128)),) * 2,
        jnp.array([768], jnp.int32), pages.block_tables, rows=jnp.array([2], jnp.int32),
    )  # fmt: skip
    pages.cache_prefix(2, tokens)
    pages.free(2)
    for moved, there in (pd.reshard(cache, pages, new), pd.resize(cache, 32, pages)):
        match = there.prefix_match(tokens)
        assert match.num_tokens == len(tokens) and there.used_pages == 0
        found = np.asarray(moved.to_pages()[0])[0, list(match.pages), :, 0]
        np.testing.assert_array_equal(found.ravel(), tokens)
    _, there = pd.resize(cache, 8, pages)
    assert there.prefix_match(tokens).num_tokens in (0, 128 * 4), "what fits: all of a chain or none of it"


def test_many_pages_go_in_chunks_of_one_program(monkeypatch):
    old, new = on((2, 1, 2)), on((1, 2, 2))
    spec = pd.CacheSpec(2, 128, 64, 128, "float32")
    cache, pages = fill(spec, old, 4, 8)
    chunks = []
    real = exchange.exchange_staged
    noted = lambda staged, *rest: (chunks.append(staged), real(staged, *rest))[1]
    monkeypatch.setattr(exchange, "exchange_staged", noted)
    before = contents(cache, pages)
    made, there = pd.reshard(cache, pages, new, chunk_bytes=1)
    check(cache, pages, made, there, before)
    assert len(chunks) >= 4 and len({c.spec for c in chunks}) == 1
    assert chunks[0].spec.num_pages == 2 * 2, "a page for each pair of shards"


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda c, a: pd.resize(c, 63, a), ValueError, "num_pages=63: must be a multiple"),
        (lambda c, a: pd.resize(c, 4, a), pd.OutOfPages, "row 0 on data shard 0"),
        (
            lambda c, a: pd.reshard(c, a, on((8, 1, 1))),
            ValueError,
            "num_sequences=4: must be a multiple of the mesh's",
        ),
        (lambda c, a: pd.reshard(c, a, on((1, 1, 4))), ValueError, "num_kv_heads=2: must be a multiple"),
        (lambda c, a: pd.reshard(c, a, on((1, 1, 2)).abstract_mesh), ValueError, "new_mesh="),
        (lambda c, a: pd.reshard(c, a, on((1, 1, 2)), chunk_bytes=0), ValueError, "chunk_bytes=0"),
        (
            lambda c, a: pd.reshard(c, a, on((1, 1, 2)), num_sequences=3),
            ValueError,
            "num_sequences=3: must be at",
        ),
        (
            lambda c, a: pd.resize(c, 128, pd.PageAllocator(c.spec, on((1, 1, 2)), 4, 8)),
            ValueError,
            r"allocator=\(1, 1\): must have the data and context sizes",
        ),
    ],
)
def test_what_cannot_be_moved_is_refused_and_nothing_changes(call, error, says):
    spec = pd.CacheSpec(2, 128, 64, 128, "float32")
    mesh = on((2, 1, 2))
    pages = pd.PageAllocator(spec, mesh, 4, 8)
    pages.allocate(0, 700)
    cache, digest = pd.PagedKVCache.create(spec, mesh), pages.digest()
    with pytest.raises(error, match=says):
        call(cache, pages)
    assert pages.digest() == digest and not cache.key_pages.is_deleted()


def test_copies_that_are_due_come_first():
    spec = pd.CacheSpec(2, 128, 64, 128, "float32")
    mesh = on((1, 1, 2))
    pages = pd.PageAllocator(spec, mesh, 4, 8)
    pages.allocate(0, 5)
    pages.fork(0, 1)
    pages.grow(1)
    with pytest.raises(ValueError, match=r"copies due=1: must be made first.*take_copies"):
        pd.resize(pd.PagedKVCache.create(spec, mesh), 128, pages)


@aot.needs_libtpu
@pytest.mark.parametrize(
    ("topology", "shape"),
    [
        ("v6e:8x8", dict(dtype="int8", num_layers=4)),
        pytest.param("v5p:4x4x4", dict(dtype="bfloat16", num_layers=4), marks=pytest.mark.slow),
        pytest.param("v5e:8x8", dict(dtype="float8_e4m3fn", page_size=64), marks=pytest.mark.slow),
        pytest.param("v4:4x4x4", dict(dtype="int8", head_dim=64), marks=pytest.mark.slow),
    ],
)
def test_a_pods_programs_stage_a_chunk_and_hold_no_pool(topology, shape):
    """data 2 x context 4 x model 8 to 8 x 2 x 4: what leaves, the exchange, and what arrives."""
    old = pd.make_pod_mesh(data=2, context=4, model=8, topology=topology)
    new = Mesh(old.devices.reshape(8, 2, 4), old.axis_names)
    axes, (S, T, q) = pd.MeshAxes(), (8, 16, 16)
    spec = pd.CacheSpec(**dict(num_kv_heads=8, head_dim=128, num_pages=4096 * T) | shape)
    pool = min(spec.bytes_per_chip(mesh) for mesh in (old, new))
    whole = lambda compiled: aot.values_as_large_as(compiled.as_text(), pool // 16)
    at = lambda mesh, x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, P(axes.pages, *(None,) * (x.ndim - 1)))
    )
    caches = [pd.PagedKVCache.abstract(spec, mesh) for mesh in (old, new)]
    leaving = pd.PagedKVCache.abstract(staging.staging_spec(spec, S, T * q), old)
    arriving = pd.PagedKVCache.abstract(staging.staging_spec(spec, T, S * q), new)
    staged = leaving.spec.bytes_per_chip(old)
    assert staged < pool / 16
    for mesh, into, source, shards in ((old, leaving, caches[0], S), (new, caches[1], arriving, T)):
        lists = [at(mesh, np.zeros(s, np.int32)) for s in ((shards, S * T * q // shards, 2), (shards,))]
        with lowering_for(mesh):
            compiled = staging.copy_chunk.lower(into, source, *lists, axes=axes, implementation=None).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= into.spec.bytes_per_chip(mesh), "written in place"
        assert (
            memory.temp_size_in_bytes <= staged and whole(compiled) == [] and aot.collectives(compiled.as_text()) == []
        )
    leave = functools.partial(exchange.send_slots, mesh=old, axes=axes, shards=S)
    specs = exchange.slot_specs(leaving, axes)
    apart = jax.tree.map(
        lambda a, p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.NamedSharding(old, p)),
        jax.eval_shape(leave, leaving),
        specs,
    )
    there = jax.tree.map(lambda p: jax.sharding.NamedSharding(new, p), specs, is_leaf=lambda x: isinstance(x, P))
    with lowering_for(old):
        steps = [jax.jit(leave).lower(leaving), jax.jit(lambda c: c, out_shardings=there).lower(apart)]
    for lowered in steps:
        compiled = lowered.compile()
        assert whole(compiled) == [] and compiled.memory_analysis().temp_size_in_bytes <= 4 * staged
        kinds = {c.kind for c in aot.collectives(compiled.as_text())}
        assert "all-to-all" in kinds and kinds <= {"all-to-all", "collective-permute"}
