"""What a process knows of its run after start-up: which process it is, of how many, and how it was told."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DistributedInfo:
    """What `initialize_distributed` set up.

    Attributes:
      process_id: this process, 0 to num_processes - 1.
      num_processes: how many there are.
      coordinator_address: host:port of process 0's coordinator; None where there is one process without one.
      how: 'explicit' (arguments), 'detected:NAME' (a cluster that JAX knows, by its name for it: 'gcetpu', 'gketpu',
        'slurm', 'ompi', 'k8s'), or 'single' (nothing set and nothing found).
    """

    process_id: int
    num_processes: int
    coordinator_address: str | None
    how: str


def coordinator_of(info: DistributedInfo) -> str:
    """The coordinator's address, host:port, where there is one: in every run of several processes."""
    assert info.coordinator_address is not None, info
    return info.coordinator_address
