"""The sharded attention op: numbers against the oracle, shardings, and every way to compose it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pod_meshes import simulated_pod
from simulated import RACES, assert_no_races

import paged_dist as pd
from paged_dist.kernels.attention.oracle import attention_oracle
from paged_dist.kernels.decode.api import add_sinks
from paged_dist.mesh.axes import AXIS_NAMES


@dataclasses.dataclass(frozen=True)
class FourRows:
    """A batch over a cache: 4 kv heads, G = 2, four rows on two data shards."""

    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    layers: int | None = None
    lengths: tuple[int, ...] = (3, 0, 17, 64)
    seed: int = 0

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """query, key and value pages, lengths, block_tables; NaN and garbage in all that is not live."""
        rng = np.random.default_rng(self.seed)
        pages, width, batch = 16, 4, 4
        shape = (4, pages, self.page_size, self.head_dim)
        tables = np.concatenate([rng.permutation(8), 8 + rng.permutation(8)]).reshape(batch, width).astype(np.int32)
        pools = []
        for _ in "kv":
            stacked = np.full((self.layers or 1, *shape), np.nan)
            for b, length in enumerate(self.lengths):
                for t in range(length):
                    stacked[-1, :, tables[b, t // self.page_size], t % self.page_size] = rng.standard_normal(
                        (4, self.head_dim)
                    )
            pools.append((stacked if self.layers else stacked[0]).astype(self.dtype))
        for b, length in enumerate(self.lengths):
            tables[b, -(-length // self.page_size) :] = rng.choice([-1, -(2**30), 2**30])
        query = rng.standard_normal((batch, 8, self.head_dim)).astype(self.dtype)
        lengths = np.array(self.lengths, np.int32)
        return dict(query=query, key=pools[0], value=pools[1], lengths=lengths, block_tables=tables)

    def cache(self, mesh: Mesh, axes: pd.MeshAxes = pd.MeshAxes()) -> pd.PagedKVCache:
        return pd.PagedKVCache.from_pages(*(self.arrays[k].copy() for k in ("key", "value")), mesh=mesh, axes=axes)

    @property
    def rest(self) -> tuple[np.ndarray, np.ndarray]:
        return self.arrays["lengths"].copy(), self.arrays["block_tables"].copy()

    @property
    def query(self) -> np.ndarray:
        return self.arrays["query"].copy()

    def oracle(self, **options) -> tuple[np.ndarray, np.ndarray]:
        a = self.arrays
        key, value = (a[k][-1] if self.layers else a[k] for k in ("key", "value"))
        return attention_oracle(a["query"], key, value, a["lengths"], a["block_tables"], **options)

    def check(self, output, lse=None, **options) -> None:
        """Holds output (and lse) to the oracle within the dtype's rounding."""
        expected, expected_lse = self.oracle(**options)
        close = dict(rtol=2e-2, atol=2e-2) if self.dtype == "bfloat16" else dict(rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.asarray(output, np.float64), expected, **close)
        if lse is not None:
            np.testing.assert_allclose(np.asarray(lse), expected_lse, rtol=1e-4, atol=1e-4)


SCALE = 128**-0.5
OPTIONS = [
    dict(),
    dict(soft_cap=5.0),
    dict(sliding_window=1),
    dict(sliding_window=16),
    dict(sliding_window=20, soft_cap=2.0),
    dict(sliding_window=1000),
]


@pytest.mark.parametrize(
    ("case", "kind", "implementation"),
    [
        pytest.param(
            case,
            kind,
            implementation,
            id=f"{name}-{kind.name}-{'simulated' if implementation else 'xla'}",
            marks=pytest.mark.slow if implementation and (kind is not AxisType.Auto or name != "d128") else (),
        )
        for name, case in {
            "d128": FourRows(),
            "d64": FourRows(64),
            "layers": FourRows(64, dtype="float32", layers=2),
            "d256": FourRows(256, 8, lengths=(3, 0, 17, 32)),
        }.items()
        for kind in (AxisType.Auto, AxisType.Explicit)
        for implementation in (None, RACES)
    ],
)
def test_sharded_attention_is_the_oracle(case, kind, implementation):
    mesh = simulated_pod(2, 1, 4, kind)
    layer = None if case.layers is None else jnp.int32(case.layers - 1)
    sinks = np.array([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0, -np.inf, 4.0], np.float32)
    output, lse = pd.sharded_paged_attention(
        case.query, case.cache(mesh), *case.rest, layer=layer, sm_scale=SCALE, sinks=jnp.asarray(sinks),
        return_lse=True, implementation=implementation,
    )  # fmt: skip
    case.check(output, lse, sm_scale=SCALE, sinks=sinks)
    if implementation is RACES:
        assert_no_races()
    assert output.dtype == case.query.dtype
    assert lse.dtype == jnp.float32
    assert output.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model", None)), 3)
    assert lse.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 2)


