"""How far a process is in its run: in a phase, or at a step. The order says which of two processes is behind."""

from __future__ import annotations

import math
from typing import NamedTuple

_PHASES = 1 << 20  # between two steps are more places than a run names phases there


class Progress(NamedTuple):
    """How far a process is: in a phase, or at a step.

    Attributes:
      phase: its name; of a step 'step', and 'devices' from when it only waits for them.
      step: the step's number, None in a phase.
      order: of two processes, the one with the smaller is behind.
      limit: seconds that a phase may take.
    """

    phase: str
    step: int | None = None
    order: int = -(1 << 60)
    limit: float = math.inf

    def next_phase(self, name: str, limit: float = math.inf) -> Progress:
        """The phase `name` behind this place."""
        return Progress(name, None, self.order + 2, limit)  # behind the same step's wait for the devices, too

    @classmethod
    def of_step(cls, number: int, *, waits: bool = False) -> Progress:
        """Step `number`, from when it `waits` for the devices."""
        return cls("devices" if waits else "step", number, number * _PHASES + waits)

    @property
    def is_phase(self) -> bool:
        """Whether the run named a phase, with a time of its own."""
        return self.step is None and self not in (START, IDLE)

    def __str__(self) -> str:
        return f"at step {self.step}" if self.step is not None else f"at no step ({self.phase})"


START = Progress("start")
IDLE = Progress("idle", None, 1 << 90)
