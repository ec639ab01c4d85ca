"""Whether the model answers at the end of an evaluation as at the beginning, and as a copy that was never queried."""

from __future__ import annotations

import copy
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attacks import ATTACKS
from ..attacks.base import all_rows, predict
from ..data import pixels
from ..queries import CountingModel, differs_off_data
from .costs import add_cost
from .state import State, Task

REPEATED = 32  # samples, drawn at random
REPEAT = 40_000  # noise stream of these samples and points


class FirstAnswers(NamedTuple):
    """What a model answered before it was queried for anything else.

    Attributes:
        rows: (M,) samples.
        points: (M, ...), a random point of each sample's threat.
        logits: (M, K) at these points.
        pristine: a copy of the model that has never been queried; None if it cannot be copied.
        counts: forwards, backwards and outputs that are not finite, of these queries.
    """

    rows: Tensor
    points: Tensor
    logits: Tensor
    pristine: nn.Module | None
    counts: tuple[int, int, Tensor | int]


def first_answers(task: Task) -> FirstAnswers:
    """Copy the model, and query it at a random point of a few samples' threats, before anything else is done."""
    model, pristine = task.model, copied(task.model.model)
    rows = task.noise.fold(REPEAT).uniform(()).argsort(stable=True)[:REPEATED]
    points = task.threat.random_start(pixels(task.data.x[rows]), task.noise[rows].fold(REPEAT, 1))
    logits = torch.cat(task.batches.map(all_rows(rows), lambda some: predict(model, points[some]).logits))
    counts = model.forwards, model.backwards, model.nonfinite
    model.forwards = model.backwards = model.nonfinite = 0
    return FirstAnswers(rows, points, logits, pristine, counts)


def copied(model: object) -> nn.Module | None:
    """A deep copy of a module; None for a function, whose state is out of reach, and where copying fails."""
    if not isinstance(model, nn.Module):
        return None
    try:
        return copy.deepcopy(model)
    except Exception:  # a lock, an open session, a tensor with a graph: the module's own error
        return None


class Repeated(NamedTuple):
    """``repeated``, ``changed`` and ``copy_differs`` of an Evaluation."""

    repeated: int
    changed: int
    copy_differs: int | None


def repeat(task: Task, state: State, first: FirstAnswers, *, counted: bool) -> Repeated:
    """Query the model again, and copies of it that have never been queried, at points of the threat.

    The points are the random ones of ``first``, the stored ``x_adv``, and the last iterates of a short ascent, which is
    where a gradient leads. Each kind gets a copy of its own: one that remembers images remembers none of these.

    Args:
        task: the evaluation.
        state: at its end.
        first: from its beginning.
        counted: whether the passes of both are added to the cost of the clean pass (in one process alone).

    Returns:
        How many samples were queried again, and how many of them changed.
    """
    began = time.perf_counter()
    repeated = Repeated(0, 0, None) if state.randomised else _repeated(task, state, first)
    model, (forwards, backwards, nonfinite) = task.model, first.counts
    if counted:
        model.forwards, model.backwards = model.forwards + forwards, model.backwards + backwards
        model.nonfinite = model.nonfinite + nonfinite
        add_cost(task, state, 0, began)
    model.forwards = model.backwards = model.nonfinite = 0
    return repeated


def _repeated(task: Task, state: State, first: FirstAnswers) -> Repeated:
    rows, noise = first.rows, task.noise[first.rows].fold(REPEAT, 2)

    def ascend(some: Tensor) -> Tensor:
        return ATTACKS["pgd"].attack(
            task.model,
            pixels(task.data.x[rows[some]]),
            task.data.y[rows[some]],
            task.threat,
            score=task.scores["matched"],
            noise=noise[some],
            steps=5,
            step_size=task.threat.eps / 2,
            iterate="last",
        )

    def answers(model: CountingModel, points: Tensor) -> Tensor:
        return torch.cat(task.batches.map(all_rows(rows), lambda some: predict(model, points[some]).logits))

    ascended = torch.cat(task.batches.map(all_rows(rows), ascend))
    changed = int(differs_off_data(first.logits, answers(task.model, first.points)).sum())
    if first.pristine is None:
        return Repeated(len(rows), changed, None)
    differs = torch.zeros_like(rows, dtype=torch.bool)
    for points in (first.points, state.columns.x_adv[rows], ascended):
        fresh = CountingModel(copy.deepcopy(first.pristine), task.model)
        differs |= differs_off_data(answers(fresh, points), answers(task.model, points))
    return Repeated(len(rows), changed, int(differs.sum()))
