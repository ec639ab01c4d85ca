"""Losses side by side: train a network per loss, seed and fold, attack each, and put the answers into one Results.

Every network has its own folder, so whatever was finished when a command was killed stays finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import jobs, models, runs, specs
from .assemble import Judged, assemble
from .attacks import SUITES
from .checks import CHECKS, audit, name_of
from .checks.record import load_audit, save_audit
from .data import Split, default_folds, load, standardisation
from .errors import UserError, unknown
from .evaluate import evaluate, stored_x_adv
from .jobs import Tell
from .objectives import OBJECTIVES, Schedule
from .results import Results, write_atomic
from .threat import Threat
from .train import FitConfig, accuracy, fit

TWIN = "sce"  # the loss whose adversarial images are tried on every other network


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how; equal comparisons share an output folder and resume each other.

    data: a name or path for ``data.load``; losses: specs such as "isce:s=10"; threat: "linf:0.1", or several
    with commas between, of which adversarial training takes the first; suite: a key of
    SUITES; objective: a key of OBJECTIVES with settings, such as "adversarial:steps=10"; model: a key of MODELS or ""
    for the size's own; seeds: networks per loss; folds: 0 for the data's own number; limit, limit_train: at most so
    many test and training images, 0 for all; fit: how each network is trained.
    """

    data: str = "digits"
    losses: tuple[str, ...] = ("sce", "isce:s=3", "isce:s=100", "mmc", "center", "lgm", "cosface:m=0.2,scale=15")
    threat: str = "linf:0.1"
    suite: str = "standard"
    objective: str = "standard"
    model: str = ""
    seeds: int = 1
    folds: int = 0
    limit: int = 1000
    limit_train: int = 0
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
        chosen = [specs.loss(text).text for text in self.losses]
        if not chosen:
            raise UserError("there is no loss to compare: name at least one, such as sce.")
        twice = sorted({text for text in chosen if chosen.count(text) > 1})
        if twice:
            raise UserError(f"the loss '{twice[0]}' is named twice: name each once, and use seeds for repetitions.")
        _objective(self, specs.loss(chosen[0]))
        if self.suite not in SUITES:
            raise unknown("suite", self.suite, SUITES)
        if self.model and self.model not in models.MODELS:
            raise unknown("model", self.model, models.MODELS)
        if self.seeds < 1 or self.folds < 0 or self.limit < 0 or self.limit_train < 0:
            raise UserError(
                "seeds must be >= 1; folds, limit and limit_train must be >= 0 (0: the data's own, or all)."
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


def _objective(comparison: Comparison, loss: specs.LossChoice) -> Schedule:
    name, settings = specs.parse(comparison.objective)
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    factory = OBJECTIVES[name]
    specs.accepts("objective", name, factory, settings)
    if name == "standard":
        return factory(loss.loss)
    return factory(loss.loss, comparison.threats[0], score=loss.score, **settings)


def train_one(job: Job, tell: Tell) -> tuple[nn.Module, dict[str, Any], Split]:
    """Train a job's network, or load it if that is done. Returns (model, summary, data)."""
    runs.check_device(job.device)
    comparison, loss, cut = job.comparison, specs.loss(job.loss), _cut(job.comparison, job.fold)
    split = load(comparison.data, **cut)
    built: dict[str, Any] = {
        "name": comparison.model or models.default_model(split.shape),
        "shape": split.shape,
        "classes": len(split.classes),
        "head": loss.head,
        "head_settings": loss.head_settings,
        "seed": job.seed,
    }
    about = {
        "model": built,
        "loss": job.loss,
        "objective": comparison.objective,
        "data": comparison.data,
        "cut": cut,
        **({} if comparison.objective == "standard" else {"threat": comparison.threat}),
        **({} if loss.logit_scale == 1 else {"logit_scale": loss.logit_scale}),
    }
    config = replace(comparison.fit, seed=job.seed)
    summary = job.folder / "train.json"
    if summary.exists():
        runs.claim(job.folder, {"fit": asdict(config), **about})
        return runs.load(job.folder, device=job.device)[0], runs.read_json(summary), split
    mean, std = standardisation(split.train)
    model = models.build(**built, mean=mean, std=std)
    fitted = fit(
        model,
        split.train,
        split.val,
        _objective(comparison, loss),
        config,
        out=job.folder,
        about=about,
        progress=lambda done, total, line: tell(job.folder.name, "training", done, total),
        device=job.device,
    )
    model = model.to(job.device)
    model.logit_scale = loss.logit_scale
    trained = {
        "epochs": comparison.fit.epochs,
        "accuracy": accuracy(model, split.train.to(job.device)),
        "val": fitted.history[-1]["val"],
        "seconds": round(fitted.seconds, 2),
        "model": built["name"],
    }
    write_atomic(summary, json.dumps(trained))
    return model, trained, split


def _cut(comparison: Comparison, fold: int) -> dict[str, Any]:
    """How a network's data is cut, as JSON keeps it: cross-validated data is attacked whole."""
    cut: dict[str, Any] = {"limit_train": comparison.limit_train or None}
    if comparison.folds > 1:
        return {**cut, "fold": [fold, comparison.folds]}
    return {**cut, "limit": comparison.limit or None}


def train_and_attack(job: Job, tell: Tell) -> tuple[nn.Module, list[Judged]]:
    """Do a job, or what is left of it: the network, and one answer a threat."""
    model, trained, split = train_one(job, tell)
    comparison, answers = job.comparison, []
    for threat in comparison.threats:
        evaluation = evaluate(
            model,
            split.test,
            threat,
            comparison.suite,
            trained_with=specs.loss(job.loss).loss,
            seed=job.seed,
            record=_record(job.folder, "evaluation", threat),
            key=f"{split.fingerprint} {runs.weights_mark(model)}",
            progress=teller(job.folder.name, tell, threat, len(split.test)),
        )
        answers.append(Judged(job.loss, job.seed, job.folder, evaluation, trained, split, _cut(comparison, job.fold)))
    return model, answers


def check(job: Job, tell: Tell) -> list[Judged]:
    """Audit what ``train_and_attack`` left, threat by threat; the SCE network of the same seed and fold is the twin."""
    model, judged = train_and_attack(job, tell)
    sce = job.folder.parent / runs.folder_name(TWIN, job.seed, job.fold)
    beside = sce if TWIN in job.comparison.losses and sce != job.folder else None
    answers = []
    for one in judged:
        threat = one.evaluation.threat
        twin = None if beside is None else stored_x_adv(_record(beside, "evaluation", threat))
        answers.append(audited(one, model, _record(job.folder, "audit", threat), twin, tell, seed=job.seed))
    return answers


def _record(folder: Path, what: str, threat: Threat) -> Path:
    return folder / f"{what}-{threat.norm}{threat.eps:.6g}.safetensors"


def audited(one: Judged, model: nn.Module, record: Path, twin: Tensor | None, tell: Tell, *, seed: int) -> Judged:
    """The same with its audit: read from the record, or made and written there."""
    asked = {
        "data": one.split.fingerprint,
        "weights": runs.weights_mark(model),
        "stages": [asdict(cost) for cost in one.evaluation.stages],
        "checks": [name_of(check) for check in CHECKS],
        "twin": None if twin is None else hashlib.blake2b(twin.numpy().tobytes()).hexdigest(),
    }
    key = hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).hexdigest()
    found = load_audit(record, key, one.evaluation)
    if found is None:
        found = audit(
            model,
            one.split.test,
            one.evaluation,
            trained_with=specs.loss(one.loss).loss,
            twin=twin,
            seed=seed,
            progress=lambda name, done, total: tell(one.folder.name, f"checking: {name}", done, total),
        )
        save_audit(record, key, found)
    return replace(one, evaluation=found.evaluation, audit=found)


