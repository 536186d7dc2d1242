"""The watch over the processes of a run: where one is lost, stuck or different, the run ends, with a reason.

A process that dies or hangs leaves the others in a collective for ever. So each process has a thread that tells process
0 every 0.2 s (1 s above 256 processes) that it lives and how far it is (`spoke`), over the connection that it opened at
start-up (`wire`). Process 0's thread (`hub`) judges (`verdicts`): a connection that ended, a silence, a step that does
not end, two digests that differ. It tells all; each prints the verdict as its last line and ends, whatever its main
thread waits for, process 0 up to 2 s after the others. A process that is frozen as a whole cannot end itself. None of
this is a JAX collective, and nothing is unpickled: some hundred bytes of JSON a second.
"""

from __future__ import annotations

import os
import socket
import threading
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import jax

from paged_dist._errors import whole_number
from paged_dist.cluster import startup
from paged_dist.cluster.agreement import Disagreement, first_difference
from paged_dist.cluster.exit_codes import LOST
from paged_dist.cluster.hub import Hub
from paged_dist.cluster.preemption import SigtermWatch
from paged_dist.cluster.progress import IDLE, START, Progress
from paged_dist.cluster.signals import SlowAbort
from paged_dist.cluster.spoke import Spoke
from paged_dist.cluster.verdicts import PATIENCE
from paged_dist.cluster.watch_state import END_MEETING, WatchSettings, WatchState
from paged_dist.cluster.wire import as_json, peer_of

_MANY = 256  # processes, of which process 0 hears each less often
_LAST_WORDS = 10.0  # seconds in which a process that failed ends; see SlowAbort

_owners: dict[socket.socket, Watchdog] = {}  # connection -> the Watchdog that uses it, or used it last


