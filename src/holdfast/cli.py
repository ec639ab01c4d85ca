"""The command line: parses, calls, prints. No logic lives here."""

from __future__ import annotations

import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from . import __version__
from .display import Display, errors, screen
from .errors import UserError

app = typer.Typer(
    name="holdfast",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train image classifiers with robust losses, attack them hard, and say what their robustness is worth.\n\n"
    "Start with **holdfast compare**: two minutes, nothing to download.",
)

OWN = "Your own model"


def _option(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, **more)


Data = Annotated[str, _option("digits, mnist, cifar10, a hub name, a parquet file or folder, or an image folder.")]
Losses = Annotated[str | None, _option("Losses with settings: sce,isce:s=10,mmc,cosface:m=0.2,scale=15.")]
OneLoss = Annotated[str, _option("A loss with settings, such as isce:s=10; after @ another head: isce:s=2@cosine.")]
Against = Annotated[str, _option("norm:eps; norm linf, l2 or l1, eps in pixels from 0 to 1: linf:0.1, linf:8/255.")]
Several = Annotated[str, _option("norm:eps, or several: linf:0.1,l2:1.5; norm linf, l2 or l1, eps in pixels, 0 to 1.")]
Suite = Annotated[str, _option("How hard to attack: quick, standard, paranoid, claims, protocols or explain.")]
Objective = Annotated[
    str, _option("How to train: standard, adversarial:steps=10, fast, trades:beta=6, mart, interval; also awp=0.01.")
]
Information = Annotated[
    str, _option("Where I-SCE's s comes from: 10, class:3, gradient:0.5, lipschitz, ibp, attack, mix:0.3.", "--s")
]
Seeds = Annotated[int, _option("Networks per loss; with more than one the interval is over seeds.")]
FirstSeed = Annotated[int, _option("The first of those seeds: fresh ones for the figures that are published.")]
On = Annotated[str, _option("test; or val: judge on validation images, where settings are chosen.")]
Keep = Annotated[str | None, _option("Weights of the last epoch, or of the best by (robust) validation accuracy.")]
Epochs = Annotated[int | None, _option("Default: 30 for digits and photographs, 10 elsewhere.")]
Limit = Annotated[int, _option("Attack at most so many test images, 0 for all. Cross-validated data is used whole.")]
LimitTrain = Annotated[int, _option("Train on at most so many images, 0 for all.")]
Folds = Annotated[int, _option("Cross-validation folds, for data without a test split. Default: 5 there.")]
Network = Annotated[str, _option("A network of `holdfast list`, or mymodel.py:backbone. Default: by image size.")]
BatchSize = Annotated[int | None, _option("Training batch size.")]
Optimizer = Annotated[str | None, _option("adam or sgd.")]
Rate = Annotated[float | None, _option("Learning rate.")]
Decay = Annotated[float | None, _option("Weight decay, decoupled for adam.")]
Augment = Annotated[str | None, _option("none, crop:PAD or crop:PAD+flip. Default: crop:4+flip for photographs.")]
Jobs = Annotated[int, _option("Networks at a time. Default: one per core on a CPU, one on a GPU.")]
Quiet = Annotated[bool, _option("No progress; the answer alone.", "--quiet", "-q")]
AsJson = Annotated[bool, _option("Print JSON instead of tables; progress goes to stderr.", "--json")]
Device = Annotated[str, _option("cpu, cuda, cuda:1 or mps; auto takes the best there is.")]
Out = Annotated[Path | None, _option("Output folder. Default: out/DATA-THREAT-HASH.", "--out", "-o")]
RunFolder = Annotated[Path, _option("The run folder; training goes on where it was.", "--out", "-o")]
Seed = Annotated[int, _option("Of weights, order, augmentation and noise.")]
Fold = Annotated[int, _option("Which fold is left out, for data without a test split.")]
Page = Annotated[Path | None, _option("The page. Default: report.html beside the first file.", "--out", "-o")]
Figures = Annotated[Path | None, _option("Write every figure here too, as SVG and PNG.")]


def main() -> None:
    """The entry point: what a user can mend is one line on stderr and exit status 2."""
    try:
        app()
    except UserError as error:
        errors.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(2)


def _best(device: str) -> str:
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _workers(asked: int, device: str) -> int:
    if asked < 0:
        raise UserError(f"jobs must be >= 0 (0: as many as fit), got {asked}.")
    if asked:
        return asked
    return len(os.sched_getaffinity(0)) if device == "cpu" and hasattr(os, "sched_getaffinity") else 1


