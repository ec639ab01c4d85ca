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


def check_arguments(words: Sequence[str], commands: dict[str, Callable[..., Any]]) -> list[str]:
    """Refuse what the parser would accept in silence: 1_000 for 1,000, an empty value for none.

    Args:
        words: the command line without the program's name.
        commands: the functions that implement the commands, by name.

    Returns:
        The command line as it is parsed: with the home folder in place of ~, which no shell writes out in --out=~/x.

    Raises:
        UserError: an argument that is too long or holds control characters, an empty one, a number that Python reads
            and people do not write, or a path that ``user_input.path`` refuses.
    """
    words = list(words)
    for place, word in enumerate(words, 1):
        text(f"argument {place} of the command line", word)
    name = next((word for word in words if word in commands), None)
    if name is None:
        return words
    for place, option, kinds, value in _given(words, words.index(name) + 1, commands[name]):
        if {int, float} & kinds and "_" in value and read_number(value.replace("_", "")) is not None:
            raise UserError(f"{option} {value}: write the number without underscores.")
        if Path in kinds:
            path(option, value)
        elif not value.strip():
            leave = f"leave {option} out" if option.startswith("-") else "leave it out"
            raise UserError(f"{option} is empty: give it a value, or {leave}.")
        if value.startswith("~") and {Path, str} & kinds:
            words[place] = words[place].removesuffix(value) + str(path(option, value))
    return words


def _given(words: Sequence[str], start: int, command: Callable[..., Any]) -> Iterator[tuple[int, str, set[Any], str]]:
    """(place, option or argument, the types it takes, value) of everything that has a value, in order."""
    options, positions = _options_of(command)
    place, only_positions = start, False
    while place < len(words):
        option, equals, value = words[place].partition("=")
        if words[place] == "--" and not only_positions:
            only_positions = True
        elif only_positions or not words[place].startswith("-") or words[place] == "-":
            if positions:
                yield place, *positions[0], words[place]
        elif option in options and bool not in options[option] and (equals or place + 1 < len(words)):
            place += not equals
            yield place, option, options[option], value if equals else words[place]
        place += 1


def _options_of(command: Callable[..., Any]) -> tuple[dict[str, set[Any]], list[tuple[str, set[Any]]]]:
    """(the types of each option, by every name it has; the positional arguments with theirs)."""
    options: dict[str, set[Any]] = {}
    positions = []
    hints = typing.get_type_hints(command, include_extras=True)
    for name in inspect.signature(command).parameters:
        kind, *more = typing.get_args(hints[name]) if hasattr(hints[name], "__metadata__") else (hints[name],)
        kinds = set(typing.get_args(kind)) or {kind}
        if more and isinstance(more[0], ArgumentInfo):
            is_path = Path in kinds or name in ("model", "run")
            positions.append((name.upper(), {Path} if is_path else kinds))
            continue
        info = more[0] if more else None  # typer keeps the first name of an Annotated option as its default
        written = [getattr(info, "default", None), *(getattr(info, "param_decls", None) or ())]
        names = [one for one in written if isinstance(one, str)] or [f"--{name.replace('_', '-')}"]
        options |= dict.fromkeys(names, kinds)
    return options, positions
