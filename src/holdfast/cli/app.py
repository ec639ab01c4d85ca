"""The application that the commands register with, the entry point, and what ``holdfast`` alone prints."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.text import Text

from .. import __version__
from ..errors import UserError
from .arguments import check_arguments
from .display import coloured, errors, screen

ABOUT = (
    "Train image classifiers with robust losses, attack them, and report how far each robustness figure can be trusted."
)
START = """\
Start here: seven losses on handwritten digits, 2 to 4 minutes on 2 cores, nothing to download
  holdfast compare

Other data, losses and threats; or a named experiment
  holdfast compare --data mnist --losses sce,isce:s=10,mmc --threat linf:0.2
  holdfast recipe

One network
  holdfast train --loss isce:s=10 --out runs/mine
  holdfast curves runs/mine      plot training and validation
  holdfast evaluate runs/mine    attack it and judge its robust accuracy
  holdfast explain runs/mine     which change of the attack broke how many samples
  holdfast bracket runs/mine     prove what attacks leave: certified <= truth <= attacked
  holdfast smooth runs/mine      certified and attacked accuracy of its smoothed classifier
  holdfast targeted runs/mine    which class an attack turns into which other
  holdfast export runs/mine      as ONNX, torch.export program or weights, for other tools

Your own model
  holdfast evaluate mymodel.py:build --data FOLDER --threat linf:8/255

Existing results
  holdfast report DIR DIR        one page for several results
  holdfast replay DIR            re-check the stored adversarial examples
  holdfast list                  losses, attacks, models, data sets, checks
  holdfast doctor                what is installed, which device, what to do

All options: holdfast --help, holdfast COMMAND --help
"""


def exits(negative: str = "", *, zero: str = "success", three: str = "") -> str:
    """The exit statuses, for the end of a command's --help.

    Args:
        negative: what status 1 means, for commands whose answer can be no.
        zero: what status 0 means.
        three: what status 3 means, where there is one.
    """
    one, three = (f"{number} {what}; " if what else "" for number, what in ((1, negative), (3, three)))
    return (
        f"**Exit status:** 0 {zero}; {one}{three}2 invalid request (one-line reason on stderr); "
        "130 interrupted by Ctrl-C."
    )


app = typer.Typer(
    name="holdfast",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"{ABOUT}\n\nStart with **holdfast compare**: 2 to 4 minutes on 2 cores, nothing to download.",
    epilog=exits("a check failed (`replay`, `recipe`)")
    + "\n\nNO_COLOR disables colours; FORCE_COLOR keeps them in a pipe.",
)


def main() -> None:
    """The entry point: an error that the user can fix is one line on stderr and exit status 2."""
    from typer import rich_utils

    # --help follows the same colour rules as all other output; typer alone ignores NO_COLOR in part.
    rich_utils.FORCE_TERMINAL = None
    rich_utils.COLOR_SYSTEM = "auto" if coloured(os.environ, True) else None
    if coloured(os.environ, False):
        rich_utils.COLOR_SYSTEM = "standard"
    with warnings.catch_warnings():
        setattr(warnings, "showwarning", _notes(warnings.showwarning))  # noqa: B010  (its type is narrower)
        try:
            commands = {
                one.name or getattr(one.callback, "__name__", ""): one.callback for one in app.registered_commands
            }
            app(check_arguments(sys.argv[1:], {name: function for name, function in commands.items() if function}))
        except KeyboardInterrupt:
            sys.exit(130)
        except SystemExit as stop:
            if isinstance(stop.__context__, typer.Abort):  # Ctrl-C, for which the parser exits with 1
                sys.exit(130)
            raise
        except UserError as error:
            errors.sentence(Text.assemble(("error:", "bold red"), f" {error}"))
            sys.exit(2)


def _notes(show: Callable[..., None]) -> Callable[..., None]:
    """What prints a warning of ours once, as a note without the line of code it comes from; others go to ``show``."""
    said = set()

    def note(message: Any, category: Any, *where: Any, **stream: Any) -> None:
        if not category.__module__.startswith("holdfast"):
            show(message, category, *where, **stream)
        elif str(message) not in said:
            said.add(str(message))
            errors.sentence(Text.assemble(("note:", "bold yellow"), f" {message}"))

    return note


def _version(show: bool) -> None:
    if show:
        screen.print(f"holdfast {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        screen.print(f"holdfast {__version__}. {ABOUT}\n\n{START}", end="")
