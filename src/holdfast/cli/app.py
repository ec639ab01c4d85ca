"""The application that commands register with, the entry point, and where a stranger starts."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.text import Text

from .. import __version__
from ..errors import UserError
from .display import coloured, errors, screen

ABOUT = "Train image classifiers with robust losses, attack them hard, and say what their robustness is worth."
START = """\
Start here: seven losses on handwritten digits, 4 minutes, nothing to download
  holdfast compare

Then with other data, losses and threats, or a whole experiment by its name
  holdfast compare --data mnist --losses sce,isce:s=10,mmc --threat linf:0.2
  holdfast recipe

One network
  holdfast train --loss isce:s=10 --out runs/mine
  holdfast curves runs/mine      how training went
  holdfast evaluate runs/mine    attack it: what is its accuracy worth?
  holdfast explain runs/mine     which change of the attack took how much
  holdfast bracket runs/mine     attacks, proofs and truth, sample by sample

A network of your own
  holdfast evaluate mymodel.py:build --data FOLDER --threat linf:8/255

What is there already
  holdfast report DIR DIR        one page of several results
  holdfast replay DIR            prove the bounds again, without attack code
  holdfast list                  losses, attacks, networks, data, checks

holdfast --help, holdfast COMMAND --help: all there is to set.
"""


def exits(no: str = "") -> str:
    """The end of a command's --help: its exit statuses. no: what 1 means, where the answer can be no."""
    negative = f"1 {no}; " if no else ""
    return (
        f"**Exit status:** 0 done; {negative}2 it cannot be done as asked, one line on stderr says why; "
        "130 stopped by Ctrl-C."
    )


app = typer.Typer(
    name="holdfast",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"{ABOUT}\n\nStart with **holdfast compare**: 4 minutes, nothing to download.",
    epilog=exits("the answer is no, as `replay` and `recipe` can say")
    + "\n\nNO_COLOR takes colours away, FORCE_COLOR keeps them in a pipe.",
)


def main() -> None:
    """The entry point: what a user can mend is one line on stderr and exit status 2."""
    from typer import rich_utils

    # The colours of --help are the same as everywhere else; typer alone keeps some with NO_COLOR, and in CI's logs.
    rich_utils.FORCE_TERMINAL = None
    rich_utils.COLOR_SYSTEM = "auto" if coloured(os.environ, True) else None
    if coloured(os.environ, False):
        rich_utils.COLOR_SYSTEM = "standard"
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
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        screen.print(f"holdfast {__version__}. {ABOUT}\n\n{START}", end="")
