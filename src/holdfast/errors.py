"""What a user can mend gets one kind of error, and one way to name the nearest thing that exists."""

from __future__ import annotations

import difflib
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
