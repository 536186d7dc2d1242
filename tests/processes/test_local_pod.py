"""A pod of processes on this host: output, exit codes, and that none is left behind."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings

import jax
import pytest
from commands import wait_for

from paged_dist.launch.common.local_processes import dies_with_parent, launcher_command, pod_environment, reserve_port
from paged_dist.launch.local_pod import run_pod

LIMIT = 60  # seconds until a pod under test is killed
MODULE = [sys.executable, "-m", "paged_dist.launch.local_pod"]


@pytest.fixture
def run_local_pod(tmp_path):
    """`run_local_pod(script, *flags)` starts a local pod of `script`; killed at the end whatever happened."""
    started = []

    def start(script, *flags):
        path = tmp_path / "launcher.py"
        path.write_text(
            "import os, signal, subprocess, sys, time\nme = int(os.environ.get('JAX_PROCESS_ID', 0))\n"
            f"folder = {str(tmp_path)!r}\n" + textwrap.dedent(script)
        )
        # A suite in a shell's background has it ignored, and so would what it starts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            [*MODULE, *flags, "--", str(path), "--its=own"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        signal.signal(signal.SIGINT, before)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def runs(pid: int) -> bool:
    """Whether process `pid` still executes; one that waits to be reaped by somebody does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids(tmp_path, count):
    """The ids that `count` processes of the pod wrote to files pid*."""
    files = lambda: [f for f in tmp_path.glob("pid*") if f.read_text().endswith("\n")]
    wait_for(lambda: len(files()) == count)
    return [int(f.read_text()) for f in files()]


WRITE_PID = """
with open(f'{folder}/pid{me}', 'w') as f:
    print(os.getpid(), file=f)
"""
SLEEP = WRITE_PID + "time.sleep(100)\n"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP  # as jax.distributed makes them


def test_lines_are_prefixed_whole_and_keep_their_stream(run_local_pod):
    p = run_local_pod(
        """
        print('out', me, sys.argv[1:], flush=True)
        sys.stdout.write('two '); sys.stdout.flush(); time.sleep(0.2); print('halves', flush=True)
        print('err', me, file=sys.stderr)
        sys.stdout.write('no newline')
        """,
        "--processes=2",
        "--devices=1",
    )
    out, err = p.communicate(timeout=LIMIT)
    assert p.returncode == 0
    for i in range(2):
        mine = [line for line in out.splitlines() if line.startswith(f"[p{i}] ")]
        assert mine == [f"[p{i}] out {i} ['--its=own']", f"[p{i}] two halves", f"[p{i}] no newline"]
        assert f"[p{i}] err {i}" in err.splitlines()
    assert len(out.splitlines()) == 6


def test_much_output_arrives_whole(run_local_pod):
    p = run_local_pod("for i in range(20000): print(me, i, 'x' * 50)\n", "--processes=2", "--devices=1")
    out, _ = p.communicate(timeout=LIMIT)
    lines = out.splitlines()
    for i in range(2):
        assert [x for x in lines if x.startswith(f"[p{i}]")] == [f"[p{i}] {i} {n} {'x' * 50}" for n in range(20000)]


def test_the_first_failure_ends_the_others_and_is_the_exit_code(run_local_pod, tmp_path):
    start = time.monotonic()
    p = run_local_pod(
        STUBBORN.replace("time.sleep(100)", "time.sleep(100 if me else 0.5); sys.exit(7)"), "--processes=3"
    )
    _, err = p.communicate(timeout=LIMIT)
    assert p.returncode == 7 and "process 0 ended with exit code 7" in err
    assert time.monotonic() - start < 20
    assert not any(map(runs, pids(tmp_path, 3)))


def test_death_by_a_signal_is_128_plus_its_number(run_local_pod):
    p = run_local_pod("os.kill(os.getpid(), signal.SIGKILL) if me == 1 else time.sleep(100)", "--processes=2")
    p.communicate(timeout=LIMIT)
    assert p.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_the_pod_ends_every_process(run_local_pod, tmp_path, number, code):
    p = run_local_pod(STUBBORN, "--processes=2", "--grace_seconds=1.5")
    children = pids(tmp_path, 2)
    p.send_signal(number)
    out, err = p.communicate(timeout=LIMIT)
    assert p.returncode == code and "Traceback" not in out + err
    assert not any(map(runs, children))


