"""``holdfast list``: everything that has a name."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from ..errors import unknown
from . import options as o
from .app import app, exits
from .common import print_json
from .display import is_terminal, screen
from .options import option


@app.command(name="list", rich_help_panel="Look", epilog=exits())
def list_names(
    kinds: Annotated[
        list[str] | None, typer.Argument(help="Only these kinds, such as losses or attacks. Default: all.")
    ] = None,
    quiet: Annotated[bool, option("Print names only.", "--quiet", "-q")] = False,
    as_json: o.AsJson = False,
) -> None:
    """List losses, heads, attacks, corruptions, objectives, sources of s, models, data sets, checks and recipes."""
    from .catalogue import catalogue

    known = catalogue()
    for kind in kinds or ():
        if kind not in known:
            raise unknown("kind", kind, known)
    chosen = {kind: known[kind] for kind in kinds or known}
    if as_json:
        print_json({kind: sorted(names) for kind, names in chosen.items()})
        return
    for kind, names in chosen.items():
        screen.print(kind, style="bold")
        width = max((len(name) for name in names), default=0)
        for name, about in names.items():
            line = f"  {name}" if quiet else f"  {name:<{width}}  {about}"
            if is_terminal(screen.file):  # in a pipe one line each, for grep
                line = textwrap.fill(line, screen.width, subsequent_indent=" " * (width + 4), drop_whitespace=True)
            screen.print(line, soft_wrap=True)
        if not names:
            screen.print("  none yet")
