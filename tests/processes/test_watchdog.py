"""The watch over a run's processes: what it judges, what the processes decide together, and real ones that fail."""

import contextlib
import ctypes
import gc
import itertools
import json
import os
import random
import re
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import flagsaver
import jax
import numpy as np
import pytest
from processes import free_port, run_processes, start

from paged_dist import CacheSpec, Disagreement, PageAllocator, Watchdog, make_pod_mesh
from paged_dist.cluster import DISAGREE, LOST
from paged_dist.cluster import startup as distributed
from paged_dist.cluster.progress import IDLE, START, Progress
from paged_dist.cluster.signals import SlowAbort, action_of, handler_in, set_action
from paged_dist.cluster.spoke import Spoke
from paged_dist.cluster.verdicts import PATIENCE, Judge
from paged_dist.cluster.watch_state import WatchState
from paged_dist.cluster.wire import Peer, encoded
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common import record_output, shared_flags
from paged_dist.launch.common.local_processes import pod_environment, reserve_port
from paged_dist.launch.common.start_jax import start_jax, watchdog
from paged_dist.launch.comparison.rows import read_rows

# What process 0 judges, on a clock of the test's own


def judge(count=3, limit=10.0, beat=1.0):
    return Judge(count, limit, beat, 0.0)


def at_step(j, now, *steps, waits=()):
    for i, step in enumerate(steps):
        j.heard(i, now)
        j.at(i, Progress.of_step(step, waits=i in waits), now)


def test_processes_that_live_and_move_are_left_alone():
    j = judge()
    for now in range(100):
        at_step(j, now, now, now + 1, now)
        assert j.verdict(now) is None


def test_a_phase_may_take_longer_than_a_step():
    j = judge()
    for now in range(50):
        for i in range(3):
            j.heard(i, now)
            j.at(i, START.next_phase("compile"), now)
        assert j.verdict(now) is None
    at_step(j, 50, 0, 0, 0)
    assert j.verdict(60) is None
    for i in range(3):
        j.heard(i, 60.5)
    verdict = j.verdict(60.5)
    assert verdict.code == LOST and "step 0 has not ended for 10 s on any process and none is behind" in verdict.text


def alive(j, now):
    for i in j.present:
        j.heard(i, now)
    return j.verdict(now)


def test_a_phase_of_one_takes_its_time_and_stops_the_clock_of_the_steps_that_wait_for_it():
    j = judge()
    at_step(j, 0, 6, 6, 6)
    j.at(0, Progress.of_step(5, waits=True).next_phase("checkpoint", 100), 0)
    for now in range(13):
        assert alive(j, now) is None
    j.at(0, Progress.of_step(6), 12.5)
    for now in range(13, 23):
        assert alive(j, now) is None
    assert "step 6 has not ended for 10 s on any process" in alive(j, 23).text


@pytest.mark.parametrize("phases", [1, 2, 5])
def test_a_phase_after_another_is_still_behind_the_next_step(phases):
    j = judge()
    at_step(j, 0, 6, 6, 6)
    progress = Progress.of_step(5)
    for _ in range(phases):
        progress = progress.next_phase("checkpoint", 100)
    j.at(0, progress, 0)
    assert alive(j, 12) is None
    j.at(0, progress, 90)
    assert alive(j, 99) is None
    verdict = alive(j, 101)
    assert verdict.code == LOST and verdict.text == (
        "process 0, at no step (checkpoint), has been in phase 'checkpoint' for 101 s, and others wait"
    )


def test_a_phase_that_hangs_everywhere_ends_after_its_own_time():
    j = judge()
    for i in range(3):
        j.at(i, START.next_phase("compile", 100), i)
    assert alive(j, 101) is None
    assert alive(j, 102.5).text.startswith("phase 'compile' has not ended for 100 s on any process: a compile")


def test_a_phase_without_an_end_never_ends_the_run():
    j = judge()
    for i in range(3):
        j.at(i, START.next_phase("serve"), 0)
    assert alive(j, 1e9) is None


