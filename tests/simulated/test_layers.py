"""The decoder layers of examples/: their numbers on eight simulated devices, their programs for absent pods."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import pathlib
import sys

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import needs_libtpu
from context_cases import lay_tables
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from slices import crossings, groups_along, partitions
from test_distributed import free_port, run_processes

import paged_dist as pd
from paged_dist.ops.collectives import attention_collectives

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@functools.cache
def example(name: str):
    """The module of examples/, which is no package."""
    found = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


class PlainJax:
    """What the tests need: `step(x, cache, positions, lengths, block_tables)`, and the weights under plain names."""

    module = example("plain_jax_layer")

    def __init__(self, config, mesh):
        self.weights = self.module.init_weights(config, mesh)
        self.step = functools.partial(self.module.decode_step, self.weights)

    @classmethod
    def abstract_step(cls, config, mesh):
        return cls.module.decode_step, (cls.module.abstract_weights(config, mesh),)


class FlaxNnx:
    module = example("flax_nnx_layer")

    def __init__(self, config, mesh):
        with jax.set_mesh(mesh):
            graph, params = nnx.split(self.module.stacked_layers(config))
        self.step = functools.partial(self.module.decode_step, graph, params)
        self.weights = {name: params[name]["scale"][...] for name in ("attention_norm", "mlp_norm")}
        self.weights |= {name: params[name]["kernel"][...] for name in ("wq", "wk", "wv", "wo")}
        self.weights |= {f"w_{name}": params[name]["kernel"][...] for name in ("gate", "up", "down")}

    @classmethod
    def abstract_step(cls, config, mesh):
        graph, params = nnx.get_abstract_model(lambda: cls.module.stacked_layers(config), mesh)
        return functools.partial(cls.module.decode_step, graph), (params,)


@functools.cache
def built(layers, dtype: str):
    """(model, mesh, config) on eight simulated devices."""
    mesh = pd.make_pod_mesh(num_kv_heads=2, model_parallelism=4)
    assert dict(mesh.shape) == {"data": 2, "context": 2, "model": 2}
    config = layers.module.Config(width=128, hidden=256, dtype=dtype)
    return layers(config, mesh), mesh, config


BOTH = pytest.mark.parametrize("layers", [PlainJax, FlaxNnx])


def reference_layer(w, x, keys, values):
    """One decoder layer in float64, on one device, without pages. Appends to keys and values.

    w: one layer's weights; x: [B, E]; keys, values: for each row a list of [Hkv, D], the tokens so far, or None where
    the row is idle.
    """
    norm = lambda v, scale: v / np.sqrt(np.mean(v * v, axis=-1, keepdims=True) + 1e-6) * scale

    def rotary(v, position):  # v: [H, D]
        half = v.shape[-1] // 2
        turn = np.exp(1j * position * 10000.0 ** (-np.arange(half) / half))
        turned = (v[:, :half] + 1j * v[:, half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    y, attended = norm(x, w["attention_norm"]), np.zeros(x.shape)
    for b, row in enumerate(y):
        if keys[b] is None:
            continue
        query, key, value = (np.einsum("e,ehd->hd", row, w[name]) for name in ("wq", "wk", "wv"))
        position, group = len(keys[b]), query.shape[0] // key.shape[0]
        keys[b].append(rotary(key, position))
        values[b].append(value)
        k, v = (np.repeat(np.stack(held), group, axis=1) for held in (keys[b], values[b]))  # [T, Hq, D]
        logits = np.einsum("hd,thd->ht", rotary(query, position), k) * key.shape[-1] ** -0.5
        weight = np.exp(logits - logits.max(axis=1, keepdims=True))
        out = np.einsum("ht,thd->hd", weight / weight.sum(axis=1, keepdims=True), v)
        attended[b] = np.einsum("hd,hde->e", out, w["wo"])
    x = x + attended
    y = norm(x, w["mlp_norm"])
    gate = y @ w["w_gate"]
    return x + (gate / (1 + np.exp(-gate)) * (y @ w["w_up"])) @ w["w_down"]


STEPS, PAGE = 5, 16
PROMPTS = np.array([0, 37, -STEPS, 15, 1, 64, 30, 48])  # tokens of each row before the first step; row 2 is idle
WAITS = 4  # this row is held and gets no token in the middle step: another's row may share its page


@BOTH
@pytest.mark.filterwarnings("ignore:.*page_size=16")
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 2e-5), pytest.param("bfloat16", 4e-2, marks=pytest.mark.slow)]
)
def test_decode_steps_through_stacked_layers_are_those_of_one_device(layers, dtype, bound):
    """Prompts over both context shards, then steps: the layer's output and what it leaves in the cache."""
    model, mesh, config = built(layers, dtype)
    rng = np.random.default_rng(0)
    tables, num_pages = lay_tables(rng, PROMPTS + STEPS, PAGE, 8, data=2, context=2)
    spec = pd.CacheSpec(2, 128, num_pages, PAGE, dtype=dtype, num_layers=config.num_layers)
    cache = pd.PagedKVCache.create(spec, mesh)

    prompts = np.maximum(PROMPTS, 0).astype(np.int32)
    held = []  # for each layer keys and values, of each row
    for layer in range(config.num_layers):
        new = [jnp.asarray(rng.standard_normal((8, 64, 2, 128)), dtype) for _ in "kv"]
        cache = pd.write_prefill_kv(cache, *new, jnp.asarray(prompts), jnp.asarray(tables), layer=layer)
        rows = [[list(row[:n]) for row, n in zip(np.asarray(x, np.float64), prompts, strict=True)] for x in new]
        held.append([[None if first < 0 else row for row, first in zip(r, PROMPTS, strict=True)] for r in rows])

    weights = {name: np.asarray(w, np.float64) for name, w in model.weights.items()}
    lengths = prompts.copy()
    for step in range(1, STEPS + 1):
        x = jnp.asarray(rng.standard_normal((8, config.width)), dtype)
        grows = (PROMPTS >= 0) & ((np.arange(8) != WAITS) | (step != 3))
        positions = np.where(grows, lengths, -1).astype(np.int32)
        lengths += grows
        before = cache
        out, cache = model.step(x, cache, positions, lengths.copy(), jnp.asarray(tables))
        assert before.key_pages.is_deleted()  # donated
        expected = np.asarray(x, np.float64)
        for layer in range(config.num_layers):
            of_those = [[row if g else None for row, g in zip(x, grows, strict=True)] for x in held[layer]]
            expected = reference_layer({k: w[layer] for k, w in weights.items()}, expected, *of_those)
        counts = grows | (PROMPTS < 0)  # a row that waits has an output that nobody reads
        worst = np.abs(np.asarray(out, np.float64) - expected)[counts].max() / np.sqrt(np.mean(expected[counts] ** 2))
        assert worst < bound

    pools = [np.asarray(pool, np.float64) for pool in cache.to_pages()[:2]]  # [L, Hkv, N, P, D]
    for layer, (keys, values) in enumerate(held):
        for pool, rows in zip(pools, (keys, values), strict=True):
            for table, row in zip(tables, rows, strict=True):
                t = np.arange(len(row or ()))
                stored = pool[layer][:, table[t // PAGE], t % PAGE]
                np.testing.assert_allclose(stored.swapaxes(0, 1), np.reshape(row or [], (-1, 2, 128)), atol=2 * bound)


@needs_libtpu
@BOTH
@pytest.mark.parametrize(
    ("topology", "num_slices"),
    [("v5p:4x4x4", 1), ("v5e:4x8", 2), pytest.param("tpu7x:4x4x2", 2, marks=pytest.mark.slow)],
)
def test_a_pods_program_of_the_layers_talks_where_it_should_and_copies_no_pool(layers, topology, num_slices):
    """Attention over context only, one sum over (model, context) for each of wo and w_down, and nothing else."""
    mesh = pd.make_pod_mesh(num_kv_heads=8, model_parallelism=32, topology=topology, num_slices=num_slices)
    config = layers.module.Config(width=1024, num_q_heads=64, num_kv_heads=8, hidden=4096, num_layers=4)
    spec = pd.CacheSpec(8, 128, 256 * mesh.shape["data"] * mesh.shape["context"], num_layers=4)
    rows, place = 16, lambda *axes: NamedSharding(mesh, P(*axes))
    batch = rows * mesh.shape["data"]
    step, weights = layers.abstract_step(config, mesh)
    compiled = aot.compile_on(
        mesh,
        step,
        *weights,
        jax.ShapeDtypeStruct((batch, config.width), jnp.bfloat16, sharding=place("data", None)),
        pd.PagedKVCache.abstract(spec, mesh),
        *(jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=place("data")) for _ in ("positions", "lengths")),
        jax.ShapeDtypeStruct((batch, 32), jnp.int32, sharding=place("data", None)),
        donate_argnames="cache",
    )
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text.count('custom_call_target="tpu_custom_call"') == 2  # append and attend, for all layers
    assert partitions(text) == mesh.size // num_slices and crossings(text) == []

    groups = lambda one: frozenset(map(frozenset, one.groups))
    over = {names: groups_along(mesh, names, num_slices) for names in (("context",), ("model", "context"))}
    found = aot.collectives(text)
    attention = [one for one in found if groups(one) == over["context",]]
    projections = [one for one in found if groups(one) == over["model", "context"]]
    assert len(attention) + len(projections) == len(found)
    assert [(one.kind, one.arrays) for one in projections] == [("all-reduce", (f"bf16[{rows},{config.width}]",))] * 2
    predicted = attention_collectives(spec, mesh, batch, config.num_q_heads, output_heads="scattered")
    assert sorted(one.kind for one in attention) == sorted(one.kind for one in predicted)
    assert sum(one.bytes for one in attention) == sum(one.bytes for one in predicted)

    layer_pool = spec.bytes_per_chip(mesh) // 2 // 4
    assert aot.values_as_large_as(text, layer_pool) == []
    assert memory.temp_size_in_bytes < layer_pool
    assert memory.alias_size_in_bytes >= spec.bytes_per_chip(mesh)


@BOTH
def test_every_weight_is_split_over_the_chips_that_read_it(layers):
    """Heads of wq, wk and wv over model; wo and the MLP over model x context, so that none of them is held twice."""
    model, *_ = built(layers, "float32")
    chips = {name: w.size // w.addressable_shards[0].data.size for name, w in model.weights.items()}
    assert {name for name, n in chips.items() if n == 1} == {"attention_norm", "mlp_norm"}
    assert {name for name, n in chips.items() if n == 2} == {"wq", "wk", "wv"}
    assert {name for name, n in chips.items() if n == 4} == {"wo", "w_gate", "w_up", "w_down"}


@BOTH
@pytest.mark.parametrize("model_parallelism", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_examples_run_as_they_are(layers, model_parallelism, capsys):
    out = layers.module.main(steps=2, model_parallelism=model_parallelism)
    assert out.shape == (4 * 8 // model_parallelism, 256) and np.isfinite(np.asarray(out, np.float32)).all()
    assert f"step 1: {out.shape} bfloat16" in capsys.readouterr().out


ON_TWO_PROCESSES = """
import importlib.util, sys
import numpy as np
import jax
from jax.experimental import multihost_utils

import paged_dist as pd

pd.initialize_distributed({address!r}, 2, {index})

def compared(*_, **__):
    raise AssertionError("arrays were compared across processes")

multihost_utils.assert_equal = multihost_utils.process_allgather = compared
mesh = pd.make_pod_mesh(model=2)
try:
    jax.device_put(np.zeros(8), jax.NamedSharding(mesh, jax.P("data")))
except AssertionError:
    print("device_put compares", flush=True)
for name in {names!r}:
    found = importlib.util.spec_from_file_location(name, {folder!r} + "/" + name + ".py")
    sys.modules[name] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if {index} == 0:  # alone: the other process would have to hear of it
        rows = module.put_rows(mesh, np.arange(8.0))
        assert [float(s.data[0]) for s in rows.addressable_shards] == [0, 0, 2, 2], rows.addressable_shards
    {then}
"""


def on_two_processes(names, then):
    """What two processes of four devices print that put arrays as the examples do, and `then`."""
    address = f"127.0.0.1:{free_port()}"
    scripts = [
        ON_TWO_PROCESSES.format(address=address, index=i, names=names, folder=str(EXAMPLES), then=then) for i in (0, 1)
    ]
    results = run_processes(scripts, 200, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    for code, _, err in results:
        assert code == 0, err
    return [out for _, out, _ in results]


def test_the_inputs_of_a_step_are_not_compared_across_processes():
    for out in on_two_processes(["plain_jax_layer"], "pass"):
        assert "device_put compares" in out
    # The other example puts them in the same way, and neither has another way.
    sources = [inspect.getsource(layers.module.put_rows) for layers in (PlainJax, FlaxNnx)]
    assert sources[0] == sources[1]
    for layers in (PlainJax, FlaxNnx):
        assert inspect.getsource(layers.module).count("device_put") == 1  # in put_rows' docstring
    assert not [file for file in (EXAMPLES.parent / "launch").glob("*.py") if "device_put" in file.read_text()]


@pytest.mark.slow
def test_an_example_gives_on_two_processes_what_it_gives_on_one(capsys):
    steps = lambda out: [line for line in out.splitlines() if line.startswith("step")]
    example("plain_jax_layer").main(steps=2)
    alone = steps(capsys.readouterr().out)
    assert len(alone) == 2
    for out in on_two_processes(["plain_jax_layer"], "module.main(steps=2)"):
        assert steps(out) == alone
