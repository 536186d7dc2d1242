"""Real processes under a watchdog, and what befalls them: killed, stopped, hung, late, apart, with a full disk."""

import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
from commands import COMMAND_LIMIT
from decode_pod import FAULTY_DECODE, DecodePod
from processes import free_port, run_processes, start

from paged_dist.cluster.verdicts import DISAGREE, LOST
from paged_dist.launch.common import record_output
from paged_dist.launch.comparison.run_rows import read_rows
from paged_dist.launch.local_pod import pod_environment


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_process_whose_stderr_cannot_be_written_ends_all_the_same():
    script = "from paged_dist import Watchdog\nWatchdog(5)._state.end_process(3, 'lost')\n"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-P", "-c", script], stderr=full, timeout=COMMAND_LIMIT)
    assert done.returncode == LOST


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
    for code, out, err in run_processes(scripts, COMMAND_LIMIT):
        assert code == 0 and "RESULT 3 [0, 1, 2]" in out, err


def test_a_process_that_is_killed_ends_the_others_who_name_it_and_its_step(tmp_path):
    with DecodePod(tmp_path, 3, "SIGKILL:1:40") as pod:
        codes, seconds = pod.ends(0, 2)
        assert codes == [LOST, LOST] and seconds < 15
        for i in (0, 2):
            lost = rf"error: lost process 1 \(.+, pid {pod.processes[1].pid}\), last heard of at step \d+: "
            assert re.search(lost + "its connection ended, the process is gone", pod.last_line(i)), pod.log(i)
        assert "process 0 is at step 40" in pod.last_line(0) or "at step 40:" in pod.last_line(0)
        assert pod.records() == []


def test_a_coordinator_that_dies_ends_the_others(tmp_path):
    with DecodePod(tmp_path, 2, "SIGKILL:0:40") as pod:
        codes, seconds = pod.ends(1)
        assert codes == [LOST] and seconds < 15
        lost = (
            rf"error: lost process 0 \(.+, pid {pod.processes[0].pid}\), the coordinator, last heard of at .*step.*: "
        )
        assert re.search(lost + "its connection ended, .* this one is at step 40$", pod.last_line(1)), pod.log(1)


@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_raises_in_a_step_ends_the_others_and_shows_its_traceback(tmp_path, who):
    with DecodePod(tmp_path, 2, f"raise:{who}:40") as pod:
        codes, seconds = pod.ends(0, 1)
        assert codes[who] == 1 and codes[1 - who] == LOST and seconds < 15
        assert pod.last_line(who) == "ZeroDivisionError: as the test wants it"
        failed = rf"error: process {who} \(.+\) failed at step 40: ZeroDivisionError: as the test wants it"
        assert re.search(failed, pod.last_line(1 - who)), pod.log(1 - who)


@pytest.mark.parametrize("who", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_is_stopped_ends_the_others_within_the_time_out(tmp_path, who):
    with DecodePod(tmp_path, 2, f"SIGSTOP:{who}:40", timeout=8) as pod:
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
    with DecodePod(tmp_path, 2, "hang:1:40", timeout=8) as pod:
        codes, seconds = pod.ends(0, 1, limit=30)
        assert codes == [LOST, LOST] and seconds < 9
        stuck = r"process 1 \(.+\), at step 40, is stuck, while others are at step 40, waiting for devices"
        assert all(re.search(stuck, pod.last_line(i)) for i in (0, 1)), pod.log(0)


def test_a_process_that_hangs_before_it_compiles_ends_all_by_the_phases_time_out(tmp_path):
    with DecodePod(tmp_path, 2, "set-up:1:0", ["--phase_timeout_seconds=2"], timeout=30) as pod:
        codes, _ = pod.ends(0, 1, limit=20)
        assert codes == [LOST, LOST]
        assert all("phase 'set-up'" in pod.last_line(i) for i in (0, 1)), pod.log(0)


def test_allocators_that_go_apart_end_all_with_both_digests(tmp_path):
    with DecodePod(tmp_path, 2, "pages:1:40") as pod:
        codes, _ = pod.ends(0, 1)
        assert codes == [DISAGREE, DISAGREE]
        apart = r"disagree on the allocator's digest at step 64: \w+ on process 0 \(.+\), \w+ on process 1 \(.+\)"
        assert all(re.search(apart, pod.last_line(i)) for i in (0, 1)), pod.log(0)


@pytest.mark.parametrize("who", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_sigterm_stops_all_at_one_step_with_a_partial_result(tmp_path, who):
    with DecodePod(tmp_path, 2, f"SIGTERM:{who}:40") as pod:
        codes, _ = pod.ends(0, 1)
        assert codes == [75, 75], pod.log(0)
        (record,) = pod.records()
        assert record["partial"] is True and 41 <= record["steps"] <= 41 + 6 and record["oracle_passed"]
        assert "PARTIAL" in pod.log(0) and f"asked to stop after {record['steps']} steps" in pod.log(0)


def test_a_process_that_never_comes_and_one_that_comes_twice_are_named(tmp_path):
    with DecodePod(tmp_path, 2, start=[1], timeout=600, arguments=["--start_timeout_seconds=4"]) as pod:
        pod.wait_for(lambda: pod.processes[0].poll() is not None)
        assert pod.processes[0].returncode == 1
        assert "timed out: process 1 of 2 waited for the coordinator at 127.0.0.1:" in pod.last_line(1)
        assert "check that process 0 runs and listens there" in pod.last_line(1)
    with DecodePod(tmp_path, 3, start=[0, 1, 1], timeout=4, arguments=["--start_timeout_seconds=60"]) as pod:
        pod.wait_for(lambda: all(p.poll() is not None for p in pod.processes))
        assert [p.returncode for p in pod.processes] == [1, 1, 1]
        pids = sorted(p.pid for p in pod.processes[1:])
        told = re.search(r"two processes were started with process_id=1: .+ pid (\d+), .+ pid (\d+);", pod.last_line(0))
        assert sorted(map(int, told.groups())) == pids


@pytest.mark.slow
def test_a_second_start_of_a_process_and_of_a_coordinator_leaves_the_run_alone(tmp_path):
    """Both come when the run is on its way: the port is taken, or nobody answers as the meeting does."""
    with DecodePod(tmp_path, 2, generated=2000) as pod:
        pod.wait_for(lambda: "compiling" in pod.log(0))
        port = int(re.search(r"coordinator 127.0.0.1:(\d+)", pod.log(0))[1])
        late = []
        for i in (0, 1):
            environment = pod_environment(i, 2, 1, port, dict(os.environ)) | {"FAULT": "none:0:0"}
            command = [*FAULTY_DECODE, "--num_requests=1", "--timeout_seconds=4"]
            late.append(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMMAND_LIMIT))
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
        with DecodePod(tmp_path, 2, generated=20) as pod:
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
    with DecodePod(tmp_path, 2, "SIGSTOP:0:40", timeout=60) as pod:
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
