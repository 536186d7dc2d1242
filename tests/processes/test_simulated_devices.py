"""A host with one CPU device is told how to simulate more, and the advice works."""

import os
import re
import subprocess
import sys


def test_the_mesh_of_the_readme_on_a_host_with_one_cpu_device_takes_the_advice():
    script = "import jax, sys, paged_dist as pd; exec(sys.argv[1]); print(dict(pd.make_pod_mesh(model=4).shape))"
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    run = lambda call: subprocess.run(
        [sys.executable, "-P", "-c", script, call], env=environment, capture_output=True, text=True, timeout=120
    )
    alone = run("")
    assert alone.returncode == 1 and "XLA_FLAGS=--xla_force_host_platform_device_count=4" in alone.stderr, alone.stderr
    done = run(re.search(r"jax\.config\.update\(.*?\)", alone.stderr)[0])
    assert done.stdout.strip() == "{'data': 1, 'context': 1, 'model': 4}", done.stderr
