"""Which physical axes of the torus each mesh axis runs over, read off the devices' coordinates."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from paged_dist._errors import bad_value
from paged_dist.mesh.devices import Place, place_of, slice_of


@dataclasses.dataclass(frozen=True)
class PhysicalRun:
    """The part of one physical axis that one mesh axis runs over, with the other mesh axes held still.

    Attributes:
      physical: 'slice', 'x', 'y', 'z' or 'core' on a TPU; 'process' or 'device' (of a process) elsewhere.
      count: positions it takes.
      size: positions the physical axis has in this mesh.
      stride: distance from one position to the next, the smallest where they differ; 1 means neighbours.
      regular: whether count and stride are the same everywhere in the mesh.
    """

    physical: str
    count: int
    size: int
    stride: int
    regular: bool

    @property
    def whole(self) -> bool:
        """Whether it takes every position of the physical axis."""
        return self.count == self.size


@dataclasses.dataclass(frozen=True)
class AxisFacts:
    """One mesh axis: its name, size, type ('Auto', 'Explicit', 'Manual') and where it runs; no runs at size 1."""

    name: str
    size: int
    type: str
    runs: tuple[PhysicalRun, ...]


@dataclasses.dataclass(frozen=True)
class MeshFacts:
    """Where a mesh's axes run: what `describe_mesh` puts in words.

    Attributes:
      axes: the mesh's axes, outermost first.
      device_kinds: (kind, how many devices), by name.
      num_devices, num_processes, num_slices: over the whole mesh.
      physical: (name, size) of each physical axis longer than 1; its size is the number of positions in use.
      has_coordinates: whether the devices know where they are on a torus.
      fills_box: whether there is a device at each position of the physical axes.
    """

    axes: tuple[AxisFacts, ...]
    platform: str
    device_kinds: tuple[tuple[str, int], ...]
    num_devices: int
    num_processes: int
    num_slices: int
    physical: tuple[tuple[str, int], ...]
    has_coordinates: bool
    fills_box: bool

    def sharers(self, physical: str) -> tuple[str, ...]:
        """The mesh axes that run over physical axis `physical`."""
        return tuple(axis.name for axis in self.axes if any(run.physical == physical for run in axis.runs))

    @property
    def split(self) -> tuple[str, ...]:
        """The physical axes that several mesh axes run over; none where devices have no coordinates."""
        return tuple(p for p, _ in self.physical if self.has_coordinates and len(self.sharers(p)) > 1)


def mesh_facts(mesh: Mesh) -> MeshFacts:
    """Where each axis of `mesh` runs, from its devices' coordinates alone: for any mesh, however it was built.

    Wraparound links are not in the coordinates, so nothing is said of them. Raises ValueError for an AbstractMesh.
    """
    if isinstance(mesh, AbstractMesh):
        raise bad_value("mesh", mesh, "is abstract: it has no devices to say anything of", "pass a jax.sharding.Mesh")
    devices = list(mesh.devices.flat)
    places = [place_of(d) for d in devices]
    has_coordinates = None not in places
    if has_coordinates:
        names, where = Place._fields, places
    else:
        names = ("process", "device")
        local: dict[int, list[int]] = collections.defaultdict(list)
        for d in sorted(devices, key=lambda d: d.id):
            local[d.process_index].append(d.id)
        ordinal = {(p, i): n for p, ids in local.items() for n, i in enumerate(ids)}
        where = [(d.process_index, ordinal[d.process_index, d.id]) for d in devices]
    coordinates = np.array(where, np.int64).reshape(*mesh.devices.shape, len(names))
    sizes = {name: len(np.unique(coordinates[..., i])) for i, name in enumerate(names)}
    physical = tuple((name, size) for name, size in sizes.items() if size > 1)
    axes = tuple(
        AxisFacts(
            name,
            mesh.shape[name],
            mesh.axis_types[k].name,
            tuple(
                run
                for i, p in enumerate(names)
                if sizes[p] > 1 and (run := _run(p, sizes[p], np.moveaxis(coordinates[..., i], k, -1))) is not None
            ),
        )
        for k, name in enumerate(mesh.axis_names)
    )
    kinds = collections.Counter(d.device_kind for d in devices)
    return MeshFacts(
        axes=axes,
        platform=devices[0].platform,
        device_kinds=tuple(sorted(kinds.items())),
        num_devices=len(devices),
        num_processes=len({d.process_index for d in devices}),
        num_slices=len({slice_of(d) for d in devices}),
        physical=physical,
        has_coordinates=has_coordinates,
        fills_box=int(np.prod([size for _, size in physical], dtype=np.int64)) == len(devices),
    )


def _run(physical: str, size: int, lines: np.ndarray) -> PhysicalRun | None:
    """How one mesh axis runs along the physical axis `physical` of `size` positions; None where it stays in place.

    lines: [..., S] of a mesh axis of size S: the position of each of its devices, with the other mesh axes held still.
    """
    steps = np.diff(np.sort(lines.reshape(-1, lines.shape[-1]), axis=-1), axis=-1)
    counts = 1 + (steps > 0).sum(axis=-1)
    if counts.max() == 1:
        return None
    strides = steps[steps > 0]
    return PhysicalRun(
        physical,
        int(counts.max()),
        size,
        int(strides.min()),
        bool((counts == counts[0]).all() and (strides == strides[0]).all()),
    )
