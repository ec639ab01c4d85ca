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
    run_code: o.RunCode = False,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Recount what results.json shows, from the stored networks and adversarial examples, without attack code.

    Clean accuracy, robust accuracy and certificates are computed again, PGD-50 as far as its adversarial examples are
    stored. A run holds if every figure is what results.json says, and every stored adversarial example lies within the
    threat and is misclassified. What cannot be recounted is named.
    """
    from .. import replay as replaying

    with aside(as_json), working("replaying adversarial examples", quiet):
        checked = replaying.replay(folder, device=best_device(device), run_code=run_code)
    if as_json:
        print_json([{**asdict(one), "bound": one.bound, "holds": one.holds} for one in checked])
    else:
        for one in checked:
            word = "holds" if one.holds else f"FAILS ({'; '.join(one.problems)})"
            counts = f"{one.misclassified} misclassified, {one.broken} broken by stored adversarial examples"
            proved = f"; {one.certified} proved robust" if one.certified else ""
            limit = "void" if one.reported is None else f"at most {one.bound:.1%} of {one.n} are robust"
            screen.sentence(f"{one.run}: {limit} ({counts}{proved}): {word}")
        for line in dict.fromkeys(f"not re-checked: {', '.join(one.not_rechecked)}" for one in checked if one.holds):
            screen.sentence(line)
        if not checked:
            screen.print("FAILS: results.json holds no runs, so there is nothing that could hold.")
    if not checked or not all(one.holds for one in checked):
        raise typer.Exit(1)
