"""What a candidate is worth: the model is asked again, whoever found it."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .. import mapped
from ..attacks.base import all_rows
from ..queries import judge_candidates
from .costs import add_cost
from .distributed import Processes, exchange_results
from .evaluation import UNBROKEN
from .state import BY_CANDIDATE, State, Task


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
    mapped.put(columns.x_adv, rows, x_adv, better)
    columns.margin_adv[rows] = torch.where(better, margin, columns.margin_adv[rows])
    columns.prediction_adv[rows] = torch.where(better, prediction, columns.prediction_adv[rows])
    columns.broken_by[rows] = torch.where(newly, number, columns.broken_by[rows])
    n_newly, n_outside = torch.stack([newly.sum(), (~inside).sum()]).tolist()  # the host waits for the device once
    return broken, n_newly, n_outside


def try_candidates(task: Task, state: State, processes: Processes) -> None:
    """Judge the images that were given, once, on what the individual attacks left."""
    given = task.candidates
    if given is None or state.tried:
        return

    def images(rows: Tensor) -> tuple[Tensor, Tensor]:
        x = task.data.pixels(rows)
        return x, mapped.take(given, rows, x.device).to(x)

    def moved(rows: Tensor) -> Tensor:
        x, candidates = images(rows)
        return (candidates != x).flatten(1).any(1)

    changed = task.batches.map(all_rows(task.data.y), moved)
    rows = torch.nonzero(state.open & torch.cat(changed))[:, 0]

    def batch(some: Tensor) -> None:
        began, (x, candidates) = time.perf_counter(), images(some)
        _, broken, outside = judge(task, state, BY_CANDIDATE, some, x, task.data.y[some], candidates)
        counts = {"attacked": len(some), "broken": broken, "outside": outside, "candidates": len(some)}
        add_cost(task, state, "given", began, **counts)

    task.batches.map(processes.mine(rows, task.batch_size), batch)
    if processes.count > 1:
        exchange_results(task, state, processes, rows)
    state.tried = True