@pytest.mark.parametrize(
    ("options", "implementation"),
    [
        *(pytest.param(options, None, id=f"{options}-xla") for options in OPTIONS),
        *(
            pytest.param(options, "pallas_interpret", id=f"{options}-simulated", marks=marks)
            for options, marks in zip(OPTIONS, [(), *[pytest.mark.slow] * (len(OPTIONS) - 1)], strict=True)
        ),
    ],
)
def test_options_of_sharded_attention(options, implementation):
    case = FourRows(lengths=(33, 5, 48, 64), seed=2)
    output = pd.sharded_paged_attention(
        case.query,
        case.cache(simulated_pod(2, 1, 4)),
        *case.rest,
        sm_scale=SCALE,
        implementation=implementation,
        **options,
    )
    case.check(output, sm_scale=SCALE, **options)


def test_empty_sequences_give_zero_and_minus_infinity():
    case = FourRows(lengths=(0, 0, 0, 0))
    run = functools.partial(
        pd.sharded_paged_attention, case.query, case.cache(simulated_pod(2, 1, 4)), *case.rest, return_lse=True
    )
    output, lse = run()
    assert not np.asarray(output).any()
    assert (np.asarray(lse) == -np.inf).all()
    output, lse = run(sinks=jnp.arange(8.0))
    assert not np.asarray(output).any()
    np.testing.assert_array_equal(lse, np.broadcast_to(np.arange(8.0, dtype=np.float32), (4, 8)))


def test_sinks_join_the_denominator_only():
    output, lse = add_sinks(jnp.full((1, 2, 4), 6.0), jnp.log(jnp.array([[2.0, 1.0]])), jnp.log(jnp.array([1.0, 3.0])))
    np.testing.assert_allclose(output[0, :, 0], [4.0, 1.5], rtol=1e-6)
    np.testing.assert_allclose(lse, np.log([[3.0, 4.0]]), rtol=1e-6)


# ------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "spec", [P(), P("model"), P(None, None, "data"), P(("data", "model"))][:3], ids=["replicated", "rows", "channels"]
)
def test_arguments_in_another_sharding_are_resharded(spec, kind):
    case, mesh = FourRows(), simulated_pod(2, 1, 4, kind)
    query = jax.device_put(case.query, NamedSharding(mesh, spec))
    lengths, tables = (jax.device_put(x, NamedSharding(mesh, P())) for x in case.rest)
    step = jax.jit(functools.partial(pd.sharded_paged_attention, sm_scale=SCALE))
    case.check(step(query, case.cache(mesh), lengths, tables), sm_scale=SCALE)


RENAMED = [
    (("replica", "tensor"), (2, 4), pd.MeshAxes(data="replica", context=None, model="tensor")),
    (("slice", "batch", "x", "y"), (2, 1, 2, 2), pd.MeshAxes(data=("slice", "batch"), context=None, model=("x", "y"))),
    (("data", "context", "model", "expert"), (2, 1, 2, 2), pd.MeshAxes()),
    (("model",), (4,), pd.MeshAxes(data=None, context=None)),
    (("one",), (1,), pd.MeshAxes(data=None, context="one", model=None)),
]


