"""``holdfast evaluate``: attack one network, of a run folder or the user's own, and judge the result."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from ..spec import name_list, numbers, share, split, threat_file_name
from ..user_input import path
from . import options as o
from .app import app, exits
from .common import asked_of_pgd50, run_evaluation, run_transforms, say_files, show
from .display import errors, screen
from .gate import THREE, apply_gate, read_gate
from .options import option
from .own_model import OwnModel, takes_own_model

if TYPE_CHECKING:
    from ..experiments.evaluate_model import ModelUnderTest


@app.command(rich_help_panel="Step by step", epilog=exits(three=THREE))
@takes_own_model
def evaluate(
    model: Annotated[
        list[str],
        typer.Argument(
            help="A run folder of `holdfast train` or `compare`; or your own model: mymodel.py:build, a .onnx, a .pt2, "
            "timm:NAME, hf:NAME or hf:FOLDER. Several are evaluated as one, their average.",
        ),
    ],
    own_model: OwnModel,
    threat: o.AnyThreat = "linf:0.1",
    suite: o.Suite = "standard",
    attack: o.AddedAttacks = "",
    budget: Annotated[
        str,
        option(
            "Stop attacks and proofs after this time, or the attacks after this many forward and backward passes over "
            "all samples: 10min, 2h, 1e6passes. Default: no limit."
        ),
    ] = "",
    proofs: o.Proofs = "linear",
    precision: o.Precision = "1%",
    pgd50: o.Pgd50 = None,
    no_pgd50: o.NoPgd50 = False,
    limit: o.Limit = 1000,
    seed: o.NoiseSeed = 0,
    batch_size: Annotated[
        int | None, option("Batch size of the attacks. Default: by image size; halved when memory runs out.")
    ] = None,
    device: o.Device = "auto",
    out: Annotated[
        Path | None,
        option(
            "Output folder. Default: evaluation-THREAT-SUITE in the run folder, or out/NAME-THREAT-SUITE for your own "
            "model.",
            "--out",
            "-o",
        ),
    ] = None,
    average: o.Average = "",
    run_code: o.RunCode = False,
    require: o.Require = None,
    junit: o.Junit = None,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Attack one network, audit the result, and write results.json, report.html and the adversarial examples.

    The network comes from a run folder, or it is your own:

    **holdfast evaluate mymodel.py:build --weights w.safetensors --data FOLDER --threat linf:8/255 --out DIR**

    build() takes no arguments and returns a module from images to logits; your code is executed. Images are in [0, 1]:
    --input-range, --mean, --std and --input-layout say what your model expects instead.

    PGD-50 is the accuracy as usually reported, robust an upper bound, to --precision. Verdicts: `holdfast compare -h`.

    A threat may also be corruptions:3 (15 kinds in the manner of ImageNet-C; without the severity, all five), one kind
    (fog:3), rotation:30,translation:3 or patch:5x5, both in the worst case. These have no suite, verdict or proofs.

    An interrupted command resumes when it is rerun. Under torchrun (`torchrun --nproc-per-node 2 -m holdfast evaluate
    ...`) the processes share the samples and give the same answer as one.
    """  # fmt: skip
    from ..results import rows

    run, what, lacks = search_of(threat, suite, attack, budget, proofs, precision, pgd50, no_pgd50)
    gate = read_gate("evaluate", require, junit, lacks=lacks)
    subject = subjects_of(model, average, own_model, limit=limit, seed=seed, quiet=quiet, run_code=run_code)
    folder = out or default_folder(model, what, threat)
    settings = {"batch_size": batch_size, "gate": gate, "quiet": quiet, "as_json": as_json}
    answer = run(subject, threat, folder=folder, seed=seed, device=device, **settings)
    if answer is None:
        return
    results, page, uncertified = answer
    show(results, as_json)
    if uncertified and not as_json:
        screen.sentence(uncertified)
    say_files([folder / "results.json", page], quiet, as_json)
    apply_gate(gate, rows(results), quiet, as_json)


