"""What process 0 knows of a run's processes, and when that ends the run: no sockets and no clock of its own."""

from __future__ import annotations

import collections
from typing import NamedTuple

FAILED = 1  # exit code of a process that failed itself
LOST = 3  # of one that ends because another was lost, stuck or failed
DISAGREE = 4  # of all, where they were started differently or went apart
PREEMPTED = 75  # of all, after SIGTERM: sysexits' EX_TEMPFAIL, start it again

PATIENCE = 2.0  # seconds that a failure waits for the reason behind it: a peer's death breaks a collective here first


class Place(NamedTuple):
    """How far a process is: in a phase that may take as long as it takes, or at a step.

    Attributes:
      phase: its name; of a step 'step', and 'devices' from when it only waits for them.
      step: the step's number, None in a phase.
      order: of two processes, the one with the smaller is behind.
    """

    phase: str
    step: int | None = None
    order: int = -1000

    def next_phase(self, name: str) -> Place:
        """The phase `name` behind this place."""
        return Place(name, None, self.order + 1)

    @classmethod
    def of_step(cls, number: int, *, waits: bool = False) -> Place:
        """Step `number`, from when it `waits` for the devices."""
        return cls("devices" if waits else "step", number, 2 * number + waits)

    def __str__(self) -> str:
        return f"at step {self.step}" if self.step is not None else f"at no step ({self.phase})"


IDLE = Place("idle", None, 1 << 60)


class Verdict(NamedTuple):
    """Why a run ends: the exit code, the reason, the process that failed by itself, or that is lost, if that is it."""

    code: int
    text: str
    culprit: int | None = None
    lost: int | None = None


class Judge:
    """The state of `num_processes` processes. Times are seconds on any one clock.

    Args:
      limit: seconds of silence, or of one step, after which the run ends.
      beat: seconds between a process's signs of life.
    """

    def __init__(self, num_processes: int, limit: float, beat: float, now: float):
        self._limit, self._beat = limit, beat
        self.names = {i: f"process {i}" for i in range(num_processes)}
        self._heard = dict.fromkeys(self.names, now)
        self._places = {i: (Place("start"), now) for i in self.names}
        self._gone: list[int] = []
        self._left: set[int] = set()
        self._failed: list[tuple[float, int, str]] = []
        self._digests: dict[int, dict[int, str]] = collections.defaultdict(dict)

    @property
    def present(self) -> list[int]:
        """The processes that neither left nor are gone."""
        return [i for i in self.names if i not in self._left and i not in self._gone]

    def heard(self, i: int, now: float) -> None:
        """Process i gave a sign of life."""
        self._heard[i] = now

    def at(self, i: int, place: Place, now: float) -> None:
        """Process i is at `place`."""
        if self._places[i][0] != place:
            self._places[i] = place, now

    def gone(self, i: int) -> None:
        """The connection of process i has ended; that is a loss unless it left before."""
        if i not in self._left and i not in self._gone:
            self._gone.append(i)

    def left(self, i: int) -> None:
        """Process i has done its part."""
        self._left.add(i)

    def failed(self, i: int, text: str, now: float) -> None:
        """Process i raised `text`."""
        self._failed.append((now, i, text))

    def digest(self, i: int, step: int, digest: str) -> None:
        """At `step`, process i had `digest`."""
        self._digests[step][i] = digest

    def verdict(self, now: float) -> Verdict | None:
        """Why the run ends now, if it does."""
        return self._disagreement() or self._loss(now) or self._failure(now) or self._silence(now) or self._stuck(now)

    def _disagreement(self) -> Verdict | None:
        for step in sorted(self._digests):
            found = self._digests[step]
            for i, digest in found.items():
                if 0 in found and digest != found[0]:
                    return Verdict(
                        DISAGREE,
                        f"the processes disagree on the allocator's digest at step {step}: {found[0]} on "
                        f"{self.names[0]}, {digest} on {self.names[i]}",
                    )
            if len(found) == len(self.names):
                del self._digests[step]
        return None

    def _loss(self, now: float) -> Verdict | None:
        if not self._gone:
            return None
        i, *others = self._gone
        more = f"; then process {', '.join(map(str, others[:8]))}" if others else ""
        # One that raised says so, and its connection ends soon after.
        for _, who, text in self._failed:
            if who == i:
                return Verdict(LOST, self._failure_of(who, text), who)
        return self._lost(i, f"its connection ended, the process is gone{more}")

    def _failure_of(self, i: int, text: str) -> str:
        return f"{self.names[i]} failed {self._places[i][0]}: {text}"

    def _failure(self, now: float) -> Verdict | None:
        """A failure in itself, or one that another process's silence has brought about."""
        if not self._failed:
            return None
        since, i, text = self._failed[0]
        if now - since <= PATIENCE:
            return None
        quiet = max(self.present, key=lambda p: now - self._heard[p])
        if quiet != i and now - self._heard[quiet] > max(PATIENCE, 4 * self._beat):
            return self._lost(quiet, f"it is silent, and {self.names[i]} then failed: {text}")
        return Verdict(LOST, self._failure_of(i, text), i)

    def _silence(self, now: float) -> Verdict | None:
        for i in self.present:
            if (seconds := now - self._heard[i]) > self._limit:
                return self._lost(i, f"it has been silent for {seconds:.0f} s")
        return None

    def _stuck(self, now: float) -> Verdict | None:
        """A step that has gone on for too long: those are to blame that are behind, if some are."""
        places = {i: self._places[i] for i in self.present if self._places[i][0] != IDLE}
        if not any(place.step is not None and now - since > self._limit for place, since in places.values()):
            return None
        least = min(place.order for place, _ in places.values())
        behind = [i for i, (place, _) in places.items() if place.order == least]
        if len(behind) == len(places):
            return Verdict(
                LOST,
                f"step {places[behind[0]][0].step} has not ended for {self._limit:.0f} s on any process and none is "
                "behind: a device or a collective hangs, or a step takes longer than the time-out allows",
            )
        # One that is slow and moves is not stuck: those are that do not move.
        still = lambda i, limit: now - places[i][1] > limit
        overdue = [i for i, (place, _) in places.items() if place.step is not None and still(i, self._limit)]
        behind = [i for i in behind if still(i, self._limit / 2)] or overdue
        more = f", and so {len(behind) - 1} more" if len(behind) > 1 else ""
        most = max((place for place, _ in places.values()), key=lambda place: place.order)
        there = f"{most}, waiting for devices" if most.phase == "devices" else f"{most}"
        return Verdict(LOST, f"{self._where(behind[0])}{more}, is stuck, while others are {there}")

    def _lost(self, i: int, how: str) -> Verdict:
        here = f"; process 0 is {self._places[0][0]}" if i and self._places[0][0] != self._places[i][0] else ""
        return Verdict(LOST, f"lost {self.names[i]}, last heard of {self._places[i][0]}: {how}{here}", lost=i)

    def _where(self, i: int) -> str:
        return f"{self.names[i]}, {self._places[i][0]}"