class Watchdog:
    """Watches over the processes of one run: where one is lost, hangs or fails, the run ends. Used as a context.

    Enter it on every process, after `initialize_distributed`. Every process calls the same methods in the same order,
    but for `step` and `stops`. In a run of one process it watches nobody, and every method works.

    Where another process is lost, this one ends: the reason on stderr, exit code 3, no clean-up. Where the block
    raises, the other processes end so and the exception goes on. Leave the process then with os._exit: JAX's own
    shut-down waits for the others.

    A process may have several, one after the other, if all processes have as many; each is entered once. Inside the
    block, on processes other than 0, it holds the handler of SIGABRT, with which JAX's client ends a process whose
    coordinator is gone.

    Args:
      timeout_seconds: how long a process may be silent, or a step may take, before the run ends; the end comes within
        that time.
      name: the program's, in front of the lines that it prints.
      start_timeout_seconds: how long a process waits at the start of the block for the others to enter theirs; None:
        timeout_seconds.
      phase_timeout_seconds: how long a phase may take that is given no time of its own, see `phase`.

    Attributes:
      process_id, num_processes: as `initialize_distributed` found them.

    Raises:
      ValueError: a time-out that is no positive number.
      RuntimeError: on entering it a second time, or inside the block of another.

    Example:
      >>> with pd.Watchdog(timeout_seconds=60) as watch:
      ...     watch.watch_for_preemption()  # SIGTERM on one process stops all before the same step
      ...     watch.agree({"batch": 64, "page_size": 128})  # pd.Disagreement where a process holds another value
      ...     watch.phase("compile")
      ...     decode_step = jax.jit(lambda lengths: lengths + 1).lower(jnp.zeros(64)).compile()
      ...     lengths = jnp.zeros(64)
      ...     for i in range(3):
      ...         if watch.stops(i):
      ...             break
      ...         watch.step(i)  # has to end within timeout_seconds, on every process
      ...         lengths = decode_step(lengths)
      ...         watch.dispatched()  # from here on it waits for the devices
      >>> float(lengths[0])
      3.0
    """

    def __init__(
        self,
        timeout_seconds: float = 60,
        *,
        name: str = "paged-dist",
        start_timeout_seconds: float | None = None,
        phase_timeout_seconds: float = 3600,
    ):
        start = timeout_seconds if start_timeout_seconds is None else start_timeout_seconds
        startup.check_seconds("timeout_seconds", timeout_seconds)
        startup.check_seconds("start_timeout_seconds", start)
        startup.check_seconds("phase_timeout_seconds", phase_timeout_seconds, endless=True)
        self.process_id, self.num_processes, self._connections = startup.peers()
        beat = min(0.2 if self.num_processes <= _MANY else 1.0, timeout_seconds / 10)
        last_words = min(PATIENCE, timeout_seconds / 8)
        before = 2 * beat + last_words  # a beat to be heard, one to be judged
        self._settings = WatchSettings(
            self.process_id,
            self.num_processes,
            name,
            f"{socket.gethostname()}, pid {os.getpid()}",
            beat,
            limit=timeout_seconds - before,
            start_limit=max(start - before, start / 2),
            last_words=last_words,
        )
        self._state = WatchState(self._settings)
        self._phase_limit = float(phase_timeout_seconds)
        self._last_progress = START  # before it was idle
        self._agreements = 0
        self._sigterm = SigtermWatch(self._state.ask_to_stop)
        self._thread: threading.Thread | None = None
        self._slow_abort: SlowAbort | None = None
        self._entered = self._inside = False

    def __enter__(self) -> Watchdog:
        if self._entered:
            raise RuntimeError("this Watchdog was entered before: make another for another block")
        if self.num_processes > 1:
            self._take_over()
            wake = self._state.open_wake()
            peers = {i: peer_of(connection) for i, connection in self._connections.items()}
            is_first = self.process_id == 0
            work = Hub(self._state, peers, wake) if is_first else Spoke(self._state, peers[0], wake)
            if not is_first and jax.distributed.is_initialized():
                self._slow_abort = SlowAbort()
            self._thread = threading.Thread(target=self._watch, args=(work.run, wake), name="watchdog", daemon=True)
            self._thread.start()
        self._entered = self._inside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state = self._state
        if self._thread is not None:
            if error is None:
                self.meet(END_MEETING)
            elif not isinstance(error, Disagreement):  # of that all know
                state.error = error
                state.say({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
                # Another process may be the reason: that ends this one here.
                state.wait_until_error_is_known(2 * PATIENCE + 2 * self._settings.beat)
            state.is_over = True
            state.say({"end": True})
            self._thread.join(PATIENCE)
            if not self._thread.is_alive():
                state.close_wake()
        self._inside = False
        if self._slow_abort is not None:
            if error is None:
                self._slow_abort.release()
            else:  # it has something to say, and the coordinator may be gone before it has
                restored = threading.Timer(_LAST_WORDS, self._slow_abort.release)
                restored.daemon = True
                restored.start()
        self._sigterm.restore(was_asked=state.is_asked_to_stop)

    def _watch(self, run: Callable[[], None], wake: socket.socket) -> None:
        """The watching thread."""
        try:
            with wake:
                run()
        except Exception as e:  # a watch that has gone blind must not look like one that sees nothing
            if not self._state.is_over:
                self._state.end_process(LOST, f"the watch over the processes failed: {e!r}")

    def _take_over(self) -> None:
        """Takes the connections from the Watchdog before, whose thread may still wait for others to leave it."""
        before = {_owners[connection] for connection in self._connections.values() if connection in _owners}
        if any(watch._inside for watch in before):
            raise RuntimeError("another Watchdog of this process is in its block: one watches at a time")
        for watch in before:
            watch._hand_over()
        for connection in self._connections.values():
            _owners[connection] = self
            peer_of(connection).begin(self._settings.this_process)

    def _hand_over(self) -> None:
        """Ends this Watchdog's thread: another takes the connections."""
        self._state.is_handed_over = True
        self._state.wake()
        if self._thread is not None:
            self._thread.join()
        self._state.close_wake()
        if self._slow_abort is not None:
            self._slow_abort.release()

    # What the run says

    def phase(self, name: str, timeout_seconds: float | None = None) -> None:
        """Says that this process now does `name` ('compile', 'checkpoint'), no step. Who waits for it is not late.

        Before the first phase or step there is no time-out but that of silence.

        Args:
          timeout_seconds: how long it may take, `math.inf` for as long as it takes; None: the Watchdog's
            phase_timeout_seconds, an hour if nothing is said.
        """
        if timeout_seconds is not None:
            startup.check_seconds("timeout_seconds", timeout_seconds, endless=True)
        limit = self._phase_limit if timeout_seconds is None else float(timeout_seconds)
        self._state.progress = self._last_progress = self._last_progress.next_phase(str(name), limit)

    def idle(self) -> None:
        """Says that this process has nothing to do for now, and is behind nobody."""
        self._state.progress = IDLE

    def step(self, number: int, digest: str | int | None = None) -> None:
        """Says that step `number` begins, which has to end in time.

        Args:
          digest: what must be the same on all processes at this step, such as `PageAllocator.digest()`: a string or a
            whole number. Process 0 compares them while the run goes on, and ends it with exit code 4 where one
            differs.
        """
        number = whole_number("number", number)
        if digest is not None and not isinstance(digest, str):
            digest = f"{whole_number('digest', digest):x}"
        self._state.progress = self._last_progress = Progress.of_step(number)
        self._state.next_step = number + 1
        if digest is not None and self._inside and self._thread is not None:
            self._state.say({"digest": [number, digest]})

    def dispatched(self) -> None:
        """Says that the rest of the step is the devices' work.

        A process that hangs before that is to blame; those that have dispatched the step wait for it.
        """
        if (step := self._state.progress.step) is not None:
            self._state.progress = self._last_progress = Progress.of_step(step, waits=True)

    # What the processes do together

    def decide(self, name: str, value: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Waits until every process has brought its `value`; returns on all what `decide` makes of them on process 0.

        Args:
          name: of this meeting; a name is used once.
          value: what JSON holds.
          decide: of the list of all values, by process, the result; what JSON holds too. Process 0 alone calls it.

        Raises:
          RuntimeError: several processes, and not inside the `with` block.
        """
        if self.num_processes == 1:
            return as_json(decide([as_json(value)]))
        if not self._inside:
            raise RuntimeError("a Watchdog of several processes is used as a context: with Watchdog() as watch")
        self._state.say({"value": [name, value]})
        if self.process_id != 0:
            return self._state.wait_for_decision(name)
        result = as_json(decide(self._state.wait_for_values(name)))
        self._state.say({"decided": [name, result]})
        return result

    def meet(self, name: str) -> None:
        """Waits until every process is here."""
        self.decide(name, None, lambda _: None)

    def agree(self, values: Mapping[str, object]) -> None:
        """Checks that every process holds the same `values`, compared as text, before they go on together.

        Raises:
          Disagreement: on all processes; names a key, the processes and hosts that differ, and both values.
        """
        mine = {key: str(value) for key, value in values.items()}
        self._agreements += 1
        text = self.decide(f"agreement {self._agreements}", [self._settings.this_process, mine], first_difference)
        if text is not None:
            raise Disagreement(text)

    # Preemption

    def watch_for_preemption(self) -> None:
        """Makes SIGTERM on any process stop all of them before the same step, see `stops`.

        A second SIGTERM kills if it comes 5 seconds later or more: that is a person's. One that comes sooner changes
        nothing: that is a supervisor's, which tells parent and child. Python sets signal handlers in the main thread
        only. Called in another, this warns, and SIGTERM stays as it was on this process; SIGTERM on another process
        still stops it.
        """
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "watch_for_preemption() was called off the main thread, where Python sets no signal handlers: SIGTERM "
                "of this process does not stop the run; call it in the main thread",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._sigterm.install()

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether a process was asked to stop, as far as this one has heard."""
        return self._state.is_asked_to_stop

    def stops(self, step: int) -> bool:
        """Whether the run ends before step `step`, because a process was asked to; call it before each step.

        All end before the same step. When a process hears of the request, its watching thread, which no collective
        holds up, tells process 0 which step comes next here. From there this process does at most two more steps until
        it knows where all stop: two steps after the furthest of them. So none waits inside a collective for one that
        has stopped already.
        """
        if not self.is_asked_to_stop or self.num_processes == 1:
            return self.is_asked_to_stop
        return self._state.stops_before(step)
