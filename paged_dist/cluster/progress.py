"""How far a process is in its run: in a phase, or at a step. The order says which of two processes is behind."""

from __future__ import annotations

import math
from typing import NamedTuple

_ORDERS_A_STEP = 1 << 20  # between two steps: more than a run names phases there


class Progress(NamedTuple):
    """How far a process is: in a phase, or at a step.

    Attributes:
      phase: the name of the phase; at a step 'step', or 'devices' once the process only waits for its devices.
      step: the number of the step; None in a phase.
      order: of two processes, the one with the smaller number is behind.
      limit: seconds that a phase may take.
    """

    phase: str
    step: int | None = None
    order: int = -(1 << 60)
    limit: float = math.inf

    def next_phase(self, name: str, limit: float = math.inf) -> Progress:
        """The phase `name`, which comes after this."""
        return Progress(name, None, self.order + 2, limit)  # behind the same step's wait for the devices, too

    @classmethod
    def of_step(cls, number: int, *, waits: bool = False) -> Progress:
        """At step `number`; `waits`: all that is left of it is the devices' work."""
        return cls("devices" if waits else "step", number, number * _ORDERS_A_STEP + waits)

    @property
    def is_phase(self) -> bool:
        """Whether this is a phase that the program has named, which has a time-out of its own."""
        return self.step is None and self not in (START, IDLE)

    def __str__(self) -> str:
        return f"at step {self.step}" if self.step is not None else f"at no step ({self.phase})"


START = Progress("start")
IDLE = Progress("idle", None, 1 << 90)
