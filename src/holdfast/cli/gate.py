"""The gate of a pipeline: --require and --junit, read before the work and applied to its answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from ..errors import UserError
from .display import errors, screen
from .output_files import writable, write_files, written

if TYPE_CHECKING:
    from ..results import Requirement, Row

UNMET = 3  # the exit status
THREE = "a requirement of `--require` is not met"


@dataclass(frozen=True)
class Gate:
    """What a command must reach.

    Args:
        command: its name, for the test suite of the JUnit file.
        requirements: what --require says.
        junit: where the JUnit file goes; None for no file.
    """

    command: str
    requirements: tuple[Requirement, ...] = ()
    junit: Path | None = None

    def needs(self, column: str) -> bool:
        """Whether a requirement is on this column."""
        return any(one.column == column for one in self.requirements)


def read_gate(command: str, require: Sequence[str] | None, junit: Path | None, *, lacks: Iterable[str] = ()) -> Gate:
    """Read --require and --junit before the work begins.

    Args:
        command: its name.
        require: each requirement as typed; None without any.
        junit: the JUnit file.
        lacks: columns that this command does not measure.

    Returns:
        The gate.

    Raises:
        UserError: a requirement cannot be read or is on a column that is not measured; a JUnit file without
            requirements, or one that cannot be written.
    """
    from ..results import parse_requirement

    requirements = tuple(parse_requirement(text) for text in require or ())
    for one in requirements:
        if one.column in lacks:
            raise UserError(f"`holdfast {command}` measures no {one.column}: leave --require '{one.text}' out.")
    if junit is not None:
        if not requirements:
            raise UserError("--junit writes a test case for each requirement: add --require, such as robust>=0.45.")
        if junit.is_dir():
            raise UserError(f"--junit {junit} is a folder: name a file, such as {junit / 'junit.xml'}.")
        writable(junit.parent, "--junit")
    return Gate(command, requirements, junit)


def check_names(gate: Gate, names: Iterable[str]) -> None:
    """Check before the work that every row that is required will be there. Raises UserError."""
    from ..results import check_rows

    check_rows(gate.requirements, names)


def check_bounds(gate: Gate, why_not: str) -> None:
    """Refuse a requirement on certified accuracy before the work, where no bound of the network is known.

    Args:
        gate: what is required.
        why_not: why, in one sentence; "" where a bound is known.

    Raises:
        UserError: there is such a requirement.
    """
    if why_not and gate.needs("certified"):
        text = next(one.text for one in gate.requirements if one.column == "certified")
        raise UserError(f"certified accuracy cannot be measured, so leave --require '{text}' out: {why_not}")


def apply_gate(gate: Gate, shown: Sequence[Row], quiet: bool = False, as_json: bool = False) -> None:
    """Hold the requirements against the rows of the answer; the last step of a command.

    Args:
        gate: what is required.
        shown: the rows.
        quiet: whether to say nothing where all is met.
        as_json: whether stdout is for one JSON document.

    Raises:
        Exit: with status 3, after a line on stderr for each requirement that is not met.
    """
    from ..results import check_requirements, junit

    if not gate.requirements:
        return
    outcomes = check_requirements(gate.requirements, shown)
    if gate.junit is not None:
        name, now = gate.junit.name, datetime.now(UTC).isoformat(timespec="seconds")
        xml = junit(outcomes, suite=f"holdfast {gate.command}", timestamp=now)
        write_files(lambda stage: [written(stage / name, xml)], gate.junit.parent, "--junit")
    for one in outcomes:
        if not one.met:
            errors.sentence(Text.assemble(("not met:", "bold red"), f" {one.reason}"))
    unmet = sum(not one.met for one in outcomes)
    if not quiet and not as_json:
        screen.sentence(f"requirements met: {len(outcomes) - unmet} of {len(outcomes)}")
    if unmet:
        raise typer.Exit(UNMET)
