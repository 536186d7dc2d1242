"""Launchers imported into a program with flags of its own."""

from __future__ import annotations

import subprocess
import sys

IMPORTED = """
import importlib, pkgutil, sys
from absl import flags, logging  # logging's are absl's own
before = set(flags.FLAGS)
HERE = [flags.DEFINE_string(name, "mine", "A flag of this program.") for name in sys.argv[1].split(",")]

import paged_dist.launch
names = [module.name for module in pkgutil.walk_packages(paged_dist.launch.__path__, "paged_dist.launch.")]
modules = [importlib.import_module(name) for name in names]
assert len(names) > 15, names
assert set(flags.FLAGS) - before == {flag.name for flag in HERE}, set(flags.FLAGS) - before
flags.FLAGS(["program", "--batch=own", "--verbosity=-1"])
assert flags.FLAGS.batch == "own" and flags.FLAGS.trace == "mine"

from paged_dist.launch.common import flag_registry
missing = {"batch", "trace", "oracle_samples", "topology", "runs", "live", "chips"} - set(flag_registry.FLAGS)
assert not missing, missing
try:
    flag_registry.parse(["program", "--batch=4"])
except flag_registry.Error as e:
    assert "defined twice" in str(e), e
else:
    raise AssertionError("a flag of this program would have been lost")
"""


PARSED = """
from absl import flags
from paged_dist.launch import decode
from paged_dist.launch.common import flag_registry
from paged_dist.launch.common import shared_flags

for value in (4, 6):  # a second time, too
    rest = flag_registry.parse(["program", f"--batch={value}", "--verbosity=1", "left"])
    assert rest == ["program", "left"] and flags.FLAGS.verbosity == 1
    assert shared_flags.BATCH.value == flags.FLAGS.batch == flag_registry.FLAGS.batch == value
    assert shared_flags.given_flags() == {"--batch": value}
assert "batch" in [flag.name for flag in flags.FLAGS.get_flags_for_module(shared_flags.__name__)]  # of --helpfull
try:
    flag_registry.parse(["program", "--bacth=4"])
except flag_registry.Error as e:
    assert "bacth" in str(e) and "batch" in str(e), e
else:
    raise AssertionError("an unknown flag was taken")
"""


def run_python(script, *arguments):
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_any_launcher_defines_no_flag_and_leaves_those_of_the_program_alone():
    run_python(IMPORTED, "batch,trace,data,output,seed,runs,chips,live,topology,oracle_samples")


def test_a_command_line_is_read_with_absls_own_flags_and_an_unknown_one_is_named():
    run_python(PARSED)
