"""``holdfast doctor``: what is installed, which device there is, what to do."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.text import Text

from . import options as o
from .app import app, exits
from .common import print_json
from .display import aside, screen

STYLES = {"ok": "green", "missing": "yellow", "broken": "bold red"}


@app.command(rich_help_panel="Look", epilog=exits("something that holdfast needs is broken"))
def doctor(quiet: o.Quiet = False, as_json: o.AsJson = False) -> None:
    """Say which versions, packages and device there are, which data sets need a download, and what to do.

    Each line is ok, missing (holdfast works without it) or broken (it does not), with the command that mends it. Only
    broken lines are printed with --quiet.
    """
    from ..doctor import examine, healthy

    with aside():  # packages print what they like when they are imported
        findings = examine()
    if as_json:
        print_json({"healthy": healthy(findings), "findings": [asdict(one) for one in findings]})
    else:
        width = max(len(one.name) for one in findings)
        for one in findings:
            if not quiet or one.status == "broken":
                advice = f"; {one.advice}" if one.advice else ""
                line = (f"{one.status:<8}", STYLES[one.status]), f"{one.name:<{width}}  {one.found}{advice}"
                screen.print(Text.assemble(*line), soft_wrap=True)
    if not healthy(findings):
        raise typer.Exit(1)
