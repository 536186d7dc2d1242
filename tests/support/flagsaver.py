"""`absl.testing.flagsaver` for the launchers' flags, which are in a registry of their own."""

from __future__ import annotations

import contextlib

from absl.testing import flagsaver as absl_flagsaver

from paged_dist.launch.common.flag_registry import FLAGS
from paged_dist.launch.common.program import Program


@contextlib.contextmanager
def flagsaver(**values):
    """Sets `values`, by flag; afterwards all flags are as they were before."""
    saved = absl_flagsaver.save_flag_values(FLAGS)
    try:
        for name, value in values.items():
            setattr(FLAGS, name, value)
        yield
    finally:
        absl_flagsaver.restore_flag_values(saved, FLAGS)


def launcher_flags(launcher, **values):
    """The flags as the console script of `launcher` sets them, and `values`; afterwards all are as they were before."""
    if not FLAGS.is_parsed():
        FLAGS(["test"])
    (program,) = (value for value in vars(launcher).values() if isinstance(value, Program))
    return flagsaver(**{**program.defaults, **values})
