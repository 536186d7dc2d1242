"""Eight simulated CPU devices for every test, set before jax starts; cases that repeat a claim are slow."""

import os
import pathlib
import sys

import pytest

ON_TPU = os.environ.get("PAGED_DIST_TEST_DEVICE") == "tpu"  # `./run test_device`: JAX finds the devices
PROCESSES = int(os.environ.get("JAX_NUM_PROCESSES", 1))  # of a rehearsal of tests/device, the devices dealt out to them
if not ON_TPU:
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={8 // PROCESSES}"
    )
    # Most of the tests' time is LLVM's, for programs that run once: without its optimisations they take a fifth less.
    # What libtpu compiles for absent TPUs is the same, and launchers that run as commands have XLA's defaults.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    os.environ["JAX_PLATFORMS"] = "cpu"
    # TPU interpret mode waits for all simulated devices at once, each of them and its callbacks on a thread of this
    # pool: with 8 threads for 8 devices it hung now and then, on both jax versions.
    os.environ["PJRT_NPROC"] = "32"


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    """JAX starts before a test runs that sets XLA_FLAGS, as a launcher does that is called in this process."""
    import jax

    assert ON_TPU or PROCESSES > 1 or jax.device_count() == 8  # several processes have to meet before JAX starts


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file(request):
    """In a run with the slow tests a file's programs go when it ends: XLA's CPU compiler, of jax 0.10, crashed in a
    process that held those of some three hundred simulated tests."""
    yield
    if "not slow" not in request.config.option.markexpr and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


# Cases of some seconds that prove again what a sibling among the fast ones does: file::test[case], without the folder.
REPEATS = frozenset((pathlib.Path(__file__).parent / "support" / "repeats.txt").read_text().splitlines())


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` chooses
def pytest_collection_modifyitems(config, items):
    found = {item.path.name + "::" + item.nodeid.partition("::")[2]: item for item in items}
    for name in REPEATS & found.keys():
        found[name].add_marker(pytest.mark.slow)
    if not any("::" in argument for argument in config.args):
        files = {name.partition("::")[0] for name in found}
        gone = [name for name in sorted(REPEATS - found.keys()) if name.partition("::")[0] in files]
        assert not gone, f"tests/support/repeats.txt names cases that are not there: {gone}"
