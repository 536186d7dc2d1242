"""The weights of a planned step: the matrices of all its layers, their shapes, and how the mesh splits them."""

from __future__ import annotations

import math
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from paged_dist.kernels.tiling import LANES
from paged_dist.launch.planning.pod_settings import PodSettings

_SEQUENCE = ("model", "context")  # the chips that share a sequence


class Weight(NamedTuple):
    """One matrix of all layers: its shape, and the mesh axes over which each of its axes is split."""

    shape: tuple[int, ...]
    split: tuple[str | tuple[str, ...] | None, ...]


def output_heads(s: PodSettings, mesh: Mesh | AbstractMesh) -> str:
    """`output_heads` of the step's `sharded_paged_attention`: how it leaves the heads of its output.

    'scattered' before a projection that is split over model x context, where the heads divide over both.
    """
    divides = s.num_q_heads % (mesh.shape["model"] * mesh.shape["context"]) == 0
    return "scattered" if s.width and divides else "replicated"


def weights_of_step(s: PodSettings, mesh: Mesh | AbstractMesh) -> dict[str, Weight]:
    """The weights that the step takes, in the order of its arguments; none without width. Split as in README's layer.

    The projections before attention lie on every context shard, each of which needs all heads of its model shard. The
    one behind it is split over model x context where the heads divide over both, the MLP always.

    All are [layers, width, n, lanes], wo and w_down too, the hidden width in rows of 128 where each device has whole
    ones: of [layers, n, width] in a loop over layers XLA makes a copy in other tiles, in every step, for v7x.
    """
    if not s.width:
        return {}
    layers, width, d = s.num_layers, s.width, s.head_dim
    heads = {"wq": s.num_q_heads, "wk": s.num_kv_heads, "wv": s.num_kv_heads}
    found = {name: Weight((layers, width, n, d), (None, None, "model", None)) for name, n in heads.items()}
    over = _SEQUENCE if output_heads(s, mesh) == "scattered" else "model"
    found["wo"] = Weight((layers, width, s.num_q_heads, d), (None, None, over, None))
    if s.mlp_width:
        parts = math.prod(mesh.shape[name] for name in _SEQUENCE)
        rows = (s.mlp_width // LANES, LANES) if s.mlp_width % (parts * LANES) == 0 else (s.mlp_width,)
        mlp = Weight((layers, width, *rows), (None, None, _SEQUENCE, None)[: 2 + len(rows)])
        found |= {"w_gate": mlp, "w_up": mlp, "w_down": mlp}
    return found


def weights_bytes(s: PodSettings, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of the weights on each device, in the dtype of the step's inputs."""
    itemsize = 4 if s.dtype == "float32" else 2
    return sum(itemsize * math.prod(shape) for shape in weight_shards(s, mesh))


def weight_shards(s: PodSettings, mesh: Mesh | AbstractMesh) -> list[tuple[int, ...]]:
    """The shape of each weight on a device, in the step's order."""
    over = lambda axes: math.prod(mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes or ()))
    return [tuple(n // over(axes) for n, axes in zip(*w, strict=True)) for w in weights_of_step(s, mesh).values()]