def teller(name: str, tell: Tell, threat: Threat, n: int) -> Any:
    """What an evaluation of n samples tells while it runs: the stage, and the robust accuracy as it is by now."""
    return lambda stage, done, total, standing: tell(
        name, f"{threat}, {stage}, at most {standing / n:.1%} robust", done, total
    )


# What runs in a worker sends nothing back: what it did is on disk.
def _do(job: Job, tell: Tell) -> None:
    train_and_attack(job, tell)


def _check(job: Job, tell: Tell) -> None:
    check(job, tell)


def _quiet(job: str, what: str, done: int, total: int) -> None:
    pass


def compare(
    comparison: Comparison,
    out: Path,
    *,
    command: str = "",
    device: str = "cpu",
    workers: int = 1,
    tell: Tell = _quiet,
    finished: Callable[[Job, int, int], None] = lambda job, done, total: None,
    checked: Callable[[Job], None] = lambda job: None,
) -> Results:
    """Train, attack and audit every network of the comparison; write results.json and witnesses.safetensors to ``out``.

    Raises UserError when ``out`` belongs to another comparison, or for anything ``Comparison.checked`` refuses. Stopped
    at any moment, the same call goes on where it was.
    """
    comparison = comparison.checked()
    runs.check_device(device)
    # What cannot work must not leave a folder behind: data and network are tried before the folder is claimed.
    split = load(comparison.data, **_cut(comparison, 0))
    models.build(comparison.model or models.default_model(split.shape), split.shape, len(split.classes))
    runs.claim(out, json.loads(json.dumps(asdict(comparison))))
    todo = [
        Job(comparison, loss, seed, fold, out / "runs" / runs.folder_name(loss, seed, fold), device)
        for fold in range(comparison.folds)
        for seed in range(comparison.seeds)
        for loss in comparison.losses
    ]
    ended: list[Job] = []

    def end(job: Job) -> None:
        ended.append(job)
        finished(job, len(ended), len(todo))

    jobs.run(_do, todo, workers=workers, tell=tell, finished=end)
    # Checks come when all networks are there: one of them asks for the SCE network's adversarial images.
    jobs.run(_check, todo, workers=workers, tell=tell, finished=checked)
    # What each job left on disk is read back, not sent back: the same way whether it was done now or a week ago.
    judged = [one for job in todo for one in check(job, _quiet)]
    order = comparison.threats.index
    judged.sort(key=lambda one: (order(one.evaluation.threat), comparison.losses.index(one.loss), one.seed))
    return assemble(judged, out, comparison.data, asdict(comparison), command)


def default_out(comparison: Comparison) -> Path:
    """out/<data>-<threat>-<hash of the whole comparison>: the same command finds its own work again."""
    whole = json.dumps(asdict(comparison.checked()), sort_keys=True)
    mark = hashlib.blake2b(whole.encode(), digest_size=3).hexdigest()
    data = Path(comparison.data).name or "data"
    return Path("out") / f"{data}-{file_text(comparison.threat)}-{mark}"


def file_text(threat: str) -> str:
    """A threat as part of a file's name.

    >>> file_text("linf:8/255,l2:1")
    'linf8_255-l21'
    """
    return threat.replace(":", "").replace("/", "_").replace(",", "-")
