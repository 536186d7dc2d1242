"""The collectives of one attention call, from shapes alone: what each device sends, before anything is compiled."""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import AbstractMesh, Mesh

from paged_dist._errors import require, whole_number
from paged_dist.cache import CacheSpec
from paged_dist.kernels.attention.checks import MAX_QUERIES
from paged_dist.mesh import MeshAxes

OUTPUT_HEADS = ("replicated", "scattered")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of an attention call, as each device sees it.

    Attributes:
      kind: 'all-reduce' or 'reduce-scatter', as in a compiled program's text.
      reduction: 'max' or 'sum'.
      axes: the mesh axes that it runs over, outermost first; devices that differ on others exchange nothing.
      group: devices that take part in each, the product of the axes' sizes.
      shapes: the arrays that each device puts in, all f32.
    """

    kind: str
    reduction: str
    axes: tuple[str, ...]
    group: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def bytes(self) -> int:
        """Bytes that each device puts in."""
        return 4 * sum(map(math.prod, self.shapes))

    @property
    def bytes_sent(self) -> int:
        """Bytes that each device sends where the devices form a ring, the least that any algorithm sends."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (self.group - 1) // self.group


def attention_collectives(
    spec: CacheSpec,
    mesh: Mesh | AbstractMesh,
    batch: int,
    num_q_heads: int,
    *,
    num_query_tokens: int = 1,
    output_heads: str = "replicated",
    axes: MeshAxes = MeshAxes(),
) -> tuple[Collective, ...]:
    """The collectives of one call of `sharded_paged_attention`, in their order; none where context is 1.

    Each context shard attends to its own pages of a sequence. The results are merged by a maximum of the log-sum-exps
    and a sum of the outputs and weights. Nothing else crosses a link, and writes have no collective.

    Args:
      spec: the cache's.
      mesh: only its sizes are read.
      batch: B, rows of the query over all data shards.
      num_q_heads: Hq.
      num_query_tokens: Q, query tokens a row, up to 16. 1 stands for a query [B, Hq, D].
      output_heads: as in `sharded_paged_attention`: 'scattered' makes the sum a reduce-scatter over heads.
      axes: which mesh axes play the three parts.

    Returns:
      A maximum of [B / data, Hq / model] and a sum of [B / data, Hq / model, D] and [B / data, Hq / model], with an
      axis Q before the heads where Q > 1; f32, over the context axes alone. Scattered, the sum of the outputs is a
      reduce-scatter and that of the weights one of its own; XLA for TPU makes an all-reduce of both where a device
      would be left with 4 KiB of output or less.

    Raises:
      ValueError: sizes that do not divide over the mesh.

    Example:
      >>> from paged_dist.collectives import attention_collectives
      >>> mesh = pd.make_pod_mesh(num_kv_heads=2, model_parallelism=4)  # data 2 x context 2 x model 2
      >>> spec = pd.CacheSpec(num_kv_heads=2, head_dim=128, num_pages=16)
      >>> for each in attention_collectives(spec, mesh, batch=4, num_q_heads=8):
      ...     print(each.kind, each.reduction, each.axes, each.shapes, each.bytes)
      all-reduce max ('context',) ((2, 4),) 32
      all-reduce sum ('context',) ((2, 4, 128), (2, 4)) 4128
    """
    spec.check_mesh(mesh, axes)
    data, context, model = (axes.size(mesh, part) for part in ("data", "context", "model"))
    for name, size in (("batch", batch), ("num_q_heads", num_q_heads), ("num_query_tokens", num_query_tokens)):
        whole_number(name, size, at_least=1)
    require(num_query_tokens <= MAX_QUERIES, "num_query_tokens", num_query_tokens, f"must be at most {MAX_QUERIES}")
    up = lambda size, multiple: f"{-(-size // multiple) * multiple} works"
    require(
        batch % data == 0, "batch", batch, f"must be a multiple of the mesh's data size {data}", up(batch, data)
    )  # fmt: skip
    require(
        num_q_heads % spec.num_kv_heads == 0,
        "num_q_heads",
        num_q_heads,
        f"must be a multiple of the cache's {spec.num_kv_heads} kv heads",
        up(num_q_heads, spec.num_kv_heads),
    )
    heads = num_q_heads // model
    check_output_heads(output_heads, heads, context)
    if context == 1:
        return ()
    rows = (batch // data,) if num_query_tokens == 1 else (batch // data, num_query_tokens)
    collective = lambda kind, reduction, *shapes: Collective(kind, reduction, axes.names("context"), context, shapes)
    weights, output = (*rows, heads), (*rows, heads, spec.head_dim)
    top = collective("all-reduce", "max", weights)
    if output_heads == "replicated":
        return top, collective("all-reduce", "sum", output, weights)
    return top, collective("reduce-scatter", "sum", output), collective("all-reduce", "sum", weights)


def check_output_heads(output_heads: str, heads: int, context: int) -> None:
    """Raises ValueError unless `output_heads` is one of OUTPUT_HEADS that serves the `heads` of one model shard."""
    require(output_heads in OUTPUT_HEADS, "output_heads", output_heads, f"must be one of {OUTPUT_HEADS}")
    require(
        output_heads == "replicated" or heads % context == 0,
        "output_heads",
        output_heads,
        f"the {heads} query heads of a model shard must be a multiple of the {context} context shards",
        "'replicated' takes any",
    )
