"""How long training and attacks will take, measured on a few steps and images before the work begins."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from .. import models
from ..data import Split, pixels
from ..errors import UserError
from ..evaluation.suites import resolve
from ..outputs import as_outputs, frozen_eval
from ..progress import EXPECTED
from ..train import fit
from .config import Job, schedule_of

SHORT = 30.0  # seconds of work that need no announcement
FEW, MANY = 8, 256  # images that are timed: many where few take no time worth measuring
INSTANT = 0.05  # seconds
STEP = 0.25  # seconds that a pass over the images of a timed step should take at most: slow networks get fewer images
LATE = 0.999  # training progress that steps are timed at: schedules of the attack's eps have reached all of it


@dataclass(frozen=True)
class Expected:
    """Seconds of work ahead.

    Attributes:
        training: as timed on steps of this training, attack and augmentation included.
        attacks: of the evaluation, if no attack breaks anything: a bound, since broken samples leave.
    """

    training: float
    attacks: float = 0.0

    def words(self) -> str:
        """In words; "" for less than half a minute.

        >>> Expected(500.0, 8000.0).words(), Expected(500.0).words(), Expected(10.0).words()
        ('expected: 8 min of training, at most 2.2 h of attacks', 'expected: 8 min of training', '')
        """
        if self.training + self.attacks < SHORT:
            return ""
        attacks = f", at most {_words(self.attacks)} of attacks" if self.attacks else ""
        return f"{EXPECTED}{_words(self.training)} of training{attacks}"


def expected_of(job: Job, split: Split, model: nn.Module | None = None, *, evaluated: bool = True) -> Expected:
    """Measure what a job will take on the device it names.

    Args:
        job: the job.
        split: its data.
        model: its network; it is copied. Default: it is built.
        evaluated: whether attacks follow the training.

    Returns:
        The seconds. No random state is changed.
    """
    net = (models.build(**job.model_arguments(split)) if model is None else copy.deepcopy(model)).to(job.device)
    x = split.test.x if len(split.test) else split.train.x
    one = _seconds_per_pass(net, pixels(x[:FEW].to(job.device)))
    if one * FEW < INSTANT:
        one = _seconds_per_pass(net, pixels(x[:MANY].to(job.device)))
    training = _training_seconds(job, split, net, one)
    if not evaluated:
        return Expected(training)
    passes = sum(stage.passes(len(split.classes)) for stage in resolve(job.comparison.suite))
    return Expected(training, one * len(split.test) * passes * len(job.comparison.threats))


def expected_of_all(jobs: Sequence[Job], split: Split, workers: int) -> str:
    """How long jobs of one comparison will take in all. Of those with the same network and training one is measured.

    Args:
        jobs: the jobs that are not done.
        split: the data of one of them.
        workers: jobs at a time.

    Returns:
        Such as "expected: 3.5 h of training, at most 9.8 h of attacks; 51 networks, 2 at a time"; "" for less than half
        a minute.
    """
    kinds: dict[str, Expected] = {}
    training = attacks = 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))  # as a worker has
    try:
        for job in jobs:
            objective = job.loss.objective or job.comparison.objective
            kind = repr((job.loss.model, objective, job.loss.source, sorted(job.loss.fit.items())))
            if kind not in kinds:
                kinds[kind] = expected_of(job, split)
            training, attacks = training + kinds[kind].training, attacks + kinds[kind].attacks
    finally:
        torch.set_num_threads(threads)
    together = min(workers, len(jobs)) or 1
    words = Expected(training / together, attacks / together).words()
    return words and f"{words}; {len(jobs)} networks, {together} at a time"


def _training_seconds(job: Job, split: Split, net: nn.Module, one: float) -> float:
    """Three steps of the job's own training, less one step, for each of its steps; with fewer images where one is slow.

    Where training cannot start, the training itself will say so: plain steps are counted then.

    Args:
        job: the job.
        split: its data.
        net: its network, whose weights are changed.
        one: seconds of a pass of one image.
    """
    config = job.fit_config
    images = max(2, min(config.batch_size, len(split.train), int(STEP / max(one, 1e-9))))
    counts = torch.bincount(split.train.y, minlength=len(split.classes))
    schedule = schedule_of(job.comparison, job.loss, counts)
    short = replace(config, epochs=1, batch_size=images, checkpoint_seconds=float("inf"), checkpoint="last")

    def seconds(steps: int) -> float:
        rows = torch.arange(steps * images) % len(split.train)
        began = time.perf_counter()
        fit(net, split.train.take(rows), split.train.take(rows[:0]), lambda _: schedule(LATE), short, device=job.device)
        return time.perf_counter() - began

    step = 2 * one * images
    with suppress(UserError):
        first = seconds(1)  # with what is done once
        step = max(seconds(3) - seconds(1), 0.0) / 2 or first
    return step * len(split.train) / images * config.epochs


def _seconds_per_pass(model: nn.Module, x: torch.Tensor) -> float:
    """Of one image, forward or backward: the faster of two tries."""
    tries = []
    with frozen_eval(model), torch.enable_grad():
        for _ in range(2):
            began = time.perf_counter()
            logits = as_outputs(model(x.detach().requires_grad_())).logits
            logits.sum().backward()
            float(logits.detach()[0, 0])  # waits for a GPU
            tries.append(time.perf_counter() - began)
    return min(tries) / (2 * max(len(x), 1))


def _words(seconds: float) -> str:
    """A time in words.

    >>> _words(42.4), _words(180), _words(40000)
    ('42 s', '3 min', '11.1 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
