"""The Pallas kernel bodies in TPU interpret mode with race detection, against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from page_attention_cases import Case, assert_close, make, stack
from simulated import assert_no_races, simulated

from paged_dist.kernels import (
    DEFAULT_MASK_VALUE,
    MultiPageAsyncCopyDescriptor,
    page_attention,
    paged_flash_attention_kernel,
    paged_flash_attention_kernel_inline_seq_dim,
)
from paged_dist.kernels.seed import pallas_call
from paged_dist.kernels.seed.pallas_call import attend_pages_pallas

CASES = [
    (Case("gqa"), 2),
    (Case("mqa_odd_table", Hq=3, Hkv=1, S=5, lengths=(40, 0, 0, 33, 1)), 2),
    (Case("bf16_page_16", P=16, dtype="bfloat16", query_dtype="bfloat16", lengths=(0, 17, 64)), 3),
    (Case("head_dim_256", Hq=8, Hkv=1, D=256, lengths=(9, 31)), 1),
    (Case("packed_head_dim_64", D=64, P=16, lengths=(0, 1, 17, 64)), 2),
    (Case("packed_window_and_cap", D=64, P=16, lengths=(64, 20, 3), sliding_window=7, soft_cap=2.0), 2),
    (Case("window_under_a_page", sliding_window=3, lengths=(0, 1, 8, 9, 32)), 2),
    (Case("window_of_two_pages", sliding_window=16, S=5, lengths=(40, 15, 0, 17)), 2),
    (Case("window_of_several_blocks", sliding_window=25, S=7, lengths=(56, 50)), 1),
    (Case("soft_cap_table_in_one_block", soft_cap=1.5, lengths=(0, 12, 32)), 9),
    (Case("all_empty", lengths=(0, 0)), 2),
]


IN_BOTH_FORMS = ("gqa", "packed_window_and_cap", "window_of_two_pages", "all_empty")


@pytest.mark.parametrize(
    "case, pages, inline",
    [
        pytest.param(
            case,
            pages,
            inline,
            id=f"{case.name}-{'inline' if inline else 'blocks_in_grid'}",
            marks=() if (inline and i % 2) or case.name in IN_BOTH_FORMS else pytest.mark.slow,
        )
        for i, (case, pages) in enumerate(CASES)
        for inline in (True, False)
    ],
)
def test_kernel_equals_the_oracle_in_stacked_pools(case, pages, inline):
    (query, k, v, *rest), expected = make(case)
    width = max(128, case.D)
    attend = jax.jit(
        lambda q, k, v, n, t, layer: attend_pages_pallas(
            q,
            k,
            v,
            n,
            t,
            layer,
            pages_per_compute_block=pages,
            inline_seq_dim=inline,
            interpret=simulated(),
            **case.options,
        )
    )
    output, lse = attend(query, stack(k, width), stack(v, width), *rest, 1)
    assert output.dtype == case.query_dtype
    assert_close(case, expected, output, lse)
    assert_no_races()


@pytest.mark.parametrize(
    "mode, inline",
    [
        ("batch", True),
        ("kv_head", False),
        pytest.param("batch", False, marks=pytest.mark.slow),
        pytest.param("kv_head", True, marks=pytest.mark.slow),
    ],
)
def test_two_cores_equal_the_oracle_and_do_not_race(mode, inline):
    case = Case("megacore", Hq=8, Hkv=4, lengths=(0, 9, 0, 32, 17, 1), sliding_window=20)
    arrays, expected = make(case)
    output = page_attention(
        *arrays,
        pages_per_compute_block=2,
        megacore_mode=mode,
        inline_seq_dim=inline,
        interpret=simulated(cores=2),
        **case.page_attention_options,
    )
    assert_close(case, expected, output)
    assert_no_races()


@pytest.mark.parametrize(
    "case",
    [
        Case("head_dim_64_page_8", D=64, lengths=(32, 0, 7)),
        Case("head_dim_64_page_16", D=64, P=16, lengths=(33, 15)),
        Case("head_dim_128", dtype="bfloat16", lengths=(12, 0)),
    ],
    ids=lambda c: c.name,
)
def test_page_attention_simulated_equals_the_oracle(case):
    arrays, expected = make(case)
    assert_close(case, expected, page_attention(*arrays, interpret=True, **case.page_attention_options))


def test_copies_may_land_at_once_or_when_waited_for():
    case = CASES[0][0]
    arrays, expected = make(case)
    output = page_attention(
        *arrays,
        interpret=simulated(dma_execution_mode="eager"),
        pages_per_compute_block=1,
        **case.page_attention_options,
    )
    assert_close(case, expected, output)
    assert_no_races()


def test_one_core_can_run_both_halves_of_a_megacore_grid():
    """What a chip without megacore does with such a launch: the seed's kernel waits there for ever."""
    case = Case("halves", Hq=4, Hkv=2, lengths=(9, 0, 32, 1))
    arrays, expected = make(case)
    output = drive(
        paged_flash_attention_kernel_inline_seq_dim,
        *arrays,
        pages=2,
        scale=case.sm_scale,
        megacore_mode="kv_head",
        interpret=simulated(cores=1),
    )
    assert_close(case, expected, output)


