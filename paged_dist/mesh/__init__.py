"""The device mesh of a pod: its axes, their placement on the torus, and topologies of pods that are not attached."""

from paged_dist.mesh.axes import MeshAxes
from paged_dist.mesh.pod_mesh import make_pod_mesh

__all__ = ["MeshAxes", "make_pod_mesh"]
