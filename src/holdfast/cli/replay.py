"""``holdfast replay``: re-check stored adversarial examples against the stored networks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .app import app, exits
from .common import best_device, print_json
from .display import aside, screen, working


@app.command(rich_help_panel="Look", epilog=exits("a check fails"))
def replay(
    folder: Annotated[Path, typer.Argument(help="An output folder of compare, recipe, evaluate or explain.")],
    device: o.Device = "auto",
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Re-check the upper bounds on robust accuracy: run the stored adversarial examples through the stored networks.

    One forward pass, no attack code. A bound holds if every stored adversarial example lies within the threat and is
    misclassified, and their number gives the robust accuracy in results.json.
    """
    from .. import replay as replaying

    with aside(as_json), working("replaying adversarial examples", quiet):
        checked = replaying.replay(folder, device=best_device(device))
    if as_json:
        print_json([{**asdict(one), "bound": one.bound, "holds": one.holds} for one in checked])
    else:
        for one in checked:
            word = "holds" if one.holds else f"FAILS ({one.failed} of them failed; reported: {one.reported:.1%})"
            counts = f"{one.misclassified} misclassified, {one.broken} broken by stored adversarial examples"
            screen.print(f"{one.run}: at most {one.bound:.1%} of {one.n} are robust ({counts}): {word}", soft_wrap=True)
        if not checked:
            screen.print("Every run is void, so results.json reports no bound: there is nothing to replay.")
    if not all(one.holds for one in checked):
        raise typer.Exit(1)