@pytest.mark.parametrize(
    ("names", "shape", "axes"),
    RENAMED,
    ids=lambda v: "x".join(v) if isinstance(v, tuple) and isinstance(v[0], str) else None,
)
def test_meshes_with_other_axes(names, shape, axes):
    case = FourRows()
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    mesh = Mesh(devices, names)
    cache = case.cache(mesh, axes)
    output = pd.sharded_paged_attention(case.query, cache, *case.rest, sm_scale=SCALE, axes=axes)
    case.check(output, sm_scale=SCALE)
    new = jnp.ones((4, 4, 128), jnp.bfloat16)
    written = pd.append_kv(cache, new, 2 * new, jnp.zeros(4, jnp.int32), case.rest[1], axes=axes)
    for page in case.arrays["block_tables"][[0, 2, 3], 0]:
        assert (np.asarray(written.to_pages()[1][:, page, 0]) == 2).all()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_local_forms_inside_a_callers_shard_map_with_check_vma(kind):
    """A caller's own shard_map appends, attends and projects; the oracle sees the appended token."""
    case, mesh = FourRows(dtype="float32"), simulated_pod(2, 1, 4, kind)
    cache = case.cache(mesh)
    rng = np.random.default_rng(4)
    key, value = (rng.standard_normal((4, 4, 128)).astype(np.float32) for _ in "kv")
    positions = np.array([2, -1, 16, 63], np.int32)

    pools = cache.partition_specs()
    rows, heads = P("data"), P("data", "model", None)

    def step(query, cache, key, value, positions, lengths, tables):
        cache = pd.append_kv_local(cache, key, value, positions, tables)
        output, lse = pd.paged_attention_local(query, cache, lengths, tables, sm_scale=SCALE, return_lse=True)
        return output, lse, jax.lax.psum(output.sum(axis=1), "model"), cache

    step = jax.shard_map(
        step, mesh=mesh, in_specs=(heads, pools, heads, heads, rows, rows, rows),
        out_specs=(heads, P("data", "model"), P("data"), pools), check_vma=True,
    )  # fmt: skip
    put = lambda x, spec: jax.device_put(jnp.asarray(x), NamedSharding(mesh, spec))
    args = [put(case.query, heads), cache, put(key, heads), put(value, heads)]
    args += [put(x, rows) for x in (positions, *case.rest)]
    output, lse, summed, _ = jax.jit(step)(*args)
    for pool, new in (("key", key), ("value", value)):
        for b in (0, 2, 3):
            page = case.arrays["block_tables"][b, positions[b] // 16]
            case.arrays[pool][:, page, positions[b] % 16] = new[b]
    case.check(output, lse, sm_scale=SCALE)
    np.testing.assert_allclose(summed, case.oracle(sm_scale=SCALE)[0].sum(axis=1), rtol=1e-4, atol=1e-4)


def test_decode_loop_of_jitted_steps_compiles_once():
    """The returned cache has the sharding of the one passed in, so the next step finds its program."""
    case, mesh = FourRows(lengths=(3, 5, 17, 40)), simulated_pod(2, 1, 4)
    compiles = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, query, key, lengths, tables):
        compiles.append(1)
        cache = pd.append_kv(cache, key, key, lengths - 1, tables)
        return cache, pd.sharded_paged_attention(query, cache, lengths, tables), lengths + 1

    cache, (lengths, tables) = pd.PagedKVCache.create(pd.CacheSpec(4, 128, 16, 64), mesh), case.rest
    lengths, key = jax.device_put(lengths, NamedSharding(mesh, P("data"))), jnp.ones((4, 4, 128), jnp.bfloat16)
    before = cache.key_pages.sharding
    for _ in range(4):
        cache, _, lengths = step(cache, case.query, key, lengths, tables)
    assert cache.key_pages.sharding == before
    assert len(compiles) == 1
    assert step._cache_size() == 1


@pytest.mark.filterwarnings("ignore:.*page_size=16")
def test_shapes_can_be_evaluated_without_devices_work():
    case, mesh = FourRows(layers=2), simulated_pod(2, 1, 4)
    spec = pd.CacheSpec(4, 128, 16, 16, num_layers=2)
    cache = jax.eval_shape(lambda: pd.PagedKVCache.create(spec, mesh))
    assert cache.spec == spec
    assert cache.key_pages.shape == (2, 4, 16, 16, 128)
    run = lambda q, c, n, t: pd.sharded_paged_attention(q, c, n, t, layer=0, return_lse=True)
    output, lse = jax.eval_shape(run, case.query, cache, *case.rest)
    assert (output.shape, output.dtype, lse.shape, lse.dtype) == ((4, 8, 128), jnp.bfloat16, (4, 8), jnp.float32)
    new = jax.ShapeDtypeStruct((4, 4, 128), jnp.bfloat16)
    after = jax.eval_shape(lambda c, k, p, t: pd.append_kv(c, k, k, p, t, layer=1), cache, new, *case.rest)
    assert after == dataclasses.replace(cache, key_pages=after.key_pages, value_pages=after.value_pages)
    assert after.key_pages.shape == cache.key_pages.shape


