"""Train one network of a comparison in its run folder: resume it if it was stopped, load it if it is finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import models, run_folder
from ..data import Split, standardisation
from ..io import read_json, write_atomic
from ..progress import Progress, as_progress
from ..train import Tracking, accuracy, expected_config, fit, tracking
from ..train.checkpoint import read_log
from .config import Job, schedule_of
from .expected import expected_of
from .initial_weights import initialise

SUMMARY_FILE = "train.json"


@dataclass(frozen=True)
class TrainSummary:
    """How training ended; all None for a network that holdfast did not train.

    Args:
        epochs: epochs trained.
        accuracy: on the training images, in [0, 1].
        val: accuracy on the validation images; None without any.
        best_epoch: the epoch with the best (robust) validation accuracy, counted from 1.
        seconds: of training.
        model: the spec of the network.
    """

    epochs: int | None = None
    accuracy: float | None = None
    val: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    model: str | None = None

    @staticmethod
    def load(folder: Path) -> TrainSummary:
        """The summary in a run folder, or an empty one. Raises UserError when the file is damaged."""
        path = folder / SUMMARY_FILE
        if not path.exists():
            return TrainSummary()
        summary: TrainSummary = read_json(path, TrainSummary, what="the summary of a training run")
        return summary

    def save(self, folder: Path) -> None:
        """Write the summary: with it the network counts as trained."""
        write_atomic(folder / SUMMARY_FILE, json.dumps(asdict(self)))


class Trained(NamedTuple):
    """A job's network.

    Attributes:
        model: the network, on the job's device.
        summary: how training ended.
        split: the data.
    """

    model: nn.Module
    summary: TrainSummary
    split: Split


def is_trained(job: Job, split: Split) -> bool:
    """Whether the job's network is in its folder, finished.

    Raises:
        UserError: the folder belongs to another configuration.
    """
    run_folder.reserve(job.folder, _config(job, split), write=False)
    return (job.folder / SUMMARY_FILE).exists()


def train_network(
    job: Job,
    split: Split | None = None,
    progress: Progress | None = None,
    *,
    announce: bool = True,
    track: Tracking | None = None,
) -> Trained:
    """Train a job's network, or load it if it is finished.

    Args:
        job: what to train, and the run folder it is trained in.
        split: the job's data where it is loaded already.
        progress: called with ("training MODEL" and the time that training is expected to take, epochs done, epochs).
        announce: whether that time is measured first.
        track: gets each epoch, those of a finished network too, and how training ended.

    Returns:
        The network, how training ended, and the data.

    Raises:
        UserError: the device cannot be used, the data cannot be read, or the folder belongs to another configuration.
    """
    report = as_progress(progress)
    run_folder.check_device(job.device)
    split = split or job.cut.load(job.comparison.data)
    if is_trained(job, split):
        run_folder.note_paths(job.folder, _config(job, split).get(run_folder.PATHS, {}))
        # The command that asks for this network named its code.
        model, _ = run_folder.load(job.folder, device=job.device, run_code=True)
        summary = TrainSummary.load(job.folder)
        if track is not None:
            track.open(read_log(job.folder))
            _track_end(track, summary)
        return Trained(model, summary, split)
    mean, std = standardisation(split.train)
    arguments = job.model_arguments(split)
    model = models.build(**arguments, mean=mean, std=std)
    initialise(model, job.comparison.init_from)
    what = f"training {arguments['name']}"
    ahead = expected_of(job, split, model, evaluated=False).words() if announce else ""
    if ahead:
        what += f", {ahead}"
        report(what, 0, job.fit_config.epochs)
    counts = torch.bincount(split.train.y, minlength=len(split.classes))
    fitted = fit(
        model,
        split.train,
        split.val,
        schedule_of(job.comparison, job.loss, counts),
        job.fit_config,
        val_threat=_val_threat(job, split),
        out=job.folder,
        about=job.about(split),
        progress=lambda line, done, total: report(what, done, total),
        track=track,
        device=job.device,
    )
    model = model.to(job.device)
    model.logit_scale = job.loss.logit_scale
    summary = TrainSummary(
        epochs=job.fit_config.epochs,
        accuracy=accuracy(model, split.train.to(job.device)),
        val=fitted.history[fitted.kept_epoch - 1]["val"],
        best_epoch=fitted.best_epoch,
        seconds=round(fitted.seconds, 2),
        model=arguments["name"],
    )
    summary.save(job.folder)
    if track is not None:
        _track_end(track, summary)
    return Trained(model, summary, split)


def tracking_of(job: Job, names: Sequence[str]) -> AbstractContextManager[Tracking]:
    """The trackers of a job's network, for a block.

    Args:
        job: the network.
        names: of the trackers.
    """
    settings = {"data": job.comparison.data, "loss": job.loss.text, "threat": job.comparison.threat, "fold": job.fold}
    return tracking(names, job.folder, {**settings, "fit": asdict(job.fit_config)})


def _track_end(track: Tracking, summary: TrainSummary) -> None:
    """Send how training ended."""
    figures = {"accuracy": summary.accuracy, "val": summary.val, "best_epoch": summary.best_epoch}
    figures["seconds"] = summary.seconds
    track.log({f"trained/{name}": value for name, value in figures.items()}, summary.epochs or 0)


def _val_threat(job: Job, split: Split) -> Any:
    """The threat that validation measures robust accuracy under, if training uses one."""
    return job.comparison.threats[0] if job.is_adversarial and len(split.val) else None


def _config(job: Job, split: Split) -> dict[str, Any]:
    return expected_config(job.fit_config, _val_threat(job, split), job.about(split))