def test_a_batch_over_scalar_memory_is_split(monkeypatch):
    case = Case("split", lengths=(9, 0, 32, 1, 8))
    (query, k, v, *rest), expected = make(case)
    monkeypatch.setattr(pallas_call, "sequences_per_launch", lambda problem, multiple: 2)
    output, lse = attend_pages_pallas(query, k[None], v[None], *rest, interpret=simulated(), **case.options)
    assert_close(case, expected, output, lse)


def test_kernel_in_a_shard_map_that_checks_types():
    case = Case("sharded", Hq=2, Hkv=2, lengths=(9, 0))
    (q, k, v, lengths, tables), expected = make(case)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(*arrays):
        return attend_pages_pallas(*arrays, 1, interpret=pltpu.InterpretParams(), **case.options)

    output, lse = jax.jit(
        jax.shard_map(
            shard,
            mesh=mesh,
            check_vma=True,
            in_specs=(P(None, "model"), P(None, "model"), P(None, "model"), P(), P()),
            out_specs=(P(None, "model"),) * 2,
        )
    )(q, stack(k, 128), stack(v, 128), lengths, tables)
    assert_close(case, expected, output, lse)


# Code written for ejkernel's kernels: four scalars, [G, D] blocks for all outputs, m and l of width 1.


def drive(
    body,
    query,
    k_pages,
    v_pages,
    lengths,
    tables,
    *,
    pages,
    scale=1.0,
    sliding_window=None,
    megacore_mode=None,
    interpret=False,
):
    """A launcher by hand, as users have them: the output, cast and reshaped by its caller."""
    B, Hq, D = query.shape
    Hkv, _, page_size, _ = k_pages.shape
    G, S = Hq // Hkv, tables.shape[1]
    cores = 1 if megacore_mode is None else 2
    inline = body is paged_flash_attention_kernel_inline_seq_dim
    grid = (cores, B // cores if megacore_mode == "batch" else B, Hkv // cores if megacore_mode == "kv_head" else Hkv)
    if G % 8:  # one row a head, so that XLA picks a layout the block fits
        q, block, tail = query.reshape(B, Hq, 1, D).astype(jnp.float32), (None, G, None, D), (0, 0)
    else:
        q, block, tail = query, (None, G, D), (0,)

    def at(core, b, h, *_):
        return (
            b * cores + core if megacore_mode == "batch" else b,
            h * cores + core if megacore_mode == "kv_head" else h,
            *tail,
        )

    spec = pl.BlockSpec(block, at)
    buffer = pltpu.VMEM((2, pages, page_size, D), k_pages.dtype)
    output, _, _ = pl.pallas_call(
        functools.partial(
            body,
            batch_size=B,
            pages_per_compute_block=pages,
            pages_per_sequence=S,
            mask_value=DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            megacore_mode=megacore_mode,
            sliding_window=sliding_window,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid if inline else (*grid, -(-S // pages)),
            in_specs=[spec, pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[spec, spec, spec],
            scratch_shapes=(buffer, buffer, pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2,))),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) + ("arbitrary",) * (2 if inline else 3)),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:-1], 1), jnp.float32),
            jax.ShapeDtypeStruct((*q.shape[:-1], 1), jnp.float32),
        ],
        interpret=interpret,
    )(
        jnp.asarray(lengths),
        jnp.asarray(tables).reshape(-1),
        jnp.zeros((1,), jnp.int32),
        jnp.ones((1,), jnp.int32),
        (q * scale).astype(q.dtype),
        k_pages,
        v_pages,
    )
    return output.reshape(B, Hq, D).astype(query.dtype)