def test_mesh_in_scope_and_abstract_mesh():
    case, mesh = FourRows(), simulated_pod(2, 1, 4)
    cache = dataclasses.replace(case.cache(mesh), mesh=None)
    with pytest.raises(ValueError, match=r"mesh=None.*none is in scope"):
        pd.sharded_paged_attention(case.query, cache, *case.rest)
    with jax.set_mesh(mesh):
        case.check(pd.sharded_paged_attention(case.query, cache, *case.rest, sm_scale=SCALE), sm_scale=SCALE)
    abstract = AbstractMesh((2, 1, 4), AXIS_NAMES)
    run = jax.jit(lambda *a: pd.sharded_paged_attention(*a, sm_scale=SCALE, mesh=abstract))
    case.check(run(case.query, cache, *case.rest), sm_scale=SCALE)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("layers", [None, 3])
def test_pages_round_trip_through_the_cache(head_dim, layers):
    rng, mesh = np.random.default_rng(1), simulated_pod(2, 1, 4)
    shape = (4, 16, 16, head_dim) if layers is None else (layers, 4, 16, 16, head_dim)
    key, value = (rng.standard_normal(shape).astype("bfloat16") for _ in "kv")
    cache = pd.PagedKVCache.from_pages(jnp.asarray(key), jnp.asarray(value), mesh=mesh)
    assert cache.key_pages.shape == cache.spec.pool_shape
    assert cache.key_pages.shape[-1] % 128 == 0
    np.testing.assert_array_equal(cache.to_pages()[0], key)
    np.testing.assert_array_equal(cache.to_pages()[1], value)
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == cache.spec.bytes_total == key.nbytes + value.nbytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_create_allocates_each_shard_where_it_lives(dtype):
    mesh, spec = simulated_pod(2, 1, 4), pd.CacheSpec(4, 128, 32, dtype=dtype, num_layers=2)
    cache = pd.PagedKVCache.create(spec, mesh)
    for pool in jax.tree.leaves(cache):
        assert pool.sharding == NamedSharding(mesh, P(None, ("model",), ("data", "context"), None, None))
        assert {s.data.shape for s in pool.addressable_shards} == {(2, 1, 16, 128, 128)}
    one_device = sum(pool.addressable_shards[0].data.nbytes for pool in jax.tree.leaves(cache))
    assert one_device == spec.bytes_per_chip(mesh) == spec.bytes_total // 8
    assert jax.tree.structure(cache) == jax.tree.structure(pd.PagedKVCache.abstract(spec, mesh))


def test_small_pages_are_warned_of():
    with pytest.warns(UserWarning, match=r"page_size=16.*128 is the default"):
        pd.PagedKVCache.create(pd.CacheSpec(4, 128, 16, 16), simulated_pod(2, 1, 4))


