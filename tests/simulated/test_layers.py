"""The decoder layers of examples/: their numbers on eight simulated devices, their programs for absent pods."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from example_layers import BOTH_EXAMPLES
from pod_cases import lay_tables

import paged_dist as pd


@functools.cache
def built_model(layers, dtype: str):
    """(model, mesh, config) on eight simulated devices."""
    mesh = pd.make_pod_mesh(num_kv_heads=2, model_parallelism=4)
    assert dict(mesh.shape) == {"data": 2, "context": 2, "model": 2}
    config = layers.module.Config(width=128, hidden=256, dtype=dtype)
    return layers(config, mesh), mesh, config


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


@BOTH_EXAMPLES
@pytest.mark.filterwarnings("ignore:.*page_size=16")
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 2e-5), pytest.param("bfloat16", 4e-2, marks=pytest.mark.slow)]
)
def test_decode_steps_through_stacked_layers_are_those_of_one_device(layers, dtype, bound):
    """Prompts over both context shards, then steps: the layer's output and what it leaves in the cache."""
    model, mesh, config = built_model(layers, dtype)
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


@BOTH_EXAMPLES
def test_every_weight_is_split_over_the_chips_that_read_it(layers):
    """Heads of wq, wk and wv over model; wo and the MLP over model x context, so that none of them is held twice."""
    model, *_ = built_model(layers, "float32")
    chips = {name: w.size // w.addressable_shards[0].data.size for name, w in model.weights.items()}
    assert {name for name, n in chips.items() if n == 1} == {"attention_norm", "mlp_norm"}
    assert {name for name, n in chips.items() if n == 2} == {"wq", "wk", "wv"}
    assert {name for name, n in chips.items() if n == 4} == {"wo", "w_gate", "w_up", "w_down"}


@BOTH_EXAMPLES
@pytest.mark.parametrize("model_parallelism", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_examples_run_as_they_are(layers, model_parallelism, capsys):
    out = layers.module.main(steps=2, model_parallelism=model_parallelism)
    assert out.shape == (4 * 8 // model_parallelism, 256) and np.isfinite(np.asarray(out, np.float32)).all()
    assert f"step 1: {out.shape} bfloat16" in capsys.readouterr().out
