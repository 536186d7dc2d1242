"""The README's code runs as printed."""

from __future__ import annotations

import pathlib
import re

import flagsaver
import jax.numpy as jnp
import numpy as np
from aot import needs_libtpu

import paged_dist as pd
from paged_dist.kernels.attention.oracle import attention_oracle
from paged_dist.launch import plan
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.planning.plan_record import plan_record
from paged_dist.launch.planning.plan_text import plan_table

README = pathlib.Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.S | re.M)


def test_the_layer_of_the_readme_decodes():
    code, *_ = blocks("python")
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
        positions = jnp.asarray(pages.grow_all(rows))
        x = jnp.asarray(rng.standard_normal((16, width)), jnp.float32)
        seen.append(x)
        tables = jnp.asarray(pages.block_tables)
        out, cache = step(params, x, cache, positions, jnp.asarray(pages.lengths), tables, jnp.int32(1))

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
    _, layer, *_ = blocks("python")
    assert layer.startswith("def decoder_layer(")
    assert layer in (README.parent / "examples" / "plain_jax_layer.py").read_text()  # which test_layers.py runs


def test_the_pages_of_the_readme_are_shared_moved_and_saved(tmp_path):
    *_, sharing, moving = (compile(code, str(README), "exec") for code in blocks("python"))
    mesh = pd.make_pod_mesh(data=2, context=2, model=2)
    spec = pd.CacheSpec(2, 128, 32, 64)
    new = np.random.default_rng(0).standard_normal((2, 4, 2, 128)).astype(np.float32)
    names = dict(jnp=jnp, pd=pd, cache=pd.PagedKVCache.create(spec, mesh), key=new[0], value=new[1])
    names |= dict(pages=pd.PageAllocator(spec, mesh, num_sequences=4, pages_per_sequence=4), row=0, new_row=1)
    pages, token_ids = names["pages"], np.arange(150)
    pages.allocate(0, 70)
    prompt = np.random.default_rng(1).standard_normal((2, 1, 70, 2, 128)).astype(np.float32)
    starts = jnp.zeros(1, jnp.int32)
    names["cache"] = pd.write_prefill_kv(
        names["cache"], *prompt, jnp.array([70]), pages.block_tables, starts=starts, rows=[0]
    )
    exec(sharing, names | dict(rows=[0, 1], token_ids=token_ids), made := {})
    assert made["match"].num_tokens == 0  # nothing is cached yet, and then the prompt's full pages are
    assert pages.prefix_match(token_ids[:-1]).num_tokens == 128
    assert pages.lengths.tolist()[:2] == [71, 71]
    held = lambda cache, pages, row: [
        np.asarray(pool, np.float32)[:, pages.block_tables[row, t // 64], t % 64]
        for t in [np.arange(71)]
        for pool in cache.to_pages()
    ]

    names |= made | dict(num_pages=64, new_mesh=pd.make_pod_mesh(data=4, context=1, model=2), folder=tmp_path / "a")
    names |= dict(any_mesh=pd.make_pod_mesh(data=1, context=4, model=2))
    exec(moving, names)
    cache, pages = names["cache"], names["pages"]
    assert cache.spec.num_pages == 64 and dict(cache.mesh.shape) == dict(data=1, context=4, model=2)
    for row in (0, 1):  # the fork's own token follows the shared ones
        for got, shared, own in zip(held(cache, pages, row), prompt[:, 0], new[:, row], strict=True):
            expected = np.concatenate([shared, own[None]]).astype(jnp.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(got.swapaxes(0, 1), expected)


@needs_libtpu
def test_the_described_mesh_of_the_readme_is_what_is_printed():
    (printed,) = (block for block in re.findall(r"^```\n(mesh: .*?)^```", README.read_text(), flags=re.S | re.M))
    mesh = pd.make_pod_mesh(num_kv_heads=8, model_parallelism=32, topology="v5p:4x4x8", num_slices=2)
    spec = pd.CacheSpec(8, 128, 8192, num_layers=32)
    text = pd.describe_mesh(mesh, spec, num_q_heads=64, batch=128, output_heads="scattered")
    assert printed.split() == text.split()  # in the README one line is broken in two


@needs_libtpu
def test_the_plan_of_the_readme_is_what_is_printed():
    """But for what is another number with each version: times, sizes of programs, what the compiler gives kernels."""
    ((command, printed),) = re.findall(r"^```\n\$ \./run plan (.*?)\n(.*?)^```", README.read_text(), flags=re.S | re.M)
    with flagsaver.flagsaver():
        flags.FLAGS(["plan", *command.split()])
        text = plan_table(plan_record(plan.plan_settings()))

    def kept(lines):
        text = re.sub(r"^(versions|compile) .*\n( .*\n)*", "", lines + "\n", flags=re.M)
        return re.sub(r"[\d.]+ (KiB of|kB, program|MB\n)", r"\1", text).split()

    assert kept(text) == kept(printed.rstrip())