# ---------------------------------------------------------------------------------------------- absent chips


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(query=((4, 8, 64), "bfloat16")), r"query\.shape=\(4, 8, 64\).*head_dim.*128"),
        (dict(query=((4, 6, 128), "bfloat16")), r"query\.shape=\(4, 6, 128\).*multiple of the cache's 4 kv heads"),
        (dict(query=((4, 8, 128), "float16")), r"query\.dtype='float16'.*bfloat16 or float32"),
        (dict(lengths=((3,), "int32")), r"lengths\.shape=\(3,\).*\(4,\)"),
        (dict(lengths=((4,), "uint32")), r"lengths\.dtype='uint32'.*int32"),
        (dict(block_tables=((4,), "int32")), r"block_tables\.shape=\(4,\).*\[4, pages_per_sequence\]"),
        (dict(block_tables=((4, 0), "int32")), r"block_tables\.shape=\(4, 0\).*at least one column"),
        (dict(sinks=jnp.zeros(4)), r"sinks\.shape=\(4,\).*\(8,\)"),
        (dict(sliding_window=0), "sliding_window=0.*at least 1"),
        (dict(sliding_window="4"), "sliding_window='4'.*whole number"),
        (dict(sm_scale=float("nan")), "sm_scale=nan.*finite"),
        (dict(axes="data"), "axes='data'.*MeshAxes"),
        (dict(soft_cap=-1.0), r"soft_cap=-1\.0.*positive"),
        (dict(implementation="triton"), "implementation='triton'.*one of"),
        (dict(implementation="pallas"), "implementation='pallas': needs a TPU, not cpu.*pallas_interpret"),
        (dict(layer=0), "layer=0.*no layer axis"),
        (dict(axes=pd.MeshAxes(model="tensor")), r"axes\.model='tensor'.*the mesh has axes"),
        (dict(axes=pd.MeshAxes(context="model")), r"axis 'model' is axes\.context already"),
    ],
)
def test_bad_calls_are_refused_before_anything_compiles(changes, names):
    arrays = dict(query=((4, 8, 128), "bfloat16"), lengths=((4,), "int32"), block_tables=((4, 4), "int32"))
    options = {k: v for k, v in changes.items() if k not in arrays}
    arrays = {k: jnp.zeros(*v) for k, v in (arrays | {k: v for k, v in changes.items() if k in arrays}).items()}
    cache = pd.PagedKVCache.create(pd.CacheSpec(4, 128, 16), simulated_pod(2, 1, 4))
    with pytest.raises(ValueError, match=names):
        pd.sharded_paged_attention(arrays["query"], cache, arrays["lengths"], arrays["block_tables"], **options)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (dict(head_dim=0), "head_dim=0: must be a whole number, at least 1"),
        (dict(page_size=12), "page_size=12.*multiple of 8"),
        (dict(head_dim=64, page_size=8), "page_size=8.*multiple of 16 at head_dim 64"),
        (dict(dtype="float16"), "dtype='float16'.*bfloat16"),
        (dict(num_pages=0), "num_pages=0.*at least 1"),
        (dict(num_layers=0), "num_layers=0"),
        (dict(num_pages=16.0), r"num_pages=16\.0.*whole number"),
        (dict(num_layers=2.5), r"num_layers=2\.5.*whole number"),
        (dict(page_size="16"), "page_size='16'.*whole number"),
        (dict(dtype="fp8"), "dtype='fp8'.*float8_e4m3fn"),
        (dict(dtype="int8", page_size=24), "page_size=24.*divide 128 or be a multiple"),
        (dict(dtype=jnp.int8, page_size=16, num_pages=12), "num_pages=12.*multiple of 8"),
    ],
)
def test_bad_specs_are_refused(arguments, names):
    with pytest.raises(ValueError, match=names):
        pd.CacheSpec(**(dict(num_kv_heads=4, head_dim=128, num_pages=16) | arguments))


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (pd.CacheSpec(6, 128, 16), "num_kv_heads=6.*multiple of the mesh's model size 4.*context"),
        (pd.CacheSpec(4, 128, 15), "num_pages=15.*multiple of the mesh's data x context size 2 x 1"),
        (pd.CacheSpec(4, 128, 8, 16, dtype="int8"), "num_pages=8.*multiple of 64 on each.*128 works"),
    ],
)
def test_specs_that_do_not_divide_over_the_mesh_are_refused(spec, names):
    with pytest.raises(ValueError, match=names):
        pd.PagedKVCache.create(spec, simulated_pod(2, 1, 4))


def test_the_sharded_op_inside_a_shard_map_names_the_local_form():
    case, mesh = FourRows(), simulated_pod(2, 1, 4)
    cache = case.cache(mesh)
    step = jax.shard_map(
        lambda q, c, n, t: pd.sharded_paged_attention(q, c, n, t), mesh=mesh,
        in_specs=(P("data", "model"), cache.partition_specs(), P("data"), P("data")), out_specs=P("data", "model"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"mesh=.*_local form"):
        step(case.query, cache, *case.rest)


@pytest.mark.filterwarnings("ignore:.*page_size=")
@pytest.mark.parametrize("page_size", [pytest.param(64, marks=pytest.mark.slow), 16])
def test_a_wrong_id_in_a_live_entry_reads_a_page_of_the_pool(page_size):
    """Such a table is the caller's fault; what comes out is finite, and other rows are untouched."""
    case = FourRows(lengths=(33, 5, 48, 64), page_size=page_size, dtype="float32")
    tables = np.array(case.arrays["block_tables"])
    tables[0, :2] = [2**30, -5]
    cache = pd.PagedKVCache.from_pages(
        *(jnp.nan_to_num(jnp.asarray(case.arrays[k])) for k in ("key", "value")), mesh=simulated_pod(2, 1, 4)
    )
    args = (case.query, cache, case.rest[0], jnp.asarray(tables))
    for implementation in (None, "pallas_interpret"):
        output = pd.sharded_paged_attention(*args, sm_scale=SCALE, implementation=implementation)
        assert np.isfinite(output).all()
        np.testing.assert_allclose(output[1:], case.oracle(sm_scale=SCALE)[0][1:], rtol=1e-5, atol=1e-5)
