"""The decode kernel's programs, compiled for one absent chip."""

import jax
import jax.numpy as jnp
from aot import compile_on, one_chip_mesh, values_as_large_as

from paged_dist.kernels import paged_decode_attention


def decode_shapes(
    B=32, Hq=32, Hkv=8, N=64, R=128, W=128, D=128, S=32, L=None, dtype="bfloat16", query_dtype="bfloat16"
):
    """(query, key_cache, value_cache, lengths, block_tables), by shape."""
    pool = jax.ShapeDtypeStruct((*(() if L is None else (L,)), Hkv, N, R, W), dtype)
    int32 = lambda *dims: jax.ShapeDtypeStruct((B, *dims), jnp.int32)
    return jax.ShapeDtypeStruct((B, Hq, D), query_dtype), pool, pool, int32(), int32(S)


def decode_program_text(chip, arrays, **options):
    """The compiled program, which holds no copy of a pool, nor as much temporary memory."""
    names = ("layer", "starts", "sinks", "key_scales", "value_scales")
    operands = {name: options.pop(name) for name in names if name in options}

    def run(*args):
        return paged_decode_attention(*args[:5], **dict(zip(operands, args[5:], strict=True)), **options)

    compiled = compile_on(one_chip_mesh(chip), run, *arrays, *operands.values())
    pool = arrays[1]
    layer = pool.size // (pool.shape[0] if pool.ndim == 5 else 1) * pool.dtype.itemsize
    assert values_as_large_as(compiled.as_text(), layer) == []
    assert compiled.memory_analysis().temp_size_in_bytes < max(layer, 4 << 20)
    return compiled.as_text()


def num_kernels(text: str) -> int:
    return text.count('custom_call_target="tpu_custom_call"')
