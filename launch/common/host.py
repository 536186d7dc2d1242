"""The host on which a program runs: its memory, its accelerators, and the CPU devices simulated where it has none."""

from __future__ import annotations

import glob
import os
import re

from paged_dist.launch.common.run_program import UsageError
from paged_dist.launch.common.shared_flags import COORDINATOR, CPU_DEVICES, NUM_PROCESSES, PROCESS_ID

_DEVICE_COUNT = "--xla_force_host_platform_device_count"


def memory_bytes() -> int:
    """Bytes of memory that this host has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def start_tpu_compiler() -> None:
    """Makes ready for compiles for absent TPUs, and leaves a TPU of this host alone.

    Raises:
      UsageError: libtpu is not installed.
    """
    from paged_dist.mesh.topology import has_libtpu

    if not has_libtpu():
        raise UsageError("libtpu, the TPU compiler, is not installed: pip install 'paged-dist[tpu]'")
    simulate_devices(1, many_processes=False)


def choose_platform(count: int | None = None) -> None:
    """Makes JAX use CPU devices where they are asked for, or where this host has no accelerator.

    An installed libtpu then does not look for a TPU that is not there.

    Args:
      count: CPU devices that are asked for; None: as --cpu_devices says.
    """
    count = CPU_DEVICES.value if count is None else count
    if count is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"
    elif not has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def is_lone_cpu_host() -> bool:
    """Whether this is one process on a host without accelerators, as far as flags and environment say."""
    given = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, CPU_DEVICES.value) != (None,) * 4
    from paged_dist._compat import detect_cluster

    if given or "JAX_NUM_PROCESSES" in os.environ or has_accelerator():
        return False
    found = detect_cluster(1)
    return found is None or found[2] == 1


def has_accelerator() -> bool:
    """Whether this host has a TPU or a GPU, by its device files; JAX is not asked, for it would start them."""
    from paged_dist.mesh.topology import has_tpu_chips

    return has_tpu_chips() or any(glob.glob(p) for p in ("/dev/nvidia[0-9]*", "/dev/kfd"))


def simulate_devices(count: int | None, many_processes: bool) -> None:
    """Sets the environment and JAX's options for `count` simulated CPU devices; JAX must not have started any device.

    Args:
      count: how many; None: 8 in a run of one process, else as the environment says.
      many_processes: whether the run has several processes.
    """
    choose_platform(count)
    if count is None and not many_processes:
        count = 8
        if _DEVICE_COUNT in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
            return
    if count is not None:
        others = re.sub(rf"{_DEVICE_COUNT}=\S*", "", os.environ.get("XLA_FLAGS", ""))
        os.environ["XLA_FLAGS"] = f"{others} {_DEVICE_COUNT}={count}".strip()
        os.environ.pop("JAX_NUM_CPU_DEVICES", None)  # it would win
    import jax

    # pyrefly: ignore[missing-attribute]  # jax gives its options to `config` as attributes when it is imported
    if count is not None and jax.config.jax_num_cpu_devices != -1:
        jax.config.update("jax_num_cpu_devices", -1)  # `import jax` has read the environment's before

    # `import jax` reads JAX_PLATFORMS, and may have come before us.
    if os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
