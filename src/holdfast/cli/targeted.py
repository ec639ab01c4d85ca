"""``holdfast targeted``: which classes attacks turn each class into."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .app import app, exits
from .common import best_device, print_json, say_files
from .display import Display, aside, screen
from .evaluate import default_folder, subject_of
from .options import NETWORK, option
from .output_files import own_folder
from .own_model import OwnModel, takes_own_model


@app.command(rich_help_panel="Look", epilog=exits())
@takes_own_model
def targeted(
    model: Annotated[str, typer.Argument(help=NETWORK)],
    own_model: OwnModel,
    threat: o.OneThreat = "linf:0.1",
    steps: Annotated[int, option("Steps of Auto-PGD towards each class.")] = 50,
    limit: Annotated[int, option("Maximum number of test images; 0: all.")] = 100,
    seed: Annotated[int, option("Random seed of the attacks' starts.")] = 0,
    batch_size: Annotated[
        int | None, option("Batch size. Default: by image size; halved when memory runs out.")
    ] = None,
    device: o.Device = "auto",
    out: Annotated[
        Path | None,
        option(
            "Output folder. Default: targeted-THREAT in the run folder, or out/NAME-targeted-THREAT for your own "
            "model.",
            "--out",
            "-o",
        ),
    ] = None,
    run_code: o.RunCode = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Targeted robustness as a matrix, class by class: the share of each class that attacks turn into each other.

    **holdfast targeted mymodel.py:build --weights w.safetensors --data FOLDER --threat linf:8/255 --out DIR**

    Every image is attacked towards every class with Auto-PGD, for at most 100 classes. A pair counts where the network,
    asked afresh, predicts the target. Nothing is proved: what was not reached may be reachable.

    Writes targeted.json, .csv, .svg and .png. An interrupted command resumes when it is rerun.
    """
    from ..targeted import sentence, table, targeted_subject

    open_subject = subject_of(model, own_model, limit=limit, seed=seed, quiet=quiet, run_code=run_code)
    folder = out or default_folder(model, "targeted-THREAT", threat)
    own_folder(folder)
    with aside(as_json), Display(quiet) as display:
        subject = open_subject(device=best_device(device))
        found, files = targeted_subject(
            subject, threat, folder, steps=steps, limit=limit, seed=seed, batch_size=batch_size,
            progress=partial(display.progress, subject.name),
        )  # fmt: skip
    if as_json:
        print_json(files[0].read_text())
    else:
        screen.print(table(found, subject.name))
        screen.sentence(sentence(found))
        say_files([*files], quiet, as_json)
