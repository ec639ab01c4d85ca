"""For the API pages: a docstring as Markdown, which takes every > at the beginning of a text for a quote."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)  # up to the next blank line
RANGE = re.compile(r"^(\s+[\w, ]+: )(?=>)", re.MULTILINE)  # an argument whose description begins with ">= 1"


def as_markdown(docstring: str) -> str:
    """The docstring with each of its doctests in a fence, and no range taken for a quote."""
    return RANGE.sub(r"\1\\", DOCTEST.sub(lambda found: f"```pycon\n{found.group()}\n```", docstring))


class Docstrings(griffe.Extension):
    """Changes the docstrings of all objects."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
