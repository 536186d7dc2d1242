"""initialize_distributed: real processes over loopback, and what it refuses. Every process here has a hard end."""

import re
import socket
import subprocess
import time

from processes import free_port, results_of, run_processes, start, start_processes

from paged_dist.cluster.distributed_info import DistributedInfo

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
