"""When a run ends, from what process 0 has heard of each process: a loss, a failure, a silence, a step that hangs.

Rules only: no sockets, no thread, no clock.
"""

from __future__ import annotations

import collections
from typing import NamedTuple

from paged_dist.cluster.exit_codes import DISAGREE, LOST
from paged_dist.cluster.progress import IDLE, START, Progress

PATIENCE = 2.0  # seconds that a failure waits for the reason behind it: a peer's death breaks a collective here first

SILENT = "it has been silent for {:.0f} s"
NOT_HERE = "it has been silent for {:.0f} s, it has not come into the block of this Watchdog"


class Verdict(NamedTuple):
    """Why a run ends.

    Attributes:
      code: the exit code of all processes.
      text: the reason, the last line that each prints.
      culprit: the process that failed by itself, if that is the reason.
      lost: the process that is gone or silent, if that is the reason.
    """

    code: int
    text: str
    culprit: int | None = None
    lost: int | None = None


class _ProgressSince(NamedTuple):
    """How far a process is, and since when."""

    progress: Progress
    since: float


class Judge:
    """Collects what process 0 hears of each process, and says from that whether the run ends.

    `verdict` has the rules. The other methods say that something was heard of a process. Times are seconds on any one
    clock, given by the caller.

    Args:
      num_processes: how many there are.
      limit: seconds of silence, or of one step, after which the run ends.
      beat: seconds between a process's signs of life.
      now: the time.
      start_limit: seconds until a process is there at all; None: `limit`.
    """

    def __init__(self, num_processes: int, limit: float, beat: float, now: float, start_limit: float | None = None):
        self._limit, self._beat = limit, beat
        self._start_limit = limit if start_limit is None else start_limit
        self.names = {i: f"process {i}" for i in range(num_processes)}
        self._heard = dict.fromkeys(self.names, now)
        self._where = dict.fromkeys(self.names, _ProgressSince(START, now))
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

    def at(self, i: int, progress: Progress, now: float) -> None:
        """Process i has come to `progress`."""
        if self._where[i].progress != progress:
            self._where[i] = _ProgressSince(progress, now)

    def gone(self, i: int) -> None:
        """The connection of process i has ended, which is a loss unless the process left before."""
        if i not in self._left and i not in self._gone:
            self._gone.append(i)

    def left(self, i: int) -> None:
        """Process i has left its Watchdog's block."""
        self._left.add(i)

    def waits(self, i: int, meeting: str) -> None:
        """Process i waits in a meeting for all others. When all are there, process 0 alone is at work: it decides."""
        self._meetings[i] = meeting
        if all(self._meetings.get(p) == meeting for p in self.names):
            del self._meetings[0]

    def met(self, meeting: str) -> None:
        """The processes that waited in this meeting go on."""
        self._meetings = {i: name for i, name in self._meetings.items() if name != meeting}

    def failed(self, i: int, text: str, now: float) -> None:
        """Process i raised `text`."""
        self._failed.append((now, i, text))

    def digest(self, i: int, step: int, digest: str) -> None:
        """At `step`, process i had `digest`."""
        self._digests[step][i] = digest

    def verdict(self, now: float) -> Verdict | None:
        """Why the run ends now; None where it goes on."""
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
                return Verdict(LOST, self._text_of_failure(who, text), who)
        return self._lost(i, f"its connection ended, the process is gone{more}")

    def _text_of_failure(self, i: int, text: str) -> str:
        return f"{self.names[i]} failed {self._where[i].progress}: {text}"

    def _failure(self, now: float) -> Verdict | None:
        """A process that failed by itself, or that failed because another one is silent."""
        if not self._failed:
            return None
        since, i, text = self._failed[0]
        if now - since <= PATIENCE:
            return None
        quiet = max(self.present, key=lambda p: now - self._heard[p])
        if quiet != i and now - self._heard[quiet] > max(PATIENCE, 4 * self._beat):
            return self._lost(quiet, f"it is silent, and {self.names[i]} then failed: {text}")
        return Verdict(LOST, self._text_of_failure(i, text), i)

    def _silence(self, now: float) -> Verdict | None:
        for i in self.present:
            seconds = now - self._heard[i]
            if i not in self._here and seconds > self._start_limit:
                return self._lost(i, NOT_HERE.format(seconds))
            if i in self._here and seconds > self._limit:
                return self._lost(i, SILENT.format(seconds))
        return None

    def _stuck(self, now: float) -> Verdict | None:
        """A step or a phase that has gone on for too long. If some processes are behind, those are to blame.

        Those that wait in a meeting are behind nobody. A process that is in a phase takes what time it has for that,
        and so do the steps of those that wait for it.
        """
        everyone = {i: self._where[i] for i in self.present if self._where[i].progress != IDLE}
        at_work = {i: where for i, where in everyone.items() if i not in self._meetings} or everyone
        if not at_work:
            return None
        least = min(where.progress.order for where in at_work.values())
        behind = [i for i, where in at_work.items() if where.progress.order == least]
        moved = max(at_work[i].since for i in behind)
        phases = [i for i in behind if at_work[i].progress.is_phase]
        if phases:
            self._freed = now
            if any(now - moved <= at_work[i].progress.limit for i in phases):
                return None
            return Verdict(LOST, self._endless(phases, len(at_work), now - moved))
        last = max(where.since for where in at_work.values())
        # Who waits in a meeting is content while any other moves.
        since = {i: where.since if i in at_work else max(where.since, last) for i, where in everyone.items()}

        def is_still(i: int, limit: float) -> bool:
            return now - max(since[i], self._freed) > limit

        stuck = [i for i, where in everyone.items() if where.progress.step is not None and is_still(i, self._limit)]
        if not stuck and not any(now - max(since[i], moved) > at.progress.limit for i, at in everyone.items()):
            return None
        if len(behind) == len(everyone):
            return Verdict(
                LOST,
                f"step {at_work[behind[0]].progress.step} has not ended for {self._limit:.0f} s on any process and "
                "none is behind: a device or a collective hangs, or a step takes longer than the time-out allows",
            )
        # One that is slow and moves is not stuck: those are that do not move.
        blamed = [i for i in behind if is_still(i, self._limit / 2)] or [i for i in stuck if i in at_work] or behind
        if len(behind) == len(at_work):
            meeting = next(self._meetings[i] for i in everyone if i not in at_work)
            there = f"waiting for it in a meeting ({meeting.strip()})"
        else:
            most = max((where.progress for where in at_work.values()), key=lambda progress: progress.order)
            there = f"{most}, waiting for devices" if most.phase == "devices" else f"{most}"
        return Verdict(LOST, f"{self._all_of(blamed)}, is stuck, while others are {there}")

    def _endless(self, phases: list[int], count: int, seconds: float) -> str:
        """The reason where the processes `phases`, of `count` that are at work, are in a phase that does not end."""
        name = self._where[phases[0]].progress.phase
        if len(phases) == count == len(self.present):
            return (
                f"phase {name!r} has not ended for {seconds:.0f} s on any process: a compile, a device or a transfer "
                "hangs, or a phase takes longer than its time-out allows"
            )
        return f"{self._all_of(phases)}, has been in phase {name!r} for {seconds:.0f} s, and others wait"

    def _lost(self, i: int, how: str) -> Verdict:
        first, its = self._where[0].progress, self._where[i].progress
        here = f"; process 0 is {first}" if i and first != its else ""
        return Verdict(LOST, f"lost {self.names[i]}, last heard of {its}: {how}{here}", lost=i)

    def _all_of(self, some: list[int]) -> str:
        """Processes as a reason names them: the first, how far it is, and how many more they are."""
        more = f", and so {len(some) - 1} more" if len(some) > 1 else ""
        return f"{self.names[some[0]]}, {self._where[some[0]].progress}{more}"
