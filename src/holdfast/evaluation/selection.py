"""Which samples a stage attacks, and the spot check: full-length attacks on a few of the survivors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..noise import EvaluationStream
from ..results import SpotCheck
from .state import State, Task
from .suites import N_NEAREST, N_RANDOM

NEAR, RANDOM = 1, 2  # values of Columns.spot_check


def choose(task: Task, state: State, number: int) -> None:
    """Decide which samples a stage attacks, once, when it begins; a resumed stage reads it from its checkpoint."""
    if state.chosen_for != number:
        state.columns.chosen = _chosen(task, state, number).clone()
        state.chosen_for = number


def _chosen(task: Task, state: State, number: int) -> Tensor:
    stage, columns, left = state.stages[number], state.columns, state.open
    nobody = torch.zeros_like(left)
    if stage.individual:
        return columns.clean
    if stage.round > 1:
        previous = [k for k, other in enumerate(state.stages) if other.round == stage.round - 1]
        if not bool(state.broken_by_stages(previous).any()):
            return nobody
    if stage.after:
        named = [k for k, other in enumerate(state.stages) if stage.after in (other.name, other.subset)]
        if not bool(state.broken_by_stages(named).any()):
            return nobody
    if stage.subset == "nearest":
        return _nearest(state, stage.fraction)
    if stage.subset == "sampled":
        if not bool(columns.spot_check.any()):
            _draw_spot_check(task, state)
        return columns.spot_check > 0
    if stage.subset == "escalated":
        broken = columns.spot_check[state.broken_by_stages(_numbers(state, "sampled"))]
        if bool((broken == RANDOM).any()):
            chosen = left
        else:
            chosen = _nearest(state, stage.fraction) if bool((broken == NEAR).any()) else nobody
        return chosen & (columns.spot_check == 0)  # the spot check itself has had these attacks
    return left


def _numbers(state: State, subset: str) -> list[int]:
    """Numbers of the stages that attack this subset."""
    return [number for number, stage in enumerate(state.stages) if stage.subset == subset]


def _nearest(state: State, fraction: float) -> Tensor:
    """(N,) bool: this fraction of what is open, at least 32 samples, those with the smallest margins."""
    rows = torch.nonzero(state.open)[:, 0]
    count = max(math.ceil(fraction * len(rows)), N_NEAREST)
    chosen = torch.zeros_like(state.open)
    chosen[rows[state.columns.margin_adv[rows].argsort(stable=True)[:count]]] = True
    return chosen


def _draw_spot_check(task: Task, state: State) -> None:
    """Draw the open samples with the smallest margins, and others at random by the samples' own noise."""
    near = _nearest(state, 1e-9)
    rest = torch.nonzero(state.open & ~near)[:, 0]
    order = task.noise[rest].fold(EvaluationStream.SPOT_CHECK).uniform(()).argsort(stable=True)
    state.columns.spot_check[near] = NEAR
    state.columns.spot_check[rest[order[:N_RANDOM]]] = RANDOM
    state.n_rest = len(rest)


def spot_check_result(state: State) -> SpotCheck | None:
    """What the full-length attacks broke; None unless all of their stages have ended."""
    sampled, escalated = _numbers(state, "sampled"), _numbers(state, "escalated")
    if not sampled or sampled[-1] >= state.ended:
        return None
    drawn, broken = state.columns.spot_check, state.broken_by_stages(sampled)
    near, random = drawn == NEAR, drawn == RANDOM
    n_random, random_broken = int(random.sum()), int((random & broken).sum())
    if random_broken and escalated and escalated[-1] < state.ended:  # then the rest has been attacked as well
        n_random, random_broken = state.n_rest, random_broken + int(state.broken_by_stages(escalated).sum())
    return SpotCheck(int(near.sum()), int((near & broken).sum()), n_random, random_broken, state.n_rest)
