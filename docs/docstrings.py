"""The house's docstrings as Markdown: for the reference, where griffe reads them, and for the page of the losses."""

from __future__ import annotations

import re
from typing import Any

import griffe

OPENING = re.compile(r"(Args|Returns|Raises|Errors|Sources?|Settings|Where it fails|Fails)\b:?(?=\s|$)")


def as_markdown(text: str) -> str:
    """Doctests in fences, each kind of statement in a paragraph of its own, a list of arguments as a list."""
    done: list[str] = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if paragraph.startswith(">>>"):
            done.append(f"```pycon\n{paragraph}\n```")
        elif paragraph.startswith("    "):
            done.append(paragraph)  # a formula: code in Markdown as it is
        else:
            done.append("\n".join(_lines(paragraph)))
    return "\n\n".join(done)


def _lines(paragraph: str) -> list[str]:
    lines: list[str] = []
    for line in paragraph.split("\n"):
        text = _escaped(line.strip())
        depth = len(line) - len(line.lstrip())
        opening = OPENING.match(line)
        if opening:
            lines += ["", f"**{opening[0]}** {text[opening.end() :].strip()}", *[""] * line.endswith(":")]
        elif depth == 4:
            name, colon, rest = text.partition(":")
            lines.append(f"* `{name}`:{rest}" if colon and re.fullmatch(r"[\w, *]+", name) else f"* {text}")
        else:
            lines.append("  " * (depth > 4) + text)
    return lines


def _escaped(text: str) -> str:
    """What looks like a tag is none; code stays as it is."""
    parts = re.split(r"(`+[^`]*`+)", text)
    return "".join(part if part.startswith("`") else re.sub(r"<(?=[\w/!])", "&lt;", part) for part in parts)


class Markdown(griffe.Extension):
    """Every docstring that is read from the sources, as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
