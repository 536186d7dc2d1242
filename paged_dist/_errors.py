"""Errors of bad input, all worded alike: the argument, its value, the rule, what would work."""

from __future__ import annotations

import numbers
import operator
from typing import TypeGuard


class BadValue(ValueError):
    """Bad input that a check of this library found, not jax or NumPy below it."""


def bad_value(argument: str, value: object, rule: str, works: str | None = None) -> BadValue:
    """A ValueError that reads `argument=value: rule; what would work`.

    `argument` is the public name as the caller wrote it (`"query.shape"` for an attribute of one), `rule` what
    must hold, `works` what to pass instead, left out where the rule says it already.
    """
    return BadValue(f"{argument}={value!r}: {rule}" + (f"; {works}" if works else ""))


def require(holds: bool, argument: str, value: object, rule: str, works: str | None = None) -> None:
    """Raises `bad_value(...)` unless `holds`."""
    if not holds:
        raise bad_value(argument, value, rule, works)


def not_yet(what: str, instead: str | None = None) -> NotImplementedError:
    """The error of a documented argument or value that this release does not serve."""
    return NotImplementedError(f"{what} is not in this release" + (f"; {instead}" if instead else ""))


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer, Python's or NumPy's. True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def whole_number(argument: str, value: object, *, at_least: int | None = None) -> int:
    """`value` as an int; raises ValueError for what is no whole number, or one below `at_least`."""
    if type(value) is int and at_least is None:  # the usual case, first: it is on the decode loop's path
        return value
    rule = "must be a whole number" + ("" if at_least is None else f", at least {at_least}")
    if not is_whole_number(value) or (at_least is not None and value < at_least):
        raise bad_value(argument, value, rule)
    return operator.index(value)
