"""The JobSet's slice is one that libtpu knows, as large as the JobSet says."""

from __future__ import annotations

from aot import needs_libtpu
from platform_files import (
    container_of,
    flags_of_container,
    mesh_sizes_of,
    pod_spec_of,
    read_jobset,
    slice_shape,
    slices_of,
)

from paged_dist import make_pod_mesh

# GKE's names: libtpu's, and the axes of a topology.
ACCELERATORS = {
    "tpu-v4-podslice": ("v4", 3),
    "tpu-v5-lite-podslice": ("v5e", 2),
    "tpu-v5p-slice": ("v5p", 3),
    "tpu-v6e-slice": ("v6e", 2),
}


@needs_libtpu
def test_jobset_is_what_libtpu_knows_that_slice_as():
    slices = slices_of(read_jobset())
    pod = pod_spec_of(slices)
    container = container_of(pod)
    generation, axes = ACCELERATORS[pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]]
    assert len(slice_shape(pod)) == axes
    shape = "x".join(map(str, slice_shape(pod)))
    heads = int(flags_of_container(container)["num_kv_heads"])
    mesh = make_pod_mesh(**mesh_sizes_of(container), num_kv_heads=heads, topology=f"{generation}:{shape}")
    hosts = [d.process_index for d in mesh.devices.flat]
    assert len(set(hosts)) == slices["template"]["spec"]["parallelism"]
    assert {hosts.count(h) for h in hosts} == {container["resources"]["limits"]["google.com/tpu"]}
