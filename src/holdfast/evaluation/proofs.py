"""Proofs in an evaluation: what is proved leaves the attacks that have no accuracy of their own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..attacks.base import all_rows
from ..bounds import METHODS, ROWS, CannotBound, Certified, certify
from ..data import pixels
from ..progress import silent
from ..results import PROOF_METHODS, ProofCost, total_proofs
from .costs import add_cost
from .state import State, Task

CHEAP = "linear"  # the last method that is tried on all samples, before any attack
PROVED_BY = ("", *PROOF_METHODS)  # values of ``Evaluation.proved_by``
PART, PART_SECONDS = 16, 10.0  # samples that the stronger methods take at first, and what a later part should last


def rank(method: str) -> int:
    """How far up the ladder of METHODS a sample is once a method has come to its end: a value of ``Columns.tried``."""
    return METHODS.index("interval" if method == "lipschitz" else method) + 1


def certified(task: Task, rows: Tensor, method: str, seconds: float = math.inf) -> Certified | None:
    """What is proved of these samples; None if no bound of the network is known. Its forwards are counted.

    Args:
        task: the evaluation.
        rows: numbers of the samples.
        method: the last one that is tried.
        seconds: wall-clock time.
    """
    model, data = task.model.model, task.data.take(rows)
    if not isinstance(model, nn.Module) or pixels(data.x[:1]).dtype != torch.float32:
        return None

    report = silent if method == CHEAP else task.progress
    size = min(ROWS, task.batches.size)
    try:
        found = certify(model, data, task.threat, method=method, seconds=seconds, batch_size=size, progress=report)
    except CannotBound:
        return None
    task.model.forwards += found.forwards  # a hook that counts would make the model another one
    return found


def prove_all(task: Task, state: State) -> None:
    """Try the cheap methods on all images, before any attack; without a bound there are no columns of proofs."""
    rows, columns = all_rows(task.data.y), state.columns
    found = None if state.randomised else certified(task, rows, CHEAP)
    if found is not None:
        columns.certified = torch.zeros_like(columns.clean)
        columns.proved_by, columns.tried = torch.zeros_like(rows), torch.zeros_like(rows)
        keep(state, rows, found, CHEAP)


def prove_survivors(task: Task, state: State, save: Callable[[State], None]) -> None:
    """Try the stronger methods on what the individual attacks left, in parts, saving after each."""
    columns, size = state.columns, PART
    if columns.certified is not None and rank(task.proofs) > rank(CHEAP):
        if columns.tried is None:  # a checkpoint of before this column
            columns.tried = torch.full_like(columns.done, rank(CHEAP))
        waiting = torch.nonzero(state.open & (columns.tried < rank(task.proofs)))[:, 0]
        while len(waiting):
            began, rows = time.perf_counter(), waiting[:size]
            found = certified(task, rows, task.proofs)
            if found is None:
                break
            keep(state, rows, found, task.proofs)
            waiting, spent = waiting[size:], time.perf_counter() - began
            size = max(PART, min(ROWS, int(size * PART_SECONDS / max(spent, 1e-3))))
            add_cost(task, state, 0, began)
            save(state)
    state.proved = True


def keep(state: State, rows: Tensor, found: Certified, method: str) -> None:
    """Put what was proved of these samples into the columns, and what it cost into the account."""
    columns = state.columns
    if columns.certified is None or columns.tried is None:
        return
    proved = found.proved.to(rows.device) & columns.clean[rows]
    columns.certified[rows] |= proved
    if columns.proved_by is not None:
        by = torch.tensor([PROVED_BY.index(name) for name in found.by]).to(rows)
        columns.proved_by[rows] = torch.where(proved, by, columns.proved_by[rows])
    before = int(columns.tried[rows].min()) if len(rows) else 0
    ended = torch.where(found.ended.to(rows.device), rank(method), columns.tried[rows])
    columns.tried[rows] = torch.maximum(columns.tried[rows], ended)
    state.proofs = [*total_proofs([*state.proofs, *_without_repeats(found.costs, before, method)])]


def _without_repeats(costs: tuple[ProofCost, ...], before: int, method: str) -> list[ProofCost]:
    """The costs of a call of ``certify``: methods that these samples had before count as time of the first new one."""
    again = [cost for cost in costs if rank(cost.method) <= before]
    new = [cost for cost in costs if rank(cost.method) > before] or [ProofCost(method, 0, 0, 0.0)]
    return [replace(new[0], seconds=new[0].seconds + sum(cost.seconds for cost in again)), *new[1:]]


def proof_costs(task: Task, state: State) -> tuple[ProofCost, ...]:
    """What each method did and cost, as the columns count it; what is open and was not tried to the end, at the last.

    Only the columns know what an attack broke or another process proved.
    """
    columns = state.columns
    if columns.proved_by is None or columns.tried is None:
        return ()
    waiting = int((state.open & (columns.tried < rank(task.proofs))).sum())
    costs = [*state.proofs, *([ProofCost(task.proofs, 0, 0, 0.0)] if waiting else [])]
    counted = columns.proved_by.bincount(minlength=len(PROVED_BY)).tolist()
    return tuple(
        replace(cost, proved=counted[PROVED_BY.index(cost.method)], out_of_time=waiting * (cost.method == task.proofs))
        for cost in total_proofs(costs)
    )
