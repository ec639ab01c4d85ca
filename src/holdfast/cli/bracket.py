"""``holdfast bracket``: both ends of a network's accuracy under a threat; or of one property, or per sample."""

from __future__ import annotations

import inspect
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from . import options as o
from .app import app, exits
from .common import best_device, print_json, say_files
from .display import Display, aside, errors, screen
from .evaluate import default_folder, subject_of
from .gate import THREE, apply_gate, check_bounds, check_names, read_gate
from .options import NETWORK, option
from .output_files import own_folder, write_files, written
from .own_model import OwnModel, takes_own_model

EXITS = exits("sat", zero="success, with --vnnlib unsat", three=f"{THREE}; with --vnnlib timeout or unknown")
STATUS = {"unsat": 0, "sat": 1, "timeout": 3, "unknown": 3}
# Which options each way of the command takes, beside those that all of them do.
DATA = {"threat", "limit", "device", "run_code", *(one.name for one in fields(OwnModel))}
ALL = {"run", "seed", "out", "quiet", "as_json"}
WAYS = {
    "vnnlib": ALL | {"vnnlib", "budget"},
    "margins": ALL | DATA | {"margins", "seconds"},
    "": ALL | DATA | {"method", "budget", "require", "junit"},
}


@app.command(rich_help_panel="Look", epilog=EXITS)
@takes_own_model
def bracket(
    run: Annotated[str, typer.Argument(help=NETWORK)],
    own_model: OwnModel,
    threat: o.OneThreat = "linf:0.1",
    budget: Annotated[str, option("Wall-clock time in all: 90s, 10min, 2h. Open samples share it evenly.")] = "10min",
    method: Annotated[
        str,
        option("The last method of proof that is tried on what is left: interval, linear, crown, alpha, branch."),
    ] = "branch",
    limit: Annotated[int, option("Maximum number of test images; 0: all.")] = 100,
    margins: Annotated[
        bool, option("Per sample instead: how far the margin can fall, s_att <= s* <= s_cert.", "--margins")
    ] = False,
    seconds: Annotated[
        float, option("With --margins: time limit per sample for the exact answer; 0: no exact answers.")
    ] = 10.0,
    vnnlib: Annotated[
        Path | None,
        option("Decide one VNN-LIB property of an .onnx file instead: sat with a counterexample, unsat, or timeout."),
    ] = None,
    seed: o.NoiseSeed = 0,
    device: o.Device = "auto",
    out: Annotated[
        Path | None,
        option(
            "Output folder. Default: bracket-THREAT (margins-THREAT) in the run folder, or out/NAME-bracket-THREAT for "
            "your own model. With --vnnlib: a file for the answer, which is printed anyway.",
            "--out",
            "-o",
        ),
    ] = None,
    run_code: o.RunCode = False,
    require: o.Require = None,
    junit: o.Junit = None,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Prove what attacks leave: certified <= accuracy under the threat <= attacked, and how many samples lie between.

    **holdfast bracket model.onnx --data FOLDER --threat linf:2/255 --budget 10min**

    **holdfast bracket runs/mine --threat linf:0.05 --method crown**

    **holdfast bracket model.onnx --vnnlib property.vnnlib --budget 5min**

    Attacks come first, then proofs on what they leave: intervals and Lipschitz constants, lines (CROWN), optimised
    slopes, branch and bound on ReLUs. Where nothing lies between, the answer is exact. Writes accuracy.json,
    witnesses.safetensors, and the proved share against time as a figure, accuracy.svg and .png. An interrupted command
    resumes when it is rerun; with a larger --budget or a stronger --method it goes on.

    --margins brackets each sample's worst-case margin drop: s_att by attacks, s_cert by bounds, s* exactly (linf and a
    small fully connected ReLU network). Writes bracket.json, .svg and .png.
    """
    given = {**locals(), **asdict(own_model)}
    from ..experiments.evaluate_model import why_unbounded

    way = "vnnlib" if vnnlib is not None else "margins" if margins else ""
    _check_options(given, way)
    gate = read_gate("bracket", require, junit, lacks=("pgd50", "verdict"))
    if vnnlib is not None:
        _property(run, vnnlib, budget, out, seed, quiet, as_json)
        return
    allowed = _seconds(budget)
    open_subject = subject_of(run, own_model, limit=limit, seed=seed, quiet=quiet, run_code=run_code)
    folder = out or default_folder(run, f"{way or 'bracket'}-THREAT", threat)
    own_folder(folder)
    bracketed = _margins if margins else _accuracy
    more = {"seconds": seconds} if margins else {"seconds": allowed, "method": method}
    with aside(as_json), Display(quiet) as display:
        subject = open_subject(device=best_device(device))
        check_names(gate, [subject.row_name])
        check_bounds(gate, why_unbounded(subject) if gate.needs("certified") else "")
        show, measured = bracketed(
            subject, threat, folder, limit=limit, seed=seed, progress=partial(display.progress, subject.name), **more
        )
    show(quiet, as_json)
    apply_gate(gate, measured, quiet, as_json)


def _check_options(given: dict[str, Any], way: str) -> None:
    """Refuse options that this way of the command would leave unused."""
    for name, parameter in inspect.signature(bracket).parameters.items():
        if given[name] != parameter.default and name not in WAYS[way]:
            option_name = f"--{name.replace('_', '-')}"
            if way:
                raise UserError(f"--{way} takes no {option_name}: leave one of them out.")
            other = next(other for other, names in WAYS.items() if other and name in names)
            raise UserError(f"{option_name} needs --{other}: add it, or leave it out.")


def _seconds(budget: str) -> float:
    """A budget of time. Raises UserError for one of passes."""
    from ..evaluation import Budget

    found = Budget.parse(budget)
    if found.passes < float("inf"):
        raise UserError(f"the budget of a bracket is a time, such as 90s, 10min or 2h, got '{budget}'.")
    return found.seconds


def _accuracy(subject: Any, threat: str, folder: Path, **settings: Any) -> Any:
    """Bracket the accuracy; returns what prints it, and its row."""
    from ..bracket import subject_accuracy
    from ..bracket.accuracy import row, sentence, table

    found, files = subject_accuracy(subject, threat, folder, **settings)

    def show(quiet: bool, as_json: bool) -> None:
        if as_json:
            print_json(files[0].read_text())
            return
        screen.print(table(found), soft_wrap=True)
        screen.sentence(sentence(found))
        say_files([*files], quiet, as_json)

    return show, [row(found, subject.row_name)]


def _margins(subject: Any, threat: str, folder: Path, **settings: Any) -> Any:
    """Bracket the margins; returns what prints them, and no row."""
    from ..bracket import bracket_subject, sentence

    answer, files = bracket_subject(subject, threat, folder, **settings)

    def show(quiet: bool, as_json: bool) -> None:
        if as_json:
            print_json(files[0].read_text())
            return
        screen.sentence(sentence(answer))
        say_files([*files], quiet, as_json)

    return show, []


def _property(model: str, vnnlib: Path, budget: str, out: Path | None, seed: int, quiet: bool, as_json: bool) -> None:
    """Decide a property, print the answer, and end with its status."""
    from ..bracket.solve import check_precision, check_property
    from ..bracket.vnnlib import read_property
    from ..importers import load_onnx

    if Path(model).suffix.lower() != ".onnx":
        raise UserError(f"--vnnlib needs an .onnx file, whose inputs X_0, X_1, ... have an order; {model} is none.")
    seconds = _seconds(budget)
    with aside(as_json), Display(quiet) as display:
        net = load_onnx(model, strip_softmax=False)
        check_precision(net.path)
        wanted = read_property(vnnlib)
        answer = check_property(
            net, wanted, seconds=seconds, seed=seed, progress=partial(display.progress, Path(model).name)
        )
    if out is not None:
        write_files(lambda stage: [written(stage / out.name, answer.text() + "\n")], out.parent)
    if as_json:
        print_json(asdict(answer))
    else:
        screen.sentence(answer.text())
    if answer.why:
        errors.sentence(answer.why)
    raise typer.Exit(STATUS[answer.verdict])
