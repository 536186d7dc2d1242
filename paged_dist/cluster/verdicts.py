"""What process 0 knows of a run's processes, and when that ends the run: no sockets and no clock of its own."""

from __future__ import annotations

import collections
import math
from typing import NamedTuple

from paged_dist.cluster.exit_codes import DISAGREE, LOST

PATIENCE = 2.0  # seconds that a failure waits for the reason behind it: a peer's death breaks a collective here first

SILENT = "it has been silent for {:.0f} s"
NOT_HERE = "it has been silent for {:.0f} s, it has not come into the block of this Watchdog"

_PHASES = 1 << 20  # between two steps are more places than a run names phases there


class Place(NamedTuple):
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

    def next_phase(self, name: str, limit: float = math.inf) -> Place:
        """The phase `name` behind this place."""
        return Place(name, None, self.order + 2, limit)  # behind the same step's wait for the devices, too

    @classmethod
    def of_step(cls, number: int, *, waits: bool = False) -> Place:
        """Step `number`, from when it `waits` for the devices."""
        return cls("devices" if waits else "step", number, number * _PHASES + waits)

    @property
    def is_phase(self) -> bool:
        """Whether the run named a phase, with a time of its own."""
        return self.step is None and self not in (START, IDLE)

    def __str__(self) -> str:
        return f"at step {self.step}" if self.step is not None else f"at no step ({self.phase})"


START = Place("start")
IDLE = Place("idle", None, 1 << 90)


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
      start_limit: seconds until a process is there at all; None: `limit`.
    """

    def __init__(self, num_processes: int, limit: float, beat: float, now: float, start_limit: float | None = None):
        self._limit, self._beat = limit, beat
        self._start_limit = limit if start_limit is None else start_limit
        self.names = {i: f"process {i}" for i in range(num_processes)}
        self._heard = dict.fromkeys(self.names, now)
        self._places = dict.fromkeys(self.names, (START, now))
        self._here: set[int] = set()
        self._meetings: dict[int, str] = {}  # of the processes that wait in one
        self._freed = now  # until then a phase held up those at a step
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
        self._here.add(i)

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

    def waits(self, i: int, meeting: str) -> None:
        """Process i waits in a meeting for all others; when all are there, process 0 is at work alone."""
        self._meetings[i] = meeting
        if all(self._meetings.get(p) == meeting for p in self.names):
            del self._meetings[0]

    def met(self, meeting: str) -> None:
        """Those that waited in this meeting go on."""
        self._meetings = {i: name for i, name in self._meetings.items() if name != meeting}

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
            seconds = now - self._heard[i]
            if i not in self._here and seconds > self._start_limit:
                return self._lost(i, NOT_HERE.format(seconds))
            if i in self._here and seconds > self._limit:
                return self._lost(i, SILENT.format(seconds))
        return None

    def _stuck(self, now: float) -> Verdict | None:
        """A step or a phase that has gone on for too long: those are to blame that are behind, if some are.

        Those that wait in a meeting are behind nobody. A process that is in a phase takes what time it has for that,
        and so do the steps of those that wait for it.
        """
        everyone = {i: self._places[i] for i in self.present if self._places[i][0] != IDLE}
        places = {i: at for i, at in everyone.items() if i not in self._meetings} or everyone
        if not places:
            return None
        least = min(place.order for place, _ in places.values())
        behind = [i for i, (place, _) in places.items() if place.order == least]
        moved = max(places[i][1] for i in behind)
        phases = [i for i in behind if places[i][0].is_phase]
        if phases:
            self._freed = now
            if any(now - moved <= places[i][0].limit for i in phases):
                return None
            return Verdict(LOST, self._endless(phases, len(places), now - moved))
        last = max(since for _, since in places.values())  # who waits in a meeting is content while any other moves
        since = {i: at[1] if i in places else max(at[1], last) for i, at in everyone.items()}
        still = lambda i, limit: now - max(since[i], self._freed) > limit
        at_step = [i for i, (place, _) in everyone.items() if place.step is not None and still(i, self._limit)]
        if not at_step and not any(now - max(since[i], moved) > at[0].limit for i, at in everyone.items()):
            return None
        if len(behind) == len(everyone):
            return Verdict(
                LOST,
                f"step {places[behind[0]][0].step} has not ended for {self._limit:.0f} s on any process and none is "
                "behind: a device or a collective hangs, or a step takes longer than the time-out allows",
            )
        # One that is slow and moves is not stuck: those are that do not move.
        blamed = [i for i in behind if still(i, self._limit / 2)] or [i for i in at_step if i in places] or behind
        if len(behind) == len(places):
            meeting = next(self._meetings[i] for i in everyone if i not in places)
            there = f"waiting for it in a meeting ({meeting.strip()})"
        else:
            most = max((place for place, _ in places.values()), key=lambda place: place.order)
            there = f"{most}, waiting for devices" if most.phase == "devices" else f"{most}"
        return Verdict(LOST, f"{self._all_of(blamed)}, is stuck, while others are {there}")

    def _endless(self, phases: list[int], count: int, seconds: float) -> str:
        """What ends a run in which these processes, of `count` that are at work, are in a phase that does not end."""
        name = self._places[phases[0]][0].phase
        if len(phases) == count == len(self.present):
            return (
                f"phase {name!r} has not ended for {seconds:.0f} s on any process: a compile, a device or a transfer "
                "hangs, or a phase takes longer than its time-out allows"
            )
        return f"{self._all_of(phases)}, has been in phase {name!r} for {seconds:.0f} s, and others wait"

    def _lost(self, i: int, how: str) -> Verdict:
        here = f"; process 0 is {self._places[0][0]}" if i and self._places[0][0] != self._places[i][0] else ""
        return Verdict(LOST, f"lost {self.names[i]}, last heard of {self._places[i][0]}: {how}{here}", lost=i)

    def _all_of(self, some: list[int]) -> str:
        """The first of some processes and where it is, and how many more they are."""
        more = f", and so {len(some) - 1} more" if len(some) > 1 else ""
        return f"{self.names[some[0]]}, {self._places[some[0]][0]}{more}"
