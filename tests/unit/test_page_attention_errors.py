"""Bad input to paged attention: a ValueError that names the argument, its value and the rule, before compiling."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.paged_attention.quantization_utils import QuantizedTensor

from paged_dist.kernels import page_attention, ref_paged_attention
from paged_dist.kernels.attention.xla_form import attend_pages_xla
from paged_dist.kernels.seed.pallas_call import attend_pages_pallas


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of a call that works, by shape: B 4, Hq 4, Hkv 2, D 128, N 6, P 8, S 3."""

    query: tuple = (4, 4, 128)
    key: tuple = (2, 6, 8, 128)
    value: tuple = (2, 6, 8, 128)
    lens: tuple = (4,)
    tables: tuple = (4, 3)
    query_dtype: str = "float32"
    key_dtype: str = "float32"
    value_dtype: str = "float32"
    lens_dtype: str = "int32"
    tables_dtype: str = "int32"

    @property
    def arrays(self):
        return tuple(
            jax.ShapeDtypeStruct(getattr(self, n), getattr(self, f"{n}_dtype"))
            for n in ("query", "key", "value", "lens", "tables")
        )

    def trace(self, fn, **options):
        """Traces `fn`, compiling nothing, so that whatever it raises it raised before a compile."""
        return jax.eval_shape(lambda *x: fn(*x, **options), *self.arrays)


BAD_ARRAYS = {
    "query_rank": (dict(query=(4, 128)), "query.shape=(4, 128): must be [B, Hq, head_dim]"),
    "key_rank": (dict(key=(6, 8, 128)), "key_cache.shape=(6, 8, 128): must be [Hkv, N, page_size, head_dim]"),
    "value_rank": (dict(value=(1, 2, 6, 8, 128)), "value_cache.shape=(1, 2, 6, 8, 128): must be [Hkv, N,"),
    "value_shape": (dict(value=(2, 6, 16, 128)), "value_cache.shape=(2, 6, 16, 128): must equal key_cache.shape"),
    "head_dims_differ": (
        dict(query=(4, 4, 64)),
        "query.shape=(4, 4, 64): its head_dim 64 must be that of key_cache, 128",
    ),
    "head_dim": (
        dict(query=(4, 4, 96), key=(2, 6, 8, 96), value=(2, 6, 8, 96)),
        "query.shape=(4, 4, 96): head_dim 96 must be 64 or a multiple of 128",
    ),
    "heads": (dict(query=(4, 5, 128)), "query.shape=(4, 5, 128): its 5 heads must be a multiple of the 2 heads"),
    "page_size": (
        dict(key=(2, 6, 12, 128), value=(2, 6, 12, 128)),
        "key_cache.shape=(2, 6, 12, 128): page_size 12 must be a multiple of 8",
    ),
    "no_pages": (
        dict(key=(2, 0, 8, 128), value=(2, 0, 8, 128)),
        "key_cache.shape=(2, 0, 8, 128): every axis must be at least 1",
    ),
    "no_sequences": (dict(query=(0, 4, 128)), "query.shape=(0, 4, 128): every axis must be at least 1"),
    "lens_shape": (dict(lens=(3,)), "context_lens.shape=(3,): must be (4,), the batch of query"),
    "lens_rank": (dict(lens=(4, 1)), "context_lens.shape=(4, 1): must be (4,)"),
    "tables_rank": (dict(tables=(12,)), "block_tables.shape=(12,): must be (4, pages_per_sequence)"),
    "tables_batch": (dict(tables=(3, 4)), "block_tables.shape=(3, 4): must be (4, pages_per_sequence)"),
    "tables_empty": (dict(tables=(4, 0)), "block_tables.shape=(4, 0): must be (4, pages_per_sequence), at least one"),
    "query_dtype": (dict(query_dtype="float16"), "query.dtype='float16': must be one of ('bfloat16', 'float32')"),
    "key_dtype": (
        dict(key_dtype="int8"),
        "key_cache.dtype='int8': must be one of ('bfloat16', 'float32'); int8 and fp8 pages need key_scales",
    ),
    "value_dtype": (dict(value_dtype="bfloat16"), "value_cache.dtype='bfloat16': must be that of key_cache, float32"),
    "lens_dtype": (dict(lens_dtype="float32"), "context_lens.dtype='float32': must be int32"),
    "tables_dtype": (dict(tables_dtype="uint32"), "block_tables.dtype='uint32': must be int32"),
}


