"""``holdfast explain``: from the usual PGD-50 figure to the robust one, one change of the attack at a time."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .app import app, exits
from .common import print_json, run_evaluation, say_files
from .display import screen
from .evaluate import default_folder, subject_of
from .options import NETWORK, option
from .output_files import write_files
from .own_model import OwnModel, takes_own_model


@app.command(rich_help_panel="Look", epilog=exits())
@takes_own_model
def explain(
    run: Annotated[str, typer.Argument(help=NETWORK)],
    own_model: OwnModel,
    threat: o.OneThreat = "linf:0.1",
    limit: o.Limit = 500,
    seed: o.NoiseSeed = 0,
    device: o.Device = "auto",
    out: Annotated[
        Path | None,
        option(
            "Output folder. Default: explain-THREAT in the run folder, or out/NAME-explain-THREAT for your own model.",
            "--out",
            "-o",
        ),
    ] = None,
    run_code: o.RunCode = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Show how robust accuracy falls from PGD-50 to the final figure as the attack is strengthened step by step.

    The steps are stable arithmetic, best iterate, more steps, restarts, targets, other scores and a black-box attack;
    each attacks the samples that survived the previous ones. Prints what each step broke, and draws waterfall.svg and
    .png beside results.json and report.html.
    """
    from ..report import waterfall

    folder = out or default_folder(run, "explain-THREAT", threat)
    subject = subject_of(run, own_model, limit=limit, seed=seed, quiet=quiet, run_code=run_code)
    answer = run_evaluation(
        subject, threat, "explain", folder,
        seed=seed, device=device, quiet=quiet, as_json=as_json,
    )  # fmt: skip
    if answer is None:
        return
    results, page, uncertified = answer
    explained = results.runs[0]
    figures = write_files(partial(waterfall.save, explained), folder)
    if as_json:
        print_json([{**asdict(step), "accuracy": step.accuracy} for step in waterfall.steps(explained)])
    else:
        screen.print(waterfall.table(explained))
        screen.sentence(waterfall.sentence(explained))
        if uncertified:
            screen.sentence(uncertified)
    say_files([*figures, page], quiet, as_json)
