"""The options of the commands: one name, one type, one line of help each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

OWN = "Your own model"
RUN = "A run folder: what `holdfast train` wrote, or one in runs/ of what `holdfast compare` wrote."


def option(help: str, *names: str, **more: Any) -> Any:
    """A command line option whose name is the parameter's, unless `names` says more."""
    return typer.Option(*names, help=help, **more)


THREAT = "What an attack may do to an image: norm:eps, norm linf, l2 or l1, eps for pixels in [0, 1]. "

Data = Annotated[
    str, option("digits, moons, mnist, cifar10, a hub name, a parquet file or folder, or a folder of images per class.")
]
Losses = Annotated[
    str | None,
    option("Comma-separated, with settings: sce,isce:s=10,mmc,cosface:m=0.2,scale=15. Default: seven losses."),
]
OneLoss = Annotated[str, option("With settings: isce:s=10; after @ another head: isce:s=2@cosine.")]
Against = Annotated[str, option(THREAT + "Such as linf:0.1, linf:8/255, l2:1.5.")]
Several = Annotated[str, option(THREAT + "Such as linf:8/255, or several: linf:0.1,l2:1.5.")]
Suite = Annotated[str, option("How hard to attack: quick, standard, paranoid, standard+loss, per-attack or explain.")]
Objective = Annotated[
    str,
    option(
        "How to train: standard, adversarial:steps=10, fast, trades:beta=6, mart, interval. Those that attack take "
        "awp=0.01 as well, a perturbation of the weights."
    ),
]
Information = Annotated[
    str,
    option(
        "Train with I-SCE, and take its s from: 10, class:3, gradient:0.5, lipschitz, ibp, attack, mix:0.3. "
        "`holdfast list` says what each is.",
        "--s",
    ),
]
Seeds = Annotated[int, option("Networks per loss; with more than one the interval is over seeds.")]
FirstSeed = Annotated[int, option("The first of those seeds. Choose with some, publish with fresh ones.")]
On = Annotated[str, option("test, or val: judge on validation images, where settings are chosen.")]
Keep = Annotated[
    str | None, option("Whose weights to keep: last, or best by (robust) validation accuracy. Default: last.")
]
Epochs = Annotated[int | None, option("Of training. Default: 30 for digits and photographs, 10 elsewhere.")]
Limit = Annotated[int, option("Attack at most so many test images; 0: all. Cross-validated data is used whole.")]
LimitTrain = Annotated[int, option("Train on at most so many images; 0: all.")]
Folds = Annotated[int, option("Cross-validation folds; 0: 5 for data without a test split, none elsewhere.")]
Network = Annotated[str, option("A network of `holdfast list`, or mymodel.py:backbone. Default: by image size.")]
BatchSize = Annotated[int | None, option("Of training. Default: by data set.")]
Optimizer = Annotated[str | None, option("adam or sgd. Default: by data set.")]
Rate = Annotated[float | None, option("Learning rate. Default: by data set.")]
Decay = Annotated[float | None, option("Weight decay, decoupled for adam. Default: by data set.")]
Augment = Annotated[str | None, option("none, crop:PAD or crop:PAD+flip. Default: crop:4+flip for photographs.")]
Jobs = Annotated[int, option("Networks at a time; 0: one per core on a CPU, one on a GPU.")]
Quiet = Annotated[bool, option("No progress; the answer alone.", "--quiet", "-q")]
AsJson = Annotated[bool, option("Print one JSON document and nothing else; progress goes to stderr.", "--json")]
Device = Annotated[str, option("cpu, cuda, cuda:1 or mps; auto: cuda where there is one, else cpu.")]
Out = Annotated[
    Path | None, option("Output folder. Default: out/DATA-THREAT-HASH, found again by the same command.", "--out", "-o")
]
RunFolder = Annotated[Path, option("The run folder. Training that was stopped goes on in it.", "--out", "-o")]
Seed = Annotated[int, option("Random seed of weights, order, augmentation and noise.")]
NoiseSeed = Annotated[int, option("Random seed of the attacks.")]
Fold = Annotated[int, option("Which fold is left out, for data without a test split.")]
Page = Annotated[
    Path | None,
    option("A name that ends in .html, or a folder. Default: report.html beside the first file.", "--out", "-o"),
]
Figures = Annotated[
    Path | None, option("A folder for every figure as SVG and PNG, and the tables as CSV, LaTeX and Markdown.")
]