@app.command(rich_help_panel="The main job")
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

    A stopped command goes on where it was when it is repeated.
    """
    from . import report as reporting
    from .compare import Comparison, default_out
    from .compare import compare as run

    fit = _fit(data, epochs, batch_size, optimizer, lr, weight_decay, augment, keep)
    given = {"losses": tuple(_split(losses))} if losses else {}
    comparison = Comparison(
        data=data, threat=threat, suite=suite, objective=objective, model=model, seeds=seeds, first_seed=first_seed,
        folds=folds, limit=limit, limit_train=limit_train, on=on, fit=fit, **given,
    ).checked()  # fmt: skip
    folder = out or default_out(comparison)
    where = _best(device)
    with Display(quiet, comparison.networks) as display:
        results = run(
            comparison,
            folder,
            command=shlex.join(["holdfast", *sys.argv[1:]]),
            device=where,
            workers=_workers(jobs, where),
            tell=display.tell,
            finished=display.finished,
            checked=display.checked,
        )
    page = reporting.render([results], folder / "report.html")
    _show(results, as_json)
    if not as_json and not quiet:
        screen.print(
            f"\n{folder / 'results.json'}\n{page}\nprove it again: holdfast verify {shlex.quote(str(folder))}",
            soft_wrap=True,
        )


def _split(text: str) -> list[str]:
    from . import specs

    return specs.split(text)


def _fit(
    data: str,
    epochs: int | None,
    batch_size: int | None,
    optimizer: str | None,
    lr: float | None,
    weight_decay: float | None,
    augment: str | None,
    keep: str | None,
) -> Any:
    from .recipes import fit_for, override
    from .specs import augmentation

    given = {"epochs": epochs, "batch_size": batch_size, "optimizer": optimizer, "lr": lr, "weight_decay": weight_decay}
    return override(fit_for(data), **given, keep=keep, **augmentation(augment))


def _show(results: Any, as_json: bool) -> None:
    from . import report as reporting
    from .results import doubts, table

    if as_json:
        from .results import to_json

        print(to_json(results))
        return
    screen.print(table(results))
    for line in doubts(results):
        screen.print(line, soft_wrap=True)
    screen.print(reporting.finding(results), soft_wrap=True)


@app.command(rich_help_panel="Step by step")
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
) -> None:
    """Train one network. Writes config.json, env.json, log.jsonl, a checkpoint and model.safetensors."""
    from .compare import Comparison, Job, train_one

    if s:
        if loss not in ("sce", "isce"):
            raise UserError(f"--s is I-SCE's: leave --loss out, or write the loss as isce:s={s}@HEAD, not '{loss}'.")
        loss = f"isce:s={s}"
    fit = _fit(data, epochs, batch_size, optimizer, lr, weight_decay, augment, keep)
    comparison = Comparison(
        data=data, losses=(loss,), threat=threat, objective=objective, model=model, limit_train=limit_train, fit=fit
    ).checked()
    with Display(quiet) as display:
        _, trained, _ = train_one(Job(comparison, loss, seed, fold, out, _best(device)), display.tell)
    screen.print(
        f"{loss}: train accuracy {trained['accuracy']:.1%}, validation {_percent(trained['val'])}, "
        f"{trained['epochs']} epochs in {trained['seconds']} s.\n"
        f"attack it: holdfast evaluate {shlex.quote(str(out))} --threat {threat}",
        soft_wrap=True,
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


@app.command(rich_help_panel="Step by step")
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run folder of `holdfast train` or `compare`; or mymodel.py:build, a .onnx, a .pt2.")
    ],
    threat: Against = "linf:0.1",
    suite: Suite = "standard",
    budget: Annotated[str, _option("Attack for so much, check, and say what is left: 10min, 2h, 1e6passes.")] = "",
    limit: Limit = 1000,
    seed: Seed = 0,
    batch_size: Annotated[int | None, _option("Default: by image size; halved when memory runs out.")] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None, _option("Default: evaluation-THREAT-SUITE in the run folder, or in out/.", "--out", "-o")
    ] = None,
    data: Annotated[str, _option("Its data. All of it is used if it has no test split.", rich_help_panel=OWN)] = "",
    weights: Annotated[str, _option(".safetensors, or .pt (tensors alone are read).", rich_help_panel=OWN)] = "",
    pixels: Annotated[str, _option("The range that it takes pixels in. Default: 0,1.", rich_help_panel=OWN)] = "",
    mean: Annotated[str, _option("Then minus this, a number or one a channel.", rich_help_panel=OWN)] = "",
    std: Annotated[str, _option("Then divided by this.", rich_help_panel=OWN)] = "",
    loss: Annotated[
        str, _option("The loss it was trained with, which attacks match. Default: sce.", rich_help_panel=OWN)
    ] = "",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Attack one network and write results.json, witnesses and report.html.

    The network is a run folder, or your own: **holdfast evaluate mymodel.py:build --weights w.safetensors --data FOLDER
    --threat linf:8/255 --out DIR**. build() is called without arguments and returns what maps images to logits; your
    code is executed. Images come in [0, 1]: say once, with --pixels, --mean and --std, what your network takes.

    Stopped at any moment, the same command goes on where it was. Under torchrun (`torchrun --nproc-per-node 2 -m
    holdfast evaluate ...`) processes share the samples and give the answer of one.
    """
    from .compare import file_text
    from .foreign import is_foreign

    if is_foreign(model):
        from .foreign import Foreign
        from .single import from_file
        from .specs import numbers

        if not data:
            raise UserError("your own model needs --data: a folder of images per class, a parquet file, a hub name.")
        source = Foreign(model, weights, *map(numbers, ("pixels", "mean", "std"), (pixels or "0,1", mean, std)))
        folder = out or Path("out") / f"{Path(model).stem}-{file_text(threat)}-{suite}"
        if not quiet:
            errors.print(f"opening {model}: what it holds is executed.", soft_wrap=True)
        opened: Any = partial(from_file, source, data, loss=loss or "sce", limit=limit, seed=seed)
    else:
        from .single import from_run

        own = {"data": data, "weights": weights, "pixels": pixels, "mean": mean, "std": std, "loss": loss}
        for name, value in own.items():
            if value:
                raise UserError(f"--{name} is for a model of your own; {model} is a run folder, which knows its own.")
        folder = out or Path(model) / f"evaluation-{file_text(threat)}-{suite}"
        opened = partial(from_run, Path(model), limit=limit)

    answer = _attack(opened, threat, suite, folder, seed, device, quiet, budget, batch_size)
    if answer is None:
        return
    results, page = answer
    _show(results, as_json)
    if not as_json and not quiet:
        screen.print(f"\n{folder / 'results.json'}\n{page}", soft_wrap=True)


