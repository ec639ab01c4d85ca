"""Output files: written whole once all of them are made, with a note on those that replace another file."""

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

NO_PLACE = ("/dev", "/proc", "/sys")  # what is written there is lost, or does harm


@dataclass(frozen=True)
class OutputFile:
    """A file that was written; ``replaced``: a different file was there before, which is lost."""

    path: Path
    replaced: bool = False

    def __str__(self) -> str:
        return f"replaced {self.path}" if self.replaced else str(self.path)


def writable(folder: Path, option: str) -> None:
    """Check before work begins that a folder can be written to. It is not created.

    Args:
        folder: the output folder.
        option: the option that names it, for the error.

    Raises:
        UserError: a file is in its place, or permission is missing.
    """
    full = folder.resolve()
    for system in NO_PLACE:
        if full.is_relative_to(system) and not full.is_relative_to("/dev/shm"):  # which is memory, and of the user
            raise UserError(f"could not write to {folder}: {system} holds no files. Name another with {option}.")
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"could not write to {folder}: {there} is a file, not a folder. Name another with {option}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"could not write to {folder}: no permission to write in {there}. Name another with {option}.")


def own_folder(folder: Path, option: str = "--out") -> None:
    """Check before work begins that a command can fill a folder with its files: as ``writable``, and it is not shared.

    Args:
        folder: the output folder.
        option: the option that names it, for the error.

    Raises:
        UserError: as ``writable`` does; or it is the home folder or one above the working folder, and no earlier
            command filled it.
    """
    writable(folder, option)
    full = folder.resolve()
    if (full in Path.cwd().resolve().parents or full == Path.home().resolve()) and not (full / "config.json").exists():
        what = "your home folder" if full == Path.home().resolve() else "above the working folder"
        raise UserError(
            f"{option} {folder} is {what}, and its files would lie among others: name a folder of its own, such as "
            f"{folder / 'run'}."
        )


def write_files(draw: Callable[[Path], Any], folder: Path, option: str = "--out") -> list[OutputFile]:
    """Write files to a temporary folder, then move each to its place: all of them, or none if one cannot be made.

    Args:
        draw: writes files to the folder it is given, and returns their paths.
        folder: where they go.
        option: the option that names the folder, for errors.

    Returns:
        The files in their place. A file that differs from the old one only in its time and command is not "replaced".

    Raises:
        UserError: the folder or a file cannot be written.
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
            placed.append(OutputFile(target, before is not None and _comparable(before) != _comparable(content)))
    return placed


def written(path: Path, text: str) -> Path:
    """Write a text file; returns its path, for ``write_files``."""
    path.write_text(text, encoding="utf-8")
    return path


def _comparable(content: bytes) -> bytes:
    """A file's content without time stamps and the command line, which change when a command is rerun."""
    return re.sub(rb"\d{4}-\d\d-\d\dT[\d:.]+(?:[+-][\d:]+|Z)?|<pre>holdfast [^<]*</pre>", b"", content)


def page_at(out: Path) -> Path:
    """The file that a page is written to: ``out`` itself, or report.html in it if it is a folder. Raises UserError."""
    if out.is_dir() or not out.suffix:
        return out / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"the page is HTML: --out takes a name that ends in .html, or a folder that exists, not {out}.")
    return out


def page(loaded: Sequence[Any], target: Path, baseline: str = "") -> OutputFile:
    """Render the page of some results; ``baseline`` is the row that others are tested against."""
    from .. import report as reporting

    return write_files(lambda stage: [reporting.render(loaded, stage / target.name, baseline)], target.parent)[0]


def say(placed: Sequence[OutputFile], quiet: bool = False) -> None:
    """Print one line per file; when quiet, only for files that replaced another one, on stderr."""
    for one in placed:
        if not quiet:
            screen.print(str(one), soft_wrap=True)
        elif one.replaced:
            errors.print(str(one), soft_wrap=True)


def parts(paths: Sequence[Path], loaded: Sequence[Any]) -> list[dict[str, Any]]:
    """The parts of a page, one per data set.

    Data sets with the same name but another fingerprint or other classes are different parts.

    Args:
        paths: the results files.
        loaded: their contents.

    Returns:
        Dicts of data (name), fingerprint, rows, runs, and from (the files).
    """
    from .. import report as reporting
    from ..results import rows

    by_data = []
    for part in reporting.merged(loaded):
        theirs = [
            path for path, one in zip(paths, loaded, strict=True) if reporting.identity(one) == reporting.identity(part)
        ]
        by_data.append(
            {
                "data": str(part.data.get("name", "data without a name")),
                "fingerprint": part.data.get("fingerprint"),
                "rows": len(rows(part)),
                "runs": len(part.runs),
                "from": list(dict.fromkeys(map(str, theirs))),
            }
        )
    return by_data


def file_lists(placed: Sequence[OutputFile]) -> dict[str, list[str]]:
    """The files of a JSON answer, and those of them that replaced another file."""
    return {
        "files": [str(one.path) for one in placed],
        "replaced": [str(one.path) for one in placed if one.replaced],
    }


def describe_parts(by_data: Sequence[dict[str, Any]]) -> list[str]:
    """The parts in words, if there are several."""
    if len(by_data) < 2:
        return []
    names = Counter(part["data"] for part in by_data)
    lines = [f"{len(by_data)} parts, one for each data set; rows of different parts are not compared:"]
    for number, part in enumerate(by_data, 1):
        more = f" ({part['fingerprint'] or 'other classes'})" if names[part["data"]] > 1 else ""
        runs = "" if part["runs"] == part["rows"] else f" of {part['runs']} runs"
        row = f"{part['rows']} row{'s' * (part['rows'] != 1)}"
        lines.append(f"  {number}. {part['data']}{more}: {row}{runs}, from {', '.join(part['from'])}")
    return lines


def describe_repeats(paths: Sequence[Path], loaded: Sequence[Any]) -> list[str]:
    """What was given twice, in words: the same file, or runs that an earlier file has too."""
    from ..report import identity

    lines: list[str] = []
    seen: list[tuple[Path, Any]] = []
    for path, one in zip(paths, loaded, strict=True):
        same = next((was for was, _ in seen if _file(was).samefile(_file(path))), None)
        before = [(was, run) for was, other in seen if identity(other) == identity(one) for run in other.runs]
        again = [was for run in one.runs for was in [next((was for was, had in before if had == run), None)] if was]
        if same is not None:
            lines.append(f"{path} was given twice: its runs count once.")
        elif again:
            count = "all" if len(again) == len(one.runs) else f"{len(again)} of"
            lines.append(f"{path}: {count} {len(one.runs)} runs are in {again[0]} too, and count once.")
        seen.append((path, one))
    return lines


def _file(path: Path) -> Path:
    from ..results import FILE

    return path / FILE if path.is_dir() else path
