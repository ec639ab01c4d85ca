"""``holdfast recipe``: run a named experiment and compare its results with what they should be."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import UserError
from . import options as o
from .app import app, exits
from .common import percent_text, print_json, run_comparison
from .display import errors, screen
from .gate import THREE, apply_gate, read_gate
from .options import option


@app.command(rich_help_panel="The main job", epilog=exits("a result is outside its expected range", three=THREE))
def recipe(
    name: Annotated[str, typer.Argument(help="One of the recipes that `holdfast recipe` lists.")] = "",
    data: Annotated[str, option("Use this data set instead: a name, or the path of your copy.")] = "",
    seeds: Annotated[int | None, option("Networks per row.")] = None,
    epochs: Annotated[
        int | None,
        option("Training epochs, for rows that set none. Default for this and the options below: the recipe's."),
    ] = None,
    limit: Annotated[int | None, option("Maximum number of test images; 0: all.")] = None,
    limit_train: Annotated[int | None, option("Maximum number of training images; 0: all.")] = None,
    model: Annotated[str | None, option("Another model, for rows that set none.")] = None,
    suite: Annotated[str | None, option("Attack suite.")] = None,
    proofs: Annotated[str | None, option("The last method of proof that is tried: linear, crown or alpha.")] = None,
    jobs: o.Jobs = 0,
    device: o.Device = "auto",
    out: o.Out = None,
    require: o.Require = None,
    junit: o.Junit = None,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Run a named experiment end to end and compare the results with their expected ranges.

    Without a name, list the recipes. With --epochs, --limit, --model and the like the experiment is another one, and
    nothing is compared. An interrupted command resumes when it is rerun.
    """
    from ..experiments import recipes
    from ..results import rows

    gate = read_gate("recipe", require, junit)
    if not name:
        given: dict[str, Any] = {
            "data": data or None,
            "seeds": seeds,
            "epochs": epochs,
            "limit": limit,
            "limit-train": limit_train,
        }
        given |= {"model": model, "suite": suite, "proofs": proofs, "out": out, "require": require}
        for option_name, value in given.items():
            if value is not None:
                raise UserError(f"--{option_name} belongs to a recipe: name one of those that `holdfast recipe` lists.")
        _list(quiet, as_json)
        return
    chosen = recipes.named(name, data)
    comparison = recipes.resized(
        chosen.comparison, seeds=seeds, epochs=epochs, limit=limit, limit_train=limit_train, model=model, suite=suite,
        proofs=proofs,
    ).checked()  # fmt: skip
    if not quiet:
        errors.sentence(f"{name}: {chosen.about}. Takes {chosen.cost}.")
    results = run_comparison(comparison, out, device, jobs, quiet, as_json, gate)
    unchanged = comparison == chosen.comparison.checked()
    expected = recipes.compare_to_expected(chosen, results) if unchanged else []
    say = errors.sentence if as_json else screen.sentence
    if chosen.expects and not unchanged:
        say("Nothing was compared with expected ranges: they hold without --seeds, --epochs, --limit and the like.")
    for one in expected:
        word = "as expected" if one.holds else "NOT as expected"
        say(f"{one.row}, {one.column}: {percent_text(one.value)}, expected {one.low:.1%} to {one.high:.1%}: {word}")
    if chosen.note and not quiet:
        say(chosen.note)
    apply_gate(gate, rows(results), quiet, as_json)
    if not all(one.holds for one in expected):
        raise typer.Exit(1)


def _list(quiet: bool, as_json: bool) -> None:
    from ..experiments import recipes

    every = {name: recipes.named(name) for name in recipes.RECIPES}
    if as_json:
        print_json([{"name": name, "about": one.about, "cost": one.cost} for name, one in every.items()])
        return
    for name, one in every.items():
        screen.sentence(name if quiet else f"{name}: {one.about}. Takes {one.cost}.")
