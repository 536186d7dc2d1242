"""The tests of tests/device, without a TPU: skipped with the reason, or rehearsed on the CPU."""

import subprocess
import sys

import pytest
from commands import clean_environment, run_command
from processes import free_port
from repository import TREE

DEVICE_TESTS = [sys.executable, "-P", "-m", "pytest", "tests/device", "-m", "device", "-q", "-p", "no:cacheprovider"]


def test_without_a_tpu_each_is_skipped_with_the_reason():
    code, out, err = run_command(DEVICE_TESTS, cwd=TREE, PAGED_DIST_TEST_DEVICE="tpu", JAX_PLATFORMS="cpu")
    assert code == 0, out + err
    assert "no TPU is attached to this host" in out and " passed" not in out and " skipped" in out


@pytest.mark.parametrize(
    "chosen",
    [
        "a_fork or context_axis",
        pytest.param("not a_fork and not context_axis", marks=pytest.mark.slow),
    ],
)
def test_a_rehearsal_on_the_cpu_passes(chosen, tmp_path):
    command = [*DEVICE_TESTS, "--rehearse", "-s", "-k", chosen, f"--basetemp={tmp_path}/rehearsal"]
    code, out, err = run_command(command, cwd=TREE, limit=900)
    assert code == 0, out + err
    assert " passed" in out and "(small) | paged-dist | cpu, wall clock" in out
    rows = (tmp_path / "rehearsal" / "device_times.jsonl").read_text().splitlines()
    assert rows and all('"small": true' in row for row in rows)


@pytest.mark.slow
def test_a_rehearsal_as_two_hosts_of_a_slice_passes(tmp_path):
    """Each host runs the same command; the devices of both make the meshes."""
    meeting = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    hosts = [
        subprocess.Popen(
            [*DEVICE_TESTS, "--rehearse", "-k", "bf16 or a_fork or moved", f"--basetemp={tmp_path}/host{i}"],
            cwd=TREE,
            env=clean_environment() | meeting | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for host in hosts:
            out, _ = host.communicate(timeout=600)
            assert host.returncode == 0 and " passed" in out, out
    finally:
        for host in hosts:
            host.kill()
            host.wait()
