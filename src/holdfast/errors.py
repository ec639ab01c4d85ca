"""UserError, the one kind of error for what a user can fix, helpers that word it, and text that is safe to print."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

LONGEST_WORD, LONGEST_MESSAGE, MOST_NAMES = 300, 1200, 60  # what a message echoes, in characters and in names
_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # colours, cursor
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"  # titles, links, clipboard
    r"|\x1b[ -/]*[0-~]?"
)
# Control characters, and what reverses or hides the text beside it; a lone surrogate stands for an undecodable byte.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def plain(text: str) -> str:
    """Text without terminal escape sequences; other control characters become U+FFFD, line breaks and tabs stay.

    >>> plain("\\x1b[31mred\\x1b[0m, \\x1b]0;title\\x07bell")
    'red, bell'
    """
    return _CONTROL.sub("\ufffd", _ESCAPE.sub("", text.replace("\r\n", "\n")))


def shortened(text: str, most: int) -> str:
    """Text of at most ``most`` characters: what is too long loses its middle.

    >>> shortened("a name that is far too long", 15)
    'a name th… long'
    """
    tail = most // 3
    return text if len(text) <= most else f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def printable(text: str, most: int = LONGEST_MESSAGE) -> str:
    """Text that came from outside, as a message, a table or a list may show it.

    Args:
        text: any text.
        most: the largest number of characters; one word has at most ``LONGEST_WORD``.

    Returns:
        The text without control characters, the middle of what is too long cut out.

    >>> printable("x" * 1000, 12), printable("sce\\x1b[2J")
    ('xxxxxxx…xxxx', 'sce')
    """
    words = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: shortened(word[0], LONGEST_WORD), plain(text))
    return shortened(words, most)


class UserError(ValueError):
    """An error that the caller can fix: the message says what was wrong, what was expected and what to do.

    The command line prints it without a traceback; in Python it is a plain ``ValueError``. What the message echoes of
    a user's input, or of another library's reason, is made ``printable`` and one line.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(re.sub(r"\s*\n\s*", " ", printable(message).strip()))


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Make the error for a name that does not exist, with the closest name that does.

    Args:
        kind: what was looked up, such as "loss".
        name: the name that does not exist.
        known: the names that exist.

    Returns:
        The error, for the caller to raise.

    >>> print(unknown("loss", "icse", ["sce", "isce", "mmc"]))
    unknown loss 'icse'. Did you mean 'isce'? Known: isce, mmc, sce.
    """
    known, name = sorted(known), printable(str(name), 100)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    more = f" and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
    return UserError(f"unknown {kind} '{name}'.{hint} Known: {', '.join(known[:MOST_NAMES])}{more}.")


def at_least(name: str, value: float, low: float = 0.0, *, above: bool = False) -> None:
    """Check that a number is finite and not below a bound; NaN, true and false are refused too.

    Args:
        name: the argument's name, for the error.
        value: the number.
        low: the bound.
        above: refuse ``low`` itself.

    Raises:
        UserError: ``value`` is no finite number >= ``low`` (> ``low`` with ``above``).

    >>> at_least("weight", 0.5)
    >>> at_least("scale", 0.0, above=True)
    Traceback (most recent call last):
    holdfast.errors.UserError: scale must be > 0, got 0.0.
    """
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not (low < value < math.inf or (value == low and not above)):
        raise UserError(f"{name} must be {'>' if above else '>='} {low:g}, got {value}.")


def type_of(value: Any) -> str:
    """Name the type of a value, with its article, for an error.

    >>> type_of({}), type_of(3)
    ('a dict', 'an int')
    """
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"