BODIES = pytest.mark.parametrize(
    "body",
    [paged_flash_attention_kernel, paged_flash_attention_kernel_inline_seq_dim],
    ids=["blocks_in_grid", "inline"],
)


@BODIES
@pytest.mark.parametrize(
    "case",
    [
        Case("rows", lengths=(0, 1, 32, 9)),
        Case("blocks", Hq=8, Hkv=1, lengths=(17, 0)),
        Case("window", lengths=(32, 0, 9), sliding_window=11),
    ],
    ids=lambda c: c.name,
)
def test_a_launcher_written_for_ejkernel_drives_the_bodies(case, body):
    arrays, expected = make(case)
    output = drive(
        body, *arrays, pages=2, scale=case.sm_scale, sliding_window=case.sliding_window, interpret=simulated()
    )
    assert_close(case, expected, output)
    assert_no_races()


@pytest.mark.parametrize("count", [3, "traced"])
def test_descriptor_loads_the_named_pages_and_no_other(count):
    pages = jnp.arange(2 * 6 * 8 * 128, dtype=jnp.float32).reshape(2, 6, 8, 128).astype(jnp.bfloat16)
    # Past the third entry the ids are wild: reading through one ends the simulation with an error.
    table = jnp.array([-5, 4, 0, 5, 10**6, 10**6], jnp.int32)

    def body(table_ref, count_ref, pages_ref, out_ref, buffer, sem):
        copy = MultiPageAsyncCopyDescriptor(
            pages_ref, buffer, sem, table_ref, 1, count_ref[0] if count == "traced" else count, 1
        )
        copy.start()
        loaded = copy.wait_and_get_loaded()
        assert loaded.shape == (4 * 8, 128) and loaded.dtype == jnp.float32
        out_ref[...] = loaded

    output = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((32, 128), jnp.float32),
        interpret=simulated(),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * 2 + [pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((4, 8, 128), jnp.bfloat16), pltpu.SemaphoreType.DMA],
    )(table, jnp.array([3], jnp.int32), pages)
    np.testing.assert_array_equal(output[:24], pages[1, table[1:4]].astype(jnp.float32).reshape(24, 128))
    assert np.isnan(output[24:]).all(), "the buffer beyond the copy is not written"
    assert_no_races()


def test_the_race_check_can_fail():
    def body(x_ref, out_ref, buffer, sem):
        copy = pltpu.make_async_copy(x_ref, buffer, sem)
        copy.start()
        out_ref[...] = buffer[...]
        copy.wait()

    racy = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        interpret=simulated(dma_execution_mode="eager"),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
    )
    # jax 0.12 ends the simulation at a race, 0.10 notes it.
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match=r"races_found|RACE DETECTED"):
        jax.block_until_ready(racy(jnp.ones((8, 128))))
        assert_no_races()
    pltpu.reset_tpu_interpret_mode_state()  # a simulation that ended early leaves its memory behind
