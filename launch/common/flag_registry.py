"""The programs' flags in a registry of their own: who imports a program's module gets none of its flags.

A program imports this module in the place of `absl.flags` and uses it the same way: `flags.DEFINE_integer(...)`,
`flags.FLAGS`. The flags become absl's when the program runs and `parse` reads its command line.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from absl import flags as _absl

FLAGS = _absl.FlagValues()
Error, Flag = _absl.Error, _absl.Flag

# Partials, not functions: absl finds the module that a flag belongs to by the caller's frame.
DEFINE_bool = functools.partial(_absl.DEFINE_bool, flag_values=FLAGS)
DEFINE_float = functools.partial(_absl.DEFINE_float, flag_values=FLAGS)
DEFINE_integer = functools.partial(_absl.DEFINE_integer, flag_values=FLAGS)
DEFINE_list = functools.partial(_absl.DEFINE_list, flag_values=FLAGS)
DEFINE_string = functools.partial(_absl.DEFINE_string, flag_values=FLAGS)
adopt_module_key_flags = functools.partial(_absl.adopt_module_key_flags, flag_values=FLAGS)
declare_key_flag = functools.partial(_absl.declare_key_flag, flag_values=FLAGS)


def parse(argv: Sequence[str]) -> list[str]:
    """Reads a command line, with absl's own flags (`--verbosity`) too; returns the program's name and what is no flag.

    Raises:
      Error: an unknown flag, a value that is none of its type, or a flag that the program has defined itself.
    """
    program = _absl.FLAGS
    for module, found in FLAGS.flags_by_module_dict().items():
        for flag in found:
            if flag.name not in program or program[flag.name] is not flag:
                program[flag.name] = flag
                program.register_flag_by_module(module, flag)
    for module, found in FLAGS.key_flags_by_module_dict().items():
        for flag in found:
            program.register_key_flag_for_module(module, flag)
    rest = program(argv)
    FLAGS.mark_as_parsed()
    return rest
