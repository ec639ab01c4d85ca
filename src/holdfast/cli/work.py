"""The commands that train and attack: compare, recipe, train, evaluate."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .app import app, exits
from .common import attack_one, best_device, print_json, say_files, schedule_from, show, side_by_side, split_rows
from .display import Display, aside, errors, screen
from .options import (
    OWN,
    Against,
    AsJson,
    Augment,
    BatchSize,
    Data,
    Decay,
    Device,
    Epochs,
    FirstSeed,
    Fold,
    Folds,
    Information,
    Jobs,
    Keep,
    Limit,
    LimitTrain,
    Losses,
    Network,
    NoiseSeed,
    Objective,
    On,
    OneLoss,
    Optimizer,
    Out,
    Quiet,
    Rate,
    RunFolder,
    Seed,
    Seeds,
    Several,
    Suite,
    option,
)
from .output_files import writable


@app.command(rich_help_panel="The main job", epilog=exits())
def compare(
    data: Data = "digits",
    losses: Losses = None,
    threat: Several = "linf:0.1",
    suite: Suite = "standard",
    objective: Objective = "standard",
    seeds: Seeds = 1,
    first_seed: FirstSeed = 0,
    epochs: Epochs = None,
    limit: Limit = 1000,
    limit_train: LimitTrain = 0,
    on: On = "test",
    folds: Folds = 0,
    model: Network = "",
    batch_size: BatchSize = None,
    optimizer: Optimizer = None,
    lr: Rate = None,
    weight_decay: Decay = None,
    augment: Augment = None,
    keep: Keep = None,
    jobs: Jobs = 0,
    device: Device = "auto",
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a network per loss, attack every one, and print clean, published and robust accuracy side by side.

    *published* is the accuracy as papers report it: F.cross_entropy in float32, one random start, 50 PGD steps of
    eps/4, the last iterate. *robust* is what is left after everything tried, with its 95% interval. Each carries a
    verdict: *refuted* (other attacks broke more), *loose* (a check says that attacks may be failing), *tight*, *void*.

    A row of --losses may name its own head after @, and its objective, network and schedule after +:
    isce:s=2@cosine+adversarial:steps=5+fit:lr=5e-3.

    Writes results.json, report.html and the adversarial images. A stopped command goes on where it was when it is
    repeated.
    """
    from ..experiments.compare import Comparison

    fit = schedule_from(data, epochs, batch_size, optimizer, lr, weight_decay, augment, keep)
    given = {"losses": tuple(split_rows(losses))} if losses else {}
    comparison = Comparison(
        data=data, threat=threat, suite=suite, objective=objective, model=model, seeds=seeds, first_seed=first_seed,
        folds=folds, limit=limit, limit_train=limit_train, on=on, fit=fit, **given,
    ).checked()  # fmt: skip
    side_by_side(comparison, out, device, jobs, quiet, as_json)


