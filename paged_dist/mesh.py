"""The pod mesh: which devices lie along data, context and model."""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import AbstractMesh, Mesh

from paged_dist._errors import bad_value

AxisNames = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Which mesh axes play the three parts: each a name, a tuple of names (outermost first), or None.

    None (or an empty tuple) means that nothing is split that way, as an axis of size 1 does.
    """

    data: AxisNames = "data"  # sequences are split
    context: AxisNames = "context"  # the pages of one sequence are split
    model: AxisNames = "model"  # heads are split

    def names(self, part: str) -> tuple[str, ...]:
        """The mesh axes of `part` ('data', 'context' or 'model'), outermost first; empty for None."""
        axes = getattr(self, part)
        return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)

    @property
    def pages(self) -> tuple[str, ...]:
        """The mesh axes over which a pool's pages are split: data, then context."""
        return self.names("data") + self.names("context")

    def size(self, mesh: Mesh | AbstractMesh, part: str) -> int:
        """How many shards `part` has on `mesh`."""
        return math.prod(mesh.shape[name] for name in self.names(part))

    def check(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises ValueError where a name is no axis of `mesh`, or one axis plays two parts."""
        seen: dict[str, str] = {}
        for part in ("data", "context", "model"):
            for name in self.names(part):
                if name not in mesh.shape:
                    raise bad_value(f"axes.{part}", getattr(self, part), f"the mesh has axes {tuple(mesh.shape)}",
                                    f"name one of them, or pass MeshAxes({part}=None) where nothing is split so")
                if name in seen:
                    raise bad_value(f"axes.{part}", getattr(self, part), f"axis {name!r} is axes.{seen[name]} already",
                                    "one mesh axis plays one part")
                seen[name] = part
