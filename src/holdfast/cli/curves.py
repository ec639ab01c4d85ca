"""``holdfast curves``: training and validation curves from a run folder's log."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .app import app, exits
from .common import print_json
from .display import screen, working
from .options import option
from .output_files import file_lists, say, write_files


@app.command(rich_help_panel="Look", epilog=exits())
def curves(
    folder: Annotated[list[Path], typer.Argument(help="Run folders, or output folders of `holdfast compare`.")],
    out: Annotated[Path | None, option("Folder for the figure. Default: the first one given.", "--out", "-o")] = None,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Plot the training loss, and clean and robust validation accuracy per epoch, from the training log.

    If the best epoch was more robust than the last one, training overfitted (robust overfitting): train with
    --checkpoint best to keep the best epoch's weights. Works while training runs. Draws curves.svg and .png.
    """
    from ..train import curves as training

    curves = [training.read(run) for path in folder for run in training.folders(path)]
    with working("drawing", quiet or as_json):
        placed = write_files(partial(training.save, curves), out or folder[0])
    if as_json:
        plain = [{**asdict(curve), "best": curve.best, "overfitting": curve.overfitting} for curve in curves]
        print_json({"curves": plain, **file_lists(placed)})
        return
    for curve in curves:
        screen.sentence(training.sentence(curve))
    say(placed, quiet)
