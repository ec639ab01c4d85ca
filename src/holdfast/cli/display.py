"""Terminal output: two consoles, colours where they are wanted, and progress for terminals, logs and notebooks."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column

from ..errors import plain
from ..progress import EXPECTED, NETWORK_DONE, Progress

FIRST, EVERY = 10.0, 60.0  # seconds until the first line of progress in a log, and between lines
CELL = 1.0  # seconds between updates of the line in a notebook


def coloured(environment: Mapping[str, str], terminal: bool) -> bool:
    """Whether to use colours: NO_COLOR says no; FORCE_COLOR or CLICOLOR_FORCE yes; else a terminal that is not dumb.

    Args:
        environment: the environment variables.
        terminal: whether the stream is a terminal.

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
    """Whether a stream is a terminal; a closed stream, or one without isatty, is not."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


class PlainConsole(Console):
    """A console that prints texts without what they may hold for the terminal: escape sequences in names and paths."""

    def print(self, *objects: Any, **more: Any) -> None:
        """Print as ``Console.print``, each text made plain."""
        super().print(*(plain(one) if isinstance(one, str) else one for one in objects), **more)

    def sentence(self, text: Any) -> None:
        """Print a sentence: broken between words on a terminal, elsewhere one line, so that it can be searched."""
        self.print(text, soft_wrap=not is_terminal(self.file))


def console(stderr: bool = False) -> PlainConsole:
    """A console without markup (text may contain users' paths and names), with colours as ``coloured`` decides.

    rich on its own takes FORCE_COLOR for a terminal and draws bars into a log, and keeps bold text under NO_COLOR.
    """
    terminal = is_terminal(sys.stderr if stderr else sys.stdout)
    system: Any = None
    if coloured(os.environ, terminal):
        system = "auto" if terminal else "standard"
    return PlainConsole(
        stderr=stderr, highlight=False, markup=False, emoji=False, force_terminal=terminal, color_system=system
    )


screen, errors = console(), console(stderr=True)


@contextmanager
def aside(wanted: bool = True) -> Iterator[None]:
    """Send everything printed in this block to stderr, so that stdout holds one JSON document.

    It redirects the file descriptor, since a user's own model and worker processes print as well.
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
    """In a notebook, a function that shows a line in place of the previous one; None elsewhere."""
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


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(42.4), duration(150), duration(4000)
    ('42 s', '2 min', '1 h 6 min')
    """
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def short(name: str, most: int = 20) -> str:
    """A name for a bar, its middle cut out: seed and fold are at the end.

    >>> short("sce-seed0-fold0"), short("sce_adversarial_steps=5,ramp=0.3-seed0-fold0")
    ('sce-seed0-fold0', 'sce_ad…3-seed0-fold0')
    """
    return name if len(name) <= most else f"{name[: most - 14]}…{name[-13:]}"


@dataclass(frozen=True)
class Part:
    """A part of a job whose reports count the same units: training, attacks, checks.

    Attributes:
        began: when its first report came, in seconds.
        first: units that were done then.
        done: units that are done.
        total: units in all, as far as is known.
    """

    began: float
    first: int
    done: int
    total: int

    def goes_on(self, done: int, total: int) -> bool:
        """Whether a report belongs to this part: counts grow, and totals, which are estimates, stay alike."""
        return done >= self.done and total <= 2 * self.total and self.total <= 2 * total

    def ahead(self, now: float) -> str:
        """How long the rest will take at the rate so far; "" where no rate is known, or nothing is left.

        >>> Part(0.0, 0, 25, 100).ahead(60.0), Part(0.0, 0, 100, 100).ahead(60.0), Part(0.0, 5, 5, 100).ahead(60.0)
        (', about 3 min more for this part', '', '')
        """
        worked, left = self.done - self.first, self.total - self.done
        if worked < 1 or left < 1 or now <= self.began:
            return ""
        return f", about {duration((now - self.began) / worked * left)} more for this part"


class Display:
    """Shows progress: bars on a terminal, one line that is updated in a notebook, occasional lines in a log.

    ``with Display(networks=n) as display: compare(..., progress=display.progress)``, or for a single network
    ``evaluate(..., progress=display.of("mine"))``.
    """

    def __init__(self, quiet: bool = False, networks: int = 1) -> None:
        self.quiet, self.networks, self.networks_done = quiet, networks, 0
        self.cell = None if quiet else _cell()
        self.live = not quiet and self.cell is None and is_terminal(errors.file) and not errors.is_dumb_terminal
        self.bars = Bars(
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
        self.networks_bar: Any = None
        self.began = time.monotonic()
        self.work_began: float | None = None  # when the first network that was not found done was reported on
        self.found_done = 0
        self.last_line = self.began + FIRST - EVERY
        self.parts: dict[str, Part] = {}

    def __enter__(self) -> Display:
        self.bars.start()
        if self.networks > 1:
            self.networks_bar = self.bars.add_task("networks done", total=self.networks)
        return self

    def __exit__(self, kind: type | None, *stop: object) -> None:
        self.bars.stop()
        if kind is KeyboardInterrupt:
            self.say("Interrupted. Completed work is saved; rerun the same command to resume.")
            if self.cell is None:  # a notebook keeps running
                sys.exit(130)

    def progress(self, job: str, what: str, done: int, total: int) -> None:
        """Show a report; it is a ``JobProgress``.

        Args:
            job: the network's name.
            what: what is being done; ``NETWORK_DONE`` when the network is complete.
            done: units done; networks with ``NETWORK_DONE``.
            total: units in all.
        """
        if what == NETWORK_DONE:
            self._network_done(job, done, total)
            return
        if self.work_began is None:
            self.work_began, self.found_done = time.monotonic(), self.networks_done
        if done == 0 and what.startswith(EXPECTED):
            if not self.quiet:
                self.say(f"{job} · {what}")
        elif self.live:
            if job not in self.tasks:
                self.tasks[job] = self.bars.add_task(short(job))
            self.bars.update(self.tasks[job], description=f"{short(job)} · {what}", completed=done, total=total)
        elif not self.quiet:
            self._line(job, what, done, total)

    def of(self, job: str) -> Progress:
        """The callback of one network or of one call: a ``Progress``, such as ``evaluate`` and ``fit`` take."""
        return partial(self.progress, job)

    def _line(self, job: str, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        part = self.parts.get(job)
        if part is None or not part.goes_on(done, total):
            part = Part(now, done, done, total)
        self.parts[job] = part = replace(part, done=done, total=total)
        announced = done == 0 and EXPECTED in what
        if now < self.last_line + (EVERY if self.cell is None else CELL) and not announced:
            return
        self.last_line = now
        networks = [f"{self.networks_done} of {self.networks} networks done"] if self.networks > 1 else []
        ahead = f"{done / max(total, 1):.0%}{part.ahead(now)}"
        self.say(" · ".join([duration(now - self.began), *networks, job, what, ahead]))

    def _network_done(self, job: str, done: int, total: int) -> None:
        self.networks, self.networks_done = total, done
        if job in self.tasks:
            self.bars.remove_task(self.tasks.pop(job))
        if self.networks_bar is not None:
            self.bars.update(self.networks_bar, completed=done, total=total)
        if not self.live and not self.quiet:
            self.say(f"network {done} of {total} done: {job}{self._left()}")

    def _left(self) -> str:
        """The time that the other networks will take if they take as long as those finished since work began."""
        finished, others = self.networks_done - self.found_done, self.networks - self.networks_done
        if self.work_began is None or finished < 1 or others < 1:
            return ""
        return f", about {duration((time.monotonic() - self.work_began) / finished * others)} left"

    def say(self, line: str) -> None:
        """Print a line in a log, or replace the line in a notebook."""
        if self.cell is not None:
            self.cell(line)
        else:
            errors.print(line, soft_wrap=True)


@contextmanager
def working(what: str, quiet: bool = False) -> Iterator[None]:
    """A spinner on a terminal, for a few seconds of work without progress reports; nothing elsewhere."""
    if quiet or not is_terminal(errors.file) or errors.is_dumb_terminal:
        yield
        return
    with errors.status(what):
        yield
