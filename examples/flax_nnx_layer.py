"""The decoder layer of `plain_jax_layer.py` as Flax NNX modules: the same shardings, as metadata of the parameters.

    python examples/flax_nnx_layer.py

The cache is an argument and a result, not part of the module, so that the jitted step can donate it. B rows, E width,
Hq and Hkv heads of D channels, F hidden channels of the MLP, L layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import paged_dist as pd


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 256
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 128
    hidden: int = 1024
    num_layers: int = 2
    dtype: str = "bfloat16"


SEQUENCE = ("model", "context")  # the chips that share a sequence


def rotary(x, positions):
    """x: [B, H, D], each row turned by its position (Su et al., 2021), channel i with channel i + D / 2."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)  # [B, 1, D / 2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class DecoderLayer(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        options = lambda *split: dict(
            use_bias=False,
            dtype=c.dtype,
            param_dtype=c.dtype,
            kernel_metadata={"out_sharding": split},
            rngs=rngs,
        )
        norm = functools.partial(nnx.RMSNorm, c.width, dtype=c.dtype, param_dtype=c.dtype, rngs=rngs)
        self.attention_norm = norm()
        self.wq = nnx.LinearGeneral(c.width, (c.num_q_heads, c.head_dim), **options(None, "model", None))
        self.wk = nnx.LinearGeneral(c.width, (c.num_kv_heads, c.head_dim), **options(None, "model", None))
        self.wv = nnx.LinearGeneral(c.width, (c.num_kv_heads, c.head_dim), **options(None, "model", None))
        self.wo = nnx.LinearGeneral(
            (c.num_q_heads, c.head_dim), c.width, axis=(-2, -1), **options(SEQUENCE, None, None)
        )
        self.mlp_norm = norm()
        self.gate = nnx.Linear(c.width, c.hidden, **options(None, SEQUENCE))
        self.up = nnx.Linear(c.width, c.hidden, **options(None, SEQUENCE))
        self.down = nnx.Linear(c.hidden, c.width, **options(SEQUENCE, None))

    def __call__(self, x, cache, positions, lengths, block_tables, layer):
        """One new token a row. Returns (x, cache).

        x: [B, E]; positions: [B], of the new tokens, -1 in a row without one, which writes nothing.
        """
        y = self.attention_norm(x)
        query, key, value = self.wq(y), self.wk(y), self.wv(y)  # [B, Hq or Hkv, D], heads over model
        query, key = rotary(query, positions), rotary(key, positions)
        cache = pd.append_kv(cache, key, value, positions, block_tables, layer=layer)
        out = pd.sharded_paged_attention(
            query,
            cache,
            lengths,
            block_tables,
            layer=layer,
            sm_scale=cache.spec.head_dim**-0.5,
            output_heads="scattered",
        )  # [B, Hq, D], heads over model x context
        x = x + self.wo(out)  # each chip's heads, summed over model x context

        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y)), cache  # summed over model x context


def stacked_layers(c: Config, seed: int = 0) -> DecoderLayer:
    """L layers in one module: each parameter has a leading axis L, which no mesh axis splits.

    Under `jax.set_mesh(mesh)` each parameter is made in its shards.
    """
    make = nnx.vmap(DecoderLayer, in_axes=(None, 0), transform_metadata={nnx.PARTITION_NAME: None})
    return make(c, nnx.Rngs(seed).split(c.num_layers))


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")  # the cache is written in place
def decode_step(graph, params, x, cache, positions, lengths, block_tables):
    """One new token a row through all layers. graph, params: `nnx.split` of the stacked layers. Returns (x, cache).

    A scan over the parameters, which a decode step only reads. `nnx.scan` would return them too.
    """

    def body(carry, layer_and_params):
        layer, own = layer_and_params
        return nnx.merge(graph, own)(*carry, positions, lengths, block_tables, layer), None

    return jax.lax.scan(body, (x, cache), (jnp.arange(cache.spec.num_layers), params))[0]


def put_rows(mesh, array):
    """A NumPy array [B, ...], the same on every process, as a global array whose rows are split over data.

    Each process fills its own devices. `jax.device_put` would first compare the array across all processes, each step.
    """
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P("data")), lambda index: array[index])


def main(steps: int = 4, model_parallelism: int = 4):
    c = Config()
    mesh = pd.make_pod_mesh(num_kv_heads=c.num_kv_heads, model_parallelism=model_parallelism)  # model 2 x context 2
    rows = 4 * mesh.shape["data"]
    spec = pd.CacheSpec(c.num_kv_heads, c.head_dim, num_pages=16 * rows, num_layers=c.num_layers)
    with jax.set_mesh(mesh):
        graph, params = nnx.split(stacked_layers(c))
    cache = pd.PagedKVCache.create(spec, mesh)
    pages = pd.PageAllocator(spec, mesh, num_sequences=rows, pages_per_sequence=8)
    put = functools.partial(put_rows, mesh)
    for row in range(rows):
        pages.allocate(row, 0)
    embedded = np.random.default_rng(0).standard_normal((steps, rows, c.width))  # in place of an embedding's rows
    for step in range(steps):
        inputs = (pages.grow_all(range(rows)), pages.lengths, pages.block_tables)
        x, cache = decode_step(graph, params, put(embedded[step].astype(c.dtype)), cache, *map(put, inputs))
        print(
            f"step {step}: {x.shape} {x.dtype}, root mean square {jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2)):.3f}"
        )
    return x


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
