"""How a program of launch/ runs and ends: it reads its flags, prints an error as one line, exits with a code.

Each program's `cli` calls `run_program`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from absl import flags as absl_flags
from absl import logging

from paged_dist.cluster import startup
from paged_dist.launch.common import flag_registry as flags
from paged_dist.launch.common.help_text import asks_for_help, help_text
from paged_dist.launch.common.interrupt import INTERRUPTED


class UsageError(Exception):
    """Bad input, found before anything was compiled or written. Its text is the one line that the user sees."""


@contextlib.contextmanager
def usage_errors(kinds: tuple[type[Exception], ...] = (ValueError, NotImplementedError)) -> Iterator[None]:
    """Errors of these kinds, in a block that compiles and writes nothing, become a UsageError."""
    try:
        yield
    except kinds as e:
        raise UsageError(str(e)) from e


def run_program(main: Callable[[Sequence[str]], int], name: str) -> NoReturn:
    """Parses the flags, runs `main` and exits with its result; does not return.

    Bad flags and UsageError end with one line and exit code 2, Ctrl-C with 130, an exception that has an `exit_code`
    (`Disagreement`) with that.

    Args:
      main: of the program's name in a list, the exit code.
      name: the program's, in front of the lines that it prints.
    """
    from absl import app  # here, for it defines flags

    def parse(argv: Sequence[str]) -> list[str]:
        if asks_for_help(argv):  # absl looks for the flags of the console script, which has none, and exits 1
            print(help_text(main.__module__))
            sys.exit(0)
        try:
            rest = flags.parse(argv)
        except flags.Error as e:
            end_with_error(name, str(e))
        program = absl_flags.FLAGS
        if program["verbosity"].using_default_value:
            program.verbosity = logging.WARNING  # what a run has to say it prints itself; --verbosity=0 says more
        return rest

    def run(argv: Sequence[str]) -> int:
        try:
            if len(argv) > 1:
                raise UsageError(f"{argv[1]!r}: is not a flag; every setting is a flag, see --help")
            code = main(argv)
        except UsageError as e:
            end_with_error(name, str(e))
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):
                print(f"{name}: interrupted", file=sys.stderr, flush=True)
            _exit_process(INTERRUPTED)
        except BaseException as e:
            if (code := getattr(e, "exit_code", None)) is not None:
                end_with_error(name, str(e), code)
            if not _is_one_of_several() or isinstance(e, SystemExit):
                raise
            code = 1
            with contextlib.suppress(OSError):
                traceback.print_exc()
        if code:
            _exit_process(code)
        return 0

    app.run(run, flags_parser=parse)
    raise AssertionError("app.run does not return")


def end_with_error(name: str, message: str, code: int = 2) -> NoReturn:
    """Prints `message` on stderr as the program's one line of error, and ends this process with exit code `code`."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    _exit_process(code)


def _is_one_of_several() -> bool:
    """Whether `initialize_distributed` has made this process one of several."""
    return startup.peers()[1] > 1


def _exit_process(code: int) -> NoReturn:
    """Ends this process with exit code `code`.

    One of several that ends with an error does not wait for the others, as JAX's shut-down does: they may be what the
    error is about.
    """
    if not _is_one_of_several():
        sys.exit(code)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        startup.wait_for_others_to_end(2.0)
    finally:
        os._exit(code)