@pytest.mark.parametrize("fn", [page_attention, ref_paged_attention], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_refused(fn, name):
    change, message = BAD_ARRAYS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        Call(**change).trace(fn)


ODD_HEADS = dict(query=(4, 3, 128), key=(3, 6, 8, 128), value=(3, 6, 8, 128))
ODD_BATCH = dict(query=(3, 4, 128), lens=(3,), tables=(3, 3))
BAD_OPTIONS = {
    "scale": ({}, dict(sm_scale=float("nan")), "sm_scale=nan: must be a finite number"),
    "scale_type": ({}, dict(sm_scale="one"), "sm_scale='one': must be a finite number"),
    "cap": ({}, dict(attn_logits_soft_cap=0.0), "attn_logits_soft_cap=0.0: must be None or a positive number"),
    "window": ({}, dict(sliding_window=0), "sliding_window=0: must be None or a whole number of tokens, at least 1"),
    "window_type": ({}, dict(sliding_window=2.5), "sliding_window=2.5: must be None or a whole number"),
    "mask": ({}, dict(mask_value=float("-inf")), "mask_value=-inf: must be a finite negative number"),
    "block": ({}, dict(pages_per_compute_block=0), "pages_per_compute_block=0: must be None or a whole number"),
    "page_over_vmem": (
        dict(key=(1, 6, 8192, 128), value=(1, 6, 8192, 128)),
        {},
        "page_size=8192: a block of one page needs 26017792 bytes of VMEM",
    ),
    "block_over_vmem": (
        dict(tables=(4, 4096)),
        dict(pages_per_compute_block=2048),
        # four buffers, K and V in f32, logits thrice, blocks of q, output, m and l
        f"pages_per_compute_block=2048: needs {2**25 + 2**24 + 3 * 2**19 + 2**16} bytes of VMEM, "
        f"of which there are {15 * 2**20}; 256 is the default here",
    ),
    "megacore": ({}, dict(megacore_mode="heads"), "megacore_mode='heads': must be one of (None, 'kv_head', 'batch')"),
    "megacore_odd_heads": (
        ODD_HEADS,
        dict(megacore_mode="kv_head"),
        "megacore_mode='kv_head': needs an even number of kv heads, not 3; None runs on one core",
    ),
    "megacore_odd_batch": (
        ODD_BATCH,
        dict(megacore_mode="batch"),
        "megacore_mode='batch': needs an even number of sequences, not 3",
    ),
    "megacore_one_core": (
        {},
        dict(megacore_mode="batch", interpret=pltpu.InterpretParams()),
        "megacore_mode='batch' simulates 2 cores; pass InterpretParams(num_cores_or_threads=2)",
    ),
    "interpret": ({}, dict(interpret="yes"), "interpret='yes': must be None, True, False or a pltpu.InterpretParams"),
    "smem": (
        dict(query=(256, 4, 128), lens=(256,), tables=(256, 1024)),
        {},
        f"block_tables.shape=(256, 1024): the table and context_lens need {2**20 + 1024 + 3 * 512} bytes of "
        f"SMEM, of which there are {2**20 - 2**13}; split the batch",
    ),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_outside_their_rule_are_refused(name):
    change, options, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        Call(**change).trace(page_attention, **options)


BESIDE_SCALES = [
    (dict(pages_per_compute_block=2), "pages_per_compute_block=2: must be None beside key_scales and value_scales"),
    (
        dict(megacore_mode="batch"),
        "megacore_mode='batch': must be None beside key_scales and value_scales, for another",
    ),
    (dict(inline_seq_dim=False), "inline_seq_dim=False: must be True beside key_scales and value_scales"),
    (dict(mask_value=1.0), "mask_value=1.0: must be a finite negative number"),
    (dict(attn_logits_soft_cap=-1.0), "attn_logits_soft_cap=-1.0: must be None or a positive number"),
]


@pytest.mark.parametrize(("options", "message"), BESIDE_SCALES, ids=[next(iter(x[0])) for x in BESIDE_SCALES])
def test_what_shapes_the_seed_s_kernels_is_refused_beside_scales(options, message):
    pages = dict(key=(2, 4, 32, 128), value=(2, 4, 32, 128), key_dtype="int8", value_dtype="int8")
    scales = jnp.ones((2, 4, 32))
    attend = lambda *x, **o: page_attention(*x, key_scales=scales, value_scales=scales, **o)
    assert Call(**pages).trace(attend, mask_value=-1.0).shape == (4, 4, 128)  # it changes no result
    with pytest.raises(ValueError, match=re.escape(message)):
        Call(**pages).trace(attend, **options)


def test_a_traced_option_is_refused_by_name():
    with pytest.raises(ValueError, match=r"sm_scale=.*must be a Python number.*static_argnames"):
        jax.eval_shape(lambda scale, *x: page_attention(*x, sm_scale=scale), 1.0, *Call().arrays)


def test_jax_quantized_tensor_is_sent_to_its_replacement():
    pages = QuantizedTensor(jnp.zeros((2, 6, 8, 128), jnp.int8), jnp.zeros((2, 6, 8, 1)))
    query, _, value, lens, tables = (jnp.zeros(a.shape, a.dtype) for a in Call().arrays)
    with pytest.raises(NotImplementedError, match=r"QuantizedTensor.*its weight.*127\.5 as key_scales"):
        page_attention(query, pages, value, lens, tables)


@pytest.mark.parametrize("fn", [attend_pages_xla, attend_pages_pallas], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(key=(2, 6, 8, 128)),
            "key_pages.shape=(2, 6, 8, 128): must be [L, Hkv, N, rows, lanes]; add a leading axis",
        ),
        (dict(key=(1, 2, 6, 8, 256), value=(1, 2, 6, 8, 256)), "key_pages.shape=(1, 2, 6, 8, 256): a row must hold"),
        (dict(key=(1, 2, 6, 8, 128), value=(1, 2, 6, 8, 128), lens=(5,)), "lengths.shape=(5,): must be (4,)"),
    ],
)
def test_stored_pools_that_do_not_fit_are_refused(fn, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Call(**change).trace(fn)


STORED = dict(key=(1, 2, 6, 8, 128), value=(1, 2, 6, 8, 128))


@pytest.mark.parametrize(
    "starts, message",
    [
        (np.zeros(5, np.int32), "starts.shape=(5,): must be (4,), the batch of query"),
        (np.zeros(4, np.float32), "starts.dtype='float32': must be int32"),
    ],
)
def test_starts_that_do_not_fit_are_refused(starts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Call(**STORED).trace(attend_pages_xla, starts=starts)


@pytest.mark.parametrize(
    "change, options, message",
    [
        (
            dict(query=(4, 4, 64), key=(1, 2, 6, 8, 64), value=(1, 2, 6, 8, 64)),
            {},
            "key_pages.shape=(1, 2, 6, 8, 64): the kernel takes rows of 128 lanes at head_dim 64",
        ),
        (
            dict(STORED, tables=(4, 300_000)),
            {},
            "block_tables.shape=(4, 300000): 1 of its rows need 1202176 bytes of SMEM",
        ),
        (STORED, dict(soft_cap=-1.0), "soft_cap=-1.0: must be None or a positive number"),
        (STORED, dict(megacore_mode="kv_head", interpret=pltpu.InterpretParams()), "simulates 2 cores"),
    ],
)
def test_a_launch_that_cannot_work_is_refused(change, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Call(**change).trace(attend_pages_pallas, **options)


def test_the_hosts_own_chip_without_megacore_is_refused(monkeypatch):
    """No TPU is at hand, so what `jax.devices()` answers on a v6e host is put in its place."""

    class V6e:
        platform, device_kind, num_cores = "tpu", "TPU v6 lite", 1

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [V6e])
    with pytest.raises(ValueError, match="megacore_mode='batch': the program is for a 'TPU v6 lite'"):
        Call().trace(page_attention, megacore_mode="batch")


def test_unknown_targets_and_cpus_are_not_refused():
    assert Call().trace(page_attention, megacore_mode="batch").shape == (4, 4, 128)
