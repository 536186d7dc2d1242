"""Devices of a TPU pod that is not here, by topology name, for ahead-of-time compilation on any CPU host."""

from __future__ import annotations

import functools
import glob
import importlib.util
import os

import jax

from paged_dist._errors import bad_value

_EXAMPLES = "v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4"


def has_libtpu() -> bool:
    """Whether libtpu, the TPU compiler, is installed (`pip install "jax[tpu]"`)."""
    return importlib.util.find_spec("libtpu") is not None


# Device files of TPUs, and where Linux says which PCI device is behind one. Other devices have such files too: a
# network card that is given to user space, an NPU of another maker.
_DEVICE_FILES = (
    ("dev/accel[0-9]*", "sys/class/accel/{}/device"),
    ("dev/accel/accel[0-9]*", "sys/class/accel/{}/device"),
    ("dev/vfio/[0-9]*", "sys/kernel/iommu_groups/{}/devices/*"),
)
_GOOGLE = 0x1AE0
_NO_TPU = (0x01, 0x02)  # PCI classes of what Google makes too: storage, network


def has_tpu_chips(root: str = "/") -> bool:
    """Whether this host has TPU chips: a device file whose PCI device is a TPU of Google's.

    Where /sys does not say which device it is, as in a container without /sys, the file alone counts.
    """
    for files, behind in _DEVICE_FILES:
        for file in glob.glob(os.path.join(root, files)):
            found = glob.glob(os.path.join(root, behind.format(os.path.basename(file)), "vendor"))
            if not found or any(map(_is_tpu, found)):
                return True
    return False


def _is_tpu(vendor: str) -> bool:
    """Whether the PCI device of this `vendor` file is a TPU."""
    try:
        with open(vendor) as maker, open(os.path.join(os.path.dirname(vendor), "class")) as kind:
            return int(maker.read(), 16) == _GOOGLE and int(kind.read(), 16) >> 16 not in _NO_TPU
    except (OSError, ValueError):
        return True  # it does not say


def _keep_libtpu_offline() -> None:
    """Keeps libtpu from looking for a TPU or the cloud's metadata server on a host that has neither."""
    if has_tpu_chips():
        return
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process of this host may be compiling too
    }.items():
        os.environ.setdefault(name, value)


def topology_devices(topology: str, num_slices: int = 1) -> tuple[jax.Device, ...]:
    """The devices of an absent pod, in the order of its topology description. Every call returns the same objects.

    Args:
      topology: `platform:shape` as libtpu names it, e.g. `v5p:8x8x8`: the chips along each physical axis.
        One device is one chip, but on `tpu7x` one core (two a chip). v4 chips are taken as megacore. Hosts have
        2x2x1 chips; a slice of one chip, such as `v6e:1x1`, is a host of its own.
      num_slices: the number of slices of that shape, joined by the data-centre network. Programs compile as for real
        slices: what crosses the network becomes a send and a receive of libtpu's multi-slice runtime.

    Returns:
      A tuple of compile-only devices, slice by slice: programs can be lowered and compiled for them, not run.

    Raises:
      ValueError: libtpu does not know the topology.
      RuntimeError: libtpu is not installed.
    """
    return _described(topology, num_slices)


@functools.cache
def _described(topology: str, num_slices: int) -> tuple[jax.Device, ...]:
    """`topology_devices`, asked of libtpu once for each pod."""
    if not has_libtpu():
        raise RuntimeError(f"topology={topology!r} needs libtpu, the TPU compiler: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    _keep_libtpu_offline()
    options: dict = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if set(topology.partition(":")[2].split("x")) == {"1"}:  # libtpu of jax 0.10 takes hosts of 2x2x1 for granted
        options["chips_per_host_bounds"] = (1, 1, 1)
    if num_slices > 1:  # libtpu refuses a 1
        options["num_slices"] = num_slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as e:
        why = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise bad_value("topology", topology, f"libtpu refused it: {why}", f"name one as {_EXAMPLES}") from e
    return tuple(found.devices)