def search_of(
    threat: str,
    suite: str,
    attack: str,
    budget: str,
    proofs: str,
    precision: str,
    pgd50: int | None,
    no_pgd50: bool,
) -> tuple[Callable[..., Any], str, tuple[str, ...]]:
    """What evaluates under a threat: (the function, the name of its folder, the columns that its rows lack).

    Raises:
        UserError: an option cannot be read, or is for threats in a norm and this is none.
    """
    from ..transforms import is_transform

    added, asked = split(attack) if attack else [], asked_of_pgd50(pgd50, no_pgd50)
    if not is_transform(threat):
        settings: dict[str, Any] = {"precision": share("precision", precision), "pgd50": asked, "added": added}
        run = partial(run_evaluation, suite=suite, budget=budget, proofs=proofs, **settings)
        return run, f"evaluation-THREAT-{suite}{names_of(added)}", ()
    given = {
        "suite": suite != "standard", "attack": attack, "budget": budget, "proofs": proofs != "linear",
        "precision": precision != "1%", "pgd50": pgd50, "no-pgd50": no_pgd50,
    }  # fmt: skip
    for name, value in given.items():
        if value:
            raise UserError(
                f"--{name} is for threats in a norm, such as linf:0.1. {threat} has one search of its own, and nothing "
                "of it is proved or audited: leave the option out."
            )
    return run_transforms, "evaluation-THREAT", ("pgd50", "certified", "verdict")


def subject_of(
    model: str, own_model: OwnModel, *, limit: int, seed: int, quiet: bool, run_code: bool
) -> Callable[..., ModelUnderTest]:
    """What opens a network, given a device: that of a run folder, or the user's own with its options.

    Raises:
        UserError: a run folder with options for one's own model, or one's own model without data.
    """
    from ..experiments.evaluate_model import from_file, from_run
    from ..importers.model_file import ModelSource, is_model_file
    from ..importers.pretrained import is_pretrained

    if not is_model_file(model):
        for name in own_model.given():
            option_name = name.replace("_", "-")
            raise UserError(f"--{option_name} is for your own model; {model} is a run folder with its own settings.")
        return partial(from_run, path("the run folder", model), limit=limit, run_code=run_code)
    if not own_model.data:
        raise UserError("your own model needs --data: an image folder, a parquet file, or a hub name.")
    input_range, mean, std = (
        numbers(name, value)
        for name, value in (
            ("input-range", own_model.input_range or "0,1"),
            ("mean", own_model.mean),
            ("std", own_model.std),
        )
    )
    source = ModelSource(model, own_model.weights, input_range, mean, std, own_model.input_layout, own_model.output)
    if not quiet and not is_pretrained(model):
        errors.sentence(f"opening {model}: code in it is executed.")
    loss, classes = own_model.loss or "sce", name_list("--classes", own_model.classes)
    reading = own_model.reading()
    return partial(
        from_file, source, own_model.data, loss=loss, limit=limit, seed=seed, reading=reading, classes=classes
    )


def subjects_of(
    models: list[str], average: str, own_model: OwnModel, *, seed: int, **settings: Any
) -> Callable[..., ModelUnderTest]:
    """What opens one network, or the average of several; the options of an own model are those of each.

    Raises:
        UserError: as ``subject_of`` does; or weights for several networks, or what to average for a single one.
    """
    from ..experiments.evaluate_model import from_several

    if len(models) == 1:
        if average:
            raise UserError("--average is for several networks, and one is named: leave it out, or name more.")
        return subject_of(models[0], own_model, seed=seed, **settings)
    if own_model.weights:
        raise UserError("--weights is for one network: write a build() for each that loads its own weights.")
    opened = [subject_of(model, own_model, seed=seed, **settings) for model in models]
    return partial(from_several, opened, average or "probabilities", seed=seed)


def names_of(added: list[str]) -> str:
    """Added attacks as a part of a folder's name, without the folders of their files.

    >>> names_of(["lib/mine.py:step:steps=3", "fab"])
    '+mine.py_step_steps=3+fab'
    """
    return "".join("+" + re.sub(r"[^\w.=,-]", "_", re.sub(r"^.*/(?=[^/]*\.py)", "", one)) for one in added)


def default_folder(model: str | list[str], what: str, threat: str) -> Path:
    """Where the answer goes without --out: into the run folder, or for one's own model to out/NAME-WHAT.

    For several networks it is out/NAME+NAME-WHAT, cut at 80 characters.
    """
    from ..importers.model_file import is_model_file
    from ..importers.pretrained import is_pretrained, short_reference

    ending = what.replace("THREAT", threat_file_name(threat))

    def stem(one: str) -> str:
        if is_pretrained(one):
            return re.sub(r"[:/]", "-", short_reference(one))
        return Path(one).stem if is_model_file(one) else Path(one).name

    several = [model] if isinstance(model, str) else model
    if len(several) > 1 or is_model_file(several[0]):
        name = "+".join(stem(one) for one in several)[:80]
        return Path("out") / f"{name}-{ending.removeprefix('evaluation-')}"
    return path("the run folder", several[0]) / ending