def test_a_second_ctrl_c_kills_the_processes(run_local_pod, tmp_path):
    p = run_local_pod(STUBBORN, "--processes=2", "--grace_seconds=1000")
    children = pids(tmp_path, 2)
    p.send_signal(signal.SIGINT)
    assert "Ctrl-C once more kills them" in p.stderr.readline()
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=LIMIT)
    assert p.returncode == 130 and "Traceback" not in out + err
    assert not any(map(runs, children))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_sigterm_and_ctrl_c_let_the_processes_end_by_themselves(run_local_pod, tmp_path, number, code):
    late = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1.5), print('wrote', me, flush=True), sys.exit(75)))\n"
    p = run_local_pod(late + SLEEP, "--processes=2")
    children = pids(tmp_path, 2)
    p.send_signal(number)
    out, _ = p.communicate(timeout=LIMIT)
    assert p.returncode == code and {"[p0] wrote 0", "[p1] wrote 1"} <= set(out.splitlines())
    assert not any(map(runs, children))


def test_the_process_that_failed_counts_and_not_those_that_lost_it(run_local_pod):
    p = run_local_pod("time.sleep(0.1 if me else 1); sys.exit(3 if me else 9)", "--processes=3")
    _, err = p.communicate(timeout=LIMIT)
    assert p.returncode == 9 and "process 0 ended with exit code 9" in err


def test_killing_the_pod_itself_leaves_no_orphan(run_local_pod, tmp_path):
    p = run_local_pod(STUBBORN, "--processes=2")
    children = pids(tmp_path, 2)
    assert all(map(runs, children))
    p.kill()
    p.wait(timeout=LIMIT)
    wait_for(lambda: not any(map(runs, children)))


def test_a_parent_that_dies_at_once_leaves_no_child_whatever_the_child_was_at(tmp_path):
    """Killed while the child is a fork, the program in between, or itself already."""
    command = dies_with_parent([sys.executable, "-c", "import time; time.sleep(100)"])
    script = f"""
import os, signal, subprocess, sys, time
command = [str(os.getpid()) if word == {str(os.getpid())!r} else word for word in {command!r}]
child = subprocess.Popen(command)
with open({str(tmp_path / "pid")!r} + sys.argv[1], "w") as file:
    print(child.pid, file=file)
time.sleep(float(sys.argv[1]))
os.kill(os.getpid(), signal.SIGKILL)
"""
    waits = ["0", "0.01", "0.02", "0.05", "0.3"]
    parents = [subprocess.Popen([sys.executable, "-c", script, seconds]) for seconds in waits]
    for parent in parents:
        assert parent.wait(LIMIT) == -signal.SIGKILL
    children = pids(tmp_path, len(waits))
    wait_for(lambda: not any(map(runs, children)))


def test_a_process_with_threads_starts_a_pod_without_forking_python(capfd):
    """JAX warns of a fork of a process in which it runs, Python 3.12 of one in which any thread does."""
    jax.devices()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        command = [sys.executable, "-c", "import os, signal; print(os.getsid(0) == os.getpid(), 'x' * 3)"]
        assert run_pod(command, 2, 1) == 0
    assert [str(w.message) for w in caught] == []
    assert sorted(capfd.readouterr().out.splitlines()) == ["[p0] True xxx", "[p1] True xxx"]


def test_a_child_has_the_signals_that_it_would_have_without_the_program_in_between(capfd):
    ignored = ["sed", "-n", "/^SigIgn/p", "/proc/self/status"]
    direct = subprocess.run(ignored, capture_output=True, text=True)
    assert run_pod(ignored, 1, 1) == 0
    assert capfd.readouterr().out == f"[p0] {direct.stdout}"