@app.command(rich_help_panel="The main job", epilog=exits("a number lies outside what the recipe expects"))
def recipe(
    name: Annotated[str, typer.Argument(help="One of those that `holdfast recipe` lists.")] = "",
    data: Annotated[str, option("Other data than the recipe's own: a name, or the path where you have it.")] = "",
    seeds: Annotated[int | None, option("Networks per row.")] = None,
    epochs: Annotated[
        int | None, option("Of training, for rows that do not name their own. Default: the recipe's, as for all below.")
    ] = None,
    limit: Annotated[int | None, option("Attack at most so many test images, 0 for all.")] = None,
    limit_train: Annotated[int | None, option("Train on at most so many images, 0 for all.")] = None,
    model: Annotated[str | None, option("Another network, for rows that do not name their own.")] = None,
    suite: Annotated[str | None, option("How hard to attack.")] = None,
    jobs: Jobs = 0,
    device: Device = "auto",
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a named experiment whole, training and attacks, and hold its numbers against those it expects.

    Without a name: what there is. In another size (--epochs, --limit, --model, ...) a recipe expects nothing. Stopped,
    it goes on where it was when it is repeated.
    """
    from ..experiments import recipes

    if not name:
        every = {known: recipes.named(known) for known in recipes.RECIPES}
        if as_json:
            print_json([{"name": known, "about": found.about, "cost": found.cost} for known, found in every.items()])
            return
        for known, found in every.items():
            screen.print(known if quiet else f"{known}: {found.about}. Takes {found.cost}.", soft_wrap=True)
        return
    chosen = recipes.named(name, data)
    size = {
        "seeds": seeds, "epochs": epochs, "limit": limit, "limit_train": limit_train, "model": model, "suite": suite
    }  # fmt: skip
    comparison = recipes.resized(chosen.comparison, **size).checked()
    if not quiet:
        errors.print(f"{name}: {chosen.about}. Takes {chosen.cost}.", soft_wrap=True)
    results = side_by_side(comparison, out, device, jobs, quiet, as_json)
    whole = comparison == chosen.comparison.checked()
    expected = recipes.compare_to_expected(chosen, results) if whole else []
    say = errors.print if as_json else screen.print
    if chosen.expects and not whole:
        say("In this size the recipe expects nothing: run it without --seeds, --epochs, --limit and the like.")
    for one in expected:
        word = "as expected" if one.holds else "NOT as expected"
        say(f"{one.row}, {one.column}: {percent(one.value)}, expected {one.low:.1%} to {one.high:.1%}: {word}",
            soft_wrap=True)  # fmt: skip
    if chosen.note and not quiet:
        say(chosen.note, soft_wrap=True)
    if not all(one.holds for one in expected):
        raise typer.Exit(1)


@app.command(rich_help_panel="Step by step", epilog=exits())
def train(
    out: RunFolder,
    data: Data = "digits",
    loss: OneLoss = "sce",
    s: Information = "",
    threat: Against = "linf:0.1",
    objective: Objective = "standard",
    seed: Seed = 0,
    fold: Fold = 0,
    epochs: Epochs = None,
    limit_train: LimitTrain = 0,
    model: Network = "",
    batch_size: BatchSize = None,
    optimizer: Optimizer = None,
    lr: Rate = None,
    weight_decay: Decay = None,
    augment: Augment = None,
    keep: Keep = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train one network, into a run folder that evaluate, explain, bracket and curves take.

    Writes config.json, env.json, log.jsonl, a checkpoint and model.safetensors. Stopped, it goes on where it was when
    it is repeated.
    """
    from ..experiments.compare import Comparison, Job, train_one

    if s:
        if loss not in ("sce", "isce"):
            raise UserError(f"--s is I-SCE's: leave --loss out, or write the loss as isce:s={s}@HEAD, not '{loss}'.")
        loss = f"isce:s={s}"
    fit = schedule_from(data, epochs, batch_size, optimizer, lr, weight_decay, augment, keep)
    comparison = Comparison(
        data=data, losses=(loss,), threat=threat, objective=objective, model=model, limit_train=limit_train, fit=fit
    ).checked()
    writable(out, "--out")
    with aside(as_json), Display(quiet) as display:
        _, trained, _ = train_one(Job(comparison, loss, seed, fold, out, best_device(device)), display.tell)
    if as_json:
        print_json({"run": str(out), "loss": loss, **trained})
        return
    screen.print(
        f"{loss}: train accuracy {trained['accuracy']:.1%}, validation {percent(trained['val'])}, "
        f"{trained['epochs']} epochs in {trained['seconds']} s.",
        soft_wrap=True,
    )
    if not quiet:
        screen.print(f"attack it: holdfast evaluate {shlex.quote(str(out))} --threat {threat}", soft_wrap=True)


def percent(value: float | None) -> str:
    """A share as 97.5%, or a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"


@app.command(rich_help_panel="Step by step", epilog=exits())
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A run folder of `holdfast train` or `compare`; or a network of your own: mymodel.py:build, a .onnx, "
            "a .pt2."
        ),
    ],
    threat: Against = "linf:0.1",
    suite: Suite = "standard",
    budget: Annotated[
        str, option("Attack for no longer, check, and say what may be left: 10min, 2h, 1e6passes. Default: to the end.")
    ] = "",
    limit: Limit = 1000,
    seed: NoiseSeed = 0,
    batch_size: Annotated[
        int | None, option("Of the attacks. Default: by image size; halved when memory runs out.")
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        option(
            "Default: evaluation-THREAT-SUITE in the run folder; of your own, NAME-THREAT-SUITE in out/.", "--out", "-o"
        ),
    ] = None,
    data: Annotated[
        str, option("Its data, as for train. All of it is used if it has no test split.", rich_help_panel=OWN)
    ] = "",
    weights: Annotated[str, option("A .safetensors, or a .pt (tensors alone are read).", rich_help_panel=OWN)] = "",
    pixels: Annotated[
        str, option("The range that it takes pixels in: 0,1 or 0,255 or -1,1. Default: 0,1.", rich_help_panel=OWN)
    ] = "",
    mean: Annotated[
        str, option("Subtracted after that: a number, or one a channel. Default: nothing.", rich_help_panel=OWN)
    ] = "",
    std: Annotated[
        str, option("Divided by after that: a number, or one a channel. Default: 1.", rich_help_panel=OWN)
    ] = "",
    loss: Annotated[
        str, option("The loss it was trained with, so that attacks climb that too. Default: sce.", rich_help_panel=OWN)
    ] = "",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Attack one network and write results.json, witnesses and report.html.

    The network is a run folder, or your own:

    **holdfast evaluate mymodel.py:build --weights w.safetensors --data FOLDER --threat linf:8/255 --out DIR**

    build() is called without arguments and returns what maps images to logits; your code is executed. Images come in
    [0, 1]: say once, with --pixels, --mean and --std, what your network takes.

    Stopped, it goes on where it was when it is repeated. Under torchrun (`torchrun --nproc-per-node 2 -m holdfast
    evaluate ...`) processes share the samples and give the answer of one.
    """
    from ..experiments.compare import threat_file_name
    from ..importers.model_file import is_model_file

    if is_model_file(model):
        from ..experiments.evaluate_model import from_file
        from ..importers.model_file import ModelSource
        from ..spec import numbers

        if not data:
            raise UserError("your own model needs --data: a folder of images per class, a parquet file, a hub name.")
        source = ModelSource(model, weights, *map(numbers, ("pixels", "mean", "std"), (pixels or "0,1", mean, std)))
        folder = out or Path("out") / f"{Path(model).stem}-{threat_file_name(threat)}-{suite}"
        if not quiet:
            errors.print(f"opening {model}: what it holds is executed.", soft_wrap=True)
        opened: Any = partial(from_file, source, data, loss=loss or "sce", limit=limit, seed=seed)
    else:
        from ..experiments.evaluate_model import from_run

        own = {"data": data, "weights": weights, "pixels": pixels, "mean": mean, "std": std, "loss": loss}
        for name, value in own.items():
            if value:
                raise UserError(f"--{name} is for a model of your own; {model} is a run folder, which knows its own.")
        folder = out or Path(model) / f"evaluation-{threat_file_name(threat)}-{suite}"
        opened = partial(from_run, Path(model), limit=limit)

    answer = attack_one(opened, threat, suite, folder, seed, device, quiet, as_json, budget, batch_size)
    if answer is None:
        return
    results, page = answer
    show(results, as_json)
    say_files([folder / "results.json", page], quiet, as_json)
