"""What a person sees while work goes on: two consoles, and progress that behaves."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# No markup: what is printed holds users' paths and names, brackets included.
screen, errors = (
    Console(highlight=False, markup=False, emoji=False),
    Console(stderr=True, highlight=False, markup=False, emoji=False),
)
EVERY = 60.0  # seconds between lines of progress where there is no terminal


class Display:
    """Progress that behaves: bars on a terminal, a line per finished network elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool, networks: int = 1) -> None:
        self.quiet, self.networks = quiet, networks
        self.live = errors.is_terminal and not quiet
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=errors,
            transient=True,
            disable=not self.live,
        )
        self.tasks: dict[str, Any] = {}
        self.told = time.monotonic()

    def __enter__(self) -> Display:
        self.bars.start()
        self.whole = self.bars.add_task("networks", total=self.networks)
        return self

    def __exit__(self, kind: type | None, *stop: object) -> None:
        self.bars.stop()
        if kind is KeyboardInterrupt:
            errors.print("stopped. What was finished is kept: the same command goes on from here.")
            sys.exit(130)

    def tell(self, job: str, what: str, done: int, total: int) -> None:
        if self.live:
            if job not in self.tasks:
                self.tasks[job] = self.bars.add_task(job)
            self.bars.update(self.tasks[job], description=f"{job} · {what}", completed=done, total=total)
        elif not self.quiet and time.monotonic() > self.told + EVERY:  # a log is told now and then
            self.told = time.monotonic()
            errors.print(f"{job} · {what} · {done / max(total, 1):.0%}", soft_wrap=True)

    def clear(self, job: str) -> None:
        if job in self.tasks:
            self.bars.remove_task(self.tasks.pop(job))

    def checked(self, job: Any) -> None:
        self.clear(job.folder.name)

    def finished(self, job: Any, done: int, total: int) -> None:
        self.bars.update(self.whole, completed=done, total=total)
        name = job.folder.name
        self.clear(name)
        if not self.live and not self.quiet:
            errors.print(f"network {done} of {total} is trained and attacked: {name}", soft_wrap=True)
