"""What process 0 judges of a run's processes, on a clock of the test's own."""

import pytest

from paged_dist import Watchdog
from paged_dist.cluster.progress import Progress
from paged_dist.cluster.verdicts import DISAGREE, IDLE, LOST, PATIENCE, START, Judge


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
