"""``holdfast report``: one HTML page, and figures and tables, from results files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError, unknown
from . import options as o
from .app import app, exits
from .common import print_json
from .display import errors, screen, working
from .gate import THREE, Gate, apply_gate, read_gate
from .options import option
from .output_files import (
    describe_parts,
    describe_repeats,
    file_lists,
    page,
    page_at,
    parts,
    say,
    writable,
    write_files,
    written,
)

if TYPE_CHECKING:
    from ..results import Results, Row


@app.command(rich_help_panel="Look", epilog=exits(three=THREE))
def report(
    results: Annotated[list[Path], typer.Argument(help="results.json files, or folders that contain one.")],
    out: o.Page = None,
    figures: o.Figures = None,
    latex: Annotated[
        Path | None, option("Write the table with its tests in LaTeX to this file, for the package booktabs.")
    ] = None,
    baseline: Annotated[
        str, option("The row that others are tested against, by its loss or label. Default: the first row.")
    ] = "",
    title: Annotated[str, option("Title of the page and of the table's caption. Default: the name of the data.")] = "",
    label: Annotated[
        list[str] | None,
        option("Show TEXT for a row, ROW=TEXT: 'isce:s=10=I-SCE, s = 10'. ROW is its loss or label. Repeatable."),
    ] = None,
    require: o.Require = None,
    junit: o.Junit = None,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Render results as one self-contained HTML page, and optionally as figures and tables.

    Several results become one page: results on the same data are rows of one table, other data sets get a part each.
    A run that is given twice counts once. Prints the path of the page, after "replaced" if a different page was there.
    """
    from .. import report as reporting
    from ..io import understood
    from ..results import load

    gate = read_gate("report", require, junit)
    loaded = [load(path) for path in results]
    beside = results[0] if results[0].is_dir() else results[0].parent
    target = page_at(out or beside / "report.html")
    writable(target.parent, "--out")
    if figures is not None:
        writable(figures, "--figures")
    if latex is not None:
        if latex.is_dir():
            raise UserError(f"--latex {latex} is a folder: name a file, such as {latex / 'table.tex'}.")
        writable(latex.parent, "--latex")
    # What results.json says freely, such as the inference region, is checked by drawing it.
    read = partial(understood, ", ".join(map(str, results)), prefix=False)
    with read():
        measured = _rows(loaded)
        _check(gate, measured)
        names = {name for row in measured for name in (row.label, row.loss)}
        if baseline and baseline not in names:
            raise unknown("row of --baseline", baseline, names)
        shown = reporting.named(loaded, title, dict(reporting.parse_label(one, sorted(names)) for one in label or ()))
        baseline = _new_name(loaded, shown, baseline)
    with working("drawing", quiet or as_json), read():
        repeats, by_data = describe_repeats(results, loaded), parts(results, loaded)
        placed = [page(shown, target, baseline)]
        if figures is not None:
            draw = partial(reporting.figures, shown, baseline=baseline)
            placed += write_files(draw, figures, "--figures")
        if latex is not None:
            text = reporting.latex_tables(shown, baseline)
            placed += write_files(lambda stage: [written(stage / latex.name, text)], latex.parent, "--latex")
    if as_json:
        print_json({"page": str(target), **file_lists(placed), "parts": by_data, "repeated": repeats})
        apply_gate(gate, measured, quiet, as_json)
        return
    for line in repeats:
        errors.sentence(line)
    if quiet:
        screen.print(str(target), soft_wrap=True)
    else:
        for line in describe_parts(by_data):
            screen.sentence(line)
    say(placed, quiet)
    apply_gate(gate, measured, quiet)


def _rows(loaded: Sequence[Results]) -> list[Row]:
    """The rows of all data sets; where two have one label, the label names the data too."""
    from .. import report as reporting
    from ..results import rows

    found = [(row, str(part.data.get("name", ""))) for part in reporting.merged(loaded) for row in rows(part)]
    taken = Counter(row.label for row, _ in found)
    return [replace(row, label=f"{row.label} ({name})") if taken[row.label] > 1 else row for row, name in found]


def _new_name(before: Sequence[Results], after: Sequence[Results], name: str) -> str:
    """The label of a row after its renaming; other names are as they were."""
    from .. import report as reporting
    from ..results import rows

    both = zip(reporting.merged(before), reporting.merged(after), strict=True)
    renamed = {old.label: new.label for a, b in both for old, new in zip(rows(a), rows(b), strict=True)}
    return renamed.get(name, name)


def _check(gate: Gate, measured: Sequence[Row]) -> None:
    """Refuse requirements on rows that are not there and on figures that were not measured."""
    from ..results import check_requirements
    from ..results.requirements import is_measured

    check_requirements(gate.requirements, measured)
    for one in gate.requirements:
        for row in measured:
            if one.is_about(row.label, row.loss) and not is_measured(one.column, row):
                raise UserError(f"--require '{one.text}' asks for {one.column}, not measured for {row.label}.")
