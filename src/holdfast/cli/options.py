"""The options that several commands share: one name, one type, one line of help each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

OWN_MODEL = "Your own model"
NETWORK = (
    "A run folder of `holdfast train` or `compare`; or your own model with --data: mymodel.py:build, a .onnx, a .pt2, "
    "timm:NAME, hf:NAME or hf:FOLDER."
)
RUN = "A run folder: the --out of `holdfast train`, or a folder in DIR/runs of `holdfast compare`."


def option(help: str, *names: str, **more: Any) -> Any:
    """A command-line option; its name is the parameter's unless ``names`` says otherwise."""
    return typer.Option(*names, help=help, **more)


THREAT = "Threat model norm:eps; norm is linf, l2 or l1, eps for pixels in [0, 1]. "

Data = Annotated[
    str,
    option(
        "Data set: digits, moons, mnist, cifar10, a Hugging Face name, a parquet file or folder, or an image folder."
    ),
]
Losses = Annotated[
    str | None,
    option(
        "Loss specs, comma-separated: sce,isce:s=10,mmc,cosface:m=0.2,scale=15. A part with = continues the spec "
        "before it. Braces try values in turn: 'isce:s={0,1,3,10}'. A loss of yours: mine.py:hinge. Default: seven "
        "losses."
    ),
]
OneLoss = Annotated[
    str, option("Loss spec: isce:s=10; with another head after @: isce:s=2@cosine; a loss of yours: mine.py:hinge.")
]
OneThreat = Annotated[str, option(THREAT + "Examples: linf:0.1, linf:8/255, l2:1.5.")]
AnyThreat = Annotated[
    str,
    option(
        THREAT + "Examples: linf:0.1, linf:8/255, l2:1.5. Or corruptions:3, rotation:30,translation:3, patch:5x5: see "
        "above."
    ),
]
Threats = Annotated[str, option(THREAT + "Comma-separated for several: linf:0.1,l2:1.5.")]
Suite = Annotated[
    str,
    option(
        "Attack suite, by strength: quick, standard, paranoid. Also standard+loss (attacks the training loss too), "
        "per-attack (each attack on all images), explain (one change at a time), as-coded (the attack of the public "
        "code of I-SCE, in the ball)."
    ),
]
AddedAttacks = Annotated[
    str,
    option(
        "Attacks that come after the suite, on what it left: an attack of yours, mine.py:step; one of `holdfast list`; "
        "one of foolbox or torchattacks, foolbox:LinfPGD. Settings after a colon, comma-separated: "
        "mine.py:step:steps=20,fab.",
        "--attack",
    ),
]
Proofs = Annotated[
    str,
    option(
        "The last method of proof that is tried on what the individual attacks leave; what is proved leaves the other "
        "attacks. linear: bounds by lines over intervals, cheap. crown: lines for every layer. alpha: their slopes "
        "optimised. branch: branch and bound, of `holdfast evaluate` with --budget alone. The stronger ones pay where "
        "a network is small or trained to be proved."
    ),
]
Precision = Annotated[
    str,
    option(
        "Share of all samples that may be breakable still where no attack shows it: 1%, 0.2%. It decides how many "
        "survivors are attacked at full length and audited; a smaller one costs more. A verdict is tight from 1% on."
    ),
]
Pgd50 = Annotated[
    int | None,
    option(
        "Run PGD-50 on so many samples drawn at random, not on all: its accuracy is then a share of these.",
        "--pgd50",
    ),
]
NoPgd50 = Annotated[bool, option("Leave PGD-50 and its column out.", "--no-pgd50")]
Objective = Annotated[
    str,
    option(
        "Training objective: standard, adversarial:steps=10, fast, free:replays=4, friendly, trades:beta=6, mart, "
        "interval. Those with an attack, but free, also take awp=0.01 (adversarial weight perturbation)."
    ),
]
Information = Annotated[
    str,
    option(
        "Train with I-SCE and this s: a number, class:3, gradient:0.5, lipschitz, ibp, attack or mix:0.3. "
        "`holdfast list` explains each.",
        "--s",
    ),
]
Seeds = Annotated[int, option("Networks per loss. With more than one, the interval is a t interval over seeds.")]
FirstSeed = Annotated[int, option("First seed. Tune on some seeds, report results on fresh ones.")]
EvalSplit = Annotated[str, option("Evaluation split: val for model selection, test for final numbers.", "--split")]
Checkpoint = Annotated[
    str | None,
    option(
        "Which weights to keep: last, or best: the epoch with the highest validation accuracy, robust if training "
        "attacks. Default: last."
    ),
]
Epochs = Annotated[int | None, option("Training epochs. Default: 30 for digits and CIFAR, 10 for other data.")]
Limit = Annotated[
    int,
    option(
        "Maximum number of test images, a fixed random subset balanced over classes; 0: all. `holdfast compare` tests "
        "on every image once where it cross-validates, whatever the limit."
    ),
]
LimitTrain = Annotated[int, option("Maximum number of training images; 0: all.")]
Folds = Annotated[
    int, option("Cross-validation folds. 0: the default of the data, 5 for digits and a single test set for others.")
]
Network = Annotated[
    str,
    option(
        "A model of `holdfast list`; mymodel.py:backbone; or a pretrained one without its last layer, timm:NAME, "
        "hf:NAME or hf:FOLDER. Default: by image size and device."
    ),
]
BatchSize = Annotated[int | None, option("Training batch size. Default: by data set.")]
Optimizer = Annotated[str | None, option("adam, sgd (Nesterov) or momentum (classical). Default: by data set.")]
LearningRate = Annotated[float | None, option("Learning rate. Default: by data set.")]
WeightDecay = Annotated[float | None, option("Weight decay (decoupled for adam). Default: by data set.")]
Augment = Annotated[
    str | None,
    option(
        "none, crop:PAD, crop:PAD+flip, noise:SIGMA (Gaussian noise, as randomised smoothing needs it), or "
        "crop:PAD+flip+noise:SIGMA. Default: crop:4+flip for CIFAR."
    ),
]
FitSettings = Annotated[
    str,
    option(
        "Further training settings, as after +fit: in a loss spec: ema=0.99,precision=bf16. They are those of "
        "FitConfig: momentum, schedule, ema, precision, checkpoint_seconds, ...",
        "--fit",
    ),
]
InitFrom = Annotated[
    str,
    option(
        "Begin with the weights of a run folder or a weights file. The backbone must fit; another head stays new.",
    ),
]
Freeze = Annotated[
    str,
    option(
        "Leave parameters of these names as they are, and the statistics of their batch norms: 'backbone.*'. Several "
        "with | between."
    ),
]
Jobs = Annotated[int, option("Networks trained in parallel; 0: one per CPU core, or one on a GPU.")]
Quiet = Annotated[bool, option("Print the result only, no progress.", "--quiet", "-q")]
AsJson = Annotated[bool, option("Print one JSON document on stdout; progress goes to stderr.", "--json")]
RunCode = Annotated[
    bool, option("Execute the Python files that the folder names, such as mymodel.py. Read them first.", "--run-code")
]
Device = Annotated[str, option("cpu, cuda, cuda:1 or mps. auto: cuda if available, else cpu.")]
Out = Annotated[
    Path | None,
    option("Output folder. Default: out/DATA-THREAT-HASH; the same command finds it again.", "--out", "-o"),
]
RunFolder = Annotated[Path, option("Run folder. Interrupted training resumes in it.", "--out", "-o")]
PIPELINE = "Pipelines"
Require = Annotated[
    list[str] | None,
    option(
        "What the answer must be, or the exit status is 3: 'robust>=0.45' (or 45%; the 95% interval's lower end must "
        "reach it), 'pgd50<=60%' (its upper end), 'verdict=tight' (or better). Columns: clean, pgd50, robust, "
        "certified. Every row must meet it, or one alone: 'sce: robust>=0.45'. Repeatable.",
        rich_help_panel=PIPELINE,
    ),
]
Junit = Annotated[
    Path | None, option("Write each requirement as a test case to this JUnit XML file.", rich_help_panel=PIPELINE)
]
Track = Annotated[
    str,
    option(
        "Send every figure of training and evaluation to a tracker that is installed: tensorboard, wandb or mlflow; "
        "several with commas between. Default: none."
    ),
]
Seed = Annotated[int, option("Random seed of weights, batch order, augmentation and noise.")]
NoiseSeed = Annotated[int, option("Random seed of the attacks.")]
Fold = Annotated[int, option("Which fold is the test set, for data without a test split.")]
Page = Annotated[
    Path | None,
    option("An .html file, or a folder. Default: report.html beside the first results file.", "--out", "-o"),
]
Figures = Annotated[
    Path | None,
    option("Folder for every figure as SVG, PNG and PDF, their captions, and the tables as CSV, LaTeX and Markdown."),
]
OWN_DATA = "Your own data"
ImageColumn = Annotated[
    str, option("Of a table, the column with the images. Default: found by type and name.", rich_help_panel=OWN_DATA)
]
LabelColumn = Annotated[
    str, option("Of a table, the column with the labels. Default: found by type and name.", rich_help_panel=OWN_DATA)
]
Convert = Annotated[
    str,
    option(
        "rgb or grey: convert all images to it. Default: images of several modes are refused.", rich_help_panel=OWN_DATA
    ),
]
Resize = Annotated[
    int,
    option(
        "N: resize all images to N x N, whatever their proportions. Default: images of several sizes are refused.",
        rich_help_panel=OWN_DATA,
    ),
]
SkipCorrupt = Annotated[
    bool,
    option(
        "Leave out images that cannot be decoded, and name them. Default: they are refused.",
        "--skip-corrupt",
        rich_help_panel=OWN_DATA,
    ),
]
Average = Annotated[
    str,
    option("Of several networks: probabilities, or logits. Default: probabilities.", rich_help_panel=OWN_MODEL),
]
