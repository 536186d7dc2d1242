"""What launch/platforms says, read for the tests."""

from __future__ import annotations

import re

import yaml
from repository import TREE

PLATFORMS = TREE / "launch" / "platforms"


def read_jobset() -> dict:
    (document,) = yaml.safe_load_all((PLATFORMS / "gke-jobset.yaml").read_text())
    return document


def slices_of(jobset) -> dict:
    """The replicated job: one job a slice."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated


def pod_spec_of(slices) -> dict:
    """The spec of the Kubernetes pods, one a host."""
    return slices["template"]["spec"]["template"]["spec"]


def container_of(pod_spec) -> dict:
    (only,) = pod_spec["containers"]
    return only


def slice_shape(pod_spec) -> list[int]:
    return [int(n) for n in pod_spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]


def flags_of_container(container) -> dict[str, str]:
    """Flag -> value in the container's arguments."""
    pairs = [re.fullmatch(r"--(\w+)=(.+)", argument).groups() for argument in container["args"]]
    assert len(dict(pairs)) == len(pairs), "a flag is given twice"
    return dict(pairs)


def mesh_sizes_of(container) -> dict[str, int]:
    return {axis: int(flags_of_container(container).get(axis, 1)) for axis in ("data", "context", "model")}
