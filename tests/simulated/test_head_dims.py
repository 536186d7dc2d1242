"""Head dims that no stored row holds as they are: padded inside, the model's everywhere that a user sees one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_bits import array_bits
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from live_pages import check_moved, fill_live_pages, row_contents
from pod_meshes import simulated_pod
from simulated import RACES, assert_no_races

import paged_dist as pd
from paged_dist.kernels.attention.oracle import attention_oracle

pytestmark = pytest.mark.filterwarnings("ignore:.*page_size=")


@pytest.mark.parametrize(
    ("head_dim", "stored", "tokens_per_row"),
    [
        (1, 64, 2), (32, 64, 2), (48, 64, 2), (64, 64, 2), (72, 128, 1), (80, 128, 1), (96, 128, 1), (100, 128, 1),
        (112, 128, 1), (128, 128, 1), (160, 256, 1), (192, 256, 1), (256, 256, 1), (320, 384, 1),
    ],
)  # fmt: skip
def test_a_head_is_stored_in_64_lanes_or_in_whole_rows_and_bytes_are_those(head_dim, stored, tokens_per_row):
    spec = pd.CacheSpec(8, head_dim, 128, 128, num_layers=3)
    assert (spec.head_dim, spec.stored_head_dim, spec.tokens_per_row) == (head_dim, stored, tokens_per_row)
    assert spec.pool_shape == (3, 8, 128, 128 // tokens_per_row, stored * tokens_per_row)
    assert spec.key_smoothing_shape == (3, 8, head_dim)
    assert spec.bytes_per_token == 2 * 3 * 8 * stored * 2
    int8 = dataclasses.replace(spec, dtype="int8")
    assert int8.bytes_per_token == 2 * 3 * 8 * (stored + 4)
    mesh = AbstractMesh((2, 2, 2), ("data", "context", "model"))
    arrays = jax.tree.leaves(pd.PagedKVCache.abstract(int8, mesh))
    assert sum(x.size * x.dtype.itemsize for x in arrays) == int8.bytes_total == 8 * int8.bytes_per_chip(mesh)


def pages_of_head_dim(dtype: str, head_dim: int, page_size: int, layers: int | None = None):
    """Pages [.., 4, N, P, D] of `dtype`, and of 8-bit ones their scales."""
    rng = np.random.default_rng(head_dim)
    shape = (*([layers] if layers else []), 4, max(16, 4096 // page_size), page_size, head_dim)
    made = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in "kv"]
    if dtype in ("bfloat16", "float32"):
        return [x.astype(dtype) for x in made]
    (keys, key_scales), (values, value_scales) = (pd.quantize_kv(x, dtype) for x in made)
    return [keys, values, key_scales, value_scales]


def lanes_behind(spec: pd.CacheSpec, pool) -> np.ndarray:
    """The bits that a stored pool [.., rows, lanes] has behind the D elements of each token."""
    tokens = np.asarray(pool).reshape(*pool.shape[:-2], spec.page_size, spec.stored_head_dim)
    return array_bits(tokens[..., spec.head_dim :])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "layers", "kind"),
    [
        ("bfloat16", 96, 16, None, AxisType.Explicit),
        ("float32", 192, 8, 2, AxisType.Auto),
        ("int8", 80, 128, None, AxisType.Auto),
        ("float8_e4m3fn", 48, 64, 2, AxisType.Explicit),
    ],
)
def test_pages_go_in_and_come_out_with_the_models_head_dim(dtype, head_dim, page_size, layers, kind):
    arrays = pages_of_head_dim(dtype, head_dim, page_size, layers)
    for mesh in (simulated_pod(2, 2, 2, kind), None):
        cache = pd.PagedKVCache.from_pages(*arrays, mesh=mesh)
        assert cache.spec == pd.CacheSpec(4, head_dim, arrays[0].shape[-3], page_size, dtype, layers)
        for pool in (cache.key_pages, cache.value_pages):
            assert pool.shape == cache.spec.pool_shape and not lanes_behind(cache.spec, pool).any()
        for got, want in zip(cache.to_pages(), arrays, strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(array_bits(got), array_bits(want))
        assert sum(x.nbytes for x in jax.tree.leaves(cache)) == cache.spec.bytes_total


@dataclasses.dataclass(frozen=True)
class Batch:
    """Four sequences with random keys and values; the last `new` tokens of each are appended, the rest a prompt."""

    spec: pd.CacheSpec
    tables: np.ndarray
    lengths: np.ndarray
    new: int
    keys: np.ndarray  # [B, T, Hkv, D] f32
    values: np.ndarray
    smoothing: np.ndarray | None  # as the spec wants it

    @classmethod
    def make(cls, dtype, head_dim, mesh, *, page_size, lengths=(5, 130, 64, 18), new=1, layers=None):
        columns, shards = -(-max(lengths) // page_size), mesh.shape["data"] * mesh.shape["context"]
        spec = pd.CacheSpec(4, head_dim, shards * max(4 * columns, 1024 // page_size), page_size, dtype, layers)
        pages = pd.PageAllocator(spec, mesh, 4, columns)
        for row, length in enumerate(lengths):
            pages.allocate(row, length)
        rng = np.random.default_rng(head_dim)
        keys, values = (rng.standard_normal((4, max(lengths), 4, head_dim)).astype(np.float32) for _ in "kv")
        smoothing = None
        if spec.is_quantized:
            keys[..., 3] *= 20
            smoothing = np.asarray(pd.calibrate_key_smoothing(keys))
            smoothing = np.broadcast_to(smoothing, spec.key_smoothing_shape)
        return cls(spec, pages.block_tables, np.array(lengths, np.int32), new, keys, values, smoothing)

    @property
    def layer(self) -> int | None:
        return None if self.spec.num_layers is None else self.spec.num_layers - 1

    def of_layer(self, x) -> np.ndarray:
        return np.asarray(x if self.layer is None else x[self.layer])

    def filled(self, mesh, implementation=None) -> pd.PagedKVCache:
        """A cache that held NaN in every lane and scale (int8: -1), with the batch's tokens written."""

        def spoilt(x):
            ones = np.full(x.size * x.dtype.itemsize, 255, np.uint8)
            return jax.device_put(ones.view(x.dtype).reshape(x.shape), x.sharding)

        cache = jax.tree.map(spoilt, pd.PagedKVCache.create(self.spec, mesh))
        smoothing = pd.PagedKVCache.create(self.spec, mesh, key_smoothing=self.smoothing).key_smoothing
        cache = dataclasses.replace(cache, key_smoothing=smoothing)
        how, before = dict(layer=self.layer, implementation=implementation), self.lengths - self.new
        cache = pd.write_prefill_kv(cache, self.keys, self.values, before, self.tables, **how)
        last = before[:, None] + np.arange(self.new)
        new = (x[np.arange(4)[:, None], last] for x in (self.keys, self.values))
        new = new if self.new > 1 else (x[:, 0] for x in new)
        return pd.append_kv(cache, *new, before, self.tables, **how)

    def held(self, cache) -> list[np.ndarray]:
        """What the pages stand for, [Hkv, N, P, D] float64: as given, or dequantised."""
        keys, values, *scales = (self.of_layer(x).astype(np.float64) for x in cache.to_pages())
        if scales:
            keys, values = (x * scale[..., None] for x, scale in zip((keys, values), scales, strict=True))
            keys = keys * self.of_layer(self.smoothing)[:, None, None]
        return [keys, values]

    def check_written(self, cache) -> None:
        """Each live token is what was given, within its dtype, with zeros behind it."""
        row = np.repeat(np.arange(4), self.lengths)
        token = np.concatenate([np.arange(n) for n in self.lengths])
        at = self.tables[row, token // self.spec.page_size], token % self.spec.page_size
        bound = {"float32": 1e-7, "bfloat16": 2**-8, "int8": 0.02, "float8_e4m3fn": 0.07}[self.spec.dtype]
        for held, given in zip(self.held(cache), (self.keys, self.values), strict=True):
            got, want = held[:, *at], np.moveaxis(given[row, token], 1, 0)
            assert got.shape[-1] == self.spec.head_dim and np.abs(got - want).max() <= bound * np.abs(want).max()
        for pool in (cache.key_pages, cache.value_pages):
            behind = lanes_behind(self.spec, self.of_layer(pool))
            assert behind.any() and not behind[:, *at].any()  # dead tokens have what was there still

    def check_attention(self, cache, query_dtype="float32", **how) -> None:
        """Attention with the model's own scale, against float64 on what the cache holds."""
        queries = (self.new,) if self.new > 1 else ()
        query = np.random.default_rng(1).standard_normal((4, *queries, 8, self.spec.head_dim)).astype(query_dtype)
        options = dict(sm_scale=cache.spec.head_dim**-0.5, soft_cap=20.0, sinks=np.linspace(-1, 1, 8, dtype=np.float32))
        output, lse = pd.sharded_paged_attention(
            query, cache, self.lengths, self.tables, layer=self.layer, return_lse=True, **options, **how
        )
        assert output.shape == query.shape and output.dtype == query.dtype and lse.shape == query.shape[:-1]
        close = 2e-2 if query_dtype == "bfloat16" else 2e-5
        for q in range(self.new):
            at = (slice(None), q) if queries else (slice(None),)
            ends = np.maximum(self.lengths - (self.new - 1 - q), 0)
            want, want_lse = attention_oracle(query[at], *self.held(cache), ends, self.tables, **options)
            np.testing.assert_allclose(np.asarray(output[at], np.float64), want, rtol=close, atol=close)
            np.testing.assert_allclose(np.asarray(lse[at]), want_lse, rtol=1e-4, atol=1e-4)


DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "shape", "new", "layers"),
    [
        ("bfloat16", 80, 16, (2, 2, 2), 1, None),
        ("float32", 192, 8, (2, 1, 4), 3, 2),
        ("int8", 112, 128, (1, 4, 2), 1, None),
        ("float8_e4m3fn", 48, 64, (2, 1, 4), 1, 2),
        *(
            pytest.param(dtype, head_dim, 128, (2, 2, 2), new, None, marks=pytest.mark.slow)
            for dtype in DTYPES
            for head_dim, new in ((32, 1), (80, 5), (96, 1), (96, 4), (100, 1), (112, 2), (192, 1))
        ),
    ],
)
def test_writes_and_attention_are_those_of_the_models_head_dim(dtype, head_dim, page_size, shape, new, layers):
    """Over pools that held NaN in every lane, those of the padding too: no score, no scale and no token knows."""
    mesh = simulated_pod(*shape)
    batch = Batch.make(dtype, head_dim, mesh, page_size=page_size, new=new, layers=layers)
    cache = batch.filled(mesh)
    batch.check_written(cache)
    batch.check_attention(cache, "bfloat16" if dtype == "bfloat16" else "float32")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "shape", "new"),
    [
        ("float32", 96, 8, (1, 1, 1), 1),
        pytest.param("int8", 192, 128, (1, 1, 2), 1, marks=pytest.mark.slow),
        pytest.param("bfloat16", 80, 16, (1, 2, 2), 1, marks=pytest.mark.slow),
        pytest.param("float8_e4m3fn", 112, 128, (1, 1, 2), 2, marks=pytest.mark.slow),
        pytest.param("float32", 48, 16, (1, 2, 2), 2, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_read_and_write_padded_heads(dtype, head_dim, page_size, shape, new):
    mesh = simulated_pod(*shape)
    lengths = (5, 2, 17, 9) if page_size < 128 else (130, 2, 3, 5)
    batch = Batch.make(dtype, head_dim, mesh, page_size=page_size, lengths=lengths, new=new)
    cache = batch.filled(mesh, RACES)
    batch.check_written(cache)
    batch.check_attention(cache, implementation=RACES)
    assert_no_races()


def test_8_bit_caches_are_quantised_over_the_models_channels():
    mesh = simulated_pod(1, 1, 1)
    spec = pd.CacheSpec(2, 96, 8, 128, "int8")
    rng = np.random.default_rng(0)
    key, value = (rng.standard_normal((1, 5, 2, 96)).astype(np.float32) for _ in "kv")
    smoothing = np.exp(rng.standard_normal((2, 96))).astype(np.float32)
    with pytest.raises(ValueError, match=r"key_smoothing\.shape=\(2, 128\): must be \(2, 96\)"):
        pd.PagedKVCache.create(spec, mesh, key_smoothing=np.ones((2, 128), np.float32))
    cache = pd.PagedKVCache.create(spec, mesh, key_smoothing=smoothing)
    cache = pd.write_prefill_kv(cache, key, value, np.array([5], np.int32), np.array([[3]], np.int32))
    wants = *pd.quantize_kv(key, "int8", smoothing=smoothing), *pd.quantize_kv(value, "int8")
    for got, want in zip(cache.to_pages(), (wants[0], wants[2], wants[1], wants[3]), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32)[:, 3, :5], np.moveaxis(want[0], 1, 0), rtol=1e-6)


def test_inside_a_shard_map_heads_have_the_models_size():
    mesh = simulated_pod(2, 2, 2)
    batch = Batch.make("float32", 96, mesh, page_size=8)
    cache = pd.PagedKVCache.create(batch.spec, mesh)
    pools, rows = cache.partition_specs(), P("data")
    seen = []

    def step(cache, query, key, value, lengths, tables):
        cache = pd.append_kv_local(cache, key, value, lengths - 1, tables)
        output = pd.paged_attention_local(query, cache, lengths, tables, sm_scale=cache.spec.head_dim**-0.5)
        seen.append((cache.spec.head_dim, output.shape, cache.to_pages()[0].shape[-1]))
        return cache, output

    heads = P("data", "model", None)
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(pools, heads, heads, heads, rows, P("data", None)), out_specs=(pools, heads)
    )
    query = np.random.default_rng(0).standard_normal((4, 8, 96)).astype(np.float32)
    new = batch.keys[:, 0], batch.values[:, 0]
    cache, output = jax.jit(mapped, donate_argnums=0)(cache, query, *new, np.ones(4, np.int32), batch.tables)
    assert seen[0] == (96, (2, 4, 96), 96)
    np.testing.assert_allclose(output, np.repeat(new[1], 2, axis=1), rtol=1e-6)  # of one token, its value


