"""How long work reports its progress: one callback, everywhere."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (what is being done, units done, units in all)
JobProgress = Callable[[str, str, int, int], None]  # the same of one job among several, its name first

NETWORK_DONE = "network done"  # a job's last report: the units are then networks, done and in all

EXPECTED = "expected: "  # in what is being done: how long it will take in all; a log shows it at once


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


def silent_job(job: str, what: str, done: int, total: int) -> None:
    """Report nothing of any job."""
