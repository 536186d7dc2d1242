"""A decoder layer of a pod model in plain JAX: paged attention, projections split over (model, context).

    python examples/plain_jax_layer.py

runs some decode steps on the attached devices (four or more), or on eight simulated devices where the host has no
accelerator.

Arrays are global. `WEIGHTS` gives the shardings of the weights, `paged_dist` those of the cache, and jit does the rest.
What the mesh axes split:

    data      rows of the batch. Nothing is sent over it, so on several slices nothing crosses DCN.
    model     KV heads, with their query heads: wq, wk, wv, and the cache.
    context   the pages of each sequence. Attention returns a part of the heads to each context shard
              (output_heads="scattered"): wo and the MLP are split over model x context, the chips of a sequence.

B rows, E width, Hq and Hkv heads of D channels, F hidden channels of the MLP, L layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
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

# Name: (axes, how they are split). wq, wk and wv are whole on every context shard, which needs all heads of its model
# shard. Splitting them over context too would take an all-gather of query, key and value.
WEIGHTS = {
    "attention_norm": ("L E", P(None, None)),
    "wq": ("L E Hq D", P(None, None, "model", None)),
    "wk": ("L E Hkv D", P(None, None, "model", None)),
    "wv": ("L E Hkv D", P(None, None, "model", None)),
    "wo": ("L Hq D E", P(None, SEQUENCE, None, None)),
    "mlp_norm": ("L E", P(None, None)),
    "w_gate": ("L E F", P(None, None, SEQUENCE)),
    "w_up": ("L E F", P(None, None, SEQUENCE)),
    "w_down": ("L F E", P(None, SEQUENCE, None)),
}


def abstract_weights(c: Config, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the weights: to load a checkpoint into, or to compile for an absent pod."""
    sizes = dict(L=c.num_layers, E=c.width, Hq=c.num_q_heads, Hkv=c.num_kv_heads, D=c.head_dim, F=c.hidden)
    return {
        name: jax.ShapeDtypeStruct([sizes[a] for a in dims.split()], c.dtype, sharding=NamedSharding(mesh, split))
        for name, (dims, split) in WEIGHTS.items()
    }


def init_weights(c: Config, mesh, seed: int = 0) -> dict[str, jax.Array]:
    """Random weights, made in their shards; norms are ones."""

    def make(key):
        made = {}
        for (name, a), k in zip(abstract.items(), jax.random.split(key, len(abstract)), strict=True):
            inputs = a.shape[1] * (a.shape[2] if name == "wo" else 1)
            noise = jax.random.normal(k, a.shape, jnp.float32) * inputs**-0.5
            made[name] = (jnp.ones(a.shape) if name.endswith("norm") else noise).astype(a.dtype)
        return made

    abstract = abstract_weights(c, mesh)
    return jax.jit(make, out_shardings=jax.tree.map(lambda a: a.sharding, abstract))(jax.random.key(seed))


def rms_norm(x, scale):
    """x: [B, E], scale: [E]."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype) * scale


def rotary(x, positions):
    """x: [B, H, D], each row turned by its position (Su et al., 2021), channel i with channel i + D / 2."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)  # [B, 1, D / 2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def decoder_layer(w, x, cache, positions, lengths, block_tables, layer):
    """One new token a row through one layer. Returns (x, cache).

    w: this layer's weights; x: [B, E]; positions: [B], of the new tokens, -1 for a row without one: it writes none.
    """
    y = rms_norm(x, w["attention_norm"])
    query, key, value = (jnp.einsum("be,ehd->bhd", y, w[name]) for name in ("wq", "wk", "wv"))  # heads over model
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
    x = x + jnp.einsum("bhd,hde->be", out, w["wo"])  # each chip's heads, summed over model x context

    y = rms_norm(x, w["mlp_norm"])
    hidden = jax.nn.silu(y @ w["w_gate"]) * (y @ w["w_up"])  # [B, F], F over model x context
    return x + hidden @ w["w_down"], cache  # summed over model x context


@functools.partial(jax.jit, donate_argnames="cache")  # the cache is written in place
def decode_step(weights, x, cache, positions, lengths, block_tables):
    """One new token a row through all layers, in a scan over the stacked weights. Returns (x, cache)."""

    def body(carry, layer_and_weights):
        layer, w = layer_and_weights
        return decoder_layer(w, *carry, positions, lengths, block_tables, layer), None

    return jax.lax.scan(body, (x, cache), (jnp.arange(cache.spec.num_layers), weights))[0]


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
    print(pd.describe_mesh(mesh, spec, num_q_heads=c.num_q_heads, batch=rows, output_heads="scattered"))

    weights = init_weights(c, mesh)
    cache = pd.PagedKVCache.create(spec, mesh)
    pages = pd.PageAllocator(spec, mesh, num_sequences=rows, pages_per_sequence=8)
    put = functools.partial(put_rows, mesh)
    for row in range(rows):
        pages.allocate(row, 0)
    embedded = np.random.default_rng(0).standard_normal((steps, rows, c.width))  # in place of an embedding's rows
    for step in range(steps):
        inputs = (pages.grow_all(range(rows)), pages.lengths, pages.block_tables)
        x, cache = decode_step(weights, put(embedded[step].astype(c.dtype)), cache, *map(put, inputs))
        print(
            f"step {step}: {x.shape} {x.dtype}, root mean square {jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2)):.3f}"
        )
    return x


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
