"""The decode launcher's engine on eight devices of this process: right outputs, and faults that the oracle sees."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

from paged_dist import CacheSpec, PageAllocator, make_pod_mesh
from paged_dist.launch.serving import programs as step
from paged_dist.launch.serving.engine import Engine
from paged_dist.launch.serving.output_checks import ERROR_BOUNDS
from paged_dist.launch.serving.programs import Model
from paged_dist.launch.serving.row_schedule import Pool, RowSchedule
from paged_dist.launch.serving.workload import Request, whole_pool

MESH_SHAPE = dict(data=4, context=1, model=2)


def engine_run(model, requests, batch=8, page_size=16):
    """(record-like summary, Measured) of a run over eight devices, checking one output of every request."""
    mesh = make_pod_mesh(**MESH_SHAPE)
    columns = max(-(-r.tokens // page_size) for r in requests)
    pages = whole_pool(batch * columns, page_size, model.dtype, shards=4)
    spec = CacheSpec(model.num_kv_heads, model.head_dim, pages, page_size, model.dtype, model.num_layers)
    engine = Engine(model, spec, mesh, batch, columns)
    checks = {r.id: (r.context + (r.generated + 1) // 2, r.id % model.num_layers) for r in requests}
    pool = Pool(batch, 4, 1, spec.num_pages // 4, page_size)
    engine.compile()
    return engine.run(
        RowSchedule(requests, PageAllocator(spec, mesh, batch, columns), pool, engine.chunk_tokens, checks)
    )


REQUESTS = [Request(i, 20 + 37 * i % 300, 3 + i % 4) for i in range(12)]


CASES = [
    Model(2, 4, 2, 64, "float32", seed=3),
    Model(1, 8, 2, 128, "bfloat16", soft_cap=2.0, sliding_window=33),
    pytest.param(Model(3, 2, 2, 128, "float32", sliding_window=16), marks=pytest.mark.slow),
    pytest.param(Model(2, 4, 2, 64, "int8", sliding_window=100), marks=pytest.mark.slow),
    Model(1, 4, 2, 128, "float8_e4m3fn", soft_cap=3.0),
    Model(2, 4, 2, 80, "bfloat16", sliding_window=40),
]


@pytest.mark.filterwarnings("ignore:.*page_size")
@pytest.mark.parametrize("model", CASES, ids=str)
def test_outputs_agree_with_the_oracle(model):
    measured = engine_run(model, REQUESTS)
    assert measured.checked == len(REQUESTS)
    assert measured.worst_error < ERROR_BOUNDS[model.dtype] / 2
    assert sum(measured.live_rows) == sum(r.generated for r in REQUESTS)


@pytest.mark.filterwarnings("ignore:.*page_size")
@pytest.mark.parametrize("page_size", [48, 96, 512])
def test_pages_that_no_power_of_two_of_tokens_fills(page_size):
    """A prompt's chunks are whole pages: several of them are written in one call, and none may undo another."""
    requests = [Request(i, context, 3) for i, context in enumerate((700, 512, 97, 300))]
    measured = engine_run(CASES[0], requests, page_size=page_size)
    assert measured.checked == len(requests)
    assert measured.worst_error < ERROR_BOUNDS["float32"] / 2


def _last_token_lost(attend):
    return lambda q, cache, lengths, tables, **kw: attend(q, cache, jnp.maximum(lengths - 1, 0), tables, **kw)


def _pages_of_a_neighbour(attend):
    return lambda q, cache, lengths, tables, **kw: attend(q, cache, lengths, jnp.roll(tables, 1, axis=0), **kw)


def _other_layer(attend):
    return lambda *args, layer, **kw: attend(*args, layer=1 - layer, **kw)


def _heads_swapped(attend):
    return lambda q, *args, **kw: attend(q[:, ::-1], *args, **kw)


@pytest.mark.filterwarnings("ignore:.*page_size")
@pytest.mark.parametrize("fault", [_last_token_lost, _pages_of_a_neighbour, _other_layer, _heads_swapped])
def test_the_oracle_sees_a_wrong_program(monkeypatch, capfd, fault):
    monkeypatch.setattr(step, "sharded_paged_attention", fault(step.sharded_paged_attention))
    measured = engine_run(CASES[0], REQUESTS[:6])
    assert measured.worst_error > ERROR_BOUNDS["float32"]
    assert "wrong output: Check(request=" in capfd.readouterr().err


def _scales_of_the_next_token(attend):
    def rolled(q, cache, *args, **kw):
        scales = {name: jnp.roll(getattr(cache, name), 1, axis=-1) for name in ("key_scales", "value_scales")}
        return attend(q, dataclasses.replace(cache, **scales), *args, **kw)

    return rolled


@pytest.mark.filterwarnings("ignore:.*page_size")
def test_the_oracle_sees_wrong_scales(monkeypatch, capfd):
    monkeypatch.setattr(step, "sharded_paged_attention", _scales_of_the_next_token(step.sharded_paged_attention))
    measured = engine_run(Model(1, 4, 2, 128, "int8"), REQUESTS[:6])
    assert measured.worst_error > 5 * ERROR_BOUNDS["int8"]
    assert "wrong output: Check(request=" in capfd.readouterr().err
