"""The commands that look at what is there: explain, bracket, curves, report, verify, list."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..display import Display, screen
from .app import app
from .options import (
    Against,
    AsJson,
    Device,
    Figures,
    Limit,
    Page,
    Quiet,
    Seed,
    option,
)
from .shared import attack_one, best_device


@app.command(rich_help_panel="Look")
def explain(
    run: Annotated[Path, typer.Argument(help="A run folder that `holdfast train` or `compare` wrote.")],
    threat: Against = "linf:0.1",
    limit: Limit = 500,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, option("Default: explain-THREAT in the run folder.", "--out", "-o")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """From the published number to what is left: a waterfall of the attack, one change at a time.

    Stable arithmetic, best iterate, steps, restarts, targets, other scores, a black box. Each change attacks what the
    ones before it left standing. Writes waterfall.svg and .png beside results.json and report.html.
    """
    from .. import waterfall
    from ..compare import file_text

    folder = out or run / f"explain-{file_text(threat)}"
    from ..single import from_run

    answer = attack_one(partial(from_run, run, limit=limit), threat, "explain", folder, seed, device, quiet)
    if answer is None:
        return
    results, page = answer
    explained = results.runs[0]
    pictures = waterfall.save(explained, folder)
    if as_json:
        from dataclasses import asdict

        print(json.dumps([{**asdict(step), "accuracy": step.accuracy} for step in waterfall.steps(explained)]))
        return
    screen.print(waterfall.table(explained))
    screen.print(waterfall.sentence(explained), soft_wrap=True)
    if not quiet:
        screen.print("\n" + "\n".join(map(str, [*pictures, page])), soft_wrap=True)


@app.command(rich_help_panel="Look")
def bracket(
    run: Annotated[Path, typer.Argument(help="A run folder that `holdfast train` or `compare` wrote.")],
    threat: Against = "linf:0.1",
    limit: Annotated[int, option("At most so many test images, 0 for all.")] = 100,
    seconds: Annotated[float, option("At most so long on the exact answer of each sample; 0: none.")] = 10.0,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, option("Default: bracket-THREAT in the run folder.", "--out", "-o")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """How far each margin can fall: found by attacks, proved by bounds, and in truth. s_att <= s* <= s_cert, drawn.

    A sample whose margin exceeds s_cert is certified, one above s* robust, one at s_att or below broken. The truth, s*,
    needs linf and a small fully connected ReLU network. Writes bracket.json, .svg and .png.
    """
    from ..bracket import of_run, sentence

    with Display(quiet) as display:
        found, files = of_run(
            run, threat, out, seconds=seconds, limit=limit, seed=seed, device=best_device(device), tell=display.tell
        )
    screen.print(files[0].read_text() if as_json else sentence(found), soft_wrap=True)
    if not quiet and not as_json:
        screen.print("\n" + "\n".join(map(str, files)), soft_wrap=True)


@app.command(rich_help_panel="Look")
def curves(
    folder: Annotated[list[Path], typer.Argument(help="Run folders, or output folders of `holdfast compare`.")],
    out: Annotated[Path | None, option("Folder of the figure. Default: the first folder.", "--out", "-o")] = None,
) -> None:
    """How training went, from its log: the loss, and clean and robust validation accuracy by epoch.

    What the best epoch had and the last one has lost is robust overfitting: --keep best keeps the best one's weights.
    Works while training goes on. Writes curves.svg and .png.
    """
    from .. import curves as drawn

    found = [drawn.read(run) for path in folder for run in drawn.folders(path)]
    for curve in found:
        screen.print(drawn.sentence(curve), soft_wrap=True)
    for path in drawn.save(found, out or folder[0]):
        screen.print(str(path), soft_wrap=True)


@app.command(rich_help_panel="Look")
def report(
    results: Annotated[list[Path], typer.Argument(help="results.json files, or folders that hold one.")],
    out: Page = None,
    figures: Figures = None,
) -> None:
    """Draw results as one self-contained HTML page, and as figures."""
    from .. import report as reporting
    from ..results import load

    loaded = [load(path) for path in results]
    beside = results[0] if results[0].is_dir() else results[0].parent
    page = reporting.render(loaded, out or beside / "report.html")
    screen.print(str(page), soft_wrap=True)
    if figures is not None:
        for found in loaded:
            for path in reporting.figures(found, figures):
                screen.print(str(path), soft_wrap=True)


@app.command(rich_help_panel="Look")
def verify(
    folder: Annotated[Path, typer.Argument(help="An output folder of compare or evaluate.")],
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Prove the upper bounds again: stored adversarial images, stored networks, one forward pass, no attack code."""
    from dataclasses import asdict

    from ..verify import verify as check

    proofs = check(folder, device=best_device(device))
    if as_json:
        print(json.dumps([{**asdict(p), "bound": p.bound, "holds": p.holds} for p in proofs], indent=1))
    else:
        for p in proofs:
            word = "holds" if p.holds else f"FAILS ({p.failed} witnesses do not hold, {p.claimed:.1%} was claimed)"
            screen.print(
                f"{p.run}: at most {p.bound:.1%} of {p.n} are robust ({p.wrong} wrong, {p.broken} broken): {word}",
                soft_wrap=True,
            )
    if not all(p.holds for p in proofs):
        raise typer.Exit(1)


@app.command(name="list", rich_help_panel="Look")
def list_(as_json: AsJson = False) -> None:
    """What there is: losses, heads, attacks, objectives, models, data sets, checks, recipes."""
    from ..catalogue import catalogue

    found = catalogue()
    if as_json:
        print(json.dumps({kind: sorted(names) for kind, names in found.items()}, indent=1))
        return
    for kind, names in found.items():
        screen.print(kind, style="bold")
        width = max((len(name) for name in names), default=0)
        for name, about in names.items():
            screen.print(f"  {name:<{width}}  {about}", soft_wrap=True)
        if not names:
            screen.print("  none yet")
