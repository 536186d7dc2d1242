"""How a run ends, in one process: a profiler that fails, Ctrl-C, and a stdout that cannot be written."""

from __future__ import annotations

import os
import re
import signal
import sys

import pytest

from paged_dist.launch.common import record_output
from paged_dist.launch.common.interrupt import CtrlC
from paged_dist.launch.serving.engine import Measured, StepProfile


@pytest.mark.parametrize("fails", ["start_trace", "stop_trace"])
def test_a_profiler_that_fails_is_left_alone_from_then_on(monkeypatch, fails):
    called = []

    def stand_in(name):
        def call(*_):
            called.append(name)
            if name == fails:
                raise RuntimeError("no\n room")

        return call

    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(f"jax.profiler.{name}", stand_in(name))
    m = Measured()
    profile = StepProfile("folder", m)
    for step in range(20):
        profile.before_step(step)
    profile.stop()
    assert called == ["start_trace", "stop_trace"][: 1 + (fails == "stop_trace")]
    assert m.profile_error == "RuntimeError: no room"


def test_the_second_ctrl_c_is_an_interrupt_and_an_ignored_one_stays_so(capfd):
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append("stop"))
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), CtrlC("name") as ctrl_c:
            signal.raise_signal(signal.SIGINT)
            assert ctrl_c.came and asked == ["stop"]
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with CtrlC("name") as ctrl_c:
            signal.raise_signal(signal.SIGINT)
        assert not ctrl_c.came and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
    assert capfd.readouterr().err.count("name: interrupted: ") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_stdout_that_cannot_be_written_costs_no_record(tmp_path, monkeypatch, capfd):
    path = tmp_path / "x.jsonl"
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert not record_output.deliver("name", "table", str(path), {"a": 1})
        print("more")  # goes nowhere, and is no error at the end either
    assert path.read_text() == '{"a": 1}\n'
    assert re.fullmatch(r"name: error: stdout could not be written: .*No space left.*\n", capfd.readouterr().err)
