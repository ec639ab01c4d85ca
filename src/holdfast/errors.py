"""UserError, the one kind of error for what a user can fix, and helpers that word it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """An error that the caller can fix: the message says what was wrong, what was expected and what to do.

    The command line prints it without a traceback; in Python it is a plain ``ValueError``.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Make the error for a name that does not exist, with the closest name that does.

    Args:
        kind: what was looked up, such as "loss".
        name: the name that does not exist.
        known: the names that exist.

    Returns:
        The error, for the caller to raise.

    >>> print(unknown("loss", "icse", ["sce", "isce", "mmc"]))
    unknown loss 'icse'. Did you mean 'isce'? Known: isce, mmc, sce.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"unknown {kind} '{name}'.{hint} Known: {', '.join(known)}.")


def at_least(name: str, value: float, low: float = 0.0, *, above: bool = False) -> None:
    """Check that a number is finite and not below a bound; NaN is refused too.

    Args:
        name: the argument's name, for the error.
        value: the number.
        low: the bound.
        above: refuse ``low`` itself.

    Raises:
        UserError: ``value`` is no finite number >= ``low`` (> ``low`` with ``above``).

    >>> at_least("weight", 0.5)
    >>> at_least("scale", 0.0, above=True)
    Traceback (most recent call last):
    holdfast.errors.UserError: scale must be > 0, got 0.0.
    """
    if not isinstance(value, (int, float)) or not (low < value < math.inf or (value == low and not above)):
        raise UserError(f"{name} must be {'>' if above else '>='} {low:g}, got {value}.")


def type_of(value: Any) -> str:
    """Name the type of a value, with its article, for an error.

    >>> type_of({}), type_of(3)
    ('a dict', 'an int')
    """
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"
