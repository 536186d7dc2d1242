"""Several command lines in one process: importing JAX takes longer than refusing a flag."""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

from commands import SUPPORT, run_command

SCRIPT = """
import contextlib, importlib, io, json, signal, sys
from absl import app, flags
from absl.testing import flagsaver as absl_flagsaver
import flagsaver
signal.signal(signal.SIGINT, signal.default_int_handler)
for name, arguments in json.loads(sys.argv[1]):
    module, out, err = importlib.import_module("paged_dist.launch." + name), io.StringIO(), io.StringIO()
    if arguments == "Ctrl-C":
        module.main, arguments = lambda _: signal.raise_signal(signal.SIGINT), []
    sys.argv = ["x", *arguments]
    with flagsaver.flagsaver(), absl_flagsaver.flagsaver():
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                module.cli()
            except SystemExit as e:
                code = e.code
            else:
                code = 0
    print(json.dumps([name, code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Ended(NamedTuple):
    """How a command line ended, by the launcher's name."""

    launcher: str
    code: int
    out: str
    err: str


def run_in_one_process(runs) -> list[Ended]:
    """Runs launchers one after another: `runs` are (name, arguments), arguments "Ctrl-C" for an interrupt in `main`."""
    command = [sys.executable, "-P", "-c", SCRIPT, json.dumps(runs)]
    code, out, err = run_command(command, PYTHONPATH=SUPPORT)
    assert code == 0, out + err
    return [Ended(*json.loads(line)) for line in out.splitlines()]
