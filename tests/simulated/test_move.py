"""Live pages to pools of other sizes and to other meshes: every token, no dead page, and no pool held twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from live_pages import MOVED_SPECS, check_moved, fill_live_pages, row_contents
from pod_meshes import simulated_pod

import paged_dist as pd
from paged_dist.transfer import exchange

# data, context, model: from, to
SHAPES = [
    ((2, 1, 4), (4, 1, 2)),
    ((2, 1, 2), (1, 4, 2)),
    ((1, 4, 2), (2, 2, 2)),
    ((1, 1, 1), (2, 2, 2)),
    ((2, 2, 2), (1, 1, 1)),
    ((1, 8, 1), (1, 1, 4)),
]
OFTEN = ["layers", "int8", "bf16", "packed", "fp8_page_64", "bf16"]


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        pytest.param(shapes, name, marks=() if name == often else pytest.mark.slow, id=f"{shapes}-{name}")
        for shapes, often in zip(SHAPES, OFTEN, strict=True)
        for name in MOVED_SPECS
    ],
)
def test_reshard_brings_every_live_page_to_its_new_place(shapes, name):
    old, new = (simulated_pod(*shape) for shape in shapes)
    spec = pd.CacheSpec(**dict(num_kv_heads=4, head_dim=128, num_pages=512) | MOVED_SPECS[name])
    cache, pages = fill_live_pages(spec, old, 8, 4)
    before, digest = row_contents(cache, pages), pages.digest()
    a_page = spec.bytes_per_token * spec.page_size
    made, there = pd.reshard(cache, pages, new, num_pages=768, chunk_bytes=4 * a_page)
    assert made.spec.num_pages == 768 and made.mesh == new
    check_moved(cache, pages, made, there, before)
    assert pages.digest() == digest and row_contents(cache, pages)[0][0].tolist() == before[0][0].tolist()
    shared = there.block_tables[0][: there.pages_for(int(there.lengths[0]))]
    if there.rows_per_shard > 1:
        np.testing.assert_array_equal(there.block_tables[1][: len(shared)], shared, "a fork shares its pages still")


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize(
    "name", ["int8", *(pytest.param(n, marks=pytest.mark.slow) for n in MOVED_SPECS if n != "int8")]
)
@pytest.mark.parametrize("num_pages", [128, 1024])
def test_resize_keeps_every_shards_pages_on_it(name, num_pages):
    mesh = simulated_pod(2, 2, 2)
    spec = pd.CacheSpec(**dict(num_kv_heads=4, head_dim=128, num_pages=512) | MOVED_SPECS[name])
    cache, pages = fill_live_pages(spec, mesh, 8, 4)
    before = row_contents(cache, pages)
    made, there = pd.resize(cache, num_pages, pages)
    assert made.spec.num_pages == num_pages
    check_moved(cache, pages, made, there, before)
    shard = lambda allocator: allocator.block_tables // (allocator.spec.num_pages // 4)
    owners = [np.where(a.block_tables < 0, -1, shard(a)) for a in (pages, there)]
    np.testing.assert_array_equal(*owners)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_from_one_half_of_the_devices_to_the_other_and_on_decoding(kind):
    """A prefill pod hands over to a decode pod, and both give the same attention; the decode pod goes on."""
    old, new = simulated_pod(1, 1, 4, kind, jax.devices()[:4]), simulated_pod(2, 2, 1, kind, jax.devices()[4:])
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
    old, new = (
        simulated_pod(2, 2, 2),
        simulated_pod(1, 4, 2, devices=[jax.devices()[i] for i in (6, 1, 0, 7, 2, 3, 5, 4)]),
    )
    spec = pd.CacheSpec(2, 128, 64, 128, "bfloat16", 2)
    cache, pages = fill_live_pages(spec, old, 4, 8)
    before = row_contents(cache, pages)
    check_moved(cache, pages, *pd.reshard(cache, pages, new), before)


def test_cached_prefixes_are_found_after_the_move():
    old, new = simulated_pod(2, 2, 1), simulated_pod(1, 4, 2)
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
    old, new = simulated_pod(2, 1, 2), simulated_pod(1, 2, 2)
    spec = pd.CacheSpec(2, 128, 64, 128, "float32")
    cache, pages = fill_live_pages(spec, old, 4, 8)
    chunks = []
    real = exchange.exchange_staged
    noted = lambda staged, *rest: (chunks.append(staged), real(staged, *rest))[1]
    monkeypatch.setattr(exchange, "exchange_staged", noted)
    before = row_contents(cache, pages)
    made, there = pd.reshard(cache, pages, new, chunk_bytes=1)
    check_moved(cache, pages, made, there, before)
    assert len(chunks) >= 4 and len({c.spec for c in chunks}) == 1
    assert chunks[0].spec.num_pages == 2 * 2, "a page for each pair of shards"


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda c, a: pd.resize(c, 63, a), ValueError, "num_pages=63: must be a multiple"),
        (lambda c, a: pd.resize(c, 4, a), pd.OutOfPages, "row 0 on data shard 0"),
        (
            lambda c, a: pd.reshard(c, a, simulated_pod(8, 1, 1)),
            ValueError,
            "num_sequences=4: must be a multiple of the mesh's",
        ),
        (lambda c, a: pd.reshard(c, a, simulated_pod(1, 1, 4)), ValueError, "num_kv_heads=2: must be a multiple"),
        (lambda c, a: pd.reshard(c, a, simulated_pod(1, 1, 2).abstract_mesh), ValueError, "new_mesh="),
        (lambda c, a: pd.reshard(c, a, simulated_pod(1, 1, 2), chunk_bytes=0), ValueError, "chunk_bytes=0"),
        (
            lambda c, a: pd.reshard(c, a, simulated_pod(1, 1, 2), num_sequences=3),
            ValueError,
            "num_sequences=3: must be at",
        ),
        (
            lambda c, a: pd.resize(c, 128, pd.PageAllocator(c.spec, simulated_pod(1, 1, 2), 4, 8)),
            ValueError,
            r"allocator=\(1, 1\): must have the data and context sizes",
        ),
    ],
)
def test_what_cannot_be_moved_is_refused_and_nothing_changes(call, error, says):
    spec = pd.CacheSpec(2, 128, 64, 128, "float32")
    mesh = simulated_pod(2, 1, 2)
    pages = pd.PageAllocator(spec, mesh, 4, 8)
    pages.allocate(0, 700)
    cache, digest = pd.PagedKVCache.create(spec, mesh), pages.digest()
    with pytest.raises(error, match=says):
        call(cache, pages)
    assert pages.digest() == digest and not cache.key_pages.is_deleted()


def test_copies_that_are_due_come_first():
    spec = pd.CacheSpec(2, 128, 64, 128, "float32")
    mesh = simulated_pod(1, 1, 2)
    pages = pd.PageAllocator(spec, mesh, 4, 8)
    pages.allocate(0, 5)
    pages.fork(0, 1)
    pages.grow(1)
    with pytest.raises(ValueError, match=r"copies due=1: must be made first.*take_copies"):
        pd.resize(pd.PagedKVCache.create(spec, mesh), 128, pages)
