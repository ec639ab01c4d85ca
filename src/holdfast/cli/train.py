"""``holdfast train``: train one network into a run folder."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from functools import partial

from ..errors import UserError
from . import options as o
from .app import app, exits
from .common import best_device, fit_from, percent_text, print_json
from .display import Display, aside, screen
from .output_files import own_folder


@app.command(rich_help_panel="Step by step", epilog=exits())
def train(
    out: o.RunFolder,
    data: o.Data = "digits",
    loss: o.OneLoss = "sce",
    s: o.Information = "",
    threat: o.OneThreat = "linf:0.1",
    objective: o.Objective = "standard",
    seed: o.Seed = 0,
    fold: o.Fold = 0,
    epochs: o.Epochs = None,
    limit_train: o.LimitTrain = 0,
    image_column: o.ImageColumn = "",
    label_column: o.LabelColumn = "",
    convert: o.Convert = "",
    resize: o.Resize = 0,
    skip_corrupt: o.SkipCorrupt = False,
    model: o.Network = "",
    batch_size: o.BatchSize = None,
    optimizer: o.Optimizer = None,
    lr: o.LearningRate = None,
    weight_decay: o.WeightDecay = None,
    augment: o.Augment = None,
    checkpoint: o.Checkpoint = None,
    fit_settings: o.FitSettings = "",
    init_from: o.InitFrom = "",
    freeze: o.Freeze = "",
    device: o.Device = "auto",
    track: o.Track = "",
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Train one network into a run folder, for evaluate, explain, bracket and curves.

    Writes config.json, env.json, log.jsonl, a checkpoint and model.safetensors. Interrupted training resumes when the
    command is rerun.
    """
    from .. import models
    from ..experiments.config import Comparison, Job
    from ..experiments.training import tracking_of, train_network
    from ..threat import Threat
    from ..train import tracker_names

    if s:
        if loss not in ("sce", "isce"):
            raise UserError(f"--s belongs to I-SCE: leave --loss out, or write isce:s={s}@HEAD, not --loss {loss}.")
        loss = f"isce:s={s}"
    fit = fit_from(data, epochs, batch_size, optimizer, lr, weight_decay, augment, checkpoint, fit_settings, freeze)
    comparison = Comparison(
        data=data, losses=(loss,), threat=threat, objective=objective, model=model, limit_train=limit_train, fit=fit,
        image_column=image_column, label_column=label_column, convert=convert, resize=resize,
        skip_corrupt=skip_corrupt, init_from=init_from,
    ).checked()  # fmt: skip
    Threat.parse(threat)  # one, unlike a comparison's
    if fold and comparison.folds <= 1:
        raise UserError(
            f"--fold is for data without a test split, which is cut into folds: {data} has one. Leave it out."
        )
    trackers = tracker_names(track)
    own_folder(out)
    job = Job(comparison, comparison.loss_specs[0], seed, fold, out, best_device(device))
    with aside(as_json), Display(quiet) as display, tracking_of(job, trackers) as tracked:
        _, trained, split = train_network(job, progress=partial(display.progress, out.name), track=tracked)
    if as_json:
        print_json({"run": str(out), "loss": job.loss.text, **asdict(trained)})
        return
    screen.sentence(
        f"{job.loss.text}: train accuracy {percent_text(trained.accuracy)}, validation {percent_text(trained.val)}, "
        f"{trained.epochs} epoch{'s' if trained.epochs != 1 else ''} in {trained.seconds} s."
    )
    if not quiet:
        code = " --run-code" if models.is_own(trained.model or "") or job.loss.file else ""
        free = threat == Comparison.threat and (job.loss.objective or objective) == "standard" and not job.loss.source
        usual = "linf:8/255" if free and split.shape[0] == 3 else threat  # 0.1 is a lot on photographs
        screen.print(f"next: holdfast evaluate {shlex.quote(str(out))} --threat {usual}{code}", soft_wrap=True)
