"""The decoder layers of examples/ on two processes."""

from __future__ import annotations

import inspect

import pytest
from example_layers import EXAMPLES_FOLDER, FlaxNnx, PlainJax, example_module
from processes import free_port, run_processes

ON_TWO_PROCESSES = """
import importlib.util, sys
import numpy as np
import jax
from jax.experimental import multihost_utils

import paged_dist as pd

pd.initialize_distributed({address!r}, 2, {index})

def compared(*_, **__):
    raise AssertionError("arrays were compared across processes")

multihost_utils.assert_equal = multihost_utils.process_allgather = compared
mesh = pd.make_pod_mesh(model=2)
try:
    jax.device_put(np.zeros(8), jax.NamedSharding(mesh, jax.P("data")))
except AssertionError:
    print("device_put compares", flush=True)
for name in {names!r}:
    found = importlib.util.spec_from_file_location(name, {folder!r} + "/" + name + ".py")
    sys.modules[name] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if {index} == 0:  # alone: the other process would have to hear of it
        rows = module.put_rows(mesh, np.arange(8.0))
        assert [float(s.data[0]) for s in rows.addressable_shards] == [0, 0, 2, 2], rows.addressable_shards
    {then}
"""


def on_two_processes(names, then):
    """What two processes of four devices print that put arrays as the examples do, and `then`."""
    address = f"127.0.0.1:{free_port()}"
    scripts = [
        ON_TWO_PROCESSES.format(address=address, index=i, names=names, folder=str(EXAMPLES_FOLDER), then=then)
        for i in (0, 1)
    ]
    results = run_processes(scripts, 200, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    for code, _, err in results:
        assert code == 0, err
    return [out for _, out, _ in results]


def test_the_inputs_of_a_step_are_not_compared_across_processes():
    for out in on_two_processes(["plain_jax_layer"], "pass"):
        assert "device_put compares" in out
    # The other example puts them in the same way, and neither has another way.
    sources = [inspect.getsource(layers.module.put_rows) for layers in (PlainJax, FlaxNnx)]
    assert sources[0] == sources[1]
    for layers in (PlainJax, FlaxNnx):
        assert inspect.getsource(layers.module).count("device_put") == 1  # in put_rows' docstring
    assert not [file for file in (EXAMPLES_FOLDER.parent / "launch").glob("*.py") if "device_put" in file.read_text()]


@pytest.mark.slow
def test_an_example_gives_on_two_processes_what_it_gives_on_one(capsys):
    steps = lambda out: [line for line in out.splitlines() if line.startswith("step")]
    example_module("plain_jax_layer").main(steps=2)
    alone = steps(capsys.readouterr().out)
    assert len(alone) == 2
    for out in on_two_processes(["plain_jax_layer"], "module.main(steps=2)"):
        assert steps(out) == alone
