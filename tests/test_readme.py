"""The README's code runs as printed."""

from __future__ import annotations

import pathlib
import re

import jax.numpy as jnp
import numpy as np
from aot import needs_libtpu

import paged_dist as pd
from paged_dist.kernels.paged_attention.oracle import attention_oracle

README = pathlib.Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.S | re.M)


def test_the_layer_of_the_readme_decodes():
    code, _ = blocks("python")
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    spec, cache, pages, step = (names[n] for n in ("spec", "cache", "pages", "decode_step"))
    assert dict(names["mesh"].shape) == {"data": 2, "context": 1, "model": 4}

    rng = np.random.default_rng(0)
    width, q_heads = 64, 16
    sizes = dict(wq=(width, q_heads * 128), wk=(width, 8 * 128), wv=(width, 8 * 128), wo=(q_heads * 128, width))
    params = {k: jnp.asarray(rng.standard_normal(v) / 8, jnp.float32) for k, v in sizes.items()}
    rows = [0, 3, 15]
    for row in rows:
        pages.allocate(row, 0)
    seen = []
    for _ in range(3):
        for row in rows:
            pages.grow(row)
        x = jnp.asarray(rng.standard_normal((16, width)), jnp.float32)
        seen.append(x)
        out, cache = step(params, x, cache, jnp.asarray(pages.lengths), jnp.asarray(pages.block_tables), jnp.int32(1))

    np.testing.assert_array_equal(np.delete(np.asarray(out - x), rows, axis=0), 0)  # idle rows: nothing is added
    heads = lambda name: np.stack([(t @ params[name]).reshape(16, -1, 128) for t in seen], axis=2)  # [B, H, T, D]
    key, value = (heads(n).astype(jnp.bfloat16).swapaxes(0, 1) for n in ("wk", "wv"))  # a page of 3 tokens a row
    query = np.asarray(seen[-1] @ params["wq"]).reshape(16, q_heads, 128)
    attended, _ = attention_oracle(
        query, key, value, np.full(16, 3), np.arange(16)[:, None], sm_scale=spec.head_dim**-0.5
    )
    expected = attended.reshape(16, -1) @ np.asarray(params["wo"], np.float64)
    np.testing.assert_allclose(np.asarray(out - x)[rows], expected[rows], rtol=1e-3, atol=1e-3)


def test_the_whole_layer_of_the_readme_is_that_of_the_example():
    _, layer = blocks("python")
    assert layer.startswith("def decoder_layer(")
    assert layer in (README.parent / "examples" / "plain_jax_layer.py").read_text()  # which test_layers.py runs


@needs_libtpu
def test_the_described_mesh_of_the_readme_is_what_is_printed():
    (printed,) = (block for block in re.findall(r"^```\n(mesh: .*?)^```", README.read_text(), flags=re.S | re.M))
    mesh = pd.make_pod_mesh(num_kv_heads=8, model_parallelism=32, topology="v5p:4x4x8", num_slices=2)
    spec = pd.CacheSpec(8, 128, 8192, num_layers=32)
    text = pd.describe_mesh(mesh, spec, num_q_heads=64, batch=128, output_heads="scattered")
    assert printed.split() == text.split()  # in the README one line is broken in two
