"""What a candidate is worth: the model is asked again, whoever found it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..queries import judge_candidates
from ..threat import column
from .evaluation import UNBROKEN
from .state import State, Task


def judge(
    task: Task, state: State, number: int, rows: Tensor, x: Tensor, y: Tensor, x_adv: Tensor
) -> tuple[Tensor, int, int]:
    """Query the model at the candidates and update the columns.

    A candidate breaks its sample if it lies in the threat and is misclassified: by one more output of the model, or by
    the majority of many outputs of a randomised one.

    Returns:
        (which candidates break their sample, number of samples newly broken, number of candidates outside the threat).
    """
    columns = state.columns
    broken, inside, finite, margin, prediction = judge_candidates(task.model, x_adv, x, y, task.threat, state.votes)
    unbroken = columns.broken_by[rows] == UNBROKEN
    newly = broken & unbroken
    better = inside & finite & (newly | (margin < columns.margin_adv[rows]))
    if state.randomised:  # a mean margin proves nothing: a sample broken by majority keeps its witness
        better &= newly | unbroken
    columns.x_adv[rows] = torch.where(column(better, x), x_adv, columns.x_adv[rows])
    columns.margin_adv[rows] = torch.where(better, margin, columns.margin_adv[rows])
    columns.prediction_adv[rows] = torch.where(better, prediction, columns.prediction_adv[rows])
    columns.broken_by[rows] = torch.where(newly, number, columns.broken_by[rows])
    n_newly, n_outside = torch.stack([newly.sum(), (~inside).sum()]).tolist()  # the host waits for the device once
    return broken, n_newly, n_outside
