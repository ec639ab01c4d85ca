"""``holdfast compare``: train and evaluate one network per loss, side by side."""

from __future__ import annotations

from typing import Any

from . import options as o
from .app import app, exits
from .common import asked_of_pgd50, fit_from, run_comparison
from .gate import THREE, apply_gate, read_gate


@app.command(rich_help_panel="The main job", epilog=exits(three=THREE))
def compare(
    data: o.Data = "digits",
    losses: o.Losses = None,
    threat: o.Threats = "linf:0.1",
    suite: o.Suite = "standard",
    proofs: o.Proofs = "linear",
    precision: o.Precision = "1%",
    pgd50: o.Pgd50 = None,
    no_pgd50: o.NoPgd50 = False,
    objective: o.Objective = "standard",
    seeds: o.Seeds = 1,
    first_seed: o.FirstSeed = 0,
    epochs: o.Epochs = None,
    limit: o.Limit = 1000,
    limit_train: o.LimitTrain = 0,
    split: o.EvalSplit = "test",
    folds: o.Folds = 0,
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
    jobs: o.Jobs = 0,
    device: o.Device = "auto",
    out: o.Out = None,
    require: o.Require = None,
    junit: o.Junit = None,
    track: o.Track = "",
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
) -> None:
    """Train one network per loss, attack each, and print clean, PGD-50 and robust accuracy side by side.

    *PGD-50* is the accuracy as usually reported: 50 PGD steps of eps/4 on the cross-entropy, one random start, the last
    iterate. *robust* is the share of samples that survived every attack (an upper bound), with its 95% interval.

    Each of the two has a verdict. *refuted*: stronger attacks broke significantly more than 1% of the samples beyond
    this figure. *loose*: not refuted, but a trust check fired, or more than 1% of the samples are estimated to have
    survived although they can be broken. *tight*: none of these, which is empirical and no proof. *exact*:
    every survivor is certified, which is a proof, or there is none. *void*: the measurement is invalid. The
    estimate comes from a sample of the survivors, as large as --precision needs.

    *certified* is the share of samples proved correct under the whole threat (a lower bound); --proofs says how hard it
    is tried.

    A spec in --losses can name its own head after @, and its own objective, model and training settings after +:
    isce:s=2@cosine+adversarial:steps=5+fit:lr=5e-3.

    Writes results.json, report.html and the adversarial examples. An interrupted command resumes when it is rerun. With
    more losses or seeds it goes on in the same --out.
    """
    from .. import spec
    from ..experiments.config import Comparison
    from ..results import rows

    gate = read_gate("compare", require, junit)
    fit = fit_from(data, epochs, batch_size, optimizer, lr, weight_decay, augment, checkpoint, fit_settings, freeze)
    chosen: dict[str, Any] = {"losses": tuple(spec.split(losses))} if losses else {}
    comparison = Comparison(
        data=data,
        threat=threat,
        suite=suite,
        proofs=proofs,
        precision=spec.share("precision", precision),
        pgd50=asked_of_pgd50(pgd50, no_pgd50),
        objective=objective,
        model=model,
        seeds=seeds,
        first_seed=first_seed,
        folds=folds,
        limit=limit,
        limit_train=limit_train,
        eval_split=split,
        image_column=image_column,
        label_column=label_column,
        convert=convert,
        resize=resize,
        skip_corrupt=skip_corrupt,
        init_from=init_from,
        fit=fit,
        **chosen,
    ).checked()
    results = run_comparison(comparison, out, device, jobs, quiet, as_json, gate, track)
    apply_gate(gate, rows(results), quiet, as_json)