@pytest.mark.parametrize("name", ["int8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_pages_keep_their_head_dim_through_resize_reshard_and_save(tmp_path, name):
    size = 16 if name == "bfloat16" else 128
    spec, mesh = pd.CacheSpec(4, 96, 512 * 128 // size // 8, size, name, 2), simulated_pod(2, 2, 2)
    cache, pages = fill_live_pages(spec, mesh, 8, 4)
    before = row_contents(cache, pages)
    assert before[0][0].shape[-1] == 96 * np.dtype(jnp.dtype(name)).itemsize
    more, new = 2 * spec.num_pages, simulated_pod(1, 2, 4)
    pd.save(tmp_path / "saved", cache, pages)
    for moved, there in (
        pd.resize(cache, more, pages),
        pd.reshard(cache, pages, new, num_pages=more),
        pd.restore(tmp_path / "saved", new, num_pages=more),
    ):
        assert moved.spec == dataclasses.replace(spec, num_pages=more) and moved.spec.head_dim == 96
        check_moved(cache, pages, moved, there, before)


def test_a_padded_query_and_padded_keys_are_refused():
    mesh = simulated_pod(1, 1, 1)
    cache = pd.PagedKVCache.create(pd.CacheSpec(2, 96, 4, 128), mesh)
    lengths, tables, wide = np.ones(1, np.int32), np.zeros((1, 2), np.int32), jnp.zeros((1, 2, 128))
    with pytest.raises(ValueError, match=r"query\.shape=\(1, 2, 128\): head_dim must be the cache's 96"):
        pd.sharded_paged_attention(wide, cache, lengths, tables)
    with pytest.raises(ValueError, match=r"key\.shape=\(1, 2, 128\): .* \(Hkv, D\) = \(2, 96\)"):
        pd.append_kv(cache, wide, wide, lengths - 1, tables)


def test_the_kernel_level_names_the_cache_that_pads_and_the_scale_to_keep():
    pages = jnp.zeros((2, 4, 8, 96))
    lengths, tables = np.ones(1, np.int32), np.zeros((1, 2), np.int32)
    works = r"head_dim 96 must be 64 or a multiple of 128; a PagedKVCache takes 96 .* to 128 .*sm_scale .*: 96\*\*-0\.5"
    for op in (pd.kernels.paged_decode_attention, pd.kernels.page_attention):
        with pytest.raises(ValueError, match=works):
            op(jnp.zeros((1, 4, 96)), pages, pages, lengths, tables)


def test_a_mesh_is_described_with_the_head_dim_that_is_stored():
    mesh = simulated_pod(2, 2, 2)
    text = pd.describe_mesh(mesh, pd.CacheSpec(4, 96, 64, num_layers=2), num_q_heads=8, batch=4)
    assert "4.19 MB a device in bfloat16, head_dim 96 stored as 128, 2 layers" in text
    assert "[2, 4, 96]" in text  # padding crosses no link
    assert "stored as" not in pd.describe_mesh(mesh, pd.CacheSpec(4, 128, 64, num_layers=2))
