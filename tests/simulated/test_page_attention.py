"""Paged attention off the TPU, the XLA form and the plain reference, against the float64 oracle."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from one_chip_cases import (
    ONE_CHIP_CASES,
    STARTS_CASES,
    OneChipCase,
    assert_close_to_oracle,
    in_stacked_pools,
    poisoned_arrays,
)

from paged_dist import kernels
from paged_dist.kernels import DEFAULT_MASK_VALUE, page_attention, ref_paged_attention
from paged_dist.kernels.attention.xla_form import attend_pages_xla


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in ONE_CHIP_CASES
        if c.name
        in ("mqa", "bf16", "page_24", "head_dim_64_page_8", "head_dim_64_bf16", "window_and_cap_bf16", "default_scale")
    ],
    ids=lambda case: case.name,
)
def test_page_attention_off_tpu_equals_the_oracle(case):
    arrays, expected = poisoned_arrays(case)
    output = page_attention(*arrays, **case.page_attention_options)
    assert output.dtype == case.query_dtype
    assert_close_to_oracle(case, expected, output)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=pytest.mark.slow if i % 2 else ()) for i, c in enumerate(ONE_CHIP_CASES)]
)
def test_xla_form_equals_the_oracle_in_stacked_pools(case):
    (query, k, v, *rest), expected = poisoned_arrays(case, seed=1)
    width = max(128, case.D) if case.P * case.D % 128 == 0 else case.D
    attend = jax.jit(lambda q, k, v, n, t, layer: attend_pages_xla(q, k, v, n, t, layer, **case.options))
    output, lse = attend(query, in_stacked_pools(k, width), in_stacked_pools(v, width), *rest, 1)
    assert output.dtype == case.query_dtype
    assert_close_to_oracle(case, expected, output, lse)


@pytest.mark.parametrize("case", STARTS_CASES, ids=lambda case: case.name)
def test_xla_form_attends_from_starts_on(case):
    """Tokens, pages and table entries before a start are poison, as those past a length are."""
    (query, k, v, *rest), expected = poisoned_arrays(case, seed=2)
    attend = jax.jit(lambda q, k, v, n, t, starts: attend_pages_xla(q, k, v, n, t, starts=starts, **case.options))
    width = max(128, case.D)
    pools = in_stacked_pools(k, width, 1, 0), in_stacked_pools(v, width, 1, 0)
    output, lse = attend(query, *pools, *rest, np.array(case.starts, np.int32))
    assert_close_to_oracle(case, expected, output, lse)


def test_starts_of_zero_change_no_bit():
    (q, k, v, lengths, tables), _ = poisoned_arrays(ONE_CHIP_CASES[0])
    plain = attend_pages_xla(q, k[None], v[None], lengths, tables)
    from_zero = attend_pages_xla(q, k[None], v[None], lengths, tables, starts=np.zeros_like(lengths))
    jax.tree.map(np.testing.assert_array_equal, plain, from_zero)


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in ONE_CHIP_CASES
        if c.name in ("gqa", "bf16", "soft_cap", "window_under_a_page", "window_over_all", "default_scale")
    ],
    ids=lambda case: case.name,
)
def test_the_plain_reference_equals_the_oracle(case):
    case = OneChipCase(**{**vars(case), "sm_scale": 1.0})
    arrays, expected = poisoned_arrays(case)
    output = ref_paged_attention(*arrays, attn_logits_soft_cap=case.soft_cap, sliding_window=case.sliding_window)
    assert output.dtype == case.query_dtype
    assert_close_to_oracle(case, expected, output)


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes_equal_the_oracle(seed):
    rng = np.random.default_rng(100 + seed)
    Hkv, D, page, S = rng.integers(1, 5), rng.choice([64, 128, 256]), 8 * rng.integers(1, 17), rng.integers(1, 9)
    lengths = rng.integers(0, page * S + 1, rng.integers(1, 12))
    case = OneChipCase(
        "random",
        int(Hkv * rng.integers(1, 9)),
        int(Hkv),
        int(D),
        int(page),
        int(S),
        tuple(int(n) for n in lengths),
        sliding_window=[None, int(rng.integers(1, page * S))][seed % 2],
    )
    arrays, expected = poisoned_arrays(case, seed)
    assert_close_to_oracle(case, expected, page_attention(*arrays, **case.page_attention_options))


def test_call_sites_of_jax_paged_attention_work():
    case = OneChipCase("jax", sm_scale=1.0, soft_cap=2.0)
    (q, k_pages, v_pages, lengths, page_indices), expected = poisoned_arrays(case)
    output = page_attention(
        q,
        k_pages,
        v_pages,
        lengths,
        page_indices,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=2.0,
        pages_per_compute_block=2,
        megacore_mode=None,
        inline_seq_dim=True,
    )
    assert_close_to_oracle(case, expected, output)


def test_works_under_jit_with_traced_arrays():
    case = ONE_CHIP_CASES[0]
    arrays, expected = poisoned_arrays(case)
    assert_close_to_oracle(
        case, expected, jax.jit(lambda *x: page_attention(*x, **case.page_attention_options))(*arrays)
    )


def test_a_length_beyond_the_table_counts_as_a_full_table():
    case = OneChipCase("full", lengths=(32, 32))
    (q, k, v, _, tables), expected = poisoned_arrays(case)
    assert_close_to_oracle(
        case, expected, page_attention(q, k, v, np.array([33, 10**9], np.int32), tables, **case.page_attention_options)
    )


def test_a_sequence_does_not_depend_on_its_neighbours():
    case = OneChipCase("neighbours", S=40, lengths=(3, 320, 0))
    (q, k, v, lengths, tables), _ = poisoned_arrays(case)
    k, v = k[None], v[None]
    alone = [attend_pages_xla(q, k, v, np.where(np.arange(3) == b, lengths, 0), tables)[0][b] for b in range(3)]
    np.testing.assert_array_equal(attend_pages_xla(q, k, v, lengths, tables)[0], jnp.stack(alone))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_xla_form_copies_no_pool(dtype):
    """Neither gathered whole, nor (XLA's CPU back end, bf16) widened to f32 whole and lifted out of the loop."""
    case = OneChipCase("big", P=32, S=64, lengths=(2048,) * 8, dtype=dtype)
    (query, k, v, *rest), expected = poisoned_arrays(case)
    pools = in_stacked_pools(k, 128, layers=8), in_stacked_pools(v, 128, layers=8)

    def attend(q, k, v, n, t):
        return jax.lax.scan(
            lambda c, layer: (c, attend_pages_xla(q, k, v, n, t, layer, **case.options)), 0, jnp.array([1, 1])
        )[1]

    compiled = jax.jit(attend).lower(query, *pools, *rest).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < pools[0].nbytes // 8, "a layer of a pool is copied"
    output, lse = compiled(query, *pools, *rest)
    assert_close_to_oracle(case, expected, output[1], lse[1])


def test_xla_form_in_a_shard_map_that_checks_types():
    case = OneChipCase("sharded", Hq=4, Hkv=2, lengths=(3, 32, 0, 9), starts=(0, 11, 0, 8))
    (q, k, v, lengths, tables), expected = poisoned_arrays(case)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def shard(q, k, v, lengths, tables, starts):
        def attend(q, layer):
            return q, attend_pages_xla(q, k, v, lengths, tables, layer, starts=starts, **case.options)

        return jax.lax.scan(attend, q, jnp.arange(2))[1]

    # Sequences over data, heads over model; every data shard holds all pages here.
    output, lse = jax.jit(
        jax.shard_map(
            shard,
            mesh=mesh,
            check_vma=True,
            in_specs=(P("data", "model"), P(None, "model"), P(None, "model"), P("data"), P("data"), P("data")),
            out_specs=(P(None, "data", "model"),) * 2,
        )
    )(q, in_stacked_pools(k, 128, 2), in_stacked_pools(v, 128, 2), lengths, tables, np.array(case.starts, np.int32))
    assert_close_to_oracle(case, expected, output[1], lse[1])


_REFS = (
    "lengths_ref, page_indices_ref, buffer_index_ref, init_flag_ref, q_ref, k_pages_hbm_ref, v_pages_hbm_ref, o_ref, "
    "m_ref, l_ref, k_vmem_buffer, v_vmem_buffer, k_sems, v_sems, *, batch_size, pages_per_compute_block, "
    "pages_per_sequence, mask_value, attn_logits_soft_cap, megacore_mode, sliding_window=None"
)
_CACHE = "query, key_cache, value_cache, context_lens, block_tables, *"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("paged_flash_attention_kernel", f"{_REFS}, program_ids=()"),
        ("paged_flash_attention_kernel_inline_seq_dim", _REFS),
        (
            "ref_paged_attention",
            f"{_CACHE}, mask_value=DEFAULT, attn_logits_soft_cap=None, sliding_window=None",
        ),
        (
            "page_attention",
            f"{_CACHE}, sm_scale=1.0, mask_value=DEFAULT, attn_logits_soft_cap=None, sliding_window=None, "
            "pages_per_compute_block=None, megacore_mode=None, inline_seq_dim=True, interpret=None, "
            "key_scales=None, value_scales=None",
        ),
        (
            "MultiPageAsyncCopyDescriptor",
            "pages_hbm_ref, vmem_buffer, sem, block_tables, page_indices_start_offset, num_pages_to_load, head_index",
        ),
    ],
)
def test_arguments_are_those_that_others_call(name, arguments):
    """Code written for ejkernel's kernels moves over as is."""
    parameters = inspect.signature(getattr(kernels, name)).parameters.values()
    words, keyword_only = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        default = "DEFAULT" if p.name == "mask_value" and p.default is not p.empty else p.default
        words.append(p.name if p.default is p.empty else f"{p.name}={default}")
    assert ", ".join(words) == arguments
    assert -0.7 * float(np.finfo(np.float32).max) == kernels.DEFAULT_MASK_VALUE