def test_the_last_to_come_to_a_phase_has_all_of_its_time():
    j = judge(2)
    j.at(0, Progress.of_step(50).next_phase("report", 100), 0)
    for step in range(200):
        j.at(1, Progress.of_step(step // 8), step)
        assert alive(j, step) is None  # who is ahead, in a phase, waits for one that moves
    j.at(1, Progress.of_step(50).next_phase("report", 100), 200)
    assert alive(j, 290) is None and alive(j, 301) is not None


def test_a_device_that_hangs_is_not_excused_by_one_that_is_past_it():
    j = judge(2)
    j.at(0, Progress.of_step(5, waits=True), 0)
    j.at(1, Progress.of_step(5, waits=True).next_phase("report", 100), 0)
    assert alive(j, 11).text.startswith("process 0, at step 5, is stuck, while others are at no step (report)")


def test_who_waits_in_a_meeting_is_content_while_others_move():
    j = judge()
    at_step(j, 0, 9, 9, 9)
    j.waits(0, "the end"), j.waits(2, "the end")
    for now in range(40):
        j.at(1, Progress.of_step(9 + now // 8), now)
        assert alive(j, now) is None
    assert (
        alive(j, 43).text == "process 1, at step 13, is stuck, while others are waiting for it in a meeting (the end)"
    )


def test_who_waits_in_a_meeting_is_not_the_one_that_hangs_in_a_phase():
    j = judge()
    for i in range(3):
        j.at(i, START.next_phase("compile", 100), 0)
    j.waits(0, "compiled"), j.waits(1, "compiled")
    assert alive(j, 99) is None
    assert alive(j, 101).text.startswith("process 2, at no step (compile), has been in phase 'compile' for 101 s")


def test_a_meeting_to_which_one_never_comes_ends_the_run():
    j = judge()
    j.at(0, Progress.of_step(3), 0)
    j.waits(0, "x"), j.waits(1, "x")
    assert alive(j, 9) is None
    assert alive(j, 11).text.startswith("process 2, at no step (start), is stuck, while others are waiting for it in")


def test_process_0_decides_alone_when_all_are_there():
    j = judge()
    at_step(j, 0, 3, 3, 3)
    for i in range(3):
        j.waits(i, "x")
    assert alive(j, 11).text.startswith("process 0, at step 3, is stuck, while others are waiting for it")
    j.met("x")
    at_step(j, 11, 4, 4, 4)
    assert alive(j, 20) is None


def test_one_that_was_idle_goes_on_from_where_it_was():
    watch = Watchdog()
    watch.step(7)
    before = watch._state.progress
    watch.idle()
    assert watch._state.progress == IDLE
    watch.phase("compile", timeout_seconds=5)
    assert before.order < watch._state.progress.order < Progress.of_step(8).order and watch._state.progress.limit == 5


def test_until_a_process_is_there_it_has_the_time_of_the_start():
    j = Judge(2, 10, 1, 0.0, start_limit=50)
    for now in range(45):
        j.heard(0, now)
        assert j.verdict(now) is None
    j.heard(1, 45), j.heard(0, 55)
    assert j.verdict(55) is None and j.verdict(55.5).text.startswith("lost process 1, last heard of at no step (start)")
    j = Judge(2, 10, 1, 0.0, start_limit=50)
    j.heard(0, 51)
    assert "it has been silent for 51 s, it has not come into the block of this Watchdog" in j.verdict(51).text


@pytest.mark.parametrize(
    ("steps", "waits", "who", "there"),
    [
        ((7, 6, 7), (), "process 1, at step 6, is stuck", "while others are at step 7"),
        ((7, 7, 7), (0, 1), "process 2, at step 7, is stuck", "while others are at step 7, waiting for devices"),
        ((7, 6, 6), (0,), "process 1, at step 6, and so 1 more, is stuck", "at step 7, waiting for devices"),
    ],
)
def test_those_behind_are_to_blame_for_a_step_that_does_not_end(steps, waits, who, there):
    j = judge()
    at_step(j, 0, *steps, waits=waits)
    for i in range(3):
        j.heard(i, 11)
    text = j.verdict(11).text
    assert who in text and there in text


def test_one_that_has_finished_is_not_behind():
    j = judge(2)
    at_step(j, 0, 5, 5)
    j.at(1, Progress.of_step(5).next_phase("report"), 1)
    for now in (5, 11):
        j.heard(0, now), j.heard(1, now)
    assert j.verdict(11).text.startswith("process 0, at step 5, is stuck, while others are at no step (report)")


def test_one_that_is_slow_and_moves_is_not_the_one_that_is_stuck():
    j = judge()
    at_step(j, 0, 500, 480, 500)
    j.at(0, Progress.of_step(500, waits=True), 0)
    for now in range(1, 12):
        for i in range(3):
            j.heard(i, now)
        j.at(1, Progress.of_step(480 + now // 3), now)
    assert j.verdict(11).text.startswith("process 0, at step 500, and so 1 more, is stuck")


def test_one_that_is_idle_is_neither_ahead_nor_behind():
    j = judge()
    at_step(j, 0, 5, 5, 5)
    j.at(2, IDLE, 0)
    for i in range(3):
        j.heard(i, 11)
    assert "on any process and none is behind" in j.verdict(11).text


def test_silence_is_a_loss_and_says_since_when():
    j = judge()
    at_step(j, 0, 3, 3, 3)
    for now in range(1, 11):
        at_step(j, now, 3 + now, 3, 3 + now)
        j._heard[1] = 0
    assert j.verdict(10) is None
    j.heard(0, 10.5), j.heard(2, 10.5)
    verdict = j.verdict(10.5)
    assert (verdict.code, verdict.culprit, verdict.lost) == (LOST, None, 1)
    assert (
        verdict.text == "lost process 1, last heard of at step 3: it has been silent for 10 s; process 0 is at step 13"
    )


def test_an_end_is_a_loss_unless_it_was_announced():
    j = judge()
    at_step(j, 0, 3, 3, 3)
    j.left(2), j.gone(2)
    assert j.verdict(0) is None and j.present == [0, 1]
    j.gone(1)
    assert j.verdict(0).text == "lost process 1, last heard of at step 3: its connection ended, the process is gone"


def test_the_first_loss_is_named_before_those_that_follow_from_it():
    j = judge(4)
    at_step(j, 0, 3, 3, 3, 3)
    j.gone(2), j.gone(1)
    assert j.verdict(0).text.startswith("lost process 2,") and "; then process 1" in j.verdict(0).text


def test_a_failure_waits_for_the_loss_that_caused_it():
    j = judge()
    at_step(j, 0, 3, 3, 3)
    j.failed(1, "JaxRuntimeError: connection reset", 0)
    assert j.verdict(PATIENCE / 2) is None
    j.gone(2)
    assert j.verdict(PATIENCE / 2).text.startswith("lost process 2,")

    j = judge(beat=0.1)
    at_step(j, 0, 3, 3, 3)
    j.heard(0, 8), j.heard(1, 8)
    j.failed(1, "JaxRuntimeError: timed out", 8)
    assert j.verdict(8) is None
    at = 8.1 + PATIENCE
    j.heard(0, at), j.heard(1, at)
    lost = "lost process 2, last heard of at step 3: it is silent, and process 1 then failed"
    assert j.verdict(at).text.startswith(lost)


def test_a_failure_of_its_own_names_its_process():
    j = judge()
    at_step(j, 0, 3, 3, 3)
    j.failed(1, "ValueError: no", 0)
    at_step(j, PATIENCE + 0.1, 3, 3, 3)
    assert j.verdict(PATIENCE + 0.1)[:3] == (LOST, "process 1 failed at step 3: ValueError: no", 1)
    j.gone(1)  # as it ends
    assert j.verdict(0.1)[:3] == (LOST, "process 1 failed at step 3: ValueError: no", 1)


def test_digests_are_compared_step_by_step_whatever_order_they_come_in():
    j = judge()
    j.digest(1, 64, "a"), j.digest(2, 0, "f"), j.digest(0, 0, "f")
    assert j.verdict(0) is None
    j.digest(1, 0, "f"), j.digest(0, 64, "a"), j.digest(2, 128, "c")
    assert j.verdict(0) is None
    j.digest(2, 64, "b")
    verdict = j.verdict(0)
    assert verdict.code == DISAGREE
    assert verdict.text == "the processes disagree on the allocator's digest at step 64: a on process 0, b on process 2"


# What processes do together, played by threads of this one


# What stands for os._exit in a watch's thread is an exception there.
ENDS = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@contextlib.contextmanager
def connected(count, monkeypatch, timeout_seconds=10, **options):
    """The watchdogs of `count` processes, joined as `initialize_distributed` joins them; their ends are noted. As many
    more that are made meanwhile are the processes' next ones."""
    pairs = {i: socket.socketpair() for i in range(1, count)}
    of = [(0, count, {i: pair[0] for i, pair in pairs.items()})]
    of += [(i, count, {0: pairs[i][1]}) for i in range(1, count)]
    found = itertools.cycle(of)
    monkeypatch.setattr(distributed, "peers", lambda: next(found))
    ended = {}

    def end(self, code, text):
        ended[self.settings.process_id] = code, text
        raise SystemExit  # of the watch's own thread

    monkeypatch.setattr(WatchState, "end_process", end)
    try:
        yield [Watchdog(timeout_seconds, **options) for _ in range(count)], ended
    finally:
        for thread in threading.enumerate():
            if thread.name == "watchdog":
                thread.join(2)  # or its exception were another test's warning
        for pair in pairs.values():
            for end_of_it in pair:
                end_of_it.close()


def run_threads(count, work, timeout=20):
    """`work(i)` in a thread each; what they returned, or raised."""
    results = {}

    def one(i):
        try:
            results[i] = work(i)
        except Exception as e:
            results[i] = e

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout)
    assert not any(t.is_alive() for t in threads), "a process hangs"
    return [results[i] for i in range(count)]


def run_all(watches, work):
    """`work(watch, i)` in a thread and in the watch's block each; what they returned, or raised."""

    def one(i):
        with watches[i]:
            return work(watches[i], i)

    return run_threads(len(watches), one)


def test_all_get_what_process_0_decides_of_all_values(monkeypatch):
    with connected(4, monkeypatch) as (watches, ended):

        def work(watch, i):
            first = watch.decide("a", [i, "x" * 300_000 * i], lambda values: sum(v[0] * len(v[1]) for v in values))
            watch.meet("b")
            return first, watch.decide("c", i, lambda values: values)

        assert run_all(watches, work) == [(300_000 * (1 + 4 + 9), [0, 1, 2, 3])] * 4
    assert not ended


def test_a_watchdog_of_one_process_needs_nobody():
    with Watchdog() as watch:
        watch.agree({"a": 1})
        watch.step(0, digest=7)
        watch.step(1, digest="0a")
        assert watch.decide("x", 3, lambda values: values) == [3] and not watch.stops(0)


def test_a_watchdog_of_several_is_a_context(monkeypatch):
    with connected(2, monkeypatch) as ((watch, _), _), pytest.raises(RuntimeError, match="used as a context"):
        watch.meet("x")


def test_processes_that_hold_the_same_agree_and_go_on(monkeypatch):
    with connected(3, monkeypatch) as (watches, ended):
        assert run_all(watches, lambda watch, i: watch.agree({"mesh": {"data": 2}, "--batch": 8})) == [None] * 3
    assert not ended


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([{"--batch": 8}, {"--batch": 8}, {"--batch": 16}], r"--batch: 8 on process 0 \(.+\), 16 on process 2 \(.+\)"),
        ([{"a": 1}, {"a": 1, "--seed": 3}, {"a": 1}], r"--seed: nothing on process 0 \(.+\), 3 on process 1 \(.+\)"),
        ([{"a": 1}, {"a": 2}, {"a": 2}], r"a: 1 on process 0 .+ 2 on process 1 .+; 1 more differ from process 0"),
    ],
)
def test_processes_that_differ_are_all_told_where_and_how(monkeypatch, values, text):
    with connected(3, monkeypatch) as (watches, ended):
        results = run_all(watches, lambda watch, i: watch.agree(values[i]))
    assert all(isinstance(e, Disagreement) and re.search(text, str(e)) for e in results), results
    assert not ended


@pytest.mark.parametrize("late", [0, 0.03])
@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_all_stop_before_the_same_step_and_none_waits_for_one_that_stopped(monkeypatch, lockstep, seed, late):
    """Also where news of it come many steps late."""
    rng = random.Random(seed)
    count, asked_at = 3, rng.randrange(1, 30)
    pace = [[rng.random() * 0.004 for _ in range(200)] for _ in range(count)]
    barrier = threading.Barrier(count)
    hear = Spoke._hear
    monkeypatch.setattr(Spoke, "_hear", lambda self, m: (time.sleep(late if "stop" in m else 0), hear(self, m)))
    with connected(count, monkeypatch) as (watches, ended):

        def work(watch, i):
            for step in range(200):
                if watch.stops(step):
                    return step
                watch.step(step)
                time.sleep(pace[i][step] * (1 if lockstep else 1 + 3 * i))
                if i == seed % count and step == asked_at:
                    watch._state.ask_to_stop()  # as its handler of SIGTERM does
                if lockstep:
                    barrier.wait(10)  # as a collective of the step would
            return "the end"

        results = run_all(watches, work)
    assert len(set(results)) == 1 and results[0] != "the end" and results[0] > asked_at and not ended


def test_one_that_has_finished_already_holds_up_nobody_s_stop(monkeypatch):
    with connected(3, monkeypatch) as (watches, ended):
        done = threading.Event()

        def work(watch, i):
            for step in range(20):
                if watch.stops(step):
                    return step
                watch.step(step)
                if i and step == 5:
                    assert done.wait(10)
                    if i == 1:
                        watch._state.ask_to_stop()
                    time.sleep(0.3)
            watch.phase("report")
            done.set()
            return "the end"

        assert run_all(watches, work) == ["the end"] * 3  # it ends before the step that all would stop before
    assert not ended


@ENDS
def test_a_peer_that_does_not_read_is_found_silent_however_much_there_is_to_say(monkeypatch):
    """Process 0 is played by a socket that nobody reads."""
    hub, mine = socket.socketpair()
    monkeypatch.setattr(distributed, "peers", lambda: (1, 2, {0: mine}))
    ended, end = [], threading.Event()

    def note(self, code, text):
        ended.append((code, text))
        end.set()
        raise SystemExit

    monkeypatch.setattr(WatchState, "end_process", note)
    with hub, mine:
        watch = Watchdog(1.5)
        watch.__enter__()
        watch._state.say({"value": ["the report", "x" * 20_000_000]})
        assert end.wait(10)
        watch._thread.join(10)
    assert ended[0][0] == LOST and "lost process 0, the coordinator" in ended[0][1] and "silent" in ended[0][1]


def test_a_value_that_is_no_json_is_the_caller_s_error_and_all_see_what_json_makes_of_one(monkeypatch):
    with pytest.raises(TypeError):
        Watchdog().decide("x", object(), lambda _: None)
    assert Watchdog().decide("x", (1, 2), lambda values: tuple(values[0])) == [1, 2]
    with connected(2, monkeypatch) as (watches, _):
        assert run_all(watches, lambda watch, i: watch.decide("x", (i,), lambda v: (v,))) == [[[[0], [1]]]] * 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_process_whose_stderr_cannot_be_written_ends_all_the_same():
    script = "from paged_dist import Watchdog\nWatchdog(5)._state.end_process(3, 'lost')\n"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-P", "-c", script], stderr=full, timeout=LIMIT)
    assert done.returncode == LOST


@ENDS
def test_one_that_raises_ends_the_others_and_goes_on_to_raise(monkeypatch):
    monkeypatch.setattr("paged_dist.cluster.verdicts.PATIENCE", 0.3)
    monkeypatch.setattr("paged_dist.cluster.watchdog.PATIENCE", 0.5)
    with connected(3, monkeypatch) as (watches, ended):

        def work(watch, i):
            watch.step(4)
            if i == 1:
                raise KeyError("gone")
            until = time.monotonic() + 8
            while watch.process_id not in ended and time.monotonic() < until:
                time.sleep(0.01)
            raise SystemError("ended")  # the process would be gone

        results = run_all(watches, work)
    assert isinstance(results[1], KeyError) and set(ended) == {0, 2}
    for code, text in ended.values():
        assert code == LOST and re.fullmatch(r"process 1 \(.+\) failed at step 4: KeyError: 'gone'", text)


@pytest.mark.parametrize("bad", [0, -1, float("inf"), float("nan"), "60", True])
def test_a_time_out_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match="timeout_seconds="):
        Watchdog(bad)
    with pytest.raises(ValueError, match="start_timeout_seconds="):
        Watchdog(60, start_timeout_seconds=bad)
    if bad != float("inf"):
        with pytest.raises(ValueError, match="phase_timeout_seconds="):
            Watchdog(60, phase_timeout_seconds=bad)
        with pytest.raises(ValueError, match="timeout_seconds="):
            Watchdog().phase("x", timeout_seconds=bad)


def until_ended(watch, ended, seconds=15):
    """Waits as a collective does, until the watch ends this process."""
    until = time.monotonic() + seconds
    while watch.process_id not in ended and time.monotonic() < until:
        time.sleep(0.01)
    raise SystemError("ended")


@ENDS
def test_the_digests_of_the_allocators_are_compared(monkeypatch):
    monkeypatch.setattr("paged_dist.cluster.watchdog.PATIENCE", 0.1)
    spec = CacheSpec(num_kv_heads=2, head_dim=128, num_pages=8)
    pages = [PageAllocator(spec, make_pod_mesh(data=1, devices=jax.devices()[:1]), 2, 4) for _ in range(2)]
    with connected(2, monkeypatch) as (watches, ended):

        def alike(watch, i):
            for step in range(20):
                pages[i].allocate(0, 5), pages[i].free(0)
                watch.step(np.int32(step), digest=pages[i].digest())
            watch.step(20, digest=7)
            watch.step(21, digest=np.int64(7))

        assert run_all(watches, alike) == [None, None] and not ended
    with connected(2, monkeypatch) as (watches, ended):

        def apart(watch, i):
            pages[i].allocate(0, 5 + 200 * i)
            watch.step(3, digest=pages[i].digest())
            until_ended(watch, ended)

        run_all(watches, apart)
    digests = " on process 0 .+, ".join(p.digest() for p in pages)
    for code, text in ended.values():
        assert code == DISAGREE and re.search(f"digest at step 3: {digests} on process 1", text)
    assert set(ended) == {0, 1}


@pytest.mark.parametrize(("number", "digest", "name"), [(1.5, None, "number"), (1, 1.5, "digest"), (1, b"a", "digest")])
def test_a_step_or_digest_of_another_kind_is_the_caller_s_error(number, digest, name):
    with pytest.raises(ValueError, match=f"{name}=.*must be a whole number"):
        Watchdog().step(number, digest=digest)


@pytest.mark.parametrize("where", ["leaves late", "comes late"])
@pytest.mark.parametrize("late", [0, 1, 2])
def test_one_watchdog_after_another_whoever_is_late(monkeypatch, late, where):
    say = WatchState.say

    def say_late(self, message):
        time.sleep(0.3 if where == "leaves late" and self.settings.process_id == late and "end" in message else 0)
        say(self, message)

    monkeypatch.setattr(WatchState, "say", say_late)
    with connected(3, monkeypatch) as (watches, ended):
        rounds = [watches, *([Watchdog(10) for _ in range(3)] for _ in range(2))]

        def work(i):
            said = []
            for n, of_all in enumerate(rounds):
                time.sleep(0.3 if where == "comes late" and i == late and n == 1 else 0)
                with of_all[i] as watch:
                    said.append(watch.decide("a", [n, i], lambda values: values))
                    watch.agree({"n": n})
                    watch.step(n, digest=str(n))
            return said

        assert run_threads(3, work) == [[[[n, i] for i in range(3)] for n in range(3)]] * 3 and not ended


@pytest.mark.parametrize("seed", range(5))
def test_a_line_belongs_to_its_session_however_the_stream_is_cut(seed):
    rng = random.Random(seed)
    sent = [[{"n": [session, i]} for i in range(rng.randrange(4))] for session in (1, 2, 3)]
    hello = lambda session: {"hello": "x", "session": session}
    stream = b"".join(encoded(m) for i, messages in enumerate(sent) for m in [hello(i + 1), *messages])
    ours, theirs = socket.socketpair()
    with ours, theirs, selectors.DefaultSelector() as events:
        peer = Peer(ours)
        heard = []
        for session in (1, 2, 3):
            peer.begin("y")
            peer.register(events, 0)
            heard.append(peer.messages())
            size = len(stream) if session == 3 else rng.randrange(len(stream) + 1)
            part, stream = stream[:size], stream[size:]
            theirs.sendall(part)
            heard[-1] += peer.read(events) if part else []
            assert peer.present == (hello(session) in heard[-1]) == bool(heard[-1])
            events.unregister(ours)
        assert heard[2] == [hello(3), *sent[2]]  # the last session has read all; what was left of the others is dropped
        for i in (0, 1):
            whole = [hello(i + 1), *sent[i]]
            assert heard[i] == whole[: len(heard[i])]


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_a_watchdog_leaves_nothing_open(monkeypatch):
    with connected(2, monkeypatch) as (watches, ended):
        assert run_all(watches, lambda watch, i: watch.meet("x")) == [None, None] and not ended
        watches.clear()
        gc.collect()  # what is left open warns now


def test_a_watchdog_inside_another_and_one_entered_twice_are_refused(monkeypatch):
    with Watchdog() as watch:
        pass
    with pytest.raises(RuntimeError, match="was entered before"):
        watch.__enter__()
    with connected(2, monkeypatch) as (watches, ended):
        inner = [Watchdog(10) for _ in range(2)]

        def work(watch, i):
            with pytest.raises(RuntimeError, match="another Watchdog of this process is in its block"):
                inner[i].__enter__()
            watch.meet("x")

        assert run_all(watches, work) == [None, None] and not ended
        with pytest.raises(RuntimeError, match="used as a context"):
            watches[1].meet("after the block")


@ENDS
def test_one_that_never_comes_to_the_second_watchdog_ends_the_others(monkeypatch):
    monkeypatch.setattr("paged_dist.cluster.watchdog.PATIENCE", 0.1)
    with connected(3, monkeypatch) as (watches, ended):
        assert run_all(watches, lambda watch, i: watch.meet("x")) == [None] * 3
        more = [Watchdog(10, start_timeout_seconds=3) for _ in range(3)]

        def work(i):
            with contextlib.suppress(BaseException), more[i] as watch:
                until_ended(watch, ended)

        for i in (0, 2):
            threading.Thread(target=work, args=(i,), daemon=True).start()
        until = time.monotonic() + 15
        while set(ended) != {0, 2} and time.monotonic() < until:
            time.sleep(0.01)
    for code, text in ended.values():
        assert code == LOST and "lost process 1" in text and "has not come into the block of this Watchdog" in text


@ENDS
def test_a_phase_longer_than_the_time_out_is_left_alone_and_one_longer_than_its_own_is_not(monkeypatch):
    monkeypatch.setattr("paged_dist.cluster.watchdog.PATIENCE", 0.1)
    with connected(3, monkeypatch, timeout_seconds=3) as (watches, ended):
        released = threading.Event()

        def work(watch, i):
            watch.step(5)
            if i == 0:
                watch.phase("checkpoint")
                time.sleep(3.5)
                released.set()
            watch.step(6)
            assert released.wait(20)

        assert run_all(watches, work) == [None] * 3 and not ended
    with connected(2, monkeypatch, phase_timeout_seconds=0.5) as (watches, ended):

        def hang(watch, i):
            watch.phase("compile")
            until_ended(watch, ended)

        run_all(watches, hang)
    for code, text in ended.values():
        assert code == LOST and text.startswith("phase 'compile' has not ended for ") and "on any process" in text
    assert set(ended) == {0, 1}


def handler(number):
    """The address of the signal's handler."""
    return handler_in(action_of(number))


def test_sigterm_is_watched_in_the_main_thread_only_and_says_so_elsewhere():
    found = []

    def work():
        with warnings.catch_warnings(record=True) as caught, Watchdog() as watch:
            warnings.simplefilter("always")
            watch.watch_for_preemption()
        found.extend(str(w.message) for w in caught)

    before = handler(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1 and "off the main thread" in found[0] and "call it in the main thread" in found[0]
    assert handler(signal.SIGTERM) == before


def test_handlers_set_from_c_are_put_back_as_they_were():
    """JAX's runtime sets one of SIGTERM, faulthandler of SIGABRT; Python's own table does not know them."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = action_of(signal.SIGTERM), action_of(signal.SIGABRT)
    known = signal.getsignal(signal.SIGTERM)
    try:
        libc.signal(signal.SIGTERM, ctypes.cast(libc.sleep, ctypes.c_void_p))
        ours = handler(signal.SIGTERM)
        with Watchdog() as watch:
            watch.watch_for_preemption(), watch.watch_for_preemption()
            assert handler(signal.SIGTERM) != ours
        assert handler(signal.SIGTERM) == ours and signal.getsignal(signal.SIGTERM) == known
        slow = SlowAbort()
        assert handler(signal.SIGABRT) != handler_in(before[1])
        slow.release()
        assert handler(signal.SIGABRT) == handler_in(before[1])
        slow.release()
        assert handler(signal.SIGABRT) == handler_in(before[1])
    finally:
        set_action(signal.SIGTERM, before[0]), set_action(signal.SIGABRT, before[1])


@pytest.mark.parametrize("name", shared_flags.TIMEOUTS)
def test_a_launcher_has_a_flag_for_each_time_out_and_refuses_what_is_none(monkeypatch, name):
    with flagsaver.flagsaver():
        flags.FLAGS(["decode", f"--{name}=7"])
        asked = {}
        monkeypatch.setattr(
            "paged_dist.launch.common.start_jax.Watchdog", lambda timeout, **k: asked.update(k, timeout_seconds=timeout)
        )
        watchdog("decode")
        usual = {"timeout_seconds": 60, "start_timeout_seconds": None, "phase_timeout_seconds": 3600}
        assert asked == usual | {name: 7, "name": "decode"}
        for bad in ("0", "-1", "inf", "nan"):
            flags.FLAGS(["decode", f"--{name}={bad}"])
            with pytest.raises(ValueError, match=rf"^--{name}=.*: must be above 0 and finite"):
                start_jax("decode")


# Real processes, and what befalls them

LIMIT = 200  # seconds, for all of them; less than faulthandler_timeout
ONE_AFTER_ANOTHER = """
import faulthandler, signal, time
import jax
from jax.experimental import multihost_utils
from paged_dist import Watchdog
from paged_dist.cluster.signals import action_of, handler_in
faulthandler.enable()
handlers = lambda: [handler_in(action_of(n)) for n in (signal.SIGTERM, signal.SIGABRT)]
before = handlers()
assert all(before)  # JAX's, faulthandler's
with Watchdog(30) as watch:
    watch.watch_for_preemption()
    assert handlers()[0] != before[0] and (handlers()[1] != before[1]) == (info.process_id != 0)
    watch.meet("a")
    watch.step(0, digest="0a1b")
assert handlers() == before
time.sleep(0.3 * (info.process_id == {late}))
with Watchdog(30) as watch:
    total = watch.decide("a", info.process_id, sum)
    watch.step(0, digest="1b")
    gathered = multihost_utils.process_allgather(jax.numpy.array(info.process_id)).tolist()
assert handlers() == before
print("RESULT", total, gathered)
"""


@pytest.mark.parametrize("late", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_real_processes_have_one_watchdog_after_another_and_their_handlers_back(late):
    address = f"127.0.0.1:{free_port()}"
    scripts = [start(address, 3, i) + ONE_AFTER_ANOTHER.format(late=late) for i in range(3)]
    for code, out, err in run_processes(scripts, LIMIT):
        assert code == 0 and "RESULT 3 [0, 1, 2]" in out, err


SMALL = ["--max_context=50", "--layers=1", "--num_kv_heads=2", "--num_q_heads=2", "--batch=4", "--oracle_samples=2"]
FAULTY = [sys.executable, "-P", os.path.join(os.path.dirname(__file__), "..", "support", "faulty_decode.py")]


class Pod:
    """`count` processes of the decode launcher, each with one device and a context shard of every sequence."""

    def __init__(self, tmp_path, count=2, fault="none:0:0", arguments=(), start=None, timeout=15, generated=400):
        self.output = tmp_path / "out.jsonl"
        self.processes, self._held = [], reserve_port()
        port = self._held.getsockname()[1]
        shape = ["--num_requests=4", f"--max_generated={generated}", "--length_scale=5", *SMALL]
        shape += [f"--context={count}", "--model=1", f"--timeout_seconds={timeout}", f"--output={self.output}"]
        self.logs = [tmp_path / f"log{i}" for i in range(count)]
        for i in range(count) if start is None else start:
            environment = pod_environment(i, count, 1, port, dict(os.environ)) | {"FAULT": fault}
            with open(self.logs[i], "ab") as log:
                command = [*FAULTY, *shape, *arguments]
                self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for p in self.processes:
            p.kill()  # SIGKILL, also to what was stopped
            p.wait()
        self._held.close()

    def log(self, i):
        return self.logs[i].read_text()

    def wait_for(self, holds, limit=LIMIT):
        until = time.monotonic() + limit
        while not holds():
            assert time.monotonic() < until, [self.log(i) for i in range(len(self.processes))]
            time.sleep(0.02)

    def ends(self, *which, limit=LIMIT):
        """The exit codes of these processes, and the seconds that the last took since the fault."""
        self.wait_for(lambda: any("fault: " in path.read_text() for path in self.logs if path.exists()))
        begin = time.monotonic()
        self.wait_for(lambda: all(self.processes[i].poll() is not None for i in which), limit)
        return [self.processes[i].returncode for i in which], time.monotonic() - begin

    def last_line(self, i):
        return self.log(i).strip().splitlines()[-1]

    def records(self):
        return [json.loads(line) for line in self.output.read_text().splitlines()] if self.output.exists() else []


def test_a_process_that_is_killed_ends_the_others_who_name_it_and_its_step(tmp_path):
    with Pod(tmp_path, 3, "SIGKILL:1:40") as pod:
        codes, seconds = pod.ends(0, 2)
        assert codes == [LOST, LOST] and seconds < 15
        for i in (0, 2):
            lost = rf"error: lost process 1 \(.+, pid {pod.processes[1].pid}\), last heard of at step \d+: "
            assert re.search(lost + "its connection ended, the process is gone", pod.last_line(i)), pod.log(i)
        assert "process 0 is at step 40" in pod.last_line(0) or "at step 40:" in pod.last_line(0)
        assert pod.records() == []


def test_a_coordinator_that_dies_ends_the_others(tmp_path):
    with Pod(tmp_path, 2, "SIGKILL:0:40") as pod:
        codes, seconds = pod.ends(1)
        assert codes == [LOST] and seconds < 15
        lost = (
            rf"error: lost process 0 \(.+, pid {pod.processes[0].pid}\), the coordinator, last heard of at .*step.*: "
        )
        assert re.search(lost + "its connection ended, .* this one is at step 40$", pod.last_line(1)), pod.log(1)


@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_raises_in_a_step_ends_the_others_and_shows_its_traceback(tmp_path, who):
    with Pod(tmp_path, 2, f"raise:{who}:40") as pod:
        codes, seconds = pod.ends(0, 1)
        assert codes[who] == 1 and codes[1 - who] == LOST and seconds < 15
        assert pod.last_line(who) == "ZeroDivisionError: as the test wants it"
        failed = rf"error: process {who} \(.+\) failed at step 40: ZeroDivisionError: as the test wants it"
        assert re.search(failed, pod.last_line(1 - who)), pod.log(1 - who)


@pytest.mark.parametrize("who", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_is_stopped_ends_the_others_within_the_time_out(tmp_path, who):
    with Pod(tmp_path, 2, f"SIGSTOP:{who}:40", timeout=8) as pod:
        codes, seconds = pod.ends(1 - who, limit=30)
        assert codes == [LOST] and 4 < seconds < 9
        silent = r"it has been silent for \d s"
        lost = (
            r"lost process 1 \(.+\), last heard of at step \d+: "
            if who
            else r"lost process 0 \(.+\), the coordinator, last heard of at .*step.*: "
        )
        assert re.search(lost, pod.last_line(1 - who)) and re.search(silent, pod.last_line(1 - who)), pod.log(1 - who)
        assert "at step 40" in pod.last_line(1 - who)
        assert pod.records() == []


@pytest.mark.slow
def test_a_process_that_hangs_on_its_host_is_named_by_those_that_wait(tmp_path):
    with Pod(tmp_path, 2, "hang:1:40", timeout=8) as pod:
        codes, seconds = pod.ends(0, 1, limit=30)
        assert codes == [LOST, LOST] and seconds < 9
        stuck = r"process 1 \(.+\), at step 40, is stuck, while others are at step 40, waiting for devices"
        assert all(re.search(stuck, pod.last_line(i)) for i in (0, 1)), pod.log(0)


def test_allocators_that_go_apart_end_all_with_both_digests(tmp_path):
    with Pod(tmp_path, 2, "pages:1:40") as pod:
        codes, _ = pod.ends(0, 1)
        assert codes == [DISAGREE, DISAGREE]
        apart = r"disagree on the allocator's digest at step 64: \w+ on process 0 \(.+\), \w+ on process 1 \(.+\)"
        assert all(re.search(apart, pod.last_line(i)) for i in (0, 1)), pod.log(0)


@pytest.mark.parametrize("who", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_sigterm_stops_all_at_one_step_with_a_partial_result(tmp_path, who):
    with Pod(tmp_path, 2, f"SIGTERM:{who}:40") as pod:
        codes, _ = pod.ends(0, 1)
        assert codes == [75, 75], pod.log(0)
        (record,) = pod.records()
        assert record["partial"] is True and 41 <= record["steps"] <= 41 + 6 and record["oracle_passed"]
        assert "PARTIAL" in pod.log(0) and f"asked to stop after {record['steps']} steps" in pod.log(0)


def test_a_process_that_never_comes_and_one_that_comes_twice_are_named(tmp_path):
    with Pod(tmp_path, 2, start=[1], timeout=600, arguments=["--start_timeout_seconds=4"]) as pod:
        pod.wait_for(lambda: pod.processes[0].poll() is not None)
        assert pod.processes[0].returncode == 1
        assert "timed out: process 1 of 2 waited for the coordinator at 127.0.0.1:" in pod.last_line(1)
        assert "check that process 0 runs and listens there" in pod.last_line(1)
    with Pod(tmp_path, 3, start=[0, 1, 1], timeout=4, arguments=["--start_timeout_seconds=60"]) as pod:
        pod.wait_for(lambda: all(p.poll() is not None for p in pod.processes))
        assert [p.returncode for p in pod.processes] == [1, 1, 1]
        pids = sorted(p.pid for p in pod.processes[1:])
        told = re.search(r"two processes were started with process_id=1: .+ pid (\d+), .+ pid (\d+);", pod.last_line(0))
        assert sorted(map(int, told.groups())) == pids


@pytest.mark.slow
def test_a_second_start_of_a_process_and_of_a_coordinator_leaves_the_run_alone(tmp_path):
    """Both come when the run is on its way: the port is taken, or nobody answers as the meeting does."""
    with Pod(tmp_path, 2, generated=2000) as pod:
        pod.wait_for(lambda: "compiling" in pod.log(0))
        port = int(re.search(r"coordinator 127.0.0.1:(\d+)", pod.log(0))[1])
        late = []
        for i in (0, 1):
            environment = pod_environment(i, 2, 1, port, dict(os.environ)) | {"FAULT": "none:0:0"}
            command = [*FAULTY, "--num_requests=1", "--timeout_seconds=4"]
            late.append(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT))
        assert [done.returncode for done in late] == [1, 1]
        for i, done in enumerate(late):
            two = rf"two processes were started with process_id={i}: one on .+, pid {pod.processes[i].pid}, one on"
            assert re.search(two, done.stderr), done.stderr
        pod.wait_for(lambda: all(p.poll() is not None for p in pod.processes))
        assert [p.returncode for p in pod.processes] == [0, 0] and len(pod.records()) == 1


def test_a_full_disk_ends_all_with_1_and_costs_no_line_but_its_own(tmp_path):
    """The files that process 0 writes may grow to this size and no further, as on a disk that is full."""
    whole = json.dumps({"before": "x" * 3000}) + "\n"
    (tmp_path / "out.jsonl").write_text(whole)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 1500, before[1]))
        with Pod(tmp_path, 2, generated=20) as pod:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            pod.wait_for(lambda: all(p.poll() is not None for p in pod.processes))
            assert [p.returncode for p in pod.processes] == [1, 1], pod.log(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signal_before)
    text = (tmp_path / "out.jsonl").read_text()
    assert text.startswith(whole) and "\n" not in text[len(whole) :]
    record_output.append_json_line(str(tmp_path / "out.jsonl"), {"after": 1})
    rows, warning = read_rows(str(tmp_path / "out.jsonl"))
    assert rows == [json.loads(whole), {"after": 1}] and "line 2: not JSON" in warning


def test_the_coordinator_of_a_local_pod_listens_on_loopback_alone(tmp_path):
    with Pod(tmp_path, 2, "SIGSTOP:0:40", timeout=60) as pod:
        pod.wait_for(lambda: "fault: " in pod.log(0))
        port = int(re.search(r"coordinator 127.0.0.1:(\d+)", pod.log(0))[1])
        listening = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            with open(table) as file:
                for fields in map(str.split, list(file)[1:]):
                    address, at = fields[1].split(":")
                    if fields[3] == "0A" and int(at, 16) == port:
                        listening.add(address)
        assert listening == {"0100007F"} or listening == {"0000000000000000FFFF00000100007F"}, listening
