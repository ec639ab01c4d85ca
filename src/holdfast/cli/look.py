"""The commands that look at what is there: explain, bracket, curves, report, replay, list."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .app import app, exits
from .common import attack_one, best_device, print_json, say_files
from .display import Display, aside, errors, is_terminal, screen, working
from .options import RUN, Against, AsJson, Device, Figures, Limit, NoiseSeed, Page, Quiet, option
from .output_files import OutputFile, describe_parts, describe_repeats, page, page_at, parts, say, writable, write_files


@app.command(rich_help_panel="Look", epilog=exits())
def explain(
    run: Annotated[Path, typer.Argument(help=RUN)],
    threat: Against = "linf:0.1",
    limit: Limit = 500,
    seed: NoiseSeed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, option("Default: explain-THREAT in the run folder.", "--out", "-o")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """From the published number to what is left: the attack made stronger, one change at a time.

    The changes are stable arithmetic, best iterate, more steps, restarts, targets, other scores, a black box; each
    attacks what the ones before it left standing. Prints what each took, and draws it as waterfall.svg and .png, beside
    results.json and report.html.
    """
    from ..experiments.compare import threat_file_name
    from ..experiments.evaluate_model import from_run
    from ..report import waterfall

    folder = out or run / f"explain-{threat_file_name(threat)}"
    answer = attack_one(partial(from_run, run, limit=limit), threat, "explain", folder, seed, device, quiet, as_json)
    if answer is None:
        return
    results, its_page = answer
    explained = results.runs[0]
    pictures = write_files(partial(waterfall.save, explained), folder)
    if as_json:
        print_json([{**asdict(step), "accuracy": step.accuracy} for step in waterfall.steps(explained)])
    else:
        screen.print(waterfall.table(explained))
        screen.print(waterfall.sentence(explained), soft_wrap=True)
    say_files([*pictures, its_page], quiet, as_json)


@app.command(rich_help_panel="Look", epilog=exits())
def bracket(
    run: Annotated[Path, typer.Argument(help=RUN)],
    threat: Against = "linf:0.1",
    limit: Annotated[int, option("At most so many test images; 0: all.")] = 100,
    seconds: Annotated[
        float, option("At most so long on the exact answer of each sample; 0: no exact answers.")
    ] = 10.0,
    seed: NoiseSeed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, option("Default: bracket-THREAT in the run folder.", "--out", "-o")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """How far the margin of each image can fall: as attacks find, as bounds prove, and in truth.

    s_att is what attacks find, s_cert what bounds allow, and the truth s* lies between them. A sample whose margin is
    above s_cert is certified, one above s* robust, one at s_att or below broken. s* needs linf and a small fully
    connected ReLU network. Writes bracket.json, .svg and .png.
    """
    from ..bracket import of_run, sentence
    from ..experiments.compare import threat_file_name

    writable(out or run / f"bracket-{threat_file_name(threat)}", "--out")
    with aside(as_json), Display(quiet) as display:
        found, files = of_run(
            run, threat, out, seconds=seconds, limit=limit, seed=seed, device=best_device(device), tell=display.tell
        )
    if as_json:
        print_json(files[0].read_text())
    else:
        screen.print(sentence(found), soft_wrap=True)
        say_files([*files], quiet, as_json)


@app.command(rich_help_panel="Look", epilog=exits())
def curves(
    folder: Annotated[list[Path], typer.Argument(help="Run folders, or output folders of `holdfast compare`.")],
    out: Annotated[
        Path | None, option("Folder that the figure goes to. Default: the first one given.", "--out", "-o")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """How training went, from its log: the loss, and clean and robust validation accuracy by epoch.

    Where the best epoch was more robust than the last one, training went on too long (robust overfitting): train with
    --keep best to keep the best one's weights. Works while training goes on. Draws curves.svg and .png.
    """
    from ..train import curves as drawn

    found = [drawn.read(run) for path in folder for run in drawn.folders(path)]
    with working("drawing", quiet or as_json):
        placed = write_files(partial(drawn.save, found), out or folder[0])
    if as_json:
        told = [{**asdict(one), "best": one.best, "lost": one.lost} for one in found]
        print_json({"curves": told, **_files(placed)})
        return
    for curve in found:
        screen.print(drawn.sentence(curve), soft_wrap=True)
    say(placed, quiet)


@app.command(rich_help_panel="Look", epilog=exits())
def report(
    results: Annotated[list[Path], typer.Argument(help="results.json files, or folders that hold one.")],
    out: Page = None,
    figures: Figures = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw results as one HTML page that opens anywhere, and as figures and tables.

    Several results become one page: of the same data as rows of one table, of different data as parts of their own. A
    run that is given twice counts once. Prints where the page is, and "replaced" before it where another one was there.
    """
    from .. import report as reporting
    from ..results import load

    loaded = [load(path) for path in results]
    beside = results[0] if results[0].is_dir() else results[0].parent
    target = page_at(out or beside / "report.html")
    writable(target.parent, "--out")
    if figures is not None:
        writable(figures, "--figures")
    twice, found = describe_repeats(results, loaded), parts(results, loaded)
    with working("drawing", quiet or as_json):
        placed = [page(loaded, target)]
        if figures is not None:
            placed += write_files(partial(reporting.figures, loaded), figures, "--figures")
    if as_json:
        print_json({"page": str(target), **_files(placed), "parts": found, "repeated": twice})
        return
    for line in twice:
        errors.print(line, soft_wrap=True)
    if quiet:
        screen.print(str(target), soft_wrap=True)
    else:
        for line in describe_parts(found):
            screen.print(line, soft_wrap=True)
    say(placed, quiet)