def _attack(
    opened: Any,
    threat: str,
    suite: str,
    folder: Path,
    seed: int,
    device: str,
    quiet: bool,
    budget: str = "",
    batch_size: int | None = None,
) -> tuple[Any, Path] | None:
    """Attack one network with its progress shown; (results, page), None in all but the first of several processes."""
    from . import report as reporting
    from .evaluate import Budget
    from .single import attack, processes

    limited = Budget.parse(budget) if budget else None
    with processes(_best(device)) as (where, first), Display(quiet or not first) as display:
        results = attack(
            opened(device=where), threat, suite, folder, seed=seed, budget=limited, batch_size=batch_size,
            tell=display.tell, command=shlex.join(["holdfast", *sys.argv[1:]]),
        )  # fmt: skip
    return (results, reporting.render([results], folder / "report.html")) if results else None


@app.command(rich_help_panel="Look")
def explain(
    run: Annotated[Path, typer.Argument(help="A run folder that `holdfast train` or `compare` wrote.")],
    threat: Against = "linf:0.1",
    limit: Limit = 500,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, _option("Default: explain-THREAT in the run folder.", "--out", "-o")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """From the published number to what is left: a waterfall of the attack, one change at a time.

    Stable arithmetic, best iterate, steps, restarts, targets, other scores, a black box. Each change attacks what the
    ones before it left standing. Writes waterfall.svg and .png beside results.json and report.html.
    """
    from . import waterfall
    from .compare import file_text

    folder = out or run / f"explain-{file_text(threat)}"
    from .single import from_run

    answer = _attack(partial(from_run, run, limit=limit), threat, "explain", folder, seed, device, quiet)
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
    limit: Annotated[int, _option("At most so many test images, 0 for all.")] = 100,
    seconds: Annotated[float, _option("At most so long on the exact answer of each sample; 0: none.")] = 10.0,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, _option("Default: bracket-THREAT in the run folder.", "--out", "-o")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """How far each margin can fall: found by attacks, proved by bounds, and in truth. s_att <= s* <= s_cert, drawn.

    A sample whose margin exceeds s_cert is certified, one above s* robust, one at s_att or below broken. The truth, s*,
    needs linf and a small fully connected ReLU network. Writes bracket.json, .svg and .png.
    """
    from .bracket import of_run, sentence

    with Display(quiet) as display:
        found, files = of_run(
            run, threat, out, seconds=seconds, limit=limit, seed=seed, device=_best(device), tell=display.tell
        )
    screen.print(files[0].read_text() if as_json else sentence(found), soft_wrap=True)
    if not quiet and not as_json:
        screen.print("\n" + "\n".join(map(str, files)), soft_wrap=True)


@app.command(rich_help_panel="Look")
def report(
    results: Annotated[list[Path], typer.Argument(help="results.json files, or folders that hold one.")],
    out: Page = None,
    figures: Figures = None,
) -> None:
    """Draw results as one self-contained HTML page, and as figures."""
    from . import report as reporting
    from .results import load

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

    from .verify import verify as check

    proofs = check(folder, device=_best(device))
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
    from .catalogue import catalogue

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
