"""Losses side by side: train a network per loss, seed and fold, attack each, and put the answers into one Results.

Every network has its own folder, so whatever was finished when a command was killed stays finished.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models, process_pool, run_folder, spec
from ..data import Split, default_folds, load, standardisation
from ..errors import UserError, unknown
from ..evaluation import evaluate, load_x_adv
from ..evaluation.suites import SUITES
from ..information.sources import source
from ..io import write_atomic
from ..objectives import OBJECTIVES, Schedule
from ..process_pool import Progress
from ..results import Results
from ..threat import Threat
from ..train import FitConfig, accuracy, expected_config, fit
from . import loss_spec
from .collect import NetworkResult, collect
from .pipeline import cached_audit, cached_region

TRANSFER_LOSS = "sce"  # the loss whose adversarial images are tried on every other network


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how; equal comparisons share an output folder and resume each other.

    data: a name or path for ``data.load``; losses: specs such as "isce:s=10"; threat: "linf:0.1", or several
    with commas between, of which adversarial training takes the first; suite: a key of
    SUITES; objective: a key of OBJECTIVES with settings, such as "adversarial:steps=10"; model: a key of MODELS or ""
    for the size's own; seeds: networks per loss, from first_seed on; folds: 0 for the data's own number; limit,
    limit_train: at most so many test and training images, 0 for all; on: "test", or "val" to judge, and choose, on
    validation images; fit: how each network is trained.
    """

    data: str = "digits"
    losses: tuple[str, ...] = ("sce", "isce:s=3", "isce:s=100", "mmc", "center", "lgm", "cosface:m=0.2,scale=15")
    threat: str = "linf:0.1"
    suite: str = "standard"
    objective: str = "standard"
    model: str = ""
    seeds: int = 1
    first_seed: int = 0
    folds: int = 0
    limit: int = 1000
    limit_train: int = 0
    on: str = "test"
    fit: FitConfig = field(default_factory=FitConfig)

    @property
    def threats(self) -> tuple[Threat, ...]:
        """What the networks are attacked under."""
        return tuple(Threat.parse(text) for text in self.threat.split(","))

    @property
    def networks(self) -> int:
        """How many networks are trained and attacked."""
        return len(self.losses) * self.seeds * max(self.folds, 1)

    def checked(self) -> Comparison:
        """The same with its defaults filled in. Raises UserError for whatever could only fail later."""
        if len(set(self.threats)) < len(self.threats):
            raise UserError(f"the threats '{self.threat}' name one twice: name each once.")
        chosen = [loss_spec.parse(text).text for text in self.losses]
        if not chosen:
            raise UserError("there is no loss to compare: name at least one, such as sce.")
        twice = sorted({text for text in chosen if chosen.count(text) > 1})
        if twice:
            raise UserError(f"the loss '{twice[0]}' is named twice: name each once, and use seeds for repetitions.")
        for text in chosen:
            row = loss_spec.parse(text)
            _objective(self, row)
            _fit(self, row)
            if row.model:
                models.check(row.model)
        if self.suite not in SUITES:
            raise unknown("suite", self.suite, SUITES)
        if self.model:
            models.check(self.model)
        if self.seeds < 1 or min(self.first_seed, self.folds, self.limit, self.limit_train) < 0:
            raise UserError(
                "seeds must be >= 1; first_seed, folds, limit, limit_train >= 0 (0: the data's own folds, all images)."
            )
        return replace(self, losses=tuple(chosen), folds=self.folds or default_folds(self.data))


@dataclass(frozen=True)
class Job:
    """One network, in a folder of its own: everything a worker process needs, as plain data."""

    comparison: Comparison
    loss: str
    seed: int
    fold: int
    folder: Path
    device: str


def _objective(comparison: Comparison, row: loss_spec.LossSpec, counts: Tensor | None = None) -> Schedule:
    """The row's own objective, or the comparison's, with the row's loss and its source of s."""
    name, settings = spec.parse(row.objective or comparison.objective)
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    factory, threat = OBJECTIVES[name], comparison.threats[0]
    spec.accepts("objective", name, factory, settings)
    takes = inspect.signature(factory).parameters
    if row.source:
        if "s" not in takes:
            raise UserError(f"objective '{name}' sets s itself: give '{row.text}' a number, or another objective.")
        settings["s"] = source(row.source, threat, counts)
    if "threat" in takes:
        settings["threat"] = threat
    if "score" in takes:
        settings["score"] = row.score
    return factory(row.loss, **settings)