def _files(placed: list[OutputFile]) -> dict[str, list[str]]:
    """The files of a JSON answer, and those of them that another one had to make room for."""
    return {
        "files": [str(one.path) for one in placed],
        "replaced": [str(one.path) for one in placed if one.replaced],
    }


@app.command(rich_help_panel="Look", epilog=exits("a proof fails"))
def replay(
    folder: Annotated[Path, typer.Argument(help="An output folder of compare, recipe, evaluate or explain.")],
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Replay the stored adversarial images through the stored networks: one forward pass, no attack code.

    A bound holds if every stored adversarial image lies within the threat and is misclassified, and their number is
    the one that results.json claims.
    """
    from ..replay import replay as replayed

    with aside(as_json), working("replaying the stored adversarial images", quiet):
        proofs = replayed(folder, device=best_device(device))
    if as_json:
        print_json([{**asdict(p), "bound": p.bound, "holds": p.holds} for p in proofs])
    else:
        for p in proofs:
            word = "holds" if p.holds else f"FAILS ({p.failed} witnesses do not hold, {p.claimed:.1%} was claimed)"
            screen.print(
                f"{p.run}: at most {p.bound:.1%} of {p.n} are robust ({p.wrong} wrong, {p.broken} broken): {word}",
                soft_wrap=True,
            )
        if not proofs:
            screen.print("every run is void, so no bound was claimed: there is nothing to prove.")
    if not all(p.holds for p in proofs):
        raise typer.Exit(1)


@app.command(name="list", rich_help_panel="Look", epilog=exits())
def list_(
    quiet: Annotated[bool, option("Names alone, without what they are.", "--quiet", "-q")] = False,
    as_json: AsJson = False,
) -> None:
    """What there is: losses, heads, attacks, objectives, sources of s, networks, data sets, checks, recipes."""
    from .catalogue import catalogue

    found = catalogue()
    if as_json:
        print_json({kind: sorted(names) for kind, names in found.items()})
        return
    for kind, names in found.items():
        screen.print(kind, style="bold")
        width = max((len(name) for name in names), default=0)
        for name, about in names.items():
            whole = f"  {name}" if quiet else f"  {name:<{width}}  {about}"
            if is_terminal(screen.file):  # in a pipe a line each, for grep
                whole = textwrap.fill(whole, screen.width, subsequent_indent=" " * (width + 4), drop_whitespace=True)
            screen.print(whole, soft_wrap=True)
        if not names:
            screen.print("  none yet")
