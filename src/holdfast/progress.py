"""How long work reports its progress: one callback, everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import UserError, type_of

Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)
JobProgress = Callable[[str, str, int, int], None]  # the same of one job among several, its name first

NETWORK_DONE = "network done"  # a job's last report: the units are then networks, done and in all

EXPECTED = "expected: "  # in what is being done: how long it will take in all; a log shows it at once


def silent(*report: Any) -> None:
    """Report nothing, of one job or of several."""


def as_progress(progress: Any) -> Callable[..., None]:
    """The callback that an argument is; None is silent.

    Args:
        progress: what a caller gave.

    Returns:
        The callback.

    Raises:
        UserError: it cannot be called.

    >>> as_progress(None) is silent
    True
    """
    if progress is None:
        return silent
    if not callable(progress) or isinstance(progress, type):
        raise UserError(f"progress must be a function that is told what is done, or None, got {type_of(progress)}.")
    return progress
