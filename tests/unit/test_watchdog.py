"""The watch over a run's processes: what it judges, what the processes decide together, and real ones that fail."""

import contextlib
import ctypes
import gc
import itertools
import random
import re
import selectors
import signal
import socket
import threading
import time
import warnings

import flagsaver
import jax
import numpy as np
import pytest

from paged_dist import CacheSpec, Disagreement, PageAllocator, Watchdog, make_pod_mesh
from paged_dist.cluster import startup as distributed
from paged_dist.cluster.signals import SlowAbort, action_of, handler_in, set_action
from paged_dist.cluster.spoke import Spoke
from paged_dist.cluster.verdicts import DISAGREE, LOST
from paged_dist.cluster.watch_state import WatchState
from paged_dist.cluster.wire import Peer, encoded
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common import shared_flags
from paged_dist.launch.common.start_jax import start_jax, watchdog

# What process 0 judges, on a clock of the test's own


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
