"""The application that commands register with, and the entry point."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.text import Text

from .. import __version__
from ..display import errors, screen
from ..errors import UserError

app = typer.Typer(
    name="holdfast",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train image classifiers with robust losses, attack them hard, and say what their robustness is worth.\n\n"
    "Start with **holdfast compare**: two minutes, nothing to download.",
)


def main() -> None:
    """The entry point: what a user can mend is one line on stderr and exit status 2."""
    try:
        app()
    except UserError as error:
        errors.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(2)


def _version(show: bool) -> None:
    if show:
        screen.print(f"holdfast {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