def _fit(comparison: Comparison, row: loss_spec.LossSpec, seed: int = 0) -> FitConfig:
    """The comparison's schedule with the row's own changes."""
    known = {f.name: getattr(comparison.fit, f.name) for f in fields(comparison.fit)}
    for key in row.fit:
        if key not in known or key == "seed":
            raise unknown(f"setting of the schedule in '{row.text}'", key, sorted(known))
    try:
        return replace(comparison.fit, **{**row.fit, "seed": seed})
    except TypeError:
        raise UserError(f"the schedule of '{row.text}' cannot be read: {row.fit}.") from None


def _adversarial(comparison: Comparison, row: loss_spec.LossSpec) -> bool:
    """Whether training asks for the threat: by its objective, or by its source of s."""
    return bool(row.source) or spec.parse(row.objective or comparison.objective)[0] != "standard"


def train_one(job: Job, tell: Progress) -> tuple[nn.Module, dict[str, Any], Split]:
    """Train a job's network, or load it if that is done. Returns (model, summary, data)."""
    run_folder.check_device(job.device)
    comparison, loss, cut = job.comparison, loss_spec.parse(job.loss), _cut(job.comparison, job.fold)
    split = load(comparison.data, **cut)
    built: dict[str, Any] = {
        "name": loss.model or comparison.model or models.default_model(split.shape),
        "shape": split.shape,
        "classes": len(split.classes),
        "head": loss.head,
        "head_settings": loss.head_settings,
        "seed": job.seed,
    }
    about = {
        "model": built,
        "loss": job.loss,
        "objective": loss.objective or comparison.objective,
        "data": comparison.data,
        "cut": cut,
        **({"threat": comparison.threat} if _adversarial(comparison, loss) else {}),
        **({} if loss.logit_scale == 1 else {"logit_scale": loss.logit_scale}),
    }
    config = _fit(comparison, loss, job.seed)
    val_threat = comparison.threats[0] if _adversarial(comparison, loss) and len(split.val) else None
    summary = job.folder / "train.json"
    if summary.exists():
        run_folder.reserve(job.folder, expected_config(config, val_threat, about))
        return run_folder.load(job.folder, device=job.device)[0], run_folder.read_json(summary), split
    mean, std = standardisation(split.train)
    model = models.build(**built, mean=mean, std=std)
    fitted = fit(
        model,
        split.train,
        split.val,
        _objective(comparison, loss, torch.bincount(split.train.y, minlength=len(split.classes))),
        config,
        val_threat=val_threat,
        out=job.folder,
        about=about,
        progress=lambda done, total, line: tell(job.folder.name, "training", done, total),
        device=job.device,
    )
    model = model.to(job.device)
    model.logit_scale = loss.logit_scale
    trained = {
        "epochs": config.epochs,
        "accuracy": accuracy(model, split.train.to(job.device)),
        "val": fitted.history[fitted.kept_epoch - 1]["val"],
        "best_epoch": fitted.best_epoch,
        "seconds": round(fitted.seconds, 2),
        "model": built["name"],
    }
    write_atomic(summary, json.dumps(trained))
    return model, trained, split


def _cut(comparison: Comparison, fold: int) -> dict[str, Any]:
    """How a network's data is cut, as JSON keeps it: cross-validated data is attacked whole."""
    cut: dict[str, Any] = {"limit_train": comparison.limit_train or None}
    if comparison.on != "test":
        cut["on"] = comparison.on
    if comparison.folds > 1:
        return {**cut, "fold": [fold, comparison.folds]}
    return {**cut, "limit": comparison.limit or None}


def train_and_attack(job: Job, tell: Progress) -> tuple[nn.Module, list[NetworkResult]]:
    """Do a job, or what is left of it: the network, and one answer a threat."""
    model, trained, split = train_one(job, tell)
    comparison, answers = job.comparison, []
    for threat in comparison.threats:
        evaluation = evaluate(
            model,
            split.test,
            threat,
            comparison.suite,
            trained_with=loss_spec.parse(job.loss).loss,
            seed=job.seed,
            checkpoint=_cache_path(job.folder, "evaluation", threat),
            key=f"{split.fingerprint} {run_folder.weights_hash(model)}",
            progress=evaluation_progress(job.folder.name, tell, threat),
        )
        answers.append(
            NetworkResult(job.loss, job.seed, job.folder, evaluation, trained, split, _cut(comparison, job.fold))
        )
    return model, answers


