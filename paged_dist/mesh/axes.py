"""`MeshAxes`: which mesh axes split the sequences (data), the pages of one sequence (context), the heads (model)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh

from paged_dist._errors import bad_value

AXIS_NAMES = ("data", "context", "model")  # of `make_pod_mesh`, outermost first
AxisNames = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Which axes of a mesh play the three parts: data, context and model.

    Each part is played by an axis (its name), by several (a tuple of names, outermost first), or by none. None, or an
    empty tuple, means that nothing is split that way, as an axis of size 1 does.

    Attributes:
      data: splits the sequences of a batch.
      context: splits the pages of one sequence.
      model: splits the heads.

    Example:
      >>> mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("replica", "tensor"))
      >>> axes = pd.MeshAxes(data="replica", context=None, model="tensor")
      >>> [axes.size(mesh, part) for part in ("data", "context", "model")]
      [2, 1, 4]
      >>> cache = pd.PagedKVCache.create(pd.CacheSpec(num_kv_heads=4, head_dim=128, num_pages=16), mesh, axes=axes)
      >>> cache.key_pages.sharding.shard_shape(cache.key_pages.shape)  # a head and 8 pages on each device
      (1, 8, 128, 128)
    """

    data: AxisNames = "data"
    context: AxisNames = "context"
    model: AxisNames = "model"

    def __post_init__(self) -> None:
        for part in ("data", "context", "model"):
            names = getattr(self, part)
            if isinstance(names, list):
                object.__setattr__(self, part, names := tuple(names))
            if not (
                names is None
                or isinstance(names, str)
                or (isinstance(names, tuple) and all(isinstance(n, str) for n in names))
            ):
                raise bad_value(f"axes.{part}", names, "must be a mesh axis's name, a tuple of names, or None")

    def names(self, part: str) -> tuple[str, ...]:
        """The mesh axes of `part` ('data', 'context' or 'model'), outermost first; empty for None."""
        axes = getattr(self, part)
        return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)

    @property
    def pages(self) -> tuple[str, ...]:
        """The mesh axes over which a pool's pages are split: data, then context."""
        return self.names("data") + self.names("context")

    def size(self, mesh: Mesh | AbstractMesh, part: str) -> int:
        """The number of shards of `part` on `mesh`. Raises ValueError, as `check`, for a name that `mesh` has not."""
        if not set(self.names(part)) <= set(mesh.axis_names):
            self.check(mesh.axis_names)
        return math.prod(mesh.shape[name] for name in self.names(part))

    def check(self, mesh_axes: Sequence[str], have: str = "the mesh has axes", works: str | None = None) -> None:
        """Raises ValueError where a name is none of `mesh_axes`, or one axis plays two parts.

        `have` and `works` are the error's words for `mesh_axes` and for what would do.
        """
        works = works or f"say which axis does what, for example axes={_example(tuple(mesh_axes))}"
        seen: dict[str, str] = {}
        for part in ("data", "context", "model"):
            for name in self.names(part):
                if name not in mesh_axes:
                    raise bad_value(
                        f"axes.{part}",
                        getattr(self, part),
                        f"{have} {tuple(mesh_axes)}",
                        f"{works}; MeshAxes({part}=None) where nothing is split so",
                    )
                if name in seen:
                    raise bad_value(
                        f"axes.{part}",
                        getattr(self, part),
                        f"axis {name!r} is axes.{seen[name]} already",
                        "one mesh axis plays one part",
                    )
                seen[name] = part


def _example(names: tuple[str, ...]) -> MeshAxes:
    """A MeshAxes of a mesh with axes `names`, outermost first as `make_pod_mesh` has them."""
    if len(names) < 2:
        return MeshAxes(None, None, names[0] if names else None)
    return MeshAxes(names[0], names[1] if len(names) > 2 else None, names[-1])
