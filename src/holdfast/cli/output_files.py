"""Files put in their place whole, once all are drawn; and what is said of those that were there before."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .display import errors, screen


@dataclass(frozen=True)
class OutputFile:
    """A file in its place; replaced: another one was there, which is lost."""

    path: Path
    replaced: bool = False

    def __str__(self) -> str:
        return f"replaced {self.path}" if self.replaced else str(self.path)


def writable(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be written to, before work begins. Nothing is made: an error leaves no folder."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"could not write to {folder}: {there} is a file, not a folder. Name another with {option}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"could not write to {folder}: no permission to write in {there}. Name another with {option}.")


def write_files(draw: Callable[[Path], Any], folder: Path, option: str = "--out") -> list[OutputFile]:
    """Let ``draw`` write files to a folder aside, then put each in its place in ``folder``: all are drawn, or none is.

    A file that was there and tells the same stays or is renewed; another one is replaced, and that is said.
    """
    from ..io import write_atomic

    writable(folder, option)
    placed = []
    with tempfile.TemporaryDirectory(prefix="holdfast-") as made:
        stage = Path(made)
        drawn = [Path(path) for path in draw(stage)]
        for path in drawn:
            target, content = folder / path.relative_to(stage), path.read_bytes()
            try:
                before = target.read_bytes() if target.exists() else None
                if before != content:
                    write_atomic(target, content)
            except (OSError, UserError) as error:
                why = str(error) if isinstance(error, UserError) else f"could not write {target}: {error.strerror}."
                raise UserError(f"{why} Name another place with {option}.") from None
            placed.append(OutputFile(target, before is not None and _told(before) != _told(content)))
    return placed


def _told(content: bytes) -> bytes:
    """What a file tells, but for when it was made and by which words: those change when a command is repeated."""
    return re.sub(rb"\d{4}-\d\d-\d\dT[\d:.]+(?:[+-][\d:]+|Z)?|<pre>holdfast [^<]*</pre>", b"", content)


def page_at(out: Path) -> Path:
    """The file that a page goes to: itself, or report.html in a folder, there already or not."""
    if out.is_dir() or not out.suffix:
        return out / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"the page is HTML: --out takes a name that ends in .html, or a folder that exists, not {out}.")
    return out


def page(loaded: Sequence[Any], target: Path) -> OutputFile:
    """The page of some results, in its place."""
    from .. import report as reporting

    return write_files(lambda stage: [reporting.render(loaded, stage / target.name)], target.parent)[0]


def say(placed: Sequence[OutputFile], quiet: bool = False) -> None:
    """A line for each file; when quiet, on stderr and for those alone that replaced another."""
    for one in placed:
        if not quiet:
            screen.print(str(one), soft_wrap=True)
        elif one.replaced:
            errors.print(str(one), soft_wrap=True)


def parts(paths: Sequence[Path], loaded: Sequence[Any]) -> list[dict[str, Any]]:
    """What the page will show, a part for each data set: its name, rows, runs, and the files they are from.

    Data sets of one name but another fingerprint or classes are told apart by more than their name.
    """
    from .. import report as reporting
    from ..results import rows

    found = []
    for part in reporting.merged(loaded):
        theirs = [
            path for path, one in zip(paths, loaded, strict=True) if reporting.identity(one) == reporting.identity(part)
        ]
        found.append(
            {
                "data": str(part.data.get("name", "data without a name")),
                "fingerprint": part.data.get("fingerprint"),
                "rows": len(rows(part)),
                "runs": len(part.runs),
                "from": list(dict.fromkeys(map(str, theirs))),
            }
        )
    return found


def describe_parts(found: Sequence[dict[str, Any]]) -> list[str]:
    """The parts in words, where there are several."""
    if len(found) < 2:
        return []
    names = Counter(part["data"] for part in found)
    lines = [f"{len(found)} parts, one for each data set; rows of different parts are not compared:"]
    for number, part in enumerate(found, 1):
        more = f" ({part['fingerprint'] or 'other classes'})" if names[part["data"]] > 1 else ""
        runs = "" if part["runs"] == part["rows"] else f" of {part['runs']} runs"
        row = f"{part['rows']} row{'s' * (part['rows'] != 1)}"
        lines.append(f"  {number}. {part['data']}{more}: {row}{runs}, from {', '.join(part['from'])}")
    return lines


def describe_repeats(paths: Sequence[Path], loaded: Sequence[Any]) -> list[str]:
    """What was given twice, in words: the same file, or runs that another file holds already."""
    from ..report import identity

    said: list[str] = []
    seen: list[tuple[Path, Any]] = []
    for path, one in zip(paths, loaded, strict=True):
        same = next((was for was, _ in seen if _file(was).samefile(_file(path))), None)
        before = [(was, run) for was, other in seen if identity(other) == identity(one) for run in other.runs]
        again = [was for run in one.runs for was in [next((was for was, had in before if had == run), None)] if was]
        if same is not None:
            said.append(f"{path} was given twice: its runs count once.")
        elif again:
            count = "all" if len(again) == len(one.runs) else f"{len(again)} of"
            said.append(f"{path}: {count} {len(one.runs)} runs are in {again[0]} too, and count once.")
        seen.append((path, one))
    return said


def _file(path: Path) -> Path:
    from ..results import FILE

    return path / FILE if path.is_dir() else path
