"""What a person sees while work goes on: two consoles, colours where they are wanted, and progress that behaves."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

FIRST, EVERY = 10.0, 60.0  # seconds until the first line of progress, and between lines, where there is no terminal
CELL = 1.0  # seconds between changes of the one line in a notebook


def coloured(environment: Mapping[str, str], terminal: bool) -> bool:
    """Whether to colour: NO_COLOR says no, else FORCE_COLOR or CLICOLOR_FORCE yes, else a terminal that is not dumb.

    >>> coloured({}, True), coloured({}, False), coloured({"FORCE_COLOR": "1"}, False), coloured({"TERM": "dumb"}, True)
    (True, False, True, False)
    >>> coloured({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True), coloured({"FORCE_COLOR": "0"}, False)
    (False, False)
    """
    if environment.get("NO_COLOR"):
        return False
    if any(environment.get(name, "") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return terminal and environment.get("TERM") != "dumb"


def is_terminal(stream: Any) -> bool:
    """Whether a stream is one; a closed stream, or one that cannot tell, is none."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def console(stderr: bool = False) -> Console:
    """Prints text as it is (no markup: it holds users' paths and names), coloured as ``coloured`` says.

    rich alone would take FORCE_COLOR for a terminal and draw bars into a log, and keep bold where NO_COLOR is set.
    """
    terminal = is_terminal(sys.stderr if stderr else sys.stdout)
    system: Any = None
    if coloured(os.environ, terminal):
        system = "auto" if terminal else "standard"
    return Console(
        stderr=stderr, highlight=False, markup=False, emoji=False, force_terminal=terminal, color_system=system
    )


screen, errors = console(), console(stderr=True)


@contextmanager
def aside(wanted: bool = True) -> Iterator[None]:
    """What is printed meanwhile goes to stderr: stdout is for one JSON document.

    That of a user's own model too, and of worker processes, which know file descriptors alone.
    """
    if not wanted:
        yield
        return
    kept = None
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


def _cell() -> Callable[[str], None] | None:
    """In a notebook: a way to show one line that each later one is written over; None elsewhere."""
    if not errors.is_jupyter:
        return None
    try:
        show: Any = importlib.import_module("IPython.display").display
    except ImportError:
        return None
    handle: Any = None

    def say(text: str) -> None:
        nonlocal handle
        if handle is None:
            handle = show({"text/plain": text}, raw=True, display_id=True)
        else:
            handle.update({"text/plain": text}, raw=True)

    return say


def passed(seconds: float) -> str:
    """A time for reading.

    >>> passed(42.4), passed(150), passed(4000)
    ('42 s', '2 min', '1 h 6 min')
    """
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def short(name: str, most: int = 20) -> str:
    """A name for a bar, without its middle: its seed and fold are at its end.

    >>> short("sce-seed0-fold0"), short("sce_adversarial_steps=5,ramp=0.3-seed0-fold0")
    ('sce-seed0-fold0', 'sce_ad…3-seed0-fold0')
    """
    return name if len(name) <= most else f"{name[: most - 14]}…{name[-13:]}"


class Display:
    """Progress that behaves: bars on a terminal, one line written over in a notebook, in a log a line now and then and
    one for each finished network, nothing when quiet.

    ``with Display(networks=n) as display: compare(..., tell=display.tell, finished=display.finished)``
    """

    def __init__(self, quiet: bool = False, networks: int = 1) -> None:
        self.quiet, self.networks = quiet, networks
        self.cell = None if quiet else _cell()
        self.live = not quiet and self.cell is None and is_terminal(errors.file) and not errors.is_dumb_terminal
        self.bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=errors,
            transient=True,
            expand=True,
            disable=not self.live,
        )
        self.tasks: dict[str, Any] = {}
        self.whole: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self.began = time.monotonic()
        self.told = self.began + FIRST - EVERY

    def __enter__(self) -> Display:
        self.bars.start()
        self.count("trained and attacked", 0)
        return self

    def __exit__(self, kind: type | None, *stop: object) -> None:
        self.bars.stop()
        if kind is KeyboardInterrupt:
            self.say("stopped. What was finished is kept: the same command goes on from here.")
            if self.cell is None:  # a notebook goes on
                sys.exit(130)

    def tell(self, job: str, what: str, done: int, total: int) -> None:
        """One job's report: what it does, how far it is."""
        if self.quiet:
            return
        if self.live:
            if job not in self.tasks:
                self.tasks[job] = self.bars.add_task(short(job))
            self.bars.update(self.tasks[job], description=f"{short(job)} · {what}", completed=done, total=total)
            return
        now = time.monotonic()
        if now < self.told + (EVERY if self.cell is None else CELL):
            return
        self.told = now
        far = [f"{word} {count} of {self.networks}" for word, count in self.counts.items()]
        line = " · ".join([passed(now - self.began), *far[-1:], job, what, f"{done / max(total, 1):.0%}"])
        self.say(line)

    def say(self, line: str) -> None:
        """A line for the log, or over the last one in a notebook."""
        if self.cell is not None:
            self.cell(line)
        else:
            errors.print(line, soft_wrap=True)

    def clear(self, job: str) -> None:
        """The job's bar goes."""
        if job in self.tasks:
            self.bars.remove_task(self.tasks.pop(job))

    def count(self, word: str, done: int) -> None:
        """How many networks are trained, or checked: a bar of its own, where there are several."""
        if self.networks > 1:
            self.counts[word] = done
            if word not in self.whole:
                self.whole[word] = self.bars.add_task(f"networks {word}", total=self.networks)
            self.bars.update(self.whole[word], completed=done)

    def checked(self, job: Any) -> None:
        """A network's checks are done."""
        self.clear(job.folder.name)
        self.count("checked", self.counts.get("checked", 0) + 1)

    def finished(self, job: Any, done: int, total: int) -> None:
        """A network is trained and attacked, the ``done``-th of ``total``."""
        name = job.folder.name
        self.clear(name)
        self.networks = total
        self.count("trained and attacked", done)
        if not self.live and not self.quiet:
            self.say(f"network {done} of {total} is trained and attacked: {name}")


@contextmanager
def working(what: str, quiet: bool = False) -> Iterator[None]:
    """A spinner on a terminal, for work of a few seconds that cannot say how far it is; nothing elsewhere."""
    if quiet or not is_terminal(errors.file) or errors.is_dumb_terminal:
        yield
        return
    with errors.status(what):
        yield
