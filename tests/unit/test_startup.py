"""initialize_distributed in one process: who meets whom on a port, what is asked of JAX, and what is refused."""

import contextlib
import os
import re
import socket
import threading
import time

import jax
import pytest
from processes import free_port

from paged_dist.cluster import meeting as _meeting
from paged_dist.cluster import startup as distributed
from paged_dist.cluster.addresses import is_on_this_host
from paged_dist.cluster.startup import DistributedInfo, initialize_distributed, split_address


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