def test_what_a_process_started_ends_with_the_pod(run_local_pod, tmp_path):
    p = run_local_pod(
        WRITE_PID
        + """
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])
with open(f'{folder}/pid-child{me}', 'w') as f:
    print(child.pid, file=f)
import glob
while len([p for p in glob.glob(f'{folder}/pid*') if os.path.getsize(p)]) < 4:  # all have written theirs
    time.sleep(0.05)
sys.exit(0 if me else 3)
""",
        "--processes=2",
    )
    p.communicate(timeout=LIMIT)
    assert p.returncode == 3
    assert not any(map(runs, pids(tmp_path, 4)))


def test_time_out_ends_the_pod_with_124(run_local_pod, tmp_path):
    p = run_local_pod(STUBBORN, "--processes=2", "--timeout_seconds=1.5")
    _, err = p.communicate(timeout=LIMIT)
    assert p.returncode == 124 and "time is up; still running: 0, 1" in err
    assert not any(map(runs, pids(tmp_path, 2)))


@pytest.mark.parametrize("arguments", [["--processes=0", "decode"], ["--devices=x", "decode"], [], ["--no", "decode"]])
def test_bad_arguments_give_one_line_and_exit_code_2(arguments):
    p = subprocess.run([*MODULE, *arguments], capture_output=True, text=True, timeout=LIMIT)
    assert p.returncode == 2 and p.stdout == ""
    assert len(p.stderr.splitlines()) == 1 and "error: " in p.stderr


@pytest.mark.parametrize("launcher", ["no_such_launcher", "no.such.module", "no_such_script.py"])
def test_an_unknown_launcher_starts_nothing(launcher):
    p = subprocess.run([*MODULE, "--processes=1", "--", launcher, "--x"], capture_output=True, text=True, timeout=LIMIT)
    assert p.returncode == 2 and p.stdout == ""
    assert len(p.stderr.splitlines()) == 1 and launcher in p.stderr


def test_a_dry_run_prints_the_command_and_starts_nothing(tmp_path):
    arguments = ["--dry_run", "--processes=2", "--", "decode", f"--output={tmp_path}/a b; c"]
    p = subprocess.run([*MODULE, *arguments], capture_output=True, text=True, timeout=LIMIT)
    command, *told, last = p.stdout.splitlines()
    assert p.returncode == 0 and last == "dry run: 2 processes; nothing was started"
    assert shlex.split(command)[1:] == ["-m", "paged_dist.launch.decode", f"--output={tmp_path}/a b; c"]
    assert [f"JAX_PROCESS_ID={i}" in line for i, line in enumerate(told)] == [True, True]


def test_each_process_is_told_its_place_and_its_devices():
    base = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=9", "JAX_PROCESS_ID": "5", "HOME": "/h"}
    two = pod_environment(1, 2, 4, 1234, base)
    assert two["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_force_host_platform_device_count=4"]
    assert (two["JAX_PROCESS_ID"], two["JAX_NUM_PROCESSES"]) == ("1", "2")
    assert two["JAX_COORDINATOR_ADDRESS"] == two["JAX_COORDINATOR_BIND_ADDRESS"] == "127.0.0.1:1234"
    one = pod_environment(0, 1, 8, 1234, base)
    assert not any(name.startswith(("JAX_COORD", "JAX_PROC", "JAX_NUM")) for name in one), "a lone process needs nobody"
    assert one["HOME"] == "/h" and one["JAX_PLATFORMS"] == "cpu"


def test_a_reserved_port_can_be_listened_on_by_the_coordinator_and_is_given_to_nobody_else():
    with reserve_port() as held:
        port = held.getsockname()[1]
        with socket.create_server(("127.0.0.1", port)), pytest.raises(OSError), socket.socket() as other:
            other.bind(("127.0.0.1", port))
        with contextlib.closing(socket.socket()) as plain, pytest.raises(OSError):
            plain.bind(("127.0.0.1", port))


def test_launchers_are_named_by_name_module_or_script():
    python = [sys.executable, *(["-P"] if sys.flags.safe_path else [])]
    assert launcher_command("decode", ["--a"]) == [*python, "-m", "paged_dist.launch.decode", "--a"]
    assert launcher_command("x.y", []) == [*python, "-m", "x.y"]
    assert launcher_command(os.path.join("a", "b.py"), []) == [*python, os.path.join("a", "b.py")]
