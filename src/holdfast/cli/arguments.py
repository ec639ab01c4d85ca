"""The command line as it was typed, checked before it is parsed: lengths, control characters, numbers, paths."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo

from ..errors import UserError
from ..user_input import path, read_number, text


def check_arguments(words: Sequence[str], commands: dict[str, Callable[..., Any]]) -> None:
    """Refuse what the parser would accept in silence: 1_000 for 1,000, an empty path for the working folder.

    Args:
        words: the command line without the program's name.
        commands: the functions that implement the commands, by name.

    Raises:
        UserError: an argument that is too long or holds control characters, a number that Python reads and people do
            not write, or a path that ``user_input.path`` refuses.
    """
    for place, word in enumerate(words, 1):
        text(f"argument {place} of the command line", word)
    name = next((word for word in words if word in commands), None)
    if name is None:
        return
    for option, kinds, value in _given(words[words.index(name) + 1 :], commands[name]):
        if {int, float} & kinds and "_" in value and read_number(value.replace("_", "")) is not None:
            raise UserError(f"{option} {value}: write the number without underscores.")
        if Path in kinds:
            path(option, value)


def _given(words: Sequence[str], command: Callable[..., Any]) -> Iterator[tuple[str, set[Any], str]]:
    """(option or argument, the types it takes, its value) of everything that has a value, in order."""
    options, positions = _declared(command)
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if word == "--":
            yield from ((positions[0], {Path}, other) for other in rest if positions)
            return
        if not word.startswith("-") or word == "-":
            if positions:
                yield positions[0], {Path}, word
        elif option in options and bool not in options[option] and (equals or rest):
            yield option, options[option], value if equals else rest.pop(0)


def _declared(command: Callable[..., Any]) -> tuple[dict[str, set[Any]], list[str]]:
    """(the types of each option, the names of the positional arguments that are paths)."""
    options: dict[str, set[Any]] = {}
    positions = []
    hints = typing.get_type_hints(command, include_extras=True)
    for name in inspect.signature(command).parameters:
        kind, *more = typing.get_args(hints[name]) if hasattr(hints[name], "__metadata__") else (hints[name],)
        kinds = set(typing.get_args(kind)) or {kind}
        if more and isinstance(more[0], ArgumentInfo):
            if Path in kinds or name == "model":
                positions.append(name.upper())
            continue
        info = more[0] if more else None  # typer keeps the first name of an Annotated option as its default
        written = [getattr(info, "default", None), *(getattr(info, "param_decls", None) or ())]
        names = [one for one in written if isinstance(one, str)] or [f"--{name.replace('_', '-')}"]
        options |= dict.fromkeys(names, kinds)
    return options, positions
