"""``holdfast bracket``: per sample, how far the margin can fall within the threat."""

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


@app.command(rich_help_panel="Look", epilog=exits())
def bracket(
    run: Annotated[str, typer.Argument(help=NETWORK)],
    threat: o.OneThreat = "linf:0.1",
    limit: Annotated[int, option("Maximum number of test images; 0: all.")] = 100,
    seconds: Annotated[float, option("Time limit per sample for the exact answer; 0: no exact answers.")] = 10.0,
    seed: o.NoiseSeed = 0,
    device: o.Device = "auto",
    out: Annotated[
        Path | None,
        option(
            "Output folder. Default: bracket-THREAT in the run folder, or out/NAME-bracket-THREAT for your own model.",
            "--out",
            "-o",
        ),
    ] = None,
    data: o.OwnData = "",
    weights: o.Weights = "",
    input_range: o.InputRange = "",
    mean: o.Mean = "",
    std: o.Std = "",
    input_layout: o.InputLayout = "",
    loss: o.TrainedWith = "",
    run_code: o.RunCode = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Worst-case margin drop per sample: lower bound from attacks, upper bound from certificates, exact if tractable.

    s_att is the largest drop that attacks found, s_cert the largest that certificates allow, and the exact value s*
    lies between them. A sample is certified if its margin exceeds s_cert, robust if it exceeds s*, and broken if it is
    at most s_att. s* needs linf and a small fully connected ReLU network. Writes bracket.json, .svg and .png.
    """
    from ..bracket import bracket_subject, sentence

    own = {
        "data": data, "weights": weights, "input-range": input_range, "mean": mean, "std": std,
        "input-layout": input_layout, "loss": loss,
    }  # fmt: skip
    open_subject = subject_of(run, own, limit=limit, seed=seed, quiet=quiet, run_code=run_code)
    folder = out or default_folder(run, "bracket-THREAT", threat)
    own_folder(folder)
    with aside(as_json), Display(quiet) as display:
        subject = open_subject(device=best_device(device))
        answer, files = bracket_subject(
            subject, threat, folder, seconds=seconds, limit=limit, seed=seed,
            progress=partial(display.progress, subject.name),
        )  # fmt: skip
    if as_json:
        print_json(files[0].read_text())
    else:
        screen.print(sentence(answer), soft_wrap=True)
        say_files([*files], quiet, as_json)
