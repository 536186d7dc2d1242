"""initialize_distributed: real processes over loopback, and what it refuses. Every process here has a hard end."""

import contextlib
import os
import re
import socket
import subprocess
import threading
import time

import jax
import pytest
from processes import free_port, results_of, run_processes, start, start_processes

from paged_dist.cluster import meeting as _meeting
from paged_dist.cluster import startup as distributed
from paged_dist.cluster.addresses import is_on_this_host, split_address
from paged_dist.cluster.distributed_info import DistributedInfo
from paged_dist.cluster.startup import initialize_distributed

PSUM = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from paged_dist.describe import describe_mesh
from paged_dist.mesh import make_pod_mesh
assert initialize_distributed({address!r}, 2, {index}) == info
mesh = make_pod_mesh(model=2)
x = jax.device_put(np.arange(1.0, 5.0, dtype=np.float32).reshape(2, 2), jax.NamedSharding(mesh, P("data", "model")))
both = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, ("data", "model")), mesh=mesh, in_specs=P("data", "model"),
                             out_specs=P(None, None)))(x)
gathered = multihost_utils.process_allgather(np.array(jax.process_index() + 7)).tolist()
print("RESULT", info.process_id, info.num_processes, info.how, float(both[0, 0]), gathered)
print(describe_mesh(mesh))
"""


def test_two_processes_of_two_devices_sum_over_all_four():
    address = f"127.0.0.1:{free_port()}"
    results = run_processes([start(address, 2, i) + PSUM.format(address=address, index=i) for i in range(2)], 60)
    for i, (code, out, err) in enumerate(results):
        assert code == 0, err
        # gloo prints lines of its own before
        assert f"RESULT {i} 2 explicit 10.0 [7, 8]\n" in out
    described = [out[out.index("mesh:") :] for _, out, _ in results]
    assert (
        described[0]
        == described[1]
        == (
            "mesh: data 2 x context 1 x model 2 = 4 devices (cpu), 2 processes, no physical coordinates\n"
            "  data 2: all 2 processes\n"
            "  context 1: nothing is split\n"
            "  model 2: all 2 devices of a process\n"
        )
    )


def test_a_slurm_step_is_detected_and_the_log_line_says_so():
    port = free_port()
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(port),
    }
    script = """
    import os, sys
    os.environ["SLURM_PROCID"] = os.environ["SLURM_LOCALID"] = "{i}"
    from absl import logging
    logging.use_absl_handler(); logging.set_verbosity(logging.INFO)
    from paged_dist.cluster.startup import initialize_distributed
    info = initialize_distributed()
    import jax
    print(info.how, info.process_id, info.num_processes, info.coordinator_address, jax.device_count())
    """
    results = run_processes([script.format(i=i) for i in range(2)], 60, **slurm)
    for i, (code, out, err) in enumerate(results):
        assert code == 0, err
        assert out.split()[-5:] == ["detected:slurm", str(i), "2", f"127.0.0.1:{port}", "4"]
        lines = [line for line in err.splitlines() if "distributed: process" in line]
        assert len(lines) == 1
        assert lines[0].endswith(f"distributed: process {i} of 2, coordinator 127.0.0.1:{port}, detected:slurm")


def test_one_process_with_nothing_set_needs_no_network_and_starts_no_back_end():
    script = """
    import jax, socket
    def refuse(*a, **k): raise AssertionError("the network was touched")
    socket.socket = socket.create_connection = socket.getaddrinfo = refuse
    from paged_dist._compat import backends_are_initialized
    from paged_dist.cluster.startup import initialize_distributed
    assert not backends_are_initialized()
    info = initialize_distributed()
    assert not backends_are_initialized()
    assert initialize_distributed() is info
    try:
        initialize_distributed("127.0.0.1:1", 1, 0)
    except RuntimeError as e:
        print(info, "|", e)
    """
    [(code, out, err)] = run_processes([script], 60)
    assert code == 0, err
    info, again = out.split(" | ")
    assert info == str(DistributedInfo(0, 1, None, "single"))
    assert "was called already" in again


def test_a_call_after_jax_has_started_is_refused():
    [(code, _, err)] = run_processes(["import jax\njax.devices()\n" + start(f"127.0.0.1:{free_port()}", 2, 0)], 60)
    assert code == 1
    assert "must be called before any JAX computation" in err


def test_an_unreachable_coordinator_is_an_exception_within_the_time_out():
    address = f"127.0.0.1:{free_port()}"
    began = time.monotonic()
    [(code, _, err)] = run_processes([start(address, 2, 1, timeout_seconds=5)], 30)
    assert code == 1, err
    assert 5 <= time.monotonic() - began < 20
    assert f"RuntimeError: timed out: process 1 of 2 waited for the coordinator at {address} (" in err
    assert "check that process 0 runs and listens there" in err


def test_missing_processes_are_named_to_those_that_came():
    address = f"127.0.0.1:{free_port()}"
    results = run_processes([start(address, 4, i, timeout_seconds=5) for i in (0, 2)], 30)
    for code, _, err in results:
        assert code == 1
        assert f"2 of 4 processes did not reach the coordinator at {address}, process 1, 3; check" in err


def test_processes_that_disagree_are_told_how():
    address = f"127.0.0.1:{free_port()}"
    scripts = [start(address, 2, 0, timeout_seconds=30), start(address, 3, 2, timeout_seconds=30)]
    two = (
        r"process 2 on .+, pid \d+ was started with num_processes=3, process 0 on .+, pid \d+ with 2: give all the same"
    )
    for code, _, err in run_processes(scripts, 60):
        assert code == 1 and re.search(two, err)


@pytest.mark.parametrize("answer", [b"220 mail.example.org ESMTP\r\n", b""], ids=["speaks", "says nothing"])
def test_a_port_that_another_program_has_is_said_to_be_taken(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(
            RuntimeError, match=f"process 0 cannot listen on {address}: .*; check that .* no other process"
        ):
            _meeting.await_others(address, DistributedInfo(0, 2, address, "explicit"), time.monotonic() + 20)


TWO = re.compile(
    rf"two processes were started with process_id=(\d): one on {re.escape(socket.gethostname())}, pid (\d+), one on "
    rf"{re.escape(socket.gethostname())}, pid (\d+); give each process its own"
)


def test_two_processes_with_one_id_are_told_so():
    address = f"127.0.0.1:{free_port()}"
    scripts = [start(address, 3, i, timeout_seconds=10) for i in (0, 1, 1)]
    results = run_processes(scripts, 40)
    for code, _, err in results:
        assert code == 1
        assert TWO.search(err)[1] == "1"
    assert len({TWO.search(err).groups() for _, _, err in results}) == 1


def test_two_processes_0_of_one_host_are_both_told_so_and_not_of_a_port():
    address = f"127.0.0.1:{free_port()}"
    running = start_processes([start(address, 2, 0, timeout_seconds=40)] * 2)
    asked = {str(p.pid) for p in running}
    for code, _, err in results_of(running, 60):
        assert code == 1 and "cannot listen" not in err and "timed out" not in err
        number, *pids = TWO.search(err).groups()
        assert number == "0" and set(pids) == asked


def test_one_too_many_of_a_run_that_has_begun_is_told_who_has_its_id_and_the_run_goes_on():
    """The others are complete without it, and JAX has the port."""
    address = f"127.0.0.1:{free_port()}"
    wait = "import os, sys, time\nprint('begun', flush=True)\nsys.stdin.read()\nos._exit(0)\n"
    run = start_processes([start(address, 2, i) + wait for i in range(2)], stdin=subprocess.PIPE)
    late = []
    try:
        for p in run:
            assert p.stdout.readline() == "begun\n"
        late = start_processes([start(address, 2, i, timeout_seconds=60) for i in range(2)])
        for i, (code, _, err) in enumerate(results_of(late, 50)):
            assert code == 1
            assert TWO.search(err).groups() == (str(i), str(run[i].pid), str(late[i].pid)), err
        assert [p.poll() for p in run] == [None, None]
    finally:
        for p in run:
            p.stdin.close()
            p.stdin = None
        assert [code for code, *_ in results_of(run, 20)] == [0, 0]


def test_a_process_0_on_another_host_than_the_coordinator_s_is_told_of_the_one_there(monkeypatch):
    """Two hosts are played by two ports of this one."""
    there, here = free_port(), free_port()
    info = DistributedInfo(0, 2, f"127.0.0.1:{there}", "explicit")
    until = time.monotonic() + 30
    errors = {}

    def meet(name, bind):
        try:
            _meeting.await_others(f"127.0.0.1:{bind}", info, until)
        except RuntimeError as e:
            errors[name] = str(e)

    threads = [threading.Thread(target=meet, args=a, daemon=True) for a in (("there", there), ("here", here))]
    threads[0].start()
    wait_for_port(there).close()
    monkeypatch.setattr(_meeting, "is_on_this_host", lambda address: False)
    monkeypatch.setattr(_meeting, "this_process", lambda: "host-b 2")
    threads[1].start()
    for t in threads:
        t.join(40)
    two = r"two processes were started with process_id=0: one on (.+), pid (\d+), one on host-b, pid 2; give each"
    assert re.match(two, errors["there"]).groups() == (socket.gethostname(), str(os.getpid()))
    assert errors["here"] == errors["there"]


def test_a_process_0_without_the_coordinator_s_address_says_so_when_nobody_comes(monkeypatch):
    monkeypatch.setattr(_meeting, "is_on_this_host", lambda address: False)
    info = DistributedInfo(0, 2, f"127.0.0.1:{free_port()}", "explicit")
    with pytest.raises(RuntimeError, match=r"1 of 2 .+ \(which is no address of .+, pid \d+, that was"):
        _meeting.await_others(f"127.0.0.1:{free_port()}", info, time.monotonic() + 0.3)


@pytest.mark.parametrize(("address", "here"), [("127.0.0.1:1", True), ("localhost:1", True), ("192.0.2.1:1", False)])
def test_an_address_of_this_host_is_known_from_another(address, here):
    assert is_on_this_host(address) == here


def wait_for_port(port):
    until = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_a_stranger_on_the_port_is_not_taken_for_a_process():
    """A port scan, an HTTP probe and a connection that says nothing come first; the start-up goes on."""
    port = free_port()
    info = DistributedInfo(0, 2, f"127.0.0.1:{port}", "explicit")
    meeting = threading.Thread(target=_meeting.await_others, args=(f"127.0.0.1:{port}", info, time.monotonic() + 20))
    meeting.start()
    strangers = []
    try:
        for said in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"x" * 5000, b"paged-dist/1 one two\n"):
            s = wait_for_port(port)
            s.sendall(said)
            strangers.append(s)
        strangers.pop(0).close()
        strangers.append(
            _meeting.join(
                "127.0.0.1", port, DistributedInfo(1, 2, info.coordinator_address, "explicit"), time.monotonic() + 10
            )
        )
        meeting.join(10)
        assert not meeting.is_alive()
    finally:
        for s in strangers:
            s.close()
        meeting.join(25)


def test_a_server_of_another_kind_is_named_as_such():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve():
            for _ in range(2):
                peer, _ = server.accept()
                peer.sendall(b"220 mail.example.org ESMTP\r\n")
                peer.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        info = DistributedInfo(1, 2, f"127.0.0.1:{port}", "explicit")
        with pytest.raises(RuntimeError, match="something answers there that is not the process 0"):
            _meeting.join("127.0.0.1", port, info, time.monotonic() + 0.15)


@pytest.mark.parametrize(
    ("address", "bind", "expected"),
    [
        ("127.0.0.1:81", None, "127.0.0.1:81"),
        ("localhost:81", None, "localhost:81"),
        ("[::1]:81", None, "[::1]:81"),
        ("10.0.0.1:81", None, "[::]:81"),
        ("10.0.0.1:81", "10.0.0.1:82", "10.0.0.1:82"),
    ],
)
def test_process_0_listens_no_wider_than_it_must(monkeypatch, address, bind, expected):
    asked = {}
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    monkeypatch.setattr(distributed, "_done", None)
    monkeypatch.setattr(distributed, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(distributed, "await_others", lambda bind, *_: asked.update(meeting=bind))
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *a, **k: asked.update(k))
    initialize_distributed(address, 2, 0, bind_address=bind)
    assert asked["meeting"] == asked["coordinator_bind_address"] == expected


@pytest.mark.parametrize(
    ("silence", "shutdown", "heartbeat"), [({}, 600, 660), ({"silence_timeout_seconds": 50.0}, 50, 110)]
)
def test_the_time_for_others_to_boot_is_not_that_of_a_dead_one(monkeypatch, silence, shutdown, heartbeat):
    asked = {}
    monkeypatch.setattr(distributed, "_done", None)
    monkeypatch.setattr(distributed, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(distributed, "await_others", lambda *_: {})
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *a, **k: asked.update(k))
    initialize_distributed("127.0.0.1:81", 2, 0, timeout_seconds=600, **silence)
    assert 500 < asked["initialization_timeout"] <= 600
    assert (asked["shutdown_timeout_seconds"], asked["heartbeat_timeout_seconds"]) == (shutdown, heartbeat)


def test_cpu_collectives_are_switched_on_where_they_were_off(monkeypatch):
    monkeypatch.setattr(distributed, "_done", None)
    monkeypatch.setattr(distributed, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(distributed, "join", lambda *_: None)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *a, **k: None)
    before = jax.config.jax_cpu_collectives_implementation
    jax.config.update("jax_cpu_collectives_implementation", None)
    try:
        initialize_distributed("10.0.0.1:81", 2, 1)
        assert jax.config.jax_cpu_collectives_implementation == "gloo"
    finally:
        jax.config.update("jax_cpu_collectives_implementation", before)


def test_more_processes_meet_than_the_usual_limit_of_open_files():
    """200 processes, played by threads of one that may open 100 files at first."""
    port = free_port()
    script = f"""
    import resource, threading, time
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    from paged_dist.cluster.meeting import await_others as _await_others, join as _join
    from paged_dist.cluster.distributed_info import DistributedInfo
    until = time.monotonic() + 20
    infos = [DistributedInfo(i, 200, "127.0.0.1:{port}", "explicit") for i in range(200)]
    done = []
    def join(info):
        _join("127.0.0.1", {port}, info, until)
        done.append(info.process_id)
    threads = [threading.Thread(target=join, args=(i,)) for i in infos[1:]]
    threads.append(threading.Thread(target=_await_others, args=("127.0.0.1:{port}", infos[0], until)))
    for t in reversed(threads): t.start()
    for t in threads: t.join()
    assert sorted(done) == list(range(1, 200))
    """
    [(code, _, err)] = run_processes([script], 40)
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h:1", None, None), "num_processes=None: is missing, while coordinator_address is given; give all three"),
        ((None, 2, 0), "coordinator_address=None: is missing, while num_processes, process_id is given"),
        (("host", 2, 0), "coordinator_address='host': must be a host and a port"),
        ((":80", 2, 0), "must be a host and a port"),
        (("http://h:80", 2, 0), "must be a host and a port"),
        (("h:0", 2, 0), "must have a port from 1 to 65535"),
        (("h:65536", 2, 0), "must have a port from 1 to 65535"),
        (("h:x", 2, 0), "must have a port from 1 to 65535"),
        (("::1:80", 2, 0), "must have an IPv6 host in brackets"),
        ((80, 2, 0), "coordinator_address=80: must be a string"),
        (("h:1", 0, 0), "num_processes=0: must be at least 1"),
        (("h:1", 2.0, 0), "num_processes=2.0: must be an integer"),
        (("h:1", 2, 2), "process_id=2: must be from 0 to num_processes - 1 = 1"),
        (("h:1", 2, -1), "process_id=-1: must be from 0"),
        (("h:1", 2, True), "process_id=True: must be an integer"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments, message):
    with pytest.raises(ValueError, match=message):
        initialize_distributed(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_seconds": 0}, "timeout_seconds=0: must be a positive number"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds=nan"),
        ({"silence_timeout_seconds": -1}, "silence_timeout_seconds=-1: must be a positive number"),
        ({"bind_address": "10.0.0.1"}, "bind_address='10.0.0.1': must be a host and a port"),
        ({"local_device_ids": []}, "local_device_ids=.*must be one or more device numbers"),
        ({"local_device_ids": [-1]}, "local_device_ids=.*must be one or more device numbers"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(options, message):
    with pytest.raises(ValueError, match=message):
        initialize_distributed("h:1", 2, 0, **options)


def test_addresses_are_taken_apart():
    assert split_address("a", "tpu-host.example:8476") == ("tpu-host.example", 8476)
    assert split_address("a", "[fe80::1]:1") == ("fe80::1", 1)


def test_a_coordinator_from_the_environment_alone_is_not_silently_one_process(monkeypatch):
    monkeypatch.setattr(distributed, "_done", None)
    monkeypatch.setattr(distributed, "detect_cluster", lambda timeout: None)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:80")
    with pytest.raises(RuntimeError, match=r"JAX_COORDINATOR_ADDRESS=10\.0\.0\.1:80 is set, but no cluster"):
        initialize_distributed()


def test_a_detection_that_breaks_says_what_to_give_instead(monkeypatch):
    def broken(timeout):
        raise KeyError("TPU_WORKER_ID")

    monkeypatch.setattr(distributed, "_done", None)
    monkeypatch.setattr(distributed, "detect_cluster", broken)
    with pytest.raises(RuntimeError, match=r"TPU_WORKER_ID.*give coordinator_address, num_processes and process_id"):
        initialize_distributed()
