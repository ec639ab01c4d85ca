"""How long work reports its progress: one callback, everywhere."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)
JobProgress = Callable[[str, str, int, int], None]  # the same of one job among several, its name first


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
