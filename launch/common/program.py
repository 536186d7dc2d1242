"""`Program`: a program declares in one place its command, the shared flags it takes, and its own defaults for them."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from absl import flags as absl_flags

from paged_dist import Watchdog
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common import shared_flags
from paged_dist.launch.common.run_program import run_program

absl_flags.disclaim_key_flags()  # a flag declared here is one of the module that makes the Program


@dataclasses.dataclass(frozen=True)
class Program:
    """A program, made once at the top of its module: that declares the flags of `takes` as the module's key flags.

    Attributes:
      name: the command, such as 'paged-dist-plan'.
      takes: names of the shared flags (`shared_flags`) that the program takes; it refuses the others.
      defaults: shared flag -> this program's default, which holds where it runs, not where it is imported.
    """

    name: str
    takes: Sequence[str] = ()
    defaults: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for flag in self.takes:
            flags.declare_key_flag(flag)

    def say(self, line: str) -> None:
        """Prints a line on stderr, with the program's name before it."""
        print(f"{self.name}: {line}", file=sys.stderr, flush=True)

    def sayer(self, watch: Watchdog) -> Callable[[str], None]:
        """A `say` that prints on process 0 alone. Warnings of all kinds go the same way from now on."""

        def say(line: str) -> None:
            if watch.process_id == 0:
                self.say(line)

        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        return say

    def refuse_other_flags(self, instead: Mapping[str, str] | None = None) -> None:
        """Raises ValueError where a shared flag is given that the program does not take.

        `instead`: flag -> what to say in place of "see --help".
        """
        shared_flags.refuse_others(self.takes, instead)

    def run(self, main: Callable[[Sequence[str]], int]) -> NoReturn:
        """Reads the command line, runs `main` and exits with its result."""
        for flag, value in self.defaults.items():
            flags.FLAGS.set_default(flag, value)
        run_program(main, self.name)
