"""What a user can mend gets one kind of error, and one way to name the nearest thing that exists."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class UserError(ValueError):
    """Something the caller can mend: the message says what was wrong, what was expected and what to do.

    The command line prints it without a traceback; in Python it is a plain ``ValueError``.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest names that do.

    >>> print(unknown("loss", "icse", ["sce", "isce", "mmc"]))
    unknown loss 'icse'. Did you mean 'isce'? Known: isce, mmc, sce.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"unknown {kind} '{name}'.{hint} Known: {', '.join(known)}.")


def at_least(name: str, value: float, low: float = 0.0, *, above: bool = False) -> None:
    """Raise UserError unless ``value`` is a finite number >= low (> low with ``above``); NaN is refused too.

    >>> at_least("weight", 0.5)
    >>> at_least("scale", 0.0, above=True)
    Traceback (most recent call last):
    holdfast.errors.UserError: scale must be > 0, got 0.0.
    """
    if not isinstance(value, (int, float)) or not (low < value < math.inf or (value == low and not above)):
        raise UserError(f"{name} must be {'>' if above else '>='} {low:g}, got {value}.")
