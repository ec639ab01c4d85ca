"""``holdfast evaluate``: attack one network, of a run folder or the user's own, and judge the result."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from ..spec import numbers, threat_file_name
from . import options as o
from .app import app, exits
from .common import run_evaluation, say_files, show
from .display import errors
from .options import option


@app.command(rich_help_panel="Step by step", epilog=exits())
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A run folder of `holdfast train` or `compare`; or your own model: mymodel.py:build, a .onnx, a .pt2."
        ),
    ],
    threat: o.OneThreat = "linf:0.1",
    suite: o.Suite = "standard",
    budget: Annotated[
        str,
        option(
            "Stop the attacks after this time, or after this many forward and backward passes over all samples: "
            "10min, 2h, 1e6passes. Default: no limit."
        ),
    ] = "",
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
    data: o.OwnData = "",
    weights: o.Weights = "",
    input_range: o.InputRange = "",
    mean: o.Mean = "",
    std: o.Std = "",
    loss: o.TrainedWith = "",
    image_column: o.ImageColumn = "",
    label_column: o.LabelColumn = "",
    convert: o.Convert = "",
    resize: o.Resize = 0,
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Attack one network, audit the result, and write results.json, report.html and the adversarial examples.

    The network comes from a run folder, or it is your own:

    **holdfast evaluate mymodel.py:build --weights w.safetensors --data FOLDER --threat linf:8/255 --out DIR**

    build() takes no arguments and returns a module from images to logits; your code is executed. Images are in [0, 1]:
    --input-range, --mean and --std say what your model expects instead.

    PGD-50 is the accuracy as usually reported, and robust is an upper bound. Each has a verdict; see `holdfast compare
    --help`.

    An interrupted command resumes when it is rerun. Under torchrun (`torchrun --nproc-per-node 2 -m holdfast evaluate
    ...`) the processes share the samples and give the same answer as one.
    """  # fmt: skip
    from ..importers.model_file import is_model_file

    own = {"data": data, "weights": weights, "input-range": input_range, "mean": mean, "std": std, "loss": loss}
    reading = {"image_column": image_column, "label_column": label_column, "convert": convert, "resize": resize}
    own |= {name.replace("_", "-"): str(value or "") for name, value in reading.items()}
    if is_model_file(model):
        folder = out or Path("out") / f"{Path(model).stem}-{threat_file_name(threat)}-{suite}"
        subject = _own_model(model, own, limit=limit, seed=seed)
        if not quiet:
            errors.print(f"opening {model}: code in it is executed.", soft_wrap=True)
    else:
        folder = out or Path(model) / f"evaluation-{threat_file_name(threat)}-{suite}"
        subject = _run_folder(model, own, limit=limit)
    answer = run_evaluation(
        subject, threat, suite, folder,
        seed=seed, device=device, quiet=quiet, as_json=as_json, budget=budget, batch_size=batch_size,
    )  # fmt: skip
    if answer is None:
        return
    results, page = answer
    show(results, as_json)
    say_files([folder / "results.json", page], quiet, as_json)


def _own_model(model: str, own: dict[str, str], *, limit: int, seed: int) -> Any:
    """What opens the user's own model with these options, given a device."""
    from ..experiments.evaluate_model import from_file
    from ..importers.model_file import ModelSource

    if not own["data"]:
        raise UserError("your own model needs --data: an image folder, a parquet file, or a hub name.")
    ranges = [
        numbers(name, own[name] or default) for name, default in (("input-range", "0,1"), ("mean", ""), ("std", ""))
    ]
    source = ModelSource(model, own["weights"], *ranges)
    return partial(
        from_file, source, own["data"], loss=own["loss"] or "sce", limit=limit, seed=seed, reading=_reading(own)
    )


def _reading(own: dict[str, str]) -> dict[str, Any]:
    """How the data is read: those of its options that were given, by the names of ``data.load``."""
    names = ("image-column", "label-column", "convert", "resize")
    given = {name.replace("-", "_"): own[name] for name in names if own.get(name)}
    return {name: int(value) if name == "resize" else value for name, value in given.items()}


def _run_folder(run: str, own: dict[str, str], *, limit: int) -> Any:
    """What opens the network of a run folder, given a device; the options of one's own model are refused."""
    from ..experiments.evaluate_model import from_run

    for name, value in own.items():
        if value:
            raise UserError(f"--{name} is for your own model; {run} is a run folder, which has its own settings.")
    return partial(from_run, Path(run), limit=limit)
