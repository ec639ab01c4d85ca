"""``holdfast report``: one HTML page, and figures and tables, from results files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .app import app, exits
from .common import print_json
from .display import errors, screen, working
from .output_files import describe_parts, describe_repeats, file_lists, page, page_at, parts, say, writable, write_files


@app.command(rich_help_panel="Look", epilog=exits())
def report(
    results: Annotated[list[Path], typer.Argument(help="results.json files, or folders that contain one.")],
    out: o.Page = None,
    figures: o.Figures = None,
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

    loaded = [load(path) for path in results]
    beside = results[0] if results[0].is_dir() else results[0].parent
    target = page_at(out or beside / "report.html")
    writable(target.parent, "--out")
    if figures is not None:
        writable(figures, "--figures")
    # What results.json says freely, such as the inference region, is checked by drawing it.
    read = understood(", ".join(map(str, results)), prefix=False)
    with working("drawing", quiet or as_json), read:
        repeats, by_data = describe_repeats(results, loaded), parts(results, loaded)
        placed = [page(loaded, target)]
        if figures is not None:
            placed += write_files(partial(reporting.figures, loaded), figures, "--figures")
    if as_json:
        print_json({"page": str(target), **file_lists(placed), "parts": by_data, "repeated": repeats})
        return
    for line in repeats:
        errors.print(line, soft_wrap=True)
    if quiet:
        screen.print(str(target), soft_wrap=True)
    else:
        for line in describe_parts(by_data):
            screen.print(line, soft_wrap=True)
    say(placed, quiet)
