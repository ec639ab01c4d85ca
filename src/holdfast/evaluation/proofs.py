"""Proofs in an evaluation: what is proved leaves the attacks that have no accuracy of their own.

The cheap methods are tried on all images before any attack, the stronger ones on what the individual attacks leave, and
branch and bound on what all attacks leave. Processes share the samples.
"""

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
from ..mapped import CHUNK, is_mapped, rows_at_a_time
from ..results import PROOF_METHODS, ProofCost, total_proofs
from .costs import add_cost, seconds_spent, waits_for_branch
from .distributed import PROOF_COLUMNS, Processes, exchange
from .judging import judge
from .state import BY_BRANCH, State, Task

CHEAP = "linear"  # the last method that is tried on all samples, before any attack
PROVED_BY = ("", *PROOF_METHODS)  # values of ``Evaluation.proved_by``
PART, PART_SECONDS = 16, 10.0  # samples that the stronger methods take at first, and what a later part should last
# Of what is left of the budget: what the stronger bounds may take at most, and with branch and bound the attacks after
# them. Branch and bound gets the rest, and what it leaves goes to further attacks.
SHARE = 0.5
LEAST_SHARE = 4.0  # times what the bounds of a sample took: the least time that branch and bound gets for one
MORE = 1.2  # times as much time as before is worth another try of branch and bound, which begins anew
STOPPED = 0.9  # of its time: what ends sooner has no ReLU left to split, or no memory, and more time is of no use


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

    size = min(ROWS, task.batches.size)
    in_a_file = is_mapped(task.data.x)
    if in_a_file:  # bounds hold many copies of the images, in float64
        size = min(size, max(1, CHUNK // (8 * data.x[:1].numel())))
    cache = None if in_a_file or task.proofs == CHEAP else task.cache  # no later call would take the boxes from it
    try:
        found = certify(model, data, task.threat, method=method, seconds=seconds, batch_size=size, cache=cache)
    except CannotBound:
        return None
    task.model.forwards += found.forwards  # a hook that counts would make the model another one
    return found


def prove_all(task: Task, state: State, processes: Processes) -> None:
    """Try the cheap methods on all images; if no bound of the network is known, there are no columns of proofs."""
    columns = state.columns
    if columns.tried is None or bool((columns.tried > 0).all()):
        return
    began, rows = time.perf_counter(), processes.mine(all_rows(task.data.y), task.batch_size)
    known = True
    for part in rows.split(rows_at_a_time(task.data.x)) if len(rows) else [rows]:
        found = certified(task, part, CHEAP) if known else None
        known = found is not None
        if found is not None:
            keep(state, part, found, CHEAP)
    if not all(_exchange(state, processes, rows, known=known)):
        columns.expect_proofs(known=False)
        state.proofs = []
    add_cost(task, state, 0, began)


def prove_survivors(task: Task, state: State, save: Callable[[State], None], processes: Processes) -> None:
    """Try the stronger bounds on what the individual attacks left, in parts, saving after each."""
    if state.proved:
        return
    columns, method = state.columns, "alpha" if task.proofs == "branch" else task.proofs
    if state.until == math.inf and task.budget is not None:
        state.until = _share(task, state)
    if columns.certified is not None and rank(method) > rank(CHEAP):
        if columns.tried is None:  # a checkpoint of before this column
            columns.tried = torch.full_like(columns.done, rank(CHEAP))
            columns.given = torch.zeros_like(columns.done, dtype=torch.float64)
        every = torch.nonzero(state.open & (columns.tried < rank(method)))[:, 0]
        mine = processes.mine(every, PART)
        known, size, waiting = True, PART, mine
        while known and len(waiting) and (seconds := state.until - seconds_spent(state)) > 0:
            began, rows = time.perf_counter(), waiting[:size]
            found = certified(task, rows, method, seconds)
            known, took = found is not None, time.perf_counter() - began
            if found is not None:
                keep(state, rows, replace(found, ended=found.ended & (took < seconds)), method)
            waiting = waiting[size:]
            size = max(PART, min(ROWS, int(size * PART_SECONDS / max(took, 1e-3))))
            add_cost(task, state, 0, began)
            save(state)
            task.progress(f"proof: {method}", len(mine) - len(waiting), len(mine))
        known = all(_exchange(state, processes, mine, known=known))
        state.cut = known and bool((state.open & (columns.tried < rank(method))).any())
    state.proved = True
    if task.budget is not None:
        state.until = _share(task, state)


def _share(task: Task, state: State) -> float:
    """Seconds spent at which half of what is left of the budget is; infinite without a budget of time."""
    spent, seconds = seconds_spent(state), math.inf if task.budget is None else task.budget.seconds
    return spent + SHARE * max(0.0, seconds - spent)


def branch_survivors(task: Task, state: State, save: Callable[[State], None], processes: Processes) -> None:
    """Branch and bound on what is open, for all that is left of the budget, saving after each sample.

    Each sample gets an equal share of what is left, but no less than a few times what its bounds took. What it proves
    is certified, and an adversarial example that it meets is judged as any other candidate.
    """
    waits, columns = waits_for_branch(task, state), state.columns
    state.branched = True
    if not waits or task.budget is None or columns.tried is None or columns.given is None:
        return
    every = torch.nonzero(state.open & (columns.tried < rank("branch")))[:, 0]
    every = every[columns.margin_adv[every].argsort(descending=True, stable=True)]  # the likeliest proofs first
    waiting = mine = processes.mine(every, 1)
    least = LEAST_SHARE * sum(cost.seconds / max(1, cost.tried) for cost in state.proofs if cost.method == "alpha")
    while len(waiting):
        share = (task.budget.seconds - seconds_spent(state)) / len(waiting)
        again = waiting[MORE * columns.given[waiting] < share]
        for turn, row in enumerate(again):
            left = task.budget.seconds - seconds_spent(state)
            if left > 0:
                _branch(task, state, row[None], min(left, max(left / (len(again) - turn), least)))
                save(state)
                task.progress("proof: branch and bound", turn + 1, len(again))
        if not len(again) or task.budget.seconds <= seconds_spent(state):
            break
        waiting = waiting[state.open[waiting] & (columns.tried[waiting] < rank("branch"))]
    _exchange(state, processes, mine, known=True)


def _branch(task: Task, state: State, row: Tensor, seconds: float) -> None:
    """Branch and bound on one sample, (1,), for so many seconds."""
    columns, began = state.columns, time.perf_counter()
    if columns.given is None or columns.tried is None:
        return
    found = certified(task, row, "branch", seconds)
    took, first, broken, met = time.perf_counter() - began, int(columns.given[row] == 0), 0, 0
    columns.given[row] = seconds
    if found is None:
        columns.tried[row] = rank("branch")
    else:
        costs = tuple(replace(cost, tried=min(cost.tried, first), broken=0) for cost in found.costs)
        for image in [] if bool(found.proved[0]) else found.x_adv.values():
            x, y = task.data.pixels(row), task.data.y[row]
            broken, met = judge(task, state, BY_BRANCH, row, x, y, image[None].to(x))[1], 1
            costs = tuple(replace(cost, broken=broken * (cost.method == "branch")) for cost in costs)
        ended = found.ended | (took < STOPPED * seconds)
        keep(state, row, replace(found, ended=ended, costs=costs), "branch")
    add_cost(task, state, "branch", began, attacked=first, broken=broken, candidates=met)


def _exchange(state: State, processes: Processes, mine: Tensor, *, known: bool) -> list[bool]:
    """After this process's part of some proofs: exchange what was found. Returns whether each process has bounds."""
    columns = state.columns
    if processes.count == 1:
        return [known]
    names = (*PROOF_COLUMNS, "broken_by", "x_adv", "margin_adv", "prediction_adv")
    shared = {name: column for name in names if (column := getattr(columns, name)) is not None}
    return exchange(processes, shared, mine, known)


def keep(state: State, rows: Tensor, found: Certified, method: str) -> None:
    """Put what was proved of these samples into the columns, and what it cost into the account."""
    columns = state.columns
    if columns.certified is None or columns.tried is None:
        return
    by = torch.tensor([PROVED_BY.index(name) for name in found.by], dtype=torch.int64)
    by, reached = torch.stack([by * found.proved, found.ended * rank(method)]).to(rows.device)  # in one copy
    proved = (by > 0) & columns.clean[rows]
    columns.certified[rows] |= proved
    if columns.proved_by is not None:
        columns.proved_by[rows] = torch.where(proved, by, columns.proved_by[rows])
    before = int(columns.tried[rows].min()) if len(rows) else 0
    columns.tried[rows] = torch.maximum(columns.tried[rows], reached)
    state.proofs = [*total_proofs([*state.proofs, *_without_repeats(found.costs, before, method)])]


def _without_repeats(costs: tuple[ProofCost, ...], before: int, method: str) -> list[ProofCost]:
    """The costs of a call of ``certify``: methods that these samples had before count as time of the first new one."""
    again = [cost for cost in costs if rank(cost.method) <= before]
    new = [cost for cost in costs if rank(cost.method) > before] or [ProofCost(method, 0, 0, 0.0)]
    return [replace(new[0], seconds=new[0].seconds + sum(cost.seconds for cost in again)), *new[1:]]


def proof_costs(task: Task, state: State, processes: Processes) -> tuple[ProofCost, ...]:
    """What each method did and cost, over all processes: counts add up; the time is that of the slowest.

    What was proved is counted in the columns. What is open and was not tried to the end counts at the last method.
    """
    columns = state.columns
    if columns.proved_by is None or columns.tried is None:
        return ()
    parts = processes.gather(state.proofs) if processes.count > 1 else [state.proofs]
    waiting = int((state.open & (columns.tried < rank(task.proofs))).sum())
    last = [ProofCost(task.proofs, 0, 0, 0.0)] if waiting else []
    counted = columns.proved_by.cpu().bincount(minlength=len(PROVED_BY)).tolist()
    return tuple(
        replace(
            cost,
            proved=counted[PROVED_BY.index(cost.method)],
            seconds=max(sum(one.seconds for one in part if one.method == cost.method) for part in parts),
            out_of_time=waiting * (cost.method == task.proofs),
        )
        for cost in total_proofs([*(cost for part in parts for cost in part), *last])
    )
