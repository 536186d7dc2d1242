"""The two programs of the decode benchmark that are jitted: one decode step of all rows, and the writing of prompts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paged_dist import append_kv, sharded_paged_attention, write_prefill_kv
from paged_dist._compat import broadcasts
from paged_dist.launch.serving.synthetic import Kind, checksum_terms, input_dtype, keys_or_values, values


@dataclasses.dataclass(frozen=True)
class Model:
    """The model that the benchmark runs: attention alone, with logits q·k / sqrt(head_dim)."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # of the cache
    soft_cap: float | None = None
    sliding_window: int | None = None
    seed: int = 0

    @property
    def input_dtype(self) -> str:
        """The dtype of query, new keys and values, and output."""
        return input_dtype(self.dtype)

    @property
    def sm_scale(self) -> float:
        """1 / sqrt(head_dim)."""
        return self.head_dim**-0.5


def shardings(mesh: Mesh) -> dict[str, NamedSharding]:
    """The shardings of the programs' small arrays, by name."""
    specs = {
        "rows": P("data", None),  # [B, 3], [B, S], [data, 2]: split like the sequences
        "chunks": P(),  # [R, 4]: every shard sees every chunk, and writes those of its rows
        "tally": P("data", "model", None),
        "sample": P("data", "model", None),
    }
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def benchmark_step(model: Model, mesh: Mesh, implementation: str | None = None):
    """The benchmark's decode step, to jit with arguments 0 and 1 donated. Its only collectives merge context shards.

    `step(cache, tally, rows, block_tables, pick) -> (cache, tally, sample)` with
      cache: `PagedKVCache` of model.num_layers layers.
      tally: uint32 [data, model, 2], the checksum so far: a partial sum for each shard of rows and heads.
      rows: int32 [B, 3]: request id, position of the token to append (idle rows: -1), live tokens after that (0).
      block_tables: int32 [B, S].
      pick: int32 [data, 2]: for each data shard, the local row and the layer whose output is shown.
      sample: [data, Hq, D], the shown outputs.
    """
    at = shardings(mesh)
    pin = lax.with_sharding_constraint
    data, shards = mesh.shape["data"], mesh.shape["model"]
    q_heads, kv_heads = np.arange(model.num_q_heads), np.arange(model.num_kv_heads)
    channels = np.arange(model.head_dim)

    @broadcasts
    def step(cache, tally, rows, block_tables, pick):
        request, position, lengths = rows[:, 0], rows[:, 1], rows[:, 2]
        batch = rows.shape[0]

        def make(kind, heads, layer):
            where = model.seed, kind, request, position, layer, heads, channels
            if kind == Kind.QUERY:
                return pin(values(jnp, model.input_dtype, *where), at["tally"])
            return pin(keys_or_values(jnp, model.dtype, *where), at["tally"])

        def one_layer(carry, layer):
            cache, tally, sample = carry
            query = make(Kind.QUERY, q_heads, layer)  # [B, Hq, D]
            key, value = (make(kind, kv_heads, layer) for kind in (Kind.KEY, Kind.VALUE))  # [B, Hkv, D]
            cache = append_kv(
                cache, key, value, position, block_tables, layer=layer, mesh=mesh, implementation=implementation
            )
            output = sharded_paged_attention(
                query,
                cache,
                lengths,
                block_tables,
                layer=layer,
                sm_scale=model.sm_scale,
                soft_cap=model.soft_cap,
                sliding_window=model.sliding_window,
                mesh=mesh,
                implementation=implementation,
            )
            assert isinstance(output, jax.Array)  # not a pair, without return_lse
            tally += _partial_sums(model, output, request, position, layer, q_heads, channels, data, shards)
            by_shard = output.reshape(data, batch // data, model.num_q_heads, model.head_dim)
            chosen = jnp.arange(batch // data)[None, :] == pick[:, :1]  # [data, B / data]
            shown = jnp.where(chosen[..., None, None], by_shard, 0).sum(axis=1, dtype=output.dtype)
            sample = jnp.where((pick[:, 1] == layer)[:, None, None], shown, sample)
            return (cache, pin(tally, at["tally"]), pin(sample, at["sample"])), None

        sample = pin(jnp.zeros((data, model.num_q_heads, model.head_dim), model.input_dtype), at["sample"])
        carry, _ = lax.scan(one_layer, (cache, tally, sample), jnp.arange(model.num_layers, dtype=jnp.int32))
        return carry

    return step


def _partial_sums(model, output, request, position, layer, heads, channels, data, shards):
    """uint32 [data, model, 2]: checksum terms of the live rows, summed within each shard of rows and heads."""
    split = (data, -1, shards, model.num_q_heads // shards, model.head_dim)
    sums = []
    for kind in (Kind.CHECKSUM_LOW, Kind.CHECKSUM_HIGH):
        terms = checksum_terms(jnp, output, model.seed, kind, request, position, layer, heads, channels)
        terms = jnp.where(position[:, None, None] >= 0, terms, jnp.uint32(0))
        sums.append(terms.reshape(split).sum(axis=(1, 3, 4), dtype=jnp.uint32))
    return jnp.stack(sums, axis=-1)


def prefill_chunks(model: Model, mesh: Mesh, chunk_tokens: int, implementation: str | None = None):
    """The writing of prompts: a function to jit, argument 0 donated.

    `fill(cache, chunks, block_tables) -> cache`, with chunks int32 [R, 4]: request id, row (negative: writes
    nothing), first token position and one past the last, at most `chunk_tokens` apart. It writes all layers.
    """
    heads_split = NamedSharding(mesh, P(None, None, "model", None))
    kv_heads, channels = np.arange(model.num_kv_heads), np.arange(model.head_dim)

    @broadcasts
    def fill(cache, chunks, block_tables):
        request, row, start, stop = (chunks[:, i] for i in range(4))
        position = start[:, None] + jnp.arange(chunk_tokens, dtype=jnp.int32)  # [R, T]
        owner = jnp.broadcast_to(request[:, None], position.shape)

        def one_layer(cache, layer):
            key, value = (
                lax.with_sharding_constraint(
                    keys_or_values(jnp, model.dtype, model.seed, kind, owner, position, layer, kv_heads, channels),
                    heads_split,
                )
                for kind in (Kind.KEY, Kind.VALUE)
            )
            cache = write_prefill_kv(
                cache,
                key,
                value,
                stop,
                block_tables,
                starts=start,
                rows=row,
                layer=layer,
                mesh=mesh,
                implementation=implementation,
            )
            return cache, None

        return lax.scan(one_layer, cache, jnp.arange(model.num_layers, dtype=jnp.int32))[0]

    return fill