def audit_job(job: Job, tell: Progress) -> list[NetworkResult]:
    """Audit what ``train_and_attack`` left, threat by threat; the SCE network of the same seed and fold is the twin."""
    model, judged = train_and_attack(job, tell)
    sce = job.folder.parent / run_folder.folder_name(TRANSFER_LOSS, job.seed, job.fold)
    beside = sce if TRANSFER_LOSS in job.comparison.losses and sce != job.folder else None
    answers = []
    for one in judged:
        threat = one.evaluation.threat
        twin = None if beside is None else load_x_adv(_cache_path(beside, "evaluation", threat))
        one = cached_audit(one, model, _cache_path(job.folder, "audit", threat), twin, tell, seed=job.seed)
        answers.append(cached_region(one, model, _cache_path(job.folder, "region", threat), tell, seed=job.seed))
    return answers


def _cache_path(folder: Path, what: str, threat: Threat) -> Path:
    return folder / f"{what}-{threat.norm}{threat.eps:.6g}.safetensors"


def evaluation_progress(name: str, tell: Progress, threat: Threat) -> Any:
    """What an evaluation reports while it runs: the threat, the stage, and the robust accuracy so far."""
    return lambda what, done, total: tell(name, f"{threat}, {what}", done, total)


# What runs in a worker sends nothing back: what it did is on disk.
def _do(job: Job, tell: Progress) -> None:
    train_and_attack(job, tell)


def _audit(job: Job, tell: Progress) -> None:
    audit_job(job, tell)


def _quiet(job: str, what: str, done: int, total: int) -> None:
    pass


def compare(
    comparison: Comparison,
    out: Path,
    *,
    command: str = "",
    device: str = "cpu",
    workers: int = 1,
    tell: Progress = _quiet,
    finished: Callable[[Job, int, int], None] = lambda job, done, total: None,
    checked: Callable[[Job], None] = lambda job: None,
) -> Results:
    """Train, attack and audit every network of the comparison; write results.json and witnesses.safetensors to ``out``.

    Raises UserError when ``out`` belongs to another comparison, or for anything ``Comparison.checked`` refuses. Stopped
    at any moment, the same call goes on where it was.
    """
    comparison = comparison.checked()
    run_folder.check_device(device)
    # What cannot work must not leave a folder behind: data and network are tried before the folder is claimed.
    split = load(comparison.data, **_cut(comparison, 0))
    models.build(comparison.model or models.default_model(split.shape), split.shape, len(split.classes))
    run_folder.reserve(out, json.loads(json.dumps(asdict(comparison))))
    todo = [
        Job(comparison, loss, seed, fold, out / "runs" / run_folder.folder_name(loss, seed, fold), device)
        for fold in range(comparison.folds)
        for seed in range(comparison.first_seed, comparison.first_seed + comparison.seeds)
        for loss in comparison.losses
    ]
    ended: list[Job] = []

    def end(job: Job) -> None:
        ended.append(job)
        finished(job, len(ended), len(todo))

    process_pool.run(_do, todo, workers=workers, tell=tell, finished=end)
    # Checks come when all networks are there: one of them asks for the SCE network's adversarial images.
    process_pool.run(_audit, todo, workers=workers, tell=tell, finished=checked)
    # What each job left on disk is read back, not sent back: the same way whether it was done now or a week ago.
    judged = [one for job in todo for one in audit_job(job, _quiet)]
    order = comparison.threats.index
    judged.sort(key=lambda one: (order(one.evaluation.threat), comparison.losses.index(one.loss), one.seed))
    name = comparison.data + (", validation images" if comparison.on == "val" else "")
    return collect(judged, out, name, asdict(comparison), command)


def default_out(comparison: Comparison) -> Path:
    """out/<data>-<threat>-<hash of the whole comparison>: the same command finds its own work again."""
    whole = json.dumps(asdict(comparison.checked()), sort_keys=True)
    mark = hashlib.blake2b(whole.encode(), digest_size=3).hexdigest()
    data = Path(comparison.data).name or "data"
    return Path("out") / f"{data}-{threat_file_name(comparison.threat)}-{mark}"


def threat_file_name(threat: str) -> str:
    """A threat as part of a file's name.

    >>> threat_file_name("linf:8/255,l2:1")
    'linf8_255-l21'
    """
    return threat.replace(":", "").replace("/", "_").replace(",", "-")
