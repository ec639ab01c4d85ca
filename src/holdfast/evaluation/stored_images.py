"""Adversarial images in a file of their own, which are written as they are found, and columns at each checkpoint.

An evaluation that was killed leaves images that are newer than its columns. What was done since is done again, with the
same noise, so that they agree in the end. All of them are then asked once more: rounding may have decided otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .. import mapped
from ..attacks.base import all_rows
from ..queries import OFF_DATA_TOLERANCE, judge_candidates
from .costs import add_cost
from .evaluation import UNBROKEN
from .state import BY_BRANCH, BY_CANDIDATE, State, Task


def begin_on_stored_images(state: State, save: Callable[..., None]) -> bool:
    """Say in the checkpoint that images may now be newer than columns. Returns whether they may have been before."""
    if not mapped.is_mapped(state.columns.x_adv):
        return False
    was = state.settled
    state.settled = False
    save(state, force=True)
    return not was


def settle_stored_images(task: Task, state: State, unsettled: bool) -> None:
    """At the end of an evaluation: its images and its columns agree; where they may not, the images are asked again.

    An image that fools the model breaks its sample. A sample whose image is lost counts as unbroken.

    Args:
        task: the evaluation.
        state: of the evaluation.
        unsettled: whether the evaluation began with images that may have been newer than the columns.
    """
    columns = state.columns
    if unsettled and not state.randomised:
        last = max(0, min(state.ended, len(state.stages)) - 1)
        began, before = time.perf_counter(), columns.broken_by.clone()
        task.batches.map(all_rows(task.data.y)[columns.clean], lambda rows: _ask(task, state, last, rows))
        if bool((before != columns.broken_by).any()):
            _recount(state)
        add_cost(task, state, last + 1, began)
    state.settled = True


def _ask(task: Task, state: State, last: int, rows: Tensor) -> None:
    """Ask the model about the stored images of some samples, and change the columns that are not about them."""
    columns, y = state.columns, task.data.y[rows]
    x, x_adv = task.data.pixels(rows), mapped.take(columns.x_adv, rows, task.data.y.device)
    judged = judge_candidates(task.model, x_adv, x, y, task.threat, state.votes)
    by, margin = columns.broken_by[rows], columns.margin_adv[rows]
    valid = judged.inside & judged.finite
    lost = ~valid | ((by != UNBROKEN) & ~judged.broken)
    moved = valid & ((judged.margin - margin).abs() > OFF_DATA_TOLERANCE * (1 + margin.abs()))
    found = judged.broken & (by == UNBROKEN)
    changed = moved | found
    mapped.put(columns.x_adv, rows, x.to(columns.x_adv.dtype), lost)
    columns.broken_by[rows] = torch.where(lost, UNBROKEN, torch.where(found, last, by))
    for name, now, clean in (
        ("margin_adv", judged.margin, columns.margin[rows]),
        ("prediction_adv", judged.prediction, columns.prediction[rows]),
    ):
        column = getattr(columns, name)
        column[rows] = torch.where(lost, clean, torch.where(changed, now, column[rows]))


def _recount(state: State) -> None:
    """What each stage broke, from the column."""
    by = state.columns.broken_by
    for number, cost in enumerate(state.costs[1:]):
        state.costs[number + 1] = replace(cost, broken=int((by == number).sum()))
    state.branch = replace(state.branch, broken=int((by == BY_BRANCH).sum()))
    state.given = replace(state.given, broken=int((by == BY_CANDIDATE).sum()))
