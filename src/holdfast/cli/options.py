"""The options of the commands: one name, one type, one line of help each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

OWN = "Your own model"


def option(help: str, *names: str, **more: Any) -> Any:
    """A command line option whose name is the parameter's, unless `names` says more."""
    return typer.Option(*names, help=help, **more)


Data = Annotated[str, option("digits, mnist, cifar10, a hub name, a parquet file or folder, or an image folder.")]
Losses = Annotated[str | None, option("Losses with settings: sce,isce:s=10,mmc,cosface:m=0.2,scale=15.")]
OneLoss = Annotated[str, option("A loss with settings, such as isce:s=10; after @ another head: isce:s=2@cosine.")]
Against = Annotated[str, option("norm:eps; norm linf, l2 or l1, eps in pixels from 0 to 1: linf:0.1, linf:8/255.")]
Several = Annotated[str, option("norm:eps, or several: linf:0.1,l2:1.5; norm linf, l2 or l1, eps in pixels, 0 to 1.")]
Suite = Annotated[str, option("How hard to attack: quick, standard, paranoid, claims, protocols or explain.")]
Objective = Annotated[
    str, option("How to train: standard, adversarial:steps=10, fast, trades:beta=6, mart, interval; also awp=0.01.")
]
Information = Annotated[
    str, option("Where I-SCE's s comes from: 10, class:3, gradient:0.5, lipschitz, ibp, attack, mix:0.3.", "--s")
]
Seeds = Annotated[int, option("Networks per loss; with more than one the interval is over seeds.")]
FirstSeed = Annotated[int, option("The first of those seeds: fresh ones for the figures that are published.")]
On = Annotated[str, option("test; or val: judge on validation images, where settings are chosen.")]
Keep = Annotated[str | None, option("Weights of the last epoch, or of the best by (robust) validation accuracy.")]
Epochs = Annotated[int | None, option("Default: 30 for digits and photographs, 10 elsewhere.")]
Limit = Annotated[int, option("Attack at most so many test images, 0 for all. Cross-validated data is used whole.")]
LimitTrain = Annotated[int, option("Train on at most so many images, 0 for all.")]
Folds = Annotated[int, option("Cross-validation folds, for data without a test split. Default: 5 there.")]
Network = Annotated[str, option("A network of `holdfast list`, or mymodel.py:backbone. Default: by image size.")]
BatchSize = Annotated[int | None, option("Training batch size.")]
Optimizer = Annotated[str | None, option("adam or sgd.")]
Rate = Annotated[float | None, option("Learning rate.")]
Decay = Annotated[float | None, option("Weight decay, decoupled for adam.")]
Augment = Annotated[str | None, option("none, crop:PAD or crop:PAD+flip. Default: crop:4+flip for photographs.")]
Jobs = Annotated[int, option("Networks at a time. Default: one per core on a CPU, one on a GPU.")]
Quiet = Annotated[bool, option("No progress; the answer alone.", "--quiet", "-q")]
AsJson = Annotated[bool, option("Print JSON instead of tables; progress goes to stderr.", "--json")]
Device = Annotated[str, option("cpu, cuda, cuda:1 or mps; auto takes the best there is.")]
Out = Annotated[Path | None, option("Output folder. Default: out/DATA-THREAT-HASH.", "--out", "-o")]
RunFolder = Annotated[Path, option("The run folder; training goes on where it was.", "--out", "-o")]
Seed = Annotated[int, option("Of weights, order, augmentation and noise.")]
Fold = Annotated[int, option("Which fold is left out, for data without a test split.")]
Page = Annotated[Path | None, option("The page. Default: report.html beside the first file.", "--out", "-o")]
Figures = Annotated[Path | None, option("Write every figure here too, as SVG and PNG.")]
