"""Real processes of a test, each with a hard end."""

import os
import socket
import subprocess
import sys
import textwrap
import time


def free_port() -> int:
    """A port of the loopback interface that nobody has right now."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def start_processes(scripts, stdin=None, **environment):
    """A Python process for each of `scripts`, on two simulated devices, told of no cluster."""
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("JAX_", "SLURM_", "OMPI_", "TPU_", "KUBERNETES_")) and "proxy" not in k.lower()
    }
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2", **environment}
    return [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(s)],
            env=env,
            text=True,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for s in scripts
    ]


def results_of(running, timeout):
    """[(exit code, stdout, stderr)] of the processes; all are gone on return."""
    deadline = time.monotonic() + timeout
    try:
        out = [p.communicate(timeout=max(0.1, deadline - time.monotonic())) for p in running]
        return [(p.returncode, *o) for p, o in zip(running, out, strict=True)]
    finally:
        for p in running:
            if p.poll() is None:
                p.kill()  # SIGKILL: jax.distributed catches SIGTERM
                p.communicate()


def run_processes(scripts, timeout, **environment):
    """What `results_of` says of the processes of `start_processes`."""
    return results_of(start_processes(scripts, **environment), timeout)


def start(address, count, index, **options):
    """The line of a script that calls initialize_distributed."""
    arguments = ", ".join(f"{k}={v!r}" for k, v in options.items())
    return (
        f"from paged_dist.cluster.startup import initialize_distributed\n"
        f"info = initialize_distributed({address!r}, {count}, {index}, {arguments})\n"
    )
